"""The devices of a run, its precision, and the backend that serves a network's blocks there."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Final

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import ACCELERATOR_REGISTRY
from lightning_fabric.strategies.ddp import DDPStrategy

from mrcn_fast.dispatch import choose
from mrcn_fast.reid import processes
from mrcn_fast.reid.console import console
from mrcn_fast.reid.kinds import Precision
from mrcn_fast.reid.launching import SHELLS, Launch, found_launch, run_again
from mrcn_fast.reid.training.config import ConfigError, TrainConfig

# Environment variables in which launchers write the number of processes that they start.
_LAUNCHERS: Final = {
    "WORLD_SIZE": "torchrun",
    "SLURM_NTASKS": "SLURM",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "JSM_NAMESPACE_SIZE": "jsrun",
}
# `fabric run` sets these variables, which fabric prefers to its arguments.
_FABRIC_SETTINGS: Final = ("LT_ACCELERATOR", "LT_DEVICES", "LT_NUM_NODES", "LT_PRECISION", "LT_STRATEGY")
# The dtypes of convolutions.
_DTYPES: Final[dict[Precision, torch.dtype]] = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


def open_fabric(accelerator: str, precision: Precision | None, callbacks: Sequence[object] = ()) -> Fabric:
    """Open one device with its precision, as a Fabric of lightning-fabric that calls `callbacks`.

    Without a precision it is float32. `fabric.autocast()` is the context in which a network computes in
    `precision`, unless its forward goes through `fabric.setup`. Raises ConfigError as `check_device` does.
    """
    check_device(accelerator, precision)
    return Fabric(
        accelerator=accelerator, devices=1, precision=precision or "32-true", callbacks=list(callbacks)
    )


def open_devices(
    accelerator: str,
    precision: Precision | None,
    devices: int | None,
    nodes: int | None,
    callbacks: Sequence[object] = (),
) -> Fabric:
    """Open several devices, each of which has a process of its own, as a Fabric in each process.

    Where torchrun or SLURM has started the processes, this connects them. Otherwise it starts them: see
    `run_again`, which doesn't return. Without `devices` and `nodes` there are as many as the launcher
    started, or one device, which `open_fabric` opens. Processes other than the first write nothing to the
    console.

    Raises ConfigError where `open_fabric` does, for more GPUs than this machine has, and for other numbers
    than the launcher's.
    """
    launch = found_launch()
    if launch is None and (devices or 1) * (nodes or 1) == 1:
        return open_fabric(accelerator, precision, callbacks)
    _check_fabric_settings()
    _check_accelerator(accelerator, precision)
    if launch is None:
        _check_count(accelerator, devices or 1)
        run_again(devices or 1, nodes or 1)
    _check_launch(launch, devices, nodes)
    _check_count(accelerator, launch.devices)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=accelerator,
        devices=launch.devices,
        num_nodes=launch.nodes,
        strategy=DDPStrategy(),
        precision=precision or "32-true",
        callbacks=list(callbacks),
    )
    fabric.launch()
    processes.connect(fabric)
    if not fabric.is_global_zero:
        console.quiet = True
        logging.getLogger("mrcn_fast").setLevel(logging.ERROR)
    return fabric


def check_device(accelerator: str, precision: Precision | None) -> None:
    """Raise ConfigError for a device that `open_fabric` can't open.

    This is an accelerator that this machine doesn't have, a precision that the accelerator doesn't have, or a
    process that `check_alone` refuses.
    """
    check_alone()
    _check_accelerator(accelerator, precision)


def _check_accelerator(accelerator: str, precision: Precision | None) -> None:
    usable = _usable_accelerators()
    if accelerator not in usable:
        raise ConfigError(
            f"got accelerator={accelerator!r}, expected {' or '.join(usable)}: {_why_not(accelerator)}. "
            f"Pass --accelerator {usable[0]}"
        )
    on_cpu = accelerator == "cpu" or usable == ["auto", "cpu"]
    if precision == "16-mixed" and on_cpu:
        # Fabric would only log a warning, and compute in bf16-mixed.
        raise ConfigError(
            "got precision='16-mixed' on the CPU, where lightning-fabric computes nothing in float16; "
            "expected 32-true or bf16-mixed. Pass --precision bf16-mixed"
        )


def check_alone() -> None:
    """Raise ConfigError where a launcher started several processes, which would all write the same files.

    The environments of torchrun, SLURM, mpirun and jsrun are checked. The settings of `fabric run` are
    refused too, because they would replace the configuration's.
    """
    for name, launcher in _LAUNCHERS.items():
        count = os.environ.get(name, "").strip()
        by_hand = launcher == "SLURM" and os.environ.get("SLURM_JOB_NAME") in SHELLS
        if count not in ("", "1") and not by_hand:
            raise ConfigError(
                f"got {name}={count} in the environment, expected 1: {launcher} started several processes, "
                "and each would do the same work and write the same files. Only train and test run on "
                f"several devices, started by torchrun or srun: have {launcher} start one process, or start "
                "it without"
            )
    _check_fabric_settings()


def _check_fabric_settings() -> None:
    if given := [name for name in _FABRIC_SETTINGS if name in os.environ]:
        raise ConfigError(
            f"got {', '.join(given)} in the environment, expected none: `fabric run` sets them, and they "
            "would replace the configuration's device and precision. Start mrcn-fast without `fabric run`, "
            "or unset them"
        )


def _check_launch(launch: Launch, devices: int | None, nodes: int | None) -> None:
    for name, given, started in (("devices", devices, launch.devices), ("nodes", nodes, launch.nodes)):
        if given not in (None, started):
            raise ConfigError(
                f"got {name}={given}, but {launch.launcher} started {launch.devices} processes on each of "
                f"{launch.nodes} machines: leave out --devices and --nodes, or give these numbers"
            )


def _check_count(accelerator: str, devices: int) -> None:
    """Refuse more devices than this machine has. On a CPU, processes share the cores."""
    fabric = Fabric(accelerator=accelerator, devices=1)
    if fabric.device.type == "cpu":
        return
    there = fabric.accelerator.auto_device_count()
    if devices > there:
        raise ConfigError(
            f"got devices={devices}, expected at most {there}: torch sees so many of type "
            f"{fabric.device.type} on this machine"
        )


def serving_backend(
    config: TrainConfig, backend: str | None, fabric: Fabric, precision: Precision | None
) -> str:
    """Return the backend that serves the blocks of a network on a device, or "" for the baseline.

    Raises BackendError, a RuntimeError, where the requested `backend` can't serve, and ValueError for an
    unknown one.
    """
    if config.model == "baseline":
        return ""
    return choose(backend, fabric.device.type, _DTYPES[precision or "32-true"], config.gate)


def _usable_accelerators() -> list[str]:
    names = ACCELERATOR_REGISTRY.available_accelerators()
    usable = [name for name in names if ACCELERATOR_REGISTRY[name]["accelerator"].is_available()]
    gpu = ["gpu"] if {"cuda", "mps"} & set(usable) else []
    return ["auto", *gpu, *usable]


def _why_not(accelerator: str) -> str:
    if accelerator not in ("gpu", *ACCELERATOR_REGISTRY.available_accelerators()):
        return "there is no accelerator of this name"
    if accelerator == "tpu":
        return "torch_xla sees no TPU here, or isn't installed"
    if accelerator == "mps":
        return "torch sees no GPU of Apple's here"
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "torch sees no CUDA device here (torch.cuda.is_available() is False)"
