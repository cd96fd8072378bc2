"""Fine-tuning: what a model gets, which epoch counts, and what is told of a suite."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from babyllama_ds import ranks
from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer
from babyllama_ds.errors import DataError, ModelError, Stopped
from babyllama_ds.evaluation import fine_tuning
from babyllama_ds.evaluation.classifier import Classifier, Encoded, Update
from babyllama_ds.evaluation.fine_tuning import (
    Learner,
    encode_task,
    fine_tune_suite,
    joined,
    kernel_to_learn,
    load_suite,
)
from babyllama_ds.evaluation.stored import Steps
from babyllama_ds.spec.corpus import TrainedTokenizer
from babyllama_ds.spec.evaluation import FineTunedTask, FineTuning
from babyllama_ds.stopping import stopped

NOUNS, VERBS = ["dog", "cat", "bird", "fish"], ["runs", "sleeps", "sings", "eats"]
LINES = [
    f"the {noun} {verb} and the {other}" for noun in NOUNS for verb in VERBS for other in NOUNS
]
random.Random(3).shuffle(LINES)


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    """An untrained LLaMA with a tokenizer of its own."""
    spec = TrainedTokenizer(kind="bpe", vocab_size=288)
    (tmp_path / "model").mkdir()
    train_tokenizer(spec, iter(LINES), tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=64, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return Learner(
        model=str(tmp_path / "model"),
        tokenizer=tokenizer,
        attention="eager",
        device=torch.device("cpu"),
        batch_tokens=8192,
        where="student",
    )


@pytest.fixture
def suite_of(tmp_path: Path) -> Callable[..., FineTuning]:
    """A suite of three tasks: does someone run, what is done in the second text, and a coin."""

    def make(**changes: Any) -> FineTuning:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        runs = [{"sentence": line, "label": int("runs" in line)} for line in LINES]
        does = [
            {"premise": one, "hypothesis": two, "label": VERBS.index(two.split()[2]) // 2}
            for one, two in pairwise(LINES)
        ]
        coin = [{"sentence": line, "label": random.Random(line).getrandbits(1)} for line in LINES]
        for name, lines in {"cola": runs, "mnli": does, "coin": coin}.items():
            for part, some in {"train": lines[::2], "valid": lines[1::2]}.items():
                text = "".join(json.dumps(line) + "\n" for line in some)
                (folder / f"{name}.{part}.jsonl").write_text(text)
        (folder / "mnli-mm.valid.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in does[:5])
        )
        defaults = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}
        return FineTuning(name="toy", path=str(folder), **{**defaults, **changes})

    return make


# -- what a model gets -----------------------------------------------------------------------------


@pytest.mark.parametrize("before", [[], [1]])
def test_two_texts_are_cut_like_transformers_cuts(before: list[int]) -> None:
    """`longest_first`: a token at a time off the longer one, of equals off either."""
    for first, second, limit in product(range(10), range(10), (3, 6, 7, 8, 20)):
        one, two = list(range(10, 10 + first)), list(range(30, 30 + second))
        found = joined([one, two], before, 2, limit)
        place = found.index(2)
        kept = [place - len(before), len(found) - place - 2]
        assert found == [*before, *one[: kept[0]], 2, *two[: kept[1]], 2]
        assert len(found) <= limit
        lengths = [first, second]
        while sum(lengths) > max(0, limit - len(before) - 2):
            lengths[lengths.index(max(lengths))] -= 1
        assert abs(kept[0] - lengths[0]) <= (first > lengths[0] and second > lengths[1])
        assert sum(kept) == sum(lengths)


def test_one_text_is_cut_at_its_end() -> None:
    assert joined([[5, 6, 7, 8]], [], 2, 3) == [5, 6, 2]
    assert joined([[5, 6, 7, 8]], [1], 2, 9) == [1, 5, 6, 7, 8, 2]
    assert joined([[]], [], 2, 9) == [2]


def test_texts_read_as_they_were_with_an_end_behind_each(learner: Learner, suite_of) -> None:
    _, mnli = load_suite(suite_of(tasks=tasks("cola", "mnli")))
    encoded = encode_task(learner, mnli, 60)
    decoded = learner.tokenizer.decode(encoded["train"].token_ids[0])
    assert decoded == f" {LINES[0]}</s> {LINES[1]}</s>"
    assert encoded["train"].labels[0] == VERBS.index(LINES[1].split()[2]) // 2
    begun = replace(learner, leading_space=False, prefix="bos")
    decoded = learner.tokenizer.decode(encode_task(begun, mnli, 60)["train"].token_ids[0])
    assert decoded == f"<s>{LINES[0]}</s>{LINES[1]}</s>"


def test_a_tokenizer_that_ends_no_text_is_refused(learner: Learner, suite_of) -> None:
    learner.tokenizer.eos_token = None
    with pytest.raises(DataError, match="got a tokenizer without a token that ends a text"):
        fine_tune_suite(learner, suite_of(), load_suite(suite_of()))


def test_a_token_without_an_embedding_is_told(learner: Learner, suite_of) -> None:
    """As of tokenizers to which a token was added without a row for it."""
    learner.tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    with pytest.raises(DataError) as caught:
        learnt(learner, suite_of())
    assert "student: toy/" in str(caught.value)
    assert "got an example with the token '<|endoftext|>', id 288, expected ids below 288" in str(
        caught.value
    )


def test_a_model_without_a_backbone_is_told(learner: Learner, suite_of) -> None:
    config = Llama4TextConfig(
        vocab_size=len(learner.tokenizer), hidden_size=24, intermediate_size=32,
        intermediate_size_mlp=32, num_hidden_layers=1, num_attention_heads=2, head_dim=12,
        num_key_value_heads=2, num_local_experts=1, max_position_embeddings=64,
        pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(learner.model)
    with pytest.raises(ModelError) as caught:
        learnt(learner, suite_of())
    (problem,) = caught.value.problems
    assert (problem.where, problem.got) == (
        "student",
        "Llama4ForCausalLM, of which transformers has no backbone without the head",
    )
    assert "without fine-tuning" in (problem.hint or "")


@pytest.mark.parametrize(
    ("requested", "missing", "kernel"),
    [
        ("auto", set(), "sdpa"),
        ("auto", {"sdpa"}, "eager"),  # Gemma 2, whose scores are capped
        ("flash_attention_3", set(), "sdpa"),  # has no dropout, and is not for fp32 at all
        ("flash_attention_2", {"sdpa"}, "eager"),
        ("eager", set(), "eager"),
    ],
)
def test_fp32_weights_take_a_kernel_that_the_family_has(
    requested: Any, missing: set[str], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every FlashAttention is usable for what is in 16 bits."""
    monkeypatch.setattr("babyllama_ds.models.attention.why_unusable", lambda *_: None)
    place: dict[str, Any] = {"device": "cuda", "precision": "bf16", "where": "student.model"}
    assert kernel_to_learn(requested, missing=missing, **place) == kernel


# -- what is learnt --------------------------------------------------------------------------------


def tasks(*names: str) -> tuple[FineTunedTask, ...]:
    return tuple(FineTunedTask(name=name) for name in names)


def ended(steps: Steps) -> dict[str, Any]:
    """What they come to."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return dict(end.value)


def learnt(learner: Learner, suite: FineTuning, **options: Any) -> dict[str, Any]:
    return fine_tune_suite(learner, suite, load_suite(suite), **options)


def test_the_scores_of_all_tasks_are_told_at_the_end(
    learner: Learner, suite_of, caplog: pytest.LogCaptureFixture
) -> None:
    suite = suite_of(epochs=1)
    with caplog.at_level("INFO", "babyllama_ds"):
        result = learnt(learner, suite)
    each = ", ".join(f"{name} {100 * of['score']:.2f}" for name, of in result["tasks"].items())
    last = f"{learner.where}: {suite.name} {100 * result['score']:.2f} ({each})"
    assert caplog.messages[-1] == last
    assert each.count(",") == len(result["tasks"]) - 1 > 0


def test_what_can_be_learnt_is_and_what_cannot_is_not(learner: Learner, suite_of) -> None:
    result = learnt(learner, suite_of(epochs=25, patience=None))
    assert json.loads(json.dumps(result)) == result
    scores = {name: task["score"] for name, task in result["tasks"].items()}
    assert scores["cola"] > 0.95
    assert scores["mnli"] > 0.9
    assert scores["coin"] < 0.85
    assert result["score"] == pytest.approx(sum(scores.values()) / 4)
    cola = result["tasks"]["cola"]
    assert (cola["metric"], cola["examples"], cola["train_examples"]) == ("mcc", 32, 32)
    assert cola["majority"] == 0
    assert result["settings"]["per_task"] == {}


def test_the_other_examples_of_a_task_are_scored_by_its_classifier(
    learner: Learner, suite_of
) -> None:
    result = learnt(learner, suite_of(tasks=tasks("mnli", "mnli-mm")))
    one, other = result["tasks"]["mnli"], result["tasks"]["mnli-mm"]
    assert (other["examples"], len(other["predictions"][0])) == (5, 5)
    assert other["epochs"] == one["epochs"]
    assert other["metric"] == "accuracy"
    # Its lines 2 and 4 are the first two that mnli is scored on.
    assert other["predictions"][0][1::2] == one["predictions"][0][:2]


def test_the_majority_is_that_of_the_training_examples(learner: Learner, tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for part, labels in {"train": "1110", "valid": "100"}.items():
        lines = [json.dumps({"sentence": "a dog", "label": int(label)}) for label in labels]
        (folder / f"mrpc.{part}.jsonl").write_text("\n".join(lines))
        (folder / f"rte.{part}.jsonl").write_text("\n".join(lines))
    result = learnt(learner, FineTuning(name="few", path=str(folder), epochs=1))
    assert result["tasks"]["mrpc"]["majority"] == pytest.approx(0.5)  # F1: 1 of 3, and all
    assert result["tasks"]["rte"]["majority"] == pytest.approx(1 / 3)


def test_the_best_epoch_counts_and_patience_ends(
    learner: Learner, suite_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are planted, one an epoch; an equal one is no better."""
    told = iter([0.1, 0.4, 0.4, 0.2, 0.9])
    calls: list[str] = []

    def planted(metric: str, labels: str, predicted: str) -> float:
        assert metric == "mcc", "an epoch is the best by the metric that is reported"
        calls.append(predicted)
        return next(told)

    monkeypatch.setattr(fine_tuning, "score", planted)
    suite = suite_of(tasks=tasks("cola"), epochs=9, patience=2)
    (task,) = load_suite(suite)
    outcome = ended(
        fine_tuning.fine_tune(learner, suite, task, encode_task(learner, task, 40), seed=0)
    )
    assert outcome["epoch"] == 2
    assert outcome["curve"] == [0.1, 0.4, 0.4, 0.2]
    assert outcome["predictions"]["cola"] == calls[1]


def test_seeds_differ_and_each_is_the_same_again(learner: Learner, suite_of) -> None:
    suite = suite_of(tasks=tasks("mnli"), seeds=2, epochs=6, patience=None)
    state = torch.get_rng_state()
    once, again = learnt(learner, suite), learnt(learner, suite)
    assert once == again
    assert torch.equal(torch.get_rng_state(), state)
    mnli = once["tasks"]["mnli"]
    assert mnli["predictions"][0] != mnli["predictions"][1]
    assert mnli["score"] == pytest.approx(sum(mnli["scores"]) / 2)
    one = learnt(learner, suite.model_copy(update={"seeds": 1}))
    assert one["tasks"]["mnli"]["predictions"] == mnli["predictions"][:1]


def test_every_example_once_an_epoch_in_an_order_of_its_own(
    learner: Learner, suite_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its task, seed and epoch; the last batch may be short."""
    batches: list[list[int]] = []
    learn = Update.__call__

    def noted(update: Update, examples: Encoded, chosen: list[int], batch_tokens: int) -> None:
        batches.append(chosen)
        learn(update, examples, chosen, batch_tokens)

    monkeypatch.setattr(Update, "__call__", noted)
    learnt(learner, suite_of(tasks=tasks("cola", "coin"), batch_size=9, epochs=2, seeds=2))
    epochs = [batches[first : first + 4] for first in range(0, len(batches), 4)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[9, 9, 9, 5]] * 8
    orders = [[index for batch in epoch for index in batch] for epoch in epochs]
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert len(set(map(tuple, orders))) == 8


def test_dropout_is_for_learning_alone(
    learner: Learner, suite_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[bool] = []
    forward = Classifier.forward

    def noted(classifier: Classifier, token_ids: Any) -> torch.Tensor:
        assert len({module.training for module in classifier.modules()}) == 1
        passes.append(classifier.training)
        return forward(classifier, token_ids)

    monkeypatch.setattr(Classifier, "forward", noted)
    learnt(learner, suite_of(tasks=tasks("cola"), epochs=2, batch_size=16))
    assert passes == [True, True, False] * 2


def test_a_tasks_own_settings_are_taken(learner: Learner, suite_of) -> None:
    own = FineTunedTask(name="cola", epochs=1, batch_size=32, learning_rate=1e-6)
    steps: dict[int, set[int]] = {}
    suite = suite_of(tasks=(own, *tasks("coin")))
    result = learnt(learner, suite, on_step=lambda done, of: steps.setdefault(of, set()).add(done))
    # 32 examples: one step, and two epochs of four.
    assert steps == {1: {1}, 8: set(range(1, 9))}
    assert result["settings"]["per_task"] == {
        "cola": {"learning_rate": 1e-6, "batch_size": 32, "epochs": 1}
    }
    assert result["settings"]["epochs"] == 2


def test_a_loss_that_is_not_finite_is_told_with_the_task(
    learner: Learner, suite_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("babyllama_ds.evaluation.classifier.INITIAL_STD", float("inf"))
    with pytest.raises(ModelError) as caught:
        learnt(learner, suite_of(tasks=tasks("cola")))
    assert "student: toy/cola: got a training loss of nan" in str(caught.value)
    assert "lower learning_rate" in str(caught.value)


# -- who does what, and what is kept ---------------------------------------------------------------


def test_what_is_remembered_is_not_learnt_again(learner: Learner, suite_of) -> None:
    kept: dict[str, dict[str, Any]] = {}
    done: list[str] = []

    def remember(fingerprint: str, learn: Callable[[], Steps]) -> Steps:
        if fingerprint not in kept:
            kept[fingerprint] = yield from learn()
            done.append(fingerprint)
        return kept[fingerprint]

    first = learnt(learner, suite_of(), remember=remember)
    assert len(done) == 3
    assert learnt(learner, suite_of(), remember=remember) == first
    assert len(done) == 3
    for changes in (
        {"learning_rate": 2e-2},
        {"batch_size": 9},
        {"epochs": 1},
        {"patience": 1},
        {"max_tokens": 9},
        {"max_train_examples": 9},
        {"max_examples": 9},
    ):
        before = len(done)
        learnt(learner, suite_of(tasks=tasks("cola"), **changes), remember=remember)
        assert len(done) == before + 1, changes
    learnt(learner, suite_of(seeds=2), remember=remember)
    assert len(done) == 3 + 7 + 3  # the second seed of each
    for other in (replace(learner, leading_space=False), replace(learner, prefix="bos")):
        before = len(done)
        learnt(other, suite_of(), remember=remember)
        assert len(done) == before + 3, "these models get other tokens"


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_trainings_are_dealt_out_whole_and_evenly(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = [5.0, 1.0, 9.0, 2.0, 2.0, 7.0, 1.0]
    monkeypatch.setattr(ranks, "world_size", lambda: world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(fine_tuning._dealt(costs))
    assert sorted(index for share in shares for index in share) == list(range(7))
    loads = [sum(costs[index] for index in share) for share in shares]
    # A greedy one is within 4/3 of the best (Graham 1969), which no rank's share can be below.
    assert max(loads) <= 4 / 3 * max(max(costs), sum(costs) / world_size)


def test_a_stop_ends_a_training_within_a_step(learner: Learner, suite_of) -> None:
    steps: list[int] = []

    def on_step(done: int, of: int) -> None:
        steps.append(done)
        if len(steps) == 3:
            raise stopped("SIGTERM")

    with pytest.raises(Stopped, match="SIGTERM"):
        learnt(learner, suite_of(), on_step=on_step)
    assert steps == [1, 2, 3]


def test_a_stop_ends_a_prediction_within_a_batch(
    learner: Learner, suite_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some tasks it takes longer than a launcher waits."""
    passes: list[bool] = []
    forward = Classifier.forward

    def noted(classifier: Classifier, token_ids: list[list[int]]) -> torch.Tensor:
        passes.append(classifier.training)
        return forward(classifier, token_ids)

    def on_step(done: int, of: int) -> None:
        if passes.count(False) == 2:
            raise stopped("SIGTERM")

    monkeypatch.setattr(Classifier, "forward", noted)
    with pytest.raises(Stopped, match="SIGTERM"):
        learnt(replace(learner, batch_tokens=16), suite_of(tasks=tasks("cola")), on_step=on_step)
    assert passes.count(False) == 2


@pytest.mark.parametrize("numbers", [(0, 0), (3, 0), (0, 3), (5, 2)])
def test_ranks_meet_until_all_have_ended(
    numbers: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks in two threads, at a meeting after each step: none is left alone, or left out."""
    meetings: dict[int, int] = {0: 0, 1: 0}
    taken: dict[int, int] = {0: 0, 1: 0}
    gate = threading.Barrier(2, timeout=20)
    more: dict[int, int] = {}
    me = threading.local()

    def max_int(value: int) -> int:
        more[me.rank] = int(value)
        gate.wait()
        meetings[me.rank] += 1
        found = max(more.values())
        gate.wait()
        return found

    monkeypatch.setattr(fine_tuning, "MEETING_S", 0.0)
    monkeypatch.setattr(ranks, "on_every_rank", lambda work: work())
    monkeypatch.setattr(ranks, "max_int", max_int)

    def steps(rank: int) -> Generator[None]:
        for _ in range(numbers[rank]):
            taken[rank] += 1
            yield

    def run(rank: int) -> None:
        me.rank = rank
        fine_tuning._together(steps(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert taken == {0: numbers[0], 1: numbers[1]}
    assert meetings == {0: max(numbers) + 1, 1: max(numbers) + 1}


def test_a_tokenizers_own_ends_do_not_matter(learner: Learner, suite_of) -> None:
    """Some add tokens of their own; what a model gets is what the docs say."""
    suite = suite_of(tasks=tasks("cola"))
    (task,) = load_suite(suite)
    plain = encode_task(learner, task, 60)["train"].token_ids
    assert isinstance(learner.tokenizer, PreTrainedTokenizerFast)
    learner.tokenizer.backend_tokenizer.enable_truncation(3)
    assert encode_task(learner, task, 60)["train"].token_ids == plain
