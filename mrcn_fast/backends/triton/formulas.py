"""What the block's kernels share: tiles, small vectors, and the formulas of csrc/block/formulas.h.

tests/test_formulas.py compares the formulas with those of C++, function by function.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- tiles and small vectors ------------------------------------------------------------------------------


@triton.jit
def places(start, c, px, pitch, K: tl.constexpr):
    """Return pointers to a tile [channels, pixels]; `pitch` separates planes, or pixels with K.PIXELS."""
    c, px = c[:, None], px[None, :]
    return start + (px.to(tl.int64) * pitch + c if K.PIXELS else c.to(tl.int64) * pitch + px)


@triton.jit
def read_tile(start, c, px, inside, pitch, KEEP: tl.constexpr, K: tl.constexpr):
    """Return a tile in the accumulation type; KEEP says that it is read again soon."""
    policy: tl.constexpr = "evict_last" if KEEP else "evict_first"
    at = places(start, c, px, pitch, K)
    return tl.load(at, mask=inside, other=0.0, eviction_policy=policy).to(K.A)


@triton.jit
def write_tile(start, c, px, inside, pitch, value, K: tl.constexpr):
    """Store a tile that no kernel reads again while it is in the cache."""
    tl.store(
        places(start, c, px, pitch, K), value.to(start.dtype.element_ty), mask=inside, cache_modifier=".cs"
    )


@triton.jit
def vector(start, at, inside, K: tl.constexpr):
    """Return the numbers at the places `at` in the accumulation type, and 0 where `inside` is false."""
    return tl.load(start + at, mask=inside, other=0.0).to(K.A)


@triton.jit
def matrix(start, rows, columns, pitch, row_inside, column_inside, K: tl.constexpr):
    """Return a matrix [rows, columns] as `vector` does; `pitch` is the stride between rows."""
    inside = row_inside[:, None] & column_inside[None, :]
    return tl.load(start + rows[:, None] * pitch + columns[None, :], mask=inside, other=0.0).to(K.A)


@triton.jit
def fma(a, b, c):
    """Return a b + c, rounded once whatever the compiler's options are."""
    return tl.fma(a, b, c)


@triton.jit
def keep(table, k, value, c, inside, C):
    """Store slot k of a sample's table, which has one number per channel."""
    tl.store(table + k * C + c, value, mask=inside)


@triton.jit
def column(table, k, c, inside, C, K: tl.constexpr):
    """Return slot k of the table as a column, for tiles of these channels."""
    return vector(table, k * C + c, inside, K)[:, None]


@triton.jit
def part_length(part, L, K: tl.constexpr):
    """Return how many pixels a part of the first launch has."""
    return tl.maximum(tl.minimum(L - part * K.PART, K.PART), 0)


@triton.jit
def add_shares(shares, r, pitch, K: tl.constexpr):
    """Return the sum [hidden] of what the channel blocks stored at `shares`, `pitch` apart, in order."""
    block = tl.arange(0, triton.next_power_of_2(K.BLOCKS))
    return tl.sum(matrix(shares, block, r, pitch, block < K.BLOCKS, r < K.R, K), axis=0)


@triton.jit
def inverse_deviation(variance, K: tl.constexpr):
    """Return 1/σ, rounded correctly: in fp32 `/` and sqrt only approximate, and every pixel would be off."""
    if K.DOUBLE:
        r = 1.0 / tl.sqrt(variance + K.EPS)
    else:
        r = tl.div_rn(tl.full(variance.shape, 1.0, K.A), tl.sqrt_rn(variance + K.EPS))
    return r


# --- formulas.h -------------------------------------------------------------------------------------------


@triton.jit
def planes_of(planes, i, saved_row):
    """Return the saved row of sample i, γ and β, from those of the first sample."""
    statistics, gamma, beta = planes
    return statistics + i * saved_row, gamma, beta


@triton.jit
def plane(planes, m, c, inside, C, K: tl.constexpr):
    """Return mean, r, a, β of the channels `c` of modality m; `planes` is the sample's saved row, γ and β."""
    statistics, gamma, beta = planes
    mean = vector(statistics, 2 * m * C + c, inside, K)
    r = vector(statistics, (2 * m + 1) * C + c, inside, K)
    a = vector(gamma, m * C + c, inside, K) * r
    return mean, r, a, vector(beta, m * C + c, inside, K)


@triton.jit
def pooled_residual(mean, a, beta):
    """Return GAP(M), the input of a gate."""
    # 0·a is NaN where the literal equations give one, and otherwise adds nothing.
    return mean - beta + 0.0 * a


@triton.jit
def extreme_pixel(a, maximum, minimum):
    """Return the pixel at which M has its maximum; M is affine in x, and its slope is 1 - a."""
    return tl.where(1.0 - a >= 0.0, maximum, minimum)


@triton.jit
def extreme_residual(mean, a, beta, extreme):
    """Return GMP(M), from the pixel at which M has its maximum."""
    return (1.0 - a) * (extreme - mean) + (mean - beta)


@triton.jit
def correction(scale, offset):
    """Return what a shift must subtract because the pixels are centered by a rounded mean."""
    term = scale * offset
    return tl.where(term - term == 0.0, term, 0.0)


@triton.jit
def normalized(offset, a, beta):
    """Return scale and shift of F̃ (eq. 1, 2)."""
    return a, beta - correction(a, offset)


@triton.jit
def restitution_scale(s, a, TO_INPUT: tl.constexpr):
    """Return p of F₊ (eq. 4, 5)."""
    return (1.0 if TO_INPUT else a) + s * (1.0 - a)


@triton.jit
def restituted(s, mean, offset, a, beta, TO_INPUT: tl.constexpr):
    """Return scale and shift of F₊ (eq. 4, 5)."""
    scale = restitution_scale(s, a, TO_INPUT)
    if TO_INPUT:
        shift = (mean + offset) + s * ((mean - beta) + offset)
    else:
        shift = s * (mean + offset) + (1.0 - s) * beta + 0.0 * beta
    return scale, shift - correction(scale, offset)


@triton.jit
def distilled(s, mean, offset, a, beta):
    """Return scale and shift of s M (eq. 6, 7)."""
    scale = s * (1.0 - a)
    return scale, s * ((mean - beta) + offset) - correction(scale, offset)


@triton.jit
def gate_gradient(mean, a, beta, S, T):
    """Return ∂s of s M, where S and T are the sums of the gradient of what s M was added to."""
    return (1.0 - a) * T + (mean - beta) * S


@triton.jit
def share_of_normalized(s, TO_INPUT: tl.constexpr):
    """Return the share of the gradient of F₊ that reaches F̃; the rest goes to x directly."""
    return -s if TO_INPUT else 1.0 - s


@triton.jit
def plane_gradient(r, a, U, V, dz, length):
    """Return k1 and k2 of ∂x, ∂γ and ∂β: what comes through the statistics of a plane of `length` pixels."""
    return (dz - a * V) / length, -a * r * r * U / length, r * U + 0.0 * dz, V - dz
