"""The folder of a run: its files, and the lock by which one process at a time writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mrcn_fast.files import remove_leftovers
from mrcn_fast.reid.training.checkpoint import BEST_NAME, CHECKPOINT_NAME, RESULT_NAMES
from mrcn_fast.reid.training.journal import DAMAGED_NAME, METRICS_NAME

LOCK_NAME = ".lock"
# Patterns of all files that a run and its scoring write, and of those that its logger writes.
RUN_FILES = (CHECKPOINT_NAME, BEST_NAME, METRICS_NAME, DAMAGED_NAME, RESULT_NAMES)
# The log of a run is begun anew with it, and is no file that a run must not replace.
LOG_NAME = "run.log"
CSV_NAME = "csv/metrics.csv"
_LOGGER_FILES = (CSV_NAME, "tensorboard/events.out.tfevents.*")
# Those with the measurements of steps, which a run that begins again takes again.
_STEP_FILES = (METRICS_NAME, DAMAGED_NAME, *_LOGGER_FILES)


class FolderInUseError(ValueError):
    """Another process writes into the folder at this moment."""


@contextmanager
def held(folder: Path, work: str) -> Iterator[None]:
    """Lock a folder for this process, and make it where it doesn't exist. `work` is a verb for the message.

    The operating system unlocks the folder when the process ends in any way. Files that a killed process left
    half-written are removed. Raises FolderInUseError, without waiting, where another process has the lock.
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
    return _found(folder, (*RUN_FILES, *_LOGGER_FILES))


def step_files(folder: Path) -> list[Path]:
    """Those of `run_files` that have the measurements of steps alone."""
    return _found(folder, _STEP_FILES)


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))
