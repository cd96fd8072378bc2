"""The one dict that DeepSpeed gets: a JSON file for the machinery, the job for the numbers.

Enters: the job, one stage's training, the device, the number of ranks, and the JSON file that
`deepspeed.config` names (`deepspeed_file`). Leaves: a dict for `deepspeed.initialize`, or a
`JobError`. Next: `engine`, which adds its own optimizer and schedule (they are not in the dict).

One owner per number: ZeRO, precision and communication live in the JSON, everything that changes
the experiment in the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from babyllama_ds.errors import JobError
from babyllama_ds.spec.base import divisors
from babyllama_ds.spec.deepspeed_file import Device, check_config, read_config
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.training import TrainingSpec

Precision = Literal["bf16", "fp32"]


def deepspeed_config(
    job: JobSpec,
    training: TrainingSpec,
    *,
    device: Device,
    ranks: int,
    base: Mapping[str, Any] | None = None,
    where: str = "student.training",
) -> dict[str, Any]:
    """The complete DeepSpeed configuration of one training stage.

    `base` is the machinery, if already read (`read_config`); `where` is the key path of
    `training` in the job, for errors. Raises `JobError`.
    """
    config = read_config(job.deepspeed, device) if base is None else check_config(base)
    accumulation = accumulation_steps(training, ranks, where=where)
    numbers: dict[str, Any] = {
        "train_batch_size": training.batch_windows,
        "train_micro_batch_size_per_gpu": micro_batch(training, ranks, where=where),
        "gradient_accumulation_steps": accumulation,
        # Without the key DeepSpeed clips at 1.0; 0.0 is its "off".
        "gradient_clipping": training.clip_norm or 0.0,
    }
    # `steps_per_print` is left out, which means never: the training loop reports.
    quiet: dict[str, Any] = {
        "wall_clock_breakdown": False,
        # Its samples per second would only be printed, for a device sync in every micro-step.
        "timers": {"throughput": {"enabled": False}},
    }
    return {**quiet, **config, **numbers, **_for_offloading(config, training, where=where)}


def offloads(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer is in the host's memory."""
    return config["zero_optimization"].get("offload_optimizer") is not None


def _for_offloading(
    config: Mapping[str, Any], training: TrainingSpec, *, where: str
) -> dict[str, Any]:
    """What DeepSpeed must be told beside. Raises `JobError`."""
    if not offloads(config):
        return {}
    if training.muon is not None:
        raise JobError.of(
            f"{where}.muon",
            got="Muon with an optimizer that is offloaded",
            expected="none, or a DeepSpeed configuration without offload_optimizer",
            hint="products of whole matrices on the host would take longer than the step",
        )
    # Its own AdamW for hosts must be compiled at the first start; torch's is there.
    return {"zero_force_ds_cpu_optimizer": False}


def precision(config: Mapping[str, Any]) -> Precision:
    """What parameters are in: bf16 (with fp32 master weights), or fp32 throughout."""
    return "bf16" if config.get("bf16", {}).get("enabled", False) else "fp32"


def micro_batch(training: TrainingSpec, ranks: int, *, where: str = "student.training") -> int:
    """Windows in one forward pass of one rank. Raises `JobError` as `accumulation_steps` does.

    Of `auto` it is the most that can come out: the rank's whole share.
    """
    accumulation = accumulation_steps(training, ranks, where=where)
    return training.batch_windows // (ranks * accumulation)


def accumulation_steps(
    training: TrainingSpec, ranks: int, *, where: str = "student.training"
) -> int:
    """Micro-batches in one optimizer step of one rank; where `auto` is not settled yet, one.

    Raises `JobError` where ranks × micro_batch do not divide batch_windows.
    """
    batch, micro = training.batch_windows, training.micro_batch
    if batch % ranks:
        raise JobError.of(
            f"{where}.batch_windows",
            got=f"{batch} windows for {ranks} ranks",
            expected=f"a multiple of {ranks}",
            hint=f"{_multiples_around(batch, ranks)} would do; the batch is that of all ranks",
        )
    share = batch // ranks
    if micro is None or micro == "auto":
        return 1
    if share % micro:
        fitting = " or ".join(str(n) for n in _divisors_around(share, micro))
        raise JobError.of(
            f"{where}.batch_windows",
            got=f"{batch} windows for {ranks} ranks with micro_batch {micro}",
            expected=f"a multiple of {ranks} × {micro} = {ranks * micro}",
            hint=f"batch_windows {_multiples_around(batch, ranks * micro)} would do, "
            f"or micro_batch {fitting}",
        )
    return share // micro


def _multiples_around(number: int, unit: int) -> str:
    lower = number // unit * unit
    return f"{lower} or {lower + unit}" if lower else str(unit)


def _divisors_around(number: int, near: int) -> list[int]:
    fitting = divisors(number)
    below, above = [n for n in fitting if n < near], [n for n in fitting if n > near]
    return below[-1:] + above[:1]
