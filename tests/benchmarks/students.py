"""Student and control again, by the textbook: finished runs enter; a table of both sides leaves.

    python tests/benchmarks/students.py RUN [RUN ...] [--precision fp32 autocast] [--ranks N]
        [--out DIR]

`bench.py` compares steps, this what comes of all of them. The textbook's trainer (`textbook.py`,
transformers' own modules) gets what the run's trainings began with: initial weights, the windows of
every batch, teachers, and the learning rate, decay and clipping of the job. It goes as far as the
step whose weights the run kept. The optimizer, its schedule, the models' arithmetic, the loss and
the ranks' gradients are its own. All models are then measured by the run's evaluation, in the
precision that each was trained in.

With one rank every batch is the run's. With more, the trainer averages gradients over ranks:
windows of an epoch's last batch that cannot be shared out evenly weigh differently.

A run must lie beside its store, and its trainings must be some that the textbook can do. What is
done is found again in `--out`.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from textbook import Precision
from transformers import AutoModelForCausalLM

from babyllama_ds import files
from babyllama_ds.corpus.prepare import Corpus, open_corpus, prepare_corpus
from babyllama_ds.fingerprints import evaluation_fingerprint
from babyllama_ds.models.build import build_model
from babyllama_ds.pipeline.job_setup import JobSetup
from babyllama_ds.pipeline.measuring import Measurer
from babyllama_ds.report.formatting import MISSING, number, table
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.training import TrainingSpec
from babyllama_ds.stopping import StopRequest
from babyllama_ds.store import Store
from babyllama_ds.training.batches import BatchPlan

RANK = Path(__file__).resolve().parent / "students_rank.py"
CPU = torch.device("cpu")
OURS = "ours"


def main() -> None:
    """Train and measure what is missing, then print the table."""
    options = _options()
    runs = []
    for run_dir in options.runs:
        run = _Run(run_dir, options.out / run_dir.name, options.ranks)
        runs.append({"run": run_dir.name, "models": run.compared(options.precision)})
        files.write_json(options.out / "students.json", {"ranks": options.ranks, "runs": runs})
    print(render(runs, options.precision))


# -- one run ---------------------------------------------------------------------------------------


class _Run:
    """A finished run, and the folder of what the textbook makes of it."""

    def __init__(self, run_dir: Path, folder: Path, num_ranks: int) -> None:
        self.run_dir = run_dir.resolve()
        self.folder = folder
        self.num_ranks = num_ranks
        self.job = load_job(run_dir / "job.yaml")
        self.setup = JobSetup(self.job, CPU)
        self.store = Store(run_dir.parent / "store")
        self.trainings = {"student": self.job.student.training}
        if self.job.control is not None:
            self.trainings["control"] = self.job.control.training or self.job.student.training
        for model, training in self.trainings.items():
            _check(self.job, training, run_dir / model)

    def compared(self, precisions: Sequence[Precision]) -> dict[str, Any]:
        """What each model measures at and how long its steps took, by who trained it."""
        corpus = open_corpus(prepare_corpus(self.job, self.store, lambda: None))
        found = {}
        for model in self.trainings:
            rows = {OURS: self._measured(model, self.run_dir / model, corpus)}
            for precision in precisions:
                trained = self.folder / model / precision
                if not (trained / "training.json").exists():
                    self._write_start(model, corpus)
                    self._train(self.folder / model, precision)
                rows[precision] = self._measured(model, trained, corpus)
            found[model] = rows
        return found

    def _write_start(self, model: str, corpus: Corpus) -> None:
        """What the textbook's ranks begin with: weights in transformers' own modules, and batches.

        The share of a rank is an item: as many of them as ranks are a batch.
        """
        folder, training = self.folder / model, self.trainings[model]
        seed = self.job.stage_seed("student")
        ours = build_model(
            self.job.student.model, corpus.tokenizer, seed=seed, attention="eager", where="student"
        )
        theirs: Any = AutoModelForCausalLM.from_config(ours.config)
        theirs.load_state_dict(ours.state_dict())
        theirs.save_pretrained(folder / "start")
        windows = self.setup.windows(corpus, seed=seed)
        plan = BatchPlan(
            windows,
            training,
            rank=0,
            num_ranks=1,
            micro_batch=training.batch_windows,
            device=CPU,
        )
        batches = [plan.batch(step) for step in range(plan.total_steps)]
        tokens = [torch.from_numpy(windows.windows(b.epoch, b.window_ids)) for b in batches]
        shares = [share for batch_BS in tokens for share in batch_BS.tensor_split(self.num_ranks)]
        torch.save(shares, folder / "shares.pt")
        summary = files.read_json(self.run_dir / model / "training.json")
        distilled = model == "student"
        loss = self.job.distillation
        asked = {
            "steps": summary["best_step"] if summary["kept"] == "best" else summary["steps"],
            "teachers": [
                str(self.run_dir / "teachers" / teacher.name)
                for teacher in self.job.teachers
                if distilled
            ],
            "loss": {
                "alpha": loss.alpha if distilled else 1.0,
                "temperature": loss.temperature,
                "soft_reduction": loss.soft_reduction,
            },
            "trainer": {
                "learning_rate": training.learning_rate,
                "lr_scheduler_type": training.schedule,
                "warmup_steps": training.warmup_steps,
                "weight_decay": training.weight_decay,
                "adam_beta1": training.betas[0],
                "adam_beta2": training.betas[1],
                "adam_epsilon": training.epsilon,
                "max_grad_norm": training.clip_norm or math.inf,
            },
        }
        files.write_json(folder / "asked.json", asked)

    def _train(self, folder: Path, precision: Precision) -> None:
        """On ranks that share the cores."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.num_ranks)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        done = subprocess.run(
            [sys.executable, *launch, str(self.num_ranks), str(RANK), str(folder), precision],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.returncode)  # a rank has said why

    def _measured(self, model: str, path: Path, corpus: Corpus) -> dict[str, Any]:
        entries = corpus.entries
        fingerprint = evaluation_fingerprint(
            path, self.job, entries.tokens_key, entries.pairs_dir, teacher=False
        )
        measurer = Measurer(self.setup, self.store, StopRequest())
        found = measurer.measure(model, path, corpus, fingerprint)
        pairs = {name: scores["accuracy"] for name, scores in found["minimal_pairs"].items()}
        seconds = files.read_json(path / "training.json")["seconds"]
        return {"dev_ce": found["dev"]["ce"], "pairs": pairs, "seconds": seconds}


def _check(job: JobSpec, training: TrainingSpec, model: Path) -> None:
    """Ends where the textbook would train something else."""
    loss = job.distillation
    differs = {
        "muon, ema, z_loss or unlabelled_tokens": training.muon is not None
        or training.ema is not None
        or training.z_loss is not None
        or bool(training.unlabelled_tokens),
        "distillation.divergence, hidden_matching or mean_of": loss.divergence.kind != "forward_kl"
        or loss.hidden_matching is not None
        or loss.mean_of != "logits",
        "distillation.cache: topk": loss.cache == "topk",
        "a schedule of alpha or the temperature": not isinstance(loss.alpha, float)
        or not isinstance(loss.temperature, float),
        "weights of teachers": len({teacher.weight for teacher in job.teachers}) > 1,
        "windows.attention: document": job.windows.attention == "document",
        "a student that is loaded": job.student.model.kind == "pretrained",
    }
    if found := [name for name, is_so in differs.items() if is_so]:
        raise SystemExit(f"{model}: the textbook has no such training: {'; '.join(found)}")


# -- what is told ----------------------------------------------------------------------------------


def render(runs: Sequence[Mapping[str, Any]], precisions: Sequence[Precision]) -> str:
    """Models of every run by who trained them; means over runs with their standard errors."""
    trainers = [OURS, *precisions]
    rows = {trainer: [_row(run["models"], trainer) for run in runs] for trainer in trainers}
    lines = [
        [run["run"] if trainer == OURS else "", _name(trainer), *_cells(rows[trainer][k])]
        for k, run in enumerate(runs)
        for trainer in trainers
    ]
    lines += [["mean", _name(trainer), *_means(rows[trainer])] for trainer in trainers]
    for precision in precisions:
        pairs = zip(rows[OURS], rows[precision], strict=True)
        differences = [{key: ours[key] - theirs[key] for key in ours} for ours, theirs in pairs]
        lines.append(["mean", f"ours − {_name(precision)}", *_means(differences)])
    return table(["run", "trained by", *rows[OURS][0]], lines)


def _name(trainer: str) -> str:
    return trainer if trainer == OURS else f"textbook {trainer}"


def _row(models: Mapping[str, Any], trainer: str) -> dict[str, float]:
    """What a trainer's models measure at, by the names of columns."""
    measured = {model: rows[trainer] for model, rows in models.items()}
    found = {f"{model} (nats/token)": row["dev_ce"] for model, row in measured.items()}
    if len(measured) > 1:
        found["gain (nats/token)"] = measured["student"]["dev_ce"] - measured["control"]["dev_ce"]
    for benchmark in measured["student"]["pairs"]:
        for model, row in measured.items():
            found[f"{model}, {benchmark} (%)"] = 100 * row["pairs"][benchmark]
    return found | {f"{model}, seconds": row["seconds"] for model, row in measured.items()}


def _cells(row: Mapping[str, float]) -> Iterator[str]:
    for column, value in row.items():
        yield number(value, _digits(column))


def _means(rows: Sequence[Mapping[str, float]]) -> Iterator[str]:
    for column in rows[0]:
        values = [row[column] for row in rows]
        digits = _digits(column)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        said = MISSING if error is None else number(error, digits)
        yield f"{number(statistics.fmean(values), digits)} ± {said}"


def _digits(column: str) -> int:
    return 4 if "nats" in column else 0 if "seconds" in column else 2


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the students of runs by the textbook.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), default=["fp32"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs") / "students")
    return parser.parse_args()


if __name__ == "__main__":
    main()
