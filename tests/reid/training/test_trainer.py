"""Training: schedule, checkpoints, resumption, interruption, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.progress import Progress

from mrcn_fast import cli
from mrcn_fast.files import write_atomically
from mrcn_fast.reid.data import SYSUMM01, DatasetError, write_sysu
from mrcn_fast.reid.evaluation.scoring import score_checkpoint
from mrcn_fast.reid.models.heads import Head
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.models.resnet import WeightsError
from mrcn_fast.reid.training.checkpoint import (
    CHECKPOINT_NAME,
    CheckpointError,
    DataIdentity,
    build_model,
    check_config,
    check_data,
    data_identity,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from mrcn_fast.reid.training.config import ConfigError, TrainConfig, learning_rate
from mrcn_fast.reid.training.journal import CollapseWatch, Journal, StepResult, embedding_spread
from mrcn_fast.reid.training.optimizer import make_optimizer
from mrcn_fast.reid.training.run_folder import FolderInUseError, held
from mrcn_fast.reid.training.trainer import Trainer, TrainingError, check_new_run


def quiet() -> Progress:
    return Progress(disable=True)


def train(config: TrainConfig, **arguments: Any) -> Trainer:
    trainer = Trainer(config)
    trainer.fit(progress=quiet(), **arguments)
    return trainer


# The values.


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.01),
        (1, 0.019),
        (5, 0.055),
        (10, 0.1),
        (19, 0.1),
        (20, 0.01),
        (59, 0.01),
        (60, 0.001),
        (79, 0.001),
    ],
)
def test_the_schedule_is_the_papers(epoch: int, expected: float) -> None:
    assert learning_rate(TrainConfig(data=""), epoch) == pytest.approx(expected)


def test_the_defaults_are_the_papers() -> None:
    config = TrainConfig(data="")
    assert (config.model, config.depth, config.stages, config.gate) == ("mrcn", 50, (0,), "se")
    assert (config.height, config.width, config.identities, config.images) == (288, 128, 4, 4)
    assert (config.epochs, config.momentum, config.weight_decay, config.trunk_lr) == (80, 0.9, 5e-4, 0.1)
    assert (config.triplet_weight, config.cqc_weight, config.cqc_margin) == (1.0, 1.2, 0.2)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"identities": 1}, "got identities=1, expected an integer from 2 to"),
        ({"steps": 0}, "got steps=0, expected an integer from 1 to 1000000000, or none"),
        ({"flip": 1.5}, "got flip=1.5"),
        ({"milestones": (60, 20)}, "got milestones=\(60, 20\), expected increasing values"),
        ({"height": 8}, "got height=8"),
        ({"split": 2}, "sysu-mm01 has one split"),
        ({"parts": 0}, "got parts=0, expected an integer from 1 to"),
        ({"parts": 19}, "got parts=19, expected at most 18 at height=288"),
        ({"height": 10**9}, "got height=1000000000, expected an integer from 32 to 8192"),
        ({"height": 48.5}, "got height=48.5, expected an integer from 32"),
        ({"width": "128"}, "got width='128', expected an integer from 16"),
        ({"padding": 289}, "got padding=289, expected at most 288"),
        ({"images": 10**6}, "expected at most 4294967296"),
        ({"lr": math.nan}, "got lr=nan, expected a finite number of at least 0"),
        ({"lr": math.inf}, "got lr=inf, expected a finite number"),
        ({"lr": "0.1"}, "got lr='0.1', expected a number"),
        ({"momentum": -0.1}, "got momentum=-0.1, expected a number from 0 to 1"),
        ({"momentum": math.nan}, "got momentum=nan"),
        ({"weight_decay": -1}, "got weight_decay=-1, expected a number of at least 0"),
        ({"cqc_weight": -1.0}, "got cqc_weight=-1.0, expected a number of at least 0"),
        ({"triplet_margin": math.inf}, "got triplet_margin=inf"),
        ({"seed": -1}, "got seed=-1, expected an integer from 0 to"),
        ({"seed": 2**64}, "got seed=18446744073709551616, expected an integer from 0 to 9223372036854775807"),
        ({"epochs": True}, "got epochs=True, expected an integer"),
        ({"workers": -1}, "got workers=-1, expected an integer from 0 to 1024"),
        ({"depth": 34}, "got depth=34, expected one of 18, 50"),
        ({"model": "mrcnn"}, "got model='mrcnn', expected one of baseline, snr, mrcn"),
        ({"gate": ["se"]}, r"got gate=\['se'\], expected one of se, eca"),
        ({"backend": "abacus"}, "got backend='abacus', expected one of cpu, triton"),
        ({"precision": 16}, "got precision=16, expected one of 32-true"),
        ({"stages": 0}, "got stages=0, expected a list of values, each an integer from 0 to 4"),
        ({"stages": ()}, "expected at least one stage for the blocks of mrcn"),
        ({"stages": (1, 5)}, r"got stages\[1\]=5, expected an integer from 0 to 4"),
        ({"skip_unreadable": "yes"}, "got skip_unreadable='yes', expected true or false"),
        ({"out": ""}, "got out='', expected a path that is not empty"),
        ({"cache": "a\0b"}, "expected a path without the character NUL"),
        ({"weights": 7}, "got weights=7, expected a path, or none"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TrainConfig(data="", **values)


def test_values_are_put_into_their_plain_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given: dict[str, Any] = {
        "height": np.int64(64),
        "lr": np.float32(0.5),
        "stages": [0, 2],
        "out": tmp_path / "run",
        "weights": "~/a",
    }
    config = TrainConfig(data="~/tree", **given)
    plain = (64, 0.5, (0, 2), str(tmp_path / "run"), str(tmp_path / "a"), str(tmp_path / "tree"))
    found = (config.height, config.lr, config.stages, config.out, config.weights, config.data)
    assert found == plain and list(map(type, found)) == list(map(type, plain))
    assert json.loads(json.dumps(config.as_dict()))["height"] == 64


def test_the_configuration_survives_json() -> None:
    config = TrainConfig(data="somewhere", milestones=(3, 7), steps=5, stages=(0, 2))
    values = json.loads(json.dumps(config.as_dict()))
    assert TrainConfig.from_dict(values) == config
    with pytest.raises(ConfigError, match="got colour='red', expected no value of this name"):
        TrainConfig.from_dict(values | {"colour": "red"})
    del values["depth"]
    with pytest.raises(ConfigError, match="got no depth, expected one of 18, 50"):
        TrainConfig.from_dict(values)


def test_neck_and_classifier_learn_at_the_full_rate() -> None:
    model = ReIDModel(5, depth=18)
    optimizer = make_optimizer(model, TrainConfig(data=""))
    head, rest = optimizer.param_groups
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head() if p.requires_grad}
    assert (head["scale"], rest["scale"]) == (1.0, 0.1)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)


# Runs.


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


def test_a_second_run_does_not_replace_the_first(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, steps=1)
    path = train(config).checkpoint_path
    before = path.read_bytes()
    with pytest.raises(TrainingError, match=r"a run is already there.*--resume") as error:
        train(config)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert train(config, overwrite=True).step_count == 1


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


# What goes wrong.


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
    with pytest.raises(TrainingError, match=r"aren't finite \(trunk\.visible\.conv1\.weight"):
        trainer.save()
    assert trainer.checkpoint_path.read_bytes() == before


def test_memory_that_is_not_there_stops_the_run_in_a_line(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(dataclasses.replace(tiny_config, steps=1)).checkpoint_path
    before = path.read_bytes()
    monkeypatch.setattr(ReIDModel, "forward", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    flags = [f"--{name}={value}" for name, value in tiny_config.as_dict().items() if value is not None]
    assert cli.main(["train", *flags, "--resume"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert f"could not allocate {1 << 60} bytes" in last and "--identities" in last
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert train(tiny_config, resume=True).step_count == 6


def test_collapse_is_told_while_it_happens(caplog: pytest.LogCaptureFixture) -> None:
    def result(spread: float) -> StepResult:
        return StepResult(1.0, 1.0, 0.3, 0.0, 0.0, 0.1, spread)

    watch = CollapseWatch()
    with caplog.at_level(logging.WARNING, logger="mrcn_fast"):
        assert not any(watch.look(step, result(0.2)) for step in range(100))
        assert [watch.look(step, result(1e-4)) for step in range(100, 121)].index(True) == 19
        assert not watch.look(121, result(0.2))
        assert not any(watch.look(step, result(1e-4)) for step in range(122, 141))
    assert "step 119: the embeddings have collapsed" in caplog.text


def test_spread_by_hand() -> None:
    # Mean (3, 4), length 5; variances 1 and 4.
    points = torch.tensor([[[2.0, 2.0], [4.0, 6.0]]])
    assert embedding_spread(points).item() == pytest.approx(5**0.5 / 5)
    # As two parts of one number each.
    assert embedding_spread(points.permute(2, 1, 0)).item() == pytest.approx(5**0.5 / 5)
    assert embedding_spread(torch.ones(1, 4, 3)).item() == 0


def test_an_unreadable_image_stops_training_by_name(tiny_config: TrainConfig, tmp_path: Path) -> None:
    root = write_sysu(
        tmp_path / "tree", identities=6, test_identities=2, images_per_camera=1, image_size=(32, 16)
    )
    for path in root.glob("cam3/*/*.jpg"):
        path.write_bytes(b"not an image")
    with pytest.raises(DatasetError, match="cam3"):
        train(dataclasses.replace(tiny_config, data=str(root), batches=20, epochs=1))


def test_what_files_alone_tell_is_refused_first(tiny_config: TrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    out = Path(tiny_config.out)
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"out": str(file)}, OSError, "expected a folder for the run; found a file"),
        ({"cache": str(file)}, OSError, "expected a folder for the cache; found a file"),
        ({"weights": str(out / "absent.pth")}, WeightsError, "no such file"),
    ]
    for values, error, told in refused:
        with pytest.raises(error, match=told):
            check_new_run(dataclasses.replace(tiny_config, **values), resume=False, overwrite=False)
    with pytest.raises(TrainingError, match="both --resume and --overwrite"):
        check_new_run(tiny_config, resume=True, overwrite=True)
    assert not out.exists()


def test_too_few_identities_are_refused(tiny_config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="a batch needs 5 distinct identities; got 4"):
        Trainer(dataclasses.replace(tiny_config, identities=5))


PROGRAM = """
import sys, json
from mrcn_fast.cli import main
sys.exit(main(json.loads(sys.argv[1])))
"""


def started(config: TrainConfig, *more: str) -> subprocess.Popen[str]:
    """`mrcn-fast train` with these values, in a process of its own."""
    values = config.as_dict() | {"checkpoint_every": 1}
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(["train", *flags, *more])],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "500"},
        # A shell's background jobs, and what they start, ignore it: this one shall hear it all the same.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(process: subprocess.Popen[str], config: TrainConfig, steps: int) -> None:
    """Until the run has taken so many steps."""
    metrics = Path(config.out) / "metrics.jsonl"
    until = time.monotonic() + 300  # never reached but where training does not start
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None and time.monotonic() < until, "training did not get going"
        time.sleep(0.02)


def test_ctrl_c_leaves_the_last_checkpoint_whole(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, epochs=100000)
    process = started(config)
    try:
        wait_for(process, config, 4)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    path = Path(config.out) / CHECKPOINT_NAME
    assert process.returncode == 130
    assert "Traceback" not in told
    assert f"The last complete checkpoint is {path}" in told
    checkpoint = load_checkpoint(path)
    assert checkpoint.step >= 3
    build_model(path, checkpoint)
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == [".lock"]


@pytest.mark.slow
def test_a_killed_run_ends_bitwise_as_one_that_was_not(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, epochs=4, batches=5)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    first = started(whole)
    killed = started(config)
    try:
        for steps in (3, 12):
            wait_for(killed, config, steps)
            killed.kill()
            killed.communicate()
            assert killed.returncode == -signal.SIGKILL
            killed = started(config, "--resume")
        _, told = killed.communicate(timeout=300)
        assert killed.returncode == 0, told
        _, told = first.communicate(timeout=300)
        assert first.returncode == 0, told
    finally:
        first.kill()
        killed.kill()
    expected, found = load_checkpoint(whole.out), load_checkpoint(config.out)
    assert found.step == expected.step == 20
    assert all(torch.equal(tensor, expected.model[name]) for name, tensor in found.model.items())
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    tiny_config: TrainConfig, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(tiny_config.out).mkdir()
    (Path(tiny_config.out) / "metrics.jsonl").write_text('{"step": 1}\n')
    with caplog.at_level(logging.WARNING, logger="mrcn_fast"):
        train(tiny_config, resume=True)
    assert "no checkpoint yet: the run begins with its first step" in caplog.text
    expected, found = load_checkpoint(finished).model, load_checkpoint(tiny_config.out).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# Checkpoints.


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: Any) -> None:
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_comes_back_as_it_was(finished: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(finished)
    copy = tmp_path / "copy.pth"
    save_checkpoint(copy, checkpoint)
    again = load_checkpoint(copy)
    assert (again.config, again.data, again.step) == (checkpoint.config, checkpoint.data, checkpoint.step)
    assert again.random["python"] == checkpoint.random["python"]
    assert torch.equal(again.random["torch"], checkpoint.random["torch"])
    assert all(torch.equal(tensor, again.model[name]) for name, tensor in checkpoint.model.items())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file"),
        (b"garbage", "can't be read"),
        ({"weights": torch.ones(1)}, "found the keys weights"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_path(tmp_path: Path, content: Any, told: str) -> None:
    path = tmp_path / CHECKPOINT_NAME
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=told) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_truncated_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT_NAME
    path.write_bytes(finished.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_checkpoint(path)


def test_another_architecture_is_refused(finished: Path) -> None:
    checkpoint = load_checkpoint(finished)
    with pytest.raises(CheckpointError, match="another architecture") as error:
        load_weights(finished, ReIDModel(4, depth=50), checkpoint.model)
    assert str(finished) in str(error.value)
    with pytest.raises(CheckpointError, match=r"another architecture(.|\n)*plugs.0.norm_weight"):
        load_weights(finished, ReIDModel(4, depth=18, model="baseline"), checkpoint.model)


def test_other_values_are_refused_on_resume(finished: Path) -> None:
    checkpoint = load_checkpoint(finished)
    other = dataclasses.replace(checkpoint.config, depth=50, lr=0.5, workers=3, epochs=9)
    with pytest.raises(CheckpointError) as error:
        check_config(finished, checkpoint, other)
    message = str(error.value)
    assert str(finished) in message
    assert "depth: expected 18 (checkpoint), found 50 (given)" in message
    assert "lr: expected 0.02 (checkpoint), found 0.5 (given)" in message
    assert "workers" not in message
    assert "epochs" not in message


def test_a_run_goes_on_from_its_own_weights_alone(
    tiny_config: TrainConfig, resnet18: Path, tmp_path: Path
) -> None:
    moved, other = shutil.copy(resnet18, tmp_path / "moved.pth"), tmp_path / "other.pth"
    torch.save(torch.load(resnet18) | {"conv1.weight": torch.ones(64, 3, 7, 7)}, other)
    config = dataclasses.replace(tiny_config, weights=str(resnet18), steps=1)
    path = train(config).checkpoint_path
    checkpoint = load_checkpoint(path)
    for weights, told in ((None, "random ones"), (str(other), r"other\.pth")):
        with pytest.raises(CheckpointError, match=rf"weights: expected '.*resnet18\.pth.* found .*{told}"):
            check_config(path, checkpoint, dataclasses.replace(config, weights=weights))
    assert train(dataclasses.replace(config, weights=str(moved), steps=2), resume=True).step_count == 2


def identity_of(tree: Path) -> DataIdentity:
    dataset = SYSUMM01(tree)
    return data_identity(dataset, dataset.training())


def test_another_data_set_is_refused(finished: Path, tiny_tree: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(finished)
    # The same people and file names, other pictures.
    other = write_sysu(
        tmp_path / "other", identities=7, test_identities=3, images_per_camera=2, image_size=(32, 16), seed=1
    )
    given = identity_of(other)
    with pytest.raises(CheckpointError, match="belongs to another data set") as error:
        check_data(finished, checkpoint, given)
    for part in (str(finished), checkpoint.data.fingerprint[:12], given.fingerprint[:12]):
        assert part in str(error.value)
    check_data(finished, checkpoint, identity_of(tiny_tree))
    with pytest.raises(CheckpointError, match="another data set"):
        score_checkpoint(finished, other, accelerator="cpu", progress=quiet())


def test_a_moved_tree_is_the_same_data_set(tiny_tree: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_tree)
    assert identity_of(moved) == identity_of(tiny_tree)


def test_other_pictures_of_the_same_sizes_are_another_data_set(tiny_tree: Path, tmp_path: Path) -> None:
    # As bitmaps have them, which RegDB is made of.
    other = shutil.copytree(tiny_tree, tmp_path / "other")
    assert identity_of(other) == identity_of(tiny_tree)
    for path in other.glob("cam*/*/*.jpg"):
        path.write_bytes(path.read_bytes()[::-1])
    assert identity_of(other) != identity_of(tiny_tree)


def line(step: int) -> bytes:
    """A line of metrics.jsonl."""
    values = {"step": step, "epoch": 0, "lr": 0.01, "loss": 1.0, "identity": 1.0, "triplet": 0.0, "cqc": 0.0}
    more = {"causality": 0.0, "accuracy": 0.5, "spread": 0.1, "step_seconds": 0.1, "wait_seconds": 0.0}
    return json.dumps(values | more).encode()


def test_a_journal_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"\n" + line(2) + b"\n" + line(3) + b'\n{"ste')
    journal = Journal(path)
    journal.return_to(2)
    journal.add(StepResult(1, 1, 0, 0, 0, 0.5, 0.1), 0.1, 0.0)
    journal.write(3, 0, 0.01)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b'{"ste\n'


DAMAGED = {
    "cut": line(2)[:40],
    "NUL bytes": bytes(60),
    "NUL bytes in it": line(2)[:20] + bytes(8) + line(2)[28:],
    "no JSON": b"Traceback (most recent call last):",
    "no UTF-8": b"\xff\xfe" + line(2),
    "two in one": line(2) + line(2),
    "a list": b"[1, 2]",
    "a number": b"7",
    "nothing": b"null",
    "nested": b"[" * 100_000,
    "no number": line(2).replace(b'"step": 2', b'"step": "2"'),
    "not finite": line(2).replace(b'"loss": 1.0', b'"loss": NaN'),
    "true": line(2).replace(b'"loss": 1.0', b'"loss": true'),
    "a value less": line(2).replace(b'"spread": 0.1, ', b""),
    "a value more": line(2).replace(b"{", b'{"more": 1, '),
    "a step before": line(1),
    "step 0": line(0),
    "a huge number": line(2).replace(b'"step": 2', b'"step": 1' + b"0" * 5000),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_set_aside(tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([line(1), text, line(3), b""]))
    journal = Journal(path)
    with caplog.at_level(logging.WARNING, logger="mrcn_fast"):
        journal.return_to(9)
    assert [line["step"] for line in journal.lines] == [1, 3]
    assert path.read_bytes().splitlines() == [line(1), line(3)]
    aside = path.with_name("metrics.jsonl.damaged")
    assert aside.read_bytes() == text + b"\n"
    assert f"{path}: damaged in line 2: moved to metrics.jsonl.damaged" in caplog.text
    # What was set aside before stays.
    path.write_bytes(b"more")
    journal.return_to(9)
    assert aside.read_bytes() == text + b"\nmore\n"
    journal.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_where_its_journal_is_damaged(tiny_config: TrainConfig, finished: Path) -> None:
    train(dataclasses.replace(tiny_config, steps=2))
    path = Path(tiny_config.out) / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + second[:30] + bytes(10))
    train(tiny_config, resume=True)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4, 5, 6]
    expected, found = load_checkpoint(finished).model, load_checkpoint(tiny_config.out).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# One process in a folder.


def test_a_folder_that_another_process_holds_is_refused(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, steps=1)
    path = train(config).checkpoint_path
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with held(path.parent, "trains"):
        for arguments in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(FolderInUseError, match=r"another process trains in this folder") as error:
                train(dataclasses.replace(config, steps=2), **arguments)
            assert str(path.parent) in str(error.value)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
    train(dataclasses.replace(config, steps=2), resume=True)


def test_the_system_lets_go_of_a_killed_runs_folder(tiny_config: TrainConfig) -> None:
    # Its processes that decode images live a little longer: they don't hold the folder.
    config = dataclasses.replace(tiny_config, epochs=100000, workers=1)
    process = started(config)
    try:
        wait_for(process, config, 1)
        second = started(config, "--resume")
        _, told = second.communicate(timeout=300)
        assert second.returncode == 2
        assert f"{config.out}: another process trains in this folder" in told and "Traceback" not in told
    finally:
        process.kill()
        process.communicate()
    with held(Path(config.out), "trains"):
        pass


@pytest.mark.parametrize("arguments", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_what_a_killed_run_left_goes(tiny_config: TrainConfig, arguments: dict[str, bool]) -> None:
    config = dataclasses.replace(tiny_config, steps=1)
    folder = train(config).out
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = (CHECKPOINT_NAME, "metrics.jsonl", "test-all-search.json")
    left = [folder / f".{name}.{ended.pid}.tmp" for name in names]
    others = [folder / f".notes.{ended.pid}.tmp", folder / f".{CHECKPOINT_NAME}.{os.getppid()}.tmp"]
    for path in (*left, *others):
        path.write_bytes(b"half")
    train(dataclasses.replace(config, steps=2), **arguments)
    assert [path.exists() for path in (*left, *others)] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.jsonl.damaged", "test-all-search.json"])
def test_what_is_left_of_a_run_without_checkpoint_is_not_replaced(
    tiny_config: TrainConfig, name: str
) -> None:
    config = dataclasses.replace(tiny_config, steps=1)
    there = Path(config.out) / name
    there.parent.mkdir()
    there.write_text("of an earlier run")
    with pytest.raises(TrainingError, match=rf"{there}: a run is already there"):
        train(config)
    assert there.read_text() == "of an earlier run"
    train(config, overwrite=True)
    assert sorted(path.name for path in there.parent.iterdir()) == [".lock", CHECKPOINT_NAME, "metrics.jsonl"]
