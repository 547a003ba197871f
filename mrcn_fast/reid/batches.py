"""Training batches: pairs of images of one person, in the order of the paired sampler."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mrcn_fast.reid.config import TrainConfig
from mrcn_fast.reid.data import PairedIdentitySampler, PersonImages, TrainingSet

Row = tuple[Tensor, Tensor, int, int, int]


class Batch(NamedTuple):
    """B pairs of images of the same person; the two indices name the files in the training set."""

    visible: Tensor  # (B, 3, H, W) uint8
    infrared: Tensor
    labels: Tensor  # (B,) class indices
    visible_index: Tensor
    infrared_index: Tensor

    def files(self, training: TrainingSet) -> list[str]:
        """The paths of the batch's images, the visible ones first."""
        paths = [training.visible[i].path for i in self.visible_index.tolist()]
        paths += [training.infrared[i].path for i in self.infrared_index.tolist()]
        return list(map(str, paths))


class PairedImages(Dataset[Row]):
    """The training set as the paired sampler indexes it: (visible, infrared) index -> a row of a Batch."""

    def __init__(self, training: TrainingSet, image_size: tuple[int, int]) -> None:
        self.visible = PersonImages(training.visible, image_size)
        self.infrared = PersonImages(training.infrared, image_size)
        classes = {identity: index for index, identity in enumerate(training.identities)}
        self.labels = [classes[sample.identity] for sample in training.visible]

    def __getitem__(self, pair: tuple[int, int]) -> Row:
        i, j = pair
        return self.visible[i], self.infrared[j], self.labels[i], i, j


class TrainingBatches:
    """The batches of an epoch, from any of them on: `for batch in batches.of(epoch, first)`.

    `len()` is the number of batches in a whole epoch. The stream depends on the configuration's seed and the
    epoch alone, so a run that goes on in the middle of an epoch meets the batches it would have met.
    """

    def __init__(self, training: TrainingSet, config: TrainConfig, pin_memory: bool = False) -> None:
        self._sampler = PairedIdentitySampler(
            [sample.identity for sample in training.visible],
            [sample.identity for sample in training.infrared],
            identities=config.identities,
            images=config.images,
            seed=config.seed,
            batches=config.batches,
        )
        self._rest = _RestOfEpoch(self._sampler)
        self._loader: DataLoader[Row] = DataLoader(
            PairedImages(training, (config.height, config.width)),
            batch_sampler=self._rest,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            pin_memory=pin_memory,
            # The loader draws a seed an epoch; from the global generator that would shift the augmentation's
            # stream.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._sampler)

    def of(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0, without those before `first`."""
        self._sampler.set_epoch(epoch)
        self._rest.first = first
        return (Batch(*row) for row in self._loader)


class _RestOfEpoch(Sampler[list[tuple[int, int]]]):
    """The sampler's batches without an epoch's first ones; their images are not read."""

    def __init__(self, sampler: PairedIdentitySampler) -> None:
        self.sampler = sampler
        self.first = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(iter(self.sampler), self.first, None)

    def __len__(self) -> int:
        return len(self.sampler) - self.first
