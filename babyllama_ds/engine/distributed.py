"""Joining the other ranks: the launcher's environment enters, a process group leaves."""

from __future__ import annotations

import gc
import logging
import os
import socket
import warnings
from typing import Literal

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from babyllama_ds import ranks
from babyllama_ds.errors import MachineError
from babyllama_ds.memory import keep_freed_memory
from babyllama_ds.models.documents import sequences_of

log = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]


def resolve_device(requested: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device that every rank computes on.

    Raises:
        MachineError: CUDA is asked for by name and there is none, or too few cards.
    """
    # DeepSpeed's own variable may settle what `auto` leaves open; a named device overrides it.
    prefers_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    if requested == "cpu" or (requested == "auto" and prefers_cpu):
        return "cpu"
    cards = torch.cuda.device_count()
    if cards < local_ranks():
        raise MachineError.of(
            "deepspeed.device",
            got=f"{cards} CUDA devices for {local_ranks()} ranks on this machine",
            expected="a CUDA device for every rank",
            hint="start fewer ranks (NPROC, --num_gpus) or set deepspeed.device=cpu",
        )
    return "cuda"


def start(device: Device) -> torch.device:
    """Join the process group that the launcher describes (alone if there is none).

    Returns this rank's device. Threads of CPU ranks are shared out, so that two ranks on two
    cores run one thread each instead of four between them.
    """
    # Read at deepspeed's import: without it a CPU job on a machine with a GPU would start NCCL.
    os.environ["DS_ACCELERATOR"] = device
    _describe_lone_rank()
    import deepspeed

    _skip_shared_memory_op(deepspeed)
    _skip_looks_at_windows()
    quiet_known_noise()
    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank())
    else:
        torch.set_num_threads(threads_per_rank())
        keep_freed_memory()
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo")
    ranks.start_control_group()
    return torch.device(device, ranks.local_rank()) if device == "cuda" else torch.device("cpu")


def stop() -> None:
    """Leave the process group; a later `start` in this process makes another."""
    if dist.is_initialized():
        import deepspeed

        ranks.forget_control_group()
        # DeepSpeed's own: it also forgets the groups that it keeps of this world.
        deepspeed.comm.destroy_process_group()
        # Engines lie in reference cycles, which still hold groups and so gloo's threads.
        gc.collect()


def threads_per_rank() -> int:
    """This rank's share of the cores it may run on; `OMP_NUM_THREADS` overrides it."""
    if "OMP_NUM_THREADS" in os.environ:
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, len(os.sched_getaffinity(0)) // local_ranks())


def local_ranks() -> int:
    """Ranks on this machine, as the launcher says; one without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def quiet_known_noise() -> None:
    """Silence warnings that say nothing about the job; all others stay."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed\..*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"deepspeed\..*")
    # DeepSpeed calls collectives by names that torch is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    transformers_logging.disable_progress_bar()


def _describe_lone_rank() -> None:
    """Give a process started without the launcher the environment of a world of one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in lone.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"


def _skip_shared_memory_op(deepspeed: object) -> None:
    """Do not let DeepSpeed compile its shared-memory all-reduce at start.

    On CPU ranks it builds `deepspeed_shm_comm` with g++ and ninja (and fails without them), but
    only tensor-parallel inference calls it: training reduces through gloo. Marked incompatible,
    it is neither built nor loaded, and no compiler is needed.
    """
    compatible: dict[str, bool] = deepspeed.ops.__compatible_ops__  # type: ignore[attr-defined]
    compatible["deepspeed_shm_comm"] = False


def _skip_looks_at_windows() -> None:
    """Tell transformers which windows hold several sequences, and that none is padded: it need not
    look.

    It would look in every forward pass of every model, and wait for the device to know: at the
    positions, and in GPT-2 at the tokens. (Under torch.compile it cannot look, and masks attention
    as if there were several sequences.) Documents that are kept apart are known by the type of
    their positions. Sentences that are padded, in evaluation, are padded on the right, where no
    causal model sees it.
    """
    from transformers import PreTrainedModel, masking_utils  # bring all of torch's compiler

    masking_utils.find_packed_sequence_indices = sequences_of
    PreTrainedModel.warn_if_padding_and_no_attention_mask = lambda *_: None
