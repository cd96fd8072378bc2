"""What this machine's matrix units give: a step's products enter, their measured rate leaves.

Measured by all ranks at the same moment, since cores and memory are shared. `square` is the rate of
a large square product, the most that a program can hope for; `same_shapes` that of the products
which the models' own layers make, in the proportions of a step. Achieved FLOP/s over the latter is
`mfu`: what is missing to 1 is what a step does beside its matrix products, not how narrow the
models are.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from babyllama_ds import ranks

BUDGET_S = {"cpu": 1.0, "cuda": 0.3}
"""Seconds of measuring, about, all products together."""
SQUARE = {"cpu": 2048, "cuda": 8192}
"""Side of the large square product."""
MOST_BYTES = 2**26
"""Largest operand or result: more rows would not change a rate, only the time to measure it."""
LEAST_ROWS = 64
BLOCKS = 5
"""Into which what is timed is divided."""


@dataclass(frozen=True)
class Product:
    """One bf16 product [rows, inner] × [inner, columns]; a transposed operand is a view."""

    rows: int
    inner: int
    columns: int
    first_transposed: bool = False
    second_transposed: bool = False

    @property
    def flops(self) -> int:
        """A multiplication and an addition each."""
        return 2 * self.rows * self.inner * self.columns

    @property
    def bytes(self) -> int:
        """Of its operands and its result."""
        rows, inner, columns = self.rows, self.inner, self.columns
        return 2 * (rows * inner + inner * columns + rows * columns)


Products = Mapping[Product, float]
"""Products, and how often each is made in a step."""


@dataclass(frozen=True)
class MatmulRates:
    """What was measured: bf16 products of all ranks together."""

    square: float
    """FLOP/s of the large square product."""
    flops_per_s: Mapping[Product, float]
    """The rate of every product that was asked for."""

    def same_shapes(self, products: Products) -> float:
        """FLOP/s of these products, one after another, each as often as it is made."""
        flops = sum(times * product.flops for product, times in products.items())
        seconds = sum(
            times * product.flops / self.flops_per_s[product] for product, times in products.items()
        )
        return flops / seconds


def step_products(
    trained: nn.Module, frozen: Iterable[nn.Module], *, tokens: int
) -> dict[Product, float]:
    """The products of linear layers in one forward and backward pass over so many tokens.

    The models may lie on the meta device. A product over more tokens than are worth measuring
    stands as several over fewer.
    """
    products: defaultdict[Product, float] = defaultdict(float)
    for layer in _linear_layers(trained):
        rows = layer.rows_to_measure(tokens)
        for product in (layer.forward(rows), *layer.backward(rows)):
            products[product] += tokens / rows
    for model in frozen:
        for layer in _linear_layers(model):
            rows = layer.rows_to_measure(tokens)
            products[layer.forward(rows)] += tokens / rows
    return dict(products)


def measure_matmul_rates(products: Collection[Product], device: torch.device) -> MatmulRates:
    """The rates of all ranks together, measured now. A collective: all ranks ask for the same."""
    square = square_product(device)
    budget_s = BUDGET_S[device.type]
    ranks.barrier()
    own = [square.flops / _seconds(square, device, budget_s / 4)]
    ranks.barrier()
    share_s = 0.75 * budget_s / max(1, len(products))
    own += [product.flops / _seconds(product, device, share_s) for product in products]
    of_square, *of_products = ranks.sum_floats(*own)
    return MatmulRates(of_square, dict(zip(products, of_products, strict=True)))


def square_product(device: torch.device) -> Product:
    """The large one."""
    side = SQUARE[device.type]
    return Product(side, side, side)


@dataclass(frozen=True)
class _Linear:
    """A linear layer; its weight is stored as [outputs, inputs], or transposed (GPT-2's are)."""

    inputs: int
    outputs: int
    transposed: bool

    def rows_to_measure(self, tokens: int) -> int:
        return max(1, min(tokens, MOST_BYTES // (2 * max(self.inputs, self.outputs))))

    def forward(self, rows: int) -> Product:
        return Product(rows, self.inputs, self.outputs, False, not self.transposed)

    def backward(self, rows: int) -> tuple[Product, Product]:
        """The gradients of the input and of the weight."""
        of_input = Product(rows, self.outputs, self.inputs, False, self.transposed)
        if self.transposed:
            return of_input, Product(self.inputs, rows, self.outputs, True, False)
        return of_input, Product(self.outputs, rows, self.inputs, True, False)


def _linear_layers(model: nn.Module) -> Iterator[_Linear]:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield _Linear(module.in_features, module.out_features, transposed=False)
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            yield _Linear(inputs, outputs, transposed=True)


def _seconds(product: Product, device: torch.device, budget_s: float) -> float:
    """Seconds of one product whose operands lie where a step would have left them: in caches.

    A machine without bf16 instructions may be a thousand times slower than one with them: a few
    rows tell how many are affordable.
    """
    few = replace(product, rows=min(product.rows, LEAST_ROWS))
    row_s = _timed(few, 1, device) / few.rows
    rows = max(few.rows, min(product.rows, int(budget_s / 4 / row_s)))
    part = replace(product, rows=rows)
    times = max(1, min(300, int(budget_s / 2 / _timed(part, 1, device))))
    return _timed(part, times, device) * product.rows / rows


def _timed(product: Product, times: int, device: torch.device) -> float:
    """Seconds of a product; a first one, at which libraries plan, is left out.

    Of several blocks the fastest, as `timeit` advises: what else the machine does only adds.
    """
    first = _operand(product.rows, product.inner, product.first_transposed, device)
    second = _operand(product.inner, product.columns, product.second_transposed, device)
    result = torch.mm(first, second)
    _synchronize(device)
    blocks = min(times, BLOCKS)
    fastest_s = math.inf
    for _ in range(blocks):
        started = time.perf_counter()
        for _ in range(times // blocks):
            torch.mm(first, second, out=result)
        _synchronize(device)
        fastest_s = min(fastest_s, time.perf_counter() - started)
    return fastest_s / (times // blocks)


def _operand(rows: int, columns: int, transposed: bool, device: torch.device) -> Tensor:
    shape = (columns, rows) if transposed else (rows, columns)
    # Not zeros: on a GPU the power that a product draws, and so its rate, depends on the numbers.
    values = torch.randn(shape, dtype=torch.bfloat16, device=device)
    return values.T if transposed else values


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
