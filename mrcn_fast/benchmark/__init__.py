"""Measure the library beside its baselines: `mrcn-fast bench`.

- timing: cases, the check before a measurement, calls timed in turn, peak memory
- workers: measuring many cases, prepared in several processes where asked for
- results: result lines, tables of them, and comparisons of two files
- forms: what is compared, with titles and colours; report: charts of result lines
- show: `bench show`, which measures nothing
- options: flags that several subcommands share
- suites: one module per subcommand that measures

A case is timed only after its fused result was compared with a baseline's on the same inputs. This package
imports nothing of `suites`; the suites import it.
"""

from mrcn_fast.benchmark.results import described, machine, print_row, read, row, write
from mrcn_fast.benchmark.timing import (
    EXACT,
    Case,
    Cost,
    Timing,
    check,
    largest_error,
    measure,
    peak_bytes,
    quantiles,
)

__all__ = [
    "EXACT",
    "Case",
    "Cost",
    "Timing",
    "check",
    "described",
    "largest_error",
    "machine",
    "measure",
    "peak_bytes",
    "print_row",
    "quantiles",
    "read",
    "row",
    "write",
]
