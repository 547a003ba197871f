"""Test features of images on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mrcn_fast.block import Modality
from mrcn_fast.reid.config import TrainConfig
from mrcn_fast.reid.data import PersonImages, Sample, normalize
from mrcn_fast.reid.model import ReIDModel


@torch.inference_mode()
def extract(
    model: ReIDModel,
    samples: Sequence[Sample],
    modality: Modality,
    config: TrainConfig,
    *,
    batch_size: int = 64,
    workers: int = 0,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Features of the samples, in their order: (len(samples), `model.feature_size`), float32.

    Image size and memory layout are those of the training configuration. `advance(n)` is told of each n
    images done. Raises ValueError when a sample is not of `modality`: visible and infrared swapped would
    still give a score.
    """
    for sample in samples:
        if sample.modality != modality:
            raise ValueError(
                f"{sample.path}: got an image of modality {sample.modality!r}, expected {modality!r}"
            )
    device = next(model.parameters()).device
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    features = torch.empty(len(samples), model.feature_size, device=device)
    loader = DataLoader(
        PersonImages(samples, (config.height, config.width)),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    training = model.training
    model.eval()
    try:
        done = 0
        for images in loader:
            images = normalize(images.to(device, non_blocking=True)).contiguous(memory_format=memory_format)
            batch = model.extract(images, modality)
            features[done : done + len(batch)] = batch
            done += len(batch)
            if advance is not None:
                advance(len(batch))
    finally:
        model.train(training)
    return features
