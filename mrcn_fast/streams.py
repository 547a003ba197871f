"""What a command prints, on streams that can't take every character, or that nobody reads any more."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Final, TextIO

# Signs of our texts as ASCII has them; all else that a stream can't write is escaped.
_ASCII: Final = {"±": "+/-", "×": "x", "–": "-", "−": "-", "µ": "u", "δ": "delta", "′": "'"}
_ERRORS: Final = "mrcn_fast.printable"


@contextlib.contextmanager
def printable() -> Iterator[None]:
    """Let stdout and stderr take all text: a sign they don't have as ASCII has it, or escaped.

    File names that are no text in the file system's encoding come out as the bytes they are.
    """
    codecs.register_error(_ERRORS, _replaced)
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_ERRORS)
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            if not stream.closed:
                with contextlib.suppress(OSError):  # what waits to be written finds no reader
                    stream.reconfigure(errors=errors)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for the first sign that a stream can't write, and where the next one is."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign, end = error.object[error.start], error.start + 1
    if "\udc80" <= sign <= "\udcff":  # a byte that Python could not decode
        return sign.encode("ascii", "surrogateescape"), end
    return _ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode(), end


def flush_stdout() -> None:
    """Write what waits for stdout, or drop it where nobody reads it any more, as behind `| head -1`.

    Raises OSError where a disk doesn't take it. What can't be written is dropped then too, as Python flushes
    once more at its end, and would complain.
    """
    if sys.stdout is None:  # as it is where the process began with stdout closed
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise


def silence(stream: TextIO) -> None:
    """Send what is written to a stream from now on, and what waits in it, nowhere."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # a stream may be no file
        os.dup2(nowhere.fileno(), stream.fileno())


def stdout_is_unread() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, no stdout, or one that is no file
        return False
