"""One side of a published workload: requests enter on the input, an answer to each leaves.

Started by `race.py`, with a description on its command line. It imports what it needs, says so, and
touches no device before it is asked to build. A request and its answer are a line of JSON each:

    {"do": "build"}                      models, weights; the answer has the first loss
    {"do": "turns", "micro": …, …}       take steps that way; seconds of a step, peak memory
    {"do": "rate"}                       the machine's bf16 products, now
    {"do": "breakdown"}, {"do": "profile", "step_s": …}      where a step's time goes

Between requests it holds its weights and no spare memory, and the card has nothing to do for it.
The end of its input ends it.

    ours      what a job runs: its engine, ensemble, objective, step and batches, on one rank
    textbook  see textbook.py; training alone, Hugging Face's Trainer as it is
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import tempfile
import traceback
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from inside import Marked, profiled, run, synchronize, timed
from scenario import NUM_BATCHES, build, build_published, windows
from side import attention_of, in_our_order, remembered
from transformers import Trainer
from workloads import Contender, Workload

from babyllama_ds.engine import distributed
from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.engine.matmul_rate import Products, measure_matmul_rates
from babyllama_ds.engine.training import TrainingEngine
from babyllama_ds.losses.heads import Head
from babyllama_ds.spec.deepspeed import deepspeed_config
from babyllama_ds.spec.distillation import scheduled
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.ahead import BatchesAhead
from babyllama_ds.training.batches import BatchPlan
from babyllama_ds.training.breakdown import Breakdown, PartTimer, untimed
from babyllama_ds.training.objective import Objective, Totals
from babyllama_ds.training.out_of_memory import ran_out
from babyllama_ds.training.step import train_step

REPEATED = 2**10
"""Times that the textbook's epoch holds every window."""
LOOKED_AT_STEPS = 4
NOTHING_WRITTEN = Path(tempfile.gettempdir()) / "babyllama-bench"
"""The textbook's trainer must be told where to write."""
REMEMBERED_AT_ONCE = 32
"""Windows at most of a teacher's forward pass for the cache."""


def main() -> None:
    """Answer requests until there are none."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever others print is no answer

    def reply(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=replies, flush=True)

    told = json.loads(sys.argv[1])
    contender = Contender(**{**told, "work": Workload(**told["work"])})
    side = _loaded(contender)
    reply({"here": True})
    for line in sys.stdin:
        request = json.loads(line)
        answer = _answer(side, request.pop("do"), request)
        side.rest()  # before another one is asked for something
        reply(answer)
    os._exit(0)  # nothing is left to agree on


def _loaded(contender: Contender) -> Ours | Textbook:
    """With its libraries imported, before anything is built."""
    if contender.kind == "textbook":
        import textbook  # noqa: F401 - it needs `accelerate`, which ours does not

        return Textbook(contender)
    import deepspeed  # noqa: F401 - which takes seconds

    return Ours(contender)


def _answer(side: Ours | Textbook, asked: str, named: dict[str, Any]) -> dict[str, Any]:
    """What was found, or why not."""
    try:
        found: dict[str, Any] = getattr(side, asked)(**named)
    except Exception as error:
        traceback.print_exc()
        told = (str(error).strip() or type(error).__name__).splitlines()
        return {"error": f"{type(error).__name__}: {told[0]}", "memory": ran_out(error)}
    return {"found": found}


# -- ours -----------------------------------------------------------------------------------------


class Ours:
    """The stack's own step on one rank, under ZeRO-2."""

    def __init__(self, contender: Contender) -> None:
        self._contender, self._work = contender, contender.work
        self._micro: int | None = None
        self._products: Products | None = None
        self._engine: TrainingEngine | None = None
        self._ahead: BatchesAhead | None = None

    def build(self, *, micro: int, attention: str | None) -> dict[str, Any]:
        """Models on the device, and the teachers' engines or what is remembered of them.

        Attention is the job's own choice. What is compiled is so at its first steps.
        """
        assert attention is None, "a job chooses it"
        work = self._work
        device = self._device = distributed.start(distributed.resolve_device("auto"))
        assert device.type == self._contender.device, f"this is {device}"
        with torch.device(device):
            model = build(
                work.model,
                work,
                stage=work.trains,
                attention=attention_of(work.model, device, training=True),
            )
        self._objective = Objective(
            model, vocab_size=work.vocab_size, distillation=work.distillation
        )
        self._ensemble = self._make_ensemble() if work.teachers else None
        self._use(micro)
        first_loss = self._first_loss()
        if self._contender.compiled:
            self._objective.compile_layers()
        return {"first_loss": first_loss, "cache_bytes": self._cache_bytes}

    def turns(
        self, *, micro: int, attention: str | None, warm: int, turns: int, turn_s: float
    ) -> dict[str, Any]:
        """Steps of so many windows a forward pass."""
        assert attention is None, "a job chooses it"
        self._use(micro)
        course = timed(self._device, warm=warm, turns=turns, turn_s=turn_s)
        try:
            return run(course, self._step)
        except RuntimeError:
            self._leave()  # half a step is in the engine
            raise

    def rate(self) -> dict[str, Any]:
        """FLOP/s of this machine's bf16 products, now."""
        if self._products is None:
            work = self._work.work(cached=self._contender.cache, micro=self._micro)
            self._products = work.products
        rates = measure_matmul_rates(self._products, self._device)
        return {"square": rates.square, "same_shapes": rates.same_shapes(self._products)}

    def breakdown(self) -> dict[str, Any]:
        """Seconds of a step's parts: on a card by its own clock, else by the host's."""
        assert self._engine is not None, "it has been built"
        for _ in range(2):
            self._step()
        synchronize(self._device)
        on_card = self._device.type == "cuda"
        parts = Marked(self._device) if on_card else Breakdown(self._device)
        with ExitStack() as stack:
            backbone: torch.nn.Module = self._objective.model.base_model  # type: ignore[assignment]
            stack.enter_context(parts.of_module(backbone, "student forward"))
            stack.enter_context(self._engine.communicating(lambda: parts.part("communication")))
            for _ in range(LOOKED_AT_STEPS):
                self._step(parts.part)
        if isinstance(parts, Marked):
            parts.settle()
        return {name: seconds / LOOKED_AT_STEPS for name, seconds in parts.seconds.items()}

    def profile(self, *, step_s: float) -> dict[str, Any]:
        """The kernels of a step."""
        return profiled(self._step, self._device, steps=LOOKED_AT_STEPS, step_s=step_s)

    def rest(self) -> None:
        """Hold no spare memory."""
        _give_back()

    def _make_ensemble(self) -> Ensemble:
        members: list[Any] = []
        for teacher in self._work.teachers:
            attention = attention_of(teacher.model, self._device, training=False)
            with torch.device(self._device):
                model = build(teacher.model, self._work, stage=teacher.name, attention=attention)
            gains = self._contender.compiled and self._device.type == "cuda"
            frozen = FrozenModel(
                model,
                device=self._device,
                dtype=torch.bfloat16,
                with_compiler=gains and not self._contender.cache,
            )
            member = Member(teacher.name, frozen, teacher.weight)
            if self._contender.cache:
                micro = math.gcd(NUM_BATCHES * self._work.batch_windows, REMEMBERED_AT_ONCE)
                kept = remembered(member, self._work, self._device, micro=micro)
                # A job with a cache holds no more of the teacher than its head.
                head = Head(kept.head.weight_PD.detach().clone())
                members.append(replace(kept, head=head))
                frozen.destroy()
            else:
                members.append(member)
            del model, frozen, member
            _give_back()
        return Ensemble(members)

    @property
    def _cache_bytes(self) -> int:
        """Of the batches measured, which are a few of a corpus's."""
        if not self._contender.cache or self._ensemble is None:
            return 0
        widths = sum(member.head.weight_PD.shape[1] for member in self._ensemble.members)
        return NUM_BATCHES * self._work.tokens * widths * torch.bfloat16.itemsize

    def _use(self, micro: int) -> None:
        """An engine and batches for forward passes of so many windows."""
        if micro == self._micro:
            return
        self._leave()
        work = self._work
        training = work.training.model_copy(update={"micro_batch": micro})
        config = deepspeed_config(work.job, training, device=self._device.type, ranks=1)  # type: ignore[arg-type]
        self._engine = TrainingEngine(
            self._objective, training=training, config=config, device=self._device
        )
        plan = self._plan = BatchPlan(
            windows(work),
            training,
            rank=0,
            num_ranks=1,
            micro_batch=micro,
            device=self._device,
        )
        self._ahead = BatchesAhead(plan.batch, total_steps=plan.total_steps, device=self._device)
        self._number, self._micro = 0, micro

    def _leave(self) -> None:
        self._micro = self._products = None
        if self._ahead is not None:
            self._ahead.close()
        if self._engine is not None:
            self._engine.destroy()
        self._engine = self._ahead = None
        self._objective.zero_grad()
        _give_back()

    def _step(self, timed: PartTimer = untimed) -> None:
        assert self._engine is not None, "it has been built"
        assert self._ahead is not None, "with its batches"
        with timed("data"):
            batch = self._ahead.batch(self._number)
        train_step(
            self._engine,
            self._objective,
            self._ensemble,
            batch,
            rate=self._work.training.learning_rate,
            seed=1,
            step=self._number,
            timed=timed,
        )
        if self._engine.overflowed:
            raise RuntimeError(f"a gradient of step {self._number} is not finite")
        self._number += 1

    def _first_loss(self) -> float:
        """Of the first batch, before any update and without dropout."""
        objective, batch = self._objective, self._plan.batch(0)
        counts = objective.counts(batch, num_ranks=1, accumulation_steps=1)
        ce_sum = kl_sum = 0.0
        objective.eval()
        with torch.no_grad():
            for micro in batch.micro_batches:
                targets = self._ensemble.targets(micro) if self._ensemble else []
                parts = objective(micro, targets, counts)
                ce_sum, kl_sum = ce_sum + parts.ce_sum.item(), kl_sum + parts.kl_sum.item()
        objective.train()
        return float(objective.value(Totals(ce_sum, kl_sum), counts))


# -- the textbook ---------------------------------------------------------------------------------


class Textbook:
    """Hugging Face's trainer; each request for steps is a training of its own."""

    def __init__(self, contender: Contender) -> None:
        self._contender, self._work = contender, contender.work
        self._models: list[Any] = []

    def build(self, *, micro: int, attention: str | None) -> dict[str, Any]:
        """Models in fp32 on the device."""
        work = self._work
        if self._contender.device == "cpu":
            torch.set_num_threads(self._contender.threads)
        described = {work.trains: work.model, **{t.name: t.model for t in work.teachers}}
        with torch.device(self._contender.device):
            self._models = [
                build_published(model, work, stage=stage, attention=attention or "sdpa")
                for stage, model in described.items()
            ]
        for teacher in self._models[1:]:
            teacher.requires_grad_(False)
        self._windows_NS = in_our_order(work)
        return {"first_loss": self._first_loss(micro), "cache_bytes": 0}

    def turns(
        self, *, micro: int, attention: str | None, warm: int, turns: int, turn_s: float
    ) -> dict[str, Any]:
        """Steps of so many windows a forward pass, with that attention in all models."""
        from textbook import AfterEachStep

        for model in self._models:
            model.set_attn_implementation(attention)
        trainer = self._trainer(micro)
        course = timed(trainer.args.device, warm=warm, turns=turns, turn_s=turn_s)
        measured: dict[str, Any] = {}

        def one_more() -> bool:
            """Whether the course has ended."""
            try:
                next(course)
            except StopIteration as end:
                measured.update(end.value)
            return bool(measured)

        trainer.add_callback(AfterEachStep(one_more))
        one_more()
        trainer.train()
        return measured

    def rest(self) -> None:
        """Hold no spare memory; the trainer and its optimizer are gone."""
        for model in self._models:
            model.zero_grad(set_to_none=True)
        _give_back()

    def _trainer(self, micro: int) -> Any:
        from textbook import DistillationTrainer, Windows, arguments

        contender, work = self._contender, self._work
        student, *teachers = self._models
        more: dict[str, Any] = {"logging_nan_inf_filter": not contender.at_its_best}
        if contender.compiled:
            more |= {"torch_compile": True}
        if contender.device == "cuda" and (contender.tf32 or contender.compiled):
            # Asked to compile, the trainer switches TF32 on by itself.
            more |= {"tf32": contender.tf32}
        if not work.distilled:
            more |= {"bf16": True}
        args = arguments(
            str(NOTHING_WRITTEN),
            batch_windows=work.batch_windows,
            num_ranks=1,
            device=contender.device,
            precision=contender.precision,  # type: ignore[arg-type]
            micro_batch=micro,
            learning_rate=work.training.learning_rate,
            **more,
        )
        data = Windows(self._windows_NS, times=REPEATED)
        if work.distillation is None:
            trainer = Trainer(model=student, args=args, train_dataset=data)
            trainer.model_accepts_loss_kwargs = False
            return trainer
        return DistillationTrainer(
            model=student,
            teachers=teachers,
            precision=contender.precision,
            alpha=scheduled(work.distillation.alpha, 0.0),
            temperature=scheduled(work.distillation.temperature, 0.0),
            args=args,
            train_dataset=data,
        )

    def _first_loss(self, micro: int) -> float:
        """Of our side's first batch, before any update and without dropout, in pieces."""
        trainer = self._trainer(micro)
        pieces = self._windows_NS[: self._work.batch_windows].split(micro)  # type: ignore[no-untyped-call]
        for model in self._models:
            model.eval()
        losses = []
        with torch.no_grad():
            for piece in pieces:
                ids_BS = piece.to(trainer.args.device)
                inputs = {"input_ids": ids_BS, "labels": ids_BS}
                losses.append(float(trainer.compute_loss(trainer.model, inputs)))
        return sum(losses) / len(losses)


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
