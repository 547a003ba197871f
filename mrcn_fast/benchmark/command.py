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
from mrcn_fast.benchmark import cases, results
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

PAGES: Final = {"warm": keep_pages_warm, "fresh": keep_pages_fresh}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="mrcn-fast bench",
        description="time the kernels against their rivals",
        epilog="`mrcn-fast bench --step` times whole training steps, `--scorer` the retrieval scores, "
        "`--loader DATA` the images; each has --help of its own.",
    )
    options.add_argument(
        "--suite", default="table", choices=cases.SUITES, help="table (default), stages or sweep"
    )
    options.add_argument(
        "--device",
        type=device_name,
        default="cpu",
        metavar="DEVICE",
        help="cpu (default), or cuda, with cases of its own",
    )
    options.add_argument(
        "--dtype",
        action="append",
        choices=cases.DTYPES,
        help="only this dtype; may be given again (default: all)",
    )
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    options.add_argument("--seconds", type=float, default=8.0, help="measuring time of a case (default 8)")
    options.add_argument(
        "--pages",
        choices=PAGES,
        default="warm",
        help="the C library keeps all memory for the next tensors (warm, default), or large ones get new "
        "pages each time (fresh), but for the fused outputs, whose memory mrcn_fast keeps",
    )
    options.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="check and compile the cases in N processes side by side, then time them one by one; their "
        "tensors stay that long (default 1: each is prepared and timed in turn)",
    )
    options.add_argument("--out", type=Path, metavar="FILE", help="append the results to FILE as JSON lines")
    options.add_argument("--list", action="store_true", help="print the cases' names and stop")
    group = options.add_argument_group("of files of results; nothing is measured")
    files = group.add_mutually_exclusive_group()
    files.add_argument("--table", type=Path, metavar="FILE", help="print the newest results as Markdown")
    files.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="say which cases moved from A to B"
    )
    files.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="draw them: PNG charts, and a page of HTML"
    )
    group.add_argument(
        "--to", type=Path, default=Path("runs/bench"), metavar="DIR", help="the report's folder (runs/bench)"
    )
    return options


def device_name(text: str) -> str:
    """The value of a `--device` flag. Raises argparse's error for another than cpu, cuda or cuda:N."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected cpu, cuda or cuda:N")
    return "cpu" if device.type == "cpu" else text


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a goal was missed or a case failed; 2 where nothing could be measured or read."""
    options = parser().parse_args(argv)
    try:
        if options.table or options.compare or options.report:
            return _show(options)
    except (ValueError, ImportError) as error:
        print(f"mrcn-fast bench: {error}", file=sys.stderr)
        return 2
    dtypes = options.dtype or tuple(cases.DTYPES)
    known = cases.cases(options.suite, options.device, dtypes)
    chosen = [case for case in known if options.only in case.name]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        print(
            f"--only: got {options.only!r}, which no case's name in the suite {options.suite} contains "
            f"({', '.join(dtypes)}); see --list",
            file=sys.stderr,
        )
        return 2
    if options.workers < 1:
        print(f"--workers: got {options.workers}, expected at least 1", file=sys.stderr)
        return 2
    if reason := unmeasurable(options.device):
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 2
    if options.out:
        try:  # to add to the file, before anything is measured for it
            results.write(options.out)
        except OSError as error:
            print(f"--out: {error}", file=sys.stderr)
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
    from mrcn_fast.benchmark import side_by_side  # which imports this module

    return side_by_side.measured(chosen, options.seconds, options.pages, options.workers)


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
