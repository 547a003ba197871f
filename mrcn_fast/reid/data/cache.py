"""Resized images kept on disk, memory-mapped: decoded once, whole at any time, rebuilt when stale."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mrcn_fast.reid.data.images import PersonImages
from mrcn_fast.reid.data.loading import Batches
from mrcn_fast.reid.data.samples import DatasetError, Sample

# Goes into every cache's name: raise it when what stands in the file changes.
_VERSION: Final = 1
# Images written at a time.
_WRITTEN: Final = 32
# Seconds between two log lines of a build.
_TOLD: Final = 10.0
# The end of a cache's name: what it was made of.
_DIGEST: Final = "-[0-9a-f]{16}"

_log = logging.getLogger(__name__)


def cached(
    samples: Sequence[Sample],
    image_size: tuple[int, int],
    *,
    filter: str,
    folder: str | Path,
    name: str,
    workers: int = 0,
) -> Dataset[Tensor]:
    """`PersonImages(samples, image_size, filter=filter)` from a memory-mapped file, which is made if need be.

    folder: where the file stands; name: what it is of, such as "regdb-split3-train-visible". A file is used
    only if it is of these samples' files in this order, by their places, sizes and times of change. Else it
    is built anew by `workers` processes, and files of the same name, size and filter that are not of these
    samples are removed; whoever has one open keeps it. Of several processes one builds and the others wait.

    The file is written beside its place and moved there when it is whole and on the disk; what builders that
    were killed leave there, the next one removes.

    Raises DatasetError naming a sample's file that is missing or can't be read; OSError with the path and the
    space needed and free where the file can't be written. Either leaves no file.
    """
    images = PersonImages(samples, image_size, filter=filter)
    if not name or Path(name).name != name:
        raise ValueError(f"name is part of a file's name; got {name!r}")
    height, width = images.image_size
    key = f"{name}-{height}x{width}-{filter}"
    path = Path(folder) / f"{key}-{_digest(images)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _is_whole(path, images):
        with _locked(path.with_name(f"{key}.lock"), name):
            # Another process may have built it meanwhile.
            if not _is_whole(path, images):
                _remove(path.parent, re.escape(key) + _DIGEST + r"\.npy\.\w+\.part")
                _build(path, images, name, workers)
                _remove(path.parent, re.escape(key) + _DIGEST + r"\.npy", but=path.name)
    return CachedImages(path, images.samples)


class CachedImages(Dataset[Tensor]):
    """The images of `samples` from the memory-mapped file `path`: `images[i]` is uint8 (3, height, width).

    A process that gets it pickled maps the file by itself. Raises DatasetError where the file is gone.
    """

    def __init__(self, path: Path, samples: tuple[Sample, ...]) -> None:
        self.path = path
        self.samples = samples
        self._rows: np.ndarray | None = None
        # Mapped at once: processes that are forked have it then even if another run replaces the file.
        self._mapped()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self._mapped()[index]))

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would be all of its content.
        return self.__dict__ | {"_rows": None}

    def _mapped(self) -> np.ndarray:
        if self._rows is None:
            try:
                self._rows = np.load(self.path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise DatasetError(
                    f"{self.path}: expected the cache of {len(self.samples)} images; found: {error}. Another "
                    f"run with other images may have replaced it: give each its own folder, or start again"
                ) from error
        return self._rows


def _digest(images: PersonImages) -> str:
    """A short hash of all that the cache's content depends on."""
    paths = [os.path.abspath(sample.path) for sample in images.samples]
    # A data set may be moved: only the places below the folder that all images are in count.
    common = os.path.commonpath(list(map(os.path.dirname, paths))) if paths else ""
    content = hashlib.sha256(json.dumps((_VERSION, images.image_size, images.filter)).encode())
    for path, sample in zip(paths, images.samples, strict=True):
        try:
            found = os.stat(path)
        except OSError as error:
            raise DatasetError(
                f"{sample.path}: expected a readable image of identity {sample.identity}, camera "
                f"{sample.camera}; found: {error.strerror}. Copy the file from the data set again"
            ) from error
        place = os.path.relpath(path, common)
        content.update(json.dumps((place, found.st_size, found.st_mtime_ns)).encode())
    return content.hexdigest()[:16]


def _is_whole(path: Path, images: PersonImages) -> bool:
    """Whether the file is there; one that was cut or overwritten by others is taken for none."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return rows.dtype == np.uint8 and rows.shape == (len(images), 3, *images.image_size)


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock `path`; say so where another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.info("Cache of %s: waiting for the process that builds it", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove(folder: Path, pattern: str, but: str = "") -> None:
    """Remove the files of `folder` whose whole name matches."""
    for entry in folder.iterdir():
        if re.fullmatch(pattern, entry.name) and entry.name != but:
            entry.unlink(missing_ok=True)


def _build(path: Path, images: PersonImages, name: str, workers: int) -> None:
    row = 3 * images.image_size[0] * images.image_size[1]
    needed = len(images) * row
    _log.info("Cache of %s: writing %d images, %.1f MB, to %s", name, len(images), needed / 1e6, path)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, _no_room("the disk is too full", needed, free), str(path))
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    start = time.monotonic()
    batches = Batches(
        images, default_collate, batch_size=_WRITTEN, batch_bytes=_WRITTEN * row, workers=workers
    )
    try:
        with part.open("xb") as file:
            _write(file, _told(batches, len(images), name), (len(images), 3, *images.image_size))
        part.replace(path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(error.errno, _no_room(error.strerror, needed, free), str(path)) from error
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)
    _log.info("Cache of %s: done in %.1f s", name, time.monotonic() - start)


def _no_room(reason: str | None, needed: int, free: int) -> str:
    return (
        f"can't write the cache: {reason}; it needs {needed} bytes, {free} are free. Make room, choose "
        f"another folder, or go without a cache"
    )


def _write(file: BinaryIO, batches: Iterable[Tensor], shape: tuple[int, ...]) -> None:
    """A .npy file of the batches, on the disk when this returns; only one batch is in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for batch in batches:
        file.write(batch.numpy().data)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Have the new name survive a power cut, where folders can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _told(batches: Iterable[Tensor], count: int, name: str) -> Iterator[Tensor]:
    """The batches, with a log line now and then of how many images are done."""
    done, told = 0, time.monotonic()
    for batch in batches:
        yield batch
        done += len(batch)
        if time.monotonic() - told > _TOLD:
            told = time.monotonic()
            _log.info("Cache of %s: %d of %d images", name, done, count)
