"""What cannot fit is refused with what would; each piece of advice is planned anew here too."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

from babyllama_ds.errors import JobError, MachineError
from babyllama_ds.plan import machines
from babyllama_ds.plan.planned import Plan, Question
from babyllama_ds.plan.planner import plan_job
from babyllama_ds.plan.rates import Rate, read_rate
from babyllama_ds.plan.remedies import check_fits
from babyllama_ds.spec.job import JobSpec

Reload = Callable[[Sequence[str]], JobSpec]
LARGE = (
    "student.model={kind: llama, hidden_size: 960, num_layers: 32, num_heads: 15, "
    "num_kv_heads: 5, intermediate_size: 2560, max_positions: 128}"
)


@pytest.fixture
def refused(
    tmp_path: Path, reload_nursery: Callable[[Sequence[str]], Reload]
) -> Callable[..., tuple[str, Reload, Question]]:
    """The text of a job's refusal, and what its advice can be tried with."""

    def make(*overrides: str, ranks: Sequence[int] = (1,), gpu: str = "L4"):
        reload = reload_nursery(overrides)
        question = Question(tokens=65_000, runs=tmp_path, gpu=gpu, ranks=ranks)
        with pytest.raises(MachineError) as caught:
            check_fits(plan_job(reload(()), question), reload)
        return str(caught.value), reload, question

    return make


def planned(reload: Reload, question: Question, overrides: Sequence[str]) -> Plan:
    return plan_job(reload(overrides), question)


def test_a_smaller_micro_batch(refused: Callable[..., tuple[str, Reload, Question]]) -> None:
    text, reload, question = refused(
        LARGE, "student.training.batch_windows=512", "student.training.warmup_steps=1"
    )
    assert text.startswith("nursery-1 on 1 rank of L4: got peaks of student ")
    assert "control " in text
    assert "expected at most 22.1 GiB, what tensors may use" in text
    assert "each of these was planned anew and fits:" in text
    advice = re.search(r"student\.training\.micro_batch=(\d+)", text)
    assert advice is not None
    micro = int(advice[1])
    for size, fits in ((micro, True), (2 * micro, False)):
        plan = planned(reload, question, [f"student.training.micro_batch={size}"])
        assert plan.fits(plan.counts[0]) is fits


def test_micro_batch_auto_is_not_refused_where_a_part_of_the_share_fits(
    tmp_path: Path, reload_nursery: Callable[[Sequence[str]], Reload]
) -> None:
    """The same job is refused with its whole share, as the tests beside this one show."""
    overrides = (LARGE, "student.training.batch_windows=512", "student.training.warmup_steps=1")
    reload = reload_nursery((*overrides, "student.training.micro_batch=auto"))
    plan = plan_job(reload(()), Question(tokens=65_000, runs=tmp_path, gpu="L4", ranks=(1,)))
    check_fits(plan, reload)
    assert 1 <= plan.counts[0].micro_batches["student"] < 512


def test_more_ranks(refused: Callable[..., tuple[str, Reload, Question]]) -> None:
    text, reload, question = refused(
        LARGE, "student.training.batch_windows=512", "student.training.warmup_steps=1"
    )
    advice = re.search(r"--ranks (\d+)  \((.*) GiB a rank\)", text)
    assert advice is not None
    more = Question(tokens=65_000, runs=question.runs, gpu="L4", ranks=(int(advice[1]),))
    plan = planned(reload, more, ())
    assert plan.fits(plan.counts[0])
    peak = max(memory.peak_bytes for memory in plan.counts[0].memory.values())
    assert advice[2] == f"{peak / 2**30:.1f}"


def test_where_nothing_helps_a_larger_card_is_what_is_left(
    refused: Callable[..., tuple[str, Reload, Question]],
) -> None:
    huge = "student.model={kind: llama, hidden_size: 4096, num_layers: 32, num_heads: 32, "
    text, _, _ = refused(huge + "intermediate_size: 11008, max_positions: 128}", ranks=(1, 2))
    assert text.startswith("nursery-1 on 2 ranks of L4: got peaks of student ")
    assert text.endswith("no change of the job's own settings was found to fit: take a larger card")


@pytest.mark.parametrize("micro_batch", ["8", "auto"])
def test_large_teachers_are_split_over_ranks(
    micro_batch: str,
    refused: Callable[..., tuple[str, Reload, Question]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two loaded teachers the one that can be, over as few of the ranks as suffice."""
    monkeypatch.setitem(machines.CARDS, "TINY", (2, 1.0))
    large = {"vocab_size": 800, "hidden_size": 1024, "num_hidden_layers": 64}
    LlamaConfig(
        **large, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=8
    ).save_pretrained(tmp_path / "a")
    GPT2Config(vocab_size=800, n_embd=64, n_layer=1, n_head=4).save_pretrained(tmp_path / "b")
    loaded = [f"{{name: {n}, model: {{kind: pretrained, path: {tmp_path / n}}}}}" for n in "ab"]
    text, reload, question = refused(
        f"teachers=[{', '.join(loaded)}]",
        f"student.training.micro_batch={micro_batch}",
        gpu="TINY",
        ranks=(4,),
    )
    (line,) = [line for line in text.splitlines() if "teachers split over ranks" in line]
    overrides = line.split("  (")[0].split()
    assert overrides[0] == "teachers.a.tensor_parallel=2"
    assert [word.split("=")[0] for word in overrides[1:]] == (
        ["student.training.micro_batch"] if micro_batch == "auto" else []
    )
    plan = planned(reload, question, overrides)
    assert plan.fits(plan.counts[0])


@pytest.mark.parametrize(
    ("remedy", "words"),
    [
        (r"student\.training\.gradient_checkpointing=true", "layers are computed twice"),
        (r"deepspeed\.config=zero2_offload", "masters and moments in the host's memory"),
    ],
)
def test_advice_is_planned(
    remedy: str, words: str, refused: Callable[..., tuple[str, Reload, Question]]
) -> None:
    """A student whose activations, or whose optimizer, are what is too much."""
    overrides = {
        "student": [LARGE, "student.training.batch_windows=512", "student.training.warmup_steps=1"],
        "deepspeed": [
            LARGE.replace("num_layers: 32", "num_layers: 140"),
            "student.training.micro_batch=1",
        ],
    }[remedy.split("\\.")[0]]
    text, reload, question = refused(*overrides)
    (line,) = [line for line in text.splitlines() if words in line]
    advice = [word for word in line.split("  (")[0].split() if "=" in word]
    assert re.search(remedy, line)
    plan = planned(reload, question, [*advice])
    assert plan.fits(plan.counts[0])


def test_offloading_is_not_advised_in_place_of_a_configuration_of_ones_own(
    refused: Callable[..., tuple[str, Reload, Question]],
) -> None:
    text, _, _ = refused(
        LARGE.replace("num_layers: 32", "num_layers: 140"),
        "student.training.micro_batch=1",
        "deepspeed.config=zero2_cuda",
    )
    assert "zero2_offload" not in text


def test_a_cache_takes_large_teachers_off_the_card(
    refused: Callable[..., tuple[str, Reload, Question]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two loaded teachers of 0.7 GB each; the student trains in a fraction of that."""
    monkeypatch.setitem(machines.CARDS, "TINY", (1, 1.0))
    LlamaConfig(
        vocab_size=800,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    ).save_pretrained(tmp_path)
    loaded = f"model: {{kind: pretrained, path: {tmp_path}}}"
    teachers = f"teachers=[{{name: a, {loaded}}}, {{name: b, {loaded}}}]"
    # No more phases than epochs: the others would be computed for nothing.
    short, _, _ = refused(teachers, "student.training.epochs=1.5", gpu="TINY")
    assert "distillation.cache_tier=disk windows.offsets={phases: 2}" in short
    text, reload, question = refused(teachers, gpu="TINY")
    advice = "distillation.cache=hidden distillation.cache_tier=disk windows.offsets={phases: 4}"
    assert advice in text
    assert "micro_batch" not in text  # it would not help
    overrides = re.findall(r"distillation\.\S+|windows\.offsets=\{phases: \d\}", advice)
    assert len(overrides) == 3
    plan = planned(reload, question, overrides)
    assert plan.fits(plan.counts[0])


def test_attention_that_keeps_its_probabilities_is_advised_against(
    refused: Callable[..., tuple[str, Reload, Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are what is too much; and of a job without them it is not said."""
    monkeypatch.setitem(machines.CARDS, "TINY", (1, 1.0))
    long = (
        "windows.length=1024",
        "student.model={kind: llama, hidden_size: 64, num_layers: 4, num_heads: 16, "
        "intermediate_size: 64, max_positions: 1024, attention: KERNEL}",
        "student.training={batch_windows: 8, micro_batch: 8, epochs: 1, learning_rate: 1e-3}",
        "control=null",
        "teachers=[{name: a, model: {kind: llama, hidden_size: 64, num_layers: 1, num_heads: 1, "
        "intermediate_size: 64, max_positions: 1024}, training: "
        "{batch_windows: 8, micro_batch: 1, epochs: 1, learning_rate: 1e-3}}]",
    )
    text, reload, question = refused(*(o.replace("KERNEL", "eager") for o in long), gpu="TINY")
    (line,) = [line for line in text.splitlines() if "no S × S probabilities are kept" in line]
    advice = line.removeprefix("    hint:").split("  (")[0].split()
    assert "student.model.attention=sdpa" in advice
    plan = planned(reload, question, advice)
    assert plan.fits(plan.counts[0])
    large = (LARGE, "student.training.batch_windows=512", "student.training.warmup_steps=1")
    assert "attention=sdpa" not in refused(*large)[0]


def test_nothing_is_refused_where_no_machine_was_named(
    tmp_path: Path, reload_nursery: Callable[[Sequence[str]], Reload]
) -> None:
    reload = reload_nursery((LARGE, "student.training.batch_windows=4096", "deepspeed.device=cpu"))
    job = reload(("student.training.warmup_steps=0",))
    check_fits(plan_job(job, Question(tokens=65_000, runs=tmp_path)), reload)


def test_one_rank_count_that_fits_is_enough(
    tmp_path: Path, reload_nursery: Callable[[Sequence[str]], Reload]
) -> None:
    reload = reload_nursery(
        (LARGE, "student.training.batch_windows=512", "student.training.warmup_steps=1")
    )
    plan = plan_job(reload(()), Question(tokens=65_000, runs=tmp_path, gpu="L4", ranks=(1, 16)))
    assert [plan.fits(count) for count in plan.counts] == [False, True]
    check_fits(plan, reload)


def test_a_rank_count_that_cannot_be_does_not_fit(
    refused: Callable[..., tuple[str, Reload, Question]],
) -> None:
    text, _, _ = refused(
        *(LARGE, "student.training.batch_windows=512", "student.training.warmup_steps=1"),
        ranks=(1, 7),
    )
    assert text.startswith("nursery-1 on 1 rank of L4: got peaks of student ")


# -- machines and rates ----------------------------------------------------------------------------


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(JobError) as caught:
        machines.find_machine("V1000", "auto")
    assert str(caught.value).startswith("--gpu: got 'V1000', expected one of A10, A100-40, ")
    assert "or here for this machine" in str(caught.value)


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "rtx-4090"])
def test_cards_are_found_however_they_are_written(name: str) -> None:
    assert machines.find_machine(name, "auto").name == "RTX4090"
    assert machines.find_machine("A100-80GB", "cuda").name == "A100-80"


def test_a_card_for_a_job_on_the_cpu_is_refused() -> None:
    with pytest.raises(JobError) as caught:
        machines.find_machine("L4", "cpu")
    assert str(caught.value) == (
        "--gpu: got 'L4' for a job on the CPU, "
        "expected a job whose deepspeed.device is auto or cuda\n"
        "    hint: --gpu here plans for this machine's memory"
    )


def test_cuda_is_planned_for_without_being_there() -> None:
    assert machines.find_machine(None, "cuda").device == "cuda"


def test_here_must_have_what_the_job_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(MachineError, match=r"deepspeed\.device: got 0 CUDA devices"):
        machines.find_machine("here", "cuda")


class ThisCard:
    """A card of 16 GiB without bf16."""

    name, total_memory = "Card", 16 << 30


def test_a_card_here_without_bf16_is_refused(
    reload_nursery: Callable[[Sequence[str]], Reload],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: ThisCard)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    question = Question(tokens=65_000, runs=tmp_path, gpu="here", ranks=(1,))
    with pytest.raises(MachineError, match=r"a card of compute capability 7\.5, which has none"):
        plan_job(reload_nursery(())(()), question)


def test_what_does_not_fit_the_card_here_is_refused(
    refused: Callable[..., tuple[str, Reload, Question]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(ThisCard, "total_memory", 2 << 30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: ThisCard)
    told, *_ = refused(LARGE, gpu="here")
    assert "student" in told


def test_ranks_of_a_cpu_share_its_memory() -> None:
    here = machines.find_machine("here", "cpu")
    one, four = here.usable_bytes(1), here.usable_bytes(4)
    assert one is not None
    assert four is not None
    assert four == one // 4


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("25000", Rate(25_000, "tok/s")),
        ("25,000 tok/s", Rate(25_000, "tok/s")),
        ("2.5e4tokens/s", Rate(25_000, "tok/s")),
        ("40TFLOP/s", Rate(40e12, "FLOP/s")),
        ("40e12 FLOP/s", Rate(40e12, "FLOP/s")),
        ("1.5 pflops", Rate(1.5e15, "FLOP/s")),
        ("3_000 kFLOP/s", Rate(3e6, "FLOP/s")),
        ("3 MFLOP/s", Rate(3e6, "FLOP/s")),
        ("3 GFLOP/s", Rate(3e9, "FLOP/s")),
    ],
)
def test_rates(text: str, rate: Rate) -> None:
    assert read_rate(text) == rate


def test_a_rate_in_words() -> None:
    assert str(Rate(25_000, "tok/s")) == "25,000 tokens/s of the student's training"
    assert str(Rate(40e12, "FLOP/s")) == "40 TFLOP/s"


@pytest.mark.parametrize(
    "text", ["", "fast", "0", "-3", "3 apples", "1e3 TFLOP/h", "1e999", "1e300 PFLOP/s"]
)
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(JobError) as caught:
        read_rate(text)
    assert str(caught.value).startswith(f"--rate: got {text!r}, expected tokens per second")
    assert "divide by them" in str(caught.value)
