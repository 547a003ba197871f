"""Test features of images on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning_fabric import Fabric
from pydantic import SkipValidation
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mrcn_fast.block import Modality
from mrcn_fast.reid.data import PersonImages, Sample, normalize
from mrcn_fast.reid.data.loading import Batches
from mrcn_fast.reid.kinds import Count, Workers
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.config import TrainConfig


@check_arguments
@torch.inference_mode()
def extract(
    model: ReIDModel,
    samples: SkipValidation[Sequence[Sample]],
    modality: Modality,
    config: SkipValidation[TrainConfig],
    *,
    fabric: Fabric,
    batch_size: Count = 64,
    workers: Workers = 0,
    images: Dataset[Tensor] | None = None,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Features of the samples, in their order: (len(samples), `model.feature_size`), float32, on the CPU.

    Image size, filter and memory layout are those of the training configuration. The network, which is on the
    device of `fabric` already, computes in the precision of `fabric`. `images` stands in for the samples'
    files: the same images from a cache. `advance(n)` is told of each n images done.

    Raises ValueError, before anything is computed, for a sample that is not of `modality` or has none:
    visible and infrared swapped would still give a score. Raises DatasetError for an image that can't be
    read.
    """
    for sample in samples:
        if sample.modality != modality:
            raise ValueError(
                f"{sample.path}: got an image of modality {sample.modality!r}, expected {modality!r}"
            )
    size = (config.height, config.width)
    if images is None:
        images = PersonImages(samples, size, filter=config.filter)
    if len(images) != len(samples):  # type: ignore[arg-type]
        raise ValueError(
            f"got {len(images)} images of {len(samples)} samples"  # type: ignore[arg-type]
        )
    device = fabric.device
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    batches = Batches(
        images,
        default_collate,
        batch_size=batch_size,
        batch_bytes=batch_size * 3 * size[0] * size[1],
        workers=workers,
        pin_memory=device.type == "cuda",
    )
    # On the device till the end: to bring each batch's to the host would wait for it.
    features = torch.empty(len(samples), model.feature_size, device=device)
    training = model.training
    model.eval()
    try:
        done = 0
        for batch in batches:
            pixels = normalize(batch.to(device, non_blocking=True)).contiguous(memory_format=memory_format)
            # Not by a method that fabric redirects: on one device it redirects none.
            with fabric.autocast():
                features[done : done + len(batch)] = model.extract(pixels, modality)
            done += len(batch)
            if advance is not None:
                advance(len(batch))
    finally:
        model.train(training)
    return features.cpu()
