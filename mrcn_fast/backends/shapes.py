"""The layouts of feature maps and the shapes of results, which all kernel backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mrcn_fast.gates import FUSED, GATES, MOST_PARAMETERS
from mrcn_fast.operations import LOSS, OPERATIONS, Operation, rows_of_sets

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_planes(x: Tensor) -> bool:
    """Whether each plane is contiguous, with any strides between planes: the kernels' NCHW."""
    height, width = x.shape[2:]
    return (width == 1 or x.stride(3) == 1) and (height == 1 or x.stride(2) == width)


def pixel_pitch(x: Tensor) -> int:
    """The stride from one pixel to the next."""
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


def is_pixels(x: Tensor) -> bool:
    """Whether each pixel's channels are contiguous and pixels evenly spaced: the kernels' channels_last."""
    channels, height, width = x.shape[1:]
    even = height == 1 or width == 1 or x.stride(2) == width * pixel_pitch(x)
    return (channels == 1 or x.stride(1) == 1) and even


def reads_pixels(x: Tensor) -> bool:
    """Whether the kernels read ``x`` as channels_last; a map in neither layout is copied to NCHW."""
    return not is_planes(x) and is_pixels(x)


def in_layout(x: Tensor, pixels: bool) -> Tensor:
    """``x`` in the call's layout: ``x`` itself, or a dense copy where it is in another layout."""
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
    """How many numbers per sample the block's forward on a GPU saves for its backward.

    They are the mean and 1/σ of every plane, and the gates' hidden layers.
    """
    operation = OPERATIONS[mode]
    layers = len(operation.gates) * GATES[gate].hidden_layers
    return 2 * len(operation.inputs) * channels + layers * hidden


def saved_rows(mode: str) -> Callable[..., Tensor]:
    """What a forward on a GPU saves, from its arguments: one row per sample."""

    def empty(*arguments: Any) -> Tensor:
        given = OPERATIONS[mode].split(arguments)
        first: Tensor = given.inputs[0]
        row = saved_row(mode, FUSED[given.gate], given.gate_parameters[0].shape[1], first.shape[1])
        return first.new_empty((first.shape[0], row), dtype=precise(first.dtype))

    return empty


def saved_statistics(mode: str) -> Callable[..., Tensor]:
    """What a forward on the CPU saves, from its arguments: mean and 1/σ of every plane.

    Its shape is (modalities, N, C, 2).
    """
    modalities = len(OPERATIONS[mode].inputs)

    def empty(first: Tensor, *_: Any) -> Tensor:
        return first.new_empty((modalities, *first.shape[:2], 2), dtype=precise(first.dtype))

    return empty


def sample_dimension(saved: Tensor) -> int:
    """The dimension of the samples in what a forward saves: first in a GPU's rows, second in statistics."""
    return 1 if saved.dim() == 4 else 0


def forward_fake(operation: Operation, saved: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The shapes of an operation's forward: its results, then what it saves."""

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        first = arguments[0]
        _check_devices(arguments)
        made = empties_like(first, operation.batches * first.shape[0], operation.results)
        return (*made, saved(*arguments))

    return fake


def _check_devices(arguments: Sequence[Any]) -> None:
    """Refuse tensors on several devices. Torch asks for shapes where only one tensor is without data."""
    device = arguments[0].device
    for argument in arguments:
        for t in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(t, Tensor) and t.device != device:
                raise RuntimeError(f"got tensors on {device} and {t.device}, expected one device")


def backward_fake(operation: Operation) -> Callable[..., tuple[Tensor, ...]]:
    """The shapes of an operation's backward: the gradients of its inputs and parameters."""
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
        fakes[operation.forward] = forward_fake(operation, saved(mode))
        fakes[operation.backward] = backward_fake(operation)
    return fakes


def no_gradients(norm_weight: Tensor, gate_parameters: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without elements that a backward gives for parameters that the gate does not have."""
    return [norm_weight.new_empty(0) for _ in range(MOST_PARAMETERS - len(gate_parameters))]


def cqc_saved_on_gpu(visible: int, infrared: int, normalize: bool) -> int:
    """How many numbers the loss's forward on a GPU saves for its backward.

    They are eight weights per visible sample, the role of each sample, and with ``normalize`` the scale of
    each row.
    """
    return 9 * visible + infrared + (3 * (visible + infrared) if normalize else 0)


def loss_fakes(saved: Callable[[Tensor, Tensor, bool], tuple[int, ...]]) -> dict[str, Callable[..., Any]]:
    """The shapes of the loss; ``saved(labels, infrared_labels, normalize)`` gives that of what it saves."""
    return {LOSS.forward: cqc_forward_fake(saved), LOSS.backward: cqc_backward_fake}


def cqc_forward_fake(saved: Callable[[Tensor, Tensor, bool], tuple[int, ...]]) -> Callable[..., Any]:
    """The shapes of the loss's forward: total, losses, identities, count, then what it saves."""

    def fake(
        features: Sequence[Tensor], labels: Tensor, infrared_labels: Tensor, *settings: Any
    ) -> tuple[Tensor, ...]:
        *_, normalize = settings
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
    rows = sum(rows_of_sets(labels.shape[0], infrared_labels.shape[0]))
    return features[0].new_empty((rows, features[0].shape[1]))
