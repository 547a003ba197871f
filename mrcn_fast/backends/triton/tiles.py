"""The tiles of the block's kernels, and how they follow from a shape."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """The part of a map that a program works on: `channels` by `span` pixels, in tiles of `pixels`."""

    channels: int
    span: int
    pixels: int
    warps: int
    ahead: int = 1  # tiles that the program reads before it waits for any


class Config(NamedTuple):
    """The tiles of the three launches forward and the three backward.

    The middle launch of each direction, `gates` and `coefficients`, works on channels alone.
    """

    statistics: Tile
    gates: Tile
    output: Tile
    sums: Tile
    coefficients: Tile
    gradient: Tile


# One program joins the parts of a sample's planes, if the sample has at most this many channels.
MOST_JOINED = 256
# At most so many blocks of channels per sample, whose shares are added up; and at most so many numbers of one
# kind in the parts of a sample's planes, which one program joins with up to eight kinds in its registers.
MOST_BLOCKS, MOST_PARTS = 64, 4096
# The most channels and hidden numbers in a tile of the gates' layers, and its weights per warp.
LAYER_CHANNELS, LAYER_HIDDEN, LAYER_WEIGHTS = 32, 32, 512


def configure(channels: int, length: int, pixels: bool, element_size: int) -> Config:
    """Return the tiles for maps of so many channels and of planes of ``length`` pixels.

    ``pixels``: the maps are channels_last. The tiles may depend neither on the mode nor on the batch, because
    the order of a sum is part of the result.
    """
    few, joins = channels <= 64, channels <= MOST_JOINED
    line = 16 // element_size  # elements that a thread reads at once
    least = max(next_power(-(-channels // MOST_BLOCKS)), 64 if channels > 1024 else 1)
    if pixels:
        # The 128 bytes of a cache line, half of them where more programs are needed.
        block = min(max(least, 8 * line if joins else 4 * line), next_power(channels))
        wide = min(64, next_power(channels))
        span = _span(length, 128 if few else 576 * 64 // block, channels) if joins else length
        statistics = Tile(block, span, max(1, 128 * line // block), 4, 4)
        sums = Tile(block, span, max(1, 64 * line // block), 4, 4)
        output = Tile(wide, 128, max(1, 512 // wide), 4, 4 if line == 8 else 2)
        gradient = Tile(wide, 128, max(1, 512 // wide), 4, 2)
    else:
        span = _span(length, 4096, channels) if joins else length
        block = min(max(least, 8 if few or line == 4 else 16), next_power(channels))
        warps = 8 if few or line != 4 else 4
        statistics = Tile(block, span, _fitting(span, 256 * warps // block), warps, 4)
        block = min(max(least, 4 if few else 16), next_power(channels))
        warps = 8 if line == 2 else 4
        sums = Tile(block, span, _fitting(span, (512 if line == 2 else 1024) // block), warps, 2)
        tile = 256 * min(4, line)
        last = _fitting(length, tile // 2)
        planes = min(next_power(channels), max(1, tile // last))
        output = Tile(planes, _share(length, 1024), last, 4, 2)
        last = _fitting(length, tile // 4)
        planes = min(next_power(channels), max(1, tile // last))
        gradient = Tile(planes, _share(length, 1024), last, 4)
    whole = Tile(next_power(channels), 0, 0, 8)
    group = Tile(min(64, next_power(channels)), 0, 0, 4)
    return Config(
        statistics,
        whole if statistics.span < length else group,
        output,
        sums,
        whole if sums.span < length else group,
        gradient,
    )


def _span(length: int, at_least: int, channels: int) -> int:
    """Return the pixels of a part: no fewer than ``at_least``, and no more parts than `MOST_PARTS` allows."""
    return min(length, max(at_least, -(-length // (MOST_PARTS // next_power(channels)))))


def _share(length: int, most: int) -> int:
    """Return the size of equal shares of ``length``, each of at most ``most``."""
    return -(-length // -(-length // most))


def _fitting(length: int, most: int) -> int:
    """Return a power of two up to ``most``, so large that its multiples exceed the length by little."""
    fitting = max(1, most)
    while fitting > 16 and -(-length // fitting) * fitting > 1.125 * length:
        fitting //= 2
    return fitting


def next_power(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
