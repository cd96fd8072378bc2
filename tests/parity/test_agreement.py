"""What is logged of the ensemble, against the formulas written plainly, in float64.

The reference holds every logit of every model at once, position by position where that is plainer.

Shapes: N positions, D hidden size, V vocabulary, P rows of a head (P ≥ V).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from torch import Tensor

from babyllama_ds.losses.agreement import Agreement, measure_agreement
from babyllama_ds.losses.distillation import TeacherStates
from babyllama_ds.losses.heads import Head

WIDTHS, VOTES = (17, 40, 31), (1.0, 2.5, 0.7)


@dataclass
class Model:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    vote: float = 1.0

    def to(self, dtype: torch.dtype) -> Model:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Model(self.hidden.to(dtype), self.weight.to(dtype), bias, self.vote)

    def log_probs(self, vocab_size: int) -> Tensor:
        return log_softmax(self.logits(vocab_size))

    def logits(self, vocab_size: int) -> Tensor:
        logits = self.hidden @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        return logits[:, :vocab_size]


def log_softmax(logits: Tensor) -> Tensor:
    return logits - torch.log(torch.exp(logits).sum(-1, keepdim=True))


@dataclass
class Case:
    student: Model
    teachers: list[Model]
    labels: Tensor
    valid: Tensor
    vocab_size: int

    def to(self, dtype: torch.dtype) -> Case:
        teachers = [teacher.to(dtype) for teacher in self.teachers]
        return Case(self.student.to(dtype), teachers, self.labels, self.valid, self.vocab_size)


def make_case(*, num_teachers: int = 2, vocab_size: int = 123, seed: int = 0) -> Case:
    """Three windows of 47: each one's last label is missing, the last window is half padding."""
    rng = torch.Generator().manual_seed(seed)
    windows, window, padding_rows = 3, 47, 5

    def model(width: int, *, biased: bool, vote: float = 1.0) -> Model:
        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64) * std

        rows = vocab_size + padding_rows
        weight = normal(rows, width, std=3 / math.sqrt(width))
        bias = normal(rows) if biased else None
        return Model(normal(windows * window, width), weight, bias, vote)

    labels = torch.randint(0, vocab_size, (windows, window), generator=rng)
    valid = torch.ones(windows, window, dtype=torch.bool)
    labels[:, -1] = labels[0, 3:6] = -100
    valid[-1, 20:] = False
    labels[-1, 19:] = -100
    return Case(
        student=model(31, biased=True),
        teachers=[
            model(width, biased=k == 1, vote=vote)
            for k, (width, vote) in enumerate(
                zip(WIDTHS[:num_teachers], VOTES[:num_teachers], strict=True)
            )
        ],
        labels=labels.flatten(),
        valid=valid.flatten(),
        vocab_size=vocab_size,
    )


def reference(case: Case, mean_of: str) -> dict[str, list[float]]:
    """Every sum, position by position."""
    votes = [teacher.vote / sum(t.vote for t in case.teachers) for teacher in case.teachers]
    log_t = [teacher.log_probs(case.vocab_size) for teacher in case.teachers]
    if mean_of == "logits":
        mean = sum(
            vote * teacher.logits(case.vocab_size)
            for vote, teacher in zip(votes, case.teachers, strict=True)
        )
        log_p = log_softmax(mean)
    else:
        log_p = torch.log(sum(vote * torch.exp(t) for vote, t in zip(votes, log_t, strict=True)))
    log_q = case.student.log_probs(case.vocab_size)
    pairs = list(combinations(range(len(log_t)), 2))
    sums = {
        "teacher_ce_K": [0.0] * len(log_t),
        "teacher_kl_K": [0.0] * len(log_t),
        "teacher_hits_K": [0.0] * len(log_t),
        "distance_P": [0.0] * len(pairs),
        "entropy": [0.0],
        "student_hits": [0.0],
        "student_kl": [0.0],
    }
    for n, (label, valid) in enumerate(zip(case.labels.tolist(), case.valid.tolist(), strict=True)):
        p = torch.exp(log_p[n])
        for k, t in enumerate(log_t):
            if label != -100:
                sums["teacher_ce_K"][k] -= t[n, label].item()
            if valid:
                sums["teacher_kl_K"][k] += (torch.exp(t[n]) * (t[n] - log_p[n])).sum().item()
                sums["teacher_hits_K"][k] += float(t[n].argmax() == p.argmax())
        if not valid:
            continue
        for number, (j, k) in enumerate(pairs):
            apart = torch.exp(log_t[j][n]) - torch.exp(log_t[k][n])
            sums["distance_P"][number] += 0.5 * apart.abs().sum().item()
        sums["entropy"][0] -= (p * log_p[n]).sum().item()
        sums["student_hits"][0] += float(log_q[n].argmax() == p.argmax())
        sums["student_kl"][0] += (p * (log_p[n] - log_q[n])).sum().item()
    return sums


def ours(case: Case, mean_of: str, chunk_tokens: int | None = None) -> Agreement:
    return measure_agreement(
        case.student.hidden,
        Head(case.student.weight, case.student.bias),
        case.labels,
        case.valid,
        [TeacherStates(t.hidden, Head(t.weight, t.bias), t.vote) for t in case.teachers],
        mean_of=mean_of,  # type: ignore[arg-type]
        vocab_size=case.vocab_size,
        chunk_tokens=chunk_tokens,
    )


def assert_close(got: Agreement, expected: dict[str, list[float]], tolerance: float) -> None:
    assert list(got._fields) == list(expected)
    for name, tensor in got._asdict().items():
        close = pytest.approx(expected[name], rel=tolerance, abs=tolerance)
        assert tensor.reshape(-1).tolist() == close, name


TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])
@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
@pytest.mark.parametrize("num_teachers", [1, 2, 3])
def test_every_sum(num_teachers: int, mean_of: str, dtype: torch.dtype) -> None:
    case = make_case(num_teachers=num_teachers)
    got = ours(case.to(dtype), mean_of, chunk_tokens=50)
    assert_close(got, reference(case, mean_of), TOLERANCE[dtype])


@pytest.mark.parametrize("chunk_tokens", [1, 7, 140, 141, 1000, None])
def test_any_chunk_size(chunk_tokens: int | None) -> None:
    case = make_case()
    assert_close(ours(case, "logits", chunk_tokens), reference(case, "logits"), 1e-11)


@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
def test_bf16_states_are_measured_in_fp32(mean_of: str) -> None:
    """Judged against float64 on the same rounded logits: what is added is fp32's rounding."""
    case = make_case(vocab_size=1009).to(torch.bfloat16)
    exact = case.to(torch.float64)
    for model, rounded in zip(
        (exact.student, *exact.teachers), (case.student, *case.teachers), strict=True
    ):
        # The logits themselves are bf16: a linear layer that passes them on.
        logits = torch.nn.functional.linear(rounded.hidden, rounded.weight, rounded.bias)
        model.hidden, model.weight = logits.double(), torch.eye(logits.shape[1]).double()
        model.bias = None
    got, expected = ours(case, mean_of), reference(exact, mean_of)
    assert got.entropy.dtype == torch.float32
    # Which of two equal largest logits wins is nobody's business: bf16 has many of them.
    for name in ("teacher_ce_K", "teacher_kl_K", "distance_P", "entropy", "student_kl"):
        values = getattr(got, name).reshape(-1).tolist()
        assert values == pytest.approx(expected[name], rel=2e-5), name


def test_one_teacher_is_its_own_ensemble() -> None:
    case = make_case(num_teachers=1)
    got = ours(case, "probabilities")
    assert got.teacher_kl_K.item() == pytest.approx(0, abs=1e-9)
    assert got.teacher_hits_K.item() == case.valid.sum().item()
    assert got.distance_P.numel() == 0
