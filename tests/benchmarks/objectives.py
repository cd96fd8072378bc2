"""Objectives side by side: one job, several objectives and seeds; a table of means and spreads.

    python tests/benchmarks/objectives.py --seeds 1 2 3 [--job JOB] [--runs RUNS] [--max-tokens N]
        [--objectives NAME ...] [--ranks N] [--only-table] [--set KEY=VALUE ...]

Every run goes through the real launcher into `RUNS/grid-OBJECTIVE-SEED`. The runs of a seed share
tokens and teachers by the store, so that only the first one trains them. Started again with the
same options it goes on: what is done is skipped by the runs' own stages. `--max-tokens` limits the
training of teachers, student and control alike; `--set` overrides any key of the job.
The control is trained once for each seed, beside the first objective.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from babyllama_ds import files
from babyllama_ds.report.formatting import MISSING, number, table
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.shipped import find_job

ROOT = Path(__file__).resolve().parents[2]
CONTROL = "control"


def matched(job: JobSpec, *, weight: float, loss: str = "mse") -> str:
    """The last layer of the student and of every teacher, and the middle ones."""
    depths = {teacher.name: teacher.model.num_layers for teacher in job.teachers}
    own = job.student.model.num_layers
    pairs = [
        f"{{teacher: {name}, teacher_layer: {theirs}, student_layer: {ours}}}"
        for name, depth in depths.items()
        for theirs, ours in ((depth // 2, own // 2), (depth, own))
    ]
    return (
        f"distillation.hidden_matching={{loss: {loss}, weight: {weight}, "
        f"layers: [{', '.join(pairs)}]}}"
    )


OBJECTIVES: Mapping[str, Callable[[JobSpec], list[str]]] = {
    "as-the-job-has-it": lambda _: [],
    "reverse-kl": lambda _: ["distillation.divergence={kind: reverse_kl}"],
    "jensen-shannon": lambda _: ["distillation.divergence={kind: jensen_shannon}"],
    "skewed-forward-kl": lambda _: ["distillation.divergence={kind: skewed_forward_kl}"],
    "skewed-reverse-kl": lambda _: ["distillation.divergence={kind: skewed_reverse_kl}"],
    "hidden-mse": lambda job: [matched(job, weight=1.0)],
    "hidden-cosine": lambda job: [matched(job, weight=1.0, loss="cosine")],
    # 1.0 CE + 0.1 KL + 0.5 MSE, all over 1.1 (docs/objectives.md)
    "mostly-ce-and-hidden-mse": lambda job: [
        "distillation.alpha=0.9091",
        "distillation.temperature=1.0",
        "distillation.soft_reduction=token",
        matched(job, weight=0.4545),
    ],
    "teachers-first": lambda _: ["distillation.alpha={start: 0.1, end: 0.9}"],
    "teachers-last": lambda _: ["distillation.alpha={start: 0.9, end: 0.1}"],
    "cooling": lambda _: ["distillation.temperature={start: 2.0, end: 1.0}"],
    "z-loss": lambda _: ["student.training.z_loss=1e-4"],
}


def main() -> int:
    """Run what is missing, then print the table; 1 where a run failed."""
    options = _options()
    failed = [] if options.only_table else _run_all(options)
    print(render(collect(options.runs, options.objectives, options.seeds)))
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


# -- running ---------------------------------------------------------------------------------------


def _run_all(options: argparse.Namespace) -> list[str]:
    """Seed by seed, so that a table of the first ones is there early."""
    failed = []
    for seed in options.seeds:
        for objective in options.objectives:
            name = run_name(objective, seed)
            print(f"{name}: started", flush=True)
            if subprocess.run(command(options, objective, seed), cwd=ROOT, check=False).returncode:
                failed.append(name)
    return failed


def command(options: argparse.Namespace, objective: str, seed: int) -> list[str]:
    """What starts one run."""
    given = [*_limits(options), *options.overrides]
    job = load_job(find_job(options.job), [f"seed={seed}", *given])
    words = [*given, *OBJECTIVES[objective](job), f"name={run_name(objective, seed)}"]
    if objective != options.objectives[0]:
        words.append("control=null")
    launcher = Path(sys.executable).with_name("deepspeed")
    start = [str(launcher), "--quiet", "--num_gpus", str(options.ranks), "launcher/run.py"]
    return [*start, options.job, "--runs", str(options.runs), f"seed={seed}", *words]


def run_name(objective: str, seed: int) -> str:
    """A run's folder."""
    return f"grid-{objective}-{seed}"


def _limits(options: argparse.Namespace) -> list[str]:
    if options.max_tokens is None:
        return []
    job = load_job(find_job(options.job), options.overrides)
    trained = [f"teachers.{t.name}" for t in job.teachers if t.training is not None]
    if job.control is not None and job.control.training is not None:
        trained.append(CONTROL)
    return [f"{where}.training.max_tokens={options.max_tokens}" for where in (*trained, "student")]


# -- the table -------------------------------------------------------------------------------------


def collect(
    runs: Path, objectives: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """The students' measures by objective, and the controls'; of the runs that have a report."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*objectives, CONTROL)}
    for objective in objectives:
        for seed in seeds:
            path = runs / run_name(objective, seed) / "report" / "report.json"
            if not path.exists():
                continue
            models = files.read_json(path)["models"]
            found[objective].append(models["student"])
            if CONTROL in models:
                found[CONTROL].append(models[CONTROL])
    return {name: models for name, models in found.items() if models}


def render(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line an objective: mean ± standard deviation over seeds, and the number of seeds."""
    benchmarks = sorted(
        {name for each in found.values() for m in each for name in m["minimal_pairs"]}
    )
    header = ["objective", "seeds", "dev CE (nats/token)", *(f"{name} (%)" for name in benchmarks)]
    lines = [
        [
            name,
            str(len(models)),
            spread([model["dev_ce"] for model in models], 4),
            *(
                spread([100 * m["minimal_pairs"][b] for m in models if b in m["minimal_pairs"]], 2)
                for b in benchmarks
            ),
        ]
        for name, models in found.items()
    ]
    return table(header, lines)


def spread(values: Sequence[float | None], digits: int) -> str:
    """`mean ± standard deviation`; of a single value, the value."""
    measured = [value for value in values if value is not None]
    if not measured:
        return MISSING
    mean = number(statistics.fmean(measured), digits)
    if len(measured) == 1:
        return mean
    return f"{mean} ± {number(statistics.stdev(measured), digits)}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--job", default="babylm_tiny", help="a job file, or a shipped one's name")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--max-tokens", type=int, help="of every training (default: the job's)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--objectives", nargs="+", choices=[*OBJECTIVES], default=[*OBJECTIVES], metavar="NAME",
        help=f"of: {', '.join(OBJECTIVES)}",
    )  # fmt: skip
    parser.add_argument("--only-table", action="store_true", help="run nothing")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    options.runs = options.runs.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
