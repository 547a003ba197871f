"""The tiles of the block's Triton kernels for shapes of every kind; nothing is compiled or run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

tiles: Any = pytest.importorskip(
    "mrcn_fast.backends.triton.tiles", reason="Triton has no build for this machine"
)

CHANNELS = (1, 3, 17, 64, 96, 256, 257, 768, 1024, 2048, 8192)
LENGTHS = (1, 2, 35, 144, 255, 576, 2304, 36864, 1_000_003)
LANES = 32
WAYS = pytest.mark.parametrize(("pixels", "element_size"), list(itertools.product((False, True), (2, 4, 8))))


def configurations(pixels: bool, element_size: int) -> Iterator[tuple[int, int, Any]]:
    for channels, length in itertools.product(CHANNELS, LENGTHS):
        yield channels, length, tiles.configure(channels, length, pixels, element_size)


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@WAYS
def test_whoever_adds_up_a_sample_has_all_of_it(pixels: bool, element_size: int) -> None:
    for channels, length, config in configurations(pixels, element_size):
        for first, between in ((config.statistics, config.gates), (config.sums, config.coefficients)):
            case = f"{channels} channels of {length} pixels: {first}, {between}"
            assert power_of_two(between.channels), case
            if first.span < length:  # one program joins the parts of every channel
                assert channels <= between.channels, case
                assert -(-length // first.span) * between.channels <= tiles.MOST_PARTS, case
            else:  # each block's share of a hidden layer is added up
                assert -(-channels // first.channels) <= tiles.MOST_BLOCKS, case


@WAYS
def test_tiles_fit_registers_and_the_map(pixels: bool, element_size: int) -> None:
    for channels, length, config in configurations(pixels, element_size):
        for name in ("statistics", "output", "sums", "gradient"):
            tile = getattr(config, name)
            case = f"{name} of {channels} channels of {length} pixels: {tile}"
            assert power_of_two(tile.channels) and power_of_two(tile.pixels), case
            assert tile.span >= 1 and tile.ahead >= 1, case
            assert tile.channels < 2 * channels, f"half of a tile is beyond the last channel: {case}"
            most = 16 if name in ("sums", "gradient") else 32  # the sums keep ten accumulators of a tile
            assert tile.channels * tile.pixels <= most * LANES * tile.warps, case
