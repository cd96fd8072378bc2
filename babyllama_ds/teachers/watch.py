"""The ensemble, watched: sums of a logged step enter; measures by name, and warnings, leave.

| measure                   |                                                                |
|---------------------------|----------------------------------------------------------------|
| `teacher_ce/NAME`         | the teacher's own cross-entropy, nats a token                  |
| `teacher_kl/NAME`         | KL(teacher ‖ ensemble), nats a token                           |
| `teacher_agreement/NAME`  | share of positions with the ensemble's likeliest token         |
| `teacher_distance/A/B`    | total variation between two teachers, a mean in [0, 1]         |
| `target_entropy`          | entropy of the ensemble, nats a token                          |
| `student_agreement`       | share of positions at which student and ensemble agree         |
| `student_kl`              | KL(ensemble ‖ student), nats a token                           |

All at T = 1 on the training windows of one optimizer step, the student as it was before the
update (dropout, where it has any, on). They go to `metrics.jsonl` and TensorBoard; the report
reads them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from babyllama_ds import ranks
from babyllama_ds.losses.agreement import Agreement, finite_positions
from babyllama_ds.losses.distillation import TeacherStates

CHANCE_MARGIN_NATS = 1e-3
"""How far below ln V a cross-entropy may lie and still be called chance: that of a uniform
teacher is ln V but for rounding."""

SAME_DISTANCE = 1e-4
"""Mean total variation up to which two teachers are called identical.

Equal weights give 0 on one device, or about 1e-6 where fp32 kernels round differently. In bf16 a
logit moves in steps of 1/256 of its size or more, so teachers this close have nearly all of their
logits in common, bit for bit. Teachers that merely are alike lie far above: in the tests, those of
two seeds 0.25 apart, and a teacher 0.02 from itself one update of rate 1e-3 later. Equal weights
that were rounded or are computed in another way, so that their bf16 logits differ throughout, are
not told from teachers that are alike, and give no warning.
"""


def measures(
    sums: Agreement, names: Sequence[str], *, num_labelled: int, num_valid: int
) -> dict[str, float]:
    """The module's table, from this rank's sums and the global counts. A collective.

    Waits for the device, once.
    """
    local = torch.cat([tensor.reshape(-1) for tensor in sums]).tolist()
    values = dict(zip(_keys(names), ranks.sum_floats(*local), strict=True))
    counts = {key: num_labelled if key.startswith("teacher_ce/") else num_valid for key in values}
    return {key: value / max(1, counts[key]) for key, value in values.items()}


def warnings_of(
    measured: Mapping[str, float], names: Sequence[str], *, vocab_size: int
) -> list[str]:
    """What is wrong with the teachers, in words that stay the same from step to step.

    A teacher whose cross-entropy is not below ln V, what a uniform guess has; and two teachers
    that are the same (`SAME_DISTANCE`). Measures that are missing give no warning.
    """
    chance = math.log(vocab_size)
    no_better = [
        f"teacher {name} is no better than chance: its cross-entropy is not below "
        f"ln {vocab_size} = {chance:.3f} nats a token, which a uniform guess has"
        for name in names
        if measured.get(f"teacher_ce/{name}", 0.0) >= chance - CHANCE_MARGIN_NATS
    ]
    same = [
        f"teachers {one} and {other} are identical: their distributions coincide, so that the "
        "ensemble holds one teacher with the weight of both"
        for one, other in combinations(names, 2)
        if measured.get(f"teacher_distance/{one}/{other}", 1.0) <= SAME_DISTANCE
    ]
    return no_better + same


def broken_windows(
    targets: Sequence[TeacherStates], valid_N: Tensor, num_windows: int, *, vocab_size: int
) -> NDArray[np.bool_]:
    """Which windows make a teacher's logits infinite or NaN at a valid position: `[K, B]`."""
    broken_KN = torch.stack(
        [~finite_positions(states, vocab_size=vocab_size) & valid_N for states in targets]
    )
    broken: NDArray[np.bool_] = broken_KN.view(len(targets), num_windows, -1).any(-1).cpu().numpy()
    return broken


def _keys(names: Sequence[str]) -> list[str]:
    """Names of the numbers of an `Agreement`, in its order."""
    return [
        *(f"teacher_ce/{name}" for name in names),
        *(f"teacher_kl/{name}" for name in names),
        *(f"teacher_agreement/{name}" for name in names),
        *(f"teacher_distance/{one}/{other}" for one, other in combinations(names, 2)),
        "target_entropy",
        "student_agreement",
        "student_kl",
    ]
