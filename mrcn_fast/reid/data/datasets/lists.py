"""The reader of the lists of identities and images in the published trees, and the checks of lists."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from mrcn_fast.reid.data.datasets.trees import contents, entries, few, is_number, stem
from mrcn_fast.reid.data.formats import SUFFIXES, is_image
from mrcn_fast.reid.data.types import DatasetError

# The most characters of a line that a message shows.
_SHOWN: Final = 100

_log = logging.getLogger(__name__)


class Listed(NamedTuple):
    """A line of a list of images: its number from 1, the image's path below the root, and its label."""

    line: int
    place: PurePosixPath
    label: int

    @property
    def person(self) -> int | None:
        """The number of the person, by the name of the image's folder; None where it is no number."""
        folder = self.place.parent.name
        return int(folder) if is_number(folder) else None


def check_identities(path: Path, identities: Collection[int], seen: Collection[int]) -> None:
    """Raise DatasetError unless all `identities`, which the list at `path` names, are in `seen`."""
    if missing := sorted(set(identities) - set(seen)):
        raise DatasetError(
            f"{path}: expected identities whose images are in the tree; found {len(missing)} of "
            f"{len(identities)} without any: {few(missing)}. Check that the list belongs to these images, or "
            f"copy the data set again"
        )


def read_identities(path: Path) -> list[int]:
    """Read the sorted identities in a file, which has one line of comma-separated numbers from 1.

    An identity that is listed several times counts once; a warning names it.
    """
    expected = "one line of comma-separated identities such as 6,10,17"
    lines = [line for line in _read(path, expected).splitlines() if line.strip()]
    if len(lines) != 1:
        raise DatasetError(f"{path}: expected {expected}; found {len(lines)} lines that are not blank")
    identities: Counter[int] = Counter()
    for field in lines[0].split(","):
        word = field.strip()
        if not (is_number(word) and int(word) > 0):
            raise DatasetError(f"{path}: expected {expected}; found {_shown(field)} among them")
        identities[int(word)] += 1
    if repeated := sorted(identity for identity, count in identities.items() if count > 1):
        _log.warning(
            "%s: %d identities stand there more than once, and count once: %s",
            path,
            len(repeated),
            few(repeated),
        )
    return sorted(identities)


def read_list(path: Path, foreign: Collection[str], *, example: str) -> list[Listed]:
    """Read a list of images: per line a path below the data set's root, a space and a label from 0.

    A path may contain spaces, and backslashes for slashes. A line that repeats an earlier one is left out,
    and a warning counts such lines. `foreign` are folders of the other modality (in lower case), in which no
    image of this list may be, because the lists might be exchanged. Messages show `example` as a correct
    line.

    Raises DatasetError with the line's number for any other line, for an image with two labels, for two
    images whose names differ only in the suffix, and for a list without images.
    """
    listed: dict[PurePosixPath, Listed] = {}
    stems: dict[str, Listed] = {}
    repeated: list[int] = []
    for line in _lines(path, f"lines such as {example!r}"):
        where = f"{path}, line {line.line}"
        _check_place(where, line.place, foreign)
        earlier = listed.setdefault(line.place, line)
        if earlier.label != line.label:
            raise DatasetError(
                f"{where}: expected one label for an image; found {line.label}, and {earlier.label} in line "
                f"{earlier.line}, for {line.place}"
            )
        twin = stems.setdefault(stem(str(line.place)), line)
        if twin.place != line.place:
            raise DatasetError(
                f"{where}: expected one image of a name; found {line.place}, and {twin.place} in line "
                f"{twin.line}, which would be one picture twice. Take one of them out of the list"
            )
        if earlier is not line:
            repeated.append(line.line)
    if repeated:
        _log.warning(
            "%s: left out %d lines that repeat an earlier one: %s", path, len(repeated), few(repeated)
        )
    return list(listed.values())


def check_images(root: Path, path: Path, listed: Iterable[Listed]) -> None:
    """Raise DatasetError if an image that the list at `path` names isn't below `root`."""
    # Folders are listed once, because a query per image takes minutes on a network disk.
    there: dict[PurePosixPath, set[str]] = {}
    missing = []
    for line in listed:
        folder = line.place.parent
        if folder not in there:
            there[folder] = set(contents(root / folder).images) if (root / folder).is_dir() else set()
        # Case matters in a listing, also on disks that ignore it.
        if line.place.name not in there[folder] and not (root / line.place).is_file():
            missing.append(line)
    if missing:
        raise DatasetError(
            f"{root / missing[0].place}: expected this image, which {path} names in line {missing[0].line}; "
            f"found no such file. {len(missing)} of the list's images are missing: copy the data set again"
        )


def check_people(lists: Mapping[Path, Iterable[Listed]]) -> None:
    """Raise DatasetError unless each label is one person, and each person one label, in all `lists` (paths).

    The number of an image's folder is the person, as in the published trees; images in other folders are not
    checked.
    """
    first: dict[tuple[str, int], tuple[Path, Listed]] = {}
    for path, line in ((path, line) for path, listed in lists.items() for line in listed):
        if line.person is None:
            continue
        for key in (("label", line.label), ("person", line.person)):
            other, earlier = first.setdefault(key, (path, line))
            if (earlier.label, earlier.person) != (line.label, line.person):
                raise DatasetError(
                    f"{path}, line {line.line}: expected one person for a label, and one label for a person; "
                    f"found label {line.label} for folder {line.place.parent}, but label {earlier.label} for "
                    f"folder {earlier.place.parent} in {other}, line {earlier.line}. The lists are of "
                    f"different splits, or were labelled apart: copy idx again"
                )


def people_of(listed: Iterable[Listed]) -> set[int]:
    """Collect the people in whose folders the images of a list are."""
    return {line.person for line in listed if line.person is not None}


def check_apart(path: Path, training: Collection[int], test: Collection[int]) -> None:
    """Raise DatasetError if a person is in both the training and the test lists at `path`."""
    if shared := sorted(set(training) & set(test)):
        raise DatasetError(
            f"{path}: expected test people apart from the training ones; found {len(shared)} in both: "
            f"{few(shared)}. The lists are of different splits: copy them again"
        )


def _lines(path: Path, expected: str) -> Iterator[Listed]:
    """Read the lines of a list that aren't blank. Raises DatasetError for an unfit line, and for none."""
    lines = [
        (number, line) for number, line in enumerate(_read(path, expected).split("\n"), 1) if line.strip()
    ]
    if not lines:
        raise DatasetError(f"{path}: expected {expected}; found an empty list")
    for number, line in lines:
        found = _parse(line)
        if found is None:
            raise DatasetError(f"{path}, line {number}: expected {expected}; found {_shown(line)}")
        yield Listed(number, *found)


def _parse(line: str) -> tuple[PurePosixPath, int] | None:
    words = line.strip().rsplit(maxsplit=1)
    if len(words) != 2 or not is_number(words[1]):
        return None
    place = PurePosixPath(words[0].replace("\\", "/"))
    # All images that a list names are below the data set's root.
    if place.is_absolute() or ".." in place.parts or not place.parts:
        return None
    return place, int(words[1])


def _check_place(where: str, place: PurePosixPath, foreign: Collection[str]) -> None:
    """Raise DatasetError unless `place`, which a list names at `where`, is an image of its modality."""
    strange = next((part for part in place.parts[:-1] if part.lower() in foreign), None)
    if strange is not None:
        raise DatasetError(
            f"{where}: expected no image of {strange} in this list; found {_shown(str(place))}. Lists of "
            f"visible and infrared, or of training and test, are interchanged: copy idx again"
        )
    if not is_image(place.name):
        raise DatasetError(
            f"{where}: expected the name of an image, which ends in one of {', '.join(SUFFIXES)}; found "
            f"{_shown(str(place))}. Convert the file and name it here, or take the line out"
        )


def _shown(text: str) -> str:
    """Format a line of any file for a message."""
    return repr(text.strip()[:_SHOWN])


def _read(path: Path, expected: str) -> str:
    try:
        # Some editors write a byte order mark first. File names are bytes that need not be UTF-8.
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError:
        raise DatasetError(
            f"{path}: expected {expected}; found no such file, but {entries(path.parent)}"
        ) from None
    except OSError as error:
        raise DatasetError(f"{path}: expected {expected}; found: {error.strerror}") from error
