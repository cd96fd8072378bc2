"""Teachers split over real gloo ranks against the same ones whole; each rank brings other windows.

Run as a script, this file is one of the ranks.

Shapes: B windows of a rank, S positions, D width.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from babyllama_ds import ranks
from babyllama_ds.engine import distributed
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.engine.tensor_parallel import RankGroup, rank_group
from babyllama_ds.evaluation.cross_entropy import DevScore, evaluate_cross_entropy
from babyllama_ds.evaluation.forward import Share
from babyllama_ds.evaluation.sentences import score_sentences
from babyllama_ds.losses.heads import logits
from babyllama_ds.models.documents import Pieces
from babyllama_ds.models.fused import fuse
from babyllama_ds.models.sizes import sizes_of
from babyllama_ds.models.splitting import SPLIT_FAMILIES, WRONGLY_SPLIT, check_split
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import MicroBatch, micro_batch
from babyllama_ds.training.objective import Counts, Objective

CPU = torch.device("cpu")
VOCAB, LENGTH, WINDOWS = 61, 17, 3

FP32_TOLERANCE = 2e-6
"""Relative, of the norm of all states: sums are added up in another order, and no more."""
BF16_FACTOR = 1.5
"""How much further from the fp32 truth than the whole bf16 model a split one may lie."""
GARBAGE = 1e-2
"""What is above this is no rounding."""

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    **{key: {"head_dim": 8} for key in ("qwen3", "gemma", "gemma2", "gemma3_text")},
    "gpt2": {"num_key_value_heads": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {} for family in SPLIT_FAMILIES},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with tied embeddings": {"tie_word_embeddings": True},
    "llama with plain attention": {"attn_implementation": "eager"},
    "opt projected": {"word_embed_proj_dim": 16},
}


def model_of(variant: str, **changes: Any) -> nn.Module:
    """A model of two layers whose weights, norms and biases are all random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = variant.split()[0]
    settings = {**OF_FAMILY.get(family, {}), **VARIANTS.get(variant, {}), **changes}
    default = "eager" if family == "gemma2" else "sdpa"
    kernel = settings.pop("attn_implementation", default)
    config = AutoConfig.for_model(family, **{**COMMON, **settings})
    draw = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=draw))
    fuse(model)
    return model


def tokens(rank: int, seed: int = 0) -> Tensor:
    """Windows [B, S] that no other rank has."""
    draw = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(0, VOCAB, (WINDOWS, LENGTH), generator=draw)


def frozen(
    model: nn.Module, group: RankGroup | None, dtype: torch.dtype = torch.float32, **more: Any
) -> FrozenModel:
    return FrozenModel(copy.deepcopy(model), device=CPU, dtype=dtype, group=group, **more)


def distance(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|, over everything."""
    return ((one - other).norm() / other.norm()).item()


# -- what the ranks do -----------------------------------------------------------------------------


def a_family(variant: str, group: RankGroup) -> dict[str, float]:
    """How far from the whole model's states and logits are those of the split one."""
    model, ids_BS = model_of(variant), tokens(ranks.rank())
    whole, split = frozen(model, None), frozen(model, group)
    exact_BSD, states_BSD = whole.hidden_states(ids_BS), split.hidden_states(ids_BS)
    assert states_BSD.shape == exact_BSD.shape
    in_bf16 = {
        name: distance(frozen(model, g, torch.bfloat16).hidden_states(ids_BS).float(), exact_BSD)
        for name, g in (("whole bf16", None), ("split bf16", group))
    }
    return {
        "states": distance(states_BSD, exact_BSD),
        "logits": distance(
            logits(states_BSD, split.head, VOCAB), logits(exact_BSD, whole.head, VOCAB)
        ),
        **in_bf16,
    }


def what_is_held(group: RankGroup) -> dict[str, Any]:
    """Parameters of a LLaMA's parts on this rank, whole and split; and after it is freed."""
    model = model_of("llama")
    split = frozen(model, group)
    of_split = {name: p.numel() for name, p in split.module.named_parameters()}
    weight = weakref.ref(split.module.get_submodule("model.layers.0.mlp.down_proj").weight)
    split.hidden_states(tokens(ranks.rank()))
    params = split.params
    split.destroy()
    gc.collect()
    return {
        "whole": {name: p.numel() for name, p in model.named_parameters()},
        "split": of_split,
        "params": params,
        "freed": weight() is None,
    }


def random_numbers(group: RankGroup) -> bool:
    """Whether this rank's own random numbers go on as they would have."""
    torch.manual_seed(ranks.rank())
    expected = torch.rand(4)
    torch.manual_seed(ranks.rank())
    frozen(model_of("llama"), group)
    return torch.equal(torch.rand(4), expected)


def documents(group: RankGroup) -> float:
    """Windows of several documents, cut elsewhere on every rank."""
    model, ids_BS = model_of("llama"), tokens(ranks.rank())
    begins_BS = np.zeros((WINDOWS, LENGTH), dtype=np.bool_)
    begins_BS[:, 0] = True
    for window in range(WINDOWS):
        begins_BS[window, [3 + ranks.rank() + window, 11 - ranks.rank()]] = True
    pieces = Pieces.of(begins_BS)
    exact_BSD = frozen(model, None).hidden_states(ids_BS, pieces)
    return distance(frozen(model, group).hidden_states(ids_BS, pieces), exact_BSD)


def layers(group: RankGroup) -> dict[str, float]:
    """States of layers in the middle."""
    model, ids_BS = model_of("llama"), tokens(ranks.rank())
    named = (0, 1, 2)
    _, exact = frozen(model, None, layers=named).hidden_states_and_layers(ids_BS)
    _, found = frozen(model, group, layers=named).hidden_states_and_layers(ids_BS)
    return {str(layer): distance(found[layer], exact[layer]) for layer in named}


def distilled(split: RankGroup | None) -> tuple[float, list[Tensor]]:
    """Loss and gradients of a student with two teachers: one split (or not), and a whole one."""
    student = model_of("llama", hidden_size=16, num_attention_heads=2, intermediate_size=24)
    objective = Objective(
        student.train(), vocab_size=VOCAB, distillation=DistillationSpec(alpha=0.3, chunk_tokens=7)
    )
    ensemble = Ensemble(
        [
            Member("split", frozen(model_of("llama"), split), 2.0),
            Member("whole", frozen(model_of("gpt2"), None), 1.0),
        ]
    )
    losses: list[float] = []
    for step in range(2):  # accumulated
        micro: MicroBatch = micro_batch(
            tokens(ranks.rank(), seed=step), torch.ones(WINDOWS, dtype=torch.bool)
        )
        counts = Counts(ce=WINDOWS * (LENGTH - 1), kl=WINDOWS, scale=1.0)
        loss = objective(micro, ensemble.targets(micro), counts).loss
        loss.backward()
        losses.append(loss.item())
    ensemble.destroy()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    return sum(losses), gradients


def a_step(group: RankGroup) -> dict[str, float]:
    (loss, gradients), (exact_loss, exact) = distilled(group), distilled(None)
    return {
        "loss": abs(loss - exact_loss) / abs(exact_loss),
        "gradients": max(distance(one, other) for one, other in zip(gradients, exact, strict=True)),
    }


def measured(group: RankGroup) -> dict[str, Any]:
    """Scores of sentences and cross-entropy of windows, neither as many as groups divide."""
    draw = torch.Generator().manual_seed(5)
    windows_WS = torch.randint(0, VOCAB, (7, LENGTH), generator=draw).numpy()
    sentences = [row[: 4 + number].tolist() for number, row in enumerate(windows_WS)]
    model = model_of("qwen2")
    whole, split = frozen(model, None), frozen(model, group)

    def both(module: nn.Module, share: Share) -> tuple[list[float], DevScore]:
        scores = score_sentences(
            module, sentences, device=CPU, batch_tokens=20, vocab_size=VOCAB, share=share
        )
        dev = evaluate_cross_entropy(
            module,
            lambda ids: windows_WS[list(ids)],
            len(windows_WS),
            device=CPU,
            batch_windows=2,
            vocab_size=VOCAB,
            share=share,
        )
        return scores, dev

    exact_scores, exact = both(whole.module, Share.of_rank())
    scores, found = both(split.module, Share(group.number, group.count, counts=group.index == 0))
    return {
        "sentences": distance(torch.tensor(scores), torch.tensor(exact_scores)),
        "cross-entropy": abs(found.cross_entropy / exact.cross_entropy - 1),
        "tokens": [found.num_tokens, exact.num_tokens],
    }


@dataclass(frozen=True)
class NotGathering(RankGroup):
    """The fault: each rank runs its own windows, as many times as there are ranks."""

    def gathered(
        self, input_ids_BS: Tensor, pieces: Pieces | None = None
    ) -> tuple[Tensor, Pieces | None]:
        return input_ids_BS.repeat(self.size, 1), pieces


def without_gathering(group: RankGroup) -> dict[str, float]:
    return a_family("llama", NotGathering(**vars(group)))


def refused(group: RankGroup) -> dict[str, bool]:
    """Whether AutoTP gives something wrong, or nothing, for each family that is refused."""
    shapes: dict[str, dict[str, Any]] = {
        "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
        "bloom": {"attn_implementation": "eager"},
    }
    wrong = {}
    for family in WRONGLY_SPLIT:
        model, ids_BS = model_of(family, **shapes.get(family, {})), tokens(ranks.rank())
        exact_BSD = frozen(model, None).hidden_states(ids_BS)
        try:
            found_BSD = frozen(model, group).hidden_states(ids_BS)
            error = distance(found_BSD, exact_BSD)
        except (AssertionError, RuntimeError, TypeError):
            error = float("inf")
        wrong[family] = not error <= GARBAGE
        ranks.barrier()
    return wrong


def two_sizes() -> dict[str, dict[str, float]]:
    """Two teachers in one process, split over other numbers of ranks, taking turns."""
    model = model_of("llama", num_key_value_heads=4)
    exact_BSD = frozen(model, None).hidden_states(tokens(ranks.rank()))
    by_two, by_four = (frozen(model, rank_group(size, CPU)) for size in (2, 4))
    return {
        str(turn): {
            str(size): distance(one.hidden_states(tokens(ranks.rank())), exact_BSD)
            for size, one in ((2, by_two), (4, by_four))
        }
        for turn in range(2)
    }


def on_two() -> dict[str, Any]:
    group = rank_group(2, CPU)
    return {
        **{variant: a_family(variant, group) for variant in VARIANTS},
        "held": what_is_held(group),
        "random numbers": random_numbers(group),
        "documents": documents(group),
        "layers": layers(group),
        "step": a_step(group),
        "measured": measured(group),
        "not gathering": without_gathering(group),
        "refused": refused(group),
    }


def on_four() -> dict[str, Any]:
    group = rank_group(2, CPU)
    return {
        "place": [group.number, group.index, group.count],
        "llama": a_family("llama", group),
        "step": a_step(group),
        "measured": measured(group),
        "sizes": two_sizes(),
    }


def main(folder: Path) -> None:
    distributed.start("cpu")
    found = on_two() if ranks.world_size() == 2 else on_four()
    (folder / f"rank-{ranks.rank()}.json").write_text(json.dumps(found))
    ranks.barrier()
    distributed.stop()


# -- what came of it -------------------------------------------------------------------------------


def results(
    number: int, folder: Path, start: Callable[..., Any], port: Callable[[], int]
) -> list[dict[str, Any]]:
    world = {"WORLD_SIZE": str(number), "LOCAL_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = str(port())
    envs = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    start([[sys.executable, __file__, folder]] * number, envs).end().assert_done()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(number)]


def some_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Any]) -> list[Any]:
    return results(2, tmp_path_factory.mktemp("two"), start, some_port)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Any]) -> list[Any]:
    return results(4, tmp_path_factory.mktemp("four"), start, some_port)


@pytest.mark.parametrize("variant", VARIANTS)
def test_split_over_two_ranks_it_gives_what_it_gives_whole(variant: str, two: list[Any]) -> None:
    for of_rank in two:
        found = of_rank[variant]
        assert found["states"] <= FP32_TOLERANCE
        assert found["logits"] <= FP32_TOLERANCE
        assert 0 < found["split bf16"] <= BF16_FACTOR * found["whole bf16"]


def test_ranks_that_run_their_own_windows_are_found_out(two: list[Any]) -> None:
    for of_rank in two:
        assert of_rank["not gathering"]["states"] > GARBAGE


def test_layers_are_dealt_out_and_the_rest_is_whole(two: list[Any]) -> None:
    for of_rank in two:
        held = of_rank["held"]
        for name, whole in held["whole"].items():
            assert held["split"][name] == (whole // 2 if "proj" in name else whole)
        assert held["params"] == sum(held["whole"].values())
        assert held["freed"]


def test_random_numbers_stay_each_ranks_own(two: list[Any]) -> None:
    assert [of_rank["random numbers"] for of_rank in two] == [True, True]


def test_documents_are_kept_apart(two: list[Any]) -> None:
    assert all(of_rank["documents"] <= FP32_TOLERANCE for of_rank in two)


def test_states_of_layers_in_the_middle(two: list[Any]) -> None:
    for of_rank in two:
        assert all(error <= FP32_TOLERANCE for error in of_rank["layers"].values())


@pytest.mark.parametrize("world", ["two", "four"])
def test_a_distillation_step_has_the_same_gradients(
    world: str, request: pytest.FixtureRequest
) -> None:
    for of_rank in request.getfixturevalue(world):
        assert of_rank["step"]["loss"] <= FP32_TOLERANCE
        assert of_rank["step"]["gradients"] <= 10 * FP32_TOLERANCE


@pytest.mark.parametrize("world", ["two", "four"])
def test_groups_measure_a_split_model_once(world: str, request: pytest.FixtureRequest) -> None:
    for of_rank in request.getfixturevalue(world):
        assert of_rank["measured"]["sentences"] <= FP32_TOLERANCE
        assert of_rank["measured"]["cross-entropy"] <= FP32_TOLERANCE
        assert of_rank["measured"]["tokens"] == [7 * (LENGTH - 1)] * 2


def test_two_groups_side_by_side(four: list[Any]) -> None:
    assert [of_rank["place"] for of_rank in four] == [[0, 0, 2], [0, 1, 2], [1, 0, 2], [1, 1, 2]]
    assert all(of_rank["llama"]["states"] <= FP32_TOLERANCE for of_rank in four)


def test_teachers_split_over_other_numbers_of_ranks(four: list[Any]) -> None:
    for of_rank in four:
        for turn in of_rank["sizes"].values():
            assert all(error <= FP32_TOLERANCE for error in turn.values())


@pytest.mark.parametrize("family", WRONGLY_SPLIT)
def test_what_is_refused_would_be_wrong(family: str, two: list[Any]) -> None:
    """A family that a later AutoTP splits right need not be refused any more."""
    assert all(of_rank["refused"][family] for of_rank in two)
    assert family not in SPLIT_FAMILIES


def test_sizes_of_every_family_that_is_split_are_read() -> None:
    for family in SPLIT_FAMILIES:
        check_split(sizes_of(model_of(family).config), 2, where="here")  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
