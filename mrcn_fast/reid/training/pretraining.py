"""Trainings on synthetic people, and their pretraining.

The paper starts from weights pretrained on ImageNet. The demo and the study pretrain on other synthetic
people instead, in visible light alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import Field
from rich.progress import Progress

from mrcn_fast.files import write_atomically
from mrcn_fast.reid.data import write_regdb
from mrcn_fast.reid.kinds import NUMPY, Count, Height, ImagesOfPerson, PathText, Share, Strength, Width
from mrcn_fast.reid.settings import check_fields
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.trainer import Trainer

# With these values, infrared cameras see what visible ones see, so that the pretraining meets no infrared
# image, as on ImageNet. Because its pictures are of people, unlike ImageNet's, a short training is enough.
VISIBLE_ALONE: Final = {"modality_gap": 0.0, "infrared_colour": 1.0}


# A batch has four people, and half of the people of a tree are for the training.
_TrainedPeople = Annotated[int, Field(ge=8, le=9999), NUMPY]


@dataclasses.dataclass(kw_only=True)
class SyntheticConfig:
    """The size of trainings on synthetic people, which the demo and the study have.

    By default there are as many people and images as in RegDB.
    """

    out: PathText
    """Folder for everything that is written."""
    identities: _TrainedPeople = 412
    """People in the synthetic data set: half of them for the training, half for the test."""
    images: ImagesOfPerson = 10
    """Images of a person in each modality."""
    modality_gap: Strength = 0.75
    """How far the brightness of a surface in infrared differs from that in visible light."""
    infrared_colour: Share = 0.25
    """How much of the colour an infrared image keeps."""
    height: Height = 64
    """Image height in pixels."""
    width: Width = 32
    """Image width in pixels."""
    pretraining_identities: _TrainedPeople = 400
    """Other people, in visible light alone, for the pretraining of the ResNet; it trains on half of them."""
    pretraining_steps: Count = 3000
    """Training steps of the pretraining."""
    steps: Count
    """Training steps of each network."""
    accelerator: str = "auto"
    """Where to compute, as lightning-fabric names it."""

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)

    @property
    def tree(self) -> Path:
        """The root of the data set."""
        return Path(self.out) / "data"

    @property
    def pretraining(self) -> Path:
        """The folder of the pretraining; the other people are in data/ below it."""
        return Path(self.out) / "pretraining"

    def write_people(self, seed: int, progress: Progress) -> Path:
        """Write the data set in RegDB's tree; returns its root."""
        looks = {"modality_gap": self.modality_gap, "infrared_colour": self.infrared_colour}
        return self._write(self.tree, self.identities, looks, seed, progress)

    def write_other_people(self, seed: int, progress: Progress) -> Path:
        """Write the people of the pretraining in RegDB's tree; returns its root."""
        root = self.pretraining / "data"
        return self._write(root, self.pretraining_identities, VISIBLE_ALONE, seed, progress)

    def training(self, tree: Path, out: Path, steps: int, **values: Any) -> TrainConfig:
        """Return the configuration of a ResNet-18's training on a tree of these sizes, with other values."""
        return TrainConfig(
            data=str(tree),
            out=str(out),
            dataset="regdb",
            depth=18,
            height=self.height,
            width=self.width,
            steps=steps,
            accelerator=self.accelerator,
            speed="plain",  # as the committed scores were made
            workers=0,
            **values,
        )

    def _write(self, root: Path, people: int, looks: dict[str, float], seed: int, progress: Progress) -> Path:
        task = progress.add_task(f"images of {root.parent.name}", total=None, status="")
        return write_regdb(
            root,
            identities=people,
            images=self.images,
            splits=1,
            image_size=(self.height, self.width),
            seed=seed,
            camera_style=0.4,
            pose_spread=0.4,
            **looks,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def pretraining_config(config: TrainConfig) -> TrainConfig:
    """The configuration of a pretraining: classification alone, as on ImageNet, by the baseline network."""
    return dataclasses.replace(config, model="baseline", triplet_weight=0.0)


def pretrain(config: TrainConfig, path: Path, *, resume: bool = False, progress: Progress) -> Path:
    """Pretrain the ResNet, and write its weights to `path` in torchvision's format.

    With `resume`, the run in the configuration's `out` goes on. Returns `path`.
    """
    trainer = Trainer(pretraining_config(config))
    trainer.fit(resume=resume, overwrite=not resume, progress=progress)
    state = trainer.model.trunk.state_dict()
    # The format has one stem, so that the infrared one is left out.
    weights = {k.removeprefix("visible."): v for k, v in state.items() if not k.startswith("infrared.")}
    write_atomically(path, lambda file: torch.save(weights, file))
    return path
