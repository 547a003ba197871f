"""Weights in the place of ImageNet's, which the paper starts from: for trainings on synthetic people."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from rich.progress import Progress

from mrcn_fast.files import write_atomically
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.trainer import Trainer

# A tree whose infrared cameras see what visible ones see: as on ImageNet, training meets no infrared image.
# Unlike there, the pictures are of people, so that a short training is enough.
MODALITY_GAP = 0.0


def pretraining_config(config: TrainConfig) -> TrainConfig:
    """The configuration with ImageNet's task: classification alone, by the plain network."""
    return dataclasses.replace(config, model="baseline", triplet_weight=0.0)


def pretrain(config: TrainConfig, path: Path, *, resume: bool = False, progress: Progress) -> Path:
    """Train by `pretraining_config` and write the trunk's weights to `path`, in torchvision's format.

    With `resume`, a run in the configuration's `out` goes on. Returns `path`.
    """
    trainer = Trainer(pretraining_config(config))
    trainer.fit(resume=resume, overwrite=not resume, progress=progress)
    state = trainer.model.trunk.state_dict()
    # torchvision's ResNet has one stem.
    weights = {k.removeprefix("visible."): v for k, v in state.items() if not k.startswith("infrared.")}
    write_atomically(path, lambda file: torch.save(weights, file))
    return path
