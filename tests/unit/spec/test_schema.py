"""The JSON schema and the reference describe every field; the files made of them are fresh."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.reference import job_reference
from babyllama_ds.spec.schema import job_schema

ROOT = Path(__file__).parents[3]
JOBS = sorted((ROOT / "launcher" / "jobs").glob("*.yaml"))


def test_the_schema_is_json_and_closed() -> None:
    schema = json.loads(json.dumps(job_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"name", "corpus", "tokenizer", "teachers", "student"}
    assert schema["properties"]["corpus"]["discriminator"]["propertyName"] == "kind"


def test_every_field_but_kind_is_described() -> None:
    bare: list[str] = []

    def visit(name: str, model: dict[str, Any]) -> None:
        for key, value in model.get("properties", {}).items():
            if key != "kind" and "$ref" not in value and not value.get("description"):
                bare.append(f"{name}.{key}")

    schema = job_schema()
    visit("JobSpec", schema)
    for name, model in schema["$defs"].items():
        visit(name, model)
    assert bare == []


def test_the_files_made_of_it_are_fresh() -> None:
    """Else: `make reference`."""
    schema = job_schema()
    assert json.loads((ROOT / "launcher" / "jobs" / "job.schema.json").read_text()) == schema
    assert (ROOT / "docs" / "jobs.md").read_text() == job_reference(schema) + "\n"


def test_the_reference_has_every_key_once_with_its_limits_and_default() -> None:
    text = " ".join(job_reference(job_schema()).split())
    models = list(_models(JobSpec))
    fields = [key for model in models for key in model.model_fields]
    assert len(re.findall(r"- \*\*`\w+`\*\*", text)) == len(fields) > 90
    for model in models:
        for key, field in model.model_fields.items():
            described = " ".join((field.description or "").split())
            assert f"- **`{key}`**" in text
            assert described in text
    alpha = "a number ≥ 0, ≤ 1 or [distillation.alpha](#distillationalpha)"
    assert f"- **`alpha`** ({alpha}; default `0.5`): Weight of the hard" in text
    assert "- **`learning_rate`** (a number > 0; to be given): Peak" in text
    assert "The same at `student.training`, `control.training`." in text


def _models(model: Any, seen: set[Any] | None = None) -> Iterator[Any]:
    """The job's classes, found without its schema."""
    seen = set() if seen is None else seen
    if isinstance(model, type) and hasattr(model, "model_fields"):
        if model in seen:
            return
        seen.add(model)
        yield model
        inner = [field.annotation for field in model.model_fields.values()]
    else:
        inner = list(getattr(model, "__args__", ()))
    for each in inner:
        yield from _models(each, seen)


def test_the_references_links_lead_to_its_headings() -> None:
    text = job_reference(job_schema())
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    # As GitHub makes them: lower case, punctuation dropped, spaces as dashes.
    anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert links == anchors - {"the-whole"}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_shipped_jobs_name_the_schema_and_read_alike_to_an_editor(path: Path) -> None:
    """Editors read YAML 1.2, to which `50_000` is a text; this package reads it as a number."""
    first, _, rest = path.read_text().partition("\n")
    assert first == "# yaml-language-server: $schema=job.schema.json"
    assert (path.parent / first.partition("=")[2]).exists()
    assert not re.search(r"\d_\d", rest)
    _known(yaml.safe_load(rest), job_schema(), job_schema()["$defs"])


def _known(value: Any, schema: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Every key is one that the schema has in this place; a choice is made by `kind`."""
    if "$ref" in schema:
        schema = parts[schema["$ref"].rpartition("/")[2]]
    if "discriminator" in schema:
        return _known(value, {"$ref": schema["discriminator"]["mapping"][value["kind"]]}, parts)
    if "anyOf" in schema and isinstance(value, dict):
        return _known(value, schema["anyOf"][0], parts)
    if isinstance(value, dict) and "properties" in schema:
        assert value.keys() <= schema["properties"].keys()
        for key, inner in value.items():
            _known(inner, schema["properties"][key], parts)
    if isinstance(value, list) and "items" in schema:
        for inner in value:
            _known(inner, schema["items"], parts)
    return None
