"""The other side: distillation from several teachers as the published code does it.

After BabyLlama's `DistillationTrainer` (arXiv 2308.02019): Hugging Face's `Trainer` with a
`compute_loss` that forms the full logits of the student and of each teacher, stacks and averages
them, and takes `nn.KLDivLoss`. The teachers get the labels too, as there. What differs is for its
benefit: current versions, fused AdamW, whichever attention is faster.

    fp32      weights and teachers in fp32; on CUDA the student under bf16 autocast, as published
    autocast  weights in fp32, all models and the loss under bf16 autocast

TF32 is left as PyTorch has it, off, as published; a row that has it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from scenario import ALPHA, NUM_BATCHES, TEMPERATURE
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

Precision = Literal["fp32", "autocast"]


class DistillationTrainer(Trainer):
    """Hugging Face's trainer with the ensemble's loss."""

    def __init__(
        self,
        *args: Any,
        teachers: Sequence[nn.Module],
        precision: str,
        alpha: float = ALPHA,
        temperature: float = TEMPERATURE,
        soft_reduction: Literal["sequence", "token"] = "sequence",
        **named: Any,
    ) -> None:
        """`soft_reduction`: `sequence` is the published one; with `token` the loss is given
        positions instead of windows, and its mean over a batch is one over them. Without teachers
        the model learns from the text alone."""
        super().__init__(*args, **named)
        self.alpha, self.temperature = alpha, temperature
        self.soft_reduction = soft_reduction
        self.teachers = teachers
        for teacher in self.teachers:
            teacher.to(self.args.device).eval()
        self.precision = precision
        # The loss does not depend on `num_items_in_batch`: it need not be counted.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        device = self.args.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "autocast"):
            outputs_student = model(**inputs)
            loss = self.alpha * outputs_student.loss
            if self.teachers:
                loss = loss + (1.0 - self.alpha) * self._soft_loss(outputs_student.logits, inputs)
        return (loss, outputs_student) if return_outputs else loss

    def _soft_loss(self, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            all_teacher_logits = [teacher(**inputs).logits for teacher in self.teachers]
            avg_teacher_logits = torch.stack(all_teacher_logits).mean(dim=0)
        if self.soft_reduction == "token":
            logits, avg_teacher_logits = logits.flatten(0, 1), avg_teacher_logits.flatten(0, 1)
        loss_function = nn.KLDivLoss(reduction="batchmean")
        return loss_function(
            torch.log_softmax(logits / self.temperature, dim=-1),
            torch.softmax(avg_teacher_logits / self.temperature, dim=-1),
        ) * (self.temperature**2)


class Windows(Dataset[dict[str, Tensor]]):
    """All windows of an epoch, in the order in which our side visits them.

    `times` over: beginning an epoch costs the trainer time, which an epoch of a few batches would
    charge to every other step.
    """

    def __init__(self, windows_NS: Tensor, times: int = 1) -> None:
        self._windows_NS = windows_NS
        self._times = times

    def __len__(self) -> int:
        return self._times * len(self._windows_NS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window_S = self._windows_NS[index % len(self._windows_NS)]
        return {"input_ids": window_S, "labels": window_S}


class AfterEachStep(TrainerCallback):
    """Calls `act` at the end of every optimizer step; it may wait as long as it likes.

    Training ends when it says True.
    """

    def __init__(self, act: Callable[[], bool | None]) -> None:
        self._act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._act():
            control.should_training_stop = True


def arguments(
    output_dir: str,
    *,
    batch_windows: int,
    num_ranks: int,
    device: str,
    precision: Precision,
    micro_batch: int | None = None,
    **more: Any,
) -> TrainingArguments:
    """Arguments under which nothing but training happens, for longer than anybody measures (or
    `num_train_epochs`).

    `micro_batch`: windows of a forward pass of one rank; none: its share of the batch. `more` are
    the trainer's own.
    """
    share = batch_windows // num_ranks
    defaults: dict[str, Any] = {
        "bf16": device == "cuda" and precision == "fp32",
        "learning_rate": 3e-4,
        "num_train_epochs": 10**6 // NUM_BATCHES,
    }
    return TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=micro_batch or share,
        gradient_accumulation_steps=share // (micro_batch or share),
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and num_ranks > 1 else None,
        # The published shape of the loss gives every parameter a gradient.
        ddp_find_unused_parameters=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=1,
        **{**defaults, **more},
    )
