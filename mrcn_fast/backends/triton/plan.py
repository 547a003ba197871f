"""A call's plan: its kernels with their constants, their programs, the lengths of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton.language as tl

from mrcn_fast.backends import shapes
from mrcn_fast.backends.triton.block_backward import (
    coefficients_kernel,
    gradient_kernel,
    sums_kernel,
)
from mrcn_fast.backends.triton.block_forward import gates_kernel, output_kernel, statistics_kernel
from mrcn_fast.backends.triton.constants import Constants
from mrcn_fast.backends.triton.launch import Launcher
from mrcn_fast.backends.triton.tiles import (
    LAYER_CHANNELS,
    LAYER_HIDDEN,
    LAYER_WEIGHTS,
    Config,
    Tile,
    configure,
    next_power,
)
from mrcn_fast.operations import OPERATIONS


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
        PC=min(LAYER_CHANNELS, next_power(call.channels)),
        BESIDE=1 if double else 4,
        EPS=call.eps,
        GIVEN=call.given,
        A=tl.float64 if double else tl.float32,
    )


def _hidden_tile(call: Call, most: int) -> int:
    return max(1, min(LAYER_HIDDEN, next_power(call.hidden), most))


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


def _launcher(kernel: Any, constants: Constants, tile: Tile, arrange: Callable[..., Any]) -> Launcher:
    return Launcher(kernel, (constants,), arrange, num_warps=tile.warps, enable_fp_fusion=False)
