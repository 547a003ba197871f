"""Tiny synthetic data sets and the values of a tiny run on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric", reason="the re-identification tests need the packages of [reid]")

import torch
from rich.progress import Progress

from mrcn_fast.reid.data import write_llcm, write_regdb, write_sysu
from mrcn_fast.reid.models.resnet import Trunk
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.trainer import Trainer

# The smallest run that still has every part: ResNet-18 on 32 x 16 pixels, 2 identities x 2 images.
TINY: dict[str, Any] = {
    "depth": 18, "height": 32, "width": 16, "identities": 2, "images": 2, "padding": 2, "workers": 0,
    "batches": 3, "epochs": 2, "lr": 0.02, "warmup_epochs": 1, "log_every": 1, "accelerator": "cpu",
    "speed": "plain",
}  # fmt: skip


def _written(write: Callable[..., Path], **sizes: int) -> Any:
    """Make a fixture of a session: the root of a synthetic tree with images of 32 x 16 pixels."""

    @pytest.fixture(scope="session")
    def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("data") / "tree", **sizes, image_size=(32, 16))

    return tree


# SYSU-MM01's tree with 4 training and 3 test identities, two images per camera.
tiny_tree = _written(write_sysu, identities=7, test_identities=3, images_per_camera=2)
# RegDB's tree: four training and four test identities in each of two splits, two images per modality.
tiny_regdb = _written(write_regdb, identities=8, images=2, splits=2)
# LLCM's tree: four training and three test identities, one image per camera.
tiny_llcm = _written(write_llcm, identities=7, test_identities=3, images_per_camera=1)


@pytest.fixture(scope="session")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a ResNet-18 in torchvision's format."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    trunk = Trunk(18).state_dict()
    own = {name: tensor for name, tensor in trunk.items() if not name.startswith("infrared.")}
    torch.save({name.removeprefix("visible."): tensor for name, tensor in own.items()}, path)
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_tree: Path) -> TrainConfig:
    """A run of six steps in two epochs, whose `out` a test replaces."""
    return TrainConfig(data=str(tiny_tree), **TINY)


@pytest.fixture
def tiny_config(tiny_run: TrainConfig, tmp_path: Path) -> TrainConfig:
    """`tiny_run` with a folder of the test as `out`."""
    return dataclasses.replace(tiny_run, out=str(tmp_path / "run"))


@pytest.fixture(scope="session")
def finished(tiny_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a finished run of `tiny_run`; tests only read it."""
    config = dataclasses.replace(tiny_run, out=str(tmp_path_factory.mktemp("finished")))
    return Trainer(config).fit(progress=Progress(disable=True))


def quiet() -> Progress:
    """Progress bars that show nothing."""
    return Progress(disable=True)


def train(config: TrainConfig, **arguments: Any) -> Trainer:
    """Train a run to its end; `arguments` are those of `Trainer.fit`."""
    trainer = Trainer(config)
    trainer.fit(progress=quiet(), **arguments)
    return trainer
