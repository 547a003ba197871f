"""The error of failed allocations: how much memory was wanted, for what, and what would need less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# The messages of torch's allocators, NumPy, shared memory and our kernels that have a number of bytes.
_WANTED: Final = re.compile(
    r"(?:tried to allocate|unable to allocate|unable to mmap|mrcn_fast can't allocate) "
    r"(?P<count>\d+(?:\.\d+)?) ?(?P<unit>bytes|[KMGTPE]iB)",
    re.IGNORECASE,
)
_UNITS: Final = ("bytes", "kib", "mib", "gib", "tib", "pib", "eib")
# The messages without a number of bytes: of more bytes than can be counted, of C++'s allocator, of the system
# where it ends a process that decodes images, and of the memory that such processes share.
_SHORT: Final = re.compile(
    r"Storage size calculation overflowed|std::bad_alloc|shared memory.*No space left"
    r"|DataLoader worker \(pid.*\) (?:is killed by signal: (?:Killed|Bus)|exited unexpectedly)",
    re.DOTALL,
)


class MemoryShortageError(MemoryError):
    """An allocation failed. The message says how much was wanted, for what, and what needs less."""


@contextmanager
def enough_memory(work: str, less: str) -> Iterator[None]:
    """Turn the error of a failed allocation in this context into MemoryShortageError.

    `work` says what the memory was for, and `less` what would need less. Other errors pass unchanged, and so
    does the MemoryShortageError of an inner context.
    """
    try:
        yield
    except MemoryShortageError:
        raise
    # torch raises RuntimeError, of which its OutOfMemoryError is a subclass.
    except (MemoryError, RuntimeError) as error:
        missing = shortage(error)
        if missing is None:
            raise
        raise MemoryShortageError(f"not enough memory for {work}{missing}. {less}") from error


def shortage(error: Exception) -> str | None:
    """Say how much a failed allocation wanted, as the end of a message: ", could not allocate 12 bytes".

    Returns "" where the error doesn't say how many bytes, and None for an error of another kind.
    """
    wanted = _WANTED.search(str(error)) if isinstance(error, (MemoryError, RuntimeError)) else None
    if wanted is None:
        return "" if isinstance(error, MemoryError) or _SHORT.search(str(error)) else None
    if "." not in wanted["count"] and wanted["unit"] == "bytes":
        return f", could not allocate {wanted['count']} bytes"
    count = float(wanted["count"]) * 1024 ** _UNITS.index(wanted["unit"].lower())
    return f", could not allocate about {int(count)} bytes"
