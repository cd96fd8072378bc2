"""The plain reference against torch's own tools, and the judge against differences put in by hand.

What ranks do is tried in tests/parity/test_zero2.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from babyllama_ds.engine.proof import plain
from babyllama_ds.engine.proof.case import Case, Trace
from babyllama_ds.engine.proof.judge import Verdict, judge
from babyllama_ds.engine.proof.models import CASES, COMPILED_CASES
from babyllama_ds.engine.proof.plain import train_plainly

CPU = torch.device("cpu")
RANKS = 2
FP32 = replace(CASES[0], steps=3)
BF16 = replace(CASES[2], steps=3)
IN_BF16 = [case for case in CASES if case.precision == "bf16"]
GRADIENT = "gradient of model.model.layers.0.self_attn.k_proj.weight"
CHANGE = "change of model.model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plainly(case: Case, dtype: torch.dtype) -> Trace:
    return train_plainly(case, num_ranks=RANKS, dtype=dtype, device=CPU)


def judged(case: Case, trace: Trace) -> Verdict:
    return judge(case, trace, num_ranks=RANKS, device=CPU)


# -- the reference ---------------------------------------------------------------------------------


def test_the_plain_training_is_torchs_own_on_whole_batches() -> None:
    """One backward pass a batch, torch's clipping, decay by name: nothing shared but the case."""
    case = FP32
    assert case.clip_norm is not None
    trace = plainly(case, torch.float64)
    module, training = case.start().double(), case.training(RANKS)
    named = dict(module.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    groups = [
        {"params": [parameter], "weight_decay": 0.0 if "norm" in name else 0.5}
        for name, parameter in named.items()
    ]
    adam = torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, eps=1e-4)
    for number, batch_BS in enumerate(case.batches(RANKS)):
        adam.zero_grad()
        module(batch_BS).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in named.items()}
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), case.clip_norm)
        if number == 0:
            assert norm > case.clip_norm, "nothing is clipped"
            torch.testing.assert_close(trace["gradient norm"][0], norm, rtol=1e-6, atol=0)
            for name, gradient in gradients.items():
                assert_close(trace[f"gradient of {name}"], gradient)
        adam.step()
    for name, parameter in named.items():
        assert_close(trace[f"change of {name}"], parameter.detach() - start[name])
    assert len(trace) == 2 * len(named) + 1


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    # transformers computes norms and softmax in fp32, also of a float64 model.
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_cases_cover_what_is_to_be_proved() -> None:
    for precision in ("fp32", "bf16"):
        cases = [case for case in CASES if case.precision == precision]
        assert {case.overlap_comm for case in cases} == {False, True}
        assert {case.accumulation_steps > 1 for case in cases} == {False, True}
        assert {case.clip_norm is None for case in cases} == {False, True}
        assert {is_tied(case) for case in cases} == {False, True}
    assert {(is_tied(case), case.overlap_comm) for case in COMPILED_CASES} == {
        (False, False),
        (True, True),
    }
    assert all(case.compiled for case in COMPILED_CASES)
    assert not any(case.compiled for case in CASES)


def is_tied(case: Case) -> bool:
    tied: bool = case.start().model.config.tie_word_embeddings
    return tied


# -- the judge -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"), [(FP32, torch.float32), (BF16, torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_a_plain_training_passes_and_every_fault_is_named(case: Case, dtype: torch.dtype) -> None:
    sound = plainly(case, dtype)
    verdict = judged(case, sound)
    assert verdict.differences == []
    assert 0 < verdict.error <= (1e-5 if case is FP32 else 1.0)
    # A gradient lost, halved, or not a number.
    for factor in (0.0, 0.5, float("nan")):
        trace = with_norm({**sound, GRADIENT: factor * sound[GRADIENT]})
        wrong = {each.what for each in judged(case, trace).differences}
        assert GRADIENT in wrong
        assert wrong <= {GRADIENT, "gradient norm"}
    wrong = {each.what for each in judged(case, {**sound, CHANGE: 1.2 * sound[CHANGE]}).differences}
    assert CHANGE in wrong
    assert wrong <= {CHANGE, "change of all weights"}
    doubled = {**sound, "gradient norm": 2 * sound["gradient norm"]}
    (only,) = judged(case, doubled).differences
    assert str(only) == "gradient norm: off by 1, allowed 1e-05"
    del doubled[GRADIENT]
    (only,) = judged(case, doubled).differences
    assert only.what == f"{GRADIENT} (missing)"


def with_norm(trace: Trace) -> Trace:
    """The trace with the norm that fits its gradients, so that these alone are wrong."""
    gradients = [each for what, each in trace.items() if what.startswith("gradient of ")]
    norm = torch.cat([each.double().flatten() for each in gradients]).norm()
    return {**trace, "gradient norm": norm[None]}


def test_a_bf16_training_does_not_pass_as_fp32() -> None:
    rounded = plainly(replace(FP32, precision="bf16"), torch.bfloat16)
    assert len(judged(FP32, rounded).differences) > 10


def test_gradients_rounded_once_more_do_not_pass_as_bf16() -> None:
    """What accumulating or reducing in bf16 does to every gradient, at the least."""
    sound = plainly(BF16, torch.bfloat16)
    rounded = with_norm({what: each.bfloat16().float() for what, each in sound.items()})
    wrong = [each.what for each in judged(BF16, rounded).differences]
    assert sum(what.startswith("gradient of ") for what in wrong) > 10


Updates = Callable[[torch.optim.AdamW, int], None]
"""Does something to an optimizer before its step of that number."""


@pytest.mark.parametrize("case", IN_BF16, ids=lambda case: case.name)
def test_sums_in_another_order_pass(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """They tip roundings of weights: a training of its own after some steps, and no wrong one."""
    change_updates(monkeypatch, noise(1e-5))
    other = plainly(case, torch.bfloat16)
    monkeypatch.undo()
    usual = plainly(case, torch.bfloat16)
    changes = [what for what in usual if what.startswith("change of ")]
    apart = [(other[what] - usual[what]).norm() / usual[what].norm() for what in changes]
    assert max(apart) > 1e-3, "nothing tipped"
    assert judged(case, {**usual, **{what: other[what] for what in changes}}).differences == []


def noise(size: float) -> Updates:
    generator = torch.Generator().manual_seed(0)

    def add(adam: torch.optim.AdamW, _: int) -> None:
        for master in masters_of(adam):
            assert master.grad is not None
            master.grad *= 1 + size * torch.randn(master.shape, generator=generator)

    return add


def round_masters(adam: torch.optim.AdamW, _: int) -> None:
    for master in masters_of(adam):
        master.data.copy_(master.bfloat16())


def lose_a_step(adam: torch.optim.AdamW, number: int) -> None:
    for master in masters_of(adam):
        if number == 7:
            master.grad = torch.zeros_like(master)


def setting(**values: Any) -> Updates:
    def put(adam: torch.optim.AdamW, _: int) -> None:
        for group in adam.param_groups:
            group.update(values)

    return put


WRONG_UPDATES: Mapping[str, Updates] = {
    "weights kept in bf16": round_masters,
    "a step without its gradients": lose_a_step,
    "norms decayed": setting(weight_decay=0.5),
    "nothing decayed": setting(weight_decay=0.0),
    "another beta": setting(betas=(0.8, 0.99)),
    "another epsilon": setting(eps=1e-8),
    "a rate of 2 % more": setting(lr=3e-3 * 1.02),
}


@pytest.mark.parametrize("fault", WRONG_UPDATES)
@pytest.mark.parametrize("case", IN_BF16, ids=lambda case: case.name)
def test_a_wrong_update_does_not_pass_as_bf16(
    case: Case, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_updates(monkeypatch, WRONG_UPDATES[fault])
    trace = plainly(case, torch.bfloat16)
    monkeypatch.undo()
    wrong = judged(case, trace).differences
    assert wrong
    assert all(each.what.startswith("change of ") for each in wrong)


def change_updates(monkeypatch: pytest.MonkeyPatch, change: Updates) -> None:
    """Have every update of a plain training changed, from here on."""
    made = plain._adamw

    def changed(masters: dict[str, Tensor], case: Case) -> torch.optim.AdamW:
        adam, steps = made(masters, case), iter(range(1, case.steps + 1))
        adam.register_step_pre_hook(lambda *_: change(adam, next(steps)))
        return adam

    monkeypatch.setattr(plain, "_adamw", changed)


def masters_of(adam: torch.optim.AdamW) -> list[Tensor]:
    return [master for group in adam.param_groups for master in group["params"]]
