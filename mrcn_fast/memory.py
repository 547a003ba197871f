"""One error for allocations that fail: how much was wanted, for what, and what would need less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# As torch's allocators, numpy and the memory that processes share write it.
_WANTED: Final = re.compile(
    r"(?:tried to allocate|unable to allocate|unable to mmap) (?P<count>\d+(?:\.\d+)?) ?"
    r"(?P<unit>bytes|[KMGTPE]iB)",
    re.IGNORECASE,
)
_UNITS: Final = ("bytes", "kib", "mib", "gib", "tib", "pib", "eib")
# Without a number of bytes: more than can be counted; C++'s allocator; the system, which ends a process that
# decodes images; the memory that such processes share.
_SHORT: Final = re.compile(
    r"Storage size calculation overflowed|std::bad_alloc|shared memory.*No space left"
    r"|DataLoader worker \(pid.*\) (?:is killed by signal: (?:Killed|Bus)|exited unexpectedly)",
    re.DOTALL,
)


class MemoryShortageError(MemoryError):
    """Memory that could not be had; the message says how much, for what, and what needs less."""


@contextmanager
def enough_memory(work: str, less: str) -> Iterator[None]:
    """Have an allocation that fails inside raise MemoryShortageError.

    `work` says what the memory was for, `less` what would need less of it. An inner context's error passes,
    and so does every error of another kind.
    """
    try:
        yield
    except MemoryShortageError:
        raise
    # torch raises RuntimeError; its OutOfMemoryError is one.
    except (MemoryError, RuntimeError) as error:
        missing = shortage(error)
        if missing is None:
            raise
        raise MemoryShortageError(f"not enough memory for {work}{missing}. {less}") from error


def shortage(error: Exception) -> str | None:
    """What an allocation that failed wanted, as the end of a message: ", could not allocate 12 bytes".

    Empty where the error doesn't say how many bytes; None for an error of another kind.
    """
    wanted = _WANTED.search(str(error)) if isinstance(error, (MemoryError, RuntimeError)) else None
    if wanted is None:
        return "" if isinstance(error, MemoryError) or _SHORT.search(str(error)) else None
    if "." not in wanted["count"] and wanted["unit"] == "bytes":
        return f", could not allocate {wanted['count']} bytes"
    count = float(wanted["count"]) * 1024 ** _UNITS.index(wanted["unit"].lower())
    return f", could not allocate about {int(count)} bytes"
