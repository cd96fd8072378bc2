"""`make bench-card`: what a training step costs a card, counted without one; a table leaves.

A card has two limits: the rate of its matrix products, and that at which it reads and writes its
memory. Of the models that the published jobs train, the operators of a layer's forward and backward
pass are recorded here, on the CPU, with what each reads and writes, at two batches and two depths:
what grows with both is a position's in a layer. Products take their time by the one rate, all other
operators by the other:

    seconds = FLOPs / (rate · share) + bytes / bandwidth

The rates are given. No launch, no wait and no cache is in this: it says where the time of a step
goes, and what would make it shorter, not how long it takes.

    one by one    operators as PyTorch runs them, RMSNorm and dropout as CUDA's kernels
    compiled      the kernels that torch.compile makes of a layer: those for a CPU, and for a card
                  other operators may be fused

    python tests/benchmarks/card.py [--rate TFLOP/s] [--share S] [--bandwidth TB/s] [WORKLOAD …]

Shapes: B windows, S positions, N = B * S, D width, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from scenario import build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from workloads import STUDENT, Workload

from babyllama_ds.models.compiled import CompiledLayers, forget_compiled
from babyllama_ds.models.fused import FusedRMSNorm
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.models.sizes import model_sizes
from babyllama_ds.report.formatting import number, table

WORKLOADS = (
    "babyllama/gpt2",
    "babyllama/llama",
    "babyllama/student",
    "babyllama2/first",
    "babyllama97/gpt2",
    "babyllama97/llama",
)
RATE_TFLOPS, BANDWIDTH_TBS = 798.0, 3.0
"""Of a large bf16 product and of a copy, read and write together: both once measured on an H100."""
SHARE = 0.8
"""What products of these models' shapes reach of the large one's rate: assumed."""

LOSS_PASSES = 3
"""Over the logits [N, V]: `losses/triton_rows.py` reads them twice and writes their gradient."""
UPDATE_BYTES = 48
"""Of a parameter, in a step of one rank without accumulation and with a gradient that need not be
clipped: zeros are written, and the bf16 gradient over them (10), its norm is taken (4); gradient,
master and two moments are read, the last three written (28), and weights made of masters (6).
`tests/unit/benchmarks/test_card.py` counts them."""

LENGTH = 128
WINDOWS = 4, 8
DEPTHS = 1, 2

FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split"}
FREE |= {"split_with_sizes", "unbind", "unsqueeze", "squeeze", "detach", "alias", "as_strided"}
FREE |= {"empty", "empty_like", "empty_strided", "new_empty", "is_same_size"}
"""Operators that touch no numbers."""
OVERWRITING = {"copy_", "_foreach_copy_", "fill_", "zero_"}
"""They do not read what they write to."""


@dataclass
class Passed:
    """Bytes that are read and written by all but matrix products."""

    attention: float = 0.0
    others: float = 0.0

    def __sub__(self, other: Passed) -> Passed:
        return Passed(self.attention - other.attention, self.others - other.others)

    def __truediv__(self, number: float) -> Passed:
        return Passed(self.attention / number, self.others / number)


def main() -> None:
    """Count, and print."""
    words = _parser().parse_args()
    rate, bandwidth = words.rate * 1e12, words.bandwidth * 1e12
    rows = []
    for name in words.workloads:
        work = workload(name)
        for how in ("one by one", "compiled"):
            parts = step_seconds(
                work, compiled=how == "compiled", rate=rate * words.share, bandwidth=bandwidth
            )
            whole = sum(parts.values())
            reached = work.flops_per_step(cached=False) / whole / rate
            cells = [number(1e3 * seconds, 1) for seconds in (*parts.values(), whole)]
            rows.append([name, how, *cells, number(reached, 2)])
    header = ["model", "layers", *(f"{part}, ms" for part in (*parts, "all")), "share of the rate"]
    print(table(header, rows, left=2))


def workload(name: str) -> Workload:
    """A job's model in its training, alone: `JOB/MODEL`."""
    job_name, trained = name.split("/")
    return Workload(job_name, trains=trained, distilled=False)


def step_seconds(
    work: Workload, *, compiled: bool, rate: float, bandwidth: float
) -> dict[str, float]:
    """By part, at `rate` FLOP/s of its products and `bandwidth` bytes/s."""
    sizes = model_sizes(work.model, work.vocab_size, where=work.name)
    plainly = passed(work, compiled=False)
    others = passed(work, compiled=True).others if compiled else plainly.others
    positions = work.tokens * sizes.num_layers
    return {
        "products": work.flops_per_step(cached=False) / rate,
        "attention": plainly.attention * positions / bandwidth,
        "others": others * positions / bandwidth,
        "loss": LOSS_PASSES * 2 * work.vocab_size * work.tokens / bandwidth,
        "update": UPDATE_BYTES * sizes.params / bandwidth,
    }


@functools.cache
def passed(work: Workload, *, compiled: bool) -> Passed:
    """Bytes of a position in a layer, forward and backward."""
    if compiled:  # layers alone are
        few, many = (_in_kernels(work, windows) for windows in WINDOWS)
        return (many - few) / ((WINDOWS[1] - WINDOWS[0]) * LENGTH)
    (a, b), (c, d) = ([_one_by_one(work, n, depth) for depth in DEPTHS] for n in WINDOWS)
    return ((d - c) - (b - a)) / ((WINDOWS[1] - WINDOWS[0]) * LENGTH)


# -- one by one ------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """What operators read and write, views and matrix products left out."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = Passed()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet.__name__ in FREE or packet in flop_registry:
            return result
        num_bytes = bytes_of(func, args, kwargs or {}, result)
        if packet.__name__.startswith("_scaled_dot_product"):
            self.passed.attention += num_bytes
        else:
            self.passed.others += num_bytes
        return result


def bytes_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """What an operator reads, and what it writes: results, and arguments that it changes."""
    read, written = [], list(tree_leaves(result))
    overwriting = func.overloadpacket.__name__ in OVERWRITING
    for at, argument in enumerate(func._schema.arguments):
        value = args[at] if at < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += tree_leaves(value)
        if not changed or not (overwriting or argument.name == "out"):
            read += tree_leaves(value)
    once = {id(each): each for each in written}.values()  # what is changed may be the result
    return sum(each.nbytes for each in (*read, *once) if isinstance(each, Tensor))


def _one_by_one(work: Workload, windows: int, depth: int) -> Passed:
    with (
        Recorded() as recorded,
        patch.object(FusedRMSNorm, "forward", _norm_of_a_card),
        patch.object(nn.Dropout, "forward", _dropout_of_a_card),
    ):
        _forward_and_backward(work, windows, depth)
    return recorded.passed


def _dropout_of_a_card(self: nn.Dropout, states: Tensor) -> Tensor:
    return torch.native_dropout(states, self.p, True)[0] if self.p else states


def _norm_of_a_card(self: FusedRMSNorm, states: Tensor) -> Tensor:
    normed: Tensor = torch.ops.card.rms_norm(states)
    return normed


@torch.library.custom_op("card::rms_norm", mutates_args=())
def _rms_norm(states: Tensor) -> Tensor:
    """In place of CUDA's kernel: reads and writes as much, and computes nothing."""
    return states.clone()


@torch.library.custom_op("card::rms_norm_backward", mutates_args=())
def _rms_norm_backward(gradient: Tensor, states: Tensor) -> Tensor:
    return states.clone()


@torch.library.custom_op("card::rms_norm_of_weight", mutates_args=())
def _rms_norm_of_weight(gradient: Tensor, states: Tensor) -> Tensor:
    return states.new_zeros(states.shape[-1])


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _two_kernels(ctx: Any, gradient: Tensor) -> Tensor:
    (states,) = ctx.saved_tensors
    torch.ops.card.rms_norm_of_weight(gradient, states)
    of_states: Tensor = torch.ops.card.rms_norm_backward(gradient, states)
    return of_states


_rms_norm.register_autograd(_two_kernels, setup_context=_keep)


# -- compiled --------------------------------------------------------------------------------------


def _in_kernels(work: Workload, windows: int) -> Passed:
    forget_compiled()
    with _kernels() as recorded:
        _forward_and_backward(work, windows, 1, compiled=True)
    forget_compiled()
    return recorded


@contextmanager
def _kernels() -> Iterator[Passed]:
    """What the kernels read and write that are compiled meanwhile; what they call is left out."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    recorded, generate = Passed(), GraphLowering.codegen

    def generated(graph: Any) -> Any:
        result = generate(graph)
        for node in graph.scheduler.nodes:
            if not node.is_extern():
                recorded.others += node.get_read_write_buffers_sizes()
        return result

    with patch.object(GraphLowering, "codegen", generated), config.patch(fx_graph_cache=False):
        yield recorded


def _forward_and_backward(
    work: Workload, windows: int, depth: int, *, compiled: bool = False
) -> None:
    spec = work.model.model_copy(update={"num_layers": depth})
    model = build(spec, work, stage=STUDENT, attention="sdpa").to(torch.bfloat16).train()
    for module in model.modules():
        if isinstance(getattr(module, "attn_dropout", None), nn.Dropout):
            module.attn_dropout.p = 0.0  # with which no fused attention takes it on a CPU
    if compiled:
        CompiledLayers(model, training=True)
    tokens_BS = torch.zeros(windows, LENGTH, dtype=torch.long)
    states_BSD = split_causal_lm(model)[0](tokens_BS)
    states_BSD.backward(torch.zeros_like(states_BSD))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What a training step costs a card, counted.")
    parser.add_argument("workloads", nargs="*", default=WORKLOADS, metavar="JOB/MODEL")
    rate = "TFLOP/s of a large bf16 product (default: %(default)s)"
    parser.add_argument("--rate", type=float, default=RATE_TFLOPS, help=rate)
    share = "what these models' products reach of it (default: %(default)s)"
    parser.add_argument("--share", type=float, default=SHARE, help=share)
    bandwidth = "TB/s of a copy, read and written (default: %(default)s)"
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH_TBS, help=bandwidth)
    return parser


if __name__ == "__main__":
    main()
