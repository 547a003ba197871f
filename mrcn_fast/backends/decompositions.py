"""The block's forwards in standard operators, for exporters that know no operation of ours, such as ONNX's.

`torch.export` keeps our operations. `ExportedProgram.run_decompositions` takes them apart where the table
that it is given has these functions, as the table of `torch.onnx.export` has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mrcn_fast import internals, plain
from mrcn_fast.backends import shapes
from mrcn_fast.gates import FUSED
from mrcn_fast.operations import OPERATIONS


def register(operation: Callable[[str], Callable[..., Any]]) -> None:
    """Registers the decompositions; ``operation(name)`` gives each operation."""
    for mode, block in OPERATIONS.items():
        internals.register_decomposition(operation(block.forward))(_plain(mode))


def _plain(mode: str) -> Callable[..., tuple[Tensor, ...]]:
    operation = OPERATIONS[mode]

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        given = operation.split(arguments)
        restitute_to = operation.restitute_to(given.flags)
        made = plain.run_precisely(mode, FUSED[given.gate], given.eps, restitute_to, given.tensors)
        return (*made, _statistics(given.inputs, given.eps))

    return forward


def _statistics(inputs: tuple[Tensor, ...], eps: float) -> Tensor:
    """Mean and 1/σ of every plane, (modalities, N, C, 2), as the CPU's forward saves them."""
    found = []
    for x in inputs:
        variance, mean = torch.var_mean(x.to(shapes.precise(x.dtype)), dim=(2, 3), correction=0)
        found.append(torch.stack((mean, torch.rsqrt(variance + eps)), dim=-1))
    return torch.stack(found)
