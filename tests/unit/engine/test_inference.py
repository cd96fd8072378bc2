"""A frozen model computes what the module does, and nothing of it can be trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.losses.heads import logits
from babyllama_ds.models.compiled import forget_compiled

VOCAB = 61


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 100), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_plain_module_bit_for_bit(
    kind: str,
    dtype: torch.dtype,
    alone: torch.device,
    tiny_model: Callable[..., Any],
    tmp_path: Any,
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    frozen = FrozenModel(model, device=alone, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        outputs = plain(input_ids=tokens(), output_hidden_states=True)
    hidden_BSD = frozen.hidden_states(tokens())
    assert hidden_BSD.dtype == dtype
    assert torch.equal(hidden_BSD, outputs.hidden_states[-1])
    ours = logits(hidden_BSD, frozen.head, VOCAB)
    assert torch.equal(ours, outputs.logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_compiled_it_computes_the_same_under_the_same_names(
    kind: str,
    alone: torch.device,
    tiny_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = without_code_generation(monkeypatch)
    plain = FrozenModel(tiny_model(kind), device=alone, dtype=torch.bfloat16)
    model = tiny_model(kind)
    names = list(model.state_dict())
    frozen = FrozenModel(model, device=alone, dtype=torch.bfloat16, with_compiler=True)
    for _ in range(2):
        hidden_BSD = frozen.hidden_states(tokens())
        assert torch.equal(hidden_BSD, plain.hidden_states(tokens()))
        assert hidden_BSD.is_inference()
    assert counter.frame_count > 0
    assert list(model.state_dict()) == names
    forget_compiled()


def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """All of torch.compile but its last part, which needs a C++ compiler; counts what it got."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def test_dropout_is_off_and_nothing_can_be_trained(
    alone: torch.device, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    frozen = FrozenModel(model, device=alone, dtype=torch.bfloat16)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    first, second = frozen.hidden_states(tokens()), frozen.hidden_states(tokens())
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert first.is_inference()
    assert torch.is_grad_enabled()
    assert not frozen.head.weight_PD.requires_grad


def test_is_in_no_optimizer_and_frees_its_weights(
    alone: torch.device, tiny_model: Callable[..., Any]
) -> None:
    import gc
    import weakref

    model = tiny_model("llama")
    frozen = FrozenModel(model, device=alone, dtype=torch.bfloat16)
    frozen.hidden_states(tokens())
    weight = weakref.ref(model.lm_head.weight)
    frozen.destroy()
    del model
    gc.collect()
    assert weight() is None
