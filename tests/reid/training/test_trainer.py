"""Training: what a run leaves, that equal runs are equal, and what goes wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import multiprocessing
import re
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from mrcn_fast import cli
from mrcn_fast.reid import console
from mrcn_fast.reid.data import DatasetError, write_sysu
from mrcn_fast.reid.evaluation.scoring import score_checkpoint
from mrcn_fast.reid.models.heads import Head
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.models.resnet import WeightsError
from mrcn_fast.reid.training.checkpoint import CHECKPOINT_NAME, CheckpointError, load_checkpoint
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.new_run import check_new_run
from mrcn_fast.reid.training.restoring import build_model
from mrcn_fast.reid.training.trainer import Trainer, TrainingError
from tests.reid.conftest import quiet, train


def test_a_run_leaves_checkpoint_and_metrics(finished: Path, tiny_tree: Path) -> None:
    checkpoint = load_checkpoint(finished)
    assert (checkpoint.step, checkpoint.epoch, checkpoint.batch) == (6, 2, 0)
    assert checkpoint.config.data == str(tiny_tree)
    assert checkpoint.data.name == "sysu-mm01"
    assert len(checkpoint.data.identities) == 4
    lines = [json.loads(line) for line in (finished.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines] == [0.01] * 3 + [0.02] * 3
    assert checkpoint.metrics == lines[-1]
    for line in lines:
        parts = line["identity"] + line["triplet"] + 1.2 * line["cqc"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
        assert line["spread"] > 0.001
    assert not list(finished.parent.glob(".*.tmp"))


def test_the_same_seed_ends_at_the_same_weights(tiny_config: TrainConfig, finished: Path) -> None:
    again = train(tiny_config)
    expected = load_checkpoint(finished).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize("steps", [2, 3])
def test_a_resumed_run_ends_bitwise_as_an_uninterrupted_one(
    tiny_config: TrainConfig, finished: Path, steps: int
) -> None:
    train(dataclasses.replace(tiny_config, steps=steps))
    assert load_checkpoint(tiny_config.out).step == steps
    torch.manual_seed(12345)  # a new process would not continue this one's generator
    resumed = train(tiny_config, resume=True)
    whole = load_checkpoint(finished)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model[name]), name
    lines = (Path(tiny_config.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_the_end_names_commands_that_run(
    tiny_config: TrainConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, out=str(tmp_path / "two words"), steps=1)
    with caplog.at_level(logging.INFO, logger="mrcn_fast"):
        train(config)
    (line,) = (line for line in caplog.messages if "is trained" in line)
    assert line.startswith("mrcn is trained to step 1: loss ")
    test, report = (shlex.split(command) for command in re.findall("`mrcn-fast ([^`]*)`", line))
    assert cli.main([*test, "--trials=1", "--accelerator=cpu"]) == 0
    assert list(Path(config.out).glob("test-*.json"))
    page = tmp_path / "page.html"
    assert cli.main([*report, f"--out={page}", "--queries=1", "--accelerator=cpu"]) == 0
    assert page.is_file()


def test_the_runs_log_is_beside_its_metrics(
    tiny_config: TrainConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(tiny_config.out) / "run.log"
    with caplog.at_level(logging.INFO, logger="mrcn_fast"):
        train(dataclasses.replace(tiny_config, steps=1))
        first = path.read_text()
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO mrcn after stage", first)
        assert "INFO mrcn is trained to step 1: loss " in first
        monkeypatch.setattr(Trainer, "_run", lambda *_: (_ for _ in ()).throw(OSError("no\udcff space left")))
        with pytest.raises(OSError, match="space left"):
            train(dataclasses.replace(tiny_config, steps=2), resume=True)
        resumed = path.read_text()
        assert resumed.startswith(first)
        assert resumed.endswith("ERROR ended by OSError: no\\udcff space left\n")
        with pytest.raises(OSError, match="space left"):
            train(tiny_config, overwrite=True)
        assert first not in path.read_text()
    handlers = logging.getLogger("mrcn_fast").handlers
    assert not any(isinstance(handler, logging.FileHandler) for handler in handlers)


def test_random_weights_of_the_papers_network_are_not_overlooked(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for depth, file in ((50, "resnet50-0676ba61.pth"), (18, "")):
        written = io.StringIO()
        monkeypatch.setattr(console, "console", Console(file=written, width=100))
        Trainer(dataclasses.replace(tiny_config, depth=depth))._introduce()
        assert file in written.getvalue() and bool(written.getvalue()) == bool(file)


def test_a_second_run_does_not_replace_the_first(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, steps=1)
    path = train(config).checkpoint_path
    before = path.read_bytes()
    with pytest.raises(TrainingError, match=r"a run is already there.*--resume") as error:
        train(config)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert train(config, overwrite=True).step_count == 1


def test_a_trainer_begins_one_run(tiny_config: TrainConfig) -> None:
    trainer = train(dataclasses.replace(tiny_config, steps=1))
    before = trainer.checkpoint_path.read_bytes()
    with pytest.raises(TrainingError, match="has taken 1 steps, expected one that has taken none"):
        trainer.fit(overwrite=True, progress=quiet())
    assert trainer.checkpoint_path.read_bytes() == before


def test_a_trainer_that_took_single_steps_begins_no_run(tiny_config: TrainConfig) -> None:
    trainer = Trainer(dataclasses.replace(tiny_config, steps=1))
    trainer.step(next(iter(trainer.batches.of(0))))
    with pytest.raises(TrainingError, match=r"has taken steps by step\(\), expected one that has taken none"):
        trainer.fit(progress=quiet())
    assert not trainer.checkpoint_path.exists()


def test_a_run_is_not_resumed_to_an_earlier_end(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, steps=2)
    path = train(config).checkpoint_path
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="has taken 2 steps, and is to end after 1: give more steps"):
        train(dataclasses.replace(config, steps=1), resume=True)
    assert path.read_bytes() == before


def test_the_old_runs_scores_go_with_it(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, steps=1)
    path = train(config).checkpoint_path
    score_checkpoint(path, config.data, trials=1, accelerator="cpu", progress=quiet())
    train(dataclasses.replace(config, lr=0.5), overwrite=True)
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", CHECKPOINT_NAME, "metrics.jsonl"]


def test_a_run_trains_only_what_should_train(tiny_config: TrainConfig) -> None:
    trainer = Trainer(dataclasses.replace(tiny_config, steps=2))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit(progress=quiet())
    same = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    assert same == ["heads.0.neck.bias"]


def test_the_baseline_trains_in_channels_last_bf16(tiny_config: TrainConfig) -> None:
    # Not 32 x 16: see test_devices.py's SIZE.
    values: dict[str, Any] = {"precision": "bf16-mixed", "height": 64, "width": 32}
    config = dataclasses.replace(tiny_config, model="baseline", channels_last=True, steps=2, **values)
    trainer = train(config)
    assert all(line["cqc"] == 0 for line in trainer.journal.lines)
    result = score_checkpoint(trainer.out, config.data, trials=1, accelerator="cpu", progress=quiet())
    assert 0 < result["searches"]["all-search"]["mean"]["mAP"] <= 1


def test_decoding_processes_give_the_same_run(tiny_config: TrainConfig, finished: Path) -> None:
    train(dataclasses.replace(tiny_config, workers=1))
    expected = load_checkpoint(finished).model
    found = load_checkpoint(tiny_config.out).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_no_decoding_process_outlives_its_run(tiny_config: TrainConfig) -> None:
    """A later run in the same program would inherit them."""
    before = set(multiprocessing.active_children())
    config = dataclasses.replace(tiny_config, workers=1, steps=1)
    trainer = Trainer(config)
    trainer.fit(progress=quiet())
    assert set(multiprocessing.active_children()) <= before
    trainer.config.steps = 2
    trainer.fit(resume=True, progress=quiet())
    assert trainer.step_count == 2
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize(
    "values",
    [
        {"model": "mrm", "gate": "eca"},
        {"model": "mcm", "stages": (0, 2)},
        {"model": "snr", "stages": (1, 2), "pool": "gem"},
        {"parts": 2, "gate": "cbam", "channel_augmentation": 0.5},
        {"cqc_weight": 0.0, "backend": "reference"},
    ],
    ids=["mrm", "mcm", "snr", "parts", "reference"],
)
def test_every_network_trains_and_comes_back(
    tiny_config: TrainConfig, tiny_regdb: Path, values: dict[str, Any]
) -> None:
    config = dataclasses.replace(
        tiny_config, data=str(tiny_regdb), dataset="regdb", split=2, steps=2, **values
    )
    trainer = train(config)
    checkpoint = load_checkpoint(trainer.checkpoint_path)
    assert checkpoint.config == config
    again = build_model(trainer.checkpoint_path, checkpoint)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for line in trainer.journal.lines:
        assert (line["cqc"] > 0) == (config.model != "snr" and config.cqc_weight > 0)
        assert (line["causality"] > 0) == (config.model == "snr")
        parts = line["identity"] + line["triplet"] + config.cqc_weight * line["cqc"]
        parts += config.causality_weight * line["causality"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)


def test_a_cache_gives_the_same_run(tiny_config: TrainConfig, finished: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(tiny_config, cache=str(tmp_path / "cache")))
    assert list((tmp_path / "cache").rglob("*.npy"))
    expected, found = load_checkpoint(finished).model, load_checkpoint(tiny_config.out).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config: TrainConfig) -> None:
    trainer = train(dataclasses.replace(tiny_config, steps=1))
    path = trainer.checkpoint_path
    before = path.read_bytes()
    with torch.no_grad():
        cast(Head, trainer.model.heads[0]).classifier.weight[0] = torch.inf
    trainer.config.steps = None
    bars = quiet()
    with pytest.raises(TrainingError) as error:
        trainer._run_epoch(bars, bars.add_task("", status=""))
    message = str(error.value)
    assert message.startswith("step 2 (epoch 1): the loss isn't finite")
    assert f"The last complete checkpoint is {path}" in message
    files = message.splitlines()[1:]
    assert len(files) == 8
    assert all(Path(file.strip()).is_file() for file in files)
    assert path.read_bytes() == before


def test_weights_that_are_not_finite_are_never_saved(tiny_config: TrainConfig) -> None:
    trainer = train(dataclasses.replace(tiny_config, steps=1))
    before = trainer.checkpoint_path.read_bytes()
    with torch.no_grad():
        trainer.model.trunk.visible.conv1.weight[0] = torch.nan
    with pytest.raises(TrainingError, match=r"aren't finite: trunk\.visible\.conv1\.weight"):
        trainer.save()
    assert trainer.checkpoint_path.read_bytes() == before


def test_a_failed_allocation_stops_the_run_with_one_line(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(dataclasses.replace(tiny_config, steps=1)).checkpoint_path
    before = path.read_bytes()
    monkeypatch.setattr(ReIDModel, "forward", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    flags = [f"--{name}={value}" for name, value in tiny_config.as_dict().items() if value is not None]
    # Without --steps the run would end where the checkpoint's did.
    assert cli.main(["train", *flags, "--resume", "--steps=6"]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert f"could not allocate {1 << 60} bytes" in last and "--identities" in last
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert train(tiny_config, resume=True).step_count == 6


def test_an_unreadable_image_stops_training_by_name(tiny_config: TrainConfig, tmp_path: Path) -> None:
    root = write_sysu(
        tmp_path / "tree", identities=6, test_identities=2, images_per_camera=1, image_size=(32, 16)
    )
    for path in root.glob("cam3/*/*.jpg"):
        path.write_bytes(b"not an image")
    with pytest.raises(DatasetError, match="cam3"):
        train(dataclasses.replace(tiny_config, data=str(root), batches=20, epochs=1))


def test_unfit_files_are_refused_before_training(tiny_config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    out = Path(tiny_config.out)
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"out": str(file)}, OSError, "expected a folder for the run; found a file"),
        ({"cache": str(file)}, OSError, "expected a folder for the cache; found a file"),
        ({"weights": str(out / "absent.pth")}, WeightsError, "no such file"),
    ]
    for values, error, message in refused:
        with pytest.raises(error, match=message):
            check_new_run(dataclasses.replace(tiny_config, **values), resume=False, overwrite=False)
    with pytest.raises(TrainingError, match="both --resume and --overwrite"):
        check_new_run(tiny_config, resume=True, overwrite=True)
    assert not out.exists()


def test_too_few_identities_are_refused(tiny_config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="a batch needs 5 different identities; got 4"):
        Trainer(dataclasses.replace(tiny_config, identities=5))
