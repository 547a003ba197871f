"""`mrcn-fast bench`: measure a suite's cases, a line for each; tables, comparisons and reports of files."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from mrcn_fast import backends, dispatch
from mrcn_fast.benchmark import results
from mrcn_fast.benchmark.suites import kernels
from mrcn_fast.benchmark.timing import (
    EXACT,
    TOLERANCES,
    Case,
    Rivals,
    check,
    growth,
    keep_pages_fresh,
    keep_pages_warm,
    measure,
    measure_gpu,
    peak_bytes,
    saved_bytes,
)
from mrcn_fast.flags import DEVICE, PATH, TEXT, Flags, number, one_of
from mrcn_fast.outputs import check_file, check_folder

PAGES: Final = {"warm": keep_pages_warm, "fresh": keep_pages_fresh}


# A day is more than anybody measures a case for.
SECONDS: Final = number(float, 0, 86_400)


def flags() -> Flags:
    options = Flags(
        "bench",
        "time the kernels beside plain PyTorch and torch.compile",
        "`mrcn-fast bench --step` times whole training steps, `--scorer` the retrieval scores, "
        "`--loader DATA` the images; each has --help of its own.",
    )
    options.add("--suite", one_of(tuple(kernels.SUITES)), "table")
    options.add("--device", DEVICE, "cpu", "cuda has cases of its own")
    dtypes = one_of(tuple(kernels.DTYPES))
    options.add("--dtype", dtypes, None, "only these; all where left out", nargs="+", action="extend")
    options.add("--only", TEXT, "", "cases whose name contains this")
    options.add("--seconds", SECONDS, 8.0, "measuring time of a case")
    options.add(
        "--pages",
        one_of(tuple(PAGES)),
        "warm",
        "the C library keeps all memory for the next tensors (warm), or large ones get new pages each time "
        "(fresh), but for the fused outputs, whose memory mrcn_fast keeps",
    )
    options.add(
        "--workers",
        number(int, 1, 1024),
        1,
        "check and compile the cases in so many processes side by side, then time them one by one; their "
        "tensors stay that long; 1 prepares and times each in turn",
    )
    options.add("--out", PATH, None, "append the results to this file as JSON lines")
    options.add_switch("--list", "print the cases' names and stop")
    options.add("--table", PATH, None, "measure nothing; print a file's newest results as Markdown")
    options.add("--compare", PATH, None, "measure nothing; say which cases moved between two files", nargs=2)
    options.add(
        "--report", PATH, None, "measure nothing; draw files' results, as PNG and a page of HTML", nargs="+"
    )
    options.add("--to", PATH, Path("runs/bench"), "the report's folder")
    return options


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a goal was missed or a case failed; 2 where nothing could be measured or read."""
    parser = flags()
    options = argparse.Namespace(**parser.values(argv))
    shown = [flag for flag in ("--table", "--compare", "--report") if getattr(options, flag[2:])]
    if len(shown) > 1:
        return parser.refuse(f"got {' and '.join(shown)}, expected one of them")
    try:
        if options.report:
            check_folder(options.to, "the report")
        if options.out:  # to add to the file, before anything is measured for it
            check_file(options.out, "the results")
        if shown:
            return _show(options)
    except (ValueError, ImportError, OSError) as error:
        return parser.refuse(str(error))
    dtypes = options.dtype or tuple(kernels.DTYPES)
    known = kernels.cases(options.suite, options.device, dtypes)
    chosen = [case for case in known if options.only in case.name]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        return parser.refuse(
            f"got --only {options.only!r}, which no case's name in the suite {options.suite} contains "
            f"({', '.join(dtypes)}); --list lists them"
        )
    if reason := unmeasurable(options.device):
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 2
    return _measure(chosen, options)


def _show(options: argparse.Namespace) -> int:
    if options.table:
        results.print_table(options.table)
    elif options.compare:
        print("\n".join(results.compare(*options.compare)))
    else:
        # matplotlib is not needed to measure.
        from mrcn_fast.benchmark.report import write_report

        for path in write_report(options.report, options.to):
            print(path)
    return 0


def _measure(chosen: Sequence[Case], options: argparse.Namespace) -> int:
    where = results.machine(options.device)
    if torch.device(options.device).type == "cpu":
        # Elsewhere than on glibc the allocator decides.
        where["pages"] = options.pages if PAGES[options.pages]() else "unknown"
    print(f"{results.described(where)}, {where['kernels']}")
    print("median of interleaved rounds; ratios are the rival's time over the fused one's\n")
    all_well = True
    for result in _results(chosen, options):
        if isinstance(result, str):
            print(result, file=sys.stderr, flush=True)
            all_well = False
            continue
        results.print_row(result)
        all_well = all_well and not result["missed"]
        if options.out:
            results.write(options.out, where | result)
    return 0 if all_well else 1


def _results(chosen: Sequence[Case], options: argparse.Namespace) -> Iterator[results.Line | str]:
    """Of each case, or in words why there is none."""
    if options.workers == 1:
        return (tried(measured, case, options.seconds, options.pages) for case in chosen)
    from mrcn_fast.benchmark import workers  # which imports this module

    return workers.measured(chosen, options.seconds, options.pages, options.workers)


def tried(function: Callable[..., Any], case: Case, *arguments: Any) -> Any:
    """What the function gives, or in words why it failed."""
    try:
        result = function(case, *arguments)
        if torch.device(case.device).type == "cuda":
            torch.cuda.empty_cache()  # what the allocator keeps is the other processes' too
        return result
    except Exception as error:
        traceback.print_exc()
        return f"{case.name}: {type(error).__name__}: {error}"


def unmeasurable(device: str) -> str | None:
    """Why nothing can be measured on ``device``; None where something can."""
    wanted = os.environ.get(dispatch.ENVIRONMENT_VARIABLE) or "auto"
    serving = "cpu" if torch.device(device).type == "cpu" else "triton"
    if wanted not in ("auto", serving):
        return (
            f"{dispatch.ENVIRONMENT_VARIABLE} is {wanted!r}, so that what is timed as the fused form would "
            f"not be {serving!r}; unset it"
        )
    if torch.device(device).type == "cpu":
        status = backends()["cpu"]
    elif not torch.cuda.is_available():
        return (
            f"--device {device}: there is no GPU here that torch can use (torch.cuda.is_available() is False)"
        )
    elif (torch.device(device).index or 0) >= torch.cuda.device_count():
        return f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here, counted from 0"
    else:
        status = backends()["triton"]
    return None if status.usable else status.reason


def measured(case: Case, seconds: float, pages: str = "warm") -> results.Line:
    """The result of a case, its fused form checked first."""
    torch._dynamo.reset()
    return timed(case, *prepared(case), seconds, pages)


def prepared(case: Case) -> tuple[Rivals, dict[str, str]]:
    """What is timed of a case, checked and compiled, and which rivals don't compile."""
    rivals = case.rivals()
    check(rivals, TOLERANCES[case.dtype])
    rivals.pop(EXACT, None)
    refused = uncompilable(rivals)
    return {name: rival for name, rival in rivals.items() if name not in refused}, refused


def timed(
    case: Case, rivals: Rivals, refused: dict[str, str], seconds: float, pages: str = "warm"
) -> results.Line:
    """The result of a case that is prepared."""
    forms = {name: call for name, call in rivals.items() if name != "floor"}
    both = case.facts.get("way") == "forward+backward"
    saved = {name: saved_bytes(call) for name, call in forms.items()} if both else {}
    if case.device == "cpu":
        PAGES[pages]()
        timings = measure(rivals, seconds)
        peaks = {name: peak_bytes(call) for name, call in forms.items()}
        known = {name: peak for name, peak in peaks.items() if peak is not None}
        grown = growth(forms["fused"])
        return results.row(case, timings, peaks=known, saved=saved, refused=refused, grown=grown)
    with torch.cuda.device(case.device):
        timings, costs = measure_gpu(rivals, seconds, case.waits, case.hot)
    return results.row(case, timings, costs, saved=saved, refused=refused)


def uncompilable(rivals: Rivals) -> dict[str, str]:
    """The compiled rivals that this torch's compiler fails on, each with its error."""
    from torch._dynamo.exc import BackendCompilerFailed  # takes two seconds

    refused = {}
    for name in (name for name in rivals if name.startswith("compile")):
        try:
            rivals[name]()
        except BackendCompilerFailed as error:
            refused[name] = repr(error.inner_exception)
    return refused
