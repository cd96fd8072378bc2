"""The products of a step are those that a real step makes; the rate is that of all of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from babyllama_ds.engine import matmul_rate
from babyllama_ds.engine.matmul_rate import Product, measure_matmul_rates, step_products

TOKENS = 12
CPU = torch.device("cpu")


def counted_flops(model: Any, *, trained: bool) -> int:
    """FLOPs of a real step's linear layers, by PyTorch's own count of its operators."""
    input_ids_BS = torch.arange(TOKENS).view(2, TOKENS // 2)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=input_ids_BS, use_cache=False).logits
        if trained:
            logits.sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    return sum(
        n for operator, n in by_operator.items() if str(operator) in ("aten.mm", "aten.addmm")
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_products_of_a_step(tiny_model: Callable[..., Any], kind: str, trained: bool) -> None:
    model = tiny_model(kind)
    nothing = torch.nn.Identity()
    products = (
        step_products(model, [], tokens=TOKENS)
        if trained
        else step_products(nothing, [model], tokens=TOKENS)
    )
    flops = sum(times * product.flops for product, times in products.items())
    assert flops == counted_flops(model, trained=trained)


def test_operands_lie_as_in_the_layer(tiny_model: Callable[..., Any]) -> None:
    gpt2, llama = tiny_model("gpt2"), tiny_model("llama")
    of_gpt2 = step_products(torch.nn.Identity(), [gpt2], tokens=TOKENS)
    of_llama = step_products(torch.nn.Identity(), [llama], tokens=TOKENS)
    assert Product(TOKENS, 24, 96) in of_gpt2  # Conv1D holds [inputs, outputs]
    assert Product(TOKENS, 24, 40, second_transposed=True) in of_llama


def test_a_large_product_stands_as_smaller_ones(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    whole = step_products(model, [], tokens=1000)
    monkeypatch.setattr(matmul_rate, "MOST_BYTES", 2 * 40 * 100)  # 100 rows of the MLP's width
    parts = step_products(model, [], tokens=1000)
    assert max(product.rows for product in parts) < max(product.rows for product in whole)
    assert sum(times * product.flops for product, times in parts.items()) == pytest.approx(
        sum(times * product.flops for product, times in whole.items())
    )


def test_the_rate_is_all_flops_over_all_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Product(8, 4, 2), Product(8, 8, 8)
    seconds = {slow: 3.0, fast: 1.0}
    side = matmul_rate.SQUARE["cpu"]
    monkeypatch.setattr(
        matmul_rate, "_seconds", lambda product, device, budget_s: seconds.get(product, 0.5)
    )
    rates = measure_matmul_rates([slow, fast], CPU)
    assert rates.square == 2 * side**3 / 0.5
    both = (2 * 8 * 4 * 2 + 2 * 2 * 8 * 8 * 8) / (3.0 + 2 * 1.0)
    assert rates.same_shapes({slow: 1, fast: 2}) == pytest.approx(both)


def test_few_rows_stand_for_many_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def a_millisecond_a_row(product: Product, times: int, device: torch.device) -> float:
        measured.append(product.rows)
        return 1e-3 * product.rows

    monkeypatch.setattr(matmul_rate, "_timed", a_millisecond_a_row)
    assert matmul_rate._seconds(Product(100_000, 4, 4), CPU, 0.8) == pytest.approx(100.0)
    assert max(measured) == 200  # a quarter of the budget


def test_a_machine_that_is_busy_for_a_while_counts_as_it_is_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks_s = iter([9.0, 2.0, 2.5, 7.0, 3.0])
    now_s, running = 0.0, False

    def clock() -> float:
        nonlocal now_s, running
        if running:
            now_s += next(blocks_s)
        running = not running
        return now_s

    monkeypatch.setattr(matmul_rate, "time", SimpleNamespace(perf_counter=clock))
    assert matmul_rate._timed(Product(4, 4, 4), 20, CPU) == pytest.approx(2.0 / 4)


def test_rates_are_measured(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(matmul_rate.SQUARE, "cpu", 64)
    monkeypatch.setitem(matmul_rate.BUDGET_S, "cpu", 0.05)
    products = step_products(tiny_model("llama"), [tiny_model("gpt2")], tokens=TOKENS)
    rates = measure_matmul_rates(products, CPU)
    assert rates.square > 0
    assert rates.same_shapes(products) > 0
