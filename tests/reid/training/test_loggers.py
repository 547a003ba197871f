"""The loggers of a run: what they get, after an interruption too, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path

import pytest

from mrcn_fast.reid.training.batches import Batch
from mrcn_fast.reid.training.callbacks import Callback
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.journal import StepResult
from mrcn_fast.reid.training.trainer import Trainer
from tests.reid.conftest import quiet, train


@pytest.fixture
def logged(tiny_config: TrainConfig, tiny_regdb: Path) -> TrainConfig:
    return dataclasses.replace(
        tiny_config, data=str(tiny_regdb), dataset="regdb", validate_every=1, logger="csv"
    )


def rows(config: TrainConfig, key: str) -> dict[int, float]:
    """The values of a key by step."""
    with (Path(config.out) / "csv" / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row[key]}


def test_a_csv_file_has_the_journals_values(logged: TrainConfig) -> None:
    journal = train(logged).journal
    for name in ("loss", "triplet", "accuracy", "lr"):
        assert rows(logged, f"train/{name}") == {line["step"]: line[name] for line in journal.lines}
    seconds = {line["step"]: line["step_seconds"] + line["wait_seconds"] for line in journal.lines}
    speed = rows(logged, "train/images_per_second")
    assert speed == pytest.approx({step: 8 / second for step, second in seconds.items()})
    for line in journal.validations:
        for search, scores in line["searches"].items():
            for score, value in scores.items():
                assert rows(logged, f"validation/{search}/{score}")[line["step"]] == value
    within, between, delta = (
        rows(logged, f"validation/{name}") for name in ("distance_within", "distance_between", "delta")
    )
    assert within.keys() == {3, 6} and all(0 < value < 2 for value in within.values())
    assert delta == pytest.approx({step: between[step] - within[step] for step in within})


def test_a_csv_file_goes_on_where_the_run_does(logged: TrainConfig) -> None:
    train(dataclasses.replace(logged, epochs=1))
    first = rows(logged, "train/loss"), rows(logged, "validation/delta")
    # The killed run had written a row of a step that no checkpoint has.
    with (Path(logged.out) / "csv" / "metrics.csv").open("a") as file:
        header = (Path(logged.out) / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
        file.write(",".join("4" if name == "step" else "99" for name in header) + "\n")
        file.write("5,0.5,1e-")  # when the machine lost its power
    train(logged, resume=True)
    loss, delta = rows(logged, "train/loss"), rows(logged, "validation/delta")
    assert (list(loss), list(delta)) == ([1, 2, 3, 4, 5, 6], [3, 6])
    assert first == ({step: loss[step] for step in (1, 2, 3)}, {3: delta[3]})
    assert loss[4] != 99


def test_a_run_stopped_before_its_first_checkpoint_logs_its_steps_again(logged: TrainConfig) -> None:
    class Stopping(Callback):
        def on_step_end(self, trainer: Trainer, batch: Batch, result: StepResult) -> None:
            if trainer.step_count == 2:
                raise RuntimeError("stopped")

    config = dataclasses.replace(logged, validate_every=None)
    with pytest.raises(RuntimeError, match="stopped"):
        Trainer(config, callbacks=[Stopping()]).fit(progress=quiet())
    assert list(rows(config, "train/loss")) == [1]
    assert list(rows(train(config, resume=True).config, "train/loss")) == [1, 2, 3, 4, 5, 6]


def test_a_new_run_begins_its_logs_anew(logged: TrainConfig) -> None:
    train(logged)
    train(dataclasses.replace(logged, logger="none"), overwrite=True)
    assert not (Path(logged.out) / "csv" / "metrics.csv").exists()


def test_tensorboard_has_curves_and_ranking_lists(logged: TrainConfig) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="TensorBoard, of the extra [tensorboard], is not installed",
    )
    config = dataclasses.replace(logged, logger="tensorboard")
    journal = train(config).journal
    found = events.EventAccumulator(str(Path(config.out) / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    losses = {event.step: event.value for event in found.Scalars("train/loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in journal.lines})
    assert [event.step for event in found.Scalars("validation/delta")] == [3, 6]
    pictures = found.Images("validation/infrared-to-visible")
    assert [event.step for event in pictures] == [3, 6]
    assert all(event.width > 500 and event.height > 200 for event in pictures)


def test_tensorboard_is_asked_for_first(logged: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    trainer = Trainer(dataclasses.replace(logged, logger="tensorboard"))
    with pytest.raises(ConfigError, match="TensorBoard is not installed: pip install tensorboard"):
        trainer.fit()
    assert not trainer.out.exists()
