"""Backend of csrc: loads the compiled library and gives torch the shapes of its operations.

The schemas and the kernels are registered in C++ (csrc/registration.cpp) as ``torch.ops.mrcn_fast.*``; here
stand only what tracing needs (`torch.library.register_fake`) and the state of the build.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Written by setup.py: {"built": bool, "reason": str, "log": str}.
BUILD_RECORD = Path(__file__).parents[1] / "_native_build.json"

_library: Any = None
_failure = ""

try:
    _library = importlib.import_module("mrcn_fast._C")
except ImportError as error:
    _failure = str(error)


def build_info() -> dict[str, Any]:
    """What the compiled library is: compiler, instruction set in use and all; empty if it can't run."""
    try:
        return dict(_library.build_info()) if _library is not None else {}
    except RuntimeError:  # see `status`
        return {}


@functools.cache
def _describe() -> str:
    info = _library.build_info()
    return f"C++ kernels, {info['isa']} of {', '.join(info['isas'])}"


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


def _is_planes(x: Tensor) -> bool:
    """Each plane is contiguous, whatever the strides between planes: the kernels' NCHW."""
    height, width = x.shape[2:]
    return (width == 1 or x.stride(3) == 1) and (height == 1 or x.stride(2) == width)


def _is_pixels(x: Tensor) -> bool:
    """Each pixel's channels are contiguous and pixels evenly spaced: the kernels' channels_last."""
    channels, height, width = x.shape[1:]
    pitch = x.stride(3) if width > 1 else x.stride(2)
    return (channels == 1 or x.stride(1) == 1) and (height == 1 or width == 1 or x.stride(2) == width * pitch)


def _empty_like(x: Tensor, batch: int) -> Tensor:
    """A dense output of ``batch`` samples in the layout in which the kernels read ``x``."""
    pixels = not _is_planes(x) and _is_pixels(x)
    memory_format = torch.channels_last if pixels else torch.contiguous_format
    return torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format)


def _forward_fake(count: int, sets: int, batches: int) -> Callable[..., tuple[Tensor, ...]]:
    """Shapes of a forward of ``count`` inputs giving ``sets`` tensors of ``batches`` times the samples."""

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        first = arguments[0]
        precise = torch.float64 if first.dtype == torch.float64 else torch.float32
        statistics = first.new_empty((count, *first.shape[:2], 2), dtype=precise)
        return (*(_empty_like(first, batches * first.shape[0]) for _ in range(sets)), statistics)

    return fake


def _backward_fake(gradients: int, count: int) -> Callable[..., tuple[Any, ...]]:
    """Shapes of the backward that takes so many gradients and then ``count`` inputs."""

    def fake(*arguments: Any) -> tuple[Any, ...]:
        inputs = arguments[gradients : gradients + count]
        norm_weight, norm_bias, gate_parameters = arguments[gradients + count + 1 :][:3]
        parameters = (_dense_like(p) for p in (norm_weight, norm_bias))
        of_inputs = (_empty_like(inputs[0], inputs[0].shape[0]) for _ in inputs)
        return (*of_inputs, *parameters, [_dense_like(p) for p in gate_parameters])

    return fake


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cqc_forward_fake(features: Sequence[Tensor], labels: Tensor, *_: Any) -> tuple[Tensor, ...]:
    precise = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    capacity, new = labels.shape[0], features[0].new_empty
    return (
        new((), dtype=precise),
        new((capacity,), dtype=precise),
        new((capacity,), dtype=torch.int64),
        new((), dtype=torch.int64),
        new((capacity, 8), dtype=precise),
    )


def _cqc_backward_fake(
    gradient: Tensor, features: Sequence[Tensor], labels: Tensor, infrared_labels: Tensor, *_: Any
) -> Tensor:
    rows = 3 * (labels.shape[0] + infrared_labels.shape[0])
    return features[0].new_empty((rows, features[0].shape[1]))


FAKES: dict[str, Callable[..., Any]] = {
    "block_forward": _forward_fake(2, 4, 1),
    "block_concat_forward": _forward_fake(2, 1, 6),
    "restitute_forward": _forward_fake(1, 1, 1),
    "snr_forward": _forward_fake(1, 3, 1),
    "block_backward": _backward_fake(4, 2),
    "block_concat_backward": _backward_fake(1, 2),
    "restitute_backward": _backward_fake(1, 1),
    "snr_backward": _backward_fake(3, 1),
    "cqc_forward": _cqc_forward_fake,
    "cqc_backward": _cqc_backward_fake,
}

if _library is not None:
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"mrcn_fast::{_name}")(_fake)
