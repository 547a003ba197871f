"""The identity of a data set, by which checkpoints and results say which images they were made of."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mrcn_fast.reid.data.types import PersonDataset, Sample, TrainingSet

# The least number of images whose contents go into the fingerprint of a data set (if it has so many).
_READ = 16


class DataIdentity(NamedTuple):
    """The data set that a network was trained on; it prevents scoring on another one by mistake."""

    name: str
    split: int
    fingerprint: str  # of the training files, see `fingerprint`
    identities: tuple[int, ...]  # sorted; class i of the classifier is identities[i]
    images: tuple[int, int]  # visible, infrared

    def __str__(self) -> str:
        return (
            f"{self.name}, split {self.split}, {len(self.identities)} identities, {self.images[0]} visible "
            f"and {self.images[1]} infrared training images, fingerprint {self.fingerprint[:12]}"
        )


def data_identity(dataset: PersonDataset, training: TrainingSet) -> DataIdentity:
    """Make the identity of a training set."""
    counts = (len(training.visible), len(training.infrared))
    digest = fingerprint(dataset.root, (*training.visible, *training.infrared))
    return DataIdentity(dataset.name, dataset.split, digest, tuple(training.identities), counts)


def fingerprint(root: Path, samples: Iterable[Sample]) -> str:
    """Compute the SHA-256 of the images' paths below the root, their file sizes and identities, in order.

    To read all contents would take minutes on the real data, and so the sizes stand for them. Because all
    bitmaps of a data set have one size, the contents of 16 to 31 images, spread evenly, count too.
    """
    samples = tuple(samples)
    digest = hashlib.sha256()
    for sample in samples:
        place = Path(sample.path).relative_to(root).as_posix()
        # File names are bytes that need not be UTF-8.
        line = f"{place}\t{_size(sample.path)}\t{sample.identity}\n"
        digest.update(line.encode(errors="surrogateescape"))
    for sample in samples[:: max(1, len(samples) // _READ)]:
        # Code that needs an unreadable image refuses it or leaves it out.
        with contextlib.suppress(OSError):
            digest.update(Path(sample.path).read_bytes())
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        # A broken or circular link counts as an unreadable image.
        return None
