"""Where documents end: marks in the raw text, which neither change it nor get lost on the way."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from babyllama_ds.corpus.documents import (
    DocumentTokens,
    after_lines,
    check_documents_found,
    document_tokens,
    documents_of,
    mark_documents,
)
from babyllama_ds.corpus.sources import iter_text, read_sources
from babyllama_ds.corpus.streams import first_lines
from babyllama_ds.errors import DataError
from babyllama_ds.spec.corpus import FilesCorpus, HeldOutFiles, TailOfEachFile

Choice = Literal["none", "blank_lines", "lines", "files"]
CHOICES: tuple[Choice, ...] = ("none", "blank_lines", "lines", "files")


def documents(text: str, choice: Choice) -> list[str]:
    marked = mark_documents(iter(text.splitlines(keepends=True)), choice)
    return ["".join(lines) for lines in documents_of(marked)]


@pytest.mark.parametrize(
    ("text", "by_blank_lines", "by_lines"),
    [
        ("one\ntwo\n", ["one\ntwo\n"], ["one\n", "two\n"]),
        ("one\n\ntwo\n", ["one\n\n", "two\n"], ["one\n\n", "two\n"]),
        # Blank lines belong to what came before, or, before the first one, to what follows.
        ("\n \none\n\n\t\ntwo\n\n", ["\n \none\n\n\t\n", "two\n\n"], None),
        ("one\ntwo", ["one\ntwo"], ["one\n", "two"]),  # without a last line break
        # A title heads its document, with or without blank lines around it.
        (
            "end of one\n= = = Two = = =\ntext\n = = = 3 = = = \n\nmore\n",
            ["end of one\n", "= = = Two = = =\ntext\n", " = = = 3 = = = \n\nmore\n"],
            ["end of one\n", "= = = Two = = =\n", "text\n", " = = = 3 = = = \n\n", "more\n"],
        ),
        ("= = = A = = =\n= = = B = = =\nx\n", ["= = = A = = =\n", "= = = B = = =\nx\n"], None),
        ("he said = = = no = = = to\nit\n", ["he said = = = no = = = to\nit\n"], None),
        ("\n\n", ["\n\n"], ["\n\n"]),
        ("", [], []),
    ],
)  # fmt: skip
def test_what_a_document_is(
    text: str, by_blank_lines: list[str], by_lines: list[str] | None
) -> None:
    assert documents(text, "blank_lines") == by_blank_lines
    if by_lines is not None:
        assert documents(text, "lines") == by_lines
    whole = [text] if text else []
    assert documents(text, "files") == documents(text, "none") == whole


def test_marks_of_empty_documents_leave_none() -> None:
    """As where cleaning took all lines of one."""
    marked = ["", "a\n", "", "", "b\n", "c\n", ""]
    assert [list(lines) for lines in documents_of(marked)] == [["a\n"], ["b\n", "c\n"]]


@pytest.mark.parametrize("number", range(5))
def test_lines_are_counted_without_marks(number: int) -> None:
    marked = ["a\n", "", "b\n", "c\n", "", "d\n", ""]
    lines = ["a\n", "b\n", "c\n", "d\n"]
    head, rest = list(first_lines(marked, number)), list(after_lines(marked, number))
    assert [line for line in head if line] == lines[:number]
    assert [line for line in rest if line] == lines[number:]
    # A document that is cut in two ends on both sides, others are whole.
    two = [list(of) for part in (head, rest) for of in documents_of(part)]
    whole = [["a\n"], ["b\n", "c\n"], ["d\n"]]
    cut = [["a\n"], ["b\n"], ["c\n"], ["d\n"]]
    assert two == (cut if number == 2 else whole)


# -- on the way through cleaning and splitting -----------------------------------------------------

LINES = (
    *("", "", "A line .", "  and \t more ,", "(A laugh.)", "WHAT ALL SHOUT !", "Subtitles by me"),
    *("= = = Anarchism = = =", "It is a thing .", "John 's book", " "),
)
DOMAINS = ("wikipedia", "simple_wiki", "bnc_spoken", "qed", "childes", "cbt", "open_subtitles")


def written(folder: Path) -> list[str]:
    """A file of each domain, lines drawn from the above; their names."""
    draw = random.Random(7)
    for name in (*DOMAINS, "gutenberg"):
        lines = draw.choices(LINES, k=120)
        (folder / f"{name}.train").write_text("\n".join(lines))
        (folder / f"{name}.dev").write_text("held out\n\n" + "\n".join(reversed(lines)))
    return [str(folder / "*.train"), str(folder / "*.dev")]


def corpus(folder: Path, choice: Choice, cleaning: Any, *, tail: bool) -> FilesCorpus:
    train, dev = written(folder)
    split = (
        TailOfEachFile(kind="tail", fraction=0.3)
        if tail
        else HeldOutFiles(kind="held_out", dev=(dev,))
    )
    return FilesCorpus(
        kind="files", train=(train,), split=split, cleaning=cleaning, documents=choice
    )


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("cleaning", ["babylm", "none"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_text_stays_the_same(tmp_path: Path, choice: Choice, cleaning: str, tail: bool) -> None:
    """Line by line, in both splits: what is held out does not depend on documents either."""

    def texts(which: Choice, split: Any) -> list[tuple[str, list[str]]]:
        sources = read_sources(corpus(tmp_path, which, cleaning, tail=tail))
        return [(domain, list(lines)) for domain, lines in iter_text(sources, split)]

    for split in ("train", "dev"):
        plain, marked = texts("none", split), texts(choice, split)
        assert [(domain, [x for x in lines if x]) for domain, lines in marked] == plain
        assert not any("" in lines for _, lines in plain)
        if choice in ("blank_lines", "lines"):
            assert all("" in lines for _, lines in marked)  # in every domain
    sources = [read_sources(corpus(tmp_path, c, cleaning, tail=tail)) for c in ("none", choice)]
    assert sources[0].fingerprint() == sources[1].fingerprint()


def test_blank_lines_and_titles_count_where_cleaning_takes_them_away(tmp_path: Path) -> None:
    (tmp_path / "wikipedia.train").write_text("= = = A = = =\none\n\ntwo\n= = = B = = =\nthree\n")
    (tmp_path / "x.dev").write_text("dev\n")
    spec = FilesCorpus(
        kind="files",
        train=(str(tmp_path / "*.train"),),
        split=HeldOutFiles(kind="held_out", dev=(str(tmp_path / "x.dev"),)),
        documents="blank_lines",
    )
    ((_, lines),) = iter_text(read_sources(spec), "train")
    assert list(lines) == ["A\n", "one\n", "", "two\n", "", "B\n", "three\n"]


# -- refused ---------------------------------------------------------------------------------------


def test_boundaries_that_are_nowhere_are_refused() -> None:
    one = [("a", iter(["x\n", "y\n", ""])), ("b", iter(["z\n"]))]
    with pytest.raises(DataError) as caught:
        check_documents_found(one, "blank_lines")
    (problem,) = caught.value.problems
    assert problem.where == "corpus.documents"
    assert problem.got.startswith("blank_lines, but no file of the training text has a blank line")
    assert problem.hint is not None
    assert "corpus.documents=lines" in problem.hint
    check_documents_found([("a", iter(["x\n", "", "y\n"]))], "blank_lines")
    for choice in ("none", "lines", "files"):
        check_documents_found([("a", iter(["x\n"]))], choice)  # type: ignore[arg-type]


def test_a_boundary_is_found_without_reading_on() -> None:
    def endless() -> Any:
        yield from ["x\n", "", "y\n"]
        raise AssertionError("read on")

    check_documents_found([("a", endless())], "blank_lines")


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = ["a", *special.values()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_document_tokens_are_the_tokenizers_own() -> None:
    ours = tokenizer(bos_token="<s>", eos_token="</s>")
    assert document_tokens(ours, "none") == DocumentTokens()
    assert document_tokens(ours, "begin") == DocumentTokens(begin=1)
    assert document_tokens(ours, "end") == DocumentTokens(end=2)
    assert document_tokens(ours, "both") == DocumentTokens(begin=1, end=2)
    gpt2 = tokenizer(eos_token="<|endoftext|>")
    assert document_tokens(gpt2, "end") == DocumentTokens(end=1)


@pytest.mark.parametrize("asked", ["begin", "both"])
def test_a_tokenizer_that_lacks_one_is_refused_with_what_it_has(asked: Any) -> None:
    with pytest.raises(DataError) as caught:
        document_tokens(tokenizer(eos_token="<|endoftext|>", pad_token="<pad>"), asked)
    (problem,) = caught.value.problems
    assert problem.where == "tokenizer.document_tokens"
    assert problem.got.startswith(f"{asked}, with a tokenizer that has no bos_token")
    assert "eos_token <|endoftext|>" in problem.got
    assert "pad_token <pad>" in problem.got
    with pytest.raises(DataError, match="no special token at all"):
        document_tokens(tokenizer(), asked)
