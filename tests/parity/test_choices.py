"""BabyLM's zero-shot formats through `babyllama-ds evaluate`: every outcome is that of a slow,
obvious implementation, which reads the files, finds the scored tokens and scores them by itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from babyllama_ds import cli
from babyllama_ds.corpus.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("process_as_it_was")

WORDS = ("the", "little", "dog", "café", "sees", "a", "日本", "red", "ball", "🙂", "runs", "to")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
ITEMS = 14
OPTIONS = 5


# -- tokenizers -----------------------------------------------------------------------------------


def saved(tokenizer: Tokenizer, trainer: Any, folder: Path) -> Path:
    # Each character occurs: an unknown token could not be spelt.
    texts = [words(random.Random(number), 8) + ".\nball ." for number in range(60)]
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def byte_level(folder: Path, *, space: bool) -> Path:
    """As trained here, or as GPT-2's: tokens of bytes, offsets without spaces, tokens around."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = (
        TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
        if space
        else ByteLevel(trim_offsets=True)
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return saved(tokenizer, trainer, folder)


def sentence_piece(folder: Path) -> Path:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return saved(tokenizer, trainer, folder)


def word_piece(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("##", ""), decoders.Fuse()])
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False)
    return saved(tokenizer, trainer, folder)


TOKENIZERS: dict[str, Callable[[Path], Path]] = {
    "byte-level": lambda folder: byte_level(folder, space=False),
    "byte-level, with a space": lambda folder: byte_level(folder, space=True),
    "SentencePiece-like": sentence_piece,
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = TOKENIZERS[request.param](tmp_path_factory.mktemp("model"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(load_tokenizer(str(directory))),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.3,
        )
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


# -- benchmarks -----------------------------------------------------------------------------------


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def different(draw: random.Random, number: int, space: str = "") -> list[str]:
    """Texts that all differ, some of several words and some of several lines."""
    ends = (".", " .", "\n")
    return [
        f"{space}{words(draw, draw.randint(1, 3))} {last}{draw.choice(ends)}ball"
        for last in draw.sample(WORDS, number)
    ]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, draw = tmp_path_factory.mktemp("benchmarks"), random.Random(5)
    made: dict[str, list[dict[str, Any]]] = {"ewok": [], "entity": [], "comps": [], "blimp": []}
    for number in range(ITEMS):
        one, two = different(draw, 2)
        contexts, targets = different(draw, 2), different(draw, 2)
        record = {"Context1": contexts[0], "Target1": targets[0], "Target2": targets[1]}
        made["ewok"].append({**record, "Domain": ("near", "far")[number % 2]})
        options = different(draw, OPTIONS, " " if number % 2 else "")
        made["entity"].append(
            {"input_prefix": words(draw, 6), "options": options, "numops": number % 3}
        )
        prefixes = {"prefix_acceptable": one, "prefix_unacceptable": two}
        made["comps"].append({**prefixes, "property_phrase": words(draw, 3)})
        made["blimp"].append({"sentence_good": one, "sentence_bad": two})
    for name, records in made.items():
        (folder / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / name / f"{name}.jsonl").write_text(lines)
    return {name: folder / name for name in made}


# -- a slow, obvious implementation ---------------------------------------------------------------


def candidates(record: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Its task ("": the file), and what is given and what is scored of each candidate."""
    if "sentence_good" in record:
        return "", [("", record["sentence_good"]), ("", record["sentence_bad"])]
    if "Domain" in record:
        targets = (record["Target1"], record["Target2"])
        return record["Domain"], [(record["Context1"], f" {target}") for target in targets]
    if "options" in record:
        pairs = [(record["input_prefix"], option) for option in record["options"]]
        return f"_{record['numops']}_ops", pairs
    contexts = (record["prefix_acceptable"], record["prefix_unacceptable"])
    return "", [(f"{context} ", record["property_phrase"]) for context in contexts]


@torch.no_grad()
def score(model: Any, tokenizer: Any, given: str, scored: str, before: list[int]) -> float | None:
    """One candidate at a time; none: no token of it has one before it."""
    ids = tokenizer(f" {given}{scored}", add_special_tokens=False).input_ids
    # What belongs to the context is all that can be spelt without going beyond it.
    context = letters(tokenizer, f" {given}") if given else ""
    alone = max(
        count
        for count in range(len(ids) + 1)
        if context.startswith(letters(tokenizer, spelt(tokenizer, ids[:count])))
    )
    first = max(1, len(before) + alone)
    ids = before + ids
    table = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    terms = [table[place - 1, ids[place]].item() for place in range(first, len(ids))]
    return sum(terms) if terms else None


def spelt(tokenizer: Any, ids: list[int]) -> str:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    text: str = tokenizer.backend_tokenizer.decoder.decode(tokens)
    return text


def letters(tokenizer: Any, text: str) -> str:
    """WordPiece knows no spaces."""
    word_piece = isinstance(tokenizer.backend_tokenizer.model, models.WordPiece)
    return "".join(text.split()) if word_piece else text


def reference(model: Any, tokenizer: Any, path: Path, before: list[int]) -> dict[str, str]:
    outcomes: dict[str, str] = {}
    for line in path.read_text().splitlines():
        task, pairs = candidates(json.loads(line))
        task = path.stem + task if task.startswith("_") or not task else task
        right, *others = (score(model, tokenizer, *pair, before) for pair in pairs)
        if right is None or None in others:
            outcome = "="
        else:
            outcome = "1" if all(right > other for other in others) else "0"
        outcomes[task] = outcomes.get(task, "") + outcome
    return outcomes


# -- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["none", "bos"])
def test_every_outcome_is_that_of_a_plain_implementation(
    model_dir: Path,
    benchmarks: dict[str, Path],
    prefix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = [f"{name}={path}" for name, path in benchmarks.items()]
    options = ["--device", "cpu", "--batch-tokens", "200", "--prefix", prefix, "--json"]
    assert cli.main(["evaluate", str(model_dir), "--pairs", *pairs, *options]) == 0
    measured = json.loads(capsys.readouterr().out)["minimal_pairs"]
    model = LlamaForCausalLM.from_pretrained(model_dir).double().eval()
    tokenizer = load_tokenizer(str(model_dir))
    before = [tokenizer.bos_token_id] if prefix == "bos" else []
    told: set[str] = set()
    for name, path in benchmarks.items():
        tasks = measured[name]["tasks"]
        found = {task: facts["outcomes"] for task, facts in tasks.items()}
        assert found == reference(model, tokenizer, path / f"{name}.jsonl", before)
        told.update(*found.values())
        assert sum(facts["pairs"] for facts in tasks.values()) == ITEMS
        chances = {facts.get("chance", 0.5) for facts in tasks.values()}
        assert chances == {1 / OPTIONS if name == "entity" else 0.5}
        right = [facts["outcomes"].count("1") / facts["pairs"] for facts in tasks.values()]
        assert measured[name]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert measured["ewok"]["tasks"].keys() == {"near", "far"}
    assert measured["entity"]["tasks"].keys() == {f"entity_{n}_ops" for n in range(3)}
    assert {"0", "1"} <= told


def test_the_table_says_what_guessing_gives(
    model_dir: Path, benchmarks: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{name}={benchmarks[name]}" for name in ("entity", "ewok")]
    assert cli.main(["evaluate", str(model_dir), "--pairs", *given, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "(mean over 3 tasks; guessing gives 20 %; " in said
    assert "(mean over 2 tasks; guessing gives 50 %; " in said
