"""The gradients of γ, β and the gates' parameters in Triton: the first programs of `gradient_kernel`.

They loop over the samples, whose shares `coefficients_kernel` has left in the scratch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mrcn_fast.backends.triton.block_backward_gates import is_set, kept_planes
from mrcn_fast.backends.triton.formulas import extreme_residual, plane, planes_of, pooled_residual, vector


@triton.jit
def norm_gradients(scratch, dgamma, dbeta, m, block, samples, C, scratch_row, K: tl.constexpr):
    """Add up ∂γ and ∂β of a block of channels of modality m over the samples, in their order."""
    BESIDE: tl.constexpr = K.BESIDE
    PC: tl.constexpr = K.PC
    c = block * PC + tl.arange(0, PC)
    inside = c < C
    of_gamma, of_beta = tl.zeros((PC,), K.A), tl.zeros((PC,), K.A)
    for first in range(0, samples, K.BESIDE):
        for n in tl.static_range(BESIDE):  # these reads do not wait for each other
            table = scratch + tl.cast(first + n, tl.int64) * scratch_row
            live = c < tl.where(first + n < samples, C, 0)
            of_gamma += vector(table + (6 * m + 4) * C, c, live, K)
            of_beta += vector(table + (6 * m + 5) * C, c, live, K)
    at = m * C + c
    tl.store(dgamma + at, of_gamma.to(dgamma.dtype.element_ty), mask=inside)
    tl.store(dbeta + at, of_beta.to(dbeta.dtype.element_ty), mask=inside)


@triton.jit
def convolution_gradient(planes, scratch, dweight, g, samples, C, rows, K: tl.constexpr):
    """Store ∂ of the convolution kernel of ECA's gate g; see `layer_gradients` for the arguments."""
    saved_row, scratch_row = rows
    PC: tl.constexpr = K.PC
    m = g % K.MODALITIES
    for t in range(K.R):
        total = tl.zeros((PC,), K.A)
        for n in range(0, samples):
            i = tl.cast(n, tl.int64)
            for first in range(0, C, PC):
                c = first + tl.arange(0, PC)
                source = c + t - K.R // 2
                inside = (source >= 0) & (source < C)  # elsewhere are the zeros of the padding
                kept = kept_planes(scratch + i * scratch_row, C, K)
                before = vector(kept + (K.BEFORE + g) * C, c, c < C, K)
                mean, _, a, shift = plane(planes_of(planes, i, saved_row), m, source, inside, C, K)
                z = tl.where(inside, pooled_residual(mean, a, shift), 0.0)
                total += tl.where((c < C) & is_set(K.USED_GATES, g), before * z, 0.0)
        tl.store(dweight + g * K.R + t, tl.sum(total, axis=0).to(dweight.dtype.element_ty))


@triton.jit
def layer_gradients(planes, scratch, of_gate, g, block, first, samples, C, rows, K: tl.constexpr):
    """Add up ∂ of both layers of gate g over the samples: a block of channels by K.RB hidden numbers.

    `planes` are the first sample's saved row, γ and β, and `rows` the lengths of the rows of `planes` and of
    `scratch`. `of_gate` are the gradients of the gate's parameters, in the order of mrcn_fast/gates.py.
    """
    saved_row, scratch_row = rows
    d0, d1, d2, d3 = of_gate
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
        for n in tl.static_range(BESIDE):  # these reads do not wait for each other
            here = start + n < samples
            here &= is_set(K.USED_GATES, g)
            live, live_hidden = c < tl.where(here, C, 0), r < tl.where(here, K.R, 0)
            i = tl.cast(tl.minimum(start + n, samples - 1), tl.int64)
            own, left = planes_of(planes, i, saved_row), scratch + i * scratch_row
            kept = kept_planes(left, C, K)
            before = vector(kept + (K.BEFORE + g) * C, c, live, K)
            of_more_bias += BRANCHES * before
            mean, _, a, shift = plane(own, m, c, inside, C, K)
            for b in tl.static_range(BRANCHES):
                if b == 0:
                    z = pooled_residual(mean, a, shift)
                else:
                    z = extreme_residual(mean, a, shift, vector(kept + (K.EXTREME + m) * C, c, inside, K))
                at = (g * BRANCHES + b) * K.R
                hidden = vector(own[0] + 2 * K.MODALITIES * C + at, r, known, K)
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
