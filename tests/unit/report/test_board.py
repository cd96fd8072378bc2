"""What TensorBoard reads back of a finished run, by TensorBoard's own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from babyllama_ds.report.board import write_boards
from babyllama_ds.report.collect import collect_report

STAGES = {
    "wide": "teachers/wide",
    "deep": "teachers/deep",
    "control": "control",
    "student": "student",
}


def read(run: Path, stage: str) -> EventAccumulator:
    board = EventAccumulator(str(run / "tensorboard" / stage))
    board.Reload()
    return board


def hparams(board: EventAccumulator) -> tuple[Any, Any]:
    """The experiment, and this model's session."""
    found = board.summary_metadata
    experiment, session = (
        plugin_data_pb2.HParamsPluginData.FromString(found[tag].plugin_data.content)
        for tag in ("_hparams_/experiment", "_hparams_/session_start_info")
    )
    return experiment.experiment, session.session_start_info


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    return make_run()


def test_hyperparameters_and_final_measures_of_every_model(run: Path) -> None:
    report = collect_report(run)
    write_boards(run, report)
    for name, stage in STAGES.items():
        board = read(run, stage)
        _, session = hparams(board)
        values = {key: v.number_value or v.string_value for key, v in session.hparams.items()}
        assert values["training.learning_rate"] == pytest.approx(7e-4)
        assert values["training.betas"] == "[0.9, 0.999]"
        assert values["role"] == report["models"][name]["role"]
        assert ("distillation.alpha" in values) is (name == "student")
        assert ("model.dropout" in values) is (name == "wide")
        assert "training.max_steps" not in values
        (dev_ce,) = board.Scalars("final/dev_ce")
        assert dev_ce.step == 600
        assert dev_ce.value == pytest.approx(report["models"][name]["dev_ce"])
        (accuracy,) = board.Scalars("final/minimal_pairs/blimp")
        assert accuracy.value == pytest.approx(report["models"][name]["minimal_pairs"]["blimp"])


def test_every_experiment_tells_the_columns_of_all(run: Path) -> None:
    write_boards(run, collect_report(run))
    columns = []
    for stage in STAGES.values():
        experiment, _ = hparams(read(run, stage))
        columns.append(
            (
                {info.name for info in experiment.hparam_infos},
                {info.name.tag for info in experiment.metric_infos},
            )
        )
    assert all(one == columns[0] for one in columns)
    assert {"model.dropout", "distillation.alpha", "role"} <= columns[0][0]
    assert {"final/dev_ce", "final/minimal_pairs/blimp"} <= columns[0][1]


def test_texts_are_shown_as_they_are(run: Path, script: str) -> None:
    write_boards(run, collect_report(run))
    (event,) = read(run, "student").Tensors("sample/1/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == f"    The dog▸ sees {script}\n    and & runs."


def test_the_trainings_own_scalars_stay_and_a_later_report_replaces_the_file(run: Path) -> None:
    with SummaryWriter(str(run / "tensorboard" / "student")) as board:
        board.add_scalar("loss", 1.5, 7)
    write_boards(run, collect_report(run))
    (run / "evaluation" / "wide.json").unlink()
    write_boards(run, collect_report(run))
    board = read(run, "student")
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(7, 1.5)]
    assert len(board.Scalars("final/dev_ce")) == 1
    assert "scalars" in read(run, "teachers/wide").Tags()
    assert read(run, "teachers/wide").Tags()["scalars"] == []


def test_a_run_that_has_only_begun(make_run: Callable[..., Path]) -> None:
    run = make_run("evaluation", "student", "control", control=None)
    report = collect_report(run)
    write_boards(run, report)
    assert read(run, "student").Tags()["scalars"] == []
    assert not (run / "tensorboard" / "control").exists()
