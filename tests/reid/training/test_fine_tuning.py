"""Fine-tuning: layers that stay as they are, and gradients of limited norm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mrcn_fast.reid.training.checkpoint import load_checkpoint
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.trainer import Trainer
from tests.reid.conftest import train


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
