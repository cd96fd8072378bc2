"""What a model says: the likeliest words without sampling, the same words again with a seed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from babyllama_ds import cli
from babyllama_ds.corpus.tokenizer import load_tokenizer, train_tokenizer
from babyllama_ds.errors import HubError, ModelError
from babyllama_ds.evaluation.generate import Sampling, generate
from babyllama_ds.spec.corpus import TrainedTokenizer
from babyllama_ds.store import STORE_LOST

CPU = torch.device("cpu")
GREEDY = Sampling(tokens=12, temperature=0.0)
VOCAB = 288


def lines() -> Iterator[str]:
    words = ("the", "little", "dog", "sees", "a", "red", "ball", "and", "runs", "to", "it")
    return (" ".join(words[(3 * i + j * j) % len(words)] for j in range(8)) for i in range(200))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model_dir(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run's student: a model of random weights with a tokenizer beside it."""
    directory = tmp_path_factory.mktemp(request.param) / "student"
    train_tokenizer(TrainedTokenizer(kind="bpe", vocab_size=VOCAB), lines(), directory)
    tiny_model(request.param, vocab_size=VOCAB, eos_token_id=2).save_pretrained(directory)
    return directory


def test_without_sampling_it_is_the_likeliest_token_each_time(model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    (text,) = generate(str(model_dir), ["the little"], GREEDY, device=CPU)
    tokenizer = load_tokenizer(str(model_dir))
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = tokenizer("the little").input_ids
    for _ in range(GREEDY.tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))  # no cache of keys
        if ids[-1] == 2:
            break
    assert f" {text}" == tokenizer.decode(ids, skip_special_tokens=True)
    assert text.startswith("the little")  # without the space that the tokenizer puts before it
    (spaced,) = generate(str(model_dir), [" the little"], GREEDY, device=CPU)
    assert spaced.startswith(" the little")


def test_a_seed_gives_the_same_texts_again(model_dir: Path) -> None:
    def texts(seed: int) -> list[str]:
        sampling = Sampling(tokens=20, number=3, seed=seed)
        return list(generate(str(model_dir), ["the dog", "a red"], sampling, device=CPU))

    first = texts(1)
    assert len(first) == 6
    assert len(set(first)) > 2
    assert texts(1) == first != texts(2)


def test_a_run_stands_for_its_student(model_dir: Path) -> None:
    of_run = list(generate(str(model_dir.parent), ["the"], GREEDY, device=CPU))
    assert of_run == list(generate(str(model_dir), ["the"], GREEDY, device=CPU))


def test_a_prompt_that_leaves_no_room_is_refused(model_dir: Path) -> None:
    with pytest.raises(ModelError) as caught:
        list(generate(str(model_dir), ["the"], replace(GREEDY, tokens=128), device=CPU))
    (problem,) = caught.value.problems
    assert problem.where == "PROMPT"
    assert problem.expected == "at most 128 together, the positions of the model"
    assert "--tokens" in (problem.hint or "")


def test_several_texts_without_sampling_are_refused(model_dir: Path) -> None:
    with pytest.raises(ModelError, match="--number: got 2 at temperature 0, expected 1"):
        list(generate(str(model_dir), ["the"], replace(GREEDY, number=2), device=CPU))


def test_an_empty_prompt_is_refused(model_dir: Path) -> None:
    with pytest.raises(ModelError, match="no tokens"):
        list(generate(str(model_dir), [""], GREEDY, device=CPU))


def test_a_name_that_is_none_is_told_to_be_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"no such directory here; .* expected a causal language"):
        list(generate("runs/no-such-run", ["the"], GREEDY, device=CPU))


def test_a_directory_without_a_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing: no such directory, expected a causal language"):
        list(generate(str(tmp_path / "nothing"), ["the"], GREEDY, device=CPU))
    load_tokenizer(str(model_dir)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a directory without config"):
        list(generate(str(tmp_path), ["the"], GREEDY, device=CPU))


def test_the_command(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--tokens", "12", "--temperature", "0", str(model_dir), "the little"]
    assert cli.main(words) == 0
    out, _ = capsys.readouterr()
    assert out == next(generate(str(model_dir), ["the little"], GREEDY, device=CPU)) + "\n"
    assert cli.main([*words, "a"]) == 0
    of_two = generate(str(model_dir), ["the little", "a"], GREEDY, device=CPU)
    assert capsys.readouterr().out == "\n\n".join(of_two) + "\n"
    assert cli.main(["generate", str(model_dir / "no"), "the"]) == 2
    assert "MODEL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "-1"), ("--temperature", "inf"), ("--top-p", "0"), ("--top-p", "1.1")],
)
def test_numbers_out_of_range_are_usage_errors(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "MODEL", "the", f"{option}={value}"])
    assert caught.value.code == 2
    assert f"argument {option}: got '{value}', expected a number" in capsys.readouterr().err


def test_what_is_no_model_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: early\n")
    with pytest.raises(ModelError, match="a run without a student yet") as caught:
        list(generate(str(tmp_path), ["the"], GREEDY, device=CPU))
    assert "teachers/NAME" in (caught.value.problems[0].hint or "")
    (tmp_path / "teachers").mkdir()
    teacher = tmp_path / "teachers" / "big"
    teacher.symlink_to("../../store/teachers/key")
    with pytest.raises(ModelError, match=r"a link to \.\./\.\./store/teachers/key") as caught:
        list(generate(str(teacher), ["the"], GREEDY, device=CPU))
    assert caught.value.problems[0].hint == STORE_LOST
    (tmp_path / "run.tar").touch()
    with pytest.raises(ModelError, match="a file, expected a directory") as caught:
        list(generate(str(tmp_path / "run.tar"), ["the"], GREEDY, device=CPU))
    assert "unpack it" in (caught.value.problems[0].hint or "")


def test_a_length_that_the_model_names_makes_way(
    model_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else transformers warns at every prompt."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    path = copy / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_length": 5}))
    assert list(generate(str(copy), ["the"], GREEDY, device=CPU)) == list(
        generate(str(model_dir), ["the"], GREEDY, device=CPU)
    )
    assert "max_length" not in caplog.text
