"""`babyllama-ds store` on stores made by hand: what it tells, what it removes, what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from babyllama_ds import cli
from babyllama_ds.errors import RunError
from babyllama_ds.evaluation import stored
from babyllama_ds.evaluation.evaluate import DevWindows
from babyllama_ds.inventory import removing
from babyllama_ds.inventory.entries import KINDS, find_items
from babyllama_ds.inventory.uses import read_uses
from babyllama_ds.pipeline.measuring import Measurer
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.stopping import StopRequest
from babyllama_ds.store import Store, link_entry
from babyllama_ds.teachers.cache import opening

HOLD = """
import sys
from pathlib import Path
from babyllama_ds.store import Store

with Store(Path(sys.argv[1])).lock(sys.argv[2], sys.argv[3]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def key_of(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def store(runs: Path) -> Store:
    (runs / "store").mkdir(parents=True)
    return Store(runs / "store")


def put(store: Store, kind: str, word: str, *, num_bytes: int = 10, **facts: object) -> Path:
    with store.lock(kind, key_of(word)):
        directory = store.new_directory(kind, key_of(word))
        (directory / "content").write_bytes(b"x" * num_bytes)
        return store.publish(kind, key_of(word), directory, facts)


def begin(store: Store, kind: str, word: str) -> Path:
    """Unfinished work, with a file of an odd size in it."""
    with store.lock(kind, key_of(word)):
        place = store.building_place(kind, key_of(word))
    (place / "part").write_bytes(b"x" * 77)
    return place


def put_run(
    runs: Path, name: str, *, status: str | None = "done", job: Any = None, **claims: str
) -> Path:
    """A run directory; `claims` are stages (`teachers_NAME`: a teacher) and keys."""
    run_dir = runs / name
    run_dir.mkdir(parents=True)
    (run_dir / "job.yaml").write_text(yaml.safe_dump(job or {"name": name}))
    if status is not None:
        (run_dir / "state.json").write_text(json.dumps({"status": status}))
    if claims:
        stages = {stage.replace("_", "/"): key for stage, key in claims.items()}
        (run_dir / "stages.json").write_text(json.dumps(stages))
    return run_dir


def everything_below(folder: Path) -> dict[str, bytes]:
    """All files but locks, which stay."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


@pytest.fixture
def ask(runs: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def typed(*words: str) -> tuple[int, str, str]:
        code = cli.main(["store", "--runs", str(runs), *words])
        return (code, *capsys.readouterr())

    return typed


def rows_of(out: str) -> dict[tuple[str, str], str]:
    """The table's rows by kind and key."""
    lines = [line.split(maxsplit=2) for line in out.splitlines() if line.startswith("  ")]
    return {(kind, key): rest for kind, key, rest in lines[1:]}


# -- what it tells ---------------------------------------------------------------------------------


def test_what_lies_there_is_told(store: Store, runs: Path, ask: Callable[..., Any]) -> None:
    used = put(store, "teachers", "a", num_bytes=3 * 2**20, stage="teachers/gpt2")
    put(store, "teachers", "b", stage="teachers/llama")
    link_entry(used, put_run(runs, "one") / "teachers" / "gpt2")
    put_run(runs, "two", teachers_gpt2=key_of("a"), student=key_of("b"))  # not of the store
    steps = begin(store, "teachers", "c")
    for step in (80, 120):
        (steps / f"step-{step:08d}").mkdir()
    cache = begin(store, "teacher_cache", "d")
    (cache / "shard-00003.bin").write_bytes(b"x")
    layout = {"num_windows": 29, "record_bytes": 8, "forward_windows": 2, "shard_windows": 4}
    (cache / "layout.json").write_text(json.dumps(layout))
    (put(store, "tokens", "e") / "manifest.json").write_text("{")
    (store.root / "tokens" / "notes").mkdir()  # not ours, nor what is in another folder
    (store.root / "backup" / key_of("f")).mkdir(parents=True)
    before = everything_below(runs)

    code, out, err = ask()
    assert (code, err) == (0, "")
    assert everything_below(runs) == before, "it only looks"
    rows = rows_of(out)
    assert list(rows) == [
        (kind, key_of(word)[:12])
        for kind, word in (
            ("tokens", "e"),
            ("teachers", "a"),  # the larger ones first
            ("teachers", "b"),
            ("teachers", "c"),
            ("teacher_cache", "d"),
        )
    ]
    tokens, a, b, c, d = (rest.split() for rest in rows.values())
    assert a[:2] == ["3.0", "MiB"]
    assert a[4:] == ["whole", "teachers/gpt2", "one,", "two"]
    assert b[4:] == ["whole", "teachers/llama", "unused"]
    assert c[4:] == ["unfinished,", "step", "120", "unused"]
    assert d[4:] == ["unfinished,", "1", "of", "8", "shards", "unused"]
    assert tokens[4:] == ["damaged", "unused"]
    assert "all: 5 items, 3.0 MiB\n" in out
    entries = (path for path in store.root.rglob("*") if path.is_file())
    of_unused = [
        path for path in entries if used not in path.parents and "backup" not in path.parts
    ]
    size = f"{sum(path.stat().st_size for path in of_unused) / 1024:.1f} KiB"
    assert f"unused: 4 items, {size}; to remove it: babyllama-ds store --runs {runs}" in out
    header, *table = [line for line in out.splitlines() if line.startswith("  ")]
    starts = {line.index(word) for line, word in zip(table, ("damaged", "whole"), strict=False)}
    assert starts == {header.index("state")}


def test_every_kind_is_in_the_list() -> None:
    """Those that the package asks a store for."""
    package = Path(removing.__file__).parents[1]
    code = "".join(path.read_text() for path in package.rglob("*.py"))
    asked = set(re.findall(r'store\.(?:build|lock|find\w*)\(\s*"(\w+)"', code))
    assert {"tokens", "teachers"} <= asked
    assert asked | {stored.KIND, stored.CLASSIFIERS, opening.KIND} == set(KINDS)


def test_an_entry_that_is_held_names_its_holder(
    store: Store, ask: Callable[..., Any], start_python: Callable[..., Any]
) -> None:
    begin(store, "teachers", "a")
    entry = put(store, "teachers", "b")
    holder = start_python(HOLD, store.root, "teachers", key_of("a"))
    assert holder.line() == "held"
    _, out, _ = ask()
    assert f"unfinished, in use by pid {holder.pid} on host" in out

    code, _, err = ask("--remove", key_of("a")[:10])
    assert code == 2
    assert f"{store.building_place('teachers', key_of('a'))}: got in use by pid {holder.pid}" in err
    assert "expected one that no process holds" in err
    assert "wait for it, or stop it" in err
    assert ask("--remove-unused")[0] == 0
    assert not entry.exists()
    assert (store.root / "teachers" / f".building-{key_of('a')}" / "part").exists()

    holder.kill()  # as if the power went: what it wrote of itself stays
    holder.wait(timeout=30)
    assert (store.root / "teachers" / f".{key_of('a')}.lock.json").exists()
    assert ask("--remove", key_of("a")[:10])[0] == 0
    assert everything_below(store.root) == {}


def test_a_folder_without_a_store_is_told(tmp_path: Path, runs: Path, ask: Any) -> None:
    code, _, err = ask()
    assert code == 2
    assert f"error: {runs / 'store'}: got no such folder, expected the store of a runs" in err
    assert "--runs" in err


def test_an_empty_store(store: Store, ask: Callable[..., Any]) -> None:
    assert ask()[1].endswith("\nall: nothing\n")
    assert ask("--remove-unused")[1] == "freed: nothing\n"


# -- who uses what ---------------------------------------------------------------------------------


def unused(runs: Path) -> list[str]:
    items, uses = find_items(Store(runs / "store")), read_uses(runs)
    return [item.kind for item in items if uses.unused(item)]


def test_a_claim_keeps_what_is_unfinished_until_the_entry_stands(store: Store, runs: Path) -> None:
    begin(store, "teachers", "a")
    put_run(runs, "stopped", status="stopped", tokens=key_of("t"), teachers_one=key_of("a"))
    assert unused(runs) == []
    put(store, "teachers", "a")
    assert [item.state for item in find_items(store)] == ["whole", "unfinished"]
    assert unused(runs) == ["teachers"], "nobody goes on with what is beside a teacher"


def test_a_bundle_among_the_runs_has_files_of_its_own(store: Store, runs: Path) -> None:
    put(store, "tokenizers", "a")
    run_dir = put_run(runs, "bundle", tokenizer=key_of("a"), tokens=key_of("b"))
    assert unused(runs) == []
    (run_dir / "tokenizer").mkdir()
    assert unused(runs) == ["tokenizers"]


def test_a_runs_own_measurement_keeps_that_of_the_store(store: Store, runs: Path) -> None:
    measured = {"fingerprint": "f", "device": "cuda", "attention": "sdpa"}
    for parts in (2, 1):
        key = stored.store_key("f", device="cuda", attention="sdpa", tensor_parallel=parts)
        store.build("evaluations", key, lambda path: (path / "x").touch())
    job = {"name": "x", "teachers": [{"name": "gpt2", "tensor_parallel": 2}]}
    run_dir = put_run(runs, "one", job=job)
    assert len(unused(runs)) == 2
    for name, left in (("gpt2", 1), ("milestones/student/chck_1M", 0)):
        path = run_dir / "evaluation" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured))
        assert len(unused(runs)) == left


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_run_uses_what_it_measured_with_any_kernel(
    kernel: str, store: Store, runs: Path, tiny_model: Callable[..., Any]
) -> None:
    """Plain attention has another name where it was made faster (`models.fused`)."""
    dev = DevWindows(windows_of=lambda ids: tokens[list(ids)], num_windows=4, batch_windows=2)
    tokens = np.random.default_rng(1).integers(0, 61, (4, 9))
    parts: Any = SimpleNamespace(
        job=load_job(find_job("nursery"), ["evaluation.samples=0"]),
        device=torch.device("cpu"),
        device_kind="cpu",
        attention=lambda *_, **__: kernel,
        dev_windows=lambda *_: dev,
        benchmarks=lambda _: {},
        suites=lambda **_: {},
    )
    run_dir = put_run(runs, "one")
    tiny_model("llama").save_pretrained(run_dir / "student")
    corpus: Any = SimpleNamespace(tokenizer=range(61))
    measured = Measurer(parts, store, StopRequest()).measure(
        "student", run_dir / "student", corpus, "f"
    )
    assert unused(runs) == ["evaluations"]
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "student.json").write_text(
        json.dumps(measured | {"fingerprint": "f"})
    )
    assert unused(runs) == []


CACHE = {"distillation": {"cache": "hidden"}}
SUITES = {"evaluation": {"fine_tuning": [{"name": "glue"}]}}
TOKENS = {"tokens": key_of("t")}


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
@pytest.mark.parametrize(
    ("job", "claims", "kept"),
    [
        ({}, TOKENS, set()),
        ({}, {}, {"text", "tokenizers", "tokens"}),
        ({"corpus": {"kind": "nursery"}}, TOKENS, {"text"}),
        ({"corpus": {"kind": "files"}, "distillation": {"cache": "none"}}, TOKENS, set()),
        (CACHE, TOKENS, {"teacher_cache"}),
        (SUITES, TOKENS, {"classifiers"}),
    ],
)
def test_a_run_that_is_not_done_may_come_for(
    store: Store, runs: Path, status: str, job: Any, claims: Any, kept: set[str], ask: Any
) -> None:
    for kind in KINDS:
        put(store, kind, kind)
    begin(store, "teacher_cache", "begun")
    run_dir = put_run(runs, "x", status=status, job={"name": "x"} | job, **claims)
    assert set(KINDS) - set(unused(runs)) == kept
    assert out_of(ask).count("x?") == len(kept) + ("teacher_cache" in kept)
    if "teacher_cache" in kept:
        (run_dir / "student").mkdir()
        (run_dir / "student" / "manifest.json").touch()
        assert "teacher_cache" in unused(runs), "the student has learnt from it"
    for none in ("done", None):  # none: a copy of results, say
        shutil.rmtree(run_dir)
        put_run(runs, "x", status=none, job={"name": "x"} | job, **claims)
        assert set(unused(runs)) == set(KINDS)


def out_of(ask: Callable[..., tuple[int, str, str]]) -> str:
    return ask()[1]


def test_a_trial_may_come_for_what_is_prepared(store: Store, runs: Path, tmp_path: Path) -> None:
    """Of this folder, or of the one where the store lies."""
    from babyllama_ds.locks import scratch_folder

    for kind in ("text", "tokenizers", "tokens", "teachers"):
        put(store, kind, kind)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "store").symlink_to(store.root)
    with scratch_folder(runs, ".trial-"):
        assert unused(runs) == unused(tmp_path / "more") == ["teachers"]
    with scratch_folder(tmp_path / "more", ".trial-"):
        assert unused(tmp_path / "more") == ["teachers"]
    assert len(unused(runs)) == len(unused(tmp_path / "more")) == 4


def test_a_store_that_several_runs_folders_link_to(
    tmp_path: Path, runs: Path, store: Store
) -> None:
    """Seen from the one that links: its own runs, and those where the store lies."""
    for word, folder in (("a", runs), ("b", tmp_path / "more")):
        link_entry(put(store, "tokens", word), put_run(folder, "run") / "tokens")
    put(store, "tokens", "c")
    (tmp_path / "more" / "store").symlink_to(store.root)
    assert len(unused(tmp_path / "more")) == 1
    assert len(unused(runs)) == 2, "nothing tells that others link here: docs/storage.md says so"
    # A store alone on another disk.
    (tmp_path / "disk").mkdir()
    store.root.rename(tmp_path / "disk" / "store")
    store.root.symlink_to(tmp_path / "disk" / "store")
    (runs / "run" / "tokens").unlink()
    link_entry(store.root / "tokens" / key_of("a"), runs / "run" / "tokens")
    assert len(unused(runs)) == 2


@pytest.mark.parametrize("name", ["job.yaml", "stages.json", "state.json", "evaluation/x.json"])
def test_what_cannot_be_read_of_a_run_ends_it(
    store: Store, runs: Path, ask: Callable[..., Any], name: str
) -> None:
    entry = put(store, "tokens", "a")
    run_dir = put_run(runs, "one", tokens=key_of("a"))
    (run_dir / "evaluation").mkdir()
    (run_dir / name).write_text("{ garbled")
    code, _, err = ask("--remove-unused")
    assert code == 2
    assert str(run_dir / name) in err
    assert entry.exists()


@pytest.mark.parametrize("name", ["job.yaml", "stages.json", "state.json"])
def test_a_runs_file_of_another_shape_ends_it(
    store: Store, runs: Path, ask: Callable[..., Any], name: str
) -> None:
    entry = put(store, "tokens", "a")
    run_dir = put_run(runs, "one", tokens=key_of("a"))
    (run_dir / name).write_text("teachers: 3" if name == "job.yaml" else "[3]")
    code, _, err = ask("--remove-unused")
    assert code == 2
    assert f"error: {run_dir}: got a job.yaml, stages.json or state.json of another shape" in err
    assert entry.exists()


def test_another_list_beside_the_measurements_is_no_measurement(
    store: Store, runs: Path, ask: Callable[..., Any]
) -> None:
    entry = put(store, "tokens", "a")
    run_dir = put_run(runs, "one", tokens=key_of("a"))
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "predictions.json").write_text("[3]")
    assert ask("--remove-unused")[0] == 0
    assert entry.exists()


def test_a_run_that_may_not_be_read_ends_it(
    store: Store, runs: Path, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, who reads everything."""
    put(store, "tokens", "a")
    secret = put_run(runs, "of-another-user") / "job.yaml"
    (runs / "lost+found").mkdir()  # no name of a run
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.parent.name in ("of-another-user", "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    code, _, err = ask("--remove-unused")
    assert code == 2
    assert f"error: {secret}: got Permission denied, expected runs that can be read" in err
    assert "do this as a user who can read them" in err
    secret.parent.rename(runs / "of+another")
    assert ask("--remove-unused")[0] == 0


# -- what it removes -------------------------------------------------------------------------------


def test_what_is_named_is_removed(store: Store, ask: Callable[..., Any]) -> None:
    doomed, stays = put(store, "teachers", "a"), put(store, "teachers", "b")
    begin(store, "teachers", "c")
    before = everything_below(stays)
    a, c = key_of("a"), key_of("c")
    code, out, err = ask("--remove", a[:6], c)
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == [
        f"removed teachers {a[:12]}, whole, 0.2 KiB",
        f"removed teachers {c[:12]}, unfinished, 0.1 KiB",
    ]
    assert out.splitlines()[2].startswith("freed: 2 items")
    assert store.find("teachers", a) is None
    assert not doomed.exists()
    assert {path.name for path in stays.parent.iterdir() if path.is_dir()} == {key_of("b")}
    assert everything_below(stays) == before
    assert put(store, "teachers", "a").exists(), "it can be made anew"


def test_all_that_nobody_uses_is_removed(store: Store, runs: Path, ask: Callable[..., Any]) -> None:
    for kind in KINDS:
        put(store, kind, f"{kind} of one")
        put(store, kind, f"{kind} of nobody")
    begin(store, "teachers", "of one, begun")
    begin(store, "teachers", "of nobody, begun")
    dead = store.new_directory("teachers", key_of("of nobody, dead"))
    (dead / "model").write_bytes(b"x")
    (store.root / "tokens" / "notes").mkdir()
    run_dir = put_run(
        runs,
        "one",
        status="stopped",
        tokens=key_of("tokens of one"),
        teachers_a=key_of("of one, begun"),
    )
    for kind, link in (
        ("tokenizers", "tokenizer"),
        ("tokens", "tokens"),
        ("teachers", "teachers/b"),
    ):
        link_entry(store.root / kind / key_of(f"{kind} of one"), run_dir / link)
    kept = [(run_dir / link).resolve() for link in ("tokenizer", "tokens", "teachers/b")]
    begun = store.root / "teachers" / f".building-{key_of('of one, begun')}"

    code, out, err = ask("--remove-unused")
    assert (code, err) == (0, "")
    assert {p for p in store.root.glob("*/*") if p.is_dir()} == {
        *kept,
        begun,
        store.root / "tokens" / "notes",
    }
    assert all(store.find_whole(entry.parent.name, entry.name) for entry in kept)
    assert out.count("removed ") == 2 * len(KINDS) - 3 + 2
    assert "unused" not in out_of(ask)


@pytest.mark.parametrize("word", ["", "deadbeef"])
def test_a_key_that_is_none(store: Store, ask: Callable[..., Any], word: str) -> None:
    put(store, "tokens", "a")
    code, _, err = ask("--remove", word)
    assert code == 2
    assert f"--remove {word}: got the beginning of no key, expected that of one key" in err
    assert "`babyllama-ds store` lists them" in err
    assert len(find_items(store)) == 1


def test_all_that_is_wrong_is_told_together_and_nothing_removed(
    store: Store, runs: Path, ask: Callable[..., Any]
) -> None:
    keys = sorted(key_of(str(number)) for number in range(17))  # two begin alike
    for number in range(17):
        put(store, "tokens", str(number))
    twice = next(a[0] for a, b in pairwise(keys) if a[0] == b[0])
    used, free = put(store, "teachers", "used"), put(store, "teachers", "free")
    put(store, "teacher_cache", "cache")
    put_run(runs, "one", job={"name": "one"} | CACHE, status="stopped", teachers_x=used.name)
    misspelt = f"{free.name[:5]}{'0' if free.name[5] != '0' else '1'}{free.name[6:12]}"
    before = everything_below(runs)

    words = [free.name, twice, misspelt, used.name[:9], key_of("cache")[:9]]
    code, out, err = ask("--remove", *words)
    assert (code, out) == (2, "")
    assert f"--remove {twice}: got the beginning of " in err
    assert f"did you mean `{free.name[:12]}`?" in err
    assert f"{used}: got used by one, expected one that no run uses" in err
    assert "remove the folder of each of these runs first" in err
    assert f"{key_of('cache')}: got perhaps used by one, not done yet, expected" in err
    assert everything_below(runs) == before


def test_a_removal_that_dies_leaves_nothing_that_reads_as_whole(
    store: Store, runs: Path, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = put(store, "tokens", "a")
    whole = shutil.rmtree

    def die(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    assert ask("--remove", entry.name)[0] == 130
    monkeypatch.setattr(shutil, "rmtree", whole)
    assert everything_below(store.root), "no file was removed"
    assert store.find("tokens", entry.name) is None
    assert "unfinished" in out_of(ask)
    assert ask("--remove-unused")[0] == 0
    assert everything_below(store.root) == {}


def test_what_the_disk_refuses_is_named(
    store: Store, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = put(store, "tokens", "a")

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    code, _, err = ask("--remove", entry.name)
    assert code == 2
    assert "some/file: got Permission denied, expected a file that can be removed" in err
    assert "counts as unfinished" in err


def test_a_full_disk_is_no_hindrance(store: Store, ask: Callable[..., Any]) -> None:
    put(store, "teacher_cache", "a")
    begin(store, "teachers", "b")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        code, _, err = ask("--remove-unused")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err) == (0, "")
    assert everything_below(store.root) == {}


def test_a_run_that_began_meanwhile_keeps_what_it_claimed(store: Store, runs: Path) -> None:
    entries = [put(store, "teachers", word) for word in "ab"]
    items = find_items(store)
    put_run(runs, "late", status="running", **TOKENS, teachers_b=key_of("b"))
    with pytest.raises(RunError, match="used by late"):
        list(removing.remove(store, runs, items))
    assert all(entry.exists() for entry in entries)


def test_what_is_held_meanwhile_stays(store: Store, runs: Path) -> None:
    entries = [put(store, "teachers", word) for word in "ab"]
    items = find_items(store)
    with (
        store.lock("teachers", key_of("b")),
        pytest.raises(RunError, match=r"got in use by pid \d+ .*, expected one that no process"),
    ):
        list(removing.remove(store, runs, items))
    assert all(entry.exists() for entry in entries)
    assert len(list(removing.remove(store, runs, items))) == 2


def test_more_than_are_locked_at_once(
    store: Store, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removing, "AT_ONCE", 7)
    for number in range(5):
        put(store, "classifiers", str(number))
        begin(store, "classifiers", str(number))
    assert len(list(removing.remove(store, runs, find_items(store)))) == 10
    assert everything_below(store.root) == {}


def test_one_of_the_two_ways(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["store", "--remove", "a", "--remove-unused"])
    assert "not allowed with argument" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["store", "--remove-unsued"])
    assert "did you mean `--remove-unused`?" in capsys.readouterr().err
