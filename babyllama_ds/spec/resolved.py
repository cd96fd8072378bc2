"""A job written back: what `<run>/job.yaml` holds.

Enters: a `JobSpec`. Leaves: YAML with every default spelled out, which `load_job` reads back to
an equal job in any environment, and `read_values` to its values, also where they are no job today.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from babyllama_ds.spec.document import CoreResolver
from babyllama_ds.spec.job import JobSpec


def dump_job(job: JobSpec) -> str:
    """The resolved job as YAML. Dollar signs are escaped: no variable is left to fill."""
    return dump_values(job.model_dump(mode="json"))


def dump_values(values: Mapping[str, Any]) -> str:
    """As `dump_job`, of a job's values."""
    data = _map_texts(values, lambda text: text.replace("$", "$$"))
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


def read_values(text: str) -> Any:
    """What `dump_job` wrote, as plain values. Raises `yaml.YAMLError`."""
    return _map_texts(yaml.safe_load(text), lambda text: text.replace("$$", "$"))


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


def _map_texts(data: Any, change: Callable[[str], str]) -> Any:
    if isinstance(data, Mapping):
        return {key: _map_texts(value, change) for key, value in data.items()}
    if isinstance(data, list):
        return [_map_texts(value, change) for value in data]
    return change(data) if isinstance(data, str) else data
