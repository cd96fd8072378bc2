"""How the loss behaves; that its values are right is shown in `tests/parity`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from babyllama_ds.losses.distillation import (
    IGNORED_LABEL,
    DistillationLoss,
    TeacherStates,
    cross_entropy_loss,
    cross_entropy_sum,
    distillation_loss,
)
from babyllama_ds.losses.heads import Head
from babyllama_ds.losses.topk import top_k_targets

N, D, V, P = 40, 6, 11, 13


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_labels(length: int = N, size: int = V) -> Tensor:
    labels = torch.randint(0, size, (length,), generator=torch.Generator().manual_seed(7))
    labels[9::10] = IGNORED_LABEL
    return labels


def make_teachers(dtype: torch.dtype = torch.float64) -> list[TeacherStates]:
    return [
        TeacherStates(normal(N, width, seed=width, dtype=dtype), Head(normal(P, width, seed=width)))
        for width in (5, 8)
    ]


def student() -> tuple[Tensor, Head]:
    hidden = normal(N, D, seed=1).requires_grad_()
    return hidden, Head(normal(P, D, seed=2).requires_grad_(), normal(P, seed=3).requires_grad_())


def compute(hidden: Tensor, head: Head, **changes: object) -> DistillationLoss:
    settings: dict[str, object] = {
        "labels_N": make_labels(),
        "valid_N": torch.ones(N, dtype=torch.bool),
        "teachers": make_teachers(),
        "alpha": 0.3,
        "temperature": 2.0,
        "mean_of": "logits",
        "ce_count": 36,
        "kl_count": 4,
        "vocab_size": V,
        "chunk_tokens": 7,
    }
    return distillation_loss(hidden, head, **(settings | changes))


def gradients(result: DistillationLoss, hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
    return torch.autograd.grad(result.loss, (hidden, head.weight_PD, head.bias_P))


# -- graph -----------------------------------------------------------------------------------------


def test_only_the_loss_has_a_graph() -> None:
    result = compute(*student())
    assert result.loss.requires_grad
    assert result.loss.shape == ()
    assert not result.ce_sum.requires_grad
    assert not result.kl_sum.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_fp32_and_gradients_of_the_parameters_dtype(dtype) -> None:
    hidden = normal(N, D, seed=1, dtype=dtype).requires_grad_()
    weight = normal(P, D, seed=2, dtype=dtype).requires_grad_()
    teachers = [
        TeacherStates(normal(N, 5, seed=5, dtype=dtype), Head(normal(P, 5, seed=6).to(dtype)))
    ]
    result = compute(hidden, Head(weight), teachers=teachers)
    assert {t.dtype for t in (result.loss, result.ce_sum, result.kl_sum)} == {torch.float32}
    result.loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_teachers_may_differ_in_dtype_from_the_student() -> None:
    hidden, head = student()
    halves = [
        TeacherStates(t.hidden_ND.bfloat16(), Head(t.head.weight_PD.bfloat16()))
        for t in make_teachers()
    ]
    wide = compute(hidden, head)
    assert compute(hidden, head, teachers=halves).kl_sum.item() == pytest.approx(
        wide.kl_sum.item(), rel=0.02
    )


def test_teachers_may_differ_in_dtype_from_each_other() -> None:
    """Side by side in one product, their states would have to be of one."""
    hidden, head = student()
    of_32, of_64 = make_teachers()
    of_32 = replace(
        of_32, hidden_ND=of_32.hidden_ND.float(), head=Head(of_32.head.weight_PD.float())
    )
    mixed, wide = compute(hidden, head, teachers=[of_32, of_64]), compute(hidden, head)
    torch.testing.assert_close(mixed.kl_sum, wide.kl_sum, rtol=1e-6, atol=0)


def test_backward_scales_with_what_comes_from_above() -> None:
    hidden, head = student()
    once = gradients(compute(hidden, head), hidden, head)
    (3 * compute(hidden, head).loss).backward()
    for leaf, gradient in zip((hidden, head.weight_PD, head.bias_P), once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient, rtol=1e-14, atol=0)


def test_backward_twice_gives_the_same() -> None:
    hidden, head = student()
    loss = compute(hidden, head).loss
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    hidden, head = student()
    loss = compute(hidden, head).loss ** 2  # so that what comes from above has a graph
    first = torch.autograd.grad(loss, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_scale_multiplies_the_loss_and_not_the_sums() -> None:
    hidden, head = student()
    plain, scaled = compute(hidden, head), compute(hidden, head, scale=8.0)
    assert scaled.loss.item() == pytest.approx(8 * plain.loss.item(), rel=1e-14)
    assert scaled.ce_sum.item() == plain.ce_sum.item()
    assert scaled.kl_sum.item() == plain.kl_sum.item()


def test_micro_batches_with_the_global_counts_add_up() -> None:
    hidden, head = student()
    whole = compute(hidden, head)
    parts = []
    for rows in (slice(0, 10), slice(10, N)):
        teachers = [TeacherStates(t.hidden_ND[rows], t.head, t.weight) for t in make_teachers()]
        valid = torch.ones(rows.stop - rows.start, dtype=torch.bool)
        parts.append(
            compute(
                hidden[rows], head, labels_N=make_labels()[rows], valid_N=valid, teachers=teachers
            )
        )
    total = parts[0].loss + parts[1].loss
    assert total.item() == pytest.approx(whole.loss.item(), rel=1e-13)
    expected = gradients(whole, hidden, head)
    got = torch.autograd.grad(total, (hidden, head.weight_PD, head.bias_P))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen) -> None:
    hidden, head = student()
    leaves = {"hidden": hidden, "weight": head.weight_PD, "bias": head.bias_P}
    leaves[frozen].requires_grad_(False)
    compute(hidden, head).loss.backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is None] == [frozen]


def test_the_whole_student_frozen_means_no_graph() -> None:
    hidden, head = student()
    for leaf in (hidden, head.weight_PD, head.bias_P):
        leaf.requires_grad_(False)
    assert not compute(hidden, head).loss.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_values_and_no_graph(mode) -> None:
    hidden, head = student()
    trained = compute(hidden, head)
    with mode():
        evaluated = compute(hidden, head)
    assert not evaluated.loss.requires_grad
    assert evaluated.loss.item() == trained.loss.item()
    assert evaluated.kl_sum.item() == trained.kl_sum.item()


def test_teachers_from_inference_mode() -> None:
    hidden, head = student()
    with torch.inference_mode():
        teachers = make_teachers()
    assert teachers[0].hidden_ND.is_inference()
    expected = gradients(compute(hidden, head), hidden, head)
    got = gradients(compute(hidden, head, teachers=teachers), hidden, head)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_under_torch_compile() -> None:
    """A compiled step breaks its graph at the loss and gets the same values and gradients."""
    hidden, head = student()

    def step(states: Tensor) -> Tensor:
        return compute(torch.tanh(states), head).loss * 2

    expected = torch.autograd.grad(step(hidden), (hidden, head.weight_PD))
    got = torch.autograd.grad(
        torch.compile(step, backend="eager")(hidden), (hidden, head.weight_PD)
    )
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)


# -- what is counted -------------------------------------------------------------------------------


def test_what_lies_at_unused_positions_has_no_effect() -> None:
    hidden, head = student()
    valid = torch.ones(N, dtype=torch.bool)
    valid[[9, 19]] = False  # these have no label either
    before = compute(hidden, head, valid_N=valid)
    expected = gradients(before, hidden, head)

    spoilt = hidden.detach().clone()
    spoilt[9], spoilt[19] = torch.nan, torch.inf
    spoilt.requires_grad_()
    teachers = make_teachers()
    teachers[0].hidden_ND[9] = torch.nan
    after = compute(spoilt, head, valid_N=valid, teachers=teachers)
    assert after.loss.item() == before.loss.item()
    got = gradients(after, spoilt, head)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert got[0][[9, 19]].abs().max() == 0


def test_the_last_position_of_a_window_counts_in_the_kl_alone() -> None:
    hidden, head = student()
    valid = torch.zeros(N, dtype=torch.bool)
    valid[9] = True
    result = compute(hidden, head, labels_N=torch.full((N,), IGNORED_LABEL), valid_N=valid)
    assert result.ce_sum.item() == 0
    assert result.kl_sum.item() > 0
    gradient = gradients(result, hidden, head)[0]
    assert gradient[9].abs().max() > 0
    assert gradient[torch.arange(N) != 9].abs().max() == 0


def test_alpha_1_measures_the_kl_and_learns_nothing_from_it() -> None:
    hidden, head = student()
    result = compute(hidden, head, alpha=1.0)
    assert result.kl_sum.item() == compute(hidden, head).kl_sum.item() > 0
    hard = cross_entropy_loss(
        hidden, head, make_labels(), ce_count=36, vocab_size=V, chunk_tokens=7
    )
    assert result.loss.item() == pytest.approx(hard.loss.item(), rel=1e-14)
    torch.testing.assert_close(
        gradients(result, hidden, head), gradients(hard, hidden, head), rtol=1e-12, atol=1e-15
    )


def test_alpha_0_measures_the_ce_and_learns_nothing_from_it() -> None:
    hidden, head = student()
    result = compute(hidden, head, alpha=0.0)
    assert result.ce_sum.item() == pytest.approx(compute(hidden, head).ce_sum.item(), rel=1e-14)
    other_labels = compute(hidden, head, alpha=0.0, labels_N=torch.zeros(N, dtype=torch.int64))
    assert result.loss.item() == other_labels.loss.item() > 0
    got = gradients(result, hidden, head)
    assert all(map(torch.equal, got, gradients(other_labels, hidden, head)))


def test_no_teachers_means_no_kl() -> None:
    hidden, head = student()
    result = compute(hidden, head, teachers=[])
    assert result.kl_sum.item() == 0
    assert result.loss.item() == pytest.approx(0.3 * result.ce_sum.item() / 36, rel=1e-14)


def test_no_positions_at_all() -> None:
    _, head = student()
    hidden = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
    teachers = [TeacherStates(torch.empty(0, 5).double(), Head(normal(P, 5, seed=1)))]
    none = torch.empty(0, dtype=torch.int64)
    result = compute(hidden, head, labels_N=none, valid_N=none.bool(), teachers=teachers)
    result.loss.backward()
    assert result.loss.item() == 0
    assert head.weight_PD.grad.abs().max() == 0


def test_a_student_equal_to_its_teacher_has_no_kl() -> None:
    hidden, head = student()
    twin = TeacherStates(hidden.detach(), Head(head.weight_PD.detach(), head.bias_P.detach()))
    result = compute(hidden, head, teachers=[twin, twin], alpha=0.0)
    assert result.kl_sum.item() == pytest.approx(0, abs=1e-12)
    assert gradients(result, hidden, head)[1].abs().max() < 1e-12


# -- without teachers ------------------------------------------------------------------------------


def test_cross_entropy_loss_is_pytorchs() -> None:
    hidden, head = student()
    z = F.linear(hidden, head.weight_PD[:V], head.bias_P[:V])
    expected = F.cross_entropy(z, make_labels(), ignore_index=IGNORED_LABEL)
    result = cross_entropy_loss(
        hidden, head, make_labels(), ce_count=36, scale=2.0, vocab_size=V, chunk_tokens=7
    )
    assert result.loss.item() == pytest.approx(2 * expected.item(), rel=1e-13)
    assert result.ce_sum.item() == pytest.approx(36 * expected.item(), rel=1e-13)
    assert not result.ce_sum.requires_grad
    torch.testing.assert_close(
        gradients(result, hidden, head),
        gradients(DistillationLoss(2 * expected, z, z), hidden, head),
    )


def test_cross_entropy_of_each_position() -> None:
    hidden, head = student()
    z = F.linear(hidden, head.weight_PD[:V], head.bias_P[:V]).detach()
    expected = F.cross_entropy(z, make_labels(), ignore_index=IGNORED_LABEL, reduction="none")
    got = cross_entropy_sum(
        hidden, head, make_labels(), vocab_size=V, chunk_tokens=7, per_token=True
    )
    assert got.shape == (N,)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected)
    assert got[9].item() == 0
    total = cross_entropy_sum(hidden, head, make_labels(), vocab_size=V)
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-13)


# -- our own mistakes ------------------------------------------------------------------------------


def test_a_label_outside_the_vocabulary_is_not_scored() -> None:
    hidden, head = student()
    labels = make_labels()
    labels[0] = V  # a padding row
    with pytest.raises(RuntimeError, match="out of bounds"):
        compute(hidden, head, labels_N=labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels_N": make_labels()[1:]}, "label"),
        ({"valid_N": torch.ones(N - 1, dtype=torch.bool)}, "validity"),
        (
            {"teachers": [TeacherStates(normal(N - 1, 5, seed=1), Head(normal(P, 5, seed=1)))]},
            "teach",
        ),
        ({"chunk_tokens": 0}, "chunk"),
        ({"vocab_size": P + 1}, "exceeds"),
    ],
)
def test_misshapen_inputs_are_our_mistake(change, message) -> None:
    with pytest.raises(AssertionError, match=message):
        compute(*student(), **change)


def test_hidden_states_and_head_of_two_dtypes_are_our_mistake() -> None:
    hidden, head = student()
    with pytest.raises(AssertionError, match="dtype"):
        compute(hidden.float(), head)


# -- memory ----------------------------------------------------------------------------------------


class AllocationRecorder(TorchDispatchMode):
    """Sizes of the tensors that operators return, and of those with memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.fresh_sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = tree_leaves((args, kwargs))
        taken = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.sizes.append(tensor.numel())
                if tensor.untyped_storage().data_ptr() not in taken:
                    self.fresh_sizes.append(tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
def test_no_tensor_of_all_positions_times_the_vocabulary(mean_of, dtype) -> None:
    positions, size, width, chunk = 600, 200, 16, 50
    hidden = normal(positions, width, seed=1).to(dtype).requires_grad_()
    weight = normal(size, width, seed=2).to(dtype).requires_grad_()
    teachers = [
        TeacherStates(
            normal(positions, d, seed=3).to(dtype), Head(normal(size, d, seed=4).to(dtype))
        )
        for d in (8, 24)
    ]
    with AllocationRecorder() as recorder:
        distillation_loss(
            hidden,
            Head(weight),
            make_labels(positions, size),
            torch.ones(positions, dtype=torch.bool),
            teachers,
            alpha=0.5,
            temperature=2.0,
            mean_of=mean_of,
            ce_count=540,
            kl_count=60,
            vocab_size=size,
            chunk_tokens=chunk,
        ).loss.backward()
    assert hidden.grad is not None
    largest = max(recorder.sizes)
    assert chunk * size <= largest  # else the recorder saw nothing
    assert largest <= max(chunk * size, size * width, positions * width) < positions * size
    # Logits of the student and of each teacher, or of their sum, and three spaces to work in (here
    # a tile is a chunk), once for all twelve chunks.
    expected = 5 if mean_of == "logits" else 6
    assert sum(numel == chunk * size for numel in recorder.fresh_sizes) == expected


@pytest.mark.parametrize("k", [1, 20])
def test_top_k_keeps_no_tensor_of_all_positions_times_the_vocabulary(k) -> None:
    positions, size, width, chunk = 600, 200, 16, 50
    hidden = normal(positions, width, seed=1).requires_grad_()
    weight = normal(size, width, seed=2).requires_grad_()
    teachers = [
        TeacherStates(normal(positions, d, seed=3), Head(normal(size, d, seed=4))) for d in (8, 24)
    ]
    with AllocationRecorder() as recorder:
        targets = top_k_targets(
            teachers, k=k, temperature=2.0, mean_of="logits", vocab_size=size, chunk_tokens=chunk
        )
        distillation_loss(
            hidden,
            Head(weight),
            make_labels(positions, size),
            torch.ones(positions, dtype=torch.bool),
            targets,
            alpha=0.5,
            temperature=2.0,
            mean_of="logits",
            ce_count=540,
            kl_count=60,
            vocab_size=size,
            chunk_tokens=chunk,
        ).loss.backward()
    assert hidden.grad is not None
    assert chunk * size <= max(recorder.sizes) < positions * size
    # The teachers' summed logits and two spaces for the targets, then the student's and two.
    assert sum(numel == chunk * size for numel in recorder.fresh_sizes) == 6


@pytest.mark.parametrize("cut", ["token_ids_NK", "log_probs_NK"])
def test_top_k_targets_of_other_positions_are_our_mistake(cut) -> None:
    targets = top_k_targets(
        make_teachers(), k=3, temperature=2.0, mean_of="logits", vocab_size=V, chunk_tokens=7
    )
    with pytest.raises(AssertionError):
        compute(*student(), teachers=replace(targets, **{cut: getattr(targets, cut)[1:]}))


def test_evaluation_makes_no_gradients() -> None:
    hidden, head = student()
    with torch.no_grad(), AllocationRecorder() as recorder:
        compute(hidden, head)
    assert P * D not in recorder.fresh_sizes
    assert N * D not in recorder.fresh_sizes
    with AllocationRecorder() as recorder:
        compute(hidden, head)
    assert P * D in recorder.fresh_sizes
    assert N * D in recorder.fresh_sizes


def test_the_chunk_chosen_for_us_is_a_fraction_of_a_large_batch() -> None:
    """64 thousand tokens of vocabulary: 128 positions at a time make 32 MiB of fp32."""
    positions, size, width = 200, 65536, 2
    hidden = normal(positions, width, seed=1).float()
    with AllocationRecorder() as recorder:
        cross_entropy_sum(
            hidden,
            Head(normal(size, width, seed=2).float()),
            make_labels(positions, size),
            vocab_size=size,
        )
    assert max(recorder.fresh_sizes) == 128 * size
