"""The JSON file of DeepSpeed's machinery: what it may hold, checked and reported by line.

Enters: the file that `deepspeed.config` names. Leaves: what stands in it, as it stands there, or a
`JobError` with every key that may not. Next: `deepspeed`, which adds the job's numbers.

DeepSpeed ignores a misspelt top-level key; here a key that is owned by the job, unknown, or
without effect in this stack is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from babyllama_ds.errors import JobError
from babyllama_ds.spec.base import Mismatch, MismatchError, Spec
from babyllama_ds.spec.deepspeed_refused import NO_FP16, REFUSED
from babyllama_ds.spec.document import Document, Place, read_document
from babyllama_ds.spec.explain import explain
from babyllama_ds.spec.job import DeepSpeedSpec
from babyllama_ds.spec.loading import read_text
from babyllama_ds.spec.shipped import find_file

Device = Literal["cpu", "cuda"]


def read_config(spec: DeepSpeedSpec, device: Device) -> dict[str, Any]:
    """The JSON file that `deepspeed.config` names, checked. Raises `JobError`."""
    name = f"zero2_{device}" if spec.config == "auto" else spec.config
    path = find_file("ds_configs", name)
    text = read_text(path)
    try:
        json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = f"{path}:{error.lineno}"
        got = f"text that is not JSON ({error.msg}, column {error.colno})"
        raise JobError.of("deepspeed.config", got=got, expected="JSON", source=place) from None
    except ValueError as error:
        raise JobError.of(
            "deepspeed.config", got=error, expected="JSON", source=str(path)
        ) from None
    # JSON is YAML but for tabs, which JSON allows only between tokens: read again, with lines.
    return _checked(read_document(text.replace("\t", " "), str(path)))


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without a file, checked in the same way. Raises `JobError`."""
    return _checked(Document(dict(config), {(): Place("the DeepSpeed configuration", 0)}))


def _checked(document: Document) -> dict[str, Any]:
    if not isinstance(document.data, dict):
        document.complain((), got=type(document.data).__name__, expected="a JSON object")
        document.raise_problems()
    try:
        DeepSpeedFile.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        explain(error, DeepSpeedFile, document, REFUSED)
    document.raise_problems()
    return dict(document.data)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")


# -- what the JSON may hold -----------------------------------------------------------------------
#
# Of each block, the keys that have an effect in this stack. What else DeepSpeed 0.19 knows is in
# `REFUSED`, with the reason. The two together are all it knows; of that the installed one is asked
# in tests/unit/spec/test_deepspeed_file.py, which hands `DeepSpeedConfig` a dict that notes which
# keys are looked up, and compares the blocks with DeepSpeed's own Pydantic models.

# DeepSpeed reads 5e7 as a whole number.
_Elements = Annotated[int, Field(strict=False, gt=0)]


class OffloadBlock(Spec):
    """The optimizer in the host's memory: master weights, moments, and the update itself."""

    device: Literal["cpu"]
    """Where it is: the host (`nvme` needs ZeRO stage 3)."""
    pin_memory: bool = True
    """Whether its memory is page-locked, for copies that the card need not wait for."""


class ZeroBlock(Spec):
    """ZeRO: what is sharded, and how gradients travel."""

    stage: Annotated[int, Field(ge=0, le=2)]
    """1: the optimizer's state is sharded; 2: gradients too. 0 (nothing) and 3 (parameters too)
    are not supported: without ZeRO the optimizer is another,
    and teachers and checkpoints here assume whole parameters on every rank."""
    contiguous_gradients: bool = True
    """Gradients are copied into one buffer as they come."""
    reduce_scatter: bool = True
    """Each rank receives only the gradients that it owns."""
    reduce_bucket_size: _Elements = 500_000_000
    """Elements reduced at a time; also the size of the gradient buffer."""
    use_multi_rank_bucket_allreduce: bool = True
    """One all-reduce for the buckets of several ranks."""
    allgather_partitions: bool = True
    """Updated parameters are gathered by all-gather, not by broadcasts."""
    allgather_bucket_size: _Elements = 500_000_000
    """Elements gathered at a time."""
    overlap_comm: bool | None = None
    """Reduction runs beside the backward pass; needs a second gradient buffer."""
    ignore_unused_parameters: bool = True
    """Parameters without gradient are no error."""
    parameter_alignment: bool = False
    """Every parameter starts at a 16-byte boundary."""
    offload_optimizer: OffloadBlock | None = None
    """The optimizer's place; none: beside the model."""


class Bf16Block(Spec):
    """Parameters in bf16."""

    enabled: bool = False
    """Whether parameters, activations and gradients are bf16 (master weights stay fp32)."""
    check_grad_overflow: bool = True
    """A step whose gradients are not finite is left out, and ends the training; may only be true:
    they would reach the weights."""


class Fp16Block(Spec):
    """Parameters in fp16: not supported."""

    enabled: bool = False
    """May only be false."""


class DataTypesBlock(Spec):
    """What gradients are accumulated in."""

    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Accumulation over micro-batches; none: the parameters' type."""
    keep_in_fp32_modules: Literal["auto"] | tuple[str, ...] = "auto"
    """Buffers that stay fp32."""


class CommsLoggerBlock(Spec):
    """A log of every collective operation."""

    enabled: bool = False
    """Whether to keep it."""
    verbose: bool = False
    """Whether to print each operation."""
    prof_all: bool = True
    """All operations, or only `prof_ops`."""
    debug: bool = False
    """Whether to name the caller."""
    prof_ops: tuple[str, ...] = ()
    """The operations to log."""


class ThroughputBlock(Spec):
    """DeepSpeed's own samples per second."""

    enabled: bool = True
    """Whether to measure."""
    synchronized: bool = True
    """Whether to wait for the device first."""


class TimersBlock(Spec):
    """DeepSpeed's timers."""

    throughput: ThroughputBlock = ThroughputBlock()
    """Samples per second."""


class DeepSpeedFile(Spec):
    """A DeepSpeed JSON file of this project."""

    zero_optimization: ZeroBlock
    """What is sharded."""
    bf16: Bf16Block = Bf16Block()
    """bf16 parameters; absent: fp32."""
    fp16: Fp16Block = Fp16Block()
    """Not supported."""
    data_types: DataTypesBlock = DataTypesBlock()
    """What gradients are accumulated in."""
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    """What gradients are reduced in; none: the parameters' type."""
    comms_logger: CommsLoggerBlock = CommsLoggerBlock()
    """A log of every collective operation."""
    timers: TimersBlock = TimersBlock()
    """DeepSpeed's timers."""
    wall_clock_breakdown: bool = False
    """Whether to time forward, backward and step, and print it."""
    memory_breakdown: bool = False
    """Whether to print memory at every step."""
    dump_state: bool = False
    """Whether to print the engine's state at the start."""
    disable_python_gc: bool = False
    """Whether to switch Python's cyclic garbage collector off."""
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    """DeepSpeed's own log level."""

    @model_validator(mode="after")
    def _precision_holds(self) -> DeepSpeedFile:
        found = []
        dtypes = {
            ("data_types", "grad_accum_dtype"): self.data_types.grad_accum_dtype,
            ("communication_data_type",): self.communication_data_type,
        }
        for key, dtype in dtypes.items():
            if dtype in ("bf16", "fp16") or (dtype is None and self.bf16.enabled):
                doing = "reduces" if len(key) == 1 else "accumulates"
                hint = f"with bf16 parameters DeepSpeed otherwise {doing} gradients in bf16"
                found.append(Mismatch(key, repr(dtype) if dtype else "nothing", "'fp32'", hint))
        if self.fp16.enabled:
            found.append(Mismatch(("fp16", "enabled"), "true", "false", NO_FP16))
        if self.bf16.enabled and not self.bf16.check_grad_overflow:
            hint = "without the check a gradient that is not finite reaches the weights unnoticed"
            found.append(Mismatch(("bf16", "check_grad_overflow"), "false", "true", hint))
        stage = self.zero_optimization.stage
        if stage < 2 and self.bf16.enabled:
            hint = {
                0: "DeepSpeed's stage 0 cannot accumulate bf16 gradients in fp32",
                1: "with fp32 gradients DeepSpeed's stage 1 is another optimizer, whose state "
                "checkpoints here cannot read",
            }[stage]
            found.append(Mismatch(("zero_optimization", "stage"), stage, "2 with bf16", hint))
        elif stage == 0:
            hint = "without ZeRO the optimizer is another, whose state checkpoints cannot read"
            found.append(Mismatch(("zero_optimization", "stage"), 0, "1 or 2", hint))
        elif stage < 2 and self.zero_optimization.offload_optimizer is not None:
            expected = "2 with offload_optimizer"
            found.append(Mismatch(("zero_optimization", "stage"), stage, expected))
        if found:
            raise MismatchError(found)
        return self
