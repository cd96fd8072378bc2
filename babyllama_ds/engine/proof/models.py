"""The small models of the proof: real ones, from the package's own builder, with a plain loss.

Shapes: B windows, S positions, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from babyllama_ds.engine.proof.case import LENGTH, VOCAB, Case
from babyllama_ds.models.build import build_model
from babyllama_ds.models.compiled import CompiledLayers
from babyllama_ds.spec.models import Gpt2Model, LlamaModel

# Weights far larger than a job's, so that two layers already bend gradients.
LLAMA = LlamaModel(
    kind="llama",
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=40,
    max_positions=LENGTH,
    initializer_range=0.2,
)
ONE_LAYER = LLAMA.model_copy(update={"num_layers": 1, "tied_embeddings": True})
"""What is compiled: tied, and quickly built."""
GPT2 = Gpt2Model(
    kind="gpt2",
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    max_positions=LENGTH,
    dropout=0.0,
    initializer_range=0.2,
)


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of a window's next tokens, from full logits in fp32 or finer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def compile_layers(self) -> None:
        """Let torch compile what it compiles in jobs."""
        CompiledLayers(self.model, training=True)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """The mean loss over windows."""
        logits_BSV: Tensor = self.model(input_ids=tokens_BS, use_cache=False).logits
        fine = torch.promote_types(logits_BSV.dtype, torch.float32)
        return cross_entropy(logits_BSV[:, :-1].flatten(0, 1).to(fine), tokens_BS[:, 1:].flatten())


def small_model(spec: LlamaModel | Gpt2Model) -> nn.Module:
    """A model of `VOCAB` tokens, always with the same weights, and plain attention."""
    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        bos_token="w1",
        eos_token="w2",
    )
    return build_model(spec, tokenizer, seed=0, attention="eager", where="proof")


def small_loss(spec: LlamaModel | Gpt2Model) -> NextTokenLoss:
    """The model with its loss."""
    return NextTokenLoss(small_model(spec))


_llama = partial(small_loss, LLAMA)
_llama_tied = partial(small_loss, LLAMA.model_copy(update={"tied_embeddings": True}))
_gpt2 = partial(small_loss, GPT2)  # tied
_one_layer_tied = partial(small_loss, ONE_LAYER)
_one_layer = partial(small_loss, ONE_LAYER.model_copy(update={"tied_embeddings": False}))

CASES = (
    Case(name="llama", make=_llama_tied, accumulation_steps=2, clip_norm=0.5),
    Case(name="gpt2", make=_gpt2, overlap_comm=True),
    Case(name="llama-bf16", make=_llama, precision="bf16", accumulation_steps=2, clip_norm=0.5),
    Case(name="gpt2-bf16", make=_gpt2, precision="bf16", overlap_comm=True),
    Case(name="llama-untied", make=_llama, accumulation_steps=2, overlap_comm=True),
)
"""What is proved of every machine: small models, with tied and untied embeddings in fp32 and in
bf16."""

COMPILED_CASES = (
    Case(
        name="llama-compiled",
        make=_one_layer,
        precision="bf16",
        accumulation_steps=2,
        clip_norm=0.5,
        compiled=True,
    ),
    Case(
        name="llama-tied-compiled",
        make=_one_layer_tied,
        precision="bf16",
        accumulation_steps=2,
        overlap_comm=True,
        compiled=True,
    ),
)
"""What is proved where there is a compiler, and the time for it."""
