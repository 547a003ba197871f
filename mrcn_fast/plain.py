"""The block operations through `reference`: the backend "reference", and what the kernels fall back to."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mrcn_fast import reference


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast inside; the meta device knows none."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def run_reference(
    mode: str,
    inputs: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    gate: str,
    eps: float,
    restitute_to: str,
) -> tuple[Tensor, ...]:
    """The block operation ``mode`` through `reference`, in its inputs' dtype, autocast or not."""
    dtype = inputs[0].dtype
    norm_weight, norm_bias = norm_weight.to(dtype), norm_bias.to(dtype)
    parameters = [p.to(dtype) for p in gate_parameters]
    with without_autocast(inputs[0].device.type):
        if len(inputs) == 2:
            visible, infrared = inputs
            sets = reference.mrcn_block(
                visible,
                infrared,
                norm_weight,
                norm_bias,
                parameters,
                gate=gate,
                eps=eps,
                restitute_to=restitute_to,
            )
            return (torch.cat(sets),) if mode == "concat" else sets[1:5]
        own = (inputs[0], norm_weight[0], norm_bias[0], [p[0] for p in parameters])
        if mode == "snr":
            return reference.snr_block(*own, gate=gate, eps=eps)
        return (reference.restitution(*own, gate=gate, eps=eps, restitute_to=restitute_to),)


def run_precisely(
    mode: str,
    inputs: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    gate: str,
    eps: float,
    restitute_to: str,
) -> tuple[Tensor, ...]:
    """The same as `run_reference`, computed as the kernels compute it: half dtypes in float32."""
    dtype = inputs[0].dtype
    precise = [x if dtype == torch.float64 else x.float() for x in inputs]
    made = run_reference(mode, precise, norm_weight, norm_bias, gate_parameters, gate, eps, restitute_to)
    return tuple(x.to(dtype) for x in made)
