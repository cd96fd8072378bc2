"""One rank of the textbook, for a whole training: a folder that `students.py` wrote enters; the
trained model leaves beside what it began with.

    torchrun … students_rank.py FOLDER {fp32,autocast}
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from textbook import AfterEachStep, DistillationTrainer, Precision, arguments
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

from babyllama_ds import files


def main() -> None:
    """Train the model of the folder, and end."""
    _train(Path(sys.argv[1]), cast(Precision, sys.argv[2]))
    # Threads of gloo that outlive the training abort some processes at the interpreter's end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _train(folder: Path, precision: Precision) -> None:
    num_ranks = int(os.environ["WORLD_SIZE"])
    asked = files.read_json(folder / "asked.json")
    shares = torch.load(folder / "shares.pt", weights_only=True)
    trainer = DistillationTrainer(
        model=_in_fp32(folder / "start"),
        teachers=[_in_fp32(Path(path)).requires_grad_(False) for path in asked["teachers"]],
        precision=precision,
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
        **asked["loss"],
    )
    trainer.add_callback(AfterEachStep(lambda: trainer.state.global_step >= asked["steps"]))
    done = trainer.train()
    if done.global_step != asked["steps"]:
        raise SystemExit(f"{done.global_step} steps, expected {asked['steps']}")
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder / precision)
        summary = {"seconds": done.metrics["train_runtime"], "steps": done.global_step}
        files.write_json(folder / precision / "training.json", summary)


def _in_fp32(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


class _Shares(Dataset[dict[str, Tensor]]):
    """Windows of one rank in one batch, batch by batch."""

    def __init__(self, shares: Sequence[Tensor]) -> None:
        self._shares = shares

    def __len__(self) -> int:
        return len(self._shares)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._shares[index], "labels": self._shares[index]}


if __name__ == "__main__":
    main()
