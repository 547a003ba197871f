"""Batches of a data set, made by worker processes: what training, extraction and the cache load with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mrcn_fast.reid.data.types import DatasetError

Item = TypeVar("Item")
Batch = TypeVar("Batch")

# What all processes together may have ready: batches wait in shared memory, of which containers have 64 MB.
_READY_BYTES: Final = 48 * 2**20
_LEAST_READY, _MOST_READY = 2, 8  # batches a process


class Batches(Generic[Batch]):
    """The batches `collate([item, ...])` of a data set, made ahead by `workers` processes, or in this one.

    batch_sampler: lists of indices, an epoch's batches each time it is iterated; else batches of `batch_size`
    in order. batch_bytes: of one batch, by which it is decided how many are made ahead. The processes stay
    for the next iteration. No value is drawn from torch's global generator.

    A DatasetError of the data set is raised as it would be without processes: with its own message.
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
            # The loader draws a seed an epoch; from the global generator that would shift the augmentation's
            # stream.
            generator=torch.Generator(),
            **order,
        )

    def __iter__(self) -> Iterator[Batch]:
        # The processes begin here, not when the first batch is asked for.
        return self._raising(iter(self._loader))

    @staticmethod
    def _raising(batches: Iterator[Any]) -> Iterator[Batch]:
        for batch in batches:
            if isinstance(batch, DatasetError):
                try:
                    raise batch
                finally:
                    # The error's traceback holds this frame: with a way back, the processes would outlive it.
                    del batch
            yield batch


class _Told(Dataset[Any]):
    """A data set whose DatasetErrors are items: raised in a process, they arrive as a traceback's text."""

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
    """The first DatasetError among a batch's items, or what `collate` makes of them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list[Any]) -> Any:
        errors = (item for item in items if isinstance(item, DatasetError))
        return next(errors, None) or self._collate(items)
