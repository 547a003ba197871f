"""Scores within a run: what they are, what they leave alone, and which checkpoint is kept as the best."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mrcn_fast.reid.data import SYSUMM01, open_dataset, write_sysu
from mrcn_fast.reid.data.datasets.lists import read_identities
from mrcn_fast.reid.evaluation import scoring
from mrcn_fast.reid.evaluation.protocol import searches_of
from mrcn_fast.reid.evaluation.results import HEADLINE
from mrcn_fast.reid.evaluation.scoring import ScoringOptions, score_checkpoint, score_searches
from mrcn_fast.reid.evaluation.trained import open_trained
from mrcn_fast.reid.training import validation
from mrcn_fast.reid.training.checkpoint import BEST_NAME, CheckpointError, content_digest, load_checkpoint
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.journal import read_lines
from tests.reid.conftest import quiet, train


def given_rank1(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Let the validations find these rank-1 in turn."""
    left = iter(values)

    def scored(trained: Any, searches: Sequence[Any], *_: Any) -> tuple[list[dict[str, Any]], set[Path]]:
        means = dict.fromkeys(HEADLINE, next(left))
        return [{"mean": means} for _ in searches], set()

    monkeypatch.setattr(validation, "score_searches", scored)


def test_validating_leaves_the_training_alone(tiny_config: TrainConfig, finished: Path) -> None:
    validated = load_checkpoint(train(dataclasses.replace(tiny_config, validate_every=1)).checkpoint_path)
    plain = load_checkpoint(finished)
    for name in ("model", "optimizer", "random"):
        assert content_digest(getattr(validated, name)) == content_digest(getattr(plain, name)), name
    timed = {"step_seconds", "wait_seconds"}
    found, expected = (
        [{name: line[name] for name in line.keys() - timed} for line in read_lines(folder / "metrics.jsonl")]
        for folder in (Path(tiny_config.out), finished.parent)
    )
    assert found == expected


def test_a_validation_gives_the_scores_of_the_test_command(
    tiny_config: TrainConfig, tiny_regdb: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(
        tiny_config, data=str(tiny_regdb), dataset="regdb", epochs=3, validate_every=2, lr=0.05
    )
    with caplog.at_level(logging.INFO, logger="mrcn_fast"):
        trainer = train(dataclasses.replace(config, epochs=2))
    (line,) = trainer.journal.validations
    result = score_checkpoint(trainer.out, tiny_regdb, accelerator="cpu", progress=quiet())
    assert line["searches"] == {name: found["mean"] for name, found in result["searches"].items()}
    assert (line["step"], line["epoch"], line["headline"]) == (6, 1, result["headline"])
    protocol = "test protocol of regdb, visible-to-infrared"
    assert line["validation"] == protocol
    assert f"Validation after step 6 by the {protocol}: rank-1 " in caplog.text
    # An epoch more isn't validated, and the line of the validation stays.
    resumed = train(config, resume=True)
    assert resumed.step_count == 9 and resumed.journal.validations == [line]


def test_validation_people_are_left_out_of_the_training(tiny_config: TrainConfig, tmp_path: Path) -> None:
    tree = write_sysu(
        tmp_path / "sysu", identities=9, test_identities=3, images_per_camera=2, image_size=(32, 16)
    )
    people = {split: read_identities(tree / "exp" / f"{split}_id.txt") for split in ("train", "val", "test")}
    config = dataclasses.replace(
        tiny_config, data=str(tree), validate_every=2, validate_on="val", logger="csv"
    )
    trainer = train(config)
    assert set(trainer.training.identities) == set(people["train"])
    (line,) = trainer.journal.validations
    assert line["validation"].startswith(
        "test protocol of sysu-mm01 on its validation identities, all-search"
    )
    trained = open_trained(trainer.checkpoint_path, tree, accelerator="cpu")
    assert isinstance(trained.dataset, SYSUMM01)
    assert {sample.identity for sample in trained.dataset.query()} == set(people["test"])
    searches = searches_of(trained.dataset.validation(), {})
    assert {sample.identity for sample in searches[0].query} == set(people["val"])
    found, _ = score_searches(trained, searches, ScoringOptions(accelerator="cpu"), quiet())
    assert line["searches"]["all-search"] == found[0]["mean"]
    # The held-out people are no part of the run's training set, so that the whole set is another one.
    with pytest.raises(CheckpointError, match="validate_on"):
        train(dataclasses.replace(config, validate_on="test"), resume=True)


def test_validation_people_are_sysus_alone() -> None:
    with pytest.raises(ConfigError, match="only sysu-mm01 has a list of validation identities"):
        TrainConfig(data="", dataset="regdb", validate_on="val")
    with pytest.raises(ValueError, match="llcm has no list of validation identities"):
        open_dataset("llcm", "", hold_out_val=True)


def test_the_best_checkpoint_stays(tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given_rank1(monkeypatch, [0.4, 0.6, 0.6, 0.5])
    config = dataclasses.replace(tiny_config, epochs=4, batches=2, validate_every=1)
    best = Path(config.out) / BEST_NAME
    train(dataclasses.replace(config, epochs=1))
    assert load_checkpoint(best).step == 2
    trainer = train(config, resume=True)
    assert load_checkpoint(best).step == 4
    assert load_checkpoint(trainer.checkpoint_path).step == 8
    assert [line["step"] for line in trainer.journal.validations] == [2, 4, 6, 8]
    monkeypatch.undo()
    assert score_checkpoint(best, config.data, accelerator="cpu", trials=1, progress=quiet())["step"] == 4


def test_exchanged_modalities_are_reported_while_it_happens(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scoring, "_rank1", lambda scores: {"paper": 0.1, "crossed": 0.9})
    with caplog.at_level(logging.WARNING, logger="mrcn_fast"):
        train(dataclasses.replace(tiny_config, epochs=1, validate_every=1))
    assert "all-search: modalities exchanged: rank-1 is 10.0 by the paper's pairing" in caplog.text


def test_a_signal_ends_a_validation_which_is_made_again(
    tiny_config: TrainConfig,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = dataclasses.replace(tiny_config, validate_every=1)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(validation, "score_searches", lambda *_: signal.raise_signal(signal.SIGTERM))
        train(config)
    assert end.value.code == 143 and "Stopped after step 3" in caplog.text
    assert not (Path(config.out) / BEST_NAME).exists()
    resumed = train(config, resume=True)
    assert [line["step"] for line in resumed.journal.validations] == [3, 6]
    expected = load_checkpoint(finished).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())
