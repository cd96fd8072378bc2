"""Every term of the loss in one optimizer step, through the engine, against plain code.

Shapes: B windows, S positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax, softmax

from babyllama_ds.engine.inference import FrozenModel
from babyllama_ds.errors import JobError
from babyllama_ds.models.documents import Pieces
from babyllama_ds.spec.distillation import DistillationSpec, HiddenMatching, LayerPair
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.teachers.ensemble import Ensemble, Member
from babyllama_ds.training.batches import Batch, label_mask, micro_batch
from babyllama_ds.training.matching import check_layers
from babyllama_ds.training.objective import Counts, Totals, objective_of
from babyllama_ds.training.step import train_step

BATCH, LENGTH, VOCAB = 8, 9, 59  # models have 61 rows: two are padding
BETA1 = 0.9
UNLABELLED = [3, 4, 5, 6, 7, 8, 9, 10]
PAIRS = [("wide", 1, 0), ("deep", 3, 1), ("deep", 0, 2), ("wide", 2, 2)]
WIDTHS = {"wide": 36, "deep": 16}


def spec_of(loss: str, **changes: Any) -> DistillationSpec:
    layers = [
        LayerPair(teacher=teacher, teacher_layer=i, student_layer=j) for teacher, i, j in PAIRS
    ]
    return DistillationSpec(
        **{
            "alpha": {"start": 0.9, "end": 0.1, "over": 0.5, "shape": "cosine"},
            "temperature": {"start": 1.0, "end": 3.0},
            "divergence": {"kind": "jensen_shannon", "beta": 0.3},
            "soft_reduction": "token",
            "hidden_matching": HiddenMatching(loss=loss, weight=0.7, layers=tuple(layers)),
            **changes,
        }
    )


def teachers_of(tiny_model: Callable[..., Any]) -> dict[str, nn.Module]:
    return {
        "wide": tiny_model("gpt2", seed=1, n_embd=WIDTHS["wide"]),
        "deep": tiny_model("llama", seed=2, hidden_size=WIDTHS["deep"], num_hidden_layers=3),
    }


@pytest.fixture
def ensemble(alone: torch.device, tiny_model: Callable[..., Any]) -> Ensemble:
    return Ensemble(
        [
            Member(
                name,
                FrozenModel(
                    model,
                    device=alone,
                    dtype=torch.float32,
                    layers=[i for teacher, i, _ in PAIRS if teacher == name],
                ),
                1.0,
            )
            for name, model in teachers_of(tiny_model).items()
        ]
    )


def batch_of(num_windows: int, accumulation: int) -> Batch:
    """Padding stands among the real windows; some tokens have no label where they come next."""
    generator = torch.Generator().manual_seed(7)
    tokens_BS = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    real_B = torch.arange(BATCH) < num_windows
    shuffled = torch.randperm(BATCH, generator=generator)
    tokens_BS, real_B = tokens_BS[shuffled], real_B[shuffled]
    has_label = label_mask(UNLABELLED)
    mask_BS = torch.from_numpy(has_label(tokens_BS.numpy()))
    micros = zip(*(each.chunk(accumulation) for each in (tokens_BS, real_B, mask_BS)), strict=True)
    return Batch(
        epoch=0,
        window_ids=shuffled[real_B].numpy(),
        length=LENGTH,
        micro_batches=tuple(micro_batch(t, r, has_label_BS=m) for t, r, m in micros),
        labelled=int(mask_BS[real_B].sum()),
    )


def real_tokens(batch: Batch) -> Tensor:
    tokens_BS = torch.cat([micro.input_ids_BS for micro in batch.micro_batches])
    valid_BS = torch.cat([micro.valid_N for micro in batch.micro_batches]).view_as(tokens_BS)
    return tokens_BS[valid_BS.all(1)]


def plain_terms(
    student: nn.Module,
    projections: Sequence[Tensor],
    teachers: dict[str, nn.Module],
    tokens_BS: Tensor,
    *,
    temperature: float,
    loss: str,
) -> dict[str, Tensor]:
    """Means of each term over the whole batch, from transformers' own hidden states."""
    ours = student(input_ids=tokens_BS, output_hidden_states=True)
    with torch.no_grad():
        theirs = {
            name: teacher(input_ids=tokens_BS, output_hidden_states=True)
            for name, teacher in teachers.items()
        }
    logits_BSV = ours.logits[..., :VOCAB]
    labels = tokens_BS[:, 1:]
    counted = ~torch.isin(labels, torch.tensor(UNLABELLED))
    likelihood = log_softmax(logits_BSV[:, :-1], -1).gather(-1, labels[..., None])[..., 0]
    mean = sum(each.logits[..., :VOCAB] for each in theirs.values()) / 2
    p, q = softmax(mean / temperature, -1), softmax(logits_BSV / temperature, -1)
    m = 0.3 * p + 0.7 * q
    soft = 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)
    matching = []
    for (teacher, i, j), weight in zip(PAIRS, projections, strict=True):
        y, t = ours.hidden_states[j] @ weight.T, theirs[teacher].hidden_states[i]
        each = (y - t).square().mean(-1) if loss == "mse" else 1 - cosine_similarity(y, t, dim=-1)
        matching.append(each.mean())
    return {
        "ce": -likelihood[counted].mean(),
        "jensen_shannon": soft.mean(),
        "log_z_squared": logits_BSV[:, :-1].logsumexp(-1)[counted].square().mean(),
        "hidden_distance": sum(matching),
    }


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("num_windows", [8, 5])
@pytest.mark.parametrize(("loss", "reduction"), [("mse", "token"), ("cosine", "sequence")])
def test_one_step_takes_the_gradient_of_all_terms(
    loss: str,
    reduction: str,
    num_windows: int,
    accumulation: int,
    ensemble: Ensemble,
    tiny_model: Callable[..., Any],
    training_spec: Callable[..., Any],
    make_engine: Callable[..., Any],
) -> None:
    training = training_spec(
        batch_windows=BATCH,
        micro_batch=BATCH // accumulation,
        clip_norm=None,
        betas=(BETA1, 0.99),
        z_loss=0.03,
    )
    objective = objective_of(
        tiny_model("llama"),
        ensemble,
        vocab_size=VOCAB,
        training=training,
        distillation=spec_of(loss, soft_reduction=reduction),
        seed=5,
    )
    weights = [each.detach().clone() for each in objective.matching.projections]
    engine = make_engine(objective, training)
    batch = batch_of(num_windows, accumulation)
    sums = train_step(
        engine, objective, ensemble, batch, rate=0, seed=0, step=3, done=0.25, watch=True
    )

    student = tiny_model("llama")
    projections = [each.requires_grad_() for each in weights]
    temperature = 1.5
    alpha = 0.9 + (0.1 - 0.9) * (1 - math.cos(math.pi / 2)) / 2  # half way of half a cosine
    terms = plain_terms(
        student,
        projections,
        {name: teacher.eval() for name, teacher in teachers_of(tiny_model).items()},
        real_tokens(batch),
        temperature=temperature,
        loss=loss,
    )
    # Of the terms the soft one alone is summed over a window, where the reduction says so.
    positions = LENGTH if reduction == "sequence" else 1
    right = (
        alpha * terms["ce"]
        + (1 - alpha) * temperature**2 * positions * terms["jensen_shannon"]
        + 0.03 * terms["log_z_squared"]
        + 0.7 * terms["hidden_distance"]
    )
    right.backward()
    state = dict(engine.named_state())
    named = {f"model.{key}": p for key, p in student.named_parameters()}
    named |= {f"matching.projections.{i}": p for i, p in enumerate(projections)}
    assert {f"exp_avg/{key}" for key in named} == {k for k in state if k.startswith("exp_avg/")}
    for key, parameter in named.items():
        gradient = state[f"exp_avg/{key}"] / (1 - BETA1)
        error = (gradient - parameter.grad).abs().max().item()
        assert error <= 3e-5 * max(parameter.grad.abs().max().item(), 1e-3), f"{key}: {error}"

    totals = sums.over_all_ranks()
    assert objective.value(totals, sums.counts) == pytest.approx(right.item(), rel=1e-5)
    measured = objective.measures(totals, sums.counts)
    assert list(measured) == [*terms, "alpha", "temperature"]
    assert measured["alpha"] == pytest.approx(alpha)
    assert measured["temperature"] == temperature
    for key, term in terms.items():
        assert measured[key] == pytest.approx(term.item(), rel=1e-5), key


def test_documents_kept_apart_are_matched_apart(
    ensemble: Ensemble, tiny_model: Callable[..., Any], training_spec: Callable[..., Any]
) -> None:
    """In student and teachers: each piece as if it were a sequence of its own."""
    tokens_BS = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    begins_BS = np.zeros((2, LENGTH), np.bool_)
    begins_BS[:, [0, 4]] = True
    micro = micro_batch(tokens_BS, torch.ones(2, dtype=torch.bool), pieces=Pieces.of(begins_BS))
    objective = objective_of(
        tiny_model("llama"),
        ensemble,
        vocab_size=VOCAB,
        training=training_spec(),
        distillation=spec_of("mse"),
        seed=5,
    ).eval()
    found = objective(micro, ensemble.targets(micro), Counts(ce=1, kl=1, scale=1.0))
    matching = soft = 0.0
    for piece_BS in (tokens_BS[:, :4], tokens_BS[:, 4:]):
        terms = plain_terms(
            tiny_model("llama").eval(),
            list(objective.matching.projections),
            {name: teacher.eval() for name, teacher in teachers_of(tiny_model).items()},
            piece_BS,
            temperature=1.0,
            loss="mse",
        )
        matching += terms["hidden_distance"].item() * piece_BS.numel()
        soft += terms["jensen_shannon"].item() * piece_BS.numel()
    assert found.matching_sum.item() == pytest.approx(matching, rel=1e-5)
    assert found.kl_sum.item() == pytest.approx(soft, rel=1e-5)


def test_matrices_follow_the_seed_alone(
    ensemble: Ensemble, tiny_model: Callable[..., Any], training_spec: Callable[..., Any]
) -> None:
    def weights(seed: int, before: int) -> list[Tensor]:
        torch.manual_seed(before)
        made = objective_of(
            tiny_model("llama"),
            ensemble,
            vocab_size=VOCAB,
            training=training_spec(),
            distillation=spec_of("mse"),
            seed=seed,
        )
        return list(made.matching.projections)

    one, again, other = weights(1, 0), weights(1, 9), weights(2, 0)
    assert [tuple(each.shape) for each in one] == [(WIDTHS[name], 24) for name, *_ in PAIRS]
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))
    assert not torch.equal(one[0][:16], one[1][:16])
    # States leave them as large as they came: each is a sum of 24 products.
    for each in one:
        assert each.std().item() == pytest.approx(24**-0.5, rel=0.15)


def test_the_model_itself_is_left_as_it_was(
    ensemble: Ensemble, tiny_model: Callable[..., Any], training_spec: Callable[..., Any]
) -> None:
    model = tiny_model("llama")
    names = list(model.state_dict())
    made = objective_of(
        model,
        ensemble,
        vocab_size=VOCAB,
        training=training_spec(),
        distillation=spec_of("mse"),
        seed=1,
    )
    assert list(model.state_dict()) == names
    made.release()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, ["ce", "kl"]),
        ({"divergence": {"kind": "reverse_kl"}}, ["ce", "reverse_kl"]),
        ({"alpha": {"start": 1.0, "end": 0.0}}, ["ce", "kl", "alpha", "temperature"]),
    ],
)
def test_measures_are_called_what_they_are(
    changes: dict[str, Any], keys: list[str], tiny_model: Callable[..., Any]
) -> None:
    made = objective_of(
        tiny_model("llama"),
        Ensemble([]),
        vocab_size=VOCAB,
        training=TrainingSpec(batch_windows=1, epochs=1.0, learning_rate=1.0),
        distillation=DistillationSpec(**changes),
        seed=1,
    )
    counts = made.counts(batch_of(5, 1), num_ranks=1, accumulation_steps=1, done=0.5)
    measured = made.measures(Totals(ce=10.0, kl=9.0), counts)
    assert list(measured) == keys
    assert measured["ce"] == 10.0 / counts.ce
    assert measured[keys[1]] == 9.0 / (5 * LENGTH)


def test_layers_of_loaded_models_are_checked_too() -> None:
    matching = spec_of("mse").hidden_matching
    check_layers(matching, {"wide": 2, "deep": 3}, 2)
    with pytest.raises(JobError) as caught:
        check_layers(matching, {"wide": 1, "deep": 2}, 1)
    assert [(p.where, p.got, p.expected) for p in caught.value.problems] == [
        (f"distillation.hidden_matching.layers[{i}].{key}", got, expected)
        for i, key, got, expected in [
            (1, "teacher_layer", "3", "at most 2: deep has 2 layers"),
            (2, "student_layer", "2", "at most 1: the student has 1 layers"),
            (3, "teacher_layer", "2", "at most 1: wide has 1 layers"),
            (3, "student_layer", "2", "at most 1: the student has 1 layers"),
        ]
    ]


def test_labels_by_a_plain_loop() -> None:
    tokens = np.array([[1, 2, 3, 1, 2], [2, 2, 9, 3, 3]])
    has_label = label_mask([3, 9])
    expected = [
        [j + 1 < 5 and row[j + 1] not in (3, 9) for j in range(5)] for row in tokens.tolist()
    ]
    assert has_label(tokens).tolist() == expected
    assert label_mask([]) is None
