"""The training's clock: optimizer steps run under it; their seconds and a rate leave."""

from __future__ import annotations

import time


class Clock:
    """Time spent in optimizer steps, evaluations and checkpoints left out."""

    def __init__(self, seconds: float, tokens: int) -> None:
        """`seconds` and `tokens`: of earlier starts, perhaps on another machine."""
        self.seconds = seconds
        self._entered = 0.0
        self._rate_from = seconds, tokens

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._entered

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call, or since this start."""
        since_s, since_tokens = self._rate_from
        self._rate_from = (self.seconds, tokens)
        return (tokens - since_tokens) / max(self.seconds - since_s, 1e-9)

    def seconds_a_step(self, steps: int) -> float:
        """Seconds of a step, on average over the training so far."""
        return self.seconds / max(steps, 1)
