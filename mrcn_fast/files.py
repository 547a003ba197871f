"""Atomic writing of files, and appending of lines."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, cast

# The temporary name that `write_atomically` writes to; the number is that of the writing process.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp", re.DOTALL)


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it, so that `path` is always complete.

    A missing folder is made. Leftovers of killed processes that wrote `path` are removed first. Raises
    OSError, with the path and the system's reason, where the file can't be written; the earlier file stays,
    and the temporary one is removed.
    """
    path = Path(path)
    remove_leftovers(path.parent, escape(path.name))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    sink: _Sink | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            sink = _Sink(file)
            write(cast(BinaryIO, sink))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch raises an error about its offsets where a write failed, so that the sink has kept the reason.
        refused = sink.refused if sink is not None and sink.refused is not None else error
        if not isinstance(refused, OSError) or refused.errno is None:
            raise
        raise _unwritten(path, refused) from error
    finally:
        # A file in the place of a folder has been refused.
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: str | Path, content: object) -> None:
    """Write indented JSON atomically. Raises OSError as `write_atomically` does."""
    text = json.dumps(content, indent=2, sort_keys=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def append(path: str | Path, content: bytes) -> None:
    """Append to a file completely or not at all.

    Raises OSError, with the path and the system's reason, and leaves the file as it was, on failure.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                with contextlib.suppress(OSError):  # pipes and devices have no length
                    os.ftruncate(file.fileno(), before)
                raise
    except OSError as error:
        raise _unwritten(Path(path), error) from error


def remove_leftovers(folder: Path, *names: str) -> list[Path]:
    """Remove the temporary files of `write_atomically` in `folder` whose processes were killed.

    `names` are shell patterns of the final names. Files of running processes stay. Returns the removed paths.
    """
    removed = []
    for entry in folder.iterdir() if folder.is_dir() else ():
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None or not any(fnmatchcase(found["name"], name) for name in names):
            continue
        if not _is_another_process(int(found["pid"])):
            entry.unlink(missing_ok=True)
            removed.append(entry)
    return removed


def sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut, on systems that can sync folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Sink(io.RawIOBase):
    """A file that remembers, as `refused`, the reason why the system refused a write."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.refused: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.refused = error
            raise


def _unwritten(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"can't be written: {error.strerror}", str(path))


def _is_another_process(pid: int) -> bool:
    """Whether another process of this number is running."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # the process of another user
        pass
    return True
