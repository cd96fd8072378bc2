"""What makes a cache impossible and is known before any training: choices enter, errors leave."""

from __future__ import annotations

from babyllama_ds.errors import JobError, ModelError
from babyllama_ds.models.parts import HeadKind
from babyllama_ds.spec.distillation import DistillationSpec


def check_top_k(loss: DistillationSpec, vocab_size: int) -> None:
    """Check that there are as many tokens as `topk` is to keep.

    Raises:
        JobError: there are fewer.
    """
    if loss.cache == "topk" and loss.cache_top_k > vocab_size:
        raise JobError.of(
            "distillation.cache_top_k",
            got=loss.cache_top_k,
            expected=f"at most the vocabulary's {vocab_size} tokens",
        )


def check_head(head: HeadKind, *, teacher: str) -> None:
    """Check that a teacher's logits follow from its hidden states, so that `hidden` may keep those.

    Raises:
        ModelError: the teacher does more to its logits than multiply by its head.
    """
    if head != "plain":
        raise ModelError.of(
            f"teachers/{teacher}",
            got="logits that are more than its head's product with its hidden states",
            expected="a plain head, for distillation.cache=hidden",
            hint="set distillation.cache=topk or none",
        )
