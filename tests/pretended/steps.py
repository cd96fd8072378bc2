"""Steps and evaluations on the pretended card: `python steps.py LIBRARY`; a line of JSON for each.

{"name": …, "waits": {FILE: TIMES}}        or "error"
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from pretended import card  # noqa: E402 - found by the line above

if __name__ == "__main__":
    card.insert(sys.argv[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402

from babyllama_ds.engine import distributed  # noqa: E402
from babyllama_ds.engine.inference import FrozenModel  # noqa: E402
from babyllama_ds.engine.proof.models import small_model  # noqa: E402
from babyllama_ds.engine.training import TrainingEngine  # noqa: E402
from babyllama_ds.evaluation.classifier import Classifier, Encoded, Update  # noqa: E402
from babyllama_ds.evaluation.cross_entropy import Domains, evaluate_cross_entropy  # noqa: E402
from babyllama_ds.evaluation.sentences import score_sentences  # noqa: E402
from babyllama_ds.losses.topk import top_k_targets  # noqa: E402
from babyllama_ds.spec.deepspeed import deepspeed_config  # noqa: E402
from babyllama_ds.spec.distillation import DistillationSpec  # noqa: E402
from babyllama_ds.spec.loading import load_job  # noqa: E402
from babyllama_ds.spec.models import Gpt2Model, LlamaModel  # noqa: E402
from babyllama_ds.spec.shipped import find_job  # noqa: E402
from babyllama_ds.spec.training import TrainingSpec  # noqa: E402
from babyllama_ds.stopping import StopRequest  # noqa: E402
from babyllama_ds.teachers.cache import build  # noqa: E402
from babyllama_ds.teachers.cache.hidden import RememberedMember  # noqa: E402
from babyllama_ds.teachers.cache.layout import Layout, padded_bytes  # noqa: E402
from babyllama_ds.teachers.cache.records import MemoryRecords  # noqa: E402
from babyllama_ds.teachers.cache.topk import TopKEnsemble, packed, record_bytes  # noqa: E402
from babyllama_ds.teachers.ensemble import Ensemble, Member  # noqa: E402
from babyllama_ds.training.batches import BatchPlan  # noqa: E402
from babyllama_ds.training.objective import objective_of  # noqa: E402
from babyllama_ds.training.step import train_step  # noqa: E402

VOCAB, LENGTH, WINDOWS, BATCH, MICRO, TOP_K = 61, 12, 12, 4, 2, 5
SIZES: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "max_positions": LENGTH}
LLAMA = LlamaModel(kind="llama", num_heads=4, num_kv_heads=2, intermediate_size=40, **SIZES)
GPT2 = Gpt2Model(kind="gpt2", num_heads=3, dropout=0.1, **SIZES)
DEVICE = torch.device("cuda", 0)
MATCHED = {"layers": ({"teacher": "gpt2", "teacher_layer": 1, "student_layer": 1},), "weight": 0.5}


class Windows:
    """Any tokens; with `documents`, two of them in each window."""

    num_windows, length = WINDOWS, LENGTH

    def __init__(self, *, documents: bool = False) -> None:
        self._documents = documents

    def batch(self, epoch: int, k: int, batch_windows: int) -> np.ndarray:
        return np.arange(k * batch_windows, (k + 1) * batch_windows)

    def windows(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        return (np.arange(LENGTH) * 7 + np.asarray(ids)[:, None]) % VOCAB

    def numbers(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        return ids

    def begins(self, epoch: int, ids: np.ndarray) -> np.ndarray | None:
        begins_S = np.isin(np.arange(LENGTH), (0, 5))
        return np.tile(begins_S, (len(ids), 1)) if self._documents else None


def model(spec: Any, kernel: str) -> Any:
    made: Any = small_model(spec)
    made.set_attn_implementation(kernel)
    return made


def live(kernel: str = "sdpa", layers: tuple[int, ...] = ()) -> Ensemble:
    """Two teachers that compute."""
    return Ensemble(
        [
            Member(
                spec.kind,
                FrozenModel(
                    model(spec, kernel), device=DEVICE, dtype=torch.bfloat16, layers=layers
                ),
                1.0,
            )
            for spec in (GPT2, LLAMA)
        ]
    )


def remembered(place: torch.device) -> Ensemble:
    """The same from a cache in a memory."""
    members = []
    for member in live().members:
        records = MemoryRecords(layout(LENGTH * 24 * 2), place=place, device=DEVICE)
        for ids_B, tokens_BS in passes():
            states = member.model.hidden_states(tokens_BS)
            records.put(ids_B[0], states.flatten(1).view(torch.uint8))
        kept = RememberedMember(name=member.name, weight=1.0, head=member.head, records=records)
        members.append(kept)
    return Ensemble(members)


def most_likely(place: torch.device) -> Ensemble:
    """Their most likely tokens from a cache."""
    loss = DistillationSpec(cache="topk", cache_top_k=TOP_K)
    records = MemoryRecords(layout(record_bytes(TOP_K, LENGTH, VOCAB)), place=place, device=DEVICE)
    teachers, windows = live(), Windows()
    for ids_B, tokens_BS in passes():
        micro = next(iter(plan(windows).batch(0).micro_batches))
        states = teachers.states(type(micro)(**{**vars(micro), "input_ids_BS": tokens_BS}))
        targets = top_k_targets(
            states, k=TOP_K, temperature=2.0, mean_of="logits", vocab_size=VOCAB
        )
        records.put(ids_B[0], packed(targets, len(ids_B), VOCAB))
    seen: Any = type("Seen", (), {"windows": windows, "vocab_size": VOCAB})
    return TopKEnsemble(records, loss, [], seen, DEVICE)


def layout(record_size: int) -> Layout:
    return Layout.choose(
        num_windows=WINDOWS, record_bytes=padded_bytes(record_size), forward_windows=MICRO
    )


def passes() -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    for start in range(0, WINDOWS, MICRO):
        ids_B = np.arange(start, start + MICRO)
        yield ids_B, torch.from_numpy(Windows().windows(0, ids_B)).to(DEVICE)


def plan(windows: Windows, training: TrainingSpec | None = None) -> BatchPlan:
    training = training or TrainingSpec(batch_windows=BATCH, learning_rate=1e-3, epochs=1.0)
    return BatchPlan(windows, training, rank=0, num_ranks=1, micro_batch=MICRO, device=DEVICE)


def step_waits(
    ensemble: Ensemble | None = None,
    *,
    student: Any = LLAMA,
    kernel: str = "sdpa",
    documents: bool = False,
    watch: bool = False,
    distillation: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, int]:
    """Of the third step: in the first, libraries and optimizers make what they keep."""
    training = TrainingSpec(
        batch_windows=BATCH, micro_batch=MICRO, epochs=1.0, learning_rate=1e-3, **settings
    )
    objective = objective_of(
        model(student, kernel),
        ensemble,
        vocab_size=VOCAB,
        training=training,
        distillation=DistillationSpec(**(distillation or {})) if ensemble else None,
        seed=1,
    )
    config = deepspeed_config(load_job(find_job("nursery")), training, device="cuda", ranks=1)
    engine = TrainingEngine(objective, training=training, config=config, device=DEVICE)
    batches = plan(Windows(documents=documents), training)

    def step(number: int) -> None:
        batch = batches.batch(number)
        train_step(engine, objective, ensemble, batch, rate=1e-3, seed=1, step=number, watch=watch)

    step(0)
    step(1)
    found = card.waits(lambda: step(2))
    engine.destroy()
    objective.release()
    return dict(found)


def evaluation_waits(*, documents: bool, domains: bool) -> dict[str, int]:
    windows = Windows(documents=documents)
    of_domains = Domains(
        names=("one", "other"),
        numbers_of=lambda ids: np.tile(np.arange(LENGTH) % 2, (len(ids), 1)),
    )
    evaluated = model(GPT2, "sdpa").bfloat16().to(DEVICE)
    return dict(
        card.waits(
            lambda: evaluate_cross_entropy(
                evaluated,
                lambda ids: windows.windows(0, np.asarray(ids)),
                WINDOWS,
                device=DEVICE,
                batch_windows=5,
                vocab_size=VOCAB,
                domains=of_domains if domains else None,
                begins_of=(lambda ids: windows.begins(0, np.asarray(ids))) if documents else None,
            )
        )
    )


def sentence_waits() -> dict[str, int]:
    evaluated = model(LLAMA, "sdpa").bfloat16().to(DEVICE)
    sentences = [[1, 2, 3], [4, 5, 6, 7], [3, 4], [9], [8, 7, 6, 5, 4]]
    return dict(
        card.waits(
            lambda: score_sentences(
                evaluated, sentences, device=DEVICE, batch_tokens=8, vocab_size=VOCAB
            )
        )
    )


def classifier_waits(*, learning: bool) -> dict[str, int]:
    """Of the third update in two passes, or of a prediction."""
    classifier = Classifier(model(GPT2, "sdpa").bfloat16(), num_labels=3).to(DEVICE)
    examples = Encoded(token_ids=[[1, 2, 3], [4, 5, 6, 7], [3], [8, 7, 6]], labels=[0, 2, 1, 0])
    if not learning:
        return dict(card.waits(lambda: [*classifier.predict(examples, batch_tokens=8)]))
    update = Update(classifier.train(), 1e-3, steps=9)

    def step() -> None:
        update(examples, range(4), batch_tokens=8)

    step()
    step()
    return dict(card.waits(step))


def filling_waits(place: torch.device) -> dict[str, int]:
    """Of a cache that is computed into memory, by teachers that nobody waits for."""
    wanted = layout(LENGTH * 8)
    work = build.Work(name="cache", layout=wanted, stop=StopRequest())
    memory = MemoryRecords(wanted, place=place, device=DEVICE)

    def compute(windows_B: np.ndarray) -> torch.Tensor:
        values = torch.full((len(windows_B), LENGTH), int(windows_B[0]), device=DEVICE)
        return values.view(torch.uint8)

    found = card.waits(
        lambda: build.make_in_memory(work, memory, list(range(wanted.num_shards)), compute)
    )
    filled = memory.read(np.arange(WINDOWS)).view(torch.int64)[:, 0].tolist()
    assert filled == [number // MICRO * MICRO for number in range(WINDOWS)]
    return dict(found)


def planted() -> dict[str, int]:
    """What the card is to notice."""
    tensor = torch.arange(6, device=DEVICE)
    host = torch.zeros(3)

    def wait() -> None:
        tensor.sum().item()
        tensor[tensor > 2]
        host.to(DEVICE, non_blocking=True)
        host.pin_memory().to(DEVICE, non_blocking=True)  # no wait
        tensor.cpu()
        torch.cuda.synchronize()

    return dict(card.waits(wait))


def mixed() -> dict[str, int]:
    """Raises, on a card."""
    torch.where(torch.ones(3, device=DEVICE) > 0, torch.ones(3), 0.0)
    return {}


CASES: dict[str, Callable[[], dict[str, int]]] = {
    "planted": planted,
    "mixed": mixed,
    "step: alone": lambda: step_waits(z_loss=1e-3),
    "step: GPT-2 alone, eager": lambda: step_waits(student=GPT2, kernel="eager"),
    "step: distilled": lambda: step_waits(live(), student=GPT2),
    "step: eager": lambda: step_waits(live("eager"), kernel="eager"),
    "step: documents": lambda: step_waits(live(), documents=True),
    "step: documents, eager": lambda: step_waits(live("eager"), kernel="eager", documents=True),
    "step: watched": lambda: step_waits(live(), watch=True),
    "step: reverse KL": lambda: step_waits(
        live(), distillation={"divergence": {"kind": "reverse_kl"}, "mean_of": "probabilities"}
    ),
    "step: matched": lambda: step_waits(
        live(layers=(1,)), distillation={"hidden_matching": MATCHED}
    ),
    "step: Muon, average, recomputed": lambda: step_waits(
        live(), muon={}, ema={}, gradient_checkpointing=True
    ),
    "step: cache on the card": lambda: step_waits(remembered(DEVICE)),
    "step: cache in the host": lambda: step_waits(remembered(torch.device("cpu"))),
    "step: likeliest on the card": lambda: step_waits(most_likely(DEVICE)),
    "step: likeliest in the host": lambda: step_waits(most_likely(torch.device("cpu"))),
    "filling the card": lambda: filling_waits(DEVICE),
    "evaluation": lambda: evaluation_waits(documents=False, domains=False),
    "evaluation: domains": lambda: evaluation_waits(documents=False, domains=True),
    "evaluation: documents": lambda: evaluation_waits(documents=True, domains=True),
    "sentences": sentence_waits,
    "classifier, learning": lambda: classifier_waits(learning=True),
    "classifier": lambda: classifier_waits(learning=False),
}


def main() -> None:
    """Every case, whatever becomes of the others."""
    distributed.start("cuda")
    for name, run in CASES.items():
        try:
            found: dict[str, Any] = {"waits": run()}
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name, **found}), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main()
