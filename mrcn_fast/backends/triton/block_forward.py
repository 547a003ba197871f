"""The block's forward in Triton: `statistics_kernel`, then `output_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from mrcn_fast.backends.triton.block_algebra import (
    correction,
    distilled,
    extreme_residual,
    inverse_deviation,
    matrix,
    places,
    plane,
    pooled_residual,
    read_tile,
    restituted,
    vector,
    write_tile,
)
from mrcn_fast.backends.triton.block_gates import gate_value

# --- statistics -------------------------------------------------------------------------------------------


@triton.jit
def _moments(x, pitch, c, inside, L, K: tl.constexpr):
    """Mean, what rounding left of it, Σ (x - mean)², and (CBAM) maximum and minimum of planes.

    Every lane of a tile is a chunk of its own in Chan's combination: it carries the mean and the squared
    deviations of the pixels it met (Welford), and all are joined at the end. Both are taken of x less
    the plane's first pixel, so that the mean keeps its digits on a plane far from zero.
    """
    BC: tl.constexpr = K.BC
    BL: tl.constexpr = K.BL
    AHEAD: tl.constexpr = K.AHEAD
    lane = tl.arange(0, BL)
    pivot = tl.load(places(x, c, tl.zeros((1,), tl.int32), pitch, K), mask=inside[:, None], other=0.0)
    pivot = pivot.to(K.A)
    mean = tl.zeros((BC, BL), K.A)
    squares = tl.zeros((BC, BL), K.A)
    high = tl.full((BC, BL), float("-inf"), K.A)
    low = tl.full((BC, BL), float("inf"), K.A)
    met = tl.full((), 0.0, K.A)
    for first in range(0, L, BL * AHEAD):
        tiles = ()  # type: tuple
        for ahead in tl.static_range(AHEAD):  # every read is on its way before the first is waited for
            px = first + ahead * BL + lane
            here = inside[:, None] & (px < L)[None, :]
            tiles += ((here, read_tile(x, c, px, here, pitch, True, K)),)
        for ahead in tl.static_range(AHEAD):
            here, pixel = tiles[ahead]
            met += 1.0
            delta = (pixel - pivot) - mean
            joined = mean + delta * (1.0 / met)
            squares += tl.where(here, delta * ((pixel - pivot) - joined), 0.0)
            mean = tl.where(here, joined, mean)
            if K.GATE == "cbam-channel":
                high = tl.where(here & (pixel > high), pixel, high)
                low = tl.where(here & (pixel < low), pixel, low)
    count = ((L + BL - 1 - lane) // BL).to(K.A)[None, :]
    length = tl.cast(L, K.A)
    shift = tl.sum(mean * count, axis=1) / length
    off = mean - shift[:, None]
    squares = tl.sum(squares + count * off * off, axis=1)
    pivot = tl.sum(pivot, axis=1)
    rounded = pivot + shift
    kept = rounded - pivot
    offset = (pivot - (rounded - kept)) + (shift - kept)  # exactly what the addition lost
    return rounded, offset, squares, tl.max(high, axis=1), tl.min(low, axis=1)


@triton.jit
def _leave_shares(shares, weights, g, z, branch, c, inside, C, K: tl.constexpr):
    """These channels' part of gate g's hidden layer."""
    z = tl.where(inside, z, 0.0)
    for first in range(0, K.R, K.RB):
        r = first + tl.arange(0, K.RB)
        weight = matrix(weights, g * K.R + r, c, C, r < K.R, inside, K)
        tl.store(
            shares + (g * K.BRANCHES + branch) * K.R + r, tl.sum(weight * z[None, :], axis=1), mask=r < K.R
        )


@triton.jit
def _describe(x, pitch, gamma, beta, p0, statistics, scratch, block, m, C, L, K: tl.constexpr):
    """Statistics of a block of planes of modality m, and what its gates' hidden layers get from them."""
    GATES: tl.constexpr = K.GATES
    MODALITIES: tl.constexpr = K.MODALITIES
    c = block * K.BC + tl.arange(0, K.BC)
    inside = c < C
    mean, offset, squares, high, low = _moments(x, pitch, c, inside, L, K)
    r = inverse_deviation(squares / tl.cast(L, K.A), K)
    tl.store(statistics + 2 * m * C + c, mean, mask=inside)
    tl.store(statistics + (2 * m + 1) * C + c, r, mask=inside)
    tl.store(scratch + m * C + c, offset, mask=inside)
    if K.GATE != "eca":
        a = vector(gamma, m * C + c, inside, K) * r
        shift = vector(beta, m * C + c, inside, K)
        shares = scratch + MODALITIES * C + block * (GATES * K.BRANCHES * K.R)
        for k in tl.static_range(GATES // MODALITIES):
            g = m + k * MODALITIES
            z = pooled_residual(mean, a, shift)
            _leave_shares(shares, p0, g, z, 0, c, inside, C, K)
            if K.BRANCHES == 2:
                z = extreme_residual(mean, a, shift, tl.where(1.0 - a >= 0.0, high, low))
                _leave_shares(shares, p0, g, z, 1, c, inside, C, K)


@triton.jit
def statistics_kernel(
    x0,
    x1,
    gamma,
    beta,
    p0,
    statistics,
    scratch,
    x0_sample,
    x0_pitch,
    x1_sample,
    x1_pitch,
    C,
    L,
    saved_row,
    scratch_row,
    K: tl.constexpr,
):
    """One block of channels of one sample and modality a program."""
    program = tl.program_id(0)
    block = program % K.BLOCKS
    m = program // K.BLOCKS % K.MODALITIES
    i = (program // (K.BLOCKS * K.MODALITIES)).to(tl.int64)
    statistics += i * saved_row
    scratch += i * scratch_row
    # A call for each modality: choosing a pointer would lose what is known of its alignment.
    if K.MODALITIES == 1 or m == 0:
        _describe(x0 + i * x0_sample, x0_pitch, gamma, beta, p0, statistics, scratch, block, 0, C, L, K)
    else:
        _describe(x1 + i * x1_sample, x1_pitch, gamma, beta, p0, statistics, scratch, block, 1, C, L, K)


# --- output -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["samples", "chunks"])
def output_kernel(
    x0,
    x1,
    gamma,
    beta,
    p0,
    statistics,
    scratch,
    p1,
    p2,
    p3,
    y0,
    y1,
    y2,
    y3,
    x0_sample,
    x0_pitch,
    x1_sample,
    x1_pitch,
    C,
    L,
    saved_row,
    scratch_row,
    samples,
    chunks,
    K: tl.constexpr,
):
    """Every set of one block of channels of one sample, over K.CHUNK pixels, a program."""
    program = tl.program_id(0)
    chunk = program % chunks
    block = program // chunks % tl.cdiv(C, K.BC)
    # The last sample first: its planes are what the statistics left in the cache.
    i = (samples - 1 - program // (chunks * tl.cdiv(C, K.BC))).to(tl.int64)
    statistics += i * saved_row
    scratch += i * scratch_row
    planes, parameters = (statistics, gamma, beta), (p0, p1, p2, p3)
    shares = scratch + K.MODALITIES * C
    c = block * K.BC + tl.arange(0, K.BC)
    inside = c < C
    rank = block + chunk  # the first of a sample's programs keeps its hidden layers for the backward

    mean0, _, a0, beta0 = plane(planes, 0, c, inside, C, K)
    off0 = vector(scratch, c, inside, K)
    s0 = gate_value(planes, shares, parameters, 0, c, inside, rank, C, True, K)
    scale0, shift0 = restituted(s0, mean0, off0, a0, beta0, K.TO_INPUT)
    if K.MODALITIES == 2:
        mean1, _, a1, beta1 = plane(planes, 1, c, inside, C, K)
        off1 = vector(scratch, C + c, inside, K)
        s1 = gate_value(planes, shares, parameters, 1, c, inside, rank, C, True, K)
        s2 = gate_value(planes, shares, parameters, 2, c, inside, rank, C, True, K)
        s3 = gate_value(planes, shares, parameters, 3, c, inside, rank, C, True, K)
        scale3, shift3 = restituted(s1, mean1, off1, a1, beta1, K.TO_INPUT)
        scale1, shift1 = distilled(s3, mean1, off1, a1, beta1)
        scale2, shift2 = distilled(s2, mean0, off0, a0, beta0)
        shift1 += beta0 - correction(a0, off0)
        shift2 += beta1 - correction(a1, off1)
    if K.MODE == "snr":
        scale1, shift1 = restituted(1.0 - s0, mean0, off0, a0, beta0, False)
        shift2 = beta0 - correction(a0, off0)

    x0 += i * x0_sample
    if K.MODALITIES == 2:
        x1 += i * x1_sample
    volume = tl.cast(C, tl.int64) * L
    if K.MODE == "concat":  # the six sets one behind the other, the inputs first and last
        batch = samples * volume
        first_set = y0 + i * volume
        last_set = first_set + 5 * batch
        y1 = y0 + 2 * batch
        y2 = y0 + 3 * batch
        y3 = y0 + 4 * batch
        y0 = y0 + batch
    y0 += i * volume
    if K.MODE != "restitute":
        y1 += i * volume
        y2 += i * volume
    if K.MODALITIES == 2:
        y3 += i * volume
    y_pitch = C if K.PIXELS else L

    for first in range(chunk * K.CHUNK, min(chunk * K.CHUNK + K.CHUNK, L), K.BL):
        px = first + tl.arange(0, K.BL)
        here = inside[:, None] & (px < L)[None, :]
        pixel0 = read_tile(x0, c, px, here, x0_pitch, False, K)
        centered0 = pixel0 - mean0[:, None]
        restituted0 = shift0[:, None] + scale0[:, None] * centered0
        write_tile(y0, c, px, here, y_pitch, restituted0, K)
        if K.MODE == "snr":
            write_tile(y1, c, px, here, y_pitch, shift1[:, None] + scale1[:, None] * centered0, K)
            write_tile(y2, c, px, here, y_pitch, shift2[:, None] + a0[:, None] * centered0, K)
        if K.MODALITIES == 2:
            pixel1 = read_tile(x1, c, px, here, x1_pitch, False, K)
            centered1 = pixel1 - mean1[:, None]
            compensated0 = shift1[:, None] + a0[:, None] * centered0 + scale1[:, None] * centered1
            compensated1 = shift2[:, None] + a1[:, None] * centered1 + scale2[:, None] * centered0
            write_tile(y1, c, px, here, y_pitch, compensated0, K)
            write_tile(y2, c, px, here, y_pitch, compensated1, K)
            write_tile(y3, c, px, here, y_pitch, shift3[:, None] + scale3[:, None] * centered1, K)
        if K.MODE == "concat":
            write_tile(first_set, c, px, here, y_pitch, pixel0, K)
            write_tile(last_set, c, px, here, y_pitch, pixel1, K)
