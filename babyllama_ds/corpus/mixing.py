"""Several sources as one: so many words of each, by weight or by budget.

Enters: a `MixCorpus` and the sources that it names, opened. Leaves: `MixedSources`: the training
text of each source from its start, whole lines up to its share, one source after another; and the
development text of all. Windows are shuffled over the whole stream, so the order of the sources
decides nothing that is learnt from them.

How much is taken is settled here, once: a number of lines of each text. So reading is a stream
like any other, the same each time, in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from babyllama_ds.corpus.streams import Sources, Split, Texts, first_lines, only_lines
from babyllama_ds.errors import DataError, Problem
from babyllama_ds.files import hash_json
from babyllama_ds.spec.corpus import MixCorpus, MixSource

Check = Callable[[], None] | None

_CHECK_LINES = 4096


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a mix, and how much of it is training text."""

    name: str
    sources: Sources
    takes: tuple[int, ...]
    """Lines of each text, in order, and from the first text again where it repeats."""

    def texts(self, split: Split) -> Texts:
        """(domain in the mix, lines) of each text."""
        if split == "dev":
            for domain, lines in self.sources.texts("dev"):
                yield self.domain(domain), lines
            return
        for take, (domain, lines) in zip(self.takes, self._rounds(), strict=False):
            yield self.domain(domain), first_lines(lines, take)

    def domain(self, own: str) -> str:
        """The source's name; before its own domain where it has several."""
        domains = self.sources.domains()
        return self.name if domains is not None and len(domains) == 1 else f"{self.name}/{own}"

    def _rounds(self) -> Texts:
        while True:
            yield from self.sources.texts("train")


@dataclass(frozen=True, kw_only=True)
class MixedSources:
    """The parts of a mix, in order."""

    parts: tuple[Part, ...]

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the cleaned text of both splits; paths do not."""
        parts = [[part.name, part.sources.fingerprint(), part.takes] for part in self.parts]
        return hash_json({"mix": parts})

    def texts(self, split: Split) -> Texts:
        """See `sources.iter_text`."""
        for part in self.parts:
            yield from part.texts(split)

    def domains(self) -> set[str] | None:
        """Those of all parts."""
        found: set[str] = set()
        for part in self.parts:
            own = part.sources.domains()
            if own is None:
                return None
            found |= {part.domain(each) for each in own}
        return found

    def contents(self) -> dict[str, str]:
        """Those of all parts."""
        return {key: name for part in self.parts for key, name in part.sources.contents().items()}

    def size(self) -> str:
        """Of each part."""
        return ", ".join(f"{part.name} ({part.sources.size()})" for part in self.parts)


def mix(spec: MixCorpus, sources: Sequence[Sources], *, key: str, check: Check) -> MixedSources:
    """Settle how much is taken of each source; `check` is called between lines and may raise.

    A budget is counted to its end, a share of all words needs all to be counted. Raises
    `DataError`: the same text in two sources; a mix that runs dry.
    """
    if problems := _shared(spec, sources, key):
        raise DataError.all_of(problems)
    budgets = _budgets(spec, sources, check)
    takes: list[tuple[int, ...]] = []
    found: list[int] = []
    for source, each, budget in zip(spec.sources, sources, budgets, strict=True):
        taken, words = _measure(each, budget, repeat=source.repeat, check=check)
        takes.append(taken)
        found.append(words)
    if problems := _dry(spec, budgets, found, key):
        raise DataError.all_of(problems)
    return MixedSources(
        parts=tuple(
            Part(name=source.name, sources=each, takes=taken)
            for source, each, taken in zip(spec.sources, sources, takes, strict=True)
        )
    )


def _budgets(spec: MixCorpus, sources: Sequence[Sources], check: Check) -> list[int]:
    """The words of each source. By weights wᵢ: total · wᵢ / Σw, the total given, or the largest
    that no source falls short of: the least words · Σw / wᵢ of those that do not repeat."""
    if spec.sources[0].words is not None:
        return [source.words or 0 for source in spec.sources]
    weights = [Fraction(source.weight or 0) for source in spec.sources]
    whole = sum(weights)
    total = Fraction(spec.words or 0)
    if spec.words is None:
        total = min(
            _measure(each, None, repeat=False, check=check)[1] * whole / weight
            for source, each, weight in zip(spec.sources, sources, weights, strict=True)
            if not source.repeat
        )
    return [max(1, floor(total * weight / whole)) for weight in weights]


def _measure(
    sources: Sources, budget: int | None, *, repeat: bool, check: Check
) -> tuple[tuple[int, ...], int]:
    """Lines of each training text, up to the line that fills the budget, and their words."""
    takes: list[int] = []
    words = 0
    while True:
        words_before = words
        for _, stream in sources.texts("train"):
            lines, words = _count(only_lines(stream), words, budget, check)
            takes.append(lines)
            if budget is not None and words >= budget:
                return tuple(takes), words
        if not repeat or budget is None or words == words_before:
            return tuple(takes), words


def _count(lines: Iterator[str], words: int, budget: int | None, check: Check) -> tuple[int, int]:
    """Lines taken, and words so far."""
    taken = 0
    for line in lines:
        if budget is not None and words >= budget:
            break
        if check is not None and taken % _CHECK_LINES == 0:
            check()
        words += len(line.split())
        taken += 1
    return taken, words


# -- what is wrong -------------------------------------------------------------------------------


def _shared(spec: MixCorpus, sources: Sequence[Sources], key: str) -> list[Problem]:
    problems = []
    first: dict[str, tuple[str, str]] = {}
    for number, (source, each) in enumerate(zip(spec.sources, sources, strict=True)):
        for content, name in each.contents().items():
            owner, theirs = first.setdefault(content, (source.name, name))
            if owner != source.name:
                problems.append(
                    Problem(
                        where=f"{key}.sources[{number}].corpus",
                        got=f"{name}, whose content source {owner!r} has too ({theirs})",
                        expected="text that no other source has",
                        hint="for more of it in the mix, give its source more weight and `repeat`",
                    )
                )
    return list(dict.fromkeys(problems))  # one file may be known in two ways


def _dry(spec: MixCorpus, budgets: Sequence[int], found: Sequence[int], key: str) -> list[Problem]:
    """The sources that are shorter than what is to be taken of them."""
    problems = []
    for number, (source, budget, words) in enumerate(
        zip(spec.sources, budgets, found, strict=True)
    ):
        if words >= budget:
            continue
        expected = f"at least {budget:,}, its budget"
        hint = f"words: {words} is all there is of it"
        if spec.words is not None:
            expected = f"at least {budget:,}, its share of {key}.words ({spec.words:,})"
            hint = f"{key}.words: {_fitting_words(spec, budgets, found)} would do"
            if len(spec.sources) > 1:
                hint += f", or weight: {_fitting_weight(spec, source, words)} here"
        hint += "; or `repeat: true` begins it again"
        if not words:
            hint = "it has no words at all"
        problems.append(
            Problem(
                where=f"{key}.sources[{number}]",
                got=f"{words:,} words of training text in {source.name!r}: the mix runs dry",
                expected=expected,
                hint=hint,
            )
        )
    return problems


def _fitting_words(spec: MixCorpus, budgets: Sequence[int], found: Sequence[int]) -> int:
    """The most words of the mix for which no source is too short."""
    whole = sum(map(_weight, spec.sources))
    return min(
        floor(words * whole / _weight(source))
        for source, budget, words in zip(spec.sources, budgets, found, strict=True)
        if words < budget
    )


def _fitting_weight(spec: MixCorpus, source: MixSource, words: int) -> str:
    """The largest weight, rounded down, with which the source's words fill its share."""
    others = sum(_weight(each) for each in spec.sources) - _weight(source)
    weight = words * others / ((spec.words or 0) - words)
    places = 3
    while weight and floor(weight * 10**places) < 100:
        places += 1
    return f"{floor(weight * 10**places) / 10**places:g}"


def _weight(source: MixSource) -> Fraction:
    return Fraction(source.weight or 0)
