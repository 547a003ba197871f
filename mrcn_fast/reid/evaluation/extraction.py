"""The extraction of test features from images on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from pydantic import SkipValidation
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, default_collate

from mrcn_fast.block import Modality
from mrcn_fast.reid.data import PersonImages, Sample, normalize
from mrcn_fast.reid.data.loading import Batches
from mrcn_fast.reid.devices import open_fabric
from mrcn_fast.reid.kinds import Count, Workers
from mrcn_fast.reid.models.interface import ReIDNetwork, check_features
from mrcn_fast.reid.processes import Processes
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.config import TrainConfig


@check_arguments
@torch.inference_mode()
def extract(
    model: ReIDNetwork,
    samples: SkipValidation[Sequence[Sample]],
    modality: Modality,
    config: SkipValidation[TrainConfig],
    *,
    fabric: Fabric | None = None,
    batch_size: Count = 64,
    workers: Workers = 0,
    images: Dataset[Tensor] | None = None,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Extract the test features of samples of one modality, in their order.

    Args:
        model: the network, which is already on the device of `fabric` if that is given
        samples: the images, all of `modality`
        config: of the training; it has the image size, the filter and the memory layout
        fabric: has the device and the precision to compute in; none: those of `config`, and the network is
            moved to the device. Several processes all call this with equal networks. They share the batches
            that one process would make, so that the features are the same, and each of them gets all.
        batch_size: images per forward pass
        workers: processes that decode images; 0: this one
        images: the same images from a cache, in place of the samples' files
        advance: called after each batch with the number of its images

    Returns:
        (len(samples), D), float32, on the CPU

    Raises:
        ValueError: before anything is computed, for a sample of another modality or of none, because a score
            of exchanged modalities would look like any other; and where the network gives no features (N, D)
        DatasetError: for an image that can't be read

    Example:
        >>> config = TrainConfig(data="data/regdb", dataset="regdb", height=64, width=32)
        >>> search = open_dataset("regdb", "data/regdb").searches()[0]
        >>> extract(ReIDModel(classes=4, depth=18), search.query, "visible", config).shape[1]
        1024
    """
    images = _checked_images(samples, modality, config, images)
    if fabric is None:
        fabric = open_fabric(config.accelerator, config.precision)
        fabric.to_device(cast(nn.Module, model))
    processes = Processes(fabric)
    places = [range(at, min(at + batch_size, len(samples))) for at in range(0, len(samples), batch_size)]
    own = processes.share(places)
    batches = Batches(
        images,
        default_collate,
        batch_sampler=cast(Sampler[Any], own),
        batch_bytes=batch_size * 3 * config.height * config.width,
        workers=workers,
        pin_memory=fabric.device.type == "cuda",
    )
    features = _features(model, batches, sum(map(len, own)), modality, config, fabric, advance)
    joined = _joined(features, places, processes)
    if advance is not None and processes.count > 1:
        advance(len(joined) - len(features))
    return joined


def _features(
    model: ReIDNetwork,
    batches: Iterable[Tensor],
    rows: int,
    modality: Modality,
    config: TrainConfig,
    fabric: Fabric,
    advance: Callable[[int], object] | None,
) -> Tensor:
    """Extract the features of batches of uint8 images with `rows` images in all: (rows, D) on the CPU."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    # The features stay on the device until the end, because a copy to the host per batch would wait for it.
    features = torch.empty(0, 0)
    done = 0
    with _evaluating(model):
        for batch in batches:
            pixels = normalize(batch.to(fabric.device, non_blocking=True))
            # `extract` is not a method that fabric redirects, so that autocast has to be entered here.
            with fabric.autocast():
                made = model.extract(pixels.contiguous(memory_format=memory_format), modality)
            made = check_features(made, len(batch))
            if not done:
                features = torch.empty(rows, made.shape[1], device=fabric.device)
            features[done : done + len(batch)] = made
            done += len(batch)
            if advance is not None:
                advance(len(batch))
    return features.cpu()


def _joined(features: Tensor, places: Sequence[range], processes: Processes) -> Tensor:
    """The features of all processes, in the order of the samples; `places` are those of each batch."""
    shares = processes.gathered(features)
    if processes.count == 1:
        return features
    joined = torch.empty(sum(map(len, places)), max(share.shape[1] for share in shares))
    for process, share in enumerate(shares):
        taken = list(chain.from_iterable(places[process :: processes.count]))
        if taken:
            joined[taken] = share
    return joined


@contextmanager
def _evaluating(model: ReIDNetwork) -> Iterator[None]:
    """Keep the network in eval mode, and restore its former mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _checked_images(
    samples: Sequence[Sample], modality: Modality, config: TrainConfig, images: Dataset[Tensor] | None
) -> Dataset[Tensor]:
    """The images of samples of one modality. Raises ValueError for samples and images that don't fit."""
    for sample in samples:
        if sample.modality != modality:
            raise ValueError(
                f"{sample.path}: got an image of modality {sample.modality!r}, expected {modality!r}"
            )
    if images is None:
        images = PersonImages(samples, (config.height, config.width), filter=config.filter)
    if (found := len(images)) != len(samples):  # type: ignore[arg-type]
        raise ValueError(f"got {found} images of {len(samples)} samples")
    return images
