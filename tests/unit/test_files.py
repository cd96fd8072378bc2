"""Files are whole or absent, and a manifest finds every damage."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from babyllama_ds import files
from babyllama_ds.errors import RunError


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- writing and reading ------------------------------------------------------------------------


def test_write_atomic_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    files.write_atomic(path, "first, and longer")
    files.write_atomic(path, "zweite Fassung: ß")
    assert path.read_bytes() == "zweite Fassung: ß".encode()
    assert names_in(path.parent) == ["note.txt"]


def test_reader_of_the_old_content_is_undisturbed(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "x", b"old")
    with (tmp_path / "x").open("rb") as reader:
        files.write_atomic(tmp_path / "x", b"new")
        assert reader.read() == b"old"


def test_write_atomic_honours_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_atomic(tmp_path / "x", b"1")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_content_is_on_the_disk_before_its_name_and_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    files.write_atomic(tmp_path / "a", b"whole")
    assert done == ["content", "name", "folder"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_interrupted_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    files.write_atomic(path, "old")

    def interrupt(descriptor: int) -> None:
        assert path.read_text() == "old"  # the new content is not visible before it is on disk
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["state.json"]


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "choose another directory (for runs: --runs)"),
        (errno.EROFS, "choose another directory (for runs: --runs)"),
        (errno.EIO, "look at the disk"),
    ],
)
def test_refused_write_is_a_run_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError) as caught:
        files.write_atomic(tmp_path / "file", "text")
    (problem,) = caught.value.problems
    assert problem.where == str(tmp_path / "file")
    assert errno.errorcode[number] in problem.got
    assert os.strerror(number) in problem.got
    assert hint in (problem.hint or "")
    assert names_in(tmp_path) == []


def test_write_below_a_file_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match=r"choose another directory \(for runs: --runs\)"):
        files.write_atomic(tmp_path / "file" / "sub" / "x.json", "text")


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("file/model", "a place below {0}/file, a file"),
        ("x" * 300, "File name too long while writing it"),
    ],
)
def test_what_cannot_appear_is_a_run_error(tmp_path: Path, name: str, got: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as caught, files.appearing(tmp_path / name):
        pytest.fail("there is no such place")
    assert caught.value.problems[0].got == got.format(tmp_path)


def test_json_round_trip_keeps_order_and_text(tmp_path: Path) -> None:
    value = {"zeta": [1, 2.5, None], "alpha": {"ü": True}}
    files.write_json(tmp_path / "v.json", value)
    text = (tmp_path / "v.json").read_text(encoding="utf-8")
    assert text == json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    assert list(files.read_json(tmp_path / "v.json")) == ["zeta", "alpha"]


def test_write_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "v.json", {"loss": float("nan")})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("content", [b'{"half": ', b"\xff\xfe\x00", b""])
def test_garbled_json_is_a_run_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(RunError, match=r"v\.json: got text that is not JSON"):
        files.read_json(tmp_path / "v.json")


def test_missing_or_unreadable_json_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"v\.json: got no such file"):
        files.read_json(tmp_path / "v.json")
    with pytest.raises(RunError, match="EISDIR"):
        files.read_json(tmp_path)


def test_sha256_of_a_file_of_several_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9001  # 2.2 MiB, not a multiple of the block
    (tmp_path / "big").write_bytes(content)
    assert files.sha256_file(tmp_path / "big") == hashlib.sha256(content).hexdigest()


def test_hash_json_sees_values_not_key_order() -> None:
    assert files.hash_json({"b": [1, "é"], "a": 2.0}) == files.hash_json({"a": 2.0, "b": (1, "é")})
    assert files.hash_json({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    different = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, {}]
    assert len({files.hash_json(value) for value in different}) == len(different)
    with pytest.raises(ValueError, match="JSON compliant"):
        files.hash_json(float("inf"))


# -- manifests ----------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A directory with a manifest over three files."""
    directory = tmp_path / "made"
    (directory / "sub").mkdir(parents=True)
    (directory / "b.bin").write_bytes(b"\x00\x01")
    (directory / "sub" / "manifest.json").write_text("{}")  # not the directory's own
    (directory / ".hidden").write_text("")
    files.write_manifest(directory, fingerprint="f00d", words=12, parts=["x"])
    return directory


def test_manifest_names_every_file_but_itself(made: Path) -> None:
    manifest = files.read_manifest(made)
    assert manifest is not None
    assert manifest.fingerprint == "f00d"
    assert manifest.facts == {"words": 12, "parts": ["x"]}
    assert list(manifest.files) == [".hidden", "b.bin", "sub/manifest.json"]
    assert manifest.files["b.bin"] == files.FileFacts(
        sha256=hashlib.sha256(b"\x00\x01").hexdigest(), bytes=2
    )
    assert files.verify_manifest(made) == manifest


def test_manifest_written_again_covers_the_new_state(made: Path) -> None:
    (made / "b.bin").write_bytes(b"changed")
    (made / "c").write_text("new")
    files.write_manifest(made, fingerprint="beef")
    manifest = files.verify_manifest(made)
    assert manifest.fingerprint == "beef"
    assert set(manifest.files) == {".hidden", "b.bin", "c", "sub/manifest.json"}


def test_files_that_are_known_are_not_read_again(made: Path) -> None:
    known = {"b.bin": files.FileFacts(sha256="as it was told", bytes=2)}
    files.write_manifest(made, fingerprint="beef", known=known)
    manifest = files.read_manifest(made)
    assert manifest is not None
    assert manifest.files["b.bin"] == known["b.bin"]
    assert manifest.files[".hidden"].sha256 == hashlib.sha256(b"").hexdigest()


def test_extra_files_are_allowed(made: Path) -> None:
    (made / "extra").write_text("a log")
    files.verify_manifest(made)


def test_changed_byte_is_found(made: Path) -> None:
    (made / "b.bin").write_bytes(b"\x00\x02")
    with pytest.raises(RunError) as caught:
        files.verify_manifest(made)
    (problem,) = caught.value.problems
    assert problem.where == str(made / "b.bin")
    assert problem.got == "SHA-256 " + hashlib.sha256(b"\x00\x02").hexdigest()
    assert problem.expected == hashlib.sha256(b"\x00\x01").hexdigest()
    assert f"delete the folder {made}" in (problem.hint or "")


def test_cut_and_missing_files_are_found_first_by_name(made: Path) -> None:
    (made / "sub" / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"sub/manifest\.json: got no such file, expected 2 bytes"):
        files.verify_manifest(made)
    (made / "b.bin").write_bytes(b"\x00")
    with pytest.raises(RunError, match=r"b\.bin: got 1 bytes, expected 2 bytes"):
        files.verify_manifest(made)


def test_no_manifest(tmp_path: Path) -> None:
    assert files.read_manifest(tmp_path) is None
    assert files.read_manifest(tmp_path / "nowhere") is None
    with pytest.raises(RunError, match="got no such file"):
        files.verify_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "{}",
        '{"fingerprint": 3, "files": {}}',
        '{"fingerprint": "f", "files": {"a": 1}}',
        '{"fingerprint": "f", "files": {"a": {"sha256": "0"}}}',
        '{"fingerprint": "f", "files": []}',
    ],
)
def test_manifest_of_another_shape_is_a_run_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunError, match="JSON of another shape"):
        files.read_manifest(tmp_path)


# -- temporary names ----------------------------------------------------------------------------


def test_only_temporaries_are_removed(tmp_path: Path) -> None:
    files.temporary_beside(tmp_path / "mine").write_text("half")
    files.temporary_beside(tmp_path / "other").mkdir()
    (tmp_path / "keep.tmp-").write_text("")
    files.remove_temporaries(tmp_path, "mine")
    assert len(names_in(tmp_path)) == 2
    files.remove_temporaries(tmp_path)
    assert names_in(tmp_path) == ["keep.tmp-"]
