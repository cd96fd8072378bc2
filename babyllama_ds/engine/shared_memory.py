"""Shared memory for NCCL: the ranks of this machine enter; nothing, or an error, leaves.

NCCL lays the buffers through which ranks of one machine talk into `/dev/shm`: a segment of 7 to
10 MB for each of a rank's connections. A container has 64 MiB there unless it is given more, and
what does not fit ends the ranks at their first collective (github.com/NVIDIA/nccl #342). Neither
gloo nor anything else here uses it: windows are read by the ranks themselves.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from babyllama_ds.engine.distributed import Device
from babyllama_ds.errors import MachineError

FOLDER = Path("/dev/shm")
BYTES_A_RANK = 64 * 2**20
"""Six connections or so: two to the next rank and two to the one before, and those of a tree."""
ADVISED_BYTES = 2**30
"""What NCCL's guide gives to a container (Troubleshooting, Docker: `--shm-size=1g`)."""
REMEDY = "give the container more: docker run --shm-size=1g, or --ipc=host"


def free_shared_bytes() -> int | None:
    """Room in `/dev/shm`; none where the system has no such folder, or NCCL is told to spare it."""
    if os.environ.get("NCCL_SHM_DISABLE", "0") != "0":
        return None
    try:
        return shutil.disk_usage(FOLDER).free
    except OSError:
        return None


def needed_shared_bytes(device: Device, local_ranks: int) -> int:
    """What `local_ranks` of one machine need there."""
    return local_ranks * BYTES_A_RANK if device == "cuda" and local_ranks > 1 else 0


def check_shared_memory(device: Device, local_ranks: int) -> None:
    """Nothing, where the ranks of this machine have what they need.

    Raises:
        MachineError: there is too little.
    """
    free, needed = free_shared_bytes(), needed_shared_bytes(device, local_ranks)
    if free is not None and free < needed:
        raise MachineError.of(
            FOLDER,
            got=f"{free / 2**20:,.0f} MiB of shared memory free",
            expected=f"{needed / 2**20:,.0f} MiB, for NCCL's buffers of {local_ranks} ranks",
            hint=REMEDY,
        )
