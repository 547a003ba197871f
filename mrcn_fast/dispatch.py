"""Which backend serves a call, and why another does not.

Within a backend, torch's dispatcher finds the kernel for a device. This module chooses the backend: the one
that the argument ``backend=`` or the environment variable ``MRCN_FAST_BACKEND`` names, or else on a GPU the
one that was measured to be the fastest (tuning.py), or else the first whose kernels can serve, or else the
plain reference. It also gives the reasons.
"""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mrcn_fast import internals, tuning
from mrcn_fast.backends import cpu, cuda, shapes, triton
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
    for name, number in _measured_here().items():
        if known[name].usable:
            told = f"; measured to be the fastest for {number}; `mrcn-fast info` lists them"
            known[name] = known[name]._replace(reason=known[name].reason + told)
    return known | {"reference": BackendStatus(True, "plain PyTorch, runs wherever torch does")}


def _measured_here() -> dict[str, str]:
    """For how many of the measured planes of the current GPU each backend serves, as text."""
    if not torch.cuda.is_available():
        return {}
    chosen = [choice.backend for choice in tuned(torch.device("cuda", torch.cuda.current_device())).values()]
    return {name: f"{chosen.count(name)} of {len(chosen)} shapes" for name in sorted(set(chosen))}


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


def choose_for(requested: str | None, features: Tensor, gate: str) -> str:
    """The name of the backend that serves a block's call on this map; arguments and errors as in `choose`."""
    return choose(requested, features.device.type, features.dtype, gate, _measured_for(features, gate))


def choose_for_plain(requested: str | None, features: Tensor, gate: str) -> str:
    """`choose_for` in less time, for a tensor that is no subclass's, outside of tracing and transforms."""
    device, dtype = features.device, features.dtype
    device_type = device.type
    measured = None
    if device_type in tuning.DEVICE_TYPES and (choices := tuned(device)):
        measured = _measured_for_plain(features, (gate, dtype), choices)
    return choose(requested, device_type, dtype, gate, measured)


@internals.assume_constant  # a traced call is decided once, when it is traced
def choose(
    requested: str | None,
    device_type: str,
    dtype: torch.dtype,
    gate: str | None = None,
    measured: str | None = None,
) -> str:
    """The name of the backend that serves a call; ``gate`` is the block's, None for the loss.

    ``requested`` is the caller's choice; without one, ``MRCN_FAST_BACKEND`` decides. With neither, or with
    "auto", the backend ``measured`` serves, which was found to be the fastest, if there is one and it can.
    Otherwise the first kernel backend that can serve is chosen, and if there is none, the reference. Each
    reason for the reference is logged once: at WARNING where a kernel backend takes tensors of this device by
    default and could not serve, otherwise at INFO.

    Raises:
        ValueError: the name is unknown.
        BackendError: the backend that was asked for can't serve the call.
    """
    asked = requested or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    return _choose(asked, device_type, dtype, gate, measured)


@functools.cache  # what a process has to run on does not change
def _choose(
    requested: str, device_type: str, dtype: torch.dtype, gate: str | None, measured: str | None
) -> str:
    if requested != "auto":
        if requested not in NAMES:
            known = ", ".join(map(repr, (*NAMES, "auto")))
            named = os.environ.get(ENVIRONMENT_VARIABLE) == requested
            name = ENVIRONMENT_VARIABLE if named else "backend"
            raise ValueError(f"{name}: got {requested!r}, expected one of {known}")
        if reason := unserved(requested, device_type, dtype, gate):
            raise BackendError(
                f"backend {requested!r} can't serve this call: {reason}. "
                "Leave backend and MRCN_FAST_BACKEND unset to fall back by itself."
            )
        return requested
    if measured is not None and unserved(measured, device_type, dtype, gate) is None:
        return measured
    for name, module in KERNELS.items():
        if device_type in module.DEVICES and unserved(name, device_type, dtype, gate) is None:
            return name
    if dtype not in shapes.DTYPES:
        return "reference"  # whose checks refuse it
    unfused = None if gate is None else GATES[gate].unfused
    reason = unfused or "; ".join(f"{name}: {_why_not(name, device_type, dtype)}" for name in KERNELS)
    expected = unfused is None and any(device_type in module.DEVICES for module in KERNELS.values())
    _log_fallback(reason, logging.WARNING if expected else logging.INFO)
    return "reference"


@functools.cache  # once per reason, whatever dtypes and gates it holds for
def _log_fallback(reason: str, level: int) -> None:
    logger.log(level, "using the reference backend (%s)", reason)


# --- by measurement ---------------------------------------------------------------------------------------


@functools.cache  # the file is read once
def tuned(device: torch.device) -> tuning.Choices:
    """What was measured on a device. Its CUDA kernels then know which samples to hold in shared memory."""
    found = tuning.load(device)
    if found:
        KERNELS["cuda"].hold(device.index, tuning.held_numbers(found))
    return found


def forget_tuned() -> None:
    """Read the file of measurements again when it is next asked for."""
    tuning.forget()
    tuned.cache_clear()


def _measured_for(features: Tensor, gate: str) -> str | None:
    """The backend that was measured to be the fastest for a block's call on this map, if any was."""
    if torch.compiler.is_compiling() or type(features) is not Tensor:
        return _measured_for_traced(features, gate)
    if internals.under_transform((features,)):
        return None
    return _measured_for_plain(features, (gate, features.dtype), tuned(features.device))


def _measured_for_plain(
    features: Tensor, kind: tuple[str, torch.dtype], choices: tuning.Choices
) -> str | None:
    """The same for a plain tensor; ``kind`` is the gate and the dtype."""
    shape = features.shape
    if len(shape) != 4:  # the call is refused later
        return None
    channels_last = not features.is_contiguous()
    if channels_last and not features.is_contiguous(memory_format=torch.channels_last):
        return None
    # A tuple takes less time than `Planes`, whose keys it finds.
    found = choices.get((*kind, channels_last, shape[1], shape[2] * shape[3]))  # type: ignore[call-overload]
    return None if found is None else found.backend


def _measured_for_traced(features: Tensor, gate: str) -> str | None:
    """The same while a call is traced: only where the traced code is for maps of this size alone."""
    for (channels_last, channels, pixels), backend in _tuned_for(features.device, gate, features.dtype):
        _, c, h, w = features.shape
        if internals.always_equal(c, channels) and internals.always_equal(h * w, pixels):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            if features.is_contiguous(memory_format=layout):
                return backend
    return None


@internals.assume_constant
def _tuned_for(
    device: torch.device, gate: str, dtype: torch.dtype
) -> tuple[tuple[tuple[bool, int, int], str], ...]:
    """The choices for a gate and a dtype: layout, channels and pixels with the backend."""
    return tuple(
        (planes[2:], choice.backend)
        for planes, choice in tuned(device).items()
        if (planes.gate, planes.dtype) == (gate, dtype)
    )
