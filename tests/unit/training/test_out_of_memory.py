"""What is, and what is not, memory that ran out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from babyllama_ds.errors import NoRoomError
from babyllama_ds.ranks import RemoteError
from babyllama_ds.training.out_of_memory import memory_needed, ran_out

OF_CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
OF_NCCL = "NCCL error in: NCCLUtils.cpp:94\nLast error:\nCuda failure 2 'out of memory'"


def too_much() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def test_torch_on_a_cpu_says_so_in_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        too_much()
    assert ran_out(caught.value)
    with pytest.raises(NoRoomError) as told, memory_needed("a.micro_batch", hint="take less"):
        too_much()
    (problem,) = told.value.problems
    assert (problem.where, problem.hint) == ("a.micro_batch", "take less")
    assert "\n" not in problem.got


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError(OF_CUBLAS), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (dist.DistBackendError(OF_NCCL), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shapes differ"), False),
        (ValueError(OF_CUBLAS), False),
        (RemoteError(1, "OutOfMemoryError", OF_CUBLAS), False),  # that rank speaks for itself
    ],
)
def test_who_ran_out(error: Exception, expected: bool) -> None:
    assert ran_out(error) == expected
    with pytest.raises(NoRoomError if expected else type(error)), memory_needed("a", hint="b"):
        raise error
