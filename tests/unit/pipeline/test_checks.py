"""The checks of loaded models, one by one, on what they ask of a job and a corpus."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer
from babyllama_ds.errors import ModelError
from babyllama_ds.pipeline import checks
from babyllama_ds.spec.corpus import TrainedTokenizer
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.models import PretrainedModel
from babyllama_ds.spec.shipped import find_job
from babyllama_ds.spec.training import TrainingSpec

VOCAB = 280
TRAINING = TrainingSpec(batch_windows=1, epochs=1, learning_rate=1e-3)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("made") / "tokenizer"
    lines = [f"the {word} sleeps by the river {word}\n" for word in ("otter", "heron", "mole")] * 9
    train_tokenizer(TrainedTokenizer(kind="bpe", vocab_size=VOCAB), iter(lines), folder)
    return folder


@pytest.fixture
def corpus(tokenizer_dir: Path) -> Any:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    stream = np.array(tokenizer(" the otter sleeps\n the mole\n").input_ids)
    shards = SimpleNamespace(
        num_tokens=lambda split: len(stream),
        read=lambda split, start, length: stream[start : start + length],
    )
    return SimpleNamespace(tokenizer=tokenizer, shards=shards)


def job_setup(
    *, kernel: str = "sdpa", documents: bool = False, suites: tuple[Any, ...] = ()
) -> Any:
    return SimpleNamespace(
        attention=lambda where, spec, training: kernel,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        within_documents=documents,
        job=SimpleNamespace(
            windows=SimpleNamespace(length=16),
            evaluation=SimpleNamespace(suites_of=lambda teacher: suites if teacher else ()),
        ),
    )


@pytest.fixture
def saved(
    tmp_path: Path, tokenizer_dir: Path, tiny_model: Callable[..., Any]
) -> Callable[[Any], PretrainedModel]:
    """A model, or a LLaMA, with the job's tokenizer beside it."""

    def save(model: Any = None) -> PretrainedModel:
        model = model or tiny_model("llama", vocab_size=VOCAB)
        model.save_pretrained(tmp_path / "model")
        shutil.copytree(tokenizer_dir, tmp_path / "model", dirs_exist_ok=True)
        return PretrainedModel(kind="pretrained", path=str(tmp_path / "model"))

    return save


def check(
    spec: PretrainedModel,
    corpus: Any,
    setup: Any,
    *,
    training: TrainingSpec | None = None,
    layers: tuple[int, ...] = (),
) -> Any:
    return checks._check_loaded(setup, "teachers.a", spec, [training], layers, corpus)


def test_a_flash_kernel_is_tried_on_the_card_alone(
    saved: Callable[..., PretrainedModel], corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, in fp32 on the CPU, the plain products take its place: it runs in neither."""
    from transformers import PreTrainedModel

    used: list[tuple[str, torch.dtype]] = []
    forward = hf.LlamaForCausalLM.forward

    def spied(self: Any, *args: Any, **options: Any) -> Any:
        used.append((self.config._attn_implementation, self.dtype))
        return forward(self, *args, **options)

    def chosen(self: Any, kernel: str) -> None:
        used.append((f"set to {kernel}", self.dtype))

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", spied)
    spec = saved()
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "set_attn_implementation", chosen)
        assert check(spec, corpus, job_setup(kernel="flash_attention_2")) == "plain"
    assert ("set to flash_attention_2", torch.bfloat16) in used
    before = used[: used.index(("set to flash_attention_2", torch.bfloat16))]
    assert {dtype for _, dtype in before} == {torch.float32}
    assert not any(kernel.startswith("flash") for kernel, _ in before)
    assert used[-1][1] == torch.bfloat16


def test_a_model_without_a_backbone_is_not_to_be_fine_tuned(
    saved: Callable[..., PretrainedModel], corpus: Any
) -> None:
    """It can teach, but it is not known where a classifier would be put on."""
    config = hf.Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, intermediate_size_mlp=24,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_local_experts=1, pad_token_id=None, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    spec = saved(hf.Llama4ForCausalLM(config))
    assert check(spec, corpus, job_setup()) == "logits"
    with pytest.raises(ModelError, match=r"teachers\.a\.model: got Llama4ForCausalLM, of which"):
        check(spec, corpus, job_setup(suites=("glue",)))


def test_what_looks_ahead_is_refused(saved: Callable[..., PretrainedModel], corpus: Any) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3}
    config = hf.BertConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, **sizes)
    with pytest.raises(ModelError, match=r"teachers\.a\.model: got BertLMHeadModel, whose pred"):
        check(saved(hf.BertLMHeadModel(config)), corpus, job_setup())


def opt(**changes: Any) -> Any:
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"vocab_size": VOCAB, "word_embed_proj_dim": 16, **sizes, **changes}
    torch.manual_seed(0)
    return hf.OPTForCausalLM(hf.OPTConfig(**values))


def test_layerdrop_is_refused_in_training_alone(
    saved: Callable[..., PretrainedModel], corpus: Any
) -> None:
    spec = saved(opt(layerdrop=0.1))
    check(spec, corpus, job_setup())
    with pytest.raises(ModelError, match=r"layerdrop 0\.1"):
        check(spec, corpus, job_setup(), training=TRAINING)


def test_layers_that_cannot_be_matched(saved: Callable[..., PretrainedModel], corpus: Any) -> None:
    spec = saved(opt(word_embed_proj_dim=8))
    check(spec, corpus, job_setup(), layers=(0,))
    with pytest.raises(ModelError, match="whose layer 1 gives states of shape"):
        check(spec, corpus, job_setup(), layers=(0, 1))


def test_a_family_that_looks_across_documents(
    saved: Callable[..., PretrainedModel], corpus: Any
) -> None:
    spec = saved(opt())
    check(spec, corpus, job_setup())
    with pytest.raises(ModelError, match=r"windows\.attention=document"):
        check(spec, corpus, job_setup(documents=True))
    check(saved(), corpus, job_setup(documents=True))


def test_a_family_that_does_not_run_in_the_jobs_precision(
    saved: Callable[..., PretrainedModel], corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = hf.LlamaForCausalLM.forward

    def only_fp32(self: Any, *args: Any, **options: Any) -> Any:
        if self.dtype != torch.float32:
            raise RuntimeError("expected m1 and m2 to have the same dtype")
        return forward(self, *args, **options)

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", only_fp32)
    with pytest.raises(ModelError, match=r"does not run in bfloat16 \(expected m1 and m2"):
        check(saved(), corpus, job_setup())


def test_other_splits_of_the_same_vocabulary_are_said(
    saved: Callable[..., PretrainedModel], corpus: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spec = saved()
    with caplog.at_level("WARNING", "babyllama_ds"):
        check(spec, corpus, job_setup())
    assert not caplog.records
    path = Path(spec.path) / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    start = text.index('"merges": [') + len('"merges": [')
    path.write_text(text[:start] + text[text.rindex("]") :], encoding="utf-8")  # none is left
    with caplog.at_level("WARNING", "babyllama_ds"):
        check(spec, corpus, job_setup())
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("teachers.a.model: its tokenizer has the job's vocabulary, but splits")
    assert "b' the'" in said


@pytest.mark.parametrize(
    ("max_tokens", "cache", "told"),
    [
        (100 * 64, "hidden", False),  # an epoch is the whole cache
        (99 * 64, "hidden", True),
        (99 * 64, "none", False),
        (None, "hidden", False),
    ],
)
def test_a_cache_of_windows_that_are_never_seen_is_told_of(
    max_tokens: int | None,
    cache: str,
    told: bool,
    corpus: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes = ["windows.offsets=fixed", f"distillation.cache={cache}"]
    changes += ["student.training.batch_windows=1", "student.training.warmup_steps=0"]
    if max_tokens is not None:
        changes.append(f"student.training.max_tokens={max_tokens}")
    windows = SimpleNamespace(num_windows=100, num_distinct=100, length=64)
    setup = SimpleNamespace(
        job=load_job(find_job("nursery"), changes), windows=lambda _corpus, seed: windows
    )
    with caplog.at_level("WARNING", "babyllama_ds"):
        checks._tell_of_a_cache_too_large(setup, corpus)
    expected = "filled with all 100 windows, of which student.training shows 99"
    assert [expected in line for line in caplog.messages] == [True] * told


def test_of_a_larger_vocabulary_no_more_ids_differ_than_there_are(tmp_path: Path) -> None:
    for name, size in (("ours", 262), ("theirs", 268)):
        spec = TrainedTokenizer(kind="bpe", vocab_size=size)
        train_tokenizer(spec, iter(["the little dog sees the little ball"] * 9), tmp_path / name)
    corpus: Any = SimpleNamespace(tokenizer=load_tokenizer(str(tmp_path / "ours")))
    loaded = PretrainedModel(kind="pretrained", path=str(tmp_path / "theirs"))
    with pytest.raises(ModelError, match="a vocabulary that differs in 6 of 268 ids"):
        checks._check_vocabulary(loaded, corpus, where="student.model")
