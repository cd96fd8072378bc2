"""Loaded models of many families: whatever the stack does with one is what transformers does.

Each family is made small and at random, with what is its own: windows longer than its sliding
window, positions with an offset, projected states, biased, capped and scaled heads, dropout in its
configuration, a vocabulary padded with rows that, taken for tokens, would outdo all others. It is
saved, and read as a job reads it. The reference is transformers' own model, its `logits`, and the
formula written out plainly.

docs/own-teachers.md has a table of families and what each can do: it is checked here, row by row.

Shapes: B windows, S positions, N = B * S, V vocabulary, P rows of the padded embedding.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from babyllama_ds import files
from babyllama_ds.corpus.shards import TokenShards
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.errors import ModelError
from babyllama_ds.evaluation.forward import likelihood_of
from babyllama_ds.evaluation.generate import Sampling, continued
from babyllama_ds.evaluation.loading import load_causal_lm
from babyllama_ds.losses.distillation import distillation_loss
from babyllama_ds.losses.heads import logits as head_logits
from babyllama_ds.models.attention import resolve_attention
from babyllama_ds.models.build import build_model, check_positions, count_parameters, load_model
from babyllama_ds.models.documents import Pieces, check_documents
from babyllama_ds.models.layers import LayerTap, check_layers
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.models.recomputing import check_recomputable, recompute_layers
from babyllama_ds.models.sizes import absent_kernels, model_sizes
from babyllama_ds.spec.corpus import Phases
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.models import PretrainedModel
from babyllama_ds.stopping import StopRequest
from babyllama_ds.store import Store
from babyllama_ds.teachers.cache.hidden import remember
from babyllama_ds.teachers.cache.opening import CacheContext
from babyllama_ds.teachers.cache.remembered import remembered_ensemble
from babyllama_ds.teachers.cache.sources import Teacher, TeacherInput
from babyllama_ds.teachers.ensemble import Ensemble, Member, Targets
from babyllama_ds.training.batches import MicroBatch, micro_batch
from references.flops import forward_flops

ROOT = Path(__file__).parents[2]
P, V, S = 64, 61, 20
ALPHA, TEMPERATURE = 0.3, 2.0
POSITIONS, SLIDING = 32, 5

SMALL: dict[str, Any] = {
    "vocab_size": P,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "attention_dropout": 0.3}
# Names of an older kind, which transformers maps to those above.
GPT: dict[str, Any] = {"vocab_size": P, "n_embd": 24, "n_layer": 2, "n_head": 4}
OPT: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if not key.startswith(("inter", "init"))},
    **{"ffn_dim": 40, "init_std": 0.2, "dropout": 0.3, "attention_dropout": 0.3},
}
FALCON: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if not key.startswith("inter")},
    **{"hidden_dropout": 0.3, "attention_dropout": 0.3},
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: hf.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=SLIDING, max_window_layers=1
    ),
    "qwen2 tied": lambda: hf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=SLIDING),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "opt": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=24),
    "opt projected": lambda: hf.OPTConfig(
        **OPT, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL, hidden_dropout=0.3, attention_dropout=0.3),
    "gptj": lambda: hf.GPTJConfig(**GPT, n_positions=POSITIONS, rotary_dim=4, resid_pdrop=0.3),
    "phi": lambda: hf.PhiConfig(**{**SMALL, "num_attention_heads": 2, "resid_pdrop": 0.3}),
    "phi3": lambda: hf.Phi3Config(**GROUPED, resid_pdrop=0.3, sliding_window=SLIDING),
    "gemma": lambda: hf.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=SLIDING, final_logit_softcapping=3.0
    ),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=SLIDING),
    "falcon": lambda: hf.FalconConfig(**FALCON, alibi=False),
    "bloom": lambda: hf.BloomConfig(
        vocab_size=P, hidden_size=24, n_layer=2, n_head=4, hidden_dropout=0.3
    ),
    "mpt": lambda: hf.MptConfig(
        vocab_size=P, d_model=24, n_layers=2, n_heads=4, max_seq_len=POSITIONS
    ),
    "granite": lambda: hf.GraniteConfig(**GROUPED, logits_scaling=3.0),
    "cohere": lambda: hf.CohereConfig(**GROUPED, logit_scale=0.25),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "smollm3": lambda: hf.SmolLM3Config(**GROUPED),
}
FAMILIES = list(CONFIGS)
MORE_THAN_A_HEAD = ["gemma2", "granite", "cohere"]
PLAIN = [family for family in FAMILIES if family not in MORE_THAN_A_HEAD]
ACROSS_DOCUMENTS = ["opt", "opt projected", "falcon", "bloom", "mpt"]
APART = [family for family in FAMILIES if family not in ACROSS_DOCUMENTS]
WITHOUT_LIMIT = ["bloom"]
NARROW_LAST_LAYER = ["opt projected"]
WITHOUT_SDPA = ["gptj", "gemma2", "bloom", "mpt"]
UNKNOWN_TO_THE_COUNTER = ["mixtral"]
"""PyTorch's counter does not know the product of experts."""
IN_FP32 = ["mixtral"]
"""Without a kernel for float64."""


@functools.cache
def model_dir(family: str, base: Path) -> Path:
    """A directory as its owner saved it."""
    directory = base / family.replace(" ", "-")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, family)))
        config = hf.LlamaConfig(**GROUPED) if family == "llama" else CONFIGS[family]()
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[V:] = 9.0  # for a token, most of the probability
        if head.bias is not None:
            head.bias[V:] = 9.0
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def saved(base: Path) -> Callable[[str], Path]:
    return lambda family: model_dir(family, base)


def loaded(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """As a job on a CPU loads a teacher."""
    spec = PretrainedModel(kind="pretrained", path=str(directory))
    kernel = resolve_attention(
        *("auto",),
        device="cpu",
        precision="fp32",
        training=False,
        where="test",
        missing=absent_kernels(spec, where="test"),
    )
    return load_model(str(directory), attention=kernel, where="test", dtype=dtype)


def own(directory: Path, family: str = "") -> Any:
    """transformers' own model, in float64 where it can."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()
    return model if family in IN_FP32 else model.double()


# -- what the models see ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> Iterator[torch.device]:
    """A world of one rank."""
    from babyllama_ds.engine import distributed

    before = dict(os.environ)
    os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(key, None)
    try:
        yield distributed.start("cpu")
    finally:
        distributed.stop()
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Scene:
    """Windows, and what remembers their targets."""

    seen: TeacherInput
    context: CacheContext
    saved: Callable[[str], Path]

    @property
    def batch(self) -> MicroBatch:
        """Three windows, none of them whole to a sliding window."""
        numbers_B = np.array([4, 0, 2])
        tokens_BS = torch.from_numpy(self.seen.windows.numbered(numbers_B))
        return micro_batch(tokens_BS, torch.ones(3, dtype=torch.bool), numbers_B, numbers_B[:0])

    def teacher(self, family: str, weight: float = 1.0) -> Teacher:
        directory = self.saved(family)

        def load() -> FrozenModel:
            return FrozenModel(
                loaded(directory), device=self.context.device, dtype=torch.float32, where=family
            )

        return Teacher(name=family, weight=weight, model_dir=directory, attention="sdpa", load=load)


@pytest.fixture(scope="module")
def scene(alone: torch.device, base: Path, saved: Callable[[str], Path]) -> Scene:
    tokens_dir = base / "tokens"
    tokens_dir.mkdir()
    tokens = np.random.default_rng(1).integers(3, V, 6 * S + 1).astype("<u2")
    (tokens_dir / "train-00000.bin").write_bytes(tokens.tobytes())
    files.write_manifest(tokens_dir, fingerprint="tokens")
    index: dict[str, Any] = {"vocab_size": V, "splits": {"train": {}}}
    shards = TokenShards(index, {"train": [tokens]})
    seen = TeacherInput(
        windows=TrainWindows(shards, length=S, offsets=Phases(phases=1), seed=0),
        tokens_dir=tokens_dir,
        vocab_size=V,
        dtype=torch.float32,
        forward_windows=3,
    )
    context = CacheContext(
        store=Store(base / "store"),
        stop=StopRequest(),
        device=alone,
        tier="disk",
        student_bytes=0,
    )
    return Scene(seen, context, saved)


def teacher_logits(scene: Scene, family: str) -> Tensor:
    """[N, V], by transformers alone."""
    with torch.no_grad():
        logits_BSP = own(scene.saved(family), family)(input_ids=scene.batch.input_ids_BS).logits
    found: Tensor = logits_BSP.flatten(0, 1)[:, :V].double()
    return found


# -- as teachers -----------------------------------------------------------------------------------


def labels_and_valid() -> tuple[Tensor, Tensor]:
    """[N] each: no label at a window's end, and the last window ends in padding."""
    valid_BS = torch.ones(3, S, dtype=torch.bool)
    valid_BS[-1, -6:] = False
    labels_BS = torch.randint(0, V, (3, S), generator=torch.Generator().manual_seed(7))
    labels_BS[:, -1] = labels_BS[~valid_BS] = -100
    return labels_BS.flatten(), valid_BS.flatten()


def textbook(z_NV: Tensor, mean_NV: Tensor) -> Tensor:
    """α·CE + (1 - α)·T²·KL(teachers || student), with 9 labels and 3 windows."""
    labels_N, valid_N = labels_and_valid()
    p_NV = softmax(mean_NV / TEMPERATURE, -1)
    kl_NV = kl_div(log_softmax(z_NV / TEMPERATURE, -1), p_NV, reduction="none")
    ce = cross_entropy(z_NV, labels_N, ignore_index=-100, reduction="sum")
    return ALPHA * ce / 9 + (1 - ALPHA) * TEMPERATURE**2 * kl_NV[valid_N].sum() / 3


def stacks(student: nn.Module, tokens_BS: Tensor, targets: Targets) -> Tensor:
    """The same by the project's way."""
    backbone, head = split_causal_lm(student)
    return distillation_loss(
        backbone(tokens_BS).flatten(0, 1),
        head,
        *labels_and_valid(),
        targets,
        alpha=ALPHA,
        temperature=TEMPERATURE,
        mean_of="logits",
        ce_count=9,
        kl_count=3,
        vocab_size=V,
        chunk_tokens=7,
    ).loss


def small_llama() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(hf.LlamaConfig(**SMALL)).eval()


def check_targets(scene: Scene, targets: Targets, mean_NV: Tensor) -> None:
    """Loss and all gradients of a student are those by the book."""
    student = small_llama()
    exact = small_llama().double()
    tokens_BS = scene.batch.input_ids_BS
    expected = textbook(exact(input_ids=tokens_BS).logits.flatten(0, 1)[:, :V], mean_NV)
    got = stacks(student, tokens_BS, targets)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    check_gradients(student, got, exact, expected)


def check_gradients(model: nn.Module, loss: Tensor, other: nn.Module, other_loss: Tensor) -> None:
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(other_loss, list(other.parameters()))
    scale = max(float(torch.linalg.norm(each)) for each in theirs)
    for (name, _), one, two in zip(model.named_parameters(), ours, theirs, strict=True):
        error = float(torch.linalg.norm(one.double() - two.double()))
        assert error < 1e-4 * max(float(torch.linalg.norm(two)), 1e-2 * scale), name


@pytest.mark.parametrize("family", FAMILIES)
def test_live_targets_are_those_of_transformers(family: str, scene: Scene) -> None:
    """Of an ensemble of two families with unequal votes."""
    teachers = [scene.teacher(family, weight=3.0), scene.teacher("llama")]
    ensemble = Ensemble([Member(each.name, each.load(), each.weight) for each in teachers])
    mean_NV = 0.75 * teacher_logits(scene, family) + 0.25 * teacher_logits(scene, "llama")
    check_targets(scene, ensemble.targets(scene.batch), mean_NV)
    assert ensemble.members[0].head.states_are_logits == (family in MORE_THAN_A_HEAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_a_teacher_is_as_exact_as_transformers_own(family: str, scene: Scene) -> None:
    directory, tokens_BS = scene.saved(family), scene.batch.input_ids_BS
    exact_NV = teacher_logits(scene, family)
    frozen = FrozenModel(
        loaded(directory, torch.bfloat16), device=scene.context.device, dtype=torch.bfloat16
    )
    with torch.inference_mode():
        ours_NV = head_logits(frozen.hidden_states(tokens_BS).flatten(0, 1), frozen.head, V)
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        theirs_NV = plain(input_ids=tokens_BS).logits.flatten(0, 1)[:, :V]
    errors = [float((each.double() - exact_NV).abs().max()) for each in (ours_NV, theirs_NV)]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("family", PLAIN)
def test_remembered_hidden_states_make_the_same_targets(family: str, scene: Scene) -> None:
    remembered = Ensemble([remember(scene.teacher(family), scene.seen, scene.context)])
    check_targets(scene, remembered.targets(scene.batch), teacher_logits(scene, family))
    remembered.destroy()


@pytest.mark.parametrize("family", FAMILIES)
def test_remembered_most_likely_tokens_are_those_of_transformers(family: str, scene: Scene) -> None:
    spec = DistillationSpec.model_validate(
        {"cache": "topk", "cache_top_k": 9, "temperature": TEMPERATURE}
    )
    ensemble = remembered_ensemble(spec, [scene.teacher(family)], scene.seen, scene.context)
    targets: Any = ensemble.targets(scene.batch)
    p_NV = softmax(teacher_logits(scene, family) / TEMPERATURE, -1)
    at_ids = p_NV.gather(-1, targets.token_ids_NK.long()).log()
    torch.testing.assert_close(targets.log_probs_NK.double(), at_ids, atol=1e-4, rtol=0)
    torch.testing.assert_close(at_ids, p_NV.topk(9).values.log(), atol=1e-4, rtol=0)
    ensemble.destroy()


# -- as students -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_as_a_student_that_is_started_from(family: str, scene: Scene) -> None:
    directory, tokens_BS = scene.saved(family), scene.batch.input_ids_BS
    teacher = scene.teacher("llama")
    ensemble = Ensemble([Member(teacher.name, teacher.load(), 1.0)])
    mean_NV = teacher_logits(scene, "llama")
    spec = PretrainedModel(kind="pretrained", path=str(directory))
    tokenizer: Any = range(V)  # its length is all that is asked
    student = build_model(spec, tokenizer, seed=0, attention="eager", where="student.model").eval()
    exact = own(directory, family)
    expected = textbook(exact(input_ids=tokens_BS).logits.flatten(0, 1)[:, :V], mean_NV)
    got = stacks(student, tokens_BS, ensemble.targets(scene.batch))
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    check_gradients(student, got, exact, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_give_the_same_gradients(family: str, scene: Scene) -> None:
    tokens_BS = scene.batch.input_ids_BS
    spec = PretrainedModel(kind="pretrained", path=str(scene.saved(family)))
    tokenizer: Any = range(V)
    student = build_model(spec, tokenizer, seed=0, attention="eager", where="test").train()
    check_recomputable(student, where="test")
    (block, *_) = next(module for module in student.modules() if isinstance(module, nn.ModuleList))
    passes: list[int] = []
    attention = next(module for name, module in block.named_children() if "att" in name)
    attention.register_forward_pre_hook(lambda *_: passes.append(1))

    def gradients() -> list[Tensor]:
        torch.manual_seed(5)  # dropout has the same masks
        backbone, head = split_causal_lm(student)
        states_ND = backbone(tokens_BS).flatten(0, 1)
        loss = head_logits(states_ND, head, V).float().square().mean()
        return list(torch.autograd.grad(loss, list(student.parameters())))

    plain = gradients()
    passes.clear()
    recompute_layers(student)
    torch.testing.assert_close(gradients(), plain)
    assert len(passes) == 2  # forward, and once more on the way back


# -- layers, documents, sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_layers_are_those_of_transformers(family: str, scene: Scene) -> None:
    model, tokens_BS = loaded(scene.saved(family)), scene.batch.input_ids_BS
    backbone, layers = split_causal_lm(model)[0], [0, 1, 2]
    if family in NARROW_LAST_LAYER:
        with pytest.raises(ModelError, match=r"layer 2 gives states of shape \(1, 8, 16\)") as told:
            check_layers(model, backbone, layers, where="teachers.a.model")
        assert "a width of 24" in str(told.value)
        layers = [0, 1]
    check_layers(model, backbone, layers, where="teachers.a.model")
    tap = LayerTap(model, layers, where="test")
    with torch.no_grad():
        _, kept = tap.collect(lambda: backbone(tokens_BS))
        expected = model(input_ids=tokens_BS, output_hidden_states=True).hidden_states
    for layer in layers:
        torch.testing.assert_close(kept[layer], expected[layer])


BEGINS = (0, 9, 12)


@pytest.mark.parametrize("family", APART)
def test_documents_are_kept_apart(family: str, scene: Scene) -> None:
    """Pieces of 9, 3 and 8 tokens: each as if it were alone."""
    model, tokens_BS = loaded(scene.saved(family)), scene.batch.input_ids_BS
    backbone, head = split_causal_lm(model)
    check_documents(model, backbone, where="teachers.a.model")
    begins_BS = np.tile(np.isin(np.arange(S), BEGINS), (3, 1))
    with torch.no_grad():
        states_ND = backbone(tokens_BS, Pieces.of(begins_BS)).flatten(0, 1)
        packed_NV = head_logits(states_ND, head, V)
        plain = own(scene.saved(family), family)
        alone = [
            plain(input_ids=tokens_BS[:, start:stop]).logits
            for start, stop in zip(BEGINS, (*BEGINS[1:], S), strict=True)
        ]
    expected_NV = torch.cat(alone, dim=1).flatten(0, 1)[:, :V]
    torch.testing.assert_close(packed_NV.double(), expected_NV.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ACROSS_DOCUMENTS)
def test_families_that_look_across_documents_are_refused(family: str, scene: Scene) -> None:
    model = loaded(scene.saved(family))
    with pytest.raises(ModelError, match=r"windows\.attention=document"):
        check_documents(model, split_causal_lm(model)[0], where="teachers.a.model")


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_that_pytorch_counts(family: str, scene: Scene) -> None:
    directory, tokens_BS = scene.saved(family), scene.batch.input_ids_BS
    spec = PretrainedModel(kind="pretrained", path=str(directory))
    sizes = model_sizes(spec, V, where="teachers.a.model")
    options = {"experts_implementation": "eager"} if family in UNKNOWN_TO_THE_COUNTER else {}
    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", **options
    ).eval()
    assert sizes.params == count_parameters(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens_BS, use_cache=False)
    assert forward_flops(counter) == tokens_BS.numel() * sizes.forward_flops(S, P)
    head = model.get_output_embeddings().weight
    assert (sizes.head_rows, sizes.state_size) == tuple(head.shape)
    assert sizes.head_weights == head.numel()
    assert max(sizes.dropout, sizes.attention_dropout) == (0.0 if family == "mpt" else 0.3) or (
        family in ("gemma", "gptj", "phi")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_beyond_the_positions_are_refused(family: str, scene: Scene) -> None:
    model = loaded(scene.saved(family))
    check_positions(model, POSITIONS, where="teachers.a.model")
    with torch.no_grad():
        model(input_ids=torch.arange(POSITIONS)[None])  # the last of them is there
    if family in WITHOUT_LIMIT:
        check_positions(model, 10 * POSITIONS, where="teachers.a.model")
        return
    with pytest.raises(ModelError, match=f"got {POSITIONS} positions, expected at least"):
        check_positions(model, POSITIONS + 1, where="teachers.a.model")


# -- used alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_measured_and_said_is_transformers_own(family: str, scene: Scene) -> None:
    model: Any = load_causal_lm(str(scene.saved(family)), device=torch.device("cpu"))
    tokens_BS = scene.batch.input_ids_BS
    counted_BT = torch.ones(3, S - 1, dtype=torch.bool)
    with likelihood_of(model, vocab_size=V) as likelihood:
        nll_N = likelihood(tokens_BS, counted_BT)
    logits_BSV = teacher_logits(scene, family).view(3, S, V)
    expected_N = cross_entropy(
        logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(nll_N.double(), expected_N, atol=1e-4, rtol=1e-4)

    ids_1S = tokens_BS[:1, :4]
    said_1S = continued(model, ids_1S, Sampling(tokens=6, temperature=0.0), pad_id=0)
    for _ in range(6):
        with torch.no_grad():
            likeliest = model(input_ids=ids_1S, use_cache=False).logits[:, -1].argmax(-1)
        ids_1S = torch.cat([ids_1S, likeliest[:, None]], dim=1)
        if likeliest.item() == 2:  # ends the text
            break
    assert said_1S.tolist() == ids_1S.tolist()


# -- kernels, files --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_that_a_family_has_not(family: str, saved: Callable[[str], Path]) -> None:
    spec = PretrainedModel(kind="pretrained", path=str(saved(family)))
    missing = absent_kernels(spec, where="test")
    assert ("sdpa" in missing) == (family in WITHOUT_SDPA)
    for kernel in ("eager", "sdpa"):
        if kernel in missing:
            with pytest.raises(ModelError, match="does not support"):
                load_model(spec.path, attention=kernel, where="test")
            with pytest.raises(ModelError, match=r"sdpa, which transformers has not for models"):
                resolve_attention(
                    *("sdpa",),
                    device="cpu",
                    precision="fp32",
                    training=False,
                    where="test",
                    missing=missing,
                )
        else:
            load_model(spec.path, attention=kernel, where="test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2 tied", "opt projected", "gpt_neox", "phi"])
def test_weights_of_any_type_in_any_number_of_files(
    family: str, dtype: torch.dtype, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(family), dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    read = loaded(tmp_path)
    assert {parameter.dtype for parameter in read.parameters()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter.float()), name


# -- the table -------------------------------------------------------------------------------------


def test_the_table_in_the_documents_is_what_was_tested() -> None:
    text = (ROOT / "docs" / "own-teachers.md").read_text(encoding="utf-8")
    rows = {}
    table = text.partition("## Which families")[2].partition("\n## ")[0]
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            (name,) = re.findall("^`(.*)`", cells[0])
            rows[name] = tuple(cell.split()[0] for cell in cells[1:])
    expected = {
        family: (
            "no" if family in MORE_THAN_A_HEAD else "yes",
            "but" if family in NARROW_LAST_LAYER else "yes",
            "no" if family in ACROSS_DOCUMENTS else "yes",
            "eager" if family in WITHOUT_SDPA else "any",
        )
        for family in FAMILIES
    }
    assert rows == expected
