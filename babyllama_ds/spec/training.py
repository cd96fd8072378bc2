"""How a model of a job is trained."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from babyllama_ds.spec.base import Mismatch, Spec, consistent, divisors

MicroBatch = Annotated[
    Annotated[PositiveInt, Tag("number")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(lambda value: "word" if value == "auto" else "number"),
]

Milestones = Annotated[
    Annotated[Literal["babylm"], Tag("word")]
    | Annotated[tuple[PositiveInt, ...], Field(min_length=1), Tag("numbers")],
    Discriminator(lambda value: "word" if value == "babylm" else "numbers"),
    AfterValidator(lambda value: _rising(value)),
]
"""Words seen, after each of which a training's model is kept as it then is. `babylm`: what the
challenge asks for since 2025, after every million words up to ten, every ten up to a hundred and
every hundred up to a thousand, as far as the training goes."""


class EarlyStopping(Spec):
    """Ends a training whose development cross-entropy no longer falls."""

    patience: PositiveInt
    """Evaluations in a row without a lower one, after which training ends."""
    min_delta: NonNegativeFloat = 0.0
    """Nats per token by which a development cross-entropy must be below the lowest that counted,
    to count itself."""


class MovingAverage(Spec):
    """An exponential moving average of the weights, evaluated and kept in their place."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """What stays of the average at each optimizer step; the step's weights are the rest."""
    ramp: bool = True
    """Whether the decay of step t is at most (1 + t) / (10 + t), so that the initial weights are
    soon forgotten; false: the same decay from the first step on."""


class Muon(Spec):
    """Muon for the matrices of the layers; embeddings, head, norms and biases stay with AdamW."""

    learning_rate: PositiveFloat = 0.02
    """Peak learning rate of these matrices, on the schedule of `learning_rate`, which stays that of
    all other parameters."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """What stays of the gradients before at each step (Nesterov's form)."""


class TrainingSpec(Spec):
    """How one model is trained; it ends at the first of the limits given (docs/training.md)."""

    batch_windows: PositiveInt
    """Windows in one optimizer step, over all ranks and micro-batches."""
    micro_batch: MicroBatch | None = None
    """Windows in one forward pass of one rank; `auto`: the largest that fits in memory, tried out
    before training; none: the rank's whole share of the batch. Accumulation steps are derived:
    `batch_windows / (micro_batch * ranks)`."""
    epochs: Annotated[float, Field(gt=0, le=1_000_000_000)]
    """Passes over the training windows; may be a fraction."""
    max_steps: PositiveInt | None = None
    """Limit on optimizer steps."""
    max_tokens: PositiveInt | None = None
    """Limit on tokens seen."""
    max_minutes: PositiveFloat | None = None
    """Limit on minutes spent in optimizer steps (evaluations and checkpoints left out), summed over
    all starts. The learning rate decays over the planned steps all the same, and where it ends
    depends on the machine."""
    early_stopping: EarlyStopping | None = None
    """End when evaluations no longer improve; none: never."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Decay to zero after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from zero."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices and embeddings (norms and biases are not decayed)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """AdamW's moment decay rates."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    muon: Muon | None = None
    """Muon for the matrices of the layers; none: AdamW for all parameters."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; none: no clipping."""
    z_loss: PositiveFloat | None = None
    """Weight of (log Z)², Z the sum of exp(logits), a mean over labelled positions (PaLM's z-loss:
    1e-4 is usual); none: no such term."""
    unlabelled_tokens: tuple[str, ...] = ()
    """Tokens, as the vocabulary writes them, that nobody is to learn to predict: where one comes
    next there is no label, and the KL stays."""
    ema: MovingAverage | None = None
    """A moving average of the weights, evaluated and kept in their place; none: the weights."""
    gradient_checkpointing: bool = False
    """Whether only the layers' inputs are kept for the backward pass, which computes the rest
    again: much less memory for a third more work."""
    evaluate_every_steps: PositiveInt | None = None
    """Optimizer steps between evaluations on development windows; none: once an epoch."""
    evaluate_windows: PositiveInt | None = None
    """Development windows (evenly spaced) in an evaluation during training; none: all."""
    keep: Literal["best", "last"] = "best"
    """The weights that leave: lowest development cross-entropy, or the last step's."""
    checkpoint_every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints; none: at every evaluation."""
    log_every_steps: PositiveInt = 10
    """Optimizer steps between logged lines."""
    profile_steps: PositiveInt | None = None
    """Optimizer steps, after the first one of a start, whose parts are timed and told (data,
    teachers, student, loss, backward, optimizer, communication); none: none. On an accelerator
    these steps are slower: each part waits for the device."""

    @model_validator(mode="after")
    def _numbers_fit(self) -> TrainingSpec:
        found = []
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            found.append(
                Mismatch(("warmup_steps",), self.warmup_steps, f"< max_steps ({self.max_steps})")
            )
        if isinstance(self.micro_batch, int) and self.batch_windows % self.micro_batch:
            fitting = [n for n in divisors(self.batch_windows) if n < self.micro_batch]
            found.append(
                Mismatch(
                    ("micro_batch",),
                    self.micro_batch,
                    f"a divisor of batch_windows ({self.batch_windows})",
                    hint=f"the next smaller one is {fitting[-1]}",
                )
            )
        return consistent(self, found)


def _rising(milestones: Literal["babylm"] | tuple[int, ...]) -> Literal["babylm"] | tuple[int, ...]:
    if milestones == "babylm":
        return milestones
    found = [
        Mismatch((i + 1,), later, f"more than the one before ({earlier})")
        for i, (earlier, later) in enumerate(pairwise(milestones))
        if later <= earlier
    ]
    return consistent(milestones, found)
