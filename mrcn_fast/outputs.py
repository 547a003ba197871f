"""Checks of output folders and files, which are made before anything is computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

_LONGEST_NAME: Final = 255


def check_folder(path: str | Path, what: str) -> None:
    """Raise OSError, with path and reason, for a folder that can't be made or written to.

    `what` is the folder's content for the message, such as "the scores". The check leaves nothing behind.
    """
    expected = f"{path}: expected a folder for {what}"
    place = Path(path)
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in place.parts):
        raise OSError(f"{expected}; found a name of more than {_LONGEST_NAME} bytes, which no disk takes")
    try:
        # The folder, or its nearest parent that exists.
        while not os.path.lexists(place) and place.parent != place:
            place = place.parent
        if not place.is_dir():
            raise OSError(f"{expected}; found a file at {place}. Give another folder")
        # The check tries to write, because permissions don't show that a disk is mounted read-only.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(
            f"{expected}; found that {place} can't be written to ({error.strerror}). Give another folder"
        ) from error


def check_file(path: str | Path, what: str) -> None:
    """Raise OSError, with path and reason, for a file that is a folder or can't be made or written.

    `what` is the file's content for the message. The check leaves nothing behind.
    """
    place = Path(path)
    if place.is_dir():
        raise OSError(f"{path}: expected a file for {what}; found a folder. Give a file's name in it")
    if not os.path.lexists(place):
        check_folder(place.parent, what)
    elif not os.access(place, os.W_OK):
        raise OSError(f"{path}: expected a file for {what}; found one that can't be written to")


def check_new(path: str | Path, what: str, overwrite: bool) -> None:
    """Raise OSError as `check_file` does and, unless `overwrite`, for a file that is there already."""
    check_file(path, what)
    if os.path.lexists(path) and not overwrite:
        raise OSError(f"{path}: is there already. Give another name, or replace it (--overwrite)")
