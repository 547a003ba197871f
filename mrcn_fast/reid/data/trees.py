"""Reading the published trees: folders, images, lists of images, lists of identities; and what they lack."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mrcn_fast.reid.data.samples import DatasetError, Sample


class Listed(NamedTuple):
    """One line of a list of images: its number from 1, the image's place below the root, and its label."""

    line: int
    place: PurePosixPath
    label: int


def few(values: Sequence[object], limit: int = 8) -> str:
    """The first of `values`, and how many there are besides."""
    shown = ", ".join(str(value) for value in values[:limit])
    return f"{shown} and {len(values) - limit} more" if len(values) > limit else shown


def entries(folder: Path) -> str:
    """What is in `folder`, for a message."""
    return few(sorted(entry.name for entry in folder.iterdir())) or "an empty folder"


def check_folders(root: Path, folders: Iterable[str], tree: str) -> None:
    """DatasetError unless `root` has all `folders`; `tree` says whose tree is expected and how it looks."""
    if not root.is_dir():
        raise DatasetError(f"{root}: expected {tree}; found no such folder")
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if missing:
        raise DatasetError(f"{root}: expected {tree}; found no {few(missing)}, but {entries(root)}")


def image_names(folder: Path) -> list[str]:
    """The sorted names of the .jpg files; a person whom the camera has not seen has no folder, hence none."""
    if not folder.is_dir():
        return []
    # Hidden names are what archivers leave beside the images.
    return sorted(n for n in os.listdir(folder) if n.lower().endswith(".jpg") and not n.startswith("."))


def by_place(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples grouped by identity and camera, in order of appearance."""
    places: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        places.setdefault((sample.identity, sample.camera), []).append(sample)
    return list(places.values())


def read_identities(path: Path) -> list[int]:
    """The sorted identities of a file of one line of comma-separated numbers from 1."""
    expected = "one line of comma-separated identities such as 6,10,17"
    lines = [line for line in _read(path, expected).splitlines() if line.strip()]
    if len(lines) != 1:
        raise DatasetError(f"{path}: expected {expected}; found {len(lines)} lines that are not blank")
    identities: set[int] = set()
    for field in lines[0].split(","):
        word = field.strip()
        if not (_is_number(word) and int(word) > 0):
            raise DatasetError(f"{path}: expected {expected}; found {word!r} among them")
        identities.add(int(word))
    return sorted(identities)


def read_list(path: Path, foreign: Collection[str], *, example: str) -> list[Listed]:
    """The images of a list, one a line: its place below the data set's root, a space, a label from 0.

    The place may hold spaces, and backslashes for slashes. `foreign` are the folders (in lower case) in which
    no image of this list lies: those of the other modality, where a list of it would be taken for this one;
    `example` is a line as it should be. Raises DatasetError with the line's number for anything else, and for
    one image with two labels or a list without images.
    """
    expected = f"lines such as {example!r}"
    listed: list[Listed] = []
    labels: dict[PurePosixPath, int] = {}
    for number, line in enumerate(_read(path, expected).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        found = _parse(line)
        if found is None:
            raise DatasetError(f"{where}: expected {expected}; found {line.strip()!r}")
        place, label = found
        strange = next((part for part in place.parts[:-1] if part.lower() in foreign), None)
        if strange is not None:
            raise DatasetError(
                f"{where}: expected no image of {strange} in this list; found {line.strip()!r}. Lists of "
                f"visible and infrared, or of training and test, are interchanged: copy idx again"
            )
        if labels.setdefault(place, label) != label:
            raise DatasetError(
                f"{where}: expected one label for an image; found {label}, and {labels[place]} in an earlier "
                f"line, for {place}"
            )
        listed.append(Listed(number, place, label))
    if not listed:
        raise DatasetError(f"{path}: expected {expected}; found an empty list")
    return listed


def check_images(root: Path, path: Path, listed: Iterable[Listed]) -> None:
    """DatasetError if an image that the list at `path` names isn't below `root`."""
    # Folders are listed once: asking for each image takes minutes on a network disk.
    there: dict[PurePosixPath, set[str]] = {}
    missing = []
    for line in listed:
        folder = line.place.parent
        if folder not in there:
            there[folder] = set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
        # Where case doesn't matter to the disk, it does in its listing.
        if line.place.name not in there[folder] and not (root / line.place).is_file():
            missing.append(line)
    if missing:
        raise DatasetError(
            f"{root / missing[0].place}: expected this image, which {path} names in line {missing[0].line}; "
            f"found no such file. {len(missing)} of the list's images are missing: copy the data set again"
        )


def _parse(line: str) -> tuple[PurePosixPath, int] | None:
    words = line.strip().rsplit(maxsplit=1)
    if len(words) != 2 or not _is_number(words[1]):
        return None
    place = PurePosixPath(words[0].replace("\\", "/"))
    # All that a list names lies below the data set's root.
    if place.is_absolute() or ".." in place.parts or not place.parts:
        return None
    return place, int(words[1])


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _read(path: Path, expected: str) -> str:
    try:
        # Some editors put a byte order mark in front.
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(
            f"{path}: expected {expected}; found no such file, but {entries(path.parent)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: expected {expected}; found: {error}") from error
