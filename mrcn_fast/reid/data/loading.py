"""Batches of a data set that worker processes make, for training, extraction and the cache."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mrcn_fast import internals
from mrcn_fast.reid.data.types import DatasetError
from mrcn_fast.reid.stopping import outlive_one_signal

Item = TypeVar("Item")
Batch = TypeVar("Batch")

# Batches that are ready wait in shared memory, of which containers have 64 MB: the limit of all processes.
_READY_BYTES: Final = 48 * 2**20
_LEAST_READY, _MOST_READY = 2, 8  # batches per process


# What has to be closed before Python ends: see `Batches.close`.
_open: weakref.WeakSet[Batches[Any]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for batches in list(_open):
        batches.close()


class Batches(Generic[Batch]):
    """The batches `collate([item, ...])` of a data set, which worker processes make ahead.

    The processes stay alive for the next iteration. No value is drawn from torch's global generator. A
    DatasetError in a process is raised here with its own message, as without processes.

    Args:
        batch_sampler: gives the index lists of an epoch; by default batches of `batch_size` in order
        batch_bytes: bytes of one batch, from which the number of batches made ahead follows
        workers: number of processes; 0: this one

    Example:
        >>> samples = open_dataset("regdb", "data/regdb").training().visible
        >>> batches = Batches(PersonImages(samples, (64, 32)), torch.stack, batch_size=5)
        >>> next(iter(batches)).shape
        torch.Size([5, 3, 64, 32])
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        collate: Callable[[list[Item]], Batch],
        *,
        batch_sampler: Sampler[Any] | None = None,
        batch_size: int = 1,
        batch_bytes: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        order = {"batch_size": batch_size} if batch_sampler is None else {"batch_sampler": batch_sampler}
        ahead = _READY_BYTES // (max(workers, 1) * max(batch_bytes, 1))
        self._loader: DataLoader[Any] = DataLoader(
            _Told(dataset),
            collate_fn=_Collate(collate),
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=max(_LEAST_READY, min(ahead, _MOST_READY)) if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=outlive_one_signal,
            # The loader draws a seed per epoch; from the global generator, this would shift the stream of the
            # augmentation.
            generator=torch.Generator(),
            **order,
        )
        _open.add(self)

    def __iter__(self) -> Iterator[Batch]:
        # The processes start here, before the first batch is requested.
        return self._raising(iter(self._loader))

    def close(self) -> None:
        """End the worker processes; the next iteration starts new ones.

        At its end, Python sends SIGTERM to the processes that are left, which outlive one, and waits for them
        forever.
        """
        internals.end_workers(self._loader)

    @staticmethod
    def _raising(batches: Iterator[Any]) -> Iterator[Batch]:
        for batch in batches:
            if isinstance(batch, DatasetError):
                try:
                    raise batch
                finally:
                    # The traceback holds this frame, which would keep the processes alive through the
                    # iterator.
                    del batch
            yield batch


class _Told(Dataset[Any]):
    """A data set that returns DatasetErrors as items, because a process passes raised ones on as text."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._dataset[index]
        except DatasetError as error:
            return error


class _Collate:
    """Return the first DatasetError among the items, or collate them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list[Any]) -> Any:
        errors = (item for item in items if isinstance(item, DatasetError))
        return next(errors, None) or self._collate(items)
