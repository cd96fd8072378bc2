"""The page: what it shows, that nothing in it can do harm, and pages of runs that are not whole."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from babyllama_ds.errors import TrainingError
from babyllama_ds.report import html
from babyllama_ds.report import write as module
from babyllama_ds.report.collect import collect_report
from babyllama_ds.report.figures import draw_dots
from babyllama_ds.report.html import _by_term, _file_name, render_html, view_of
from babyllama_ds.report.metrics import collect_curves
from babyllama_ds.report.words import unfinished
from babyllama_ds.report.write import write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}
Tag = tuple[str, dict[str, str | None]]


class Page(HTMLParser):
    """Tags with their attributes, and texts by the tag that they stand in; every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[Tag] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def of(self, tag: str) -> list[str]:
        """The texts directly inside of a tag."""
        return [text for inside, text in self.texts if inside == tag]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def said(self) -> str:
        return " ".join(text for inside, text in self.texts if inside != "style")


def page_of(run: Path, **more: Any) -> Page:
    report = {**collect_report(run), **more}
    return Page(
        render_html(view_of(report, collect_curves(run / "metrics.jsonl", report["models"])))
    )


# -- what it shows --------------------------------------------------------------------------------


def test_the_page_of_a_whole_run(make_run: Callable[..., Path], domains: dict[str, Any]) -> None:
    page = page_of(make_run(), domains=domains)
    assert page.of("h1") == ["demo-11"]
    assert page.of("h2") == [
        "Models",
        "Training",
        "Minimal pairs",
        "Milestones",
        "Fine-tuning",
        "Development text by domain",
        "What the models write",
        "The ensemble",
        "The loss",
        "Speed",
        "Provenance",
    ]
    for words in (
        "The student (1.29 M parameters) reaches a dev cross-entropy of 2.1200 nats/token, 0.1300 "
        "better (lower) than its undistilled control",
        "student finished 2026-03-01 12:34 UTC",
        "One run, one seed",
        "Warning: teacher deep is no better than chance",
        "Means over steps 541 to 600 of the distillation (60 logged)",
        "weighs 512 times a nat of cross-entropy",
        "learning_rate: 0.0007",
        "A point of a long curve is the mean of up to 3 logged values.",
        "what came before may lie outside",
        "Where a step's time went, in ms",
        "30.5 (59%)",
    ):
        assert words in page.said, words
    # Curves, benchmarks, text and benchmarks on the way, fine-tuning, domains.
    assert len(page.all("figure")) == 4 + 2 + 3 + 1 + 1
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in page.all("figure"))


def test_student_and_control_stand_out_and_the_best_is_marked(make_run: Any) -> None:
    page = render_html(view_of(collect_report(make_run()), {}))
    table = re.search(r"<table.*?</table>", page, re.DOTALL)
    assert table is not None
    rows = re.findall(r"<tr class=\"(\w+)\">(.*?)</tr>", table[0], re.DOTALL)
    assert [role for role, _ in rows] == ["teacher", "teacher", "control", "student"]
    marked = {
        role: re.findall(r'<strong class="best">([\d.]+)<span class="unseen"> \(best\)', row)
        for role, row in rows
    }
    assert marked["student"] == ["2.1200", "8.33", "0.7067", "67.58", "67.58", "62.50"]
    assert marked["control"] == marked["teacher"] == []


def test_a_lone_measured_model_is_not_the_best(make_run: Any) -> None:
    run = make_run(*(f"evaluation/{name}.json" for name in ("wide", "deep", "control")))
    assert 'class="best"' not in render_html(view_of(collect_report(run), {}))


def test_terms_are_means_over_their_tasks() -> None:
    def task(term: str | None, **accuracy: float) -> dict[str, Any]:
        return {"term": term, "accuracy": accuracy}

    benchmark = {
        "tasks": {
            "one": task("agreement", a=0.5, b=0.25),
            "two": task("agreement", a=1.0),
            "three": task(None, a=0.125, b=0.5),
        }
    }
    assert _by_term(benchmark) == {"agreement": {"a": 75.0}, "three": {"a": 12.5, "b": 50.0}}


@pytest.mark.parametrize(
    ("chances", "line"),
    [((None, None), 50.0), ((0.2, sum([0.2] * 3) / 3), 20.0), ((0.2, None), None)],
)
def test_the_line_of_guessing_is_where_guessing_is(
    chances: tuple[float | None, ...],
    line: float | None,
    make_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of five candidates it gets a fifth right; of tasks that differ no line holds."""
    report = collect_report(make_run())
    report["minimal_pairs"] = {
        "entities": {
            "tasks": {
                str(number): {"term": None, "accuracy": {"student": 0.45}, "ties": {}, "pairs": 9}
                | ({} if chance is None else {"chance": chance})
                for number, chance in enumerate(chances)
            },
            "terms": {},
            "pooled_accuracy": {"student": 0.45},
            "prefix": None,
            "leading_space": True,
        }
    }
    drawn = []

    def draw(*given: Any, **named: Any) -> Any:
        drawn.append(named.get("chance"))
        return draw_dots(*given, **named)

    monkeypatch.setattr(html, "draw_dots", draw)
    view_of(report, {})
    assert drawn[0] == line


def test_one_task_is_no_plural(make_run: Any) -> None:
    run = make_run()
    blimp = collect_report(run)["minimal_pairs"]["blimp"]
    one = {**blimp, "tasks": {"task_0": blimp["tasks"]["task_0"]}}
    summaries = page_of(run, minimal_pairs={"blimp": one}).of("summary")
    assert "1 task of blimp" in summaries


def test_samples_keep_their_lines_and_what_was_given(make_run: Any, script: str) -> None:
    page = page_of(make_run())
    assert "The dog" in page.of("span")
    assert any(script in text and "and & runs." in text for text in page.of("blockquote"))


# -- safety and access ----------------------------------------------------------------------------


def test_nothing_of_the_run_becomes_markup(
    make_run: Any, domains: dict[str, Any], script: str
) -> None:
    page = page_of(make_run(), domains=domains)
    assert page.all("script") == []
    assert script in page.said  # shown as it is
    assert page.of("title") == ["demo-11 – report"]
    handlers = [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
    assert handlers == []


def test_nothing_is_fetched(make_run: Any, domains: dict[str, Any]) -> None:
    page = page_of(make_run(), domains=domains)
    links = [
        value
        for _, attrs in page.tags
        for key, value in attrs.items()
        if key in ("href", "src", "xlink:href", "data", "action", "srcset")
    ]
    assert [link for link in links if not (link or "").startswith(("#", "data:,"))] == []
    style = " ".join(text for inside, text in page.texts if inside == "style")
    assert "@import" not in style
    assert "url(" not in style
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert "default-src 'none'" in (policy or "")


def test_headings_tables_ids_and_language(make_run: Any, domains: dict[str, Any]) -> None:
    page = page_of(make_run(), domains=domains)
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    targets = {str(link["href"])[1:] for link in page.all("a")}
    assert targets <= set(ids)
    assert {
        attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs
    } <= set(ids)


# -- runs that are not whole ----------------------------------------------------------------------


def test_without_evaluations(make_run: Any) -> None:
    page = page_of(make_run("evaluation"))
    assert "The student (1.29 M parameters) has not been evaluated." in page.said
    assert "Missing: the evaluation of the student." in page.said
    assert "Missing: the evaluation of teacher wide." in page.said
    assert not {"Minimal pairs", "Fine-tuning"} & {*page.of("h2")}
    assert len(page.all("figure")) == 4


def test_without_a_control(make_run: Any) -> None:
    page = page_of(make_run(control=None))
    assert "undistilled control" not in page.said
    assert "Missing" not in page.said
    assert page.of("th").count("control") == 1  # in the last logged steps: it was trained once


def test_without_metrics(make_run: Any) -> None:
    page = page_of(make_run("metrics.jsonl"))
    assert "No metrics are logged in this run, so there are no curves." in page.said
    assert "Missing: the metrics of its trainings" in page.said
    assert len(page.all("figure")) == 2 + 3 + 1  # the benchmarks, milestones and fine-tuning
    assert "The ensemble" not in page.of("h2")


def test_in_the_middle(make_run: Any) -> None:
    run = make_run(
        "student",
        "control",
        "evaluation",
        state={"status": "running", "pid": 1, "since": 2.0},
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        x for x in lines if x["stage"] != "control" and (x["stage"] != "student" or x["step"] <= 90)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    page = page_of(run)
    assert "The run was going on when this was written, or had been killed before." in page.said
    assert "Missing: the student (logged up to step 90)." in page.said
    assert "Missing: the control." in page.said
    assert "student finished" not in page.said
    assert "No curve for control" in page.said
    assert len(page.all("figure")) == 4


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"status": "failed", "error": "disk <full>\n"}, "The run failed: disk <full>."),
        ({"status": "failed"}, "The run failed: it does not say why."),
        (
            {"status": "stopped", "reason": "SIGTERM", "at": "student, step 3"},
            "The run was stopped: SIGTERM, student, step 3. The same command goes on",
        ),
        ({"status": "failed", "error": None}, "The run failed"),
    ],
)
def test_failed_and_stopped(make_run: Any, state: dict[str, Any], words: str) -> None:
    assert words in page_of(make_run(state=state)).said


def test_a_run_that_ends_meanwhile_is_not_reported_as_unfinished(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own report may come first, and be replaced by one of what was there before."""
    missing = "evaluation/control.json"
    run = make_run(missing, state={"status": "running"})
    render = module.render_markdown

    def as_the_run_ends(report: Any) -> str:
        (run / missing).write_text((run / "evaluation" / "student.json").read_text())
        return render(report)

    monkeypatch.setattr(module, "render_markdown", as_the_run_ends)
    assert write_report(run)["unfinished"] is None
    assert json.loads((run / "report" / "report.json").read_text())["unfinished"] is None


def test_an_errors_lines_do_not_run_into_each_other(make_run: Any) -> None:
    hint = "lower the learning rate"
    error = str(TrainingError.of("student", got="a loss of nan", expected="a number", hint=hint))
    report = collect_report(make_run("control", state={"status": "failed", "error": error}))
    assert unfinished(report) == [
        "The run failed: student: got a loss of nan, expected a number.",
        f"hint: {hint}",
        "Missing: the control (logged up to step 600).",
    ]


@pytest.mark.parametrize("status", ["done", "running"])
def test_a_whole_run_has_nothing_to_say_of_its_state(make_run: Any, status: str) -> None:
    report = collect_report(make_run(state={"status": status}))
    assert report["unfinished"] is None


def test_with_nothing_but_its_job(make_run: Any) -> None:
    names = ("wide", "deep", "control", "student")
    folders = ("teachers/wide", "teachers/deep", "control", "student")
    run = make_run("evaluation", *folders, "metrics.jsonl", "environment.json", "state.json")
    page = page_of(run)
    assert "The run is not complete." in page.said
    assert page.said.count("Missing:") == len(names)
    assert "Not recorded." in page.said


# -- files ----------------------------------------------------------------------------------------


def test_files_beside_the_page_and_its_size(make_run: Any) -> None:
    run = make_run()
    write_report(run)
    folder = run / "report"
    assert sorted(path.name for path in folder.iterdir()) == [
        "ce.svg",
        "dev_ce.svg",
        "fine_tuning-glue.svg",
        "kl.svg",
        "milestones--script-document-title-taken-script-.svg",
        "milestones-blimp.svg",
        "milestones.svg",
        "minimal_pairs--script-document-title-taken-script-.svg",
        "minimal_pairs-blimp.svg",
        "report.html",
        "report.json",
        "report.md",
        "student_agreement.svg",
    ]
    assert (folder / "report.html").stat().st_size < 500_000
    assert all(path.read_text().startswith("<?xml") for path in folder.glob("*.svg"))


def test_written_again_it_is_the_same_and_old_figures_go(make_run: Any) -> None:
    run = make_run()
    write_report(run)
    first = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    (run / "report" / "old.svg").write_text("<svg/>")
    write_report(run)
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == first


def test_names_of_files_stay_in_their_folder_and_differ() -> None:
    assert _file_name("../a b", []) == "-a-b"
    assert _file_name("a/b", ["a-b", "a-b-2"]) == "a-b-3"
