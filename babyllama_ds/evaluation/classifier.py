"""A classifier: a language model's backbone and a linear layer, and how it learns.

Examples' token ids enter, logits or predicted labels leave. `fine_tuning` says what is learnt.

Shapes: B examples, S positions, D width, L labels.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from babyllama_ds.errors import ModelError
from babyllama_ds.evaluation.labelled_files import LABELS
from babyllama_ds.evaluation.sentences import length_batches, padded
from babyllama_ds.memory import sent
from babyllama_ds.models.parts import final_states
from babyllama_ds.models.probe import probe_tokens

CLIP_NORM = 1.0
CPU_PART_TOKENS = 2048
INITIAL_STD = 0.02
"""Of the classifier's weights, as transformers draws them."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The examples of one file as a model gets them."""

    token_ids: Sequence[Sequence[int]]
    """At least one token each."""
    labels: Sequence[int]


class Classifier(nn.Module):
    """A backbone, and a linear layer on the state of each example's last token."""

    def __init__(self, model: nn.Module, num_labels: int) -> None:
        """Takes the model: its weights become fp32."""
        super().__init__()
        self.in_bf16 = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
        self.model = model.float()
        self.head = nn.Linear(_width(self.model), num_labels, bias=False)
        nn.init.normal_(self.head.weight, std=INITIAL_STD)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.head.weight.device

    def learns(self) -> list[nn.Parameter]:
        """What is trained: not the language model's own head, unless it is the embedding."""
        backbone: nn.Module = self.model.base_model  # type: ignore[assignment]
        return [*backbone.parameters(), *self.head.parameters()]

    def forward(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, L], fp32."""
        tokens_BS, lengths_B = padded(token_ids)
        rows_B = torch.arange(len(token_ids))
        last_B = sent(rows_B * tokens_BS.shape[1] + lengths_B - 1, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
            states_BSD = final_states(self.model, sent(tokens_BS, self.device))
            logits_BL: Tensor = self.head(states_BSD.flatten(0, 1).index_select(0, last_B))
        return logits_BL.float()

    def predict(self, examples: Encoded, batch_tokens: int) -> Generator[None, None, str]:
        """The likeliest label of each example, batch by batch."""
        self.eval()
        lengths = [len(ids) for ids in examples.token_ids]
        batches = length_batches(lengths, batch_tokens, shortest=1)
        found = []
        for batch in batches:
            with torch.no_grad():
                found.append(self([examples.token_ids[index] for index in batch]).argmax(1))
            yield
        labels = [0] * len(lengths)
        # One device synchronisation for all batches.
        indices = [index for batch in batches for index in batch]
        for index, label in zip(indices, torch.cat(found).tolist(), strict=True):
            labels[index] = label
        return told(labels)


@torch.no_grad()
def _width(model: nn.Module) -> int:
    """D of the final states, by trying: the language model's own head may be narrower (ELECTRA)."""
    return final_states(model.eval(), probe_tokens(model, 1)).shape[-1]


class Update:
    """One optimizer step at a time; the gradient is of the mean over a batch's examples."""

    def __init__(self, classifier: Classifier, learning_rate: float, steps: int) -> None:
        self.classifier = classifier
        self.parameters = classifier.learns()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 - step / steps
        )
        self.loss = torch.zeros((), device=classifier.device)
        self.done = 0
        """Steps so far."""

    def __call__(self, examples: Encoded, chosen: Sequence[int], batch_tokens: int) -> None:
        """Learn from the `chosen` examples, in parts of at most `batch_tokens` tokens."""
        lengths = [len(examples.token_ids[index]) for index in chosen]
        for part in length_batches(lengths, self._part_tokens(batch_tokens), shortest=1):
            indices = [chosen[place] for place in part]
            logits_BL = self.classifier([examples.token_ids[index] for index in indices])
            labels_B = sent(
                torch.tensor([examples.labels[index] for index in indices]), logits_BL.device
            )
            loss = functional.cross_entropy(logits_BL, labels_B, reduction="sum") / len(chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            self.loss += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.done += 1

    def _part_tokens(self, batch_tokens: int) -> int:
        """On a CPU parts of like lengths cost least, since none is padded to the batch's longest;
        on a card a part is as large as may be, since there each costs its launches."""
        on_cpu = self.classifier.device.type == "cpu"
        return min(batch_tokens, CPU_PART_TOKENS) if on_cpu else batch_tokens

    def check_finite(self, where: str) -> None:
        """Raise `ModelError` if a loss so far was not finite; waits for the device."""
        if not torch.isfinite(self.loss):
            raise ModelError.of(
                where,
                got=f"a training loss of {self.loss.item()}",
                expected="a finite one",
                hint="give the suite, or this task, a lower learning_rate",
            )


def told(labels: Sequence[int]) -> str:
    """Numbers of labels as the characters that results have for them."""
    return "".join(LABELS[label] for label in labels)
