"""The Triton kernel against the formulas in float64, PyTorch's softmax and autograd.

On CUDA it runs compiled. On a CPU it runs through Triton's interpreter, which has to be chosen
before Triton is imported: hence in a process of its own, started by the one test that is not
skipped there.

Shapes: C positions, V vocabulary, K teachers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babyllama_ds.losses.factors import Factors
from babyllama_ds.losses.rows import Mixture
from references.errors import relative_error

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_HERE = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

needs_kernel = pytest.mark.skipif(not RUNS_HERE, reason="run by test_through_the_interpreter")


@pytest.mark.skipif(RUNS_HERE, reason="already runs the kernel")
@pytest.mark.skipif(
    version("triton").startswith("3.6.") and Version(version("numpy")) >= Version("2.4"),
    reason="the interpreter of Triton 3.6 makes numbers of arrays in a way that numpy 2.4 refuses",
)
def test_through_the_interpreter() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
            __file__,
        ],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed, 1 skipped" in done.stdout


C = 5
SHARES = {
    0: (),
    1: (1.0,),
    2: (0.25, 0.75),
    3: (0.5, 0.2, 0.3),
    8: (0.1, 0.05, 0.15, 0.1, 0.2, 0.05, 0.25, 0.1),
}


def make_logits(num_teachers: int, vocab_size: int, seed: int = 0) -> list[Tensor]:
    """Student's and teachers', in float64."""
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randn(1 + num_teachers, C, vocab_size, generator=rng).double() * 3)


def labels_of(vocab_size: int) -> Tensor:
    return torch.tensor([[0], [vocab_size - 1], [1], [vocab_size // 2], [0]])


def factors_of() -> Factors:
    """A position without label, one not valid, one that is neither."""
    return Factors(
        ce_C1=torch.tensor([[0.5], [0.0], [0.7], [0.3], [0.0]]),
        kl_C1=torch.tensor([[1.5], [2.0], [0.0], [0.6], [0.0]]),
    )


def reference(
    logits: list[Tensor], labels: Tensor, mixture: Mixture, factors: Factors
) -> tuple[Tensor, Tensor, Tensor]:
    """(CE, KL, gradient), by autograd from the definitions; factors of the KL carry 1/T · T²."""
    z = logits[0].double().requires_grad_()
    temperature = mixture.temperature
    ce = F.cross_entropy(z, labels[:, 0], reduction="none")
    kl = torch.zeros_like(ce)
    if mixture.shares:
        pairs = list(zip(mixture.shares, [t.double() for t in logits[1:]], strict=True))
        if mixture.mean_of == "logits":
            p = F.softmax(sum(s * t for s, t in pairs) / temperature, -1)
        else:
            p = sum(s * F.softmax(t / temperature, -1) for s, t in pairs)
        log_q = F.log_softmax(z / temperature, -1)
        kl = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
    weighted = factors.ce_C1[:, 0] * ce + factors.kl_C1[:, 0] * temperature * kl
    (gradient,) = torch.autograd.grad(weighted.sum(), z)
    return ce.detach()[:, None], kl.detach()[:, None], gradient


def kernel(
    logits: list[Tensor], labels: Tensor, mixture: Mixture, factors: Factors | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(CE, KL, what is left in place of the student's logits)."""
    from babyllama_ds.losses.triton_rows import row_losses

    student, *teachers = (each.to(DEVICE) for each in logits)
    student = student.clone()
    if factors:
        factors = Factors(ce_C1=factors.ce_C1.to(DEVICE), kl_C1=factors.kl_C1.to(DEVICE))
    ce, kl = row_losses(student, teachers, labels.to(DEVICE), mixture, factors)
    return ce.cpu(), kl.cpu(), student.cpu()


def assert_right(
    logits: list[Tensor], mixture: Mixture, *, tolerance: float = 2e-6, rounded: float = 2e-6
) -> None:
    """Every position's CE and KL to `tolerance` of the largest, the gradient to `rounded`."""
    labels, factors = labels_of(logits[0].shape[1]), factors_of()
    expected = reference(logits, labels, mixture, factors)
    got = kernel(logits, labels, mixture, factors)
    assert relative_error(got[0], expected[0]) < tolerance
    assert relative_error(got[1], expected[1]) < tolerance
    assert got[2].dtype == logits[0].dtype
    assert relative_error(got[2], expected[2]) < rounded
    assert got[2][4].abs().max() == 0


def mixture_of(num_teachers: int, temperature: float, mean_of: str) -> Mixture:
    return Mixture(shares=SHARES[num_teachers], temperature=temperature, mean_of=mean_of)


@needs_kernel
@pytest.mark.parametrize("vocab_size", [3, 37, 5003])
@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_teachers", [0, 1, 3])
def test_values_and_gradients(num_teachers, temperature, mean_of, vocab_size) -> None:
    """5003 needs two blocks, the second with a part outside the row."""
    logits = [each.float() for each in make_logits(num_teachers, vocab_size)]
    assert_right(logits, mixture_of(num_teachers, temperature, mean_of))


@needs_kernel
@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
@pytest.mark.parametrize("num_teachers", [2, 8])
def test_bf16_logits_round_the_gradient_alone(num_teachers, mean_of) -> None:
    logits = [each.bfloat16() for each in make_logits(num_teachers, 131)]
    assert_right(logits, mixture_of(num_teachers, 2.0, mean_of), rounded=2**-8)


@needs_kernel
def test_models_of_different_dtypes() -> None:
    student, one, two = make_logits(2, 131)
    logits = [student.float(), one.bfloat16(), two.half()]
    assert_right(logits, mixture_of(2, 2.0, "logits"))


@needs_kernel
@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vocab_size", [37, 9001])
def test_logits_of_80(vocab_size, temperature, mean_of) -> None:
    """Where the student is sure the teachers rule out, and the other way about. The last block has
    the largest logit of two rows, so that what was summed before it counts nothing."""
    logits = make_logits(3, vocab_size)
    logits = [(each * 8).round() / 8 for each in logits]
    for number, (high, low) in enumerate([(0, -1), (-1, 0), (-1, 0), (-1, 0)]):
        logits[number][1::2, high], logits[number][1::2, low] = 80.0, -80.0
    logits = [each.float() for each in logits]
    # Of logits of 80 fp32 sums hold 5e-6, and T = 0.5 doubles that.
    assert_right(logits, mixture_of(3, temperature, mean_of), tolerance=5e-6, rounded=1e-5)


@needs_kernel
@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
def test_rows_of_wider_buffers_are_left_alone_beside(mean_of) -> None:
    """As a chunk of a padded vocabulary: views whose rows lie further apart than V, each its own
    way."""
    logits = [each.float() for each in make_logits(8, 37)]
    wide = [F.pad(each, (0, 11 - k), value=1e4).contiguous() for k, each in enumerate(logits)]
    views = [each.to(DEVICE)[:, :37] for each in wide]
    assert [each.stride(0) for each in views] == [*range(48, 39, -1)]
    from babyllama_ds.losses.triton_rows import row_losses

    factors = factors_of()
    factors = Factors(ce_C1=factors.ce_C1.to(DEVICE), kl_C1=factors.kl_C1.to(DEVICE))
    mixture = mixture_of(8, 2.0, mean_of)
    before = views[0].clone()
    ce, kl = row_losses(views[0], views[1:], labels_of(37).to(DEVICE), mixture, factors)
    expected = reference(logits, labels_of(37), mixture, factors_of())
    assert not torch.equal(views[0], before)
    for got, right in zip((ce, kl, views[0]), expected, strict=True):
        assert relative_error(got.cpu(), right) < 2e-6
    if DEVICE == "cpu":
        assert (wide[0][:, 37:] == 1e4).all()


@needs_kernel
def test_without_factors_the_logits_are_left_alone() -> None:
    logits = [each.float() for each in make_logits(2, 37)]
    mixture = mixture_of(2, 2.0, "logits")
    ce, kl, left = kernel(logits, labels_of(37), mixture, None)
    expected = reference(logits, labels_of(37), mixture, factors_of())
    assert torch.equal(left, logits[0])
    assert relative_error(ce, expected[0]) < 2e-6
    assert relative_error(kl, expected[1]) < 2e-6


@needs_kernel
def test_a_token_no_teacher_can_reach_counts_nothing() -> None:
    sure = torch.zeros(C, 37)
    sure[:, 5] = 1e5
    logits = [make_logits(0, 37)[0].float(), sure]
    assert_right(logits, mixture_of(1, 1.0, "probabilities"))
    assert_right(logits, mixture_of(1, 1.0, "logits"))


@needs_kernel
def test_more_teachers_than_places_are_our_mistake() -> None:
    from babyllama_ds.losses.triton_rows import row_losses

    logits = [each.float() for each in make_logits(9, 37)]
    mixture = Mixture(shares=(1 / 9,) * 9, temperature=1.0, mean_of="logits")
    with pytest.raises(AssertionError, match="places"):
        row_losses(logits[0], logits[1:], labels_of(37), mixture, None)


@needs_kernel
def test_no_positions_at_all() -> None:
    from babyllama_ds.losses.triton_rows import row_losses

    none = torch.empty(0, 37, device=DEVICE)
    label = torch.empty(0, 1, dtype=torch.int64, device=DEVICE)
    ce, kl = row_losses(none, [none], label, mixture_of(1, 1.0, "logits"), None)
    assert ce.shape == kl.shape == (0, 1)


@needs_kernel
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_teachers", [0, 3])
def test_the_z_loss(num_teachers, temperature) -> None:
    """Its gradient is 2 log Z · softmax(z), beside that of CE and KL; log Z is given out."""
    from babyllama_ds.losses.triton_rows import row_losses

    logits = [each.float() for each in make_logits(num_teachers, 5003)]
    logits[0] += torch.tensor([0.0, 40.0, -40.0, 1.0, 2.0])[:, None]
    mixture = mixture_of(num_teachers, temperature, "logits")
    labels, factors = labels_of(5003), factors_of()
    z_factors = torch.tensor([[0.1], [0.0], [0.02], [0.3], [0.0]])
    ce, kl, gradient = reference(logits, labels, mixture, factors)
    z = logits[0].double().requires_grad_()
    log_z = z.logsumexp(-1, keepdim=True)
    gradient = gradient + torch.autograd.grad((z_factors * log_z.square()).sum(), z)[0]

    student, *teachers = (each.to(DEVICE) for each in logits)
    student, kept = student.clone(), torch.empty(C, 1, device=DEVICE)
    on_device = Factors(
        ce_C1=factors.ce_C1.to(DEVICE), kl_C1=factors.kl_C1.to(DEVICE), z_C1=z_factors.to(DEVICE)
    )
    got = row_losses(student, teachers, labels.to(DEVICE), mixture, on_device, log_z_C1=kept)
    assert relative_error(got[0].cpu(), ce) < 5e-6
    assert relative_error(got[1].cpu(), kl) < 5e-6
    assert relative_error(student.cpu(), gradient) < 1e-5
    assert relative_error(kept.cpu(), log_z.detach()) < 1e-6
