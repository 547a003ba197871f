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
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mrcn_fast.backends import shapes
from mrcn_fast.backends.triton.block_backward import gradient_kernel, sums_kernel
from mrcn_fast.backends.triton.block_forward import output_kernel, statistics_kernel

MODES = shapes.MODES

# --- how the work is cut ----------------------------------------------------------------------------------


class Config(NamedTuple):
    """Channels and pixels of a tile, and of what a program takes."""

    channels: int  # a program of the first launches takes so many,
    pixels: int  # in tiles of so many
    tile_channels: int  # a program of the second launches,
    tile_pixels: int
    chunk: int  # over so many pixels
    warps: int


# Blocks a sample: every program of a second launch adds up the shares of all of them.
MOST_BLOCKS = 32
# The most channels, hidden numbers and weights of a tile of the gates' layers.
LAYER_CHANNELS, LAYER_HIDDEN, LAYER_WEIGHTS = 64, 32, 1024


def configure(channels: int, length: int, pixels: bool, element_size: int) -> Config:
    """The configuration of a shape class: no measurement stands behind it yet.

    It may not depend on the mode: the order of a sum is part of the result. A tile is 8 elements a thread
    (the ten sums of the backward are carried by every lane), in float64 half as many; also where the second
    launches would hold every coefficient of 8 channels a thread. Blocks of channels are as small as
    `MOST_BLOCKS` allows, but where a pixel's channels are contiguous at least the 32 bytes that memory gives
    at once.
    """
    tile = 512 if element_size == 8 else 1024
    second = 512 if pixels and element_size == 2 else tile
    least = 32 // element_size if pixels else 4
    block = max(_power(-(-channels // MOST_BLOCKS)), min(least, _power(channels)))
    tile_channels = max(block, min(64, _power(channels))) if pixels else block
    tile_pixels = max(1, second // tile_channels)
    return Config(
        channels=block,
        pixels=max(1, min(_power(length), tile // block)),
        tile_channels=tile_channels,
        tile_pixels=min(_power(length), tile_pixels),
        chunk=8 * tile_pixels,
        warps=8 if element_size == 8 or block > 32 else 4,
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
    """What follows from shapes and settings: the kernels' constants, programs, lengths of rows."""

    statistics: Constants
    first: Constants
    second: Constants
    second_programs: int  # that write pixels
    parameter_programs: int  # a call
    chunks: int
    saved_row: int  # numbers a sample that the forward leaves to its backward,
    forward_row: int  # and scratch of each
    backward_row: int
    warps: int


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
        BL=config.pixels,
        CHUNK=config.chunk,
        PC=min(LAYER_CHANNELS, _power(channels)),
        EPS=0.0,
        A=tl.float64 if dtype == torch.float64 else tl.float32,
    )
    # The same kernel for every mode of as many modalities.
    alike = "pair" if first.MODALITIES == 2 else "restitute"
    statistics = replace(first, MODE=alike, TO_INPUT=False, EPS=eps)
    second = replace(first, BC=config.tile_channels, BL=config.tile_pixels)
    chunks = -(-length // config.chunk)
    of_norm = first.MODALITIES * -(-channels // first.PC)
    of_gate = first.GATES * (1 if gate == "eca" else first.PARTS * -(-channels // first.PC))
    shares = 0 if gate == "eca" else blocks * first.GATES * hidden
    return Plan(
        statistics,
        first,
        second,
        chunks * -(-channels // config.tile_channels),
        of_norm + of_gate,
        chunks,
        shapes.saved_row(mode, gate, hidden, channels),
        first.MODALITIES * channels + shares * first.BRANCHES,
        first.PLANES * channels + shares,
        config.warps,
    )


# --- launchers --------------------------------------------------------------------------------------------


def _launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: Sequence[Any],
    constants: Constants,
    warps: int,
) -> None:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, constants, num_warps=warps, enable_fp_fusion=False)
    else:
        kernel[(programs,)](*arguments, constants, num_warps=warps, enable_fp_fusion=False)


NO_MAP = (None, 0, 0)


def _strided(x: Tensor | None, pixels: bool) -> tuple[Tensor | None, int, int]:
    """``x`` as the kernels take it, with strides: the sample's, the plane's or (pixels) the pixel's."""
    if x is None:
        return NO_MAP
    x = shapes.in_layout(x, pixels)
    return x, x.stride(0), shapes.pixel_pitch(x) if pixels else x.stride(1)


def _padded(values: Sequence[Any], number: int) -> tuple[Any, ...]:
    return (*values, *[None] * (number - len(values)))


def _plan_for(
    mode: str, first: Tensor, gate_parameters: Sequence[Tensor], gate: str, eps: float, to_input: bool
) -> Plan:
    if gate not in GATES:
        raise RuntimeError(f"gate: got {gate!r}, expected one of {', '.join(map(repr, GATES))}")
    _, channels, height, width = first.shape
    pixels = shapes.reads_pixels(first)
    hidden = gate_parameters[0].shape[1]
    return plan(mode, gate, to_input, eps, hidden, channels, height * width, pixels, first.dtype)


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
    p = _plan_for(mode, first, gate_parameters, gate, eps, to_input)
    samples, channels, length = first.shape[0], first.shape[1], first.shape[2] * first.shape[3]
    modalities, _, sets = MODES[mode]
    count, batch = (1, 6 * samples) if mode == "concat" else (sets, samples)
    made = shapes.empties_like(first, batch, count)
    precise = shapes.precise(first.dtype)
    statistics = first.new_empty((samples, p.saved_row), dtype=precise)
    if samples == 0:
        return (*made, statistics)
    scratch = first.new_empty((samples, p.forward_row), dtype=precise)
    maps = [_strided(x, p.first.PIXELS) for x in inputs]
    read = (*maps[0], *(maps[1] if modalities == 2 else NO_MAP))
    norm = norm_weight.contiguous(), norm_bias.contiguous()
    parameters = _padded([q.contiguous() for q in gate_parameters], 4)
    rows = p.saved_row, p.forward_row
    _launch(
        statistics_kernel,
        p.first.BLOCKS * modalities * samples,
        first.device,
        (*read, *norm, parameters[0], statistics, scratch, channels, length, *rows),
        p.statistics,
        p.warps,
    )
    written = (*_padded(made, 4), samples, channels, length, p.chunks, *rows)
    _launch(
        output_kernel,
        p.second_programs * samples,
        first.device,
        (*read, *norm, *parameters, statistics, scratch, *written),
        p.second,
        p.warps,
    )
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
    p = _plan_for(mode, first, gate_parameters, gate, 0.0, to_input)
    samples, channels, length = first.shape[0], first.shape[1], first.shape[2] * first.shape[3]
    of_inputs = shapes.empties_like(first, samples, len(inputs))
    of_norm = [shapes.dense_like(q) for q in (norm_weight, norm_bias)]
    of_gate = [shapes.dense_like(q) for q in gate_parameters]
    scratch = first.new_empty((samples, p.backward_row), dtype=statistics.dtype)
    maps = [_strided(x, p.first.PIXELS) for x in inputs]
    given = [_strided(g, p.first.PIXELS) for g in gradients]
    if mode == "concat":  # one tensor holds every set's
        given *= 4
    maps += [NO_MAP] * (2 - len(maps))
    given += [NO_MAP] * (4 - len(given))
    norm = norm_weight.contiguous(), norm_bias.contiguous()
    parameters = _padded([q.contiguous() for q in gate_parameters], 4)
    read = (*itertools.chain(*maps, *given), *norm)
    rows = p.saved_row, p.backward_row
    if samples > 0:
        _launch(
            sums_kernel,
            p.first.BLOCKS * samples,
            first.device,
            (*read, *parameters, statistics, scratch, samples, channels, length, *rows),
            p.first,
            p.warps,
        )
    made = (*_padded(of_inputs, 2), *of_norm, *_padded(of_gate, 4))
    _launch(
        gradient_kernel,
        p.parameter_programs + p.second_programs * samples,
        first.device,
        (*read, parameters[0], statistics, scratch, *made, samples, channels, length, p.chunks, *rows),
        p.second,
        p.warps,
    )
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
