"""The block's backward between the passes over the pixels in Triton (eq. 1-7): `coefficients_kernel`.

It makes, from the sums over whole planes, the gradients through the gates and the coefficients of the inputs'
gradients. Where a program of `sums_kernel` has read whole planes, it begins with that itself (`finish_sums`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrcn_fast.backends.triton.formulas import (
    add_shares,
    extreme_pixel,
    gate_gradient,
    keep,
    matrix,
    plane,
    plane_gradient,
    planes_of,
    restitution_scale,
    share_of_normalized,
    vector,
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


@triton.jit
def is_set(mask: tl.constexpr, number):
    """Return whether bit `number` of the mask is set; the number need not be known at compile time."""
    return ((tl.full((), mask, tl.int32) >> number) & 1) != 0


@triton.jit
def kept_planes(scratch, C, K: tl.constexpr):
    """Return where U and V, the gates and their gradients begin in a sample's scratch."""
    return scratch + K.GRADIENT_SLOTS * C + K.GATES * K.BRANCHES * K.HIDDEN


@triton.jit
def slope(planes, m, c, inside, C, K: tl.constexpr):
    """Return the sign (1 or -1) by which x is multiplied so that its maximum is where M has its maximum."""
    _, _, a, _ = plane(planes, m, c, inside, C, K)
    return extreme_pixel(a, 1.0, -1.0).to(K.A)


@triton.jit
def _of_gates(sums, planes, parameters, m, c, inside, C, K: tl.constexpr):
    """Return U and V of whole planes of modality m; then, for each of its gates, s and ∂ before the sigmoid.

    `sums` holds two numbers per set: the sum of the set's gradient, and the sum of the gradient times the
    centered input. The first set is F₊. In a pair the second is the set that M was added to and the third
    the set that F̃ was added to; in SNR they are F₋ and F̃. With CBAM the last two numbers are the extreme of
    ±x and the number of pixels that have it.
    """
    mean, _, a, beta = plane(planes, m, c, inside, C, K)
    # The gate is computed from the hidden layer that the forward has saved, so no shares are read. A gate
    # whose sets have no gradient must change nothing, not even by a NaN.
    used = is_set(K.USED_GATES, m)
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
        used = is_set(K.USED_GATES, m + 2)
        more_s = gate_value(planes, planes[0], parameters, m + 2, c, inside, 0, C, False, K)
        more_s = tl.where(used, more_s, 0.0)
        ds = gate_gradient(mean, a, beta, sums[2], sums[3])
        U += sums[5] - more_s * sums[3]
        V += sums[4] - more_s * sums[2]
        more_before = tl.where(inside & used, ds * more_s * (1.0 - more_s), 0.0)
    return U, V, s, before, more_s, more_before


@triton.jit
def _keep_gates(kept, of_gates, m, c, inside, C, K: tl.constexpr):
    """Store the gates and the gradients before their sigmoids."""
    _, _, s, before, more_s, more_before = of_gates
    keep(kept, 2 * K.MODALITIES + m, s, c, inside, C)
    keep(kept, K.BEFORE + m, before, c, inside, C)
    if K.MODALITIES == 2:
        keep(kept, 2 * K.MODALITIES + m + 2, more_s, c, inside, C)
        keep(kept, K.BEFORE + m + 2, more_before, c, inside, C)


@triton.jit
def _keep_extremes(kept, sums, planes, m, c, inside, C, K: tl.constexpr):
    """Store and return the extreme pixel of every plane, and how many pixels have its value."""
    PLAIN: tl.constexpr = K.SUMS - 2
    extreme = sums[PLAIN] * slope(planes, m, c, inside, C, K)
    keep(kept, K.EXTREME + m, extreme, c, inside, C)
    keep(kept, K.EXTREME + K.MODALITIES + m, sums[PLAIN + 1], c, inside, C)
    return extreme, sums[PLAIN + 1]


@triton.jit
def _leave_shares(shares, weights, g, before, c, inside, C, K: tl.constexpr):
    """Store these channels' share of the gradient of gate g's hidden layer."""
    for first in range(0, K.R, K.RB):
        r = first + tl.arange(0, K.RB)
        weight = matrix(weights, g * C + c, r, K.R, inside, r < K.R, K)
        share = tl.sum(tl.where(is_set(K.USED_GATES, g), weight * before[:, None], 0.0), axis=0)
        tl.store(shares + g * K.R + r, share, mask=r < K.R)


@triton.jit
def _finish(sums, planes, scratch, parameters, block, m, c, inside, C, K: tl.constexpr):
    """Store the gates' gradients that follow from sums over whole planes, and the hidden layers' shares."""
    kept = kept_planes(scratch, C, K)
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
    start = kept_planes(scratch, C, K) + K.PLANES * C + K.BLOCKS * (K.GATES * K.HIDDEN)
    return start + m * K.SUMS * C, K.MODALITIES * K.SUMS * C


@triton.jit
def finish_sums(sums, planes, scratch, parameters, block, part, m, c, inside, C, K: tl.constexpr):
    """Store the sums over one part of the pixels, or, of a whole plane, what follows from them."""
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
    for k in tl.static_range(SUMS):  # the program starts every read before it waits for the first
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


@triton.jit
def _keep_inner(row, inners, g, b, r, gradient, K: tl.constexpr):
    """Store and return the gradient before the ReLU of gate g in branch b; both branches get `gradient`."""
    at = (g * K.BRANCHES + b) * K.R
    inner = tl.where(vector(row + at, r, r < K.R, K) <= 0.0, 0.0, gradient)
    tl.store(inners + at + r, inner, mask=r < K.R)  # every block of channels stores the same numbers
    return inner


@triton.jit
def _add_pooled(dz, dz_extreme, weight, gradient, row, inners, g, r, K: tl.constexpr):
    """Return dz and dz_extreme, increased by the shares of the hidden numbers r of gate g."""
    weight = tl.where(is_set(K.USED_GATES, g), weight, 0.0)
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
        reached = inside & (to >= 0) & (to < tl.where(is_set(K.USED_GATES, g), C, 0))
        before = vector(kept + (K.BEFORE + g) * C, to, reached, K)
        dz += tl.where(reached, tl.load(weights + g * K.R + t).to(K.A) * before, 0.0)
    return dz


@triton.jit
def _of_all_channels(of_gates, row, inners, parameters, m, c, inside, C, K: tl.constexpr):
    """Return ∂ of GAP(M) and GMP(M) of modality m; the program has the gate gradients of all channels."""
    RB: tl.constexpr = K.RB
    before, more_before = of_gates[3], of_gates[5]
    dz, dz_extreme = tl.zeros(c.shape, K.A), tl.zeros(c.shape, K.A)
    for first in range(0, K.R, RB):
        r = first + tl.arange(0, RB)
        weight, _, second = layers(parameters, m, r, c, inside, C, K)
        more_weight, more_second = weight, second
        if K.MODALITIES == 2:  # the reads start before the program waits for the first gate's sums
            more_weight, _, more_second = layers(parameters, m + 2, r, c, inside, C, K)
        gradient = tl.sum(tl.where(is_set(K.USED_GATES, m), second * before[:, None], 0.0), axis=0)
        dz, dz_extreme = _add_pooled(dz, dz_extreme, weight, gradient, row, inners, m, r, K)
        if K.MODALITIES == 2:
            used = is_set(K.USED_GATES, m + 2)
            gradient = tl.sum(tl.where(used, more_second * more_before[:, None], 0.0), axis=0)
            dz, dz_extreme = _add_pooled(dz, dz_extreme, more_weight, gradient, row, inners, m + 2, r, K)
    return dz, dz_extreme


@triton.jit
def coefficients_kernel(planes, parameters, scratch, C, L, saved_row, scratch_row, K: tl.constexpr):
    """Make the gradients' table for one block of channels of one sample and modality.

    Where parts are joined, the block has all channels. The table has six slots per modality: mean, k1, k2, a,
    and the sample's part of ∂γ and of ∂β. Then comes one slot per set, the factor by which its gradient is
    multiplied on the way back through a gate. With CBAM two slots per modality follow: the extreme pixel, and
    the number that is added to ∂x where x has this value.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(C, K.BC)
    m = program // blocks % K.MODALITIES
    i = (program // (blocks * K.MODALITIES)).to(tl.int64)
    scratch += i * scratch_row
    planes, weights = planes_of(planes, i, saved_row), parameters[0]
    row = planes[0] + 2 * K.MODALITIES * C
    inners, kept = scratch + K.GRADIENT_SLOTS * C, kept_planes(scratch, C, K)
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
            tl.debug_barrier()  # other threads have stored the neighbours' gradients
        dz = _of_neighbours(kept, weights, m, c, inside, C, K)
        if K.MODALITIES == 2:
            dz += _of_neighbours(kept, weights, other, c, inside, C, K)
    else:
        if K.PARTS > 1:
            dz, dz_extreme = _of_all_channels(of_gates, row, inners, parameters, m, c, inside, C, K)
        else:
            shares = kept + K.PLANES * C
            dz, dz_extreme = _of_pooled(row, inners, shares, weights, m, c, inside, C, K)
            if K.MODALITIES == 2:
                more_dz, more_dz_extreme = _of_pooled(row, inners, shares, weights, other, c, inside, C, K)
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
    used = is_set(K.USED_INPUTS, m)
    k1, k2, of_gamma, of_beta = plane_gradient(r, a, U, V, dz, length)
    keep(scratch, 6 * m + 1, tl.where(used, k1, 0.0), c, inside, C)
    keep(scratch, 6 * m + 2, tl.where(used, k2, 0.0), c, inside, C)
    keep(scratch, 6 * m + 3, a, c, inside, C)
    keep(scratch, 6 * m + 4, tl.where(used, of_gamma, 0.0), c, inside, C)
    keep(scratch, 6 * m + 5, tl.where(used, of_beta, 0.0), c, inside, C)
    scales = scratch + 6 * K.MODALITIES * C
    keep(scales, 3 * m, restitution_scale(s, a, K.TO_INPUT), c, inside, C)
    if K.MODE == "snr":
        keep(scales, 1, restitution_scale(1.0 - s, a, False), c, inside, C)
    if K.MODALITIES == 2:
        keep(scales, 2 - m, more_s * (1.0 - a), c, inside, C)
