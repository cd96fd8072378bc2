"""Seeds, names, and validators seen from Python."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from babyllama_ds.spec.job import JobSpec, derive_seed
from babyllama_ds.spec.models import LlamaModel


def job(**changes: Any) -> JobSpec:
    training = {"batch_windows": 4, "epochs": 1, "learning_rate": 1e-3}
    model = {"kind": "pretrained", "path": "x"}
    data = {
        "name": "run-{seed}-a",
        "seed": 5,
        "corpus": {"kind": "nursery"},
        "tokenizer": {"kind": "bpe"},
        "teachers": [{"name": "one", "model": model}, {"name": "two", "model": model, "seed": 42}],
        "student": {"model": model, "training": training},
        **changes,
    }
    return JobSpec.model_validate_json(json.dumps(data))


def test_run_name_holds_the_seed() -> None:
    assert job().run_name == "run-5-a"


def test_stages_have_seeds_of_their_own_and_the_control_the_students() -> None:
    spec = job()
    assert spec.stage_seed("teachers/two") == 42
    assert spec.stage_seed("teachers/one") == derive_seed(5, "teachers/one")
    assert spec.stage_seed("control") == spec.stage_seed("student") == derive_seed(5, "student")
    assert spec.stage_seed("corpus") == derive_seed(5, "corpus")
    assert len({derive_seed(s, n) for s in range(50) for n in ("student", "corpus")}) == 100


def test_seeds_are_the_same_everywhere() -> None:
    # The first eight bytes of `printf 1/student | sha256sum`, less the last bit.
    assert derive_seed(1, "student") == 0x32B65B83B45FB5B7 >> 1


def test_a_job_is_frozen() -> None:
    with pytest.raises(ValidationError):
        job().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("offsets", "phases"), [("fixed", 1), ("random", None), ({"phases": 3}, 3), ({"phases": 1}, 1)]
)
def test_offsets_are_words_or_phases(offsets: Any, phases: int | None) -> None:
    assert job(windows={"length": 64, "offsets": offsets}).windows.num_phases == phases


def test_one_phase_and_fixed_are_one_experiment() -> None:
    one, fixed = (job(windows={"offsets": word}) for word in ({"phases": 1}, "fixed"))
    assert one == fixed
    assert one.model_dump(mode="json")["windows"]["offsets"] == "fixed"


@pytest.mark.parametrize("cache", ["hidden", "topk"])
def test_a_cache_of_random_windows_is_refused(cache: str) -> None:
    with pytest.raises(ValidationError) as caught:
        job(distillation={"cache": cache})
    (mismatch,) = caught.value.errors()[0]["ctx"]["error"].mismatches
    assert str(mismatch) == (
        f"cache: got {cache}, expected none, since windows.offsets are random: "
        "no window comes twice"
    )
    assert mismatch.hint == "set windows.offsets={phases: K}, K up to 1 (the epochs)"
    assert job(distillation={"cache": cache}, windows={"offsets": "fixed"})


def test_phases_that_no_epoch_reaches_are_refused() -> None:
    training = {"batch_windows": 4, "epochs": 2.5, "learning_rate": 1e-3}
    student = {"model": {"kind": "pretrained", "path": "x"}, "training": training}

    def with_phases(number: int) -> JobSpec:
        windows = {"offsets": {"phases": number}}
        return job(student=student, windows=windows, distillation={"cache": "hidden"})

    assert with_phases(3)
    with pytest.raises(ValidationError, match=r"hidden over 4 phases, expected at most as many "):
        with_phases(4)
    assert job(student=student, windows={"offsets": {"phases": 4}})  # without a cache it may be


def test_what_is_asked_of_documents_needs_their_boundaries() -> None:
    asked = {
        "tokenizer": {"kind": "bpe", "document_tokens": "both"},
        "windows": {"attention": "document"},
    }
    with pytest.raises(ValidationError) as caught:
        job(**asked)
    mismatches = [
        mismatch for error in caught.value.errors() for mismatch in error["ctx"]["error"].mismatches
    ]
    dropped = "since corpus.documents is none: boundaries are dropped"
    assert list(map(str, mismatches)) == [
        f"document_tokens: got both, expected none, {dropped}",
        f"attention: got document, expected window, {dropped}",
    ]
    assert {one.hint for one in mismatches} == {"set corpus.documents to what a document is"}
    loaded = {"kind": "pretrained", "path": "x", "document_tokens": "end"}
    with pytest.raises(ValidationError, match="document_tokens: got end, expected none"):
        job(tokenizer=loaded)
    kept = {"kind": "nursery", "documents": "lines"}
    assert job(corpus=kept, **asked)
    assert job(corpus=kept, windows=asked["windows"], tokenizer=loaded)
    # Under `sequence` too: documented, and not refused.
    assert job(corpus=kept, **asked, distillation={"soft_reduction": "sequence"})


def test_mismatches_read_well_without_a_file() -> None:
    with pytest.raises(ValidationError, match=r"hidden_size: got 10, expected a multiple of num_"):
        LlamaModel(kind="llama", hidden_size=10, num_layers=1, num_heads=3, intermediate_size=4)
