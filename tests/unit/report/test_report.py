from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from babyllama_ds.errors import RunError
from babyllama_ds.report.card import render_model_card
from babyllama_ds.report.collect import collect_report
from babyllama_ds.report.formatting import count, duration, number, percent, table
from babyllama_ds.report.markdown import render_markdown
from babyllama_ds.report.write import write_report
from babyllama_ds.spec.resolved import dump_values

TRAINING = {
    "batch_windows": 32,
    "epochs": 6.0,
    "learning_rate": 0.0007,
    "schedule": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.1,
}


def make_job(**changes):
    job = {
        "name": "demo-{seed}",
        "seed": 11,
        "corpus": {"kind": "nursery", "words": 150000},
        "windows": {"length": 128, "offsets": "random"},
        "teachers": [
            {"name": "wide", "model": {"kind": "gpt2"}, "training": TRAINING},
            {"name": "deep", "model": {"kind": "llama"}, "training": TRAINING},
        ],
        "student": {"model": {"kind": "llama"}, "training": TRAINING},
        "control": {"training": None},
        "distillation": {
            "alpha": 0.5,
            "temperature": 2.0,
            "soft_reduction": "sequence",
            "mean_of": "logits",
            "chunk_tokens": None,
        },
    }
    return {**job, **changes}


def training(params: int, seconds: float) -> dict:
    return {
        "params": params,
        "train_tokens": 2_000_000,
        "seconds": seconds,
        "tokens_per_s": 2_000_000 / seconds,
        "flops_per_s": 8e13 / seconds,
        "mfu": 64 / seconds,
        "step_s": {"teachers": 0.02, "loss": 0.0305},
        "steps": 488,
        "planned_steps": 488,
        "ended_by": "steps",
        "kept": "best",
        "averaged": None,
        "best_dev_ce": 4.5,
        "best_step": 400,
        "final_dev_ce": 4.6,
        "runs": ["demo-11"],
        "vocab_size": 1000,
        "more": "than is shown",
    }


def evaluation(name: str, ce: float, accuracies: list[float], num_ties: int = 0) -> dict:
    tasks = {
        f"task_{index}": {
            "accuracy": accuracy,
            "pairs": 100 * (index + 1),
            "ties": num_ties,
            "term": "agreement" if index == 0 else None,
            # Right on the first pairs: the better of two is right wherever the other is.
            "outcomes": "1" * round(100 * (index + 1) * accuracy)
            + "0" * round(100 * (index + 1) * (1 - accuracy)),
        }
        for index, accuracy in enumerate(accuracies)
    }
    pairs = sum(task["pairs"] for task in tasks.values())
    return {
        "model": name,
        "params": 999,
        "dtype": "bfloat16",
        "dev": {
            "ce": ce,
            "perplexity": math.exp(ce),
            "bits_per_byte": ce / 3,
            "tokens": 1270,
            "windows": 10,
        },
        "minimal_pairs": {
            "blimp": {
                "accuracy": sum(accuracies) / len(accuracies),
                "pooled_accuracy": sum(t["accuracy"] * t["pairs"] for t in tasks.values()) / pairs,
                "tasks": tasks,
                "prefix": None,
                "leading_space": True,
            }
        },
    }


ENVIRONMENT = {
    "commit": "0123abc",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": "2 CPU cores",
    "ranks": 2,
    "zero_stage": 2,
    "device": "cpu",
    "attention": "sdpa",
    "precision": "bf16",
    "seeds": {"student": 5, "teachers/wide": 6},
    "fingerprints": {"job": "a" * 64, "tokenizer": "b" * 64, "tokens": "c" * 64},
}

METRICS = [
    {"stage": "teachers/wide", "step": 10, "loss": 5.0, "ce": 5.0, "grad_norm": 1.5},
    {"stage": "student", "step": 10, "loss": 90.0, "ce": 6.0, "kl": 0.9, "tokens_per_s": 900.0},
    {"stage": "student", "step": 20, "loss": 30.5, "ce": 5.1, "kl": 0.25, "tokens_per_s": 1234.4},
    {"stage": "student", "step": 20, "dev_ce": 4.9},
]


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "demo-11"
    run.mkdir()
    (run / "job.yaml").write_text(yaml.safe_dump(make_job()))
    write(run / "environment.json", ENVIRONMENT)
    write(run / "teachers" / "wide" / "training.json", training(3_200_000, 100.0))
    write(run / "teachers" / "deep" / "training.json", training(2_500_000, 125.0))
    write(run / "control" / "training.json", training(1_290_000, 50.0))
    write(run / "student" / "training.json", training(1_290_000, 160.0))
    write(run / "evaluation" / "wide.json", evaluation("wide", 4.683, [0.60, 0.50]))
    write(run / "evaluation" / "deep.json", evaluation("deep", 4.663, [0.64, 0.70]))
    write(run / "evaluation" / "control.json", evaluation("control", 4.654, [0.61, 0.51]))
    write(run / "evaluation" / "student.json", evaluation("student", 4.642, [0.63, 0.53]))
    lines = [json.dumps(line) for line in METRICS]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"stage": "stud')
    return run


def parsed_tables(page: str) -> list[list[list[str]]]:
    """Tables of a Markdown page as rows of cells; escaped bars stay inside their cell."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in page.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
        inside = True
        assert line.endswith("|")
        cells = line.replace("\\|", "\0").strip("|").split("|")
        tables[-1].append([cell.strip().replace("\0", "|") for cell in cells])
    return tables


def find_table(page: str, first_header: str) -> list[list[str]]:
    return next(t for t in parsed_tables(page) if t[0][0] == first_header)


# -- collecting ---------------------------------------------------------------------------------


def test_models_side_by_side(run_dir: Path) -> None:
    report = collect_report(run_dir)
    assert list(report["models"]) == ["wide", "deep", "control", "student"]
    assert [m["role"] for m in report["models"].values()] == [
        "teacher",
        "teacher",
        "control",
        "student",
    ]
    student = report["models"]["student"]
    assert student == {
        "role": "student",
        "params": 1_290_000,
        "train_tokens": 2_000_000,
        "seconds": 160.0,
        "tokens_per_s": 12_500.0,
        "flops_per_s": 5.0e11,
        "mfu": 0.4,
        "step_s": {"teachers": 0.02, "loss": 0.0305},
        "steps": 488,
        "planned_steps": 488,
        "ended_by": "steps",
        "kept": "best",
        "averaged": None,
        "best_step": 400,
        "best_dev_ce": 4.5,
        "final_dev_ce": 4.6,
        "runs": ["demo-11"],
        "dev_ce": 4.642,
        "perplexity": math.exp(4.642),
        "bits_per_byte": 4.642 / 3,
        "minimal_pairs": {"blimp": pytest.approx(0.58)},
        "minimal_pairs_standard_error": {
            "blimp": pytest.approx(0.5 * math.sqrt(0.63 * 0.37 / 99 + 0.53 * 0.47 / 199))
        },
        "fine_tuning": {},
        "fine_tuning_standard_error": {},
    }
    assert report["name"] == "demo-11"
    assert report["job"] == make_job()
    assert report["environment"] == ENVIRONMENT


def test_a_run_keeps_its_name_wherever_it_lies(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from inside, where the folder is called `.`, and copied under another name."""
    copy = tmp_path / "copied"
    shutil.copytree(run_dir, copy)
    assert collect_report(copy)["name"] == "demo-11"
    monkeypatch.chdir(copy)
    assert collect_report(Path())["name"] == "demo-11"


def test_gains_are_student_minus_the_other(run_dir: Path) -> None:
    gains = collect_report(run_dir)["gains"]
    assert "negative is better" in gains["note"]
    assert list(gains["student_minus"]) == ["control", "wide", "deep"]
    expected = {"control": (-0.012, 2.0), "wide": (-0.041, 3.0), "deep": (-0.021, -9.0)}
    for name, (dev_ce, points) in expected.items():
        gain = gains["student_minus"][name]
        assert gain["dev_ce"] == pytest.approx(dev_ce)
        assert gain["minimal_pairs_points"] == {"blimp": pytest.approx(points)}
    # They differ on 2 of 100 pairs and on 4 of 200.
    error = 100 * 0.5 * math.sqrt(0.02 * 0.98 / 99 + 0.02 * 0.98 / 199)
    over_control = gains["student_minus"]["control"]["minimal_pairs_points_standard_error"]
    assert over_control == {"blimp": pytest.approx(error)}


def test_evaluations_without_outcomes_have_no_standard_errors(run_dir: Path) -> None:
    measured = evaluation("control", 4.654, [0.61, 0.51])
    for task in measured["minimal_pairs"]["blimp"]["tasks"].values():
        del task["outcomes"]
    write(run_dir / "evaluation" / "control.json", measured)
    report = collect_report(run_dir)
    assert report["models"]["control"]["minimal_pairs_standard_error"] == {"blimp": None}
    gain = report["gains"]["student_minus"]["control"]
    assert gain["minimal_pairs_points_standard_error"] == {"blimp": None}
    assert "(+2.00 points against the control)" in render_markdown(report)


@pytest.mark.parametrize(
    ("settings", "ce", "kl", "words"),
    [
        ({}, 0.5, 256.0, "weighs 512 times a nat of cross-entropy: the KL is summed over the 128"),
        ({"temperature": 1.0}, 0.5, 64.0, "weighs 128 times"),
        ({"soft_reduction": "token"}, 0.5, 2.0, "weighs 4 times a nat of cross-entropy: both are"),
        ({"alpha": 1.0}, 1.0, 0.0, "The KL has no weight"),
        ({"alpha": 0.0}, 0.0, 512.0, "The cross-entropy has no weight"),
    ],
)
def test_effective_weights_of_a_token(run_dir: Path, settings, ce, kl, words) -> None:
    distillation = {**make_job()["distillation"], **settings}
    (run_dir / "job.yaml").write_text(yaml.safe_dump(make_job(distillation=distillation)))
    report = collect_report(run_dir)
    loss = report["loss"]
    assert (loss["weight_ce"], loss["weight_kl"], loss["window_length"]) == (ce, kl, 128)
    assert words in loss["explanation"]
    assert {key: loss[key] for key in settings} == settings
    page = render_markdown(report)
    assert find_table(page, "setting")[-2:] == [
        ["weight of a token's CE", f"{ce:g}"],
        ["weight of a token's KL", f"{kl:g}"],
    ]
    assert loss["explanation"] in page


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({}, "alpha CE + (1 - alpha) T² KL(teachers ‖ student)"),
        ({"divergence": {"kind": "reverse_kl"}}, "T² KL(student ‖ teachers)"),
        (
            {"divergence": {"kind": "jensen_shannon", "beta": 0.3}},
            "T² JSD(teachers, student; beta 0.3)",
        ),
        (
            {"divergence": {"kind": "skewed_forward_kl", "skew": 0.1}},
            "KL(teachers ‖ 0.1 teachers + 0.9 student)",
        ),
        (
            {"divergence": {"kind": "skewed_reverse_kl", "skew": 0.1}},
            "KL(student ‖ 0.9 teachers + 0.1 student)",
        ),
        (
            {"hidden_matching": {"loss": "mse", "weight": 0.5, "layers": [{}, {}]}},
            "KL(teachers ‖ student) + 0.5 MSE of hidden states",
        ),
    ],
)
def test_the_loss_is_written_as_it_is(run_dir: Path, settings: dict, formula: str) -> None:
    distillation = {**make_job()["distillation"], **settings}
    (run_dir / "job.yaml").write_text(yaml.safe_dump(make_job(distillation=distillation)))
    report = collect_report(run_dir)
    assert formula in report["loss"]["formula"]
    page, card = render_markdown(report), render_model_card(report, "student")
    assert f"`{report['loss']['formula']}`" in page
    assert f"`{report['loss']['formula']}`" in card
    name = "divergence" if "divergence" in settings else "KL"
    assert f"weight of a token's {name}" in page
    assert f"nat of {'the ' * (name != 'KL')}{name} weighs 512 times" in page
    if "hidden_matching" in settings:
        assert "Hidden states of 2 pairs of layers are matched beside it" in page


def test_dollar_signs_of_a_job_are_as_they_were_given(run_dir: Path) -> None:
    """The file escapes them, and so does the job that the pages show, to be run again."""
    training = TRAINING | {"unlabelled_tokens": ["$"]}
    job = make_job(student={"model": {"kind": "llama"}, "training": training})
    (run_dir / "job.yaml").write_text(dump_values(job))
    report = write_report(run_dir)
    assert report["job"] == job
    assert "No cross-entropy where the next token is `$`." in report["loss"]["explanation"]
    page = (run_dir / "report" / "report.md").read_text()
    assert (run_dir / "job.yaml").read_text() in page


def test_schedules_z_loss_and_unlabelled_tokens_are_told(run_dir: Path) -> None:
    job = make_job()
    job["distillation"] |= {
        "alpha": {"start": 0.9, "end": 0.0, "over": 0.5, "shape": "cosine"},
        "temperature": {"start": 2.0, "end": 1.0, "over": 1.0, "shape": "linear"},
        "soft_reduction": "token",
    }
    job["student"] |= {"training": TRAINING | {"z_loss": 1e-4, "unlabelled_tokens": ["<s>", "CHI"]}}
    (run_dir / "job.yaml").write_text(yaml.safe_dump(job))
    report = collect_report(run_dir)
    loss = report["loss"]
    assert loss["formula"].endswith(" + 0.0001 (log Z)²")
    assert (loss["weight_ce"], loss["weight_kl"]) == (0.9, pytest.approx(0.4))
    assert loss["weights_at_end"] == {"ce": 0.0, "kl": 1.0}
    assert loss["explanation"].startswith(
        "At the first step: For one token, a nat of KL weighs 0.4"
    )
    assert "At the last step: The cross-entropy has no weight" in loss["explanation"]
    assert "No cross-entropy where the next token is `<s>`, `CHI`." in loss["explanation"]
    for text in (render_markdown(report), render_model_card(report, "student")):
        assert "0.9 to 0 over 50% of the steps (cosine)" in text
        assert "2 to 1 over 100% of the steps (linear)" in text
    rows = find_table(render_markdown(report), "setting")
    assert ["weight of a token's CE", "0.9 to 0"] in rows
    assert ["weight of a token's KL", "0.4 to 1"] in rows


def test_the_divergence_that_is_trained_is_in_the_last_logged_step(run_dir: Path) -> None:
    distillation = make_job()["distillation"] | {"divergence": {"kind": "reverse_kl"}}
    (run_dir / "job.yaml").write_text(yaml.safe_dump(make_job(distillation=distillation)))
    line = {"stage": "student", "step": 30, "loss": 9.0, "ce": 5.0, "reverse_kl": 0.125}
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps(line) + "\n")
    page = render_markdown(collect_report(run_dir))
    assert "divergence (nats)" in page
    assert "0.1250" in page


def test_the_times_of_a_teacher_of_another_run_are_not_this_machines(run_dir: Path) -> None:
    """Of `deep`, which this run did not train, it may have all that was logged."""
    path = run_dir / "teachers" / "deep" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"runs": ["another"]}))
    told = "deep was trained in another run, which shares it through the store"
    report = collect_report(run_dir)
    page = render_markdown(report)
    assert told in page
    assert "wide was trained in another run" not in page
    assert "on 2 cpu ranks" in render_model_card(report, "wide")
    card = render_model_card(report, "deep")
    assert "on 2 cpu ranks" not in card
    assert "488 steps in 2 min 5 s, in another run" in card
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps({"stage": "teachers/deep", "step": 1, "loss": 5.0}))
    assert told in render_markdown(collect_report(run_dir))


def test_a_teacher_of_an_earlier_version_is_of_another_run_if_nothing_of_it_is_logged(
    run_dir: Path,
) -> None:
    for name in ("wide", "deep"):
        path = run_dir / "teachers" / name / "training.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"runs": None}))
    page = render_markdown(collect_report(run_dir))
    assert "deep was trained in another run" in page
    assert "wide was trained in another run" not in page
    (run_dir / "metrics.jsonl").unlink()  # which is told as missing
    assert "was trained in another run" not in render_markdown(collect_report(run_dir))


def test_a_teacher_that_several_runs_trained_is_told_of_all_of_them(run_dir: Path) -> None:
    """Whether this one was the last of them, as of `wide`, or another, as of `deep`."""
    for name in ("wide", "deep"):
        path = run_dir / "teachers" / name / "training.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"runs": ["a", "b", "demo-11"]}))
    report = collect_report(run_dir)
    page = render_markdown(report)
    for name in ("wide", "deep"):
        told = f"{name} was trained in the runs a, b and demo-11, each of which went on where the "
        assert told in page
        card = render_model_card(report, name)
        assert "in the runs a, b and demo-11, one after another." in card
        assert "on 2 cpu ranks" not in card
    assert "in another run" not in page


def test_the_error_of_top_k_targets_is_told(run_dir: Path) -> None:
    report = collect_report(run_dir)
    assert report["topk"] is None
    assert "approximate" not in render_markdown(report)
    error = {
        "k": 64,
        "windows": 50,
        "exact_kl": 0.25,
        "topk_kl": 0.24,
        "relative_kl_error": 0.04,
        "gradient_cosine": 0.99871,
    }
    path = run_dir / "student" / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "topk": error}))
    report = collect_report(run_dir)
    assert report["topk"] == error
    page = render_markdown(report)
    assert "k 64, all other tokens one bucket" in page
    assert "on 50 windows of the training text, the KL is 0.24 nats/token instead of 0.25" in page
    assert "(relative error 0.04)" in page
    assert "cosine of 0.9987 with the exact one" in page


def test_tasks_keep_each_models_accuracy(run_dir: Path) -> None:
    blimp = collect_report(run_dir)["minimal_pairs"]["blimp"]
    assert (blimp["prefix"], blimp["leading_space"]) == (None, True)
    assert blimp["tasks"]["task_0"] == {
        "pairs": 100,
        "term": "agreement",
        "accuracy": {"wide": 0.60, "deep": 0.64, "control": 0.61, "student": 0.63},
        "ties": {"wide": 0, "deep": 0, "control": 0, "student": 0},
    }
    assert blimp["pooled_accuracy"]["deep"] == pytest.approx((64 + 140) / 300)


def test_last_logged_step_of_each_stage_and_a_line_cut_short(run_dir: Path, caplog) -> None:
    last = collect_report(run_dir)["last_logged_step"]
    assert last == {"teachers/wide": METRICS[0], "student": METRICS[2]}
    assert "metrics.jsonl:5: not a JSON object" in caplog.text


def test_the_job_is_named_by_its_hash(run_dir: Path) -> None:
    first = collect_report(run_dir)["job_sha256"]
    assert collect_report(run_dir)["job_sha256"] == first
    (run_dir / "job.yaml").write_text(yaml.safe_dump(make_job(seed=12)))
    assert collect_report(run_dir)["job_sha256"] != first


def test_a_loaded_teacher_has_its_parameters_from_its_evaluation(run_dir: Path) -> None:
    (run_dir / "teachers" / "wide" / "training.json").unlink()
    wide = collect_report(run_dir)["models"]["wide"]
    assert (wide["params"], wide["train_tokens"], wide["seconds"]) == (999, None, None)


def test_speed(run_dir: Path) -> None:
    write(run_dir / "control" / "training.json", {**training(1, 400.0), "step_s": None})
    (run_dir / "teachers" / "wide" / "training.json").unlink()
    page = render_markdown(collect_report(run_dir))
    speed = page.split("## Speed")[1].split("\n## ")[0]
    rows = {
        cells[0]: cells[1:]
        for line in speed.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("| ").split("|")]) == 4
    }
    assert rows["student"] == ["12,500", "500.0", "0.400"]
    assert rows["control"] == ["5,000", "200.0", "0.160"]
    assert "wide" not in rows  # it was not trained here
    assert "A step of student, by parts (ms): teachers 20.0, loss 30.5." in speed
    assert "A step of control" not in speed


def test_early_ends_and_averages_are_told(run_dir: Path) -> None:
    page = render_markdown(collect_report(run_dir))
    assert "planned steps" not in page
    assert "moving average" not in page
    early = {"planned_steps": 1_200, "ended_by": "early_stopping", "averaged": 0.999}
    write(run_dir / "student" / "training.json", {**training(1_290_000, 160.0), **early})
    late = {"planned_steps": 700, "ended_by": "max_minutes"}
    write(run_dir / "teachers" / "deep" / "training.json", {**training(2_500_000, 125.0), **late})
    report = collect_report(run_dir)
    said = (
        "The training of deep ended after 488 of 700 planned steps: max_minutes. "
        "The training of student ended after 488 of 1,200 planned steps: early stopping. "
        "The weights of student are a moving average (decay 0.999)."
    )
    assert said in render_markdown(report)
    assert said in render_model_card(report, "student")


def test_a_run_of_before_says_nothing_of_them(run_dir: Path) -> None:
    for path in run_dir.glob("**/training.json"):
        old = json.loads(path.read_text())
        write(path, {k: v for k, v in old.items() if k not in ("planned_steps", "ended_by")})
    assert "planned steps" not in render_markdown(collect_report(run_dir))


def test_without_a_meter_there_is_nothing_on_speed(run_dir: Path) -> None:
    for path in run_dir.glob("**/training.json"):
        facts = json.loads(path.read_text())
        write(path, {key: facts[key] for key in facts if key not in ("flops_per_s", "mfu")})
    assert "## Speed" not in render_markdown(collect_report(run_dir))


def test_without_a_control(run_dir: Path) -> None:
    (run_dir / "job.yaml").write_text(yaml.safe_dump(make_job(control=None)))
    report = collect_report(run_dir)
    assert list(report["models"]) == ["wide", "deep", "student"]
    assert list(report["gains"]["student_minus"]) == ["wide", "deep"]
    page = render_markdown(report)
    assert "control" not in page.split("## Job")[0].split("## Models")[0]
    assert "0.0210 better (lower) than the best of its teachers (deep)" in page


def test_an_old_controls_evaluation_does_not_come_back(run_dir: Path) -> None:
    (run_dir / "job.yaml").write_text(yaml.safe_dump(make_job(control=None)))
    tasks = collect_report(run_dir)["minimal_pairs"]["blimp"]["tasks"]
    assert set(tasks["task_0"]["accuracy"]) == {"wide", "deep", "student"}


def test_a_run_with_nothing_but_its_job(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(make_job()))
    report = write_report(tmp_path)
    assert report["models"]["student"]["dev_ce"] is None
    assert report["gains"]["student_minus"]["control"] == {
        "dev_ce": None,
        "minimal_pairs_points": {},
        "minimal_pairs_points_standard_error": {},
        "fine_tuning_points": {},
        "fine_tuning_points_standard_error": {},
    }
    page = (tmp_path / "report" / "report.md").read_text()
    assert "The student has not been evaluated." in page
    assert all(len(row) == len(t[0]) for t in parsed_tables(page) for row in t)
    assert "Not evaluated." in render_model_card(report, "student")


def test_one_model_not_evaluated_yet(run_dir: Path) -> None:
    (run_dir / "evaluation" / "control.json").unlink()
    report = collect_report(run_dir)
    assert report["gains"]["student_minus"]["control"]["dev_ce"] is None
    page = render_markdown(report)
    row = next(row for row in find_table(page, "model") if row[0] == "control")
    assert row[3:7] == ["–", "–", "–", "–"]
    assert "undistilled control" not in page.split("## Models")[0]


def test_missing_or_unfit_job_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"job\.yaml: got No such file.*\n.*is this the directory"):
        collect_report(tmp_path)
    (tmp_path / "job.yaml").write_text("name: [")
    with pytest.raises(RunError, match=r"job\.yaml: got text that is not YAML"):
        collect_report(tmp_path)
    (tmp_path / "job.yaml").write_text("name: x\nseed: 1\nwindows: {}\n")
    with pytest.raises(RunError, match=r"got no teachers, student, distillation, expected the res"):
        collect_report(tmp_path)


def test_a_garbled_evaluation_is_an_error(run_dir: Path) -> None:
    (run_dir / "evaluation" / "deep.json").write_text('{"dev": ')
    with pytest.raises(RunError, match=r"deep\.json"):
        collect_report(run_dir)


# -- by domain and by term ----------------------------------------------------------------------


def say_more(run_dir: Path, name: str, domains: dict, terms: dict) -> None:
    path = run_dir / "evaluation" / f"{name}.json"
    result = json.loads(path.read_text())
    result["dev"]["domains"] = {
        domain: {"ce": ce, "perplexity": math.exp(ce), "bits_per_byte": None, "tokens": tokens}
        for domain, (ce, tokens) in domains.items()
    }
    result["minimal_pairs"]["blimp"]["terms"] = {
        term: {"accuracy": accuracy, "tasks": 2, "pairs": 1300} for term, accuracy in terms.items()
    }
    write(path, result)


def test_domains_by_model(run_dir: Path) -> None:
    say_more(run_dir, "deep", {"speech": (4.0, 1000), "books": (5.0, 270)}, {})
    say_more(run_dir, "student", {"speech": (4.25, 1000), "books": (4.5, 270)}, {})
    report = collect_report(run_dir)
    assert report["domains"] == {
        "speech": {"deep": {"ce": 4.0, "tokens": 1000}, "student": {"ce": 4.25, "tokens": 1000}},
        "books": {"deep": {"ce": 5.0, "tokens": 270}, "student": {"ce": 4.5, "tokens": 270}},
    }
    page = render_markdown(report)
    section = page.split("## Dev cross-entropy by domain (nats/token)")[1].split("\n## ")[0]
    (domains,) = parsed_tables(section)
    assert [domains[0], *domains[2:]] == [
        ["domain", "tokens", "deep", "student"],
        ["speech", "1,000", "4.0000", "4.2500"],
        ["books", "270", "5.0000", "4.5000"],
        ["whole", "1,270", "4.6630", "4.6420"],
    ]


def test_the_text_by_split_and_domains_over_all_their_files(run_dir: Path) -> None:
    def span(domain: str, start: int, stop: int) -> dict:
        return {"domain": domain, "start": start, "stop": stop}

    spans = [span("speech", 0, 70), span("books", 70, 95), span("speech", 95, 300)]
    train = {"tokens": 300, "words": 210, "bytes": 1200, "domains": spans, "files": []}
    dev = {"tokens": 13, "words": 9, "bytes": 50, "domains": [span("books", 0, 13)], "files": []}
    write(run_dir / "tokens" / "shards.json", {"splits": {"train": train, "dev": dev}})
    assert collect_report(run_dir)["data"] == {
        "train": {
            "tokens": 300,
            "words": 210,
            "bytes": 1200,
            "domains": {"speech": 275, "books": 25},
        },
        "dev": {"tokens": 13, "words": 9, "bytes": 50, "domains": {"books": 13}},
    }


def test_a_model_that_lacks_a_domain_has_a_dash_there(run_dir: Path) -> None:
    say_more(run_dir, "deep", {"speech": (4.0, 1000)}, {})
    say_more(run_dir, "student", {"speech": (4.25, 1000), "books": (4.5, 270)}, {})
    page = render_markdown(collect_report(run_dir))
    table = next(table for table in parsed_tables(page) if "domain" in table[0])
    assert ["books", "270", "–", "4.5000"] in table


def test_one_domain_or_none_makes_no_table(run_dir: Path) -> None:
    assert collect_report(run_dir)["domains"] == {}
    assert "by domain" not in render_markdown(collect_report(run_dir))
    say_more(run_dir, "student", {"town": (4.25, 1270)}, {})
    assert list(collect_report(run_dir)["domains"]) == ["town"]
    assert "by domain" not in render_markdown(collect_report(run_dir))


def test_terms_by_model(run_dir: Path) -> None:
    say_more(run_dir, "deep", {}, {"binding": 0.5, "islands": 0.75})
    say_more(run_dir, "student", {}, {"binding": 0.625, "islands": 0.25})
    report = collect_report(run_dir)
    assert report["minimal_pairs"]["blimp"]["terms"] == {
        "binding": {"tasks": 2, "pairs": 1300, "accuracy": {"deep": 0.5, "student": 0.625}},
        "islands": {"tasks": 2, "pairs": 1300, "accuracy": {"deep": 0.75, "student": 0.25}},
    }
    terms = find_table(render_markdown(report), "term")
    assert terms[0] == ["term", "tasks", "pairs", "wide", "deep", "control", "student"]
    assert terms[2:] == [
        ["binding", "2", "1,300", "–", "50.00", "–", "62.50"],
        ["islands", "2", "1,300", "–", "75.00", "–", "25.00"],
    ]


def test_a_benchmark_without_terms_has_no_table_of_them(run_dir: Path) -> None:
    report = collect_report(run_dir)
    assert report["minimal_pairs"]["blimp"]["terms"] == {}
    assert all(table[0][0] != "term" for table in parsed_tables(render_markdown(report)))


def test_a_prefix_token_is_told(run_dir: Path) -> None:
    assert "no prefix token, so the first token is not scored" in render_markdown(
        collect_report(run_dir)
    )
    for path in (run_dir / "evaluation").glob("*.json"):
        result = json.loads(path.read_text())
        result["minimal_pairs"]["blimp"]["prefix"] = "<s>"
        write(path, result)
    page = render_markdown(collect_report(run_dir))
    assert "behind the prefix token `<s>`; a leading space." in page


# -- the ensemble -------------------------------------------------------------------------------

WATCHED = {
    "teacher_ce/wide": 5.0,
    "teacher_ce/deep": 5.5,
    "teacher_kl/wide": 0.2,
    "teacher_kl/deep": 0.3,
    "teacher_agreement/wide": 0.75,
    "teacher_agreement/deep": 0.5,
    "teacher_distance/wide/deep": 0.25,
    "target_entropy": 4.0,
    "student_agreement": 0.625,
    "student_kl": 0.5,
}


def write_watched(run_dir: Path, steps: list[int], **changes: float) -> None:
    """Logged steps of the student; each measure is higher by 1 than at the logged step before."""
    values = {**WATCHED, **{key.replace("__", "/"): value for key, value in changes.items()}}
    lines = [
        {"stage": "student", "step": step, "loss": 1.0}
        | {key: value + number for key, value in values.items()}
        for number, step in enumerate(steps, start=1 - len(steps))  # the last is as given
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_ensemble_over_the_last_tenth(run_dir: Path) -> None:
    write_watched(run_dir, [1, 10, 90, 91, 95, 100])
    report = collect_report(run_dir)
    ensemble = report["ensemble"]
    # Steps 91, 95 and 100: a mean of what was 2 lower, 1 lower, and as given.
    assert (ensemble["first_step"], ensemble["last_step"]) == (91, 100)
    assert ensemble["logged_steps"] == 3
    assert ensemble["chance_ce"] == pytest.approx(math.log(1000))
    assert ensemble["teachers"] == {
        "wide": {"ce": pytest.approx(4), "kl": pytest.approx(-0.8), "agreement": -0.25},
        "deep": {"ce": pytest.approx(4.5), "kl": pytest.approx(-0.7), "agreement": -0.5},
    }
    assert ensemble["distances"] == {"wide/deep": -0.75}
    assert ensemble["target_entropy"] == pytest.approx(3)
    assert ensemble["student_agreement"] == pytest.approx(-0.375)
    assert ensemble["student_kl"] == pytest.approx(-0.5)


def test_the_ensembles_section(run_dir: Path) -> None:
    write_watched(run_dir, [1, 200])
    page = render_markdown(collect_report(run_dir))
    assert find_table(page, "teacher")[2:] == [
        ["wide", "5.0000", "0.2000", "75.00"],
        ["deep", "5.5000", "0.3000", "50.00"],
    ]
    section = page.split("## The ensemble")[1].split("\n## ")[0]
    for words in (
        "Means over steps 200 to 200 of the distillation (1 logged), on its training windows",
        "a uniform guess has a CE of 6.9078.",
        "The targets' entropy is 4.0000 nats/token.",
        "likeliest token is the ensemble's at 62.50 % of positions",
        "KL(ensemble ‖ student) is 0.5000 nats/token.",
        "wide and deep are 0.2500 apart (total variation, 0 to 1).",
    ):
        assert words in section
    assert "Warning" not in section


def test_warnings_stand_in_the_report_by_name(run_dir: Path) -> None:
    write_watched(run_dir, [9], teacher_ce__deep=6.95, teacher_distance__wide__deep=0.0)
    report = collect_report(run_dir)
    chance, same = report["ensemble"]["warnings"]
    assert chance.startswith("teacher deep is no better than chance")
    assert same.startswith("teachers wide and deep are identical")
    page = render_markdown(report)
    assert f"**Warning: {chance}.**" in page
    assert f"**Warning: {same}.**" in page


def test_without_measures_there_is_no_section(run_dir: Path) -> None:
    report = collect_report(run_dir)
    assert report["ensemble"] == {}
    assert "## The ensemble" not in render_markdown(report)


def test_before_the_end_of_training_chance_is_not_known(run_dir: Path) -> None:
    write_watched(run_dir, [9], teacher_ce__deep=6.95)
    (run_dir / "student" / "training.json").unlink()
    report = collect_report(run_dir)
    assert report["ensemble"]["chance_ce"] is None
    assert report["ensemble"]["warnings"] == []
    assert "at T = 1. The targets" in render_markdown(report)


# -- the page -----------------------------------------------------------------------------------


def test_tables_are_well_formed_and_aligned(run_dir: Path) -> None:
    page = render_markdown(collect_report(run_dir))
    tables = parsed_tables(page)
    assert len(tables) == 7
    for rows in tables:
        assert len({len(row) for row in rows}) == 1
        assert all(set(cell) <= {"-", ":"} and len(cell) >= 3 for cell in rows[1])
    lines = [line for line in page.splitlines() if line.startswith("|")]
    widths = [len(line) for line in lines]
    assert len(set(widths)) == len(tables)  # each table's lines are of one width


def test_headline(run_dir: Path) -> None:
    text = render_markdown(collect_report(run_dir)).split("\n\n")[1]
    assert text == (
        "**The student (1.29 M parameters) reaches a dev cross-entropy of 4.6420 nats/token, "
        "0.0120 better (lower) than its undistilled control and 0.0210 better (lower) than the "
        "best of its teachers (deep).** "
        "Its accuracy on blimp is 58.00 %, the mean over its tasks (+2.00 ± 0.86 points against "
        "the control)."
    )


def test_headline_of_a_student_that_lost(run_dir: Path) -> None:
    write(run_dir / "evaluation" / "student.json", evaluation("student", 4.663, [0.5, 0.5]))
    text = render_markdown(collect_report(run_dir)).split("\n\n")[1]
    assert "0.0090 worse (higher) than its undistilled control" in text
    assert "level with the best of its teachers (deep)" in text
    assert "(-6.00 ± 1.61 points against the control)" in text


def test_models_and_gains_tables(run_dir: Path) -> None:
    page = render_markdown(collect_report(run_dir))
    models = find_table(page, "model")
    assert models[0] == [
        "model",
        "role",
        "parameters",
        "dev CE (nats/token)",
        "perplexity",
        "bits/byte",
        "blimp (%)",
        "tokens seen",
        "training time",
        "tokens/s",
    ]
    assert models[-1] == [
        "student",
        "student",
        "1.29 M",
        "4.6420",
        f"{math.exp(4.642):.2f}",
        "1.5473",
        "58.00",
        "2.00 M",
        "2 min 40 s",
        "12,500",
    ]
    gains = find_table(page, "student minus")
    assert gains[2:] == [
        ["control", "-0.0120", "+2.00 ± 0.86"],
        ["wide", "-0.0410", "+3.00 ± 1.05"],
        ["deep", "-0.0210", "-9.00 ± 1.42"],
    ]
    assert "negative is better" in page


def test_loss_steps_tasks_and_environment(run_dir: Path) -> None:
    page = render_markdown(collect_report(run_dir))
    assert ["weight of a token's KL", "256"] in find_table(page, "setting")
    steps = find_table(page, "stage")
    assert steps[-1] == ["student", "20", "30.5000", "5.1000", "0.2500", "–", "1,234"]
    tasks = find_table(page, "task")
    assert tasks[2:] == [
        ["task_0", "agreement", "100", "60.00", "64.00", "61.00", "63.00"],
        ["task_1", "–", "200", "50.00", "70.00", "51.00", "53.00"],
        ["mean over tasks", "", "300", "55.00", "67.00", "56.00", "58.00"],
        ["share of all pairs", "", "300", "53.33", "68.00", "54.33", "56.33"],
    ]
    assert "no prefix token, so the first token is not scored; a leading space" in page
    assert "ties: none" in page
    environment = find_table(page, "what")
    assert ["versions.torch", "2.13.0"] in environment
    assert ["zero_stage", "2"] in environment
    expected = f"· tokenizer sha256 {'b' * 12} · tokens sha256 {'c' * 12} · seed 11 · 2 CPU cores"
    assert "commit 0123abc · job sha256 " in page
    assert expected in page
    assert 'AutoModelForCausalLM.from_pretrained("student")' in page


@pytest.mark.parametrize(
    ("card", "told"),
    [
        (None, "16 cores of Some CPU, 125.5 GiB"),
        ("NVIDIA H100", "NVIDIA H100, beside 16 cores of Some CPU, 125.5 GiB"),
    ],
)
def test_the_machine_is_told_in_words(run_dir: Path, card: str | None, told: str) -> None:
    facts = {"host_cpu": "Some CPU", "cores": 16, "memory_gib": 125.5, "cuda_device": card}
    write(run_dir / "environment.json", ENVIRONMENT | {"hardware": facts})
    assert f"· seed 11 · {told}\n" in render_markdown(collect_report(run_dir))


def test_ties_are_shown(run_dir: Path) -> None:
    write(run_dir / "evaluation" / "wide.json", evaluation("wide", 4.7, [0.0, 0.5], num_ties=3))
    assert "(ties: wide 6)" in render_markdown(collect_report(run_dir))


@pytest.mark.parametrize(("num_tasks", "folded"), [(20, False), (21, True)])
def test_many_tasks_are_folded_away(run_dir: Path, num_tasks: int, folded: bool) -> None:
    for name in ("wide", "deep", "control", "student"):
        scores = evaluation(name, 4.6, [0.5] * num_tasks)
        write(run_dir / "evaluation" / f"{name}.json", scores)
    page = render_markdown(collect_report(run_dir))
    assert (f"<details><summary>{num_tasks} tasks</summary>\n\n| task" in page) is folded
    assert page.count("<details>") == page.count("</details>")


# -- the model card -----------------------------------------------------------------------------


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_card_of_the_student(run_dir: Path) -> None:
    card = render_model_card(collect_report(run_dir), "student")
    front = front_matter(card)
    assert front["language"] == "en"
    assert front["library_name"] == "transformers"
    assert {"llama", "knowledge-distillation"} <= set(front["tags"])
    assert "license" not in front
    assert "distilled from an ensemble of 2 teachers (wide, deep)" in card
    assert "alpha 0.5, T 2, the mean of the teachers' logits, `soft_reduction: sequence`" in card
    assert "weighs 512 times" in card
    rows = find_table(card, "model")
    assert {row[0]: row[3] for row in rows[2:]} == {
        "wide": "4.6830",
        "deep": "4.6630",
        "control": "4.6540",
        "student": "4.6420",
    }
    for citation in ("2308.02019", "2409.17312", "AutoModelForCausalLM.from_pretrained"):
        assert citation in card
    assert "learning rate 0.0007 (cosine, 20 warm-up steps), weight decay 0.1" in card


@pytest.mark.parametrize(("epochs", "told"), [(6.0, "at most 6 epochs"), (1.0, "at most 1 epoch,")])
def test_a_card_counts_epochs(run_dir: Path, epochs: float, told: str) -> None:
    report = collect_report(run_dir)
    report["job"]["student"]["training"]["epochs"] = epochs
    assert told in render_model_card(report, "student")


def test_cards_name_what_they_were_made_from(run_dir: Path) -> None:
    report = collect_report(run_dir)
    own_seeds = {"student": "5", "control": "5", "wide": "6", "deep": "–"}
    for name, own_seed in own_seeds.items():
        facts = dict(find_table(render_model_card(report, name), "what")[2:])
        assert facts == {
            "commit": "0123abc",
            "job sha256": report["job_sha256"],
            "tokenizer sha256": "b" * 64,
            "tokens sha256 (text and tokenizer)": "c" * 64,
            "seed of the job": "11",
            "seed of this model": own_seed,
            "ranks": "2",
            "precision": "bf16",
            "versions.torch": "2.13.0",
            "versions.transformers": "5.23.0",
            "hardware": "2 CPU cores",
        }


def test_the_report_names_what_it_was_made_from(run_dir: Path) -> None:
    report = write_report(run_dir)
    written = json.loads((run_dir / "report" / "report.json").read_text())
    assert written["environment"] == ENVIRONMENT
    assert written["job_sha256"] == report["job_sha256"]
    assert len(written["job_sha256"]) == 64


def test_a_card_without_a_known_environment_has_dashes(run_dir: Path) -> None:
    (run_dir / "environment.json").unlink()
    facts = dict(find_table(render_model_card(collect_report(run_dir), "student"), "what")[2:])
    assert facts["commit"] == facts["tokens sha256 (text and tokenizer)"] == "–"
    assert facts["seed of the job"] == "11"


def test_cards_of_the_others(run_dir: Path) -> None:
    own = {**TRAINING, "learning_rate": 0.001}
    (run_dir / "job.yaml").write_text(yaml.safe_dump(make_job(control={"training": own})))
    report = collect_report(run_dir)
    control = render_model_card(report, "control", license_id="mit")
    assert front_matter(control)["license"] == "mit"
    assert "knowledge-distillation" not in front_matter(control)["tags"]
    assert "without teachers" in control
    assert "learning rate 0.001 " in control
    assert "KL(" not in control
    teacher = render_model_card(report, "wide")
    assert "gpt2" in front_matter(teacher)["tags"]
    assert "a teacher, from which the student" in teacher


def test_an_mfu_that_cannot_be_is_not_left_to_be_believed(run_dir: Path) -> None:
    """As on a machine that was busy when its products were measured."""
    from babyllama_ds.report.html import render_html, view_of

    report = collect_report(run_dir)
    for model in report["models"].values():
        model["mfu"] = 0.99
    pages = [render_markdown(report), render_html(view_of(report, {}))]
    assert all("above 1" not in page for page in pages)
    report["models"]["deep"]["mfu"] = 1.07
    report["models"]["wide"]["mfu"] = None  # loaded
    pages = [render_markdown(report), render_html(view_of(report, {}))]
    assert all("That of deep is above 1, which cannot be" in page for page in pages)


def test_a_card_names_muon_and_the_settings_within_settings(run_dir: Path) -> None:
    own = {**TRAINING, "muon": {"learning_rate": 0.03, "momentum": 0.9}, "ema": None}
    job = make_job(control={"training": {**own, "ema": {"decay": 0.97, "ramp": False}}})
    (run_dir / "job.yaml").write_text(yaml.safe_dump(job))
    report = collect_report(run_dir)
    card = render_model_card(report, "control")
    assert "- Muon at 0.03 for the layers' matrices, else AdamW, learning rate 0.0007" in card
    settings = dict(find_table(card, "setting")[2:])
    assert (settings["muon.learning_rate"], settings["muon.momentum"]) == ("0.03", "0.9")
    assert (settings["ema.decay"], settings["ema.ramp"]) == ("0.97", "False")
    plain = render_model_card(report, "student")
    assert "- AdamW, learning rate 0.0007" in plain
    assert "max_steps" not in dict(find_table(plain, "setting")[2:])


def test_card_of_a_run_without_a_control_and_with_a_loaded_teacher(run_dir: Path) -> None:
    loaded = {"name": "big", "model": {"kind": "pretrained", "path": "x"}, "training": None}
    job = make_job(control=None, teachers=[loaded])
    (run_dir / "job.yaml").write_text(yaml.safe_dump(job))
    report = collect_report(run_dir)
    assert "distilled from one teacher (big), frozen" in render_model_card(report, "student")
    card = render_model_card(report, "big")
    assert "Loaded, not trained here." in card
    assert "pretrained" not in front_matter(card)["tags"]


def test_a_card_says_whose_weights_a_model_has_or_began_with(run_dir: Path) -> None:
    """Text that was seen elsewhere is no text of the run's. Paths are nobody's business."""
    own, hub = ({"kind": "pretrained", "path": path} for path in ("/home/me/big", "org/big"))
    loaded = [
        {"name": "wide", "model": own, "training": None},
        {"name": "deep", "model": hub | {"revision": "v2"}, "training": None},
    ]
    job = make_job(teachers=loaded, student={"model": hub, "training": TRAINING})
    (run_dir / "job.yaml").write_text(yaml.safe_dump(job))
    settled = {"hub": {"org/big": "a1", "org/big@v2": "b2"}}
    write(run_dir / "environment.json", ENVIRONMENT | {"settled": settled})
    report = collect_report(run_dir)
    told = {
        "wide": "Its weights are those of another model, loaded by the run: it was not trained",
        "deep": "Its weights are those of `org/big` (commit b2), loaded by the run: it was not",
        "student": "It began with the weights of `org/big` (commit a1) and was trained further on",
        "control": "It began with the weights of `org/big` (commit a1) and was trained further on",
    }
    for name, words in told.items():
        card = render_model_card(report, name)
        assert words in card
        assert "It saw little text" not in card
        assert "/home/me" not in card
    (run_dir / "job.yaml").write_text(yaml.safe_dump(make_job()))
    plain = render_model_card(collect_report(run_dir), "student")
    assert "It saw little text" in plain
    assert "weights of" not in plain


# -- writing ------------------------------------------------------------------------------------


def test_all_files_are_written_and_agree(run_dir: Path) -> None:
    report = write_report(run_dir)
    folder = run_dir / "report"
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "report.md").read_text() == render_markdown(report)
    assert sorted(path.name for path in folder.iterdir()) == [
        "minimal_pairs-blimp.svg",  # the metrics here tell no tokens: there are no curves
        "report.html",
        "report.json",
        "report.md",
    ]
    assert write_report(run_dir) == report  # again, over the first


# -- formatting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (999, "999"),
        (1_000, "1.00 k"),
        (9_996, "10.0 k"),
        (999_999, "1.00 M"),
        (58_343_936, "58.3 M"),
        (704_928_768, "705 M"),
        (1_500_000_000, "1.50 B"),
    ],
)
def test_counts_have_three_digits(value, text) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (7.26, "7.3 s"), (59.99, "1 min 0 s"), (160, "2 min 40 s"), (7_380, "2 h 3 min")],
)
def test_durations(seconds, text) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    assert number(-1234.5678, 2) == "-1,234.57"
    assert number(0.25, 3, sign=True) == "+0.250"
    assert number(-1e-9, 4) == "0.0000"
    assert number(-1e-9, 2, sign=True) == "+0.00"
    assert percent(0.6666) == "66.66"
    assert percent(None) == "–"


def test_table_escapes_what_would_break_it() -> None:
    text = table(["a|b", "n"], [["x\ny", "1"], ["long text", "22"]])
    assert text.splitlines() == [
        "| a\\|b      |   n |",
        "| --------- | --: |",
        "| x y       |   1 |",
        "| long text |  22 |",
    ]


def test_a_figure_left_over_that_another_report_removed_is_gone(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a person asks for the report while the run that ends writes its own."""
    (run_dir / "report").mkdir()
    (run_dir / "report" / "old.svg").touch()
    unlink = Path.unlink

    def second(path: Path, missing_ok: bool = False) -> None:
        if path.name == "old.svg":
            unlink(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", second)
    write_report(run_dir)
    assert not (run_dir / "report" / "old.svg").exists()
