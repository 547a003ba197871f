"""Backend of the Triton kernels: CUDA and ROCm tensors, and CPU tensors in Triton's interpreter.

The operations are ``torch.ops.mrcn_fast_triton.*`` with the arguments of csrc's. Triton and the kernels are
imported where the backend is first chosen: ``import mrcn_fast`` needs no Triton and does not wait for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from mrcn_fast.backends import batching, shapes
from mrcn_fast.checks import checked

NAMESPACE = "mrcn_fast_triton"
KERNEL_MODULES = ("operations", "cqc")
OLDEST = (3, 6)
DEVICES = ("cuda",)  # whose tensors it takes by itself; torch calls ROCm's devices "cuda" too

# Triton decides when a kernel is defined whether it is interpreted; these are the values it takes for yes.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

_libraries: list[torch.library.Library] = []  # an operation lives as long as its library
_registering = threading.Lock()  # the first calls may come from several threads


def status() -> tuple[bool, str]:
    """Whether Triton is there and has something to run on, and which or why not."""
    version, reason = _find_triton()
    if reason:
        return False, reason
    if INTERPRETED:
        return True, f"Triton {version}'s interpreter, for CPU tensors (TRITON_INTERPRET)"
    if not torch.cuda.is_available():
        return False, (
            "torch sees no GPU here; with TRITON_INTERPRET=1 in the environment it runs CPU tensors in "
            "Triton's interpreter"
        )
    return True, f"Triton {version} on {_device_name()}"


@functools.cache
def _device_name() -> str:  # every call asks for the status
    return torch.cuda.get_device_name()


@functools.cache
def _find_triton() -> tuple[str, str]:
    """Triton's version, and what is wrong with it if anything is."""
    needed = "Triton {}.{} or newer".format(*OLDEST)
    if importlib.util.find_spec("triton") is None:
        return "", f"Triton is not installed; it needs {needed}, which torch for Linux GPUs brings along"
    version = _installed_version()
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return version, f"Triton {version} is too old; it needs {needed}: update torch, which brings it along"
    return version, ""


def version() -> str:
    """Triton's version; "none" where it is not installed."""
    return _find_triton()[0] or "none"


def _installed_version() -> str:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return str(importlib.import_module("triton").__version__)


def serves(device_type: str, dtype: torch.dtype) -> str | None:
    """Why such tensors can't be served; None where they can, and then the operations are there."""
    if INTERPRETED and device_type != "cpu":
        return f"Triton's interpreter (TRITON_INTERPRET) serves CPU tensors, got a tensor on {device_type!r}"
    if not INTERPRETED and device_type not in DEVICES:
        return (
            f"it serves CUDA and ROCm tensors, got a tensor on {device_type!r}; with TRITON_INTERPRET=1 in "
            "the environment it serves CPU tensors"
        )
    if dtype not in shapes.DTYPES:
        return f"it serves {', '.join(map(str, shapes.DTYPES))}, got {dtype}"
    _register()  # here, because torch.compile traces `operation` but not what chooses a backend
    return None


def operation(name: str) -> Callable[..., Any]:
    """``torch.ops.mrcn_fast_triton.<name>.default``, once `serves` has said that it can serve."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _register() -> None:
    with _registering:
        if _libraries:
            return
        library = torch.library.Library(NAMESPACE, "DEF")
        key = "CPU" if INTERPRETED else "CUDA"
        for module_name in KERNEL_MODULES:
            module = importlib.import_module(f"{__name__}.{module_name}")
            for name, schema in module.SCHEMAS.items():
                library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
                library.impl(name, checked(name, module.IMPLEMENTATIONS[name]), key)
                torch.library.register_fake(f"{NAMESPACE}::{name}", module.FAKES[name], lib=library)
        batching.register(NAMESPACE, operation, library)
        _libraries.append(library)
