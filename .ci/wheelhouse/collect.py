"""Collects the wheels for a machine without internet.

Enters: our own wheel, the pins of constraints.txt, what Python and platform the machine has, and
which packages. Leaves: a folder with the wheels that it lacks, `requirements.txt` with their
hashes, and `install.sh`.

pip downloads; what it is asked for is decided here. It reads markers (`python_version < "3.14"`)
for the Python that it runs on, not for the one that it downloads for.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from babyllama_ds.cli import exit_code_of
from babyllama_ds.errors import UserError
from babyllama_ds.files import sha256_file
from babyllama_ds.spec.explain import did_you_mean

FROM_SOURCE = ("deepspeed",)
"""Published as source alone. Built here, where it has to become a wheel for any machine."""

BESIDE_TORCH = "setuptools"
"""What a torch of the machine needs, and may not find: a new environment of Python 3.11 has an old
one of its own, which hides the machine's. So it is always in a house for that. Later ones bring
none, and the machine's own is the one that its torch asks for (torch 2.11: older than 82)."""
HIDES_IT = "3.11"

LEAST_GLIBC = 5
LEGACY_TAGS = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
HEADER = "# Wheels of babyllama_ds"


def main() -> None:
    """Collect, write the house, and say what is in it. Raises `UserError`."""
    options = command_line().parse_args()
    target = Target.of(options.python, options.platform, SpecifierSet(about(options.own).requires))
    machine = machine_of(options.torch, options.have, options.system, python=options.python)
    pins = read_pins(options.constraints)
    if options.torch != "system":
        pins["torch"] = options.torch
    with tempfile.TemporaryDirectory() as scratch:
        index = Index(target, pins, options.constraints.resolve(), Path(scratch))
        closure = follow(options.own, words_of(options.extras), target, machine, index)
        check_words(options.have, closure)
        write_house(options.out, target, closure)
    print(summary(options.out, closure))


def command_line() -> argparse.ArgumentParser:
    """What `make wheelhouse` passes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("own", type=Path, help="the wheel of babyllama_ds")
    parser.add_argument("--out", type=Path, default=Path("wheelhouse"))
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64")
    parser.add_argument("--torch", default="system", help="`system`, the machine's, or a version")
    parser.add_argument("--extras", default="", help="extras of babyllama_ds: a,b")
    parser.add_argument("--have", default="", help="packages that the machine has: a,b==1.0")
    parser.add_argument("--system", type=Path, help="what `pip freeze` printed on the machine")
    return parser


def words_of(text: str) -> list[str]:
    """`a,b` or `a b`."""
    return [word for word in re.split(r"[,\s]+", text) if word]


# -- the target ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """A CPython on Linux, `python` as 3.12, with glibc 2.`glibc` at least."""

    python: str
    glibc: int
    machine: str

    @classmethod
    def of(cls, python: str, platform: str, requires: SpecifierSet) -> Target:
        """From PYTHON and PLATFORM as they were typed. Raises `UserError`."""
        if not re.fullmatch(r"3\.\d+", python) or f"{python}.0" not in requires:
            raise UserError.of(
                "PYTHON", got=f"{python!r}", expected=f"a version {requires}, written like 3.12"
            )
        known = re.fullmatch(r"manylinux_2_(\d+)_([a-z]\w*)", platform)
        old = re.fullmatch(r"manylinux2014_([a-z]\w*)", platform)
        if known is None and old is None:
            raise UserError.of(
                "PLATFORM",
                got=f"{platform!r}",
                expected="a Linux by its glibc, like manylinux_2_28_x86_64",
                hint="`ldd --version` and `uname -m` on the machine tell both parts",
            )
        glibc, machine = (int(known[1]), known[2]) if known else (17, old[1] if old else "")
        return cls(python=python, glibc=glibc, machine=machine)

    def __str__(self) -> str:
        return f"Python {self.python} on {self.platforms[0]}"

    @property
    def platforms(self) -> list[str]:
        """Tags of every wheel that runs there, the newest first."""
        found = []
        for minor in range(self.glibc, LEAST_GLIBC - 1, -1):
            found.append(f"manylinux_2_{minor}_{self.machine}")
            if minor in LEGACY_TAGS:
                found.append(f"{LEGACY_TAGS[minor]}_{self.machine}")
        return found

    @property
    def pip_options(self) -> list[str]:
        """For `pip download`."""
        tag = "cp" + self.python.replace(".", "")
        options = ["--implementation", "cp", "--python-version", self.python, "--abi", tag]
        return options + [word for name in self.platforms for word in ("--platform", name)]

    @property
    def environment(self) -> dict[str, str]:
        """What markers are read in: the target's, whatever runs here."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


# -- the machine -----------------------------------------------------------------------------------

Machine = Mapping[str, Version | None]
"""What it has, by canonical name; a version that is not known is taken to do."""


def machine_of(torch: str, have: str, system: Path | None, *, python: str) -> Machine:
    """From TORCH, HAVE, SYSTEM and PYTHON. Raises `UserError`."""
    there: dict[str, Version | None] = {} if system is None else read_freeze(system)
    if python == HIDES_IT:
        there.pop(BESIDE_TORCH, None)
    for word in words_of(have):
        found = installed(word if "=" in word else f"{word} @ there")
        if found is None:
            raise UserError.of("HAVE", got=repr(word), expected="names, or name==version")
        there.update([found])
    if torch != "system":
        try:
            Version(torch)
        except InvalidVersion:
            raise UserError.of(
                "TORCH", got=repr(torch), expected="`system`, or a version like 2.13.0"
            ) from None
        there.pop("torch", None)  # asked for by name
    elif system is not None and "torch" not in there:
        raise UserError.of(
            "TORCH",
            got=f"`system`, and no torch in {system}",
            expected="a machine with a torch of its own",
            hint="TORCH=2.13.0, say, puts one into the house",
        )
    else:
        there.setdefault("torch", None)
    return there


def read_freeze(path: Path) -> dict[str, Version | None]:
    """What `pip freeze` printed. Raises `UserError` where it did not print this."""
    hint = "on the machine: python3 -m pip freeze --all > freeze.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError.of(
            path, got=str(error), expected="what `pip freeze` printed", hint=hint
        ) from None
    there: dict[str, Version | None] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith(("#", "-e ")):
            continue
        found = installed(line)
        if found is None:
            raise UserError.of(
                f"{path}:{number}",
                got=repr(line[:60]),
                expected="a line of `pip freeze`: name==version",
                hint=hint,
            )
        there.update([found])
    if not there:
        raise UserError.of(path, got="no packages", expected="what `pip freeze` printed", hint=hint)
    return there


def installed(line: str) -> tuple[str, Version | None] | None:
    """Name and version from `name==1.0` or `name @ URL`; none if the line is neither."""
    try:
        one = Requirement(line)
    except InvalidRequirement:
        return None
    name = canonicalize_name(one.name)
    if one.url is not None:  # as built on the spot; a wheel's name tells the version
        try:
            return name, parse_wheel_filename(one.url.rpartition("/")[2])[1]
        except (InvalidWheelFilename, InvalidVersion):
            return name, None
    exact = [part.version for part in one.specifier if part.operator in ("==", "===")]
    try:
        return (name, Version(exact[0])) if len(exact) == len(one.specifier) == 1 else None
    except InvalidVersion:
        return None


# -- wheels ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class About:
    """What a wheel says of itself."""

    name: str
    version: Version
    requires: str
    """Requires-Python."""
    requirements: tuple[Requirement, ...]
    extras: frozenset[str]


def about(wheel: Path) -> About:
    """Read a wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        # At the top: setuptools brings packages within it, with theirs.
        (name,) = (
            one for one in archive.namelist() if re.match(r"[^/]+\.dist-info/METADATA$", one)
        )
        told = HeaderParser().parsestr(archive.read(name).decode())
    return About(
        name=canonicalize_name(told["Name"]),
        version=Version(told["Version"]),
        requires=told["Requires-Python"] or "",
        requirements=tuple(map(Requirement, told.get_all("Requires-Dist", []))),
        extras=frozenset(map(canonicalize_name, told.get_all("Provides-Extra", []))),
    )


def read_pins(path: Path) -> dict[str, str]:
    """Versions by canonical name."""
    lines = (line.partition("==") for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(name): version for name, equals, version in lines if equals}


@dataclass(frozen=True)
class Index:
    """Where wheels come from: pip, with our pins, for the target."""

    target: Target
    pins: Mapping[str, str]
    constraints: Path
    folder: Path

    def fetch(self, wanted: Mapping[str, SpecifierSet]) -> dict[str, Path]:
        """Wheels by name. Raises `UserError` for what has none for the target."""
        if not wanted:
            return {}
        before = set(self.folder.glob("*.whl"))
        words = {name: self._pinned(name, bounds) for name, bounds in wanted.items()}
        built = {name: word for name, word in words.items() if name in FROM_SOURCE}
        ready = [word for name, word in words.items() if name not in FROM_SOURCE]
        if ready:
            only = ["--only-binary=:all:", *self.target.pip_options, "--dest", str(self.folder)]
            self._pip(["download", "--no-deps", *only, *ready])
        for name, word in built.items():
            # Anew: a cached wheel may hold kernels, built for the torch of this machine.
            anew = ["--no-cache-dir", f"--no-binary={name}", "--wheel-dir", str(self.folder)]
            self._pip(["wheel", "--no-deps", *anew, word], PIP_CONSTRAINT=str(self.constraints))
        found = {about(path).name: path for path in set(self.folder.glob("*.whl")) - before}
        for name in set(FROM_SOURCE) & found.keys():
            if not found[name].name.endswith("-none-any.whl"):
                raise UserError.of(
                    name,
                    got=f"{found[name].name}, built here",
                    expected="a wheel for any machine",
                )
        return found

    def _pinned(self, name: str, bounds: SpecifierSet) -> str:
        return f"{name}=={self.pins[name]}" if name in self.pins else f"{name}{bounds}"

    def _pip(self, words: Sequence[str], **environment: str) -> None:
        # Nothing of DS_*: kernels are compiled on the machine that they run on.
        kept = {key: value for key, value in os.environ.items() if not key.startswith("DS_")}
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
            env={**kept, "DS_BUILD_OPS": "0", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return
        missing = re.search(r"No matching distribution found for (\S+)", done.stderr)
        broken = re.search(r"connection broken by .*", done.stderr)
        if missing is None or broken is not None:
            got = broken[0] if broken else done.stderr.strip()
            expected = "a package index that answers" if broken else "success"
            raise UserError.of(f"pip {words[0]}", got=got, expected=expected)
        raise UserError.of(
            missing[1],
            got=f"no wheel for {self.target}",
            expected="one on the package index",
            hint="another PYTHON or PLATFORM may have one; what the machine has already can be "
            "left out by HAVE or SYSTEM",
        )


# -- what is needed --------------------------------------------------------------------------------


@dataclass
class Closure:
    """All that our wheel needs, directly or not."""

    house: dict[str, Path] = field(default_factory=dict)
    """Wheels by name: ours, and what the machine lacks."""
    asked: list[tuple[Requirement, str]] = field(default_factory=list)
    """Every requirement that holds for the target, and who has it."""

    def bounds(self, name: str) -> SpecifierSet:
        """What all together ask of a package's version."""
        both = SpecifierSet()
        for one, _ in self.asked:
            if canonicalize_name(one.name) == name:
                both &= one.specifier
        return both

    @property
    def of_the_machine(self) -> list[str]:
        """Requirements that the house leaves to the machine."""
        names = {canonicalize_name(one.name) for one, _ in self.asked} - self.house.keys()
        return [f"{name}{self.bounds(name)}" for name in sorted(names)]


def follow(
    own: Path, extras: Iterable[str], target: Target, machine: Machine, index: Index
) -> Closure:
    """From our wheel through what each wheel requires. Raises `UserError`.

    What the machine has is not followed: a package that is installed has its own requirements
    beside it, as torch has `sympy`. Those that something else needs too are in the house, unless
    the machine is known to have them.
    """
    ours = about(own)
    for extra in extras:
        if canonicalize_name(extra) not in ours.extras:
            hint = did_you_mean(extra, sorted(ours.extras))
            raise UserError.of(
                "EXTRAS", got=repr(extra), expected="extras of babyllama_ds", hint=hint
            )
    closure = Closure(house={ours.name: own})
    told = {ours.name: own}
    pending = [Requirement(f"{ours.name}[{','.join(extras)}]")]
    followed: set[str] = set()
    beside = [(Requirement(BESIDE_TORCH), "torch")] if "torch" in machine else []
    while pending:
        new: list[tuple[Requirement, str]] = [
            (one, name)
            for name, extras in ((canonicalize_name(one.name), one.extras) for one in pending)
            for one in requirements_of(told[name], extras, target, whole=name in closure.house)
        ]
        if not closure.asked:
            new += beside
        closure.asked += new
        # Of a package that the machine has only its extras may be lacking: its wheel is read for
        # them (`fsspec[http]`), and left out.
        wanted, read = set(), set()
        for one, _ in new:
            name = canonicalize_name(one.name)
            if not has(machine, one):
                check_torch(one, machine)
                wanted.add(name)
            elif one.extras:
                read.add(name)
        told |= index.fetch({name: closure.bounds(name) for name in (wanted | read) - told.keys()})
        closure.house |= {name: told[name] for name in wanted}
        followed |= {str(one) for one in pending}
        pending = [
            one
            for one, _ in new
            if canonicalize_name(one.name) in told and str(one) not in followed
        ]
    check_agreement(closure)
    return closure


def requirements_of(
    wheel: Path, extras: Iterable[str], target: Target, *, whole: bool
) -> Iterator[Requirement]:
    """Those that hold for the target; without `whole`, those of the extras alone."""
    environment = target.environment
    for one in about(wheel).requirements:
        plain = one.marker is None or one.marker.evaluate({**environment, "extra": ""})
        extra = one.marker is not None and any(
            one.marker.evaluate({**environment, "extra": name}) for name in extras
        )
        if (whole and plain) or (extra and not plain):
            yield one


def has(machine: Machine, one: Requirement) -> bool:
    """Whether the machine meets a requirement."""
    name = canonicalize_name(one.name)
    version = machine.get(name)
    return name in machine and (
        version is None or one.specifier.contains(version, prereleases=True)
    )


def check_torch(one: Requirement, machine: Machine) -> None:
    """That a torch left to the machine is one that does there. Raises `UserError`."""
    if canonicalize_name(one.name) == "torch" and "torch" in machine:
        raise UserError.of(
            "TORCH=system",
            got=f"torch {machine['torch']} on the machine",
            expected=str(one),
            hint="TORCH=2.13.0, say, puts one into the house",
        )


def check_agreement(closure: Closure) -> None:
    """That every wheel is one that all who need it can do with. Raises `UserError`."""
    for one, whose in closure.asked:
        wheel = closure.house.get(canonicalize_name(one.name))
        if wheel is not None and not one.specifier.contains(about(wheel).version, prereleases=True):
            raise UserError.of(
                f"{whose} needs {one.name}",
                got=f"{about(wheel).version}",
                expected=str(one.specifier),
                hint="constraints.txt pins what our tests run with; `make lock` writes it anew",
            )


def check_words(have: str, closure: Closure) -> None:
    """That everything in HAVE is needed: a misspelt name leaves nothing out. Raises `UserError`."""
    names = {canonicalize_name(one.name) for one, _ in closure.asked}
    for word in words_of(have):
        name = canonicalize_name(re.split("[=<>]", word)[0])
        if name not in names:
            raise UserError.of(
                "HAVE",
                got=repr(word),
                expected="packages that would be in the house",
                hint=did_you_mean(name, names),
            )


# -- the house -------------------------------------------------------------------------------------


def write_house(out: Path, target: Target, closure: Closure) -> None:
    """Wheels, requirements with hashes, and the script, in place of an older house."""
    old = out / "requirements.txt"
    if out.exists() and any(out.iterdir()):
        if not old.is_file() or not old.read_text(encoding="utf-8").startswith(HEADER):
            raise UserError.of(out, got="a folder of something else", expected="none, or a house")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"{HEADER} for {target}.", f"# python: {target.python}"]
    lines += [f"# The machine has to have {one}" for one in closure.of_the_machine]
    for name, wheel in sorted(closure.house.items()):
        shutil.copy(wheel, out)
        digest = sha256_file(out / wheel.name)
        lines.append(f"{name}=={about(wheel).version} --hash=sha256:{digest}")
    shutil.copy(Path(__file__).with_name("install.sh"), out)
    (out / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def summary(out: Path, closure: Closure) -> str:
    """What is in the house, the largest first, and what is not."""
    wheels = sorted(out.glob("*.whl"), key=lambda path: -path.stat().st_size)
    sizes = [path.stat().st_size for path in wheels]
    lines = [
        f"{size / 1e6:8.1f} MB  {path.name}"
        for path, size in zip(wheels[:8], sizes[:8], strict=True)
    ]
    lines.append(f"{sum(sizes) / 1e6:8.1f} MB  in {len(wheels)} wheels in {out}")
    if closure.of_the_machine:
        lines.append(f"the machine has to have {', '.join(closure.of_the_machine)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
