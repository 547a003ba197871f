"""MRCN's block and SNR's: functions, modules and the checks of what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mrcn_fast import dispatch
from mrcn_fast.autograd import MODES, BlockFunction, distinct, run_block, split
from mrcn_fast.backends import shapes
from mrcn_fast.gates import GATES, make_gate, parameter

Modality = Literal["visible", "infrared"]
MODALITIES: tuple[Modality, ...] = ("visible", "infrared")
RESTITUTE_TO = ("normalized", "input")


class MRCNFeatures(NamedTuple):
    """The six feature sets in the paper's order v, v+, v-, n-, n+, n; each (N, C, H, W), pooled (N, D)."""

    visible: Tensor
    visible_restituted: Tensor
    visible_compensated: Tensor
    infrared_compensated: Tensor
    infrared_restituted: Tensor
    infrared: Tensor


class SNRFeatures(NamedTuple):
    """F̃ + sM, F̃ + (1 - s)M and F̃; each (N, C, H, W)."""

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
            contiguous, channels_last or any other strides. The outputs have the input's dtype and layout.
        norm_weight, norm_bias: (2, C), γ and β of the two instance normalizations, visible then infrared;
            the inputs' dtype or float32.
        gate_parameters: the gate's parameters with a leading 4 (A_v1, A_n1, A_v2, A_n2), in the order of
            `gates.Gate.parameter_list`.
        gate: "se", "eca", "cbam-channel", or "cbam", which plain PyTorch serves and no kernel can.
        eps: added to the variance.
        restitute_to: what M₊ is added to: "normalized" (F̃, the text) or "input" (F, eq. 5 as printed).
        concat: give the six sets as one (6N, C, H, W) tensor in the order of `MRCNFeatures`.
        backend: "cpu", "triton", "cuda", "reference", or None for what serves (see `mrcn_fast.backends`).

    Returns:
        `MRCNFeatures`, whose ``visible`` and ``infrared`` are the inputs; with ``concat`` one tensor.

    Raises:
        TypeError: an argument that is no tensor, or a dtype that does not fit.
        ValueError: a shape, device, gate, modality or backend name that does not fit.
        RuntimeError: the backend asked for can't serve the call.

    Equivalent to:
        ``MRCNFeatures(*mrcn_fast.reference.mrcn_block(visible, infrared, norm_weight, norm_bias,
        gate_parameters))``, and ``torch.cat`` of it with ``concat``.
    """
    tensors = (visible, infrared, norm_weight, norm_bias, *gate_parameters)
    if concat:
        return _run("concat", backend, gate, eps, restitute_to, tensors)[0]
    made = _run("pair", backend, gate, eps, restitute_to, tensors)
    return MRCNFeatures._make((visible, *made, infrared))


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
    """F₊ of one modality (eq. 1, 3, 4, 5): what MRCN uses at inference.

    Arguments, result and errors as in `mrcn_block`, for one (N, C, H, W) tensor: ``norm_weight`` and
    ``norm_bias`` are (1, C), the gate's parameters have a leading 1.

    Equivalent to:
        ``reference.restitution(features, norm_weight[0], norm_bias[0], [p[0] for p in gate_parameters])``.
    """
    tensors = (features, norm_weight, norm_bias, *gate_parameters)
    return _run("restitute", backend, gate, eps, restitute_to, tensors)[0]


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

    Arguments and errors as in `mrcn_restitution`.

    Equivalent to:
        ``reference.snr_block(features, norm_weight[0], norm_bias[0], [p[0] for p in gate_parameters])``.
    """
    tensors = (features, norm_weight, norm_bias, *gate_parameters)
    return SNRFeatures._make(_run("snr", backend, gate, eps, "normalized", tensors))


def _run(
    mode: str, requested: str | None, gate: str, eps: float, restitute_to: str, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The feature sets that ``mode`` makes.

    Kernels that refuse what does not fit see the tensors unchecked: `_check` costs as much as a launch, and
    is left to say in the caller's terms what a call was refused for.
    """
    if torch.compiler.is_compiling():
        _check(mode, gate, restitute_to, tensors)
        return _serve(mode, requested, gate, eps, restitute_to, tensors)
    try:
        return _serve(mode, requested, gate, eps, restitute_to, tensors)
    except Exception:
        if fault := _fault(mode, gate, restitute_to, tensors):
            raise fault from None
        raise


def _serve(
    mode: str, requested: str | None, gate: str, eps: float, restitute_to: str, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    backend = dispatch.choose(requested, tensors[0].device.type, tensors[0].dtype, gate)
    refuses = backend != "reference" and dispatch.KERNELS[backend].CHECKS
    # A subclass may be a fake one, which has only a shape: no kernel sees it.
    if not (refuses and type(tensors[0]) is Tensor and restitute_to in RESTITUTE_TO):
        _check(mode, gate, restitute_to, tensors)
    if backend == "reference":
        inputs, (norm_weight, norm_bias), parameters = split(tensors, MODES[mode].inputs)
        return dispatch.run_reference(
            mode, inputs, norm_weight, norm_bias, parameters, gate, eps, restitute_to
        )
    # Inference: what a Function costs can be saved, but where it has forward-mode derivatives to refuse.
    forward_mode = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    if not (torch.is_grad_enabled() or forward_mode):
        return run_block(mode, backend, gate, eps, restitute_to, *tensors)[:-1]
    return BlockFunction.apply(mode, backend, gate, eps, restitute_to, *distinct(*tensors))


class _Block(nn.Module):
    """Instance-norm parameters of ``modalities`` and ``gates`` gates."""

    def __init__(
        self,
        channels: int,
        modalities: int,
        gates: int,
        reduction: int,
        eps: float,
        gate: str,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("reduction", reduction)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")
        if not eps > 0:
            raise ValueError(f"eps: got {eps!r}, expected a number above 0")
        if backend is not None:
            _check_choice("backend", backend, (*dispatch.NAMES, "auto"))
        self.channels, self.reduction, self.eps, self.gate_kind, self.backend = (
            channels,
            reduction,
            eps,
            gate,
            backend,
        )
        self.norm_weight = nn.Parameter(torch.ones(modalities, channels, device=device, dtype=dtype))
        self.norm_bias = nn.Parameter(torch.zeros(modalities, channels, device=device, dtype=dtype))
        self.gate = make_gate(gate, channels, gates, reduction=reduction, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """γ = 1, β = 0 and the gate's own initialization."""
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        self.gate.reset_parameters()

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
        restitute_to: "normalized" (default) or "input", see `mrcn_block`.
        backend: "cpu", "triton", "cuda", "reference", or None for what serves.
        device, dtype: of the parameters.

    Parameters: ``norm_weight (2, C)``, ``norm_bias (2, C)`` (visible, infrared); ``gate.*`` with a leading 4
    in the order A_v1, A_n1, A_v2, A_n2 (visible restitution, infrared restitution, visible compensation,
    infrared compensation), see `mrcn_fast.gates`.

    Raises ValueError for unknown names and sizes below 1.
    """

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
        super().__init__(channels, 2, 4, reduction, eps, gate, backend, device, dtype)
        _check_choice("restitute_to", restitute_to, RESTITUTE_TO)
        self.restitute_to = restitute_to

    @overload
    def forward(self, visible: Tensor, infrared: Tensor, concat: Literal[False] = ...) -> MRCNFeatures: ...

    @overload
    def forward(self, visible: Tensor, infrared: Tensor, concat: Literal[True]) -> Tensor: ...

    def forward(self, visible: Tensor, infrared: Tensor, concat: bool = False) -> MRCNFeatures | Tensor:
        """The six feature sets of a pair, (N, C, H, W) each or one (6N, C, H, W); see `mrcn_block`."""
        return mrcn_block(
            visible,
            infrared,
            parameter(self, "norm_weight"),
            parameter(self, "norm_bias"),
            self.gate.parameter_list(),
            gate=self.gate_kind,
            eps=self.eps,
            restitute_to=self.restitute_to,
            concat=concat,
            backend=self.backend,
        )

    def restitute(self, features: Tensor, modality: Modality) -> Tensor:
        """F₊ of one modality for inference, any batch size; see `mrcn_restitution`.

        ``modality`` is "visible" or "infrared"; ValueError for any other.
        """
        _check_choice("modality", modality, MODALITIES)
        index = MODALITIES.index(modality)
        own = slice(index, index + 1)
        return mrcn_restitution(
            features,
            self.norm_weight[own],
            self.norm_bias[own],
            [p[own] for p in self.gate.parameter_list()],
            gate=self.gate_kind,
            eps=self.eps,
            restitute_to=self.restitute_to,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, restitute_to={self.restitute_to!r}"


class SNRBlock(_Block):
    """SNR's block (Jin et al. 2020) with its parameters; arguments as in `MRCNBlock`.

    Parameters: ``norm_weight (1, C)``, ``norm_bias (1, C)``, ``gate.*`` with a leading 1.
    """

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
        super().__init__(channels, 1, 1, reduction, eps, gate, backend, device, dtype)

    def forward(self, features: Tensor) -> SNRFeatures:
        """F̃ + sM, F̃ + (1 - s)M and F̃ of a batch (N, C, H, W); see `snr_block`."""
        return snr_block(
            features,
            parameter(self, "norm_weight"),
            parameter(self, "norm_bias"),
            self.gate.parameter_list(),
            gate=self.gate_kind,
            eps=self.eps,
            backend=self.backend,
        )

    def restitute(self, features: Tensor) -> Tensor:
        """F̃ + sM alone, for inference: the first of `forward`'s three, through `mrcn_restitution`.

        It reads and writes one map where `forward` reads one and writes three.
        """
        return mrcn_restitution(
            features,
            parameter(self, "norm_weight"),
            parameter(self, "norm_bias"),
            self.gate.parameter_list(),
            gate=self.gate_kind,
            eps=self.eps,
            backend=self.backend,
        )


def _check_choice(name: str, got: object, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(map(repr, known))}")


def _fault(
    mode: str, gate: str, restitute_to: str, tensors: tuple[Tensor, ...]
) -> TypeError | ValueError | None:
    """What does not fit, if anything."""
    try:
        _check(mode, gate, restitute_to, tensors)
    except (TypeError, ValueError) as error:
        return error
    return None


def _check(mode: str, gate: str, restitute_to: str, tensors: tuple[Tensor, ...]) -> None:
    """Raises TypeError or ValueError for what does not fit, and says what would."""
    count = MODES[mode].inputs
    inputs, (norm_weight, norm_bias), parameters = split(tensors, count)
    if count == 2:
        _check_pair(*inputs)
        _check_parameters(inputs[0], norm_weight, norm_bias, parameters, gate, 2, 4)
    else:
        _check_features("features", inputs[0])
        _check_parameters(inputs[0], norm_weight, norm_bias, parameters, gate, 1, 1)
    _check_choice("restitute_to", restitute_to, RESTITUTE_TO)


def _check_features(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor (N, C, H, W)")
    if x.dim() != 4:
        raise ValueError(f"{name}: got {x.dim()} dimensions {tuple(x.shape)}, expected four, (N, C, H, W)")
    if x.dtype not in shapes.DTYPES:
        raise TypeError(
            f"{name}: got dtype {x.dtype}, expected float32, float64, bfloat16 or float16; "
            "convert with .float()"
        )
    if x.shape[2] * x.shape[3] < 2:
        raise ValueError(
            f"{name}: got planes of {x.shape[2]} x {x.shape[3]}, expected at least 2 elements: "
            "the variance of a single one says nothing; normalize before pooling to 1 x 1"
        )
    if x.shape[1] < 1:
        raise ValueError(f"{name}: got no channels in {tuple(x.shape)}, expected C >= 1")


def _check_pair(visible: Tensor, infrared: Tensor) -> None:
    _check_features("visible", visible)
    _check_features("infrared", infrared)
    if visible.shape != infrared.shape:
        raise ValueError(
            f"visible and infrared: got shapes {tuple(visible.shape)} and {tuple(infrared.shape)}, expected "
            "equal ones: sample i of one is mixed with sample i of the other (eq. 7). For one modality alone "
            "use restitute(features, modality)"
        )
    if visible.dtype != infrared.dtype:
        raise TypeError(
            f"visible and infrared: got dtypes {visible.dtype} and {infrared.dtype}, expected one dtype"
        )
    if visible.device != infrared.device:
        raise ValueError(
            f"visible and infrared: got devices {visible.device} and {infrared.device}, expected one device"
        )


def _check_parameters(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    gate: str,
    modalities: int,
    gates: int,
) -> None:
    _check_choice("gate", gate, tuple(GATES))
    channels = features.shape[1]
    for name, p in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: got {type(p).__name__}, expected a tensor ({modalities}, {channels})")
        if p.shape != (modalities, channels):
            raise ValueError(
                f"{name}: got shape {tuple(p.shape)}, expected ({modalities}, {channels}) for features of "
                f"{channels} channels"
            )
    for p, expected in zip(
        gate_parameters, _gate_shapes(gate, gates, channels, gate_parameters), strict=True
    ):
        if p.shape != expected:
            raise ValueError(
                f"gate_parameters of {gate!r}: got shape {tuple(p.shape)}, expected {expected} for features "
                f"of {channels} channels"
            )
    device, dtype, own = features.device, features.dtype, norm_weight.dtype
    for p in (norm_weight, norm_bias, *gate_parameters):
        if p.device != device:
            raise ValueError(f"parameters: got device {p.device}, expected the features' {device}")
        if p.dtype != own or own not in (dtype, torch.float32):
            raise TypeError(
                f"parameters: got dtypes {own} and {p.dtype}, expected one dtype for all, the features' "
                f"{dtype} or torch.float32; convert the block with .to(dtype)"
            )
    if dtype == torch.float64 and own != torch.float64:
        raise TypeError(
            "parameters: got dtype torch.float32 for float64 features; convert the block with .double()"
        )


def _gate_shapes(
    gate: str, gates: int, channels: int, gate_parameters: Sequence[Tensor]
) -> list[tuple[int, ...]]:
    first = gate_parameters[0] if len(gate_parameters) else None
    width = first.shape[1] if isinstance(first, Tensor) and first.dim() > 1 else 0
    shapes = GATES[gate].shapes(channels, width).values()
    if len(gate_parameters) != len(shapes) or not all(isinstance(p, Tensor) for p in gate_parameters):
        kinds = ", ".join(type(p).__name__ for p in gate_parameters)
        raise ValueError(f"gate_parameters of {gate!r}: got ({kinds}), expected {len(shapes)} tensors")
    if width < 1:
        raise ValueError(f"gate_parameters of {gate!r}: got a width of {width}, expected at least 1")
    if gate == "eca" and width % 2 == 0:
        raise ValueError(f"gate_parameters of 'eca': got a kernel of {width}, expected an odd one")
    return [(gates, *shape) for shape in shapes]
