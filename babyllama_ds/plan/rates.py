"""Rates: text like `25000`, `25000 tok/s` or `150 TFLOP/s` enters; a measured speed leaves."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from babyllama_ds.errors import JobError

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_FORM = re.compile(
    r"(?P<number>[0-9][0-9_,]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*"
    r"(?:(?P<tokens>(?:tok(?:ens)?)(?:/s)?)|(?P<prefix>[kmgtp]?)flops?(?:/s)?)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Rate:
    """What one rank does in a second."""

    value: float
    unit: Literal["tok/s", "FLOP/s"]

    def flops_a_second(self, flops_a_token: float) -> float:
        """In FLOP/s; tokens are those of the student's steps, with their part of its teachers."""
        return self.value if self.unit == "FLOP/s" else self.value * flops_a_token

    def __str__(self) -> str:
        if self.unit == "tok/s":
            return f"{self.value:,.0f} tokens/s of the student's training"
        return f"{self.value / 1e12:,.4g} TFLOP/s"


def read_rate(text: str) -> Rate:
    """`N`, `N tok/s`, `N FLOP/s`, with k, M, G, T, P before FLOP.

    Raises:
        JobError: something else, or no finite number above 0.
    """
    match = _FORM.fullmatch(text.strip())
    value = float(match["number"].replace("_", "").replace(",", "")) if match else 0.0
    if match is not None:
        value *= _PREFIXES[(match["prefix"] or "").lower()]
    if match is None or not 0 < value < math.inf:
        raise JobError.of(
            "--rate",
            got=repr(text),
            expected="tokens per second (25000, 25000tok/s) or FLOP/s (40e12FLOP/s, 40TFLOP/s), "
            "of one rank",
            hint="a run prints tokens per second of all its ranks together: divide by them",
        )
    return Rate(value, "tok/s" if match["prefix"] is None else "FLOP/s")
