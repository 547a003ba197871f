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
from collections.abc import Callable, Sequence
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


def _in_layout(maps: Sequence[Tensor | None], pixels: bool) -> tuple[list[Tensor | None], list[int]]:
    """Return the maps as the kernels read them, and two strides of each.

    The strides go from sample to sample, and from plane to plane or with ``pixels`` from pixel to pixel.
    """
    readable: list[Tensor | None] = []
    strides: list[int] = []
    known, layout = None, None  # the last map's: most maps of a call have the same strides
    for x in maps:
        if x is None:
            strides += 0, 0
        else:
            given = x.stride()
            if layout is None or given != known:
                known, layout = given, _layout(x.shape, given)
            if layout.readable[pixels]:
                strides += given[0], layout.pitch[pixels]
            else:
                x = shapes.in_layout(x, pixels)
                strides += x.stride(0), _layout(x.shape, x.stride()).pitch[pixels]
        readable.append(x)
    return readable, strides


def _empties_like(x: Tensor, layout: Layout, batch: int, number: int) -> list[Tensor]:
    """Return ``number`` dense tensors of ``batch`` samples in the layout of ``x``."""
    if layout.dense and batch == x.shape[0]:
        return [torch.empty_like(x) for _ in range(number)]
    return shapes.empties_like(x, batch, number)


def _padded(tensors: Sequence[Tensor], length: int) -> list[Tensor | None]:
    """Return the tensors, followed by None up to ``length``."""
    return [*tensors, *[None] * (length - len(tensors))]


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
    samples, channels, height, width = first.shape
    made = _empties_like(first, layout, operation.batches * samples, operation.results)
    precise = shapes.precise(first.dtype)
    statistics = first.new_empty((samples, p.saved_row), dtype=precise)
    if samples == 0:
        return (*made, statistics)
    scratch = first.new_empty((samples, p.forward_row), dtype=precise)
    (x0, x1), strides = _in_layout(_padded(inputs, 2), layout.pixels)
    x0_sample, x0_pitch, x1_sample, x1_pitch = strides
    p0, p1, p2, p3 = _padded([q.contiguous() for q in gate_parameters], 4)
    y0, y1, y2, y3 = _padded(made, 4)
    gamma, beta = norm_weight.contiguous(), norm_bias.contiguous()
    given = Arguments(
        first.device,
        {
            "x0": x0, "x1": x1, "gamma": gamma, "beta": beta, "p0": p0, "p1": p1, "p2": p2, "p3": p3,
            "statistics": statistics, "scratch": scratch, "y0": y0, "y1": y1, "y2": y2, "y3": y3,
        },
        {
            "x0_sample": x0_sample, "x0_pitch": x0_pitch, "x1_sample": x1_sample, "x1_pitch": x1_pitch,
            "C": channels, "L": height * width, "saved_row": p.saved_row, "scratch_row": p.forward_row,
        },
        {"samples": samples, "chunks": p.output_chunks},
    )  # fmt: skip
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
    samples, channels, height, width = first.shape
    of_inputs = _empties_like(first, layout, samples, len(inputs))
    of_weight, of_bias = shapes.dense_like(norm_weight), shapes.dense_like(norm_bias)
    of_gate = [shapes.dense_like(q) for q in gate_parameters]
    scratch = first.new_empty((samples, p.backward_row), dtype=statistics.dtype)
    if mode == "concat":  # one tensor holds every set's gradient
        gradients = [*gradients] * 4
    maps = [*_padded(inputs, 2), *gradients, *[None] * (4 - len(gradients))]
    (x0, x1, g0, g1, g2, g3), strides = _in_layout(maps, layout.pixels)
    x0_sample, x0_pitch, x1_sample, x1_pitch, g0_sample, g0_pitch, *strides = strides
    g1_sample, g1_pitch, g2_sample, g2_pitch, g3_sample, g3_pitch = strides
    p0, p1, p2, p3 = _padded([q.contiguous() for q in gate_parameters], 4)
    dx0, dx1 = _padded(of_inputs, 2)
    d0, d1, d2, d3 = _padded(of_gate, 4)
    gamma, beta = norm_weight.contiguous(), norm_bias.contiguous()
    given = Arguments(
        first.device,
        {
            "x0": x0, "x1": x1, "g0": g0, "g1": g1, "g2": g2, "g3": g3, "gamma": gamma, "beta": beta,
            "p0": p0, "p1": p1, "p2": p2, "p3": p3, "statistics": statistics, "scratch": scratch,
            "dx0": dx0, "dx1": dx1, "dgamma": of_weight, "dbeta": of_bias,
            "d0": d0, "d1": d1, "d2": d2, "d3": d3,
        },
        {
            "x0_sample": x0_sample, "x0_pitch": x0_pitch, "x1_sample": x1_sample, "x1_pitch": x1_pitch,
            "g0_sample": g0_sample, "g0_pitch": g0_pitch, "g1_sample": g1_sample, "g1_pitch": g1_pitch,
            "g2_sample": g2_sample, "g2_pitch": g2_pitch, "g3_sample": g3_sample, "g3_pitch": g3_pitch,
            "C": channels, "L": height * width, "saved_row": p.saved_row, "scratch_row": p.backward_row,
        },
        {"samples": samples, "chunks": p.gradient_chunks},
    )  # fmt: skip
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
