"""What the library is measured against, and how: forms, cases, interleaved timing, result lines, reports.

`mrcn-fast bench` prints tables; ``pytest benchmarks`` runs the same cases under pytest-benchmark. A case is
timed only after its fused result was compared with the plain one on the same inputs.

Here stands what every measurement shares; the cases are in `cases`, the command in `command`.
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
