"""Channel gates A: plane statistics of the residual (N, C) -> gate (N, C).

A gate here is only its parameters and its initialization. The computation stands in `reference.GATES`
(plain PyTorch) and in csrc/block/gates.h (kernels): both read the parameters in the
order of `parameter_list`.
Every parameter has a leading dimension, one slice an independent gate.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn


class ChannelGate(nn.Module):
    """Parameters of ``count`` independent gates over ``channels`` channels."""

    kind: ClassVar[str]

    def parameter_list(self) -> list[Tensor]:
        """The parameters in the order in which the operations take them."""
        return list(self.parameters(recurse=False))

    def reset_parameters(self) -> None:
        raise NotImplementedError


class SEGate(ChannelGate):
    """Squeeze-and-excitation (Hu et al. 2018): σ(fc2 ReLU(fc1 z)), z = GAP(M).

    Parameters: ``fc1_weight (count, R, C)``, ``fc1_bias (count, R)``, ``fc2_weight (count, C, R)``,
    ``fc2_bias (count, C)`` with R = max(1, C // reduction); initialized like `torch.nn.Linear`.
    """

    kind = "se"

    def __init__(
        self,
        channels: int,
        count: int,
        *,
        reduction: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, *shape, device=device, dtype=dtype))

        self.fc1_weight, self.fc1_bias = empty(hidden, channels), empty(hidden)
        self.fc2_weight, self.fc2_bias = empty(channels, hidden), empty(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√fan_in, weights and biases, as `torch.nn.Linear` draws them."""
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)


class CBAMChannelGate(SEGate):
    """Channel part of CBAM (Woo et al. 2018): σ(mlp(GAP(M)) + mlp(GMP(M))); parameters as in `SEGate`."""

    kind = "cbam-channel"


class ECAGate(ChannelGate):
    """Efficient channel attention (Wang et al. 2020): σ(conv1d over channels of GAP(M)).

    Parameter: ``weight (count, K)``; K is |log2(C)/2 + 1/2|, made odd, as the authors choose it.
    ``reduction`` has no meaning here and is ignored.
    """

    kind = "eca"

    def __init__(
        self,
        channels: int,
        count: int,
        *,
        reduction: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = int(abs(math.log2(channels) + 1) / 2)
        self.weight = nn.Parameter(torch.empty(count, size + 1 - size % 2, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√K, as `torch.nn.Conv1d` draws it."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)


GATES: dict[str, type[SEGate] | type[ECAGate]] = {
    gate.kind: gate for gate in (SEGate, ECAGate, CBAMChannelGate)
}


def make_gate(
    kind: str,
    channels: int,
    count: int,
    *,
    reduction: int = 16,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ChannelGate:
    """The gate module called ``kind``; ValueError lists the known ones."""
    if kind not in GATES:
        raise ValueError(f"gate: got {kind!r}, expected one of {', '.join(map(repr, GATES))}")
    return GATES[kind](channels, count, reduction=reduction, device=device, dtype=dtype)
