"""Gates A, which say how much of the residual M (N, C, H, W) is distilled per channel, or per pixel too.

A class here has a gate's parameters and their initialization. The computation is in `reference.GATES` (plain
PyTorch) and in csrc/block/cpu/gates.h (kernels): both read the parameters in the order of `parameter_list`.
Every parameter has a leading dimension with one slice per independent gate. A block calls no gate as a
module, unless a hook is registered on it; `Gate.forward` gives the attention to whoever asks for it.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mrcn_fast import internals, reference


class Gate(nn.Module):
    """The parameters of ``count`` independent gates over ``channels`` channels, as `shapes` lists them.

    Attributes:
        kind: the gate's name.
        unfused: None for a gate that the kernels fuse, which is a function of plane statistics. For any other
            gate it tells a user why they can't.
        hidden_layers: how many hidden layers a GPU's forward saves, each of the gate's width.
        odd_width: whether the width must be odd.
    """

    kind: ClassVar[str]
    unfused: ClassVar[str | None] = None
    hidden_layers: ClassVar[int] = 0
    odd_width: ClassVar[bool] = False

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
        shapes = self.shapes(channels, self.width(channels, reduction))
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            empty = torch.empty(count, *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    @staticmethod
    def width(channels: int, reduction: int) -> int:
        """The size that the channels alone don't fix: the number of hidden units, or a kernel's length."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, channels: int, width: int) -> dict[str, tuple[int, ...]]:
        """The parameters of one gate by name, in their order, without the leading dimension."""
        raise NotImplementedError

    def parameter_list(self) -> list[Tensor]:
        """The parameters in the order in which the operations take them.

        They are looked up by name, because a parametrized one (`torch.nn.utils.parametrize`) is not among the
        module's ``parameters()``.
        """
        return internals.parameters(self, self._names)

    def forward(self, residual: Tensor, index: int = 0) -> Tensor:
        """The attention A(M) of one of the gates, in plain PyTorch; differentiable.

        Args:
            residual: M, (N, C, H, W).
            index: which of the ``count`` gates; MRCN's are A_v1, A_n1, A_v2, A_n2.

        Returns:
            (N, C) with values in (0, 1), or (N, C, H, W) where the gate is "cbam".
        """
        return reference.GATES[self.kind](residual, [p[index] for p in self.parameter_list()])

    def one(self, index: int) -> dict[str, Tensor]:
        """The parameters of one of the gates by name, as views without the leading dimension."""
        return {name: p[index] for name, p in zip(self._names, self.parameter_list(), strict=True)}

    def has_hooks(self) -> bool:
        """Whether calling the module would call somebody's hook."""
        return internals.has_forward_hooks(self)

    def reset_parameters(self) -> None:
        raise NotImplementedError

    @classmethod
    def no_weight_decay(cls) -> frozenset[str]:
        """The names of the parameters that are usually left out of weight decay: biases that are vectors."""
        known = cls.shapes(2, 1).items()
        return frozenset(name for name, shape in known if name.endswith("_bias") and len(shape) == 1)


class SEGate(Gate):
    """Squeeze-and-excitation (Hu et al. 2018): σ(fc2 ReLU(fc1 z)), z = GAP(M).

    Parameters: ``fc1_weight (count, R, C)``, ``fc1_bias (count, R)``, ``fc2_weight (count, C, R)``,
    ``fc2_bias (count, C)`` with R = max(1, C // reduction); initialized like `torch.nn.Linear`.
    """

    kind = "se"
    hidden_layers = 1
    fc1_weight: nn.Parameter
    fc1_bias: nn.Parameter
    fc2_weight: nn.Parameter
    fc2_bias: nn.Parameter

    @staticmethod
    def width(channels: int, reduction: int) -> int:
        return max(1, channels // reduction)

    @classmethod
    def shapes(cls, channels: int, width: int) -> dict[str, tuple[int, ...]]:
        return {
            "fc1_weight": (width, channels),
            "fc1_bias": (width,),
            "fc2_weight": (channels, width),
            "fc2_bias": (channels,),
        }

    def reset_parameters(self) -> None:
        """Draw weights and biases uniformly from ±1/√fan_in, as `torch.nn.Linear` does."""
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)


class CBAMChannelGate(SEGate):
    """Channel part of CBAM (Woo et al. 2018): σ(mlp(GAP(M)) + mlp(GMP(M))); parameters as in `SEGate`.

    The pixels at which M is largest share the gradient of the maximum evenly, as in `torch.amax`. The kernels
    look for these pixels in the input, of which M is an affine map: pixels share the gradient where their
    inputs are equal. Plain PyTorch looks for them in the rounded M. If a plane varies by less than the
    rounding of M, as with values of 1e-28 beside β = 0.5, plain PyTorch finds more pixels equal, and shares
    the same sum among them.
    """

    kind = "cbam-channel"
    hidden_layers = 2


class CBAMGate(CBAMChannelGate):
    """The whole CBAM (Woo et al. 2018): the channel part, then a weight for each pixel of its result.

    Parameters: those of `CBAMChannelGate`, then ``spatial_weight (count, 2, 7, 7)``, a convolution without
    bias over the mean and the maximum of the channels.
    """

    kind = "cbam"
    unfused = (
        "CBAM's spatial part weighs each place by its 7 x 7 surroundings, which is no function of the "
        "statistics of planes that a kernel could fuse; the plain PyTorch form serves it on every device. "
        "gate='cbam-channel' is CBAM's channel part alone, fused"
    )
    spatial_weight: nn.Parameter

    @classmethod
    def shapes(cls, channels: int, width: int) -> dict[str, tuple[int, ...]]:
        return super().shapes(channels, width) | {"spatial_weight": (2, 7, 7)}

    def reset_parameters(self) -> None:
        """Initialize as `SEGate` does, and the convolution uniformly in ±1/√fan_in, as `torch.nn.Conv2d`."""
        super().reset_parameters()
        bound = 1 / math.sqrt(self.spatial_weight[0].numel())
        nn.init.uniform_(self.spatial_weight, -bound, bound)


class ECAGate(Gate):
    """Efficient channel attention (Wang et al. 2020): σ(conv1d over channels of GAP(M)).

    Parameter: ``weight (count, K)``; K is |log2(C)/2 + 1/2|, made odd, as the authors choose it.
    ``reduction`` has no meaning here and is ignored.
    """

    kind = "eca"
    odd_width = True
    weight: nn.Parameter

    @staticmethod
    def width(channels: int, reduction: int) -> int:
        size = int(abs(math.log2(channels) + 1) / 2)
        return size + 1 - size % 2

    @classmethod
    def shapes(cls, channels: int, width: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (width,)}

    def reset_parameters(self) -> None:
        """Draw the weight uniformly from ±1/√K, as `torch.nn.Conv1d` does."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)


GATES: dict[str, type[Gate]] = {gate.kind: gate for gate in (SEGate, ECAGate, CBAMChannelGate, CBAMGate)}
# The gates that kernels fuse. An operation takes a gate by its place here: `Gate` in csrc/block/gate_table.h.
FUSED = tuple(kind for kind, gate in GATES.items() if gate.unfused is None)
# Gradients of gate parameters that a backward gives; of a gate with fewer parameters the last are empty.
MOST_PARAMETERS = max(len(GATES[kind].shapes(1, 1)) for kind in FUSED)


def make_gate(kind: str, channels: int, count: int, **options: Any) -> Gate:
    """A gate of one of the kinds in `GATES`; the other arguments are those of `Gate`.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in tuple(GATES):  # a tuple takes what can't be hashed, a dict does not
        raise ValueError(f"gate: got {kind!r}, expected one of {', '.join(map(repr, GATES))}")
    return GATES[kind](channels, count, **options)
