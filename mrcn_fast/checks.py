"""The checks of a call's arguments, and their messages: what was given, what was expected, what to do.

Who checks what:

- This module has the text of every message, the checks of all arguments that are no tensors (gate, eps,
  restitute_to, modality, margin, ...) and all checks of the loss.
- The block's operations check whether their tensors fit one another (shape, dtype, device). The operations of
  the compiled library do so in C++ (csrc/block/ops.h), in a fraction of the ten microseconds that
  `check_tensors` takes, and raise RuntimeError. `autograd.run_block` catches it, and `check_tensors` then
  raises the error in the caller's terms. Operations that are written in Python call `check_tensors`
  themselves (`checked`).
- Where no operation sees the tensors as they are (plain PyTorch, tracing, transforms, tensors without data),
  `autograd.run_block` calls `check_tensors` first.

tests/test_errors.py checks that C++ refuses what `check_tensors` refuses, and names the same argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from mrcn_fast.backends import shapes
from mrcn_fast.gates import FUSED, GATES
from mrcn_fast.operations import OPERATIONS, RESTITUTE_TO, SETS, rows_of_sets

GATE_NAMES = tuple(GATES)
REDUCTIONS = ("sum", "mean", "none")
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_choice(name: str, got: object, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(f"{name}: got {got!r}, expected one of {', '.join(map(repr, known))}")


def positive_integer(name: str, value: object) -> int:
    """The value as an int; NumPy's integers are accepted."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")
    return int(value)


def check_flag(name: str, value: object) -> bool:
    """The value as a bool; 0, 1 and NumPy's are accepted, but no text, because any text would be true."""
    if value not in (True, False):
        raise ValueError(f"{name}: got {value!r}, expected True or False")
    return bool(value)


def check_eps(eps: object) -> None:
    known = type(eps) is float or (isinstance(eps, Real) and not isinstance(eps, bool))
    if not known or not 0 < eps < math.inf:  # type: ignore[operator]
        raise ValueError(f"eps: got {eps!r}, expected a number above 0")


def gate_tensors(gate_parameters: object) -> tuple[Tensor, ...]:
    """The gate's parameters as a tuple; `check_tensors` looks at each."""
    if isinstance(gate_parameters, (Tensor, Mapping)) or not isinstance(gate_parameters, Iterable):
        raise TypeError(
            f"gate_parameters: got {type(gate_parameters).__name__}, expected a sequence of tensors; "
            "of a gate module, pass gate.parameter_list()"
        )
    return tuple(gate_parameters)


def check_settings(gate: object, eps: object, restitute_to: object) -> None:
    if gate in GATE_NAMES and type(eps) is float and 0 < eps < math.inf and restitute_to in RESTITUTE_TO:
        return  # every call comes here
    check_choice("gate", gate, GATE_NAMES)
    check_eps(eps)
    check_choice("restitute_to", restitute_to, RESTITUTE_TO)


def check_maps(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor (N, C, H, W)")
    _check_kind(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name}: got {x.dim()} dimensions {tuple(x.shape)}, expected four, (N, C, H, W)")
    if x.shape[2] * x.shape[3] < 2:
        raise ValueError(
            f"{name}: got planes of {x.shape[2]} x {x.shape[3]}, expected at least 2 elements: "
            "the variance of a single one says nothing; normalize before pooling to 1 x 1"
        )
    if x.shape[1] < 1:
        raise ValueError(f"{name}: got no channels in {tuple(x.shape)}, expected C >= 1")


def _check_kind(name: str, x: Tensor) -> None:
    """Raise TypeError for a tensor that isn't dense, or of a dtype that nothing here computes with."""
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name}: got {kind}, expected a dense tensor; convert with .to_dense()")
    if x.dtype not in shapes.DTYPES:
        raise TypeError(
            f"{name}: got dtype {x.dtype}, expected float32, float64, bfloat16 or float16; "
            "convert with .float()"
        )


def check_pair(visible: Tensor, infrared: Tensor) -> None:
    check_maps("visible", visible)
    check_maps("infrared", infrared)
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


def check_tensors(mode: str, gate: str, tensors: Sequence[Tensor]) -> None:
    """Raise for tensors that don't fit a block operation: its inputs, γ, β and the gate's parameters."""
    operation = OPERATIONS[mode]
    n = len(operation.inputs)
    if n == 2:
        check_pair(*tensors[:n])
    else:
        check_maps("features", tensors[0])
    norm_weight, norm_bias, *parameters = tensors[n:]
    check_parameters(tensors[0], norm_weight, norm_bias, parameters, gate, n, len(operation.gates))


def checked(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation written in Python, behind `check_tensors` where it is a block's forward."""
    for mode, block in OPERATIONS.items():
        if name == block.forward:
            return _checked_forward(mode, operation)
    return operation


def _checked_forward(mode: str, operation: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*arguments: Any) -> Any:
        given = OPERATIONS[mode].split(arguments)
        check_tensors(mode, FUSED[given.gate], given.tensors)
        return operation(*arguments)

    return forward


def check_parameters(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    gate: str,
    modalities: int,
    gates: int,
) -> None:
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
        if p.dtype != own:
            raise TypeError(
                f"parameters: got dtypes {own} and {p.dtype}, expected one dtype for all; "
                f"convert the block with .to({dtype})"
            )
    # Parameters in float32 serve maps of half precision.
    known = (dtype,) if dtype == torch.float64 else tuple(dict.fromkeys((dtype, torch.float32)))
    if own not in known:
        raise TypeError(
            f"parameters: got dtype {own} for features of {dtype}, expected {' or '.join(map(str, known))}; "
            f"convert the block with .to({dtype})"
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
    if GATES[gate].odd_width and width % 2 == 0:
        raise ValueError(f"gate_parameters of {gate!r}: got a kernel of {width}, expected an odd one")
    return [(gates, *shape) for shape in shapes]


def check_reduction(reduction: object) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(map(repr, REDUCTIONS))}")


def check_margin(margin: object) -> None:
    known = type(margin) is float or (isinstance(margin, Real) and not isinstance(margin, bool))
    if not known or not -math.inf < margin < math.inf:  # type: ignore[operator]
        raise ValueError(f"margin: got {margin!r}, expected a finite number")


def check_labels(name: str, labels: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}, expected an integer tensor (B,)")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name}: got dtype {labels.dtype}, expected integers; convert with .long()")
    if labels.dim() != 1 or labels.shape[0] == 0:
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, expected (B,) with B >= 1")
    return labels.long()


def check_features(
    features: Sequence[Tensor] | Tensor, labels: Tensor, infrared_labels: Tensor
) -> tuple[Tensor, ...]:
    tensors = (features,) if isinstance(features, Tensor) else tuple(features)
    if len(tensors) not in (1, len(SETS)) or not all(isinstance(f, Tensor) for f in tensors):
        raise TypeError(
            f"features: got {len(tensors)} of {', '.join(sorted({type(f).__name__ for f in tensors}))}, "
            "expected six tensors v, v+, v-, n-, n+, n or one that stacks them"
        )
    visible, infrared = labels.shape[0], infrared_labels.shape[0]
    rows = rows_of_sets(visible, infrared)
    if len(tensors) == 1:
        rows = [sum(rows)]
    first = tensors[0]
    _check_kind("features", first)
    dimensions, dtype, device = first.shape[-1:], first.dtype, first.device
    for f, expected in zip(tensors, rows, strict=True):
        shape = f.shape
        if len(shape) != 2 or shape[1:] != dimensions:
            raise ValueError(
                f"features: got shape {tuple(shape)}, expected (B, D), one D for all; pool the maps first"
            )
        if shape[0] != expected:
            both = visible == infrared and 2 * shape[0] == expected
            hint = "; pass one modality's labels, not those of both in one" if both else ""
            raise ValueError(
                f"features: got {shape[0]} rows for {visible} visible and {infrared} infrared labels, "
                f"expected {expected}{hint}"
            )
        if f.dtype != dtype:
            raise TypeError(
                f"features: got dtypes {dtype} and {f.dtype}, expected one dtype for all; "
                "convert with .float()"
            )
        if f.device != device:
            raise ValueError(f"features: got devices {device} and {f.device}, expected one")
    for name, other in (("labels", labels), ("infrared_labels", infrared_labels)):
        if other.device != device:
            raise ValueError(f"{name}: got device {other.device}, expected the features' {device}")
    return tensors
