"""The flags that several subcommands of `mrcn-fast bench` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeVar

from mrcn_fast.benchmark.timing import Case
from mrcn_fast.flags import PATH, TEXT, Flags, number
from mrcn_fast.outputs import check_file

# At most a day.
SECONDS: Final = number(float, 0, 86_400)


class _WithOut(Protocol):
    @property
    def out(self) -> Path | None: ...


Read = TypeVar("Read", bound=_WithOut)


def read_options(kind: Callable[..., Read], flags: Flags, argv: Sequence[str] | None) -> Read:
    """Make the options of a suite from its flags.

    Args:
        kind: the class of the options; `out` is the file that results are appended to
        flags: the flags, whose names are those of the options
        argv: what the flags are read from; None: the process's arguments

    Raises:
        OSError: results can't be appended to `out`.
    """
    options = kind(**flags.values(argv))
    if options.out:
        check_file(options.out, "the results")
    return options


def add_case_flags(flags: Flags) -> None:
    """Add the flags of a suite of cases: which of them, for how long, and where the results go."""
    flags.add("--only", TEXT, "", "cases whose name contains this")
    flags.add("--seconds", SECONDS, 8.0, "measuring time per case")
    flags.add("--out", PATH, None, "append the results to this file as JSON lines")
    flags.add_switch("--list", "print the cases' names and stop")


def print_names(cases: Sequence[Case]) -> None:
    """Print the cases' names, one per line."""
    print("\n".join(case.name for case in cases))
