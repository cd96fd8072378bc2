"""Losses of single rows, worked out by hand on a vocabulary of two tokens."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from babyllama_ds.losses import rows as module
from babyllama_ds.losses.divergences import Divergence
from babyllama_ds.losses.factors import Factors
from babyllama_ds.losses.rows import Mixture, num_work, row_losses, takes_kernel

# Odds of 3 : 1, 1 : 1 and 9 : 1 for the first token.
THREE_TO_ONE = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
EVEN = torch.tensor([[5.0, 5.0]], dtype=torch.float64)
NINE_TO_ONE = torch.tensor([[math.log(9.0) - 2.0, -2.0]], dtype=torch.float64)
LABEL = torch.tensor([[0]])
ONE = torch.ones(1, 1, dtype=torch.float64)


def work() -> list[torch.Tensor]:
    return [torch.full((1, 2), math.nan, dtype=torch.float64) for _ in range(3)]


def mixture(temperature: float = 1.0, mean_of: str = "logits", shares=(1.0,)) -> Mixture:
    return Mixture(shares=shares, temperature=temperature, mean_of=mean_of)


def test_cross_entropy_and_its_gradient() -> None:
    student = THREE_TO_ONE.clone()
    ce, kl = row_losses(
        student, [], LABEL, mixture(shares=()), Factors(ce_C1=2 * ONE, kl_C1=ONE), work()
    )
    assert ce.item() == pytest.approx(math.log(4 / 3))
    assert kl.item() == 0
    assert student.tolist()[0] == pytest.approx([2 * (0.75 - 1), 2 * 0.25])


def test_kl_goes_from_the_teacher_to_the_student() -> None:
    _, kl = row_losses(THREE_TO_ONE.clone(), [EVEN], LABEL, mixture(), None, work())
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


def test_temperature_divides_the_logits_of_both() -> None:
    student = NINE_TO_ONE.clone()  # at T = 2: 3 to 1
    factors = Factors(ce_C1=0 * ONE, kl_C1=ONE)
    ce, kl = row_losses(student, [EVEN], LABEL, mixture(2.0), factors, work())
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert ce.item() == pytest.approx(math.log(10 / 9))
    assert student.tolist()[0] == pytest.approx([0.75 - 0.5, 0.25 - 0.5])


@pytest.mark.parametrize(
    ("mean_of", "first"),
    [("logits", 3 / 4), ("probabilities", (9 / 10 + 1 / 2) / 2)],
)
def test_mean_of_logits_is_geometric_and_of_probabilities_arithmetic(mean_of, first) -> None:
    student = EVEN.clone()
    mix = mixture(mean_of=mean_of, shares=(0.5, 0.5))
    factors = Factors(ce_C1=0 * ONE, kl_C1=ONE)
    row_losses(student, [NINE_TO_ONE, EVEN], LABEL, mix, factors, work())
    assert student.tolist()[0] == pytest.approx([0.5 - first, first - 0.5])


def test_without_factors_the_logits_are_left_alone() -> None:
    student = THREE_TO_ONE.clone()
    row_losses(student, [EVEN], LABEL, mixture(2.0), None, work())
    assert torch.equal(student, THREE_TO_ONE)


def test_a_token_no_teacher_can_reach_counts_nothing() -> None:
    sure = torch.tensor([[0.0, -1e5]])
    spaces = [torch.empty(1, 2) for _ in range(3)]
    student = torch.zeros(1, 2)
    mix = mixture(mean_of="probabilities")
    factors = Factors(ce_C1=torch.zeros(1, 1), kl_C1=torch.ones(1, 1))
    _, kl = row_losses(student, [sure], LABEL, mix, factors, spaces)
    assert kl.item() == pytest.approx(math.log(2))
    assert student.tolist()[0] == [-0.5, 0.5]


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
@pytest.mark.parametrize("num_teachers", [0, 2])
def test_work_spaces_of_any_number_of_rows_give_the_same(num_teachers: int, rows: int) -> None:
    rng = torch.Generator().manual_seed(0)
    student, *teachers = torch.randn(1 + num_teachers, 5, 7, generator=rng, dtype=torch.float64)
    label = torch.arange(5)[:, None]
    factors = Factors(ce_C1=torch.rand(5, 1).double(), kl_C1=torch.rand(5, 1).double())
    mix = mixture(2.0, shares=(0.5, 0.5)[:num_teachers])

    def compute(num_rows: int) -> list[torch.Tensor]:
        z = student.clone()
        spaces = [torch.full((num_rows, 7), math.nan, dtype=torch.float64) for _ in range(3)]
        return [*row_losses(z, teachers, label, mix, factors, spaces), z]

    assert all(map(torch.equal, compute(rows), compute(5)))


# -- the kernel for CUDA ---------------------------------------------------------------------------


def test_only_fp32_and_less_on_cuda_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernels", SimpleNamespace)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert takes_kernel(torch.bfloat16, cuda, 2)
    assert takes_kernel(torch.float32, cuda, 8)
    assert not takes_kernel(torch.float32, cpu, 2)
    assert not takes_kernel(torch.float64, cuda, 2)
    assert not takes_kernel(torch.float32, cuda, 9)
    assert [num_work(torch.float32, cuda, k) for k in (0, 2, 9)] == [0, 0, 3]
    assert [num_work(torch.float32, cpu, k) for k in (0, 2)] == [1, 3]


@pytest.fixture
def _nothing_known() -> Iterator[None]:
    """Of Triton, before and after."""
    known = (module.why_no_kernel, module._kernels, module._say_without_kernel)
    for one in known:
        one.cache_clear()
    yield
    for one in known:
        one.cache_clear()


@pytest.mark.usefixtures("_nothing_known")
def test_cuda_without_triton_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "babyllama_ds.losses.triton_rows", None)
    monkeypatch.delattr("babyllama_ds.losses.triton_rows", raising=False)
    for _ in range(3):
        assert not takes_kernel(torch.bfloat16, torch.device("cuda"), 2)
    (message,) = caplog.messages
    assert message.startswith("the loss takes PyTorch's operators on CUDA")


@pytest.mark.parametrize(
    "refusal",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc", "driver.c"]),  # without Python.h
    ],
    ids=["no compiler", "no headers"],
)
@pytest.mark.usefixtures("_nothing_known")
def test_cuda_where_triton_can_start_nothing_goes_without_it(
    refusal: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton imports all the same, and builds what talks to the card at its first kernel."""
    pytest.importorskip("triton")
    from babyllama_ds.losses import triton_rows

    class Driver:
        @property
        def active(self) -> None:
            raise refusal

    monkeypatch.setattr(triton_rows, "driver", Driver())
    assert not takes_kernel(torch.bfloat16, torch.device("cuda"), 2)
    (message,) = caplog.messages
    assert str(refusal).splitlines()[0] in message
    assert message.endswith("apt install gcc python3-dev)")


# -- other divergences and the z-loss, by hand -----------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "value"),
    [
        # p = (1/2, 1/2) of the teacher, q = (3/4, 1/4) of the student
        (Divergence("reverse_kl"), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        (
            Divergence("jensen_shannon", 0.5),  # m = (5/8, 3/8)
            0.25 * math.log(0.8) + 0.25 * math.log(4 / 3)
            + 0.375 * math.log(1.2) + 0.125 * math.log(2 / 3),
        ),
        (
            Divergence("skewed_forward_kl", 0.5),
            0.5 * math.log(0.8) + 0.5 * math.log(4 / 3),
        ),
        (
            Divergence("skewed_reverse_kl", 0.5),
            0.75 * math.log(1.2) + 0.25 * math.log(2 / 3),
        ),
    ],
)  # fmt: skip
def test_divergences_of_two_tokens(divergence: Divergence, value: float) -> None:
    five = [torch.full((1, 2), math.nan, dtype=torch.float64) for _ in range(6)]
    _, got = row_losses(
        THREE_TO_ONE.clone(), [EVEN], LABEL, mixture(), None, five, divergence=divergence
    )
    assert got.item() == pytest.approx(value)


def test_the_gradient_of_the_reverse_kl() -> None:
    """q (log q/p − KL): with KL = ¾ log 1.5 + ¼ log ½, and both entries' sum 0."""
    student = THREE_TO_ONE.clone()
    five = [torch.full((1, 2), math.nan, dtype=torch.float64) for _ in range(6)]
    factors = Factors(ce_C1=0 * ONE, kl_C1=ONE)
    row_losses(
        student, [EVEN], LABEL, mixture(), factors, five, divergence=Divergence("reverse_kl")
    )
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    expected = [0.75 * (math.log(1.5) - kl), 0.25 * (math.log(0.5) - kl)]
    assert student.tolist()[0] == pytest.approx(expected)
    assert sum(expected) == pytest.approx(0)


@pytest.mark.parametrize("teachers", [[], [EVEN]])
def test_log_z_and_its_gradient(teachers: list[torch.Tensor]) -> None:
    """Z = 9 e^−2 + e^−2 = 10 e^−2; the z-loss pulls by 2 log Z · (0.9, 0.1)."""
    student, log_z = NINE_TO_ONE.clone(), torch.full((1, 1), math.nan, dtype=torch.float64)
    factors = Factors(ce_C1=0 * ONE, kl_C1=0 * ONE, z_C1=0.5 * ONE)
    mix = mixture(2.0) if teachers else mixture(shares=())
    row_losses(student, teachers, LABEL, mix, factors, work(), log_z_C1=log_z)
    right = math.log(10) - 2
    assert log_z.item() == pytest.approx(right)
    assert student.tolist()[0] == pytest.approx([right * 0.9, right * 0.1])
