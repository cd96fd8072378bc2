"""Tokens of the corpus: found in the store, counted or estimated, against what is made."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from babyllama_ds.corpus.prepare import open_corpus, prepare_corpus
from babyllama_ds.errors import DataError
from babyllama_ds.plan.corpus import PlannedCorpus, bytes_a_token, plan_corpus
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.store import Store

Job = Callable[..., JobSpec]


def test_tokens_are_exact_where_the_store_has_them(nursery: Job, tmp_path: Path) -> None:
    job = nursery("corpus.words=4000", "corpus.dev_words=1000", "tokenizer.vocab_size=400")
    before_it = plan_corpus(job, runs=tmp_path, tokens=None)
    assert before_it.source == "estimate"
    assert (before_it.train_tokens, before_it.dev_tokens) == (5_400, 1_350)  # 1.35 a word
    corpus = open_corpus(prepare_corpus(job, Store(tmp_path / "store"), lambda: None))
    before = sorted((tmp_path / "store").rglob("*"))
    planned = plan_corpus(job, runs=tmp_path, tokens=None)
    assert planned.source == "store"
    assert planned.train_tokens == corpus.shards.num_tokens("train")
    assert planned.dev_tokens == corpus.shards.num_tokens("dev")
    assert planned.vocab_size == 400
    assert sorted((tmp_path / "store").rglob("*")) == before
    other = nursery("corpus.words=4000", "corpus.dev_words=1000", "tokenizer.vocab_size=401")
    assert plan_corpus(other, runs=tmp_path, tokens=None).source == "estimate"


def test_tokens_are_estimated_from_the_size_of_the_text(files_job: Job, tmp_path: Path) -> None:
    planned = plan_corpus(files_job("tokenizer.vocab_size=800"), runs=tmp_path, tokens=None)
    assert planned.train_tokens == round(10_000 / 2.21)
    assert planned.dev_tokens == round(2_000 / 2.21)
    assert planned.assumption == (
        "2.21 bytes of text a token (English, vocabulary 800), nothing lost in cleaning"
    )


def test_a_tail_held_out_is_no_training_text(files_job: Job, tmp_path: Path) -> None:
    tail = f"{{kind: files, train: ['{tmp_path}/*.train'], split: {{kind: tail, fraction: 0.25}}}}"
    job = files_job("tokenizer.vocab_size=800", f"corpus={tail}")
    planned = plan_corpus(job, runs=tmp_path, tokens=None)
    assert planned.train_tokens == round(7_500 / 2.21)
    assert planned.dev_tokens == round(2_500 / 2.21)


def test_bytes_a_token_lie_between_the_measured_ones() -> None:
    assert bytes_a_token(8_192) == 3.12
    part = math.log(12_000 / 8_192) / math.log(16_000 / 8_192)
    assert bytes_a_token(12_000) == pytest.approx(3.12 + part * (3.27 - 3.12))
    assert bytes_a_token(260) == 2.21
    assert bytes_a_token(100_000) == 3.38


def test_given_tokens_need_no_text(nursery: Job, tmp_path: Path) -> None:
    split = "corpus={kind: files, train: ['/no/such/*.train'], split: {kind: tail, fraction: 0.2}}"
    planned = plan_corpus(nursery(split), runs=tmp_path, tokens=8_000)
    assert (planned.train_tokens, planned.dev_tokens, planned.source) == (8_000, 2_000, "--tokens")


def test_what_has_to_be_read_is_counted(files_job: Job, tmp_path: Path) -> None:
    """Compressed files, tables and mixes: the cleaned text, not the files' size."""
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"x" * 9_999 + b"\n"))
    rows = tmp_path / "b.jsonl"
    rows.write_text("".join(f'{{"n": {i}, "text": "é{"y" * 97}"}}\n' for i in range(100)))
    dev = f"split: {{kind: held_out, dev: ['{tmp_path}/a.dev']}}"

    def planned(corpus: str) -> PlannedCorpus:
        job = files_job("tokenizer.vocab_size=800", f"corpus={corpus}")
        return plan_corpus(job, runs=tmp_path, tokens=None)

    for path in (packed, rows):
        found = planned(f"{{kind: files, train: ['{path}'], {dev}}}")
        assert (found.train_tokens, found.dev_tokens) == (round(10_000 / 2.21), round(2_000 / 2.21))
        assert found.assumption.endswith("counted in the cleaned text")
    tail = "split: {kind: tail, fraction: 0.5}"
    found = planned(
        "{kind: mix, sources: ["
        f"{{name: one, corpus: {{kind: files, train: ['{rows}'], {tail}}}, words: 20}},"
        f"{{name: two, corpus: {{kind: files, train: ['{packed}'], {dev}}}, words: 1}}]}}"
    )
    assert found.train_tokens == round((20 * 100 + 10_000) / 2.21)
    assert found.dev_tokens == round((50 * 100 + 2_000) / 2.21)


@pytest.mark.parametrize(("asked", "each"), [("none", 0), ("begin", 1), ("end", 1), ("both", 2)])
def test_tokens_at_the_ends_of_documents_are_counted(
    asked: str, each: int, nursery: Job, tmp_path: Path
) -> None:
    """Against the shards that a run makes: what they have more than without these tokens."""
    (tmp_path / "a.train").write_text("One fine day.\n\n \n" * 300 + "It ends.\n" * 2)
    (tmp_path / "b.train").write_text("Another.\n\nAnd more.\n")
    (tmp_path / "a.dev").write_text("A day.\n\nIt began.\n\nIt ended.\n")
    corpus = (
        f"corpus={{kind: files, train: ['{tmp_path}/*.train'], documents: blank_lines, "
        f"split: {{kind: held_out, dev: ['{tmp_path}/*.dev']}}}}"
    )

    def tokens(asked: str, *, made: bool) -> tuple[int, int | None]:
        job = nursery(corpus, f"tokenizer.document_tokens={asked}", "tokenizer.vocab_size=270")
        runs = tmp_path / ("made" if made else "none")
        if made:
            prepare_corpus(job, Store(runs / "store"), lambda: None)
        planned = plan_corpus(job, runs=runs, tokens=None)
        assert planned.source == ("store" if made else "estimate")
        return planned.train_tokens, planned.dev_tokens

    (made_train, made_dev), (train, dev) = (tokens(asked, made=made) for made in (True, False))
    (plain_train, plain_dev), (without, dev_without) = (
        tokens("none", made=made) for made in (True, False)
    )
    assert train - without == made_train - plain_train == each * (301 + 2)
    assert None not in (dev, dev_without, made_dev, plain_dev)
    assert dev - dev_without == made_dev - plain_dev == each * 3  # type: ignore[operator]


def test_tokens_at_the_ends_of_scenes(nursery: Job, tmp_path: Path) -> None:
    """The nursery's, within two hundredths of what is made of it."""
    made, estimated = {}, {}
    for asked in ("none", "both"):
        changes = ("corpus.words=30_000", "corpus.documents=lines")
        job = nursery(*changes, f"tokenizer.document_tokens={asked}")
        estimated[asked] = plan_corpus(job, runs=tmp_path / "none", tokens=None)
        prepare_corpus(job, Store(tmp_path / "store"), lambda: None)
        made[asked] = plan_corpus(job, runs=tmp_path, tokens=None).train_tokens
    assert estimated["both"].assumption == (
        "1.35 tokens a word of the nursery, 2 tokens at the ends of each scene of 51.5 words"
    )
    more = estimated["both"].train_tokens - estimated["none"].train_tokens
    assert more == pytest.approx(made["both"] - made["none"], rel=0.02)


def test_a_hub_dataset_needs_tokens(files_job: Job, tmp_path: Path) -> None:
    hub = "{kind: hub, path: nobody/tales, split: {kind: tail, fraction: 0.2}}"
    mixed = f"{{kind: mix, sources: [{{name: a, corpus: {hub}, words: 5}}]}}"
    for corpus in (hub, mixed):
        with pytest.raises(DataError) as caught:
            plan_corpus(files_job(f"corpus={corpus}"), runs=tmp_path, tokens=None)
        assert str(caught.value) == (
            "corpus: got nobody/tales, a hub dataset, whose size is known when it is loaded, "
            "expected the job's text, to estimate its tokens\n"
            "    hint: give --tokens N, the tokens of the training text, to plan without it"
        )
    planned = plan_corpus(files_job(f"corpus={hub}"), runs=tmp_path, tokens=8_000)
    assert (planned.train_tokens, planned.dev_tokens) == (8_000, 2_000)
    assert plan_corpus(files_job(f"corpus={mixed}"), runs=tmp_path, tokens=8).dev_tokens is None


def test_a_prepared_hub_dataset_is_found_without_a_download(
    files_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tales"
    folder.mkdir()
    for split in ("train", "validation"):
        text = "".join(f'{{"text": "{split} {i} of a tale"}}\n' for i in range(400))
        (folder / f"{split}.jsonl").write_text(text)
    corpus = f"corpus={{kind: hub, path: '{folder}', split: {{kind: held_out}}}}"
    job = files_job(corpus, "tokenizer.vocab_size=270")
    opened = open_corpus(prepare_corpus(job, Store(tmp_path / "store"), lambda: None))
    asked = []
    real = datasets.load_dataset

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["streaming"])
        return real(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load)
    planned = plan_corpus(job, runs=tmp_path, tokens=None)
    assert (planned.source, planned.train_tokens) == ("store", opened.shards.num_tokens("train"))
    assert set(asked) == {True}


def test_missing_text_names_the_way_out(nursery: Job, tmp_path: Path) -> None:
    split = "corpus={kind: files, train: ['/no/such/*.train'], split: {kind: tail}}"
    with pytest.raises(DataError) as caught:
        plan_corpus(nursery(split), runs=tmp_path, tokens=None)
    assert str(caught.value) == (
        f"corpus: got '/no/such/*.train', which matches nothing from {Path.cwd()}, "
        "expected the job's text, to estimate its tokens\n"
        "    hint: give --tokens N, the tokens of the training text, to plan without it"
    )
