"""Writing files so that they are whole at any time: in one piece, or line by line."""

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

# What `write_atomically` writes into before it is in place; the number is the writing process.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp", re.DOTALL)


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: at any time `path` is whole.

    What processes that were killed left of earlier writes of `path` is removed first. Raises OSError naming
    the path and the system's reason where the disk doesn't take the file; the one before stays then, and
    nothing is left of the new one.
    """
    path = Path(path)
    remove_leftovers(path.parent, escape(path.name))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    sink: _Sink | None = None
    try:
        with open(temporary, "wb") as file:
            sink = _Sink(file)
            write(cast(BinaryIO, sink))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch tells of its own offsets where the system refused a write, so the sink kept the reason.
        refused = sink.refused if sink is not None and sink.refused is not None else error
        if not isinstance(refused, OSError) or refused.errno is None:
            raise
        raise _unwritten(path, refused) from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: str | Path, content: object) -> None:
    """Write JSON for people and programs, atomically. Raises OSError as `write_atomically` does."""
    text = json.dumps(content, indent=2, sort_keys=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def append(path: str | Path, content: bytes) -> None:
    """Append to a file, all or nothing.

    Raises OSError naming the path and the system's reason; the file is as long as before then.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                with contextlib.suppress(OSError):  # what is no file on a disk has no length
                    os.ftruncate(file.fileno(), before)
                raise
    except OSError as error:
        raise _unwritten(Path(path), error) from error


def remove_leftovers(folder: Path, *names: str) -> list[Path]:
    """Remove what `write_atomically` left in `folder` of files called so when its process was killed.

    `names` are patterns as in a shell. Files whose writer still runs stay. Returns what was removed.
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


class _Sink(io.RawIOBase):
    """A file to write into that remembers why the system `refused` to take a piece."""

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
    """Whether a process of this number runs and isn't this one."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Have a new name survive a power cut, where folders can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
