"""What people watch: numbers of logged steps enter; metrics.jsonl, TensorBoard and a bar leave.

Only rank 0 writes. A resumed training first takes back what was logged after its checkpoint, so
that every step stands once in the file; of steps that another run made, it takes over what that one
logged. TensorBoard's files lie in one run on one node alone: those of other runs' steps, or of a
node that was replaced, are written anew from the file. Where the disk refuses, all ranks raise: one
that waited for rank 0 would end with an error of the network instead.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from babyllama_ds import files, ranks
from babyllama_ds.rundir import BOARDS_NAME, METRICS_NAME

log = logging.getLogger(__name__)

Metrics = Mapping[str, float | int | str | None]
UNPLOTTED = ("stage", "step", "epoch", "tokens")


class MetricsLog:
    """The metrics of one stage: a line per logged step, scalars, and a progress bar.

    Opening, `write`, and leaving without an error are collectives. They raise `RunError` when the
    disk refuses.
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        *,
        first_step: int,
        total_steps: int,
        logged: Callable[[], str | None] = lambda: None,
    ) -> None:
        """After `first_step` steps, of which rank 0's `logged` has the lines (none: its file)."""
        self.stage = stage
        self._total_steps = total_steps
        self._bar: tqdm[Any] | None = None
        self._board: SummaryWriter | None = None
        self._run_dir = run_dir
        self._file = run_dir / METRICS_NAME
        self._on_rank_zero(lambda: self._open(first_step, logged()))

    def _open(self, first_step: int, logged: str | None) -> None:
        past = self._until(first_step) if logged is None else _named(self.stage, logged)
        go_back(self._run_dir, self.stage, past)
        restore_boards(self._run_dir)
        board = _board_of(self._run_dir, self.stage)
        self._board = SummaryWriter(str(board), purge_step=first_step + 1)
        self._bar = tqdm(
            total=self._total_steps,
            initial=first_step,
            desc=self.stage,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def _until(self, step: int) -> list[str]:
        """The lines that stand here, of so many steps."""
        return [line for line, entry in _lines_of(self._file, self.stage) if entry["step"] <= step]

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is None:
            self._on_rank_zero(self._close_board)
            return
        with suppress(OSError):  # the error that ends the training says more
            self._close_board()

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()

    def advance(self) -> None:
        """One step further on the bar."""
        if self._bar is not None:
            self._bar.update()

    def write(self, step: int, values: Metrics) -> None:
        """Record what was measured after `step` updates."""
        self._on_rank_zero(lambda: self._write(step, values))

    def _write(self, step: int, values: Metrics) -> None:
        assert self._board is not None, "opened on this rank"
        line = json.dumps({"stage": self.stage, "step": step, **values})
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        _plot(self._board, step, values)

    def _on_rank_zero(self, work: Callable[[], None]) -> None:
        def told() -> None:
            if ranks.rank() != 0:
                return
            try:
                work()
            except OSError as error:
                raise files.cannot_write(self._run_dir, error) from error

        ranks.on_every_rank(told)

    def show(
        self,
        step: int,
        values: Metrics,
        *,
        tokens_per_s: float,
        mfu: float | None = None,
        seconds_left: float,
    ) -> None:
        """The line for people: on the bar, or in the log when there is no terminal."""
        if self._bar is None:
            return
        shown = "  ".join(
            f"{key} {value:.4g}" for key, value in values.items() if _is_number(value)
        )
        speed = f"{tokens_per_s:,.0f} tok/s" + (f"  mfu {mfu:.2f}" if mfu is not None else "")
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{shown}  {speed}", refresh=False)
            return
        log.info(
            "%s  step %d/%d  %s  %s  %s left",
            self.stage,
            step,
            self._total_steps,
            shown,
            speed,
            duration(seconds_left),
        )


def go_back(run_dir: Path, stage: str, past: list[str]) -> None:
    """Leave of `stage` these lines, to stand last. They may be of steps that another run made."""
    path = run_dir / METRICS_NAME
    own = [line for line, _ in _lines_of(path, stage)]
    if own[: len(past)] != past:
        shutil.rmtree(_board_of(run_dir, stage), ignore_errors=True)  # it tells of other steps
    if path.exists() or past:
        others = [line for line, entry in _whole_lines(path) if entry["stage"] != stage]
        files.write_atomic(path, "".join(line + "\n" for line in [*others, *past]))


def tell_as_done(run_dir: Path, stage: str, logged: str) -> None:
    """Have the lines that a finished training `logged`, and their board; on rank 0.

    Another run may have done it that shares the store, and this one a part of it, or none.

    Raises:
        RunError: the disk refuses.
    """
    done = _named(stage, logged)
    try:
        if [line for line, _ in _lines_of(run_dir / METRICS_NAME, stage)] != done:
            shutil.rmtree(_board_of(run_dir, stage), ignore_errors=True)
            go_back(run_dir, stage, done)
        restore_boards(run_dir)  # also where a kill came between the lines and these
    except OSError as error:
        raise files.cannot_write(run_dir, error) from error


def logged_of(run_dir: Path, stage: str, *, to_step: int = 0) -> str:
    """The lines that are logged of a stage; none where they end before `to_step`."""
    lines = _lines_of(run_dir / METRICS_NAME, stage)
    if max((entry["step"] for _, entry in lines), default=0) < to_step:
        return ""
    return "".join(line + "\n" for line, _ in lines)


def _named(stage: str, logged: str) -> list[str]:
    """The lines of a training, which may have another name in the run that logged them."""
    return [json.dumps({**json.loads(line), "stage": stage}) for line in logged.splitlines()]


def _board_of(run_dir: Path, stage: str) -> Path:
    return run_dir / BOARDS_NAME / stage


def _lines_of(path: Path, stage: str) -> list[tuple[str, dict[str, Any]]]:
    return [(line, entry) for line, entry in _whole_lines(path) if entry["stage"] == stage]


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines that no kill or power cut left short or garbled, and what they say."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            yield line, json.loads(line)


def restore_boards(run_dir: Path) -> None:
    """Write TensorBoard's files of stages that have lines, and no folder; on rank 0.

    A folder appears whole: one that is there is left alone.
    """
    boards = run_dir / BOARDS_NAME
    for folder in (boards, *boards.glob("*/")):
        files.remove_temporaries(folder)
    path = run_dir / METRICS_NAME
    for stage in dict.fromkeys(entry["stage"] for _, entry in _whole_lines(path)):
        if (folder := boards / stage).exists():
            continue
        temporary = files.temporary_beside(folder)
        with SummaryWriter(str(temporary)) as board:
            for _, entry in _lines_of(path, stage):
                _plot(board, entry["step"], entry)
        temporary.rename(folder)


def _plot(board: SummaryWriter, step: int, values: Metrics) -> None:
    for key, value in values.items():
        if key not in UNPLOTTED and isinstance(value, float):
            board.add_scalar(key, value, step)


def duration(seconds: float) -> str:
    """`75` to `1:15`, `3675` to `1:01:15`."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
