"""What an editor makes of the schema: shipped jobs pass, and what the loader refuses is refused.

Checked with a validator that shares nothing with Pydantic, in the draft that the schema names and
in draft 7, the one that older editors know.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, Draft202012Validator

from babyllama_ds.errors import JobError
from babyllama_ds.spec.document import Loader
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.schema import job_schema
from babyllama_ds.spec.shipped import find_job, shipped_names

VALIDATORS = pytest.mark.parametrize("validator", [Draft202012Validator, Draft7Validator])
NAMES = shipped_names("jobs")
ENVIRON = {"BABYLM_DATA": "/data", "WHO": "me"}
Change = Callable[[dict[str, Any]], object]


def written(name: str) -> dict[str, Any]:
    """A shipped job as it is written, `${…}` and all."""
    loader = _Core(find_job(name).read_text())
    job: dict[str, Any] = loader.get_single_data()
    return copy.deepcopy(job)  # nothing shared by anchors


class _Core(Loader):
    """PyYAML's safe constructors over YAML 1.2's scalars, as editors read them."""


def _float(loader: yaml.Loader, node: yaml.ScalarNode) -> float:
    return float(node.value)


_Core.add_constructor("tag:yaml.org,2002:float", _float)


def errors(validator: Any, job: object) -> list[str]:
    return [error.message for error in validator(job_schema()).iter_errors(job)]


def loads(job: object, folder: Path) -> bool:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    try:
        load_job(path, environ=ENVIRON)
    except JobError:
        return False
    return True


@VALIDATORS
def test_the_schema_is_one(validator: Any) -> None:
    validator.check_schema(job_schema())


@VALIDATORS
@pytest.mark.parametrize("name", NAMES)
def test_shipped_jobs_pass(validator: Any, name: str) -> None:
    assert errors(validator, written(name)) == []


RIGHT: dict[str, Change] = {
    "a variable in a path": lambda job: job.update(
        corpus={"kind": "files", "train": ["${BABYLM_DATA}/a.txt"], "split": {"kind": "tail"}}
    ),
    "a variable in the name": lambda job: job.update(name="${WHO}-{seed}"),
    "a variable in a teacher's name": lambda job: job["teachers"][0].update(name="${WHO}"),
    "no control": lambda job: job.update(control=None),
    "a control of its own": lambda job: job.update(
        control={"training": job["student"]["training"]}
    ),
    "betas": lambda job: job["student"]["training"].update(betas=[0.9, 0.95]),
    "micro_batch": lambda job: job["student"]["training"].update(micro_batch=4),
    "micro_batch auto": lambda job: job["student"]["training"].update(micro_batch="auto"),
    "offsets": lambda job: job["windows"].update(offsets={"phases": 2}),
    "no clipping": lambda job: job["student"]["training"].update(clip_norm=None),
    "a loaded teacher": lambda job: job["teachers"].append(
        {"name": "big", "model": {"kind": "pretrained", "path": "some/model"}}
    ),
}

WRONG: dict[str, Change] = {
    "a misspelt key": lambda job: job.update(sead=1),
    "a misspelt key in a list": lambda job: job["teachers"][0].update(wieght=1),
    "a misspelt key in a union": lambda job: job["student"]["model"].update(hiden_size=3),
    "a misspelt key deep down": lambda job: job["student"]["training"].update(epoch=3),
    "a key of another kind": lambda job: job["student"]["model"].update(dropout=0.1),
    "a text for a number": lambda job: job["student"]["training"].update(epochs="many"),
    "a number for a text": lambda job: job.update(name=5),
    "a number below its limit": lambda job: job["corpus"].update(words=10),
    "a number above its limit": lambda job: job["distillation"].update(alpha=1.5),
    "a boolean for a number": lambda job: job.update(seed=True),
    "a list for a mapping": lambda job: job.update(student=[]),
    "no kind": lambda job: job["student"]["model"].pop("kind"),
    "a wrong kind": lambda job: job["student"]["model"].update(kind="lama"),
    "a wrong word": lambda job: job["student"]["training"].update(schedule="cosin"),
    "a wrong word in a union": lambda job: job["windows"].update(offsets="fixt"),
    "a wrong word for a number": lambda job: job["student"]["training"].update(micro_batch="aut"),
    "a wrong key in a union of words": lambda job: job["windows"].update(offsets={"phase": 2}),
    "too few": lambda job: job.update(teachers=[]),
    "one beta": lambda job: job["student"]["training"].update(betas=[0.9]),
    "three betas": lambda job: job["student"]["training"].update(betas=[0.9, 0.9, 0.9]),
    "a beta of 1": lambda job: job["student"]["training"].update(betas=[0.9, 1.0]),
    "a missing key": lambda job: job["student"]["training"].pop("learning_rate"),
    "a name that is a path": lambda job: job.update(name="a/b"),
    "null for a value": lambda job: job.update(seed=None),
}


@VALIDATORS
@pytest.mark.parametrize("what", RIGHT)
def test_what_the_loader_takes_passes(validator: Any, what: str, tmp_path: Path) -> None:
    job = written("nursery")
    RIGHT[what](job)
    assert loads(job, tmp_path)
    assert errors(validator, job) == []


@VALIDATORS
@pytest.mark.parametrize("what", WRONG)
def test_what_the_loader_refuses_is_marked(validator: Any, what: str, tmp_path: Path) -> None:
    job = written("nursery")
    WRONG[what](job)
    assert not loads(job, tmp_path)
    assert errors(validator, job)


def test_an_editor_has_something_to_show() -> None:
    """Completion needs closed mappings, words to choose from, defaults and descriptions."""
    schema = job_schema()
    for name, model in {"": schema, **schema["$defs"]}.items():
        assert model["additionalProperties"] is False, name
        for key, value in model["properties"].items():
            if key != "kind":
                assert value.get("description") or described(value, schema), f"{name}.{key}"
            assert key in model.get("required", ()) or "default" in value, f"{name}.{key}"
    schedule = schema["$defs"]["TrainingSpec"]["properties"]["schedule"]
    assert (schedule["enum"], schedule["default"]) == (["cosine", "linear"], "cosine")
    kinds = {
        one["properties"]["kind"]["const"]
        for one in schema["$defs"].values()
        if "kind" in one["properties"]
    }
    assert {"nursery", "files", "bpe", "llama", "gpt2", "pretrained", "tail"} <= kinds


def described(value: dict[str, Any], schema: dict[str, Any]) -> str:
    """What the part that a key leads to says of itself."""
    (part,) = {schema["$defs"][name]["description"] for name in references(value)}
    return str(part)


def references(value: object) -> Iterator[str]:
    yield from re.findall(r"#/\$defs/(\w+)", str(value))
