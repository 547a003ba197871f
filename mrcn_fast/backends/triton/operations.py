"""The block's operations in Triton: three launches forward, three backward.

The formulas are those of csrc/block/formulas.h, whose letters are used here. Forward, `statistics_kernel`
reads every plane once and `output_kernel` writes every set; backward, `sums_kernel` and `gradient_kernel`.
Between the two stands a small launch, `gates_kernel` or `coefficients_kernel`: it makes of O(N·C) sums what
the last one multiplies and adds, once a sample, so that a program of the last one has nothing to do before
its first pixel and may be small.

A gate's first layer needs every channel of a sample. Where a program of the first launch has read whole
planes, it leaves its channels' share of that layer, and who needs the whole adds the shares in the order of
the blocks. Where the pixels of a plane are shared out too, one program of the small launch joins the parts of
all channels. So no program waits for another, nothing is added atomically, and the results are the same bits
on every run.

What the forward gives its backward is one row a sample (`shapes.saved_row`): mean and 1/σ of every plane,
and the gates' hidden layers.

Floating-point contraction is off at every launch: what to fuse would be chosen a kernel at a time, and
restitution alone has to give the bits that the pair gives. Where it saves time it is written down (`fma`).
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
from mrcn_fast.operations import OPERATIONS


class Layout(NamedTuple):
    """What strides say of a feature map: found out once, not at every call."""

    pixels: bool  # the kernels read a call whose first map it is as channels_last
    readable: tuple[bool, bool]  # as NCHW, as channels_last
    pitch: tuple[int, int]  # between planes, between pixels
    dense: bool  # results beside it have its strides


@functools.lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
    x = torch.empty_strided(shape, strides, device="meta")
    like = shapes.empties_like(x, shape[0], 1)[0]
    return Layout(
        shapes.reads_pixels(x),
        (shapes.is_planes(x), shapes.is_pixels(x)),
        (x.stride(1), shapes.pixel_pitch(x)),
        strides == like.stride() == torch.empty_like(x).stride(),
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
    _, channels, height, width = first.shape
    hidden = gate_parameters[0].shape[1]
    length = height * width
    settings = (mode, FUSED[gate], to_input, eps)
    return plan(Call(*settings, hidden, channels, length, layout.pixels, first.dtype, given))


def _in_layout(maps: Sequence[Tensor | None], pixels: bool) -> tuple[list[Tensor | None], list[int]]:
    """Maps as the kernels take them, and two strides of each: the sample's, the plane's or the pixel's."""
    readable: list[Tensor | None] = []
    strides: list[int] = []
    for x in maps:
        if x is None:
            strides += 0, 0
        else:
            given = x.stride()
            layout = _layout(x.shape, given)
            if not layout.readable[pixels]:
                x = shapes.in_layout(x, pixels)
                given = x.stride()
                layout = _layout(x.shape, given)
            strides += given[0], layout.pitch[pixels]
        readable.append(x)
    return readable, strides


def _empties_like(x: Tensor, layout: Layout, batch: int, number: int) -> list[Tensor]:
    if layout.dense and batch == x.shape[0]:
        return [torch.empty_like(x) for _ in range(number)]
    return shapes.empties_like(x, batch, number)


def _contiguous(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """A gate's parameters, contiguous, and None for those that it does not have."""
    return [*[p.contiguous() for p in parameters], *[None] * (4 - len(parameters))]


def _forward(
    mode: str,
    inputs: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    gate: int,
    eps: float,
    to_input: bool = False,
) -> tuple[Tensor, ...]:
    """The made sets (concat: all six in one tensor), then what the backward needs of each sample."""
    first = inputs[0]
    layout = _layout(first.shape, first.stride())
    p = _plan_for(mode, first, layout, gate_parameters, gate, eps, to_input, OPERATIONS[mode].all_given())
    samples, channels, height, width = first.shape
    operation = OPERATIONS[mode]
    made = _empties_like(first, layout, operation.batches * samples, operation.results)
    precise = shapes.precise(first.dtype)
    statistics = first.new_empty((samples, p.saved_row), dtype=precise)
    if samples == 0:
        return (*made, statistics)
    scratch = first.new_empty((samples, p.forward_row), dtype=precise)
    maps, strides = _in_layout([*inputs, *[None] * (2 - len(inputs))], layout.pixels)
    norm = norm_weight.contiguous(), norm_bias.contiguous()
    first_weight, *parameters = _contiguous(gate_parameters)
    given = Arguments(
        first.device,
        [*maps, *norm, first_weight, statistics, scratch, *parameters, *made, *[None] * (4 - len(made))],
        (*strides, channels, height * width, p.saved_row, p.forward_row),
        (samples, p.output_chunks),
    )
    with on_device(first.device):
        p.statistics(p.programs.statistics * samples, given)
        p.gates(p.programs.gates * samples, given)
        p.output(p.programs.output * samples, given)
    return (*made, statistics)


def _backward(
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
    """Gradients of the inputs, norm_weight, norm_bias and the gate's parameters."""
    first = inputs[0]
    layout = _layout(first.shape, first.stride())
    present = tuple(g is not None for g in gradients)
    p = _plan_for(mode, first, layout, gate_parameters, gate, 0.0, to_input, present)
    samples, channels, height, width = first.shape
    of_inputs = _empties_like(first, layout, samples, len(inputs))
    of_norm = [shapes.dense_like(q) for q in (norm_weight, norm_bias)]
    of_gate = [shapes.dense_like(q) for q in gate_parameters]
    scratch = first.new_empty((samples, p.backward_row), dtype=statistics.dtype)
    if mode == "concat":  # one tensor holds every set's
        gradients = [*gradients] * 4
    absent = [None] * (2 - len(inputs))
    maps, strides = _in_layout([*inputs, *absent, *gradients, *[None] * (4 - len(gradients))], layout.pixels)
    norm = norm_weight.contiguous(), norm_bias.contiguous()
    first_weight, *parameters = _contiguous(gate_parameters)
    made = [*of_inputs, *absent, *of_norm, *of_gate, *[None] * (4 - len(of_gate))]
    given = Arguments(
        first.device,
        [*maps, *norm, first_weight, statistics, scratch, *parameters, *made],
        (*strides, channels, height * width, p.saved_row, p.backward_row),
        (samples, p.gradient_chunks),
    )
    with on_device(first.device):
        if samples > 0:
            p.sums(p.programs.sums * samples, given)
            p.coefficients(p.programs.coefficients * samples, given)
        p.gradient(p.programs.parameters + p.programs.gradient * samples, given)
    return (*of_inputs, *of_norm, *of_gate, *shapes.no_gradients(norm_weight, gate_parameters))


# --- operations -------------------------------------------------------------------------------------------

_FORWARD = "Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, int gate, float eps"
_BACKWARD = "Tensor statistics, Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, int gate"
_PAIR, _FLAG = "Tensor visible, Tensor infrared", "bool to_input"
_PAIR_GRADIENTS = (
    "Tensor? visible_restituted, Tensor? visible_compensated, Tensor? infrared_compensated, "
    "Tensor? infrared_restituted"
)
_SNR_GRADIENTS = "Tensor? restituted, Tensor? contaminated, Tensor? normalized"

_PARAMETERS = ", ".join(["Tensor"] * (2 + MOST_PARAMETERS))

# Those of csrc/schemas.h.
SCHEMAS = {
    "block_forward": f"({_PAIR}, {_FORWARD}, {_FLAG}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "block_backward": f"({_PAIR_GRADIENTS}, {_PAIR}, {_BACKWARD}, {_FLAG}) "
    f"-> (Tensor, Tensor, {_PARAMETERS})",
    "block_concat_forward": f"({_PAIR}, {_FORWARD}, {_FLAG}) -> (Tensor, Tensor)",
    "block_concat_backward": f"(Tensor? features, {_PAIR}, {_BACKWARD}, {_FLAG}) "
    f"-> (Tensor, Tensor, {_PARAMETERS})",
    "restitute_forward": f"(Tensor features, {_FORWARD}, {_FLAG}) -> (Tensor, Tensor)",
    "restitute_backward": f"(Tensor? restituted, Tensor features, {_BACKWARD}, {_FLAG}) "
    f"-> (Tensor, {_PARAMETERS})",
    "snr_forward": f"(Tensor features, {_FORWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    "snr_backward": f"({_SNR_GRADIENTS}, Tensor features, {_BACKWARD}) -> (Tensor, {_PARAMETERS})",
}


def _forward_of(mode: str) -> Callable[..., Any]:
    count = len(OPERATIONS[mode].inputs)

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        return _forward(mode, arguments[:count], *arguments[count:])

    return run


def _backward_of(mode: str) -> Callable[..., Any]:
    operation = OPERATIONS[mode]
    given, count = operation.results, len(operation.inputs)

    def run(*arguments: Any) -> tuple[Any, ...]:
        inputs = arguments[given : given + count]
        return _backward(mode, arguments[:given], inputs, *arguments[given + count :])

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
for _mode, _operation in OPERATIONS.items():
    IMPLEMENTATIONS[f"{_operation.op}_forward"] = _forward_of(_mode)
    IMPLEMENTATIONS[f"{_operation.op}_backward"] = _backward_of(_mode)
FAKES = shapes.block_fakes(shapes.saved_rows)
