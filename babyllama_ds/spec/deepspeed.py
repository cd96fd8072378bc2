"""The one dict that DeepSpeed gets: a JSON file for the machinery, the job for the numbers.

Enters: the job, one stage's training, the device, the number of ranks, and the JSON file that
`deepspeed.config` names. Leaves: a dict for `deepspeed.initialize`, or a `JobError`. Next:
`engine`, which adds its own optimizer and schedule (they are not in the dict).

One owner per number: ZeRO, precision and communication live in the JSON, everything that changes
the experiment in the job. DeepSpeed ignores a misspelt top-level key; here a key that is owned
by the job, unknown, or without effect in this stack is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from babyllama_ds.errors import JobError
from babyllama_ds.spec.base import Mismatch, MismatchError, Spec
from babyllama_ds.spec.document import Document, Place, read_document
from babyllama_ds.spec.explain import explain
from babyllama_ds.spec.job import DeepSpeedSpec, JobSpec
from babyllama_ds.spec.loading import read_text
from babyllama_ds.spec.shipped import find_file
from babyllama_ds.spec.training import TrainingSpec

Device = Literal["cpu", "cuda"]
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
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below, above = [n for n in divisors if n < near], [n for n in divisors if n > near]
    return below[-1:] + above[:1]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON does not have")


# -- what the JSON may hold -----------------------------------------------------------------------
#
# Of each block, the keys that have an effect in this stack. What else DeepSpeed 0.19 knows is in
# `REFUSED`, with the reason. The two together are all it knows; tests/unit/spec/test_deepspeed.py
# shows that against the installed one: it hands `DeepSpeedConfig` a dict that notes which keys
# are looked up, and compares the blocks with DeepSpeed's own Pydantic models.

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
            found.append(Mismatch(("fp16", "enabled"), "true", "false", _FP16))
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


# -- what it may not hold, and why ----------------------------------------------------------------


def _owned(owner: str) -> str:
    return f"one owner per number: the job has it, as {owner}; remove it here"


_REMOVED = "DeepSpeed has removed it"
_PARALLEL = "ranks are data-parallel here, and nothing else"
_STAGE_3 = "only ZeRO stage 3 reads it, and stages here are 1 and 2"
_OFFLOAD = "of offloading, `offload_optimizer` to the host is supported alone"
_NVME = "only offloading to NVMe reads it, which needs ZeRO stage 3"
_OWN_CHECKPOINTS = "the run writes its own checkpoints"
_FP16 = "fp16 is not supported yet: it needs loss scaling and skipped steps; use bf16"
_NO_NEED = "gradients are averaged in fp32: there is nothing to scale"

REFUSED: Mapping[str, str] = {
    "train_batch_size": _owned("`student.training.batch_windows` (and each teacher's)"),
    "train_micro_batch_size_per_gpu": _owned("`student.training.micro_batch` (and each teacher's)"),
    "gradient_accumulation_steps": _owned("batch_windows / (micro_batch × ranks)"),
    "gradient_clipping": _owned("`student.training.clip_norm` (and each teacher's)"),
    "optimizer": _owned("`learning_rate`, `weight_decay`, `betas`, `epsilon` of `training`"),
    "scheduler": _owned("`schedule` and `warmup_steps` of `training`"),
    "steps_per_print": _owned("`log_every_steps` of `training`"),
    "vocabulary_size": _owned("`tokenizer.vocab_size`"),
    "data_efficiency": _owned("`windows`, `seed` and the stages' seeds"),
    "dataloader_drop_last": _owned("`windows` (no window is dropped)"),
    "tensorboard": "the run writes its own metrics and TensorBoard files",
    "wandb": "the run writes its own metrics",
    "csv_monitor": "the run writes its own metrics",
    "comet": "the run writes its own metrics",
    "checkpoint": _OWN_CHECKPOINTS,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "managed_gradient_accumulation": "the step relies on DeepSpeed's accumulation",
    "gradient_allreduce_op": "the loss relies on the mean over ranks",
    "prescale_gradients": _NO_NEED,
    "gradient_predivide_factor": _NO_NEED,
    "zero_allow_untested_optimizer": "the optimizer here is one that DeepSpeed has tested",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's AdamW, also where it is offloaded",
    "aio": _OFFLOAD,
    "activation_checkpointing": "models here do not use DeepSpeed's checkpointed layers",
    "compile": "DeepCompile is not supported yet",
    "torch_autocast": "precision is `bf16` or fp32 throughout; autocast would be a third",
    "weight_quantization": "precision is `bf16` or fp32 throughout",
    "bfloat16": "write `bf16`",
    "disable_allgather": "DeepSpeed reads it and does nothing with it",
    "flops_profiler": "it ends up in no report here",
    "autotuning": "a run is one experiment",
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "data_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "hybrid_engine": "generation is no part of training here",
    **dict.fromkeys(
        (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
            "zero_optimization.mics_hierarchical_params_gather",
            "zero_optimization.mics_shard_size",
            "zero_optimization.zeropp_loco_param",
            "zero_optimization.legacy_stage1",
        ),
        _REMOVED,
    ),
    "bf16.immediate_grad_update": "it has no effect with ZeRO stage 2",
    "bf16.bf16_master_weights_and_grads": "master weights and gradients are fp32 here",
    "bf16.bf16_optimizer_states": "the optimizer's moments are fp32 here",
    "data_types.param_dtype": "`bf16.enabled` says it",
    "data_types.buffer_dtype": "rotary frequencies and the like keep the type they have",
    **dict.fromkeys(
        (
            "fp16.auto_cast",
            "fp16.loss_scale",
            "fp16.initial_scale_power",
            "fp16.loss_scale_window",
            "fp16.hysteresis",
            "fp16.consecutive_hysteresis",
            "fp16.min_loss_scale",
            "fp16.fp16_master_weights_and_grads",
        ),
        _FP16,
    ),
    "zero_optimization.compute_grad_norm": "the step needs the gradient's norm",
    "zero_optimization.load_from_fp32_weights": _OWN_CHECKPOINTS,
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer here is AdamW",
    "zero_optimization.zenflow": _OFFLOAD,
    **{
        f"zero_optimization.{key}": _OFFLOAD
        for key in (
            "offload_param",
            "cpu_offload",
            "round_robin_gradients",
            "cpu_offload_param",
            "cpu_offload_use_pin_memory",
        )
    },
    **{
        f"zero_optimization.offload_optimizer.{key}": _NVME
        for key in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")
    },
    **{
        f"zero_optimization.offload_optimizer.{key}": _STAGE_3
        for key in ("ratio", "super_offload", "cpuadam_cores_perc")
    },
    **{
        f"zero_optimization.{key}": _STAGE_3
        for key in (
            "sub_group_size",
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "model_persistence_threshold",
            "max_live_parameters",
            "max_reuse_distance",
            "gather_16bit_weights_on_model_save",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
            "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "memory_efficient_linear",
            "pipeline_loading_checkpoint",
            "override_module_apply",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
            "leaf_module",
        )
    },
}
"""Keys that DeepSpeed knows and that may not stand in the JSON: key path to reason."""
