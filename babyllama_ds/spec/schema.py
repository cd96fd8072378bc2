"""The job's JSON schema, for editors that complete and check YAML.

It is Pydantic's, in words that mean the same in every draft from 7 on, for editors differ in the
one that they know (yaml-language-server: 7, later 2020-12 too).
"""

from __future__ import annotations

from typing import Any

from babyllama_ds.spec.job import JobSpec

FROM_ENVIRONMENT = r"|\$\{"
"""Ends every pattern: a text with `${NAME}` is checked once the variable is filled in."""


def job_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12, and 7) of a job file, every field with its description."""
    schema: dict[str, Any] = _for_editors(JobSpec.model_json_schema())
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "babyllama_ds job",
    }


def _for_editors(part: Any) -> Any:
    if isinstance(part, list):
        return [_for_editors(one) for one in part]
    if not isinstance(part, dict):
        return part
    whole = {key: _for_editors(value) for key, value in part.items()}
    if isinstance(whole.get("pattern"), str):
        whole["pattern"] += FROM_ENVIRONMENT
    items = whole.get("prefixItems")
    if isinstance(items, list) and all(item == items[0] for item in items):
        # Draft 7 does not know it; `minItems` and `maxItems` say how many there are.
        del whole["prefixItems"]
        whole["items"] = items[0]
    return whole
