"""The sampler of paired batches: P identities with K visible and K infrared images each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from mrcn_fast.reid.data.types import at_least


class PairedIdentitySampler(Sampler[list[tuple[int, int]]]):
    """A batch sampler of pairs (visible index, infrared index) of the same identity.

    A batch has `identities` different identities with `images` consecutive pairs each; images are drawn with
    replacement. The batches depend only on the seed and the epoch, so that a resumed run gets the same. Call
    `set_epoch` before each epoch.

    Where a run has several processes, they deal out the batches of one sequence: batch i of process p is
    number i * processes + p. Each of them has a sampler with the same values but `process`.

    Args:
        visible_identities, infrared_identities: the identity of each visible and infrared image
        identities: identities per batch, P
        images: pairs per identity, K
        seed: of the draws
        batches: batches per epoch of a process; by default floor(max(visible, infrared) / (P K processes)) +
            1, as in the field
        processes, process: the number of processes of the run, and which one of them this is, from 0

    Raises:
        ValueError: for fewer identities than a batch needs, for identities with one modality, and for values
            that are no integers or too small
    """

    def __init__(
        self,
        visible_identities: Sequence[int],
        infrared_identities: Sequence[int],
        *,
        identities: int,
        images: int,
        seed: int = 0,
        batches: int | None = None,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        identities, images = at_least(1, "identities", identities), at_least(1, "images", images)
        if batches is not None:
            batches = at_least(1, "batches", batches)
        self._processes = at_least(1, "processes", processes)
        self._process = at_least(0, "process", process)
        if process >= processes:
            raise ValueError(f"got process={process}, expected 0 to {processes - 1}, one of {processes}")
        visible, infrared = _positions(visible_identities), _positions(infrared_identities)
        _check_identities(visible, infrared, identities)
        self._images = [(visible[identity], infrared[identity]) for identity in sorted(visible)]
        self._identities_per_batch = identities
        self._images_per_identity = images
        self._seed = at_least(0, "seed", seed)
        self._epoch = 0
        largest = max(len(visible_identities), len(infrared_identities))
        self._batches = (
            batches_of_epoch(largest, identities * images * processes) if batches is None else batches
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, of the next iteration."""
        self._epoch = at_least(0, "epoch", epoch)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng((self._seed, self._epoch))
        for number in range(self._batches * self._processes):
            batch = self._draw(generator)
            if number % self._processes == self._process:
                yield batch

    def _draw(self, generator: np.random.Generator) -> list[tuple[int, int]]:
        chosen = generator.choice(len(self._images), self._identities_per_batch, replace=False)
        batch: list[tuple[int, int]] = []
        for identity in chosen:
            visible, infrared = (
                generator.choice(i, self._images_per_identity) for i in self._images[identity]
            )
            batch.extend(zip(visible.tolist(), infrared.tolist(), strict=True))
        return batch


def batches_of_epoch(images: int, pairs: int) -> int:
    """Batches per epoch as the field counts them, from the larger modality's images and a step's pairs."""
    return images // pairs + 1


def _positions(identities: Sequence[int]) -> dict[int, np.ndarray]:
    """Map each identity to the indices of its images."""
    values = np.asarray(identities)
    # An empty list doesn't have an integer dtype.
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(
            f"expected the images' identities as a row of integers; got {values.dtype} {values.shape}"
        )
    return {int(identity): np.flatnonzero(values == identity) for identity in np.unique(values)}


def _check_identities(visible: dict[int, np.ndarray], infrared: dict[int, np.ndarray], needed: int) -> None:
    unpaired = sorted(visible.keys() ^ infrared.keys())
    if unpaired:
        raise ValueError(
            f"every identity needs images of both modalities; {len(unpaired)} have one only: "
            f"{', '.join(map(str, unpaired))}. Leave them out, as the data set's training() does"
        )
    if len(visible) < needed:
        raise ValueError(
            f"a batch needs {needed} different identities; got {len(visible)}. Train on more people, or take "
            "fewer for a batch (`identities` of the training configuration)"
        )
