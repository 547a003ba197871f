"""Layouts of feature maps, and the shapes of results: what every kernel backend agrees on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mrcn_fast.gates import FUSED, GATES, MOST_PARAMETERS
from mrcn_fast.operations import OPERATIONS, Operation

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def precise(dtype: torch.dtype) -> torch.dtype:
    """What sums over tensors of ``dtype`` are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_planes(x: Tensor) -> bool:
    """Each plane is contiguous, whatever the strides between planes: the kernels' NCHW."""
    height, width = x.shape[2:]
    return (width == 1 or x.stride(3) == 1) and (height == 1 or x.stride(2) == width)


def pixel_pitch(x: Tensor) -> int:
    """What lies between one pixel and the next."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


def is_pixels(x: Tensor) -> bool:
    """Each pixel's channels are contiguous and pixels evenly spaced: the kernels' channels_last."""
    channels, height, width = x.shape[1:]
    even = height == 1 or width == 1 or x.stride(2) == width * pixel_pitch(x)
    return (channels == 1 or x.stride(1) == 1) and even


def reads_pixels(x: Tensor) -> bool:
    """Whether the kernels read ``x`` as channels_last; what is in neither layout is copied to NCHW."""
    return not is_planes(x) and is_pixels(x)


def in_layout(x: Tensor, pixels: bool) -> Tensor:
    """``x`` readable in the call's layout: itself, or a dense copy where it is in neither or in the other."""
    if is_pixels(x) if pixels else is_planes(x):
        return x
    return torch.empty_like(x, memory_format=_format(pixels)).copy_(x)


def empties_like(x: Tensor, batch: int, number: int) -> list[Tensor]:
    """Dense outputs of ``batch`` samples in the layout in which the kernels read ``x``."""
    shape, memory_format = (batch, *x.shape[1:]), _format(reads_pixels(x))
    first = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    return [first, *(torch.empty_like(first) for _ in range(number - 1))]


def _format(pixels: bool) -> torch.memory_format:
    return torch.channels_last if pixels else torch.contiguous_format


def dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def saved_row(mode: str, gate: str, hidden: int, channels: int) -> int:
    """How many numbers a sample the block's forward on a GPU leaves to its backward.

    Mean and 1/σ of every plane, and the gates' hidden layers.
    """
    operation = OPERATIONS[mode]
    layers = len(operation.gates) * GATES[gate].hidden_layers
    return 2 * len(operation.inputs) * channels + layers * hidden


def saved_rows(mode: str) -> Callable[..., Tensor]:
    """What a forward on a GPU saves, from its arguments: a row a sample."""
    count = len(OPERATIONS[mode].inputs)

    def empty(*arguments: Any) -> Tensor:
        first, gate_parameters, gate = arguments[0], arguments[count + 2], arguments[count + 3]
        row = saved_row(mode, FUSED[gate], gate_parameters[0].shape[1], first.shape[1])
        return first.new_empty((first.shape[0], row), dtype=precise(first.dtype))

    return empty


def forward_fake(operation: Operation, saved: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Shapes of an operation's forward: its results, then what it saves."""

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        first = arguments[0]
        _check_devices(arguments)
        made = empties_like(first, operation.batches * first.shape[0], operation.results)
        return (*made, saved(*arguments))

    return fake


def _check_devices(arguments: Sequence[Any]) -> None:
    """One tensor without data is enough for torch to ask for shapes where the others have theirs."""
    device = arguments[0].device
    for argument in arguments:
        for t in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(t, Tensor) and t.device != device:
                raise RuntimeError(f"got tensors on {device} and {t.device}, expected one device")


def backward_fake(operation: Operation) -> Callable[..., tuple[Tensor, ...]]:
    """Shapes of an operation's backward: the gradients of its inputs and parameters."""
    first, count = operation.results, len(operation.inputs)

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        inputs = arguments[first : first + count]
        norm_weight, norm_bias, gate_parameters = arguments[first + count + 1 :][:3]
        of_inputs = empties_like(inputs[0], inputs[0].shape[0], count)
        of_parameters = (dense_like(p) for p in (norm_weight, norm_bias, *gate_parameters))
        return (*of_inputs, *of_parameters, *no_gradients(norm_weight, gate_parameters))

    return fake


def block_fakes(saved: Callable[[str], Callable[..., Tensor]]) -> dict[str, Callable[..., Any]]:
    """The shapes of every block operation; ``saved(mode)`` gives what its forward saves."""
    fakes: dict[str, Callable[..., Any]] = {}
    for mode, operation in OPERATIONS.items():
        fakes[f"{operation.op}_forward"] = forward_fake(operation, saved(mode))
        fakes[f"{operation.op}_backward"] = backward_fake(operation)
    return fakes


def no_gradients(norm_weight: Tensor, gate_parameters: Sequence[Tensor]) -> list[Tensor]:
    """The empty tensors of a backward for gate parameters that the gate does not have."""
    return [norm_weight.new_empty(0) for _ in range(MOST_PARAMETERS - len(gate_parameters))]


def cqc_saved_on_gpu(visible: int, infrared: int, normalize: bool) -> int:
    """How many numbers the loss's forward on a GPU leaves to its backward.

    Eight weights a visible sample, the role of each sample, and with ``normalize`` the scale of each row.
    """
    return 9 * visible + infrared + (3 * (visible + infrared) if normalize else 0)


def cqc_forward_fake(saved: Callable[[Tensor, Tensor, bool], tuple[int, ...]]) -> Callable[..., Any]:
    """Shapes of the loss's forward: total, losses, identities, count, then what it saves."""

    def fake(
        features: Sequence[Tensor],
        labels: Tensor,
        infrared_labels: Tensor,
        margin: float,
        detach_negative: bool,
        normalize: bool,
    ) -> tuple[Tensor, ...]:
        new, slots, dtype = features[0].new_empty, labels.shape[0], precise(features[0].dtype)
        return (
            new((), dtype=dtype),
            new((slots,), dtype=dtype),
            new((slots,), dtype=torch.int64),
            new((), dtype=torch.int64),
            new(saved(labels, infrared_labels, normalize), dtype=dtype),
        )

    return fake


def cqc_backward_fake(
    gradient: Tensor, features: Sequence[Tensor], labels: Tensor, infrared_labels: Tensor, *_: Any
) -> Tensor:
    """The shape of the gradient of all sets, stacked."""
    return features[0].new_empty((3 * (labels.shape[0] + infrared_labels.shape[0]), features[0].shape[1]))
