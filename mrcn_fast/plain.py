"""The block operations through `reference`, for the backend "reference" and wherever no kernel can serve."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrcn_fast import reference
from mrcn_fast.backends import shapes
from mrcn_fast.operations import OPERATIONS


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast; the meta device has none to switch off."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def run_reference(
    mode: str, gate: str, eps: float, restitute_to: str, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The results of the block operation ``mode`` through `reference`, in its inputs' dtype.

    ``tensors`` are the inputs, γ, β and the gate's parameters.
    """
    operation = OPERATIONS[mode]
    count = len(operation.inputs)
    inputs, parameters = tensors[:count], [p.to(tensors[0].dtype) for p in tensors[count:]]
    if count == 1:  # the equations of one modality take the parameters of one modality and one gate
        parameters = [p[0] for p in parameters]
    norm_weight, norm_bias, *gate_parameters = parameters
    settings: dict[str, Any] = {"gate": gate, "eps": eps}
    if operation.restitutes:
        settings["restitute_to"] = restitute_to
    equation = getattr(reference, operation.equation)
    with without_autocast(inputs[0].device.type):
        returned = equation(*inputs, norm_weight, norm_bias, gate_parameters, **settings)
        return operation.results_of(torch.cat(returned) if operation.stacked else returned)


def run_precisely(
    mode: str, gate: str, eps: float, restitute_to: str, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The same as `run_reference`, computed as the kernels compute it: half dtypes in float32."""
    dtype, count = tensors[0].dtype, len(OPERATIONS[mode].inputs)
    inputs = [x.to(shapes.precise(dtype)) for x in tensors[:count]]
    made = run_reference(mode, gate, eps, restitute_to, (*inputs, *tensors[count:]))
    return tuple(x.to(dtype) for x in made)
