"""An exported model works where this package is not, and nothing half-made is ever left."""

from __future__ import annotations

import json
import logging
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from babyllama_ds import cli, files
from babyllama_ds.errors import RunError
from babyllama_ds.evaluation.generate import Sampling, generate
from babyllama_ds.export import model as model_module
from babyllama_ds.export.finished import open_finished
from babyllama_ds.export.model import CardFacts, export_model_dir
from babyllama_ds.store import STORE_LOST

NOTHING_TOLD = CardFacts()
STRANGER = r"""
import contextlib, io, json, os, re, sys

for name in ("babyllama_ds", "deepspeed"):
    sys.modules[name] = None

import logging
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

messages = []
keeper = logging.Handler(logging.WARNING)
keeper.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("transformers").addHandler(keeper)
result = {}
for directory in sys.argv[1:]:
    generator = pipeline("text-generation", model=directory)
    torch.manual_seed(1)
    (written,) = generator("the little dog", min_length=128, return_tensors=True)
    tokenizer = generator.tokenizer
    model = generator.model
    ids = tokenizer("the little dog", return_tensors="pt").input_ids
    result[directory] = {
        "text": tokenizer.decode(written["generated_token_ids"]),
        "tokens": len(written["generated_token_ids"]),
        "model_max_length": tokenizer.model_max_length,
        "special": [model.generation_config.pad_token_id, model.generation_config.eos_token_id],
        "of_tokenizer": [tokenizer.pad_token_id, tokenizer.eos_token_id],
        "dtype": str(model.dtype),
        "modules": sorted({type(module).__module__ for module in model.modules()}),
        "logits": model(ids).logits.float().sum().item(),
    }
# The card's code, as it stands there, from where it stands.
os.chdir(sys.argv[1])
blocks = re.findall(r"```python\n(.*?)```", open("README.md").read(), flags=re.DOTALL)
with contextlib.redirect_stdout(io.StringIO()) as printed:
    for block in blocks:
        exec(block, {})
assert not any(name.startswith(("babyllama_ds.", "deepspeed.")) for name in sys.modules)
facts = {"blocks": len(blocks), "printed": printed.getvalue(), "messages": messages}
print(json.dumps({**facts, "models": result}))
"""


def export(run_dir: Path, model: str, target: Path, facts: CardFacts = NOTHING_TOLD) -> Path:
    export_model_dir(open_finished(run_dir), model, target, facts)
    return target


def python_elsewhere(script: str, *words: object, folder: Path) -> str:
    """Run without this package: no PYTHONPATH, no current directory, no user's packages."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pipeline_works_without_this_package(run_dir: Path, tmp_path: Path) -> None:
    models = {"student": "student", "gpt2": "teachers/gpt2"}
    places = {name: export(run_dir, part, tmp_path / name) for name, part in models.items()}
    told = python_elsewhere(STRANGER, *places.values(), folder=tmp_path)
    found = json.loads(told.splitlines()[-1])
    for name, part in models.items():
        seen = found["models"][str(places[name])]
        assert seen["text"].strip().startswith("the little dog")
        assert seen["tokens"] == 128  # it was asked for no fewer, and the model has no more
        assert seen["model_max_length"] == 128
        assert seen["special"] == seen["of_tokenizer"] == [0, 2]
        assert seen["dtype"] == "torch.bfloat16"
        assert all(re.match("torch|transformers", module) for module in seen["modules"])
        original = AutoModelForCausalLM.from_pretrained(run_dir / part)
        ids = torch.tensor([ids_of(run_dir, "the little dog")])
        assert original(ids).logits.float().sum().item() == pytest.approx(seen["logits"], rel=1e-3)
    assert found["messages"] == []
    assert found["blocks"] == 2
    assert found["printed"].count("The little dog") == 2


def ids_of(run_dir: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(run_dir / "tokenizer" / "tokenizer.json")).encode(text).ids


def test_nothing_in_it_is_of_this_package_or_machine(run_dir: Path, tmp_path: Path) -> None:
    directory = export(run_dir, "student", tmp_path / "out")
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not any("attn_implementation" in key or key == "auto_map" for key in config)
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    for path in directory.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content
        assert path.suffix == ".md" or b"babyllama" not in content


def test_every_file_is_in_the_manifest_and_none_is_a_pickle(run_dir: Path, tmp_path: Path) -> None:
    directory = export(run_dir, "teachers/gpt2", tmp_path / "out")
    manifest = files.verify_manifest(directory)
    names = {path.name for path in directory.iterdir()}
    assert names == {*manifest.files, "manifest.json"}
    assert {Path(name).suffix for name in names} == {".json", ".safetensors", ".md"}
    source = files.read_manifest(run_dir / "teachers" / "gpt2")
    assert source is not None
    assert manifest.files["model.safetensors"] == source.files["model.safetensors"]
    assert manifest.fingerprint == source.fingerprint
    assert files.read_json(directory / "manifest.json")["model"] == "teachers/gpt2"


def test_a_model_of_an_older_run_is_told_its_length(run_dir: Path, tmp_path: Path) -> None:
    path = run_dir / "student" / "generation_config.json"
    older = {k: v for k, v in json.loads(path.read_text()).items() if k != "max_length"}
    path.write_text(json.dumps(older))
    files.write_manifest(run_dir / "student", fingerprint="older")
    directory = export(run_dir, "student", tmp_path / "out")
    assert json.loads((directory / "generation_config.json").read_text())["max_length"] == 128


@pytest.mark.parametrize("part", ["student", "teachers/gpt2"])
def test_weights_in_fp32_are_the_same_values(run_dir: Path, tmp_path: Path, part: str) -> None:
    """Loaded as it was saved, the model then computes in fp32, as when it is cast on loading."""
    wide = export(run_dir, part, tmp_path / "wide", CardFacts(float32=True))
    saved = AutoModelForCausalLM.from_pretrained(wide)
    cast = AutoModelForCausalLM.from_pretrained(run_dir / part, dtype=torch.float32)
    assert saved.dtype == torch.float32
    ids = torch.arange(30)[None]
    assert torch.equal(saved(ids).logits, cast(ids).logits)
    facts = (wide / "model.safetensors").stat()
    assert facts.st_mode == (wide / "config.json").stat().st_mode
    assert facts.st_size > 1.9 * (run_dir / part / "model.safetensors").stat().st_size
    manifest = files.verify_manifest(wide)
    assert manifest.files["model.safetensors"].bytes == facts.st_size
    ours = (run_dir / part / "manifest.json").read_text()
    digest = json.loads(ours)["files"]["model.safetensors"]["sha256"]
    card = (wide / "README.md").read_text()
    assert f"| model.safetensors sha256 before the cast to fp32 | {digest}" in re.sub(
        " +", " ", card
    )


def test_the_index_of_several_files_tells_their_size_in_fp32(run_dir: Path, tmp_path: Path) -> None:
    """As transformers writes it for the same model in fp32."""
    student = run_dir / "student"
    (student / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(run_dir / "control")
    model.save_pretrained(student, max_shard_size="20KB")
    files.write_manifest(student, fingerprint="student")
    model.float().save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    wide = export(run_dir, "student", tmp_path / "wide", CardFacts(float32=True))
    assert len([*wide.glob("*.safetensors")]) > 1
    name = "model.safetensors.index.json"
    assert files.read_json(wide / name) == files.read_json(tmp_path / "theirs" / name)
    saved = AutoModelForCausalLM.from_pretrained(wide)
    ids = torch.arange(30)[None]
    assert torch.equal(saved(ids).logits, model(ids).logits)


def test_a_copy_has_the_weights_that_were_proved_whole(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def flip(source: Path, target: Path) -> None:
        copy(source, target)
        if target.suffix == ".safetensors":
            content = bytearray(target.read_bytes())
            content[-1] ^= 1
            target.write_bytes(content)

    monkeypatch.setattr(model_module.shutil, "copyfile", flip)
    with pytest.raises(RunError, match=r"model\.safetensors: got SHA-256 \w+ in the copy"):
        export(run_dir, "student", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_copy_in_fp32_is_compared_with_what_was_proved_whole(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = model_module.save_file

    def flip(weights: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        first = next(iter(weights.values()))
        first.view(-1)[0] += 1
        write(weights, path, **options)

    monkeypatch.setattr(model_module, "save_file", flip)
    with pytest.raises(RunError, match=r"other values of .* in the copy"):
        export(run_dir, "student", tmp_path / "wide", CardFacts(float32=True))
    assert not (tmp_path / "wide").exists()


def test_it_speaks(
    run_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    greedy = Sampling(tokens=8, temperature=0.0)
    cpu = torch.device("cpu")
    directory = export(run_dir, "student", tmp_path / "out")
    (exported,) = generate(str(directory), ["the little"], greedy, device=cpu)
    (original,) = generate(str(run_dir), ["the little"], greedy, device=cpu)
    assert exported == original
    assert "max_length" not in caplog.text


# -- the card -------------------------------------------------------------------------------------


def test_the_cards_front_matter_is_the_hubs(run_dir: Path, tmp_path: Path) -> None:
    facts = CardFacts(license_id="mit", language="da", place="org/name")
    directory = export(run_dir, "student", tmp_path / "out", facts)
    card = ModelCard.load(directory / "README.md")
    assert card.data.license == "mit"
    assert card.data.language == "da"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.model_name == "nursery-1: student"
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    dev = "the development text of the run (nursery)"
    assert measured == {
        (dev, "cross_entropy"): 4.25,
        (dev, "perplexity"): 2.0,
        (dev, "bits_per_byte"): 1.5,
        ("nursery (minimal pairs)", "accuracy"): 0.625,
    }
    assert 'model="org/name"' in card.text
    assert "`mit`, as whoever published the model says." in card.text


def test_the_card_has_the_text_the_recipe_and_the_weights(run_dir: Path, tmp_path: Path) -> None:
    directory = export(run_dir, "student", tmp_path / "out")
    card = ModelCard.load(directory / "README.md")
    assert card.data.language == "en"  # the nursery is written here
    assert card.data.license is None
    index = json.loads((run_dir / "tokens" / "shards.json").read_text())["splits"]
    rows = dict(re.findall(r"^\| ([^|]+?) +\| +([\d,]+) ", card.text, flags=re.MULTILINE))
    of_talk = [d["stop"] - d["start"] for d in index["train"]["domains"] if d["domain"] == "talk"]
    assert rows["talk"] == f"{sum(of_talk):,}"
    assert rows["all"] == f"{index['train']['tokens']:,}"
    assert rows["words (by whitespace)"] == f"{3 * 200 * 8:,}"
    digest = files.sha256_file(directory / "model.safetensors")
    assert "| model.safetensors sha256 " in card.text
    assert digest in card.text
    assert "For one token that is 0.5 CE + 0.5 KL." in card.text
    assert "Teachers: gpt2 (gpt2, " in card.text
    assert "4 steps in 3.5 s on 2 cpu ranks." in card.text
    assert "| learning_rate " in card.text
    assert "None is claimed here" in card.text
    assert "@misc{babyllama_ds," in card.text


def test_a_text_of_others_has_no_language_unless_told(run_dir: Path) -> None:
    from babyllama_ds.report.card import render_model_card

    report = dict(open_finished(run_dir).report)
    report["job"] = {**report["job"], "corpus": {"kind": "files", "cleaning": "babylm"}}
    assert ModelCard(render_model_card(report, "student")).data.language is None
    told = render_model_card(report, "student", language="is")
    assert ModelCard(told).data.language == "is"
    assert "cleaned by BabyLlama's rules" in told


def test_what_a_run_does_not_know_is_left_out(run_dir: Path, tmp_path: Path) -> None:
    for path in (run_dir / "evaluation").iterdir():
        path.unlink()
    directory = export(run_dir, "student", tmp_path / "out")
    card = ModelCard.load(directory / "README.md")
    assert card.data.eval_results is None
    assert "Not evaluated." in card.text


# -- what is refused ------------------------------------------------------------------------------


def refused(run_dir: Path, model: str, target: Path) -> Any:
    """The problem of an export that is refused and leaves nothing behind."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(RunError) as caught:
        export(run_dir, model, target)
    assert sorted(target.parent.iterdir()) == before
    return caught.value.problems[0]


@pytest.mark.parametrize("name", ["teachers/gtp2", "gpt2"])
def test_an_unknown_model(name: str, run_dir: Path, tmp_path: Path) -> None:
    problem = refused(run_dir, name, tmp_path / "out")
    assert (problem.where, problem.got) == ("--model", repr(name))
    assert problem.expected == "one of student, control, teachers/gpt2, teachers/llama"
    assert problem.hint == "did you mean `teachers/gpt2`?"


@pytest.mark.parametrize(
    ("state", "got", "hint"),
    [
        ({"status": "running"}, "a run that is running", "wait for it"),
        ({"status": "stopped"}, "a run that is stopped", "it goes on"),
        ({"status": "failed"}, "a run that is failed", "it goes on"),
        (None, "no state.json", "<runs>/<job name>"),
    ],
)
def test_a_run_that_is_not_done(
    run_dir: Path, tmp_path: Path, state: object, got: str, hint: str
) -> None:
    path = run_dir / "state.json"
    path.unlink() if state is None else path.write_text(json.dumps(state))
    problem = refused(run_dir, "student", tmp_path / "out")
    assert (problem.where, problem.got) == (str(run_dir), got)
    assert hint in problem.hint


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "none", "student", tmp_path / "out").got == "no such directory"


def test_a_teacher_whose_store_is_gone(run_dir: Path, tmp_path: Path) -> None:
    (run_dir.parent / "store").rename(run_dir.parent / "elsewhere")
    problem = refused(run_dir, "teachers/llama", tmp_path / "out")
    assert problem.where == str(run_dir / "teachers" / "llama")
    assert problem.got == "a link to ../../store/teachers/llama, which is not there"
    assert problem.hint == STORE_LOST
    export(run_dir, "student", tmp_path / "out")  # it lies in the run


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model(run_dir: Path, tmp_path: Path, name: str) -> None:
    path = run_dir / "student" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    problem = refused(run_dir, "student", tmp_path / "out")
    assert problem.where == str(path)
    assert problem.got.startswith("SHA-256")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "code.py", "more/config.json"])
def test_a_file_of_another_kind_is_not_given_away(run_dir: Path, tmp_path: Path, name: str) -> None:
    path = run_dir / "student" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x80\x04.")
    files.write_manifest(run_dir / "student", fingerprint="other")
    assert refused(run_dir, "student", tmp_path / "out").where == str(path)


def test_a_file_beside_the_manifest_stays_where_it_is(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "student" / "notes.txt").write_text("mine")
    (run_dir / "student" / "optimizer.pt").write_bytes(b"\x80\x04.")
    directory = export(run_dir, "student", tmp_path / "out")
    assert not {"notes.txt", "optimizer.pt"} & {path.name for path in directory.iterdir()}


def test_nothing_is_written_over(run_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    export(run_dir, "student", target)  # an empty folder is as good as none
    problem = refused(run_dir, "student", target)
    assert (problem.where, problem.got) == (str(target), "something that exists")
    assert refused(run_dir, "student", run_dir / "student").got == "a place inside the run"


def test_a_disk_that_fills(run_dir: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a full disk would
    try:
        problem = refused(run_dir, "student", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert problem.got == "File too large while writing it"
    assert "nothing was left here" in problem.hint


# -- the command ----------------------------------------------------------------------------------


def test_the_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(run_dir), "--model", "control", "--to", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "# nursery-1: control" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            [],
            "export: got no place for it, "
            "expected --to DIR, --push ORG/NAME, --bundle PATH or --results DIR",
        ),
        (["--bundle", "b", "--model", "control"], "--model: got no --to or --push"),
        (["--to", "d", "--private"], "--private: got no --push"),
        (["--to", "d", "--replace"], "--replace: got no --push"),
        (["--bundle", "b", "--license", "mit"], "--license: got no --to or --push"),
        (["--push", "name"], "--push: got 'name', expected ORG/NAME"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(
    run_dir: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run_dir), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err


@pytest.mark.parametrize("place", ["model", "student/model", "tokens/model", "teachers/gpt2/model"])
def test_a_place_inside_the_run(
    run_dir: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a folder of it is a link, the model would lie in the store."""
    assert cli.main(["export", str(run_dir), "--to", str(run_dir / place)]) == 2
    assert "got a place inside the run, expected one outside of it" in capsys.readouterr().err
    assert not (run_dir / place).exists()


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (["--to", "a", "--bundle", "a"], "--bundle: got a, where --to puts something else"),
        (["--to", "a/b", "--bundle", "a"], "--bundle: got a, where --to puts something else"),
        (["--results", "a", "--to", "a/b"], "--to: got a/b, where --results puts something else"),
        (["--to", "a", "--bundle", "taken"], "taken: got something that exists"),
        (["--to", "a", "--bundle", "b.zip"], "--bundle: got b.zip, expected a directory"),
        (["--to", "file/a"], "file/a: got a place below file, a file"),
    ],
    ids=" ".join,
)
def test_places_are_refused_before_anything_is_written(
    run_dir: Path,
    tmp_path: Path,
    places: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    (tmp_path / "file").write_text("")
    assert cli.main(["export", str(run_dir), *places]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert not (tmp_path / "a").exists()
