"""What ranks left behind, as findings; the ranks themselves are tried at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from babyllama_ds.doctor import rank as rank_module
from babyllama_ds.doctor import zero2 as module
from babyllama_ds.doctor.world import World
from babyllama_ds.engine.proof.models import CASES
from babyllama_ds.engine.proof.plain import train_plainly
from babyllama_ds.engine.proof.sharded import trace_path

QUICK = tuple(replace(case, steps=1) for case in (CASES[0], CASES[2]))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Ended:
    """Ranks that have ended, `said` how."""

    world = World(device="cpu", num_ranks=2)

    def __init__(self, folder: Path, said: str | None = None) -> None:
        self.folder, self.said = folder, said

    def wait(self) -> str | None:
        return self.said


@pytest.fixture
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ranks that have trained as plain processes."""
    monkeypatch.setattr(module, "CASES", QUICK)
    (tmp_path / rank_module.COLLECTIVES).write_text("[]")
    for case in QUICK:
        dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
        trace = train_plainly(case, num_ranks=2, dtype=dtype, device=torch.device("cpu"))
        save_file(trace, trace_path(tmp_path, case))
    return tmp_path


def findings(folder: Path, said: str | None = None) -> dict[str, Any]:
    ended: Any = Ended(folder, said)
    return {finding.check: finding for finding in module.zero2(ended, compiled=False)}


def test_sound_ranks(sound: Path) -> None:
    found = findings(sound)
    assert {each.status for each in found.values()} == {"ok"}
    assert found["collectives"].found == (
        "2 CPU ranks (gloo): all-reduce and reduce-scatter give the right sums"
    )
    assert found["zero-2 fp32"].found.startswith(
        "2 CPU ranks: gradients, and weights after 20 steps, are those of one plain PyTorch "
        "process (1 training; largest relative difference "
    )
    assert found["zero-2 bf16"].found.endswith("largest error 1.00 × a plain bf16 one's)")


def test_wrong_sums(sound: Path) -> None:
    (sound / rank_module.COLLECTIVES).write_text(json.dumps(["all-reduce on rank 1"]))
    found = findings(sound)["collectives"]
    assert found.status == "failure"
    assert found.found == "2 CPU ranks (gloo): wrong sums of all-reduce on rank 1"
    assert found.remedy


def test_wrong_gradients_name_case_and_parameters(sound: Path) -> None:
    case = QUICK[0]
    trace = train_plainly(case, num_ranks=2, dtype=torch.float64, device=torch.device("cpu"))
    halved = {key: each / 2 if "mlp" in key else each for key, each in trace.items()}
    save_file(halved, trace_path(sound, case))
    found = findings(sound)
    wrong = found["zero-2 fp32"]
    assert wrong.status == "failure"
    assert wrong.found.startswith(
        "2 CPU ranks, not as a plain process. llama: gradient of "
        "model.model.layers.0.mlp.gate_proj.weight: off by 0.5, allowed 2e-05; gradient of "
    )
    assert wrong.found.endswith("; and 10 more")
    assert "do not train here" in (wrong.remedy or "")
    assert found["zero-2 bf16"].status == "ok"


def test_ranks_that_died_on_the_way(sound: Path) -> None:
    trace_path(sound, QUICK[1]).unlink()
    found = findings(sound, "rank 1 ended with status 1: boom")
    assert found["zero-2 fp32"].status == "ok", "what was done before stays"
    assert found["zero-2 bf16"].status == "failure"
    assert found["zero-2 bf16"].found == (
        "2 CPU ranks: the training of llama-bf16 did not end; rank 1 ended with status 1: boom"
    )


@pytest.mark.parametrize("said", ["rank 1 ended with status -6", "rank 0 did not end in 180 s"])
def test_ranks_that_did_all_and_then_did_not_leave_well(sound: Path, said: str) -> None:
    found = findings(sound, said)
    left = found.pop("ranks")
    assert {each.status for each in found.values()} == {"ok"}
    assert left.status == "failure"
    assert left.found == f"2 CPU ranks: all trainings were done, but afterwards {said}"
    assert "make test" in (left.remedy or "")


def test_how_ranks_ended_is_told_once(sound: Path) -> None:
    trace_path(sound, QUICK[1]).unlink()
    assert "ranks" not in findings(sound, "rank 1 ended with status 1: boom")


def test_ranks_that_never_met(tmp_path: Path) -> None:
    found = findings(tmp_path, "rank 0 did not end in 120 s, without a word")
    assert {each.status for each in found.values()} == {"failure"}
    assert found["collectives"].found.endswith("rank 0 did not end in 120 s, without a word")


# -- torch.compile ---------------------------------------------------------------------------------


def test_without_a_compiler_nothing_is_proved() -> None:
    found = module.not_compiled("no C++ compiler")
    assert (found.status, found.found) == ("warning", "not proved: no C++ compiler")
    assert "g++" in (found.remedy or "")


def test_not_asked_for_is_no_warning() -> None:
    found = module.not_compiled(None)
    assert found.status == "ok"
    assert "--compile" in found.found


# -- collectives -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faulty", "told"),
    [
        (None, []),
        ("_all_reduced", ["all-reduce on rank 0"]),
        ("_reduce_scattered", ["reduce-scatter on rank 0"]),
    ],
)
def test_wrong_collectives_are_seen(
    faulty: str | None, told: list[str], alone: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if faulty:
        honest = getattr(rank_module, faulty)
        monkeypatch.setattr(rank_module, faulty, lambda tensor: honest(tensor) + 1)
    assert list(rank_module._wrong_sums(alone)) == told
