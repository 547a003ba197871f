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
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mrcn_fast.backends import shapes
from mrcn_fast.backends.triton.block_backward import (
    coefficients_kernel,
    gradient_kernel,
    sums_kernel,
)
from mrcn_fast.backends.triton.block_forward import gates_kernel, output_kernel, statistics_kernel
from mrcn_fast.backends.triton.launch import Arguments, Launcher, on_device
from mrcn_fast.gates import FUSED, MOST_PARAMETERS
from mrcn_fast.operations import OPERATIONS

# --- how the work is cut ----------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What a program takes: so many channels by `span` pixels, in tiles of `pixels`."""

    channels: int
    span: int
    pixels: int
    warps: int
    ahead: int = 1  # tiles that are read before one is waited for


class Config(NamedTuple):
    """The launches, forward and backward. Those between work on channels alone."""

    statistics: Tile
    gates: Tile
    output: Tile
    sums: Tile
    coefficients: Tile
    gradient: Tile


# Up to so many channels one program joins the parts of a sample's planes.
MOST_JOINED = 256
# Blocks of channels a sample, whose shares are added up; parts of its planes, which are joined, as numbers
# of one kind: up to eight of them stand in the registers of a program.
MOST_BLOCKS, MOST_PARTS = 64, 4096
# The most channels and hidden numbers of a tile of the gates' layers, and its weights a warp.
LAYER_CHANNELS, LAYER_HIDDEN, LAYER_WEIGHTS = 32, 32, 512


def configure(channels: int, length: int, pixels: bool, element_size: int) -> Config:
    """The configuration of a shape class.

    It may depend neither on the mode nor on the batch: the order of a sum is part of the result.
    """
    few, joins = channels <= 64, channels <= MOST_JOINED
    line = 16 // element_size  # elements that a thread reads at once
    least = max(_power(-(-channels // MOST_BLOCKS)), 64 if channels > 1024 else 1)
    if pixels:
        # The 128 bytes of a cache line, half of them where more programs are needed.
        block = min(max(least, 8 * line if joins else 4 * line), _power(channels))
        wide = min(64, _power(channels))
        span = _span(length, 128 if few else 576 * 64 // block, channels) if joins else length
        statistics = Tile(block, span, max(1, 128 * line // block), 4, 4)
        sums = Tile(block, span, max(1, 64 * line // block), 4, 4)
        output = Tile(wide, 128, max(1, 512 // wide), 4, 4 if line == 8 else 2)
        gradient = Tile(wide, 128, max(1, 512 // wide), 4, 2)
    else:
        span = _span(length, 4096, channels) if joins else length
        block = min(max(least, 8 if few or line == 4 else 16), _power(channels))
        warps = 8 if few or line != 4 else 4
        statistics = Tile(block, span, _fitting(span, 256 * warps // block), warps, 4)
        block = min(max(least, 4 if few else 16), _power(channels))
        warps = 8 if line == 2 else 4
        sums = Tile(block, span, _fitting(span, (512 if line == 2 else 1024) // block), warps, 2)
        tile = 256 * min(4, line)
        last = _fitting(length, tile // 2)
        planes = min(_power(channels), max(1, tile // last))
        output = Tile(planes, _share(length, 1024), last, 4, 2)
        last = _fitting(length, tile // 4)
        planes = min(_power(channels), max(1, tile // last))
        gradient = Tile(planes, _share(length, 1024), last, 4)
    whole = Tile(_power(channels), 0, 0, 8)
    group = Tile(min(64, _power(channels)), 0, 0, 4)
    return Config(
        statistics,
        whole if statistics.span < length else group,
        output,
        sums,
        whole if sums.span < length else group,
        gradient,
    )


def _span(length: int, at_least: int, channels: int) -> int:
    """Pixels of a part, of which there are as many as `MOST_PARTS` allows."""
    return min(length, max(at_least, -(-length // (MOST_PARTS // _power(channels)))))


def _share(length: int, most: int) -> int:
    """The length in equal shares of at most so many."""
    return -(-length // -(-length // most))


def _fitting(length: int, most: int) -> int:
    """The largest power of two up to `most` whose multiples cover the length with little beyond it."""
    fitting = max(1, most)
    while fitting > 16 and -(-length // fitting) * fitting > 1.125 * length:
        fitting //= 2
    return fitting


def _power(n: int) -> int:
    """The power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for, in its words."""

    MODE: str
    GATE: str
    TO_INPUT: bool
    R: int  # width of the gates' hidden layer (SE, CBAM) or of their kernel (ECA)
    RB: int  # of which a tile holds so many
    BLOCKS: int  # of channels, whose shares of the hidden layers are added up
    PARTS: int  # of the pixels, in the first launch
    PART: int  # pixels of a part
    PIXELS: bool  # channels_last
    BC: int  # channels of a tile
    BL: int  # pixels of a tile
    AHEAD: int  # tiles that a program reads before it waits for any
    CHUNK: int  # pixels of a program of the last launch
    PC: int  # channels of a program that makes the parameters' gradients
    BESIDE: int  # samples that it reads before it waits for any
    EPS: float
    GIVEN: tuple[bool, ...]  # which results of the forward have a gradient
    A: tl.dtype  # what is computed in

    @property
    def DOUBLE(self) -> bool:
        return tl.float64 == self.A

    @property
    def MODALITIES(self) -> int:
        return len(OPERATIONS[self.MODE].inputs)

    @property
    def GATES(self) -> int:
        return len(OPERATIONS[self.MODE].gates)

    @property
    def SETS(self) -> int:
        return len(OPERATIONS[self.MODE].sets)

    @property
    def USED_INPUTS(self) -> int:
        """Bits of the inputs that a set with a gradient was made of."""
        used, _ = OPERATIONS[self.MODE].used_by(self.GIVEN)
        return sum(1 << j for j, is_used in enumerate(used) if is_used)

    @property
    def USED_GATES(self) -> int:
        """Bits of the gates that a set with a gradient was made by."""
        operation = OPERATIONS[self.MODE]
        made = {s.gate for s in operation.given_sets(self.GIVEN)} - {None}
        return sum(1 << gate for gate in made if gate is not None)

    @property
    def BRANCHES(self) -> int:
        return 2 if self.GATE == "cbam-channel" else 1

    @property
    def CONCAT(self) -> int:
        return 1 if self.MODE == "concat" else 0

    @property
    def HIDDEN(self) -> int:
        """Width of a gate's hidden layer, if it has one."""
        return 0 if self.GATE == "eca" else self.R

    @property
    def LAYER_PARTS(self) -> int:
        """Programs that share the gradients of a gate's layers."""
        return 1 if self.GATE == "eca" else -(-self.R // self.RB)

    @property
    def MOMENTS(self) -> int:
        """Numbers of a part of a plane."""
        return 2 * self.BRANCHES

    @property
    def OUTPUT_SLOTS(self) -> int:
        """Planes of the output's table."""
        return 3 * self.MODALITIES + 2 * self.SETS

    @property
    def SUMS(self) -> int:
        """Numbers of a part of a plane in the backward."""
        return (2 if self.MODE == "restitute" else 6) + 2 * (self.BRANCHES - 1)

    @property
    def GRADIENT_SLOTS(self) -> int:
        """Planes of the gradients' table."""
        return 6 * self.MODALITIES + self.SETS + 2 * self.MODALITIES * (self.BRANCHES - 1)

    @property
    def BEFORE(self) -> int:
        """Which plane of the backward's scratch is the first gradient before a sigmoid."""
        return 2 * self.MODALITIES + self.GATES

    @property
    def EXTREME(self) -> int:
        """Which plane of the backward's scratch is the first extreme."""
        return self.BEFORE + self.GATES

    @property
    def PLANES(self) -> int:
        """Planes of the backward's scratch."""
        return self.EXTREME + (2 * self.MODALITIES if self.BRANCHES == 2 else 0)


class Call(NamedTuple):
    """What a plan depends on."""

    mode: str
    gate: str
    to_input: bool
    eps: float
    hidden: int
    channels: int
    length: int
    pixels: bool
    dtype: torch.dtype
    given: tuple[bool, ...]  # which results of the forward have a gradient

    def blocks(self, of: int) -> int:
        """Blocks of so many channels."""
        return -(-self.channels // of)

    def parts(self, of: int) -> int:
        """Parts of so many pixels."""
        return -(-self.length // of)


class Programs(NamedTuple):
    """Of a sample; those that make the parameters' gradients of a call."""

    statistics: int
    gates: int
    output: int
    sums: int
    coefficients: int
    gradient: int
    parameters: int


class Plan(NamedTuple):
    """What follows from shapes and settings: the kernels with their constants, programs, lengths of rows."""

    statistics: Launcher
    gates: Launcher
    output: Launcher
    sums: Launcher
    coefficients: Launcher
    gradient: Launcher
    programs: Programs
    output_chunks: int
    gradient_chunks: int
    saved_row: int  # numbers a sample that the forward leaves to its backward,
    forward_row: int  # and scratch of each
    backward_row: int


@functools.lru_cache(maxsize=1024)
def plan(call: Call) -> Plan:
    config = configure(call.channels, call.length, call.pixels, call.dtype.itemsize)
    statistics = replace(
        _constants(call, config.statistics, config.statistics),
        # The same kernel for every mode of as many modalities.
        MODE="pair" if len(OPERATIONS[call.mode].inputs) == 2 else "restitute",
        TO_INPUT=False,
        AHEAD=_reads_ahead(config.statistics, call.gate),
    )
    gates = _constants(call, config.gates, config.statistics)
    output = _constants(call, config.output, config.statistics)
    sums = replace(_constants(call, config.sums, config.sums), AHEAD=_reads_ahead(config.sums, call.gate))
    coefficients = _constants(call, config.coefficients, config.sums)
    gradient = replace(
        _constants(call, config.gradient, config.sums),
        RB=_hidden_tile(call, LAYER_WEIGHTS // 4 * config.gradient.warps // LAYER_CHANNELS),
    )
    return Plan(
        _launcher(statistics_kernel, statistics, config.statistics, lambda t, i, _: (*t[:7], *i)),
        _launcher(gates_kernel, gates, config.gates, lambda t, i, _: (*t[2:10], *i[4:])),
        _launcher(
            output_kernel, output, config.output, lambda t, i, n: (*t[:2], t[6], *t[10:], *i[:6], i[7], *n)
        ),
        _launcher(sums_kernel, sums, config.sums, lambda t, i, n: (*t[:14], *i, n[0])),
        _launcher(
            coefficients_kernel, coefficients, config.coefficients, lambda t, i, _: (*t[6:14], *i[12:])
        ),
        _launcher(gradient_kernel, gradient, config.gradient, lambda t, i, n: (*t[:11], *t[14:], *i, *n)),
        _programs(call, config, gradient),
        call.parts(config.output.span),
        call.parts(config.gradient.span),
        shapes.saved_row(call.mode, call.gate, call.hidden, call.channels),
        _forward_row(gates, call.channels),
        _backward_row(coefficients, call.channels),
    )


def _constants(call: Call, tile: Tile, first: Tile) -> Constants:
    """Of a launch with this tile, whose direction begins with a launch with the tile `first`."""
    parts = call.parts(first.span)
    double = call.dtype == torch.float64
    return Constants(
        MODE=call.mode,
        GATE=call.gate,
        TO_INPUT=call.to_input,
        R=call.hidden,
        RB=_hidden_tile(call, LAYER_WEIGHTS * tile.warps // tile.channels),
        BLOCKS=1 if parts > 1 else call.blocks(first.channels),
        PARTS=parts,
        PART=first.span,
        PIXELS=call.pixels,
        BC=tile.channels,
        BL=tile.pixels,
        AHEAD=tile.ahead,
        CHUNK=tile.span,
        PC=min(LAYER_CHANNELS, _power(call.channels)),
        BESIDE=1 if double else 4,
        EPS=call.eps,
        GIVEN=call.given,
        A=tl.float64 if double else tl.float32,
    )


def _hidden_tile(call: Call, most: int) -> int:
    return max(1, min(LAYER_HIDDEN, _power(call.hidden), most))


def _reads_ahead(tile: Tile, gate: str) -> int:
    """Tiles that a first launch reads at once, as many as registers allow beside what CBAM carries on."""
    return max(1, tile.ahead // 2) if gate == "cbam-channel" else tile.ahead


def _programs(call: Call, config: Config, gradient: Constants) -> Programs:
    modalities = len(OPERATIONS[call.mode].inputs)
    layers = call.blocks(gradient.PC)
    of_gate = 1 if call.gate == "eca" else gradient.LAYER_PARTS * layers

    def over_pixels(tile: Tile) -> int:
        return call.blocks(tile.channels) * call.parts(tile.span)

    return Programs(
        modalities * over_pixels(config.statistics),
        modalities * call.blocks(config.gates.channels),
        over_pixels(config.output),
        over_pixels(config.sums),
        modalities * call.blocks(config.coefficients.channels),
        over_pixels(config.gradient),
        modalities * layers + gradient.GATES * of_gate,
    )


def _forward_row(k: Constants, channels: int) -> int:
    """Numbers of a sample's scratch: see block_forward.py."""
    shares = k.BLOCKS * k.GATES * k.BRANCHES * k.HIDDEN
    parts = k.PARTS * k.MODALITIES * k.MOMENTS if k.PARTS > 1 else 0
    return (k.OUTPUT_SLOTS + k.MODALITIES + parts) * channels + shares


def _backward_row(k: Constants, channels: int) -> int:
    """Numbers of a sample's scratch: see block_backward.py."""
    hidden = (k.BLOCKS + k.BRANCHES) * k.GATES * k.HIDDEN
    parts = k.PARTS * k.MODALITIES * k.SUMS if k.PARTS > 1 else 0
    return (k.GRADIENT_SLOTS + k.PLANES + parts) * channels + hidden


# --- launchers --------------------------------------------------------------------------------------------


def _launcher(kernel: Any, constants: Constants, tile: Tile, arrange: Callable[..., Any]) -> Launcher:
    return Launcher(kernel, (constants,), arrange, num_warps=tile.warps, enable_fp_fusion=False)


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
