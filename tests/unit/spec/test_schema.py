"""The JSON schema describes every field and names the kinds."""

from __future__ import annotations

import json
from typing import Any

from babyllama_ds.spec.schema import job_schema


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
