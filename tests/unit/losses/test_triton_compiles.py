"""The Triton kernels, compiled for cards that are not here: Triton brings all that this takes.

That they compute the right thing is tested through the interpreter (tests/parity), which reads
Python and would not notice what the compiler refuses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
CAPABILITIES = (80, 90, 100)
"""Of an A100, an H100 or H200, and a B200."""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_compile(capability: int, tmp_path: Path) -> None:
    """In a process of its own, where Triton does not interpret, and with nothing kept."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, str(capability)],
        env={**kept, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 8, done.stdout


def compile_all(capability: int) -> None:
    """A line of each kernel's machine code, as a launch of `row_losses` would have it compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from babyllama_ds.losses import triton_rows
    from babyllama_ds.losses.factors import MAX_TEACHERS

    target = GPUTarget("cuda", capability, 32)

    def show(kernel: object, logits: str, **constants: object) -> None:
        names = list(kernel.arg_names)  # type: ignore[attr-defined]
        signature = {
            name: "constexpr" if name in constants else _type_of(name, logits) for name in names
        }
        places = {(names.index(name),): value for name, value in constants.items()}
        compiled = compile_kernel(
            ASTSource(kernel, signature, places), target=target, options={"num_warps": 8}
        )
        print(logits, constants, len(compiled.asm["cubin"]))

    block = {"BLOCK": triton_rows._MAX_BLOCK}
    show(triton_rows._log_sum_exp_kernel, "bf16", **block)
    for logits, teachers, of_probabilities, extras in (
        ("bf16", 0, False, False),  # plain cross-entropy
        ("bf16", 2, False, False),
        ("bf16", 2, False, True),
        ("bf16", 2, True, False),
        ("bf16", MAX_TEACHERS, True, True),
        ("fp16", 1, False, False),
        ("fp32", 2, False, False),
    ):
        show(
            triton_rows._row_kernel,
            logits,
            NUM_TEACHERS=teachers,
            OF_PROBABILITIES=of_probabilities,
            WARM=teachers > 0,
            WITH_GRADIENT=True,
            WITH_Z=extras,
            KEEP_LOG_Z=extras,
            **block,
        )


def _type_of(name: str, logits: str) -> str:
    kind, numbered = name[0], name[1:].isdigit()
    if name in ("student", "logits") or (kind == "t" and numbered):
        return f"*{logits}"
    if name == "labels":
        return "*i64"
    if name == "scale" or (kind == "s" and numbered):
        return "fp32"
    if name in ("stride", "num_rows", "vocab_size") or (kind == "d" and numbered):
        return "i32"
    return "*fp32"


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
