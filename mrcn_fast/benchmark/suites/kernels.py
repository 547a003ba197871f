"""`mrcn-fast bench kernels`: the block's operations and the loss beside plain PyTorch and torch.compile.

The suites of cases:

- table: the cases of the README, which have goals
- stages: every operation at the shapes of stages 0 to 4 of the paper's network, for its batch and one of
  twice the identities, in both dtypes and both layouts
- sweep: the block over N, C and H·W, with volumes from 1 MB to 1 GB, which shows how the time grows
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from mrcn_fast.benchmark import results, workers
from mrcn_fast.benchmark.options import add_case_flags, print_names, read_options
from mrcn_fast.benchmark.suites import problems
from mrcn_fast.benchmark.suites.problems import (
    DTYPES,
    LAYOUTS,
    OPERATIONS,
    WAYS,
    Problem,
    Shape,
    cqc_calls,
    map_calls,
)
from mrcn_fast.benchmark.timing import Case, check_measurable
from mrcn_fast.flags import DEVICE, Flags, number, one_of

SUITES: Final = ("table", "stages", "sweep")

SHAPES: Final = ((16, 256, 72, 32), (16, 64, 72, 32), (8, 512, 36, 16))
GPU_SHAPES: Final = ((16, 64, 72, 32), (16, 256, 72, 32), (64, 256, 72, 32))
# C, H, W after stages 0 to 4 of ResNet-50 at 288 x 128 pixels, layer4 with stride 1.
STAGES: Final = ((64, 72, 32), (256, 72, 32), (512, 36, 16), (1024, 18, 8), (2048, 18, 8))
BATCHES: Final = (16, 32)  # samples of a modality: 4 x 4, and 8 x 4
SWEEP: Final[tuple[Shape, ...]] = (
    *((n, 256, 72, 32) for n in (1, 4, 16, 64, 256, 448)),
    *((16, c, 72, 32) for c in (8, 32, 64, 1024)),
    *((16, 64, h, w) for h, w in ((9, 4), (18, 8), (36, 16), (144, 64), (288, 128))),
    (1, 256, 288, 128),
)


def cases(suite: str = "table", device: str = "cpu", dtypes: Sequence[str] = tuple(DTYPES)) -> list[Case]:
    """Return the cases of a suite.

    Args:
        suite: a name from SUITES
        device: where they run; a GPU has its own cases
        dtypes: names from DTYPES; cases of other dtypes are left out
    """
    on_cpu = torch.device(device).type == "cpu"
    make_problems = {
        "table": _table_problems if on_cpu else _gpu_table_problems,
        "stages": _stage_problems,
        "sweep": _sweep_problems,
    }[suite]
    found = [_map_case(problem, suite) for problem in make_problems(device) if problem.dtype in dtypes]
    return found + [case for case in _cqc_cases(suite, device) if _dtype_name(case) in dtypes]


def _dtype_name(case: Case) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == case.dtype)


def _table_problems(device: str) -> Iterator[Problem]:
    for layout, shape, way in itertools.product(LAYOUTS, SHAPES, ("forward", "forward+backward")):
        yield Problem("block", way, shape, layout, device=device)
    for layout, way in itertools.product(LAYOUTS, ("forward", "forward+backward")):
        yield Problem("block", way, SHAPES[0], layout, "bf16", device)
    for layout in LAYOUTS:
        yield Problem("concat", "forward+backward", SHAPES[0], layout, device=device)
    for operation, layout in itertools.product(("restitution", "snr"), LAYOUTS):
        yield Problem(operation, "forward", SHAPES[0], layout, device=device)


def _gpu_table_problems(device: str) -> Iterator[Problem]:
    ways = ("forward", "forward+backward")
    for dtype, layout, shape, way in itertools.product(DTYPES, LAYOUTS, GPU_SHAPES, ways):
        yield Problem("block", way, shape, layout, dtype, device)
    for dtype, way in itertools.product(DTYPES, ways):
        yield Problem("block", way, GPU_SHAPES[0], "channels_last", dtype, device, hot=True)


def _stage_problems(device: str) -> Iterator[Problem]:
    done = [("block", way) for way in WAYS]
    done += [("concat", WAYS[2]), ("restitution", WAYS[0]), ("snr", WAYS[2])]
    for (operation, way), batch, stage, dtype, layout in itertools.product(
        done, BATCHES, STAGES, DTYPES, LAYOUTS
    ):
        yield Problem(operation, way, (batch, *stage), layout, dtype, device)


def _sweep_problems(device: str) -> Iterator[Problem]:
    for way, shape in itertools.product(("forward", "forward+backward"), SWEEP):
        yield Problem("block", way, shape, device=device)


def _map_case(problem: Problem, suite: str) -> Case:
    with_baselines = suite != "sweep" or problem.volume_bytes <= problems.LARGEST_WITH_BASELINES
    return Case(
        problem.name,
        partial(map_calls, problem, with_baselines),
        goals(problem),
        problem.device,
        DTYPES[problem.dtype],
        hot=problem.hot,
        facts=problem.facts,
    )


def _cqc_cases(suite: str, device: str) -> Iterator[Case]:
    on_cpu = torch.device(device).type == "cpu"
    batches = {"table": ((4, 4),) if on_cpu else ((4, 4), (16, 8)), "stages": ((4, 4), (8, 4)), "sweep": ()}
    goals = {"vectorized": 5.0, "loop": 15.0} if on_cpu else {"vectorized": 4.0, "loop": 10.0}
    unit_goals = goals | {"unfused": 3.0}
    dtypes = ("fp32",) if on_cpu and suite == "table" else tuple(DTYPES)
    for dtype, normalize, (identities, images) in itertools.product(dtypes, (False, True), batches[suite]):
        name = f"cqc{' normalized' * normalize} forward+backward {identities}x{images}x2048"
        if not on_cpu:
            name = f"gpu {name} {dtype}"
        elif dtype != "fp32":
            name += f" {dtype}"
        make = partial(cqc_calls, identities, images, 2048, device, DTYPES[dtype], normalize)
        facts = {"operation": "cqc normalized" if normalize else "cqc", "way": WAYS[2], "dtype": dtype}
        reached = unit_goals if normalize else goals
        yield Case(name, make, reached, device, DTYPES[dtype], waits=True, facts=facts)


def goals(problem: Problem) -> dict[str, float]:
    """Return the goals of a problem's case: see `Case.goals`."""
    return _cpu_goals(problem) if problem.device == "cpu" else _gpu_goals(problem)


# The bytes of a volume that no CPU's last cache holds.
_BEYOND_CACHE: Final = 32e6


def _cpu_goals(problem: Problem) -> dict[str, float]:
    both = problem.way == "forward+backward"
    memory = {"memory": 1.02} if both and problem.operation == "block" else {}
    beyond_cache = problem.volume_bytes > _BEYOND_CACHE
    if problem.dtype == "bf16":
        return {"floor": 1.3} | memory if problem.operation == "block" else {}
    if problem.operation == "restitution" and problem.way == "forward" and beyond_cache:
        return {"floor": 1.15}
    if problem.operation != "block" or problem.way == "backward":
        return {}
    if problem.shape in SHAPES[1:]:
        return {"compile": 3.0 if both else 4.0 if problem.shape[1] == 512 else 3.5} | memory
    if not beyond_cache:
        return memory
    if problem.volume_bytes > problems.LARGEST_WITH_BASELINES:
        return {"floor": 1.35 if both else 1.1} | memory
    if both:
        return {"floor": 1.35, "compile": 3.5} | memory
    return {"floor": 1.1, "compile": 3.5, "compile collapsed": 2.5}


def _gpu_goals(problem: Problem) -> dict[str, float]:
    if problem.operation != "block" or problem.way == "backward":
        return {}
    if problem.way == "forward":
        return {"host": 40.0} | ({"floor": 1 / 0.8} if problem.volume_bytes >= 32e6 else {})
    if problem.shape[0] != 16:
        # Six volumes at 80 % of the copy's bandwidth, eight at 70 %.
        forward, backward = (OPERATIONS["block"].volumes(way) for way in ("forward", "backward"))
        return {"floor": (forward / 0.8 + backward / 0.7) / (forward + backward)}
    return {"compile": 2.0, "compile collapsed": 1.5, "eager": 6.0}


# --- the command --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The flags of `bench kernels`."""

    suite: str
    device: str
    dtype: Sequence[str] | None
    only: str
    seconds: float
    pages: str
    workers: int
    out: Path | None
    list: bool

    @property
    def dtypes(self) -> Sequence[str]:
        """The names of the dtypes that are measured."""
        return self.dtype or tuple(DTYPES)


def flags() -> Flags:
    """Return the flags of `bench kernels`."""
    found = Flags("bench kernels", "time the kernels beside plain PyTorch and torch.compile")
    found.add(
        "--suite", one_of(SUITES), "table", "which cases: those of the README, of all stages, of all sizes"
    )
    found.add("--device", DEVICE, "cpu", "where to measure; a GPU has its own cases")
    dtypes = one_of(tuple(DTYPES))
    found.add("--dtype", dtypes, None, "only these; all where it is left out", nargs="+", action="extend")
    add_case_flags(found)
    found.add(
        "--pages",
        one_of(tuple(workers.PAGES)),
        "warm",
        "on the CPU: whether the C library keeps freed memory for the next tensors (warm), or gives large "
        "tensors new pages each time (fresh), except the fused outputs, whose memory mrcn_fast keeps",
    )
    found.add(
        "--workers",
        number(int, 1, 1024),
        1,
        "check and compile the cases in this many processes side by side, then time them one by one; all "
        "processes hold their tensors meanwhile; with 1 each case is prepared and timed in turn",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mrcn-fast bench kernels argv...`.

    Returns:
        0; 1 where a goal was missed or a case failed; 2 where nothing could be measured.
    """
    parser = flags()
    options = read_options(Options, parser, argv)
    known = cases(options.suite, options.device, options.dtypes)
    chosen = [case for case in known if options.only in case.name]
    if options.list:
        print_names(chosen)
        return 0
    if not chosen:
        return parser.refuse(
            f"got --only {options.only!r}, which no case's name in the suite {options.suite} contains "
            f"({', '.join(options.dtypes)}); --list lists them"
        )
    check_measurable(options.device)
    return _measure(chosen, options)


def _measure(chosen: Sequence[Case], options: Options) -> int:
    """Measure the cases and print a line for each; return the exit status."""
    where = results.machine(options.device)
    if torch.device(options.device).type == "cpu":
        # Without glibc, the allocator alone decides.
        where["pages"] = options.pages if workers.PAGES[options.pages]() else "unknown"
    print(f"{results.described(where)}, {where['kernels']}")
    print("median of interleaved rounds; ratios are the baseline's time over the fused time\n")
    all_well = True
    for result in workers.measured(chosen, options.seconds, options.pages, options.workers):
        if isinstance(result, str):
            print(result, file=sys.stderr, flush=True)
            all_well = False
            continue
        results.print_row(result)
        all_well = all_well and not result["missed"]
        if options.out:
            results.write(options.out, where | result)
    return 0 if all_well else 1
