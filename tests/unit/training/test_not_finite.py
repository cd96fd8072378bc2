"""Numbers that are not finite end a training and name their cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from babyllama_ds.errors import TrainingError
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.voters import TeacherStates
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.ensemble import Ensemble
from trainings import VOCAB, WINDOWS, RandomWindows, Run, ensemble_of, windows_of_step


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_gradient_that_is_not_finite_ends_training(
    precision: str, new_run: Callable[..., Run]
) -> None:
    run = new_run(precision=precision, checkpoint_every_steps=2, log_every_steps=100)

    def spoil(epoch: int, k: int) -> None:
        if (epoch, k) == (1, 1):  # the sixth step
            with torch.no_grad():
                next(run.last_model.parameters())[7].fill_(float("inf"))

    with pytest.raises(TrainingError) as caught:
        run.train(before=spoil)
    (problem,) = caught.value.problems
    ids = np.random.default_rng(1).permutation(WINDOWS)[4:8]  # epoch 1, batch 1
    assert problem.where == "student: step 6"
    assert problem.got.startswith("a gradient that is not finite")
    assert problem.got.endswith(f"epoch 1, windows {', '.join(map(str, ids))}")
    assert problem.expected == "finite numbers"
    assert "lower the learning rate" in (problem.hint or "")
    assert (problem.hint or "").endswith(str(run.folder.directory / "step-00000004"))
    assert max(run.folder.saved) == 4


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("spoilt", ["a row of the head", "an embedding"])
def test_a_teacher_that_is_not_finite_is_named_with_its_windows(
    spoilt: str, precision: str, new_run: Callable[..., Run], tiny_model: Callable[..., Any]
) -> None:
    """Also between logged steps. A row of its head spoils all windows, an embedding some."""
    run = new_run(precision=precision, distilled=True, log_every_steps=100)
    whole, broken = tiny_model("llama", seed=5), tiny_model("llama", seed=6)
    run.ensemble = ensemble_of(run.device, whole, broken, dtype=torch.bfloat16)
    ids = windows_of_step(5)
    tokens = RandomWindows().tokens
    token = tokens[ids[1], 3]

    def spoil(epoch: int, k: int) -> None:
        if (epoch, k) == (1, 1):  # the sixth step
            head, embedding = broken.get_output_embeddings(), broken.get_input_embeddings()
            module = head if spoilt == "a row of the head" else embedding
            module.weight.data[token] = float("nan")

    with pytest.raises(TrainingError) as caught:
        run.train(before=spoil)
    holding = [w for w in ids if token in tokens[w]]
    assert 0 < len(holding) < len(ids)
    windows = ids if spoilt == "a row of the head" else holding
    (problem,) = caught.value.problems
    assert problem.where == "student: step 6"
    assert problem.got == (
        "logits of teacher 1 that are not finite, in epoch 1, "
        f"windows {', '.join(map(str, windows))}"
    )
    assert problem.expected == "finite numbers"
    assert problem.hint == (
        "the weights of 1 are damaged, or its training had diverged: train it again, "
        "or leave it out"
    )
    assert max(run.folder.saved) == 4
    assert all(weight.isfinite().all() for weight in run.weights().values())


def test_a_broken_teacher_is_named_in_a_short_batch_too(
    new_run: Callable[..., Run], tiny_model: Callable[..., Any]
) -> None:
    """The last of an epoch: of its four windows two are padding."""
    run = new_run(distilled=True)
    broken = tiny_model("llama", seed=6)
    run.ensemble = ensemble_of(run.device, broken, dtype=torch.bfloat16)

    def spoil(epoch: int, k: int) -> None:
        if (epoch, k) == (0, 3):
            broken.lm_head.weight.data[3] = float("nan")

    with pytest.raises(TrainingError) as caught:
        run.train(before=spoil)
    (problem,) = caught.value.problems
    windows = windows_of_step(3)
    assert len(windows) == 2
    assert problem.got == (
        "logits of teacher 0 that are not finite, in epoch 0, "
        f"windows {', '.join(map(str, windows))}"
    )


def test_every_teacher_that_is_not_finite_is_named(
    new_run: Callable[..., Run], tiny_model: Callable[..., Any]
) -> None:
    run = new_run(distilled=True)
    teachers = [tiny_model("llama", seed=seed) for seed in (5, 6)]
    for teacher in teachers:
        teacher.lm_head.weight.data[3] = float("nan")
    run.ensemble = ensemble_of(run.device, *teachers, dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match=r"teacher 0 (.|\n)*teacher 1 ") as caught:
        run.train()
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
def test_a_teachers_logit_of_minus_infinity_ends_training(
    mean_of: Any, new_run: Callable[..., Run]
) -> None:
    """A mean of probabilities with it is finite, and so is the loss: only the measures see it."""
    run = new_run(distilled=True, log_every_steps=3)
    run.distillation = DistillationSpec(mean_of=mean_of)
    assert run.ensemble is not None
    first, second = run.ensemble.members
    run.ensemble = Ensemble([first, RulesOut(second, since=4 * 2)])  # two forwards a step

    with pytest.raises(TrainingError, match="logits of teacher 1 that are not finite") as caught:
        run.train()
    # A mean of logits makes the KL NaN, and with it the gradient: step 5, which is not logged.
    seen_at = 5 if mean_of == "logits" else 6
    assert caught.value.problems[0].where == f"student: step {seen_at}"


class RulesOut:
    """A teacher that gives a token the logit −inf, once it has run so many times."""

    def __init__(self, teacher: Any, *, since: int) -> None:
        self.teacher, self.left = teacher, since
        self.name, self.weight = teacher.name, teacher.weight

    @property
    def head(self) -> Head:
        bias = torch.zeros(VOCAB, dtype=torch.bfloat16)
        if self.left < 0:
            bias[7] = -torch.inf
        return Head(self.teacher.head.weight_PD, bias)

    def states(self, windows: Any) -> TeacherStates:
        self.left -= 1
        return replace(self.teacher.states(windows), head=self.head)

    def destroy(self) -> None:
        self.teacher.destroy()


def test_without_a_checkpoint_the_error_says_so(new_run: Callable[..., Run]) -> None:
    run = new_run()

    def spoil(epoch: int, k: int) -> None:
        run.last_model.get_output_embeddings().weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"student: step 1: .*\n.*checkpoint: none yet"):
        run.train(before=spoil)


def test_a_development_loss_that_is_not_finite_ends_training(new_run: Callable[..., Run]) -> None:
    run = new_run(precision="fp32", learning_rate=1e30, evaluate_every_steps=1)
    expected = r"student: step 1: got a development cross-entropy that is not finite.*\n.*none yet"
    with pytest.raises(TrainingError, match=expected):
        run.train()
