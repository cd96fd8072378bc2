"""Memory items against numbers computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from babyllama_ds.engine.muon import TOGETHER
from babyllama_ds.losses.matching import hidden_distance_sum
from babyllama_ds.models.sizes import ModelSizes
from babyllama_ds.plan.activations import (
    MicroBatchShape,
    recomputed_bytes,
    saved_bytes,
    working_bytes,
)
from babyllama_ds.plan.memory import (
    HeldTeacher,
    MatchedPair,
    StageShape,
    chunk_bytes,
    rank_memory,
)
from babyllama_ds.spec.training import Muon, TrainingSpec

ZERO2: dict[str, Any] = {
    "zero_optimization": {"stage": 2, "reduce_scatter": False, "reduce_bucket_size": 1_000},
    "bf16": {"enabled": True},
}
FP32: dict[str, Any] = {"zero_optimization": ZERO2["zero_optimization"]}
STUDENT = ModelSizes(
    family="llama",
    params=10_000,
    parameter_sizes=(800,) * 12 + (100,) * 4,
    backbone_weights=7_000,
    head_rows=100,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_size=4,
    intermediate_size=32,
    dropout=0.0,
)
TEACHER = replace(STUDENT, params=40_000, hidden_size=32, head_rows=128)
MICRO = MicroBatchShape(windows=4, length=8, kernel="sdpa", element_bytes=2, device="cuda")
STAGE = StageShape(
    model=STUDENT,
    micro=MICRO,
    accumulation=1,
    ranks=4,
    vocab_size=100,
    chunk_tokens=5,
    teachers=(),
    summed=False,
    work_spaces=1,
    cache_bytes=0,
    host_cache_bytes=0,
    filling=(),
    evaluation_tokens=64,
    deepspeed=ZERO2,
)
MUON = TrainingSpec(batch_windows=1, epochs=1.0, learning_rate=1e-2, muon=Muon(learning_rate=1e-2))


def test_the_engine_under_zero_2() -> None:
    items = rank_memory(STAGE).moments["backward"]
    assert items["parameters"] == 20_000  # 2 bytes each, whole
    assert items["master weights, fp32"] == 10_000  # 4 bytes, a quarter
    assert items["moments, fp32"] == 20_000  # two of them
    assert items["gradients, fp32"] == 10_000  # the owned quarter
    # 1,000 elements that wait in bf16, the 800 that find them there, and their copy in fp32.
    assert items["gradient buckets"] == 2_000 + 1_600 + 4_000


def test_stage_1_keeps_gradients_whole_until_they_are_reduced() -> None:
    config = {"zero_optimization": {**ZERO2["zero_optimization"], "stage": 1}}
    micro = replace(MICRO, element_bytes=4)
    stage = replace(STAGE, deepspeed=config, micro=micro, accumulation=2)
    items = rank_memory(stage).moments
    assert items["backward"]["master weights, fp32"] == 10_000
    assert items["forward"]["gradients, fp32"] == 40_000 + 4_000  # and the buffer
    # Those that wait are in the buffer; what is owned is copied once more.
    assert items["backward"]["gradients, fp32"] == 40_000 - 4_000 + 10_000
    assert items["backward"]["gradient buckets"] == 4_000
    assert items["update"]["gradients, fp32"] == 2 * 10_000


def test_what_reduces_beside_the_backward_pass_has_two_buffers() -> None:
    config = {**ZERO2, "zero_optimization": {**ZERO2["zero_optimization"], "overlap_comm": True}}
    items = rank_memory(replace(STAGE, deepspeed=config)).moments["backward"]
    assert items["gradient buckets"] == 2 * 2_000 + 1_600 + 4_000


def test_a_buffer_larger_than_the_model_is_allocated_whole_on_a_card_alone() -> None:
    zero = {"stage": 2, "reduce_scatter": True, "reduce_bucket_size": 50_000}
    config = {**ZERO2, "zero_optimization": zero}
    on_card = rank_memory(replace(STAGE, deepspeed=config)).moments["backward"]
    assert on_card["gradient buckets"] == 100_000 + 60_000  # its copies in bf16 and fp32
    assert on_card["activations"] == 0  # the only reduction ends the backward pass
    on_cpu = replace(STAGE, deepspeed=config, micro=replace(MICRO, device="cpu"))
    assert rank_memory(on_cpu).moments["backward"]["gradient buckets"] == 20_000 + 60_000


def test_gradients_that_wait_need_no_buffer() -> None:
    """As the shipped files have it: no more than the model has, however large a bucket may be."""
    zero = {**ZERO2["zero_optimization"], "reduce_bucket_size": 50_000}
    stage = replace(STAGE, deepspeed={**ZERO2, "zero_optimization": zero}, accumulation=2)
    items = rank_memory(stage).moments["backward"]
    assert items["gradient buckets"] == 20_000 + 40_000
    # Of one micro-batch alone what is owned comes after those in bf16 are gone.
    items = rank_memory(replace(stage, accumulation=1)).moments["backward"]
    assert items["gradient buckets"] + items["gradients, fp32"] == 20_000 + 40_000


def test_gradients_outlive_a_micro_batch_only_under_accumulation() -> None:
    assert rank_memory(STAGE).moments["forward"]["gradients, fp32"] == 0
    accumulated = rank_memory(replace(STAGE, accumulation=2)).moments["forward"]
    assert accumulated["gradients, fp32"] == 10_000


def test_the_loss() -> None:
    teachers = [HeldTeacher(sizes=TEACHER, live=True), HeldTeacher(sizes=TEACHER, live=False)]
    stage = replace(STAGE, teachers=teachers, work_spaces=3, cache_bytes=7)
    # Five positions: student's and two teachers' logits in bf16, three work spaces in fp32.
    assert chunk_bytes(stage) == 5 * 100 * (3 * 2 + 3 * 4)
    assert chunk_bytes(STAGE) == 5 * 100 * (2 + 4)
    assert chunk_bytes(replace(STAGE, micro=replace(MICRO, device="cpu"))) == 5 * 100 * 2
    items = rank_memory(stage).moments["forward"]
    assert items["teachers"] == 2 * 40_000 + 2 * 128 * 32  # one whole, of the other its head
    assert items["teachers' hidden states"] == 32 * (32 + 32) * 2
    assert items["teacher cache"] == 7
    # The head's gradient: fp32 sum and bf16 cast; states and their gradient, bf16; 16 B a position.
    assert items["gradients of head and states"] == 6 * 100 * 16 + 32 * (4 * 16 + 16)
    assert items["activations"] == saved_bytes(STUDENT, MICRO)


def test_teachers_of_equal_votes_have_one_sum_of_logits() -> None:
    teachers = [HeldTeacher(sizes=TEACHER, live=True)] * 3
    apart = replace(STAGE, teachers=teachers, work_spaces=3)
    summed = replace(apart, summed=True)
    assert chunk_bytes(summed) == 5 * 100 * (2 * 2 + 3 * 4)
    items = rank_memory(summed).moments["forward"]
    assert items["teachers' heads side by side"] == 100 * 3 * 32 * 2
    assert rank_memory(apart).moments["forward"]["teachers' heads side by side"] == 0


def test_an_evaluation_has_its_own_windows_and_no_teachers() -> None:
    teachers = [HeldTeacher(sizes=TEACHER, live=True)]
    stage = replace(STAGE, teachers=teachers, work_spaces=3, chunk_tokens=None)
    items = rank_memory(stage).moments["evaluation"]
    # 64 tokens, where a training's micro-batch has 32: logits in bf16, the kernel at work.
    assert items["logits of a chunk"] == 64 * 100 * 2
    chunked = rank_memory(replace(stage, chunk_tokens=5)).moments["evaluation"]
    assert chunked["logits of a chunk"] == items["logits of a chunk"]
    # At least a window of 8, were there fewer tokens in a pass.
    least = rank_memory(replace(stage, evaluation_tokens=5)).moments["evaluation"]
    assert least["logits of a chunk"] == 8 * 100 * 2


def test_teachers_are_there_before_the_student_is_cast() -> None:
    stage = replace(STAGE, teachers=[HeldTeacher(sizes=TEACHER, live=True)], cache_bytes=7)
    assert rank_memory(stage).moments["start"] == {
        "model before it is cast": 4 * 10_000,
        "teachers": 2 * 40_000,
        "teacher cache": 7,
    }


def test_every_rank_holds_a_copy_of_a_cache_in_the_hosts_memory() -> None:
    memory = rank_memory(replace(STAGE, host_cache_bytes=7))
    assert memory.host_cache_bytes == 4 * 7
    assert memory.peak_bytes == rank_memory(STAGE).peak_bytes


def test_fp32_has_no_cast_copies() -> None:
    stage = replace(
        STAGE,
        micro=replace(MICRO, element_bytes=4),
        deepspeed=FP32,
    )
    memory = rank_memory(stage)
    assert memory.moments["backward"]["parameters"] == 40_000
    assert memory.moments["backward"]["gradient buckets"] == 4_000 + 3_200  # the next gradient's
    assert memory.moments["update"]["gradients, fp32"] == 2 * 10_000  # as they are, and laid flat
    head_and_states = memory.moments["forward"]["gradients of head and states"]
    assert head_and_states == 4 * 100 * 16 + 32 * (8 * 16 + 16)


def test_the_peak_is_the_highest_point() -> None:
    memory = rank_memory(STAGE)
    sums = {moment: sum(items.values()) for moment, items in memory.moments.items()}
    assert memory.peak_bytes == max(sums.values()) == sums[memory.peak]
    assert memory.items == memory.moments[memory.peak]


def test_the_work_of_a_layer_is_that_of_its_larger_half() -> None:
    """Of the MLP three tensors of 32 columns; of eager attention two of 4 heads' 64 x 64 scores.

    Beside either half is the mask that keeps documents apart, as booleans and as numbers.
    """
    long = replace(MICRO, windows=1, length=64)
    assert working_bytes(STUDENT, long) == 3 * 2 * 64 * 32
    eager = replace(long, kernel="eager")
    assert working_bytes(STUDENT, eager) == 2 * 2 * 4 * 64 * 64
    mask = (1 + 2) * 64 * 64
    assert working_bytes(STUDENT, replace(eager, documents=True)) == 2 * 2 * 4 * 64 * 64 + mask
    assert working_bytes(STUDENT, replace(long, documents=True)) == 3 * 2 * 64 * 32 + mask
    flash = replace(long, kernel="flash_attention_2", documents=True)
    assert working_bytes(STUDENT, flash) == 3 * 2 * 64 * 32


def test_a_checkpoint_is_gathered_in_host_memory() -> None:
    """Masters and moments, 12 bytes a parameter, and the best weights; on a CPU beside the rest."""
    assert rank_memory(STAGE).host_bytes == 14 * 10_000
    assert "checkpoint" not in rank_memory(STAGE).moments
    on_cpu = rank_memory(replace(STAGE, micro=replace(MICRO, device="cpu")))
    assert on_cpu.host_bytes == 0
    assert on_cpu.moments["checkpoint"]["gathered checkpoint"] == 12 * 10_000
    assert on_cpu.moments["checkpoint"]["best weights"] == 2 * 10_000


@pytest.mark.parametrize("windows", [4, 40_000])
def test_on_a_cpu_the_allocator_keeps_a_share_of_what_is_freed(windows: int) -> None:
    micro = replace(MICRO, device="cpu", windows=windows)
    items = rank_memory(replace(STAGE, micro=micro)).moments["forward"]
    share = round(0.5 * items["activations"])
    assert (share > 120 * 2**20) == (windows > 4)
    assert items["kept by the allocator"] == max(120 * 2**20, share)
    assert rank_memory(STAGE).moments["forward"]["kept by the allocator"] == 0
    backward = rank_memory(replace(STAGE, micro=micro)).moments["backward"]
    assert backward["activations"] == items["activations"]  # nor is it given back
    assert backward["kept by the allocator"] == items["kept by the allocator"]
    update = rank_memory(replace(STAGE, micro=micro)).moments["update"]
    assert update["activations"] == items["activations"]
    assert rank_memory(STAGE).moments["update"]["activations"] == 0


def test_filling_a_cache() -> None:
    """The student is not there yet; of teachers one after another the largest counts."""
    small, large = (
        HeldTeacher(sizes=sizes, live=True) for sizes in (replace(TEACHER, params=30_000), TEACHER)
    )
    by_turns = rank_memory(replace(STAGE, filling=[[small], [large]])).moments["cache"]
    at_once = rank_memory(replace(STAGE, filling=[[small, large]])).moments["cache"]
    assert by_turns["teachers"] == 2 * 40_000
    assert at_once["teachers"] == 2 * 70_000
    assert "parameters" not in by_turns
    # 32 tokens: the stream twice in bf16 and twice in fp32, and three MLP tensors in bf16.
    assert by_turns["work of a layer"] == 32 * (32 * 12 + 3 * 2 * 32)


def test_matched_layers_cost_their_matrices_and_states() -> None:
    """Two pairs: matrices of 32 × 16 and 24 × 16, trained and checkpointed like the model."""
    pairs = [
        MatchedPair(teacher_width=32, loss="mse"),
        MatchedPair(teacher_width=24, loss="cosine"),
    ]
    stage = replace(STAGE, matched=pairs)
    assert stage.trained == 10_000 + 16 * (32 + 24)
    items = rank_memory(stage).moments["forward"]
    assert items["parameters"] == 2 * stage.trained
    assert items["moments, fp32"] == 2 * 4 * stage.trained // 4
    # 32 positions: both layers in bf16; the difference of one pair, both sides of the other,
    # and one more of each, in fp32.
    of_mse, of_cosine = 2 * (32 + 16) + 2 * 4 * 32, 2 * (24 + 16) + 3 * 4 * 24
    assert items["states of matched layers"] == 32 * (of_mse + of_cosine)
    assert rank_memory(STAGE).moments["forward"]["states of matched layers"] == 0
    assert rank_memory(stage).host_bytes == 12 * stage.trained + 2 * stage.trained


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_matched_layers_keep_what_autograd_is_handed(loss: Any) -> None:
    """Of one pair, beside the teacher's layer and one more in passing."""
    num, width, teacher_width = 32, 16, 1000
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    student = torch.randn(num, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(teacher_width, width, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(num, teacher_width, dtype=torch.bfloat16)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_distance_sum(student, weight, teacher, torch.ones(num, dtype=torch.bool), loss)
    del kept[weight.untyped_storage()._cdata]
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    stage = replace(STAGE, matched=[MatchedPair(teacher_width=teacher_width, loss=loss)])
    planned = rank_memory(stage).moments["forward"]["states of matched layers"]
    # Norms, one number for each position, are left out.
    assert found == pytest.approx(planned - teacher.nbytes - 2 * teacher.nbytes, rel=0.01)


# -- options ---------------------------------------------------------------------------------------


def test_a_moving_average_is_one_more_partition() -> None:
    averaged = rank_memory(replace(STAGE, averaged=True))
    assert averaged.moments["backward"]["moving average, fp32"] == 10_000
    assert averaged.host_bytes == 18 * 10_000  # gathered with the rest
    assert rank_memory(STAGE).moments["backward"]["moving average, fp32"] == 0


def test_muon_has_one_moment_for_the_matrices_of_the_layers() -> None:
    memory = rank_memory(replace(STAGE, muon=True))
    assert memory.moments["backward"]["moments, fp32"] == 20_000 - 7_000
    assert memory.host_bytes == 14 * 10_000 - 4 * 7_000


def test_muons_updates_are_there_once_whole_and_some_of_them_worked_on() -> None:
    items = rank_memory(replace(STAGE, muon=True)).moments["update"]
    assert items["orthogonal updates"] == 4 * 1_750 + (4 + 4 * 2) * 1_750  # of four ranks
    assert rank_memory(STAGE).moments["update"]["orthogonal updates"] == 0
    large = replace(STAGE.model, backbone_weights=10 * TOGETHER)
    items = rank_memory(replace(STAGE, model=large, ranks=2, muon=True)).moments["update"]
    assert items["orthogonal updates"] == 4 * 5 * TOGETHER + 12 * TOGETHER


@pytest.mark.parametrize("shapes", [[(256, 256)] * 8, [(256, 256)] * 8 + [(512, 256)] * 4])
def test_a_step_of_muon_takes_no_more_than_is_planned(
    shapes: list[tuple[int, int]], muon_of: Callable[..., Any]
) -> None:
    """In fp32, whose products need no room of their own on a CPU; all of it, if all are square."""
    matrices = [torch.randn(shape) for shape in shapes]
    optimizer, *_ = muon_of(MUON, matrices, matrices)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer.step()
    results: Any = profiled.profiler.kineto_results
    events = sorted(results.events(), key=lambda event: event.start_ns())
    measured = max(accumulate(e.nbytes() for e in events if e.name() == "[memory]"))
    stage = replace(
        STAGE,
        model=replace(STUDENT, backbone_weights=sum(one.numel() for one in matrices)),
        micro=replace(MICRO, element_bytes=4),
        ranks=1,
        deepspeed=FP32,
        muon=True,
    )
    planned = rank_memory(stage).moments["update"]["orthogonal updates"]
    if len(set(shapes)) == 1:
        assert planned == pytest.approx(measured, rel=1e-3)
    else:
        assert 0.5 * planned < measured < planned


def test_recomputed_layers_keep_their_inputs_and_come_back_one_by_one() -> None:
    stage = replace(STAGE, micro=replace(MICRO, checkpointed=True))
    plain, items = rank_memory(STAGE).moments, rank_memory(stage).moments
    assert items["forward"]["activations"] < plain["forward"]["activations"] / 2
    again = recomputed_bytes(STUDENT, stage.micro)
    assert again > 0
    assert items["backward"]["work of a layer"] == plain["backward"]["work of a layer"] + again


def test_an_offloaded_optimizer_leaves_the_card_for_the_host() -> None:
    zero = {**ZERO2["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    stage = replace(STAGE, deepspeed={**ZERO2, "zero_optimization": zero}, averaged=True)
    memory = rank_memory(stage)
    items = memory.moments["backward"]
    for gone in ("master weights, fp32", "moments, fp32", "moving average, fp32"):
        assert items[gone] == 0  # type: ignore[index]
    assert items["parameters"] == 20_000
    assert items["gradients, fp32"] == 10_000
    assert items["offloading"] == 2 * 100 * 16  # the largest gradient on its way
    # A quarter of masters, moments and average (16 B), of fp32 gradients and of new bf16 weights.
    assert memory.host_bytes == 18 * 10_000 + (16 + 4 + 2) * 10_000 // 4
    on_cpu = rank_memory(replace(stage, micro=replace(MICRO, device="cpu")))
    assert on_cpu.moments["backward"]["master weights, fp32"] == 10_000
    assert on_cpu.moments["backward"]["offloading"] == 2 * 100 * 16 + (4 + 2) * 10_000 // 4


def test_a_teacher_that_is_split_over_ranks() -> None:
    """Its layers are dealt out, not its embedding, norms and head; its windows are four ranks'."""
    whole, split = (HeldTeacher(sizes=TEACHER, live=True, parts=parts) for parts in (1, 4))
    assert whole.held_params == 40_000
    assert split.held_params == 40_000 - 7_000 + 7_000 // 4
    assert HeldTeacher(sizes=TEACHER, live=False, parts=4).held_params == 128 * 32
    alone, together = (
        rank_memory(replace(STAGE, teachers=[one])).moments for one in (whole, split)
    )
    assert "teaching" not in alone
    assert alone["forward"]["teachers"] - together["forward"]["teachers"] == 2 * (7_000 - 1_750)
    # 4 x 32 tokens: two states of 32 in bf16 and two in fp32; of 3 x 32 inner columns a quarter.
    assert together["teaching"]["work of a layer"] == 128 * 32 * (2 * 2 + 2 * 4) + 3 * 2 * 32 * 32
    filling = rank_memory(replace(STAGE, filling=[[split]])).moments["cache"]
    assert filling["teachers"] == 2 * split.held_params
    assert filling["work of a layer"] == together["teaching"]["work of a layer"]
