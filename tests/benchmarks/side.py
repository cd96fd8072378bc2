"""One rank of one side: a description on the command line enters, times of its steps leave.

Started by `bench.py`. It builds its models, answers `ready`, and then takes so many optimizer
steps for each line `{"steps": n}` on its input and answers with the seconds they took. Between
rounds it sleeps, so that the sides can take turns on the same cores. The end of its input ends it.

    ours      the stack's own pieces: engine, ensemble, objective, step and batches
    plain     the same computation in one process without DeepSpeed
    textbook  see textbook.py
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import torch
from scenario import Shape, Sizes, build, build_published, job, windows
from torch import Tensor, nn

from babyllama_ds import ranks
from babyllama_ds.memory import keep_freed_memory
from babyllama_ds.models.attention import resolve_attention
from babyllama_ds.models.documents import Pieces
from babyllama_ds.models.parts import split_causal_lm
from babyllama_ds.models.sizes import attention_dropout
from babyllama_ds.spec.job import JobSpec, TeacherSpec
from babyllama_ds.spec.models import ModelSpec
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.teachers.cache.hidden import RememberedMember
from babyllama_ds.teachers.cache.layout import Layout, padded_bytes
from babyllama_ds.teachers.cache.records import MemoryRecords
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import BatchPlan
from babyllama_ds.training.objective import Objective


@dataclass(frozen=True)
class Built:
    """A side that is ready to train."""

    device: torch.device
    step: Callable[[int], Tensor | float]
    """Takes the optimizer step of this number; the first one's result is its loss."""
    questions: Mapping[str, Callable[[], Any]]
    """What else can be asked, by name."""


class Rounds:
    """The conversation with `bench.py`: it says how many steps, we say how long they took."""

    def __init__(
        self, replies: TextIO, device: torch.device, questions: Mapping[str, Callable[[], Any]]
    ) -> None:
        self._replies = replies
        self._device = device
        self._questions = questions
        self._left = 0
        self._since = 0.0

    def ready(self, **facts: Any) -> None:
        """Say that everything is built, and wait for the first round."""
        self._reply(facts)
        self._wait()

    def step_done(self) -> None:
        """At the end of every step; after a round's last one, report and wait."""
        self._left -= 1
        if self._left == 0:
            self._synchronize()
            self._reply({"seconds": time.perf_counter() - self._since})
            self._wait()

    def _wait(self) -> None:
        while True:
            line = sys.stdin.readline()
            if not line:
                os._exit(0)  # the other ranks end too: nothing is left to agree on
            asked = json.loads(line)
            if "steps" in asked:
                break
            self._reply(self._questions[asked["ask"]]())
        self._left = asked["steps"]
        self._since = time.perf_counter()

    def _reply(self, facts: Any) -> None:
        print(json.dumps(facts), file=self._replies, flush=True)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def main() -> None:
    """Be the rank that the command line describes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever others print is no reply
    side = json.loads(sys.argv[1])
    sizes = Sizes.from_json(side["sizes"])
    if side["kind"] == "textbook":
        run_textbook(side, sizes, replies)
    else:
        built = {"ours": ours, "plain": plain}[side["kind"]](side, sizes)
        rounds = Rounds(replies, built.device, built.questions)
        rounds.ready(first_loss=float(built.step(0)))
        for number in itertools.count(1):
            built.step(number)
            rounds.step_done()


# -- ours -----------------------------------------------------------------------------------------


def ours(side: dict[str, Any], sizes: Sizes) -> Built:
    """The stack's own step on this rank, under ZeRO-2."""
    from babyllama_ds.engine import distributed
    from babyllama_ds.engine.inference import FrozenModel
    from babyllama_ds.engine.matmul_rate import measure_matmul_rates, step_products
    from babyllama_ds.engine.training import TrainingEngine
    from babyllama_ds.spec.deepspeed import deepspeed_config
    from babyllama_ds.training.step import train_step

    device = distributed.start(distributed.resolve_device("auto"))
    spec = job(sizes)
    teachers = [_teacher(teacher, sizes, device) for teacher in spec.teachers]
    objective, plan = _objective(spec, sizes, device), _plan(sizes, device)
    products = step_products(objective, teachers, tokens=sizes.tokens // ranks.world_size())
    training = spec.student.training
    config = deepspeed_config(
        spec,
        training,
        device=device.type,  # type: ignore[arg-type]
        ranks=ranks.world_size(),
    )
    compiled = side["compiled"]
    engine = TrainingEngine(objective, training=training, config=config, device=device)
    if compiled != "none":
        objective.compile_layers()
    frozen = [
        FrozenModel(model, device=device, dtype=torch.bfloat16, with_compiler=compiled == "all")
        for model in teachers
    ]
    live = [Member(t.name, model, t.weight) for t, model in zip(spec.teachers, frozen, strict=True)]
    ensemble = Ensemble(live)
    if side["cache"]:
        micro = sizes.batch_windows // ranks.world_size()
        ensemble = Ensemble([remembered(member, sizes, device, micro=micro) for member in live])

    def rate() -> dict[str, float]:
        rates = measure_matmul_rates(products, device)
        return {"square": rates.square, "same_shapes": rates.same_shapes(products)}

    def step(number: int) -> Tensor | float:
        sums = train_step(
            engine, objective, ensemble, plan.batch(number), rate=3e-4, seed=1, step=number
        )
        if number > 0:
            return sums.ce_sum
        return objective.value(sums.over_all_ranks(), sums.counts)

    return Built(device, step, {"rate": rate})


def _objective(spec: JobSpec, sizes: Sizes, device: torch.device) -> Objective:
    model = build(
        spec.student.model,
        sizes,
        stage="student",
        attention=attention_of(spec.student.model, device, training=True),
    )
    return Objective(model, vocab_size=sizes.vocab_size, distillation=spec.distillation)


def _teacher(teacher: TeacherSpec, sizes: Sizes, device: torch.device) -> nn.Module:
    attention = attention_of(teacher.model, device, training=False)
    return build(teacher.model, sizes, stage=teacher.name, attention=attention)


def remembered(
    member: Member, sizes: Shape, device: torch.device, *, micro: int
) -> RememberedMember:
    """The same teacher with the states of every window kept in the device's memory.

    They are computed `micro` windows at a time.
    """
    source = windows(sizes)
    width = member.head.weight_PD.shape[1]
    layout = Layout.choose(
        num_windows=source.num_windows,
        record_bytes=padded_bytes(sizes.length * width * 2),
        forward_windows=micro,
    )
    records = MemoryRecords(layout, place=device, device=device)
    for start in range(0, source.num_windows, micro):
        numbers = np.arange(start, start + micro)
        input_ids_BS = torch.from_numpy(source.numbered(numbers)).to(device)
        states_BSD = member.model.hidden_states(input_ids_BS)
        records.put(start, states_BSD.flatten(1).view(torch.uint8))
    return RememberedMember(
        name=member.name, weight=member.weight, head=member.head, records=records
    )


def attention_of(model: ModelSpec, device: torch.device, *, training: bool) -> str:
    """The kernel that a job takes by itself."""
    return resolve_attention(
        model.attention,
        device=device.type,  # type: ignore[arg-type]
        precision="bf16",
        training=training,
        where="bench",
        dropout=attention_dropout(model, where="bench"),
    )


def _plan(sizes: Sizes, device: torch.device) -> BatchPlan:
    """Batches for longer than anybody measures."""
    training = job(sizes).student.training.model_copy(update={"epochs": 1e6})
    return BatchPlan(
        windows(sizes),
        training,
        rank=ranks.rank(),
        num_ranks=ranks.world_size(),
        micro_batch=sizes.batch_windows // ranks.world_size(),
        device=device,
    )


# -- plain ----------------------------------------------------------------------------------------


class PlainTeacher:
    """A frozen bf16 model without an engine around it."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = _in_bf16(model.eval().requires_grad_(False)).to(device)

    @property
    def head(self) -> Any:
        return split_causal_lm(self._model)[1]

    @torch.inference_mode()
    def hidden_states(self, input_ids_BS: Tensor, pieces: Pieces | None = None) -> Tensor:
        return split_causal_lm(self._model)[0](input_ids_BS, pieces)

    def hidden_states_and_layers(
        self, input_ids_BS: Tensor, pieces: Pieces | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        return self.hidden_states(input_ids_BS, pieces), {}


class MasterWeights:
    """fp32 copies of a module's weights, which it has in bf16, under fused AdamW.

    The gradients of all are copied, clipped, and their updates copied back, each in one call.
    """

    def __init__(self, module: nn.Module, training: TrainingSpec, device: torch.device) -> None:
        from babyllama_ds.engine.training import adamw

        masters = copy.deepcopy(module).to(device)
        self._module = _in_bf16(module).to(device).train()
        self._optimizer = adamw(masters, training)
        self._weights: list[Tensor] = list(module.parameters())
        self._masters: list[Tensor] = list(masters.parameters())
        self._gradients = [torch.zeros_like(master) for master in self._masters]
        for master, gradient in zip(self._masters, self._gradients, strict=True):
            master.grad = gradient

    @torch.no_grad()
    def update(self) -> None:
        """A step of the optimizer, after a backward pass."""
        torch._foreach_copy_(self._gradients, [weight.grad for weight in self._weights])  # type: ignore[misc]
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        torch._foreach_copy_(self._weights, self._masters)
        self._module.zero_grad()


def plain(side: dict[str, Any], sizes: Sizes) -> Built:
    """The same computation in one process: bf16 weights, fp32 master weights, fused AdamW."""
    device = torch.device(side["device"])
    if device.type == "cpu":
        keep_freed_memory()  # as `distributed.start` does
    spec = job(sizes)
    objective, plan = _objective(spec, sizes, device), _plan(sizes, device)
    masters = MasterWeights(objective, spec.student.training, device)
    ensemble = Ensemble(
        [
            Member(
                t.name,
                PlainTeacher(_teacher(t, sizes, device), device),  # type: ignore[arg-type]
                t.weight,
            )
            for t in spec.teachers
        ]
    )

    def step(number: int) -> Tensor | float:
        batch = plan.batch(number)
        counts = objective.counts(batch, num_ranks=1, accumulation_steps=1)
        (micro,) = batch.micro_batches
        parts = objective(micro, ensemble.targets(micro), counts)
        parts.loss.backward()
        masters.update()
        return parts.loss.detach()

    return Built(device, step, {})


def _in_bf16(model: nn.Module) -> nn.Module:
    """Parameters in bf16; buffers stay (rotary frequencies lose positions in bf16)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


# -- the textbook ---------------------------------------------------------------------------------


def run_textbook(side: dict[str, Any], sizes: Sizes, replies: TextIO) -> None:
    """Train until the input ends, waiting for `bench.py` at the end of steps."""
    from textbook import AfterEachStep, DistillationTrainer, Windows, arguments

    device, num_ranks = side["device"], side["ranks"]
    if device == "cpu":
        torch.set_num_threads(side["threads"])
    attention = side["attention"]
    spec = job(sizes)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = DistillationTrainer(
            model=build_published(spec.student.model, sizes, stage="student", attention=attention),
            teachers=[
                build_published(t.model, sizes, stage=t.name, attention=attention).requires_grad_(
                    False
                )
                for t in spec.teachers
            ],
            precision=side["precision"],
            args=arguments(
                output_dir,
                batch_windows=sizes.batch_windows,
                num_ranks=num_ranks,
                device=device,
                precision=side["precision"],
            ),
            train_dataset=Windows(in_our_order(sizes)),
        )
        rounds = Rounds(replies, trainer.args.device, {})
        trainer.add_callback(AfterEachStep(rounds.step_done))
        rounds.ready(first_loss=_first_loss(trainer, sizes))
        trainer.train()


def in_our_order(sizes: Shape) -> Tensor:
    """All windows, in the order in which the stack's own side visits them."""
    source = windows(sizes)
    ids = source.batch(0, 0, source.num_windows)
    return torch.from_numpy(source.windows(0, ids))


def _first_loss(trainer: Any, sizes: Sizes) -> float:
    """The loss of the batch that our side begins with, before any update."""
    ids_BS = in_our_order(sizes)[: sizes.batch_windows].to(trainer.args.device)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, {"input_ids": ids_BS, "labels": ids_BS})
    return float(loss)


if __name__ == "__main__":
    main()
