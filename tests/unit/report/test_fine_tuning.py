"""Fine-tuning scores in every place that shows them, from evaluation files made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from babyllama_ds.files import read_json
from babyllama_ds.report.board import write_boards
from babyllama_ds.report.card import render_model_card
from babyllama_ds.report.collect import collect_report
from babyllama_ds.report.gains import render_gains
from babyllama_ds.report.html import render_html, view_of
from babyllama_ds.report.markdown import render_markdown
from babyllama_ds.report.measured import render_measured
from babyllama_ds.report.write import write_report

LABELS = {"rte": "1" * 30 + "0" * 20, "mrpc": "1" * 60 + "0" * 40}
SETTINGS = {
    "learning_rate": 5e-5,
    "batch_size": 64,
    "epochs": 10,
    "patience": None,
    "max_tokens": 512,
    "seeds": 1,
    "per_task": {"rte": {"learning_rate": 1e-5, "epochs": 1000, "patience": 4}},
}
PROTOCOL = "published protocol, which flatters every model alike"


def wrong(labels: str, count: int) -> str:
    """Said of examples whose first `count` (all of label 1) are got wrong."""
    return "0" * count + labels[count:]


def measured(rte: int, mrpc: int, **settings: object) -> dict[str, Any]:
    """A suite of a model that gets so many ones wrong, of 50 examples and of 100 with 60 ones."""
    rte_score, mrpc_score = 1 - rte / 50, 2 * (60 - mrpc) / (2 * (60 - mrpc) + mrpc)
    scores = {"rte": (rte_score, rte), "mrpc": (mrpc_score, mrpc)}
    tasks = {
        task: {
            "metric": {"rte": "accuracy", "mrpc": "f1"}[task],
            "score": score,
            "scores": [score],
            "majority": {"rte": 0.6, "mrpc": 0.75}[task],
            "examples": len(LABELS[task]),
            "train_examples": {"rte": 2490, "mrpc": 3668}[task],
            "epochs": [7],
            "labels": LABELS[task],
            "predictions": [wrong(LABELS[task], count)],
        }
        for task, (score, count) in scores.items()
    }
    score = (rte_score + mrpc_score) / 2
    return {"score": score, "tasks": tasks, "settings": {**SETTINGS, **settings}}


SUITES = {"deep": measured(5, 30), "control": measured(15, 20), "student": measured(10, 20)}
"""`wide` is left out, as teachers can be."""
F1 = {20: 80 / 100, 30: 60 / 90}


def put(run: Path, model: str, suites: object) -> None:
    path = run / "evaluation" / f"{model}.json"
    evaluation = json.loads(path.read_text())
    if suites is None:
        del evaluation["fine_tuning"]
    else:
        evaluation["fine_tuning"] = suites
    path.write_text(json.dumps(evaluation))


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    run = make_run()
    put(run, "wide", {})
    for model, suite in SUITES.items():
        put(run, model, {"glue": suite})
    return run


def rows_of(text: str, first_header: str) -> list[list[str]]:
    """The rows, header first, of the first Markdown table that begins so."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_header} "))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def column(rows: list[list[str]], title: str) -> dict[str, str]:
    place = rows[0].index(title)
    return {row[0]: row[place] for row in rows[1:]}


# -- report.json ----------------------------------------------------------------------------------


def test_scores_and_their_errors_by_model(run: Path) -> None:
    models = collect_report(run)["models"]
    assert models["student"]["fine_tuning"] == {"glue": pytest.approx(0.8)}
    assert models["control"]["fine_tuning"] == {"glue": pytest.approx(0.75)}
    assert models["wide"]["fine_tuning"] == models["wide"]["fine_tuning_standard_error"] == {}
    error = models["student"]["fine_tuning_standard_error"]["glue"]
    # A part of it is that of the accuracy alone, 40 of 50 right.
    assert 0.5 * math.sqrt(0.16 / 49) < error < math.sqrt(0.16 / 49)


def test_a_suite_keeps_each_models_scores_and_no_predictions(run: Path) -> None:
    report = collect_report(run)
    glue = report["fine_tuning"]["glue"]
    assert glue["settings"] == SETTINGS
    assert glue["score"] == {
        "deep": pytest.approx((0.9 + F1[30]) / 2),
        "control": pytest.approx(0.75),
        "student": pytest.approx(0.8),
    }
    assert list(glue["tasks"]) == ["rte", "mrpc"]
    assert glue["tasks"]["rte"] == {
        "metric": "accuracy",
        "examples": 50,
        "train_examples": 2490,
        "majority": 0.6,
        "score": {"deep": 0.9, "control": 0.7, "student": 0.8},
        "scores": {"deep": [0.9], "control": [0.7], "student": [0.8]},
        "epochs": {"deep": [7], "control": [7], "student": [7]},
    }
    said = json.dumps(report)
    assert all(labels not in said for labels in LABELS.values())
    assert all(wrong(LABELS["rte"], count) not in said for count in (5, 10, 15))


def test_gains_are_points_with_the_error_of_the_same_examples(run: Path) -> None:
    gains = collect_report(run)["gains"]
    assert "In scores of fine-tuning (points) positive is better" in gains["note"]
    over_control = gains["student_minus"]["control"]
    assert over_control["fine_tuning_points"] == {"glue": pytest.approx(5.0)}
    # They differ on 5 of 50 examples of rte, and on none of mrpc.
    error = 100 * math.sqrt(0.1 * 0.9 / 49) / 2
    assert over_control["fine_tuning_points_standard_error"] == {
        "glue": pytest.approx(error, rel=0.06)
    }
    assert gains["student_minus"]["wide"]["fine_tuning_points"] == {}
    assert gains["student_minus"]["wide"]["fine_tuning_points_standard_error"] == {}


@pytest.mark.parametrize("nothing", [None, {}])
def test_runs_that_were_not_fine_tuned_say_nothing_of_it(run: Path, nothing: object) -> None:
    for model in ("wide", "deep", "control", "student"):
        put(run, model, nothing)
    report = write_report(run)
    assert report["fine_tuning"] == {}
    texts = [(run / "report" / name).read_text() for name in ("report.md", "report.html")]
    texts += [render_model_card(report, "student"), report["gains"]["note"]]
    texts.append(render_gains([run]))
    for text in texts:
        # The job's own words may name it; the report's do not.
        assert "flatters" not in text
        assert "Fine-tun" not in text
        assert "fine-tun" not in text


# -- the pages ------------------------------------------------------------------------------------


def test_models_and_gains_have_a_column_of_it(run: Path) -> None:
    page = render_markdown(collect_report(run))
    assert column(rows_of(page, "model"), "glue (score)") == {
        "wide": "–",
        "deep": "78.33",
        "control": "75.00",
        "student": "80.00",
    }
    gains = column(rows_of(page, "student minus"), "glue (score, points)")
    assert gains["control"].startswith("+5.00 ± 2.")
    assert gains["deep"].startswith("+1.67 ± ")
    assert gains["wide"] == "–"
    headline = page.split("\n\n")[1]
    told = "Fine-tuned on glue, it scores 80.00 points, the mean over its tasks (+5.00 ± 2."
    assert told in headline


def test_a_section_has_every_task_and_says_how_it_was_measured(run: Path) -> None:
    report = collect_report(run)
    for page in (render_markdown(report), render_model_card(report, "student")):
        section = page.split("# Fine-tuning: glue (score, times 100)\n")[1].split("\n## ")[0]
        rows = rows_of(section, "task")
        assert rows[:3] == [
            ["task", "metric", "validation examples", "majority", "deep", "control", "student"],
            ["rte", "accuracy", "50", "60.00", "90.00", "70.00", "80.00"],
            ["mrpc", "F1", "100", "75.00", "66.67", "80.00", "80.00"],
        ]
        assert rows[3] == ["mean over tasks", "", "", "", "78.33", "75.00", "80.00"]
        errors = [
            f"{100 * report['models'][model]['fine_tuning_standard_error']['glue']:.2f}"
            for model in SUITES
        ]
        assert rows[4] == ["its standard error", "", "", "", *errors]
        for words in (
            PROTOCOL,
            "scored on its validation examples (one seed)",
            "learning rate 5e-05, 64 examples a batch, 10 epochs, no early end, at most 512 tokens",
            "; rte: learning rate 1e-05, 1,000 epochs, ended after 4 epochs without a better score",
            "standard error (±) is that of the choice of validation examples, not of the seed",
        ):
            assert words in section, words


def test_the_page_marks_the_best_of_each_task(run: Path) -> None:
    page = render_html(view_of(collect_report(run), {}))
    section = page.split('<h2 id="fine-tuning">')[1].split("</section>")[0]
    best = '<strong class="best">'
    rows = [row.split(best)[1:] for row in section.split("<tbody>")[1].split("</tr>")[:3]]
    assert [[cell.split("<")[0] for cell in row] for row in rows] == [
        ["90.00"],
        ["80.00", "80.00"],  # level
        ["80.00"],
    ]
    assert PROTOCOL in section
    assert "rte (accuracy): deep 90.00, control 70.00, student 80.00; mrpc (F1): " in section
    assert "score on glue after fine-tuning, mean over tasks" in page.split("<nav")[0]
    assert '<a href="#fine-tuning">' in page


def test_several_seeds_are_told_and_have_another_error(run: Path) -> None:
    one = measured(10, 20, seeds=2)
    for task, other in (("rte", 20), ("mrpc", 20)):
        one["tasks"][task]["predictions"].append(wrong(LABELS[task], other))
    put(run, "student", {"glue": one})
    for model in ("deep", "control"):
        put(run, model, {})
    page = render_markdown(collect_report(run))
    assert "(the mean over 2 seeds)" in page
    assert "of the choice of validation examples and of the seeds of fine-tuning, not" in page


def test_means_over_different_tasks_are_not_compared(run: Path) -> None:
    student = measured(10, 20)
    del student["tasks"]["mrpc"]
    put(run, "student", {"glue": {**student, "score": 0.8}})
    report = collect_report(run)
    for gain in report["gains"]["student_minus"].values():
        assert gain["fine_tuning_points"] == {}
    page = render_markdown(report)
    told = "The means are not of the same tasks (student lacks mrpc): compare task by task."
    assert told in page
    assert column(rows_of(page, "student minus"), "glue (score, points)")["control"] == "–"
    assert column(rows_of(page, "task"), "student")  # of the minimal pairs, as before
    html = render_html(view_of(report, {}))
    section = html.split('<h2 id="fine-tuning">')[1].split("</section>")[0]
    rows = section.split("<tbody>")[1].split("</tr>")[:3]
    assert [row.count('class="best"') for row in rows] == [1, 1, 0]
    assert "–" in rows[1]
    models = html.split("<tbody>")[1].split("</tbody>")[0]
    assert '<strong class="best">80.00' not in models


def test_a_task_that_one_model_alone_has_is_not_its_best(run: Path) -> None:
    for model in ("deep", "control"):
        put(run, model, {})
    html = render_html(view_of(collect_report(run), {}))
    section = html.split('<h2 id="fine-tuning">')[1].split("</section>")[0]
    assert 'class="best"' not in section


def test_the_cards_front_matter_has_the_hubs_metrics(run: Path) -> None:
    report = collect_report(run)

    def results(model: str) -> dict[tuple[str, str], float]:
        front = yaml.safe_load(render_model_card(report, model).split("---\n", 2)[1])
        return {
            (one["dataset"]["config"], metric["type"]): metric["value"]
            for one in front["model-index"][0]["results"]
            if one["dataset"]["type"] == "glue"
            for metric in one["metrics"]
        }

    assert results("student") == {("rte", "accuracy"): 0.8, ("mrpc", "f1"): pytest.approx(0.8)}
    assert results("wide") == {}
    own = read_json(run / "evaluation" / "control.json")["fine_tuning"]["glue"]["tasks"]
    assert {task: score for (task, _), score in results("control").items()} == {
        task: pytest.approx(measured["score"]) for task, measured in own.items()
    }
    assert own["rte"]["score"] != 0.8
    report["fine_tuning"]["glue"]["tasks"]["rte"]["metric"] = "mcc"
    assert ("rte", "matthews_correlation") in results("student")


def test_on_whose_examples_the_epoch_was_chosen_is_told(run: Path) -> None:
    """mnli-mm's is that of mnli, whose classifier it has: not chosen on its own."""
    report = collect_report(run)
    tasks = report["fine_tuning"]["glue"]["tasks"]
    report["fine_tuning"]["glue"]["tasks"] = {"mnli": tasks["rte"], "mnli-mm": tasks["rte"]}
    front = yaml.safe_load(render_model_card(report, "student").split("---\n", 2)[1])
    names = {
        one["dataset"]["config"]: one["metrics"][0]["name"]
        for one in front["model-index"][0]["results"]
        if one["dataset"]["type"] == "glue"
    }
    assert names == {
        "mnli": "accuracy (best epoch on the same examples)",
        "mnli-mm": "accuracy (best epoch on the examples of mnli)",
    }
    assert "the same examples" not in render_markdown(report)


def test_tensorboard_has_the_suites_score(run: Path) -> None:
    write_boards(run, collect_report(run))
    board = EventAccumulator(str(run / "tensorboard" / "student"))
    board.Reload()
    (event,) = board.Scalars("final/fine_tuning/glue")
    assert event.value == pytest.approx(0.8)


# -- a single measurement -------------------------------------------------------------------------


def test_the_terminal_has_every_task() -> None:
    suite = measured(10, 20)
    result = {
        "model": "m",
        "params": 999,
        "dtype": "bfloat16",
        "device": "cpu",
        "attention": "sdpa",
        "dev": None,
        "minimal_pairs": {},
        "seconds": 3.0,
        "fine_tuning": {"glue": suite},
    }
    text = render_measured(result)
    assert "\nglue: 80.00 ± " in text
    assert PROTOCOL in text
    header = ["task", "metric", "training examples", "validation examples", "majority", "score"]
    assert rows_of(text, "task") == [
        [*header, "epoch"],
        ["rte", "accuracy", "2,490", "50", "60.00", "80.00", "7"],
        ["mrpc", "F1", "3,668", "100", "75.00", "80.00", "7"],
        ["mean over tasks", "", "", "", "", "80.00", ""],
    ]
    suite["settings"]["seeds"] = 2
    for task in suite["tasks"].values():
        task.update(scores=[0.875, 0.725], epochs=[7, 10])
        task["predictions"] *= 2
    rows = rows_of(render_measured(result), "task")
    assert rows[0] == [*header, "by seed", "epoch"]
    assert rows[1][-2:] == ["87.50, 72.50", "7, 10"]
    del result["fine_tuning"]
    assert "glue" not in render_measured(result)


# -- several runs ---------------------------------------------------------------------------------


def runs_of(tmp_path: Path, run: Path, student: dict[str, Any]) -> list[Path]:
    """The run, and a second with another seed and student."""
    other = tmp_path / "other"
    put(run, "student", {"glue": student})
    report = write_report(run)
    path = other / "report" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report | {"name": "demo-12", "job": report["job"] | {"seed": 12}}))
    put(run, "student", {"glue": SUITES["student"]})
    write_report(run)
    return [run, other]


def test_gains_over_several_runs(run: Path, tmp_path: Path) -> None:
    text = render_gains(runs_of(tmp_path, run, measured(5, 20)))
    assert column(rows_of(text, "run"), "glue (score)")  # there is one
    gains = {(row[0], row[1]): row[2:] for row in rows_of(text, "student minus")[1:]}
    # 5 and 10 points over the control.
    assert gains["control", "glue (score, points)"] == [
        "+7.5000",
        "2.5000",
        "+5.0000",
        "+10.0000",
        "2",
    ]
    assert ("wide", "glue (score, points)") not in gains
    assert PROTOCOL in text
    assert "No gain is told" not in text


def test_runs_measured_with_other_settings_have_no_gain(run: Path, tmp_path: Path) -> None:
    text = render_gains(runs_of(tmp_path, run, measured(5, 20)))
    assert "glue (score, points)" in text
    for model, suite in SUITES.items():
        put(run, model, {"glue": {**suite, "settings": {**SETTINGS, "epochs": 3}}})
    write_report(run)
    text = render_gains([run, tmp_path / "other"])
    assert "glue (score, points)" not in text
    assert "No gain is told in glue: its tasks, examples or settings are not the same" in text


def test_runs_measured_on_other_examples_have_no_gain(run: Path, tmp_path: Path) -> None:
    """Also where the settings are the same: the files behind them may have changed."""
    runs = runs_of(tmp_path, run, measured(5, 20))
    path = runs[1] / "report" / "report.json"
    for fact in ("metric", "examples", "train_examples", "majority"):
        before = path.read_text()
        report = json.loads(before)
        report["fine_tuning"]["glue"]["tasks"]["rte"][fact] = 9
        path.write_text(json.dumps(report))
        for order in (runs, runs[::-1]):
            text = render_gains(order)
            assert "glue (score, points)" not in text
            assert "No gain is told in glue" in text
        path.write_text(before)


def test_a_report_of_before_has_a_dash(run: Path, tmp_path: Path) -> None:
    first, second = runs_of(tmp_path, run, measured(5, 20))
    path = second / "report" / "report.json"
    report = json.loads(path.read_text())
    del report["fine_tuning"]
    for model in report["models"].values():
        del model["fine_tuning"], model["fine_tuning_standard_error"]
    for gain in report["gains"]["student_minus"].values():
        del gain["fine_tuning_points"], gain["fine_tuning_points_standard_error"]
    path.write_text(json.dumps({**report, "name": "before"}))
    for order in ([first, second], [second, first]):
        text = render_gains(order)
        assert "glue (score, points)" not in text
        rows = rows_of(text, "run")
        shown = {(row[0], row[1]): row[-1] for row in rows[1:]}
        assert shown["demo-11", "student"] == "80.00"
        assert shown["before", "student"] == "–"
