"""The other side: distillation from several teachers as the published code does it.

After BabyLlama's `DistillationTrainer` (arXiv 2308.02019): Hugging Face's `Trainer` with a
`compute_loss` that forms the full logits of the student and of each teacher, stacks and averages
them, and takes `nn.KLDivLoss`. The teachers get the labels too, as there. What differs is for its
benefit: current versions, fused AdamW, whichever attention is faster.

    fp32      weights and teachers in fp32; on CUDA the student under bf16 autocast, as published
    autocast  weights in fp32, all models and the loss under bf16 autocast
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

    def __init__(self, *args: Any, teachers: Sequence[nn.Module], precision: str, **named: Any):
        super().__init__(*args, **named)
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
            student_loss = outputs_student.loss
            with torch.no_grad():
                all_teacher_logits = [teacher(**inputs).logits for teacher in self.teachers]
                avg_teacher_logits = torch.stack(all_teacher_logits).mean(dim=0)
            loss_function = nn.KLDivLoss(reduction="batchmean")
            loss_logits = loss_function(
                torch.log_softmax(outputs_student.logits / TEMPERATURE, dim=-1),
                torch.softmax(avg_teacher_logits / TEMPERATURE, dim=-1),
            ) * (TEMPERATURE**2)
            loss = ALPHA * student_loss + (1.0 - ALPHA) * loss_logits
        return (loss, outputs_student) if return_outputs else loss


class Windows(Dataset[dict[str, Tensor]]):
    """All windows of an epoch, in the order in which our side visits them."""

    def __init__(self, windows_NS: Tensor) -> None:
        self._windows_NS = windows_NS

    def __len__(self) -> int:
        return len(self._windows_NS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows_NS[index], "labels": self._windows_NS[index]}


class AfterEachStep(TrainerCallback):
    """Calls `act` at the end of every optimizer step; it may wait as long as it likes."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._act()


def arguments(
    output_dir: str, *, batch_windows: int, num_ranks: int, device: str, precision: Precision
) -> TrainingArguments:
    """Arguments under which nothing but training happens, for longer than anybody measures."""
    return TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch_windows // num_ranks,
        num_train_epochs=10**6 // NUM_BATCHES,
        learning_rate=3e-4,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and num_ranks > 1 else None,
        bf16=device == "cuda" and precision == "fp32",
        # The published shape of the loss gives every parameter a gradient.
        ddp_find_unused_parameters=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
