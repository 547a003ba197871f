"""The block's backward in Triton (eq. 1-7): `sums_kernel`, `coefficients_kernel`, then `gradient_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from mrcn_fast.backends.triton.formulas import (
    add_shares,
    column,
    extreme_residual,
    fma,
    gate_gradient,
    keep,
    matrix,
    part_length,
    plane,
    pooled_residual,
    read_tile,
    restitution_scale,
    share_of_normalized,
    vector,
    write_tile,
)
from mrcn_fast.backends.triton.gates import gate_value, layers

# A sample's row of scratch holds, in this order:
#
#   the gradients' table                     K.GRADIENT_SLOTS planes of C numbers, see `coefficients_kernel`
#   gradients before the ReLUs               (gates, branches, R)
#   U, V of each modality | s of each gate | ∂ before the sigmoid of each gate | (CBAM) extreme pixel of each
#   modality | (CBAM) how often it occurs    planes of C numbers, K.PLANES in all
#   shares of the hidden layers' gradients   (blocks, gates, R)
#   sums of each part of the pixels          (parts, modalities, K.SUMS, C), if there are several

# --- sums -------------------------------------------------------------------------------------------------


@triton.jit
def _sample_of(g, i, samples, sample, CONCAT_SET: tl.constexpr):
    """Return where sample i of a gradient begins; CONCAT_SET is the set's place in a stack of six."""
    start = g
    if g is not None:
        start += (CONCAT_SET * samples + i) * sample
    return start


@triton.jit
def _gradient(start, c, px, here, pitch, like, KEEP: tl.constexpr, K: tl.constexpr):
    """Return a tile of a gradient, or zeros if the gradient is missing."""
    return tl.zeros(like.shape, K.A) if start is None else read_tile(start, c, px, here, pitch, KEEP, K)


@triton.jit
def _add_product(start, a, b, total):
    """Return total + a b if the gradient at `start` was given, else total, because 0 times a NaN is a NaN."""
    return total if start is None else fma(a, b, total)


@triton.jit
def _has(mask: tl.constexpr, number):
    """Return whether bit `number` of the mask is set; it may be known only when the kernel runs."""
    return ((tl.full((), mask, tl.int32) >> number) & 1) != 0


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


@triton.jit
def _planes_kept(scratch, C, K: tl.constexpr):
    """Return where U and V, the gates and their gradients begin in a sample's scratch."""
    return scratch + K.GRADIENT_SLOTS * C + K.GATES * K.BRANCHES * K.HIDDEN


@triton.jit
def _slope(planes, m, c, inside, C, K: tl.constexpr):
    """Return 1 or -1, the sign with which ±x is largest where M, which is affine in x, has its maximum."""
    _, _, a, _ = plane(planes, m, c, inside, C, K)
    return tl.where(1.0 - a >= 0.0, 1.0, -1.0).to(K.A)


@triton.jit
def _of_gates(sums, planes, parameters, m, c, inside, C, K: tl.constexpr):
    """Return U and V of whole planes of modality m, then s and the gradient before it of each of its gates.

    `sums` holds two numbers for each set, the sum of its gradient and that of the gradient times the centered
    input: first for F₊; then in a pair for the set that M went to and the set that F̃ went to, in SNR for F₋
    and F̃. With CBAM the extreme of ±x and how often it occurs stand last.
    """
    mean, _, a, beta = plane(planes, m, c, inside, C, K)
    # A gate comes from the hidden layer that the forward has kept, so no shares are read. A gate that belongs
    # to no set with a gradient must not show, not even by a NaN.
    used = _has(K.USED_GATES, m)
    s = tl.where(used, gate_value(planes, planes[0], parameters, m, c, inside, 0, C, False, K), 0.0)
    ds = gate_gradient(mean, a, beta, sums[0], sums[1])
    U = share_of_normalized(s, K.TO_INPUT) * sums[1]
    V = share_of_normalized(s, K.TO_INPUT) * sums[0]
    if K.MODE == "snr":
        ds -= gate_gradient(mean, a, beta, sums[2], sums[3])
        U += s * sums[3] + sums[5]
        V += s * sums[2] + sums[4]
    before = tl.where(inside & used, ds * s * (1.0 - s), 0.0)
    more_s, more_before = s, before
    if K.MODALITIES == 2:
        used = _has(K.USED_GATES, m + 2)
        more_s = gate_value(planes, planes[0], parameters, m + 2, c, inside, 0, C, False, K)
        more_s = tl.where(used, more_s, 0.0)
        ds = gate_gradient(mean, a, beta, sums[2], sums[3])
        U += sums[5] - more_s * sums[3]
        V += sums[4] - more_s * sums[2]
        more_before = tl.where(inside & used, ds * more_s * (1.0 - more_s), 0.0)
    return U, V, s, before, more_s, more_before


@triton.jit
def _keep_gates(kept, of_gates, m, c, inside, C, K: tl.constexpr):
    """Keep the gates and the gradients before their sigmoids."""
    _, _, s, before, more_s, more_before = of_gates
    keep(kept, 2 * K.MODALITIES + m, s, c, inside, C)
    keep(kept, K.BEFORE + m, before, c, inside, C)
    if K.MODALITIES == 2:
        keep(kept, 2 * K.MODALITIES + m + 2, more_s, c, inside, C)
        keep(kept, K.BEFORE + m + 2, more_before, c, inside, C)


@triton.jit
def _keep_extremes(kept, sums, planes, m, c, inside, C, K: tl.constexpr):
    PLAIN: tl.constexpr = K.SUMS - 2
    extreme = sums[PLAIN] * _slope(planes, m, c, inside, C, K)
    keep(kept, K.EXTREME + m, extreme, c, inside, C)
    keep(kept, K.EXTREME + K.MODALITIES + m, sums[PLAIN + 1], c, inside, C)
    return extreme, sums[PLAIN + 1]


@triton.jit
def _leave_shares(shares, weights, g, before, c, inside, C, K: tl.constexpr):
    """Store these channels' share of the gradient of gate g's hidden layer."""
    for first in range(0, K.R, K.RB):
        r = first + tl.arange(0, K.RB)
        weight = matrix(weights, g * C + c, r, K.R, inside, r < K.R, K)
        share = tl.sum(tl.where(_has(K.USED_GATES, g), weight * before[:, None], 0.0), axis=0)
        tl.store(shares + g * K.R + r, share, mask=r < K.R)


@triton.jit
def _finish(sums, planes, scratch, parameters, block, m, c, inside, C, K: tl.constexpr):
    """Keep what follows from the sums over whole planes, and store the hidden layers' shares of it."""
    kept = _planes_kept(scratch, C, K)
    of_gates = _of_gates(sums, planes, parameters, m, c, inside, C, K)
    keep(kept, 2 * m, of_gates[0], c, inside, C)
    keep(kept, 2 * m + 1, of_gates[1], c, inside, C)
    _keep_gates(kept, of_gates, m, c, inside, C, K)
    if K.GATE == "cbam-channel":
        _keep_extremes(kept, sums, planes, m, c, inside, C, K)
    if K.GATE != "eca":
        shares = kept + K.PLANES * C + block * (K.GATES * K.R)
        _leave_shares(shares, parameters[2], m, of_gates[3], c, inside, C, K)
        if K.MODALITIES == 2:
            _leave_shares(shares, parameters[2], m + 2, of_gates[5], c, inside, C, K)


@triton.jit
def _parts_of(scratch, m, C, K: tl.constexpr):
    """Return where the sums of modality m's parts begin, and the distance between two parts."""
    start = _planes_kept(scratch, C, K) + K.PLANES * C + K.BLOCKS * (K.GATES * K.HIDDEN)
    return start + m * K.SUMS * C, K.MODALITIES * K.SUMS * C


@triton.jit
def _leave(sums, planes, scratch, parameters, block, part, m, c, inside, C, K: tl.constexpr):
    SUMS: tl.constexpr = K.SUMS
    if K.PARTS == 1:
        _finish(sums, planes, scratch, parameters, block, m, c, inside, C, K)
    else:
        parts, pitch = _parts_of(scratch, m, C, K)
        for k in tl.static_range(SUMS):
            keep(parts + part * pitch, k, sums[k], c, inside, C)


@triton.jit
def _join_parts(scratch, m, c, inside, C, K: tl.constexpr):
    """Return the sums over whole planes, added up from those of their parts in the order of the parts."""
    PLAIN: tl.constexpr = K.SUMS - 2 * (K.BRANCHES - 1)
    SUMS: tl.constexpr = K.SUMS
    parts, pitch = _parts_of(scratch, m, C, K)
    part = tl.arange(0, triton.next_power_of_2(K.PARTS))
    each = ()  # type: tuple
    for k in tl.static_range(SUMS):  # every read is on its way before the first is waited for
        each += (matrix(parts + k * C, part, c, pitch, part < K.PARTS, inside, K),)
    sums = ()  # type: tuple
    for k in tl.static_range(PLAIN):
        sums += (tl.sum(each[k], axis=0),)
    if K.GATE == "cbam-channel":
        highest = tl.where((part < K.PARTS)[:, None], each[PLAIN], float("-inf"))
        extreme = tl.max(highest, axis=0)
        count = tl.sum(tl.where(highest == extreme[None, :], each[PLAIN + 1], 0.0), axis=0)
        sums += (extreme, count)
    return sums


@triton.jit(do_not_specialize=["samples"])
def sums_kernel(
    x0,
    x1,
    g0,
    g1,
    g2,
    g3,
    gamma,
    beta,
    p0,
    statistics,
    scratch,
    p1,
    p2,
    p3,
    x0_sample,
    x0_pitch,
    x1_sample,
    x1_pitch,
    g0_sample,
    g0_pitch,
    g1_sample,
    g1_pitch,
    g2_sample,
    g2_pitch,
    g3_sample,
    g3_pitch,
    C,
    L,
    saved_row,
    scratch_row,
    samples,
    K: tl.constexpr,
):
    """Make all sums over one part of the pixels of one block of channels of one sample."""
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
    planes, parameters = (statistics + i * saved_row, gamma, beta), (p0, p1, p2, p3)

    x0 += i * x0_sample
    g0 = _sample_of(g0, i, samples, g0_sample, K.CONCAT)
    g1 = _sample_of(g1, i, samples, g1_sample, 2 * K.CONCAT)
    g2 = _sample_of(g2, i, samples, g2_sample, 3 * K.CONCAT)
    g3 = _sample_of(g3, i, samples, g3_sample, 4 * K.CONCAT)

    mean0, _, _, _ = plane(planes, 0, c, inside, C, K)
    zero = tl.zeros((BC, BL), K.A)
    S0, T0 = zero, zero
    if K.MODALITIES == 2:
        x1 += i * x1_sample
        mean1, _, _, _ = plane(planes, 1, c, inside, C, K)
        T10, T21 = zero, zero
    if K.MODE != "restitute":
        S1, S2, T1, T2 = zero, zero, zero, zero
    if K.MODALITIES == 2:
        S3, T3 = zero, zero
    if K.GATE == "cbam-channel":
        sign0 = _slope(planes, 0, c, inside, C, K)
        best0, count0 = tl.full((BC, BL), float("-inf"), K.A), zero
        if K.MODALITIES == 2:
            sign1 = _slope(planes, 1, c, inside, C, K)
            best1, count1 = tl.full((BC, BL), float("-inf"), K.A), zero

    end = part * K.PART + part_length(part, L, K)
    for first in range(part * K.PART, end, BL * AHEAD):
        tiles = ()  # type: tuple
        for ahead in tl.static_range(AHEAD):  # every read is on its way before the first is waited for
            px = first + ahead * BL + tl.arange(0, BL)
            here = inside[:, None] & (px < end)[None, :]
            value0 = read_tile(x0, c, px, here, x0_pitch, True, K)
            gradient0 = _gradient(g0, c, px, here, g0_pitch, zero, True, K)
            value1, gradient1, gradient2, gradient3 = zero, zero, zero, zero
            if K.MODE != "restitute":
                gradient1 = _gradient(g1, c, px, here, g1_pitch, zero, True, K)
                gradient2 = _gradient(g2, c, px, here, g2_pitch, zero, True, K)
            if K.MODALITIES == 2:
                value1 = read_tile(x1, c, px, here, x1_pitch, True, K)
                gradient3 = _gradient(g3, c, px, here, g3_pitch, zero, True, K)
            tiles += ((here, value0, value1, gradient0, gradient1, gradient2, gradient3),)
        for ahead in tl.static_range(AHEAD):
            here, value0, value1, gradient0, gradient1, gradient2, gradient3 = tiles[ahead]
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
    _leave(sums, planes, scratch, parameters, block, part, 0, c, inside, C, K)
    if K.MODALITIES == 2:
        sums = (tl.sum(S3, axis=1), tl.sum(T3, axis=1), sum1, moment1, sum2, tl.sum(T21, axis=1))
        if K.GATE == "cbam-channel":
            sums += _extreme(best1, count1)
        _leave(sums, planes, scratch, parameters, block, part, 1, c, inside, C, K)


# --- coefficients -----------------------------------------------------------------------------------------


@triton.jit
def _keep_inner(row, inners, g, b, r, gradient, K: tl.constexpr):
    """Keep and return the gradient before the ReLU of gate g in branch b; both branches get `gradient`."""
    at = (g * K.BRANCHES + b) * K.R
    inner = tl.where(vector(row + at, r, r < K.R, K) <= 0.0, 0.0, gradient)
    tl.store(inners + at + r, inner, mask=r < K.R)  # every block of channels has the same
    return inner


@triton.jit
def _add_pooled(dz, dz_extreme, weight, gradient, row, inners, g, r, K: tl.constexpr):
    """Return dz and dz_extreme with what these hidden numbers of gate g add to them."""
    weight = tl.where(_has(K.USED_GATES, g), weight, 0.0)
    dz += tl.sum(weight * _keep_inner(row, inners, g, 0, r, gradient, K)[:, None], axis=0)
    if K.BRANCHES == 2:
        inner = _keep_inner(row, inners, g, 1, r, gradient, K)
        dz_extreme += tl.sum(weight * inner[:, None], axis=0)
    return dz, dz_extreme


@triton.jit
def _of_pooled(row, inners, shares, weights, g, c, inside, C, K: tl.constexpr):
    """Return ∂ of GAP(M) and of GMP(M) through gate g, from the shares of its hidden layer's gradient."""
    dz, dz_extreme = tl.zeros(c.shape, K.A), tl.zeros(c.shape, K.A)
    for first in range(0, K.R, K.RB):
        r = first + tl.arange(0, K.RB)
        gradient = add_shares(shares + g * K.R, r, K.GATES * K.R, K)
        weight = matrix(weights, g * K.R + r, c, C, r < K.R, inside, K)
        dz, dz_extreme = _add_pooled(dz, dz_extreme, weight, gradient, row, inners, g, r, K)
    return dz, dz_extreme


@triton.jit
def _of_neighbours(kept, weights, g, c, inside, C, K: tl.constexpr):
    """Return ∂ of GAP(M) through ECA's gate g."""
    dz = tl.zeros(c.shape, K.A)
    for t in range(K.R):
        to = c - t + K.R // 2
        reached = inside & (to >= 0) & (to < tl.where(_has(K.USED_GATES, g), C, 0))
        before = vector(kept + (K.BEFORE + g) * C, to, reached, K)
        dz += tl.where(reached, tl.load(weights + g * K.R + t).to(K.A) * before, 0.0)
    return dz


@triton.jit
def _of_all_channels(of_gates, row, inners, parameters, m, c, inside, C, K: tl.constexpr):
    """Return ∂ of GAP(M) and GMP(M) of modality m, in a program that has all channels' gate gradients."""
    RB: tl.constexpr = K.RB
    before, more_before = of_gates[3], of_gates[5]
    dz, dz_extreme = tl.zeros(c.shape, K.A), tl.zeros(c.shape, K.A)
    for first in range(0, K.R, RB):
        r = first + tl.arange(0, RB)
        weight, _, second = layers(parameters, m, r, c, inside, C, K)
        more_weight, more_second = weight, second
        if K.MODALITIES == 2:  # read before the first gate's sums are waited for
            more_weight, _, more_second = layers(parameters, m + 2, r, c, inside, C, K)
        gradient = tl.sum(tl.where(_has(K.USED_GATES, m), second * before[:, None], 0.0), axis=0)
        dz, dz_extreme = _add_pooled(dz, dz_extreme, weight, gradient, row, inners, m, r, K)
        if K.MODALITIES == 2:
            used = _has(K.USED_GATES, m + 2)
            gradient = tl.sum(tl.where(used, more_second * more_before[:, None], 0.0), axis=0)
            dz, dz_extreme = _add_pooled(dz, dz_extreme, more_weight, gradient, row, inners, m + 2, r, K)
    return dz, dz_extreme


@triton.jit
def coefficients_kernel(
    gamma, beta, p0, statistics, scratch, p1, p2, p3, C, L, saved_row, scratch_row, K: tl.constexpr
):
    """Make the gradients' table for one block of channels of one sample and modality.

    Where parts are joined, the block is all channels. The table has six slots per modality: mean, k1, k2, a,
    and the sample's part of ∂γ and of ∂β; then one slot per set, the factor of its gradient on the way back
    through a gate; and with CBAM the extreme of each modality and what ∂x gains there.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(C, K.BC)
    m = program // blocks % K.MODALITIES
    i = (program // (blocks * K.MODALITIES)).to(tl.int64)
    scratch += i * scratch_row
    planes, parameters = (statistics + i * saved_row, gamma, beta), (p0, p1, p2, p3)
    row = planes[0] + 2 * K.MODALITIES * C
    inners, kept = scratch + K.GRADIENT_SLOTS * C, _planes_kept(scratch, C, K)
    other = m + K.GATES - K.MODALITIES
    c = program % blocks * K.BC + tl.arange(0, K.BC)
    inside = c < C
    if K.PARTS > 1:
        sums = _join_parts(scratch, m, c, inside, C, K)
        of_gates = _of_gates(sums, planes, parameters, m, c, inside, C, K)
        U, V, s, _, more_s, _ = of_gates
        _keep_gates(kept, of_gates, m, c, inside, C, K)
        if K.GATE == "cbam-channel":
            extreme, count = _keep_extremes(kept, sums, planes, m, c, inside, C, K)
    else:
        U, V = vector(kept + 2 * m * C, c, inside, K), vector(kept + (2 * m + 1) * C, c, inside, K)
        gates = kept + 2 * K.MODALITIES * C
        s, more_s = vector(gates + m * C, c, inside, K), vector(gates + other * C, c, inside, K)
        if K.GATE == "cbam-channel":
            extreme = vector(kept + (K.EXTREME + m) * C, c, inside, K)
            count = vector(kept + (K.EXTREME + K.MODALITIES + m) * C, c, inside, K)
    if K.GATE == "eca":
        if K.PARTS > 1:
            tl.debug_barrier()  # the neighbours' gradients are what other threads have kept
        dz = _of_neighbours(kept, p0, m, c, inside, C, K)
        if K.MODALITIES == 2:
            dz += _of_neighbours(kept, p0, other, c, inside, C, K)
    else:
        if K.PARTS > 1:
            dz, dz_extreme = _of_all_channels(of_gates, row, inners, parameters, m, c, inside, C, K)
        else:
            shares = kept + K.PLANES * C
            dz, dz_extreme = _of_pooled(row, inners, shares, p0, m, c, inside, C, K)
            if K.MODALITIES == 2:
                more_dz, more_dz_extreme = _of_pooled(row, inners, shares, p0, other, c, inside, C, K)
                dz += more_dz
                dz_extreme += more_dz_extreme

    mean, r, a, _ = plane(planes, m, c, inside, C, K)
    if K.GATE == "cbam-channel":
        U -= (extreme - mean) * dz_extreme
        V -= dz_extreme
        first = K.GRADIENT_SLOTS - 2 * K.MODALITIES + 2 * m
        keep(scratch, first, extreme, c, inside, C)
        keep(scratch, first + 1, (1.0 - a) * dz_extreme / count, c, inside, C)
    length = tl.cast(L, K.A)
    keep(scratch, 6 * m, mean, c, inside, C)
    used = _has(K.USED_INPUTS, m)
    keep(scratch, 6 * m + 1, tl.where(used, (dz - a * V) / length, 0.0), c, inside, C)
    keep(scratch, 6 * m + 2, tl.where(used, -a * r * r * U / length, 0.0), c, inside, C)
    keep(scratch, 6 * m + 3, a, c, inside, C)
    keep(scratch, 6 * m + 4, tl.where(used, r * U + 0.0 * dz, 0.0), c, inside, C)
    keep(scratch, 6 * m + 5, tl.where(used, V - dz, 0.0), c, inside, C)
    scales = scratch + 6 * K.MODALITIES * C
    keep(scales, 3 * m, restitution_scale(s, a, K.TO_INPUT), c, inside, C)
    if K.MODE == "snr":
        keep(scales, 1, restitution_scale(1.0 - s, a, False), c, inside, C)
    if K.MODALITIES == 2:
        keep(scales, 2 - m, more_s * (1.0 - a), c, inside, C)


# --- gradients --------------------------------------------------------------------------------------------


@triton.jit
def _norm_gradients(scratch, dgamma, dbeta, m, block, samples, C, scratch_row, K: tl.constexpr):
    """Add up ∂γ and ∂β of a block of channels of modality m over the samples, in their order."""
    BESIDE: tl.constexpr = K.BESIDE
    PC: tl.constexpr = K.PC
    c = block * PC + tl.arange(0, PC)
    inside = c < C
    of_gamma, of_beta = tl.zeros((PC,), K.A), tl.zeros((PC,), K.A)
    for first in range(0, samples, K.BESIDE):
        for n in tl.static_range(BESIDE):  # their reads wait for nothing
            table = scratch + tl.cast(first + n, tl.int64) * scratch_row
            live = c < tl.where(first + n < samples, C, 0)
            of_gamma += vector(table + (6 * m + 4) * C, c, live, K)
            of_beta += vector(table + (6 * m + 5) * C, c, live, K)
    at = m * C + c
    tl.store(dgamma + at, of_gamma.to(dgamma.dtype.element_ty), mask=inside)
    tl.store(dbeta + at, of_beta.to(dbeta.dtype.element_ty), mask=inside)


@triton.jit
def _convolution_gradient(
    statistics, scratch, gamma, beta, dweight, g, samples, C, saved_row, scratch_row, K: tl.constexpr
):
    """Store ∂ of the convolution kernel of ECA's gate g."""
    PC: tl.constexpr = K.PC
    m = g % K.MODALITIES
    for t in range(K.R):
        total = tl.zeros((PC,), K.A)
        for n in range(0, samples):
            i = tl.cast(n, tl.int64)
            for first in range(0, C, PC):
                c = first + tl.arange(0, PC)
                source = c + t - K.R // 2
                inside = (source >= 0) & (source < C)  # elsewhere are the padding's zeros
                kept = _planes_kept(scratch + i * scratch_row, C, K)
                before = vector(kept + (K.BEFORE + g) * C, c, c < C, K)
                mean, _, a, shift = plane((statistics + i * saved_row, gamma, beta), m, source, inside, C, K)
                z = tl.where(inside, pooled_residual(mean, a, shift), 0.0)
                total += tl.where((c < C) & _has(K.USED_GATES, g), before * z, 0.0)
        tl.store(dweight + g * K.R + t, tl.sum(total, axis=0).to(dweight.dtype.element_ty))


@triton.jit
def _layer_gradients(
    statistics,
    scratch,
    gamma,
    beta,
    d0,
    d1,
    d2,
    d3,
    g,
    block,
    first,
    samples,
    C,
    saved_row,
    scratch_row,
    K: tl.constexpr,
):
    """Add up ∂ of both layers of gate g over the samples: a block of channels by K.RB hidden numbers."""
    BESIDE: tl.constexpr = K.BESIDE
    PC: tl.constexpr = K.PC
    BRANCHES: tl.constexpr = K.BRANCHES
    RB: tl.constexpr = K.RB
    m = g % K.MODALITIES
    c = block * PC + tl.arange(0, PC)
    r = first + tl.arange(0, RB)
    inside, known = c < C, r < K.R
    of_weight, of_more_weight = tl.zeros((PC, RB), K.A), tl.zeros((PC, RB), K.A)
    of_bias, of_more_bias = tl.zeros((RB,), K.A), tl.zeros((PC,), K.A)
    for start in range(0, samples, K.BESIDE):
        for n in tl.static_range(BESIDE):  # their reads wait for nothing
            here = start + n < samples
            here &= _has(K.USED_GATES, g)
            live, live_hidden = c < tl.where(here, C, 0), r < tl.where(here, K.R, 0)
            i = tl.cast(tl.minimum(start + n, samples - 1), tl.int64)
            saved, left = statistics + i * saved_row, scratch + i * scratch_row
            kept = _planes_kept(left, C, K)
            before = vector(kept + (K.BEFORE + g) * C, c, live, K)
            of_more_bias += BRANCHES * before
            mean, _, a, shift = plane((saved, gamma, beta), m, c, inside, C, K)
            for b in tl.static_range(BRANCHES):
                if b == 0:
                    z = pooled_residual(mean, a, shift)
                else:
                    z = extreme_residual(mean, a, shift, vector(kept + (K.EXTREME + m) * C, c, inside, K))
                at = (g * BRANCHES + b) * K.R
                hidden = vector(saved + 2 * K.MODALITIES * C + at, r, known, K)
                inner = vector(left + K.GRADIENT_SLOTS * C + at, r, live_hidden, K)
                of_bias += inner
                of_weight += tl.where(live[:, None], z[:, None] * inner[None, :], 0.0)
                of_more_weight += tl.where(live[:, None], before[:, None] * hidden[None, :], 0.0)
    both = inside[:, None] & known[None, :]
    at = g * K.R + r
    tl.store(d0 + at[None, :] * C + c[:, None], of_weight.to(d0.dtype.element_ty), mask=both)
    tl.store(d1 + at, of_bias.to(d1.dtype.element_ty), mask=r < tl.where(block == 0, K.R, 0))
    at = g * C + c
    tl.store(d2 + at[:, None] * K.R + r[None, :], of_more_weight.to(d2.dtype.element_ty), mask=both)
    tl.store(d3 + at, of_more_bias.to(d3.dtype.element_ty), mask=c < tl.where(first == 0, C, 0))


@triton.jit
def _input_gradients(
    input0,
    input1,
    set0,
    set1,
    set2,
    set3,
    table,
    dx0,
    dx1,
    i,
    block,
    chunk,
    samples,
    C,
    L,
    K: tl.constexpr,
):
    """Store ∂ of the inputs for one block of channels of one sample, over K.CHUNK pixels.

    Every map comes with its strides: (pointer, sample, pitch).
    """
    x0, x0_sample, x0_pitch = input0
    x1, x1_sample, x1_pitch = input1
    g0, g0_sample, g0_pitch = set0
    g1, g1_sample, g1_pitch = set1
    g2, g2_sample, g2_pitch = set2
    g3, g3_sample, g3_pitch = set3
    BC: tl.constexpr = K.BC
    BL: tl.constexpr = K.BL
    AHEAD: tl.constexpr = K.AHEAD
    M: tl.constexpr = K.MODALITIES
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    if K.MODE == "concat":
        first_set = _sample_of(g0, i, samples, g0_sample, 0)
        last_set = _sample_of(g0, i, samples, g0_sample, 5)
    g0 = _sample_of(g0, i, samples, g0_sample, K.CONCAT)
    g1 = _sample_of(g1, i, samples, g1_sample, 2 * K.CONCAT)
    g2 = _sample_of(g2, i, samples, g2_sample, 3 * K.CONCAT)
    g3 = _sample_of(g3, i, samples, g3_sample, 4 * K.CONCAT)

    x0 += i * x0_sample
    dx0 += i * C * L
    mean0 = column(table, 0, c, inside, C, K)
    k10 = column(table, 1, c, inside, C, K)
    k20 = column(table, 2, c, inside, C, K)
    scale0 = column(table, 6 * M, c, inside, C, K)
    if K.MODE != "restitute":
        a0 = column(table, 3, c, inside, C, K)
        scale1 = column(table, 6 * M + 1, c, inside, C, K)
    if M == 2:
        x1 += i * x1_sample
        dx1 += i * C * L
        mean1 = column(table, 6, c, inside, C, K)
        k11 = column(table, 7, c, inside, C, K)
        k21 = column(table, 8, c, inside, C, K)
        a1 = column(table, 9, c, inside, C, K)
        scale2 = column(table, 6 * M + 2, c, inside, C, K)
        scale3 = column(table, 6 * M + 3, c, inside, C, K)
    if K.GATE == "cbam-channel":
        extreme0 = column(table, K.GRADIENT_SLOTS - 2 * M, c, inside, C, K)
        k30 = column(table, K.GRADIENT_SLOTS - 2 * M + 1, c, inside, C, K)
        if M == 2:
            extreme1 = column(table, K.GRADIENT_SLOTS - 2, c, inside, C, K)
            k31 = column(table, K.GRADIENT_SLOTS - 1, c, inside, C, K)
    pitch = C if K.PIXELS else L

    zero = tl.zeros((BC, BL), K.A)
    end = min(chunk * K.CHUNK + K.CHUNK, L)
    for first in range(chunk * K.CHUNK, end, BL * AHEAD):
        tiles = ()  # type: tuple
        for ahead in tl.static_range(AHEAD):  # every read is on its way before the first is waited for
            px = first + ahead * BL + tl.arange(0, BL)
            here = inside[:, None] & (px < end)[None, :]
            value0 = read_tile(x0, c, px, here, x0_pitch, False, K)
            gradient0 = _gradient(g0, c, px, here, g0_pitch, zero, False, K)
            value1, gradient1, gradient2, gradient3, beside0, beside1 = zero, zero, zero, zero, zero, zero
            if K.MODE != "restitute":
                gradient1 = _gradient(g1, c, px, here, g1_pitch, zero, False, K)
                gradient2 = _gradient(g2, c, px, here, g2_pitch, zero, False, K)
            if M == 2:
                value1 = read_tile(x1, c, px, here, x1_pitch, False, K)
                gradient3 = _gradient(g3, c, px, here, g3_pitch, zero, False, K)
            if K.MODE == "concat":
                beside0 = _gradient(first_set, c, px, here, g0_pitch, zero, False, K)
                beside1 = _gradient(last_set, c, px, here, g0_pitch, zero, False, K)
            gradients = (gradient0, gradient1, gradient2, gradient3, beside0, beside1)
            tiles += ((px, here, value0, value1, gradients),)
        for ahead in tl.static_range(AHEAD):
            px, here, value0, value1, gradients = tiles[ahead]
            gradient0, gradient1, gradient2, gradient3, beside0, beside1 = gradients
            of0 = _add_product(g0, scale0, gradient0, fma(k20, value0 - mean0, k10))
            if K.MODE == "snr":
                of0 = _add_product(g1, scale1, gradient1, of0)
                of0 = _add_product(g2, a0, gradient2, of0)
            if M == 2:
                of0 = _add_product(g1, a0, gradient1, of0)
                of0 = _add_product(g2, scale2, gradient2, of0)
            if K.MODE == "concat":
                of0 += beside0
            if K.GATE == "cbam-channel":
                of0 = tl.where(value0 == extreme0, of0 + k30, of0)
            write_tile(dx0, c, px, here, pitch, of0, K)
            if M == 2:
                of1 = _add_product(g1, scale1, gradient1, fma(k21, value1 - mean1, k11))
                of1 = _add_product(g2, a1, gradient2, of1)
                of1 = _add_product(g3, scale3, gradient3, of1)
                if K.MODE == "concat":
                    of1 += beside1
                if K.GATE == "cbam-channel":
                    of1 = tl.where(value1 == extreme1, of1 + k31, of1)
                write_tile(dx1, c, px, here, pitch, of1, K)


@triton.jit(do_not_specialize=["samples", "chunks"])
def gradient_kernel(
    x0,
    x1,
    g0,
    g1,
    g2,
    g3,
    gamma,
    beta,
    p0,
    statistics,
    scratch,
    dx0,
    dx1,
    dgamma,
    dbeta,
    d0,
    d1,
    d2,
    d3,
    x0_sample,
    x0_pitch,
    x1_sample,
    x1_pitch,
    g0_sample,
    g0_pitch,
    g1_sample,
    g1_pitch,
    g2_sample,
    g2_pitch,
    g3_sample,
    g3_pitch,
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
    if program < norms:
        m, block = program // blocks, program % blocks
        _norm_gradients(scratch, dgamma, dbeta, m, block, samples, C, scratch_row, K)
    elif program < norms + gates:
        k = program - norms
        if K.GATE == "eca":
            _convolution_gradient(
                statistics, scratch, gamma, beta, d0, k, samples, C, saved_row, scratch_row, K
            )
        else:
            _layer_gradients(
                statistics,
                scratch,
                gamma,
                beta,
                d0,
                d1,
                d2,
                d3,
                k // (K.LAYER_PARTS * blocks),
                k % blocks,
                k // blocks % K.LAYER_PARTS * K.RB,
                samples,
                C,
                saved_row,
                scratch_row,
                K,
            )
    else:
        k = program - norms - gates
        across = tl.cdiv(C, K.BC)
        # The last sample first: it is what the sums left in the cache.
        i = (samples - 1 - k // (chunks * across)).to(tl.int64)
        _input_gradients(
            (x0, x0_sample, x0_pitch),
            (x1, x1_sample, x1_pitch),
            (g0, g0_sample, g0_pitch),
            (g1, g1_sample, g1_pitch),
            (g2, g2_sample, g2_pitch),
            (g3, g3_sample, g3_pitch),
            scratch + i * scratch_row,
            dx0,
            dx1,
            i,
            k % across if K.PIXELS else k // chunks % across,  # neighbours in memory side by side
            k // across % chunks if K.PIXELS else k % chunks,
            samples,
            C,
            L,
            K,
        )
