"""Where a step's time goes, on request: parts of the code enter, seconds of each leave.

    data            the batch: windows read, put on the device
    teachers        their forward passes, or their states read from a cache
    student forward the backbone
    loss            heads of student and teachers, and the gradient made on the way
    backward        through the backbone
    optimizer       clipping and update
    communication   collectives of gradients and weights, waiting for other ranks included

Each moment counts once: a part inside another is taken out of the outer one. Measured on this
rank's host, after waiting for the device at both ends of each part; so a measured step is slower
than others on an accelerator, and its parts add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

PARTS = ("data", "teachers", "student forward", "loss", "backward", "optimizer", "communication")


PartTimer = Callable[[str], AbstractContextManager[None]]
"""Given the name of a part of the step, the context to run that part in."""


def untimed(_name: str, /) -> AbstractContextManager[None]:
    """The `PartTimer` of a step that nobody asked about: it measures nothing and never waits."""
    return nullcontext()


class Breakdown:
    """Seconds of each part, summed over the steps measured so far."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._inside: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str, /) -> Iterator[None]:
        """Inside is the part `name`; what surrounds it pauses."""
        self._turn()
        self._inside.append(name)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    @contextmanager
    def of_module(self, module: nn.Module, name: str) -> Iterator[None]:
        """Within, each forward pass of `module` is the part `name`."""
        open_parts: list[AbstractContextManager[None]] = []

        def enter(*_: object) -> None:
            open_parts.append(self.part(name))
            open_parts[-1].__enter__()

        def leave(*_: object) -> None:
            open_parts.pop().__exit__(None, None, None)

        hooks = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _turn(self) -> None:
        """The time since the last turn belongs to the innermost part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now
