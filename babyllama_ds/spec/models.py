"""The models of a job, as they are built or loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from babyllama_ds.spec.base import HubName, Mismatch, Spec, consistent

Attention = Literal[
    "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa", "eager"
]


Dropout = Annotated[float, Field(ge=0, lt=1)]
"""Probability that a number is left out in training."""


class LlamaModel(Spec):
    """A LLaMA built from random initialisation (SiLU, RMSNorm, RoPE, no biases)."""

    kind: Literal["llama"]
    hidden_size: PositiveInt
    """Width."""
    num_layers: PositiveInt
    """Decoder layers."""
    num_heads: PositiveInt
    """Attention heads; divides `hidden_size`."""
    num_kv_heads: PositiveInt | None = None
    """Key-value heads (grouped-query attention); none: as many as heads."""
    intermediate_size: PositiveInt
    """Width inside the gated MLP."""
    max_positions: PositiveInt = 256
    """Longest sequence."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding."""
    norm_epsilon: PositiveFloat = 1e-6
    """RMSNorm epsilon."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tied_embeddings: bool = False
    """Whether the head shares the embedding's weights."""
    attention_dropout: Dropout = 0.0
    """Dropout of attention's probabilities."""
    attention: Attention = "auto"
    """Attention kernel; `auto`: FlashAttention where installed and usable, else PyTorch's own."""

    @model_validator(mode="after")
    def _heads_fit(self) -> LlamaModel:
        found = _not_divisible(self, "hidden_size", "num_heads")
        if not found and self.hidden_size // self.num_heads % 2:
            size = self.hidden_size // self.num_heads
            found.append(
                Mismatch(
                    ("hidden_size",),
                    f"{self.hidden_size} for {self.num_heads} heads of {size}",
                    "an even head size",
                    hint="rotary embedding turns pairs of numbers",
                )
            )
        if self.num_kv_heads:
            found += _not_divisible(self, "num_heads", "num_kv_heads")
        return consistent(self, found)


class Gpt2Model(Spec):
    """A GPT-2 built from random initialisation (GELU, LayerNorm, learned positions)."""

    kind: Literal["gpt2"]
    hidden_size: PositiveInt
    """Width."""
    num_layers: PositiveInt
    """Decoder layers."""
    num_heads: PositiveInt
    """Attention heads; divides `hidden_size`."""
    intermediate_size: PositiveInt | None = None
    """Width inside the MLP; none: `4 * hidden_size`."""
    max_positions: PositiveInt = 256
    """Longest sequence (rows of the position embedding)."""
    dropout: Dropout = 0.1
    """Dropout of residuals, embeddings and attention."""
    norm_epsilon: PositiveFloat = 1e-5
    """LayerNorm epsilon."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tied_embeddings: bool = True
    """Whether the head shares the embedding's weights."""
    attention: Attention = "auto"
    """Attention kernel; `auto`: FlashAttention where installed and usable, else PyTorch's own."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Gpt2Model:
        return consistent(self, _not_divisible(self, "hidden_size", "num_heads"))


class PretrainedModel(Spec):
    """Any causal language model that transformers can load (safetensors only)."""

    kind: Literal["pretrained"]
    path: HubName
    """A Hugging Face model directory or hub id."""
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Of a hub id: a commit, tag or branch; none: the main branch, at the commit that the run's
    first start finds."""
    dropout: Dropout | None = None
    """Dropout of residuals and embeddings in training, for families that have it; none: as
    config.json says."""
    attention_dropout: Dropout | None = None
    """Dropout of attention's probabilities in training; none: as config.json says."""
    attention: Attention = "auto"
    """Attention kernel; `auto`: FlashAttention where installed and usable, else PyTorch's own."""


ModelSpec = Annotated[LlamaModel | Gpt2Model | PretrainedModel, Field(discriminator="kind")]


def _not_divisible(model: LlamaModel | Gpt2Model, key: str, divisor: str) -> list[Mismatch]:
    number, by = getattr(model, key), getattr(model, divisor)
    if number % by == 0:
        return []
    lower = number // by * by
    fitting = f"{lower} or {lower + by}" if lower else str(by)
    return [Mismatch((key,), number, f"a multiple of {divisor} ({by})", hint=f"{fitting} would do")]
