"""One job on two ranks through the real launcher: what it leaves behind, and what it said."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from babyllama_ds.corpus.shards import TokenShards

pytestmark = pytest.mark.launch

STEPS, WARMUP, BATCH, LENGTH = 24, 3, 8, 32
MODELS = ("gpt2", "llama", "student", "control")
STAGES = ("teachers/gpt2", "teachers/llama", "student", "control")
WATCHED = (
    *(f"teacher_{what}/{name}" for what in ("ce", "kl", "agreement") for name in MODELS[:2]),
    *("teacher_distance/gpt2/llama", "target_entropy", "student_agreement", "student_kl"),
)
ALARM = re.compile(r"warn|error|traceback|exception|deprecat|terminate|fatal|abort|\bnan\b", re.I)


@pytest.fixture(scope="module")
def report(finished: Any) -> dict[str, Any]:
    return dict(json.loads((finished.run_dir / "report" / "report.json").read_text()))


@pytest.fixture(scope="module")
def lines(finished: Any, metrics: Callable[[Path], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return metrics(finished.run_dir)


def of_stage(lines: list[dict[str, Any]], stage: str, key: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["stage"] == stage and key in line]


# -- what it said ---------------------------------------------------------------------------------


def test_output_is_calm_and_comes_from_one_rank(finished: Any) -> None:
    ended = finished.ended[0]
    assert ended.out == ""
    told = ended.err.splitlines()
    assert [line for line in told if ALARM.search(line)] == []
    assert [line for line in told if not re.match(r"\d\d:\d\d:\d\d  \S", line)] == []
    assert sum("ranks 2" in line and "ZeRO-2" in line for line in told) == 1
    for stage in STAGES:
        assert sum(line.endswith(f"{stage}: training") for line in told) == 1


# -- what it left behind --------------------------------------------------------------------------


def test_run_directory_is_laid_out_as_designed(finished: Any) -> None:
    run = finished.run_dir
    written = ("job.yaml", "metrics.jsonl", "state.json", "report/report.md", "report/report.html")
    for name in written:
        assert (run / name).stat().st_size > 0
    for name in MODELS:
        assert (run / "evaluation" / f"{name}.json").is_file()
    for model in (run / "student", run / "control", run / "teachers/gpt2", run / "teachers/llama"):
        for name in ("model.safetensors", "config.json", "tokenizer.json", "manifest.json"):
            assert (model / name).is_file()
    assert "dev" in (run / "student" / "README.md").read_text().lower()
    assert json.loads((run / "state.json").read_text()) == {"status": "done"}


def test_nothing_unfinished_is_left(finished: Any) -> None:
    everything = [path.name for path in finished.runs.rglob("*")]
    assert [name for name in everything if "tmp" in name or name.endswith(".lock.json")] == []
    assert not list(finished.run_dir.glob("checkpoints/**/*.safetensors"))
    assert not list(finished.runs.glob("store/teachers/.building-*"))


def test_shared_work_lies_in_the_store(finished: Any) -> None:
    kinds = {
        "tokenizer": "tokenizers",
        "tokens": "tokens",
        "teachers/gpt2": "teachers",
        "teachers/llama": "teachers",
    }
    for name, kind in kinds.items():
        link = finished.run_dir / name
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve().parent == (finished.runs / "store" / kind).resolve()
    assert not (finished.run_dir / "student").is_symlink()


def test_resolved_job_reloads_equal(finished: Any) -> None:
    from babyllama_ds.spec.loading import load_job

    resolved = load_job(finished.run_dir / "job.yaml", [])
    assert resolved == load_job(finished.job, [])
    text = (finished.run_dir / "job.yaml").read_text()
    assert "temperature: 2.0" in text  # a default that the job does not mention


def test_weights_are_bf16_and_heads_as_asked(finished: Any) -> None:
    tied = {"student": False, "control": False, "teachers/gpt2": True, "teachers/llama": True}
    for name, is_tied in tied.items():
        with safe_open(finished.run_dir / name / "model.safetensors", framework="pt") as weights:
            keys = list(weights.keys())
            assert {str(weights.get_tensor(key).dtype) for key in keys} == {"torch.bfloat16"}
        assert ("lm_head.weight" in keys) is not is_tied


def test_student_and_its_control_are_different_models(finished: Any) -> None:
    student, control = (
        (finished.run_dir / name / "model.safetensors").read_bytes()
        for name in ("student", "control")
    )
    assert student != control


# -- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_have_every_step_once(lines: list[dict[str, Any]], stage: str) -> None:
    steps = of_stage(lines, stage, "loss")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    named = {"stage", "step", "epoch", "tokens", "loss", "ce", "lr", "grad_norm"}
    named |= {"tokens_per_s", "flops_per_s", "mfu"}
    distilled = {"kl", *WATCHED} if stage == "student" else set()
    for line in steps:
        assert set(line) == named | distilled
        assert all(math.isfinite(line[key]) for key in named - {"stage"})
    assert [line["step"] for line in of_stage(lines, stage, "dev_ce")] == [8, 16, 24]


@pytest.mark.parametrize("stage", STAGES)
def test_rate_warms_up_and_decays(lines: list[dict[str, Any]], stage: str) -> None:
    peak = 5e-3 if stage.startswith("teachers/") else 1.5e-2
    for step, line in enumerate(of_stage(lines, stage, "loss")):
        if step < WARMUP:
            share = step / WARMUP
        else:
            share = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        assert line["lr"] == pytest.approx(peak * share, rel=1e-9, abs=1e-12)


def test_loss_is_made_of_ce_and_kl(lines: list[dict[str, Any]]) -> None:
    alpha, temperature = 0.5, 2.0
    for line in of_stage(lines, "student", "loss"):
        # `sequence`: the KL of a window is a sum over its positions.
        soft = temperature**2 * line["kl"] * LENGTH
        assert line["loss"] == pytest.approx(alpha * line["ce"] + (1 - alpha) * soft, rel=1e-6)
    for line in of_stage(lines, "control", "loss"):
        assert line["loss"] == line["ce"]


def test_models_learn(lines: list[dict[str, Any]]) -> None:
    for stage in STAGES:
        first, *_, last = of_stage(lines, stage, "ce")
        assert first["ce"] == pytest.approx(math.log(300), abs=0.2)  # knows nothing: ln(vocabulary)
        assert last["ce"] < first["ce"] - 0.5


def test_tokens_count_windows_not_padding(finished: Any, lines: list[dict[str, Any]]) -> None:
    shards = json.loads((finished.run_dir / "tokens" / "shards.json").read_text())
    windows = shards["splits"]["train"]["tokens"] // LENGTH - 1
    sizes = [min(BATCH, windows - start) for start in range(0, windows, BATCH)]
    assert sizes[-1] < BATCH, "the last batch of an epoch should be short here"
    assert len(sizes) < STEPS, "an epoch should end within the training here"
    seen = [sum((sizes * 2)[:step]) * LENGTH for step in range(1, STEPS + 1)]
    for stage in STAGES:
        assert [line["tokens"] for line in of_stage(lines, stage, "loss")] == seen


@pytest.mark.parametrize("stage", STAGES)
def test_tensorboard_holds_the_same_scalars(
    finished: Any, lines: list[dict[str, Any]], stage: str
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.run_dir / "tensorboard" / stage)).Reload()
    for key in ("loss", "ce", "lr", "grad_norm", "tokens_per_s", "dev_ce"):
        expected = [(line["step"], line[key]) for line in of_stage(lines, stage, key)]
        scalars = [(scalar.step, scalar.value) for scalar in events.Scalars(key)]
        assert [step for step, _ in scalars] == [step for step, _ in expected]
        assert [value for _, value in scalars] == pytest.approx([value for _, value in expected])


def test_report_tells_of_every_model(
    finished: Any, report: dict[str, Any], lines: list[dict[str, Any]]
) -> None:
    assert set(report["models"]) == set(MODELS)
    for name in MODELS:
        model = report["models"][name]
        stage = name if name in ("student", "control") else f"teachers/{name}"
        evaluation = json.loads((finished.run_dir / "evaluation" / f"{name}.json").read_text())
        assert model["dev_ce"] == evaluation["dev"]["ce"]
        assert model["steps"] == STEPS
        assert model["train_tokens"] == of_stage(lines, stage, "loss")[-1]["tokens"]
        assert model["seconds"] > 0
        assert model["tokens_per_s"] == pytest.approx(model["train_tokens"] / model["seconds"])
        assert model["minimal_pairs"] == {}
    width, head, inner, vocab = 32, 8, 48, 300
    attention = 2 * width * width + 2 * width * (2 * head)  # q and o; k and v of two heads
    layer = attention + 3 * width * inner + 2 * width
    assert report["models"]["student"]["params"] == 2 * layer + width + 2 * vocab * width
    assert report["models"]["llama"]["params"] == 1 * layer + width + 1 * vocab * width


def test_report_tells_of_the_ensemble(
    finished: Any, report: dict[str, Any], lines: list[dict[str, Any]]
) -> None:
    ensemble = report["ensemble"]
    last_tenth = of_stage(lines, "student", "loss")[-3:]  # steps 22 to 24
    assert (ensemble["first_step"], ensemble["last_step"]) == (22, STEPS)
    for name in ("gpt2", "llama"):
        own = ensemble["teachers"][name]
        for measure in ("ce", "kl", "agreement"):
            values = [line[f"teacher_{measure}/{name}"] for line in last_tenth]
            assert own[measure] == pytest.approx(sum(values) / 3)
        assert own["ce"] < ensemble["chance_ce"] - 0.5  # it has learnt something
        assert own["kl"] > 0
    assert 0.01 < ensemble["distances"]["gpt2/llama"] < 1
    assert ensemble["warnings"] == []
    page = (finished.run_dir / "report" / "report.md").read_text()
    assert "## The ensemble" in page
    first = of_stage(lines, "student", "student_kl")[0]["student_kl"]
    assert ensemble["student_kl"] < first


def test_the_card_names_what_the_student_was_made_from(
    finished: Any, report: dict[str, Any]
) -> None:
    card = (finished.run_dir / "student" / "README.md").read_text()
    environment = report["environment"]
    facts = [
        report["job_sha256"],
        environment["fingerprints"]["tokenizer"],
        environment["fingerprints"]["tokens"],
        str(environment["seeds"]["student"]),
        environment["versions"]["torch"],
        environment["hardware"]["cpu_capability"],
    ]
    assert [fact for fact in facts if f"| {fact} " not in card] == []


def test_every_model_wrote_as_many_texts_as_it_was_asked_for(
    finished: Any, report: dict[str, Any]
) -> None:
    assert {name: len(texts) for name, texts in report["samples"].items()} == dict.fromkeys(
        MODELS, 2
    )
    page = (finished.run_dir / "report" / "report.html").read_text()
    for stage in STAGES:
        board = EventAccumulator(str(finished.run_dir / "tensorboard" / stage))
        board.Reload()
        assert "sample/2/text_summary" in board.Tags()["tensors"]
        (dev_ce,) = board.Scalars("final/dev_ce")
        name = stage.removeprefix("teachers/")
        assert dev_ce.value == pytest.approx(report["models"][name]["dev_ce"])
        assert html.escape(report["samples"][name][0]["prompt"].strip(), quote=False) in page


def test_milestones_measure_at_what_transformers_makes_of_them(
    finished: Any, report: dict[str, Any]
) -> None:
    shards = TokenShards.open(finished.run_dir / "tokens")
    tokens = shards.read("dev", 0, shards.num_tokens("dev") // LENGTH * LENGTH)
    windows = torch.tensor(tokens).view(-1, LENGTH)
    kept = {name: [one["name"] for one in of] for name, of in report["milestones"].items()}
    assert kept == {"student": ["chck_400", "chck_700", "chck_2150"], "control": ["chck_1K"]}
    for model, of_model in report["milestones"].items():
        for one in of_model:
            place = finished.run_dir / "milestones" / model / one["name"]
            loaded = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
            with torch.inference_mode():
                logits = loaded(windows).logits[:, :-1].double()
            ce = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
            assert one["dev_ce"] == pytest.approx(ce.item(), abs=1e-3)
    student = {one["name"]: one for one in report["milestones"]["student"]}
    assert len({one["dev_ce"] for one in student.values()}) == 3
    # That of the best evaluation, which is the finished model.
    assert student["chck_700"]["steps"] == report["models"]["student"]["best_step"]
    assert student["chck_700"]["dev_ce"] == report["models"]["student"]["dev_ce"]


def test_the_log_ends_with_the_page(finished: Any) -> None:
    last = finished.ended[0].err.splitlines()[-1]
    assert last.endswith(f"  report: {finished.run_dir / 'report' / 'report.html'}")


def test_report_tells_where_it_was_made(finished: Any, report: dict[str, Any]) -> None:
    environment = report["environment"]
    assert (environment["ranks"], environment["zero_stage"]) == (2, 2)
    assert (environment["device"], environment["precision"]) == ("cpu", "bf16")
    assert environment["attention"]["student"] in ("sdpa", "eager")  # `auto`, resolved
    assert set(environment["seeds"]) == {"student", "teachers/gpt2", "teachers/llama"}
    assert environment["versions"]["deepspeed"]
    assert report["job"] == yaml.safe_load((finished.run_dir / "job.yaml").read_text())


def test_best_weights_are_the_ones_that_leave(
    finished: Any, lines: list[dict[str, Any]], report: dict[str, Any]
) -> None:
    for name in ("student", "control"):
        scores = {line["step"]: line["dev_ce"] for line in of_stage(lines, name, "dev_ce")}
        best = min(scores, key=scores.__getitem__)
        assert report["models"][name]["best_step"] == best
        assert report["models"][name]["best_dev_ce"] == scores[best]
        # Evaluated while training on 16 windows only, at the end on all.
        assert report["models"][name]["dev_ce"] == pytest.approx(scores[best], abs=0.1)
        assert report["models"][name]["final_dev_ce"] == scores[STEPS]
    assert report["models"]["student"]["best_step"] == 8, "the last weights should not be the best"
