"""Cases prepared in several processes at once, then timed one after the other.

Most of a GPU's benchmark is Inductor compiling the rivals on the processor, autotuning above all. Here every
process prepares its share of the cases and keeps them; when all have done so and the machine is quiet, the
cases are timed in their order, each where it was prepared.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import torch

from mrcn_fast.benchmark import command
from mrcn_fast.benchmark.results import Line
from mrcn_fast.benchmark.timing import Case

Shares = list[list[int]]


def measured(cases: Sequence[Case], seconds: float, pages: str, workers: int) -> Iterator[Line | str]:
    """The result of every case in their order; for one that failed, what happened."""
    shares = dealt(cases, workers)
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    owners: dict[int, tuple[Connection, int]] = {}  # of each case, and its number there
    processes = []
    try:
        for share in shares:
            here, there = context.Pipe()
            work = ([cases[k] for k in share], seconds, pages, there)
            processes.append(context.Process(target=_serve, args=work, daemon=True))
            processes[-1].start()
            there.close()  # so that a process that ends is noticed
            connections.append(here)
            owners |= {k: (here, number) for number, k in enumerate(share)}
        for connection in connections:
            with contextlib.suppress(EOFError):  # it has ended: whoever asks it will be told
                connection.recv()
        for k, case in enumerate(cases):
            yield _asked(*owners[k], case)
    finally:
        for connection in connections:
            connection.close()  # a process that waits for work ends
        for process in processes:
            process.join(5)
            process.terminate()


def dealt(cases: Sequence[Case], workers: int) -> Shares:
    """Which cases each process prepares: about as much to compile for each, where a backward is like two."""
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
    try:
        connection.send(number)
        answer: Line | str = connection.recv()
    except (EOFError, OSError):
        return f"{case.name}: the process that prepared it has ended"
    return answer


def _serve(cases: Sequence[Case], seconds: float, pages: str, connection: Connection) -> None:
    """Prepare the cases, say so, and then time those that are asked for."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # there are processes enough
    # Every case compiles the same functions, with others inside: each counts as a recompilation.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    prepared = [command.tried(command.prepared, case) for case in cases]
    connection.send("ready")
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        case, rivals = cases[number], prepared[number]
        if isinstance(rivals, str):
            connection.send(rivals)
        else:
            connection.send(command.tried(command.timed, case, *rivals, seconds, pages))
            prepared[number] = f"{case.name}: timed before"  # its tensors are free for the next
