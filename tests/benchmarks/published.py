"""`make bench` at the published sizes: workloads enter; a table and a file leave, row by row.

The sides of a group are built at the same time and take turns on the device, which they have for
themselves meanwhile. Groups come in the order of what depends on them. Every turn's result is on
the disk before the next begins: what is cut off costs what had not been measured.

A ratio is of the medians over rounds. The textbook has two kinds of rows: at its best (attention
and micro-batch tried out, nothing looked at after a pass) and as published (its micro-batch, the
trainer's defaults).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from race import Deadline, FailedError, NoMemoryError, OutOfTimeError, Running, Variant, tuned
from scenario import machine
from workloads import STUDENT, TINY_PART, Contender, Workload

from babyllama_ds import files
from babyllama_ds.report.formatting import number, table

TURN_S = {"cuda": 0.8, "cpu": 0.2}
"""About how long a turn is."""
LEAST_MICRO = 16
"""Windows of a forward pass that ours may go down to."""
TOLERANCE = {"bf16": 0.02, "fp32": 0.02, "autocast": 0.15}
"""Relative difference from the fp32 first loss above which a side cannot be doing the same work;
bf16 logits alone move the textbook's by some percent."""

AIMS = {
    "babyllama: tokens_per_s_ratio": "≥ 6",
    "babyllama: cached_tokens_per_s_ratio": "≥ 12",
    "babyllama: tokens_per_s_ratio_autocast": "≥ 2",
    "babyllama: cached_tokens_per_s_ratio_autocast": "≥ 5",
    **{
        f"{name}: {cached}peak_memory_ratio{precision}": "< 1"
        for name in ("babyllama", "babyllama2")
        for cached in ("", "cached_")
        for precision in ("", "_autocast")
    },
    **{
        f"{name}: {rate}": f"≥ {aim}"
        for name, aim in (
            ("babyllama2/first", 0.5),
            ("babyllama/gpt2", 0.5),
            ("babyllama/control", 0.35),
        )
        for rate in ("mfu", "mfu_square")
    },
}
"""What is asked of a key. Of `mfu` the strict reading is `mfu_square`."""


# -- what is measured, in order --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the result: a side, and what is tried for it."""

    name: str
    contender: Contender
    micros: tuple[int, ...]
    """Windows of a forward pass, tried in this order as long as they are faster."""
    attentions: tuple[str | None, ...] = (None,)
    like: str | None = None
    """The row of the same workload whose choice it takes, where there is one."""

    @property
    def place(self) -> tuple[str, str]:
        """Workload and row."""
        return self.contender.work.name, self.name


@dataclass(frozen=True)
class Group:
    """Sides that take turns."""

    name: str
    rows: tuple[Row, ...]


def groups(
    workloads: Sequence[str], *, device: str, windows: int | None, tiny: bool, compiled: bool
) -> list[Group]:
    """Everything that is measured, the most important first."""
    threads = machine()[1] if device == "cpu" else 1

    def work(job: str, trains: str = STUDENT, *, distilled: bool = True) -> Workload:
        asked = windows if trains == STUDENT else None
        return Workload(job, trains, distilled=distilled, windows_asked=asked, tiny=tiny)

    def contender(kind: str, of: Workload, **more: Any) -> Contender:
        return Contender(kind=kind, work=of, device=device, threads=threads, **more)

    make = _Rows(contender)
    alone = {
        "345M, 705M and 58M alone": (
            work("babyllama2", "first", distilled=False),
            work("babyllama", "gpt2", distilled=False),
            work("babyllama", distilled=False),
        ),
        "360M alone": (work("babyllama", "llama", distilled=False),),
    }
    first, second = work("babyllama"), work("babyllama2")
    ordered = [
        ("babyllama", Group("babyllama", make.distilled(first))),
        *(
            ("alone", Group(name, tuple(row for each in works for row in make.alone(each))))
            for name, works in alone.items()
        ),
        ("babyllama2", Group("babyllama2", make.distilled(second))),
    ]
    if compiled:
        ordered += [
            ("babyllama", Group("babyllama, compiled", make.distilled_compiled(first))),
            *(
                ("alone", Group(f"{name}, compiled", tuple(map(make.alone_compiled, works))))
                for name, works in alone.items()
            ),
            ("babyllama2", Group("babyllama2, compiled", make.distilled_compiled(second))),
        ]
    ordered += [
        ("babyllama", Group("babyllama, further", make.further(first, compiled=compiled))),
        ("babyllama2", Group("babyllama2, further", make.further(second, compiled=compiled))),
    ]
    return [group for name, group in ordered if name in workloads]


def chosen(
    todo: Iterable[Group], *, groups: Sequence[str] | None, rows: Sequence[str] | None
) -> list[Group]:
    """Those of these names; none: all."""
    found = [
        Group(group.name, tuple(row for row in group.rows if not rows or row.name in rows))
        for group in todo
        if not groups or group.name in groups
    ]
    return [group for group in found if group.rows]


def listed(todo: Iterable[Group]) -> str:
    """Their names, and those of their rows."""
    return "\n".join(
        f"    {group.name}: {'; '.join(dict.fromkeys(row.name for row in group.rows))}"
        for group in todo
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of each kind of group."""

    contender: Callable[..., Contender]

    def distilled(self, work: Workload) -> tuple[Row, ...]:
        """Ours beside the textbook, at its best and as published."""
        rows = [
            self._ours(work, "ours"),
            self._textbook(work, "fp32"),
            self._textbook(work, "autocast"),
            self._ours(work, "ours cached", cache=True),
            self._textbook(work, "fp32", as_published=True),
            self._textbook(work, "autocast", as_published=True),
        ]
        if work.published_micro < work.batch_windows:
            published = self._ours(work, "ours, published micro-batch")
            rows.append(replace(published, micros=(work.published_micro,)))
        return tuple(rows)

    def distilled_compiled(self, work: Workload) -> tuple[Row, ...]:
        """Ours under torch.compile, as long trainings have it."""
        return (
            self._ours(work, "ours compiled", like="ours", compiled=True),
            self._ours(work, "ours cached compiled", like="ours cached", cache=True, compiled=True),
        )

    def further(self, work: Workload, *, compiled: bool) -> tuple[Row, ...]:
        """The textbook with what was not published, or of BabyLlama-2's student alone: TF32, and
        the student under torch.compile."""
        rows = [
            replace(
                self._textbook(work, "fp32", tf32=True),
                name="textbook fp32 in TF32",
                like="textbook fp32",
            )
        ]
        for precision in ("fp32", "autocast") if compiled else ():
            name = f"textbook {precision}"
            row = self._textbook(work, precision, compiled=True)
            rows.append(replace(row, name=f"{name} compiled", like=name))
        return tuple(rows)

    def alone(self, work: Workload) -> tuple[Row, ...]:
        """One model's training beside Hugging Face's under autocast."""
        return (self._ours(work, "ours"), self._textbook(work, "autocast"))

    def alone_compiled(self, work: Workload) -> Row:
        """The same under torch.compile."""
        return self._ours(work, "ours compiled", like="ours", compiled=True)

    def _ours(self, work: Workload, name: str, *, like: str | None = None, **more: Any) -> Row:
        """The whole batch at once, or halves and quarters of it if they are faster."""
        least = min(work.batch_windows, LEAST_MICRO // (TINY_PART if work.tiny else 1))
        parts = [work.batch_windows // n for n in (1, 2, 4, 8) if work.batch_windows % n == 0]
        micros = tuple(n for n in parts if n >= least)
        return Row(
            name=name, contender=self.contender("ours", work, **more), micros=micros, like=like
        )

    def _textbook(
        self, work: Workload, precision: str, *, as_published: bool = False, **more: Any
    ) -> Row:
        """Its published micro-batch, and larger ones if they are faster."""
        micros = [work.published_micro]
        while not as_published and work.batch_windows % (2 * micros[-1]) == 0:
            micros.append(2 * micros[-1])
        name = f"textbook {precision}" + (", as published" if as_published else "")
        contender = self.contender(
            "textbook", work, precision=precision, at_its_best=not as_published, **more
        )
        return Row(
            name=name,
            contender=contender,
            micros=tuple(micros),
            attentions=("sdpa", "eager"),
        )


# -- measuring -------------------------------------------------------------------------------------


@dataclass
class Record:
    """What is known so far; on the disk after every turn."""

    out: Path
    facts: dict[str, Any]
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    """Groups that have ended."""

    def row(self, row: Row) -> dict[str, Any]:
        """The facts of a row, to be added to."""
        work = row.contender.work
        if work.name not in self.workloads:
            self.workloads[work.name] = {**work.facts(), "rows": {}}
        found: dict[str, Any] = self.workloads[work.name]["rows"].setdefault(
            row.name, {"kind": row.contender.kind}
        )
        return found

    def choice(self, row: Row) -> Variant | None:
        """What the row that this one is like has chosen."""
        rows = self.workloads.get(row.contender.work.name, {}).get("rows", {})
        found = rows.get(row.like, {})
        return Variant(**found["variant"]) if "variant" in found else None

    def save(self) -> None:
        """Everything, whole or as it was before."""
        files.write_json(self.out, self.as_json())

    def as_json(self) -> dict[str, Any]:
        """With the keys that follow from the rows."""
        found = keys(self.workloads)
        return {
            "keys": found,
            "aims": {key: AIMS[key] for key in found if key in AIMS},
            "same_work": differing(self.workloads) or "yes",
            "workloads": self.workloads,
            "groups_done": self.done,
            **self.facts,
        }


def measure(
    todo: Sequence[Group],
    record: Record,
    logs: Path,
    *,
    rounds: int,
    seconds: float | None,
) -> None:
    """Group after group, until all is done or time is over; either way the record is whole.

    On a GPU the processes of the next group import while this one's are built.
    """
    deadline, begun = Deadline(seconds), time.monotonic()
    running: list[dict[tuple[str, str], Running]] = []
    on_card = bool(todo) and todo[0].rows[0].contender.device == "cuda"
    try:
        for place, group in enumerate(todo):
            for later in todo[len(running) : place + 1 + int(on_card)]:
                running.append(
                    {row.place: Running(row.contender, logs, deadline) for row in later.rows}
                )
            sides = [(row, running[place][row.place]) for row in group.rows]
            print(f"\n== {group.name} ({time.monotonic() - begun:.0f} s)", flush=True)
            _Turns(sides, record, rounds=rounds).measure(
                waiting=[each for one in running[place + 1 :] for each in one.values()]
            )
            record.done.append(group.name)
            record.save()
            _end(running[place].values())
        record.facts["ended_by"] = "all measured"
    except OutOfTimeError:
        record.facts["ended_by"] = "time"
    finally:
        _end(each for one in running for each in one.values())
        record.facts["seconds"] = round(time.monotonic() - begun, 1)
        record.save()


def _end(running: Iterable[Running]) -> None:
    for each in running:
        each.end()


class _Turns:
    """One group in its course; a side that fails is left out from there on."""

    def __init__(
        self, sides: Sequence[tuple[Row, Running]], record: Record, *, rounds: int
    ) -> None:
        self._sides = list(sides)
        self._record = record
        self._rounds = rounds
        self._variants: dict[tuple[str, str], Variant] = {}
        self._turn_s = TURN_S[sides[0][0].contender.device]

    def measure(self, *, waiting: Sequence[Running]) -> None:
        """Build, choose, take turns, look inside."""
        self._build()
        for each in waiting:  # else they would import while others are timed
            try:
                each.wait_until_here()
            except FailedError:
                continue  # it is said when its turn comes
        self._each(self._first_turn)
        for k in range(1, self._rounds):
            self._each(self._turn, backwards=k % 2 == 1)
        self._each(self._look_inside)

    def _build(self) -> None:
        """On a card all at the same time; on a CPU, which has no room for that, in turn."""
        if self._sides[0][0].contender.device == "cuda":
            self._each(self._ask_to_build)
            self._each(self._built)
            if all(row.contender.compiled for row, _ in self._sides):
                self._compile_together()
        else:
            self._each(self._build_at_once)

    def _ask_to_build(self, row: Row, side: Running) -> None:
        chosen = self._record.choice(row)
        first = Variant(row.micros[0], row.attentions[0])
        variant = self._variants[row.place] = chosen or first
        side.say("build", micro=variant.micro, attention=variant.attention)

    def _build_at_once(self, row: Row, side: Running) -> None:
        self._ask_to_build(row, side)
        self._built(row, side)

    def _built(self, row: Row, side: Running) -> None:
        self._record.row(row).update(side.hear())

    def _compile_together(self) -> None:
        """Their first steps, in which they are compiled, at the same time: nobody is timed yet."""

        def begin(row: Row, side: Running) -> None:
            side.say("turns", **asdict(self._variants[row.place]), warm=1, turns=0, turn_s=0.0)

        def end(_: Row, side: Running) -> None:
            with suppress(NoMemoryError):  # together it was too much; alone it may fit
                side.hear()

        self._each(begin)
        self._each(end)

    def _first_turn(self, row: Row, side: Running) -> None:
        self._choose(row, side)
        self._turn(row, side)

    def _choose(self, row: Row, side: Running) -> None:
        """Micro-batch and attention; told, with all that was tried."""
        chosen = self._record.choice(row)
        if chosen is not None:
            variant, tried = chosen, list[dict[str, Any]]()
        elif row.contender.compiled:  # to try is to compile
            variant, tried = self._variants[row.place], []
        else:
            variant, tried = tuned(side, row.attentions, row.micros)
        self._variants[row.place] = variant
        self._record.row(row).update(variant=asdict(variant), tried=tried)

    def _turn(self, row: Row, side: Running) -> None:
        """A round of one side. A compiled trainer of theirs takes all its rounds at once: each
        call is a training of its own, and would be compiled anew."""
        facts, contender = self._record.row(row), row.contender
        at_once = contender.kind == "textbook" and contender.compiled
        if at_once and "rounds_s" in facts:
            return
        turns = self._rounds if at_once else 1
        variant = self._variants[row.place]
        found = side.steps(variant, turns=turns, turn_s=self._turn_s)
        facts.setdefault("rounds_s", []).extend(found["step_s"])
        facts["memory"] = found["memory"]
        if contender.kind == "ours":
            facts.setdefault("rates", []).append(side.ask("rate"))
        self._sum_up(row, facts)
        print(_told(row, facts), flush=True)

    def _look_inside(self, row: Row, side: Running) -> None:
        if row.contender.kind != "ours":
            return
        facts = self._record.row(row)
        facts["breakdown_s"] = side.ask("breakdown")
        facts["profile"] = side.ask("profile", step_s=facts["step_s"])
        print(_looked(row, facts), flush=True)

    def _sum_up(self, row: Row, facts: dict[str, Any]) -> None:
        work, step_s = row.contender.work, median(facts["rounds_s"])
        flops = work.flops_per_step(cached=row.contender.cache)
        facts |= {
            "step_s": step_s,
            "tokens_per_s": work.tokens / step_s,
            "flops_per_s": flops / step_s,
            "batch_windows": work.batch_windows,
            "micro_batch": facts["variant"]["micro"],
        }
        if "rates" in facts:
            for name, rate in (("mfu", "same_shapes"), ("mfu_square", "square")):
                facts[name] = flops / step_s / median(each[rate] for each in facts["rates"])

    def _each(self, act: Callable[[Row, Running], None], *, backwards: bool = False) -> None:
        """Every side; the record is saved after each, and one that fails is out."""
        for row, side in list(reversed(self._sides) if backwards else self._sides):
            try:
                act(row, side)
            except FailedError as error:
                self._record.row(row)["failed"] = str(error)
                self._sides.remove((row, side))
                side.end()
                print(f"{' / '.join(row.place)}: FAILED: {error}", flush=True)
            self._record.save()


# -- what follows ----------------------------------------------------------------------------------


def keys(workloads: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`WORKLOAD: KEY`, of the rows that are there.

    Ours is its fastest row, uncompiled ones alone for keys that end so; the textbook's the fastest
    of a precision, that as published for keys that end so. TF32 is in none of them.
    """
    found: dict[str, float] = {}
    for name, workload in workloads.items():
        rows = {row: facts for row, facts in workload["rows"].items() if "step_s" in facts}
        of_workload = _keys(rows, _keys_of_textbooks(rows))
        found |= {f"{name}: {key}": value for key, value in of_workload.items()}
    return found


def _keys_of_textbooks(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Theirs, by the end of a key: the fastest as published and at its best."""
    found = {}
    for precision, ending in (("fp32", ""), ("autocast", "_autocast")):
        own = {row: f for row, f in rows.items() if row.startswith(f"textbook {precision}")}
        own = {row: facts for row, facts in own.items() if not row.endswith("TF32")}
        if own:
            found[ending] = min(own.values(), key=_step_s)
        if f"textbook {precision}, as published" in own:
            found[f"{ending}_published"] = own[f"textbook {precision}, as published"]
    return found


def _keys(
    rows: Mapping[str, Mapping[str, Any]], textbooks: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    ours = {row: facts for row, facts in rows.items() if facts["kind"] == "ours"}
    found: dict[str, float] = {}
    for start in ("", "cached_"):
        mine = {row: f for row, f in ours.items() if ("cached" in row) == (start == "cached_")}
        if not mine:
            continue
        best = min(mine.values(), key=_step_s)
        plain = [facts for row, facts in mine.items() if "compiled" not in row]
        for ending, theirs in textbooks.items():
            found[f"{start}tokens_per_s_ratio{ending}"] = theirs["step_s"] / best["step_s"]
            if best not in plain and plain:
                step_s = min(map(_step_s, plain))
                key = f"{start}tokens_per_s_ratio{ending}_uncompiled"
                found[key] = theirs["step_s"] / step_s
            found |= _memory_key(f"{start}peak_memory_ratio{ending}", best, theirs)
            alike = [f for f in mine.values() if f["micro_batch"] == theirs["micro_batch"]]
            if alike and best not in alike:
                key = f"{start}peak_memory_ratio{ending}_same_micro_batch"
                found |= _memory_key(key, min(alike, key=_step_s), theirs)
        found |= {f"{start}{key}": best[key] for key in ("mfu", "mfu_square")}
    return found


def _memory_key(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Ours over theirs, the few batches of a cache left out: a job's is as large as its corpus,
    and lies where there is room."""
    (measure, *_), (also, *_) = ours["memory"], theirs["memory"]
    assert measure == also, "measured alike"
    own = ours["memory"][measure] - ours["cache_bytes"]
    return {key: own / theirs["memory"][measure]}


def differing(workloads: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rows whose first loss is too far from the fp32 textbook's of the same workload (alone, from
    the autocast one's): they do not do the same work."""
    found = {}
    for name, workload in workloads.items():
        losses = {row: f["first_loss"] for row, f in workload["rows"].items() if "first_loss" in f}
        reference = losses.get("textbook fp32", losses.get("textbook autocast"))
        if reference is None:
            continue
        for row, loss in losses.items():
            kind = next((each for each in ("autocast", "fp32") if each in row), "bf16")
            if not abs(loss / reference - 1) <= TOLERANCE[kind]:
                found[f"{name}: {row}"] = {"first_loss": loss, "expected": reference}
    return found


def _step_s(facts: Mapping[str, Any]) -> float:
    step_s: float = facts["step_s"]
    return step_s


# -- what is shown ---------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """A table for each workload, then the keys with their aims."""
    texts = []
    for name, workload in result["workloads"].items():
        params = ", ".join(f"{who} {n / 1e6:,.0f}M" for who, n in workload["params"].items())
        windows = f"{workload['batch_windows']} windows of {workload['length']} tokens a step"
        lines = [_line(row, facts) for row, facts in workload["rows"].items()]
        texts.append(f"{name} ({params}; {windows})\n\n{table(_HEADER, lines, left=2)}")
    shown = [
        [key, number(value, 3), result["aims"].get(key, "")]
        for key, value in result["keys"].items()
    ]
    texts.append(table(["key", "", "aim"], shown, left=1))
    if result["same_work"] != "yes":
        texts.append(f"NOT THE SAME WORK: {result['same_work']}")
    return "\n\n".join(texts)


def render_inside(result: Mapping[str, Any]) -> str:
    """Of each row that was looked into: the parts of a step, and its longest kernels."""
    texts = []
    for name, facts in told_rows(result):
        profile = facts.get("profile", {})
        if "kinds" not in profile:
            continue
        idle = profile.get("idle_share")
        of_card = "" if idle is None else f", of which the card idles {idle:.0%}"
        parts = [[part, number(1e3 * s, 2)] for part, s in facts["breakdown_s"].items() if s]
        kinds = [
            [kind, number(each["ms"], 2), f"{each['share']:.0%}"]
            for kind, each in profile["kinds"].items()
        ]
        longest = [
            [f"`{each['name']}`", number(each["times"], 1), number(each["ms"], 2)]
            for each in profile["longest"]
        ]
        texts += [
            f"## {name}",
            f"A step of {number(1e3 * facts['step_s'], 2)} ms{of_card}; "
            f"{number(profile['kernels_per_step'], 0)} kernels.",
            table(["part", "ms"], parts, left=1),
            table(["kernels", "ms", "share"], kinds, left=1),
            table(["longest", "times", "ms a step"], longest, left=1),
        ]
    return "\n\n".join(texts)


_HEADER = ["row", "variant", "tokens/s", "ms a step", "rounds", "mfu", "square", "peak GiB", "idle"]


def _line(row: str, facts: Mapping[str, Any]) -> list[str]:
    if "step_s" not in facts:
        return [row, facts.get("failed", "not measured"), *[""] * (len(_HEADER) - 2)]
    rounds = [1e3 * each for each in facts["rounds_s"]]
    idle = facts.get("profile", {}).get("idle_share")
    return [
        row,
        str(Variant(**facts["variant"])),
        number(facts["tokens_per_s"], 0),
        number(1e3 * facts["step_s"], 1),
        f"{min(rounds):,.1f} – {max(rounds):,.1f}",
        number(facts["mfu"], 3) if "mfu" in facts else "",
        number(facts["mfu_square"], 3) if "mfu_square" in facts else "",
        number(next(iter(facts["memory"].values())) / 2**30, 2),
        "" if idle is None else f"{idle:.0%}",
    ]


def _told(row: Row, facts: Mapping[str, Any]) -> str:
    """A line of progress."""
    header = _HEADER[2:]
    values = _line(row.name, facts)
    rest = ", ".join(
        f"{value} {head}" for head, value in zip(header, values[2:], strict=True) if value
    )
    return f"{' / '.join(row.place)}, {values[1]}: {rest}"


def _looked(row: Row, facts: Mapping[str, Any]) -> str:
    """Where a step's time goes, in two lines."""
    parts = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in facts["breakdown_s"].items() if s)
    kinds = facts["profile"].get("kinds", {})
    kernels = ", ".join(f"{kind} {each['ms']:.1f}" for kind, each in kinds.items())
    return f"{' / '.join(row.place)}: parts, ms: {parts}\n    kernels, ms: {kernels}"


def told_rows(result: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(`WORKLOAD: ROW`, facts) of all rows."""
    for name, workload in result["workloads"].items():
        for row, facts in workload["rows"].items():
            yield f"{name}: {row}", facts
