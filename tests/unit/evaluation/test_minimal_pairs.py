"""Minimal pairs: the likelier sentence wins, a tie is wrong, and what the means are taken over."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from babyllama_ds.errors import DataError
from babyllama_ds.evaluation.minimal_pairs import PairScores, TaskScore, evaluate_minimal_pairs
from babyllama_ds.evaluation.pair_files import Candidate, Item, Task
from babyllama_ds.evaluation.sentences import sentence_encoder

TEXT = ["the cat sees the dogs .", "The dogs see the cat .", "who do the cats see ?"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in TEXT for _ in range(5)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@torch.no_grad()
def reference_score(model, ids) -> float:
    """One sentence at a time, from the model's own full logits; the first token is given."""
    log_probs = model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs[place, token].item() for place, token in enumerate(ids[1:]))


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
    items = tuple(
        Item(tuple(map(Candidate, pair)), f"{name}.jsonl:{line}")
        for line, pair in enumerate(pairs, start=1)
    )
    return Task(name=name, items=items, term=term)


def evaluate(model, tokenizer, tasks, leading_space=True, prefix="none"):
    return evaluate_minimal_pairs(
        model,
        tokenizer,
        tasks,
        leading_space=leading_space,
        prefix=prefix,
        device="cpu",
        batch_tokens=32,
        vocab_size=len(tokenizer),
    )


def test_a_constant_model_earns_nothing() -> None:
    tokenizer = make_tokenizer()
    tasks = [
        task("a", ("the cat sees the dogs", "the cat see the dogs"), ("the cat", "the dogs")),
        task("b", ("who do the cats see the cat ?", "do who the cats see the cat ?")),
    ]
    scores = evaluate(FixedLlama(len(tokenizer)), tokenizer, tasks)
    assert [(t.correct, t.ties, t.pairs) for t in scores.tasks] == [(0, 2, 2), (0, 1, 1)]
    assert scores.accuracy == 0
    assert scores.pooled_accuracy == 0


def test_the_likelier_sentence_wins() -> None:
    tokenizer = make_tokenizer()
    (see,) = sentence_encoder(tokenizer, leading_space=True)(["see"])
    model = FixedLlama(len(tokenizer), favoured=see[0])
    tasks = [
        task("right", ("the dogs see", "the dogs sees"), term="agreement"),
        task("wrong", ("the cat sees", "the cat see")),
        task("both", ("the see", "the cat"), ("the cat", "the see"), ("see the", "the the")),
    ]
    scores = evaluate(model, tokenizer, tasks)
    # In the last pair they differ only in the first token, which is not scored: a tie.
    assert [(t.name, t.outcomes) for t in scores.tasks] == [
        ("right", "1"),
        ("wrong", "0"),
        ("both", "10="),
    ]
    assert scores.tasks[0].term == "agreement"
    assert scores.accuracy == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert scores.pooled_accuracy == pytest.approx(2 / 5)
    assert (scores.prefix, scores.leading_space) == (None, True)


def test_a_sentence_without_a_scored_token_makes_a_tie() -> None:
    tokenizer = make_tokenizer()
    model = FixedLlama(len(tokenizer))
    # One token scores 0, above any log-probability: it must neither win nor lose.
    tasks = [task("a", ("cat", "the cat"), ("the cat", "cat"), ("", "the cat"))]
    (result,) = evaluate(model, tokenizer, tasks).tasks
    assert (result.correct, result.ties) == (0, 3)


def test_accuracies_by_hand() -> None:
    tasks = (
        TaskScore(name="a", outcomes="1011"),
        TaskScore(name="b", outcomes="1" * 10 + "=" * 5 + "0" * 25),
    )
    scores = PairScores(tasks=tasks, leading_space=False)
    assert [(t.correct, t.ties, t.pairs) for t in tasks] == [(3, 0, 4), (10, 5, 40)]
    assert [t.accuracy for t in tasks] == [0.75, 0.25]
    assert scores.accuracy == 0.5
    assert scores.pooled_accuracy == 13 / 44


def test_accuracy_agrees_with_scoring_each_pair_by_itself() -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
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
            for (good, _), (bad, _) in (item.candidates for item in given.items)
        ]
        assert measured.correct == sum(margin > 1e-6 for margin in margins)
        assert 0 < measured.correct < measured.pairs


def test_too_long_a_sentence_names_file_and_line() -> None:
    tokenizer = make_tokenizer()
    tasks = [task("long", ("the cat", "the dog"), ("the" + " the" * 29, "cat"))]
    with pytest.raises(DataError, match=r"long\.jsonl:2: sentence: got 30 tokens, expected at"):
        evaluate(FixedLlama(len(tokenizer)), tokenizer, tasks)


# -- more than two, and parts --------------------------------------------------------------------


def choice(name: str, *items: tuple[str, ...]) -> Task:
    """Of each item the context, and what may follow it."""
    return Task(
        name=name,
        items=tuple(
            Item(tuple(Candidate(context + text, len(context)) for text in texts), f"{name}:{line}")
            for line, (context, *texts) in enumerate(items, start=1)
        ),
    )


def test_the_right_one_beats_all_others() -> None:
    tokenizer = make_tokenizer()
    (see,) = sentence_encoder(tokenizer, leading_space=True)(["see"])
    model = FixedLlama(len(tokenizer), favoured=see[0])
    items = choice(
        "which",
        ("the", " see see", " see the", " the the", " the see"),  # best of all
        ("the", " see the", " see see", " the the", " the the"),  # second
        ("the", " see the", " the the", " the see", " the cat"),  # level with the third
        ("the", " the cat", " the the", " see the", " see see"),  # level, but not with the best
        ("the", " see see", " the the", "", " see the"),  # one has nothing to score
        ("the", "", " the the", " see the", " see see"),
        ("the see", " see see", " the the", "", " see the"),  # the same behind two tokens
        ("the see", "", " the the", " see the", " see see"),
    )
    (scores,) = evaluate(model, tokenizer, [items]).tasks
    assert scores.outcomes == "10=0===="
    assert (scores.correct, scores.ties, scores.chance) == (1, 5, 0.25)


def test_what_is_before_a_part_is_not_scored() -> None:
    """The favoured token in the context changes nothing, whichever candidate's context it is in."""
    tokenizer = make_tokenizer()
    (see,) = sentence_encoder(tokenizer, leading_space=True)(["see"])
    model = FixedLlama(len(tokenizer), favoured=see[0])
    contexts = ("the see see ", "the cat cat ")

    def outcome(whole: bool, *texts: str) -> str:
        candidates = tuple(
            Candidate(context + text, 0 if whole else len(context))
            for context, text in zip(contexts, texts, strict=True)
        )
        given = Task(name="a", items=(Item(candidates, "a:1"),))
        return evaluate(model, tokenizer, [given]).tasks[0].outcomes

    assert [outcome(whole, "the cats", "the cats") for whole in (True, False)] == ["1", "="]
    assert [outcome(whole, "the", "see") for whole in (True, False)] == ["1", "0"]


def test_guessing_is_the_mean_of_what_it_gives_on_each_item() -> None:
    tokenizer = make_tokenizer()
    tasks = [
        choice("a", ("the", " cat", " dogs"), ("the", " cat", " dogs", " see", " who")),
        task("b", ("the cat", "the dogs")),
    ]
    scores = evaluate(FixedLlama(len(tokenizer)), tokenizer, tasks)
    assert [one.chance for one in scores.tasks] == [0.375, 0.5]


def test_an_options_line_is_named_where_it_is_too_long() -> None:
    tokenizer = make_tokenizer()
    fits = ("the", " cat", " dogs", " see")
    tasks = [choice("w.jsonl", fits, fits), choice("x.jsonl", fits, ("the", " cat", " the" * 24))]
    with pytest.raises(DataError, match=r"x\.jsonl:2: sentence: got 25 tokens, expected at most"):
        evaluate(FixedLlama(len(tokenizer)), tokenizer, tasks)


# -- a prefix token -----------------------------------------------------------------------------


def test_behind_a_prefix_token_the_first_token_counts() -> None:
    tokenizer = make_tokenizer()
    (see,) = sentence_encoder(tokenizer, leading_space=True)(["see"])
    model = FixedLlama(len(tokenizer), favoured=see[0])
    tasks = [task("first", ("see the", "the the"), ("see", "the"), ("", "see"))]
    scores = evaluate(model, tokenizer, tasks, prefix="bos")
    # An empty sentence has its leading space; without it there is nothing to score.
    assert [(t.correct, t.ties) for t in scores.tasks] == [(2, 0)]
    nothing = [task("nothing", ("", "see"))]
    (empty,) = evaluate(model, tokenizer, nothing, leading_space=False, prefix="bos").tasks
    assert (empty.correct, empty.ties) == (0, 1)
    assert scores.prefix == "<s>"
    (without,) = evaluate(model, tokenizer, tasks).tasks
    assert (without.correct, without.ties) == (0, 3)


def test_the_prefix_token_takes_a_position() -> None:
    tokenizer = make_tokenizer()
    tasks = [task("long", ("the" + " the" * 23, "cat"))]
    model = FixedLlama(len(tokenizer))
    assert evaluate(model, tokenizer, tasks).tasks[0].pairs == 1
    with pytest.raises(DataError, match=r"long\.jsonl:1: sentence: got 25 tokens, expected at"):
        evaluate(model, tokenizer, tasks, prefix="bos")


# -- by term ------------------------------------------------------------------------------------


def test_a_term_is_the_mean_of_its_tasks() -> None:
    tasks = (
        TaskScore(name="a", outcomes="1110", term="islands"),
        TaskScore(name="b", outcomes="1" * 9 + "0", term="binding"),
        TaskScore(name="c", outcomes="1" * 10 + "0" * 90, term="islands"),
        TaskScore(name="d", outcomes="01"),
    )
    terms = PairScores(tasks=tasks, leading_space=True).terms
    assert {term: (one.accuracy, len(one.tasks), one.pairs) for term, one in terms.items()} == {
        "binding": (0.9, 1, 10),
        "islands": (pytest.approx((0.75 + 0.1) / 2), 2, 104),
    }
    assert list(terms) == ["binding", "islands"]


def test_a_benchmark_without_terms_has_none() -> None:
    tasks = (TaskScore(name="a", outcomes="1110"),)
    assert PairScores(tasks=tasks, leading_space=True).terms == {}
