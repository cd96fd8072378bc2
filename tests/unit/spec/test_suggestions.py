"""Whatever is misspelt, wherever it stands, the word that was meant is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from babyllama_ds.errors import JobError, Problem
from babyllama_ds.spec.deepspeed_file import check_config
from babyllama_ds.spec.explain import closest, did_you_mean
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_file, find_job

NURSERY = find_job("nursery")


def problems(*overrides: str, path: Path = NURSERY) -> dict[str, Problem]:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides, environ={})
    return {problem.where: problem for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("override", "where", "meant"),
    [
        # keys, at every depth
        ("studnet.seed=1", "studnet", "student"),
        ("student.trainig.epochs=4", "student.trainig", "training"),
        ("student.training.epoch=4", "student.training.epoch", "epochs"),
        ("student.training.Epochs=4", "student.training.Epochs", "epochs"),
        ("student.model.hiden_size=4", "student.model.hiden_size", "hidden_size"),
        ("teacher.gpt2.weight=2", "teacher", "teachers"),
        ("teachers.0.wieght=2", "teachers[0].wieght", "weight"),
        ("teachers.gpt2.model.droput=0", "teachers[0].model.droput", "dropout"),
        ("teachers.gpt2.training.learnin_rate=1", "teachers[0].training.learnin_rate",
         "learning_rate"),
        ("corpus.word=5000", "corpus.word", "words"),
        ("windows.offsets={phase: 2}", "windows.offsets.phase", "phases"),
        ("control.trainig={}", "control.trainig", "training"),
        ("distilation.alpha=1", "distilation", "distillation"),
        ("evaluation.minimal_pairs=[{nam: a, path: b}]", "evaluation.minimal_pairs[0].nam", "name"),
        ("deepspeed.divice=cpu", "deepspeed.divice", "device"),
        # values
        ("student.training.schedule=cosin", "student.training.schedule", "cosine"),
        ("student.training.keep=bst", "student.training.keep", "best"),
        ("distillation.mean_of=logit", "distillation.mean_of", "logits"),
        ("distillation.soft_reduction=tokens", "distillation.soft_reduction", "token"),
        ("distillation.cache=hiden", "distillation.cache", "hidden"),
        ("deepspeed.device=gpu", "deepspeed.device", "cuda"),  # not `cpu`, which is nearer
        ("deepspeed.compile=studnet", "deepspeed.compile", "student"),
        ("windows.offsets=randon", "windows.offsets", "random"),
        ("student.training.micro_batch=aut", "student.training.micro_batch", "auto"),
        ("student.model.attention=spda", "student.model.attention", "sdpa"),
        # kinds
        ("student.model.kind=lama", "student.model.kind", "llama"),
        ("teachers.1.model.kind=gpt-2", "teachers[1].model.kind", "gpt2"),
        ("corpus.kind=nursry", "corpus.kind", "nursery"),
        ("corpus={kind: file, train: [a], split: {kind: tail}}", "corpus.kind", "files"),
        ("corpus={kind: files, train: [a], split: {kind: heldout}}", "corpus.split.kind",
         "held_out"),
        ("tokenizer.kind=bep", "tokenizer.kind", "bpe"),
        # a teacher's name
        ("teachers.gtp2.weight=2", "teachers", "gpt2"),
        ("teachers.LLAMA2.weight=2", "teachers", "llama"),
    ],
)  # fmt: skip
def test_misspelt(override: str, where: str, meant: str) -> None:
    found = problems(override)
    assert f"did you mean `{meant}`?" in (found[where].hint or "")
    assert found[where].source == f"command line: {override}"


@pytest.mark.parametrize("key", ["knd", "type", "knid"])
def test_a_misspelt_kind(key: str) -> None:
    (problem,) = problems(f"tokenizer={{{key}: bpe}}").values()
    assert (problem.where, problem.got) == ("tokenizer.kind", "nothing")
    assert problem.hint == f"`{key}` is called `kind` here"


def test_a_word_in_place_of_a_number() -> None:
    problem = problems("student.training.micro_batch=many")["student.training.micro_batch"]
    assert problem.expected == "a whole number, or 'auto', or null"


def test_in_the_file_too(tmp_path: Path) -> None:
    job = yaml.safe_load(NURSERY.read_text())
    job["teachers"][0]["trainng"] = job["teachers"][0].pop("training")
    job["student"]["model"]["kind"] = "Llama"
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    found = problems(path=path)
    assert found["teachers[0].trainng"].hint == "did you mean `training`?"
    assert found["student.model.kind"].hint == "did you mean `llama`?"
    assert found["student.model.kind"].source.startswith(f"{path}:")


@pytest.mark.parametrize("word", ["nursary", "nursary.yaml", "Nursery", "nursery.yml"])
def test_a_misspelt_shipped_job(word: str) -> None:
    with pytest.raises(JobError, match="did you mean `nursery`"):
        find_job(word)


def test_a_misspelt_shipped_configuration() -> None:
    with pytest.raises(JobError, match="did you mean `zero2_cpu`"):
        find_file("ds_configs", "zero2_cup")


def test_a_misspelt_path(tmp_path: Path) -> None:
    (tmp_path / "small-job.yaml").write_text("")
    (problem,) = problems(path=tmp_path / "smal-job.yaml").values()
    assert problem.hint == "did you mean `small-job.yaml`?"
    (problem,) = problems(path=tmp_path / "no" / "job.yaml").values()
    assert problem.hint is None


GOOD: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


@pytest.mark.parametrize(
    ("key", "value", "where", "meant"),
    [
        ("zero_optimizaton", {}, "zero_optimizaton", "zero_optimization"),
        ("Zero_Optimization", {}, "Zero_Optimization", "zero_optimization"),
        ("zero_optimization", {"stage": 2, "overlap_com": True}, "zero_optimization.overlap_com",
         "overlap_comm"),
        ("timers", {"throughput": {"enable": True}}, "timers.throughput.enable", "enabled"),
        ("timers", {"throughputs": {}}, "timers.throughputs", "throughput"),
        ("comms_logger", {"verbos": True}, "comms_logger.verbos", "verbose"),
        ("data_types", {"grad_accum_dtype": "fp23"}, "data_types.grad_accum_dtype", "fp32"),
        ("data_types", {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": "aut"},
         "data_types.keep_in_fp32_modules", "auto"),
        ("log_level", "warnin", "log_level", "warning"),
    ],
)  # fmt: skip
def test_misspelt_in_deepspeeds_json(key: str, value: object, where: str, meant: str) -> None:
    with pytest.raises(JobError) as caught:
        check_config({**GOOD, key: value})
    of_key = [problem for problem in caught.value.problems if problem.where == where]
    assert len(of_key) == 1
    assert f"did you mean `{meant}`?" in (of_key[0].hint or "")


def test_words() -> None:
    assert closest("GPT", ["gpt2", "llama"]) == "gpt2"
    assert closest("gpt2", ["GPT2"]) == "GPT2"
    assert closest("zzz", ["gpt2"]) is None
    assert did_you_mean("zzz", ["b", "a"]) == "there are: a, b"
    assert did_you_mean("zzz", []) is None
