"""Resumption: checkpoints come back whole, and only into the run that they belong to."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mrcn_fast.files import write_atomically
from mrcn_fast.reid.data import SYSUMM01, write_sysu
from mrcn_fast.reid.evaluation.scoring import score_checkpoint
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.batches import Batch
from mrcn_fast.reid.training.callbacks import Callback
from mrcn_fast.reid.training.checkpoint import (
    CHECKPOINT_NAME,
    CheckpointError,
    content_digest,
    load_checkpoint,
    save_checkpoint,
)
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.data_identity import DataIdentity, data_identity
from mrcn_fast.reid.training.journal import StepResult
from mrcn_fast.reid.training.restoring import check_config, check_data, load_weights
from mrcn_fast.reid.training.trainer import Trainer
from tests.reid.conftest import quiet, train


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
    ((own,), (expected,)) = again.random, checkpoint.random
    assert own["python"] == expected["python"] and torch.equal(own["torch"], expected["torch"])
    assert all(torch.equal(tensor, again.model[name]) for name, tensor in checkpoint.model.items())


@pytest.mark.parametrize("speed", ["plain", "auto"])
def test_the_moving_average_is_scored_and_goes_on(
    tiny_config: TrainConfig, tmp_path: Path, speed: Any
) -> None:
    config = dataclasses.replace(
        tiny_config,
        ema=0.5,
        lr=0.02,
        speed=speed,
        validate_every=2,
        checkpoint_every=1,
        out=str(tmp_path / "ema"),
    )
    seen: list[dict[str, torch.Tensor]] = []

    class Weights(Callback):
        def on_step_end(self, trainer: Trainer, batch: Batch, result: StepResult) -> None:
            seen.append({name: value.clone() for name, value in trainer.model.state_dict().items()})

    trainer = Trainer(config, callbacks=[Weights()])
    whole = load_checkpoint(trainer.fit(progress=quiet()))
    assert content_digest(whole.raw) == content_digest(seen[-1])
    for name in (
        "trunk.layer4.0.conv1.weight",
        "trunk.layer1.0.bn1.running_mean",
        "trunk.visible.conv1.weight",
    ):
        expected = seen[0][name]
        for state in seen[1:]:
            expected = 0.5 * expected + 0.5 * state[name]
        torch.testing.assert_close(whole.model[name], expected)
        assert not torch.equal(whole.model[name], whole.raw[name])
    # The validation has scored the average, as `mrcn-fast test` does.
    result = score_checkpoint(trainer.out, config.data, accelerator="cpu", progress=quiet())
    (line,) = trainer.journal.validations
    assert line["searches"] == {name: found["mean"] for name, found in result["searches"].items()}
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"), steps=4)
    train(stopped)
    resumed = load_checkpoint(train(dataclasses.replace(stopped, steps=None), resume=True).checkpoint_path)
    assert content_digest(resumed.model) == content_digest(whole.model)
    assert content_digest(resumed.raw) == content_digest(whole.raw)


@pytest.mark.parametrize("speed", ["plain", "auto"])
def test_adamw_goes_on_where_it_was(tiny_config: TrainConfig, tmp_path: Path, speed: Any) -> None:
    config = dataclasses.replace(
        tiny_config, optimizer="adamw", lr=3e-4, warmup_lr=1e-4, speed=speed, out=str(tmp_path / "whole")
    )
    whole = load_checkpoint(train(config).checkpoint_path)
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"), steps=4)
    train(stopped)
    resumed = load_checkpoint(train(dataclasses.replace(stopped, steps=None), resume=True).checkpoint_path)
    assert all(torch.equal(tensor, resumed.model[name]) for name, tensor in whole.model.items())
    state = whole.optimizer["state"]
    assert {name for moments in state.values() for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(moments["step"] == 6 for moments in state.values())
    with pytest.raises(CheckpointError, match="optimizer"):
        train(dataclasses.replace(config, optimizer="sgd"), resume=True)
    content = torch.load(Path(config.out) / CHECKPOINT_NAME, weights_only=True)
    content["optimizer"]["state"][0]["exp_avg_sq"] = torch.zeros(1)
    torch.save(content, tmp_path / "edited.pth")
    with pytest.raises(CheckpointError, match=r"optimizer.state\[0\].exp_avg_sq"):
        load_checkpoint(tmp_path / "edited.pth")


def test_a_named_optimizer_goes_on_where_it_was(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class is imported to train and to resume, and not to read the checkpoint."""
    (tmp_path / "own_optimizers.py").write_text("from torch.optim import RAdam\n\nclass Own(RAdam): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = "own_optimizers.Own eps=1e-6"
    config = dataclasses.replace(
        tiny_config, optimizer=text, lr=3e-4, speed="auto", out=str(tmp_path / "whole")
    )
    whole = load_checkpoint(train(config).checkpoint_path)
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"), steps=4)
    train(stopped)
    resumed = train(dataclasses.replace(stopped, steps=None), resume=True)
    assert type(resumed.optimizer).__name__ == "Own"
    there = load_checkpoint(resumed.checkpoint_path)
    assert content_digest(there.model) == content_digest(whole.model)
    with pytest.raises(CheckpointError, match="optimizer"):
        train(dataclasses.replace(config, optimizer="own_optimizers.Own eps=1e-7"), resume=True)
    monkeypatch.delitem(sys.modules, "own_optimizers")
    (tmp_path / "own_optimizers.py").unlink()
    assert load_checkpoint(resumed.checkpoint_path).config.optimizer == text
    with pytest.raises(ConfigError, match=r"can't import own_optimizers\.Own"):
        train(config, resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"garbage", "can't be read"),
        ({"weights": torch.ones(1)}, "found the keys weights"),
    ],
)
def test_other_files_than_checkpoints_are_refused_by_path(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / CHECKPOINT_NAME
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
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
    for weights, message in ((None, "random ones"), (str(other), r"other\.pth")):
        with pytest.raises(CheckpointError, match=rf"weights: expected '.*resnet18\.pth.* found .*{message}"):
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
