"""A packed batch against its documents one by one: the same loss, the same gradient, in float64.

The reference runs every piece of a document as a sequence of its own, by the model's own forward
pass, and takes the formula plainly from whole logits. The packed batch goes the way of training.

FlashAttention needs a card. Here transformers' code for it runs over a plain function with the
kernel's signature: what is shown is that the kernel is given the right lengths.

Shapes: B windows, S positions, N = B * S, V vocabulary, K teachers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, masking_utils
from transformers import modeling_flash_attention_utils as flash

from babyllama_ds.engine import quirks
from babyllama_ds.evaluation.cross_entropy import evaluate_cross_entropy
from babyllama_ds.losses.distillation import TeacherStates
from babyllama_ds.models.compiled import forget_compiled
from babyllama_ds.models.documents import Pieces
from babyllama_ds.models.fused import fuse
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.training.batches import Batch, MicroBatch, micro_batch
from babyllama_ds.training.objective import Objective

LENGTH, VOCAB = 16, 59  # models have 61 rows: two are padding
# Lengths of documents, window by window; what is cut by a window's end goes on as another piece.
WINDOWS = ((16,), (5, 11), (1, 1, 3, 10, 1), (15, 1), (1,) * 16, (8, 8))
SPECS = {
    "distilled": DistillationSpec(alpha=0.3, temperature=2.0, soft_reduction="token"),
    "probabilities": DistillationSpec(
        alpha=0.6, temperature=1.0, soft_reduction="token", mean_of="probabilities", chunk_tokens=7
    ),
    "alone": None,
}


CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    ),
    "gpt2": GPT2Config(
        vocab_size=61, n_embd=24, n_layer=2, n_head=3, n_positions=64, initializer_range=0.2
    ),
}


def random_model(kind: str, seed: int = 0) -> nn.Module:
    """LLaMA: grouped queries, untied; GPT-2: tied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))


def tokens_and_begins() -> tuple[Tensor, np.ndarray]:
    tokens_BS = torch.randint(0, VOCAB, (len(WINDOWS), LENGTH), generator=_generator(3))
    begins_BS = np.zeros((len(WINDOWS), LENGTH), np.bool_)
    for row, lengths in enumerate(WINDOWS):
        assert sum(lengths) == LENGTH
        begins_BS[row, np.cumsum((0, *lengths[:-1]))] = True
    return tokens_BS, begins_BS


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pieces_apart(tokens_BS: Tensor) -> list[Tensor]:
    """The token ids [1, length] of every piece."""
    return [
        piece[None]
        for row, lengths in zip(tokens_BS, WINDOWS, strict=True)
        for piece in row.split(lengths)
    ]


def one_by_one(
    student: nn.Module, teachers: Sequence[nn.Module], spec: DistillationSpec | None
) -> Tensor:
    """L of all pieces, each a sequence of its own."""
    ce_sum = kl_sum = torch.zeros((), dtype=torch.float64)
    num_labelled = num_valid = 0
    for ids_1S in pieces_apart(tokens_and_begins()[0]):
        logits_SV = student(input_ids=ids_1S).logits[0, :, :VOCAB]
        ce_sum = ce_sum + cross_entropy(logits_SV[:-1], ids_1S[0, 1:], reduction="sum")
        num_labelled += ids_1S.shape[1] - 1
        num_valid += ids_1S.shape[1]
        if spec is not None:
            with torch.no_grad():
                theirs_KSV = torch.stack(
                    [each(input_ids=ids_1S).logits[0, :, :VOCAB] for each in teachers]
                )
            if spec.mean_of == "logits":
                target_SV = softmax(theirs_KSV.mean(0) / spec.temperature, -1)
            else:
                target_SV = softmax(theirs_KSV / spec.temperature, -1).mean(0)
            ours_SV = log_softmax(logits_SV / spec.temperature, -1)
            kl_sum = kl_sum + kl_div(ours_SV, target_SV, reduction="sum")
    if spec is None:
        return ce_sum / num_labelled
    soft = spec.temperature**2 * kl_sum / num_valid
    return spec.alpha * ce_sum / num_labelled + (1 - spec.alpha) * soft


def packed_batch() -> Batch:
    tokens_BS, begins_BS = tokens_and_begins()
    real_B = torch.ones(len(WINDOWS), dtype=torch.bool)
    parts = [slice(0, 4), slice(4, None)]  # two micro-batches
    return Batch(
        epoch=0,
        window_ids=np.arange(len(WINDOWS)),
        length=LENGTH,
        micro_batches=tuple(
            micro_batch(tokens_BS[p], real_B[p], pieces=Pieces.of(begins_BS[p])) for p in parts
        ),
        labelled=int((~begins_BS[:, 1:]).sum()),
    )


def targets(teachers: Sequence[nn.Module], micro: MicroBatch) -> list[TeacherStates]:
    found = []
    for teacher in teachers:
        backbone, head = split_causal_lm(teacher)
        with torch.no_grad():
            states = backbone(micro.input_ids_BS, micro.pieces).flatten(0, 1)
        found.append(TeacherStates(states, head))
    return found


def packed(objective: Objective, teachers: Sequence[nn.Module]) -> Tensor:
    """L of the packed batch, summed over its micro-batches; its gradient is made."""
    batch = packed_batch()
    counts = objective.counts(batch, num_ranks=1, accumulation_steps=1)
    loss = torch.zeros((), dtype=torch.float64)
    for micro in batch.micro_batches:
        part = objective(micro, targets(teachers, micro), counts).loss
        part.backward()
        loss = loss + part.detach()
    return loss


def plain_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """What `flash_attn_varlen_func` computes, sequence by sequence: [N, H, D]."""
    assert causal and not dropout_p and window_size == (-1, -1) and not deterministic  # noqa: PT018
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert isinstance(max_seqlen_q, int)  # the kernel takes no tensor
    assert max_seqlen_q == max_seqlen_k == max(lengths)
    groups = q.shape[1] // k.shape[1]
    outs = []
    for q_SHD, k_SHD, v_SHD in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        k_SHD, v_SHD = (t.repeat_interleave(groups, 1) for t in (k_SHD, v_SHD))
        scores_HST = torch.einsum("shd,thd->hst", q_SHD, k_SHD) * softmax_scale
        later_ST = torch.ones(scores_HST.shape[1:], dtype=torch.bool).triu(1)
        weights_HST = scores_HST.masked_fill(later_ST, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hst,thd->shd", weights_HST, v_SHD))
    return torch.cat(outs)


@pytest.fixture
def plain_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' code around FlashAttention, over the function above."""

    def no_whole_windows(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the lengths of documents were not used")

    functions = (no_whole_windows, plain_varlen, no_whole_windows, None, None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)


def with_kernel(model: nn.Module, kernel: str) -> nn.Module:
    """In float64, with a kernel: `fused` is this project's own plain one."""
    model = model.double().eval()
    if kernel == "flash_attention_2":
        model.config._attn_implementation = kernel  # asked for aloud, it would have to be installed
        return model
    model.set_attn_implementation("eager" if kernel == "fused" else kernel)
    if kernel == "fused":
        fuse(model)
    return model


@pytest.fixture(params=["as it is", "as the engine leaves it"])
def transformers_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks for sequences in the positions, or is told by the engine."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", LOOKING)
    monkeypatch.setattr(flash, "_is_packed_sequence", LOOKING_IN_LAYERS)
    if request.param != "as it is":
        quirks.skip_looks_at_windows()


LOOKING = masking_utils.find_packed_sequence_indices
LOOKING_IN_LAYERS = flash._is_packed_sequence


@pytest.mark.usefixtures("plain_flash", "transformers_way")
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "fused", "flash_attention_2"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_documents_are_documents(kind: str, kernel: str, name: str) -> None:
    spec = SPECS[name]
    families = ("llama", "gpt2") if spec else ()
    teachers = [with_kernel(random_model(each, seed=7), kernel) for each in families]
    student = with_kernel(random_model(kind), kernel)
    loss = packed(Objective(student, vocab_size=VOCAB, distillation=spec), teachers)

    alone = with_kernel(random_model(kind), "eager")
    teachers_alone = [with_kernel(random_model(each, seed=7), "eager") for each in families]
    expected = one_by_one(alone, teachers_alone, spec)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-7, atol=0)
    ours, theirs = (dict(model.named_parameters()) for model in (student, alone))
    for key, parameter in theirs.items():
        error = (ours[key].grad - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-12)
        assert error < 1e-6, key


@pytest.mark.usefixtures("plain_flash")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_layer_looks_at_positions_for_documents(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FlashAttention and one window a layer of transformers would wait for the device."""
    asked = []
    monkeypatch.setattr(flash, "_is_packed_sequence", lambda *_, **__: asked.append("looked"))
    whole = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)

    def plain(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        groups = q.shape[2] // k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return whole(q, *(t.repeat_interleave(groups, 1) for t in (k, v))).transpose(1, 2)

    functions = (plain, plain_varlen, plain, None, None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    model = with_kernel(random_model(kind), "flash_attention_2")
    tokens_1S = tokens_and_begins()[0][:1]
    expected = with_kernel(random_model(kind), "eager")(input_ids=tokens_1S).logits
    backbone, head = split_causal_lm(model)
    backbone(tokens_1S)
    assert asked, "transformers does not ask any more: `skip_looks_at_windows` can do less"
    asked.clear()
    quirks.skip_looks_at_windows()
    states_1SD = backbone(tokens_1S)
    assert not asked
    torch.testing.assert_close(states_1SD @ head.weight_PD.T, expected, rtol=1e-4, atol=1e-6)


def test_under_sequence_a_batch_is_not_its_documents() -> None:
    """Its KL is divided by windows, whatever they hold: as `docs/documents.md` says."""
    spec = DistillationSpec(alpha=0.3, soft_reduction="sequence")
    teacher, student = (with_kernel(random_model("llama", seed=s), "sdpa") for s in (7, 0))
    objective = Objective(student, vocab_size=VOCAB, distillation=spec)
    batch = packed_batch()
    counts = objective.counts(batch, num_ranks=1, accumulation_steps=1)
    assert counts.kl == len(WINDOWS)
    assert packed(objective, [teacher]).item() > 2 * one_by_one(student, [teacher], spec).item()


def test_the_last_position_of_a_piece_predicts_nothing_and_still_learns_from_teachers() -> None:
    for micro in packed_batch().micro_batches:
        assert micro.pieces is not None
        labels_BS = micro.labels_N.view_as(micro.input_ids_BS)
        lasts_BT = micro.pieces.positions_BS[:, 1:] == 0
        assert (labels_BS[:, :-1][lasts_BT] == -100).all()
        assert (labels_BS[:, :-1][~lasts_BT] == micro.input_ids_BS[:, 1:][~lasts_BT]).all()
        assert micro.valid_N.all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_development_text_is_scored_document_by_document(kind: str) -> None:
    tokens_BS, begins_BS = tokens_and_begins()
    model = with_kernel(random_model(kind), "sdpa")
    lengths = np.arange(1, VOCAB + 1)
    score = evaluate_cross_entropy(
        model,
        lambda ids: tokens_BS[list(ids)].numpy(),
        len(WINDOWS),
        device="cpu",
        batch_windows=4,
        vocab_size=VOCAB,
        byte_lengths=lengths,
        begins_of=lambda ids: begins_BS[list(ids)],
    )
    labels = torch.cat([ids_1S[0, 1:] for ids_1S in pieces_apart(tokens_BS)])
    with torch.no_grad():
        expected = one_by_one(model, [], None)
    assert score.num_tokens == len(labels)
    assert score.num_bytes == int(lengths[labels].sum())
    assert score.cross_entropy == pytest.approx(expected.item(), rel=1e-7)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    counted = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    yield counted
    forget_compiled()


@pytest.mark.parametrize("transformers_way", ["as the engine leaves it"], indirect=True)
@pytest.mark.usefixtures("transformers_way")
def test_a_compiled_backbone_is_compiled_once_for_all_pieces(counter: CompileCounter) -> None:
    """Masks are of one shape, whatever documents there are; without generating code."""
    plain, fast = (
        Objective(with_kernel(random_model("llama"), "sdpa"), vocab_size=VOCAB, distillation=None)
        for _ in range(2)
    )
    fast.compile_layers()
    tokens_BS, begins_BS = tokens_and_begins()
    frames = []
    for rows in ([0, 1], [2, 3], [4, 5], [0, 0]):
        micro = micro_batch(
            tokens_BS[rows], torch.ones(2, dtype=torch.bool), pieces=Pieces.of(begins_BS[rows])
        )
        counts = plain.counts(packed_batch(), num_ranks=1, accumulation_steps=1)
        values = []
        for objective in (plain, fast):
            objective.zero_grad()
            loss = objective(micro, [], counts).loss
            loss.backward()
            values.append([loss, *(parameter.grad for parameter in objective.parameters())])
        torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=1e-12)
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert frames == [frames[0]] * 4, "compiled anew"


def test_the_stand_in_has_the_kernels_arguments() -> None:
    """transformers asks a kernel's signature for what it may give it."""
    found = set(inspect.signature(plain_varlen).parameters)
    assert {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal"} < found
