"""The state of a process's random generators, which a run that goes on takes up again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of a process's random generators: torch's on the CPU and on its device, and Python's."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore a `random_state`; the state of CUDA only where both devices are of CUDA."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
    random.setstate(python_state(state["python"]))


def python_state(state: Sequence[Any]) -> tuple[Any, ...]:
    """Convert a stored state for `random.setstate`. Raises ValueError or TypeError for anything else."""
    version, internal, gauss = state
    return version, tuple(internal), None if gauss is None else float(gauss)
