"""What may not stand in the JSON of DeepSpeed's machinery: DeepSpeed's keys, each with the reason.

`deepspeed_file` refuses them; together with what it allows they are all that DeepSpeed knows.
"""

from __future__ import annotations

from collections.abc import Mapping

NO_FP16 = "fp16 is not supported yet: it needs loss scaling and skipped steps; use bf16"


def _owned(owner: str) -> str:
    return f"one owner per number: the job has it, as {owner}; remove it here"


_REMOVED = "DeepSpeed has removed it"
_PARALLEL = "ranks are data-parallel here, and nothing else"
_STAGE_3 = "only ZeRO stage 3 reads it, and stages here are 1 and 2"
_OFFLOAD = "of offloading, `offload_optimizer` to the host is supported alone"
_NVME = "only offloading to NVMe reads it, which needs ZeRO stage 3"
_OWN_CHECKPOINTS = "the run writes its own checkpoints"
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
    "zero_allow_untested_optimizer": "both optimizers here are tested under ZeRO",
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
        NO_FP16,
    ),
    "zero_optimization.compute_grad_norm": "the step needs the gradient's norm",
    "zero_optimization.load_from_fp32_weights": _OWN_CHECKPOINTS,
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "only DeepSpeed's own Muon reads it",
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
