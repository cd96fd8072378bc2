"""The whole doctor on this machine, ranks and all, as a person starts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.doctor import examine as module
from babyllama_ds.doctor.findings import ok

CHECKS = [
    "packages",
    "deepspeed",
    "host",
    "gpu",
    "disk",
    "write speed",
    "locks",
    "bf16",
    "plain attention",
    "sdpa",
    "flash attention",
    "collectives",
    "zero-2 fp32",
    "zero-2 bf16",
    "torch.compile",
]


@pytest.mark.launch
def test_the_doctor_on_two_cpu_ranks(run_alone: Callable[..., Any], tmp_path: Path) -> None:
    ended = run_alone("doctor", "--device", "cpu", "--json", "--runs", tmp_path / "runs")
    value = json.loads(ended.out)
    found = {each["check"]: each for each in value["findings"]}
    assert list(found) == CHECKS
    # Room and speed are the machine's affair.
    expected = {name: "ok" for name in CHECKS if name not in ("host", "disk", "write speed")}
    assert {name: found[name]["status"] for name in expected} == expected
    assert found["zero-2 bf16"]["found"].startswith("2 CPU ranks: gradients, and weights after 20")
    assert ended.code == (2 if value["counts"]["failure"] else 0)
    assert not (tmp_path / "runs").exists()


def test_a_glance_starts_nothing_and_touches_no_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Started", "bf16", "attention", "devices", "zero2"):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(name))
    found = [each.check for each in module.glance(tmp_path / "runs", "cpu")]
    assert found == ["packages", "deepspeed", "host", "disk", "locks"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("asked", "lacking", "tried", "told"),
    [
        (True, None, True, None),
        (True, "no C++ compiler", False, "not proved: no C++ compiler"),
        (False, "no C++ compiler", False, "not tried: --compile does"),
    ],
)
def test_what_is_compiled(
    asked: bool,
    lacking: str | None,
    tried: bool,
    told: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []

    class Started:
        def __init__(self, _: object, *, compiled: bool) -> None:
            started.append(compiled)

        def __enter__(self) -> Started:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(module, "Started", Started)
    monkeypatch.setattr(module, "what_compiling_lacks", lambda _: lacking)
    monkeypatch.setattr(module, "zero2", lambda _, *, compiled: [ok("zero-2", str(compiled))])
    for name in ("disk", "bf16", "attention", "devices"):
        monkeypatch.setattr(module, name, lambda _: [])
    monkeypatch.setattr(module, "versions", list)
    found = {each.check: each.found for each in module.examine(tmp_path, "cpu", compiled=asked)}
    assert started == [tried]
    assert found["zero-2"] == str(tried)
    if told is None:
        assert "torch.compile" not in found
    else:
        assert found["torch.compile"].startswith(told)
