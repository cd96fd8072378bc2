"""A module imports only from rows above its own, and rooms of one row do not import each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "babyllama_ds"
LAUNCHER = PACKAGE.parent / "launcher" / "run.py"

ROWS = (
    {
        *("errors", "files", "hub", "memory", "locks", "store"),
        *("ranks", "storages", "slurm", "stopping", "heartbeat", "console"),
    },
    {"spec"},
    {"corpus", "losses", "rundir", "environment"},
    {"models", "fingerprints"},
    {"engine", "evaluation"},
    {"teachers"},
    {"training", "report"},
    {"pipeline", "plan", "doctor", "export", "inventory"},
    {"cli"},
)
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE) != Path("__init__.py")
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; of a relative one its dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "." * node.level
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(room: str, source: str) -> Iterator[str]:
    for line, name in imported(source):
        root, _, rest = name.partition(".")
        if root == "":
            yield f"line {line}: a relative import"
        if root == "deepspeed" and room != "engine":
            yield f"line {line}: deepspeed outside engine/"
        if root != "babyllama_ds" or rest == "__version__":
            continue
        other = rest.partition(".")[0]
        if other not in ROW_OF:
            yield f"line {line}: {name} is in no row"
        elif ROW_OF[other] > ROW_OF[room]:
            yield f"line {line}: {name} lies below {room}"
        elif ROW_OF[other] == ROW_OF[room] > 0 and other != room:
            yield f"line {line}: {name} is in {room}'s row"


def test_every_module_has_a_row() -> None:
    assert len(MODULES) > 40
    assert {room_of(path) for path in MODULES} <= ROW_OF.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_up(path: Path) -> None:
    assert list(violations(room_of(path), path.read_text(encoding="utf-8"))) == []


def test_the_launchers_script_knows_the_command_line_alone() -> None:
    names = [name for _, name in imported(LAUNCHER.read_text(encoding="utf-8"))]
    ours = [name for name in names if name.startswith("babyllama_ds")]
    assert ours
    assert all(name.startswith("babyllama_ds.cli.") for name in ours)
    assert len(LAUNCHER.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("losses", "from babyllama_ds.models.parts import x", 1),
        ("losses", "from babyllama_ds import models", 1),
        ("losses", "import babyllama_ds.models.parts", 1),
        ("losses", "def f():\n    from babyllama_ds.corpus.text import x", 1),
        ("losses", "from babyllama_ds.losses.rows import x", 0),
        ("losses", "from ..losses import rows", 1),
        ("losses", "from babyllama_ds import files, ranks", 0),
        ("losses", "from babyllama_ds.nowhere import x", 1),
        ("store", "from babyllama_ds.files import x", 0),
        ("environment", "from babyllama_ds import __version__", 0),
        ("teachers", "import deepspeed.comm", 1),
        ("teachers", "from deepspeed import comm", 1),
        ("engine", "import deepspeed", 0),
    ],
)
def test_the_check_itself(room: str, source: str, found: int) -> None:
    assert len(list(violations(room, source))) == found


def test_the_picture_of_the_house() -> None:
    """Its rows are the rows, and every arrow is an import."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = page.partition("```mermaid\n")[2].partition("```")[0]
    rows = re.findall(r"subgraph row(\d).*?\n(.*?)  end", picture, re.S)
    assert {int(number): set(rooms.split()) for number, rooms in rows} == dict(enumerate(ROWS))
    arrows = set(re.findall(r"(\w+) [=-]{2}> (\w+)", picture))
    imports = {
        (room_of(path), name.split(".")[1])
        for path in MODULES
        for _, name in imported(path.read_text(encoding="utf-8"))
        if name.startswith("babyllama_ds.")
    }
    assert len(arrows) > 10
    assert arrows <= imports


CHECK_A_JOB = """
import sys
import babyllama_ds.cli
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
load_job(find_job("nursery"))
print(*sorted({"torch", "transformers", "deepspeed", "datasets", "numpy"} & set(sys.modules)))
"""


def test_a_job_is_checked_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK_A_JOB], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
