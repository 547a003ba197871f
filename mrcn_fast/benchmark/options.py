"""The flags that several subcommands of `mrcn-fast bench` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mrcn_fast.benchmark.timing import Case
from mrcn_fast.flags import PATH, TEXT, Flags, number

# At most a day.
SECONDS: Final = number(float, 0, 86_400)


def add_case_flags(flags: Flags) -> None:
    """Add the flags of a suite of cases: which of them, for how long, and where the results go."""
    flags.add("--only", TEXT, "", "cases whose name contains this")
    flags.add("--seconds", SECONDS, 8.0, "measuring time per case")
    flags.add("--out", PATH, None, "append the results to this file as JSON lines")
    flags.add_switch("--list", "print the cases' names and stop")


def print_names(cases: Sequence[Case]) -> None:
    """Print the cases' names, one per line."""
    print("\n".join(case.name for case in cases))
