"""Training: schedule, checkpoints, resumption, interruption, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from mrcn_fast.reid.checkpoint import (
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
    write_atomically,
)
from mrcn_fast.reid.config import ConfigError, TrainConfig, learning_rate
from mrcn_fast.reid.data import SYSUMM01, DatasetError, write_sysu
from mrcn_fast.reid.extraction import extract
from mrcn_fast.reid.metrics import CollapseWatch, Journal, StepResult, embedding_spread
from mrcn_fast.reid.model import ReIDModel
from mrcn_fast.reid.scoring import score_checkpoint
from mrcn_fast.reid.training import Trainer, TrainingError, make_optimizer


def quiet() -> Progress:
    return Progress(disable=True)


def train(config: TrainConfig, **arguments: Any) -> Trainer:
    trainer = Trainer(config)
    trainer.fit(progress=quiet(), **arguments)
    return trainer


@pytest.fixture(scope="module")
def finished(tiny_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a finished run of six steps; tests only read it."""
    out = tmp_path_factory.mktemp("finished")
    return train(dataclasses.replace(tiny_run, out=str(out))).checkpoint_path


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
    assert (config.model, config.depth, config.stage, config.gate, config.reduction) == (
        "mrcn",
        50,
        0,
        "se",
        16,
    )
    assert (config.height, config.width, config.identities, config.images) == (288, 128, 4, 4)
    assert (config.epochs, config.momentum, config.weight_decay, config.trunk_lr) == (80, 0.9, 5e-4, 0.1)
    assert (config.triplet_weight, config.cqc_weight, config.cqc_margin) == (1.0, 1.2, 0.2)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"identities": 1}, "got identities=1, expected at least 2"),
        ({"steps": 0}, "got steps=0, expected at least 1, or none"),
        ({"flip": 1.5}, "got flip=1.5"),
        ({"milestones": (60, 20)}, "expected increasing epochs"),
        ({"height": 8}, "got height=8"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TrainConfig(data="", **values)


def test_the_configuration_survives_json() -> None:
    config = TrainConfig(data="somewhere", milestones=(3, 7), steps=5)
    values = json.loads(json.dumps(config.as_dict()))
    assert TrainConfig.from_dict(values) == config
    with pytest.raises(ConfigError, match=r"unknown values.*colour"):
        TrainConfig.from_dict(values | {"colour": "red"})
    del values["depth"]
    with pytest.raises(ConfigError, match=r"missing.*depth"):
        TrainConfig.from_dict(values)


def test_neck_and_classifier_learn_at_the_full_rate() -> None:
    model = ReIDModel(5, depth=18)
    optimizer = make_optimizer(model, TrainConfig(data=""))
    head, rest = optimizer.param_groups
    assert {id(p) for p in head["params"]} == {id(model.neck.weight), id(model.classifier.weight)}
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


def test_a_run_trains_only_what_should_train(tiny_config: TrainConfig) -> None:
    trainer = Trainer(dataclasses.replace(tiny_config, steps=2))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit(progress=quiet())
    same = [n for n, p in trainer.model.named_parameters() if torch.equal(p, before[n])]
    assert same == ["neck.bias"]


def test_the_baseline_trains_in_channels_last_bf16(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(
        tiny_config, model="baseline", channels_last=True, precision="bf16-mixed", steps=2
    )
    trainer = train(config)
    assert all(line["cqc"] == 0 for line in trainer.journal.lines)
    result = score_checkpoint(trainer.out, config.data, trials=1, accelerator="cpu", progress=quiet())
    assert 0 < result["mean"]["mAP"] <= 1


def test_decoding_processes_give_the_same_run(tiny_config: TrainConfig, finished: Path) -> None:
    train(dataclasses.replace(tiny_config, workers=1))
    expected = load_checkpoint(finished).model
    found = load_checkpoint(tiny_config.out).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# What goes wrong.


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config: TrainConfig) -> None:
    trainer = train(dataclasses.replace(tiny_config, steps=1))
    path = trainer.checkpoint_path
    before = path.read_bytes()
    with torch.no_grad():
        trainer.model.classifier.weight[0] = torch.inf
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


def test_collapse_is_told_while_it_happens(caplog: pytest.LogCaptureFixture) -> None:
    def result(spread: float) -> StepResult:
        return StepResult(1.0, 1.0, 0.3, 0.0, 0.1, spread)

    watch = CollapseWatch()
    with caplog.at_level(logging.WARNING, logger="mrcn_fast"):
        assert not any(watch.look(step, result(0.2)) for step in range(100))
        assert [watch.look(step, result(1e-4)) for step in range(100, 121)].index(True) == 19
        assert not watch.look(121, result(0.2))
        assert not any(watch.look(step, result(1e-4)) for step in range(122, 141))
    assert "step 119: the embeddings have collapsed" in caplog.text


def test_spread_by_hand() -> None:
    # Mean (3, 4), length 5; variances 1 and 4.
    points = torch.tensor([[2.0, 2.0], [4.0, 6.0]])
    assert embedding_spread(points).item() == pytest.approx(5**0.5 / 5)
    assert embedding_spread(torch.ones(4, 3)).item() == 0


def test_an_unreadable_image_stops_training_by_name(tiny_config: TrainConfig, tmp_path: Path) -> None:
    root = write_sysu(
        tmp_path / "tree", identities=6, test_identities=2, images_per_camera=1, image_size=(32, 16)
    )
    for path in root.glob("cam3/*/*.jpg"):
        path.write_bytes(b"not an image")
    with pytest.raises(DatasetError, match="cam3"):
        train(dataclasses.replace(tiny_config, data=str(root), batches=20, epochs=1))


def test_too_few_identities_are_refused(tiny_config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="a batch needs 5 distinct identities; got 4"):
        Trainer(dataclasses.replace(tiny_config, identities=5))


PROGRAM = """
import sys, json
from mrcn_fast.cli import main
sys.exit(main(json.loads(sys.argv[1])))
"""


def test_ctrl_c_leaves_the_last_checkpoint_whole(tiny_config: TrainConfig) -> None:
    flags = [f"--{name}={value}" for name, value in tiny_config.as_dict().items() if value is not None]
    flags = [flag for flag in flags if not flag.startswith(("--epochs", "--checkpoint_every"))]
    command = ["train", *flags, "--epochs=100000", "--checkpoint_every=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(command)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "500"},
        # A shell's background jobs, and what they start, ignore it: this one shall hear it all the same.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = Path(tiny_config.out) / "metrics.jsonl"
    try:
        until = time.monotonic() + 300  # never reached but where training does not start
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
            assert process.poll() is None and time.monotonic() < until, "training did not get going"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    path = Path(tiny_config.out) / CHECKPOINT_NAME
    assert process.returncode == 130
    assert "Traceback" not in told
    assert f"The last complete checkpoint is {path}" in told
    checkpoint = load_checkpoint(path)
    assert checkpoint.step >= 3
    build_model(path, checkpoint)
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


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
    with pytest.raises(CheckpointError, match=r"another architecture(.|\n)*block.norm_weight"):
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


def test_another_data_set_is_refused(finished: Path, tiny_tree: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(finished)
    # The same people and file names, other pictures.
    other = write_sysu(
        tmp_path / "other", identities=7, test_identities=3, images_per_camera=2, image_size=(32, 16), seed=1
    )
    given = data_identity("sysu-mm01", other, SYSUMM01(other).training())
    with pytest.raises(CheckpointError, match="belongs to another data set") as error:
        check_data(finished, checkpoint, given)
    for part in (str(finished), checkpoint.data.fingerprint[:12], given.fingerprint[:12]):
        assert part in str(error.value)
    check_data(finished, checkpoint, data_identity("sysu-mm01", tiny_tree, SYSUMM01(tiny_tree).training()))
    with pytest.raises(CheckpointError, match="another data set"):
        score_checkpoint(finished, other, accelerator="cpu", progress=quiet())


def test_a_moved_tree_is_the_same_data_set(tiny_tree: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_tree)
    identities: list[DataIdentity] = [
        data_identity("sysu-mm01", root, SYSUMM01(root).training()) for root in (tiny_tree, moved)
    ]
    assert identities[0] == identities[1]


def test_a_journal_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    journal = Journal(path)
    journal.return_to(2)
    journal.add(StepResult(1, 1, 0, 0, 0.5, 0.1), 0.1, 0.0)
    journal.write(3, 0, 0.01)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


# Scores.


def test_a_checkpoint_and_the_tree_suffice_to_score(finished: Path, tiny_tree: Path) -> None:
    result = score_checkpoint(finished, tiny_tree, trials=3, accelerator="cpu", progress=quiet())
    assert json.loads(Path(result["path"]).read_text()) == json.loads(json.dumps(result))
    assert Path(result["path"]) == finished.with_name("test-all-1shot-random.json")
    # 3 test people, cameras 3 and 6, two images each; the gallery has cameras 1, 2, 4, 5.
    assert (result["queries"], result["gallery_images"]) == (12, 12)
    assert result["valid_queries"] == [12, 12, 12]
    assert result["mean"]["rank10"] == 1
    for name in ("rank1", "mAP", "mINP"):
        values = [row[name] for row in result["per_trial"]]
        mean = sum(values) / 3
        assert result["mean"][name] == pytest.approx(mean)
        assert result["std"][name] == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    assert (result["mode"], result["shots"], result["draw"], result["trials"]) == ("all", 1, "random", 3)


def test_scores_do_not_depend_on_the_batch(finished: Path, tiny_tree: Path) -> None:
    checkpoint = load_checkpoint(finished)
    model = build_model(finished, checkpoint)
    samples = SYSUMM01(tiny_tree).query()[:5]
    whole, single = (
        extract(model, samples, "infrared", checkpoint.config, batch_size=size) for size in (5, 1)
    )
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)
    assert model.training


def test_visible_and_infrared_swapped_are_refused(finished: Path, tiny_tree: Path) -> None:
    checkpoint = load_checkpoint(finished)
    model = build_model(finished, checkpoint)
    with pytest.raises(ValueError, match="got an image of modality 'infrared', expected 'visible'"):
        extract(model, SYSUMM01(tiny_tree).query(), "visible", checkpoint.config)
