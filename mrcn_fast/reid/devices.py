"""The device of the process, its precision, and the backend that serves a network's blocks there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import ACCELERATOR_REGISTRY

from mrcn_fast.dispatch import choose
from mrcn_fast.reid.kinds import Precision
from mrcn_fast.reid.training.config import ConfigError, TrainConfig

# Environment variables in which launchers write the number of processes that they start.
_LAUNCHERS: Final = {
    "WORLD_SIZE": "torchrun",
    "SLURM_NTASKS": "SLURM",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "JSM_NAMESPACE_SIZE": "jsrun",
}
# Jobs of these names are interactive shells on a node; fabric treats them in the same way.
_SHELLS: Final = ("bash", "interactive")
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


def check_device(accelerator: str, precision: Precision | None) -> None:
    """Raise ConfigError for a device that `open_fabric` can't open.

    This is an accelerator that this machine doesn't have, a precision that the accelerator doesn't have, or a
    process that `check_alone` refuses.
    """
    check_alone()
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
        by_hand = launcher == "SLURM" and os.environ.get("SLURM_JOB_NAME") in _SHELLS
        if count not in ("", "1") and not by_hand:
            raise ConfigError(
                f"got {name}={count} in the environment, expected 1: {launcher} started several processes, "
                "and each would do the same work and write the same files. mrcn-fast runs as one process on "
                f"one device: have {launcher} start one, or start it without"
            )
    if given := [name for name in _FABRIC_SETTINGS if name in os.environ]:
        raise ConfigError(
            f"got {', '.join(given)} in the environment, expected none: `fabric run` sets them, and they "
            "would replace the configuration's device and precision. Start mrcn-fast without `fabric run`, "
            "or unset them"
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
