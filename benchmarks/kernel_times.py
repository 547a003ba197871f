"""The GPU's time of every kernel of a call, with a cold cache, beside the time of a copy.

    python benchmarks/kernel_times.py --only "forward 16x256x72x32 channels_last bf16" [--form "fused cuda"]

The cases are those of `mrcn-fast bench kernels --device cuda`, and their results are checked first. The times
are medians over calls that use the case's sets of tensors in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mrcn_fast.benchmark import timing
from mrcn_fast.benchmark.suites.kernels import SUITES, cases


class Kernel(NamedTuple):
    """A kernel that the GPU ran."""

    name: str
    start: float  # microseconds
    time: float


def kernels(run: Callable[[], Any], calls: int) -> list[Kernel]:
    """Return the kernels that the GPU runs for this many calls, in order."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    on_gpu = (e for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA)
    found = [Kernel(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in on_gpu]
    return sorted(found, key=lambda kernel: kernel.start)


def medians(found: Sequence[Kernel], calls: int) -> list[tuple[str, float]]:
    """Return the time of each kernel of a call.

    It is the median by the kernel's place in the call; where the calls differ, the mean by its name.
    """
    size, rest = divmod(len(found), calls)
    places = [found[k::size] for k in range(size)] if size and not rest else []
    if places and all(len({kernel.name for kernel in place}) == 1 for place in places):
        return [(place[0].name, statistics.median(kernel.time for kernel in place)) for place in places]
    names = dict.fromkeys(kernel.name for kernel in found)
    return [(name, sum(kernel.time for kernel in found if kernel.name == name) / calls) for name in names]


def lines(name: str, times: Sequence[tuple[str, float]], floor: float | None) -> list[str]:
    """Return the times as lines of text, in microseconds."""
    total = sum(time for _, time in times)
    head = f"{name}: {total:.1f} us" + (f", {total / floor:.2f} floors of {floor:.1f} us" if floor else "")
    return [head, *(f"  {time:8.1f}  {kernel[:100]}" for kernel, time in times)]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--suite", default="table", choices=SUITES)
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    options.add_argument(
        "--form",
        default="fused",
        help='which form (default: fused; "fused cuda", "eager")',
    )
    options.add_argument("--calls", type=int, default=30)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if reason := timing.unmeasurable("cuda"):
        print(f"kernel_times: {reason}", file=sys.stderr)
        return 2
    chosen = [case for case in cases(options.suite, "cuda") if options.only in case.name]
    if not chosen:
        print(f"--only: got {options.only!r}, which no case's name contains", file=sys.stderr)
        return 2
    for case in chosen:
        calls = case.calls()
        if options.form not in calls:
            print(f"{case.name}: --form: got {options.form!r}, expected one of {', '.join(calls)}")
            continue
        timing.check(calls, timing.TOLERANCES[case.dtype])
        times = medians(kernels(calls[options.form], options.calls), options.calls)
        floor = None
        if "floor" in calls:
            floor = sum(time for _, time in medians(kernels(calls["floor"], options.calls), options.calls))
        print("\n".join(lines(case.name, times, floor)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
