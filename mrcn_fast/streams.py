"""Printing: characters that a stream can't write, pipes whose reader has gone, and steps that take long."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final, TextIO

# Seconds between two lines about a step that takes long, where no bar moves.
SECONDS_BETWEEN_LINES: Final = 15.0

# ASCII replacements of the signs in our texts; other characters that a stream can't write are escaped.
_ASCII: Final = {"±": "+/-", "×": "x", "–": "-", "−": "-", "µ": "u", "δ": "delta", "′": "'"}
_ERRORS: Final = "mrcn_fast.printable"


@contextlib.contextmanager
def printable() -> Iterator[None]:
    """Make stdout and stderr write all text, with replaced or escaped characters where necessary.

    File names that aren't text in the file system's encoding are written as their bytes.
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
                with contextlib.suppress(OSError):  # the reader has gone before the buffer was written
                    stream.reconfigure(errors=errors)


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace the first character that a stream can't write; returns the text and the next position."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign, end = error.object[error.start], error.start + 1
    if "\udc80" <= sign <= "\udcff":  # a byte that Python could not decode
        return sign.encode("ascii", "surrogateescape"), end
    return _ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode(), end


def flush_stdout() -> None:
    """Flush stdout, or drop its buffer where the reader has gone, as after `| head -1`.

    Raises OSError where a disk doesn't take the text. The buffer is dropped then too, because Python flushes
    again when it ends, and would raise another error.
    """
    if sys.stdout is None:  # the process was started without stdout
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise


def silence(stream: TextIO) -> None:
    """Discard the buffer of a stream and everything that is written to it later."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # a stream may be no file
        os.dup2(nowhere.fileno(), stream.fileno())


def stdout_is_unread() -> bool:
    """Whether stdout is a pipe whose reader has gone."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, no stdout, or one that is no file
        return False


@contextlib.contextmanager
def announced(step: str) -> Iterator[None]:
    """Say on stderr what the body does, and every 15 s that it still does it."""
    begun, ended = time.perf_counter(), threading.Event()

    def go_on() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            print(f"{step}: {time.perf_counter() - begun:.0f} s so far", file=sys.stderr, flush=True)

    print(step, file=sys.stderr, flush=True)
    writer = threading.Thread(target=go_on, daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()
