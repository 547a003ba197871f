"""Measure cases: check and compile each one, then time it; several are prepared side by side where asked for.

Most of a GPU's benchmark is Inductor compiling the baselines on the processor, autotuning above all. With
several processes, each one prepares its share of the cases and keeps them. When all have finished and the
machine is quiet, the cases are timed in their order, each in the process that prepared it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final

import torch

from mrcn_fast.benchmark.results import Line, row
from mrcn_fast.benchmark.timing import (
    EXACT,
    TOLERANCES,
    Calls,
    Case,
    check,
    growth,
    keep_pages_fresh,
    keep_pages_warm,
    measure,
    measure_gpu,
    peak_bytes,
    saved_bytes,
)
from mrcn_fast.streams import announced

Shares = list[list[int]]

# How the C library treats the pages of freed memory on the CPU.
PAGES: Final = {"warm": keep_pages_warm, "fresh": keep_pages_fresh}


def measured(cases: Sequence[Case], seconds: float, pages: str, workers: int = 1) -> Iterator[Line | str]:
    """Measure cases and yield their results in order.

    Args:
        cases: what is measured
        seconds: measuring time per case
        pages: a name from PAGES
        workers: how many processes prepare cases side by side; 1 prepares and times each in turn, here

    Yields:
        The result line of each case; for a case that failed, a message.
    """
    if workers == 1:
        return (tried(measured_case, case, seconds, pages) for case in cases)
    return _measured_side_by_side(cases, seconds, pages, workers)


# --- one case -----------------------------------------------------------------------------------------


def measured_case(case: Case, seconds: float, pages: str = "warm") -> Line:
    """Return the result line of a case, after its fused results were checked."""
    torch.compiler.reset()
    return timed(case, *prepared(case), seconds, pages)


def prepared(case: Case) -> tuple[Calls, dict[str, str]]:
    """Check and compile the calls of a case.

    Returns:
        The calls that are timed, and the error of each baseline that doesn't compile.

    Raises:
        RuntimeError: a fused result is wrong.
    """
    calls = case.calls()
    compiled = [name for name in calls if name.startswith("compile")]
    with announced(f"{case.name}: checking{', and compiling ' * bool(compiled)}{', '.join(compiled)}"):
        check(calls, TOLERANCES[case.dtype])
        calls.pop(EXACT, None)
        refused = uncompilable(calls)
    return {name: call for name, call in calls.items() if name not in refused}, refused


def timed(case: Case, calls: Calls, refused: dict[str, str], seconds: float, pages: str = "warm") -> Line:
    """Return the result line of a case that was prepared."""
    forms = {name: call for name, call in calls.items() if name != "floor"}
    both = case.facts.get("way") == "forward+backward"
    saved = {name: saved_bytes(call) for name, call in forms.items()} if both else {}
    if case.device == "cpu":
        PAGES[pages]()
        timings = measure(calls, seconds)
        peaks = {name: peak_bytes(call) for name, call in forms.items()}
        known = {name: peak for name, peak in peaks.items() if peak is not None}
        grown = growth(forms["fused"])
        return row(case, timings, peaks=known, saved=saved, refused=refused, grown=grown)
    with torch.cuda.device(case.device):
        timings, costs = measure_gpu(calls, seconds, case.waits, case.hot)
    return row(case, timings, costs, saved=saved, refused=refused)


def uncompilable(calls: Calls) -> dict[str, str]:
    """Return the error of each baseline that this torch's compiler fails on, by the baseline's name."""
    from torch._dynamo.exc import BackendCompilerFailed  # takes two seconds

    refused = {}
    for name in (name for name in calls if name.startswith("compile")):
        try:
            calls[name]()
        except BackendCompilerFailed as error:
            refused[name] = repr(error.inner_exception)
    return refused


def tried(function: Callable[..., Any], case: Case, *arguments: Any) -> Any:
    """Return the function's result for a case, or a message where it failed."""
    try:
        result = function(case, *arguments)
        if torch.device(case.device).type == "cuda":
            torch.cuda.empty_cache()  # the allocator would keep memory that other processes need
        return result
    except Exception as error:
        traceback.print_exc()
        return f"{case.name}: {type(error).__name__}: {error}"


# --- several processes --------------------------------------------------------------------------------


def _measured_side_by_side(
    cases: Sequence[Case], seconds: float, pages: str, workers: int
) -> Iterator[Line | str]:
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    owners: dict[int, tuple[Connection, int]] = {}  # of each case: its process, and its number there
    processes = []
    try:
        for share in shared_out(cases, workers):
            here, there = context.Pipe()
            work = ([cases[k] for k in share], seconds, pages, there)
            processes.append(context.Process(target=_serve, args=work, daemon=True))
            processes[-1].start()
            there.close()  # so that the end of the process is noticed
            connections.append(here)
            owners |= {k: (here, number) for number, k in enumerate(share)}
        for connection in connections:
            with contextlib.suppress(EOFError):  # the process has ended, which `_asked` reports
                connection.recv()
        for k, case in enumerate(cases):
            yield _asked(*owners[k], case)
    finally:
        for connection in connections:
            connection.close()  # a process that waits for work ends
        for process in processes:
            process.join(5)
            process.terminate()


def shared_out(cases: Sequence[Case], workers: int) -> Shares:
    """Return the cases of each process, such that all have about as much to compile.

    A case with a backward counts as two.
    """
    shares: Shares = [[] for _ in range(max(1, min(workers, len(cases))))]
    loads = [0] * len(shares)
    for k in sorted(range(len(cases)), key=lambda k: -_cost(cases[k])):
        least = loads.index(min(loads))
        shares[least].append(k)
        loads[least] += _cost(cases[k])
    return shares


def _cost(case: Case) -> int:
    return 2 if "backward" in case.name else 1


def _asked(connection: Connection, number: int, case: Case) -> Line | str:
    """Ask a process for the result of one of its cases."""
    try:
        connection.send(number)
        answer: Line | str = connection.recv()
    except (EOFError, OSError):
        return f"{case.name}: the process that prepared it has ended"
    return answer


def _serve(cases: Sequence[Case], seconds: float, pages: str, connection: Connection) -> None:
    """Prepare the cases, report that it is done, and then time the cases whose numbers arrive."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # there are processes enough
    # All cases compile the same functions with other contents, and each one counts as a recompilation.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    ready = [tried(prepared, case) for case in cases]
    connection.send("ready")
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        case, calls = cases[number], ready[number]
        if isinstance(calls, str):
            connection.send(calls)
        else:
            connection.send(tried(timed, case, *calls, seconds, pages))
            ready[number] = f"{case.name}: timed before"  # frees its tensors for the next case
