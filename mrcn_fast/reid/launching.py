"""The start of a run's processes: by a launcher that the user chose, or else by this library.

torchrun and SLURM's srun start every process of a run, and say so in environment variables. Without them a
process that wants several devices starts its own command again, once for each device, by the launcher behind
torchrun. It then waits for these processes and ends with their exit status.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any, Final, NamedTuple, NoReturn
from uuid import uuid4

from mrcn_fast.reid.training.config import ConfigError

log = logging.getLogger(__name__)

# Jobs with these names are interactive shells on a node, which start one process. Fabric treats them alike.
SHELLS: Final = ("bash", "interactive")
# What the processes of several machines need to find each other.
_MEETING_POINT: Final = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


class Launch(NamedTuple):
    """The processes that a launcher started: `devices` on each of `nodes` machines."""

    launcher: str
    devices: int
    nodes: int


def found_launch() -> Launch | None:
    """The launch by torchrun or SLURM that this process belongs to; none where it started alone.

    Raises ConfigError where the number of processes can't be divided among the machines.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _launch("torchrun", _number("WORLD_SIZE"), nodes=_number("GROUP_WORLD_SIZE"))
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in SHELLS:
        return _slurm_launch()
    return None


def _slurm_launch() -> Launch | None:
    processes = _number("SLURM_NTASKS")
    for name, advice in (
        ("SLURM_STEP_NUM_TASKS", "start the command by srun"),  # sbatch starts one process for all tasks
        ("SLURM_NTASKS_PER_NODE", "give srun --ntasks-per-node"),
    ):
        if processes > 1 and name not in os.environ:
            raise ConfigError(
                f"got SLURM_NTASKS={processes}, but no {name} in the environment, expected processes that "
                f"srun started, as many on each machine: {advice}"
            )
    return _launch("SLURM", processes, nodes=_number("SLURM_NNODES"))


def _launch(launcher: str, processes: int, nodes: int) -> Launch | None:
    if processes % nodes:
        raise ConfigError(
            f"got {processes} processes on {nodes} machines from {launcher}, expected as many on each machine"
        )
    return Launch(launcher, processes // nodes, nodes) if processes > 1 else None


def _number(name: str) -> int:
    text = os.environ.get(name, "1").strip()
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"got {name}={text} in the environment, expected a number of at least 1")
    return int(text)


def run_again(devices: int, nodes: int) -> NoReturn:
    """Start the command of this process again, once for each device of this machine, and wait for its end.

    The new processes belong to a `Launch` of torchrun. Where one fails, the others are ended. A signal that
    this process gets is passed on to them.

    With several machines the same command is started on each of them, with the environment variables
    MASTER_ADDR, MASTER_PORT (address and free port of the first machine) and NODE_RANK (0, 1, ...).

    Raises:
        SystemExit: at the end of the processes, with their status where one failed, else 0
        ConfigError: in an interactive session, and where an environment variable is missing
    """
    if hasattr(sys, "ps1"):
        raise ConfigError(
            f"got devices={devices} and nodes={nodes} in an interactive session, expected a script or "
            "mrcn-fast: each device needs a process that runs the same program"
        )
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes, max_nodes=nodes, nproc_per_node=devices, max_restarts=0, **_rendezvous(nodes)
    )
    # The launcher's own log lines repeat what the processes themselves and the lines below say.
    logging.disable(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except ChildFailedError as error:
        logging.disable(logging.NOTSET)
        raise SystemExit(_status(error, devices * nodes)) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    finally:
        logging.disable(logging.NOTSET)
    raise SystemExit(0)


def _rendezvous(nodes: int) -> dict[str, Any]:
    if nodes == 1:
        return {
            "run_id": uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "127.0.0.1:0",
            "local_addr": "127.0.0.1",
        }
    if missing := [name for name in _MEETING_POINT if not os.environ.get(name)]:
        raise ConfigError(
            f"got nodes={nodes}, but no {', '.join(missing)} in the environment; expected MASTER_ADDR and "
            "MASTER_PORT, address and free port of the first machine, and NODE_RANK, 0 to "
            f"{nodes - 1}, this machine's number. Set them on each machine, or start the command by torchrun "
            "or srun"
        )
    return {
        "run_id": "mrcn-fast",
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        "rdzv_configs": {"rank": int(os.environ["NODE_RANK"])},
    }


def _status(error: Any, processes: int) -> int:
    """The exit status of the failed processes; a line is logged where a signal ended the first of them."""
    rank, failure = error.get_first_failure()
    status = int(failure.exitcode)
    if status >= 0:
        # A process that ends because of another one has status 1.
        return max(int(other.exitcode) for other in error.failures.values())
    name = signal.Signals(-status).name
    hint = "; the system sends it where memory is short" if -status == signal.SIGKILL else ""
    log.error(
        "Process %d of %d (pid %d) was ended by %s%s. The others were ended, too",
        *(rank, processes, failure.pid, name, hint),
    )
    return 128 - status
