from __future__ import annotations

import json
from pathlib import Path

import pytest

from babyllama_ds.errors import DataError
from babyllama_ds.report.gains import collect_gains, render_gains
from babyllama_ds.spec.loading import load_job
from babyllama_ds.spec.resolved import dump_job, read_values

SHIPPED = Path(__file__).resolve().parents[3] / "launcher" / "jobs"


def model(ce: float, accuracy: float) -> dict[str, object]:
    return {"dev_ce": ce, "minimal_pairs": {"blimp": accuracy}}


def run(folder: Path, name: str, student: float, control: float) -> Path:
    report = {
        "name": name,
        "models": {"student": model(student, 0.6), "control": model(control, 0.5)},
    }
    path = folder / name / "report" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report))
    return folder / name


def test_mean_and_standard_error_by_hand(tmp_path: Path) -> None:
    runs = [run(tmp_path, "a", 2.0, 2.1), run(tmp_path, "b", 2.0, 2.3)]
    reports = [json.loads((path / "report" / "report.json").read_text()) for path in runs]
    cross_entropy, pairs = collect_gains(reports)
    assert cross_entropy.mean == pytest.approx(-0.2)
    # Differences -0.1 and -0.3: standard deviation 0.1414, over the root of 2.
    assert cross_entropy.standard_error == pytest.approx(0.1)
    assert pairs.values == pytest.approx((10.0, 10.0))
    assert pairs.standard_error == pytest.approx(0.0, abs=1e-12)
    table = render_gains(runs)
    assert "| control | dev CE (nats/token) | -0.2000 | 0.1000 | -0.3000 | -0.1000 | 2 |" in table
    assert "| b | control | 2.3000 | 50.00 |" in table


def test_a_single_run_has_no_standard_error(tmp_path: Path) -> None:
    assert "| -0.1000 | – |" in render_gains([run(tmp_path, "a", 2.0, 2.1)])


def test_a_run_without_a_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}: got no report") as error:
        render_gains([tmp_path])
    assert f"of one that is done, babyllama-ds report {tmp_path} writes it" in str(error.value)


def changed(run_dir: Path, **changes: object) -> Path:
    path = run_dir / "report" / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return run_dir


def test_a_run_with_models_that_are_not_measured_is_named(tmp_path: Path) -> None:
    """`report` writes one of an unfinished run, too."""
    whole, unfinished = run(tmp_path, "a", 2.0, 2.1), run(tmp_path, "b", 2.0, 2.3)
    nothing = {"dev_ce": None, "minimal_pairs": {}}
    changed(unfinished, models={"student": nothing, "control": model(2.3, 0.5)})
    with pytest.raises(DataError, match=f"{unfinished}: got a report without .* of student,"):
        render_gains([whole, unfinished])


def test_a_run_that_is_given_twice_is_no_second_seed(tmp_path: Path) -> None:
    one = run(tmp_path, "a", 2.0, 2.1)
    with pytest.raises(DataError, match=f"got the same student as {one}, expected runs of diff"):
        render_gains([one, tmp_path / "a" / ".." / "a"])
    weights = {"student": {"model.safetensors": "5" * 64}}
    runs = [changed(run(tmp_path, name, 2.0, 2.1), weights=weights) for name in ("b", "c")]
    with pytest.raises(DataError, match=f"{runs[1]}: got the same student as {runs[0]}"):
        render_gains([one, *runs])
    changed(runs[1], weights={"student": {"model.safetensors": "6" * 64}})
    assert "| 3 |" in render_gains([one, *runs])


def test_a_benchmark_that_a_run_lacks_is_a_dash_and_no_gain(tmp_path: Path) -> None:
    runs = [run(tmp_path, "a", 2.0, 2.1), run(tmp_path, "b", 2.0, 2.3)]
    more = {"dev_ce": 2.0, "minimal_pairs": {"blimp": 0.5, "ewok": 0.75}}
    changed(runs[1], models={"student": more, "control": more})
    runs += [changed(run(tmp_path, "c", 2.0, 2.1), models={"student": more, "control": more})]
    for order in (runs, runs[::-1], [runs[1], runs[0], runs[2]]):
        table = render_gains(order)
        assert "| a | student | 2.0000 | 60.00 | – |" in table
        assert "| b | student | 2.0000 | 50.00 | 75.00 |" in table
        assert "ewok (points)" not in table
        assert "| control | blimp (points) |" in table


def test_a_model_that_a_run_lacks_is_in_no_gain(tmp_path: Path) -> None:
    runs = [run(tmp_path, "a", 2.0, 2.1), run(tmp_path, "b", 2.0, 2.3)]
    one = {"dev_ce": 2.25, "minimal_pairs": {"blimp": 0.5}}
    changed(runs[0], models={"deep": one, "student": one, "control": one})
    for order in (runs, runs[::-1]):
        table = render_gains(order)
        assert "| a | deep | 2.2500 |" in table
        assert "| deep | dev CE" not in table
        assert "| control | dev CE" in table


def test_a_table_without_benchmarks_has_no_column_of_them(tmp_path: Path) -> None:
    plain = {"dev_ce": 2.0, "minimal_pairs": {}}
    alone = changed(run(tmp_path, "a", 2.0, 2.1), models={"student": plain, "control": plain})
    assert render_gains([alone]).splitlines()[:3] == [
        "| run | model | dev CE (nats/token) |",
        "|---|---|---:|",
        "| a | student | 2.0000 |",
    ]


def test_runs_of_different_jobs_are_told(tmp_path: Path) -> None:
    def job(name: str, seed: int, **changes: object) -> Path:
        made = {
            "name": name,
            "seed": seed,
            "student": {"seed": seed, "training": {"epochs": 2.0, "micro_batch": seed}},
            **changes,
        }
        return changed(run(tmp_path, name, 2.0, 2.1), job=made)

    seeds = [job("a", 1), job("b", 2)]
    assert "differ" not in render_gains(seeds)
    other = job("c", 3, windows={"length": 64}, distillation={"alpha": 0.1})
    told = "These runs differ in more than their seeds: distillation.alpha, windows.length."
    assert told in render_gains([*seeds, other])


def test_a_run_of_before_an_option_differs_in_nothing(tmp_path: Path) -> None:
    runs = []
    for seed in (1, 2):
        job = dict(read_values(dump_job(load_job(SHIPPED / "nursery.yaml", [f"seed={seed}"]))))
        if seed == 1:
            del job["windows"]["attention"]
        runs.append(changed(run(tmp_path, f"nursery-{seed}", 2.0, 2.1), job=job))
    assert "differ" not in render_gains(runs)


def test_one_seed_on_two_machines_is_no_second_seed(tmp_path: Path) -> None:
    """Its weights differ by roundings, or by the kernels of another card, and by nothing else."""

    def made(name: str, seed: int, micro_batch: int) -> Path:
        training = {"epochs": 2.0, "micro_batch": micro_batch}
        job = {"name": name, "seed": seed, "student": {"training": training}}
        weights = {"student": {"model.safetensors": name}}
        return changed(run(tmp_path, name, 2.0, 2.1), job=job, weights=weights)

    one, other, again = made("a", 1, 4), made("b", 2, 4), made("c", 1, 8)
    assert "| 2 |" in render_gains([one, other])
    with pytest.raises(DataError, match=f"{again}: got the same job and seed as {one}, expected"):
        render_gains([one, other, again])


def test_runs_of_one_name_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    runs = [run(tmp_path / place, "a", 2.0, 2.1) for place in ("x", "y")]
    table = render_gains([*runs, run(tmp_path, "b", 2.0, 2.3)])
    for name in (*runs, "b"):
        assert f"| {name} | student |" in table


def test_a_text_that_changed_beneath_the_job_is_told(tmp_path: Path) -> None:
    def made(kind: str, name: str, tokens: str | None) -> Path:
        environment = {"fingerprints": {"tokens": tokens}} if tokens else {}
        job = {"name": name, "corpus": {"kind": kind, "train": ["a.txt"]}}
        return changed(run(tmp_path / kind, name, 2.0, 2.1), job=job, environment=environment)

    told = "The text or the tokenizer is not the same in these runs"
    one, same, other, unknown = (
        made("files", name, tokens)
        for name, tokens in (("a", "1"), ("b", "1"), ("c", "2"), ("d", None))
    )
    assert told in render_gains([one, other])
    assert told not in render_gains([one, same, unknown])
    assert told not in render_gains([made("nursery", "a", "1"), made("nursery", "b", "2")])


def on_the_way(run_dir: Path, *, student: float, control: float, **asked: object) -> Path:
    """With two milestones of the student, of which the control has the first."""

    def kept(*at: tuple[str, float]) -> list[dict[str, object]]:
        return [{"name": name, **model(ce, 0.5)} for name, ce in at]

    milestones = {
        "student": kept(("chck_1M", student), ("chck_2M", student)),
        "control": kept(("chck_1M", control)),
    }
    return changed(run_dir, milestones=milestones, job={"evaluation": {"milestones": asked}})


def test_gains_on_the_way_are_of_milestones_that_both_have(tmp_path: Path) -> None:
    runs = [
        on_the_way(run(tmp_path, "a", 2.0, 2.1), student=3.0, control=3.5),
        on_the_way(run(tmp_path, "b", 2.0, 2.3), student=3.0, control=3.7),
    ]
    table = render_gains(runs)
    assert "| control at chck_1M | dev CE (nats/token) | -0.6000 | 0.1000 |" in table
    assert "| control at chck_1M | blimp (points) | +0.0000 | 0.0000 |" in table
    assert "chck_2M" not in table
    assert "No gain is told of milestones" not in table
    without = changed(run(tmp_path, "c", 2.0, 2.1), milestones={"student": [], "control": []})
    assert "chck_1M" not in render_gains([*runs, without])


def test_milestones_that_were_measured_otherwise_have_no_gain(tmp_path: Path) -> None:
    runs = [
        on_the_way(run(tmp_path, "a", 2.0, 2.1), student=3.0, control=3.5),
        on_the_way(run(tmp_path, "b", 2.0, 2.3), student=3.0, control=3.7, dev_windows=7),
    ]
    table = render_gains(runs)
    assert "chck_1M" not in table
    assert "No gain is told of milestones: evaluation.milestones" in table


def test_milestones_take_over_how_finished_models_are_measured(tmp_path: Path) -> None:
    """Unless they have a limit of their own: then nothing is measured otherwise."""
    runs = [
        on_the_way(run(tmp_path, name, 2.0, 2.1), student=3.0, control=3.5) for name in ("a", "b")
    ]
    as_finished = {"milestones": {"max_pairs_per_task": None}}
    changed(runs[0], job={"evaluation": {"max_pairs_per_task": None, **as_finished}})
    changed(runs[1], job={"evaluation": {"max_pairs_per_task": 5, **as_finished}})
    assert "chck_1M" not in render_gains(runs)
    assert "No gain is told of milestones" in render_gains(runs)
    own = {"milestones": {"max_pairs_per_task": 5}}
    changed(runs[0], job={"evaluation": own})
    changed(runs[1], job={"evaluation": {"max_pairs_per_task": 9, **own}})
    assert "control at chck_1M" in render_gains(runs)


def test_runs_that_were_measured_otherwise_are_told(tmp_path: Path) -> None:
    """Each difference is of one measurement; their mean is of several."""

    def measured(name: str, **evaluation: object) -> Path:
        return changed(run(tmp_path, name, 2.0, 2.1), job={"evaluation": evaluation})

    all_pairs, few = measured("a", max_pairs_per_task=None), measured("b", max_pairs_per_task=5)
    same = measured("c", max_pairs_per_task=None, prefix="none")  # the others are of before
    told = "These runs were not measured alike: evaluation.max_pairs_per_task."
    assert told in render_gains([all_pairs, few])
    assert "not measured alike" not in render_gains([all_pairs, same])
