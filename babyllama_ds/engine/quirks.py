"""What DeepSpeed and transformers do by themselves and should not: nothing enters, nothing leaves.

Each is called once, before a process joins its ranks.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

from transformers.utils import logging as transformers_logging

from babyllama_ds.models.documents import sequences_of


def quiet_known_noise() -> None:
    """Silence warnings that say nothing about the job; all others stay."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed\..*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"deepspeed\..*")
    # DeepSpeed calls collectives by names that torch is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    transformers_logging.disable_progress_bar()


def skip_shared_memory_op() -> None:
    """Do not let DeepSpeed compile its shared-memory all-reduce at start.

    On CPU ranks it builds `deepspeed_shm_comm` with g++ and ninja (and fails without them), but
    only tensor-parallel inference calls it: training reduces through gloo. Marked incompatible,
    it is neither built nor loaded, no compiler is needed, and split teachers reduce through gloo
    too. (It knows of one group, that of all ranks: groups of some it would not keep apart.)
    """
    import deepspeed

    compatible: dict[str, bool] = deepspeed.ops.__compatible_ops__
    compatible["deepspeed_shm_comm"] = False


def leave_out_deepspeeds_muon() -> None:
    """Have DeepSpeed find stand-ins where it looks for its own Muon, which no job here can choose.

    It imports both names in every run, whatever the optimizer. Their module decorates functions
    with `torch.compile`, which brings all of torch's compiler: nearly two seconds of every start
    (docs/decisions/host-overhead.md).
    """
    for module, wanted in (("muon_optimizer", "MuonWithAuxAdam"), ("original_muon", "muon_update")):
        name = f"deepspeed.runtime.zero.muon.{module}"
        stand_in = ModuleType(name)
        setattr(stand_in, wanted, type(wanted, (), {}))
        sys.modules.setdefault(name, stand_in)


def ask_torch_for_free_memory() -> None:
    """Have DeepSpeed ask torch how much of a card is free, which it asks of every engine.

    Where NVML's Python package is installed it would ask that, and take what stands in
    CUDA_VISIBLE_DEVICES for numbers: a card's name there, or that of a part of one (`GPU-…`,
    `MIG-…`, as schedulers write them), would end the run.
    """
    import torch
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    def available_memory(_: CUDA_Accelerator, device_index: int | None = None) -> int:
        free, _total = torch.cuda.mem_get_info(device_index)
        return int(free)

    CUDA_Accelerator.available_memory = available_memory


def skip_looks_at_windows() -> None:
    """Tell transformers which windows hold several sequences, and that none is padded: it need not
    look.

    It would look in every forward pass of every model, and wait for the device to know: at the
    positions, with FlashAttention in every layer (where there is one window: others are never
    packed), and in GPT-2 at the tokens. (Under torch.compile it cannot look, and masks attention
    as if there were several sequences.) Documents that are kept apart are known by the type of
    their positions. Sentences that are padded, in evaluation, are padded on the right, where no
    causal model sees it.
    """
    # Bring all of torch's compiler.
    from transformers import PreTrainedModel, masking_utils, modeling_flash_attention_utils

    # Lengths of documents are given with their positions (`models.documents`).
    modeling_flash_attention_utils._is_packed_sequence = lambda *_, **__: False
    masking_utils.find_packed_sequence_indices = sequences_of
    PreTrainedModel.warn_if_padding_and_no_attention_mask = lambda *_: None
