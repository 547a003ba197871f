"""Training batches of pairs of images of the same person, in the order of the paired sampler."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from mrcn_fast.reid.data import PairedIdentitySampler, PersonImages, Sample, TrainingSet
from mrcn_fast.reid.data.cache import cached
from mrcn_fast.reid.data.checks import pair_modalities
from mrcn_fast.reid.data.images import check_left, readable
from mrcn_fast.reid.data.loading import Batches
from mrcn_fast.reid.data.sampler import batches_of_epoch
from mrcn_fast.reid.training.config import ConfigError, TrainConfig

Row = tuple[Tensor, Tensor, int, int, int]


class Batch(NamedTuple):
    """B pairs of images of the same person; the indices are those of the images in the training set.

    The batch of a step that accumulates gradients has the pairs of all its parts, one part after the other.
    """

    visible: Tensor  # (B, 3, H, W) uint8
    infrared: Tensor
    labels: Tensor  # (B,) class indices
    visible_index: Tensor
    infrared_index: Tensor

    def files(self, training: TrainingSet) -> list[str]:
        """The paths of the images, the visible ones first."""
        paths = [training.visible[i].path for i in self.visible_index.tolist()]
        paths += [training.infrared[i].path for i in self.infrared_index.tolist()]
        return list(map(str, paths))

    def parts(self, number: int) -> list[Batch]:
        """Split the batch into a number of parts of equal length."""
        return list(map(Batch._make, zip(*(values.chunk(number) for values in self), strict=True)))


class PairedImages(Dataset[Row]):
    """The images of a training set as pairs: (visible, infrared) index -> a row of a Batch.

    A pair's indices count the samples of `used`, which are drawn. The indices and the class in a row are
    those in `training`, which has all samples and identities.
    """

    def __init__(
        self, training: TrainingSet, used: TrainingSet, visible: Dataset[Tensor], infrared: Dataset[Tensor]
    ) -> None:
        self.visible = visible
        self.infrared = infrared
        classes = {identity: index for index, identity in enumerate(training.identities)}
        self.labels = [classes[sample.identity] for sample in used.visible]
        self.visible_index = _places(training.visible, used.visible)
        self.infrared_index = _places(training.infrared, used.infrared)

    def __getitem__(self, pair: tuple[int, int]) -> Row:
        i, j = pair
        return (
            self.visible[i],
            self.infrared[j],
            self.labels[i],
            self.visible_index[i],
            self.infrared_index[j],
        )


class TrainingBatches:
    """The batches of each epoch; `batches.of(epoch, first)` iterates over them from any of them on.

    The batches depend only on the configuration's seed and the epoch, so that a resumed run gets the batches
    that it would have got. `len()` is the number of batches of a whole epoch.

    A batch serves a step of this process: it consists of `config.accumulate` batches of the sampler. The
    processes of a run have different batches of one sequence.

    With `config.skip_unreadable`, the constructor decodes every image once. It leaves out, logs and counts
    the images that can't be read (`unreadable`) and the identities without images of both modalities. Classes
    and indices in a batch stay those of `training`.

    Args:
        training: the training set
        config: of the run
        name: the data set and its split, such as "regdb-split3", for messages and the cache's name
        pin_memory: put batches into pinned memory
        processes, process: the number of processes of the run, and which one of them this is, from 0

    Raises:
        ValueError: for fewer identities than a batch needs
        DatasetError: for an unreadable image that goes into a cache, and where fewer identities than a batch
            needs remain without unreadable images

    Example:
        >>> config = TrainConfig(data="data/regdb", height=64, width=32, identities=2, images=3, workers=0)
        >>> training = open_dataset("regdb", "data/regdb").training()
        >>> batch = next(TrainingBatches(training, config, name="regdb").of(epoch=0))
        >>> batch.visible.shape, batch.infrared.dtype, len(batch.labels)
        (torch.Size([6, 3, 64, 32]), torch.uint8, 6)
    """

    def __init__(
        self,
        training: TrainingSet,
        config: TrainConfig,
        *,
        name: str,
        pin_memory: bool = False,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        # Checked before images are read, which takes minutes.
        if len(training.identities) < config.identities:
            raise ConfigError(
                f"{name}: a batch needs {config.identities} different identities; got "
                f"{len(training.identities)}. Train on more people, or take fewer for a batch (identities)"
            )
        used = training
        self.unreadable: tuple[Sample, ...] = ()
        if config.skip_unreadable:
            used, self.unreadable = without_unreadable(
                training, name, workers=config.workers, identities=config.identities
            )
        pairs = config.identities * config.images
        steps = config.batches or batches_of_epoch(
            max(len(used.visible), len(used.infrared)), pairs * config.accumulate * processes
        )
        self._sampler = PairedIdentitySampler(
            [sample.identity for sample in used.visible],
            [sample.identity for sample in used.infrared],
            identities=config.identities,
            images=config.images,
            seed=config.seed,
            batches=steps * config.accumulate,
            processes=processes,
            process=process,
        )
        self._rest = _RestOfEpoch(self._sampler, config.accumulate)
        visible, infrared = (
            _images(samples, config, f"{name}-train-{modality}")
            for samples, modality in ((used.visible, "visible"), (used.infrared, "infrared"))
        )
        self._batches = Batches(
            PairedImages(training, used, visible, infrared),
            collate,
            batch_sampler=self._rest,
            batch_bytes=pairs * config.accumulate * 2 * 3 * config.height * config.width,
            workers=config.workers,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return self._rest.steps

    def of(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch (from 0), starting with batch `first`."""
        self._sampler.set_epoch(epoch)
        self._rest.first = first
        return iter(self._batches)

    def close(self) -> None:
        """End the processes that make batches; the next epoch starts new ones."""
        self._batches.close()


def collate(rows: list[Row]) -> Batch:
    """Collate rows into a batch; a worker process puts it into shared memory."""
    return Batch(*default_collate(rows))


class _RestOfEpoch(Sampler[list[tuple[int, int]]]):
    """The pairs of each step of an epoch from step `first` on; images of earlier ones are not read.

    A step has `accumulate` batches of the sampler.
    """

    def __init__(self, sampler: PairedIdentitySampler, accumulate: int) -> None:
        self.sampler, self.accumulate = sampler, accumulate
        self.steps = len(sampler) // accumulate
        self.first = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = itertools.islice(iter(self.sampler), self.first * self.accumulate, None)
        for _ in range(len(self)):
            yield list(itertools.chain.from_iterable(itertools.islice(batches, self.accumulate)))

    def __len__(self) -> int:
        return self.steps - self.first


def _images(samples: tuple[Sample, ...], config: TrainConfig, name: str) -> Dataset[Tensor]:
    size = (config.height, config.width)
    if config.cache is None:
        return PersonImages(samples, size, filter=config.filter)
    return cached(samples, size, filter=config.filter, folder=config.cache, name=name, workers=config.workers)


def without_unreadable(
    training: TrainingSet, name: str, *, workers: int = 0, identities: int = 1
) -> tuple[TrainingSet, tuple[Sample, ...]]:
    """Split a training set into the set of its readable images, paired again, and the unreadable images.

    `name` is the data set's name in messages. Raises DatasetError where less than `identities` remain.
    """
    kept, unreadable = readable((*training.visible, *training.infrared), workers=workers)
    check_left(kept, unreadable, "training", identities=identities)
    return (pair_modalities(kept, name) if unreadable else training), tuple(unreadable)


def _places(samples: tuple[Sample, ...], used: tuple[Sample, ...]) -> list[int]:
    """The index of each of `used` in `samples`."""
    place = {sample: index for index, sample in enumerate(samples)}
    return [place[sample] for sample in used]
