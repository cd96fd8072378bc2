"""A card that is not there, for tests on machines without one: `card.cpp` enters, `cuda` leaves.

`build` compiles it; `insert`, called before torch is imported, has torch of this process believe
in one H100. Its tensors are refused beside those of the CPU, and `waits` counts what makes a host
wait. Attention is by plain products, and losses take PyTorch's operators, not the Triton kernel:
numbers are a CPU's, and nothing here says how fast a card is or what memory its kernels take.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("card.cpp")
TOTAL_BYTES = 80 << 30


def compiler() -> str | None:
    """A C++ compiler; none: there is none here."""
    return shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> Path:
    """The library, compiled into the folder; half a minute."""
    found, library, torch_found = compiler(), folder / "card.so", find_spec("torch")
    assert found is not None, "asked for before"
    assert torch_found is not None, "installed"
    assert torch_found.origin is not None, "in a folder"
    torch_dir = Path(torch_found.origin).parent
    includes = [torch_dir / "include", torch_dir / "include/torch/csrc/api/include"]
    words = [found, "-std=c++20", "-O0", "-fPIC", "-shared", str(SOURCE), "-o", str(library)]
    words += [f"-I{each}" for each in includes]
    words += [f"-L{torch_dir / 'lib'}", f"-Wl,-rpath,{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


_library: Any = None


def insert(library: str) -> None:
    """From here on `torch.device("cuda", 0)` is there."""
    global _library
    assert "torch" not in sys.modules, "torch asks only once, when it is imported"
    _library = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    os.environ.pop("DS_ACCELERATOR", None)
    sys.modules["babyllama_ds.losses.triton_rows"] = None  # type: ignore[assignment]
    import torch

    torch._C._cuda_getCurrentRawStream = lambda _: 0  # type: ignore[attr-defined]
    torch._C._cuda_getDeviceCount = lambda: 1  # type: ignore[attr-defined]
    for name, value in _answers().items():
        for module in (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams):
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    torch.version.cuda = "13.0"
    torch.nn.functional.scaled_dot_product_attention = _attention(
        torch.nn.functional.scaled_dot_product_attention
    )
    _without_nccl()


def waits(run: Callable[[], object]) -> Counter[str]:
    """The files whose lines make the host wait for the card meanwhile, and how often."""
    del _waited[:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _library.pretended_card_tells(True)
        try:
            run()
        finally:
            _library.pretended_card_tells(False)
    told = (each for each in caught if "called a synchronizing" in str(each.message))
    return Counter(Path(each.filename).name for each in told) + Counter(_waited)


_waited: list[str] = []


def _wait(*_: Any, **__: Any) -> None:
    _waited.append("synchronize")


# -- torch.cuda ------------------------------------------------------------------------------------


class _Stream:
    """The only one."""

    cuda_stream = stream_id = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    synchronize = _wait

    def wait_stream(self, _: Any) -> None:
        pass

    wait_event = record_event = wait_stream


class _Properties:
    name = "a pretended card"
    major, minor, multi_processor_count, total_memory = 9, 0, 132, TOTAL_BYTES


class _Generator:
    """The numbers are the CPU's own."""

    def manual_seed(self, _: int) -> None:
        pass

    def get_state(self) -> Any:
        import torch

        return torch.zeros(16, dtype=torch.uint8)

    set_state = manual_seed


def _answers() -> dict[str, Any]:
    def answer(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    always = ("is_available", "is_initialized", "is_bf16_supported")
    nothing = ("_lazy_init", "init", "set_device", "empty_cache", "manual_seed", "manual_seed_all")
    counts = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return {
        # A function for each: dynamo knows them by name.
        **{name: answer(True) for name in always},
        **{name: answer(None) for name in (*nothing, "reset_peak_memory_stats")},
        **{name: answer(0) for name in counts},
        "_lazy_call": lambda work, **_: work(),
        "device_count": answer(1),
        "current_device": answer(0),
        "device": lambda _: contextlib.nullcontext(),
        "synchronize": _wait,
        "mem_get_info": answer((TOTAL_BYTES, TOTAL_BYTES)),
        "get_device_name": answer(_Properties.name),
        "get_device_capability": answer((9, 0)),
        "get_device_properties": answer(_Properties),
        "Stream": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": lambda _: contextlib.nullcontext(),
        "default_generators": (_Generator(),),
        "nvtx": types.SimpleNamespace(range_push=answer(0), range_pop=answer(0)),
        "nccl": types.SimpleNamespace(version=answer((2, 0, 0))),
    }


def _attention(own: Any) -> Any:
    import torch

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, *given: Any, **named: Any
    ) -> Any:
        if not query.is_cuda:
            return own(query, key, value, attn_mask, *given, **named)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = zeros.masked_fill(~attn_mask, float("-inf"))
        plain = torch.ops.aten._scaled_dot_product_attention_math
        return plain(query, key, value, attn_mask, *given, **named)[0]

    return attention


def _without_nccl() -> None:
    """A world of one card has nobody to send to; ranks without a card meet as ever."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    own = dist.init_process_group

    def init_process_group(backend: str | None = None, *given: Any, **named: Any) -> None:
        if backend == "nccl":
            own("fake", store=FakeStore(), rank=0, world_size=1)
        else:
            own(backend, *given, **named)

    dist.init_process_group = dist.distributed_c10d.init_process_group = init_process_group
