"""The planner: a job, rank counts and a machine enter; a `Plan` leaves.

    plan_corpus → plan_stages → for each stage and rank count: rank_memory, seconds → disk

    basis        what is the same for all rank counts: machine, corpus, work, precision
    shapes       what decides a stage's memory on so many ranks
    tiers        where it reads the teacher caches from
    speed        how long it takes
    assumptions  what all that rests on
    planned      the question, and the plan that answers it

Nothing is written, no weight allocated and nothing downloaded but the configuration of a model
that the job names by a hub id.
"""

from __future__ import annotations

from babyllama_ds.errors import JobError
from babyllama_ds.models.splitting import check_groups
from babyllama_ds.plan.activations import is_estimated
from babyllama_ds.plan.assumptions import assumptions
from babyllama_ds.plan.basis import Basis
from babyllama_ds.plan.disk import disk_items
from babyllama_ds.plan.memory import rank_memory
from babyllama_ds.plan.planned import Plan, Question, RankCount
from babyllama_ds.plan.shapes import stage_shape
from babyllama_ds.plan.speed import seconds
from babyllama_ds.plan.tiers import cached_by_tier
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.teachers.cache.check import check_top_k


def plan_job(job: JobSpec, question: Question) -> Plan:
    """Plan `job`.

    Raises:
        JobError: an unknown card, a wrong DeepSpeed configuration, more tokens to be cached than
            the vocabulary has, a job that none of the rank counts can cut.
        DataError, ModelError, MachineError: what the job needs and is not there.
    """
    basis = Basis(job, question)
    machine, work = basis.machine, basis.work
    basis.check_configurations()
    check_top_k(job.distillation, basis.corpus.vocab_size)
    counts = [_count(basis, ranks) for ranks in question.ranks]
    if all(count.impossible for count in counts):
        raise JobError.of(
            "--ranks",
            got=", ".join(str(count.ranks) for count in counts),
            expected="at least one number of ranks that the job can be cut for",
            hint="; ".join(f"{count.ranks}: {count.impossible}" for count in counts),
        )
    return Plan(
        job=job,
        question=question,
        machine=machine,
        precision=basis.precision,
        corpus=basis.corpus,
        work=work,
        counts=counts,
        disk=disk_items(job, basis.corpus, work, element_bytes=basis.element_bytes),
        measured=basis.measured,
        assumptions=assumptions(basis, counts),
    )


def _count(basis: Basis, ranks: int) -> RankCount:
    try:
        for teacher in basis.work.teachers:
            check_groups(teacher.parts, ranks, where=f"teachers.{teacher.name}.tensor_parallel")
        shapes = {stage.name: stage_shape(basis, stage, ranks) for stage in basis.work.stages}
        estimated = [n for n, shape in shapes.items() if is_estimated(shape.model, shape.micro)]
    except JobError as error:
        problem = error.problems[0]
        reason = f"{problem.where}: {problem.got}, expected {problem.expected}"
        return RankCount(
            ranks=ranks,
            impossible=reason,
            memory={},
            micro_batches={},
            estimated=(),
            cached={},
            seconds=None,
        )
    return RankCount(
        ranks=ranks,
        impossible=None,
        memory={name: rank_memory(shape) for name, shape in shapes.items()},
        micro_batches={name: shape.micro.windows for name, shape in shapes.items()},
        estimated=estimated,
        cached=cached_by_tier(basis, ranks),
        seconds=seconds(basis, ranks),
    )
