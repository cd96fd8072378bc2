"""A version is written in one place; what else names it has to agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

import babyllama_ds

ROOT = Path(__file__).parents[2]
RELEASE = re.compile(r"^## (?:(Unreleased)|(\S+) - (\d{4}-\d\d-\d\d))$", re.M)


def disagreements(version: str, citation: dict[str, Any], changelog: str) -> list[str]:
    """What does not fit `version`, in CITATION.cff and in the headings of CHANGELOG.md.

    The newest heading is of this version, or `Unreleased`, what will be the next. A citation gives
    the date of the newest release, and none before the first.
    """
    found = []
    headings = [line for line in changelog.splitlines() if line.startswith("## ")]
    releases = list(RELEASE.finditer(changelog))
    if not headings or len(releases) != len(headings):
        found.append("a heading is neither `## Unreleased` nor `## VERSION - DATE`")
    if any(release[1] for release in releases[1:]):
        found.append("what is unreleased stands first")
    numbered = [(release[2], release[3]) for release in releases if release[2]]
    newest, date = numbered[0] if numbered else (version, None)
    if newest != version:
        found.append(f"CHANGELOG.md: {newest} is the newest release")
    if citation.get("version") != version:
        found.append(f"CITATION.cff: version {citation.get('version')}")
    if str(citation.get("date-released")) != str(date):
        found.append(f"CITATION.cff: date-released {citation.get('date-released')}, not {date}")
    return found


def test_citation_and_changelog_name_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert disagreements(babyllama_ds.__version__, citation, changelog) == []
    assert str(Version(babyllama_ds.__version__)) == babyllama_ds.__version__


BEFORE, NEXT = "## Unreleased\n", "## Unreleased\n\n## 1.1 - 2027-02-03\n\n## 1.0 - 2027-01-01\n"
RELEASED = NEXT.removeprefix("## Unreleased\n\n")
DATE = {"date-released": yaml.safe_load("2027-02-03")}


@pytest.mark.parametrize(
    ("citation", "changelog", "told"),
    [
        ({}, BEFORE, None),
        (DATE, BEFORE, "date-released 2027-02-03, not None"),
        (DATE, NEXT, None),
        (DATE, RELEASED, None),
        ({}, RELEASED, "date-released None, not 2027-02-03"),
        ({**DATE, "version": "1.0"}, RELEASED, "CITATION.cff: version 1.0"),
        (DATE, RELEASED.replace("1.1", "1.2"), "1.2 is the newest release"),
        (DATE, RELEASED.replace(" - 2027-02-03", ""), "a heading is neither"),
        (DATE, f"{RELEASED}\n## Unreleased\n", "stands first"),
        ({}, "", "a heading is neither"),
    ],
)
def test_the_check_itself(citation: dict[str, Any], changelog: str, told: str | None) -> None:
    found = disagreements("1.1", {"version": "1.1", **citation}, changelog)
    assert (told or "") in "\n".join(found)
    assert bool(found) == (told is not None)
