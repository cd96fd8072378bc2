"""What torch.compile is given: by name, by the rule of `auto`, or not at all."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from babyllama_ds.engine.compiling import REPAID_AFTER_S, choose_compiled, what_compiling_lacks
from babyllama_ds.errors import JobError, MachineError

Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretend:
    """Say whether there are compilers of C++ and C, and Triton."""

    def say(*, compiler: bool, triton: bool = True, c_compiler: str | None = "gcc") -> None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.delenv("CC", raising=False)
        there = {"g++" if compiler else None, c_compiler}
        monkeypatch.setattr(
            shutil, "which", lambda name: str(tmp_path / name) if name in there else None
        )
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
        ("auto", "cpu", REPAID_AFTER_S, "student"),
        ("auto", "cuda", REPAID_AFTER_S - 1, "none"),
        ("auto", "cuda", REPAID_AFTER_S, "all"),
    ],
)
@pytest.mark.usefixtures("pretend")
def test_rules(asked: str, device: str, products_s: float, expected: str) -> None:
    chosen, why = choose_compiled(asked, device=device, products_s=products_s)
    assert chosen == expected
    assert why


@pytest.mark.usefixtures("pretend")
def test_what_has_another_shape_each_time_is_not_compiled() -> None:
    options = {"device": "cuda", "products_s": REPAID_AFTER_S, "shapes_vary": True}
    chosen, why = choose_compiled("auto", **options)
    assert chosen == "none"
    assert why == "the lengths of documents are others in every micro-batch"
    assert choose_compiled("none", **options)[0] == "none"
    for asked in ("student", "all"):
        with pytest.raises(JobError) as caught:
            choose_compiled(asked, **options)
        (problem,) = caught.value.problems
        assert (problem.where, problem.got) == ("deepspeed.compile", asked)
        assert "windows.attention=document" in problem.expected
        assert "attention to sdpa" in (problem.hint or "")


@pytest.mark.parametrize(
    ("compiler", "triton", "c_compiler", "lacking"),
    [
        (False, True, "gcc", "no C++ compiler"),
        (True, False, "gcc", "no Triton"),
        (True, True, None, "no C compiler"),
    ],
)
def test_auto_does_without_what_is_not_there(
    compiler: bool, triton: bool, c_compiler: str | None, lacking: str, pretend: Pretend
) -> None:
    pretend(compiler=compiler, triton=triton, c_compiler=c_compiler)
    assert choose_compiled("auto", device="cuda", products_s=1e6) == ("none", f"{lacking} here")


@pytest.mark.usefixtures("pretend")
def test_python_without_headers_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system's own Python, whose headers are another package (python3-dev)."""
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    lacking = "no headers of Python (Python.h)"
    for device in ("cpu", "cuda"):
        assert choose_compiled("auto", device=device, products_s=1e6) == ("none", f"{lacking} here")
    with pytest.raises(MachineError, match="python3-dev"):
        choose_compiled("student", device="cpu", products_s=10)
    (tmp_path / "Python.h").touch()
    assert what_compiling_lacks("cuda") is None


def test_by_name_without_a_compiler_is_an_error(pretend: Pretend) -> None:
    pretend(compiler=False)
    with pytest.raises(MachineError) as caught:
        choose_compiled("student", device="cpu", products_s=10)
    (problem,) = caught.value.problems
    assert problem.where == "deepspeed.compile"
    assert problem.got == "no C++ compiler on this machine, for 'student'"
    assert "g++" in (problem.hint or "")


def test_only_triton_needs_a_compiler_of_c(pretend: Pretend) -> None:
    pretend(compiler=True, c_compiler=None)
    assert what_compiling_lacks("cpu") is None
    assert what_compiling_lacks("cuda") == "no C compiler"
    pretend(compiler=True, c_compiler="clang")
    assert what_compiling_lacks("cuda") is None


@pytest.mark.parametrize(("variable", "name"), [("CXX", "g++"), ("CC", "gcc")])
def test_a_compiler_may_be_named_with_flags(
    variable: str, name: str, pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(compiler=True)
    monkeypatch.setenv(variable, f"{name} -O2 '-DX=a b'")
    assert what_compiling_lacks("cuda") is None
    monkeypatch.setenv(variable, "no-such-compiler -O2")
    assert what_compiling_lacks("cuda") is not None


def test_a_compiler_named_by_cxx_must_be_there(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(compiler=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError):
        choose_compiled("all", device="cpu", products_s=10)
