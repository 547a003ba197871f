"""Resized images kept on disk, memory-mapped: decoded once, whole at any time, rebuilt when stale."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import secrets
import shutil
import time
import zlib
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
from mrcn_fast.reid.data.types import DatasetError, Sample

# Goes into every cache's name: raise it when what stands in the file changes.
_VERSION: Final = 2
# Bytes behind the images: their CRC-32.
_CHECKSUM: Final = 4
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
    only if it is of these samples' files in this order, by their places, sizes and times of change, and its
    content is as it was written, by a checksum. Else it is built anew by `workers` processes, and files of
    the same name, size and filter that are not of these samples are removed; whoever has one open keeps it.
    Of several processes one builds and the others wait.

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
    shape = (len(images), 3, height, width)
    if _damage(path, shape):
        with _locked(path.with_name(f"{key}.lock"), name):
            # Another process may have built it meanwhile.
            if damage := _damage(path, shape):
                if path.exists():
                    _log.warning("Cache of %s: %s is made anew; found: %s", name, path, damage)
                _remove(path.parent, re.escape(key) + _DIGEST + r"\.npy\.\w+\.part")
                _build(path, images, name, workers)
                _remove(path.parent, re.escape(key) + _DIGEST + r"\.npy", but=path.name)
    return CachedImages(path, images.samples, images.image_size)


class CachedImages(Dataset[Tensor]):
    """The images of `samples` from the memory-mapped file `path`: `images[i]` is uint8 (3, height, width).

    image_size: (height, width). A process that gets it pickled maps the file by itself. Raises DatasetError
    where the file is gone or isn't a cache of so many images of that size.
    """

    def __init__(self, path: Path, samples: tuple[Sample, ...], image_size: tuple[int, int]) -> None:
        self.path = path
        self.samples = samples
        self.image_size = image_size
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
                self._rows = _rows(self.path, (len(self.samples), 3, *self.image_size))
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


def _damage(path: Path, shape: tuple[int, ...]) -> str | None:
    """Why the file can't be used as the cache of images of this shape; None where it is as it was written."""
    try:
        rows = _rows(path, shape)
        with path.open("rb") as file:
            file.seek(-_CHECKSUM, os.SEEK_END)
            whole = file.read() == _checksum(zlib.crc32(rows.data))
    except (OSError, ValueError) as error:
        return str(error)
    return None if whole else "content that doesn't fit its checksum"


def _rows(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The images in a cache's file, memory-mapped. ValueError for a file of another kind, shape or length."""
    # Not np.load, which takes other kinds of files, too, and fails in many ways on damaged ones.
    header = _header(shape)
    with path.open("rb") as file:
        size = len(header) + math.prod(shape) + _CHECKSUM
        found = os.fstat(file.fileno()).st_size
        if file.read(len(header)) != header or found != size:
            raise ValueError(f"not {size} bytes of images of shape {shape[1:]}, but {found} of another kind")
        return np.memmap(file, np.uint8, "r", len(header), shape)


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    content = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, content)
    return header.getvalue()


def _checksum(value: int) -> bytes:
    return value.to_bytes(_CHECKSUM, "little")


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
    """Write the batches as a .npy file, and their checksum behind it, onto the disk, a batch at a time."""
    file.write(_header(shape))
    value = 0
    for batch in batches:
        content = batch.numpy().data
        file.write(content)
        value = zlib.crc32(content, value)
    file.write(_checksum(value))
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
