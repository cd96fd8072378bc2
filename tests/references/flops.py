"""What PyTorch counts of a forward pass, less what no weight has part in."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode


def forward_flops(counter: FlopCounterMode) -> int:
    """All FLOPs counted, without those of rotary angles.

    Older releases of transformers (5.17 is one) make the angles, frequencies times positions, by a
    matrix product of inner size 1, once for all windows; newer ones multiply, which is not counted.
    """
    angles = sum(
        sum(flops.values())
        for module, flops in counter.get_flop_counts().items()
        if module.endswith(".rotary_emb")
    )
    return counter.get_total_flops() - angles
