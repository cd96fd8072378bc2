"""The job's JSON schema, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from babyllama_ds.spec.job import JobSpec


def job_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a job file, every field with its description."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **JobSpec.model_json_schema(),
        "title": "babyllama_ds job",
    }
