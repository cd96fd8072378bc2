"""The entries of the store: documents decide the tokens, and neither the text nor the tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from babyllama_ds.corpus.prepare import CorpusEntries, open_corpus, prepare_corpus
from babyllama_ds.corpus.sources import read_sources
from babyllama_ds.errors import DataError, Stopped
from babyllama_ds.files import hash_json
from babyllama_ds.spec.corpus import FilesCorpus
from babyllama_ds.spec.loading import load_job
from babyllama_ds.store import Store

Prepare = Callable[..., CorpusEntries]
NURSERY = "corpus={kind: nursery, words: 1000, dev_words: 300, pairs_per_task: 1"


@pytest.fixture
def prepare(tmp_path: Path, tiny_job: Callable[..., Path]) -> Prepare:
    """The tiny job's corpus, with overrides; a line of text is a sentence."""
    path = tiny_job(tmp_path / "job")

    def run(*overrides: str) -> CorpusEntries:
        job = load_job(path, overrides, environ={})
        return prepare_corpus(job, Store(tmp_path / "store"), lambda: None)

    return run


def test_without_documents_the_keys_are_what_they_were(prepare: Prepare, tmp_path: Path) -> None:
    """So that tokens, teachers and caches of earlier versions are found."""
    entries = prepare()
    corpus = load_job(tmp_path / "job" / "job.yaml", environ={}).corpus
    assert isinstance(corpus, FilesCorpus)
    text = read_sources(corpus).fingerprint()
    bpe = {"kind": "bpe", "vocab_size": 300, "min_frequency": 2}
    assert entries.tokenizer_key == hash_json({"version": 1, "text": text, **bpe})
    assert entries.tokens_key == hash_json(
        {"version": 1, "text": text, "tokenizer": entries.tokenizer_key}
    )


def test_a_nursery_can_be_stopped_while_it_is_written(
    tmp_path: Path, tiny_job: Callable[..., Path]
) -> None:
    def stop() -> None:
        raise Stopped("SIGTERM")

    job = load_job(tiny_job(tmp_path / "job"), [NURSERY + "}"], environ={})
    with pytest.raises(Stopped):
        prepare_corpus(job, Store(tmp_path / "store"), stop)
    assert not list((tmp_path / "store" / "text").glob("[0-9a-f]*"))


def test_the_unicode_form_decides_the_tokenizer(prepare: Prepare) -> None:
    forms = [prepare(f"tokenizer.normalization={form}") for form in ("nfkc", "nfc", "none")]
    assert forms[0].tokenizer_key == prepare().tokenizer_key
    assert len({each.tokenizer_key for each in forms}) == 3


def test_documents_and_their_tokens_decide_the_shards_alone(prepare: Prepare) -> None:
    entries = [
        prepare(),
        prepare("corpus.documents=lines"),
        prepare("corpus.documents=files"),
        prepare("corpus.documents=lines", "tokenizer.document_tokens=end"),
        prepare("corpus.documents=lines", "tokenizer.document_tokens=both"),
    ]
    assert len({each.tokens_key for each in entries}) == 5
    assert len({each.tokenizer_key for each in entries}) == 1


def test_the_nurserys_scenes_are_documents(prepare: Prepare) -> None:
    vocabulary = "tokenizer.vocab_size=280"
    plain = prepare(f"{NURSERY}}}", vocabulary)
    kept = prepare(f"{NURSERY}, documents: lines}}", vocabulary, "tokenizer.document_tokens=both")
    assert plain.pairs_dir == kept.pairs_dir  # the text is the same
    assert plain.tokens_key != kept.tokens_key
    assert kept.pairs_dir is not None
    shards = open_corpus(kept).shards
    for split in ("train", "dev"):
        scenes = (kept.pairs_dir.parent / split / f"nursery.{split}").read_text().splitlines()
        documents = shards.documents(split)
        assert documents is not None
        assert documents.num_documents == len(scenes) > 3
        ids = shards.read(split, 0, shards.num_tokens(split)).tolist()
        assert ids.count(1) == ids.count(2) == len(scenes)
        assert (ids[0], ids[-1]) == (1, 2)
    assert open_corpus(plain).shards.documents("train") is None


def test_rows_of_a_mix_are_documents_beside_the_lines_of_a_text(
    prepare: Prepare, tmp_path: Path
) -> None:
    rows = ["mara paints a blue boat .\nand laughs .", "old tim mends the long ladder ."]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tail = "split: {kind: tail, fraction: 0.3}"
    of_rows = f"{{kind: files, train: [{table}], {tail}, documents: rows}}"
    of_lines = f"{{kind: files, train: ['{tmp_path}/job/*.train'], {tail}, documents: lines}}"
    entries = prepare(
        "corpus={kind: mix, sources: ["
        f"{{name: a, corpus: {of_rows}, words: 8}}, {{name: b, corpus: {of_lines}, words: 60}}]}}",
        "tokenizer.document_tokens=end",
    )
    corpus = open_corpus(entries)
    end = corpus.tokenizer.eos_token_id
    tokens = corpus.shards.gather("train", np.array([0]), corpus.shards.num_tokens("train"))[0]
    texts = [[]]  # type: ignore[var-annotated]
    for token in tokens.tolist():
        if token == end:
            texts.append([])
        else:
            texts[-1].append(token)
    # Each is encoded by itself, so the tokenizer puts its space before each.
    documents = [corpus.tokenizer.decode(ids) for ids in texts[:-1]]
    assert texts[-1] == []
    assert documents[0] == f" {rows[0]}\n"
    of_text = (tmp_path / "job" / "town.train").read_text().splitlines(keepends=True)
    assert documents[1:] == [f" {line}" for line in of_text[: len(documents) - 1]]
    assert len(documents) > 5


def test_a_loaded_tokenizer_keeps_its_own_ends_of_texts(prepare: Prepare, tmp_path: Path) -> None:
    """One `tokenizer.json`, and models that end a text with different tokens."""
    own = prepare().tokenizer_dir
    ends = {"usual": "</s>", "other": "<pad>"}
    found = {}
    for name, token in ends.items():
        folder = tmp_path / name
        shutil.copytree(own, folder)
        settings = json.loads((own / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": token}))
        found[name] = prepare(
            f"tokenizer={{kind: pretrained, path: {folder}, document_tokens: end}}",
            "corpus.documents=lines",
        )
    for name, entries in found.items():
        corpus = open_corpus(entries)
        assert corpus.tokenizer.eos_token == ends[name]
        last = corpus.shards.read("train", corpus.shards.num_tokens("train") - 1, 1)
        assert corpus.tokenizer.convert_ids_to_tokens(last.tolist()) == [ends[name]]
    assert found["usual"].tokens_key != found["other"].tokens_key


def test_boundaries_that_are_nowhere_are_refused_before_work_begins(
    prepare: Prepare, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"corpus\.documents: got blank_lines, but no file"):
        prepare("corpus.documents=blank_lines")
    assert not list((tmp_path / "store").rglob("tokenizer.json"))
