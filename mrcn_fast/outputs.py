"""Where results go: places that can't take them are refused before anything is computed for them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

_LONGEST_NAME: Final = 255


def check_folder(path: str | Path, what: str) -> None:
    """Refuse a folder for `what`, such as "the scores", that takes no files or can't be made.

    Nothing is left behind. Raises OSError naming the path and the reason.
    """
    expected = f"{path}: expected a folder for {what}"
    place = Path(path)
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in place.parts):
        raise OSError(f"{expected}; found a name of more than {_LONGEST_NAME} bytes, which no disk takes")
    try:
        # The folder, or what there is of the way to it.
        while not os.path.lexists(place) and place.parent != place:
            place = place.parent
        if not place.is_dir():
            raise OSError(f"{expected}; found a file at {place}. Give another folder")
        # Only trying is sure: permissions say nothing about a disk that is mounted read-only.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(
            f"{expected}; found that {place} can't be written to ({error.strerror}). Give another folder"
        ) from error


def check_file(path: str | Path, what: str) -> None:
    """Refuse a file for `what` that is a folder or can't be written, or can't be made.

    Nothing is left behind. Raises OSError naming the path and the reason.
    """
    place = Path(path)
    if place.is_dir():
        raise OSError(f"{path}: expected a file for {what}; found a folder. Give a file's name in it")
    if not os.path.lexists(place):
        check_folder(place.parent, what)
    elif not os.access(place, os.W_OK):
        raise OSError(f"{path}: expected a file for {what}; found one that can't be written to")
