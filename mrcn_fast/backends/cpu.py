"""Backend of csrc: loads the compiled library and gives torch the shapes of its operations.

The schemas and the kernels are registered in C++ (csrc/registration.cpp) as ``torch.ops.mrcn_fast.*``; here
stand only what tracing needs (`torch.library.register_fake`) and the state of the build. The operations are
those of CUDA tensors too, with kernels from another library (cuda.py).
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrcn_fast import internals
from mrcn_fast.backends import batching, decompositions, shapes

# Written by setup.py: {"built": bool, "reason": str, "log": str, "cuda": {the same of the CUDA part, ...}}.
BUILD_RECORD = Path(__file__).parents[1] / "_native_build.json"

DEVICES = ("cpu",)  # whose tensors it takes by itself

_library: Any = None
_failure = ""

try:
    _library = importlib.import_module("mrcn_fast._C")
except ImportError as error:
    _failure = str(error)


# What makes ordinary storages of kept memory (csrc/cpu/storage.cpp); _no_storage: why it can't be used.
STORAGE_LIBRARY = Path(__file__).parents[1] / "_storage.so"
_no_storage = (
    _failure
    if _library is None
    else _library.connect_storage(str(STORAGE_LIBRARY), torch.__version__)
    if STORAGE_LIBRARY.is_file()
    else "the library was built without it"
)


def loaded() -> bool:
    """Whether the operations are there, with or without kernels that can run."""
    return _library is not None


def build_info() -> dict[str, Any]:
    """What the compiled library is: compiler, instruction set in use and all; empty if it can't run."""
    if _library is None:
        return {}
    memory = "that of freed outputs serves the next ones"
    if _no_storage:
        memory = f"new for each output, because the library _storage can't be used: {_no_storage}"
    try:
        return dict(_library.build_info()) | {"memory": memory}
    except RuntimeError:  # see `status`
        return {}


def release_memory() -> None:
    """Give back to the system the memory that freed CPU outputs have left for the next ones.

    Outputs of 2 MiB and more take the memory of earlier ones, because to get new pages from the system costs
    more than the block does. What is kept and all outputs that live are together never more than outputs took
    at once; `memory_in_use` says how much that is.

    Example:
        >>> from mrcn_fast.backends.cpu import memory_in_use
        >>> release_memory()
        >>> memory_in_use()[1]  # bytes that are kept
        0
    """
    if _library is not None:
        _library.release_memory()


def memory_in_use() -> tuple[int, int]:
    """Bytes of large CPU outputs that live, and bytes that are kept for the next ones."""
    return _library.memory_in_use() if _library is not None else (0, 0)


@functools.cache
def _describe() -> str:
    info = _library.build_info()
    return f"C++ kernels for {info['isa']}, compiled for {', '.join(info['isas'])}"


def status() -> tuple[bool, str]:
    """Whether the compiled library is loaded, and which instruction set it uses or why it is not."""
    if _library is not None:
        try:
            return True, _describe()
        except RuntimeError as error:  # MRCN_FAST_ISA names none that runs here
            return False, str(error)
    if BUILD_RECORD.exists():
        record = json.loads(BUILD_RECORD.read_text())
        if not record["built"]:
            return False, f"the native library was not built: {record['reason']}"
        return False, f"the native library does not load: {_failure}. Reinstall with this Python and torch."
    return False, f"the native library is absent ({_failure}); build it with `make install`"


def operation(name: str) -> Callable[..., Any]:
    """``torch.ops.mrcn_fast.<name>.default``."""
    return getattr(torch.ops.mrcn_fast, name).default


def serves(device_type: str, dtype: torch.dtype) -> str | None:
    """Why tensors of this device and dtype can't be served; None where they can."""
    if device_type != "cpu":
        return f"it serves CPU tensors, got a tensor on {device_type!r}"
    if dtype not in shapes.DTYPES:
        return f"it serves {', '.join(map(str, shapes.DTYPES))}, got {dtype}"
    return None


def fakes(device_type: str | None = None) -> dict[str, Callable[..., Any]]:
    """The shapes of the operations, for tracing.

    What a forward saves for its backward is the kernels' own: that of kernels for ``device_type``, or where
    none is named, of those that the arguments' device has.
    """

    def on_gpu(tensor: Tensor) -> bool:
        return (device_type or tensor.device.type) == "cuda"

    def saved(mode: str) -> Callable[..., Tensor]:
        rows, statistics = shapes.saved_rows(mode), shapes.saved_statistics(mode)

        def empty(*arguments: Any) -> Tensor:
            return (rows if on_gpu(arguments[0]) else statistics)(*arguments)

        return empty

    def cqc_saved(labels: Tensor, infrared_labels: Tensor, normalize: bool) -> tuple[int, ...]:
        slots = labels.shape[0]
        if on_gpu(labels):
            return (shapes.cqc_saved_on_gpu(slots, infrared_labels.shape[0], normalize),)
        return slots, 8

    return shapes.block_fakes(saved) | shapes.loss_fakes(cqc_saved)


def _kept_whole(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The shapes of an operation, and to whoever asks for them: Inductor shall not take it apart."""

    def traced(*arguments: Any) -> Any:
        internals.keep_whole_in_inductor(operation(name))
        return fake(*arguments)

    return traced


if _library is not None:
    for _name, _fake in fakes().items():
        torch.library.register_fake(f"mrcn_fast::{_name}")(_kept_whole(_name, _fake))
    batching.register("mrcn_fast", operation)
    decompositions.register(operation)
