"""`make gpu-kit`: everything that a bare machine with a GPU and no internet needs, in one folder.

    python tests/gpu/kit/collect.py --out DIR [--job JOB] [--limit-mb 60]

Enters: this checkout's last commit, a job, its corpus, and `DIR/wheels`, which `make wheelhouse`
has filled before. Leaves in DIR:

    wheels/          what the machine's Python lacks
    code.tar.xz      the commit, with its .git, so that reports name it
    text.tar.xz      the files of the corpus and of minimal pairs, which keys are made from
    store.tar.xz     tokenizer and token shards, made here, as entries of a store
    kit.json         the commit, the job, and the keys of the entries
    setup.sh         installs all of it: verified, offline, without a compiler
    SHA256SUMS       of everything above

Keys of a store are hashes of contents, not of paths: on the machine the job finds its tokenizer and
shards under the same keys, wherever the text lies. The text itself has to be there, for its hash.

The kit holds the corpus: it is as free as that, and belongs in no repository.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from babyllama_ds import files  # noqa: E402 - found by the line above
from babyllama_ds.corpus.prepare import CorpusEntries, prepare_corpus  # noqa: E402
from babyllama_ds.spec.job import JobSpec  # noqa: E402
from babyllama_ds.spec.loading import load_job  # noqa: E402
from babyllama_ds.spec.shipped import find_job  # noqa: E402
from babyllama_ds.store import Store  # noqa: E402

DATA = "BABYLM_DATA"
LIMIT_MB = 60.0
SHOWN = 8
SUMS = "SHA256SUMS"


def main() -> None:
    """Collect, say what is in the kit and how large it is."""
    parser = argparse.ArgumentParser(description="Collect what an offline machine needs.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--job", default="babyllama", help="a job file, or a shipped job's name")
    parser.add_argument("--limit-mb", type=float, default=LIMIT_MB)
    words = parser.parse_args()
    if DATA not in os.environ:
        sys.exit(f"{DATA} is not set: it names the folder of the corpus")
    job = load_job(find_job(words.job))
    collect(words.out, job, data=Path(os.environ[DATA]).resolve())
    print(summary(words.out))
    check_size(words.out, words.limit_mb)


def collect(out: Path, job: JobSpec, *, data: Path) -> None:
    """Fill `out`, beside the wheels that are in it.

    Raises:
        DataError: text that cannot be used.
        SystemExit: nothing of the job lies in `data`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        code = _clone(scratch / "code")
        _pack(out / "code.tar.xz", code, [code])
        _pack(out / "text.tar.xz", data, list(_texts(job, data)))
        entries = prepare_corpus(job, Store(scratch / "store"), lambda: None)
        _pack(
            out / "store.tar.xz",
            scratch / "store",
            [entries.tokenizer_dir, entries.tokens_dir],
        )
        files.write_json(out / "kit.json", _facts(job, entries, code))
    shutil.copy(Path(__file__).with_name("setup.sh"), out)
    lines = [
        f"{files.sha256_file(path)}  {path.relative_to(out)}"
        for path in _contents(out)
        if path.name != SUMS
    ]
    files.write_atomic(out / SUMS, "\n".join(lines) + "\n")


def summary(out: Path) -> str:
    """The largest files, and all together."""
    sizes = _sizes(out)
    lines = [f"{size / 1e6:8.1f} MB  {name}" for name, size in sizes[:SHOWN]]
    total = sum(size for _, size in sizes) / 1e6
    return "\n".join([*lines, f"{total:8.1f} MB  in {len(sizes)} files in {out}"])


def check_size(out: Path, limit_mb: float) -> None:
    """Raises SystemExit, with the largest file, when the kit is larger than the limit."""
    sizes = _sizes(out)
    total = sum(size for _, size in sizes) / 1e6
    if total > limit_mb:
        name, size = sizes[0]
        sys.exit(
            f"the kit: got {total:.1f} MB, expected at most {limit_mb:g}; "
            f"the largest file is {name}, {size / 1e6:.1f} MB"
        )


# -- what goes in ----------------------------------------------------------------------------------


def _clone(target: Path) -> Path:
    """The last commit, without its history: what is not committed is not in the kit."""
    words = ["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(target)]
    subprocess.run(words, check=True)
    return target


def _texts(job: JobSpec, data: Path) -> Iterator[Path]:
    """The job's text and minimal pairs, as far as they lie in `data`."""
    spec = job.corpus.model_dump()
    split = spec.get("split") or {}
    patterns = [*spec.get("train", ()), *(split.get("dev") or ())]
    patterns += [f"{pairs.path}/*.jsonl" for pairs in job.evaluation.minimal_pairs]
    for pattern in patterns:
        path = Path(pattern)
        found = sorted(path.parent.glob(path.name))
        if not found or not all(each.resolve().is_relative_to(data) for each in found):
            sys.exit(f"{pattern}: got {len(found)} files, expected some in {data}")
        yield from (each.resolve() for each in found)


def _pack(path: Path, root: Path, members: Iterable[Path]) -> None:
    """An archive of files and folders by their places in `root`; locks stay behind."""
    with tarfile.open(path, "w:xz", preset=6) as archive:
        for member in members:
            archive.add(member, arcname=str(member.relative_to(root)), filter=_plain)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _facts(job: JobSpec, entries: CorpusEntries, code: Path) -> dict[str, object]:
    words = ["git", "-C", str(code), "rev-parse", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "commit": commit,
        "job": job.name,
        "tokenizer": entries.tokenizer_key,
        "tokens": entries.tokens_key,
    }


def _contents(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file())


def _sizes(out: Path) -> Sequence[tuple[str, int]]:
    found = [(str(path.relative_to(out)), path.stat().st_size) for path in _contents(out)]
    return sorted(found, key=lambda each: -each[1])


if __name__ == "__main__":
    main()
