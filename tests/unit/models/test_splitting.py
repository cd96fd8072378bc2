"""What cannot be split over ranks is refused, with what could."""

from __future__ import annotations

from dataclasses import replace

import pytest

from babyllama_ds.errors import JobError, ModelError
from babyllama_ds.models.sizes import ModelSizes
from babyllama_ds.models.splitting import (
    SPLIT_FAMILIES,
    WRONGLY_SPLIT,
    check_groups,
    check_split,
)

LLAMA = ModelSizes(
    family="llama",
    params=10_000,
    parameter_sizes=(10_000,),
    backbone_weights=7_000,
    head_rows=100,
    hidden_size=48,
    num_layers=2,
    num_heads=12,
    num_kv_heads=4,
    head_size=4,
    intermediate_size=40,
    dropout=0.0,
)
WHERE = "teachers.big.tensor_parallel"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("family", SPLIT_FAMILIES)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_what_divides_is_split(family: str, parts: int) -> None:
    check_split(replace(LLAMA, family=family), parts, where=WHERE)


@pytest.mark.parametrize(
    ("parts", "changes", "got", "divisor", "fitting"),
    [
        (8, {}, "8 for a model of 12 attention heads", 12, 4),
        (3, {}, "3 for a model of 4 key-value heads", 4, 2),
        (4, {"intermediate_size": 42}, "4 for a model of 42 inner columns (inter", 42, 2),
        (16, {"num_heads": 16}, "16 for a model of 4 key-value heads", 4, 4),
        (10**12, {}, "1000000000000 for a model of 12 attention heads", 12, 4),  # at once
    ],
)
def test_heads_and_columns_are_dealt_out_in_equal_numbers(
    parts: int, changes: dict[str, int], got: str, divisor: int, fitting: int
) -> None:
    with pytest.raises(ModelError) as caught:
        check_split(replace(LLAMA, **changes), parts, where=WHERE)  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.where == WHERE
    assert problem.got.startswith(got)
    assert problem.expected == f"a divisor of {divisor}: each rank has as many"
    assert (problem.hint or "").endswith(f"divides all of this model is {fitting}")


@pytest.mark.parametrize(
    ("family", "why"), [*WRONGLY_SPLIT.items(), ("mamba", "nobody has compared it with one rank")]
)
def test_other_families_are_refused_with_the_reason(family: str, why: str) -> None:
    check_split(replace(LLAMA, family=family), 1, where=WHERE)
    with pytest.raises(ModelError) as caught:
        check_split(replace(LLAMA, family=family), 2, where=WHERE)
    (problem,) = caught.value.problems
    assert problem.got == f"2 for a model of the family {family}: {why}"
    assert problem.expected.startswith("1, or one of the families llama, mistral, ")
    assert "distillation.cache=hidden" in (problem.hint or "")


def test_gpt2_is_one_that_deepspeed_itself_refuses() -> None:
    """DeepSpeed's own table: the reason that is given for it is true."""
    from deepspeed.module_inject.auto_tp import AutoTP

    assert not AutoTP.supported("(transformer): GPT2Model(")
    assert AutoTP.supported("(model): LlamaModel(")


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_every_rank_is_in_one_group(num_ranks: int) -> None:
    check_groups(2, num_ranks, where=WHERE)


@pytest.mark.parametrize(("num_ranks", "got"), [(1, "2 with 1 rank"), (3, "2 with 3 ranks")])
def test_ranks_that_are_left_over_are_refused(num_ranks: int, got: str) -> None:
    with pytest.raises(JobError) as caught:
        check_groups(2, num_ranks, where=WHERE)
    assert str(caught.value) == (
        f"{WHERE}: got {got}, expected a divisor of the number of ranks: each is in one group\n"
        f"    hint: start a multiple of 2 ranks (NPROC, --num_gpus), or change {WHERE}"
    )


def test_a_group_is_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_SIZE", "4")
    check_groups(4, 8, where=WHERE)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with pytest.raises(JobError, match="got 4 with 2 ranks on this machine, expected a divisor"):
        check_groups(4, 8, where=WHERE)
