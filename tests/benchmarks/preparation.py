"""Preparing a corpus: its rate beside the bare library's, its time and memory as text grows.

    ours       files → checked → cleaned → encoded → shards on the disk
    lines      bare `Tokenizer.encode_batch` over the same cleaned lines, already in memory
    fast       bare `Tokenizer.encode_batch_fast` over the same text in blocks, already in memory

Sides take turns, in turned order every other round. A ratio is the median over rounds of the other
side's time over ours, so of our rate over its; by CPU time it holds on a busy machine too.

    python tests/benchmarks/preparation.py --text FILE... [--rounds N]
    python tests/benchmarks/preparation.py --growth [--megabytes 4]

The second, on text of its own, prepares 1, 4 and 16 times so many megabytes, each in a process.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from babyllama_ds.corpus.blocks import BLOCK_CHARS, cut_into_blocks
from babyllama_ds.corpus.sources import iter_text, read_sources
from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer
from babyllama_ds.corpus.writing import BATCH_BLOCKS, write_shards
from babyllama_ds.report.formatting import number, table
from babyllama_ds.spec.corpus import FilesCorpus, HeldOutFiles, TrainedTokenizer

VOCAB_SIZE = 8192
LEARNT_LINES = 100_000
"""Lines that the tokenizer learns from."""
BATCH_LINES = 10_000
GROWTH = (1, 4, 16)

Work = Callable[[], None]


def corpus(paths: list[Path], folder: Path) -> FilesCorpus:
    """The files as training text, and a line of development text."""
    dev = folder / "one-line.dev"
    dev.write_text("some text\n")
    split = HeldOutFiles(kind="held_out", dev=(str(dev),))
    train = tuple(map(str, paths))
    return FilesCorpus(kind="files", train=train, split=split, cleaning="babylm")


def prepare(paths: list[Path], tokenizer: Any, folder: Path) -> None:
    """What a job does with its text once it has a tokenizer."""
    sources = read_sources(corpus(paths, folder.parent))
    texts = {"train": iter_text(sources, "train"), "dev": iter_text(sources, "dev")}
    write_shards(folder, texts, tokenizer)


def learn(lines: list[str], folder: Path) -> Any:
    """A tokenizer as large as the main job's, or as the text allows."""
    spec = TrainedTokenizer(kind="bpe", vocab_size=VOCAB_SIZE)
    train_tokenizer(spec, iter(lines[:: max(1, len(lines) // LEARNT_LINES)]), folder)
    return load_tokenizer(str(folder))


# -- rate ------------------------------------------------------------------------------------------


def measure_rate(paths: list[Path], rounds: int, folder: Path) -> str:
    """A table of the three sides."""
    sources = read_sources(corpus(paths, folder))
    lines = [line for _, of_file in iter_text(sources, "train") for line in of_file]
    blocks = list(cut_into_blocks(lines, lambda *_: True, BLOCK_CHARS))
    tokenizer = learn(lines, folder / "tokenizer")
    backend = tokenizer.backend_tokenizer
    sides: dict[str, Callable[[int], None]] = {
        "ours": lambda turn: prepare(paths, tokenizer, folder / f"shards-{turn}"),
        "lines": lambda _: _bare(backend.encode_batch, lines, BATCH_LINES),
        "fast": lambda _: _bare(backend.encode_batch_fast, blocks, BATCH_BLOCKS),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):  # the first warms up
        for name in sides if turn % 2 == 0 else reversed(sides):
            spent = _spent(lambda name=name, turn=turn: sides[name](turn))  # type: ignore[misc]
            if turn:
                times[name].append(spent)
    megabytes = sum(len(line.encode()) for line in lines) / 1e6
    rows = [_row(name, times, megabytes) for name in sides]
    header = ["side", "MB/s", "CPU s", "our rate over its", "by CPU time"]
    return f"{megabytes:.1f} MB of cleaned text\n\n{table(header, rows)}"


def _row(name: str, times: dict[str, list[tuple[float, float]]], megabytes: float) -> list[str]:
    wall_s, cpu_s = (median(spent[kind] for spent in times[name]) for kind in (0, 1))
    pairs = list(zip(times[name], times["ours"], strict=True))
    ratios = [median(its[kind] / ours[kind] for its, ours in pairs) for kind in (0, 1)]
    return [name, number(megabytes / wall_s, 2), number(cpu_s, 2), *(number(r, 2) for r in ratios)]


def _bare(encode: Callable[..., Any], texts: list[str], at_once: int) -> None:
    for start in range(0, len(texts), at_once):
        for encoding in encode(texts[start : start + at_once], add_special_tokens=False):
            _ = encoding.ids


def _spent(work: Work) -> tuple[float, float]:
    """Seconds by the clock, and of all this process's threads."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


# -- growth ----------------------------------------------------------------------------------------


def measure_growth(megabytes: int, folder: Path) -> str:
    """A table of sizes; every size is prepared in a process of its own."""
    path = folder / "learnt.txt"
    write_text(path, 1 << 20)
    learn(path.read_text().splitlines(keepends=True), folder / "tokenizer")
    rows = []
    for times in GROWTH:
        size = megabytes * times
        write_text(folder / f"{size}.txt", size * 10**6)
        command = [sys.executable, __file__, "--one", str(folder), "--megabytes", str(size)]
        reply = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        wall_s, cpu_s, before, peak = map(float, reply.stdout.split())
        cells = [number(wall_s, 1), number(cpu_s, 1), number(1e3 * cpu_s / size, 0)]
        rows.append([f"{times}×", str(size), *cells, number(before, 0), number(peak, 0)])
    header = ["", "MB", "s", "CPU s", "CPU ms a MB", "MiB before", "MiB at most"]
    return table(header, rows)


def write_text(path: Path, size: int) -> None:
    """Random sentences of made-up words, common ones and rare ones, of `size` bytes."""
    draw = random.Random(7)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(30_000)]
    weights = [1 / (place + 3) for place in range(len(words))]
    with path.open("w") as stream:
        while stream.tell() < size:
            chosen = draw.choices(words, weights, k=10_000)
            stream.writelines(
                " ".join(chosen[start : start + 8]) + " .\n" for start in range(0, 10_000, 8)
            )


def _one(folder: Path, megabytes: int) -> str:
    """Seconds, CPU seconds, resident MiB before the work and at most, of this process."""
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    # A first time, small, so that what is loaded but once is loaded.
    prepare([folder / "learnt.txt"], tokenizer, folder / "first")
    before = _status_mebibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    spent = _spent(
        lambda: prepare([folder / f"{megabytes}.txt"], tokenizer, folder / f"shards-{megabytes}")
    )
    return " ".join(map(str, (*spent, before, _status_mebibytes("VmHWM"))))


def _status_mebibytes(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--megabytes", type=int, default=4)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if words.one:
        print(_one(words.one, words.megabytes))
        return
    if not words.growth and not words.text:
        parser.error("give --text FILE... or --growth")
    with tempfile.TemporaryDirectory() as folder:
        if words.growth:
            print(measure_growth(words.megabytes, Path(folder)))
        else:
            print(measure_rate(words.text, words.rounds, Path(folder)))


if __name__ == "__main__":
    main()
