"""The DeepSpeed JSON: all that DeepSpeed knows is allowed or refused with a reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, KeysView
from pathlib import Path
from typing import Any, ClassVar

import pytest

from babyllama_ds.errors import JobError, Problem
from babyllama_ds.spec.deepspeed_file import (
    DeepSpeedFile,
    OffloadBlock,
    check_config,
    read_config,
)
from babyllama_ds.spec.deepspeed_refused import REFUSED
from babyllama_ds.spec.job import DeepSpeedSpec

GOOD: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


def changed(**changes: Any) -> dict[str, Any]:
    """GOOD with keys set; `zero_optimization__stage` is a nested one, None removes."""
    config = copy.deepcopy(GOOD)
    for name, value in changes.items():
        *parents, key = name.split("__")
        here = config
        for parent in parents:
            here = here.setdefault(parent, {})
        if value is None:
            del here[key]
        else:
            here[key] = value
    return config


def problems(config: dict[str, Any]) -> tuple[Problem, ...]:
    with pytest.raises(JobError) as caught:
        check_config(config)
    return caught.value.problems


# -- what may not be in the JSON -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("train_batch_size", 32, "student.training.batch_windows"),
        ("train_batch_size", "auto", "student.training.batch_windows"),
        ("train_micro_batch_size_per_gpu", 4, "student.training.micro_batch"),
        ("gradient_accumulation_steps", 2, "batch_windows / (micro_batch × ranks)"),
        ("gradient_clipping", 1.0, "student.training.clip_norm"),
        ("optimizer", {"type": "AdamW"}, "learning_rate"),
        ("scheduler", {"type": "WarmupLR"}, "warmup_steps"),
        ("steps_per_print", 10, "log_every_steps"),
        ("vocabulary_size", 16000, "tokenizer.vocab_size"),
        ("data_efficiency", {"seed": 1}, "seed"),
        ("wandb", {"enabled": True}, "own metrics"),
        ("gradient_allreduce_op", "sum", "mean over ranks"),
        ("tensor_parallel", {"autotp_size": 2}, "data-parallel"),
        ("elasticity", {}, "removed"),
        ("bfloat16", {"enabled": True}, "`bf16`"),
        ("zero_optimization__offload_param", {"device": "cpu"}, "`offload_optimizer` to the host"),
        ("zero_force_ds_cpu_optimizer", False, "torch's AdamW"),
        ("zero_optimization__stage3_max_live_parameters", 1, "stage 3"),
        ("zero_optimization__compute_grad_norm", False, "norm"),
        ("bf16__bf16_master_weights_and_grads", True, "fp32"),
        ("data_types__param_dtype", "bf16", "bf16.enabled"),
        ("fp16__loss_scale", 0, "use bf16"),
    ],
)  # fmt: skip
def test_keys_that_belong_elsewhere(key: str, value: object, hint: str) -> None:
    (problem,) = problems(changed(**{key: value}))
    assert problem.where == key.replace("__", ".")
    assert problem.expected == "no such key here"
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [("ratio", 0.5, "stage 3"), ("nvme_path", "/tmp", "NVMe"), ("pipeline_read", True, "NVMe")],
)
def test_of_offloading_only_the_host_is_supported(key: str, value: object, hint: str) -> None:
    block = {"device": "cpu", key: value}
    (problem,) = problems(changed(zero_optimization__offload_optimizer=block))
    assert problem.where == f"zero_optimization.offload_optimizer.{key}"
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("gradient_clipp1ng", "did you mean `gradient_clipping`? one owner per number"),
        ("zero_optimisation", "did you mean `zero_optimization`?"),
        ("bf61", "did you mean `bf16`?"),
        ("zero_optimization__overlap_com", "did you mean `overlap_comm`?"),
        ("zero_optimization__offload_optimiser", "did you mean `offload_optimizer`?"),
        ("data_types__grad_acum_dtype", "did you mean `grad_accum_dtype`?"),
        ("bf16__enable", "did you mean `enabled`?"),
        ("timers__throughput__sync", "there are: enabled, synchronized"),
    ],
)
def test_misspelt_keys(key: str, hint: str) -> None:
    (problem,) = problems(changed(**{key: 1}))
    assert (problem.where, problem.got) == (key.replace("__", "."), "an unknown key")
    assert (problem.hint or "").startswith(hint)


@pytest.mark.parametrize(
    ("changes", "where", "got", "expected", "hint"),
    [
        ({"zero_optimization__stage": 3}, "zero_optimization.stage", "3", "a number <= 2",
         "whole parameters"),
        ({"zero_optimization__stage": True}, "zero_optimization.stage", "true",
         "a whole number", ""),
        ({"zero_optimization__stage": "2"}, "zero_optimization.stage", "'2'", "a whole number",
         "remove the quotes"),
        ({"zero_optimization__reduce_bucket_size": 0.5}, "zero_optimization.reduce_bucket_size",
         "0.5", "a whole number", ""),
        ({"zero_optimization__stage": None}, "zero_optimization.stage", "nothing", "a value", ""),
        ({"zero_optimization": True}, "zero_optimization", "true", "a mapping", ""),
        ({"zero_optimization": None}, "zero_optimization", "nothing", "a value", ""),
        ({"zero_optimization__reduce_bucket_size": "auto"},
         "zero_optimization.reduce_bucket_size", "'auto'", "a whole number", "leave it out"),
        ({"zero_optimization__reduce_bucket_size": 0}, "zero_optimization.reduce_bucket_size",
         "0", "a number > 0", ""),
        ({"zero_optimization__overlap_comm": 1}, "zero_optimization.overlap_comm", "1",
         "true or false, or null", "write true"),
        ({"zero_optimization__stage": 0}, "zero_optimization.stage", "0", "2 with bf16",
         "accumulate"),
        ({"zero_optimization__stage": 0, "bf16": None}, "zero_optimization.stage", "0", "1 or 2",
         "without ZeRO"),
        ({"zero_optimization__stage": 1}, "zero_optimization.stage", "1", "2 with bf16",
         "another optimizer"),
        ({"zero_optimization__offload_optimizer": {"device": "nvme"}},
         "zero_optimization.offload_optimizer.device", "'nvme'", "one of 'cpu'", ""),
        ({"zero_optimization__offload_optimizer": {}}, "zero_optimization.offload_optimizer.device",
         "nothing", "a value", ""),
        ({"zero_optimization__offload_optimizer": {"device": "cpu"}, "bf16": None,
          "zero_optimization__stage": 1},
         "zero_optimization.stage", "1", "2 with offload_optimizer",
         ""),
        ({"fp16__enabled": True}, "fp16.enabled", "true", "false", "loss scaling"),
        ({"bf16__check_grad_overflow": False}, "bf16.check_grad_overflow", "false", "true",
         "reaches the weights"),
        ({"data_types": None}, "data_types.grad_accum_dtype", "nothing", "'fp32'",
         "accumulates gradients in bf16"),
        ({"data_types__grad_accum_dtype": "bf16"}, "data_types.grad_accum_dtype", "'bf16'",
         "'fp32'", "accumulates"),
        ({"communication_data_type": None}, "communication_data_type", "nothing", "'fp32'",
         "reduces gradients in bf16"),
        ({"communication_data_type": "bf16"}, "communication_data_type", "'bf16'", "'fp32'", ""),
        ({"communication_data_type": "bf16", "bf16": None}, "communication_data_type", "'bf16'",
         "'fp32'", ""),
        ({"communication_data_type": "fp31"}, "communication_data_type", "'fp31'",
         "one of 'fp32', 'bf16', 'fp16', or null", "did you mean `fp32`?"),
        ({"log_level": "warn"}, "log_level", "'warn'", "one of 'debug'", "did you mean `warning`?"),
    ],
)  # fmt: skip
def test_wrong_values(
    changes: dict[str, Any], where: str, got: str, expected: str, hint: str
) -> None:
    (problem,) = problems(changed(**changes))
    assert (problem.where, problem.got) == (where, got)
    assert problem.expected.startswith(expected)
    assert hint in (problem.hint or "")


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_optimization__stage": 1, "bf16": None},
        {"bf16": None},
        {"bf16__enabled": False, "data_types": None, "communication_data_type": None},
        {"zero_optimization__reduce_bucket_size": 5e7},
        {"zero_optimization__overlap_comm": True},
        {"zero_optimization__offload_optimizer": {"device": "cpu", "pin_memory": False}},
        {"fp16__enabled": False},
        {"bf16__check_grad_overflow": True},
        {"log_level": "info", "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]}},
    ],
)
def test_what_is_allowed_is_left_as_it_is(changes: dict[str, Any]) -> None:
    config = changed(**changes)
    assert check_config(config) == config


# -- the file ------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    return read_config(DeepSpeedSpec(config=str(path)), "cpu")


def file_problems(path: Path) -> tuple[Problem, ...]:
    with pytest.raises(JobError) as caught:
        read(path)
    return caught.value.problems


def test_a_file_is_reported_by_line_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    lines = ["{", '\t"zero_optimization": {', '\t\t"stage": 3,', '\t\t"overlap_com": false', "\t},"]
    lines += ['\t"train_batch_size": "auto",', '\t"bf16": {"enabled": 1}', "}"]
    path.write_text("\n".join(lines))
    assert [(p.source, p.where) for p in file_problems(path)] == [
        (f"{path}:3", "zero_optimization.stage"),
        (f"{path}:4", "zero_optimization.overlap_com"),
        (f"{path}:6", "train_batch_size"),
        (f"{path}:7", "bf16.enabled"),
    ]


def test_a_good_file_is_what_json_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(changed(zero_optimization__reduce_bucket_size=5e7), indent="\t"))
    assert read(path) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("text", "source", "got"),
    [
        ('{"bf16": {"enabled": true},}', ":1", "Illegal trailing comma|Expecting property name"),
        ("stage: 2\n", ":1", "Expecting value"),
        ('{"a":\n\n oops}', ":3", "Expecting value"),
        ('{"a": NaN}', "", "NaN"),
    ],
)
def test_text_that_is_not_json(tmp_path: Path, text: str, source: str, got: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    (problem,) = file_problems(path)
    assert (problem.where, problem.source) == ("deepspeed.config", f"{path}{source}")
    assert any(one in problem.got for one in got.split("|"))


def test_a_duplicate_key_in_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 2,\n"stage": 1}}')
    (problem,) = file_problems(path)
    assert (problem.source, problem.where) == (f"{path}:2", "zero_optimization.stage")


@pytest.mark.parametrize("text", ["[1]", "3"])
def test_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    (problem,) = file_problems(path)
    assert "a JSON object" in problem.expected


def test_a_missing_file_and_an_unknown_name(tmp_path: Path) -> None:
    assert file_problems(tmp_path / "none.json")[0].got == "no such file"
    with pytest.raises(JobError, match="zero2_gpu: got no such file") as caught:
        read_config(DeepSpeedSpec(config="zero2_gpu"), "cpu")
    assert "zero2_cpu" in (caught.value.problems[0].hint or "")


# -- against the installed DeepSpeed -------------------------------------------------------------


class Noting(dict[str, Any]):
    """A dict that notes every key that is looked up."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> KeysView[str]:
        noting = self

        class Keys(KeysView[str]):
            def __contains__(self, key: object) -> bool:
                return key in noting

            def __iter__(self) -> Iterator[str]:
                return iter(list(dict.keys(noting)))

        return Keys(self)


def our_keys(prefix: str = "") -> set[str]:
    """The keys that may stand right below `prefix`, and those that are refused with a reason."""
    refused = {name.removeprefix(prefix) for name in REFUSED if name.startswith(prefix)}
    model: Any = DeepSpeedFile
    if prefix:
        model = DeepSpeedFile.model_fields[prefix.rstrip(".")].annotation
    return {key for key in refused if "." not in key} | set(model.model_fields)


def test_every_top_level_key_that_deepspeed_reads_is_known() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    Noting.asked = set()
    DeepSpeedConfig(Noting({"train_batch_size": 1, "zero_optimization": {"stage": 2}}))
    assert "train_micro_batch_size_per_gpu" in Noting.asked, "nothing was noted"
    assert Noting.asked - our_keys() == set()
    # Only read under conditions that this configuration does not meet.
    conditional = {"data_parallel_size", "sequence_parallel_size"}
    unread = our_keys() - Noting.asked - conditional
    assert unread == set(), "DeepSpeed no longer reads these: shorten the list"


def test_every_removed_key_is_known() -> None:
    from deepspeed.runtime import config

    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= our_keys()
    assert set(config._REMOVED_ZERO_CONFIG_KEYS) <= our_keys("zero_optimization.")


@pytest.mark.parametrize("block", ["zero_optimization", "bf16", "fp16", "comms_logger"])
def test_blocks_have_deepspeeds_keys(block: str) -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }
    fields = models[block].model_fields
    theirs = set(fields) | {field.alias for field in fields.values() if field.alias}
    if block == "zero_optimization":
        theirs |= set(_REMOVED_ZERO_CONFIG_KEYS)
    assert our_keys(f"{block}.") == theirs


def test_data_types_have_deepspeeds_keys() -> None:
    from deepspeed.runtime import constants

    names = "GRAD_ACCUM_DTYPE", "PARAM_DTYPE", "BUFFER_DTYPE", "KEEP_IN_FP32_MODULES"
    assert our_keys("data_types.") == {getattr(constants, name) for name in names}


def test_the_offloading_block_has_deepspeeds_keys() -> None:
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    prefix = "zero_optimization.offload_optimizer."
    refused = {key.removeprefix(prefix) for key in REFUSED if key.startswith(prefix)}
    ours = refused | set(OffloadBlock.model_fields)
    assert ours == set(DeepSpeedZeroOffloadOptimizerConfig.model_fields)
