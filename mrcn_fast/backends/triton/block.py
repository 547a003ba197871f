"""The block's operations in Triton: two launches forward, two backward.

The formulas are those of csrc/block/algebra.h, whose letters are used here. Forward, `statistics_kernel`
reads every plane once and `output_kernel` writes every set; backward, `sums_kernel` and `gradient_kernel`.
Between the launches of a pair stand only O(N·C) numbers. The gates' first layer needs every channel of a
sample: each program of a first launch leaves its own channels' share of it, and who needs the whole adds
the shares in the order of the blocks. So no program waits for another, nothing is added atomically, and the
results are the same bits on every run.

What the forward gives its backward is one row a sample (`shapes.saved_row`): mean and 1/σ of every plane,
and the gates' hidden layers.

Floating-point contraction is off at every launch: what to fuse would be chosen a kernel at a time, and
restitution alone has to give the bits that the pair gives. The kernels wait for memory, not for multiplying.
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
from mrcn_fast.backends.triton.block_backward import gradient_kernel, sums_kernel
from mrcn_fast.backends.triton.block_forward import output_kernel, statistics_kernel
from mrcn_fast.backends.triton.launching import Arguments, Launcher, on_device

MODES = shapes.MODES

# --- how the work is cut ----------------------------------------------------------------------------------


class Config(NamedTuple):
    """Channels and pixels of a tile, and of what a program takes."""

    channels: int  # a program of the first launches takes so many:
    pixels: int  # the statistics' in tiles of so many,
    warps: int
    ahead: int  # of which so many are read before one is waited for;
    sums_pixels: int  # the same of the sums', which read up to six maps
    sums_warps: int
    sums_ahead: int
    tile_channels: int  # a program of the second launches takes so many,
    tile_pixels: int  # in tiles of so many,
    chunk: int  # over so many pixels
    tile_warps: int


# Blocks a sample: every program of a second launch adds up the shares of all of them.
MOST_BLOCKS = 32
# The most channels, hidden numbers and weights of a tile of the gates' layers.
LAYER_CHANNELS, LAYER_HIDDEN, LAYER_WEIGHTS = 64, 32, 1024


def configure(channels: int, length: int, pixels: bool, element_size: int) -> Config:
    """The configuration of a shape class, after timings on an H200 at 16x64x72x32 and 16x256x72x32.

    The first launches wait for memory: where there are few programs, 8 warps took half the time of 4 (C = 64,
    channels_last), and so they read ahead. In the second launches every program makes its gates first, at a
    cost that grows with C²: at C = 256 it takes 576 pixels to make up for it, at C = 64 more programs of 64
    are better. Blocks of channels are as small as `MOST_BLOCKS` allows, but where a pixel's channels are
    contiguous 16, or 8 where there are few.

    It may depend neither on the mode nor on the batch: the order of a sum is part of the result.
    """
    double, few = element_size == 8, channels <= 64
    least = (4 if double else 8 if few else 16) if pixels else 4
    block = max(_power(-(-channels // MOST_BLOCKS)), min(least, _power(channels)))
    tile_channels = max(block, min(64, _power(channels))) if pixels else block
    warps = 8 if double or pixels or block > 32 else 4
    tile = 512 if double else 256 * warps
    sums_warps = 8 if double or (pixels and channels <= 128) or block > 32 else 4
    sums_tile = 512 if double else 1024
    second = 512 if double or (few and pixels and element_size == 2) else 1024 if few else 2048
    tile_warps = 8 if double or block > 32 or (element_size == 4 and not (few or pixels)) else 4
    tile_pixels = max(1, min(_power(length), second // tile_channels))
    enough = max(64, channels**2 // 128) if pixels else max(768, channels**2 // 32)
    chunk = -(-length // max(1, length // enough))
    return Config(
        channels=block,
        pixels=max(1, min(_power(length), tile // block)),
        warps=warps,
        ahead=4,
        sums_pixels=max(1, min(_power(length), sums_tile // block)),
        sums_warps=sums_warps,
        sums_ahead=2 if double or sums_warps == 4 else 4,
        tile_channels=tile_channels,
        tile_pixels=tile_pixels,
        chunk=-(-chunk // tile_pixels) * tile_pixels,
        tile_warps=tile_warps,
    )


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
    BLOCKS: int  # of channels, in the first launch
    PIXELS: bool  # channels_last
    BC: int  # channels of a tile
    BL: int  # pixels of a tile
    AHEAD: int  # tiles that a program of a first launch reads before it waits for any
    CHUNK: int  # pixels of a program
    PC: int  # channels of a program that makes the parameters' gradients
    EPS: float
    A: tl.dtype  # what is computed in

    @property
    def DOUBLE(self) -> bool:
        return tl.float64 == self.A

    @property
    def MODALITIES(self) -> int:
        return MODES[self.MODE].modalities

    @property
    def GATES(self) -> int:
        return MODES[self.MODE].gates

    @property
    def BRANCHES(self) -> int:
        return 2 if self.GATE == "cbam-channel" else 1

    @property
    def CONCAT(self) -> int:
        return 1 if self.MODE == "concat" else 0

    @property
    def PARTS(self) -> int:
        """Programs that share the gradients of a gate's layers."""
        return 1 if self.GATE == "eca" else -(-self.R // self.RB)

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


GATES = ("se", "eca", "cbam-channel")


class Plan(NamedTuple):
    """What follows from shapes and settings: the kernels with their constants, programs, lengths of rows."""

    statistics: Launcher
    output: Launcher
    sums: Launcher
    gradient: Launcher
    blocks: int  # programs of a first launch a sample (and modality),
    second_programs: int  # of a second launch that write pixels,
    parameter_programs: int  # and of the backward's, a call
    chunks: int
    saved_row: int  # numbers a sample that the forward leaves to its backward,
    forward_row: int  # and scratch of each
    backward_row: int


@functools.lru_cache(maxsize=1024)
def plan(
    mode: str,
    gate: str,
    to_input: bool,
    eps: float,
    hidden: int,
    channels: int,
    length: int,
    pixels: bool,
    dtype: torch.dtype,
) -> Plan:
    config = configure(channels, length, pixels, dtype.itemsize)
    blocks = -(-channels // config.channels)
    first = Constants(
        MODE=mode,
        GATE=gate,
        TO_INPUT=to_input,
        R=hidden,
        RB=min(LAYER_HIDDEN, _power(hidden), max(1, LAYER_WEIGHTS // config.channels)),
        BLOCKS=blocks,
        PIXELS=pixels,
        BC=config.channels,
        BL=config.sums_pixels,
        AHEAD=_reads_ahead(config, mode, gate),
        CHUNK=config.chunk,
        PC=min(LAYER_CHANNELS, _power(channels)),
        EPS=0.0,
        A=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    # The same kernel for every mode of as many modalities.
    alike = "pair" if first.MODALITIES == 2 else "restitute"
    statistics = replace(first, MODE=alike, TO_INPUT=False, EPS=eps, BL=config.pixels, AHEAD=config.ahead)
    second = replace(first, BC=config.tile_channels, BL=config.tile_pixels, AHEAD=1)
    chunks = -(-length // config.chunk)
    of_norm = first.MODALITIES * -(-channels // first.PC)
    of_gate = first.GATES * (1 if gate == "eca" else first.PARTS * -(-channels // first.PC))
    shares = 0 if gate == "eca" else blocks * first.GATES * hidden
    return Plan(
        _launcher(statistics_kernel, statistics, config.warps, lambda t, i, _: (*t[:7], *i)),
        _launcher(output_kernel, second, config.tile_warps, lambda t, i, n: (*t, *i, *n)),
        _launcher(sums_kernel, first, config.sums_warps, lambda t, i, n: (*t[:14], *i, n[0])),
        _launcher(gradient_kernel, second, config.tile_warps, lambda t, i, n: (*t[:11], *t[14:], *i, *n)),
        blocks,
        chunks * -(-channels // config.tile_channels),
        of_norm + of_gate,
        chunks,
        shapes.saved_row(mode, gate, hidden, channels),
        first.MODALITIES * channels + shares * first.BRANCHES,
        first.PLANES * channels + shares,
    )


def _reads_ahead(config: Config, mode: str, gate: str) -> int:
    """Tiles that the sums read at once, as many as registers allow: it decides no bit of the result."""
    if gate == "cbam-channel":  # carries the extremes too
        return min(2, config.sums_ahead)
    return config.sums_ahead if MODES[mode].modalities == 2 else 2 * config.sums_ahead


# --- launchers --------------------------------------------------------------------------------------------


def _launcher(kernel: Any, constants: Constants, warps: int, arrange: Callable[..., Any]) -> Launcher:
    return Launcher(kernel, (constants,), arrange, num_warps=warps, enable_fp_fusion=False)


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
    gate: str,
    eps: float,
    to_input: bool,
) -> Plan:
    if gate not in GATES:
        raise RuntimeError(f"gate: got {gate!r}, expected one of {', '.join(map(repr, GATES))}")
    _, channels, height, width = first.shape
    hidden = gate_parameters[0].shape[1]
    return plan(mode, gate, to_input, eps, hidden, channels, height * width, layout.pixels, first.dtype)


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
    gate: str,
    eps: float,
    to_input: bool = False,
) -> tuple[Tensor, ...]:
    """The made sets (concat: all six in one tensor), then what the backward needs of each sample."""
    first = inputs[0]
    layout = _layout(first.shape, first.stride())
    p = _plan_for(mode, first, layout, gate_parameters, gate, eps, to_input)
    samples, channels, height, width = first.shape
    modalities, _, sets = MODES[mode]
    count, batch = (1, 6 * samples) if mode == "concat" else (sets, samples)
    made = _empties_like(first, layout, batch, count)
    precise = shapes.precise(first.dtype)
    statistics = first.new_empty((samples, p.saved_row), dtype=precise)
    if samples == 0:
        return (*made, statistics)
    scratch = first.new_empty((samples, p.forward_row), dtype=precise)
    maps, strides = _in_layout([*inputs, *[None] * (2 - modalities)], layout.pixels)
    norm = norm_weight.contiguous(), norm_bias.contiguous()
    first_weight, *parameters = _contiguous(gate_parameters)
    given = Arguments(
        first.device,
        [*maps, *norm, first_weight, statistics, scratch, *parameters, *made, *[None] * (4 - count)],
        (*strides, channels, height * width, p.saved_row, p.forward_row),
        (samples, p.chunks),
    )
    with on_device(first.device):
        p.statistics(p.blocks * modalities * samples, given)
        p.output(p.second_programs * samples, given)
    return (*made, statistics)


def _backward(
    mode: str,
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    statistics: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: Sequence[Tensor],
    gate: str,
    to_input: bool = False,
) -> tuple[Any, ...]:
    """Gradients of the inputs, norm_weight, norm_bias and (a list) the gate's parameters."""
    first = inputs[0]
    layout = _layout(first.shape, first.stride())
    p = _plan_for(mode, first, layout, gate_parameters, gate, 0.0, to_input)
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
        (samples, p.chunks),
    )
    with on_device(first.device):
        if samples > 0:
            p.sums(p.blocks * samples, given)
        p.gradient(p.parameter_programs + p.second_programs * samples, given)
    return (*of_inputs, *of_norm, of_gate)


# --- operations -------------------------------------------------------------------------------------------

_FORWARD = "Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, str gate, float eps"
_BACKWARD = "Tensor statistics, Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, str gate"
_PAIR, _FLAG = "Tensor visible, Tensor infrared", "bool to_input"
_PAIR_GRADIENTS = (
    "Tensor? visible_restituted, Tensor? visible_compensated, Tensor? infrared_compensated, "
    "Tensor? infrared_restituted"
)
_SNR_GRADIENTS = "Tensor? restituted, Tensor? contaminated, Tensor? normalized"

# Those of csrc/registration.cpp, but for the shape of the statistics.
SCHEMAS = {
    "block_forward": f"({_PAIR}, {_FORWARD}, {_FLAG}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "block_backward": f"({_PAIR_GRADIENTS}, {_PAIR}, {_BACKWARD}, {_FLAG}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    "block_concat_forward": f"({_PAIR}, {_FORWARD}, {_FLAG}) -> (Tensor, Tensor)",
    "block_concat_backward": f"(Tensor? features, {_PAIR}, {_BACKWARD}, {_FLAG}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    "restitute_forward": f"(Tensor features, {_FORWARD}, {_FLAG}) -> (Tensor, Tensor)",
    "restitute_backward": f"(Tensor? restituted, Tensor features, {_BACKWARD}, {_FLAG}) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
    "snr_forward": f"(Tensor features, {_FORWARD}) -> (Tensor, Tensor, Tensor, Tensor)",
    "snr_backward": f"({_SNR_GRADIENTS}, Tensor features, {_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor[])",
}


def _forward_of(mode: str) -> Callable[..., Any]:
    count = MODES[mode].modalities

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        return _forward(mode, arguments[:count], *arguments[count:])

    return run


def _backward_of(mode: str) -> Callable[..., Any]:
    modalities, _, sets = MODES[mode]
    count = 1 if mode == "concat" else sets

    def run(*arguments: Any) -> tuple[Any, ...]:
        inputs = arguments[count : count + modalities]
        return _backward(mode, arguments[:count], inputs, *arguments[count + modalities :])

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
FAKES: dict[str, Callable[..., Any]] = {}
for _mode, _op in (("pair", "block"), ("concat", "block_concat"), ("restitute", "restitute"), ("snr", "snr")):
    _modalities, _, _sets = MODES[_mode]
    _count, _batches = (1, 6) if _mode == "concat" else (_sets, 1)
    IMPLEMENTATIONS[f"{_op}_forward"] = _forward_of(_mode)
    IMPLEMENTATIONS[f"{_op}_backward"] = _backward_of(_mode)
    FAKES[f"{_op}_forward"] = shapes.forward_fake(_count, _batches, shapes.saved_rows(_mode))
    FAKES[f"{_op}_backward"] = shapes.backward_fake(_count, _modalities)
