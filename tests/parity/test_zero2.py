"""ZeRO-2 on two ranks against one plain process, and faults that the comparison must find.

Run as a script, this file is one of the two ranks: it trains the cases that it is told.

Shapes: B windows, S positions, N = B * S, D width.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from babyllama_ds import ranks
from babyllama_ds.engine import distributed
from babyllama_ds.engine.proof import sharded
from babyllama_ds.engine.proof.case import LENGTH, VOCAB, Case
from babyllama_ds.engine.proof.judge import Verdict, judge
from babyllama_ds.engine.proof.models import (
    CASES,
    COMPILED_CASES,
    GPT2,
    ONE_LAYER,
    small_loss,
    small_model,
)
from babyllama_ds.losses.distillation import TeacherStates
from babyllama_ds.losses.heads import Head
from babyllama_ds.models.compiled import forget_compiled
from babyllama_ds.spec.distillation import DistillationSpec
from babyllama_ds.spec.models import Gpt2Model, LlamaModel
from babyllama_ds.training.objective import Counts, Objective

CPU = torch.device("cpu")
LOST = "model.transformer.h.1.mlp.c_fc.weight"
LOST_COMPILED = "objective.model.model.layers.0.mlp.up_proj.weight"


# -- more modules than the doctor has time for -----------------------------------------------------


class Distilled(nn.Module):
    """The objective of a student with two teachers: its gradient is made in the forward pass."""

    def __init__(self, student: LlamaModel | Gpt2Model = GPT2) -> None:
        super().__init__()
        spec = DistillationSpec(alpha=0.3, chunk_tokens=7, soft_reduction="token")
        self.objective = Objective(small_model(student), vocab_size=VOCAB, distillation=spec)

    def compile_layers(self) -> None:
        self.objective.compile_layers()

    def forward(self, tokens_BS: Tensor) -> Tensor:
        labels_BS = torch.cat([tokens_BS[:, 1:], tokens_BS.new_full((len(tokens_BS), 1), -100)], 1)
        micro: Any = SimpleNamespace(
            input_ids_BS=tokens_BS,
            labels_N=labels_BS.flatten(),
            valid_N=torch.ones(tokens_BS.numel(), dtype=torch.bool),
            pieces=None,
        )
        # Divided by the micro-batch's own counts, the loss is a mean: the engine's scale is 1.
        counts = Counts(ce=len(tokens_BS) * (LENGTH - 1), kl=tokens_BS.numel(), scale=1.0)
        return self.objective(micro, self._teachers(tokens_BS), counts).loss

    def _teachers(self, tokens_BS: Tensor) -> list[TeacherStates]:
        """Frozen ones of two widths: each token has its state."""
        dtype = next(self.parameters()).dtype
        generator = torch.Generator().manual_seed(3)
        teachers = []
        for width in (16, 40):
            states_VD, head_VD = torch.randn(2, VOCAB, width, generator=generator).to(dtype)
            teachers.append(TeacherStates(states_VD[tokens_BS.flatten()], Head(head_VD)))
        return teachers


class UsedTwice(nn.Module):
    """A block used twice, as in DeepSpeed's issue #8224; `second` says how the second time.

    `lost` leaves out the gradient of the second use, which is what that bug does.
    """

    def __init__(self, second: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB, 24)
            self.block = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
            self.head = nn.Linear(24, VOCAB)
        self.second = second

    def forward(self, tokens_BS: Tensor) -> Tensor:
        states_BSD = self.embedding(tokens_BS)
        states_BSD = states_BSD + self._again(states_BSD + self.block(states_BSD))
        logits_BSV = self.head(states_BSD)
        fine = torch.promote_types(logits_BSV.dtype, torch.float32)
        return cross_entropy(logits_BSV[:, :-1].flatten(0, 1).to(fine), tokens_BS[:, 1:].flatten())

    def _again(self, states_BSD: Tensor) -> Tensor:
        if self.second == "lost":
            frozen = {name: value.detach() for name, value in self.block.named_parameters()}
            return torch.func.functional_call(self.block, frozen, (states_BSD,))
        if self.second == "checkpointed":
            return checkpoint(self.block, states_BSD, use_reentrant=False)
        return self.block(states_BSD)


def without_a_gradient(make: Callable[[], nn.Module], lost: str) -> nn.Module:
    """A module one of whose weights hears nothing."""
    module = make()
    dict(module.named_parameters())[lost].register_hook(torch.zeros_like)
    return module


SOUND = {
    case.name: case
    for case in (
        *CASES,
        Case(name="distilled", make=Distilled, accumulation_steps=2, clip_norm=0.1),
        Case(name="distilled-bf16", make=Distilled, precision="bf16", overlap_comm=True),
        Case(
            name="untied",
            make=partial(small_loss, GPT2.model_copy(update={"tied_embeddings": False})),
            clip_norm=100.0,  # never reached
            accumulation_steps=4,
        ),
        Case(name="twice", make=partial(UsedTwice, "plain"), precision="bf16"),
        Case(
            name="twice-checkpointed",
            make=partial(UsedTwice, "checkpointed"),
            precision="bf16",
            accumulation_steps=2,
        ),
    )
}
COMPILED = {
    case.name: case
    for case in (
        *COMPILED_CASES,
        Case(
            name="distilled-compiled",
            make=partial(Distilled, ONE_LAYER),
            precision="bf16",
            accumulation_steps=2,
            overlap_comm=True,
            compiled=True,
        ),
    )
}
BF16 = replace(SOUND["llama-bf16"], accumulation_steps=4)
FAULTY_STEPS = 2


# -- planted faults --------------------------------------------------------------------------------


@contextmanager
def unreduced_on_rank_one() -> Iterator[None]:
    """Rank 1 takes part in every reduction, and goes on with what it had before."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    reduce = DeepSpeedZeroOptimizer.gradient_reduction_w_predivide

    def reduce_for_others(self: Any, bucket: Tensor, *args: Any, **named: Any) -> Tensor:
        own = bucket.clone()
        reduce(self, bucket, *args, **named)
        return bucket.copy_(own) if ranks.rank() == 1 else bucket

    with patch.object(DeepSpeedZeroOptimizer, "gradient_reduction_w_predivide", reduce_for_others):
        yield


@contextmanager
def undivided() -> Iterator[None]:
    """Micro-batches are summed where they should be averaged."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward

    def backward_of_the_sum(self: Any, loss: Tensor) -> Tensor:
        return backward(self, loss, scale_wrt_gas=False)

    with patch.object(DeepSpeedEngine, "backward", backward_of_the_sum):
        yield


@contextmanager
def configured(**changes: Any) -> Iterator[None]:
    """DeepSpeed's dict, changed after all checks."""
    honest = sharded.engine_config

    with patch.object(sharded, "engine_config", lambda *args: {**honest(*args), **changes}):
        yield


# Of each: the case as it should be, what is wrong about the ranks, and a gradient that is wrong.
FAULTS: dict[str, tuple[Case, Callable[[], Any], str]] = {
    "unreduced": (BF16, unreduced_on_rank_one, "model.lm_head.weight"),
    "undivided": (SOUND["llama"], undivided, "model.model.layers.0.mlp.up_proj.weight"),
    "accumulated in bf16": (
        BF16,
        partial(configured, data_types={"grad_accum_dtype": "bf16"}),
        "model.model.layers.1.self_attn.q_proj.weight",
    ),
    "reduced in bf16": (
        BF16,
        partial(configured, communication_data_type="bf16"),
        "model.lm_head.weight",
    ),
    "unclipped": (SOUND["llama"], partial(configured, gradient_clipping=0.0), ""),
    "lost": (
        SOUND["gpt2"],
        lambda: trained(partial(without_a_gradient, SOUND["gpt2"].make, LOST)),
        LOST,
    ),
    "half lost": (
        SOUND["twice"],
        lambda: trained(partial(UsedTwice, "lost")),
        "block.0.weight",
    ),
}


COMPILED_FAULTS: dict[str, tuple[Case, Callable[[], Any], str]] = {
    "unreduced": (
        COMPILED["distilled-compiled"],
        unreduced_on_rank_one,
        "objective.model.model.layers.0.self_attn.o_proj.weight",
    ),
    "lost": (
        COMPILED["distilled-compiled"],
        lambda: trained(
            partial(without_a_gradient, COMPILED["distilled-compiled"].make, LOST_COMPILED)
        ),
        LOST_COMPILED,
    ),
}


@contextmanager
def trained(make: Callable[[], nn.Module]) -> Iterator[None]:
    """The ranks train another module than they should."""
    with patch.object(Case, "start", lambda case: replace(case, make=make).make()):
        yield


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture
def folder_of(
    once: Callable[..., Any],
    start: Callable[..., Any],
    rank_environments: list[dict[str, str]],
) -> Callable[[str], Path]:
    """The folder with what two ranks of this file, started once, wrote of all cases of a kind."""

    def folder(kind: str) -> Path:
        def make(scene: Any) -> list[Any]:
            command = [sys.executable, "-u", __file__, kind, scene.folder]
            # A compiler that is killed leaves half a library there: not in the user's cache.
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(scene.folder / "inductor")}
            environments = [{**environment, **cache} for environment in rank_environments]
            return [start([command, command], environments).end()]

        scene = once(f"zero2_{kind}", make)
        scene.ended[0].assert_done()
        return scene.folder

    return folder


def faulty(case: Case, name: str) -> Case:
    return replace(case, name=name, steps=FAULTY_STEPS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def judged(case: Case, folder: Path) -> Verdict:
    return judge(case, load_file(sharded.trace_path(folder, case)), num_ranks=2, device=CPU)


@pytest.mark.launch
@pytest.mark.parametrize("name", SOUND)
def test_two_ranks_train_as_a_plain_process(name: str, folder_of: Callable[[str], Path]) -> None:
    assert judged(SOUND[name], folder_of("eager")).differences == []


@pytest.mark.launch
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_the_parameter_named(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    case, _, parameter = FAULTS[name]
    found = [each.what for each in judged(faulty(case, name), folder_of("eager")).differences]
    wrong = {what.removeprefix("gradient of ") for what in found if what.startswith("gradient of ")}
    if name == "unclipped":
        assert wrong == set()
        assert any(what.startswith("change of ") for what in found)
    else:
        assert parameter in wrong
    if name == "lost":
        assert wrong == {parameter}
    if name == "half lost":
        assert wrong <= {f"block.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


needs_a_compiler = pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")),
    reason="torch.compile on a CPU needs a C++ compiler",
)


@pytest.mark.launch
@needs_a_compiler
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_ranks_train_as_a_plain_process(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    assert judged(COMPILED[name], folder_of("compiled")).differences == []


@pytest.mark.launch
@needs_a_compiler
@pytest.mark.parametrize("name", COMPILED_FAULTS)
def test_a_fault_is_found_under_compile_too(name: str, folder_of: Callable[[str], Path]) -> None:
    case, _, parameter = COMPILED_FAULTS[name]
    found = [each.what for each in judged(faulty(case, name), folder_of("compiled")).differences]
    assert f"gradient of {parameter}" in found
    if name == "lost":
        assert [what for what in found if what.startswith("gradient of ")] == [
            f"gradient of {parameter}"
        ]


def run_as_rank(kind: str, folder: Path) -> None:
    device = distributed.start("cpu")
    if kind == "compiled":
        for case in COMPILED.values():
            with compiling():
                sharded.trace_cases([case], folder, device)
    else:
        sharded.trace_cases(tuple(SOUND.values()), folder, device)
    for name, (case, planted, _) in (COMPILED_FAULTS if kind == "compiled" else FAULTS).items():
        with planted():
            sharded.trace_cases([faulty(case, name)], folder, device)
    distributed.stop()


@contextmanager
def compiling() -> Iterator[None]:
    """Something is compiled meanwhile: modules alike do not get by with each other's code."""
    from torch._dynamo.utils import counters

    forget_compiled()
    before = counters["frames"]["ok"]
    yield
    assert counters["frames"]["ok"] > before, "nothing was compiled"


if __name__ == "__main__":
    run_as_rank(sys.argv[-2], Path(sys.argv[-1]))
