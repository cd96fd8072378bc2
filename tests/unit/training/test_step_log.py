"""What is logged of a training: its metrics against all logits, its line, its warnings."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from babyllama_ds.engine.schedule import learning_rate
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.training import clock, objective, step_log
from babyllama_ds.training.meter import Meter
from trainings import VOCAB, RandomWindows, Run, ensemble_of, windows_of_step


def test_logged_lines(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    run = new_run(log_every_steps=3, warmup_steps=2)
    with caplog.at_level(logging.INFO):
        summary = run.train()
    logged = run.logged()
    assert list(logged) == [1, 3, 6, 8]
    tokens = {1: 40, 3: 120, 6: 220, 8: 280}  # the fourth and the eighth batch have two windows
    for step, line in logged.items():
        assert set(line) == {
            *("stage", "step", "epoch", "tokens", "loss", "ce"),
            *("lr", "grad_norm", "tokens_per_s"),
        }
        assert line["stage"] == "student"
        assert line["tokens"] == tokens[step]
        assert line["epoch"] == pytest.approx(step / 4)
        assert line["lr"] == learning_rate(run.training, step - 1, 8)
        assert line["loss"] == line["ce"]
        assert line["grad_norm"] > 0
        assert line["tokens_per_s"] > 0
    assert summary["train_tokens"] == 280
    assert summary["tokens_per_s"] == pytest.approx(280 / summary["seconds"])
    assert summary["params"] == sum(p.numel() for p in run.last_model.parameters())
    shown = [one.getMessage() for one in caplog.records if "tok/s" in one.getMessage()]
    # Not at a terminal: at once, then every ten seconds, and at the end.
    assert shown[0].startswith("student  step 1/8  loss ")
    assert shown[-1].startswith("student  step 8/8  loss ")
    assert shown[-1].endswith("0:00 left")
    assert len(shown) == 2


def test_speed_is_that_since_the_last_line_and_the_rest_is_reckoned_by_all_steps(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a step takes a second, and waiting for a logged one's sums another."""
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    seconds, minutes = itertools.count(), itertools.count(step=60)
    fake = SimpleNamespace(perf_counter=lambda: next(seconds), monotonic=lambda: next(minutes))
    for module in (clock, step_log):
        monkeypatch.setattr(module, "time", fake)
    run = new_run(log_every_steps=3)
    with caplog.at_level(logging.INFO):
        run.train()
    # 40 tokens in the first step, 80 in the next two, 100 in three, 60 in two.
    expected = {1: 40 / (1 + 1), 3: 80 / (2 + 1), 6: 100 / (3 + 1), 8: 60 / (2 + 1)}
    assert {step: line["tokens_per_s"] for step, line in run.logged().items()} == expected
    left = [m[1] for one in caplog.records if (m := re.search(r"(\S+) left$", one.getMessage()))]
    # 7 steps of 2 seconds, 5 of 5/3, 2 of 9/6.
    assert left == ["0:14", "0:08", "0:03", "0:00"]


def test_a_distilled_step_logs_ce_and_kl_and_their_weighted_sum(
    new_run: Callable[..., Run],
) -> None:
    run = new_run(distilled=True, log_every_steps=1, epochs=1.0)
    run.train()
    logged = run.logged()
    assert list(logged) == [1, 2, 3, 4]
    for line in logged.values():
        assert line["kl"] > 0
        # The published reduction: KL summed over a window's ten positions, T² = 4.
        expected = 0.5 * line["ce"] + 0.5 * 4 * 10 * line["kl"]
        assert line["loss"] == pytest.approx(expected, rel=1e-6)


def test_the_meter_is_read_at_logged_steps(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(log_every_steps=3)
    run.meter = Meter(flops_per_token=1e6, matmul_flops_per_s=1e10)
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    with caplog.at_level(logging.INFO):
        summary = run.train()
    for values in (*run.logged().values(), summary):
        assert values["flops_per_s"] == 1e6 * values["tokens_per_s"]
        assert values["mfu"] == values["flops_per_s"] / 1e10
    assert re.search(r"tok/s  mfu \d\.\d\d  0:00 left", caplog.text)


def test_without_a_meter_only_tokens_are_told(new_run: Callable[..., Run]) -> None:
    run = new_run()
    assert "mfu" not in run.train()
    assert not any("mfu" in line for line in run.metrics())


# -- the ensemble, watched -------------------------------------------------------------------------


@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
def test_logged_steps_tell_how_teachers_and_student_agree(
    mean_of: Any, new_run: Callable[..., Run], tiny_model: Callable[..., Any]
) -> None:
    """Against all logits of the whole batch, the short last one of an epoch included."""
    run = new_run(precision="fp32", distilled=True, kind="llama", log_every_steps=4)
    run.distillation = DistillationSpec(mean_of=mean_of)
    run.ensemble = ensemble_of(
        run.device, tiny_model("llama", seed=5), tiny_model("gpt2", seed=6), dtype=torch.float32
    )
    run.train()
    logged = run.logged()
    assert list(logged) == [1, 4, 8]
    models = [tiny_model(kind, seed=seed).eval() for kind, seed in (("llama", 5), ("gpt2", 6))]
    for step, students in ((1, [run.model().eval()]), (4, []), (8, [])):
        tokens_BS = torch.from_numpy(RandomWindows().tokens[windows_of_step(step - 1)])
        with torch.no_grad():
            one, two, *ours = (
                model(input_ids=tokens_BS).logits.double().log_softmax(-1)
                for model in (*models, *students)
            )
        if mean_of == "logits":
            targets = (one / 3 + 2 * two / 3).log_softmax(-1)
        else:
            targets = (one.exp() / 3 + 2 * two.exp() / 3).log()
        expected = {
            "target_entropy": -(targets.exp() * targets).sum(-1).mean(),
            "teacher_distance/0/1": (one.exp() - two.exp()).abs().sum(-1).mean() / 2,
        }
        for name, teacher in (("0", one), ("1", two)):
            likelihood = teacher[:, :-1].gather(-1, tokens_BS[:, 1:, None])
            expected[f"teacher_ce/{name}"] = -likelihood.mean()
            expected[f"teacher_kl/{name}"] = (teacher.exp() * (teacher - targets)).sum(-1).mean()
            expected[f"teacher_agreement/{name}"] = agreement(teacher, targets)
        for student in ours:  # before its first update: what it was made as
            expected["student_kl"] = (targets.exp() * (targets - student)).sum(-1).mean()
            expected["student_agreement"] = agreement(student, targets)
        for key, value in expected.items():
            assert logged[step][key] == pytest.approx(value.item(), rel=2e-5, abs=1e-6), key
    learnt = [line["student_kl"] for line in logged.values()]
    assert learnt[-1] < learnt[0]


def agreement(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ours.argmax(-1) == theirs.argmax(-1)).double().mean()


def test_only_logged_steps_are_watched_and_the_line_is_no_longer(
    new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    passes = []
    original = objective.measure_agreement
    monkeypatch.setattr(
        objective,
        "measure_agreement",
        lambda *parts, **named: passes.append(1) or original(*parts, **named),
    )
    run = new_run(distilled=True, log_every_steps=3)
    with caplog.at_level(logging.INFO):
        run.train()
    assert len(passes) == 4 * 2  # steps 1, 3, 6, 8, two micro-batches each
    shown = [one.getMessage() for one in caplog.records if "tok/s" in one.getMessage()]
    assert shown
    for line in shown:
        assert re.fullmatch(
            r"student  step \d/8  loss \S+  ce \S+  kl \S+  \S+ tok/s  \S+ left", line
        )


def test_a_model_without_teachers_is_not_watched(new_run: Callable[..., Run]) -> None:
    run = new_run()
    run.train()
    assert not any("agreement" in key for line in run.metrics() for key in line)


def test_teachers_that_are_chance_or_identical_are_named_once(
    new_run: Callable[..., Run],
    tiny_model: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("babyllama_ds"), "propagate", True)
    run = new_run(distilled=True, log_every_steps=1, epochs=1.0)
    twins = (tiny_model("llama", seed=5) for _ in range(2))
    run.ensemble = ensemble_of(run.device, *twins, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="babyllama_ds"):
        summary = run.train()
    told = [one.getMessage() for one in caplog.records if one.name.startswith("babyllama_ds")]
    # On random tokens every teacher is worse than chance.
    assert [line.split(":")[1].strip() for line in told] == [
        "teacher 0 is no better than chance",
        "teacher 1 is no better than chance",
        "teachers 0 and 1 are identical",
    ]
    assert all(line.startswith("warning: ") for line in told)
    assert summary["vocab_size"] == VOCAB
