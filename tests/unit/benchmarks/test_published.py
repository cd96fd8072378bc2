"""The bench at the published sizes, with sides that only say what they would have measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench  # noqa: E402 - found by the line above
import inside  # noqa: E402
import published  # noqa: E402
import race  # noqa: E402
from workloads import Workload  # noqa: E402

STUB = """
import json, sys, time

told = json.loads(sys.argv[1])
side = told["kind"] + ("/" + told["precision"] if told["kind"] == "textbook" else "")
side += "/cache" if told["cache"] else ""
table = json.loads(open(TABLE).read())
mine = table.get(side, {})
print(json.dumps({"here": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == mine.get("dies_at"):
        sys.exit("a bad day")
    if asked["do"] == "turns":
        time.sleep(mine.get("sleeps", 0))
    if asked["do"] == "turns" and asked["micro"] >= mine.get("no_memory_from", 10**9):
        answer = {"error": "out of memory", "memory": True}
    elif asked["do"] == "build":
        answer = {"found": {"first_loss": mine.get("first_loss", 3.0), "cache_bytes": 100}}
    elif asked["do"] == "turns":
        step_s = mine.get("step_s", 1.0)
        answer = {"found": {"step_s": [step_s] * max(1, asked["turns"]), "steps": 1,
                            "memory": {"peak_bytes": mine.get("peak_bytes", 1000)}}}
    elif asked["do"] == "rate":
        answer = {"found": {"square": 2e12, "same_shapes": 1e12}}
    elif asked["do"] == "breakdown":
        answer = {"found": {"loss": 0.5}}
    else:
        longest = [{"name": "nvjet", "times": 2.0, "ms": 1.5, "share": 0.5}]
        kinds = {"matrix products": {"ms": 1.5, "share": 0.5}}
        answer = {"found": {"idle_share": 0.25, "kernels_per_step": 3.0, "kinds": kinds,
                            "longest": longest}}
    print(json.dumps(answer), flush=True)
"""


class Stage:
    """Where stubs stand for the sides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "published.json"

    def run(
        self,
        table: dict[str, Any],
        *,
        seconds: float | None = None,
        rounds: int = 2,
        device: str = "cpu",
    ) -> dict[str, Any]:
        """What is on the disk after group `babyllama` in small; of a card, after all its groups."""
        (self.folder / "table.json").write_text(json.dumps(table))
        compiled = device == "cuda"
        todo = published.groups(
            ["babyllama"], device=device, windows=None, tiny=True, compiled=compiled
        )
        todo = todo if device == "cuda" else todo[:1]
        record = published.Record(self.out, {})
        published.measure(todo, record, self.folder, rounds=rounds, seconds=seconds)
        found: dict[str, Any] = json.loads(self.out.read_text())
        return found


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    script = tmp_path / "contender.py"
    script.write_text(STUB.replace("TABLE", repr(str(tmp_path / "table.json"))))
    monkeypatch.setattr(race, "CONTENDER", script)
    return Stage(tmp_path)


# -- workloads -------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_papers() -> None:
    first, second = Workload("babyllama"), Workload("babyllama2")
    assert first.params() == {"student": 58_343_936, "gpt2": 704_928_768, "llama": 359_973_888}
    assert set(second.params().values()) == {345_355_200}
    assert (first.batch_windows, second.batch_windows) == (32, 128)
    assert (first.published_micro, second.published_micro) == (32, 32)
    assert (first.vocab_size, first.length) == (16_000, 128)
    assert first.distillation is not None
    assert second.distillation is not None
    assert (first.distillation.temperature, second.distillation.temperature) == (2.0, 1.0)


def test_a_model_alone_has_its_own_batch_and_no_teachers() -> None:
    alone = Workload("babyllama", "gpt2", distilled=False)
    assert (alone.name, alone.batch_windows, alone.published_micro) == ("babyllama/gpt2", 128, 8)
    assert not alone.teachers
    assert alone.distillation is None
    # Six FLOPs for each weight of a product, and attention's.
    length, width, layers = 128, 1536, 24
    weights = layers * 12 * width * width + 16_000 * width
    expected = 6 * weights + 12 * layers * length * width
    assert alone.work(cached=False).flops_per_token == expected


def test_another_batch_is_the_same_for_both_sides() -> None:
    todo = published.groups(
        ["babyllama", "alone"], device="cpu", windows=128, tiny=False, compiled=False
    )
    batches = {
        row.contender.work.name: row.contender.work.batch_windows
        for group in todo
        for row in group.rows
    }
    assert batches["babyllama@128"] == batches["babyllama/control@128"] == 128
    (main, *_) = todo
    assert {row.contender.work.batch_windows for row in main.rows} == {128}
    micros = {row.name: row.micros for row in main.rows}
    assert micros["ours"] == (128, 64, 32, 16)
    assert micros["textbook fp32"] == (32, 64, 128)
    assert micros["textbook fp32, as published"] == (32,)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sizes", "babyllama"], "--device cpu rehearses"),
        (["--sizes", "alone", "--device", "cpu", "--batch-windows", "48"], "a multiple of 32"),
        (["--sizes", "alone", "--device", "cpu", "--rows", "hers"], "360M alone: ours; textbook"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "argv", ["bench.py", *words, "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().out


# -- choosing --------------------------------------------------------------------------------------


class Fake:
    """Takes these seconds a step; no number: there is no room."""

    def __init__(self, step_s: dict[tuple[int, str | None], float | None]) -> None:
        self.step_s = step_s

    def steps(self, variant: race.Variant, *, turns: int, turn_s: float) -> dict[str, Any]:
        step_s = self.step_s[variant.micro, variant.attention]
        if step_s is None:
            raise race.NoMemoryError("out of memory")
        return {"step_s": [step_s]}


def test_attention_is_chosen_first_then_micro_batches_as_long_as_they_gain() -> None:
    fake: Any = Fake({(8, "sdpa"): 3.0, (8, "eager"): 4.0, (16, "sdpa"): 2.0, (32, "sdpa"): 2.5})
    best, tried = race.tuned(fake, ("sdpa", "eager"), (8, 16, 32, 64))
    assert best == race.Variant(16, "sdpa")
    assert len(tried) == 4


def test_what_has_no_room_is_passed_over() -> None:
    fake: Any = Fake({(128, None): None, (64, None): 2.0, (32, None): 3.0})
    best, tried = race.tuned(fake, (None,), (128, 64, 32))
    assert best == race.Variant(64)
    assert tried[0]["error"] == "out of memory"
    with pytest.raises(race.NoMemoryError):
        race.tuned(Fake({(2, None): None, (1, None): None}), (None,), (2, 1))  # type: ignore[arg-type]


# -- measuring -------------------------------------------------------------------------------------


def test_rows_and_keys(stage: Stage) -> None:
    found = stage.run(
        {
            "ours": {"step_s": 0.5, "peak_bytes": 600},
            "ours/cache": {"step_s": 0.25, "peak_bytes": 600},
            "textbook/fp32": {"step_s": 3.0},
            "textbook/autocast": {"step_s": 1.0, "first_loss": 3.2},
        }
    )
    rows, keys = found["workloads"]["babyllama"]["rows"], found["keys"]
    assert found["ended_by"] == "all measured"
    assert found["same_work"] == "yes"
    assert rows["ours"]["rounds_s"] == [0.5, 0.5]
    tokens = 4 * 32
    assert rows["ours"]["tokens_per_s"] == tokens / 0.5
    assert rows["ours"]["breakdown_s"] == {"loss": 0.5}
    assert "breakdown_s" not in rows["textbook fp32"]
    assert keys["babyllama: tokens_per_s_ratio"] == 6
    assert keys["babyllama: cached_tokens_per_s_ratio_autocast"] == 4
    assert keys["babyllama: tokens_per_s_ratio_published"] == 6
    assert keys["babyllama: mfu"] == 2 * keys["babyllama: mfu_square"]
    assert "| babyllama: tokens_per_s_ratio" in published.render(found)
    told = published.render_inside(found)
    assert "## babyllama: ours cached" in told
    assert "A step of 500.00 ms, of which the card idles 25%; 3 kernels." in told
    assert "`nvjet`" in told
    # The stubs' first 100 bytes are a cache.
    assert keys["babyllama: peak_memory_ratio"] == pytest.approx(0.5)
    assert found["aims"]["babyllama: tokens_per_s_ratio"] == "≥ 6"


def test_on_a_card_sides_are_built_together_and_compiled_ones_take_what_was_chosen(
    stage: Stage,
) -> None:
    found = stage.run(
        {"ours": {"no_memory_from": 4}, "textbook/autocast": {"dies_at": "build"}}, device="cuda"
    )
    rows = found["workloads"]["babyllama"]["rows"]
    assert found["groups_done"] == ["babyllama", "babyllama, compiled", "babyllama, further"]
    assert rows["ours"]["micro_batch"] == rows["ours compiled"]["micro_batch"] == 2
    assert [each.get("error") for each in rows["ours"]["tried"]] == ["out of memory", None]
    assert rows["ours compiled"]["tried"] == []
    assert "failed" in rows["textbook autocast"]
    # A trainer that is compiled anew at every call takes all its rounds in one.
    assert len(rows["textbook fp32 compiled"]["rounds_s"]) == 2
    assert len(rows["textbook fp32 in TF32"]["rounds_s"]) == 2


@pytest.mark.parametrize("moment", ["build", "turns", "profile"])
def test_a_side_that_dies_costs_its_own_row(stage: Stage, moment: str) -> None:
    found = stage.run({"ours": {"dies_at": moment}})
    rows = found["workloads"]["babyllama"]["rows"]
    assert rows["ours"]["failed"] == "it ended: a bad day"
    assert ("step_s" in rows["ours"]) == (moment == "profile")
    others = [facts for row, facts in rows.items() if row != "ours"]
    assert all(len(facts["rounds_s"]) == 2 for facts in others)
    assert found["ended_by"] == "all measured"


def test_a_side_without_memory_costs_its_own_row(stage: Stage) -> None:
    found = stage.run({"textbook/fp32": {"no_memory_from": 1}})
    rows = found["workloads"]["babyllama"]["rows"]
    assert rows["textbook fp32"]["failed"] == "out of memory"
    assert "step_s" in rows["textbook autocast"]
    assert "babyllama: tokens_per_s_ratio" not in found["keys"]


def test_a_cut_off_costs_what_comes_after(stage: Stage) -> None:
    found = stage.run({"textbook/autocast": {"sleeps": 60}}, seconds=8)
    assert found["ended_by"] == "time"
    rows = found["workloads"]["babyllama"]["rows"]
    assert rows["ours"]["tokens_per_s"] == rows["textbook fp32"]["tokens_per_s"] == 4 * 32
    assert "step_s" not in rows["textbook autocast"]
    assert found["seconds"] < 20


def test_what_is_measured_is_on_the_disk_at_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is when the second turn ends and nothing more is ever written."""
    saved = published.Record.save
    ends = 0

    def stop(self: published.Record) -> None:
        nonlocal ends
        saved(self)
        rows = self.workloads.get("babyllama", {}).get("rows", {})
        ends = sum("step_s" in facts for facts in rows.values())
        if ends == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(published.Record, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        stage.run({})
    rows = json.loads(stage.out.read_text())["workloads"]["babyllama"]["rows"]
    assert [row for row, facts in rows.items() if "step_s" in facts] == ["ours", "textbook fp32"]


def test_another_first_loss_is_told(stage: Stage) -> None:
    found = stage.run({"ours/cache": {"first_loss": 3.5}})
    assert list(found["same_work"]) == ["babyllama: ours cached"]


# -- inside ----------------------------------------------------------------------------------------


def test_a_course_counts_the_turns_alone() -> None:
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1

    course = inside.timed(torch.device("cpu"), warm=3, turns=2, turn_s=0.0)
    found = inside.run(course, step)
    assert taken == 3 + 3 * inside.TRIAL_STEPS
    assert len(found["step_s"]) == 2
    assert found["memory"]["peak_rss_bytes"] > 2**20


def test_time_in_which_something_runs() -> None:
    assert inside.covered([(10, 20), (15, 30), (40, 50), (41, 42), (45, 52)]) == 32


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("triton_per_fused__to_copy_mean_mul_pow_rsqrt_3", "compiled"),
        ("something_else", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert inside.kind_of(kernel) == kind


class Mark:
    """A CUDA event of a device that does nothing but tick: a second at every mark."""

    ticks = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Mark.ticks += 1
        self.at = Mark.ticks

    def elapsed_time(self, later: Mark) -> float:
        return 1000.0 * (later.at - self.at)


def test_parts_by_the_devices_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    parts = inside.Marked(torch.device("cuda"))
    for _ in range(2):
        with parts.part("loss"), parts.part("student forward"):
            pass  # a tick before it, one of its own, and one after it
        with parts.part("optimizer"):
            pass
    assert not waits
    parts.settle()
    assert len(waits) == 1
    told = {name: seconds for name, seconds in parts.seconds.items() if seconds}
    assert told == {"loss": 4.0, "student forward": 2.0, "optimizer": 2.0}


@dataclass
class Span:
    """What kineto tells of something that ran."""

    label: str
    start: int
    length: int
    on_card: bool = True
    annotation: bool = False

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.length

    def device_type(self) -> DeviceType:
        return DeviceType.CUDA if self.on_card else DeviceType.CPU

    def is_user_annotation(self) -> bool:
        return self.annotation


def test_kernels_of_a_card_and_the_time_in_which_none_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spans = [
        Span("nvjet_one", 10_000, 4_000),
        Span("nvjet_one", 12_000, 4_000),  # on another stream
        Span("vectorized_elementwise_kernel", 26_000, 4_000),
        Span("cudaLaunchKernel", 0, 90_000, on_card=False),
        Span("Optimizer.step#AdamW.step", 0, 90_000),
        Span("mine", 0, 90_000, annotation=True),
    ]

    @contextmanager
    def seen(activities: list[Any]) -> Iterator[Any]:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        results = SimpleNamespace(events=lambda: spans)
        yield SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))

    monkeypatch.setattr(inside, "profile", seen)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    steps: list[int] = []
    found = inside.profiled(
        lambda: steps.append(1), torch.device("cuda"), steps=2, step_s=20_000e-9
    )
    assert len(steps) == 3  # the first of them is not looked at
    assert found["busy_s"] == pytest.approx(5_000e-9)
    assert found["idle_share"] == pytest.approx(0.75)
    assert found["idle_share_profiled"] == pytest.approx(0.5)
    assert found["kernels_per_step"] == 1.5
    (longest, _) = found["longest"]
    assert (longest["name"], longest["times"]) == ("nvjet_one", 1)
    assert longest["ms"] == pytest.approx(4e-3)
    assert found["kinds"]["matrix products"]["share"] == pytest.approx(2 / 3)
