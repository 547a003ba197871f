"""The block's forward in Triton (eq. 1-7): `statistics_kernel`, `gates_kernel`, then `output_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from mrcn_fast.backends.triton.formulas import (
    column,
    distilled,
    extreme_pixel,
    extreme_residual,
    fma,
    inverse_deviation,
    keep,
    matrix,
    normalized,
    part_length,
    places,
    plane,
    planes_of,
    pooled_residual,
    read_tile,
    restituted,
    vector,
    write_tile,
)
from mrcn_fast.backends.triton.gates import gate_value, whole_gates

# A sample's row of scratch holds, in this order:
#
#   the rounding error of each mean       or, until the parts are joined, the first pixel of each plane
#   shares of the hidden layers           (blocks, gates, branches, R)
#   moments of each part of the pixels    (parts, modalities, K.MOMENTS, C), if there are several
#   the output's table                    K.OUTPUT_SLOTS planes of C numbers, see `gates_kernel`

# --- statistics -------------------------------------------------------------------------------------------


@triton.jit
def _read_round(x, pitch, c, inside, first, end, K: tl.constexpr):
    """Return the tiles of a round; the program starts every read before it waits for the first."""
    BL: tl.constexpr = K.BL
    AHEAD: tl.constexpr = K.AHEAD
    tiles = ()  # type: tuple
    for ahead in tl.static_range(AHEAD):
        px = first + ahead * BL + tl.arange(0, BL)
        here = inside[:, None] & (px < end)[None, :]
        tiles += (read_tile(x, c, px, here, pitch, True, K),)
    return tiles


@triton.jit
def _join_round(moments, tiles, pivot, met, more, left, K: tl.constexpr):
    """Return the moments of lanes that met `met` pixels, joined with those of a round of `more` pixels.

    `left` is the number of pixels until the end if the round reaches beyond it, else None.
    """
    mean, squares, high, low = moments
    BL: tl.constexpr = K.BL
    AHEAD: tl.constexpr = K.AHEAD
    total = tl.zeros(mean.shape, K.A)
    for ahead in tl.static_range(AHEAD):
        value = tiles[ahead] - pivot
        if left is not None:
            value = tl.where((ahead * BL + tl.arange(0, BL) < left)[None, :], value, 0.0)
        total += value
    near = total / tl.maximum(more, 1.0)
    for ahead in tl.static_range(AHEAD):
        off = (tiles[ahead] - pivot) - near
        higher, lower = tiles[ahead] > high, tiles[ahead] < low
        if left is not None:
            here = (ahead * BL + tl.arange(0, BL) < left)[None, :]
            off = tl.where(here, off, 0.0)
            higher, lower = here & higher, here & lower
        squares = fma(off, off, squares)
        if K.GATE == "cbam-channel":
            high, low = tl.where(higher, tiles[ahead], high), tl.where(lower, tiles[ahead], low)
    off = near - mean
    share = more / tl.maximum(met + more, 1.0)
    # The order matters: `off` squared may be infinite, and at the first round it would be multiplied by 0.
    squares = fma(off, off * (met * share), squares)
    return fma(off, share, mean), squares, high, low


@triton.jit
def _moments(x, pitch, c, inside, begin, end, K: tl.constexpr):
    """Return the plane's first pixel p and, from begin to end, mean - p, Σ (x - mean)² and the extremes.

    Every lane of a tile has moments of its own, the mean and the squared deviations of the pixels that it has
    met. Those of a round come from two passes over registers and are joined with the moments before (Chan et
    al.). In the end the lanes are joined. The moments are those of x - p, so that the mean keeps its digits
    on a plane far from zero.
    """
    BC: tl.constexpr = K.BC
    BL: tl.constexpr = K.BL
    AHEAD: tl.constexpr = K.AHEAD
    lane = tl.arange(0, BL)
    pivot = tl.load(places(x, c, tl.zeros((1,), tl.int32), pitch, K), mask=inside[:, None], other=0.0)
    pivot = pivot.to(K.A)
    zero = tl.zeros((BC, BL), K.A)
    moments = (zero, zero, tl.full((BC, BL), float("-inf"), K.A), tl.full((BC, BL), float("inf"), K.A))
    rounds = (end - begin) // (BL * AHEAD)
    for n in range(0, rounds):
        tiles = _read_round(x, pitch, c, inside, begin + n * (BL * AHEAD), end, K)
        met, more = tl.cast(n * AHEAD, K.A), tl.cast(AHEAD, K.A)
        moments = _join_round(moments, tiles, pivot, met, more, None, K)
    left = (end - begin) - rounds * (BL * AHEAD)
    more = tl.minimum((left + BL - 1 - lane) // BL, AHEAD).to(K.A)[None, :]
    met = tl.cast(rounds * AHEAD, K.A)
    if left > 0:
        tiles = _read_round(x, pitch, c, inside, end - left, end, K)
        moments = _join_round(moments, tiles, pivot, met, more, left, K)
    mean, squares, high, low = moments
    met += more
    # Each mean is multiplied by its lane's share first, because the sum of the means might overflow.
    shift = tl.sum(mean * (met / tl.cast(end - begin, K.A)), axis=1)
    off = mean - shift[:, None]
    squares = tl.sum(squares + met * off * off, axis=1)
    return tl.sum(pivot, axis=1), shift, squares, tl.max(high, axis=1), tl.min(low, axis=1)


@triton.jit
def _leave_shares(shares, weights, g, z, branch, c, inside, C, K: tl.constexpr):
    """Store these channels' share of gate g's hidden layer."""
    z = tl.where(inside, z, 0.0)
    for first in range(0, K.R, K.RB):
        r = first + tl.arange(0, K.RB)
        weight = matrix(weights, g * K.R + r, c, C, r < K.R, inside, K)
        tl.store(
            shares + (g * K.BRANCHES + branch) * K.R + r, tl.sum(weight * z[None, :], axis=1), mask=r < K.R
        )


@triton.jit
def _keep_planes(moments, planes, scratch, m, c, inside, C, L, K: tl.constexpr):
    """Store the statistics of whole planes; return mean, its rounding error, a, β, GAP(M) and GMP(M)."""
    statistics, gamma, beta = planes
    pivot, shift, squares, high, low = moments
    mean = pivot + shift
    kept = mean - pivot
    offset = (pivot - (mean - kept)) + (shift - kept)  # the exact rounding error
    r = inverse_deviation(squares / tl.cast(L, K.A), K)
    tl.store(statistics + 2 * m * C + c, mean, mask=inside)
    tl.store(statistics + (2 * m + 1) * C + c, r, mask=inside)
    tl.store(scratch + m * C + c, offset, mask=inside)
    a = vector(gamma, m * C + c, inside, K) * r
    b = vector(beta, m * C + c, inside, K)
    z = pooled_residual(mean, a, b)
    extreme_z = z
    if K.BRANCHES == 2:
        extreme_z = extreme_residual(mean, a, b, extreme_pixel(a, high, low))
    return mean, offset, a, b, z, extreme_z


@triton.jit
def _describe(moments, planes, scratch, parameters, block, m, c, inside, C, L, K: tl.constexpr):
    """Store the statistics of whole planes of modality m, and the hidden layers' shares of them."""
    GATES: tl.constexpr = K.GATES
    MODALITIES: tl.constexpr = K.MODALITIES
    _, _, _, _, z, extreme_z = _keep_planes(moments, planes, scratch, m, c, inside, C, L, K)
    if K.GATE != "eca":
        shares = scratch + MODALITIES * C + block * (GATES * K.BRANCHES * K.R)
        for k in tl.static_range(GATES // MODALITIES):
            g = m + k * MODALITIES
            _leave_shares(shares, parameters[0], g, z, 0, c, inside, C, K)
            if K.BRANCHES == 2:
                _leave_shares(shares, parameters[0], g, extreme_z, 1, c, inside, C, K)


@triton.jit
def _parts_of(scratch, m, C, K: tl.constexpr):
    """Return where the moments of modality m's parts begin, and the distance between two parts."""
    start = K.MODALITIES * C + K.BLOCKS * (K.GATES * K.BRANCHES * K.HIDDEN)
    return scratch + start + m * K.MOMENTS * C, K.MODALITIES * K.MOMENTS * C


@triton.jit
def _table_of(scratch, C, K: tl.constexpr):
    """Return where the output's table begins, behind the parts."""
    parts, pitch = _parts_of(scratch, 0, C, K)
    return parts + (K.PARTS if K.PARTS > 1 else 0) * pitch


@triton.jit
def _leave_part(moments, scratch, part, m, c, inside, C, K: tl.constexpr):
    """Store the moments of one part of the pixels; the first part stores the planes' first pixels too."""
    pivot, shift, squares, high, low = moments
    parts, pitch = _parts_of(scratch, m, C, K)
    parts += part * pitch + c
    tl.store(parts, shift, mask=inside)
    tl.store(parts + C, squares, mask=inside)
    if K.GATE == "cbam-channel":
        tl.store(parts + 2 * C, high, mask=inside)
        tl.store(parts + 3 * C, low, mask=inside)
    tl.store(scratch + m * C + c, pivot, mask=c < tl.where(part == 0, C, 0))


@triton.jit
def _join_parts(scratch, m, c, inside, C, L, K: tl.constexpr):
    """Return the moments of whole planes, joined from those of their parts in the order of the parts."""
    parts, pitch = _parts_of(scratch, m, C, K)
    part = tl.arange(0, triton.next_power_of_2(K.PARTS))
    count = part_length(part, L, K).to(K.A)[:, None]
    shifts = matrix(parts, part, c, pitch, part < K.PARTS, inside, K)
    squares = matrix(parts + C, part, c, pitch, part < K.PARTS, inside, K)
    shift = tl.sum(shifts * (count / tl.cast(L, K.A)), axis=0)
    off = shifts - shift[None, :]
    squares = tl.sum(squares + count * off * off, axis=0)
    high, low = shift, shift
    if K.GATE == "cbam-channel":
        live = (part < K.PARTS)[:, None]
        highs = matrix(parts + 2 * C, part, c, pitch, part < K.PARTS, inside, K)
        lows = matrix(parts + 3 * C, part, c, pitch, part < K.PARTS, inside, K)
        high = tl.max(tl.where(live, highs, float("-inf")), axis=0)
        low = tl.min(tl.where(live, lows, float("inf")), axis=0)
    return vector(scratch, m * C + c, inside, K), shift, squares, high, low


@triton.jit
def _read_planes(x, pitch, planes, scratch, parameters, block, part, m, C, L, K: tl.constexpr):
    """Make the moments of one part of the pixels of modality m, and store what follows from them."""
    c = block * K.BC + tl.arange(0, K.BC)
    inside = c < C
    begin = part * K.PART
    moments = _moments(x, pitch, c, inside, begin, begin + part_length(part, L, K), K)
    if K.PARTS == 1:
        _describe(moments, planes, scratch, parameters, block, m, c, inside, C, L, K)
    else:
        _leave_part(moments, scratch, part, m, c, inside, C, K)


@triton.jit
def statistics_kernel(
    maps, planes, parameters, scratch, strides, pitches, C, L, saved_row, scratch_row, K: tl.constexpr
):
    """Make the statistics of one part of the pixels of one block of channels of one sample and modality."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, K.BC)
    block = program % blocks
    part = program // blocks % K.PARTS
    m = program // (blocks * K.PARTS) % K.MODALITIES
    i = (program // (blocks * K.PARTS * K.MODALITIES)).to(tl.int64)
    scratch += i * scratch_row
    planes = planes_of(planes, i, saved_row)
    # Each modality has a call of its own, because the alignment of a pointer is lost where it is chosen.
    if K.MODALITIES == 1 or m == 0:
        x = maps[0] + i * strides[0]
        _read_planes(x, pitches[0], planes, scratch, parameters, block, part, 0, C, L, K)
    else:
        x = maps[1] + i * strides[1]
        _read_planes(x, pitches[1], planes, scratch, parameters, block, part, 1, C, L, K)


# --- gates ------------------------------------------------------------------------------------------------


@triton.jit
def _keep_set(table, k, scale, shift, c, inside, C, K: tl.constexpr):
    """Store scale and shift of set k."""
    keep(table, 3 * K.MODALITIES + 2 * k, scale, c, inside, C)
    keep(table, 3 * K.MODALITIES + 2 * k + 1, shift, c, inside, C)


@triton.jit
def gates_kernel(planes, parameters, scratch, C, L, saved_row, scratch_row, K: tl.constexpr):
    """Make the output's table for one block of channels of one sample and modality.

    Where parts are joined, the block has all channels. The table has three slots per modality, its mean and
    F̃'s scale and shift. Then come two slots per set, the scale and shift of the term that has a gate.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(C, K.BC)
    block = program % blocks
    m = program // blocks % K.MODALITIES
    i = (program // (blocks * K.MODALITIES)).to(tl.int64)
    scratch += i * scratch_row
    planes = planes_of(planes, i, saved_row)
    table = _table_of(scratch, C, K)
    shares = scratch + K.MODALITIES * C
    c = block * K.BC + tl.arange(0, K.BC)
    inside = c < C
    if K.PARTS > 1:
        moments = _join_parts(scratch, m, c, inside, C, L, K)
        mean, offset, a, b, z, extreme_z = _keep_planes(moments, planes, scratch, m, c, inside, C, L, K)
    else:
        mean, _, a, b = plane(planes, m, c, inside, C, K)
        offset = vector(scratch, m * C + c, inside, K)
    other = m + K.GATES - K.MODALITIES
    if K.PARTS > 1 and K.GATE != "eca":
        row = planes[0] + 2 * K.MODALITIES * C
        s, more_s = whole_gates(z, extreme_z, row, parameters, m, c, inside, C, K)
    else:
        if K.PARTS > 1:
            tl.debug_barrier()  # ECA reads the neighbours' statistics, which other threads have stored
        s = gate_value(planes, shares, parameters, m, c, inside, block, C, True, K)
        more_s = s
        if K.MODALITIES == 2:
            more_s = gate_value(planes, shares, parameters, other, c, inside, block, C, True, K)

    scale, shift = normalized(offset, a, b)
    keep(table, 3 * m, mean, c, inside, C)
    keep(table, 3 * m + 1, scale, c, inside, C)
    keep(table, 3 * m + 2, shift, c, inside, C)
    scale, shift = restituted(s, mean, offset, a, b, K.TO_INPUT)
    _keep_set(table, 3 * m, scale, shift, c, inside, C, K)
    if K.MODE == "snr":
        scale, shift = restituted(1.0 - s, mean, offset, a, b, False)
        _keep_set(table, 1, scale, shift, c, inside, C, K)
    if K.MODALITIES == 2:  # to the other modality's compensated set
        scale, shift = distilled(more_s, mean, offset, a, b)
        _keep_set(table, 2 - m, scale, shift, c, inside, C, K)


# --- output -----------------------------------------------------------------------------------------------


@triton.jit
def _of_set(table, k, c, inside, C, K: tl.constexpr):
    """Return scale and shift of set k."""
    first = 3 * K.MODALITIES + 2 * k
    return column(table, first, c, inside, C, K), column(table, first + 1, c, inside, C, K)


@triton.jit(do_not_specialize=["samples", "chunks"])
def output_kernel(maps, made, scratch, strides, pitches, C, L, scratch_row, samples, chunks, K: tl.constexpr):
    """Write every made set for one block of channels of one sample, over K.CHUNK pixels."""
    x0, x1 = maps
    y0, y1, y2, y3 = made
    AHEAD: tl.constexpr = K.AHEAD
    program = tl.program_id(0)
    blocks = tl.cdiv(C, K.BC)
    # Programs that start together read neighbours in memory.
    block = program % blocks if K.PIXELS else program // chunks % blocks
    chunk = program // blocks % chunks if K.PIXELS else program % chunks
    # The last sample comes first, because the statistics have left its planes in the cache.
    i = (samples - 1 - program // (chunks * blocks)).to(tl.int64)
    table = _table_of(scratch + i * scratch_row, C, K)
    c = block * K.BC + tl.arange(0, K.BC)
    inside = c < C

    mean0 = column(table, 0, c, inside, C, K)
    scale0, shift0 = _of_set(table, 0, c, inside, C, K)
    if K.MODE != "restitute":
        a0, b0 = column(table, 1, c, inside, C, K), column(table, 2, c, inside, C, K)
        scale1, shift1 = _of_set(table, 1, c, inside, C, K)
    if K.MODALITIES == 2:
        mean1 = column(table, 3, c, inside, C, K)
        a1, b1 = column(table, 4, c, inside, C, K), column(table, 5, c, inside, C, K)
        scale2, shift2 = _of_set(table, 2, c, inside, C, K)
        scale3, shift3 = _of_set(table, 3, c, inside, C, K)
        shift1 += b0
        shift2 += b1

    x0 += i * strides[0]
    if K.MODALITIES == 2:
        x1 += i * strides[1]
    volume = tl.cast(C, tl.int64) * L
    if K.MODE == "concat":  # the six sets follow one another in one tensor, the inputs first and last
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

    end = min(chunk * K.CHUNK + K.CHUNK, L)
    for first in range(chunk * K.CHUNK, end, K.BL * AHEAD):
        tiles = ()  # type: tuple
        for ahead in tl.static_range(AHEAD):
            px = first + ahead * K.BL + tl.arange(0, K.BL)
            here = inside[:, None] & (px < end)[None, :]
            pixel0 = read_tile(x0, c, px, here, pitches[0], False, K)
            pixel1 = pixel0
            if K.MODALITIES == 2:
                pixel1 = read_tile(x1, c, px, here, pitches[1], False, K)
            tiles += ((px, here, pixel0, pixel1),)
        for ahead in tl.static_range(AHEAD):
            px, here, pixel0, pixel1 = tiles[ahead]
            centered0 = pixel0 - mean0
            write_tile(y0, c, px, here, y_pitch, fma(scale0, centered0, shift0), K)
            if K.MODE == "snr":
                write_tile(y1, c, px, here, y_pitch, fma(scale1, centered0, shift1), K)
                write_tile(y2, c, px, here, y_pitch, fma(a0, centered0, b0), K)
            if K.MODALITIES == 2:
                centered1 = pixel1 - mean1
                compensated = fma(scale1, centered1, fma(a0, centered0, shift1))
                write_tile(y1, c, px, here, y_pitch, compensated, K)
                compensated = fma(scale2, centered0, fma(a1, centered1, shift2))
                write_tile(y2, c, px, here, y_pitch, compensated, K)
                write_tile(y3, c, px, here, y_pitch, fma(scale3, centered1, shift3), K)
            if K.MODE == "concat":
                write_tile(first_set, c, px, here, y_pitch, pixel0, K)
                write_tile(last_set, c, px, here, y_pitch, pixel1, K)
