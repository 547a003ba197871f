"""The reader of folders in the published trees: their images, missing folders, and ignored entries."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from mrcn_fast.reid.data.formats import SUFFIXES, is_image
from mrcn_fast.reid.data.types import DatasetError, Sample

# The most digits of a label or an identity, so that the numbers fit all integer types used later.
_DIGITS: Final = 9

_log = logging.getLogger(__name__)


class Content(NamedTuple):
    """The sorted names of the images, folders and other entries in a folder."""

    images: list[str]
    folders: list[str]
    others: list[str]


class LeftOut:
    """The entries of a tree that its reader ignores; they are collected by path, and logged together."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths: list[Path] = []

    def add(self, folder: Path, names: Iterable[str]) -> None:
        """Add the entries `names` of `folder`."""
        self._paths += [folder / name for name in names]

    def log(self, dataset: str) -> None:
        """Log the number of entries since the last call, and the first of them, if there are any."""
        if self._paths:
            _log.warning(
                "%s: left out %d entries that are neither images (%s) nor folders of this layout: %s",
                dataset,
                len(self._paths),
                ", ".join(SUFFIXES),
                few([path.relative_to(self._root).as_posix() for path in self._paths]),
            )
        self._paths.clear()


def few(values: Sequence[object], limit: int = 8) -> str:
    """Format the first of `values`, and the number of the others."""
    shown = ", ".join(str(value) for value in values[:limit])
    return f"{shown} and {len(values) - limit} more" if len(values) > limit else shown


def entries(folder: Path) -> str:
    """Describe the entries of `folder` for a message."""
    return few(sorted(entry.name for entry in folder.iterdir())) or "an empty folder"


def check_is_folder(root: Path, tree: str) -> None:
    """Raise DatasetError unless `root` is a folder; `tree` describes the expected tree."""
    if not root.is_dir():
        found = "a file" if root.exists() else "no such folder"
        raise DatasetError(f"{root}: expected {tree}; found {found}")


def check_folders(root: Path, folders: Iterable[str], tree: str) -> None:
    """Raise DatasetError unless `root` has all `folders`; `tree` describes the expected tree."""
    check_is_folder(root, tree)
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if missing:
        raise DatasetError(f"{root}: expected {tree}; found no {few(missing)}, but {entries(root)}")


def contents(folder: Path) -> Content:
    """List the entries of `folder`. Raises DatasetError where that fails."""
    found = Content([], [], [])
    try:
        with os.scandir(folder) as listing:
            listed = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(
            f"{folder}: expected a folder that can be listed; found: {error.strerror}"
        ) from error
    for entry in listed:
        if entry.name.startswith("."):
            found.others.append(entry.name)
        elif is_image(entry.name) and _is_file(entry):
            found.images.append(entry.name)
        elif _is_folder(entry):
            found.folders.append(entry.name)
        else:
            found.others.append(entry.name)
    return found


def images_in(folder: Path, left_out: LeftOut) -> list[str]:
    """List the sorted names of the images in a person's folder, and add other entries to `left_out`.

    Raises DatasetError for two files whose names differ only in the suffix, because they would be the same
    picture.
    """
    found = contents(folder)
    left_out.add(folder, found.folders + found.others)
    count = Counter(map(stem, found.images))
    if twins := [name for name in found.images if count[stem(name)] > 1]:
        raise DatasetError(
            f"{folder / twins[0]}: expected one image of a name; found {twins[0]} and {twins[1]}, which "
            f"would be one picture twice. Remove one of them"
        )
    return found.images


def numbered(camera: Path, left_out: LeftOut) -> dict[int, Path]:
    """Find the folders of `camera` by the identities in their names, and add other entries to `left_out`.

    Raises DatasetError where two folders have one number, such as 0012 and 12.
    """
    found = contents(camera)
    left_out.add(camera, found.images + found.others)
    folders: dict[int, Path] = {}
    for name in found.folders:
        if not is_number(name):
            left_out.add(camera, [name])
        elif int(name) in folders:
            raise DatasetError(
                f"{camera}: expected one folder an identity; found {folders[int(name)].name} and {name}"
            )
        else:
            folders[int(name)] = camera / name
    return folders


def unknown_cameras(folder: Path, cameras: Iterable[int]) -> list[str]:
    """Find the folders in `folder` that are named like cameras, but are none of `cameras`."""
    known = {f"cam{camera}" for camera in cameras}
    return [name for name in contents(folder).folders if name.lower().startswith("cam") and name not in known]


def is_number(word: str) -> bool:
    """Whether a label, an identity or the name of a folder is a number from 0."""
    return word.isascii() and word.isdigit() and len(word) <= _DIGITS


def stem(name: str) -> str:
    """A file's name without its suffix."""
    return os.path.splitext(name)[0]


def by_place(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Group samples by identity and camera, in order of appearance."""
    places: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        places.setdefault((sample.identity, sample.camera), []).append(sample)
    return list(places.values())


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file; a broken link counts as a file that can't be read."""
    if entry.is_symlink() and not os.path.exists(entry.path):
        return True
    return entry.is_file()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # The entry's own method raises for a circular link.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
