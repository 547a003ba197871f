"""The plan of a block call: its kernels with their constants, their programs, and the sizes of its rows."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton.language as tl

from mrcn_fast.backends import shapes
from mrcn_fast.backends.triton.block_backward import gradient_kernel, sums_kernel
from mrcn_fast.backends.triton.block_backward_gates import coefficients_kernel
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
    """What a plan depends on: the settings, the shape, the layout, and which gradients are given."""

    mode: str
    gate: str
    to_input: bool
    eps: float
    hidden: int
    channels: int
    length: int  # pixels of a plane
    pixels: bool  # whether the maps are read as channels_last
    dtype: torch.dtype
    given: tuple[bool, ...]  # which results of the forward have a gradient

    def blocks(self, size: int) -> int:
        """Return how many blocks of ``size`` channels there are."""
        return -(-self.channels // size)

    def parts(self, size: int) -> int:
        """Return how many parts of ``size`` pixels a plane has."""
        return -(-self.length // size)


class Programs(NamedTuple):
    """How many programs each launch has per sample, and how many make the parameters' gradients in all."""

    statistics: int
    gates: int
    output: int
    sums: int
    coefficients: int
    gradient: int
    parameters: int


class Plan(NamedTuple):
    """The launches of a call and of its backward, and the sizes that they need."""

    statistics: Launcher
    gates: Launcher
    output: Launcher
    sums: Launcher
    coefficients: Launcher
    gradient: Launcher
    programs: Programs
    output_chunks: int  # programs that share the pixels of a plane
    gradient_chunks: int
    saved_row: int  # numbers per sample that the forward saves for its backward
    forward_row: int  # numbers per sample of the forward's scratch
    backward_row: int  # numbers per sample of the backward's scratch


@functools.lru_cache(maxsize=1024)
def plan(call: Call) -> Plan:
    """Return the plan of a call."""
    config = configure(call.channels, call.length, call.pixels, call.dtype.itemsize)
    statistics = replace(
        _constants(call, config.statistics, config.statistics),
        # All modes with the same number of modalities share this kernel.
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
        statistics=_launcher(statistics_kernel, statistics, config.statistics),
        gates=_launcher(gates_kernel, gates, config.gates),
        output=_launcher(output_kernel, output, config.output),
        sums=_launcher(sums_kernel, sums, config.sums),
        coefficients=_launcher(coefficients_kernel, coefficients, config.coefficients),
        gradient=_launcher(gradient_kernel, gradient, config.gradient),
        programs=_programs(call, config, gradient),
        output_chunks=call.parts(config.output.span),
        gradient_chunks=call.parts(config.gradient.span),
        saved_row=shapes.saved_row(call.mode, call.gate, call.hidden, call.channels),
        forward_row=_forward_row(gates, call.channels),
        backward_row=_backward_row(coefficients, call.channels),
    )


def _launcher(kernel: Any, constants: Constants, tile: Tile) -> Launcher:
    return Launcher(kernel, {"K": constants}, num_warps=tile.warps, enable_fp_fusion=False)


def _constants(call: Call, tile: Tile, first: Tile) -> Constants:
    """Return the constants of a launch with ``tile``; its direction begins with the tile ``first``."""
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
    """Return how many hidden numbers a tile of a gate's layers holds: at most ``most``."""
    return max(1, min(LAYER_HIDDEN, next_power(call.hidden), most))


def _reads_ahead(tile: Tile, gate: str) -> int:
    """Return how many tiles a first launch reads at once; CBAM's extremes take registers of half of them."""
    return max(1, tile.ahead // 2) if gate == "cbam-channel" else tile.ahead


def _programs(call: Call, config: Config, gradient: Constants) -> Programs:
    """Return the launches' programs; ``gradient`` are the constants of the last backward kernel."""
    modalities = len(OPERATIONS[call.mode].inputs)
    layers = call.blocks(gradient.PC)
    of_gate = 1 if call.gate == "eca" else gradient.LAYER_PARTS * layers

    def over_pixels(tile: Tile) -> int:
        return call.blocks(tile.channels) * call.parts(tile.span)

    return Programs(
        statistics=modalities * over_pixels(config.statistics),
        gates=modalities * call.blocks(config.gates.channels),
        output=over_pixels(config.output),
        sums=over_pixels(config.sums),
        coefficients=modalities * call.blocks(config.coefficients.channels),
        gradient=over_pixels(config.gradient),
        parameters=modalities * layers + gradient.GATES * of_gate,
    )


def _forward_row(k: Constants, channels: int) -> int:
    """Return how many numbers a sample's scratch holds; block_forward.py lists them."""
    shares = k.BLOCKS * k.GATES * k.BRANCHES * k.HIDDEN
    parts = k.PARTS * k.MODALITIES * k.MOMENTS if k.PARTS > 1 else 0
    return (k.OUTPUT_SLOTS + k.MODALITIES + parts) * channels + shares


def _backward_row(k: Constants, channels: int) -> int:
    """Return how many numbers a sample's scratch holds; block_backward.py lists them."""
    hidden = (k.BLOCKS + k.BRANCHES) * k.GATES * k.HIDDEN
    parts = k.PARTS * k.MODALITIES * k.SUMS if k.PARTS > 1 else 0
    return (k.GRADIENT_SLOTS + k.PLANES + parts) * channels + hidden
