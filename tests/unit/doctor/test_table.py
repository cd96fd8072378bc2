"""The table's text in 80 columns, the same as JSON, and the error that failures end in."""

from __future__ import annotations

import json

import pytest

from babyllama_ds.doctor.findings import failure, ok, refuse_failures, warning
from babyllama_ds.doctor.table import WIDTH, as_json, as_table
from babyllama_ds.errors import MachineError

FINDINGS = [
    ok("host", "2 cores, 12.0 GiB of memory available"),
    warning("write speed", "64 MiB written and synced at 9 MB/s", remedy="choose a local disk"),
    failure(
        "zero-2 fp32",
        "2 CPU ranks, not as a plain process. llama: gradient of model.layers.0.weight: off by 0.5",
        remedy="do not train here",
    ),
]
TABLE = """\
status   check        found
--------------------------------------------------------------------------------
ok       host         2 cores, 12.0 GiB of memory available
warning  write speed  64 MiB written and synced at 9 MB/s
                      remedy: choose a local disk
failure  zero-2 fp32  2 CPU ranks, not as a plain process. llama: gradient of
                      model.layers.0.weight: off by 0.5
                      remedy: do not train here
--------------------------------------------------------------------------------
3 checks in 12 s: 1 ok, 1 warning, 1 failure
"""


def test_the_table() -> None:
    text = as_table(FINDINGS, seconds=12.3)
    assert text == TABLE
    assert max(len(line) for line in text.splitlines()) <= WIDTH == 80


def test_a_long_name_does_not_leave_the_table() -> None:
    found = failure("zero-2 bf16", "gradient of " + "model.layers." * 20, remedy="x" * 200)
    assert max(len(line) for line in as_table([found], seconds=0).splitlines()) <= WIDTH


def test_the_count_of_several() -> None:
    last = as_table([*FINDINGS, *FINDINGS], seconds=0).splitlines()[-1]
    assert last == "6 checks in 0 s: 2 ok, 2 warnings, 2 failures"


def test_the_same_as_json() -> None:
    value = json.loads(as_json(FINDINGS, seconds=12.34))
    assert value["counts"] == {"ok": 1, "warning": 1, "failure": 1}
    assert value["seconds"] == 12.3
    assert value["findings"][0] == {
        "check": "host",
        "status": "ok",
        "found": "2 cores, 12.0 GiB of memory available",
        "remedy": None,
    }
    assert [each["remedy"] for each in value["findings"][1:]] == [
        "choose a local disk",
        "do not train here",
    ]


def test_failures_are_an_error_of_the_family_and_warnings_are_not() -> None:
    refuse_failures(FINDINGS[:2])
    with pytest.raises(MachineError) as caught:
        refuse_failures([*FINDINGS, failure("locks", "none", remedy="mount it with them")])
    assert str(caught.value) == (
        "doctor: got 2 failures: zero-2 fp32, locks, expected none\n"
        "    hint: the table says what to do about each"
    )
    with pytest.raises(MachineError, match="got 1 failure: zero-2 fp32, expected none"):
        refuse_failures(FINDINGS)
