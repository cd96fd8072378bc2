"""What torch.compile is given: by name, by the rule of `auto`, or not at all."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from babyllama_ds.engine.compiling import REPAID_AFTER_S, choose_compiled
from babyllama_ds.errors import MachineError


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Say whether there are a C++ compiler and Triton."""

    def say(*, compiler: bool, triton: bool = True) -> None:
        monkeypatch.delenv("CXX", raising=False)
        path = str(tmp_path / "g++") if compiler else None
        monkeypatch.setattr(shutil, "which", lambda name: path if name == "g++" else None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if triton else None)

    say(compiler=True)
    return say


@pytest.mark.parametrize(
    ("asked", "device", "products_s", "expected"),
    [
        ("none", "cuda", 10**6, "none"),
        ("student", "cpu", 1, "student"),
        ("all", "cuda", 1, "all"),
        ("auto", "cpu", REPAID_AFTER_S - 1, "none"),
        ("auto", "cpu", REPAID_AFTER_S, "all"),
        ("auto", "cuda", REPAID_AFTER_S - 1, "none"),
        ("auto", "cuda", REPAID_AFTER_S, "all"),
    ],
)
@pytest.mark.usefixtures("pretend")
def test_rules(asked: str, device: str, products_s: float, expected: str) -> None:
    chosen, why = choose_compiled(asked, device=device, products_s=products_s)
    assert chosen == expected
    assert why


@pytest.mark.parametrize(
    ("compiler", "triton", "lacking"),
    [(False, True, "no C++ compiler"), (True, False, "no Triton")],
)
def test_auto_does_without_what_is_not_there(
    compiler: bool, triton: bool, lacking: str, pretend: object
) -> None:
    pretend(compiler=compiler, triton=triton)  # type: ignore[operator]
    assert choose_compiled("auto", device="cuda", products_s=1e6) == ("none", f"{lacking} here")


def test_by_name_without_a_compiler_is_an_error(pretend: object) -> None:
    pretend(compiler=False)  # type: ignore[operator]
    with pytest.raises(MachineError) as caught:
        choose_compiled("student", device="cpu", products_s=10)
    (problem,) = caught.value.problems
    assert problem.where == "deepspeed.compile"
    assert problem.got == "no C++ compiler on this machine, for 'student'"
    assert "g++" in (problem.hint or "")


def test_a_compiler_named_by_cxx_must_be_there(
    pretend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(compiler=True)  # type: ignore[operator]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError):
        choose_compiled("all", device="cpu", products_s=10)
