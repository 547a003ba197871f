"""Backend of csrc: loads the compiled library and gives torch the shapes of its operations.

The schemas and the kernels are registered in C++ (csrc/registration.cpp) as ``torch.ops.mrcn_fast.*``; here
stand only what tracing needs (`torch.library.register_fake`) and the state of the build.
"""

from __future__ import annotations

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
    """What the compiled library is: compiler, instruction set in use and those it carries; empty if absent."""
    return dict(_library.build_info()) if _library is not None else {}


def status() -> tuple[bool, str]:
    """Whether the compiled library is loaded, and which instruction set it uses or why it is not."""
    if _library is not None:
        info = build_info()
        return True, f"C++ kernels, {info['isa']} of {', '.join(info['isas'])}"
    if BUILD_RECORD.exists():
        record = json.loads(BUILD_RECORD.read_text())
        if not record["built"]:
            return False, f"the native library was not built: {record['reason']}"
        return False, f"the native library does not load: {_failure}. Reinstall with this Python and torch."
    return False, f"the native library is absent ({_failure}); build it with `pip install --no-build-isolation .`"


def operation(name: str) -> Callable[..., Any]:
    """``torch.ops.mrcn_fast.<name>.default``."""
    return getattr(torch.ops.mrcn_fast, name).default


def statistics_shape(inputs: Sequence[Tensor], gate: str) -> tuple[int, int, int, int]:
    """(modalities, N, C, K): mean and 1/σ of each plane, with CBAM its maximum and minimum too."""
    return len(inputs), inputs[0].shape[0], inputs[0].shape[1], 4 if gate == "cbam-channel" else 2


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


def _forward_fake(inputs: Sequence[Tensor], gate: str, sets: int, batches: int = 1) -> tuple[Tensor, ...]:
    first = inputs[0]
    precise = torch.float64 if first.dtype == torch.float64 else torch.float32
    statistics = torch.empty(statistics_shape(inputs, gate), dtype=precise, device=first.device)
    return (*(_empty_like(first, batches * first.shape[0]) for _ in range(sets)), statistics)


def _backward_fake(
    inputs: Sequence[Tensor], norm_weight: Tensor, norm_bias: Tensor, gate_parameters: Sequence[Tensor]
) -> tuple[Any, ...]:
    gradients = (_empty_like(inputs[0], inputs[0].shape[0]) for _ in inputs)
    parameters = (torch.empty_like(p, memory_format=torch.contiguous_format) for p in (norm_weight, norm_bias))
    gate = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in gate_parameters]
    return (*gradients, *parameters, gate)


def _register_fakes() -> None:
    fake = torch.library.register_fake

    @fake("mrcn_fast::block_forward")
    def _(visible, infrared, norm_weight, norm_bias, gate_parameters, gate, eps, to_input):  # type: ignore[no-untyped-def]
        return _forward_fake((visible, infrared), gate, 4)

    @fake("mrcn_fast::block_concat_forward")
    def _(visible, infrared, norm_weight, norm_bias, gate_parameters, gate, eps, to_input):  # type: ignore[no-untyped-def]
        return _forward_fake((visible, infrared), gate, 1, batches=6)

    @fake("mrcn_fast::restitute_forward")
    def _(features, norm_weight, norm_bias, gate_parameters, gate, eps, to_input):  # type: ignore[no-untyped-def]
        return _forward_fake((features,), gate, 1)

    @fake("mrcn_fast::snr_forward")
    def _(features, norm_weight, norm_bias, gate_parameters, gate, eps):  # type: ignore[no-untyped-def]
        return _forward_fake((features,), gate, 3)

    @fake("mrcn_fast::block_backward")
    def _(g1, g2, g3, g4, visible, infrared, statistics, norm_weight, norm_bias, gate_parameters, gate, to_input):  # type: ignore[no-untyped-def]
        return _backward_fake((visible, infrared), norm_weight, norm_bias, gate_parameters)

    @fake("mrcn_fast::block_concat_backward")
    def _(gradient, visible, infrared, statistics, norm_weight, norm_bias, gate_parameters, gate, to_input):  # type: ignore[no-untyped-def]
        return _backward_fake((visible, infrared), norm_weight, norm_bias, gate_parameters)

    @fake("mrcn_fast::restitute_backward")
    def _(gradient, features, statistics, norm_weight, norm_bias, gate_parameters, gate, to_input):  # type: ignore[no-untyped-def]
        return _backward_fake((features,), norm_weight, norm_bias, gate_parameters)

    @fake("mrcn_fast::snr_backward")
    def _(g1, g2, g3, features, statistics, norm_weight, norm_bias, gate_parameters, gate):  # type: ignore[no-untyped-def]
        return _backward_fake((features,), norm_weight, norm_bias, gate_parameters)

    @fake("mrcn_fast::cqc_forward")
    def _(features, labels, infrared_labels, margin, detach_negative):  # type: ignore[no-untyped-def]
        precise = torch.float64 if features[0].dtype == torch.float64 else torch.float32
        capacity = labels.shape[0]
        new = features[0].new_empty
        return (
            new((), dtype=precise),
            new((capacity,), dtype=precise),
            new((capacity,), dtype=torch.int64),
            new((), dtype=torch.int64),
            new((capacity, 8), dtype=precise),
        )

    @fake("mrcn_fast::cqc_backward")
    def _(gradient, features, labels, infrared_labels, identities, count, weights):  # type: ignore[no-untyped-def]
        return [torch.empty_like(f, memory_format=torch.contiguous_format) for f in features]


if _library is not None:
    _register_fakes()
