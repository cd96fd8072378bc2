"""What all parts of a job are made of: strict, frozen models, and how their mismatches are told."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
"""A name that becomes a file or folder name."""

HubName = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path, or an id of the Hugging Face hub."""

FolderPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A directory."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What every random generator we use accepts."""

T = TypeVar("T")


@dataclass(frozen=True)
class Mismatch:
    """Values that are each fine and do not fit together; `key` starts at the validated part."""

    key: tuple[str | int, ...]
    got: object
    expected: str
    hint: str | None = None

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.key))}: got {self.got}, expected {self.expected}"


class MismatchError(ValueError):
    """What a validator raises: every mismatch it found, for `spec.explain` to place."""

    def __init__(self, mismatches: Sequence[Mismatch]) -> None:
        self.mismatches = tuple(mismatches)
        super().__init__("; ".join(map(str, mismatches)))


class Spec(BaseModel):
    """What all parts of a job have in common: frozen, strict, no unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def consistent(value: T, found: Sequence[Mismatch]) -> T:
    """`value`; raises `MismatchError` when anything was found wrong with it."""
    if found:
        raise MismatchError(found)
    return value


def repeated_names(names: Sequence[str]) -> list[Mismatch]:
    """Names that an earlier one of the list has too."""
    return [
        Mismatch((i, "name"), repr(name), "a name of its own", hint=f"number {first} has it too")
        for i, name in enumerate(names)
        if (first := names.index(name)) != i
    ]


def divisors(number: int) -> list[int]:
    """All of them, in order. In about √`number` steps: what a user mistypes may be huge."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
