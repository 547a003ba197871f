"""The block's operations in Triton: from torch's tensors to three launches forward and three backward.

The formulas are those of csrc/block/formulas.h, whose letters the kernels use. Forward, `statistics_kernel`
reads every plane once and `output_kernel` writes every set; backward, `sums_kernel` and `gradient_kernel` do
the same. A small launch stands between the two, `gates_kernel` or `coefficients_kernel`: once per sample it
turns O(N·C) sums into what the last kernel multiplies and adds. A program of the last kernel therefore has
nothing to compute before its first pixel, and may be small.

A gate's first layer needs every channel of a sample. Where a program of the first launch has read whole
planes, it stores its channels' share of that layer, and whoever needs the layer adds the shares in the order
of the blocks. Where the pixels of a plane are split between programs too, one program of the small launch
joins the parts of all channels. So no program waits for another, nothing is added atomically, and the results
have the same bits on every run.

The forward saves one row per sample for the backward (`shapes.saved_row`): mean and 1/σ of every plane, and
the gates' hidden layers.

Floating-point contraction is off at every launch. The compiler would choose what to fuse for each kernel by
itself, but restitution alone has to give the bits that the pair gives. Where a fused multiply-add saves time,
the kernel asks for it (`fma`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrcn_fast.backends import shapes
from mrcn_fast.backends.triton.launch import Arguments, on_device
from mrcn_fast.backends.triton.plan import Call, Plan, plan
from mrcn_fast.gates import FUSED, MOST_PARAMETERS
from mrcn_fast.operations import OPERATIONS, Operation


class Layout(NamedTuple):
    """What the kernels need to know of a feature map's strides."""

    pixels: bool  # whether the kernels read a call whose first map this is as channels_last
    readable: tuple[bool, bool]  # whether it can be read as NCHW, and as channels_last
    pitch: tuple[int, int]  # elements from plane to plane, and from pixel to pixel
    dense: bool  # whether results in its layout have its strides


@functools.lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
    """Return the layout of such a map; remembered, because every call asks for it."""
    x = torch.empty_strided(shape, strides, device="meta")
    like = shapes.empties_like(x, shape[0], 1)[0]
    return Layout(
        pixels=shapes.reads_pixels(x),
        readable=(shapes.is_planes(x), shapes.is_pixels(x)),
        pitch=(x.stride(1), shapes.pixel_pitch(x)),
        dense=strides == like.stride() == torch.empty_like(x).stride(),
    )


def _plan_for(
    mode: str,
    first: Tensor,
    layout: Layout,
    gate_parameters: Sequence[Tensor],
    gate: int,
    eps: float,
    to_input: bool,
    given: tuple[bool, ...],
) -> Plan:
    """Return the plan of a call whose first input is ``first``."""
    _, channels, height, width = first.shape
    return plan(
        Call(
            mode=mode,
            gate=FUSED[gate],
            to_input=to_input,
            eps=eps,
            hidden=gate_parameters[0].shape[1],
            channels=channels,
            length=height * width,
            pixels=layout.pixels,
            dtype=first.dtype,
            given=given,
        )
    )


class Maps(NamedTuple):
    """Feature maps as the kernels read them; a map that a call does not have is None, with strides of 0."""

    tensors: tuple[Tensor | None, ...]
    strides: tuple[int, ...]  # from sample to sample
    pitches: tuple[
        int, ...
    ]  # from plane to plane, or from pixel to pixel where maps are read as channels_last


def _in_layout(maps: Sequence[Tensor | None], pixels: bool) -> Maps:
    """Return the maps as the kernels read them, with ``pixels`` as channels_last."""
    readable: list[Tensor | None] = []
    strides: list[int] = []
    pitches: list[int] = []
    known, layout = None, None  # the last map's: most maps of a call have the same strides
    for x in maps:
        if x is None:
            strides.append(0)
            pitches.append(0)
        else:
            given = x.stride()
            if layout is None or given != known:
                known, layout = given, _layout(x.shape, given)
            if layout.readable[pixels]:
                strides.append(given[0])
                pitches.append(layout.pitch[pixels])
            else:
                x = shapes.in_layout(x, pixels)
                strides.append(x.stride(0))
                pitches.append(_layout(x.shape, x.stride()).pitch[pixels])
        readable.append(x)
    return Maps(tuple(readable), tuple(strides), tuple(pitches))


def _empties_like(x: Tensor, layout: Layout, batch: int, number: int) -> list[Tensor]:
    """Return ``number`` dense tensors of ``batch`` samples in the layout of ``x``."""
    if layout.dense and batch == x.shape[0]:
        return [torch.empty_like(x) for _ in range(number)]
    return shapes.empties_like(x, batch, number)


def _padded(tensors: Sequence[Tensor | None], length: int) -> tuple[Tensor | None, ...]:
    """Return the tensors, followed by None up to ``length``."""
    return (*tensors, *[None] * (length - len(tensors)))


def _arguments(
    first: Tensor,
    maps: Maps,
    parameters: Sequence[Tensor],
    statistics: Tensor,
    scratch: Tensor,
    chunks: int,
    results: Mapping[str, Tensor],
    groups: Mapping[str, tuple[Tensor | None, ...]],
) -> Arguments:
    """Return the arguments of a direction's kernels.

    Args:
        first: The first input.
        maps: The maps that the kernels read.
        parameters: norm_weight, norm_bias and the gate's parameters.
        statistics: The rows that the forward saves.
        scratch: The rows that the launches leave to each other.
        chunks: How many programs of the last kernel share the pixels of a plane.
        results: The results that are a tensor each.
        groups: The results that are tuples of tensors.
    """
    gamma, beta, *of_gate = [q.contiguous() for q in parameters]
    samples, channels, height, width = first.shape
    return Arguments(
        first.device,
        {"scratch": scratch, **results},
        {
            "strides": maps.strides,
            "pitches": maps.pitches,
            "C": channels,
            "L": height * width,
            "saved_row": statistics.shape[1],
            "scratch_row": scratch.shape[1],
        },
        {"samples": samples, "chunks": chunks},
        {
            "maps": maps.tensors,
            "planes": (statistics, gamma, beta),
            "parameters": _padded(of_gate, MOST_PARAMETERS),
            **groups,
        },
    )


def forward(
    mode: str,
    inputs: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    gate: int,
    eps: float,
    to_input: bool = False,
) -> tuple[Tensor, ...]:
    """Return the sets that the operation makes (concat: all six in one tensor), then the saved rows."""
    first, operation = inputs[0], OPERATIONS[mode]
    layout = _layout(first.shape, first.stride())
    p = _plan_for(mode, first, layout, gate_parameters, gate, eps, to_input, operation.all_given())
    samples = first.shape[0]
    made = _empties_like(first, layout, operation.batches * samples, operation.results)
    precise = shapes.precise(first.dtype)
    statistics = first.new_empty((samples, p.saved_row), dtype=precise)
    if samples == 0:
        return (*made, statistics)
    scratch = first.new_empty((samples, p.forward_row), dtype=precise)
    maps = _in_layout(_padded(inputs, 2), layout.pixels)
    parameters = norm_weight, norm_bias, *gate_parameters
    groups = {"made": _padded(made, 4)}
    given = _arguments(first, maps, parameters, statistics, scratch, p.output_chunks, {}, groups)
    with on_device(first.device):
        p.statistics(p.programs.statistics * samples, given)
        p.gates(p.programs.gates * samples, given)
        p.output(p.programs.output * samples, given)
    return (*made, statistics)


def backward(
    mode: str,
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    statistics: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    gate: int,
    to_input: bool = False,
) -> tuple[Any, ...]:
    """Return the gradients of the inputs, norm_weight, norm_bias and the gate's parameters."""
    first = inputs[0]
    layout = _layout(first.shape, first.stride())
    present = tuple(g is not None for g in gradients)
    p = _plan_for(mode, first, layout, gate_parameters, gate, 0.0, to_input, present)
    samples = first.shape[0]
    of_inputs = _empties_like(first, layout, samples, len(inputs))
    of_weight, of_bias = shapes.dense_like(norm_weight), shapes.dense_like(norm_bias)
    of_gate = [shapes.dense_like(q) for q in gate_parameters]
    scratch = first.new_empty((samples, p.backward_row), dtype=statistics.dtype)
    if mode == "concat":  # one tensor holds every set's gradient
        gradients = [*gradients] * 4
    maps = _in_layout((*_padded(inputs, 2), *_padded(gradients, 4)), layout.pixels)
    parameters = norm_weight, norm_bias, *gate_parameters
    results = {"dgamma": of_weight, "dbeta": of_bias}
    groups = {"of_inputs": _padded(of_inputs, 2), "of_gate": _padded(of_gate, MOST_PARAMETERS)}
    given = _arguments(first, maps, parameters, statistics, scratch, p.gradient_chunks, results, groups)
    with on_device(first.device):
        if samples > 0:
            p.sums(p.programs.sums * samples, given)
            p.coefficients(p.programs.coefficients * samples, given)
        p.gradient(p.programs.parameters + p.programs.gradient * samples, given)
    return (*of_inputs, of_weight, of_bias, *of_gate, *shapes.no_gradients(norm_weight, gate_parameters))


# --- for torch --------------------------------------------------------------------------------------------


def _tensors(number: int) -> str:
    return ", ".join(["Tensor"] * number)


def _schemas_of(operation: Operation) -> tuple[str, str]:
    """Return the schemas of an operation's forward and backward, as csrc/schemas.h spells them."""
    inputs = ", ".join(f"Tensor {name}" for name in operation.inputs)
    results = ("features",) if operation.stacked else tuple(s.name for s in operation.sets)
    gradients = ", ".join(f"Tensor? {name}" for name in results)
    parameters = "Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, int gate"
    flag = ", bool to_input" if operation.restitutes else ""
    return (
        f"({inputs}, {parameters}, float eps{flag}) -> ({_tensors(operation.results + 1)})",
        f"({gradients}, {inputs}, Tensor statistics, {parameters}{flag}) "
        f"-> ({_tensors(len(operation.inputs) + 2 + MOST_PARAMETERS)})",
    )


def _forward_of(mode: str) -> Callable[..., Any]:
    """Return `forward` of one mode, with the arguments of its schema."""
    count = len(OPERATIONS[mode].inputs)

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        return forward(mode, arguments[:count], *arguments[count:])

    return run


def _backward_of(mode: str) -> Callable[..., Any]:
    """Return `backward` of one mode, with the arguments of its schema."""
    operation = OPERATIONS[mode]
    given, count = operation.results, len(operation.inputs)

    def run(*arguments: Any) -> tuple[Any, ...]:
        inputs = arguments[given : given + count]
        return backward(mode, arguments[:given], inputs, *arguments[given + count :])

    return run


SCHEMAS: dict[str, str] = {}
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
for _mode, _operation in OPERATIONS.items():
    _forward_name, _backward_name = f"{_operation.op}_forward", f"{_operation.op}_backward"
    SCHEMAS[_forward_name], SCHEMAS[_backward_name] = _schemas_of(_operation)
    IMPLEMENTATIONS[_forward_name] = _forward_of(_mode)
    IMPLEMENTATIONS[_backward_name] = _backward_of(_mode)
FAKES = shapes.block_fakes(shapes.saved_rows)
