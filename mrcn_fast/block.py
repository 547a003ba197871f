"""MRCN's block and SNR's block, as functions and as modules with parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from mrcn_fast import dispatch, internals, reference
from mrcn_fast.autograd import run_block
from mrcn_fast.checks import (
    check_choice,
    check_eps,
    check_flag,
    check_maps,
    check_pair,
    gate_tensors,
    positive_integer,
)
from mrcn_fast.gates import Gate, make_gate
from mrcn_fast.operations import OPERATIONS, RESTITUTE_TO, Operation

Modality = Literal["visible", "infrared"]
MODALITIES: tuple[Modality, ...] = ("visible", "infrared")
Role = Literal["restitution", "compensation"]
ROLES: tuple[Role, ...] = ("restitution", "compensation")


class MRCNFeatures(NamedTuple):
    """The six feature sets in the paper's order v, v+, v-, n-, n+, n: (N, C, H, W) each, or (N, D) pooled.

    Example:
        >>> sets = MRCNBlock(16)(*torch.randn(2, 3, 16, 6, 4))
        >>> torch.equal(sets.visible_restituted, sets[1])
        True
    """

    visible: Tensor
    visible_restituted: Tensor
    visible_compensated: Tensor
    infrared_compensated: Tensor
    infrared_restituted: Tensor
    infrared: Tensor


class MRCNAttention(NamedTuple):
    """The attention A(M) of a pair's four gates: (N, C) each, or (N, C, H, W) where the gate is "cbam".

    Example:
        >>> attention = MRCNBlock(16).attention(*torch.randn(2, 3, 16, 6, 4))
        >>> attention.infrared_compensation.shape
        torch.Size([3, 16])
    """

    visible_restitution: Tensor  # A_v1
    infrared_restitution: Tensor  # A_n1
    visible_compensation: Tensor  # A_v2, which multiplies M_v in the infrared compensated features
    infrared_compensation: Tensor  # A_n2


class SNRFeatures(NamedTuple):
    """F̃ + sM, F̃ + (1 - s)M and F̃; each (N, C, H, W).

    Example:
        >>> maps = torch.randn(3, 16, 6, 4)
        >>> sets = SNRBlock(16)(maps)
        >>> torch.allclose(sets.restituted + sets.contaminated, maps + sets.normalized, atol=1e-5)
        True
    """

    restituted: Tensor
    contaminated: Tensor
    normalized: Tensor


@overload
def mrcn_block(
    visible: Tensor,
    infrared: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    *,
    gate: str = ...,
    eps: float = ...,
    restitute_to: str = ...,
    concat: Literal[False] = ...,
    backend: str | None = ...,
) -> MRCNFeatures: ...


@overload
def mrcn_block(
    visible: Tensor,
    infrared: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    *,
    gate: str = ...,
    eps: float = ...,
    restitute_to: str = ...,
    concat: Literal[True],
    backend: str | None = ...,
) -> Tensor: ...


@overload
def mrcn_block(
    visible: Tensor,
    infrared: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    *,
    gate: str = ...,
    eps: float = ...,
    restitute_to: str = ...,
    concat: bool,
    backend: str | None = ...,
) -> MRCNFeatures | Tensor: ...


def mrcn_block(
    visible: Tensor,
    infrared: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    *,
    gate: str = "se",
    eps: float = 1e-5,
    restitute_to: str = "normalized",
    concat: bool = False,
    backend: str | None = None,
) -> MRCNFeatures | Tensor:
    """Modality restitution and compensation of a pair of feature maps (eq. 1-7).

    Args:
        visible, infrared: (N, C, H, W), H·W >= 2, paired by identity; float32, float64, bfloat16 or float16;
            contiguous, channels_last or any other strides. The outputs have the inputs' dtype and layout.
        norm_weight, norm_bias: (2, C), γ and β of the two instance normalizations, visible then infrared;
            in the inputs' dtype or float32.
        gate_parameters: the gate's parameters with a leading 4 (A_v1, A_n1, A_v2, A_n2), in the order of
            `gates.Gate.parameter_list`.
        gate: "se", "eca", "cbam-channel", or "cbam", which plain PyTorch serves and no kernel can.
        eps: added to the variance.
        restitute_to: what M₊ is added to: "normalized" (F̃, the text) or "input" (F, eq. 5 as printed).
        concat: give the six sets as one (6N, C, H, W) tensor in the order of `MRCNFeatures`.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses one (see `mrcn_fast.backends`).

    Returns:
        `MRCNFeatures`, whose ``visible`` and ``infrared`` are the inputs; with ``concat`` one tensor.

    Raises:
        TypeError: an argument is no tensor, or a dtype does not fit.
        ValueError: a shape, a device, ``eps`` or a name does not fit.
        RuntimeError: the backend that was asked for can't serve the call.

    Equivalent to:
        ``MRCNFeatures(*mrcn_fast.reference.mrcn_block(visible, infrared, norm_weight, norm_bias,
        gate_parameters))``, and ``torch.cat`` of it with ``concat``.

    Example:
        >>> visible, infrared = torch.randn(2, 3, 16, 6, 4)
        >>> gate = torch.randn(4, 1, 16), torch.randn(4, 1), torch.randn(4, 16, 1), torch.randn(4, 16)
        >>> sets = mrcn_block(visible, infrared, torch.ones(2, 16), torch.zeros(2, 16), gate)
        >>> sets.infrared_compensated.shape
        torch.Size([3, 16, 6, 4])
    """
    if _stand_ins(visible, infrared):
        made: MRCNFeatures | Tensor = handle_torch_function(
            mrcn_block, (visible, infrared), visible, infrared, norm_weight, norm_bias, gate_parameters,
            gate=gate, eps=eps, restitute_to=restitute_to, concat=concat, backend=backend,
        )  # fmt: skip
        return made
    tensors = (visible, infrared, norm_weight, norm_bias, *gate_tensors(gate_parameters))
    if check_flag("concat", concat):
        return run_block("concat", backend, gate, eps, restitute_to, tensors)[0]
    sets = run_block("pair", backend, gate, eps, restitute_to, tensors)
    return MRCNFeatures._make((visible, *sets, infrared))


def mrcn_restitution(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    *,
    gate: str = "se",
    eps: float = 1e-5,
    restitute_to: str = "normalized",
    backend: str | None = None,
) -> Tensor:
    """F₊ of one modality (eq. 1, 3, 4, 5), which is what MRCN uses at inference.

    Args:
        features: (N, C, H, W).
        norm_weight, norm_bias: (1, C).
        gate_parameters: the gate's parameters with a leading 1.
        gate, eps, restitute_to, backend: as in `mrcn_block`, like the dtypes and layouts of all tensors.

    Returns:
        (N, C, H, W).

    Raises:
        TypeError, ValueError, RuntimeError: as in `mrcn_block`.

    Equivalent to:
        ``reference.restitution(features, norm_weight[0], norm_bias[0], [p[0] for p in gate_parameters])``.

    Example:
        >>> gate = torch.randn(1, 1, 16), torch.randn(1, 1), torch.randn(1, 16, 1), torch.randn(1, 16)
        >>> mrcn_restitution(torch.randn(3, 16, 6, 4), torch.ones(1, 16), torch.zeros(1, 16), gate).shape
        torch.Size([3, 16, 6, 4])
    """
    if _stand_ins(features):
        made: Tensor = handle_torch_function(
            mrcn_restitution, (features,), features, norm_weight, norm_bias, gate_parameters,
            gate=gate, eps=eps, restitute_to=restitute_to, backend=backend,
        )  # fmt: skip
        return made
    tensors = (features, norm_weight, norm_bias, *gate_tensors(gate_parameters))
    return run_block("restitute", backend, gate, eps, restitute_to, tensors)[0]


def snr_block(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    *,
    gate: str = "se",
    eps: float = 1e-5,
    backend: str | None = None,
) -> SNRFeatures:
    """Style normalization and restitution (Jin et al. 2020): F̃ + sM, F̃ + (1 - s)M and F̃.

    The arguments and errors are those of `mrcn_restitution`.

    Returns:
        `SNRFeatures`, (N, C, H, W) each.

    Equivalent to:
        ``reference.snr_block(features, norm_weight[0], norm_bias[0], [p[0] for p in gate_parameters])``.

    Example:
        >>> gate = torch.randn(1, 1, 16), torch.randn(1, 1), torch.randn(1, 16, 1), torch.randn(1, 16)
        >>> snr_block(torch.randn(3, 16, 6, 4), torch.ones(1, 16), torch.zeros(1, 16), gate)._fields
        ('restituted', 'contaminated', 'normalized')
    """
    if _stand_ins(features):
        made: SNRFeatures = handle_torch_function(
            snr_block, (features,), features, norm_weight, norm_bias, gate_parameters,
            gate=gate, eps=eps, backend=backend,
        )  # fmt: skip
        return made
    tensors = (features, norm_weight, norm_bias, *gate_tensors(gate_parameters))
    return SNRFeatures._make(run_block("snr", backend, gate, eps, "normalized", tensors))


def _stand_ins(*features: object) -> bool:
    """Whether one of the arguments only stands for a tensor, as a Proxy of torch.fx does."""
    for x in features:
        if not isinstance(x, Tensor):
            return has_torch_function(features)
    return False


class _Block(nn.Module):
    """The parameters of an operation: γ and β of each of its inputs, and its gates."""

    _operation: ClassVar[Operation]

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        eps: float = 1e-5,
        gate: str = "se",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = positive_integer("channels", channels)
        reduction = positive_integer("reduction", reduction)
        check_eps(eps)
        if backend is not None:
            check_choice("backend", backend, (*dispatch.NAMES, "auto"))
        self.channels, self.reduction, self.eps = channels, reduction, eps
        self.gate_kind, self.backend = gate, backend
        modalities, gates = len(self._operation.inputs), len(self._operation.gates)
        self.norm_weight = nn.Parameter(torch.ones(modalities, channels, device=device, dtype=dtype))
        self.norm_bias = nn.Parameter(torch.zeros(modalities, channels, device=device, dtype=dtype))
        self.gate = make_gate(gate, channels, gates, reduction=reduction, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """γ = 1, β = 0 and the gate's own initialization."""
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        self.gate.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that are usually left out of weight decay: γ, β and the gates' biases.

        timm asks a module for them by this name. The parameters are stacked, so that rules such as
        ``p.ndim <= 1`` don't find them.
        """
        return {"norm_weight", "norm_bias", *(f"gate.{name}" for name in self.gate.no_weight_decay())}

    def _norm(self) -> list[Tensor]:
        """γ and β of the instance normalizations, (modalities, C) each."""
        return internals.parameters(self, ("norm_weight", "norm_bias"))

    def _parameters_and_settings(self, gate: Gate) -> tuple[list[Any], dict[str, Any]]:
        """γ, β and the gate's parameters, and the settings that all of the block's functions take.

        ``gate`` is ``self.gate``, which a call looks up once.
        """
        settings = {"gate": self.gate_kind, "eps": self.eps, "backend": self.backend}
        return [*self._norm(), gate.parameter_list()], settings

    def _residual(self, features: Tensor, modality: int) -> Tensor:
        """M of a modality (eq. 3)."""
        norm_weight, norm_bias = (p[modality] for p in self._norm())
        return reference.residual(
            features, reference.instance_norm(features, norm_weight, norm_bias, self.eps)
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, gate={self.gate_kind!r}, backend={self.backend!r}"


class MRCNBlock(_Block):
    """MRCN's restitution and compensation block (eq. 1-7) with its parameters.

    Args:
        channels: C of the feature maps.
        reduction: the gates' hidden width is max(1, C // reduction).
        eps: added to the variance.
        gate: "se" (the paper), "eca", "cbam-channel", or "cbam", which has a spatial part that no kernel can
            fuse: plain PyTorch serves it on every device.
        restitute_to: "normalized" or "input", see `mrcn_block`.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses one (see `mrcn_fast.backends`).
        device, dtype: of the parameters.

    Parameters: ``norm_weight (2, C)``, ``norm_bias (2, C)`` (visible, infrared); ``gate.*`` with a leading 4
    in the order A_v1, A_n1, A_v2, A_n2 (visible restitution, infrared restitution, visible compensation,
    infrared compensation), see `mrcn_fast.gates`.

    Raises:
        ValueError: an unknown name, a size below 1, or an ``eps`` that is not above 0.

    Example:
        >>> block, maps = MRCNBlock(64), torch.randn(2, 3, 64, 6, 4)
        >>> block(*maps).infrared_compensated.shape
        torch.Size([3, 64, 6, 4])
    """

    _operation = OPERATIONS["pair"]

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        eps: float = 1e-5,
        gate: str = "se",
        restitute_to: str = "normalized",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            channels, reduction=reduction, eps=eps, gate=gate, backend=backend, device=device, dtype=dtype
        )
        check_choice("restitute_to", restitute_to, RESTITUTE_TO)
        self.restitute_to = restitute_to

    @overload
    def forward(self, visible: Tensor, infrared: Tensor, concat: Literal[False] = ...) -> MRCNFeatures: ...

    @overload
    def forward(self, visible: Tensor, infrared: Tensor, concat: Literal[True]) -> Tensor: ...

    def forward(self, visible: Tensor, infrared: Tensor, concat: bool = False) -> MRCNFeatures | Tensor:
        """The six feature sets of a pair, (N, C, H, W) each or one (6N, C, H, W); see `mrcn_block`.

        A hook that is registered on ``self.gate`` is called with each gate's residual and attention. For the
        hook they are computed once more, in plain PyTorch, and what it returns is not used.
        """
        gate: Gate = internals.submodule(self, "gate")
        if gate.has_hooks():
            self.attention(visible, infrared)
        parameters, settings = self._parameters_and_settings(gate)
        return mrcn_block(
            visible, infrared, *parameters, restitute_to=self.restitute_to, concat=concat, **settings
        )

    def restitute(self, features: Tensor, modality: Modality) -> Tensor:
        """F₊ of one modality for inference, any batch size; see `mrcn_restitution`.

        ``modality`` is "visible" or "infrared"; ValueError for any other.
        """
        check_choice("modality", modality, MODALITIES)
        index = MODALITIES.index(modality)
        own = slice(index, index + 1)
        gate: Gate = internals.submodule(self, "gate")
        if gate.has_hooks():
            gate(self._residual(features, index), index)
        (norm_weight, norm_bias, gate_parameters), settings = self._parameters_and_settings(gate)
        parameters = norm_weight[own], norm_bias[own], [p[own] for p in gate_parameters]
        return mrcn_restitution(features, *parameters, restitute_to=self.restitute_to, **settings)

    def attention(self, visible: Tensor, infrared: Tensor) -> MRCNAttention:
        """The attention of the four gates on a pair of feature maps, for inspection or for a loss on it.

        It is computed in plain PyTorch and is differentiable. The arguments are those of `forward`.

        Example:
            >>> block, maps = MRCNBlock(64), torch.randn(2, 3, 64, 6, 4)
            >>> block.attention(*maps).visible_restitution.shape
            torch.Size([3, 64])
        """
        check_pair(visible, infrared)
        residuals = self._residual(visible, 0), self._residual(infrared, 1)
        return MRCNAttention._make(self.gate(residuals[k % 2], k) for k in range(4))

    def gate_parameters(self, modality: Modality, role: Role) -> dict[str, Tensor]:
        """The parameters of one of the four gates by name, as views of the stacked ones.

        Args:
            modality: whose residual the gate sees, "visible" or "infrared".
            role: "restitution" (A_1, eq. 4) or "compensation" (A_2, eq. 6).

        Example:
            >>> MRCNBlock(64).gate_parameters("visible", "restitution")["fc1_weight"].shape
            torch.Size([4, 64])
        """
        check_choice("modality", modality, MODALITIES)
        check_choice("role", role, ROLES)
        index = 2 * ROLES.index(role) + MODALITIES.index(modality)
        return self.gate.one(index)

    def norm_parameters(self, modality: Modality) -> tuple[Tensor, Tensor]:
        """γ and β of one modality's instance normalization, (C,) each, as views of the stacked ones."""
        check_choice("modality", modality, MODALITIES)
        index = MODALITIES.index(modality)
        norm_weight, norm_bias = self._norm()
        return norm_weight[index], norm_bias[index]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, restitute_to={self.restitute_to!r}"


class SNRBlock(_Block):
    """SNR's block (Jin et al. 2020) with its parameters.

    The arguments are those of `MRCNBlock`, without ``restitute_to``.

    Parameters: ``norm_weight (1, C)``, ``norm_bias (1, C)``, ``gate.*`` with a leading 1.

    Example:
        >>> SNRBlock(64)(torch.randn(3, 64, 6, 4)).contaminated.shape
        torch.Size([3, 64, 6, 4])
    """

    _operation = OPERATIONS["snr"]

    def forward(self, features: Tensor) -> SNRFeatures:
        """F̃ + sM, F̃ + (1 - s)M and F̃ of a batch (N, C, H, W); see `snr_block`, and `MRCNBlock` on hooks."""
        gate: Gate = internals.submodule(self, "gate")
        if gate.has_hooks():
            self.attention(features)
        parameters, settings = self._parameters_and_settings(gate)
        return snr_block(features, *parameters, **settings)

    def restitute(self, features: Tensor) -> Tensor:
        """F̃ + sM alone, for inference: the first of `forward`'s three sets, through `mrcn_restitution`.

        It reads one map and writes one, where `forward` writes three.
        """
        gate: Gate = internals.submodule(self, "gate")
        if gate.has_hooks():
            self.attention(features)
        parameters, settings = self._parameters_and_settings(gate)
        return mrcn_restitution(features, *parameters, **settings)

    def attention(self, features: Tensor) -> Tensor:
        """The gate's attention s on feature maps, (N, C), in plain PyTorch; differentiable."""
        check_maps("features", features)
        attention: Tensor = self.gate(self._residual(features, 0))
        return attention
