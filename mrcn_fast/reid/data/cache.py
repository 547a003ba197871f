"""A memory-mapped cache of resized images, which is built atomically, and again when it is stale."""

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

from mrcn_fast.files import sync_folder
from mrcn_fast.reid.data.images import PersonImages
from mrcn_fast.reid.data.loading import Batches
from mrcn_fast.reid.data.types import DatasetError, Sample

# Part of every cache's name: raise it when the content of the file changes.
_VERSION: Final = 2
# Bytes of the CRC-32 after the images.
_CHECKSUM: Final = 4
# Images that are written at a time.
_WRITTEN: Final = 32
# Seconds between two log lines during a build.
_LOG_SECONDS: Final = 10.0
# The end of a cache's name: a digest of what it was made of.
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
    """Read `PersonImages(samples, image_size, filter=filter)` from a memory-mapped file.

    An existing file is used only if it was made of the same files in the same order (by path, size and time
    of change) and its checksum is right. Otherwise a new one is built, and files of the same name, size and
    filter are removed; processes that have one open keep it. One of several processes builds, and the others
    wait. The file is written under another name and renamed when it is completely on the disk. The next
    builder removes the leftovers of a killed one.

    Args:
        samples, image_size, filter: as `PersonImages` takes them
        folder: the folder of the cache
        name: what the images are, such as "regdb-split3-train-visible"
        workers: processes that decode the images; 0: this one

    Raises:
        DatasetError: with the file, for an image that is missing or can't be read
        OSError: with the path and the space needed and free, where the cache can't be written

    Neither leaves a file.
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
            # Another process may have built it in the meantime.
            if damage := _damage(path, shape):
                if path.exists():
                    _log.warning("Cache of %s: %s is made anew; found: %s", name, path, damage)
                _remove(path.parent, re.escape(key) + _DIGEST + r"\.npy\.\w+\.part")
                _build(path, images, name, workers)
                _remove(path.parent, re.escape(key) + _DIGEST + r"\.npy", but=path.name)
    return CachedImages(path, images.samples, images.image_size)


class CachedImages(Dataset[Tensor]):
    """The images of `samples` in the memory-mapped file `path`: `images[i]` is uint8 (3, height, width).

    A process that unpickles it maps the file again. Raises DatasetError where the file is missing or isn't a
    cache of this number and size of images.
    """

    def __init__(self, path: Path, samples: tuple[Sample, ...], image_size: tuple[int, int]) -> None:
        self.path = path
        self.samples = samples
        self.image_size = image_size
        self._rows: np.ndarray | None = None
        # Mapped here, so that forked processes have the map even if another run replaces the file.
        self._mapped()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self._mapped()[index]))

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled with its whole content.
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
    """Hash everything that the content of the cache depends on."""
    paths = [os.path.abspath(sample.path) for sample in images.samples]
    # Only the paths below the common folder of all images count, because a data set may be moved.
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
    """The reason why the file can't be used as the cache of images of this shape; None where it can."""
    try:
        rows = _rows(path, shape)
        with path.open("rb") as file:
            file.seek(-_CHECKSUM, os.SEEK_END)
            whole = file.read() == _checksum(zlib.crc32(rows.data))
    except (OSError, ValueError) as error:
        return str(error)
    return None if whole else "content that doesn't fit its checksum"


def _rows(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Map the images in a cache. Raises ValueError for a file of another type, shape or length."""
    # np.load isn't used, because it accepts other types of files and fails in many ways on damaged ones.
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
    """Hold the lock `path`; log where this process has to wait for another."""
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
    """Remove the files in `folder` whose whole name matches the pattern."""
    for entry in folder.iterdir():
        if re.fullmatch(pattern, entry.name) and entry.name != but:
            entry.unlink(missing_ok=True)


def _build(path: Path, images: PersonImages, name: str, workers: int) -> None:
    row = 3 * images.image_size[0] * images.image_size[1]
    needed = len(images) * row
    _log.info("Cache of %s: writing %d images, %.1f MB, to %s", name, len(images), needed / 1e6, path)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, _cant_write("the disk is too full", needed, free), str(path))
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    start = time.monotonic()
    batches = Batches(
        images, default_collate, batch_size=_WRITTEN, batch_bytes=_WRITTEN * row, workers=workers
    )
    try:
        with part.open("xb") as file:
            _write(file, _logged(batches, len(images), name), (len(images), 3, *images.image_size))
        part.replace(path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(error.errno, _cant_write(error.strerror, needed, free), str(path)) from error
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
    _log.info("Cache of %s: done in %.1f s", name, time.monotonic() - start)


def _cant_write(reason: str | None, needed: int, free: int) -> str:
    return (
        f"can't write the cache: {reason}; it needs {needed} bytes, {free} are free. Make room, choose "
        f"another folder, or go without a cache"
    )


def _write(file: BinaryIO, batches: Iterable[Tensor], shape: tuple[int, ...]) -> None:
    """Write the batches as a .npy file, followed by their checksum, and sync it to the disk."""
    file.write(_header(shape))
    value = 0
    for batch in batches:
        content = batch.numpy().data
        file.write(content)
        value = zlib.crc32(content, value)
    file.write(_checksum(value))
    file.flush()
    os.fsync(file.fileno())


def _logged(batches: Iterable[Tensor], count: int, name: str) -> Iterator[Tensor]:
    """Pass the batches on, and log the number of finished images now and then."""
    done, logged = 0, time.monotonic()
    for batch in batches:
        yield batch
        done += len(batch)
        if time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            _log.info("Cache of %s: %d of %d images", name, done, count)
