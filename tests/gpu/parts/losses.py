"""The losses against their definitions in float64: values and every gradient, in bf16 and fp32.

bf16 is judged by its error beside that of plain code which forms its logits in bf16, too, and goes
on in fp32. On CUDA the forward KL goes through the Triton kernel; it is also taken through
PyTorch's operators, and tried on more than 2^31 logits.

Shapes: C positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import cross_entropy

from babyllama_ds.losses import rows
from babyllama_ds.losses.factors import Factors
from babyllama_ds.losses.mixture import Mixture
from gpu.measures import Measure, at_most, holds, told
from references import losses, topk

FP32_ERROR = 6e-6
"""As in tests/parity/test_divergences.py."""
BF16_ERROR = 1.5
"""Times the plain code's: ours rounds the gradient of the logits to bf16, too. As there."""
BF16_SUM = 2**-11
SIZES = {True: (94, 31, 123, 128), False: (4096, 512, 16_000, 16_000)}
WIDTHS = {True: (17, 40, 31), False: (1536, 1024, 512)}
TOP_K = 9


def measure(device: torch.device, *, small: bool) -> Iterator[Measure]:
    if device.type == "cuda":
        used = rows.takes_kernel(torch.bfloat16, device, 2)
        yield holds("the forward KL goes through the Triton kernel", used, str(used))
    for kind in losses.DIVERGENCES:
        for mean_of in losses.MEANS:
            yield _fp32(kind, mean_of, device)
            yield from _bf16(kind, mean_of, device, small=True)
    if not small:
        for kind in losses.DIVERGENCES:
            yield from _bf16(kind, "logits", device, small=False)
    if device.type == "cuda":
        with _without_kernel():
            yield from _bf16("forward_kl", "logits", device, small=True, how=", no kernel")
        if not small:
            yield from _long_rows(device)
    for mean_of in topk.MEANS:
        yield from _top_k(mean_of, device)


def _fp32(kind: str, mean_of: str, device: torch.device) -> Measure:
    """Biased heads, teachers of unequal votes and widths, padding rows; a z-loss beside it."""
    case = losses.make_case().to(torch.float32, device)
    settings = {"alpha": 0.3, "temperature": 2.0, "mean_of": mean_of, "z_loss": 0.05}
    errors = losses.ours(case, kind, **settings).errors(losses.reference(case, kind, **settings))
    return at_most(f"{kind}, mean of {mean_of}, fp32", max(errors.values()), FP32_ERROR)


def _bf16(
    kind: str, mean_of: str, device: torch.device, *, small: bool, how: str = ""
) -> Iterator[Measure]:
    worst, of_sum = 0.0, 0.0
    for seed in range(3 if small else 1):
        case = losses.make_case(seed=seed, sizes=SIZES[small], widths=WIDTHS[small])
        case = case.to(torch.bfloat16, device)
        settings = {"alpha": 0.3, "temperature": 2.0, "mean_of": mean_of}
        right = losses.reference(case, kind, **settings)
        plain = losses.reference(case, kind, dtype=torch.float32, **settings).errors(right)
        chunk = {} if small else {"chunk_tokens": None}
        got = losses.ours(case, kind, **settings, **chunk).errors(right)
        worst = max(worst, max(got[name] / plain[name] for name in ("hidden", "weight", "bias")))
        of_sum = max(of_sum, got["soft_sum"])
    size = "" if small else ", {} × {} × {}".format(*SIZES[small])
    name = f"{kind}, mean of {mean_of}, bf16{size}{how}"
    yield at_most(f"{name}: error of gradients / plain code's", worst, BF16_ERROR)
    yield at_most(f"{name}: error of the sum", of_sum, BF16_SUM)


def _top_k(mean_of: str, device: torch.device) -> Iterator[Measure]:
    case = topk.make_case().to(torch.float32, device)
    targets = topk.make_targets(case, TOP_K, 2.0, mean_of)
    p = topk.mixture(case, 2.0, mean_of)
    right = topk.reference(case, p, targets.token_ids_NK, 0.3, 2.0)
    errors = topk.ours(case, targets, 0.3, 2.0).errors(right)
    yield at_most(f"topk, mean of {mean_of}, fp32", max(errors.values()), FP32_ERROR)
    case = case.to(torch.bfloat16)
    targets = topk.make_targets(case, TOP_K, 2.0, mean_of)
    p = topk.kept(targets, topk.mixture(case, 2.0, mean_of))
    right = topk.reference(case, p, targets.token_ids_NK, 0.3, 2.0)
    plain = topk.reference(case, p, targets.token_ids_NK, 0.3, 2.0, dtype=torch.float32)
    plain_errors, got = plain.errors(right), topk.ours(case, targets, 0.3, 2.0).errors(right)
    worst = max(got[name] / plain_errors[name] for name in ("hidden", "weight", "bias"))
    name = f"topk, mean of {mean_of}, bf16: error of gradients / plain code's"
    yield at_most(name, worst, BF16_ERROR)


@contextmanager
def _without_kernel() -> Iterator[None]:
    kernels = rows._kernels
    rows._kernels = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        rows._kernels = kernels


def _long_rows(device: torch.device) -> Iterator[Measure]:
    """The last rows of a chunk that starts beyond 2^31 logits: their places need 64 bits."""
    from babyllama_ds.losses.triton_rows import row_losses

    vocab_size = 16_000
    num_rows = 2**31 // vocab_size + 1_000
    student_CV, teacher_CV = (
        torch.empty(num_rows, vocab_size, dtype=torch.bfloat16, device=device).normal_()
        for _ in range(2)
    )
    last = slice(num_rows - 500, None)
    kept_CV, theirs_CV = student_CV[last].double(), teacher_CV[last].double()
    label_C1 = torch.randint(0, vocab_size, (num_rows, 1), device=device)
    ones_C1 = torch.ones(num_rows, 1, device=device)
    factors = Factors(ce_C1=ones_C1, kl_C1=ones_C1)
    mixture = Mixture(shares=(1.0,), temperature=1.0, mean_of="logits")
    ce_C1, kl_C1 = row_losses(student_CV, [teacher_CV], label_C1, mixture, factors)
    p, q = theirs_CV.softmax(-1), kept_CV.softmax(-1)
    right_ce = cross_entropy(kept_CV, label_C1[last, 0], reduction="none")
    right_kl = (p * (p.log() - q.log())).sum(-1)
    gradient = 2 * q - p
    gradient.scatter_add_(1, label_C1[last], -torch.ones_like(gradient[:, :1]))
    yield told("long chunk: logits of a model", float(num_rows * vocab_size))
    for name, got, right, allowed in (
        ("CE", ce_C1[last, 0], right_ce, 1e-5),
        ("KL", kl_C1[last, 0], right_kl, 1e-5),
        ("gradient", student_CV[last], gradient, 2**-8),
    ):
        yield at_most(f"long chunk: {name}", losses.relative_error(got, right), allowed)
