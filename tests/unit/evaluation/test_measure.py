"""`evaluate`: the numbers of any family are those of its own logits; every wrong word is told."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from babyllama_ds import cli, files
from babyllama_ds.corpus.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from babyllama_ds.errors import DataError, ModelError, UserError
from babyllama_ds.evaluation import measure as measuring
from babyllama_ds.evaluation.fine_tuning import Learner
from babyllama_ds.evaluation.measure import Wanted, measure
from babyllama_ds.spec.corpus import TrainedTokenizer
from babyllama_ds.spec.evaluation import FineTuning
from babyllama_ds.store import Store

CPU = torch.device("cpu")
VOCAB = 288
LENGTH = 16
COMMON: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    **COMMON,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    ),
    # Rows above the tokenizer's, as of vocabularies padded to a multiple.
    "padded llama": lambda: LlamaConfig(vocab_size=VOCAB + 32, intermediate_size=40, **SIZES),
    "tied qwen2": lambda: Qwen2Config(
        vocab_size=VOCAB + 3,
        intermediate_size=40,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **SIZES,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB, ffn_dim=40, word_embed_proj_dim=12, init_std=0.2, **SIZES
    ),
    "gpt-neox": lambda: GPTNeoXConfig(vocab_size=VOCAB, intermediate_size=40, **SIZES),
    "gpt-j with a biased head": lambda: GPTJConfig(
        vocab_size=VOCAB + 5,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=4,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **COMMON,
    ),
}
WORDS = ("the", "little", "dog", "sees", "a", "red", "ball", "and", "runs", "to", "it")


def lines(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=8)) + ".\n" for _ in range(count))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that puts its own tokens around a text unless it is told not to.

    Like GPT-2's, and unlike those trained here, it adds no space.
    """
    directory = tmp_path_factory.mktemp("tokenizer")
    spec = TrainedTokenizer(kind="bpe", vocab_size=VOCAB)
    train_tokenizer(spec, iter(lines(0, 200).splitlines()), directory)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_prefix_space = False
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    save_tokenizer(tokenizer, directory)
    assert load_tokenizer(str(directory))("the dog").input_ids[0] == 1
    return directory


def save(family: str, tokenizer_dir: Path, directory: Path, **changes: Any) -> Path:
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("lm_head.bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    return directory


@pytest.fixture(scope="module")
def model_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with padding rows; not to be changed."""
    return save("padded llama", tokenizer_dir, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Wanted:
    """Two texts, whose border lies within a window, and a benchmark of two tasks."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tales.txt").write_text(lines(1, 9))
    (folder / "talk.dev").write_text(lines(2, 14))
    pairs = folder / "pairs"
    pairs.mkdir()
    draw = random.Random(3)
    for task, term in (("order", "word_order"), ("turns", None)):
        with (pairs / f"{task}.jsonl").open("w") as stream:
            for _ in range(12):
                good = draw.choices(WORDS, k=6)
                bad = draw.sample(good, k=6)
                glue = "\n" if task == "turns" else " "
                record = {"sentence_good": glue.join(good), "sentence_bad": glue.join(bad)}
                record |= {} if term is None else {"linguistics_term": term}
                stream.write(json.dumps(record) + "\n")
    return Wanted(
        texts=(folder / "tales.txt", folder / "talk.dev"),
        benchmarks={"order": pairs},
        length=LENGTH,
        batch_tokens=100,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- a slow, obvious implementation ---------------------------------------------------------------


@torch.no_grad()
def log_probs(model: Any, tokenizer: Any, ids: list[int]) -> torch.Tensor:
    """[S, V] in float64, from the model's own logits; padding rows are no tokens.

    Of the tokenizer's tokens there may be more than were learnt: Qwen2's adds its own.
    """
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, :, : len(tokenizer)]
    return logits.log_softmax(-1)


def reference_texts(model: Any, tokenizer: Any, wanted: Wanted) -> dict[str, tuple[float, int]]:
    """Summed NLL and tokens of each file: files one after another, cut into windows."""
    stream = [
        (path.stem, token)
        for path in wanted.texts
        for token in tokenizer(path.read_text(), add_special_tokens=False).input_ids
    ]
    sums: dict[str, tuple[float, int]] = {}
    for start in range(0, len(stream) - wanted.length + 1, wanted.length):
        window = stream[start : start + wanted.length]
        table = log_probs(model, tokenizer, [token for _, token in window])
        for place, (domain, token) in enumerate(window[1:]):
            nll, tokens = sums.get(domain, (0.0, 0))
            sums[domain] = (nll - table[place, token].item(), tokens + 1)
    return sums


def reference_accuracy(
    model: Any, tokenizer: Any, path: Path, before: list[int], space: str = " "
) -> float:
    def score(sentence: str) -> float:
        ids = before + tokenizer(space + sentence, add_special_tokens=False).input_ids
        table = log_probs(model, tokenizer, ids)
        return sum(table[place, token].item() for place, token in enumerate(ids[1:]))

    records = [json.loads(line) for line in path.read_text().splitlines()]
    right = sum(score(one["sentence_good"]) > score(one["sentence_bad"]) for one in records)
    return right / len(records)


@pytest.mark.parametrize("family", CONFIGS)
def test_numbers_are_those_of_the_models_own_logits(
    family: str, tokenizer_dir: Path, wanted: Wanted, tmp_path: Path
) -> None:
    directory = save(family, tokenizer_dir, tmp_path / "model")
    result = measure(str(directory), wanted, device=CPU)
    assert json.loads(json.dumps(result)) == result
    model = AutoModelForCausalLM.from_pretrained(directory).double().eval()
    tokenizer = load_tokenizer(str(directory))
    expected = reference_texts(model, tokenizer, wanted)
    domains = result["dev"]["domains"]
    assert domains.keys() == expected.keys() == {"tales", "talk"}
    for name, (nll, tokens) in expected.items():
        assert domains[name]["tokens"] == tokens
        assert domains[name]["ce"] == pytest.approx(nll / tokens, rel=1e-5)
    nll, tokens = (sum(column) for column in zip(*expected.values(), strict=True))
    assert result["dev"]["ce"] == pytest.approx(nll / tokens, rel=1e-5)
    for task, score in result["minimal_pairs"]["order"]["tasks"].items():
        path = wanted.benchmarks["order"] / f"{task}.jsonl"
        assert score["accuracy"] == reference_accuracy(model, tokenizer, path, [])
        assert score["pairs"] == 12
    assert result["minimal_pairs"]["order"]["terms"].keys() == {"word_order"}


def test_bits_are_per_byte_of_the_labelled_text(model_dir: Path, wanted: Wanted) -> None:
    dev = measure(str(model_dir), replace(wanted, length=2), device=CPU)["dev"]
    tokenizer = load_tokenizer(str(model_dir))
    stream = [
        token
        for path in wanted.texts
        for token in tokenizer(path.read_text(), add_special_tokens=False).input_ids
    ]
    labels = stream[1 : len(stream) // 2 * 2 : 2]  # every second token of windows of two
    num_bytes = sum(len(tokenizer.decode([token]).encode()) for token in labels)
    assert dev["tokens"] == len(labels)
    expected = dev["ce"] * len(labels) / math.log(2) / num_bytes
    assert dev["bits_per_byte"] == pytest.approx(expected, rel=1e-9)


def test_a_prefix_token_only_when_asked_for(model_dir: Path, wanted: Wanted) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir).double().eval()
    tokenizer = load_tokenizer(str(model_dir))
    pairs = replace(wanted, texts=())
    before: dict[str, list[int]] = {"none": [], "bos": [1]}
    found = {}
    for prefix, ids in before.items():
        result = measure(str(model_dir), replace(pairs, prefix=prefix), device=CPU)
        assert result["dev"] is None
        order = result["minimal_pairs"]["order"]
        found[prefix] = [order["tasks"][task]["accuracy"] for task in ("order", "turns")]
        assert found[prefix] == [
            reference_accuracy(model, tokenizer, wanted.benchmarks["order"] / name, ids)
            for name in ("order.jsonl", "turns.jsonl")
        ]
        assert order["prefix"] == {"none": None, "bos": "<s>"}[prefix]
    assert found["none"] != found["bos"]


def test_a_space_before_a_sentence_only_when_asked_for(model_dir: Path, wanted: Wanted) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir).double().eval()
    tokenizer = load_tokenizer(str(model_dir))
    found = {}
    for space in ("", " "):
        asked = replace(wanted, texts=(), leading_space=bool(space))
        order = measure(str(model_dir), asked, device=CPU)["minimal_pairs"]["order"]
        found[space] = [order["tasks"][task]["accuracy"] for task in ("order", "turns")]
        assert found[space] == [
            reference_accuracy(model, tokenizer, wanted.benchmarks["order"] / name, [], space)
            for name in ("order.jsonl", "turns.jsonl")
        ]
    assert found[""] != found[" "]


def test_a_run_is_measured_by_its_student(model_dir: Path, wanted: Wanted, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "student").symlink_to(model_dir)
    of_run = measure(str(tmp_path / "run"), wanted, device=CPU)
    plain = measure(str(model_dir), wanted, device=CPU)
    assert {**of_run, "model": 0, "seconds": 0} == {**plain, "model": 0, "seconds": 0}


def test_batches_are_told_and_change_nothing(model_dir: Path, wanted: Wanted) -> None:
    told: list[tuple[int, int]] = []
    few = measure(str(model_dir), wanted, device=CPU, on_batch=lambda *call: told.append(call))
    many = measure(str(model_dir), replace(wanted, batch_tokens=100_000), device=CPU)
    assert few["dev"]["ce"] == pytest.approx(many["dev"]["ce"], rel=1e-6)
    assert few["minimal_pairs"] == many["minimal_pairs"]
    assert sum(done == of for done, of in told) == 2  # the text and the pairs


# -- a tokenizer with more tokens than the model has rows -----------------------------------------


def test_a_token_beyond_the_embedding_matters_only_where_it_occurs(
    model_dir: Path, wanted: Wanted, tmp_path: Path
) -> None:
    """The published BabyLlama has one: `<|endoftext|>`, which no text holds."""
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.add_tokens([f"extra{number}" for number in range(40)])
    tokenizer.save_pretrained(str(directory))
    plain = measure(str(model_dir), wanted, device=CPU)
    extended = measure(str(directory), wanted, device=CPU)
    # The padding rows below them are tokens now.
    assert extended["dev"]["ce"] > plain["dev"]["ce"]
    (tmp_path / "odd.txt").write_text(lines(1, 9) + "extra39\n" + lines(1, 3))
    with pytest.raises(DataError, match=r"got a text with the token 'extra39', id 327, expected"):
        measure(str(directory), replace(wanted, texts=(tmp_path / "odd.txt",)), device=CPU)


def test_what_the_tokenizer_changes_of_a_text_is_told(
    model_dir: Path, wanted: Wanted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    tokenizer = load_tokenizer(str(directory))
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    save_tokenizer(tokenizer, directory)
    (tmp_path / "tales.txt").write_text("The Dog sees The ball.\n" * 9)
    with caplog.at_level("WARNING", "babyllama_ds"):
        asked = replace(wanted, texts=(tmp_path / "tales.txt",), benchmarks={})
        measure(str(directory), asked, device=CPU)
    (message,) = (one for one in caplog.messages if "writes otherwise" in one)
    assert "it writes otherwise 27 of the text's " in message
    assert "2 different" in message


# -- remembered -----------------------------------------------------------------------------------


def test_the_store_remembers(
    model_dir: Path, wanted: Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, told = Store(tmp_path / "store"), []

    def again(path: Path = model_dir, **changes: Any) -> bool:
        told.clear()
        asked = replace(wanted, **changes)
        measure(str(path), asked, device=CPU, store=store, on_batch=lambda *_: told.append(1))
        return bool(told)

    assert again()
    assert not again()
    moved = tmp_path / "moved"
    shutil.copytree(model_dir, moved)
    assert not again(moved)  # the same files elsewhere
    assert not again(batch_tokens=50)
    assert again(length=LENGTH // 2)
    assert again(prefix="bos")
    assert again(leading_space=False)
    assert again(cleaning="babylm")
    assert again(texts=wanted.texts[:1])
    assert again(benchmarks={"another": wanted.benchmarks["order"]})
    assert again(texts=())
    assert not again(texts=(), length=LENGTH // 2)  # windows of no text
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert again(moved)
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.backend_tokenizer.normalizer = None
    shutil.rmtree(moved)
    shutil.copytree(model_dir, moved)
    tokenizer.save_pretrained(str(moved))
    assert again(moved)
    assert again(moved, texts=())
    files.write_manifest(moved, fingerprint="of an export")
    assert not again(moved)
    weights = load_file(moved / "model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, moved / "model.safetensors")
    assert again(moved)  # trained further: its manifest tells of what was there before


# -- fine-tuned -----------------------------------------------------------------------------------


@pytest.fixture
def learners(monkeypatch: pytest.MonkeyPatch) -> list[Learner]:
    """Those that were to learn a suite; none does."""
    seen: list[Learner] = []
    monkeypatch.setattr(measuring, "load_suite", lambda *_, **__: [])
    monkeypatch.setattr(measuring, "fine_tune_suite", lambda one, *_, **__: seen.append(one) or {})
    return seen


SUITE = FineTuning(name="toy", path="toy", max_tokens=40)


@pytest.mark.parametrize("leading_space", [True, False])
@pytest.mark.parametrize("prefix", ["none", "bos"])
def test_examples_are_given_as_sentences_are(
    leading_space: bool, prefix: Any, model_dir: Path, learners: list[Learner]
) -> None:
    asked = Wanted(suites=(SUITE,), prefix=prefix, leading_space=leading_space, batch_tokens=77)
    measure(str(model_dir), asked, device=CPU)
    (learner,) = learners
    assert (learner.prefix, learner.leading_space) == (prefix, leading_space)
    assert (learner.batch_tokens, learner.device, learner.model) == (77, CPU, str(model_dir))


def test_what_no_copy_can_learn_is_told_before_anything_is_measured(
    model_dir: Path, wanted: Wanted, learners: list[Learner], tmp_path: Path
) -> None:
    long = replace(wanted, suites=(SUITE.model_copy(update={"max_tokens": 65}),))
    told: list[tuple[int, int]] = []
    with pytest.raises(DataError, match="--max-tokens: got examples of 65 tokens, expected at mo"):
        measure(str(model_dir), long, device=CPU, on_batch=lambda *call: told.append(call))
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(str(directory))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(directory))
    asked = replace(wanted, suites=(SUITE,))
    with pytest.raises(DataError, match="got a tokenizer without a token that ends a text"):
        measure(str(directory), asked, device=CPU, on_batch=lambda *call: told.append(call))
    assert told == []
    assert learners == []


def test_a_measurement_without_a_suite_is_not_taken_for_one_with_it(
    model_dir: Path, learners: list[Learner], tmp_path: Path
) -> None:
    (tmp_path / "toy").mkdir()
    suite = SUITE.model_copy(update={"path": str(tmp_path / "toy")})
    longer = suite.model_copy(update={"max_tokens": 41})
    store = Store(tmp_path / "store")
    learnt = []
    for suites in ((suite,), (suite,), (longer,), (suite, longer), (longer,)):
        before = len(learners)
        measure(str(model_dir), Wanted(suites=suites), device=CPU, store=store)
        learnt.append(len(learners) - before)
    assert learnt == [1, 0, 1, 2, 0]


# -- what is wrong --------------------------------------------------------------------------------


def refused(path: Path | str, wanted: Wanted) -> str:
    with pytest.raises(UserError) as caught:
        measure(str(path), wanted, device=CPU)
    return str(caught.value)


def test_nothing_to_measure_is_told(model_dir: Path) -> None:
    assert "got neither --text, --pairs nor --fine-tune" in refused(model_dir, Wanted())


def test_no_model_is_told(tmp_path: Path, wanted: Wanted) -> None:
    assert "no such directory" in refused(tmp_path / "nothing", wanted)
    assert "without config.json" in refused(tmp_path, wanted)


def test_a_name_that_is_none_is_told_to_be_no_model(
    wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = refused("runs/no-such-run", wanted)
    assert told.startswith("MODEL: got runs/no-such-run: no such directory here")
    assert "expected a causal language model" in told


def test_pickled_weights_are_told(model_dir: Path, wanted: Wanted, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    message = refused(directory, wanted)
    assert "pickled weights only (pytorch_model.bin)" in message
    assert "save_pretrained" in message


def test_damaged_weights_are_told(model_dir: Path, wanted: Wanted, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    (directory / "model.safetensors").write_bytes(b"not weights")
    assert refused(directory, wanted).startswith("MODEL: got ")


def test_a_missing_tokenizer_is_told(model_dir: Path, wanted: Wanted, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dir / name, tmp_path)
    assert "a fast tokenizer" in refused(tmp_path, wanted)


def test_a_slow_tokenizer_is_told(model_dir: Path, wanted: Wanted, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dir / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert "a tokenizer written in Python" in refused(tmp_path, wanted)


def test_wrong_pairs_are_told(model_dir: Path, wanted: Wanted, tmp_path: Path) -> None:
    def pairs(folder: Path) -> str:
        return refused(model_dir, replace(wanted, benchmarks={"blimp": folder}))

    assert "see `--pairs`" in pairs(tmp_path / "nothing")
    assert "no *.jsonl files" in pairs(tmp_path)
    long = {"sentence_good": "the dog", "sentence_bad": "the " * 65}
    (tmp_path / "a.jsonl").write_text(json.dumps(long))
    assert "a.jsonl:1: sentence: got " in pairs(tmp_path)
    assert "at most 64, the model's positions" in pairs(tmp_path)


def test_wrong_texts_are_told(model_dir: Path, wanted: Wanted, tmp_path: Path) -> None:
    def text(*paths: Path, **changes: Any) -> str:
        return refused(model_dir, replace(wanted, texts=paths, **changes))

    assert "nothing.txt: got No such file" in text(tmp_path / "nothing.txt")
    short = tmp_path / "short.txt"
    short.write_text("the little dog")
    message = text(wanted.texts[0], short)  # short by itself, though a window would be filled
    tokens = len(load_tokenizer(str(model_dir))("the little dog\n", add_special_tokens=False)[0])
    assert f"short.txt, of {tokens} tokens, expected at least {LENGTH}, a window" in message
    assert "--length: got windows of 65 tokens, expected at most 64" in text(
        *wanted.texts, length=65
    )


def test_a_window_may_take_all_positions_and_a_text_be_one_window(
    model_dir: Path, wanted: Wanted, tmp_path: Path
) -> None:
    whole = measure(str(model_dir), replace(wanted, length=64, benchmarks={}), device=CPU)
    assert whole["dev"]["tokens"] % 63 == 0
    short = tmp_path / "short.txt"
    short.write_text("the little dog\n")
    tokens = len(load_tokenizer(str(model_dir))("the little dog\n", add_special_tokens=False)[0])
    asked = replace(wanted, texts=(short,), length=tokens, benchmarks={})
    assert measure(str(model_dir), asked, device=CPU)["dev"]["tokens"] == tokens - 1


def test_a_prefix_that_the_tokenizer_has_not_is_told(
    model_dir: Path, wanted: Wanted, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_dir, directory)
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(str(directory))
    tokenizer.bos_token = None
    tokenizer.save_pretrained(str(directory))
    message = refused(directory, replace(wanted, prefix="bos"))
    assert message.startswith("--prefix: got bos, and a tokenizer without")
    measure(str(directory), wanted, device=CPU)


def test_weights_that_are_not_finite_are_told(
    tokenizer_dir: Path, wanted: Wanted, tmp_path: Path
) -> None:
    directory = save("gpt2", tokenizer_dir, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    model.save_pretrained(directory)
    with pytest.raises(ModelError, match="log-likelihood of nan"):
        measure(str(directory), wanted, device=CPU)


# -- the command ----------------------------------------------------------------------------------


def command(model_dir: Path, wanted: Wanted, *more: object) -> list[str]:
    pairs = [f"{name}={path}" for name, path in wanted.benchmarks.items()]
    words = ["evaluate", model_dir, "--text", *wanted.texts, "--pairs", *pairs]
    words += ["--length", wanted.length, "--device", "cpu", *more]
    return list(map(str, words))


@pytest.mark.usefixtures("process_as_it_was")
def test_the_command_prints_a_table_or_json(
    model_dir: Path, wanted: Wanted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ("--runs", tmp_path / "runs")
    assert cli.main(command(model_dir, wanted, "--json", *runs)) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "dev cross-entropy" in err
    assert list((tmp_path / "runs" / "store" / "evaluations").glob("*/evaluation.json"))
    assert cli.main(command(model_dir, wanted, *runs)) == 0
    out, err = capsys.readouterr()
    assert "found in the store" in err
    tales = next(line for line in out.splitlines() if line.startswith("| tales "))
    assert tales.split("|")[2].strip() == f"{result['dev']['domains']['tales']['tokens']:,}"
    assert f"{result['dev']['ce']:.4f}" in out
    assert f"order: {100 * result['minimal_pairs']['order']['accuracy']:.2f} ± " in out


@pytest.mark.usefixtures("process_as_it_was")
def test_the_command_ends_with_2_and_one_error(
    model_dir: Path, wanted: Wanted, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(model_dir), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: evaluate: got neither")
    twice = [f"order={wanted.benchmarks['order']}"] * 2
    assert cli.main(["evaluate", str(model_dir), "--pairs", *twice]) == 2
    assert "--pairs: got two called order, expected a name for each" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--pairs", "folder", "got 'folder', expected NAME=DIR"),
        ("--pairs", "=folder", "got '=folder', expected NAME=DIR"),
        ("--length", "1", "got '1', expected a whole number, 2 or more"),
        ("--prefix", "eos", "invalid choice: 'eos'"),
    ],
)
def test_words_out_of_range_are_usage_errors(
    option: str, value: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", "MODEL", f"{option}={value}"])
    assert caught.value.code == 2
    assert f"argument {option}: {told}" in capsys.readouterr().err
