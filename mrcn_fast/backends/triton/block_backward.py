"""The block's backward over the pixels in Triton (eq. 1-7): `sums_kernel` and `gradient_kernel`.

Between the two, `coefficients_kernel` (block_backward_gates.py) turns the sums into the coefficients by which
`gradient_kernel` multiplies and which it adds. The first programs of `gradient_kernel` make the gradients of
the parameters (block_backward_parameters.py).

Both kernels take six maps, with their strides from sample to sample and their pitches (`formulas.places`):
the two inputs, then the gradients of the sets that the operation makes, in the order of its table
(mrcn_fast/operations.py). In concat every gradient is the same stack of the six sets' gradients. A map that
the operation lacks is None, and so is a gradient that was not given.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrcn_fast.backends.triton.block_backward_gates import finish_sums, slope
from mrcn_fast.backends.triton.block_backward_parameters import (
    convolution_gradient,
    layer_gradients,
    norm_gradients,
)
from mrcn_fast.backends.triton.formulas import (
    column,
    fma,
    part_length,
    plane,
    planes_of,
    read_tile,
    write_tile,
)

# --- maps -------------------------------------------------------------------------------------------------


@triton.jit
def _maps_of(maps, strides, i, samples, KEEP: tl.constexpr, K: tl.constexpr):
    """Return where sample i begins in the inputs, the gradients, and the gradients of the sets v and n.

    Only concat returns v and n, its inputs, and only the last reading (KEEP is false) needs their gradients.
    """
    x0, x1, g0, g1, g2, g3 = maps
    g_v, g_n = None, None
    x0 += i * strides[0]
    if x1 is not None:
        x1 += i * strides[1]
    if g0 is not None:
        if K.MODE == "concat" and not KEEP:
            g_v = g0 + i * strides[2]
            g_n = g0 + (5 * samples + i) * strides[2]
        g0 += (K.CONCAT * samples + i) * strides[2]
    if g1 is not None:
        g1 += (2 * K.CONCAT * samples + i) * strides[3]
    if g2 is not None:
        g2 += (3 * K.CONCAT * samples + i) * strides[4]
    if g3 is not None:
        g3 += (4 * K.CONCAT * samples + i) * strides[5]
    return (x0, x1), (g0, g1, g2, g3), (g_v, g_n)


@triton.jit
def _read(start, c, px, here, pitch, KEEP: tl.constexpr, K: tl.constexpr):
    """Return a tile of a map, or zeros if the map is missing."""
    return tl.zeros((K.BC, K.BL), K.A) if start is None else read_tile(start, c, px, here, pitch, KEEP, K)


@triton.jit
def _read_round(maps, pitches, c, inside, first, end, KEEP: tl.constexpr, K: tl.constexpr):
    """Return the tiles of a round; the program starts every read before it waits for the first.

    A tile consists of its pixels, a mask of its places that are inside the map, and the values there of all
    that `_maps_of` returns. KEEP says that the maps are read again soon.
    """
    (x0, x1), (g0, g1, g2, g3), (g_v, g_n) = maps
    AHEAD: tl.constexpr = K.AHEAD
    tiles = ()  # type: tuple
    for ahead in tl.static_range(AHEAD):
        px = first + ahead * K.BL + tl.arange(0, K.BL)
        here = inside[:, None] & (px < end)[None, :]
        value0 = _read(x0, c, px, here, pitches[0], KEEP, K)
        gradient0 = _read(g0, c, px, here, pitches[2], KEEP, K)
        gradient1 = _read(g1, c, px, here, pitches[3], KEEP, K)
        gradient2 = _read(g2, c, px, here, pitches[4], KEEP, K)
        value1 = _read(x1, c, px, here, pitches[1], KEEP, K)
        gradient3 = _read(g3, c, px, here, pitches[5], KEEP, K)
        gradient_v = _read(g_v, c, px, here, pitches[2], KEEP, K)
        gradient_n = _read(g_n, c, px, here, pitches[2], KEEP, K)
        gradients = (gradient0, gradient1, gradient2, gradient3)
        tiles += ((px, here, (value0, value1), gradients, (gradient_v, gradient_n)),)
    return tiles


@triton.jit
def _add_product(start, a, b, total):
    """Return total + a b if the gradient at `start` was given, else total, because 0 times a NaN is a NaN."""
    return total if start is None else fma(a, b, total)


# --- sums -------------------------------------------------------------------------------------------------


@triton.jit
def _count_extremes(value, here, best, count):
    """Return each lane's extreme so far, and how often it occurred."""
    value = tl.where(here, value, float("-inf"))
    better = value > best
    count = tl.where(better, 1.0, tl.where((value == best) & here, count + 1.0, count))
    return tl.where(better, value, best), count


@triton.jit
def _extreme(best, count):
    """Return the extreme of a plane from those of its lanes, and how many pixels have it."""
    extreme = tl.max(best, axis=1)
    return extreme, tl.sum(tl.where(best == extreme[:, None], count, 0.0), axis=1)


@triton.jit(do_not_specialize=["samples"])
def sums_kernel(
    maps,
    planes,
    parameters,
    scratch,
    strides,
    pitches,
    C,
    L,
    saved_row,
    scratch_row,
    samples,
    K: tl.constexpr,
):
    """Make all sums over one part of the pixels of one block of channels of one sample.

    S1 is the sum of gradient g1, and T1 the sum of its products with the centered input whose residual was
    added to the set. In a pair, T10 and T21 are the sums of the products with the set's own input.
    """
    BC: tl.constexpr = K.BC
    BL: tl.constexpr = K.BL
    AHEAD: tl.constexpr = K.AHEAD
    program = tl.program_id(0)
    blocks = tl.cdiv(C, BC)
    block = program % blocks
    part = program // blocks % K.PARTS
    i = (program // (blocks * K.PARTS)).to(tl.int64)
    scratch += i * scratch_row
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    planes = planes_of(planes, i, saved_row)
    starts = _maps_of(maps, strides, i, samples, True, K)
    g0, g1, g2, g3 = starts[1]

    mean0, _, _, _ = plane(planes, 0, c, inside, C, K)
    zero = tl.zeros((BC, BL), K.A)
    S0, T0 = zero, zero
    if K.MODALITIES == 2:
        mean1, _, _, _ = plane(planes, 1, c, inside, C, K)
        T10, T21 = zero, zero
    if K.MODE != "restitute":
        S1, S2, T1, T2 = zero, zero, zero, zero
    if K.MODALITIES == 2:
        S3, T3 = zero, zero
    if K.GATE == "cbam-channel":
        sign0 = slope(planes, 0, c, inside, C, K)
        best0, count0 = tl.full((BC, BL), float("-inf"), K.A), zero
        if K.MODALITIES == 2:
            sign1 = slope(planes, 1, c, inside, C, K)
            best1, count1 = tl.full((BC, BL), float("-inf"), K.A), zero

    end = part * K.PART + part_length(part, L, K)
    for first in range(part * K.PART, end, BL * AHEAD):
        tiles = _read_round(starts, pitches, c, inside, first, end, True, K)
        for ahead in tl.static_range(AHEAD):
            here = tiles[ahead][1]
            value0, value1 = tiles[ahead][2]
            gradient0, gradient1, gradient2, gradient3 = tiles[ahead][3]
            centered0 = value0 - mean0[:, None]
            S0 += gradient0
            T0 = _add_product(g0, gradient0, centered0, T0)
            if K.MODE != "restitute":
                S1 += gradient1
                S2 += gradient2
            if K.MODE == "snr":
                T1 = _add_product(g1, gradient1, centered0, T1)
                T2 = _add_product(g2, gradient2, centered0, T2)
            if K.GATE == "cbam-channel":
                best0, count0 = _count_extremes(value0 * sign0[:, None], here, best0, count0)
            if K.MODALITIES == 2:
                centered1 = value1 - mean1[:, None]
                S3 += gradient3
                T3 = _add_product(g3, gradient3, centered1, T3)
                T10 = _add_product(g1, gradient1, centered0, T10)
                T1 = _add_product(g1, gradient1, centered1, T1)
                T2 = _add_product(g2, gradient2, centered0, T2)
                T21 = _add_product(g2, gradient2, centered1, T21)
                if K.GATE == "cbam-channel":
                    best1, count1 = _count_extremes(value1 * sign1[:, None], here, best1, count1)

    sums = (tl.sum(S0, axis=1), tl.sum(T0, axis=1))  # type: tuple
    if K.MODE != "restitute":
        sum1, moment1, sum2, moment2 = (
            tl.sum(S1, axis=1),
            tl.sum(T1, axis=1),
            tl.sum(S2, axis=1),
            tl.sum(T2, axis=1),
        )
    if K.MODE == "snr":
        sums += (sum1, moment1, sum2, moment2)
    if K.MODALITIES == 2:
        sums += (sum2, moment2, sum1, tl.sum(T10, axis=1))
    if K.GATE == "cbam-channel":
        sums += _extreme(best0, count0)
    finish_sums(sums, planes, scratch, parameters, block, part, 0, c, inside, C, K)
    if K.MODALITIES == 2:
        sums = (tl.sum(S3, axis=1), tl.sum(T3, axis=1), sum1, moment1, sum2, tl.sum(T21, axis=1))
        if K.GATE == "cbam-channel":
            sums += _extreme(best1, count1)
        finish_sums(sums, planes, scratch, parameters, block, part, 1, c, inside, C, K)


# --- gradients --------------------------------------------------------------------------------------------


@triton.jit
def _coefficients_of(table, m, c, inside, C, K: tl.constexpr):
    """Return mean, k1, k2 and a of modality m; then, with CBAM, its extreme pixel and what ∂x gains there."""
    mean = column(table, 6 * m, c, inside, C, K)
    k1 = column(table, 6 * m + 1, c, inside, C, K)
    k2 = column(table, 6 * m + 2, c, inside, C, K)
    a = column(table, 6 * m + 3, c, inside, C, K)
    extreme, k3 = mean, k1
    if K.GATE == "cbam-channel":
        first = K.GRADIENT_SLOTS - 2 * K.MODALITIES + 2 * m
        extreme, k3 = column(table, first, c, inside, C, K), column(table, first + 1, c, inside, C, K)
    return mean, k1, k2, a, extreme, k3


@triton.jit
def _write_gradient(at, of, given, value, extreme, k3, K: tl.constexpr):
    """Store a tile of ∂x at `at`, the first arguments of `write_tile`.

    In concat it includes the gradient that was given for the input itself, and with CBAM that of GMP(M) at
    the extreme pixels.
    """
    dx, c, px, here, pitch = at
    if K.MODE == "concat":
        of += given
    if K.GATE == "cbam-channel":
        of = tl.where(value == extreme, of + k3, of)
    write_tile(dx, c, px, here, pitch, of, K)


@triton.jit
def _input_gradients(
    maps, of_inputs, table, strides, pitches, i, block, chunk, samples, C, L, K: tl.constexpr
):
    """Store ∂ of the inputs for one block of channels of one sample, over K.CHUNK pixels.

    `table` is what `coefficients_kernel` has made of the sample, and `of_inputs` are the inputs' gradients.
    """
    dx0, dx1 = of_inputs
    BC: tl.constexpr = K.BC
    AHEAD: tl.constexpr = K.AHEAD
    M: tl.constexpr = K.MODALITIES
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    starts = _maps_of(maps, strides, i, samples, False, K)
    g0, g1, g2, g3 = starts[1]

    dx0 += i * C * L
    mean0, k10, k20, a0, extreme0, k30 = _coefficients_of(table, 0, c, inside, C, K)
    scale0 = column(table, 6 * M, c, inside, C, K)
    if K.MODE != "restitute":
        scale1 = column(table, 6 * M + 1, c, inside, C, K)
    if M == 2:
        dx1 += i * C * L
        mean1, k11, k21, a1, extreme1, k31 = _coefficients_of(table, 1, c, inside, C, K)
        scale2 = column(table, 6 * M + 2, c, inside, C, K)
        scale3 = column(table, 6 * M + 3, c, inside, C, K)
    pitch = C if K.PIXELS else L

    end = min(chunk * K.CHUNK + K.CHUNK, L)
    for first in range(chunk * K.CHUNK, end, K.BL * AHEAD):
        tiles = _read_round(starts, pitches, c, inside, first, end, False, K)
        for ahead in tl.static_range(AHEAD):
            px, here, (value0, value1), gradients, (gradient_v, gradient_n) = tiles[ahead]
            gradient0, gradient1, gradient2, gradient3 = gradients
            of0 = _add_product(g0, scale0, gradient0, fma(k20, value0 - mean0, k10))
            if K.MODE == "snr":
                of0 = _add_product(g1, scale1, gradient1, of0)
                of0 = _add_product(g2, a0, gradient2, of0)
            if M == 2:
                of0 = _add_product(g1, a0, gradient1, of0)
                of0 = _add_product(g2, scale2, gradient2, of0)
            at0 = (dx0, c, px, here, pitch)
            _write_gradient(at0, of0, gradient_v, value0, extreme0, k30, K)
            if M == 2:
                of1 = _add_product(g1, scale1, gradient1, fma(k21, value1 - mean1, k11))
                of1 = _add_product(g2, a1, gradient2, of1)
                of1 = _add_product(g3, scale3, gradient3, of1)
                at1 = (dx1, c, px, here, pitch)
                _write_gradient(at1, of1, gradient_n, value1, extreme1, k31, K)


@triton.jit(do_not_specialize=["samples", "chunks"])
def gradient_kernel(
    # what is read: the maps, and what the launches before have left
    maps,
    planes,
    scratch,
    # the gradients
    of_inputs,
    dgamma,
    dbeta,
    of_gate,
    # sizes
    strides,
    pitches,
    C,
    L,
    saved_row,
    scratch_row,
    samples,
    chunks,
    K: tl.constexpr,
):
    """Make the parameters' gradients in the first programs, and the inputs' in the others.

    The launches before have left all that either kind needs, so no program waits for another. The programs of
    the parameters loop over the samples, which takes longest, so they start first.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(C, K.PC)
    norms = K.MODALITIES * blocks
    gates = K.GATES if K.GATE == "eca" else K.GATES * K.LAYER_PARTS * blocks
    rows = (saved_row, scratch_row)
    if program < norms:
        m, block = program // blocks, program % blocks
        norm_gradients(scratch, dgamma, dbeta, m, block, samples, C, scratch_row, K)
    elif program < norms + gates:
        k = program - norms
        if K.GATE == "eca":
            convolution_gradient(planes, scratch, of_gate[0], k, samples, C, rows, K)
        else:
            g, block = k // (K.LAYER_PARTS * blocks), k % blocks
            first = k // blocks % K.LAYER_PARTS * K.RB
            layer_gradients(planes, scratch, of_gate, g, block, first, samples, C, rows, K)
    else:
        k = program - norms - gates
        across = tl.cdiv(C, K.BC)
        # The last sample comes first, because the sums have left its maps in the cache.
        i = (samples - 1 - k // (chunks * across)).to(tl.int64)
        # Programs that start together read neighbours in memory.
        block = k % across if K.PIXELS else k // chunks % across
        chunk = k // across % chunks if K.PIXELS else k % chunks
        table = scratch + i * scratch_row
        _input_gradients(maps, of_inputs, table, strides, pitches, i, block, chunk, samples, C, L, K)
