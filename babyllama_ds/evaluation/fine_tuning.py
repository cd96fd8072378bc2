"""Fine-tuning: a model directory and labelled tasks enter, how well copies of it learn them leaves.

    texts     [prefix] A </s>, or [prefix] A </s> B </s>, cut to `max_tokens`
    model     the backbone and a linear classifier (no bias) on the last token's final state
    training  AdamW without decay, a learning rate that falls linearly to zero, gradients clipped to
              norm 1; fp32 weights, bf16 products where the model was saved in 16 bits
    score     of the best epoch, on the very examples that are reported

This is the protocol of BabyLM's pipeline (Hugging Face's Trainer there), but for the `</s>`: its
tokenizers put nothing between two texts. The best epoch's score flatters, and every model alike.
A rank trains whole tasks by itself: they are small, and many.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from babyllama_ds import ranks
from babyllama_ds.errors import DataError
from babyllama_ds.evaluation.classification import metric_of, score
from babyllama_ds.evaluation.classifier import Classifier, Encoded, Update, told
from babyllama_ds.evaluation.forward import OnBatch
from babyllama_ds.evaluation.labelled_files import (
    PATH_KEY,
    Example,
    LabelledTask,
    load_labelled_tasks,
)
from babyllama_ds.evaluation.sentences import prefix_ids, sentence_encoder
from babyllama_ds.evaluation.stored import Remember, Steps
from babyllama_ds.files import hash_json
from babyllama_ds.models.attention import Device, kind_of, resolve_attention
from babyllama_ds.models.build import load_model
from babyllama_ds.models.parts import check_backbone
from babyllama_ds.models.probe import embedding_rows
from babyllama_ds.spec.evaluation import FineTuning, Prefix
from babyllama_ds.spec.job import derive_seed
from babyllama_ds.spec.models import Attention

logger = logging.getLogger(__name__)

MEETING_S = 5.0
"""Seconds of work between meetings of the ranks, each of which waits for the others' steps."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model that is to be fine-tuned, and where and how."""

    model: str
    """A model directory or hub id, of which a fresh copy is loaded for each task and seed."""
    tokenizer: PreTrainedTokenizerFast
    attention: str
    """The kernel, one for fp32 weights: not FlashAttention."""
    device: torch.device
    batch_tokens: int
    """Tokens, padding included, in one forward pass."""
    leading_space: bool = True
    prefix: Prefix = "none"
    where: str = "fine-tuning"
    """What names the model in errors."""


def load_suite(suite: FineTuning, *, where: str = PATH_KEY) -> list[LabelledTask]:
    """A suite's tasks, read and checked. Raises `DataError`."""
    return load_labelled_tasks(
        Path(suite.path),
        None if suite.tasks is None else [task.name for task in suite.tasks],
        max_train=suite.max_train_examples,
        max_valid=suite.max_examples,
        where=where,
    )


def fine_tune_suite(
    learner: Learner,
    suite: FineTuning,
    tasks: Sequence[LabelledTask],
    *,
    remember: Remember = lambda _, learn: learn(),
    on_step: OnBatch | None = None,
) -> dict[str, Any]:
    """A suite's scores as JSON; called by every rank, the same on every rank.

    Tasks and seeds are dealt out to ranks, each of which `remember`s its own as it goes.

    Raises:
        DataError: a tokenizer that has no token to end a text with, or one that the model has no
            embedding for.
        ModelError: not loadable, without a backbone, or a loss that is not finite.
    """
    encoded = {task.name: encode_task(learner, task, suite.max_tokens) for task in tasks}
    trainings = [(task, seed) for task in tasks for seed in range(suite.seeds)]
    mine = _dealt([_cost(suite, encoded[task.name], task) for task, _ in trainings])
    outcomes: dict[tuple[str, int], dict[str, Any]] = {}

    def learn(task: LabelledTask, seed: int) -> Steps:
        return fine_tune(learner, suite, task, encoded[task.name], seed=seed, on_step=on_step)

    def work() -> Generator[None]:
        for task, seed in (trainings[index] for index in mine):
            known_by = _fingerprint(suite, task, seed, learner)
            outcomes[task.name, seed] = yield from remember(known_by, partial(learn, task, seed))

    _together(work())
    for of_rank in ranks.gather_objects(outcomes):
        outcomes |= of_rank
    result = _as_json(suite, tasks, outcomes)
    # Each rank has told of its own tasks only, and all but rank 0 are silent.
    scores = ", ".join(f"{name} {100 * of['score']:.2f}" for name, of in result["tasks"].items())
    logger.info("%s: %s %.2f (%s)", learner.where, suite.name, 100 * result["score"], scores)
    return result


def _together(steps: Generator[None]) -> None:
    """Take this rank's steps, to the end of all ranks'. Every few seconds they meet, whatever each
    is at, so that what ends the work on one ends it on all: an error, or a request to stop, of
    which the `deepspeed` launcher tells one rank half a minute before the next."""

    def some() -> bool:
        until = time.monotonic() + MEETING_S
        return any(time.monotonic() >= until for _ in steps)

    with closing(steps):
        while ranks.max_int(ranks.on_every_rank(some)):
            pass


def kernel_to_learn(
    requested: Attention,
    *,
    device: Device,
    precision: Literal["bf16", "fp32"],
    where: str,
    missing: Set[str],
) -> str:
    """The kernel for fp32 weights: the one for training, but not FlashAttention, for 16 bits alone.

    `missing` are the kinds that the model's family has not. Raises as `resolve_attention`.
    """
    return resolve_attention(
        "auto" if kind_of(requested) == "flash_attention" else requested,
        device=device,
        precision=precision,
        training=True,
        where=where,
        missing={*missing, "flash_attention"},
    )


def encode_task(learner: Learner, task: LabelledTask, max_tokens: int) -> dict[str, Encoded]:
    """`train`, and the validation examples by the name under which they are scored.

    Raises:
        DataError: the tokenizer has no token to end a text with, or no prefix token.
    """
    end = ends_of_texts(learner.tokenizer, where=learner.where)
    encode = sentence_encoder(learner.tokenizer, leading_space=learner.leading_space)
    before = prefix_ids(learner.tokenizer, learner.prefix)

    def encoded(examples: Sequence[Example]) -> Encoded:
        texts = zip(
            *(encode(part) for part in zip(*(e.texts for e in examples), strict=True)), strict=True
        )
        return Encoded(
            token_ids=[joined(parts, before, end, max_tokens) for parts in texts],
            labels=[example.label for example in examples],
        )

    return {"train": encoded(task.train)} | {
        name: encoded(examples) for name, examples in task.valid.items()
    }


def ends_of_texts(tokenizer: PreTrainedTokenizerFast, *, where: str) -> int:
    """The id of the token that stands behind each text.

    Raises:
        DataError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError.of(
            where,
            got="a tokenizer without a token that ends a text",
            expected="one with an eos_token, which stands behind each text of an example",
        )
    return int(tokenizer.eos_token_id)


def joined(
    parts: Sequence[Sequence[int]], before: Sequence[int], end: int, max_tokens: int
) -> list[int]:
    """One example's ids, of which there are at most `max_tokens`: of two texts the longer one is
    cut, to no less than the other's length."""
    room = max(0, max_tokens - len(before) - len(parts))
    lengths = [len(part) for part in parts]
    if len(parts) == 1:
        kept = [room]
    else:
        half = min(lengths[0], max(room - lengths[1], room // 2))
        kept = [half, room - half]
    return [*before, *(i for part, n in zip(parts, kept, strict=True) for i in (*part[:n], end))]


# -- one task, one seed ---------------------------------------------------------------------------


def fine_tune(
    learner: Learner,
    suite: FineTuning,
    task: LabelledTask,
    encoded: Mapping[str, Encoded],
    *,
    seed: int,
    on_step: OnBatch | None = None,
) -> Steps:
    """Train a copy of the model on one task, and predict; on this rank alone, step by step.

    Leaves the best `epoch`, the score after each one (`curve`), and of the best one the
    `predictions` by the name of the validation examples.

    Raises:
        DataError: an example with a token that the model has no embedding for.
        ModelError: not loadable, without a backbone, or a loss that is not finite.
    """
    started = time.monotonic()
    settings = suite.settings_of(task.name)
    metric, labels = metric_of(task.name), told(encoded[task.name].labels)
    drawn = derive_seed(seed, f"fine-tuning/{task.name}")
    batches = _Batches(len(task.train), settings.batch_size, drawn)
    steps = settings.epochs * batches.of_epoch
    curve: list[float] = []
    best: dict[str, Any] = {}
    with _seeded(drawn, learner.device):
        model = load_model(
            learner.model, attention=learner.attention, where=learner.where, dtype="auto"
        )
        check_backbone(model, where=learner.where)
        _check_embedded(model, encoded, learner, f"{learner.where}: {suite.name}/{task.name}")
        classifier = Classifier(model, task.num_labels).to(learner.device)
        update = Update(classifier, settings.learning_rate, steps)

        def heed() -> None:
            if on_step is not None:
                on_step(update.done, steps)

        def predict(name: str) -> Generator[None, None, str]:
            return _heeding(classifier.predict(encoded[name], learner.batch_tokens), heed)

        for epoch in range(1, settings.epochs + 1):
            classifier.train()
            for chosen in batches(epoch):
                update(encoded["train"], chosen, learner.batch_tokens)
                heed()
                yield
            update.check_finite(f"{learner.where}: {suite.name}/{task.name}")
            predicted = yield from predict(task.name)
            curve.append(score(metric, labels, predicted))
            if not best or curve[-1] > best["score"]:
                predictions = {task.name: predicted}
                for name in task.valid:
                    if name not in predictions:
                        predictions[name] = yield from predict(name)
                best = {"epoch": epoch, "score": curve[-1], "predictions": predictions}
            elif suite.patience is not None and epoch - best["epoch"] >= suite.patience:
                break
    seconds = time.monotonic() - started
    logger.info(
        "%s: %s/%s, %s %.2f in epoch %d of %d, %.0f s",
        learner.where,
        suite.name,
        task.name,
        metric,
        100 * best["score"],
        best["epoch"],
        len(curve),
        seconds,
    )
    return {**best, "curve": curve, "seconds": seconds}


def _heeding(
    steps: Generator[None, None, str], heed: Callable[[], None]
) -> Generator[None, None, str]:
    """The same, with a look after each step whether to go on: predicting may take minutes."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return str(end.value)
        heed()
        yield


def _check_embedded(
    model: nn.Module, encoded: Mapping[str, Encoded], learner: Learner, where: str
) -> None:
    largest = max(max(ids) for part in encoded.values() for ids in part.token_ids)
    if largest >= (rows := embedding_rows(model)):
        token = learner.tokenizer.convert_ids_to_tokens(largest)
        raise DataError.of(
            where,
            got=f"an example with the token {token!r}, id {largest}",
            expected=f"ids below {rows}, the rows of the model's embedding",
            hint="use the tokenizer that this model was trained with",
        )


@dataclass(frozen=True)
class _Batches:
    """Batches of an epoch: every example once, in an order that the seed and the epoch decide."""

    num_examples: int
    size: int
    seed: int

    @property
    def of_epoch(self) -> int:
        return -(-self.num_examples // self.size)

    def __call__(self, epoch: int) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
        for batch in range(self.of_epoch):
            yield order[batch * self.size : (batch + 1) * self.size].tolist()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators, on the CPU and this device, seeded within and as they were after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# -- a suite ---------------------------------------------------------------------------------------


def _dealt(costs: Sequence[float]) -> list[int]:
    """Which trainings are this rank's: the longest first, each to the rank with the least to do."""
    loads = [0.0] * ranks.world_size()
    mine = []
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        loads[least] += costs[index]
        if least == ranks.rank():
            mine.append(index)
    return mine


def _cost(suite: FineTuning, encoded: Mapping[str, Encoded], task: LabelledTask) -> float:
    """Tokens that a training may come to, a third of them for those that are only predicted."""
    tokens = {name: sum(map(len, part.token_ids)) for name, part in encoded.items()}
    return suite.settings_of(task.name).epochs * (
        tokens["train"] + (sum(tokens.values()) - tokens["train"]) / 3
    )


def _fingerprint(suite: FineTuning, task: LabelledTask, seed: int, learner: Learner) -> str:
    """Of what a training's outcome depends on, but for the model and the tokenizer."""
    return hash_json(
        {
            "task": [task.name, task.fingerprint],
            "settings": suite.settings_of(task.name),
            "patience": suite.patience,
            "max_tokens": suite.max_tokens,
            "seed": seed,
            "leading_space": learner.leading_space,
            "prefix": learner.prefix,
        }
    )


def _as_json(
    suite: FineTuning,
    tasks: Sequence[LabelledTask],
    outcomes: Mapping[tuple[str, int], Mapping[str, Any]],
) -> dict[str, Any]:
    scored = {
        name: _task_as_json(
            name, task, examples, [outcomes[task.name, seed] for seed in range(suite.seeds)]
        )
        for task in tasks
        for name, examples in task.valid.items()
    }
    return {
        "score": sum(task["score"] for task in scored.values()) / len(scored),
        "tasks": scored,
        "settings": {
            "learning_rate": suite.learning_rate,
            "batch_size": suite.batch_size,
            "epochs": suite.epochs,
            "patience": suite.patience,
            "max_tokens": suite.max_tokens,
            "seeds": suite.seeds,
            "per_task": {
                task.name: own
                for task in suite.tasks or ()
                if (own := task.model_dump(exclude={"name"}, exclude_none=True))
            },
        },
    }


def _task_as_json(
    name: str,
    task: LabelledTask,
    examples: Sequence[Example],
    outcomes: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Scores of one file's examples, by seed and in the mean."""
    metric = metric_of(name)
    labels = told([example.label for example in examples])
    predictions = [outcome["predictions"][name] for outcome in outcomes]
    scores = [score(metric, labels, predicted) for predicted in predictions]
    commonest = Counter(example.label for example in task.train).most_common(1)[0][0]
    return {
        "metric": metric,
        "score": sum(scores) / len(scores),
        "scores": scores,
        "majority": score(metric, labels, told([commonest]) * len(labels)),
        "examples": len(labels),
        "train_examples": len(task.train),
        "epochs": [outcome["epoch"] for outcome in outcomes],
        "labels": labels,
        "predictions": predictions,
    }
