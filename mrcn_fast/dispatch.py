"""Which backend serves a call, and why another does not.

Within a backend, torch's dispatcher finds the kernel for a device. This module chooses the backend: the one
that the argument ``backend=`` or the environment variable ``MRCN_FAST_BACKEND`` names, or else the first
whose kernels can serve, or else the plain reference. It also gives the reasons.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch

from mrcn_fast import internals
from mrcn_fast.backends import cpu, cuda, triton
from mrcn_fast.gates import GATES

logger = logging.getLogger("mrcn_fast")

ENVIRONMENT_VARIABLE = "MRCN_FAST_BACKEND"
KERNELS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "cuda": cuda}
NAMES = (*KERNELS, "reference")


class BackendError(RuntimeError):
    """The backend that was asked for can't serve the call. The message says why."""


class BackendStatus(NamedTuple):
    """Whether a backend can be used on this machine, and the reason."""

    usable: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """The known backends, each with whether it is usable here and why (not).

    Example:
        >>> list(backends())
        ['cpu', 'triton', 'cuda', 'reference']
        >>> backends()["reference"].usable
        True
    """
    known = {name: BackendStatus(*module.status()) for name, module in KERNELS.items()}
    return known | {"reference": BackendStatus(True, "plain PyTorch, runs wherever torch does")}


def unserved(name: str, device_type: str, dtype: torch.dtype, gate: str | None = None) -> str | None:
    """Why backend ``name`` can't serve this device, dtype and gate (None: the loss); None where it can."""
    if name == "reference":
        return None
    if gate is not None and GATES[gate].unfused is not None:
        return GATES[gate].unfused
    usable, reason = KERNELS[name].status()
    return KERNELS[name].serves(device_type, dtype) if usable else reason


def _why_not(name: str, device_type: str, dtype: torch.dtype) -> str:
    return unserved(name, device_type, dtype) or "it serves such tensors only where it is asked for"


@internals.assume_constant  # a traced call is decided once, when it is traced
def choose(requested: str | None, device_type: str, dtype: torch.dtype, gate: str | None = None) -> str:
    """The name of the backend that serves a call; ``gate`` is the block's, None for the loss.

    ``requested`` is the caller's choice; without one, ``MRCN_FAST_BACKEND`` decides. With neither, or with
    "auto", the first kernel backend that can serve is chosen, and if there is none, the reference. Each
    reason for the reference is logged once: at WARNING where a kernel backend takes tensors of this device by
    default and could not serve, otherwise at INFO.

    Raises:
        ValueError: the name is unknown.
        BackendError: the backend that was asked for can't serve the call.
    """
    return _choose(requested or os.environ.get(ENVIRONMENT_VARIABLE) or "auto", device_type, dtype, gate)


@functools.cache  # what a process has to run on does not change
def _choose(requested: str, device_type: str, dtype: torch.dtype, gate: str | None) -> str:
    if requested != "auto":
        if requested not in NAMES:
            known = ", ".join(map(repr, (*NAMES, "auto")))
            raise ValueError(f"backend: got {requested!r}, expected one of {known}")
        if reason := unserved(requested, device_type, dtype, gate):
            raise BackendError(
                f"backend {requested!r} can't serve this call: {reason}. "
                "Leave backend and MRCN_FAST_BACKEND unset to fall back by itself."
            )
        return requested
    for name, module in KERNELS.items():
        if device_type in module.DEVICES and unserved(name, device_type, dtype, gate) is None:
            return name
    unfused = None if gate is None else GATES[gate].unfused
    reason = unfused or "; ".join(f"{name}: {_why_not(name, device_type, dtype)}" for name in KERNELS)
    expected = unfused is None and any(device_type in module.DEVICES for module in KERNELS.values())
    _log_fallback(reason, logging.WARNING if expected else logging.INFO)
    return "reference"


@functools.cache  # once per reason, whatever dtypes and gates it holds for
def _log_fallback(reason: str, level: int) -> None:
    logger.log(level, "using the reference backend (%s)", reason)
