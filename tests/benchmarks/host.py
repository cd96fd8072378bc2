"""`make bench-host`: what a step costs the host; a table and `host.json` leave.

The published numbers of layers and of parameters, and next to no arithmetic: widths of 16, batches
of 4 × 8 tokens. What is left is Python, DeepSpeed, and the calling of operators: on a card, the
time below which no step gets, however fast the card is.

    ours                the stack's own pieces: engine, ensemble, objective, step and batches
    … DeepSpeed's own   the same without `engine/lean.py`, gradients reduced whole
    … scattered         the same with `reduce_scatter`
    plain               the same computation in one process without DeepSpeed
    textbook            Hugging Face's trainer (see textbook.py), bf16 autocast

One rank of one thread. Every side is a process; they take turns. On a CPU its own time counts, for
others use the cores too; with CUDA the clock's, and the parts are the host's: nobody waits for the
card between them.

    python tests/benchmarks/host.py [--rounds N] [--steps N] [--layers N N] [--students …]
        [--sides …] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TextIO
from unittest.mock import patch

import torch
from scenario import Sizes, build, build_published, job, machine, windows
from side import MasterWeights, PlainTeacher
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from babyllama_ds import files
from babyllama_ds.environment import describe_environment
from babyllama_ds.memory import keep_freed_memory
from babyllama_ds.models.attention import resolve_attention
from babyllama_ds.report.formatting import number, table
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import BatchPlan
from babyllama_ds.training.breakdown import Breakdown, PartTimer, untimed
from babyllama_ds.training.objective import Objective

SIDES = ("ours", "ours, DeepSpeed's own", "ours, scattered", "plain", "textbook")
STUDENTS = {"control": False, "two teachers": True}
"""Whether there are teachers."""
WARM_UP_STEPS = 10
OTHER = "other"
"""What is in no part."""


def sizes_of(student_layers: int, teacher_layers: int) -> Sizes:
    """Models as deep as asked for, and as narrow as they get."""
    narrow = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    return Sizes(
        vocab_size=272,
        length=8,
        batch_windows=4,
        student={"kind": "llama", "num_layers": student_layers, **narrow},
        teachers=(
            {"kind": "gpt2", "num_layers": teacher_layers, "tied_embeddings": False}
            | {"dropout": 0.0, **narrow},
            {"kind": "llama", "num_layers": teacher_layers, **narrow},
        ),
    )


def main() -> None:
    """Measure, print, write; or be one of the sides."""
    words = _parser().parse_args()
    if words.side is not None:
        be_side(json.loads(words.side))
        return
    result: dict[str, Any] = {
        name: measure(
            words.sides, STUDENTS[name], words.layers, rounds=words.rounds, steps=words.steps
        )
        for name in words.students
    }
    device, _ = machine()
    facts = {
        "environment": describe_environment(torch.device(device)),
        "load_average": os.getloadavg(),
        "rounds": words.rounds,
        "steps": words.steps,
        "layers": words.layers,
    }
    out: Path = words.out or Path("runs/bench/host.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(out, {"measured": result, **facts})
    print(f"\n{render(result)}\n\nwritten to {out}")


def measure(
    names: Sequence[str], with_teachers: bool, layers: Sequence[int], *, rounds: int, steps: int
) -> dict[str, Any]:
    """Each side's step: ms of every round, and by part ms and operators."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = {
            name: stack.enter_context(
                _running({"name": name, "teachers": with_teachers, "layers": layers}, logs)
            )
            for name in names
        }
        for ask in sides.values():
            ask(WARM_UP_STEPS, "nothing")
        step_ms: dict[str, list[float]] = {name: [] for name in names}
        for count in range(rounds):
            for name in names if count % 2 == 0 else reversed(names):
                step_ms[name].append(1e3 * sides[name](steps, "nothing")["seconds"] / steps)
        found, against = {}, "plain" if "plain" in names else names[0]
        for name, ask in sides.items():
            parts = ask(steps, "parts")["parts"]
            found[name] = {
                "step_ms": step_ms[name],
                "over": median(a / b for a, b in zip(step_ms[name], step_ms[against], strict=True)),
                "parts_ms": {part: 1e3 * seconds / steps for part, seconds in parts.items()},
                "operators": ask(1, "operators")["operators"],
            }
    return found


@contextmanager
def _running(side: Mapping[str, Any], logs: Path) -> Iterator[Callable[[int, str], Any]]:
    """A side's process: so many steps, what is measured, and its answer."""
    device, _ = machine()
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": "0"}
    path = logs / f"{SIDES.index(side['name'])}.log"
    with path.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--side", json.dumps({**side, "device": device})],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    wanted, answers = process.stdin, process.stdout

    def ask(steps: int, what: str) -> Any:
        wanted.write(json.dumps({"steps": steps, "measure": what}) + "\n")
        wanted.flush()
        line = answers.readline()
        if not line:
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{side['name']} ended:\n{tail}")
        return json.loads(line)

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait(timeout=60)


# -- what is shown --------------------------------------------------------------------------------


def render(result: Mapping[str, Any]) -> str:
    """For each student, the sides' steps, then their parts."""
    return "\n\n".join(
        f"{student}\n\n{_steps_table(sides)}\n\n{_parts_table(sides)}"
        for student, sides in result.items()
    )


def _steps_table(sides: Mapping[str, Any]) -> str:
    lines = [
        [
            name,
            number(median(facts["step_ms"]), 2),
            f"{min(facts['step_ms']):.2f} - {max(facts['step_ms']):.2f}",
            number(facts["over"], 2),
            number(sum(facts["operators"].values()), 0),
        ]
        for name, facts in sides.items()
    ]
    return table(["side", "ms a step", "rounds", "over", "operators"], lines, left=1)


def _parts_table(sides: Mapping[str, Any]) -> str:
    """Milliseconds and operators of each part, and below what is in none."""
    parts = dict.fromkeys(part for facts in sides.values() for part in facts["parts_ms"])
    lines = []
    for part in parts:
        cells = []
        for facts in sides.values():
            ms, operators = facts["parts_ms"].get(part), facts["operators"].get(part, 0)
            cells.append("" if ms is None else f"{ms:.2f} ({operators})")
        lines.append([part, *cells])
    return table(["ms (operators)", *sides], lines, left=1)


# -- a side ---------------------------------------------------------------------------------------


class HostParts(Breakdown):
    """As the breakdown of a job, of the host alone: nobody waits for the device in between."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.clock = time.process_time if device.type == "cpu" else time.perf_counter
        self.operators: Counter[str] = Counter()

    @property
    def inside(self) -> str:
        """The innermost part."""
        return self._inside[-1] if self._inside else OTHER

    def _turn(self) -> None:
        now = self.clock()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now


class Counted(TorchDispatchMode):
    """The operators of each part that read or write numbers: on a card each is a launch, or more.

    As they come below autograd; one for a list of tensors counts once.
    """

    def __init__(self, parts: HostParts) -> None:
        super().__init__()
        self._parts = parts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if not (func.is_view or name.startswith(("aten::empty", "aten::detach", "profiler::"))):
            self._parts.operators[self._parts.inside] += 1
        return func(*args, **(kwargs or {}))


Instrument = Callable[[Breakdown], AbstractContextManager[None]]


class Turns:
    """The conversation of a side: it hears how many steps, takes them, says what they took."""

    def __init__(self, replies: TextIO, device: torch.device) -> None:
        self.instrument: Instrument = lambda _: nullcontext()
        """Where the parts of a step are, while they are measured."""
        self._timed: PartTimer = untimed
        self._replies = replies
        self._device = device
        self._left = 0
        self._since = 0.0
        self._measuring = ExitStack()
        self._parts = HostParts(device)

    def part(self, name: str, /) -> AbstractContextManager[None]:
        """A `PartTimer` for the steps that are being taken."""
        return self._timed(name)

    def wait(self) -> None:
        """Until there are steps to take."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        asked = json.loads(line)
        self._left = asked["steps"]
        self._parts = HostParts(self._device)
        if asked["measure"] != "nothing":
            self._timed = self._parts.part
            self._measuring.enter_context(self.instrument(self._parts))
        if asked["measure"] == "operators":
            self._measuring.enter_context(Counted(self._parts))
        self._since = self._parts.clock()

    def step_done(self) -> None:
        """At the end of every step; after the last one, answer and wait."""
        self._left -= 1
        if self._left > 0:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = self._parts.clock() - self._since
        self._measuring.close()
        self._timed = untimed
        parts = self._parts.seconds
        answer = {
            "seconds": seconds,
            "parts": {**parts, OTHER: seconds - sum(parts.values())},
            "operators": self._parts.operators,
        }
        print(json.dumps(answer), file=self._replies, flush=True)
        self.wait()


@dataclass(frozen=True)
class Work:
    """What a side is built of."""

    sizes: Sizes
    with_teachers: bool
    device: torch.device

    def model(self, spec: ModelSpec, stage: str, *, published: bool = False) -> nn.Module:
        """With the attention that a job would choose."""
        attention = resolve_attention(
            "auto",
            device=self.device.type,  # type: ignore[arg-type]
            precision="bf16",
            training=stage == "student",
            where="bench",
        )
        make = build_published if published else build
        return make(spec, self.sizes, stage=stage, attention=attention)

    def objective(self) -> Objective:
        """The student with its loss."""
        spec = job(self.sizes)
        return Objective(
            self.model(spec.student.model, "student"),
            vocab_size=self.sizes.vocab_size,
            distillation=spec.distillation if self.with_teachers else None,
        )

    def teachers(self, *, published: bool = False) -> dict[str, nn.Module]:
        """By name."""
        chosen = job(self.sizes).teachers if self.with_teachers else ()
        return {t.name: self.model(t.model, t.name, published=published) for t in chosen}

    def plan(self) -> BatchPlan:
        """Batches for longer than anybody measures."""
        training = job(self.sizes).student.training.model_copy(update={"epochs": 1e6})
        return BatchPlan(
            windows(self.sizes),
            training,
            rank=0,
            num_ranks=1,
            micro_batch=self.sizes.batch_windows,
            device=self.device,
        )


def be_side(side: Mapping[str, Any]) -> None:
    """Build what is asked for, and take steps until nobody asks for more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever others print is no answer
    device = torch.device(side["device"])
    turns = Turns(replies, device)
    work = Work(sizes_of(*side["layers"]), side["teachers"], device)
    if side["name"] == "textbook":
        run_textbook(work, turns)
        return
    if side["name"] == "plain":
        step = plain(work, turns)
    else:
        own, scattered = side["name"] != "ours", side["name"] == "ours, scattered"
        step = ours(work, turns, own=own, scattered=scattered)
    turns.wait()
    for count in itertools.count():
        step(count)
        turns.step_done()


def ours(work: Work, turns: Turns, *, own: bool, scattered: bool) -> Callable[[int], Any]:
    """The stack's own step; `own`: with DeepSpeed's reduction and update as they are."""
    from babyllama_ds.engine import distributed
    from babyllama_ds.engine.inference import FrozenModel
    from babyllama_ds.engine.training import TrainingEngine
    from babyllama_ds.spec.deepspeed import deepspeed_config
    from babyllama_ds.training.step import train_step

    device = distributed.start(work.device.type)  # type: ignore[arg-type]
    work = replace(work, device=device)
    spec, objective, plan = job(work.sizes), work.objective(), work.plan()
    training = spec.student.training
    config = deepspeed_config(spec, training, device=device.type, ranks=1)  # type: ignore[arg-type]
    zero = {**config["zero_optimization"], "reduce_scatter": scattered}
    with patch("babyllama_ds.engine.training.make_lean") if own else nullcontext():
        engine = TrainingEngine(
            objective,
            training=training,
            config={**config, "zero_optimization": zero},
            device=device,
        )
    members = [
        Member(name, FrozenModel(model, device=device, dtype=torch.bfloat16), 1.0)
        for name, model in work.teachers().items()
    ]
    ensemble = Ensemble(members) if members else None

    @contextmanager
    def instrument(parts: Breakdown) -> Iterator[None]:
        backbone: nn.Module = objective.model.base_model  # type: ignore[assignment]
        with (
            parts.of_module(backbone, "student forward"),
            engine.communicating(lambda: parts.part("communication")),
        ):
            yield

    turns.instrument = instrument

    def step(count: int) -> Any:
        with turns.part("data"):
            batch = plan.batch(count)
        return train_step(
            engine, objective, ensemble, batch, rate=3e-4, seed=1, step=count, timed=turns.part
        )

    return step


def plain(work: Work, turns: Turns) -> Callable[[int], Any]:
    """bf16 weights, fp32 master weights, fused AdamW, each a call for all parameters."""
    from babyllama_ds.engine.quirks import skip_looks_at_windows

    if work.device.type == "cpu":
        keep_freed_memory()  # as `distributed.start` does, which does this too
    skip_looks_at_windows()
    objective, plan = work.objective(), work.plan()
    masters = MasterWeights(objective, job(work.sizes).student.training, work.device)
    ensemble = Ensemble(
        [
            Member(name, PlainTeacher(model, work.device), 1.0)  # type: ignore[arg-type]
            for name, model in work.teachers().items()
        ]
    )

    @contextmanager
    def instrument(parts: Breakdown) -> Iterator[None]:
        backbone: nn.Module = objective.model.base_model  # type: ignore[assignment]
        with parts.of_module(backbone, "student forward"):
            yield

    turns.instrument = instrument

    def step(count: int) -> Any:
        with turns.part("data"):
            batch = plan.batch(count)
        counts = objective.counts(batch, num_ranks=1, accumulation_steps=1)
        (micro,) = batch.micro_batches
        with turns.part("teachers"):
            targets = ensemble.targets(micro)
        with turns.part("loss"):
            result = objective(micro, targets, counts)
        with turns.part("backward"):
            result.loss.backward()
        with turns.part("optimizer"):
            masters.update()
        return result.ce_sum

    return step


def run_textbook(work: Work, turns: Turns) -> None:
    """Hugging Face's trainer, until nobody asks for more steps."""
    from textbook import AfterEachStep, DistillationTrainer, Windows, arguments

    class Told(DistillationTrainer):
        """Says which part runs."""

        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **named: Any) -> Any:
            with turns.part("loss"):
                if self.teachers:
                    return super().compute_loss(model, inputs, **named)
                with torch.autocast(work.device.type, torch.bfloat16):
                    return model(**inputs).loss

    spec, source = job(work.sizes), windows(work.sizes)
    tokens_NS = torch.from_numpy(source.windows(0, source.batch(0, 0, source.num_windows)))
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = Told(
            model=work.model(spec.student.model, "student", published=True),
            teachers=list(work.teachers(published=True).values()),
            precision="autocast",
            args=arguments(
                output_dir,
                batch_windows=work.sizes.batch_windows,
                num_ranks=1,
                device=work.device.type,
                precision="autocast",
            ),
            # Beginning an epoch costs the trainer time.
            train_dataset=Windows(tokens_NS.repeat(500, 1)),
        )
        begun = False

        def after_step() -> None:
            nonlocal begun
            if begun:
                turns.step_done()
            else:  # the first step makes the optimizer's state
                begun = True
                turns.wait()

        turns.instrument = lambda parts: _instrumented(trainer, parts)
        trainer.add_callback(AfterEachStep(after_step))
        trainer.train()


@contextmanager
def _instrumented(trainer: Any, parts: Breakdown) -> Iterator[None]:
    def told(owner: Any, method: str, name: str) -> Any:
        run = getattr(owner, method)

        def within(*words: Any, **named: Any) -> Any:
            with parts.part(name):
                return run(*words, **named)

        return patch.object(owner, method, within)

    with ExitStack() as stack:
        stack.enter_context(parts.of_module(trainer.model.base_model, "student forward"))
        for teacher in trainer.teachers:
            stack.enter_context(parts.of_module(teacher, "teachers"))
        stack.enter_context(told(trainer, "get_batch_samples", "data"))
        stack.enter_context(told(trainer.accelerator, "backward", "backward"))
        stack.enter_context(told(trainer.accelerator, "clip_grad_norm_", "optimizer"))
        stack.enter_context(told(trainer.optimizer, "step", "optimizer"))
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What a training step costs the host.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30, help="of a side in a round")
    parser.add_argument(
        "--layers",
        type=int,
        nargs=2,
        default=(16, 24),
        metavar=("STUDENT", "TEACHERS"),
        help="how deep the student and its two teachers are (default: as published)",
    )
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--out", type=Path, help="default: runs/bench/host.json")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
