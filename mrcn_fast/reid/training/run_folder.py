"""The folder of a run: the files that belong to the run, and that one process at a time writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mrcn_fast.files import remove_leftovers
from mrcn_fast.reid.training.checkpoint import CHECKPOINT_NAME, RESULT_NAMES
from mrcn_fast.reid.training.journal import DAMAGED_NAME, METRICS_NAME

LOCK_NAME = ".lock"
# All that a run and its scoring write, as patterns.
RUN_FILES = (CHECKPOINT_NAME, METRICS_NAME, DAMAGED_NAME, RESULT_NAMES)


class FolderInUseError(ValueError):
    """A folder into which another process writes at this moment."""


@contextmanager
def held(folder: Path, work: str) -> Iterator[None]:
    """Hold a folder, which is made if need be, for `work`, such as "trains": no other process holds it then.

    The system lets go of it when the process ends, however it ends. What a killed holder left half-written is
    removed. Raises FolderInUseError, at once, where another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUseError(
            f"{folder}: another process {work} in this folder (it holds {LOCK_NAME} there). Wait until it "
            "ends, or give another folder (--out)"
        ) from error
    try:
        remove_leftovers(folder, *RUN_FILES)
        yield
    finally:
        lock.release()


def run_files(folder: Path) -> list[Path]:
    """The files of a run that are in the folder."""
    return sorted(path for pattern in RUN_FILES for path in folder.glob(pattern))
