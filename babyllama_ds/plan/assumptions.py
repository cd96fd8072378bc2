"""What a plan takes for granted, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from babyllama_ds.plan.basis import Basis
from babyllama_ds.plan.planned import RankCount
from babyllama_ds.plan.speed import assumed_speed


def assumptions(basis: Basis, counts: Sequence[RankCount]) -> list[str]:
    """The assumptions of the plan that found `counts`."""
    found = [f"tokens: {basis.corpus.assumption}"]
    if basis.corpus.dev_tokens is None:
        found.append("evaluations during training: left out, the development text is not known")
    if basis.measured is not None:
        found += ["minimal pairs: left out of FLOPs", *basis.measured.notes]
    else:
        found += ["minimal pairs: left out of FLOPs and time", assumed_speed(basis)]
    if basis.job.evaluation.fine_tuning:
        found.append("fine-tuning: left out of FLOPs, time and memory, of a --within too")
    found += _early_ends(basis)
    possible = [count for count in counts if count.impossible is None]
    found += _settled_micro_batches(basis, possible)
    found += _settled_tiers(basis, possible)
    found += _estimated(basis, possible)
    if basis.measured is None:
        found.append("ranks: N times as fast as one; communication, checkpoints and start left out")
    return found


def _early_ends(basis: Basis) -> list[str]:
    """Limits that nobody knows before."""
    return [
        f"{stage.name}: all {stage.steps:,} steps; {limit} may end it earlier"
        for stage in basis.work.stages
        for limit in ("early_stopping", "max_minutes")
        if getattr(stage.training, limit) is not None
    ]


def _settled_micro_batches(basis: Basis, counts: Sequence[RankCount]) -> list[str]:
    """What `micro_batch: auto` was taken to be."""
    unnamed = basis.machine.memory_bytes is None
    how = "the rank's whole share: no machine was named" if unnamed else "the most that fit"
    return [
        f"micro-batch of {stage.name}: auto, {how}: "
        + _by_ranks((count.ranks, str(count.micro_batches[stage.name])) for count in counts)
        for stage in basis.work.stages
        if stage.training.micro_batch == "auto"
    ]


def _settled_tiers(basis: Basis, counts: Sequence[RankCount]) -> list[str]:
    """Where a cache of tier `auto` was taken to be read from."""
    if basis.job.distillation.cache == "none" or basis.job.distillation.cache_tier != "auto":
        return []
    tiers = _by_ranks((count.ranks, " and ".join(count.cached)) for count in counts)
    return [
        f"teacher cache: tier auto, the first that fits: {tiers}; enough room on the disk"
        + (" and in the host's memory" if basis.machine.device == "cuda" else "")
    ]


def _estimated(basis: Basis, counts: Sequence[RankCount]) -> list[str]:
    """What is counted as something else is."""
    names = {name for count in counts for name in count.estimated}
    found = [
        f"memory of {stage.name}: activations of {stage.sizes.family} counted as those of a "
        "LLaMA of its widths, and may be more: it could not be run on shapes"
        for stage in basis.work.stages
        if stage.name in names
    ]
    frozen = {teacher.name for teacher in basis.work.teachers if teacher.sizes.config}
    if frozen:
        found.append(
            f"memory of {', '.join(sorted(frozen))}, teachers of other families: while they "
            "compute, a layer's work is counted as that of a LLaMA of their widths"
        )
    return found


def _by_ranks(settled: Iterable[tuple[int, str]]) -> str:
    """`64 (ranks 1 2), 32 (ranks 4)`; `64` alone where all rank counts have it."""
    ranks_of: dict[str, list[str]] = {}
    for ranks, what in settled:
        ranks_of.setdefault(what, []).append(str(ranks))
    if len(ranks_of) == 1:
        return next(iter(ranks_of))
    return ", ".join(f"{what} (ranks {' '.join(ranks)})" for what, ranks in ranks_of.items())
