"""The block as Triton kernels: two launches forward, two backward.

The formulas are those of csrc/block/algebra.h, whose letters are used here. Forward, `statistics_kernel`
reads every plane once and `output_kernel` writes every set; backward, `sums_kernel` and `gradient_kernel`.
Between the launches of a pair stand only O(N·C) numbers. The gates' first layer needs every channel of a
sample: each program of a first launch leaves its own channels' share of it, and who needs the whole adds
the shares in the order of the blocks. So no program waits for another, nothing is added atomically, and the
results are the same bits on every run.

What the forward gives its backward is one row a sample (`Rows.saved`): mean and 1/σ of every plane, and
the gates' hidden layers.

Floating-point contraction is off at every launch: what to fuse would be chosen a kernel at a time, and
restitution alone has to give the bits that the pair gives. The kernels wait for memory, not for multiplying.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrcn_fast.backends import shapes

# --- tiles and small vectors ------------------------------------------------------------------------------


@triton.jit
def _places(start, c, px, pitch, PIXELS: tl.constexpr):
    """Pointers to a tile [channels, pixels]; `pitch` lies between planes, or (PIXELS) between pixels."""
    if PIXELS:
        places = start + px.to(tl.int64)[None, :] * pitch + c[:, None]
    else:
        places = start + c.to(tl.int64)[:, None] * pitch + px[None, :]
    return places


@triton.jit
def _read(start, c, px, inside, pitch, PIXELS: tl.constexpr, KEEP: tl.constexpr, A: tl.constexpr):
    """A tile in the accumulation type; KEEP: it is read again soon, else this is its last use."""
    places = _places(start, c, px, pitch, PIXELS)
    if KEEP:
        tile = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_last")
    else:
        tile = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_first")
    return tile.to(A)


@triton.jit
def _write(start, c, px, inside, pitch, value, PIXELS: tl.constexpr):
    """Store a tile that nobody reads before it has left the cache."""
    places = _places(start, c, px, pitch, PIXELS)
    tl.store(places, value.to(start.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def _vector(start, at, inside, A: tl.constexpr):
    return tl.load(start + at, mask=inside, other=0.0).to(A)


@triton.jit
def _matrix(start, rows, columns, pitch, row_inside, column_inside, A: tl.constexpr):
    inside = row_inside[:, None] & column_inside[None, :]
    return tl.load(start + rows[:, None] * pitch + columns[None, :], mask=inside, other=0.0).to(A)


@triton.jit
def _total(shares, r, R: tl.constexpr, pitch, BLOCKS: tl.constexpr, A: tl.constexpr):
    """What the channel blocks left at `shares`, `pitch` apart, added in one order: [hidden]."""
    block = tl.arange(0, triton.next_power_of_2(BLOCKS))
    return tl.sum(_matrix(shares, block, r, pitch, block < BLOCKS, r < R, A), axis=0)


@triton.jit
def _inverse_deviation(variance, eps: tl.constexpr, A: tl.constexpr):
    # Correctly rounded where `/` and sqrt are approximations: the error would be in every pixel.
    if A == tl.float32:
        r = tl.div_rn(tl.full(variance.shape, 1.0, A), tl.sqrt_rn(variance + eps))
    else:
        r = 1.0 / tl.sqrt(variance + eps)
    return r


# --- algebra.h --------------------------------------------------------------------------------------------


@triton.jit
def _plane(statistics, gamma, beta, m, c, inside, C, A: tl.constexpr):
    """mean, r, a, β of the channels `c` of modality m; `statistics` is the sample's row."""
    mean = _vector(statistics, 2 * m * C + c, inside, A)
    r = _vector(statistics, (2 * m + 1) * C + c, inside, A)
    a = _vector(gamma, m * C + c, inside, A) * r
    return mean, r, a, _vector(beta, m * C + c, inside, A)


@triton.jit
def _pooled_residual(mean, a, beta):
    # 0·a: not a number where the literal equations have none, else nothing.
    return mean - beta + 0.0 * a


@triton.jit
def _extreme_residual(mean, a, beta, extreme):
    """GMP(M) from the pixel where M, affine in x, is largest."""
    return (1.0 - a) * (extreme - mean) + (mean - beta)


@triton.jit
def _correction(scale, offset):
    term = scale * offset
    return tl.where(term - term == 0.0, term, 0.0)


@triton.jit
def _restitution_scale(s, a, TO_INPUT: tl.constexpr):
    """p of F₊ (eq. 4, 5)."""
    if TO_INPUT:
        scale = 1.0 + s * (1.0 - a)
    else:
        scale = a + s * (1.0 - a)
    return scale


@triton.jit
def _restituted(s, mean, offset, a, beta, TO_INPUT: tl.constexpr):
    """Scale and shift of F₊ (eq. 4, 5)."""
    scale = _restitution_scale(s, a, TO_INPUT)
    if TO_INPUT:
        shift = (mean + offset) + s * ((mean - beta) + offset)
    else:
        shift = s * (mean + offset) + (1.0 - s) * beta + 0.0 * beta
    return scale, shift - _correction(scale, offset)


@triton.jit
def _distilled(s, mean, offset, a, beta):
    """Scale and shift of s M (eq. 6, 7)."""
    scale = s * (1.0 - a)
    return scale, s * ((mean - beta) + offset) - _correction(scale, offset)


@triton.jit
def _gate_gradient(mean, a, beta, S, T):
    """∂s of s M, S and T the sums of the gradient of what s M was added to."""
    return (1.0 - a) * T + (mean - beta) * S


@triton.jit
def _share_of_normalized(s, TO_INPUT: tl.constexpr):
    if TO_INPUT:
        share = -s
    else:
        share = 1.0 - s
    return share


# --- gates ------------------------------------------------------------------------------------------------


@triton.jit
def _hidden(row, shares, bias, g, b, r, pitch, R: tl.constexpr, BRANCHES: tl.constexpr, BLOCKS: tl.constexpr,
            FORWARD: tl.constexpr, A: tl.constexpr):
    """The hidden layer of gate g and branch b: made from the shares, or (backward) as the forward kept it."""
    at = (g * BRANCHES + b) * R
    if FORWARD:
        before = _total(shares + at, r, R, pitch, BLOCKS, A) + _vector(bias + g * R, r, r < R, A)
        hidden = tl.where(before < 0.0, 0.0, before)  # a NaN passes, as in torch.relu
    else:
        hidden = _vector(row + at, r, r < R, A)
    return hidden


@triton.jit
def _excite(row, shares, weights, biases, more_weights, more_biases, g, c, inside, rank, C, pitch,
            R: tl.constexpr, RB: tl.constexpr, BRANCHES: tl.constexpr, BLOCKS: tl.constexpr,
            FORWARD: tl.constexpr, A: tl.constexpr):
    """The two layers of SE and CBAM before the sigmoid; `row` holds the hidden layers, kept by rank 0."""
    x = BRANCHES * _vector(more_biases, g * C + c, inside, A)
    for first in range(0, R, RB):
        r = first + tl.arange(0, RB)
        both = tl.zeros((RB,), A)
        for b in tl.static_range(BRANCHES):
            hidden = _hidden(row, shares, biases, g, b, r, pitch, R, BRANCHES, BLOCKS, FORWARD, A)
            both += hidden
            if FORWARD:
                tl.store(row + (g * BRANCHES + b) * R + r, hidden, mask=r < tl.where(rank == 0, R, 0))
        weight = _matrix(more_weights, g * C + c, r, R, inside, r < R, A)
        x += tl.sum(weight * both[None, :], axis=1)
    return x


@triton.jit
def _convolve(statistics, gamma, beta, weight, g, m, c, C, K: tl.constexpr, A: tl.constexpr):
    """ECA before the sigmoid: the neighbouring channels' pooled residuals, from their statistics."""
    x = tl.zeros(c.shape, A)
    for t in range(K):
        neighbour = c + t - K // 2
        inside = (neighbour >= 0) & (neighbour < C)
        mean, _, a, shift = _plane(statistics, gamma, beta, m, neighbour, inside, C, A)
        z = _pooled_residual(mean, a, shift)
        x += tl.where(inside, tl.load(weight + g * K + t).to(A) * z, 0.0)
    return x


@triton.jit
def _gate(statistics, shares, gamma, beta, p0, p1, p2, p3, g, m, c, inside, rank, C, pitch,
          MODALITIES: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
          BLOCKS: tl.constexpr, FORWARD: tl.constexpr, A: tl.constexpr):
    """s of gate g, which looks at modality m, for the channels `c`."""
    BRANCHES: tl.constexpr = 2 if GATE == "cbam-channel" else 1
    if GATE == "eca":
        x = _convolve(statistics, gamma, beta, p0, g, m, c, C, R, A)
    else:
        row = statistics + 2 * MODALITIES * C
        x = _excite(row, shares, p0, p1, p2, p3, g, c, inside, rank, C, pitch, R, RB, BRANCHES, BLOCKS,
                    FORWARD, A)
    return 1.0 / (1.0 + tl.exp(-x))


# --- forward: statistics ----------------------------------------------------------------------------------


@triton.jit
def _moments(x, pitch, c, inside, L, PIXELS: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr,
             EXTREMES: tl.constexpr, A: tl.constexpr):
    """Mean, what rounding left of it, Σ (x - mean)², and (EXTREMES) maximum and minimum of planes.

    Every lane of a tile is a chunk of its own in Chan's combination: it carries the mean and the squared
    deviations of the pixels it met (Welford), and all are joined at the end. Both are taken of x less
    the plane's first pixel, so that the mean keeps its digits on a plane far from zero.
    """
    lane = tl.arange(0, BL)
    pivot = tl.load(_places(x, c, tl.zeros((1,), tl.int32), pitch, PIXELS), mask=inside[:, None], other=0.0)
    pivot = pivot.to(A)
    mean = tl.zeros((BC, BL), A)
    squares = tl.zeros((BC, BL), A)
    high = tl.full((BC, BL), float("-inf"), A)
    low = tl.full((BC, BL), float("inf"), A)
    met = tl.full((1, 1), 0.0, A)
    for first in range(0, L, BL):
        px = first + lane
        here = inside[:, None] & (px < L)[None, :]
        pixel = _read(x, c, px, here, pitch, PIXELS, True, A)
        met += 1.0
        delta = (pixel - pivot) - mean
        joined = mean + delta / met
        squares += tl.where(here, delta * ((pixel - pivot) - joined), 0.0)
        mean = tl.where(here, joined, mean)
        if EXTREMES:
            high = tl.where(here & (pixel > high), pixel, high)
            low = tl.where(here & (pixel < low), pixel, low)
    count = ((L + BL - 1 - lane) // BL).to(A)[None, :]
    length = tl.cast(L, A)
    shift = tl.sum(mean * count, axis=1) / length
    off = mean - shift[:, None]
    squares = tl.sum(squares + count * off * off, axis=1)
    pivot = tl.sum(pivot, axis=1)
    rounded = pivot + shift
    kept = rounded - pivot
    offset = (pivot - (rounded - kept)) + (shift - kept)  # exactly what the addition lost
    return rounded, offset, squares, tl.max(high, axis=1), tl.min(low, axis=1)


@triton.jit
def _leave_shares(shares, weights, g, z, branch, c, inside, C, R: tl.constexpr, RB: tl.constexpr,
                  BRANCHES: tl.constexpr, A: tl.constexpr):
    """These channels' part of gate g's hidden layer."""
    z = tl.where(inside, z, 0.0)
    for first in range(0, R, RB):
        r = first + tl.arange(0, RB)
        weight = _matrix(weights, g * R + r, c, C, r < R, inside, A)
        tl.store(shares + (g * BRANCHES + branch) * R + r, tl.sum(weight * z[None, :], axis=1), mask=r < R)


@triton.jit
def _describe(x, pitch, gamma, beta, p0, statistics, scratch, block, m, C, L, eps: tl.constexpr,
              MODALITIES: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
              PIXELS: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr, A: tl.constexpr):
    """Statistics of a block of planes of modality m, and what its gates' hidden layers get from them."""
    BRANCHES: tl.constexpr = 2 if GATE == "cbam-channel" else 1
    GATES: tl.constexpr = 4 if MODALITIES == 2 else 1
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    mean, offset, squares, high, low = _moments(x, pitch, c, inside, L, PIXELS, BC, BL, BRANCHES == 2, A)
    r = _inverse_deviation(squares / tl.cast(L, A), eps, A)
    tl.store(statistics + 2 * m * C + c, mean, mask=inside)
    tl.store(statistics + (2 * m + 1) * C + c, r, mask=inside)
    tl.store(scratch + m * C + c, offset, mask=inside)
    if GATE != "eca":
        a = _vector(gamma, m * C + c, inside, A) * r
        shift = _vector(beta, m * C + c, inside, A)
        shares = scratch + MODALITIES * C + block * (GATES * BRANCHES * R)
        for k in tl.static_range(GATES // MODALITIES):
            g = m + k * MODALITIES
            z = _pooled_residual(mean, a, shift)
            _leave_shares(shares, p0, g, z, 0, c, inside, C, R, RB, BRANCHES, A)
            if BRANCHES == 2:
                z = _extreme_residual(mean, a, shift, tl.where(1.0 - a >= 0.0, high, low))
                _leave_shares(shares, p0, g, z, 1, c, inside, C, R, RB, BRANCHES, A)


@triton.jit
def statistics_kernel(
    x0, x1, x0_sample, x0_pitch, x1_sample, x1_pitch, gamma, beta, p0, statistics, scratch, C, L,
    saved_row, scratch_row, eps: tl.constexpr, MODALITIES: tl.constexpr, GATE: tl.constexpr,
    R: tl.constexpr, RB: tl.constexpr, BLOCKS: tl.constexpr, PIXELS: tl.constexpr, BC: tl.constexpr,
    BL: tl.constexpr, A: tl.constexpr,
):
    """One block of channels of one sample and modality a program."""
    program = tl.program_id(0)
    block = program % BLOCKS
    m = program // BLOCKS % MODALITIES
    i = (program // (BLOCKS * MODALITIES)).to(tl.int64)
    statistics += i * saved_row
    scratch += i * scratch_row
    # A call for each: choosing a pointer would lose what is known of its alignment.
    if m == 0:
        _describe(x0 + i * x0_sample, x0_pitch, gamma, beta, p0, statistics, scratch, block, 0, C, L, eps,
                  MODALITIES, GATE, R, RB, PIXELS, BC, BL, A)
    if MODALITIES == 2:
        if m == 1:
            _describe(x1 + i * x1_sample, x1_pitch, gamma, beta, p0, statistics, scratch, block, 1, C, L, eps,
                      MODALITIES, GATE, R, RB, PIXELS, BC, BL, A)


# --- forward: output --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["samples", "chunks"])
def output_kernel(
    x0, x1, x0_sample, x0_pitch, x1_sample, x1_pitch, gamma, beta, p0, p1, p2, p3, statistics, scratch,
    y0, y1, y2, y3, samples, C, L, chunks, saved_row, scratch_row, MODE: tl.constexpr, GATE: tl.constexpr,
    TO_INPUT: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BLOCKS: tl.constexpr, PIXELS: tl.constexpr,
    BC: tl.constexpr, BL: tl.constexpr, CHUNK: tl.constexpr, A: tl.constexpr,
):
    """Every set of one block of channels of one sample, over CHUNK pixels, a program."""
    MODALITIES: tl.constexpr = 2 if MODE == "pair" or MODE == "concat" else 1
    BRANCHES: tl.constexpr = 2 if GATE == "cbam-channel" else 1
    GATES: tl.constexpr = 4 if MODALITIES == 2 else 1
    program = tl.program_id(0)
    chunk = program % chunks
    block = program // chunks % tl.cdiv(C, BC)
    # The last sample first: its planes are what the statistics left in the cache.
    i = (samples - 1 - program // (chunks * tl.cdiv(C, BC))).to(tl.int64)
    statistics += i * saved_row
    scratch += i * scratch_row
    shares = scratch + MODALITIES * C
    pitch = GATES * BRANCHES * R
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    rank = block + chunk  # the first of a sample's programs keeps its hidden layers for the backward

    mean0, _, a0, beta0 = _plane(statistics, gamma, beta, 0, c, inside, C, A)
    off0 = _vector(scratch, c, inside, A)
    s0 = _gate(statistics, shares, gamma, beta, p0, p1, p2, p3, 0, 0, c, inside, rank, C, pitch,
               MODALITIES, GATE, R, RB, BLOCKS, True, A)
    scale0, shift0 = _restituted(s0, mean0, off0, a0, beta0, TO_INPUT)
    if MODALITIES == 2:
        mean1, _, a1, beta1 = _plane(statistics, gamma, beta, 1, c, inside, C, A)
        off1 = _vector(scratch, C + c, inside, A)
        s1 = _gate(statistics, shares, gamma, beta, p0, p1, p2, p3, 1, 1, c, inside, rank, C, pitch,
                   MODALITIES, GATE, R, RB, BLOCKS, True, A)
        s2 = _gate(statistics, shares, gamma, beta, p0, p1, p2, p3, 2, 0, c, inside, rank, C, pitch,
                   MODALITIES, GATE, R, RB, BLOCKS, True, A)
        s3 = _gate(statistics, shares, gamma, beta, p0, p1, p2, p3, 3, 1, c, inside, rank, C, pitch,
                   MODALITIES, GATE, R, RB, BLOCKS, True, A)
        scale3, shift3 = _restituted(s1, mean1, off1, a1, beta1, TO_INPUT)
        scale1, shift1 = _distilled(s3, mean1, off1, a1, beta1)
        scale2, shift2 = _distilled(s2, mean0, off0, a0, beta0)
        shift1 += beta0 - _correction(a0, off0)
        shift2 += beta1 - _correction(a1, off1)
    if MODE == "snr":
        scale1, shift1 = _restituted(1.0 - s0, mean0, off0, a0, beta0, False)
        shift2 = beta0 - _correction(a0, off0)

    x0 += i * x0_sample
    if MODALITIES == 2:
        x1 += i * x1_sample
    volume = tl.cast(C, tl.int64) * L
    if MODE == "concat":  # the six sets one behind the other, the inputs first and last
        batch = samples * volume
        first_set = y0 + i * volume
        last_set = first_set + 5 * batch
        y1 = y0 + 2 * batch
        y2 = y0 + 3 * batch
        y3 = y0 + 4 * batch
        y0 = y0 + batch
    y0 += i * volume
    if MODE != "restitute":
        y1 += i * volume
        y2 += i * volume
    if MODALITIES == 2:
        y3 += i * volume
    if PIXELS:
        y_pitch = C
    else:
        y_pitch = L

    for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, L), BL):
        px = first + tl.arange(0, BL)
        here = inside[:, None] & (px < L)[None, :]
        pixel0 = _read(x0, c, px, here, x0_pitch, PIXELS, False, A)
        centered0 = pixel0 - mean0[:, None]
        restituted0 = shift0[:, None] + scale0[:, None] * centered0
        _write(y0, c, px, here, y_pitch, restituted0, PIXELS)
        if MODE == "snr":
            _write(y1, c, px, here, y_pitch, shift1[:, None] + scale1[:, None] * centered0, PIXELS)
            _write(y2, c, px, here, y_pitch, shift2[:, None] + a0[:, None] * centered0, PIXELS)
        if MODALITIES == 2:
            pixel1 = _read(x1, c, px, here, x1_pitch, PIXELS, False, A)
            centered1 = pixel1 - mean1[:, None]
            compensated0 = shift1[:, None] + a0[:, None] * centered0 + scale1[:, None] * centered1
            compensated1 = shift2[:, None] + a1[:, None] * centered1 + scale2[:, None] * centered0
            _write(y1, c, px, here, y_pitch, compensated0, PIXELS)
            _write(y2, c, px, here, y_pitch, compensated1, PIXELS)
            _write(y3, c, px, here, y_pitch, shift3[:, None] + scale3[:, None] * centered1, PIXELS)
        if MODE == "concat":
            _write(first_set, c, px, here, y_pitch, pixel0, PIXELS)
            _write(last_set, c, px, here, y_pitch, pixel1, PIXELS)


# --- backward: sums ---------------------------------------------------------------------------------------
#
# A sample's row of scratch holds planes of C numbers, then the shares of the hidden layers' gradients:
#
#   U, V of each modality | s of each gate | ∂ before the sigmoid of each gate | (CBAM) extreme pixel of each
#   modality | (CBAM) how often it occurs | shares (blocks, gates, R)


@triton.jit
def _sample_of(g, i, samples, sample, CONCAT_SET: tl.constexpr):
    """Where sample i of a gradient begins; CONCAT_SET: which of six sets that stand one behind the other."""
    if g is None:
        start = None
    else:
        start = g + (CONCAT_SET * samples + i) * sample
    return start


@triton.jit
def _gradient(start, c, px, here, pitch, like, PIXELS: tl.constexpr, KEEP: tl.constexpr, A: tl.constexpr):
    """A tile of a gradient, zeros where it is missing."""
    if start is None:
        tile = tl.zeros(like.shape, A)
    else:
        tile = _read(start, c, px, here, pitch, PIXELS, KEEP, A)
    return tile


@triton.jit
def _count_extremes(value, here, best, count):
    """A lane's extreme so far and how often it occurred."""
    value = tl.where(here, value, float("-inf"))
    better = value > best
    count = tl.where(better, 1.0, tl.where((value == best) & here, count + 1.0, count))
    return tl.where(better, value, best), count


@triton.jit
def _keep_extremes(extremes, counts, best, count, sign, inside):
    """The extreme of a plane from those of its lanes, and in how many pixels it stands."""
    extreme = tl.max(best, axis=1)
    total = tl.sum(tl.where(best == extreme[:, None], count, 0.0), axis=1)
    tl.store(extremes, extreme * sign, mask=inside)
    tl.store(counts, total, mask=inside)


@triton.jit
def _leave_gradient(scratch, shares, weights, g, gradient, s, c, inside, C, MODALITIES: tl.constexpr,
                    GATES: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
                    A: tl.constexpr):
    """Keep s of gate g and the gradient before its sigmoid, and these channels' part of its hidden layer's."""
    before = tl.where(inside, gradient * s * (1.0 - s), 0.0)
    tl.store(scratch + (2 * MODALITIES + g) * C + c, s, mask=inside)
    tl.store(scratch + (2 * MODALITIES + GATES + g) * C + c, before, mask=inside)
    if GATE != "eca":
        for first in range(0, R, RB):
            r = first + tl.arange(0, RB)
            weight = _matrix(weights, g * C + c, r, R, inside, r < R, A)
            tl.store(shares + g * R + r, tl.sum(weight * before[:, None], axis=0), mask=r < R)


@triton.jit(do_not_specialize=["samples"])
def sums_kernel(
    x0, x1, x0_sample, x0_pitch, x1_sample, x1_pitch, g0, g1, g2, g3, g0_sample, g0_pitch, g1_sample,
    g1_pitch, g2_sample, g2_pitch, g3_sample, g3_pitch, gamma, beta, p0, p1, p2, p3, statistics, scratch,
    samples, C, L, saved_row, scratch_row, MODE: tl.constexpr, GATE: tl.constexpr, TO_INPUT: tl.constexpr,
    R: tl.constexpr, RB: tl.constexpr, BLOCKS: tl.constexpr, PIXELS: tl.constexpr, BC: tl.constexpr,
    BL: tl.constexpr, A: tl.constexpr,
):
    """All sums over the planes of one block of channels of one sample, and the gates' gradients from them."""
    MODALITIES: tl.constexpr = 2 if MODE == "pair" or MODE == "concat" else 1
    GATES: tl.constexpr = 4 if MODALITIES == 2 else 1
    PLANES: tl.constexpr = 2 * (MODALITIES + GATES) + (2 * MODALITIES if GATE == "cbam-channel" else 0)
    program = tl.program_id(0)
    block = program % BLOCKS
    i = (program // BLOCKS).to(tl.int64)
    statistics += i * saved_row
    scratch += i * scratch_row
    shares = scratch + PLANES * C + block * (GATES * R)
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    lane = tl.arange(0, BL)

    x0 += i * x0_sample
    CONCAT: tl.constexpr = 1 if MODE == "concat" else 0
    g0 = _sample_of(g0, i, samples, g0_sample, CONCAT)
    g1 = _sample_of(g1, i, samples, g1_sample, 2 * CONCAT)
    g2 = _sample_of(g2, i, samples, g2_sample, 3 * CONCAT)
    g3 = _sample_of(g3, i, samples, g3_sample, 4 * CONCAT)

    mean0, _, a0, beta0 = _plane(statistics, gamma, beta, 0, c, inside, C, A)
    zero = tl.zeros((BC, BL), A)
    S0, T0 = zero, zero
    if MODALITIES == 2:
        x1 += i * x1_sample
        mean1, _, a1, beta1 = _plane(statistics, gamma, beta, 1, c, inside, C, A)
        T10, T21 = zero, zero
    if MODE != "restitute":
        S1, S2, T1, T2 = zero, zero, zero, zero
    if MODALITIES == 2:
        S3, T3 = zero, zero
    if GATE == "cbam-channel":  # M has its maximum at the largest value of ±x, whichever way it slopes
        sign0 = tl.where(1.0 - a0 >= 0.0, 1.0, -1.0).to(A)
        best0, count0 = tl.full((BC, BL), float("-inf"), A), zero
        if MODALITIES == 2:
            sign1 = tl.where(1.0 - a1 >= 0.0, 1.0, -1.0).to(A)
            best1, count1 = tl.full((BC, BL), float("-inf"), A), zero

    for first in range(0, L, BL):
        px = first + tl.arange(0, BL)
        here = inside[:, None] & (px < L)[None, :]
        value0 = _read(x0, c, px, here, x0_pitch, PIXELS, True, A)
        centered0 = value0 - mean0[:, None]
        gradient0 = _gradient(g0, c, px, here, g0_pitch, zero, PIXELS, True, A)
        S0 += gradient0
        T0 += gradient0 * centered0
        if MODE != "restitute":
            gradient1 = _gradient(g1, c, px, here, g1_pitch, zero, PIXELS, True, A)
            gradient2 = _gradient(g2, c, px, here, g2_pitch, zero, PIXELS, True, A)
            S1 += gradient1
            S2 += gradient2
        if MODE == "snr":
            T1 += gradient1 * centered0
            T2 += gradient2 * centered0
        if GATE == "cbam-channel":
            best0, count0 = _count_extremes(value0 * sign0[:, None], here, best0, count0)
        if MODALITIES == 2:
            value1 = _read(x1, c, px, here, x1_pitch, PIXELS, True, A)
            centered1 = value1 - mean1[:, None]
            gradient3 = _gradient(g3, c, px, here, g3_pitch, zero, PIXELS, True, A)
            S3 += gradient3
            T3 += gradient3 * centered1
            T10 += gradient1 * centered0
            T1 += gradient1 * centered1
            T2 += gradient2 * centered0
            T21 += gradient2 * centered1
            if GATE == "cbam-channel":
                best1, count1 = _count_extremes(value1 * sign1[:, None], here, best1, count1)

    s0 = _gate(statistics, shares, gamma, beta, p0, p1, p2, p3, 0, 0, c, inside, 0, C, 0,
               MODALITIES, GATE, R, RB, BLOCKS, False, A)
    sum0, moment0 = tl.sum(S0, axis=1), tl.sum(T0, axis=1)
    ds0 = _gate_gradient(mean0, a0, beta0, sum0, moment0)
    U0 = _share_of_normalized(s0, TO_INPUT) * moment0
    V0 = _share_of_normalized(s0, TO_INPUT) * sum0
    if MODE != "restitute":
        sum1, moment1 = tl.sum(S1, axis=1), tl.sum(T1, axis=1)
        sum2, moment2 = tl.sum(S2, axis=1), tl.sum(T2, axis=1)
    if MODE == "snr":
        ds0 -= _gate_gradient(mean0, a0, beta0, sum1, moment1)
        U0 += s0 * moment1 + moment2
        V0 += s0 * sum1 + sum2
    if MODALITIES == 2:
        s1 = _gate(statistics, shares, gamma, beta, p0, p1, p2, p3, 1, 1, c, inside, 0, C, 0,
                   MODALITIES, GATE, R, RB, BLOCKS, False, A)
        s2 = _gate(statistics, shares, gamma, beta, p0, p1, p2, p3, 2, 0, c, inside, 0, C, 0,
                   MODALITIES, GATE, R, RB, BLOCKS, False, A)
        s3 = _gate(statistics, shares, gamma, beta, p0, p1, p2, p3, 3, 1, c, inside, 0, C, 0,
                   MODALITIES, GATE, R, RB, BLOCKS, False, A)
        sum3, moment3 = tl.sum(S3, axis=1), tl.sum(T3, axis=1)
        U0 += tl.sum(T10, axis=1) - s2 * moment2
        V0 += sum1 - s2 * sum2
        U1 = _share_of_normalized(s1, TO_INPUT) * moment3 + tl.sum(T21, axis=1) - s3 * moment1
        V1 = _share_of_normalized(s1, TO_INPUT) * sum3 + sum2 - s3 * sum1
        tl.store(scratch + 2 * C + c, U1, mask=inside)
        tl.store(scratch + 3 * C + c, V1, mask=inside)
        ds1 = _gate_gradient(mean1, a1, beta1, sum3, moment3)
        ds2 = _gate_gradient(mean0, a0, beta0, sum2, moment2)
        ds3 = _gate_gradient(mean1, a1, beta1, sum1, moment1)
        _leave_gradient(scratch, shares, p2, 1, ds1, s1, c, inside, C, MODALITIES, GATES, GATE, R, RB, A)
        _leave_gradient(scratch, shares, p2, 2, ds2, s2, c, inside, C, MODALITIES, GATES, GATE, R, RB, A)
        _leave_gradient(scratch, shares, p2, 3, ds3, s3, c, inside, C, MODALITIES, GATES, GATE, R, RB, A)
    tl.store(scratch + c, U0, mask=inside)
    tl.store(scratch + C + c, V0, mask=inside)
    _leave_gradient(scratch, shares, p2, 0, ds0, s0, c, inside, C, MODALITIES, GATES, GATE, R, RB, A)
    if GATE == "cbam-channel":
        EXTREME: tl.constexpr = 2 * (MODALITIES + GATES)
        extremes, counts = scratch + EXTREME * C + c, scratch + (EXTREME + MODALITIES) * C + c
        _keep_extremes(extremes, counts, best0, count0, sign0, inside)
        if MODALITIES == 2:
            _keep_extremes(extremes + C, counts + C, best1, count1, sign1, inside)


# --- backward: gradients ----------------------------------------------------------------------------------


@triton.jit
def _inner(row, shares, g, b, r, pitch, R: tl.constexpr, BRANCHES: tl.constexpr, BLOCKS: tl.constexpr,
           A: tl.constexpr):
    """Gradient before the ReLU of gate g's hidden layer in branch b; both branches share what comes to it."""
    hidden = _vector(row + (g * BRANCHES + b) * R, r, r < R, A)
    return tl.where(hidden <= 0.0, 0.0, _total(shares + g * R, r, R, pitch, BLOCKS, A))


@triton.jit
def _of_pooled(statistics, scratch, weights, m, b: tl.constexpr, c, inside, C, MODALITIES: tl.constexpr,
               GATE: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BLOCKS: tl.constexpr, A: tl.constexpr):
    """∂z: gradient of GAP(M) of modality m (b = 0) or of GMP(M) (b = 1), through every gate that reads it."""
    BRANCHES: tl.constexpr = 2 if GATE == "cbam-channel" else 1
    GATES: tl.constexpr = 4 if MODALITIES == 2 else 1
    BEFORE: tl.constexpr = 2 * MODALITIES + GATES
    PLANES: tl.constexpr = 2 * (MODALITIES + GATES) + (2 * MODALITIES if GATE == "cbam-channel" else 0)
    row, shares = statistics + 2 * MODALITIES * C, scratch + PLANES * C
    dz = tl.zeros(c.shape, A)
    for k in tl.static_range(GATES // MODALITIES):
        g = m + k * MODALITIES
        if GATE == "eca":
            for t in range(R):
                to = c - t + R // 2
                reached = inside & (to >= 0) & (to < C)
                before = _vector(scratch + (BEFORE + g) * C, to, reached, A)
                dz += tl.where(reached, tl.load(weights + g * R + t).to(A) * before, 0.0)
        else:
            for first in range(0, R, RB):
                r = first + tl.arange(0, RB)
                inner = _inner(row, shares, g, b, r, GATES * R, R, BRANCHES, BLOCKS, A)
                weight = _matrix(weights, g * R + r, c, C, r < R, inside, A)
                dz += tl.sum(weight * inner[:, None], axis=0)
    return dz


@triton.jit
def _plane_gradient(statistics, scratch, gamma, beta, weights, m, c, inside, C, L,
                    MODALITIES: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
                    BLOCKS: tl.constexpr, A: tl.constexpr):
    """k1, k2 of ∂x, (CBAM) the extreme pixel and what is added there, and the sample's part of ∂γ and ∂β."""
    GATES: tl.constexpr = 4 if MODALITIES == 2 else 1
    EXTREME: tl.constexpr = 2 * (MODALITIES + GATES)
    mean, r, a, _ = _plane(statistics, gamma, beta, m, c, inside, C, A)
    U = _vector(scratch + 2 * m * C, c, inside, A)
    V = _vector(scratch + (2 * m + 1) * C, c, inside, A)
    dz = _of_pooled(statistics, scratch, weights, m, 0, c, inside, C, MODALITIES, GATE, R, RB, BLOCKS, A)
    extreme, k3 = mean, mean
    if GATE == "cbam-channel":
        extreme = _vector(scratch + (EXTREME + m) * C, c, inside, A)
        count = _vector(scratch + (EXTREME + MODALITIES + m) * C, c, inside, A)
        of = _of_pooled(statistics, scratch, weights, m, 1, c, inside, C, MODALITIES, GATE, R, RB, BLOCKS, A)
        U -= (extreme - mean) * of
        V -= of
        k3 = (1.0 - a) * of / count
    length = tl.cast(L, A)
    return (dz - a * V) / length, -a * r * r * U / length, extreme, k3, r * U + 0.0 * dz, V - dz


@triton.jit
def _norm_gradients(statistics, scratch, gamma, beta, weights, dgamma, dbeta, m, block, samples, C, L,
                    saved_row, scratch_row, MODALITIES: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr,
                    RB: tl.constexpr, BLOCKS: tl.constexpr, BC: tl.constexpr, A: tl.constexpr):
    """∂γ and ∂β of a block of channels of modality m, over the samples in their order."""
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    of_gamma, of_beta = tl.zeros((BC,), A), tl.zeros((BC,), A)
    for n in range(0, samples):
        i = tl.cast(n, tl.int64)
        _, _, _, _, more_gamma, more_beta = _plane_gradient(
            statistics + i * saved_row, scratch + i * scratch_row, gamma, beta, weights, m, c, inside, C, L,
            MODALITIES, GATE, R, RB, BLOCKS, A)
        of_gamma += more_gamma
        of_beta += more_beta
    at = m * C + c
    tl.store(dgamma + at, of_gamma.to(dgamma.dtype.element_ty), mask=inside)
    tl.store(dbeta + at, of_beta.to(dbeta.dtype.element_ty), mask=inside)


@triton.jit
def _convolution_gradient(statistics, scratch, gamma, beta, dweight, g, samples, C, saved_row, scratch_row,
                          MODALITIES: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, A: tl.constexpr):
    """∂ of ECA's kernel of gate g."""
    GATES: tl.constexpr = 4 if MODALITIES == 2 else 1
    m = g % MODALITIES
    for t in range(K):
        total = tl.zeros((BC,), A)
        for n in range(0, samples):
            i = tl.cast(n, tl.int64)
            for first in range(0, C, BC):
                c = first + tl.arange(0, BC)
                source = c + t - K // 2
                inside = (c < C) & (source >= 0) & (source < C)
                before = _vector(scratch + i * scratch_row + (2 * MODALITIES + GATES + g) * C, c, inside, A)
                mean, _, a, shift = _plane(
                    statistics + i * saved_row, gamma, beta, m, source, inside, C, A)
                total += tl.where(inside, before * _pooled_residual(mean, a, shift), 0.0)
        tl.store(dweight + g * K + t, tl.sum(total, axis=0).to(dweight.dtype.element_ty))


@triton.jit
def _layer_gradients(statistics, scratch, gamma, beta, d0, d1, d2, d3, g, block, first, samples, C, saved_row,
                     scratch_row, MODALITIES: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr,
                     RB: tl.constexpr, BLOCKS: tl.constexpr, BC: tl.constexpr, A: tl.constexpr):
    """∂ of both layers of gate g: a block of channels by RB hidden numbers, over the samples in their order."""
    BRANCHES: tl.constexpr = 2 if GATE == "cbam-channel" else 1
    GATES: tl.constexpr = 4 if MODALITIES == 2 else 1
    EXTREME: tl.constexpr = 2 * (MODALITIES + GATES)
    PLANES: tl.constexpr = EXTREME + (2 * MODALITIES if GATE == "cbam-channel" else 0)
    m = g % MODALITIES
    c = block * BC + tl.arange(0, BC)
    r = first + tl.arange(0, RB)
    inside, known = c < C, r < R
    of_weight, of_more_weight = tl.zeros((BC, RB), A), tl.zeros((BC, RB), A)
    of_bias, of_more_bias = tl.zeros((RB,), A), tl.zeros((BC,), A)
    for n in range(0, samples):
        i = tl.cast(n, tl.int64)
        saved, left = statistics + i * saved_row, scratch + i * scratch_row
        row, shares = saved + 2 * MODALITIES * C, left + PLANES * C
        before = _vector(left + (2 * MODALITIES + GATES + g) * C, c, inside, A)
        of_more_bias += BRANCHES * before
        mean, _, a, shift = _plane(saved, gamma, beta, m, c, inside, C, A)
        for b in tl.static_range(BRANCHES):
            if b == 0:
                z = _pooled_residual(mean, a, shift)
            else:
                z = _extreme_residual(mean, a, shift, _vector(left + (EXTREME + m) * C, c, inside, A))
            hidden = _vector(row + (g * BRANCHES + b) * R, r, known, A)
            inner = _inner(row, shares, g, b, r, GATES * R, R, BRANCHES, BLOCKS, A)
            of_bias += inner
            of_weight += z[:, None] * inner[None, :]
            of_more_weight += before[:, None] * hidden[None, :]
    both = inside[:, None] & known[None, :]
    at = g * R + r
    tl.store(d0 + at[None, :] * C + c[:, None], of_weight.to(d0.dtype.element_ty), mask=both)
    tl.store(d1 + at, of_bias.to(d1.dtype.element_ty), mask=r < tl.where(block == 0, R, 0))
    at = g * C + c
    tl.store(d2 + at[:, None] * R + r[None, :], of_more_weight.to(d2.dtype.element_ty), mask=both)
    tl.store(d3 + at, of_more_bias.to(d3.dtype.element_ty), mask=c < tl.where(first == 0, C, 0))


@triton.jit
def _input_gradients(
    x0, x1, x0_sample, x0_pitch, x1_sample, x1_pitch, g0, g1, g2, g3, g0_sample, g0_pitch, g1_sample,
    g1_pitch, g2_sample, g2_pitch, g3_sample, g3_pitch, gamma, beta, p0, statistics, scratch, dx0, dx1,
    i, block, chunk, samples, C, L, MODE: tl.constexpr, GATE: tl.constexpr, TO_INPUT: tl.constexpr,
    R: tl.constexpr, RB: tl.constexpr, BLOCKS: tl.constexpr, PIXELS: tl.constexpr, BC: tl.constexpr,
    BL: tl.constexpr, CHUNK: tl.constexpr, A: tl.constexpr,
):
    """∂ of the inputs of one block of channels of one sample, over CHUNK pixels."""
    MODALITIES: tl.constexpr = 2 if MODE == "pair" or MODE == "concat" else 1
    CONCAT: tl.constexpr = 1 if MODE == "concat" else 0
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    gates = scratch + 2 * MODALITIES * C
    if MODE == "concat":
        first_set = _sample_of(g0, i, samples, g0_sample, 0)
        last_set = _sample_of(g0, i, samples, g0_sample, 5)
    g0 = _sample_of(g0, i, samples, g0_sample, CONCAT)
    g1 = _sample_of(g1, i, samples, g1_sample, 2 * CONCAT)
    g2 = _sample_of(g2, i, samples, g2_sample, 3 * CONCAT)
    g3 = _sample_of(g3, i, samples, g3_sample, 4 * CONCAT)

    x0 += i * x0_sample
    dx0 += i * C * L
    mean0, _, a0, _ = _plane(statistics, gamma, beta, 0, c, inside, C, A)
    s0 = _vector(gates, c, inside, A)
    scale0 = _restitution_scale(s0, a0, TO_INPUT)
    k10, k20, extreme0, k30, _, _ = _plane_gradient(
        statistics, scratch, gamma, beta, p0, 0, c, inside, C, L, MODALITIES, GATE, R, RB, BLOCKS, A)
    if MODE == "snr":
        scale1 = _restitution_scale(1.0 - s0, a0, False)
    if MODALITIES == 2:
        x1 += i * x1_sample
        dx1 += i * C * L
        mean1, _, a1, _ = _plane(statistics, gamma, beta, 1, c, inside, C, A)
        scale3 = _restitution_scale(_vector(gates + C, c, inside, A), a1, TO_INPUT)
        scale2 = _vector(gates + 2 * C, c, inside, A) * (1.0 - a0)
        scale1 = _vector(gates + 3 * C, c, inside, A) * (1.0 - a1)
        k11, k21, extreme1, k31, _, _ = _plane_gradient(
            statistics, scratch, gamma, beta, p0, 1, c, inside, C, L, MODALITIES, GATE, R, RB, BLOCKS, A)
    if PIXELS:
        pitch = C
    else:
        pitch = L

    like = tl.zeros((BC, BL), A)
    for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, L), BL):
        px = first + tl.arange(0, BL)
        here = inside[:, None] & (px < L)[None, :]
        value0 = _read(x0, c, px, here, x0_pitch, PIXELS, False, A)
        gradient0 = _gradient(g0, c, px, here, g0_pitch, like, PIXELS, False, A)
        of0 = k10[:, None] + k20[:, None] * (value0 - mean0[:, None]) + scale0[:, None] * gradient0
        if MODE != "restitute":
            gradient1 = _gradient(g1, c, px, here, g1_pitch, like, PIXELS, False, A)
            gradient2 = _gradient(g2, c, px, here, g2_pitch, like, PIXELS, False, A)
        if MODE == "snr":
            of0 += scale1[:, None] * gradient1 + a0[:, None] * gradient2
        if MODALITIES == 2:
            of0 += a0[:, None] * gradient1 + scale2[:, None] * gradient2
        if MODE == "concat":
            of0 += _gradient(first_set, c, px, here, g0_pitch, like, PIXELS, False, A)
        if GATE == "cbam-channel":
            of0 = tl.where(value0 == extreme0[:, None], of0 + k30[:, None], of0)
        _write(dx0, c, px, here, pitch, of0, PIXELS)
        if MODALITIES == 2:
            value1 = _read(x1, c, px, here, x1_pitch, PIXELS, False, A)
            gradient3 = _gradient(g3, c, px, here, g3_pitch, like, PIXELS, False, A)
            of1 = k11[:, None] + k21[:, None] * (value1 - mean1[:, None]) + scale1[:, None] * gradient1
            of1 += a1[:, None] * gradient2 + scale3[:, None] * gradient3
            if MODE == "concat":
                of1 += _gradient(last_set, c, px, here, g0_pitch, like, PIXELS, False, A)
            if GATE == "cbam-channel":
                of1 = tl.where(value1 == extreme1[:, None], of1 + k31[:, None], of1)
            _write(dx1, c, px, here, pitch, of1, PIXELS)


@triton.jit(do_not_specialize=["samples", "chunks"])
def gradient_kernel(
    x0, x1, x0_sample, x0_pitch, x1_sample, x1_pitch, g0, g1, g2, g3, g0_sample, g0_pitch, g1_sample,
    g1_pitch, g2_sample, g2_pitch, g3_sample, g3_pitch, gamma, beta, p0, statistics, scratch, dx0, dx1,
    dgamma, dbeta, d0, d1, d2, d3, samples, C, L, chunks, saved_row, scratch_row, MODE: tl.constexpr,
    GATE: tl.constexpr, TO_INPUT: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BLOCKS: tl.constexpr,
    PIXELS: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr, CHUNK: tl.constexpr, PC: tl.constexpr,
    A: tl.constexpr,
):
    """The parameters' gradients in the first programs, the inputs' in the rest.

    All they need is there: the programs of both kinds need not wait for each other. Those of the parameters
    go over the samples one by one, so they start first.
    """
    MODALITIES: tl.constexpr = 2 if MODE == "pair" or MODE == "concat" else 1
    GATES: tl.constexpr = 4 if MODALITIES == 2 else 1
    PARTS: tl.constexpr = (R + RB - 1) // RB
    program = tl.program_id(0)
    blocks = tl.cdiv(C, PC)
    norms = MODALITIES * blocks
    if GATE == "eca":
        gates = GATES
    else:
        gates = GATES * PARTS * blocks
    if program < norms:
        _norm_gradients(statistics, scratch, gamma, beta, p0, dgamma, dbeta, program // blocks,
                        program % blocks, samples, C, L, saved_row, scratch_row, MODALITIES, GATE, R, RB,
                        BLOCKS, PC, A)
    elif program < norms + gates:
        k = program - norms
        if GATE == "eca":
            _convolution_gradient(statistics, scratch, gamma, beta, d0, k, samples, C, saved_row, scratch_row,
                                  MODALITIES, R, PC, A)
        else:
            _layer_gradients(statistics, scratch, gamma, beta, d0, d1, d2, d3, k // (PARTS * blocks),
                             k % blocks, k // blocks % PARTS * RB, samples, C, saved_row, scratch_row,
                             MODALITIES, GATE, R, RB, BLOCKS, PC, A)
    else:
        k = program - norms - gates
        # The last sample first: it is what the sums left in the cache.
        i = (samples - 1 - k // (chunks * tl.cdiv(C, BC))).to(tl.int64)
        _input_gradients(
            x0, x1, x0_sample, x0_pitch, x1_sample, x1_pitch, g0, g1, g2, g3, g0_sample, g0_pitch, g1_sample,
            g1_pitch, g2_sample, g2_pitch, g3_sample, g3_pitch, gamma, beta, p0, statistics + i * saved_row,
            scratch + i * scratch_row, dx0, dx1, i, k // chunks % tl.cdiv(C, BC), k % chunks, samples, C, L,
            MODE, GATE, TO_INPUT, R, RB, BLOCKS, PIXELS, BC, BL, CHUNK, A)


# --- launchers --------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """How the work is cut. It may not depend on the mode: the order of a sum is part of the result."""

    channels: int  # a program of the first launches takes so many,
    pixels: int  # in tiles of so many
    tile_channels: int  # a program of the second launches,
    tile_pixels: int
    chunk: int  # over so many pixels
    warps: int = 4


# Blocks a sample: every program of a second launch adds up the shares of all of them.
MOST_BLOCKS = 32
PARAMETER_CHANNELS, HIDDEN = 64, 32  # the parameters' gradients and the gates' layers, a tile


@functools.lru_cache(maxsize=256)
def configure(channels: int, length: int, pixels: bool, element_size: int) -> Config:
    """The configuration of a shape class: no measurement stands behind it yet.

    A tile is 8 elements a thread (the ten sums of the backward are carried a lane), half as many in
    float64. Blocks of channels are as small as keeps them at `MOST_BLOCKS`, and where a pixel's channels are
    contiguous at least the 32 bytes that memory gives at once.
    """
    tile = 512 if element_size == 8 else 1024
    least = 32 // element_size if pixels else 4
    block = max(_power(-(-channels // MOST_BLOCKS)), min(least, _power(channels)))
    tile_channels = max(block, min(64, _power(channels))) if pixels else block
    tile_pixels = max(1, tile // tile_channels)
    return Config(
        block,
        max(1, min(_power(length), tile // block)),
        tile_channels,
        min(_power(length), tile_pixels),
        max(8 * tile // tile_channels, tile_pixels),
    )


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class Rows(NamedTuple):
    """Lengths of a sample's row: what the forward saves, and the scratch of each direction."""

    saved: int
    forward: int
    backward: int


class Mode(NamedTuple):
    """The modalities, gates and made sets of an operation."""

    modalities: int
    gates: int
    sets: int


MODES = {"pair": Mode(2, 4, 4), "concat": Mode(2, 4, 4), "restitute": Mode(1, 1, 1), "snr": Mode(1, 1, 3)}
GATES = ("se", "eca", "cbam-channel")


def _saved_row(mode: str, gate: str, channels: int, width: int) -> int:
    modalities, gates, _ = MODES[mode]
    hidden = 0 if gate == "eca" else gates * (2 if gate == "cbam-channel" else 1) * width
    return 2 * modalities * channels + hidden


def _rows(mode: str, gate: str, channels: int, width: int, blocks: int) -> Rows:
    modalities, gates, _ = MODES[mode]
    cbam = gate == "cbam-channel"
    shares = 0 if gate == "eca" else blocks * gates * width
    return Rows(
        _saved_row(mode, gate, channels, width),
        modalities * channels + shares * (2 if cbam else 1),
        2 * (modalities + gates + (modalities if cbam else 0)) * channels + shares,
    )


class Call(NamedTuple):
    """What the launches of an operation share."""

    samples: int
    channels: int
    length: int
    pixels: bool
    config: Config
    blocks: int
    rows: Rows
    precise: torch.dtype
    settings: dict[str, Any]  # the constants of every kernel

    @property
    def chunks(self) -> int:
        return -(-self.length // self.config.chunk)

    @property
    def second_programs(self) -> int:
        """Programs that write pixels."""
        return self.chunks * -(-self.channels // self.config.tile_channels) * self.samples

    def first_tile(self) -> dict[str, Any]:
        return {"BC": self.config.channels, "BL": self.config.pixels, **self.settings}

    def second_tile(self) -> dict[str, Any]:
        c = self.config
        return {"BC": c.tile_channels, "BL": c.tile_pixels, "CHUNK": c.chunk, **self.settings}


def _prepare(mode: str, first: Tensor, gate_parameters: Sequence[Tensor], gate: str) -> Call:
    if gate not in GATES:
        raise RuntimeError(f"gate: got {gate!r}, expected one of {', '.join(map(repr, GATES))}")
    samples, channels, height, width = first.shape
    length, hidden = height * width, gate_parameters[0].shape[1]
    pixels = shapes.is_pixels(first) and not shapes.is_planes(first)
    config = configure(channels, length, pixels, first.element_size())
    blocks = -(-channels // config.channels)
    double = first.dtype == torch.float64
    settings = {
        "GATE": gate,
        "R": hidden,
        "RB": min(HIDDEN, _power(hidden)),
        "BLOCKS": blocks,
        "PIXELS": pixels,
        "A": tl.float64 if double else tl.float32,
        "num_warps": config.warps,
        "enable_fp_fusion": False,
    }
    rows = _rows(mode, gate, channels, hidden, blocks)
    precise = torch.float64 if double else torch.float32
    return Call(samples, channels, length, pixels, config, blocks, rows, precise, settings)


def _launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **settings: Any) -> None:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **settings)
    else:
        kernel[(programs,)](*arguments, **settings)


def _read_maps(maps: Sequence[Tensor | None], pixels: bool) -> tuple[list[Tensor | None], list[int]]:
    """The maps in the call's layout, copied where they are in no such, and strides (sample, pitch) of each."""
    ready: list[Tensor | None] = []
    strides = []
    for x in maps:
        if x is None:
            ready.append(None)
            strides += [0, 0]
            continue
        x = shapes.in_layout(x, pixels)
        ready.append(x)
        strides += [x.stride(0), shapes.pixel_pitch(x) if pixels else x.stride(1)]
    return ready, strides


def _padded(values: Sequence[Any], number: int, by: Any = None) -> list[Any]:
    return [*values, *[by] * (number - len(values))]


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
    call = _prepare(mode, first, gate_parameters, gate)
    modalities, _, sets = MODES[mode]
    count, batch = (1, 6 * call.samples) if mode == "concat" else (sets, call.samples)
    made = [shapes.empty_like(first, batch) for _ in range(count)]
    statistics = first.new_empty((call.samples, call.rows.saved), dtype=call.precise)
    if call.samples == 0:
        return (*made, statistics)
    scratch = first.new_empty((call.samples, call.rows.forward), dtype=call.precise)
    maps, strides = _read_maps(inputs, call.pixels)
    maps, strides = _padded(maps, 2), _padded(strides, 4, 0)
    norm = norm_weight.contiguous(), norm_bias.contiguous()
    parameters = _padded([p.contiguous() for p in gate_parameters], 4)
    rows = call.rows.saved, call.rows.forward
    _launch(
        statistics_kernel,
        call.blocks * modalities * call.samples,
        first.device,
        *(*maps, *strides, *norm, parameters[0], statistics, scratch, call.channels, call.length, *rows),
        eps=eps,
        MODALITIES=modalities,
        **call.first_tile(),
    )
    _launch(
        output_kernel,
        call.second_programs,
        first.device,
        *(*maps, *strides, *norm, *parameters, statistics, scratch, *_padded(made, 4)),
        *(call.samples, call.channels, call.length, call.chunks, *rows),
        MODE=mode,
        TO_INPUT=to_input,
        **call.second_tile(),
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
    call = _prepare(mode, first, gate_parameters, gate)
    modalities, gates, _ = MODES[mode]
    of_inputs = [shapes.empty_like(first, call.samples) for _ in inputs]
    of_norm = [shapes.dense_like(p) for p in (norm_weight, norm_bias)]
    of_gate = [shapes.dense_like(p) for p in gate_parameters]
    scratch = first.new_empty((call.samples, call.rows.backward), dtype=call.precise)
    maps, strides = _read_maps(inputs, call.pixels)
    given, given_strides = _read_maps(gradients, call.pixels)
    if mode == "concat":  # one tensor holds every set's
        given, given_strides = given * 4, given_strides * 4
    maps, strides = _padded(maps, 2), _padded(strides, 4, 0)
    given, given_strides = _padded(given, 4), _padded(given_strides, 8, 0)
    norm = norm_weight.contiguous(), norm_bias.contiguous()
    parameters = _padded([p.contiguous() for p in gate_parameters], 4)
    rows = call.rows.saved, call.rows.backward
    read = (*maps, *strides, *given, *given_strides, *norm)
    if call.samples > 0:
        _launch(
            sums_kernel,
            call.blocks * call.samples,
            first.device,
            *(*read, *parameters, statistics, scratch, call.samples, call.channels, call.length, *rows),
            MODE=mode,
            TO_INPUT=to_input,
            **call.first_tile(),
        )
    tile = min(PARAMETER_CHANNELS, _power(call.channels))
    blocks = -(-call.channels // tile)
    parts = -(-call.settings["R"] // call.settings["RB"])
    parameter_programs = modalities * blocks + gates * (1 if gate == "eca" else parts * blocks)
    _launch(
        gradient_kernel,
        parameter_programs + call.second_programs,
        first.device,
        *(*read, parameters[0], statistics, scratch, *_padded(of_inputs, 2), *of_norm, *_padded(of_gate, 4)),
        *(call.samples, call.channels, call.length, call.chunks, *rows),
        MODE=mode,
        TO_INPUT=to_input,
        PC=tile,
        **call.second_tile(),
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


def _saved_of(mode: str) -> Callable[..., Tensor]:
    """The shape of what a forward saves, from its arguments."""
    count = MODES[mode].modalities

    def empty(*arguments: Any) -> Tensor:
        first, gate_parameters, gate = arguments[0], arguments[count + 2], arguments[count + 3]
        row = _saved_row(mode, gate, first.shape[1], gate_parameters[0].shape[1])
        return first.new_empty((first.shape[0], row), dtype=shapes.precise(first.dtype))

    return empty


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
FAKES: dict[str, Callable[..., Any]] = {}
for _mode, _op in (("pair", "block"), ("concat", "block_concat"), ("restitute", "restitute"), ("snr", "snr")):
    _modalities, _, _sets = MODES[_mode]
    _count, _batches = (1, 6) if _mode == "concat" else (_sets, 1)
    IMPLEMENTATIONS[f"{_op}_forward"] = _forward_of(_mode)
    IMPLEMENTATIONS[f"{_op}_backward"] = _backward_of(_mode)
    FAKES[f"{_op}_forward"] = shapes.forward_fake(_count, _batches, _saved_of(_mode))
    FAKES[f"{_op}_backward"] = shapes.backward_fake(_count, _modalities)
