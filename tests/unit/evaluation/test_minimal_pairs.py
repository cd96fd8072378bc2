from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from babyllama_ds import ranks
from babyllama_ds.errors import DataError, ModelError
from babyllama_ds.evaluation.minimal_pairs import (
    Pair,
    PairScores,
    Task,
    TaskScore,
    evaluate_minimal_pairs,
    length_batches,
    load_tasks,
    score_sentences,
    sentence_encoder,
)

V = 61
TEXT = ["the cat sees the dogs .", "The dogs see the cat .", "who do the cats see ?"]


def tiny_llama():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2():
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=V, n_embd=24, n_layer=2, n_head=3, n_positions=24, initializer_range=0.3
    )
    return GPT2LMHeadModel(config)  # in training mode, with dropout


def random_sentences(count=40, longest=24):
    draw = random.Random(7)
    return [[draw.randrange(V) for _ in range(draw.randint(0, longest))] for _ in range(count)] + [
        [5] * longest,
        [5, 6],
        [5, 6],
    ]


@torch.no_grad()
def reference_score(model, ids) -> float:
    """One sentence at a time, from the model's own full logits."""
    model.eval()
    total = 0.0
    if len(ids) > 1:
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position, token in enumerate(ids[1:]):
            total += log_probs[position, token].item()
    return total


def score(model, sentences, batch_tokens=64, **options):
    return score_sentences(
        model, sentences, device="cpu", batch_tokens=batch_tokens, vocab_size=V, **options
    )


# -- scoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_scores_agree_with_a_plain_implementation(build) -> None:
    sentences = random_sentences()
    scores = score(build(), sentences)
    model = build()
    expected = [reference_score(model, ids) for ids in sentences]
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len({round(value, 3) for value in expected}) > 30  # sentences do differ


@pytest.mark.parametrize("batch_tokens", [1, 24, 100_000])
def test_scores_do_not_depend_on_batching_or_order(batch_tokens) -> None:
    model = tiny_llama()
    sentences = random_sentences()
    expected = score(model, sentences)
    scores = score(model, sentences[::-1], batch_tokens=batch_tokens)[::-1]
    assert scores == pytest.approx(expected, rel=1e-5)


def test_too_short_sentences_score_zero() -> None:
    assert score(tiny_llama(), [[], [7]]) == [0.0, 0.0]


def test_identical_sentences_are_scored_once_and_equal() -> None:
    model, rows = tiny_llama(), []
    model.model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first, other, second = score(model, [[1, 2, 3, 4], [4, 3, 2, 1], [1, 2, 3, 4]])
    assert first == second != other
    assert sum(rows) == 2


def test_length_batches_are_a_partition_within_the_budget() -> None:
    lengths = [len(ids) for ids in random_sentences(200)]
    batches = length_batches(lengths, 50)
    assert sorted(i for batch in batches for i in batch) == [
        i for i, length in enumerate(lengths) if length >= 2
    ]
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert all(len(batch) * width <= 50 for batch, width in zip(batches, longest, strict=True))
    assert longest == sorted(longest, reverse=True)  # the most memory first
    assert len(batches) < len(lengths) / 3
    # A sentence above the budget still gets its batch.
    assert length_batches([9, 3, 80, 0, 1], 10) == [[2], [0], [1]]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches(world, monkeypatch) -> None:
    model, sentences, shares = tiny_llama(), random_sentences(), []
    expected = score(model, sentences)
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    monkeypatch.setattr(ranks, "on_every_rank", lambda work: work())
    # Simulated ranks hand in their shares one after another; the last sees all of them.
    monkeypatch.setattr(ranks, "gather_objects", lambda share: [*shares, shares.append(share)][:-1])
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        score(model, sentences)
    monkeypatch.setattr(ranks, "gather_objects", lambda share: shares)
    assert score(model, sentences) == expected
    indices = [index for share in shares for index in share]
    assert len(indices) == len(set(indices))  # nobody worked on another's sentences
    assert all(len(share) > 5 for share in shares)


def test_longer_than_the_models_positions_is_an_error() -> None:
    for build in (tiny_llama, tiny_gpt2):
        with pytest.raises(DataError, match="sentence 2: got 25 tokens, expected at most 24"):
            score(build(), [[1, 2], [3] * 25])
    with pytest.raises(DataError, match=r"tasks/a\.jsonl:9: sentence: got 25 tokens"):
        score(tiny_llama(), [[1, 2], [3] * 25], sources=["tasks/a.jsonl:1", "tasks/a.jsonl:9"])


def test_not_a_number_is_an_error() -> None:
    model = tiny_llama()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ModelError, match="log-probability of nan, expected a finite number"):
        score(model, [[1, 2, 3]])


# -- tokenization -------------------------------------------------------------------------------


def byte_level_tokenizer(*, add_prefix_space: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def metaspace_tokenizer(*, prepend: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always" if prepend else "never")]
    )
    return trained(tokenizer, [])


def prepending_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return trained(tokenizer, [])


def trained(tokenizer: Tokenizer, alphabet: list[str]) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in TEXT for _ in range(5)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    ("tokenizer", "space"),
    [
        (byte_level_tokenizer(add_prefix_space=True), "Ġ"),
        (byte_level_tokenizer(add_prefix_space=False), "Ġ"),
        (metaspace_tokenizer(prepend=True), "▁"),
        (metaspace_tokenizer(prepend=False), "▁"),
        (prepending_tokenizer(), "▁"),
    ],
)
def test_exactly_one_leading_space_or_none(tokenizer, space) -> None:
    sentences = ["the cat", " the cat", "\n  the cat"]
    before = tokenizer.backend_tokenizer.to_str()
    for leading_space, first in ((True, space + "the"), (False, "the")):
        encode = sentence_encoder(tokenizer, leading_space=leading_space)
        for ids in encode(sentences):
            text = "".join(tokenizer.convert_ids_to_tokens(ids))
            assert text == f"{first}{space}cat"
    assert tokenizer.backend_tokenizer.to_str() == before  # the tokenizer itself is as it was


def test_with_a_leading_space_ids_are_those_of_running_text() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    encode = sentence_encoder(tokenizer, leading_space=True)
    assert encode(TEXT) == [tokenizer(text).input_ids for text in TEXT]


def test_no_special_tokens_padding_or_truncation() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(2)
    short, long = sentence_encoder(tokenizer, leading_space=True)(["the", "the cat sees the"])
    assert len(short) == 1
    assert len(long) == 4
    assert not {0, 1, 2} & {*short, *long}


# -- accuracy -----------------------------------------------------------------------------------


class FixedLlama(LlamaForCausalLM):
    """Next-token logits that depend on nothing: the head's bias alone."""

    def __init__(self, vocab_size: int, favoured: int | None = None) -> None:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=24,
            tie_word_embeddings=False,
        )
        super().__init__(config)
        self.lm_head = torch.nn.Linear(8, vocab_size, bias=True)
        torch.nn.init.zeros_(self.lm_head.weight)
        torch.nn.init.zeros_(self.lm_head.bias)
        if favoured is not None:
            self.lm_head.bias.data[favoured] = 5.0


def task(name: str, *pairs: tuple[str, str], term: str | None = None) -> Task:
    lines = tuple(Pair(good, bad, line) for line, (good, bad) in enumerate(pairs, start=1))
    return Task(name=name, pairs=lines, path=Path(f"{name}.jsonl"), term=term)


def evaluate(model, tokenizer, tasks, leading_space=True):
    return evaluate_minimal_pairs(
        model,
        tokenizer,
        tasks,
        leading_space=leading_space,
        device="cpu",
        batch_tokens=32,
        vocab_size=len(tokenizer),
    )


def test_a_constant_model_earns_nothing() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    tasks = [
        task("a", ("the cat sees the dogs", "the cat see the dogs"), ("the cat", "the dogs")),
        task("b", ("who do the cats see the cat ?", "do who the cats see the cat ?")),
    ]
    scores = evaluate(FixedLlama(len(tokenizer)), tokenizer, tasks)
    assert [(t.correct, t.ties, t.pairs) for t in scores.tasks] == [(0, 2, 2), (0, 1, 1)]
    assert scores.accuracy == 0
    assert scores.pooled_accuracy == 0


def test_the_likelier_sentence_wins() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    (see,) = sentence_encoder(tokenizer, leading_space=True)(["see"])
    model = FixedLlama(len(tokenizer), favoured=see[0])
    tasks = [
        task("right", ("the dogs see", "the dogs sees"), term="agreement"),
        task("wrong", ("the cat sees", "the cat see")),
        task("both", ("the see", "the cat"), ("the cat", "the see"), ("see the", "the the")),
    ]
    scores = evaluate(model, tokenizer, tasks)
    # In the last pair they differ only in the first token, which is not scored: a tie.
    assert [(t.name, t.correct, t.ties) for t in scores.tasks] == [
        ("right", 1, 0),
        ("wrong", 0, 0),
        ("both", 1, 1),
    ]
    assert scores.tasks[0].term == "agreement"
    assert scores.accuracy == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert scores.pooled_accuracy == pytest.approx(2 / 5)
    assert (scores.prefix, scores.leading_space) == (None, True)


def test_a_sentence_without_a_scored_token_makes_a_tie() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    model = FixedLlama(len(tokenizer))
    # One token scores 0, above any log-probability: it must neither win nor lose.
    tasks = [task("a", ("cat", "the cat"), ("the cat", "cat"), ("", "the cat"))]
    (result,) = evaluate(model, tokenizer, tasks).tasks
    assert (result.correct, result.ties) == (0, 3)


def test_accuracies_by_hand() -> None:
    tasks = (
        TaskScore(name="a", correct=3, ties=0, pairs=4),
        TaskScore(name="b", correct=10, ties=5, pairs=40),
    )
    scores = PairScores(tasks=tasks, leading_space=False)
    assert [t.accuracy for t in tasks] == [0.75, 0.25]
    assert scores.accuracy == 0.5
    assert scores.pooled_accuracy == 13 / 44


def test_accuracy_agrees_with_scoring_each_pair_by_itself() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    torch.manual_seed(1)
    config = tiny_llama().config
    config.vocab_size = len(tokenizer)
    model = LlamaForCausalLM(config)
    words = ["the", "cat", "cats", "dog", "dogs", "see", "sees", "who"]
    draw = random.Random(2)
    sentences = [" ".join(draw.choices(words, k=draw.randint(2, 6))) for _ in range(60)]
    tasks = [
        task(n, *zip(sentences[i::4], sentences[i + 1 :: 4], strict=True))
        for i, n in ((0, "a"), (2, "b"))
    ]
    scores = evaluate(model, tokenizer, tasks, leading_space=False)
    encode = sentence_encoder(tokenizer, leading_space=False)
    for measured, given in zip(scores.tasks, tasks, strict=True):
        margins = [
            reference_score(model, encode([good])[0]) - reference_score(model, encode([bad])[0])
            for good, bad, _ in given.pairs
        ]
        assert measured.correct == sum(margin > 1e-6 for margin in margins)
        assert 0 < measured.correct < measured.pairs


def test_too_long_a_sentence_names_file_and_line() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    tasks = [task("long", ("the cat", "the dog"), ("the" + " the" * 29, "cat"))]
    with pytest.raises(DataError, match=r"long\.jsonl:2: sentence: got 30 tokens, expected at"):
        evaluate(FixedLlama(len(tokenizer)), tokenizer, tasks)


def test_log_probability_of_a_constant_model_by_hand() -> None:
    model = FixedLlama(V)
    assert score(model, [[1, 2, 3, 4]]) == pytest.approx([-3 * math.log(V)], rel=1e-6)


# -- reading ------------------------------------------------------------------------------------


def write_lines(path: Path, *lines: object) -> None:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )


def record(good="the cat sees", bad="the cat see", **more):
    return {"sentence_good": good, "sentence_bad": bad, **more}


def test_tasks_are_read_in_order_of_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "b_plain.jsonl", record("é", "e"), "", record("c", "d"))
    facts = {"field": "syntax", "linguistics_term": "island_effects", "UID": "x"}
    write_lines(tmp_path / "a_island.jsonl", record(**facts), record("x", "y", **facts))
    write_lines(tmp_path / "notes.txt", "not a task")
    island, plain = load_tasks(tmp_path, max_pairs=None)
    assert (island.name, island.term, island.field) == ("a_island", "island_effects", "syntax")
    assert island.pairs == (Pair("the cat sees", "the cat see", 1), Pair("x", "y", 2))
    assert (plain.name, plain.term, plain.field) == ("b_plain", None, None)
    assert plain.pairs == (Pair("é", "e", 1), Pair("c", "d", 3))  # blank lines count as lines


def test_only_the_first_pairs_are_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", record("1", "1"), record("2", "2"), "broken")
    (first,) = load_tasks(tmp_path, max_pairs=2)
    assert [pair.good for pair in first.pairs] == ["1", "2"]


def test_missing_directory_and_directory_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: got no such directory"):
        load_tasks(tmp_path / "nowhere", max_pairs=None)
    with pytest.raises(DataError, match=r"got no \*\.jsonl files"):
        load_tasks(tmp_path, max_pairs=None)
    write_lines(tmp_path / "a.jsonl", record())
    with pytest.raises(DataError, match="got no such directory"):
        load_tasks(tmp_path / "a.jsonl", max_pairs=None)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"sentence_good": "x"', "expected a JSON object"),
        (b'["x", "y"]', "got a JSON list, expected a JSON object"),
        (b'{"sentence_good": "x"}', "sentence_bad: got nothing, expected a sentence"),
        (b'{"sentence_good": 3, "sentence_bad": "x"}', "sentence_good: got a int, expected a"),
        (b'{"sentence_good": "caf\xe9", "sentence_bad": "x"}', "byte 0xe9 at offset 22"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(record()).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        load_tasks(tmp_path, max_pairs=None)
    assert f"{path}:2: " in str(caught.value)
    assert complaint in str(caught.value)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", "", "")
    with pytest.raises(DataError, match=r"a\.jsonl: got an empty file, expected at least one"):
        load_tasks(tmp_path, max_pairs=None)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"a\.jsonl: got Is a directory, expected a readable file"):
        load_tasks(tmp_path, max_pairs=None)
