"""Seeds, names, and validators seen from Python."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from babyllama_ds.errors import JobError
from babyllama_ds.spec.job import JobSpec, derive_seed
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.models import LlamaModel
from babyllama_ds.spec.shipped import find_job


def job(**changes: Any) -> JobSpec:
    training = {"batch_windows": 4, "epochs": 1, "learning_rate": 1e-3}
    model = {"kind": "pretrained", "path": "x"}
    data = {
        "name": "run-{seed}-a",
        "seed": 5,
        "corpus": {"kind": "nursery"},
        "tokenizer": {"kind": "bpe"},
        "teachers": [{"name": "one", "model": model}, {"name": "two", "model": model, "seed": 42}],
        "student": {"model": model, "training": training},
        **changes,
    }
    return JobSpec.model_validate_json(json.dumps(data))


def test_run_name_holds_the_seed() -> None:
    assert job().run_name == "run-5-a"


def test_stages_have_seeds_of_their_own_and_the_control_the_students() -> None:
    spec = job()
    assert spec.stage_seed("teachers/two") == 42
    assert spec.stage_seed("teachers/one") == derive_seed(5, "teachers/one")
    assert spec.stage_seed("control") == spec.stage_seed("student") == derive_seed(5, "student")
    assert spec.stage_seed("corpus") == derive_seed(5, "corpus")
    assert len({derive_seed(s, n) for s in range(50) for n in ("student", "corpus")}) == 100


def test_seeds_are_the_same_everywhere() -> None:
    # The first eight bytes of `printf 1/student | sha256sum`, less the last bit.
    assert derive_seed(1, "student") == 0x32B65B83B45FB5B7 >> 1


def test_the_nurserys_pairs_keep_their_name() -> None:
    """Others of that name would be left out in silence: the report has one benchmark of a name."""
    evaluation = {
        "minimal_pairs": [{"name": "blimp", "path": "x"}, {"name": "nursery", "path": "y"}]
    }
    with pytest.raises(ValidationError, match=r"minimal_pairs\.1\.name: got 'nursery'"):
        job(evaluation=evaluation)
    split = {"kind": "tail"}
    files = {"kind": "files", "train": ["a.txt"], "split": split}
    assert len(job(evaluation=evaluation, corpus=files).evaluation.minimal_pairs) == 2


def test_milestones_are_measured_as_finished_models_but_for_what_is_said() -> None:
    student = job().student.model_dump(mode="json") | {"milestones": [9]}
    suite = {"name": "glue", "path": "g"}
    evaluation = {"max_pairs_per_task": 500, "dev_windows": 70, "samples": 3, "prefix": "bos"}
    evaluation |= {"fine_tuning": [suite], "milestones": {"max_pairs_per_task": 200}}
    asked = job(student=student, evaluation=evaluation).evaluation
    found = asked.of_milestones()
    assert found is not None
    changed = {"max_pairs_per_task": 200, "samples": 0, "fine_tuning": (), "milestones": None}
    assert found.model_dump() == asked.model_dump() | changed
    assert job(student=student).evaluation.of_milestones() is None


@pytest.mark.parametrize("value", ["20k", "20000"])
def test_milestones_that_are_no_list_are_told_of_one(value: str) -> None:
    with pytest.raises(JobError, match="expected a list, or 'babylm', or null"):
        load_job(find_job("nursery"), [f"student.milestones={value}"])


@pytest.mark.parametrize("control", [None, {}])
def test_milestones_that_nobody_keeps_are_not_measured(control: dict[str, Any] | None) -> None:
    expected = r"milestones: got milestones to measure, expected none: none are kept"
    with pytest.raises(ValidationError, match=expected):
        job(control=control, evaluation={"milestones": {}})
    assert job(control={"milestones": [9]}, evaluation={"milestones": {}}).evaluation.milestones


def test_a_job_is_frozen() -> None:
    with pytest.raises(ValidationError):
        job().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("offsets", "phases"), [("fixed", 1), ("random", None), ({"phases": 3}, 3), ({"phases": 1}, 1)]
)
def test_offsets_are_words_or_phases(offsets: Any, phases: int | None) -> None:
    assert job(windows={"length": 64, "offsets": offsets}).windows.num_phases == phases


def test_one_phase_and_fixed_are_one_experiment() -> None:
    one, fixed = (job(windows={"offsets": word}) for word in ({"phases": 1}, "fixed"))
    assert one == fixed
    assert one.model_dump(mode="json")["windows"]["offsets"] == "fixed"


@pytest.mark.parametrize("cache", ["hidden", "topk"])
def test_a_cache_of_random_windows_is_refused(cache: str) -> None:
    with pytest.raises(ValidationError) as caught:
        job(distillation={"cache": cache})
    (mismatch,) = caught.value.errors()[0]["ctx"]["error"].mismatches
    assert str(mismatch) == (
        f"cache: got {cache}, expected none, since windows.offsets are random: "
        "no window comes twice"
    )
    assert mismatch.hint == "set windows.offsets={phases: K}, K up to 1 (the epochs)"
    assert job(distillation={"cache": cache}, windows={"offsets": "fixed"})


def test_a_cache_on_the_disk_is_kept() -> None:
    fleeting = {"cache": "hidden", "cache_kept": False}
    assert job(distillation=fleeting, windows={"offsets": "fixed"})
    with pytest.raises(ValidationError) as caught:
        job(distillation={**fleeting, "cache_tier": "disk"}, windows={"offsets": "fixed"})
    (mismatch,) = caught.value.errors()[0]["ctx"]["error"].mismatches
    assert str(mismatch) == "cache_kept: got false with cache_tier: disk, expected true"
    assert "cache_tier=auto" in (mismatch.hint or "")


def test_phases_that_no_epoch_reaches_are_refused() -> None:
    training = {"batch_windows": 4, "epochs": 2.5, "learning_rate": 1e-3}
    student = {"model": {"kind": "pretrained", "path": "x"}, "training": training}

    def with_phases(number: int) -> JobSpec:
        windows = {"offsets": {"phases": number}}
        return job(student=student, windows=windows, distillation={"cache": "hidden"})

    assert with_phases(3)
    with pytest.raises(ValidationError, match=r"hidden over 4 phases, expected at most as many "):
        with_phases(4)
    assert job(student=student, windows={"offsets": {"phases": 4}})  # without a cache it may be


def test_what_is_asked_of_documents_needs_their_boundaries() -> None:
    asked = {
        "tokenizer": {"kind": "bpe", "document_tokens": "both"},
        "windows": {"attention": "document"},
    }
    with pytest.raises(ValidationError) as caught:
        job(**asked)
    mismatches = [
        mismatch for error in caught.value.errors() for mismatch in error["ctx"]["error"].mismatches
    ]
    dropped = "since corpus.documents is none: boundaries are dropped"
    assert list(map(str, mismatches)) == [
        f"document_tokens: got both, expected none, {dropped}",
        f"attention: got document, expected window, {dropped}",
    ]
    assert {one.hint for one in mismatches} == {"set corpus.documents to what a document is"}
    loaded = {"kind": "pretrained", "path": "x", "document_tokens": "end"}
    with pytest.raises(ValidationError, match="document_tokens: got end, expected none"):
        job(tokenizer=loaded)
    kept = {"kind": "nursery", "documents": "lines"}
    assert job(corpus=kept, **asked)
    assert job(corpus=kept, windows=asked["windows"], tokenizer=loaded)
    # Under `sequence` too: documented, and not refused.
    assert job(corpus=kept, **asked, distillation={"soft_reduction": "sequence"})


def test_mismatches_read_well_without_a_file() -> None:
    with pytest.raises(ValidationError, match=r"hidden_size: got 10, expected a multiple of num_"):
        LlamaModel(kind="llama", hidden_size=10, num_layers=1, num_heads=3, intermediate_size=4)


# -- teachers split over ranks ---------------------------------------------------------------------

LLAMA = {
    "kind": "llama",
    "hidden_size": 48,
    "num_layers": 1,
    "num_heads": 6,
    "num_kv_heads": 2,
    "intermediate_size": 40,
}


def with_split(parts: int, *, micro_batch: Any = None, **changes: Any) -> JobSpec:
    training = {"batch_windows": 4, "epochs": 1, "learning_rate": 1e-3, "micro_batch": micro_batch}
    model = {"kind": "pretrained", "path": "x"}
    teachers = [{"name": "one", "model": model, "tensor_parallel": parts}]
    student = {"model": model, "training": training}
    return job(**{"teachers": teachers, "student": student, **changes})


def problems(**changes: Any) -> list[tuple[Any, str]]:
    with pytest.raises(ValidationError) as caught:
        with_split(2, **changes)
    return [(error["loc"], error["msg"]) for error in caught.value.errors()]


def test_a_micro_batch_is_not_tried_out_with_a_split_teacher() -> None:
    """A rank that finds no memory would leave the others of its group waiting."""
    assert with_split(1, micro_batch="auto").student.training.micro_batch == "auto"
    assert with_split(2, micro_batch=2).teachers[0].tensor_parallel == 2
    ((loc, message),) = problems(micro_batch="auto")
    assert loc == ("student",)
    assert "training.micro_batch: got auto, expected a number, since teachers.one is" in message


def test_a_split_teacher_is_not_fine_tuned() -> None:
    """A copy has to fit one rank."""
    suite = {"name": "glue", "path": "x"}
    alone = {"fine_tuning": [{**suite, "teachers": False}]}
    assert with_split(2, evaluation=alone).evaluation.suites_of(teacher=True) == ()
    assert with_split(1, evaluation={"fine_tuning": [suite]}).evaluation.suites_of(teacher=True)
    ((loc, message),) = problems(evaluation={"fine_tuning": [suite]})
    assert loc == ("evaluation",)
    assert "fine_tuning.0.teachers: got true, expected false, since teachers.one is" in message


def test_a_tilde_in_a_benchmarks_path_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/mara")
    of_name = {"name": "one", "path": "~/eval"}
    read = job(evaluation={"minimal_pairs": [of_name], "fine_tuning": [of_name]}).evaluation
    assert (read.minimal_pairs[0].path, read.fine_tuning[0].path) == ("/home/mara/eval",) * 2


def test_a_task_has_its_own_settings_or_else_the_suites() -> None:
    tasks = [{"name": "cola", "epochs": 3}, {"name": "wsc", "learning_rate": 5e-7, "batch_size": 1}]
    suite = {"name": "glue", "path": "x", "tasks": tasks, "epochs": 6}
    (read,) = job(evaluation={"fine_tuning": [suite]}).evaluation.fine_tuning
    assert read.settings_of("cola") == (5e-5, 64, 3)
    assert read.settings_of("wsc") == (5e-7, 1, 6)
    assert read.settings_of("rte") == (5e-5, 64, 6)
    with pytest.raises(ValidationError, match=r"1\.name: got 'cola', expected a name of its own"):
        job(evaluation={"fine_tuning": [{**suite, "tasks": [{"name": "cola"}] * 2}]})
    with pytest.raises(ValidationError, match=r"1\.name: got 'glue', expected a name of its own"):
        job(evaluation={"fine_tuning": [suite, suite]})


def test_a_suite_without_tasks_is_refused() -> None:
    """It would have no score to tell, after all training."""
    suite = {"name": "glue", "path": "x", "tasks": []}
    with pytest.raises(ValidationError, match="should have at least 1 item"):
        job(evaluation={"fine_tuning": [suite]})


def test_settings_of_a_task_without_a_training_are_refused() -> None:
    """The report would tell of epochs that mnli-mm's classifier, which is mnli's, never had."""
    tasks = [{"name": "mnli", "epochs": 2}, {"name": "mnli-mm"}]
    suite = {"name": "glue", "path": "x", "tasks": tasks}
    assert job(evaluation={"fine_tuning": [suite]}).evaluation.fine_tuning[0].tasks is not None
    with pytest.raises(ValidationError, match=r"1\.epochs: got 3, expected nothing"):
        job(evaluation={"fine_tuning": [{**suite, "tasks": [tasks[0], {**tasks[1], "epochs": 3}]}]})


@pytest.mark.parametrize("compiled", ["auto", "none", "student"])
def test_split_teachers_are_not_compiled(compiled: str) -> None:
    assert with_split(1, deepspeed={"compile": "all"}).deepspeed.compile == "all"
    assert with_split(2, deepspeed={"compile": compiled}).deepspeed.compile == compiled
    ((loc, message),) = problems(deepspeed={"compile": "all"})
    assert loc == ("deepspeed",)
    assert "compile: got all, expected student, none or auto, since teachers.one is" in message


@pytest.mark.parametrize(
    ("parts", "changes", "expected"),
    [
        (2, {}, None),
        (4, {}, "got 4 for a model whose num_heads is 6, expected a divisor of 6"),
        (6, {}, "got 6 for a model whose num_kv_heads is 2, expected a divisor of 2"),
        (3, {"num_kv_heads": None}, "whose intermediate_size is 40, expected a divisor of 40"),
        (6, {"num_kv_heads": None, "intermediate_size": 42}, None),
    ],
)
def test_a_teacher_trained_here_is_dealt_out_in_equal_parts(
    parts: int, changes: dict[str, Any], expected: str | None
) -> None:
    training = {"batch_windows": 4, "epochs": 1, "learning_rate": 1e-3}
    one = {"name": "one", "model": {**LLAMA, **changes}, "training": training}
    teachers = [{**one, "tensor_parallel": parts}]
    if expected is None:
        assert job(teachers=teachers, windows={"length": 64}).teachers[0].tensor_parallel == parts
        return
    with pytest.raises(ValidationError, match="tensor_parallel: ") as caught:
        job(teachers=teachers, windows={"length": 64})
    assert expected in str(caught.value)


def test_a_gpt2_is_not_split() -> None:
    gpt2 = {"kind": "gpt2", "hidden_size": 48, "num_layers": 1, "num_heads": 4}
    training = {"batch_windows": 4, "epochs": 1, "learning_rate": 1e-3}
    teachers = [{"name": "one", "model": gpt2, "training": training, "tensor_parallel": 2}]
    with pytest.raises(ValidationError, match=r"tensor_parallel: got 2 for a gpt2, expected 1"):
        job(teachers=teachers)
