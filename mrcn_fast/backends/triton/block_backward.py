"""The block's backward in Triton: `sums_kernel`, then `gradient_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl

from mrcn_fast.backends.triton.block_algebra import (
    add_shares,
    extreme_residual,
    gate_gradient,
    matrix,
    plane,
    pooled_residual,
    read_tile,
    restitution_scale,
    share_of_normalized,
    vector,
    write_tile,
)
from mrcn_fast.backends.triton.block_gates import gate_value

# --- sums -------------------------------------------------------------------------------------------------
#
# A sample's row of scratch holds planes of C numbers, then the shares of the hidden layers' gradients:
#
#   U, V of each modality | s of each gate | ∂ before the sigmoid of each gate | (CBAM) extreme pixel of each
#   modality | (CBAM) how often it occurs | shares (blocks, gates, R)


@triton.jit
def _sample_of(g, i, samples, sample, CONCAT_SET: tl.constexpr):
    """Where sample i of a gradient begins; CONCAT_SET: which one of six sets in one tensor."""
    start = g
    if g is not None:
        start += (CONCAT_SET * samples + i) * sample
    return start


@triton.jit
def _gradient(start, c, px, here, pitch, like, KEEP: tl.constexpr, K: tl.constexpr):
    """A tile of a gradient, zeros where it is missing."""
    return tl.zeros(like.shape, K.A) if start is None else read_tile(start, c, px, here, pitch, KEEP, K)


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
def _leave_gradient(scratch, shares, weights, g, gradient, s, c, inside, C, K: tl.constexpr):
    """Keep s of gate g, the gradient before its sigmoid, and these channels' part of its hidden layer's."""
    before = tl.where(inside, gradient * s * (1.0 - s), 0.0)
    tl.store(scratch + (2 * K.MODALITIES + g) * C + c, s, mask=inside)
    tl.store(scratch + (K.BEFORE + g) * C + c, before, mask=inside)
    if K.GATE != "eca":
        for first in range(0, K.R, K.RB):
            r = first + tl.arange(0, K.RB)
            weight = matrix(weights, g * C + c, r, K.R, inside, r < K.R, K)
            tl.store(shares + g * K.R + r, tl.sum(weight * before[:, None], axis=0), mask=r < K.R)


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
    """All sums over the planes of one block of channels of one sample, and the gates' gradients from them."""
    BC: tl.constexpr = K.BC
    BL: tl.constexpr = K.BL
    AHEAD: tl.constexpr = K.AHEAD
    program = tl.program_id(0)
    block = program % K.BLOCKS
    i = (program // K.BLOCKS).to(tl.int64)
    statistics += i * saved_row
    scratch += i * scratch_row
    shares = scratch + K.PLANES * C + block * (K.GATES * K.R)
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    planes, parameters = (statistics, gamma, beta), (p0, p1, p2, p3)

    x0 += i * x0_sample
    g0 = _sample_of(g0, i, samples, g0_sample, K.CONCAT)
    g1 = _sample_of(g1, i, samples, g1_sample, 2 * K.CONCAT)
    g2 = _sample_of(g2, i, samples, g2_sample, 3 * K.CONCAT)
    g3 = _sample_of(g3, i, samples, g3_sample, 4 * K.CONCAT)

    mean0, _, a0, beta0 = plane(planes, 0, c, inside, C, K)
    zero = tl.zeros((BC, BL), K.A)
    S0, T0 = zero, zero
    if K.MODALITIES == 2:
        x1 += i * x1_sample
        mean1, _, a1, beta1 = plane(planes, 1, c, inside, C, K)
        T10, T21 = zero, zero
    if K.MODE != "restitute":
        S1, S2, T1, T2 = zero, zero, zero, zero
    if K.MODALITIES == 2:
        S3, T3 = zero, zero
    if K.GATE == "cbam-channel":  # M has its maximum at the largest value of ±x, whichever way it slopes
        sign0 = tl.where(1.0 - a0 >= 0.0, 1.0, -1.0).to(K.A)
        best0, count0 = tl.full((BC, BL), float("-inf"), K.A), zero
        if K.MODALITIES == 2:
            sign1 = tl.where(1.0 - a1 >= 0.0, 1.0, -1.0).to(K.A)
            best1, count1 = tl.full((BC, BL), float("-inf"), K.A), zero

    for first in range(0, L, BL * AHEAD):
        tiles = ()  # type: tuple
        for ahead in tl.static_range(AHEAD):  # every read is on its way before the first is waited for
            px = first + ahead * BL + tl.arange(0, BL)
            here = inside[:, None] & (px < L)[None, :]
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
            T0 += gradient0 * centered0
            if K.MODE != "restitute":
                S1 += gradient1
                S2 += gradient2
            if K.MODE == "snr":
                T1 += gradient1 * centered0
                T2 += gradient2 * centered0
            if K.GATE == "cbam-channel":
                best0, count0 = _count_extremes(value0 * sign0[:, None], here, best0, count0)
            if K.MODALITIES == 2:
                centered1 = value1 - mean1[:, None]
                S3 += gradient3
                T3 += gradient3 * centered1
                T10 += gradient1 * centered0
                T1 += gradient1 * centered1
                T2 += gradient2 * centered0
                T21 += gradient2 * centered1
                if K.GATE == "cbam-channel":
                    best1, count1 = _count_extremes(value1 * sign1[:, None], here, best1, count1)

    s0 = gate_value(planes, shares, parameters, 0, c, inside, 0, C, False, K)
    sum0, moment0 = tl.sum(S0, axis=1), tl.sum(T0, axis=1)
    ds0 = gate_gradient(mean0, a0, beta0, sum0, moment0)
    U0 = share_of_normalized(s0, K.TO_INPUT) * moment0
    V0 = share_of_normalized(s0, K.TO_INPUT) * sum0
    if K.MODE != "restitute":
        sum1, moment1 = tl.sum(S1, axis=1), tl.sum(T1, axis=1)
        sum2, moment2 = tl.sum(S2, axis=1), tl.sum(T2, axis=1)
    if K.MODE == "snr":
        ds0 -= gate_gradient(mean0, a0, beta0, sum1, moment1)
        U0 += s0 * moment1 + moment2
        V0 += s0 * sum1 + sum2
    if K.MODALITIES == 2:
        s1 = gate_value(planes, shares, parameters, 1, c, inside, 0, C, False, K)
        s2 = gate_value(planes, shares, parameters, 2, c, inside, 0, C, False, K)
        s3 = gate_value(planes, shares, parameters, 3, c, inside, 0, C, False, K)
        sum3, moment3 = tl.sum(S3, axis=1), tl.sum(T3, axis=1)
        U0 += tl.sum(T10, axis=1) - s2 * moment2
        V0 += sum1 - s2 * sum2
        U1 = share_of_normalized(s1, K.TO_INPUT) * moment3 + tl.sum(T21, axis=1) - s3 * moment1
        V1 = share_of_normalized(s1, K.TO_INPUT) * sum3 + sum2 - s3 * sum1
        tl.store(scratch + 2 * C + c, U1, mask=inside)
        tl.store(scratch + 3 * C + c, V1, mask=inside)
        ds1 = gate_gradient(mean1, a1, beta1, sum3, moment3)
        ds2 = gate_gradient(mean0, a0, beta0, sum2, moment2)
        ds3 = gate_gradient(mean1, a1, beta1, sum1, moment1)
        _leave_gradient(scratch, shares, p2, 1, ds1, s1, c, inside, C, K)
        _leave_gradient(scratch, shares, p2, 2, ds2, s2, c, inside, C, K)
        _leave_gradient(scratch, shares, p2, 3, ds3, s3, c, inside, C, K)
    tl.store(scratch + c, U0, mask=inside)
    tl.store(scratch + C + c, V0, mask=inside)
    _leave_gradient(scratch, shares, p2, 0, ds0, s0, c, inside, C, K)
    if K.GATE == "cbam-channel":
        extremes, counts = scratch + K.EXTREME * C + c, scratch + (K.EXTREME + K.MODALITIES) * C + c
        _keep_extremes(extremes, counts, best0, count0, sign0, inside)
        if K.MODALITIES == 2:
            _keep_extremes(extremes + C, counts + C, best1, count1, sign1, inside)


# --- gradients --------------------------------------------------------------------------------------------


@triton.jit
def _inner(row, shares, g, b, r, K: tl.constexpr):
    """Gradient before the ReLU of gate g's hidden layer in branch b; both branches share what comes to it."""
    hidden = vector(row + (g * K.BRANCHES + b) * K.R, r, r < K.R, K)
    return tl.where(hidden <= 0.0, 0.0, add_shares(shares + g * K.R, r, K.GATES * K.R, K))


@triton.jit
def _of_pooled(row, scratch, weights, m, b: tl.constexpr, c, inside, C, K: tl.constexpr):
    """∂z: gradient of GAP(M) of modality m (b = 0) or of GMP(M) (b = 1), through every gate that reads it."""
    GATES: tl.constexpr = K.GATES
    MODALITIES: tl.constexpr = K.MODALITIES
    hidden, shares = row + 2 * MODALITIES * C, scratch + K.PLANES * C
    dz = tl.zeros(c.shape, K.A)
    for k in tl.static_range(GATES // MODALITIES):
        g = m + k * MODALITIES
        if K.GATE == "eca":
            for t in range(K.R):
                to = c - t + K.R // 2
                reached = inside & (to >= 0) & (to < C)
                before = vector(scratch + (K.BEFORE + g) * C, to, reached, K)
                dz += tl.where(reached, tl.load(weights + g * K.R + t).to(K.A) * before, 0.0)
        else:
            for first in range(0, K.R, K.RB):
                r = first + tl.arange(0, K.RB)
                inner = _inner(hidden, shares, g, b, r, K)
                weight = matrix(weights, g * K.R + r, c, C, r < K.R, inside, K)
                dz += tl.sum(weight * inner[:, None], axis=0)
    return dz


@triton.jit
def _plane_gradient(planes, scratch, weights, m, c, inside, C, L, K: tl.constexpr):
    """k1, k2 of ∂x, (CBAM) the extreme pixel and what is added there, and the sample's part of ∂γ and ∂β."""
    mean, r, a, _ = plane(planes, m, c, inside, C, K)
    U = vector(scratch + 2 * m * C, c, inside, K)
    V = vector(scratch + (2 * m + 1) * C, c, inside, K)
    dz = _of_pooled(planes[0], scratch, weights, m, 0, c, inside, C, K)
    extreme, k3 = mean, mean
    if K.GATE == "cbam-channel":
        extreme = vector(scratch + (K.EXTREME + m) * C, c, inside, K)
        count = vector(scratch + (K.EXTREME + K.MODALITIES + m) * C, c, inside, K)
        of = _of_pooled(planes[0], scratch, weights, m, 1, c, inside, C, K)
        U -= (extreme - mean) * of
        V -= of
        k3 = (1.0 - a) * of / count
    length = tl.cast(L, K.A)
    return (dz - a * V) / length, -a * r * r * U / length, extreme, k3, r * U + 0.0 * dz, V - dz


@triton.jit
def _norm_gradients(
    statistics,
    scratch,
    gamma,
    beta,
    weights,
    dgamma,
    dbeta,
    m,
    block,
    samples,
    C,
    L,
    saved_row,
    scratch_row,
    K: tl.constexpr,
):
    """∂γ and ∂β of a block of channels of modality m, over the samples in their order."""
    PC: tl.constexpr = K.PC
    c = block * PC + tl.arange(0, PC)
    inside = c < C
    of_gamma, of_beta = tl.zeros((PC,), K.A), tl.zeros((PC,), K.A)
    for n in range(0, samples):
        i = tl.cast(n, tl.int64)
        _, _, _, _, more_gamma, more_beta = _plane_gradient(
            (statistics + i * saved_row, gamma, beta),
            scratch + i * scratch_row,
            weights,
            m,
            c,
            inside,
            C,
            L,
            K,
        )
        of_gamma += more_gamma
        of_beta += more_beta
    at = m * C + c
    tl.store(dgamma + at, of_gamma.to(dgamma.dtype.element_ty), mask=inside)
    tl.store(dbeta + at, of_beta.to(dbeta.dtype.element_ty), mask=inside)


@triton.jit
def _convolution_gradient(
    statistics, scratch, gamma, beta, dweight, g, samples, C, saved_row, scratch_row, K: tl.constexpr
):
    """∂ of ECA's kernel of gate g."""
    PC: tl.constexpr = K.PC
    m = g % K.MODALITIES
    for t in range(K.R):
        total = tl.zeros((PC,), K.A)
        for n in range(0, samples):
            i = tl.cast(n, tl.int64)
            for first in range(0, C, PC):
                c = first + tl.arange(0, PC)
                source = c + t - K.R // 2
                inside = (c < C) & (source >= 0) & (source < C)
                before = vector(scratch + i * scratch_row + (K.BEFORE + g) * C, c, inside, K)
                mean, _, a, shift = plane((statistics + i * saved_row, gamma, beta), m, source, inside, C, K)
                total += tl.where(inside, before * pooled_residual(mean, a, shift), 0.0)
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
    """∂ of both layers of gate g: a block of channels by K.RB hidden numbers, over the samples."""
    PC: tl.constexpr = K.PC
    BRANCHES: tl.constexpr = K.BRANCHES
    RB: tl.constexpr = K.RB
    m = g % K.MODALITIES
    c = block * PC + tl.arange(0, PC)
    r = first + tl.arange(0, RB)
    inside, known = c < C, r < K.R
    of_weight, of_more_weight = tl.zeros((PC, RB), K.A), tl.zeros((PC, RB), K.A)
    of_bias, of_more_bias = tl.zeros((RB,), K.A), tl.zeros((PC,), K.A)
    for n in range(0, samples):
        i = tl.cast(n, tl.int64)
        saved, left = statistics + i * saved_row, scratch + i * scratch_row
        row, shares = saved + 2 * K.MODALITIES * C, left + K.PLANES * C
        before = vector(left + (K.BEFORE + g) * C, c, inside, K)
        of_more_bias += BRANCHES * before
        mean, _, a, shift = plane((saved, gamma, beta), m, c, inside, C, K)
        for b in tl.static_range(BRANCHES):
            if b == 0:
                z = pooled_residual(mean, a, shift)
            else:
                z = extreme_residual(mean, a, shift, vector(left + (K.EXTREME + m) * C, c, inside, K))
            hidden = vector(row + (g * BRANCHES + b) * K.R, r, known, K)
            inner = _inner(row, shares, g, b, r, K)
            of_bias += inner
            of_weight += z[:, None] * inner[None, :]
            of_more_weight += before[:, None] * hidden[None, :]
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
    planes,
    scratch,
    weights,
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
    """∂ of the inputs of one block of channels of one sample, over K.CHUNK pixels.

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
    c = block * BC + tl.arange(0, BC)
    inside = c < C
    gates = scratch + 2 * K.MODALITIES * C
    if K.MODE == "concat":
        first_set = _sample_of(g0, i, samples, g0_sample, 0)
        last_set = _sample_of(g0, i, samples, g0_sample, 5)
    g0 = _sample_of(g0, i, samples, g0_sample, K.CONCAT)
    g1 = _sample_of(g1, i, samples, g1_sample, 2 * K.CONCAT)
    g2 = _sample_of(g2, i, samples, g2_sample, 3 * K.CONCAT)
    g3 = _sample_of(g3, i, samples, g3_sample, 4 * K.CONCAT)

    x0 += i * x0_sample
    dx0 += i * C * L
    mean0, _, a0, _ = plane(planes, 0, c, inside, C, K)
    s0 = vector(gates, c, inside, K)
    scale0 = restitution_scale(s0, a0, K.TO_INPUT)
    k10, k20, extreme0, k30, _, _ = _plane_gradient(planes, scratch, weights, 0, c, inside, C, L, K)
    if K.MODE == "snr":
        scale1 = restitution_scale(1.0 - s0, a0, False)
    if K.MODALITIES == 2:
        x1 += i * x1_sample
        dx1 += i * C * L
        mean1, _, a1, _ = plane(planes, 1, c, inside, C, K)
        scale3 = restitution_scale(vector(gates + C, c, inside, K), a1, K.TO_INPUT)
        scale2 = vector(gates + 2 * C, c, inside, K) * (1.0 - a0)
        scale1 = vector(gates + 3 * C, c, inside, K) * (1.0 - a1)
        k11, k21, extreme1, k31, _, _ = _plane_gradient(planes, scratch, weights, 1, c, inside, C, L, K)
    pitch = C if K.PIXELS else L

    like = tl.zeros((BC, BL), K.A)
    for first in range(chunk * K.CHUNK, min(chunk * K.CHUNK + K.CHUNK, L), BL):
        px = first + tl.arange(0, BL)
        here = inside[:, None] & (px < L)[None, :]
        value0 = read_tile(x0, c, px, here, x0_pitch, False, K)
        gradient0 = _gradient(g0, c, px, here, g0_pitch, like, False, K)
        of0 = k10[:, None] + k20[:, None] * (value0 - mean0[:, None]) + scale0[:, None] * gradient0
        if K.MODE != "restitute":
            gradient1 = _gradient(g1, c, px, here, g1_pitch, like, False, K)
            gradient2 = _gradient(g2, c, px, here, g2_pitch, like, False, K)
        if K.MODE == "snr":
            of0 += scale1[:, None] * gradient1 + a0[:, None] * gradient2
        if K.MODALITIES == 2:
            of0 += a0[:, None] * gradient1 + scale2[:, None] * gradient2
        if K.MODE == "concat":
            of0 += _gradient(first_set, c, px, here, g0_pitch, like, False, K)
        if K.GATE == "cbam-channel":
            of0 = tl.where(value0 == extreme0[:, None], of0 + k30[:, None], of0)
        write_tile(dx0, c, px, here, pitch, of0, K)
        if K.MODALITIES == 2:
            value1 = read_tile(x1, c, px, here, x1_pitch, False, K)
            gradient3 = _gradient(g3, c, px, here, g3_pitch, like, False, K)
            of1 = k11[:, None] + k21[:, None] * (value1 - mean1[:, None]) + scale1[:, None] * gradient1
            of1 += a1[:, None] * gradient2 + scale3[:, None] * gradient3
            if K.MODE == "concat":
                of1 += _gradient(last_set, c, px, here, g0_pitch, like, False, K)
            if K.GATE == "cbam-channel":
                of1 = tl.where(value1 == extreme1[:, None], of1 + k31[:, None], of1)
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
    """The parameters' gradients in the first programs, the inputs' in the rest.

    All they need is there: the programs of both kinds need not wait for each other. Those of the parameters
    go over the samples one by one, so they start first.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(C, K.PC)
    norms = K.MODALITIES * blocks
    gates = K.GATES if K.GATE == "eca" else K.GATES * K.PARTS * blocks
    if program < norms:
        _norm_gradients(
            statistics,
            scratch,
            gamma,
            beta,
            p0,
            dgamma,
            dbeta,
            program // blocks,
            program % blocks,
            samples,
            C,
            L,
            saved_row,
            scratch_row,
            K,
        )
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
                k // (K.PARTS * blocks),
                k % blocks,
                k // blocks % K.PARTS * K.RB,
                samples,
                C,
                saved_row,
                scratch_row,
                K,
            )
    else:
        k = program - norms - gates
        # The last sample first: it is what the sums left in the cache.
        i = (samples - 1 - k // (chunks * tl.cdiv(C, K.BC))).to(tl.int64)
        _input_gradients(
            (x0, x0_sample, x0_pitch),
            (x1, x1_sample, x1_pitch),
            (g0, g0_sample, g0_pitch),
            (g1, g1_sample, g1_pitch),
            (g2, g2_sample, g2_pitch),
            (g3, g3_sample, g3_pitch),
            (statistics + i * saved_row, gamma, beta),
            scratch + i * scratch_row,
            p0,
            dx0,
            dx1,
            i,
            k // chunks % tl.cdiv(C, K.BC),
            k % chunks,
            samples,
            C,
            L,
            K,
        )
