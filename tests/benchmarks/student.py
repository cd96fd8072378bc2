"""The student again, by the textbook: finished runs enter; both students, measured alike, leave.

    python tests/benchmarks/student.py RUN [RUN ...] [--precision fp32 autocast] [--ranks N]
        [--out DIR]

`bench.py` compares steps, this what comes of all of them. The textbook's trainer (`textbook.py`,
transformers' own modules) gets what the run's training began with: the student's initial weights,
the windows of every batch, the teachers, and the learning rate, decay and clipping of the job. The
optimizer, its schedule, the models' arithmetic, the loss and the ranks' gradients are its own.
Both students are then measured by the run's evaluation, in the precision that each was trained in.

With one rank every batch is the run's. With more, the trainer averages gradients over ranks:
windows of an epoch's last batch that cannot be shared out evenly weigh differently.

A run must lie beside its store, and its student's training must be one that the textbook can do.
What is done is found again in `--out`.
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
from textbook import DistillationTrainer, Precision, arguments
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from babyllama_ds import files
from babyllama_ds.corpus.prepare import Corpus, open_corpus, prepare_corpus
from babyllama_ds.fingerprints import evaluation_fingerprint
from babyllama_ds.models.build import build_model
from babyllama_ds.pipeline.measuring import Measurer
from babyllama_ds.pipeline.parts import Parts
from babyllama_ds.report.formatting import number, table
from babyllama_ds.spec.job import JobSpec
from babyllama_ds.spec.loading import load_job
from babyllama_ds.stopping import StopRequest
from babyllama_ds.store import Store
from babyllama_ds.training.batches import BatchPlan

CPU = torch.device("cpu")


def main() -> None:
    """Train and measure what is missing, then print the table."""
    options = _options()
    if options.train is not None:
        train(options.train, options.precision[0])
        return
    rows = []
    for run_dir in options.runs:
        rows.append(
            _Run(run_dir, options.out / run_dir.name, options.ranks).compared(options.precision)
        )
        files.write_json(options.out / "students.json", {"runs": rows})
    print(render(rows, options.precision))


# -- one run ---------------------------------------------------------------------------------------


class _Run:
    """A finished run, and the folder of what the textbook makes of it."""

    def __init__(self, run_dir: Path, folder: Path, num_ranks: int) -> None:
        self.run_dir = run_dir
        self.folder = folder
        self.num_ranks = num_ranks
        self.job = load_job(run_dir / "job.yaml")
        self.store = Store(run_dir.parent / "store")
        _check(self.job, run_dir)

    def compared(self, precisions: Sequence[Precision]) -> dict[str, Any]:
        """What both students measure at, and how long their steps took."""
        corpus = open_corpus(prepare_corpus(self.job, self.store, lambda: None))
        rows = {"ours": self._row(self.run_dir / "student", corpus)}
        for precision in precisions:
            student = self.folder / precision
            if not (student / "training.json").exists():
                self._write_start(corpus)
                self._train(precision)
            rows[precision] = self._row(student, corpus)
        return {"run": self.run_dir.name, "rows": rows}

    def _write_start(self, corpus: Corpus) -> None:
        """What the textbook's ranks begin with: weights in transformers' own modules, and batches.

        The share of a rank is an item: as many of them as ranks are a batch.
        """
        spec, training = self.job.student, self.job.student.training
        seed = self.job.stage_seed("student")
        ours = build_model(
            spec.model, corpus.tokenizer, seed=seed, attention="eager", where="student"
        )
        theirs: Any = AutoModelForCausalLM.from_config(ours.config)
        theirs.load_state_dict(ours.state_dict())
        theirs.save_pretrained(self.folder / "start")
        windows = Parts(self.job, CPU).windows(corpus, seed=seed)
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
        torch.save(shares, self.folder / "shares.pt")
        asked = {
            "teachers": {t.name: t.weight for t in self.job.teachers},
            "run": str(self.run_dir.resolve()),
            "alpha": self.job.distillation.alpha,
            "temperature": self.job.distillation.temperature,
            "soft_reduction": self.job.distillation.soft_reduction,
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
        files.write_json(self.folder / "asked.json", asked)

    def _train(self, precision: Precision) -> None:
        """On ranks that share the cores."""
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [__file__, "--train", str(self.folder), "--precision", precision]
        threads = max(1, len(os.sched_getaffinity(0)) // self.num_ranks)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [*launch, "--nproc-per-node", str(self.num_ranks), *words]
        if status := subprocess.run(command, env=environment, check=False).returncode:
            raise SystemExit(status)  # a rank has said why

    def _row(self, student: Path, corpus: Corpus) -> dict[str, Any]:
        parts = Parts(self.job, CPU)
        measurer = Measurer(parts, self.store, StopRequest())
        entries = corpus.entries
        fingerprint = evaluation_fingerprint(
            student, self.job, entries.tokens_key, entries.pairs_dir, teacher=False
        )
        measured = measurer.measure("student", student, corpus, fingerprint)
        scores = measured["minimal_pairs"]
        return {
            "dev_ce": measured["dev"]["ce"],
            "pairs": {name: found["accuracy"] for name, found in scores.items()},
            "seconds": files.read_json(student / "training.json")["seconds"],
        }


def _check(job: JobSpec, run_dir: Path) -> None:
    """Ends where the textbook would train something else."""
    training, loss = job.student.training, job.distillation
    summary = files.read_json(run_dir / "student" / "training.json")
    differs = {
        "the run kept a step before the last": summary["best_step"] != summary["steps"]
        and training.keep == "best",
        "its training ended early": summary["steps"] != summary["planned_steps"],
        "student.training.muon, ema, z_loss or unlabelled_tokens": training.muon is not None
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
    if found := [name for name, true in differs.items() if true]:
        raise SystemExit(f"{run_dir}: the textbook has no such training: {'; '.join(found)}")


# -- the textbook's ranks --------------------------------------------------------------------------


class _Shares(Dataset[dict[str, Tensor]]):
    """Windows of one rank in one batch, batch by batch."""

    def __init__(self, shares: Sequence[Tensor]) -> None:
        self._shares = shares

    def __len__(self) -> int:
        return len(self._shares)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._shares[index], "labels": self._shares[index]}


def train(folder: Path, precision: Precision) -> None:
    """Be one of the ranks that train the student of a folder."""
    num_ranks = int(os.environ["WORLD_SIZE"])
    asked = files.read_json(folder / "asked.json")
    shares = torch.load(folder / "shares.pt", weights_only=True)
    teachers = [Path(asked["run"]) / "teachers" / name for name in asked["teachers"]]
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32),
        teachers=[
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)
            for path in teachers
        ],
        precision=precision,
        alpha=asked["alpha"],
        temperature=asked["temperature"],
        soft_reduction=asked["soft_reduction"],
        args=arguments(
            str(folder / "trainer"),
            batch_windows=num_ranks,  # items, each of them a rank's windows
            num_ranks=num_ranks,
            device="cpu",
            precision=precision,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            **asked["trainer"],
        ),
        train_dataset=_Shares(shares),
        data_collator=lambda items: items[0],
    )
    done = trainer.train()
    if done.global_step * num_ranks != len(shares):
        raise SystemExit(f"{done.global_step} steps, expected {len(shares) // num_ranks}")
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder / precision)
        summary = {"seconds": done.metrics["train_runtime"], "steps": done.global_step}
        files.write_json(folder / precision / "training.json", summary)


# -- what is told ----------------------------------------------------------------------------------


def render(runs: Sequence[Mapping[str, Any]], precisions: Sequence[Precision]) -> str:
    """Each run's students, and the mean of ours minus theirs with its standard error."""
    measures = ["dev CE (nats/token)", *(f"{name} (%)" for name in _pairs(runs))]
    header = ["run", "student", *measures, "seconds of training"]
    lines = [
        [
            run["run"] if kind == "ours" else "",
            kind if kind == "ours" else f"textbook {kind}",
            *_cells(row),
            number(row["seconds"], 0),
        ]
        for run in runs
        for kind, row in run["rows"].items()
    ]
    for precision in precisions:
        lines.append(["mean ± standard error", f"ours − textbook {precision}"])
        lines[-1] += [*_differences(runs, precision), ""]
    return table(header, lines)


def _pairs(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(runs[0]["rows"]["ours"]["pairs"])


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [number(row["dev_ce"], 4), *(number(100 * x, 2) for x in row["pairs"].values())]


def _differences(runs: Sequence[Mapping[str, Any]], precision: Precision) -> Iterator[str]:
    def over_runs(of: str, scale: float, name: str | None = None) -> list[float]:
        both = [(run["rows"]["ours"][of], run["rows"][precision][of]) for run in runs]
        if name is not None:
            both = [(ours[name], theirs[name]) for ours, theirs in both]
        return [scale * (ours - theirs) for ours, theirs in both]

    yield _mean(over_runs("dev_ce", 1.0), digits=4)
    for name in _pairs(runs):
        yield _mean(over_runs("pairs", 100.0, name), digits=2)


def _mean(values: Sequence[float], *, digits: int) -> str:
    mean = f"{statistics.fmean(values):+.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train finished runs' students by the textbook.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), default=["fp32"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs") / "students")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is None and not options.runs:
        parser.error("expected finished runs, for example runs/nursery-1")
    return options


if __name__ == "__main__":
    main()
