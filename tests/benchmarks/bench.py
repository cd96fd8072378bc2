"""`make bench`: our trainer and the textbook's, side by side; a table and `bench.json` leave.

First the variants of each row are tried and the fastest kept (ranks or threads, SDPA or eager
attention: the textbook gets its best). Then, round after round, the sides take turns. A ratio is
the median, over rounds, of the ratio of two sides' times in the same round.

    python tests/benchmarks/bench.py [--sizes default|small] [--rounds N] [--no-compiled] [--grid]
        [--out FILE]
    python tests/benchmarks/bench.py --sizes published|babyllama|babyllama2|alone [--seconds N]
        [--batch-windows N] [--device cuda|cpu] …

The second form is that of published.py, for a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import grid
import published
import torch
from scenario import SIZES, SMALL, Sizes, machine
from turns import TURN_S, Running, Side, fastest, take_turns
from workloads import PUBLISHED_MICRO, STUDENT

from babyllama_ds import files
from babyllama_ds.engine.compiling import what_compiling_lacks
from babyllama_ds.environment import describe_environment
from babyllama_ds.report.formatting import number, table

LOSS = Path(__file__).resolve().parent / "loss.py"
SMALL_TURN_S = 0.1
ALL = ("babyllama", "alone", "babyllama2")
PUBLISHED = {"published": ALL, **{name: (name,) for name in ALL}}
"""What `--sizes` may ask of published.py."""
LOSS_TOLERANCE = {"bf16": 0.01, "fp32": 0.01, "autocast": 0.15}
"""Relative difference from the fp32 textbook's first loss above which a side cannot be doing the
same work. Under autocast the textbook averages bf16 logits, which moves its loss by 6 %."""


def main() -> None:
    """Measure, print, write."""
    words = _parser().parse_args()
    if words.rounds is None:
        words.rounds = 3 if words.sizes in PUBLISHED else 5
    if words.device is not None:
        os.environ["DS_ACCELERATOR"] = words.device
    if words.sizes in PUBLISHED:
        sys.exit(measure_published(words))
    out = words.out or Path("runs/bench") / ("grid.json" if words.grid else "bench.json")
    logs = out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if words.grid:
        result = grid.measure(logs, rounds=words.rounds)
        shown = grid.render(result)
    else:
        sizes = SIZES[words.sizes]
        result = measure(sizes, logs, rounds=words.rounds, compiled=_can_compile(words.compiled))
        shown = render(result)
    files.write_json(out, {**result, **_provenance()})
    print(f"\n{shown}\n\nwritten to {out}")


def measure_published(words: argparse.Namespace) -> int:
    """The published workloads; 1 if a side failed, or does not do the same work."""
    device, _ = machine()
    if device == "cpu" and words.device != "cpu":
        print("no CUDA device for models of these sizes; --device cpu rehearses with narrow ones")
        return 2
    step = max(PUBLISHED_MICRO[job][STUDENT] for job in PUBLISHED_MICRO)
    if words.batch_windows is not None and words.batch_windows % step:
        print(f"--batch-windows {words.batch_windows}: a multiple of {step}, which is published")
        return 2
    out = words.out or Path("runs/bench/published.json")
    logs = out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    todo = published.groups(
        PUBLISHED[words.sizes],
        device=device,
        windows=words.batch_windows,
        tiny=device == "cpu",
        compiled=_can_compile(words.compiled),
    )
    chosen = published.chosen(todo, groups=words.only, rows=words.rows)
    if not chosen:
        print(f"no such groups and rows; there are:\n{published.listed(todo)}")
        return 2
    record = published.Record(out, {"rounds": words.rounds, **_provenance()})
    published.measure(chosen, record, logs, rounds=words.rounds, seconds=words.seconds)
    result = record.as_json()
    shown = published.render(result)
    files.write_atomic(out.with_suffix(".md"), f"{shown}\n\n{published.render_inside(result)}\n")
    print(f"\n{shown}\n\nended by: {result['ended_by']}; written to {out}")
    failed = any("failed" in facts for _, facts in published.told_rows(result))
    return int(failed or result["same_work"] != "yes")


def _can_compile(asked: bool) -> bool:
    lacking = what_compiling_lacks(machine()[0])
    if asked and lacking:
        print(f"no compiled rows: {lacking} here")
    return asked and lacking is None


def measure(sizes: Sizes, logs: Path, *, rounds: int, compiled: bool) -> dict[str, Any]:
    """All rows of one workload."""
    with ExitStack() as stack:
        sides: dict[str, Running] = {}
        for row, variants in _started(rows(sizes, compiled=compiled), logs, small=sizes == SMALL):
            sides[row] = fastest(variants)
            stack.callback(sides[row].end)
        _check_same_work(sides)
        ours = [side for side in sides.values() if side.side.kind == "ours"]
        rates = take_turns(list(sides.values()), rounds, after_each=lambda: ours[0].ask("rate"))
    return {
        "keys": {**keys(sides, rates), **loss_keys(sizes, rounds)},
        "rows": {row: _summary(side) for row, side in sides.items()},
        "matmul_rate": {key: median(rate[key] for rate in rates) for key in rates[0]},
        "sizes": sizes.as_json(),
        "rounds": rounds,
    }


# -- what is measured -----------------------------------------------------------------------------


def rows(sizes: Sizes, *, compiled: bool) -> dict[str, list[Side]]:
    """Each row's variants, of which the fastest is measured; `compiled`: ours that way, too, in
    rows of their own, as long trainings have it and short ones do not."""
    device, units = machine()
    if device == "cuda":
        layouts = list(dict.fromkeys([(units, 1), (1, 1)]))
    else:
        layouts = [(2, max(1, units // 2)), (1, units)]
    small = sizes == SMALL  # one variant of each row, one thread of each rank
    if small:
        layouts = [(2 if device == "cpu" else 1, 1), (1, 1)]
    attentions = ("sdpa",) if small else ("sdpa", "eager")

    def side(kind: Any, ranks: int, threads: int, **more: Any) -> Side:
        return Side(kind, sizes, device, ranks, threads, **more)

    result: dict[str, list[Side]] = {}
    for ranks, threads in layouts[:1] if small else layouts:
        result[f"ours, {ranks} ranks"] = [side("ours", ranks, threads)]
    for ranks, threads in layouts[-1:] if small else layouts:
        result[f"ours cached, {ranks} ranks"] = [side("ours", ranks, threads, cache=True)]
    if compiled:
        (ranks, threads), gaining = layouts[0], "student" if device == "cpu" else "all"
        result["ours compiled"] = [side("ours", ranks, threads, compiled=gaining)]
        result["ours cached compiled"] = [
            side("ours", ranks, threads, cache=True, compiled="student")
        ]
    result["plain process"] = [side("plain", *layouts[-1])]
    for precision in ("fp32", "autocast"):
        result[f"textbook {precision}"] = [
            side("textbook", ranks, threads, precision=precision, attention=attention)
            for ranks, threads in (layouts[-1:] if small else layouts)
            for attention in attentions
        ]
    return result


def _started(
    rows: Mapping[str, Sequence[Side]], logs: Path, *, small: bool
) -> Iterable[tuple[str, Iterable[Running]]]:
    """The processes of each row, one variant after another; small ones all at once."""
    turn_s = SMALL_TURN_S if small else TURN_S
    starting = [
        (row, (Running(side, logs, turn_s=turn_s) for side in sides)) for row, sides in rows.items()
    ]
    return [(row, list(variants)) for row, variants in starting] if small else starting


def keys(sides: Mapping[str, Running], rates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The numbers that the project is held to: of the fastest rows, and of those not compiled."""
    plainly = {row: side for row, side in sides.items() if side.side.compiled == "none"}
    online, cached = _best(sides, cache=False), _best(sides, cache=True)
    fp32, autocast = sides["textbook fp32"], sides["textbook autocast"]
    uncompiled = {
        "tokens_per_s_ratio_uncompiled": _ratio(fp32, _best(plainly, cache=False)),
        "cached_tokens_per_s_ratio_uncompiled": _ratio(fp32, _best(plainly, cache=True)),
    }
    # Two ranks share the cores that the plain process has for itself; GPUs are not shared out.
    two_ranks = fp32.side.device == "cpu"
    sharded = sides["ours, 2 ranks" if two_ranks else "ours, 1 ranks"]
    return {
        "tokens_per_s_ratio": _ratio(fp32, online),
        "tokens_per_s_ratio_autocast": _ratio(autocast, online),
        "cached_tokens_per_s_ratio": _ratio(fp32, cached),
        "cached_tokens_per_s_ratio_autocast": _ratio(autocast, cached),
        **uncompiled,
        "mfu": _share(online, [rate["same_shapes"] for rate in rates]),
        "mfu_square": _share(online, [rate["square"] for rate in rates]),
        "zero2_overhead": 1 / _ratio(sides["plain process"], sharded) - 1,
    }


def loss_keys(sizes: Sizes, rounds: int) -> dict[str, float]:
    """What `loss.py` measures of the loss alone, on the same sizes."""
    widths = [str(teacher["hidden_size"]) for teacher in sizes.teachers]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "loss.json"
        words = ["--positions", sizes.tokens, "--vocab", sizes.vocab_size, "--rounds", rounds]
        words += ["--student", sizes.student["hidden_size"], "--out", out, "--teachers", *widths]
        subprocess.run([sys.executable, str(LOSS), *map(str, words)], check=True)
        measured: dict[str, float] = files.read_json(out)["keys"]
    return measured


def _best(sides: Mapping[str, Running], *, cache: bool) -> Running:
    ours = [each for each in sides.values() if each.side.kind == "ours"]
    return min(
        (each for each in ours if each.side.cache == cache), key=lambda each: median(each.step_s)
    )


def _ratio(slow: Running, fast: Running) -> float:
    """How many times the tokens per second of `slow`."""
    return median(a / b for a, b in zip(slow.step_s, fast.step_s, strict=True))


def _share(running: Running, rates: Sequence[float]) -> float:
    """Of the rates measured in the same rounds, what the step reached."""
    flops = running.side.flops_per_step
    return median(flops / s / rate for s, rate in zip(running.step_s, rates, strict=True))


def _check_same_work(sides: Mapping[str, Running]) -> None:
    """Same weights, same tokens, same loss: else the comparison means nothing."""
    losses = {row: side.first_loss for row, side in sides.items()}
    reference = losses["textbook fp32"]
    off = {
        row: loss
        for row, loss in losses.items()
        if abs(loss / reference - 1) > LOSS_TOLERANCE[sides[row].side.precision]
    }
    if off:
        raise SystemExit(f"first losses differ from the textbook's {reference:.4f}: {off}")


# -- what is shown --------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """The rows, then the keys."""
    lines = [
        [
            row,
            facts["variant"],
            number(facts["tokens_per_s"], 0),
            number(1000 * facts["step_s"], 0),
            f"{1000 * min(facts['rounds_s']):,.0f} – {1000 * max(facts['rounds_s']):,.0f}",
            number(facts["flops_per_s"] / 1e9, 0),
        ]
        for row, facts in result["rows"].items()
    ]
    header = ["row", "ranks × threads", "tokens/s", "ms a step", "rounds", "GFLOP/s"]
    shown = [[key, number(value, 3)] for key, value in result["keys"].items()]
    rate = result["matmul_rate"]
    return "\n\n".join(
        (
            table(header, lines, left=2),
            f"bf16 products: {rate['same_shapes'] / 1e9:,.0f} GFLOP/s at the models' shapes, "
            f"{rate['square'] / 1e9:,.0f} GFLOP/s square",
            table(["key", ""], shown),
        )
    )


def _summary(running: Running) -> dict[str, Any]:
    step_s = median(running.step_s)
    return {
        "variant": running.side.variant,
        "tokens_per_s": running.side.sizes.tokens / step_s,
        "step_s": step_s,
        "rounds_s": running.step_s,
        "flops_per_s": running.side.flops_per_step / step_s,
        "first_loss": running.first_loss,
    }


def _provenance() -> dict[str, Any]:
    device, units = machine()
    return {
        "environment": describe_environment(torch.device(device)),
        "device": device,
        "cores_or_devices": units,
        "load_average": os.getloadavg(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Our trainer against the textbook's.")
    parser.add_argument("--sizes", choices=[*SIZES, *PUBLISHED], default="default")
    parser.add_argument("--rounds", type=int, help="default: 5; of the published sizes 3")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure our side under torch.compile too, as long runs have it (minutes to compile)",
    )
    parser.add_argument("--grid", action="store_true", help="time a token against the sizes")
    parser.add_argument("--out", type=Path, help="default: in runs/bench, by what is measured")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: CUDA where there is one"
    )
    of_published = parser.add_argument_group("of the published sizes")
    of_published.add_argument("--seconds", type=float, help="end then, with what there is")
    of_published.add_argument(
        "--batch-windows", type=int, metavar="N", help="of the student's step, on both sides"
    )
    of_published.add_argument("--only", nargs="+", metavar="GROUP", help="these groups of rows")
    of_published.add_argument("--rows", nargs="+", metavar="ROW", help="these rows of them")
    return parser


if __name__ == "__main__":
    main()
