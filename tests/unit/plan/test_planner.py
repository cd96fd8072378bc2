"""Plans of whole jobs: steps, FLOPs, time and disk against arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from babyllama_ds.corpus.prepare import open_corpus, prepare_corpus
from babyllama_ds.corpus.windows import TrainWindows
from babyllama_ds.engine.muon import layer_matrices, orthogonalised
from babyllama_ds.errors import JobError, MachineError, ModelError
from babyllama_ds.models.recomputing import recompute_layers
from babyllama_ds.models.sizes import meta_model
from babyllama_ds.plan import shapes
from babyllama_ds.plan.machines import CARDS, USABLE, UTILISATION, Machine
from babyllama_ds.plan.planned import Plan, Question
from babyllama_ds.plan.planner import plan_job
from babyllama_ds.plan.rates import Rate
from babyllama_ds.plan.text import plan_as_json, render_plan
from babyllama_ds.plan.traced import NotTracedError
from babyllama_ds.report.formatting import duration
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.store import Store
from babyllama_ds.training.meter import flops_per_token

Job = Callable[..., JobSpec]
ON_CPU = "deepspeed.device=cpu"


# -- work ------------------------------------------------------------------------------------------


def test_steps_tokens_and_flops(nursery: Job, tmp_path: Path) -> None:
    job = nursery(
        ON_CPU,
        "student.training.epochs=2",
        "student.training.warmup_steps=1",
        "control=null",
    )
    plan = plan_job(job, Question(tokens=64 * 101, runs=tmp_path))
    assert plan.work.num_windows == 100  # one is spared for random offsets
    stages = {stage.name: stage for stage in plan.work.stages}
    assert list(stages) == ["teachers/gpt2", "teachers/llama", "student"]
    student = stages["student"]
    assert student.steps == 8  # 4 of 32 windows an epoch, the last one short
    assert student.tokens == 8 * 32 * 64
    assert student.flops.training == student.tokens * 3 * student.sizes.forward_flops(64, 800)
    teachers = sum(teacher.sizes.forward_flops(64, 800) for teacher in plan.work.teachers)
    assert student.flops.teachers == student.tokens * teachers
    assert stages["teachers/gpt2"].flops.teachers == 0


def test_evaluations_are_counted(nursery: Job, tmp_path: Path) -> None:
    job = nursery(
        ON_CPU,
        "corpus.words=4000",
        "corpus.dev_words=1000",
        "student.training.max_steps=7",
        "student.training.warmup_steps=1",
        "student.training.evaluate_every_steps=3",
        "student.training.evaluate_windows=5",
        "evaluation.dev_windows=8",
    )
    plan = plan_job(job, Question(runs=tmp_path))
    student = next(stage for stage in plan.work.stages if stage.name == "student")
    windows = 3 * 5 + 8  # after steps 3, 6 and 7; at the end
    assert student.flops.evaluation == windows * 64 * student.sizes.forward_flops(64, 800)


def test_no_more_development_windows_than_there_are(nursery: Job, tmp_path: Path) -> None:
    job = nursery(
        ON_CPU,
        "corpus.words=4000",
        "corpus.dev_words=1000",
        "student.training.evaluate_windows=1000",
        "evaluation.dev_windows=1000",
        "student.training.epochs=2",
        "student.training.warmup_steps=1",
        "control={training: {batch_windows: 64, epochs: 1.0, learning_rate: 1.0e-3}}",
    )
    plan = plan_job(job, Question(runs=tmp_path))
    assert plan.corpus.dev_tokens is not None
    available = plan.corpus.dev_tokens // 64
    assert 1 < available < 1000
    student, control = plan.work.stages[2:]
    a_window = 64 * student.sizes.forward_flops(64, 800)
    assert (
        student.flops.evaluation == (2 + 1) * available * a_window
    )  # after epochs, and at the end
    assert control.flops.evaluation == (1 + 1) * available * a_window
    assert control.tokens == -(-plan.work.num_windows // 64) * 64 * 64


def test_layers_that_are_computed_again_are_counted(nursery: Job, tmp_path: Path) -> None:
    """Against PyTorch's own count of a window's products.

    Those of the head are not made again; nor the last one of each layer, as the plan has it.
    """
    question = Question(tokens=64 * 101, runs=tmp_path)
    counts = {}
    for again in (False, True):
        job = nursery(ON_CPU, f"student.training.gradient_checkpointing={str(again).lower()}")
        student = plan_job(job, question).work.stages[2]
        model = meta_model(student.spec, 800, where="student").to_empty(device="cpu").train()
        model.set_attn_implementation("eager")
        if again:
            recompute_layers(model)
        with FlopCounterMode(display=False) as counter:
            ids_BS = torch.zeros(1, 64, dtype=torch.int64)
            model(input_ids=ids_BS, use_cache=False).logits.sum().backward()
        counts[again] = counter.get_total_flops()
        sizes = student.sizes
        spared = again * 64 * sizes.num_layers * 2 * sizes.hidden_size * sizes.intermediate_size
        # LLaMA turns positions into angles by a small product of its own, which is no layer's.
        planned = student.flops.training / student.tokens * 64
        assert planned == pytest.approx(counts[again] + spared, rel=1e-3)
    assert counts[True] > 1.2 * counts[False]


def test_muons_products_are_counted(nursery: Job, tmp_path: Path) -> None:
    """Against PyTorch's own count of an update's, of GPT-2's and LLaMA's matrices."""
    job = nursery(
        ON_CPU,
        "student.training.muon.learning_rate=0.02",
        "teachers.0.training.muon.learning_rate=0.02",
    )
    plan = plan_job(job, Question(tokens=64 * 101, runs=tmp_path))
    gpt2, llama, student, _ = plan.work.stages
    for stage in (gpt2, student):
        model = meta_model(stage.spec, 800, where="").to_empty(device="cpu")
        with FlopCounterMode(display=False) as counter:
            for matrix, _ in layer_matrices(model):
                orthogonalised(matrix.detach()[None], torch.float32)
        assert stage.flops.updates == stage.steps * counter.get_total_flops() > 0
    assert llama.flops.updates == 0
    before = plan_job(nursery(ON_CPU), Question(tokens=64 * 101, runs=tmp_path)).work.stages[2]
    assert student.flops.total - before.flops.total == student.flops.updates
    assert student.flops.steps - before.flops.steps == student.flops.updates
    table = render_plan(plan).split("\n\n")[1].splitlines()
    assert table[1].split()[-5:] == ["training", "teachers", "Muon", "evaluation", "all"]
    assert table[4].split()[-3] == f"{student.flops.updates / 1e12:.3g}"
    assert table[-1].split()[0] == "all"


def test_a_cache_runs_the_backbones_once(nursery: Job, tmp_path: Path) -> None:
    phases = "windows.offsets={phases: 2}"

    def teachers(cache: str) -> int:
        job = nursery(ON_CPU, phases, f"distillation.cache={cache}")
        plan = plan_job(job, Question(tokens=64 * 100, runs=tmp_path))
        return plan.work.stages[2].flops.teachers

    plan = plan_job(nursery(ON_CPU, phases), Question(tokens=64 * 100, runs=tmp_path))
    assert plan.work.distinct_windows == 2 * 99
    distinct, tokens = 2 * 99 * 64, plan.work.stages[2].tokens
    sizes = [teacher.sizes for teacher in plan.work.teachers]
    backbones = sum(one.backbone_flops(64) for one in sizes)
    heads = sum(one.head_flops(800) for one in sizes)
    assert teachers("none") == tokens * (backbones + heads)
    assert teachers("hidden") == distinct * backbones + tokens * heads
    assert teachers("topk") == distinct * (backbones + heads)


def test_where_each_node_keeps_its_own_the_plan_says_which_hold_what(
    nursery: Job, tmp_path: Path
) -> None:
    """As in the table of docs/storage.md."""
    changes = ("windows.offsets=fixed", "distillation.cache=hidden", "distillation.cache_tier=disk")
    question = Question(tokens=65_000, runs=tmp_path, ranks=(4,))
    shared, own = (
        plan_job(nursery(*changes, f"deepspeed.storage={storage}"), question)
        for storage in ("shared", "node")
    )
    assert {item.nodes for item in shared.disk} == {"one"}
    assert "node" not in render_plan(shared).partition("disk in ")[2].partition("assumptions")[0]
    assert plan_as_json(own)["disk_nodes"] == {
        "models": "every",
        "milestones": "every",
        "token shards": "every",
        "teacher cache": "every",
        "checkpoints (2, and one being written)": "first two",
    }
    assert plan_as_json(own)["disk_bytes"] == plan_as_json(shared)["disk_bytes"]
    table = render_plan(own).partition("disk of a node in ")[2].partition("assumptions")[0]
    rows = [" ".join(line.split()[-2:]) for line in table.strip().splitlines()[2:]]
    assert rows == ["every node"] * 3 + ["two nodes", "first node"]


def test_disk(nursery: Job, tmp_path: Path) -> None:
    job = nursery(ON_CPU, "windows.offsets=fixed", "distillation.cache=hidden")
    plan = plan_job(job, Question(tokens=64 * 100, runs=tmp_path))
    items = {item.name: item.bytes for item in plan.disk}
    gpt2, llama = (teacher.sizes.params for teacher in plan.work.teachers)
    student = plan.work.stages[2].sizes.params
    assert items["models"] == 2 * (gpt2 + llama + 2 * student)  # bf16; the control too
    assert items["token shards"] == 2 * 6_400
    assert items["teacher cache"] == 100 * 64 * (192 + 192) * 2
    assert items["checkpoints (2, and one being written)"] == 3 * 14 * llama
    fleeting = nursery(
        ON_CPU, "windows.offsets=fixed", "distillation={cache: hidden, cache_kept: false}"
    )
    plan = plan_job(fleeting, Question(tokens=64 * 100, runs=tmp_path))
    assert {item.name: item.bytes for item in plan.disk}["teacher cache"] == 0
    job = nursery(ON_CPU, "windows.offsets=fixed", "distillation.cache=topk")
    plan = plan_job(job, Question(tokens=64 * 100, runs=tmp_path))
    items = {item.name: item.bytes for item in plan.disk}
    assert items["teacher cache"] == 100 * 64 * 64 * (4 + 2)  # fp32 and a 16-bit id, k = 64


def test_milestones_on_the_disk(nursery: Job, tmp_path: Path) -> None:
    """As many as the training shows words for; the nursery's words are known before its tokens."""
    changes = ("corpus.words=1_000_000", "student.training.epochs=9.6", "control.milestones=[5]")
    plan = plan_job(nursery(ON_CPU, *changes), Question(runs=tmp_path))
    items = {item.name: item.bytes for item in plan.disk}
    student = plan.work.stages[2].sizes.params
    assert plan.corpus.train_words == 1_000_000
    assert items["milestones"] == 2 * student
    plan = plan_job(nursery(ON_CPU, *changes, "student.milestones=babylm"), Question(runs=tmp_path))
    items = {item.name: item.bytes for item in plan.disk}
    assert items["milestones"] == 2 * student * (10 + 1)
    assert "milestones" in render_plan(plan)


def test_what_options_add_to_the_disk(nursery: Job, tmp_path: Path) -> None:
    """A checkpoint of each kind; ids of 16 bits up to 65,536 tokens; text for development."""

    def items(*overrides: str) -> tuple[dict[str, int], Plan]:
        large = "student.model.num_layers=24"  # than which no teacher is larger
        job = nursery(ON_CPU, large, *overrides)
        plan = plan_job(job, Question(tokens=64 * 100, runs=tmp_path))
        return {item.name.split()[0]: item.bytes for item in plan.disk}, plan

    plain, plan = items()
    student = plan.work.stages[2].sizes
    assert plain["checkpoints"] == 3 * 14 * student.params
    averaged, _ = items("student.training.ema={decay: 0.9}")
    assert averaged["checkpoints"] == 3 * 18 * student.params
    muon, _ = items("student.training.muon={learning_rate: 0.02}")
    assert muon["checkpoints"] == 3 * (14 * student.params - 4 * student.backbone_weights)
    layers = "[{teacher: gpt2, teacher_layer: 1, student_layer: 1}]"
    matched, _ = items(f"distillation.hidden_matching={{weight: 0.5, layers: {layers}}}")
    matrix = plan.work.teachers[0].sizes.hidden_size * student.hidden_size
    assert matched["checkpoints"] == 3 * 14 * (student.params + matrix)
    for vocab_size, id_bytes in ((65_536, 2), (65_537, 4)):
        found, _ = items(f"tokenizer.vocab_size={vocab_size}")
        assert found["token"] == id_bytes * 6_400
    text = f"corpus={{kind: files, train: ['{tmp_path}/*'], split: {{kind: tail, fraction: 0.2}}}}"
    found, _ = items(text)
    assert found["token"] == 2 * (6_400 + 1_600)


def test_what_lies_on_the_disk_in_fp32_and_of_loaded_teachers(nursery: Job, tmp_path: Path) -> None:
    config = tmp_path / "fp32.json"
    config.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    GPT2Config(vocab_size=800, n_embd=64, n_layer=1, n_head=4).save_pretrained(tmp_path / "b")
    loaded = f"{{name: b, model: {{kind: pretrained, path: {tmp_path / 'b'}}}}}"
    large = "{name: a, model: {kind: gpt2, hidden_size: 512, num_layers: 8, num_heads: 8, "
    large += "max_positions: 64}, training: {batch_windows: 32, epochs: 1, learning_rate: 1e-3}}"
    layers = "[{teacher: b, teacher_layer: 1, student_layer: 1}]"

    def items(*overrides: str) -> tuple[dict[str, int], Plan]:
        job = nursery(ON_CPU, f"deepspeed.config={config}", *overrides)
        plan = plan_job(job, Question(tokens=64 * 100, runs=tmp_path))
        return {item.name.split()[0]: item.bytes for item in plan.disk}, plan

    found, plan = items(
        f"teachers=[{large}, {loaded}]",
        f"distillation.hidden_matching={{weight: 0.5, layers: {layers}}}",
    )
    a, b = (teacher.sizes.params for teacher in plan.work.teachers)
    student = plan.work.stages[1].sizes.params
    assert found["models"] == 4 * (a + b + 2 * student)
    assert found["checkpoints"] == 3 * 16 * a  # of the largest stage, which matches no layers
    found, _ = items("windows.offsets=fixed", "distillation.cache=hidden")
    assert found["teacher"] == 100 * 64 * (192 + 192) * 4


def test_time_at_a_measured_rate(nursery: Job, tmp_path: Path) -> None:
    text = f"corpus={{kind: files, train: ['{tmp_path}/*'], split: {{kind: tail, fraction: 0.2}}}}"
    question = Question(tokens=6_500, runs=tmp_path, rate=Rate(1_000, "tok/s"))
    plan = plan_job(nursery(ON_CPU, "control=null", text), question)
    student = plan.work.stages[2]
    one, two = plan.counts[0].seconds, plan.counts[1].seconds
    assert one is not None
    assert two is not None
    assert student.flops.evaluation > 0  # at the same FLOPs a second, and not of the rate's tokens
    trained = student.flops.training + student.flops.teachers
    evaluated = student.tokens / 1_000 * student.flops.evaluation / trained
    assert one["student"] == pytest.approx(student.tokens / 1_000 + evaluated)
    assert two["student"] == pytest.approx(one["student"] / 2)
    said = "speed: 1,000 tokens/s of the student's training, for each rank; "
    assert said + "other stages by their FLOPs" in plan.assumptions
    per_flop = one["student"] / student.flops.total
    assert one["teachers/gpt2"] == pytest.approx(plan.work.stages[0].flops.total * per_flop)


@pytest.mark.parametrize("cache", ["none", "hidden", "topk"])
def test_a_rate_is_that_of_the_steps(cache: Any, nursery: Job, tmp_path: Path) -> None:
    """As a run prints it, whose meter counts what its steps compute: no filling of a cache."""
    job = nursery(ON_CPU, "windows.offsets={phases: 2}", f"distillation.cache={cache}")
    question = Question(tokens=6_500, runs=tmp_path, rate=Rate(1_000, "tok/s"), ranks=(1,))
    plan = plan_job(job, question)
    (seconds,) = (count.seconds for count in plan.counts)
    assert seconds is not None
    teachers = [teacher.sizes for teacher in plan.work.teachers]
    student, control = plan.work.stages[2:]
    a_token = flops_per_token(student.sizes, teachers, length=64, vocab_size=800, cache=cache)
    assert seconds["control"] == pytest.approx(control.flops.total / (1_000 * a_token))
    assert seconds["student"] == pytest.approx(student.flops.total / (1_000 * a_token))


def test_time_and_room_of_a_named_card(nursery: Job, tmp_path: Path) -> None:
    plan = plan_job(nursery(), Question(tokens=6_500, runs=tmp_path, gpu="rtx 3090"))
    assert (plan.machine.name, plan.machine.device) == ("RTX3090", "cuda")
    assert plan.usable_bytes(8) == int(24 * 2**30 * USABLE)
    seconds = plan.counts[0].seconds
    assert seconds is not None
    student = plan.work.stages[2]
    assert seconds["student"] == pytest.approx(student.flops.total / (71e12 * UTILISATION))
    assert all(plan.fits(count) for count in plan.counts)


def test_no_speed_no_time(nursery: Job, tmp_path: Path) -> None:
    plan = plan_job(nursery(ON_CPU), Question(tokens=6_500, runs=tmp_path))
    assert {count.seconds for count in plan.counts} == {None}
    assert "time: not known; name a card with --gpu or give a measured --rate" in plan.assumptions


def test_fine_tuning_is_not_planned_and_that_is_told(nursery: Job, tmp_path: Path) -> None:
    asked = "evaluation.fine_tuning=[{name: glue, path: nowhere}]"
    with_it, without = (
        plan_job(nursery(*more, ON_CPU), Question(tokens=6_500, runs=tmp_path))
        for more in ((asked,), ())
    )
    (told,) = set(with_it.assumptions) - set(without.assumptions)
    assert told.startswith("fine-tuning: left out of FLOPs, time and memory")


def test_a_card_has_no_speed_in_fp32(nursery: Job, tmp_path: Path) -> None:
    config = tmp_path / "fp32.json"
    config.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    job = nursery(f"deepspeed.config={config}")
    plan = plan_job(job, Question(tokens=6_500, runs=tmp_path, gpu="H100"))
    assert plan.precision == "fp32"
    assert {count.seconds for count in plan.counts} == {None}
    assert "time: not known; a card's peak is that of bf16, give a measured --rate" in (
        plan.assumptions
    )
    assert not any(line.startswith("speed:") for line in plan.assumptions)


# -- memory that `auto` settles --------------------------------------------------------------------

CACHED = ("windows.offsets=fixed", "distillation.cache=hidden")


def test_micro_batch_auto_is_the_most_that_fits(
    nursery: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plans of every micro-batch that could be asked for."""

    def planned(micro: str, gpu: str | None = "H100") -> Plan:
        # Batches so large that the training's peaks are above those of evaluations.
        job = nursery(f"student.training.micro_batch={micro}", "student.training.batch_windows=480")
        return plan_job(job, Question(tokens=65_000, runs=tmp_path, gpu=gpu, ranks=(1, 2)))

    peaks = {n: planned(str(n)).counts[0].memory["student"].peak_bytes for n in (1, 120, 160, 240)}
    between = (peaks[120] + peaks[160]) // 2
    room = {1: between, 2: peaks[240]}
    monkeypatch.setattr(Machine, "usable_bytes", lambda _self, ranks: room[ranks])
    plan = planned("auto")
    assert plan.counts[0].micro_batches["student"] == 120
    assert plan.counts[0].memory["student"].peak_bytes == peaks[120]
    assert "student" not in plan.too_large(plan.counts[0])
    assert "micro-batch of student: auto, the most that fit: 120 (ranks 1), 240 (ranks 2)" in (
        plan.assumptions
    )
    monkeypatch.setattr(Machine, "usable_bytes", lambda _self, ranks: peaks[1] - 1)
    plan = planned("auto")
    assert plan.counts[0].micro_batches["student"] == 1
    assert "student" in plan.too_large(plan.counts[0])


def test_micro_batch_auto_where_nothing_is_to_fit(nursery: Job, tmp_path: Path) -> None:
    job = nursery(ON_CPU, "student.training.micro_batch=auto")
    plan = plan_job(job, Question(tokens=65_000, runs=tmp_path, ranks=(2,)))
    share = job.student.training.batch_windows // 2
    assert plan.counts[0].micro_batches["student"] == share
    assert (
        "micro-batch of student: auto, the rank's whole share: no machine was named: "
        f"{share}" in plan.assumptions
    )


def test_a_cache_of_tier_auto_goes_where_it_fits(
    nursery: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CARDS, "TINY", (1, 1.0))
    # Two teachers, each with 192 numbers of two bytes for every token.
    small, large = 64 * 100, 64 * 16_000

    def planned(tokens: int, gpu: str | None, *overrides: str) -> Plan:
        question = Question(tokens=tokens, runs=tmp_path, gpu=gpu, ranks=(2,))
        return plan_job(nursery(*CACHED, *overrides), question)

    on_card = planned(small, "TINY")
    assert on_card.counts[0].cached == {"device": small * 2 * 192 * 2}
    student = on_card.counts[0].memory["student"]
    assert student.moments["forward"]["teacher cache"] == small * 2 * 192 * 2
    assert student.host_cache_bytes == 0
    # Of 942 MiB that are usable 205 are spared: one teacher's 375 MiB find room, not the second's.
    both = planned(large, "TINY")
    assert both.counts[0].cached == {"device": large * 192 * 2, "host": large * 192 * 2}
    student = both.counts[0].memory["student"]
    assert student.moments["forward"]["teacher cache"] == large * 192 * 2
    assert student.host_cache_bytes == 2 * large * 192 * 2  # a copy for each of two ranks
    assert both.counts[0].memory["control"].host_cache_bytes == 0
    text = render_plan(both)
    assert "teacher cache in host memory, all ranks" in text
    assert (
        "teacher cache: tier auto, the first that fits: device and host; "
        "enough room on the disk and in the host's memory" in text
    )
    # Nor do 18 bytes for each parameter of a deep student leave room beside what is spared.
    deep = planned(small, "TINY", "student.model.num_layers=320")
    assert 18 * deep.work.stages[2].sizes.params > (942 - 205) * 2**20
    assert deep.counts[0].cached == {"host": small * 2 * 192 * 2}
    asked = planned(small, "TINY", "distillation.cache_tier=host").counts[0]
    assert asked.memory["student"].moments["forward"]["teacher cache"] == 0
    assert asked.memory["student"].host_cache_bytes == 2 * small * 2 * 192 * 2


def test_a_cache_that_lies_elsewhere_takes_no_room_from_the_next(
    nursery: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first teacher's cache is too large for the memory that computes, the second's is not."""
    monkeypatch.setitem(CARDS, "TINY", (1, 1.0))
    wide, tokens = "teachers.gpt2.model.hidden_size=384", 64 * 16_000
    large, small = tokens * 384 * 2, tokens * 192 * 2
    question = Question(tokens=tokens, runs=tmp_path, gpu="TINY", ranks=(1,))
    on_card = plan_job(nursery(*CACHED, wide), question).counts[0]
    assert on_card.cached == {"host": large, "device": small}
    monkeypatch.setattr(Machine, "usable_bytes", lambda _self, ranks: (large + small) // 2 * 5 // 4)
    question = replace(question, gpu=None)
    on_cpu = plan_job(nursery(ON_CPU, *CACHED, wide), question).counts[0]
    assert on_cpu.cached == {"disk": large, "host": small}


def test_a_cache_of_tier_auto_on_a_cpu(
    nursery: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's memory is what the ranks compute in; what it has no room for is read from disk."""
    job = nursery(ON_CPU, *CACHED)
    question = Question(tokens=6_400, runs=tmp_path, ranks=(1,))
    count = plan_job(job, question).counts[0]
    assert count.cached == {"host": 6_400 * 2 * 192 * 2}
    assert count.memory["student"].moments["forward"]["teacher cache"] == 6_400 * 2 * 192 * 2
    assert count.memory["student"].host_cache_bytes == 0
    asked = nursery(ON_CPU, *CACHED, "distillation.cache_tier=device")
    assert plan_job(asked, question).counts[0].cached == count.cached
    monkeypatch.setattr(Machine, "usable_bytes", lambda _self, ranks: 2_000_000)
    count = plan_job(job, question).counts[0]
    assert count.cached == {"disk": 6_400 * 2 * 192 * 2}
    assert count.memory["student"].moments["forward"]["teacher cache"] == 0


def test_what_options_change_in_memory(nursery: Job, tmp_path: Path) -> None:
    """Each of them reaches the student's memory, and no other stage's."""

    def planned(*overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
        question = Question(tokens=65_000, runs=tmp_path, gpu="H100", ranks=(1,))
        job = nursery("control.training=null", "windows.offsets=fixed", *overrides)
        memory = plan_job(job, question).counts[0].memory
        return memory["student"].moments, memory["teachers/llama"].moments

    plain, of_teacher = planned()
    job = nursery("windows.offsets=fixed")
    work = plan_job(job, Question(tokens=65_000, runs=tmp_path)).work
    student, teachers = work.stages[2].sizes, [one.sizes for one in work.teachers]
    e, windows = 2, job.student.training.batch_windows
    assert plain["forward"]["teachers"] == e * sum(one.params for one in teachers)
    assert plain["forward"]["moments, fp32"] == 2 * 4 * student.params
    assert plain["forward"]["moving average, fp32"] == 0
    assert plain["forward"]["states of matched layers"] == 0
    assert of_teacher["forward"]["teachers"] == 0
    assert "cache" not in plain

    averaged, _ = planned("student.training.ema={decay: 0.9}")
    assert averaged["forward"]["moving average, fp32"] == 4 * student.params
    muon, _ = planned("student.training.muon={learning_rate: 0.02}")
    numbers = 2 * student.params - student.backbone_weights
    assert muon["forward"]["moments, fp32"] == 4 * numbers
    again, _ = planned("student.training.gradient_checkpointing=true")
    assert again["forward"]["activations"] < plain["forward"]["activations"] / 2

    layers = "[{teacher: gpt2, teacher_layer: 1, student_layer: 1}]"
    matched, other = planned(f"distillation.hidden_matching={{weight: 0.5, layers: {layers}}}")
    matrix = teachers[0].hidden_size * student.hidden_size
    assert matched["forward"]["parameters"] == e * (student.params + matrix)
    assert other == of_teacher
    chunked, other = planned("distillation.chunk_tokens=16")
    # Of the student and of the sum of its teachers, whose votes are equal.
    assert chunked["forward"]["logits of a chunk"] == 16 * 800 * 2 * e
    assert other == of_teacher
    wider, _ = planned("evaluation.batch_tokens=640")
    assert wider["evaluation"]["logits of a chunk"] == 640 * 800 * e

    hidden, other = planned("distillation.cache=hidden")
    assert hidden["forward"]["teachers"] == e * sum(one.head_weights for one in teachers)
    assert hidden["cache"]["teachers"] == e * max(one.params for one in teachers)
    assert other == of_teacher
    top_k, _ = planned("distillation.cache=topk")
    assert top_k["forward"]["teachers"] == 0
    assert top_k["cache"]["teachers"] == e * sum(one.params for one in teachers)
    assert windows * 64 * 800 * (e + 2 * 4) == top_k["forward"]["logits of a chunk"]
    of_documents = ("corpus.documents=lines", "windows.attention=document")
    apart, _ = planned("student.model.attention=eager", *of_documents)
    inside, _ = planned("student.model.attention=eager")
    assert apart["backward"]["work of a layer"] > inside["backward"]["work of a layer"]


def test_what_else_changes_in_memory(nursery: Job, tmp_path: Path) -> None:
    """Micro-batches, windows, matched layers and split teachers, each by what it is made of."""

    def planned(*overrides: str, ranks: int = 1) -> Plan:
        changes = ("control=null", "student.training.micro_batch=8", *overrides)
        question = Question(tokens=65_000, runs=tmp_path, gpu="H100", ranks=(ranks,))
        return plan_job(nursery(*changes), question)

    def forward(plan: Plan) -> dict[str, int]:
        return dict(plan.counts[0].memory["student"].moments["forward"])

    whole = planned("student.training.batch_windows=8")
    student = whole.work.stages[2].sizes
    assert forward(whole)["gradients, fp32"] == 0
    assert forward(planned())["gradients, fp32"] == 4 * student.params  # of three micro-batches
    short, long = (
        forward(planned(f"windows.length={n}"))["teachers' hidden states"] for n in (32, 64)
    )
    assert long == 2 * short == 8 * 64 * 2 * (192 + 192)

    narrow = "teachers.gpt2.model.hidden_size=96"
    layer = "[{teacher: gpt2, teacher_layer: 1, student_layer: 1}]"
    for loss, in_fp32 in (("mse", 2), ("cosine", 3)):
        matching = f"{{weight: 0.5, loss: {loss}, layers: {layer}}}"
        plan = planned(narrow, f"distillation.hidden_matching={matching}")
        a_position = 2 * (96 + student.hidden_size) + in_fp32 * 4 * 96
        assert forward(plan)["states of matched layers"] == 8 * 64 * a_position
        trained = student.params + 96 * student.hidden_size
        assert forward(plan)["parameters"] == 2 * trained

    split = "teachers.llama.tensor_parallel=2"
    backbone = whole.work.teachers[1].sizes.backbone_weights
    for cache, moment in (("none", "forward"), ("topk", "cache")):
        changes = ("windows.offsets=fixed", f"distillation.cache={cache}")
        one, two = (
            planned(*changes, *more, ranks=2).counts[0].memory["student"].moments[moment]
            for more in ((), (split,))
        )
        assert one["teachers"] - two["teachers"] == 2 * (backbone - backbone // 2)


def test_an_attention_that_a_cpu_lacks_is_refused(nursery: Job, tmp_path: Path) -> None:
    question = Question(tokens=6_500, runs=tmp_path, ranks=(1,))
    with pytest.raises(MachineError, match=r"student\.model\.attention: got "):
        plan_job(nursery(ON_CPU, "student.model.attention=flash_attention_2"), question)


# -- ranks -----------------------------------------------------------------------------------------


def test_rank_counts_that_do_not_divide_the_batch_are_told(nursery: Job, tmp_path: Path) -> None:
    job = nursery(ON_CPU, "student.training.batch_windows=6")
    plan = plan_job(job, Question(tokens=6_500, runs=tmp_path))
    assert [count.impossible is None for count in plan.counts] == [True, True, False, False]
    assert plan.counts[2].impossible == (
        "student.training.batch_windows: got 6 windows for 4 ranks, expected a multiple of 4"
    ).replace("got ", "")
    assert "–" in render_plan(plan)
    with pytest.raises(JobError, match=r"--ranks: got 4, 8, expected at least one number"):
        plan_job(job, Question(tokens=6_500, runs=tmp_path, ranks=(4, 8)))


def test_ranks_are_taken_in_groups_of_every_split_teacher(nursery: Job, tmp_path: Path) -> None:
    """Of the second of two loaded ones, which 2 and 4 ranks can share, and 1 and 3 cannot."""
    LlamaConfig(
        vocab_size=800, hidden_size=64, intermediate_size=96, num_hidden_layers=1
    ).save_pretrained(tmp_path / "a")
    loaded = f"model: {{kind: pretrained, path: {tmp_path / 'a'}}}"
    teachers = f"teachers=[{{name: a, {loaded}}}, {{name: b, {loaded}, tensor_parallel: 2}}]"
    sizes = ("student.training.batch_windows=24", "student.training.micro_batch=2")
    question = Question(tokens=65_000, runs=tmp_path, ranks=(1, 2, 3, 4))
    plan = plan_job(nursery(ON_CPU, teachers, "control=null", *sizes), question)
    refused = "teachers.b.tensor_parallel: 2 with {}, expected a divisor of the number of ranks: "
    assert [count.impossible for count in plan.counts] == [
        refused.format("1 rank") + "each is in one group",
        None,
        refused.format("3 ranks") + "each is in one group",
        None,
    ]


def test_a_stage_fits_to_the_last_byte(
    nursery: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On so many ranks as share the memory; the hungriest is the one that needs most."""
    plan = plan_job(nursery(ON_CPU), Question(tokens=6_500, runs=tmp_path, ranks=(1, 2)))
    one, two = plan.counts
    peaks = {name: memory.peak_bytes for name, memory in two.memory.items()}
    assert peaks[two.hungriest] == max(peaks.values()) > min(peaks.values())
    room = {1: 1, 2: peaks[two.hungriest]}
    monkeypatch.setattr(Machine, "usable_bytes", lambda _self, ranks: room[ranks])
    assert (plan.fits(one), plan.fits(two)) == (False, True)
    room[2] -= 1
    assert plan.too_large(two) == [two.hungriest]


def test_what_a_run_would_refuse_is_not_planned(nursery: Job, tmp_path: Path) -> None:
    question = Question(tokens=6_500, runs=tmp_path, ranks=(2,))
    long = nursery(ON_CPU, "student.training.warmup_steps=100")
    with pytest.raises(JobError, match=r"student\.training\.warmup_steps: got 100, expected fewer"):
        plan_job(long, question)
    GPT2Config(vocab_size=800, n_embd=64, n_layer=1, n_head=4).save_pretrained(tmp_path / "b")
    loaded = f"{{kind: pretrained, path: {tmp_path / 'b'}}}"
    split = nursery(ON_CPU, f"teachers=[{{name: b, model: {loaded}, tensor_parallel: 2}}]")
    with pytest.raises(ModelError, match=r"teachers\.b\.tensor_parallel: got 2 for a model of "):
        plan_job(split, question)


def test_a_family_without_fused_attention_is_planned_with_eager(
    nursery: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = Question(tokens=6_500, runs=tmp_path, gpu="H100", ranks=(1,))
    fused, eager = (
        plan_job(nursery(f"student.model.attention={kernel}"), question).counts[0]
        for kernel in ("auto", "eager")
    )
    monkeypatch.setattr(shapes, "absent_kernels", lambda *_, **__: frozenset({"sdpa"}))
    without = plan_job(nursery(), question).counts[0]
    assert without.memory["student"] == eager.memory["student"] != fused.memory["student"]


# -- text ------------------------------------------------------------------------------------------


def test_the_text_says_what_it_is_about(nursery: Job, tmp_path: Path) -> None:
    question = Question(tokens=6_500, runs=tmp_path, gpu="H100", ranks=(1, 2))
    text = render_plan(plan_job(nursery(), question))
    assert text.startswith("plan of nursery-1 on cuda, bf16, H100 (80 GiB)\n")
    for wanted in (
        "corpus: about 6.50 k training tokens, 100 windows of 64 an epoch, vocabulary 800",
        "861,312",
        "memory of a rank in MiB",
        "peak of student",
        "assumptions\n  tokens: 6,500 training tokens, as given by --tokens",
        "20% of the H100's 989 TFLOP/s",
    ):
        assert wanted in text
    assert max(map(len, text.splitlines())) <= 120


def test_every_number_of_the_text_has_its_unit(
    nursery: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row at a time against what the plan holds, each column of its own rank count."""
    monkeypatch.setitem(CARDS, "TINY", (1, 1.0))
    changes = ("windows.offsets=fixed", "distillation.cache=hidden", "distillation.cache_tier=host")
    question = Question(tokens=6_500, runs=tmp_path, gpu="TINY", ranks=(1, 4))
    plan = plan_job(nursery(*changes), question)
    one, four = plan.counts
    rows = {
        name.strip(): cells
        for line in render_plan(plan).splitlines()
        for name, *cells in [re.split(r" {2,}", line.strip())]
    }
    mib = [f"{count.memory['student'].peak_bytes / 2**20:,.1f}" for count in (one, four)]
    assert rows["peak of student"] == mib
    assert mib[0] != mib[1]
    host = [max(memory.host_bytes for memory in count.memory.values()) for count in (one, four)]
    assert rows["host memory of rank 0"] == [f"{b / 2**20:,.1f}" for b in host]
    cache = 101 * 64 * 2 * 192 * 2  # of which every rank has its copy
    assert rows["teacher cache in host memory, all ranks"] == [
        f"{n * cache / 2**20:,.1f}" for n in (1, 4)
    ]
    assert rows["fits"] == ["yes", "yes"]
    assert rows["models"][-1] == rows["teacher cache"][-1] == "stays"
    assert rows["checkpoints (2, and one being written)"][-1] == "while training"
    work, times = (part.splitlines() for part in render_plan(plan).split("\n\n")[1:3])
    tera = sum(stage.flops.total for stage in plan.work.stages) / 1e12
    assert 1 < tera < 10
    assert work[0] == "work, matrix products in TFLOP"
    assert work[-1].split() == ["all", f"{tera:.2f}"]
    assert one.seconds is not None
    assert times[-1].split()[:2] == ["all", duration(sum(one.seconds.values())).split()[0]]
    monkeypatch.setattr(Machine, "usable_bytes", lambda _self, ranks: 1)
    assert re.search(r"fits +NO +NO", render_plan(plan))


def test_the_json_holds_the_same(nursery: Job, tmp_path: Path) -> None:
    plan = plan_job(nursery(), Question(tokens=6_500, runs=tmp_path, gpu="H100", ranks=(1, 2)))
    data = json.loads(json.dumps(plan_as_json(plan)))
    assert data["models"]["student"] == 861_312
    assert data["ranks"]["2"]["fits"] is True
    stage = data["ranks"]["1"]["stages"]["student"]
    assert stage["peak_bytes"] == plan.counts[0].memory["student"].peak_bytes
    assert stage["peak_bytes"] == sum(stage["moments"][stage["peak"]].values())
    flops = plan.work.stages[2].flops
    assert data["stages"]["student"]["flops"] == {
        "training": flops.training,
        "teachers": flops.teachers,
        "updates": 0,
        "evaluation": flops.evaluation,
    }
    assert data["ranks"]["2"]["seconds"] == plan.counts[1].seconds
    assert set(data["models"]) == {"gpt2", "llama", "student", "control"}
    phased = nursery("windows.offsets={phases: 3}")
    question = Question(tokens=6_500, runs=tmp_path)
    data = plan_as_json(plan_job(phased, question))
    assert data["corpus"]["distinct_windows"] == 3 * data["corpus"]["windows"]
    assert {count["fits"] for count in data["ranks"].values()} == {None}  # nobody asked where


# -- the real windows ------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", ["fixed", "random", "{phases: 3}"])
def test_windows_are_those_of_training(offsets: str, nursery: Job, tmp_path: Path) -> None:
    job = nursery(
        ON_CPU,
        f"windows.offsets={offsets}",
        "corpus.words=4000",
        "corpus.dev_words=1000",
        "tokenizer.vocab_size=400",
    )
    corpus = open_corpus(prepare_corpus(job, Store(tmp_path / "store"), lambda: None))
    spec = job.windows
    real = TrainWindows(corpus.shards, length=spec.length, offsets=spec.offsets, seed=5)
    assert plan_job(job, Question(runs=tmp_path)).work.num_windows == real.num_windows


# -- objectives ------------------------------------------------------------------------------------


def test_what_an_objective_asks_for_is_planned(nursery: Job, tmp_path: Path) -> None:
    """Teachers 192 wide, a student 128: two matrices; a divergence with two more work spaces."""
    layers = ", ".join(
        f"{{teacher: {name}, teacher_layer: 2, student_layer: 2}}" for name in ("gpt2", "llama")
    )
    question = Question(tokens=64 * 100, runs=tmp_path, gpu="H100", ranks=(1,))
    plain = plan_job(nursery(), question)
    rich = plan_job(
        nursery(
            f"distillation.hidden_matching={{weight: 1, layers: [{layers}]}}",
            "distillation.divergence={kind: jensen_shannon}",
        ),
        question,
    )
    items = [plan.counts[0].memory["student"].moments["forward"] for plan in (plain, rich)]
    matrices = 2 * 192 * 128
    assert items[1]["parameters"] - items[0]["parameters"] == 2 * matrices
    assert items[1]["states of matched layers"] > items[0]["states of matched layers"] == 0
    assert items[1]["logits of a chunk"] > items[0]["logits of a chunk"]
    for name in ("teachers/gpt2", "control"):
        assert rich.counts[0].memory[name] == plain.counts[0].memory[name]


@pytest.mark.parametrize(
    ("words", "models", "spaces"),
    [
        ((), 2, 0),
        (("distillation.divergence={kind: reverse_kl}",), 2, 5),
        (("distillation.cache=topk", "windows.offsets=fixed"), 1, 2),
    ],
)
def test_the_kernels_work_takes_no_room(
    words: tuple[str, ...], models: int, spaces: int, nursery: Job, tmp_path: Path
) -> None:
    """On a card: logits of the student and of the teachers' sum, and what the loss works in."""
    job = nursery("distillation.chunk_tokens=16", *words)
    question = Question(tokens=64 * 100, runs=tmp_path, gpu="H100", ranks=(1,))
    (count,) = plan_job(job, question).counts
    chunk = {
        stage: count.memory[stage].moments["forward"]["logits of a chunk"]
        for stage in ("student", "control")
    }
    vocab, tokens = 800, 64 * count.micro_batches["control"]
    assert chunk == {
        "student": 16 * vocab * (2 * models + 4 * spaces),
        "control": tokens * vocab * 2,
    }


# -- other families --------------------------------------------------------------------------------


def test_models_of_other_families_are_run_on_shapes_or_said_to_be_estimates(
    nursery: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Qwen2Config(
        vocab_size=800,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(tmp_path / "qwen")
    path = f"{{kind: pretrained, path: {tmp_path / 'qwen'}}}"
    job = nursery(f"student.model={path}", "control=null", f"teachers=[{{name: q, model: {path}}}]")
    question = Question(tokens=65_000, runs=tmp_path / "runs", ranks=(1,))
    plan = plan_job(job, question)
    (of_teacher,) = [line for line in plan.assumptions if line.startswith("memory of")]
    assert of_teacher.startswith("memory of q, teachers of other families: while they compute")
    exact = plan.counts[0].memory["student"].moments["forward"]["activations"]

    def refuse(*_: Any, **__: Any) -> int:
        raise NotTracedError

    monkeypatch.setattr("babyllama_ds.plan.activations.kept_bytes", refuse)
    plan = plan_job(job, question)
    said, _ = [line for line in plan.assumptions if line.startswith("memory of")]
    assert said.startswith("memory of student: activations of qwen2 counted as those of a LLaMA")
    assert plan.counts[0].memory["student"].moments["forward"]["activations"] < exact


@pytest.mark.parametrize(
    ("override", "where", "hint"),
    [
        ("deepspeed.config=zero2_cup", "zero2_cup", "did you mean `zero2_cpu`?"),
        ("deepspeed.config=no/such.json", "no/such.json", "paths are relative to"),
        ("control={training: {batch_windows: 4, epochs: 9, learning_rate: 1, muon: {}}}",
         "control.training.muon", "longer than the step"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_told_as_what_it_is(
    nursery: Job, tmp_path: Path, override: str, where: str, hint: str
) -> None:
    """Once, and not as numbers of ranks that the job cannot be cut for."""
    job = nursery(ON_CPU, "deepspeed.config=zero2_offload", override)
    with pytest.raises(JobError) as caught:
        plan_job(job, Question(tokens=64 * 1000, runs=tmp_path))
    (problem,) = caught.value.problems
    assert problem.where == where
    assert hint in (problem.hint or "")


def test_more_cached_tokens_than_the_vocabulary_has_are_refused_as_a_run_would(
    nursery: Job, tmp_path: Path
) -> None:
    job = nursery(
        "distillation.cache=topk", "windows.offsets=fixed", "distillation.cache_top_k=1024"
    )
    with pytest.raises(JobError, match=r"cache_top_k: got 1024, expected at most .* 800 tokens"):
        plan_job(job, Question(tokens=64 * 1000, runs=tmp_path))
