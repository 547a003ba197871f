"""Functions in several processes, which find each other as those of torchrun or SLURM do."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_CONTEXT = multiprocessing.get_context("forkserver")
# The server imports it once, and not each process.
_CONTEXT.set_forkserver_preload(["mrcn_fast.reid.training.trainer"])


class Outcome(NamedTuple):
    """What a function returned in a process, or the last lines of its exception and the exit status."""

    value: Any
    error: str
    status: int | None


def in_processes(
    count: int, function: Callable[..., Any], *arguments: Any, launcher: str = "torchrun"
) -> list[Outcome]:
    """Call `function(rank, *arguments)` in processes of their own, and wait for their end.

    `launcher` is "torchrun" or "srun": the processes have environment variables as that sets them. A process
    that takes longer than four minutes is killed, and its status is None.
    """
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name, str(rank)) for rank in range(count)]
        make = _ENVIRONMENTS[launcher]
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
        processes = [
            _CONTEXT.Process(
                target=_call,
                args=(make(str(rank), str(count)) | here, rank, str(path), function, arguments),
            )
            for rank, path in enumerate(paths)
        ]
        for process in processes:
            process.start()
        outcomes = []
        for process, path in zip(processes, paths, strict=True):
            process.join(240)
            status = process.exitcode
            process.kill()
            value, error = pickle.loads(path.read_bytes()) if path.exists() else (None, "")
            outcomes.append(Outcome(value, error, status))
        return outcomes


def _by_torchrun(rank: str, count: str) -> dict[str, str]:
    return {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def _by_srun(rank: str, count: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_NNODES": "1",
        "SLURM_NTASKS": count, "SLURM_NTASKS_PER_NODE": count, "SLURM_STEP_NUM_TASKS": count,
    }  # fmt: skip


_ENVIRONMENTS = {"torchrun": _by_torchrun, "srun": _by_srun}


def _call(
    environment: dict[str, str],
    rank: int,
    path: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= environment
    value, error, status = None, "", 0
    try:
        value = function(rank, *arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        error, status = traceback.format_exc(), 1
    Path(path).write_bytes(pickle.dumps((value, error)))
    raise SystemExit(status)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port
