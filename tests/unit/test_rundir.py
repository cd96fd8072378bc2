"""A run's directory belongs to one experiment; what changes no result may change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from babyllama_ds.errors import RunError
from babyllama_ds.rundir import RunDirectory, differing_keys
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.storages import Storages
from babyllama_ds.store import Store, link_entry

JobOf = Callable[..., JobSpec]

LLAMA = "{kind: llama, hidden_size: 32, num_layers: 2, num_heads: 4, intermediate_size: 48}"
JOBS = {
    "nursery": "{kind: nursery}",
    "files": "{kind: files, train: [/data/*.train], split: {kind: held_out, dev: [/data/*.dev]}}",
}
JOB = f"""
name: one
corpus: CORPUS
tokenizer: {{kind: bpe, vocab_size: 800}}
windows: {{length: 64}}
teachers:
  - name: gpt2
    model: {{kind: gpt2, hidden_size: 32, num_layers: 2, num_heads: 4}}
    training: &training {{batch_windows: 32, epochs: 4, learning_rate: 2e-3}}
  - name: llama
    model: {LLAMA}
    training: *training
student:
  model: {LLAMA}
  training: *training
control: {{}}
distillation: {{alpha: 0.5}}
"""
OTHER_TEACHERS = "[{name: loaded, model: {kind: pretrained, path: /models/a}}]"


@pytest.fixture
def job_of(tmp_path: Path) -> JobOf:
    """A job on a corpus of the kind, changed by overrides."""

    def load(corpus: str, *overrides: str) -> JobSpec:
        path = tmp_path / "job.yaml"
        path.write_text(JOB.replace("CORPUS", JOBS[corpus]))
        return load_job(path, overrides, environ={})

    return load


@pytest.fixture
def empty(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "one")


@pytest.fixture
def directory(empty: RunDirectory) -> RunDirectory:
    """One that holds work already: only there is another experiment refused."""
    empty.path.mkdir(parents=True)
    (empty.path / "metrics.jsonl").touch()
    return empty


def test_the_resolved_job_is_written_and_reads_back(job_of: JobOf, directory: RunDirectory) -> None:
    job = job_of("nursery", "student.training.epsilon=1e-9")
    directory.open(job)
    assert load_job(directory.path / "job.yaml", environ={}) == job
    directory.open(job)


@pytest.mark.parametrize("name", ["nursery", "files"])
def test_the_same_job_may_be_opened_again(
    job_of: JobOf, name: str, directory: RunDirectory
) -> None:
    directory.open(job_of(name))
    directory.open(job_of(name))


def test_a_job_with_dollar_signs_may_be_opened_again(
    job_of: JobOf, directory: RunDirectory
) -> None:
    """They are escaped in the file: no token of the job is another for it."""
    job = job_of("nursery", 'student.training.unlabelled_tokens=["$$", "$${x}$$"]')
    assert job.student.training.unlabelled_tokens == ("$", "${x}$")
    directory.open(job)
    directory.open(job)


def test_what_was_settled_is_kept_for_later_starts(directory: RunDirectory) -> None:
    assert directory.settled() == {}
    directory.settle("student on 2 cpu ranks", {"micro_batch": 4})
    directory.settle("control on 2 cpu ranks", {"micro_batch": 8})
    directory.settle("student on 2 cpu ranks", {"micro_batch": 4, "compile": "all"})
    assert RunDirectory(directory.path).settled() == {
        "student on 2 cpu ranks": {"micro_batch": 4, "compile": "all"},
        "control on 2 cpu ranks": {"micro_batch": 8},
    }


# -- what may change -------------------------------------------------------------------------------

FREE = {
    "nursery": [
        "student.training.micro_batch=4",
        "student.training.micro_batch=auto",
        "teachers.gpt2.training.micro_batch=2",
        "student.training.log_every_steps=1",
        "student.training.checkpoint_every_steps=5",
        "teachers.0.model.attention=eager",
        "student.model.attention=sdpa",
        "teachers.llama.tensor_parallel=2",
        "distillation.chunk_tokens=64",
        "distillation.cache_tier=host",
        "distillation.cache_kept=false",
        "distillation.cache_top_k=8",
        "deepspeed.device=cpu",
        "deepspeed.config=zero2_cpu",
        "deepspeed.compile=all",
        "deepspeed.join_timeout_minutes=0.5",
        "deepspeed.node_timeout_minutes=60",
        "deepspeed.storage=node",
        "evaluation.batch_tokens=100",
        "evaluation.leading_space=false",
        "evaluation.max_pairs_per_task=3",
        "evaluation.minimal_pairs=[{name: more, path: /pairs}]",
    ],
    "files": [
        'corpus.train=["/elsewhere/*.train"]',
        'corpus.train=["/a.train", "/b.train"]',
        'corpus.split.dev=["/elsewhere/*.dev"]',
        "corpus.column=body",
    ],
}


@pytest.mark.parametrize(
    ("name", "override"), [(name, override) for name in FREE for override in FREE[name]]
)
def test_what_changes_no_model_may_change(
    job_of: JobOf, name: str, override: str, directory: RunDirectory
) -> None:
    directory.open(job_of(name))
    changed = job_of(name, override)
    assert changed != job_of(name)
    directory.open(changed)
    assert load_job(directory.path / "job.yaml", environ={}) == changed


@pytest.mark.parametrize(
    "change", ["teachers.0.model.path=/models/elder", "teachers.0.model.revision=v1"]
)
def test_a_loaded_model_is_compared_by_what_it_is(
    job_of: JobOf, change: str, directory: RunDirectory
) -> None:
    elder = "teachers.0={name: elder, model: {kind: pretrained, path: someone/elder}}"
    directory.open(job_of("nursery", elder))
    (directory.path / "student").mkdir()
    directory.open(job_of("nursery", elder, change))


PHASES = "windows.offsets={phases: 2}"


def test_teachers_may_be_remembered_from_the_next_start_on(
    job_of: JobOf, directory: RunDirectory
) -> None:
    directory.open(job_of("nursery", PHASES))
    directory.open(job_of("nursery", PHASES, "distillation.cache=hidden"))
    directory.open(job_of("nursery", PHASES))


def test_their_top_k_are_another_experiment(job_of: JobOf, directory: RunDirectory) -> None:
    def open_with(*overrides: str) -> None:
        directory.open(job_of("nursery", PHASES, *overrides))

    open_with("distillation.cache=hidden")
    with pytest.raises(RunError, match=r"distillation\.cache: got 'none or hidden' in the run"):
        open_with("distillation.cache=topk")
    other = RunDirectory(directory.path.with_name("other"))
    other.open(job_of("nursery", PHASES, "distillation.cache=topk"))
    (other.path / "metrics.jsonl").touch()
    with pytest.raises(RunError, match=r"distillation\.cache_top_k: got 64 in the run"):
        other.open(
            job_of("nursery", PHASES, "distillation.cache=topk", "distillation.cache_top_k=8")
        )


def test_paths_of_models_and_tokenizers_may_change(job_of: JobOf, directory: RunDirectory) -> None:
    def job(path: str) -> JobSpec:
        return job_of(
            "nursery",
            f"tokenizer={{kind: pretrained, path: {path}}}",
            f"student.model={{kind: pretrained, path: {path}}}",
            f"teachers=[{{name: a, model: {{kind: pretrained, path: {path}}}}}]",
        )

    directory.open(job("/models/here"))
    directory.open(job("/models/moved"))


# -- what may not ----------------------------------------------------------------------------------

MATTERS = {
    "nursery": [
        ("seed=2", ["seed"]),
        ("name=another", ["name"]),
        ("corpus.words=2000", ["corpus.words"]),
        ("tokenizer.vocab_size=700", ["tokenizer.vocab_size"]),
        ("windows.length=32", ["windows.length"]),
        ("windows.offsets=fixed", ["windows.offsets"]),
        ("student.training.epochs=7", ["student.training.epochs"]),
        ("student.training.betas=[0.8, 0.999]", ["student.training.betas[0]"]),
        ("student.training.clip_norm=null", ["student.training.clip_norm"]),
        ("student.training.keep=last", ["student.training.keep"]),
        ("student.training.evaluate_every_steps=3", ["student.training.evaluate_every_steps"]),
        ("student.model.hidden_size=64", ["student.model.hidden_size"]),
        ("student.seed=5", ["student.seed"]),
        ("teachers.gpt2.weight=2", ["teachers[0].weight"]),
        ("teachers.llama.name=other", ["teachers[1].name"]),
        ("distillation.alpha=0.4", ["distillation.alpha"]),
        ("distillation.soft_reduction=token", ["distillation.soft_reduction"]),
        ("control.training={batch_windows: 8, epochs: 1, learning_rate: 0.1}", None),
        (f"teachers={OTHER_TEACHERS}", None),
    ],
    "files": [
        ("corpus.cleaning=none", ["corpus.cleaning"]),
        ("corpus.split={kind: tail}", ["corpus.split.fraction", "corpus.split.kind"]),
    ],
}


@pytest.mark.parametrize(
    ("name", "override", "keys"),
    [(name, override, keys) for name in MATTERS for override, keys in MATTERS[name]],
)
def test_another_experiment_is_refused_and_its_keys_named(
    job_of: JobOf, name: str, override: str, keys: list[str] | None, directory: RunDirectory
) -> None:
    directory.open(job_of(name))
    before = (directory.path / "job.yaml").read_bytes()
    with pytest.raises(RunError) as caught:
        directory.open(job_of(name, override))
    named = [problem.where.removeprefix(f"{directory.path}: ") for problem in caught.value.problems]
    if keys is None:  # a whole part: all that is in it
        assert {re.split(r"[.[]", key)[0] for key in named} == {
            override.partition("=")[0].split(".")[0]
        }
        assert len(named) > 3
    else:
        assert named == keys
    assert (directory.path / "job.yaml").read_bytes() == before


def test_all_differences_are_told_with_both_values(job_of: JobOf, directory: RunDirectory) -> None:
    directory.open(job_of("nursery"))
    with pytest.raises(RunError) as caught:
        directory.open(job_of("nursery", "seed=2", "distillation.alpha=0.25"))
    alpha, seed = caught.value.problems
    assert alpha.got == "0.5 in the run that is there"
    assert alpha.expected == "0.25, as this job says"
    assert seed.got == "1 in the run that is there"
    assert "another `name`" in (seed.hint or "")


def test_values_are_told_as_a_job_writes_them(job_of: JobOf, directory: RunDirectory) -> None:
    directory.open(job_of("nursery"))
    changed = ("student.training.max_steps=9", "student.model.tied_embeddings=true")
    with pytest.raises(RunError) as caught:
        directory.open(job_of("nursery", *changed))
    tied, steps = caught.value.problems
    assert (tied.got, tied.expected) == (
        "false in the run that is there",
        "true, as this job says",
    )
    assert steps.got == "null in the run that is there"


def test_a_job_that_failed_before_it_trained_may_be_corrected(
    job_of: JobOf, empty: RunDirectory
) -> None:
    empty.open(job_of("nursery", "tokenizer.vocab_size=700"))
    empty.claim_stage("tokenizer", "a" * 64, made_from="the text")
    empty.settle("student on 2 cpu ranks", {"micro_batch": 4})
    corrected = job_of("nursery")
    empty.open(corrected)
    assert load_job(empty.path / "job.yaml", environ={}) == corrected
    empty.claim_stage("tokenizer", "b" * 64, made_from="the text")
    assert empty.settled() == {}


@pytest.mark.parametrize("work", ["checkpoints", "teachers", "student", "control", "evaluation"])
def test_one_with_any_work_may_not(job_of: JobOf, empty: RunDirectory, work: str) -> None:
    empty.open(job_of("nursery", "tokenizer.vocab_size=700"))
    (empty.path / work).mkdir()
    with pytest.raises(RunError, match=r"tokenizer\.vocab_size: got 700"):
        empty.open(job_of("nursery"))


def test_differing_keys_by_hand() -> None:
    theirs = {"a": {"b": 1, "c": [1, 2]}, "evaluation": {"x": 1}, "only": None, "gone": 3}
    ours = {"a": {"b": 2, "c": [1]}, "evaluation": {"x": 2}, "new": "n"}
    assert list(differing_keys(theirs, ours)) == [
        ("a.b", 1, 2),
        ("a.c[1]", 2, None),
        ("gone", 3, None),
        ("new", None, "n"),
    ]


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"", b"- a\n- b\n", b"text"])
def test_a_job_that_cannot_be_read_is_an_error(
    job_of: JobOf, content: bytes, empty: RunDirectory
) -> None:
    empty.path.mkdir(parents=True)
    (empty.path / "job.yaml").write_bytes(content)
    with pytest.raises(RunError, match="expected the job of the run that is there") as caught:
        empty.open(job_of("nursery"))
    assert caught.value.problems[0].where == str(empty.path / "job.yaml")
    assert (empty.path / "job.yaml").read_bytes() == content


def test_an_unwritable_directory_is_an_error(job_of: JobOf, empty: RunDirectory) -> None:
    empty.path.parent.mkdir(parents=True)
    empty.path.write_text("a file")
    with pytest.raises(RunError, match="expected a place that can be written"):
        empty.open(job_of("nursery"))


# -- stages and state ------------------------------------------------------------------------------


def test_a_stage_is_claimed_once(empty: RunDirectory) -> None:
    empty.path.mkdir(parents=True)
    empty.claim_stage("student", "a" * 64, made_from="its teachers")
    empty.claim_stage("control", "b" * 64, made_from="its text")
    empty.claim_stage("student", "a" * 64, made_from="its teachers")
    with pytest.raises(RunError) as caught:
        empty.claim_stage("student", "c" * 64, made_from="its teachers")
    (problem,) = caught.value.problems
    assert problem.where == f"{empty.path}: student"
    assert problem.got == "fingerprint aaaaaaaaaaaa in the run that is there"
    assert problem.expected == "cccccccccccc: its teachers changed since"
    stages = json.loads((empty.path / "stages.json").read_text())
    assert stages == {"student": "a" * 64, "control": "b" * 64}


def test_the_state_is_the_last_one_set(directory: RunDirectory) -> None:
    directory.set_state("running", pid=1)
    directory.set_state("stopped", reason="SIGTERM")
    state = json.loads((directory.path / "state.json").read_text())
    assert state == {"status": "stopped", "reason": "SIGTERM"}


def test_a_run_of_before_an_option_came_goes_on(tmp_path: Path, job_of: JobOf) -> None:
    """Its `job.yaml` does not name the option; the job that does has it at its default."""
    directory = RunDirectory(tmp_path / "runs" / "one")
    directory.open(job_of("nursery"))
    (directory.path / "metrics.jsonl").touch()
    path = directory.path / "job.yaml"
    old = yaml.safe_load(path.read_text())
    del old["windows"]["order"], old["student"]["training"]["gradient_checkpointing"]
    del old["student"]["model"]["attention_dropout"]
    path.write_text(yaml.safe_dump(old))
    directory.open(job_of("nursery"))
    path.write_text(yaml.safe_dump(old))
    with pytest.raises(RunError, match=r"windows\.order: got 'seeded' in the run that is there"):
        directory.open(job_of("nursery", "windows.order=published"))


def linked(directory: RunDirectory, store: Store, *names: str) -> None:
    """Links of a run into the store, in which nothing is."""
    for name in names:
        link_entry(store.root / KINDS[name.split("/")[0]] / "key", directory.path / name)


KINDS = {"tokenizer": "tokenizers", "tokens": "tokens", "teachers": "teachers"}


def lost(directory: RunDirectory, store: Store, *trained: str) -> list[str]:
    """Which of these teachers are named as lost."""
    try:
        directory.check_store(trained, store, Storages())
    except RunError as error:
        return [str(Path(problem.where).relative_to(directory.path)) for problem in error.problems]
    return []


def test_a_store_that_was_left_behind(empty: RunDirectory) -> None:
    store = Store(empty.path.parent / "store")
    assert lost(empty, store, "a", "b") == []  # a run that begins
    linked(empty, store, "tokenizer", "tokens")
    assert lost(empty, store, "a", "b") == []  # no teacher yet
    linked(empty, store, "teachers/b")
    assert lost(empty, store, "a", "b") == ["teachers/b"]
    linked(empty, store, "teachers/a")
    assert lost(empty, store, "a", "b") == ["teachers/a", "teachers/b"]
    assert lost(empty, store) == []  # loaded, not trained
    store.build("tokens", "key", lambda folder: (folder / "x").touch())
    assert lost(empty, store, "a", "b") == []  # it is here, without what was deleted of it


def test_a_run_that_was_moved_within_reach_of_its_store(empty: RunDirectory) -> None:
    """Its links lead nowhere, and are made again where `--runs` has the entries."""
    store = Store(empty.path.parent / "store")
    linked(empty, store, "tokenizer", "tokens", "teachers/a")
    other = RunDirectory(empty.path.parent.parent / "deep" / "below" / "one")
    other.path.parent.mkdir(parents=True)
    empty.path.rename(other.path)
    assert lost(other, store, "a") == ["teachers/a"]
    store.build("teachers", "key", lambda folder: (folder / "x").touch())
    assert lost(other, store, "a") == []
