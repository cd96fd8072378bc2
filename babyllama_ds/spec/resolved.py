"""A job written back: what `<run>/job.yaml` holds.

Enters: a `JobSpec`. Leaves: YAML with every default spelled out, which `load_job` reads back to
an equal job in any environment.
"""

from __future__ import annotations

from typing import Any

import yaml

from babyllama_ds.spec.document import CoreResolver
from babyllama_ds.spec.job import JobSpec


def dump_job(job: JobSpec) -> str:
    """The resolved job as YAML. Dollar signs are escaped: no variable is left to fill."""
    data = _escape(job.model_dump(mode="json"))
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 (other readers) or the core schema would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        """No anchors: two teachers with the same training are written out twice."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML's single quotes lose line breaks such as U+0085: escape all that is not printable.
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, None if text.isprintable() else '"'
    )


CoreResolver.add_to(_Dumper)
_Dumper.add_representer(str, _represent_text)


def _escape(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _escape(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_escape(value) for value in data]
    return data.replace("$", "$$") if isinstance(data, str) else data
