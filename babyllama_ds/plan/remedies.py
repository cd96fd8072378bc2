"""Remedies: a plan that does not fit enters; what would, each planned anew, leaves in an error.

A change is suggested only after the changed job was planned and found to fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from babyllama_ds.errors import JobError, MachineError, ModelError, UserError
from babyllama_ds.models.splitting import check_split
from babyllama_ds.plan.planned import Plan, Question, RankCount
from babyllama_ds.plan.planner import plan_job
from babyllama_ds.plan.stages import PlannedTeacher
from babyllama_ds.plan.text import gibibytes
from babyllama_ds.spec.base import divisors
from babyllama_ds.spec.job import JobSpec

Reload = Callable[[Sequence[str]], JobSpec]
"""The same job with more `KEY=VALUE` overrides, validated like any."""

MOST_RANKS = 64
MOST_PHASES = 4
"""Phases of the windows that are suggested: a cache grows with them."""


def check_fits(plan: Plan, reload: Reload) -> None:
    """A job that fits on one of the rank counts asked for, or where no machine was named.

    Raises:
        MachineError: it fits on none; every stage that does not, and what would help.
    """
    if any(plan.fits(count) for count in plan.counts):
        return
    count = [count for count in plan.counts if count.impossible is None][-1]
    usable = plan.usable_bytes(count.ranks)
    assert usable is not None, "without a machine everything fits"
    peaks = ", ".join(
        f"{name} {gibibytes(count.memory[name].peak_bytes)}" for name in plan.too_large(count)
    )
    raise MachineError.of(
        f"{plan.job.run_name} on {_ranks(count.ranks)} of {plan.machine.name}",
        got=f"peaks of {peaks} for each rank",
        expected=f"at most {gibibytes(usable)}, what tensors may use",
        hint="\n          ".join(remedies(plan, count, reload)),
    )


def remedies(plan: Plan, count: RankCount, reload: Reload) -> list[str]:
    """Lines of advice for a job that does not fit on `count.ranks`; at least one."""
    found = list(_changes(plan, count, reload))
    more = _more_ranks(plan, count)
    if more is not None:
        found.append(more)
    if found:
        return ["each of these was planned anew and fits:", *found]
    return ["no change of the job's own settings was found to fit: take a larger card"]


# -- what the job can change ---------------------------------------------------------------------


def _changes(plan: Plan, count: RankCount, reload: Reload) -> Iterator[str]:
    """Overrides under which every stage fits, the least intrusive first."""
    smaller = _smaller_micro_batches(plan, count, reload)
    if smaller is not None:
        yield f"{' '.join(smaller)}  (smaller micro-batches, more accumulation: the same result)"
    if any(stage.spec.attention == "eager" for stage in plan.work.stages):
        overrides = [
            f"{plan.job.model_key(stage.name)}.attention=sdpa" for stage in plan.work.stages
        ]
        if _fits_with(plan, count, reload, overrides):
            yield f"{' '.join(overrides)}  (no S × S probabilities are kept)"
    recomputed = [
        f"{key}.gradient_checkpointing=true"
        for key in dict.fromkeys(plan.job.training_key(name) for name in plan.too_large(count))
    ]
    if _fits_with(plan, count, reload, recomputed):
        yield f"{' '.join(recomputed)}  (layers are computed twice: the same result, slower)"
    elif smaller is None:
        both = [*recomputed, *_least_micro_batches(plan, count)]
        if _fits_with(plan, count, reload, both):
            yield " ".join(both)
    offloaded = ["deepspeed.config=zero2_offload"]
    if _could_offload(plan) and _fits_with(plan, count, reload, offloaded):
        yield f"{' '.join(offloaded)}  (masters and moments in the host's memory; slower)"
    split = next((s for s in _splits(plan, count) if _fits_with(plan, count, reload, s)), None)
    if split is not None:
        yield f"{' '.join(split)}  (teachers split over ranks, which run them together)"
    for cache in _caches(plan):
        if _fits_with(plan, count, reload, cache):
            yield f"{' '.join(cache)}  (teachers leave the card before the student trains)"
        elif smaller is None:
            both = [*cache, *_least_micro_batches(plan, count)]
            if _fits_with(plan, count, reload, both):
                yield " ".join(both)


def _smaller_micro_batches(plan: Plan, count: RankCount, reload: Reload) -> list[str] | None:
    """The largest micro-batch that fits, for every stage that does not; none: not one does."""
    chosen: dict[str, str] = {}
    for name in plan.too_large(count):
        key, share = plan.job.training_key(name), count.micro_batches[name]
        for micro in reversed(divisors(share)[:-1]):
            planned = _planned_with(plan, count, reload, [f"{key}.micro_batch={micro}"])
            if planned is not None and name not in planned.too_large(planned.counts[0]):
                chosen[key] = f"{key}.micro_batch={micro}"
                break
        else:
            return None
    overrides = list(chosen.values())
    return overrides if _fits_with(plan, count, reload, overrides) else None


def _least_micro_batches(plan: Plan, count: RankCount) -> list[str]:
    keys = dict.fromkeys(plan.job.training_key(name) for name in plan.too_large(count))
    return [f"{key}.micro_batch=1" for key in keys]


def _could_offload(plan: Plan) -> bool:
    """Whether it is the machinery alone that the other configuration changes."""
    own = plan.job.deepspeed.config != "auto" or plan.precision != "bf16"
    return plan.machine.device == "cuda" and not own


def _splits(plan: Plan, count: RankCount) -> Iterator[list[str]]:
    """Overrides that split the teachers that can be, over as few ranks as possible first."""
    for parts in divisors(count.ranks)[1:]:
        teachers = [one for one in plan.work.teachers if one.parts < parts and _can(one, parts)]
        overrides = [f"teachers.{one.name}.tensor_parallel={parts}" for one in teachers]
        if overrides and plan.job.student.training.micro_batch == "auto":
            # Which a job with split teachers must say.
            windows = count.micro_batches["student"]
            overrides.append(f"student.training.micro_batch={windows}")
        if overrides:
            yield overrides


def _can(teacher: PlannedTeacher, parts: int) -> bool:
    try:
        check_split(teacher.sizes, parts, where=teacher.name)
    except ModelError:
        return False
    return True


def _caches(plan: Plan) -> Iterator[list[str]]:
    """Overrides that take the teachers off the device while the student trains."""
    loss, windows = plan.job.distillation, plan.job.windows
    if loss.cache != "none" or "student" not in {stage.name for stage in plan.work.stages}:
        return
    repeat = []
    if windows.num_phases is None:
        phases = min(MOST_PHASES, math.ceil(plan.job.student.training.epochs))
        repeat = [f"windows.offsets={{phases: {phases}}}"]
    for kind in ("hidden", "topk"):
        yield [f"distillation.cache={kind}", "distillation.cache_tier=disk", *repeat]


def _more_ranks(plan: Plan, count: RankCount) -> str | None:
    """The next power of two of ranks on which it fits, as it is."""
    if plan.machine.device == "cpu":  # they would share the same memory
        return None
    ranks = 2 * count.ranks
    while ranks <= MOST_RANKS:
        try:
            planned = plan_job(plan.job, _for_ranks(plan.question, plan, ranks))
        except JobError:
            return None
        if planned.fits(planned.counts[0]):
            peak = max(memory.peak_bytes for memory in planned.counts[0].memory.values())
            return f"--ranks {ranks}  ({gibibytes(peak)} a rank)"
        ranks *= 2
    return None


def _fits_with(plan: Plan, count: RankCount, reload: Reload, overrides: Sequence[str]) -> bool:
    planned = _planned_with(plan, count, reload, overrides)
    return planned is not None and planned.fits(planned.counts[0])


def _planned_with(
    plan: Plan, count: RankCount, reload: Reload, overrides: Sequence[str]
) -> Plan | None:
    """The changed job's plan; none: the change is refused."""
    try:
        return plan_job(reload(overrides), _for_ranks(plan.question, plan, count.ranks))
    except UserError:
        return None


def _for_ranks(question: Question, plan: Plan, ranks: int) -> Question:
    """The same question for one rank count; the corpus is not looked for again."""
    return replace(question, ranks=(ranks,), tokens=plan.corpus.train_tokens)


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
