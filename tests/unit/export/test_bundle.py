"""A bundle is the whole run and nothing else, works without a store, and is whole or not there."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds import cli, files
from babyllama_ds.errors import RunError
from babyllama_ds.export import bundle
from babyllama_ds.export.bundle import bundle_run
from babyllama_ds.export.finished import open_finished


def make(run_dir: Path, target: Path) -> Path:
    bundle_run(open_finished(run_dir), target)
    return target


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below, behind links too."""
    return {
        Path(folder, name).relative_to(directory).as_posix(): Path(folder, name).read_bytes()
        for folder, _, names in os.walk(directory, followlinks=True)
        for name in names
    }


def expected(run_dir: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(run_dir).items() if name != ".lock"}


def unpacked(tar: Path, folder: Path) -> Path:
    """By GNU tar, not by the library that packed it. Returns the run in it."""
    folder.mkdir()
    subprocess.run(["tar", "--extract", "--file", tar, "--directory", folder], check=True)
    (run,) = folder.iterdir()
    return run


@pytest.fixture(params=["directory", "tar"])
def made(request: pytest.FixtureRequest, run_dir: Path, tmp_path: Path) -> Path:
    """The bundled run, and its store gone."""
    if request.param == "directory":
        run = make(run_dir, tmp_path / "there" / "nursery-1")
    else:
        tar = make(run_dir, tmp_path / "nursery.tar")
        run = unpacked(tar, tmp_path / "there")
    shutil.move(run_dir.parent, tmp_path / "gone")
    return run


def test_it_is_the_run_without_links(made: Path, tmp_path: Path) -> None:
    found = contents(made)
    sums = found.pop("SHA256SUMS").decode()
    assert found == expected(tmp_path / "gone" / "nursery-1")
    assert not any(path.is_symlink() for path in made.rglob("*"))
    assert made.name == "nursery-1"
    names = [line.split("  ")[1] for line in sums.splitlines()]
    assert names == sorted(found)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=made, check=False
    )
    assert done.returncode == 0


def test_the_sums_tell_of_damage(made: Path) -> None:
    (made / "job.yaml").write_text("name: other\n")
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"],
        cwd=made,
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0


def test_it_reports_and_speaks_without_a_store(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(made)
    assert cli.main(["report", str(made)]) == 0
    assert contents(made) == before  # the same report
    capsys.readouterr()
    words = ["the little", "--tokens", "5", "--temperature", "0"]
    assert cli.main(["generate", str(made), *words]) == 0
    assert capsys.readouterr().out.strip().startswith("the little")
    assert cli.main(["generate", str(made / "teachers" / "gpt2"), *words]) == 0


def test_a_bundle_can_be_exported_and_bundled_again(made: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(made), "--to", str(tmp_path / "model")]) == 0
    again = make(made, tmp_path / "again" / "nursery-1")
    assert contents(again) == contents(made)


def test_the_same_run_gives_the_same_tar(run_dir: Path, tmp_path: Path) -> None:
    first = make(run_dir, tmp_path / "1.tar").read_bytes()
    for path in run_dir.rglob("*"):
        if path.is_file():
            os.utime(path, (1e9, 1e9))
            path.chmod(0o600)
    assert make(run_dir, tmp_path / "2.tar").read_bytes() == first
    with tarfile.open(tmp_path / "1.tar") as tar:
        entries = tar.getmembers()
    assert {entry.name.split("/")[0] for entry in entries} == {"nursery-1"}
    assert {(e.uid, e.gid, e.uname, e.gname, e.mode) for e in entries} == {(0, 0, "", "", 0o644)}
    assert len({entry.mtime for entry in entries}) == 1
    names = [entry.name for entry in entries]
    assert names[:-1] == sorted(names[:-1])
    assert names[-1] == "nursery-1/SHA256SUMS"


def test_what_belongs_to_a_process_is_left_out(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / ".lock.json").write_text("{}")
    (run_dir / ".tmp-student-17-abcd").mkdir()
    (run_dir / ".tmp-student-17-abcd" / "half").write_text("x")
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "state.pt").write_bytes(b"\x80\x04.")
    found = set(contents(make(run_dir, tmp_path / "b")))
    assert not {name for name in found if name.startswith((".", "checkpoints"))}


# -- what is refused ------------------------------------------------------------------------------


def refused(run_dir: Path, target: Path) -> tuple[Any, ...]:
    """The problems of a bundle that is refused and leaves nothing behind."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(RunError) as caught:
        make(run_dir, target)
    assert sorted(target.parent.iterdir()) == before
    return caught.value.problems


TARGETS = pytest.mark.parametrize("name", ["b", "b.tar"])


@TARGETS
def test_every_broken_link_is_named(run_dir: Path, tmp_path: Path, name: str) -> None:
    (run_dir.parent / "store").rename(run_dir.parent / "elsewhere")
    problems = refused(run_dir, tmp_path / name)
    assert [problem.where for problem in problems] == [
        str(run_dir / part) for part in ("teachers/gpt2", "teachers/llama", "tokenizer", "tokens")
    ]
    assert problems[0].got == "a link to ../../store/teachers/gpt2, which is not there"


def test_a_missing_teacher(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "teachers" / "llama").unlink()
    (problem,) = refused(run_dir, tmp_path / "b")
    assert (problem.where, problem.got) == (str(run_dir / "teachers" / "llama"), "nothing")


def test_a_control_that_was_not_finished(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "control" / "manifest.json").unlink()
    (problem,) = refused(run_dir, tmp_path / "b")
    assert problem.got == "no manifest.json: unfinished"


def test_a_run_that_is_not_done(run_dir: Path, tmp_path: Path) -> None:
    files.write_json(run_dir / "state.json", {"status": "stopped", "reason": "SIGTERM"})
    (problem,) = refused(run_dir, tmp_path / "b")
    assert problem.got == "a run that is stopped"


@TARGETS
@pytest.mark.parametrize("part", ["tokens/train-00000.bin", "teachers/gpt2/model.safetensors"])
def test_a_damaged_part(run_dir: Path, tmp_path: Path, name: str, part: str) -> None:
    path = run_dir / part
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (problem,) = refused(run_dir, tmp_path / name)
    assert problem.where == str(path)
    assert str(path.parent.resolve()) in problem.hint


def test_milestones_come_along(run_with_milestones: Path, tmp_path: Path) -> None:
    run = run_with_milestones
    assert contents(make(run, tmp_path / "b"))["milestones/student/chck_2K/config.json"]
    path = run / "milestones" / "student" / "chck_2K" / "config.json"
    path.write_text("{}")
    (problem,) = refused(run, tmp_path / "c")
    assert problem.where == str(path)
    assert problem.hint == f"delete the folder {path.parent}, which the run can do without"
    shutil.rmtree(path.parent)
    make(run, tmp_path / "d")


def test_a_file_that_a_manifest_misses(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "student" / "config.json").unlink()
    (problem,) = refused(run_dir, tmp_path / "b")
    assert (problem.where, problem.got) == (
        str(run_dir / "student" / "config.json"),
        "no such file",
    )


@TARGETS
def test_nothing_is_written_over(run_dir: Path, tmp_path: Path, name: str) -> None:
    target = make(run_dir, tmp_path / name)
    (problem,) = refused(run_dir, target)
    assert (problem.where, problem.got) == (str(target), "something that exists")


def test_a_place_inside_the_run(run_dir: Path) -> None:
    (problem,) = refused(run_dir, run_dir / "b.tar")
    assert problem.got == "a place inside the run"


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "b.zip"])
def test_packers_are_refused(run_dir: Path, tmp_path: Path, name: str) -> None:
    (problem,) = refused(run_dir, tmp_path / name)
    assert problem.expected == "a directory, or a file that ends in .tar"


def test_a_link_of_someone_elses(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "notes").symlink_to(tmp_path)
    (problem,) = refused(run_dir, tmp_path / "b")
    assert problem.where == str(run_dir / "notes")
    assert problem.got == f"a link to {tmp_path}"


@TARGETS
def test_a_disk_that_fills(run_dir: Path, tmp_path: Path, name: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a full disk would
    try:
        (problem,) = refused(run_dir, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert problem.got == "File too large while writing it"


@TARGETS
def test_until_it_is_whole_it_has_another_name(
    run_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whatever ends the work leaves nothing."""
    target = tmp_path / name
    seen: list[list[str]] = []

    def at(of: Callable[..., None]) -> Callable[..., None]:
        def write(*file: Any) -> None:
            of(*file)
            seen.append([path.name for path in tmp_path.iterdir() if path.name != "runs"])
            if len(seen) == 9:
                raise KeyboardInterrupt

        return write

    for function in ("_into_tar", "_into_directory"):
        monkeypatch.setattr(bundle, function, at(getattr(bundle, function)))
    with pytest.raises(KeyboardInterrupt):
        make(run_dir, target)
    assert len(seen) == 9
    assert all(len(names) == 1 and names[0].startswith(".tmp-") for names in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@TARGETS
def test_it_outlives_a_power_cut(
    run_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is on the disk before it has its name, and then the name."""
    synced: list[int] = []
    with_its_name: list[int] = []
    sync, rename = os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        with_its_name.append(len(synced))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    target = make(run_dir, tmp_path / name)
    written = [path for path in (target, *target.rglob("*")) if path.is_file()]
    (before,) = with_its_name
    assert {path.stat().st_ino for path in written} <= set(synced[:before])
    assert tmp_path.stat().st_ino in synced[before:]


def test_a_file_that_grows_meanwhile(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is told in no manifest: it is of the run, not of one of its parts."""
    copy = bundle._into_directory

    def grown(place: Path, name: str, *file: Any) -> None:
        if name == "job.yaml":
            with (run_dir / name).open("a") as stream:
                stream.write("# more\n")
        copy(place, name, *file)

    monkeypatch.setattr(bundle, "_into_directory", grown)
    (problem,) = refused(run_dir, tmp_path / "b")
    assert problem.got == "job.yaml changed while it was copied while writing it"
    assert not (tmp_path / "b").exists()


def test_the_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "n.tar"
    assert cli.main(["export", str(run_dir), "--bundle", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    run = unpacked(target, tmp_path / "there")
    assert json.loads((run / "state.json").read_text()) == {"status": "done"}
    assert cli.main(["generate", str(target), "the"]) == 2
    assert "tar --extract" in capsys.readouterr().err
