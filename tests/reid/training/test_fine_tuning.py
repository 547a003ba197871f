"""Fine-tuning: the weights of a file, layers that stay as they are, and gradients of limited norm."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mrcn_fast.reid.models.resnet import WeightsError
from mrcn_fast.reid.training.checkpoint import CheckpointError, load_checkpoint
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.trainer import Trainer
from tests.reid.conftest import train


@pytest.mark.parametrize("kind", ["checkpoint", "folder", "state.pth", "state.safetensors"])
def test_a_run_begins_with_the_weights_of_another(
    tiny_config: TrainConfig, finished: Path, tmp_path: Path, kind: str
) -> None:
    trained = load_checkpoint(finished).model
    path = {"checkpoint": finished, "folder": finished.parent}.get(kind, tmp_path / kind)
    if kind == "state.pth":
        torch.save({f"module.{name}": tensor for name, tensor in trained.items()}, path)
    elif kind == "state.safetensors":
        save_file(trained, path)
    begun = Trainer(dataclasses.replace(tiny_config, init=str(path))).model.state_dict()
    assert all(torch.equal(tensor, begun[name]) for name, tensor in trained.items())


def test_other_people_and_blocks_are_named(
    tiny_config: TrainConfig, finished: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    state = load_checkpoint(finished).model
    random = Trainer(tiny_config).model.state_dict()
    changed = {name: tensor for name, tensor in state.items() if not name.startswith("plugs.")}
    changed["heads.0.classifier.weight"] = torch.zeros(9, 512)
    changed["strange.weight"] = torch.zeros(1)
    path = tmp_path / "other.pth"
    torch.save(changed, path)
    caplog.clear()
    begun = Trainer(dataclasses.replace(tiny_config, init=str(path))).model.state_dict()
    for name, tensor in begun.items():
        own = name.startswith("plugs.") or name == "heads.0.classifier.weight"
        assert torch.equal(tensor, (random if own else state)[name]), name
    assert "heads.0.classifier.weight: got (9, 512), expected (4, 512)" in caplog.text
    assert "plugs.0.norm_weight" in caplog.text
    assert "in the state_dict and not used: heads.0.classifier.weight, strange.weight" in caplog.text
    del changed["trunk.layer1.0.conv1.weight"]
    torch.save(changed, path)
    with pytest.raises(WeightsError, match=rf"{path}: .* found none of the right shape for trunk.layer1.0"):
        Trainer(dataclasses.replace(tiny_config, init=str(path)))


def test_a_fine_tuning_goes_on_from_its_own_initial_weights_alone(
    tiny_config: TrainConfig, finished: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, init=str(finished), steps=4)
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole"))).model.state_dict()
    train(dataclasses.replace(config, steps=2))
    with pytest.raises(CheckpointError, match=r"weights: expected '.*checkpoint.pth' with .* random ones"):
        train(dataclasses.replace(config, init=None), resume=True)
    moved = shutil.copy(finished, tmp_path / "moved.pth")
    resumed = train(dataclasses.replace(config, init=str(moved)), resume=True).model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_frozen_layers_stay_as_they_are(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, freeze=("stem", "layer1"), steps=4)
    before = {name: tensor.clone() for name, tensor in Trainer(config).model.state_dict().items()}
    train(dataclasses.replace(config, steps=2))
    resumed = train(config, resume=True)
    after = load_checkpoint(resumed.checkpoint_path).model
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    frozen = ("trunk.visible.", "trunk.infrared.", "trunk.layer1.")
    assert not [name for name in changed if name.startswith(frozen)]
    for prefix in ("trunk.layer2.", "trunk.layer4.", "plugs.", "heads."):
        assert [name for name in changed if name.startswith(prefix)], prefix


def test_the_gradient_has_at_most_the_norm(tiny_config: TrainConfig) -> None:
    def gradient(config: TrainConfig) -> torch.Tensor:
        trainer = Trainer(config)  # which seeds the augmentation
        trainer.step(next(trainer.batches.of(0)))
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    whole = gradient(tiny_config)
    clipped = gradient(dataclasses.replace(tiny_config, clip_norm=0.01))
    assert whole.norm() > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped, whole * (0.01 / whole.norm()), rtol=1e-3, atol=1e-9)
    assert torch.equal(gradient(dataclasses.replace(tiny_config, clip_norm=1e6)), whole)


def test_a_network_of_ones_own_is_frozen_by_its_owner(tiny_config: TrainConfig) -> None:
    class Own(nn.Module):
        def extract(self) -> None: ...

    with pytest.raises(ConfigError, match=r"got freeze=\('stem',\) with a network of your own"):
        Trainer(dataclasses.replace(tiny_config, freeze=("stem",)), model=Own())
