"""Divergences other than the forward KL, and the z-loss, against plain float64 code with autograd.

The reference forms every logit of every model, writes each softmax and each divergence as it is
defined in its paper, and knows nothing of chunks, tiles or ratios. Compared are the loss, all sums,
and the gradients of hidden states, head and bias.

Shapes: N positions, D hidden size, V vocabulary, P rows of a head (P ≥ V), K teachers.
"""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babyllama_ds.losses import chunks, rows
from babyllama_ds.losses.distillation import (
    cross_entropy_loss,
)
from babyllama_ds.losses.divergences import Divergence
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.topk import top_k_targets
from references.losses import (
    BETA,
    COUNTS,
    DIVERGENCES,
    MEANS,
    OTHERS,
    SKEW,
    TEMPERATURES,
    Case,
    Outcome,
    V,
    leaves_of,
    make_case,
    ours,
    plain_logits,
    reference,
    relative_error,
)


def assert_right(got: Outcome, right: Outcome, tolerance: float) -> None:
    errors = got.errors(right)
    assert all(error <= tolerance for error in errors.values()), errors


# -- values and gradients --------------------------------------------------------------------------

# Logits of 10 are known to 5e-7 in fp32, T = 0.5 doubles that, and a slope log q/p is up to 20.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 6e-6}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32"])
@pytest.mark.parametrize("mean_of", MEANS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_teachers", [1, 3])
@pytest.mark.parametrize("kind", OTHERS)
def test_values_and_gradients(kind, num_teachers, alpha, temperature, mean_of, dtype) -> None:
    case = make_case(num_teachers=num_teachers, biased=num_teachers == 3).to(dtype)
    settings = {"alpha": alpha, "temperature": temperature, "mean_of": mean_of}
    assert_right(ours(case, kind, **settings), reference(case, kind, **settings), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", OTHERS)
def test_teachers_of_equal_votes_are_summed_as_for_the_forward_kl(kind: str) -> None:
    case = make_case(votes=(1.0, 1.0, 1.0))
    settings = {"alpha": 0.3, "temperature": 2.0, "mean_of": "logits"}
    assert_right(ours(case, kind, **settings), reference(case, kind, **settings), 1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 93, 94, 1000, None])
@pytest.mark.parametrize("kind", OTHERS)
def test_any_chunk_size(kind, chunk_tokens) -> None:
    case, settings = make_case(), {"alpha": 0.3, "temperature": 2.0, "mean_of": "probabilities"}
    got = ours(case, kind, chunk_tokens=chunk_tokens, z_loss=0.01, **settings)
    assert_right(got, reference(case, kind, z_loss=0.01, **settings), 1e-12)


@pytest.mark.parametrize("rows_of_a_tile", [1, 5, 1000])
@pytest.mark.parametrize("kind", OTHERS)
def test_any_tile(kind, rows_of_a_tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent: tiles change no bit."""
    case = make_case().to(torch.float32)
    settings = {"alpha": 0.3, "temperature": 2.0, "mean_of": "logits", "z_loss": 0.01}
    plain = ours(case, kind, **settings)
    monkeypatch.setattr(chunks, "_tile_rows", lambda *_: rows_of_a_tile)
    tiled = ours(case, kind, **settings)
    assert all(map(torch.equal, plain.gradients, tiled.gradients))
    assert torch.equal(plain.soft_sum, tiled.soft_sum)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_several_threads(kind) -> None:
    """`make test` gives a process one."""
    case, settings = make_case(), {"alpha": 0.3, "temperature": 2.0, "mean_of": "probabilities"}
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        got = ours(case, kind, chunk_tokens=None, z_loss=0.01, **settings)
    finally:
        torch.set_num_threads(threads)
    assert_right(got, reference(case, kind, z_loss=0.01, **settings), 1e-12)


@pytest.mark.parametrize("mean_of", MEANS)
@pytest.mark.parametrize("kind", OTHERS)
def test_bf16_rounds_no_more_than_plain_code_in_fp32(kind, mean_of) -> None:
    """Both form logits in bf16. Ours has to round the gradient of the logits to bf16 as well."""
    worst = 0.0
    for seed in range(3):
        case = make_case(seed=seed).to(torch.bfloat16)
        settings = {"alpha": 0.3, "temperature": 2.0, "mean_of": mean_of}
        right = reference(case, kind, **settings)
        plain = reference(case, kind, dtype=torch.float32, **settings).errors(right)
        got = ours(case, kind, **settings).errors(right)
        worst = max(worst, max(got[name] / plain[name] for name in ("hidden", "weight", "bias")))
        assert got["soft_sum"] <= 2**-11  # a mean of terms, each rounded to 2⁻⁹
    assert worst <= 1.5, worst


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32"])
@pytest.mark.parametrize("mean_of", MEANS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", OTHERS)
def test_student_and_teachers_sure_of_what_the_other_rules_out(
    kind, temperature, mean_of, dtype
) -> None:
    """Probabilities of e^−160 and less: the reverse KL is made of their logarithms."""
    case = make_case(num_teachers=2, votes=(1.0, 3.0))
    for holder, high, low in ((case, 3, 7), *((t.head, 7, 3) for t in case.teachers)):
        bias = holder.bias if isinstance(holder, Case) else holder.bias_P
        bias[high], bias[low] = 80.0, -80.0
    case = case.to(dtype)
    settings = {"alpha": 0.3, "temperature": temperature, "mean_of": mean_of}
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}[dtype]
    assert_right(ours(case, kind, **settings), reference_in_logs(case, kind, **settings), tolerance)


def reference_in_logs(
    case: Case, kind: str, *, alpha: float, temperature: float, mean_of: str
) -> Outcome:
    """As `reference`, from log-probabilities: in float64 e^−320 is there, but its square is not."""
    case = case.to(torch.float64)
    leaves = leaves_of(case)
    z = plain_logits(*leaves)
    ts = [plain_logits(t.hidden_ND, t.head.weight_PD, t.head.bias_P) for t in case.teachers]
    shares = [t.weight / sum(t.weight for t in case.teachers) for t in case.teachers]
    if mean_of == "logits":
        mean = sum(s * t for s, t in zip(shares, ts, strict=True))
        log_p = F.log_softmax(mean / temperature, -1)
    else:
        each = [
            math.log(s) + F.log_softmax(t / temperature, -1)
            for s, t in zip(shares, ts, strict=True)
        ]
        log_p = torch.stack(each).logsumexp(0)
    log_q = F.log_softmax(z / temperature, -1)

    def log_m(share: float) -> Tensor:
        return torch.logaddexp(math.log(share) + log_p, math.log(1 - share) + log_q)

    def log_kl(one: Tensor, other: Tensor) -> Tensor:
        return (one.exp() * (one - other)).sum(-1)

    soft = {
        "reverse_kl": lambda: log_kl(log_q, log_p),
        "jensen_shannon": lambda: (
            BETA * log_kl(log_p, log_m(BETA)) + (1 - BETA) * log_kl(log_q, log_m(BETA))
        ),
        "skewed_forward_kl": lambda: log_kl(log_p, log_m(SKEW)),
        "skewed_reverse_kl": lambda: log_kl(log_q, log_m(1 - SKEW)),
    }[kind]()
    soft_sum = soft[case.valid].sum()
    ce_sum = F.cross_entropy(z, case.labels, ignore_index=-100, reduction="sum")
    loss = alpha * ce_sum / COUNTS["ce_count"]
    loss = loss + (1 - alpha) * temperature**2 * soft_sum / COUNTS["kl_count"]
    gradients = torch.autograd.grad(loss, leaves)
    return Outcome(loss.detach(), ce_sum, soft_sum, None, gradients)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_lies_at_unused_positions_has_no_effect(kind: str) -> None:
    case = make_case()
    settings = {"alpha": 0.3, "temperature": 2.0, "mean_of": "logits", "z_loss": 0.1}
    clean = ours(case, kind, **settings)
    case.hidden[~case.valid] = math.nan
    for teacher in case.teachers:
        teacher.hidden_ND[~case.valid] = math.nan
    dirty = ours(case, kind, **settings)
    assert torch.equal(clean.loss, dirty.loss)
    assert torch.equal(clean.gradients[1], dirty.gradients[1])
    assert not dirty.gradients[0][~case.valid].any()


@pytest.mark.parametrize("kind", OTHERS)
def test_a_student_equal_to_its_teacher_is_at_rest(kind: str) -> None:
    case = make_case(num_teachers=1)
    (teacher,) = case.teachers
    case.hidden, case.weight = teacher.hidden_ND.clone(), teacher.head.weight_PD.clone()
    case.bias = teacher.head.bias_P.clone()
    got = ours(case, kind, alpha=0.0, temperature=2.0, mean_of="logits")
    assert abs(got.soft_sum.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in got.gradients)


@pytest.mark.parametrize(("share", "limit"), [(1e-7, "forward_kl"), (1 - 1e-7, "reverse_kl")])
def test_the_jensen_shannon_divergence_tends_to_either_kl(share: float, limit: str) -> None:
    case, settings = make_case(), {"alpha": 0.0, "temperature": 4.0, "mean_of": "logits"}
    DIVERGENCES["near"] = Divergence("jensen_shannon", share)
    near = ours(case, "near", **settings).soft_sum / min(share, 1 - share)
    assert near.item() == pytest.approx(ours(case, limit, **settings).soft_sum.item(), rel=1e-3)


# -- the z-loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", list(DIVERGENCES))
def test_the_z_loss_beside_every_divergence(kind, temperature, alpha, dtype) -> None:
    case = make_case().to(dtype)
    settings = {
        "alpha": alpha,
        "temperature": temperature,
        "mean_of": "logits",
        "z_loss": 0.05,
    }
    assert_right(ours(case, kind, **settings), reference(case, kind, **settings), TOLERANCE[dtype])


@pytest.mark.parametrize("shift", [0.0, -300.0, 300.0])
def test_the_z_loss_of_shifted_logits(shift: float) -> None:
    """log Z is that of the logits themselves, not less their maximum."""
    case = make_case()
    case.bias += shift
    settings = {"alpha": 0.3, "temperature": 2.0, "mean_of": "logits", "z_loss": 0.05}
    got = ours(case.to(torch.float32), "forward_kl", **settings)
    right = reference(case.to(torch.float32), "forward_kl", **settings)
    assert_right(got, right, 1e-4)  # logits of 300 are known to 1.5e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 20, V])
def test_the_z_loss_beside_top_k_targets(k: int, temperature: float) -> None:
    """Its value and its share of the gradient are those without a cache."""
    case, settings = make_case(), {"alpha": 0.3, "temperature": temperature, "mean_of": "logits"}
    targets = top_k_targets(
        case.teachers, k=k, temperature=temperature, mean_of="logits", vocab_size=V
    )
    with_z, without = (
        ours(case, "forward_kl", targets=targets, z_loss=z, **settings) for z in (0.05, 0.0)
    )
    right = [reference(case, "forward_kl", z_loss=z, **settings) for z in (0.05, 0.0)]
    assert relative_error(with_z.z_sum, right[0].z_sum) < 1e-12
    for got, plain, a, b in zip(
        with_z.gradients, without.gradients, right[0].gradients, right[1].gradients, strict=True
    ):
        assert relative_error(got - plain, a - b) < 1e-10


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp64", "fp32"])
def test_the_z_loss_of_training_without_teachers(dtype: torch.dtype) -> None:
    case = make_case().to(dtype)
    leaves = leaves_of(case)
    result = cross_entropy_loss(
        leaves[0],
        Head(leaves[1], leaves[2]),
        case.labels,
        ce_count=77,
        vocab_size=V,
        scale=3.0,
        chunk_tokens=17,
        z_loss=0.05,
    )
    right_leaves = leaves_of(case.to(torch.float64))
    z = plain_logits(*right_leaves)
    z_sum = z.logsumexp(-1).square()[case.labels != -100].sum()
    ce_sum = F.cross_entropy(z, case.labels, ignore_index=-100, reduction="sum")
    loss = 3.0 * (ce_sum + 0.05 * z_sum) / 77
    assert relative_error(result.loss.detach(), loss.detach()) < TOLERANCE[dtype]
    assert relative_error(result.ce_sum, ce_sum.detach()) < TOLERANCE[dtype]
    assert relative_error(result.z_sum, z_sum.detach()) < TOLERANCE[dtype]
    gradients = (
        torch.autograd.grad(each, of) for each, of in ((result.loss, leaves), (loss, right_leaves))
    )
    for got, right in zip(*gradients, strict=True):
        assert relative_error(got, right) < TOLERANCE[dtype]


def test_without_a_z_loss_there_is_no_sum_of_it() -> None:
    got = ours(make_case(), "forward_kl", alpha=0.3, temperature=2.0, mean_of="logits")
    assert got.z_sum is None


# -- what is asked of the machine -----------------------------------------------------------------


def test_top_k_targets_have_no_other_divergence() -> None:
    case = make_case()
    targets = top_k_targets(case.teachers, k=5, temperature=1.0, mean_of="logits", vocab_size=V)
    with pytest.raises(AssertionError, match="no other divergence"):
        ours(case, "reverse_kl", targets=targets, alpha=0.3, temperature=1.0, mean_of="logits")


def test_on_cuda_other_divergences_take_pytorchs_operators_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows._say_without_kernel.cache_clear()
    monkeypatch.setattr(rows, "_kernels", object)
    cuda = torch.device("cuda")
    for kind, teachers in itertools.product(OTHERS[:2], (0, 2, 2)):
        took = rows.takes_kernel(torch.bfloat16, cuda, teachers, DIVERGENCES[kind])
        assert took == (teachers == 0)
    with caplog.at_level(logging.WARNING):
        assert rows.num_work(torch.bfloat16, cuda, 2, DIVERGENCES["reverse_kl"]) == 5
    assert [m.rpartition(" ")[2] for m in caplog.messages] == OTHERS[:2]
    rows._say_without_kernel.cache_clear()
