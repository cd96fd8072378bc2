from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from babyllama_ds import ranks
from babyllama_ds.errors import DataError, ModelError, Stopped
from babyllama_ds.evaluation.cross_entropy import (
    Domains,
    bits_per_byte,
    evaluate_cross_entropy,
    perplexity,
)

V, S = 61, 13


def tiny_llama(**changes):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        **changes,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2():
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=V, n_embd=24, n_layer=2, n_head=3, n_positions=32, initializer_range=0.3
    )  # dropout 0.1: must be off in evaluation
    return GPT2LMHeadModel(config)


WINDOWS = np.random.default_rng(5).integers(0, V, size=(7, S)).astype(np.uint16)


def windows_of(indices):
    return WINDOWS[list(indices)]


@torch.no_grad()
def reference_nll(model, windows) -> float:
    """Every logit of every window at once, float64."""
    model = model.double().eval()
    tokens = torch.from_numpy(windows.astype(np.int64))
    logits = model(input_ids=tokens).logits
    nll = cross_entropy(logits[:, :-1].reshape(-1, V), tokens[:, 1:].reshape(-1), reduction="sum")
    model.float()
    return nll.item()


def evaluate(model, *, num_windows=7, batch_windows=3, **options):
    return evaluate_cross_entropy(
        model,
        windows_of,
        num_windows,
        device="cpu",
        batch_windows=batch_windows,
        vocab_size=V,
        **options,
    )


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_windows", [1, 3, 100])
def test_agrees_with_cross_entropy_of_full_logits(build, batch_windows) -> None:
    model = build()
    expected = reference_nll(model, WINDOWS)
    score = evaluate(model, batch_windows=batch_windows)
    assert score.nll_nats == pytest.approx(expected, rel=1e-6)
    assert score.num_tokens == 7 * (S - 1)
    assert score.num_windows == 7
    assert score.num_bytes is None
    assert score.cross_entropy == pytest.approx(expected / (7 * (S - 1)), rel=1e-6)


def test_only_the_first_windows_asked_for_are_scored() -> None:
    model = tiny_llama()
    score = evaluate(model, num_windows=2)
    assert score.nll_nats == pytest.approx(reference_nll(model, WINDOWS[:2]), rel=1e-6)


def test_bf16_model_is_scored_close_to_its_fp32_values() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    score = evaluate(model.bfloat16())
    expected = reference_nll(model.float(), WINDOWS)  # the same rounded weights
    assert score.nll_nats == pytest.approx(expected, rel=2e-2)
    assert score.nll_nats != expected


@pytest.mark.parametrize("world", [2, 3, 10])
def test_ranks_share_the_windows_exactly(world, monkeypatch) -> None:
    model = tiny_llama()
    whole = evaluate(model, byte_lengths=np.arange(V))
    seen, parts = [], []

    def watched(indices):
        seen.extend(indices)
        return windows_of(indices)

    monkeypatch.setattr(ranks, "world_size", lambda: world)
    monkeypatch.setattr(ranks, "on_every_rank", lambda work: work())
    monkeypatch.setattr(ranks, "max_int", lambda value: value)
    # Each simulated rank contributes its own sums; the real sum is taken below.
    monkeypatch.setattr(ranks, "sum_floats", lambda *values: parts.append(values) or list(values))
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        evaluate_cross_entropy(
            model,
            watched,
            7,
            device="cpu",
            batch_windows=2,
            vocab_size=V,
            byte_lengths=np.arange(V),
        )
    assert sorted(seen) == list(range(7))
    nll, tokens, num_bytes = (sum(column) for column in zip(*parts, strict=True))
    assert nll == pytest.approx(whole.nll_nats, rel=1e-6)
    assert tokens == whole.num_tokens
    assert num_bytes == whole.num_bytes


RANK_SCRIPT = """
import json, sys
from functools import partial
import numpy as np, torch, torch.distributed as dist
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
from babyllama_ds import ranks
from babyllama_ds.errors import Stopped
from babyllama_ds.evaluation.cross_entropy import evaluate_cross_entropy
from babyllama_ds.evaluation.sentences import score_sentences
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model = LlamaForCausalLM.from_pretrained(folder + "/model")
windows = np.load(folder + "/windows.npy")
options = dict(device="cpu", vocab_size=61)
score = evaluate_cross_entropy(model, lambda i: windows[list(i)], 7, batch_windows=2, **options)
sentences = json.load(open(folder + "/sentences.json"))
scores = score_sentences(model, sentences, batch_tokens=12, **options)
firsts = [(1 + len(ids)) // 2 for ids in sentences]
scores += score_sentences(model, sentences, firsts=firsts, batch_tokens=12, **options)
def fails_at(batch, error, work):
    calls = []
    def on_batch(*call):
        calls.append(call)
        if (rank, len(calls)) == (1, batch):
            raise error
    try:
        work(on_batch=on_batch)
    except Exception as error:
        return calls, type(error).__name__
# Of seven windows rank 0 has four and rank 1 three: at the last it has none.
windows_of = lambda i: windows[list(i)]
dev = partial(evaluate_cross_entropy, model, windows_of, 7, batch_windows=1, **options)
pairs = partial(score_sentences, model, sentences, batch_tokens=12, **options)
ended = {
    "whole": fails_at(0, None, lambda **given: dev(**given) and 1 / 0),
    "dev": fails_at(2, Stopped("asked to"), dev),
    "dev, none left": fails_at(4, Stopped("asked to"), dev),
    "pairs": fails_at(3, Stopped("asked to"), pairs),
    "error": fails_at(1, KeyError("k"), pairs),
}
result = {"nll": score.nll_nats, "tokens": score.num_tokens, "scores": scores, "ended": ended}
json.dump(result, open(f"{folder}/rank{rank}.json", "w"))
ranks.forget_control_group()
dist.destroy_process_group()
"""


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    from babyllama_ds.evaluation.sentences import score_sentences

    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "windows.npy", WINDOWS)
    sentences = [row[: 1 + i % 9].tolist() for i, row in enumerate(np.tile(WINDOWS, (4, 1)))]
    (tmp_path / "sentences.json").write_text(json.dumps(sentences))
    processes = [
        subprocess.Popen([sys.executable, "-c", RANK_SCRIPT, str(rank), str(tmp_path)])
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    ended, other = first.pop("ended"), second.pop("ended")
    assert first == second
    assert first["nll"] == pytest.approx(evaluate(model).nll_nats, rel=1e-6)
    assert first["tokens"] == 7 * (S - 1)
    options = {"device": "cpu", "batch_tokens": 12, "vocab_size": V}
    firsts = [(1 + len(ids)) // 2 for ids in sentences]
    alone = score_sentences(model, sentences, **options)
    alone += score_sentences(model, sentences, firsts=firsts, **options)
    # The batches are the same, only who runs them differs.
    assert first["scores"] == pytest.approx(alone, rel=1e-6)
    # What one rank raises ends the work of both, after the same batch.
    assert ended.pop("error") == [[[1, 8]], "RemoteError"]
    assert other.pop("error") == [[[1, 8]], "KeyError"]
    assert ended == other
    assert ended["whole"] == [[[1, 4], [2, 4], [3, 4], [4, 4]], "ZeroDivisionError"]
    assert ended["dev"] == [[[1, 4], [2, 4]], "Stopped"]
    assert ended["dev, none left"] == [[[1, 4], [2, 4], [3, 4], [4, 4]], "Stopped"]
    assert ended["pairs"] == [[[1, 8], [2, 8], [3, 8]], "Stopped"]


def test_each_modules_training_mode_is_restored_also_after_an_error() -> None:
    model = tiny_gpt2().train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]

    def fail(done, batches):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise Stopped("enough")

    evaluate(model)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(Stopped):
        evaluate(model, on_batch=fail)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_leaves_no_gradient_and_no_trace_in_later_training() -> None:
    model = tiny_llama().train()
    evaluate(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    tokens = torch.from_numpy(WINDOWS.astype(np.int64))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_progress_counts_batches() -> None:
    calls = []
    evaluate(tiny_llama(), batch_windows=3, on_batch=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_no_window_is_an_error() -> None:
    with pytest.raises(DataError, match="development windows: got none, expected at least one"):
        evaluate(tiny_llama(), num_windows=0)


def test_not_a_number_is_an_error() -> None:
    model = tiny_llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ModelError, match="negative log-likelihood of nan, expected a finite"):
        evaluate(model)


def test_bytes_are_those_of_the_labelled_tokens() -> None:
    lengths = np.arange(V, dtype=np.uint8)  # token id i stands for i bytes
    score = evaluate(tiny_llama(), byte_lengths=lengths)
    assert score.num_bytes == sum(int(token) for window in WINDOWS for token in window[1:])


def test_perplexity_and_bits_per_byte_by_hand() -> None:
    # 6 tokens at ln 8 nats each = 18 bits, over 9 bytes.
    assert perplexity(6 * math.log(8), 6) == pytest.approx(8)
    assert bits_per_byte(6 * math.log(8), 9) == pytest.approx(2)


def test_a_perplexity_beyond_all_floats_is_none() -> None:
    """A model that diverged is measured all the same: its cross-entropy is finite."""
    assert perplexity(709.0 * 3, 3) == pytest.approx(math.exp(709))
    assert perplexity(710.0 * 3, 3) is None


# -- by domain ----------------------------------------------------------------------------------

DOMAINS = ("speech", "books", "never")
# A stream of seven windows; borders within windows 1 and 4, "books" comes back, "never" is empty.
DOMAIN_OF_STREAM = np.repeat([0, 1, 0, 1], [S + 5, 3 * S, 8, 7 * S - (S + 5 + 3 * S + 8)])
NUMBERS = DOMAIN_OF_STREAM.reshape(7, S)


def by_domain(model, **options):
    domains = Domains(names=DOMAINS, numbers_of=lambda indices: NUMBERS[list(indices)])
    return evaluate(model, domains=domains, byte_lengths=np.arange(V), **options)


@torch.no_grad()
def reference_by_domain(model) -> dict[str, list[float]]:
    """One label at a time: NLL in float64, tokens and bytes by the domain of its position."""
    model = model.double().eval()
    log_probs = model(input_ids=torch.from_numpy(WINDOWS.astype(np.int64))).logits.log_softmax(-1)
    sums = {name: [0.0, 0, 0] for name in DOMAINS}
    for row in range(7):
        for place in range(1, S):
            token = int(WINDOWS[row, place])
            own = sums[DOMAINS[NUMBERS[row, place]]]
            own[0] -= log_probs[row, place - 1, token].item()
            own[1] += 1
            own[2] += token  # token id i stands for i bytes
    model.float()
    return sums


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("batch_windows", [1, 3, 100])
def test_domains_agree_with_a_sum_over_labels(build, batch_windows) -> None:
    model = build()
    expected = reference_by_domain(model)
    score = by_domain(model, batch_windows=batch_windows)
    assert list(score.domains) == ["speech", "books"]  # a domain without a label has no score
    for name, part in score.domains.items():
        nll, tokens, num_bytes = expected[name]
        assert part.nll_nats == pytest.approx(nll, rel=1e-6)
        assert (part.num_tokens, part.num_bytes) == (tokens, num_bytes)


def test_domains_add_up_to_the_whole() -> None:
    model = tiny_llama()
    score, whole = by_domain(model), evaluate(model, byte_lengths=np.arange(V))
    parts = score.domains.values()
    assert score.num_tokens == sum(part.num_tokens for part in parts) == whole.num_tokens
    assert score.num_bytes == sum(part.num_bytes for part in parts) == whole.num_bytes
    assert score.nll_nats == sum(part.nll_nats for part in parts)
    mean = sum(part.cross_entropy * part.num_tokens for part in parts) / score.num_tokens
    assert mean == pytest.approx(score.cross_entropy, rel=1e-14)
    assert score.nll_nats == pytest.approx(whole.nll_nats, rel=1e-12)


def test_domains_cost_no_second_pass() -> None:
    model, rows = tiny_llama(), []
    model.model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    by_domain(model)
    assert sum(rows) == 7


@pytest.mark.parametrize("world", [2, 3, 10])
def test_ranks_share_the_domains_exactly(world, monkeypatch) -> None:
    model, parts = tiny_llama(), []
    whole = by_domain(model)
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    monkeypatch.setattr(ranks, "on_every_rank", lambda work: work())
    monkeypatch.setattr(ranks, "max_int", lambda value: value)
    monkeypatch.setattr(ranks, "sum_floats", lambda *values: parts.append(values) or list(values))
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        by_domain(model)
    sums = [sum(column) for column in zip(*parts, strict=True)]
    monkeypatch.setattr(ranks, "sum_floats", lambda *_: sums)
    for name, part in by_domain(model).domains.items():
        assert part.nll_nats == pytest.approx(whole.domains[name].nll_nats, rel=1e-6)
        assert part.num_tokens == whole.domains[name].num_tokens
        assert part.num_bytes == whole.domains[name].num_bytes


@pytest.mark.usefixtures("alone")  # where ranks have started, transformers looks at no windows
def test_every_batch_is_on_its_way_before_a_value_is_waited_for() -> None:
    """On `meta`, where a tensor has a shape and no values, whatever looks at them fails."""
    done = []
    with pytest.raises(RuntimeError, match="meta"):
        evaluate_cross_entropy(
            tiny_llama().to("meta"),
            windows_of,
            len(WINDOWS),
            device="meta",
            batch_windows=2,
            vocab_size=V,
            on_batch=lambda number, _: done.append(number),
        )
    assert done == [1, 2, 3, 4]
