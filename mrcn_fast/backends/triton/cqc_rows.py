"""What the loss's kernels share: the samples of an identity, the six sets, centers, and rows of length one.

A modality is a tuple: the first rows of its three sets, their strides, the scales that normalize its rows,
its labels, and the number of its samples. The kernels read the scales with K.NORMALIZE alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# The roles of a sample. The forward stores them behind the weights, so that the backward loads one number.
LONELY = tl.constexpr(0)  # only one modality has its identity
LEADER = tl.constexpr(1)  # the earliest visible sample of an identity that both modalities have
FOLLOWER = tl.constexpr(2)  # any other sample of such an identity

# The identity of a slot that has none: the last in order.
NO_IDENTITY = tl.constexpr(torch.iinfo(torch.int64).max)

# Each of the four hinges has two distances, and each distance a weight.
WEIGHTS = tl.constexpr(8)

# A squared distance below this is clamped and its gradient zero, because the root's would not be finite.
LEAST_SQUARE = tl.constexpr(1e-12)

# Where rows are normalized, the square of a row's length is clamped in the same way.
LEAST_SQUARED_LENGTH = tl.constexpr(1e-24)


# --- the samples of an identity ---------------------------------------------------------------------------


@triton.jit
def first_of(labels: tl.tensor, count: tl.tensor, identity: tl.tensor, K: tl.constexpr) -> Any:
    """Return the first sample of ``identity``, or ``count`` where there is none."""
    found = count
    start = 0
    while (start < count) & (found == count):
        samples = start + tl.arange(0, K.LABELS)
        here = samples < count
        same = here & (tl.load(labels + samples, mask=here, other=0) == identity)
        found = tl.min(tl.where(same, samples, count))
        start += K.LABELS
    return found


@triton.jit
def ranks_from(
    labels: tl.tensor, count: tl.tensor, identity: tl.tensor, start: tl.tensor, K: tl.constexpr
) -> Any:
    """Return 1, 2, ... at the samples of ``identity`` from ``start`` on and 0 at others, and their number."""
    samples = start + tl.arange(0, K.LABELS)
    here = samples < count
    same = (here & (tl.load(labels + samples, mask=here, other=0) == identity)).to(tl.int32)
    return same * tl.cumsum(same, 0), tl.sum(same)


@triton.jit
def members_of(ranks: tl.tensor, wanted: tl.tensor, start: tl.tensor, K: tl.constexpr) -> Any:
    """Return the samples that have the ranks ``wanted``, as 64-bit integers."""
    samples = start + tl.arange(0, K.LABELS)
    return tl.sum(tl.where(ranks[None, :] == wanted[:, None], samples[None, :], 0), 1).to(tl.int64)


# --- the six sets -----------------------------------------------------------------------------------------


@triton.jit
def sets_of(
    tensors: tl.tuple, strides: tl.tuple, visible: tl.tensor, infrared: tl.tensor, STACKED: tl.constexpr
) -> Any:
    """Return the first row of each set; the sets of a stack follow one another in one tensor."""
    if STACKED:
        v = visible.to(tl.int64)
        n = infrared.to(tl.int64)
        return (
            tensors[0],
            tensors[1] + v * strides[1],
            tensors[2] + 2 * v * strides[2],
            tensors[3] + 3 * v * strides[3],
            tensors[4] + (3 * v + n) * strides[4],
            tensors[5] + (3 * v + 2 * n) * strides[5],
        )
    else:
        return tensors


@triton.jit
def modalities(
    features: tl.tuple,
    strides: tl.tuple,
    labels: tl.tensor,
    infrared_labels: tl.tensor,
    weights: tl.tensor,
    visible: tl.tensor,
    infrared: tl.tensor,
    K: tl.constexpr,
) -> Any:
    """Return the visible modality and the infrared one."""
    sets = sets_of(features, strides, visible, infrared, K.STACKED)
    scales, infrared_scales = scales_of(weights, visible, infrared)
    return (
        (sets[0], sets[1], sets[2]),
        (strides[0], strides[1], strides[2]),
        scales,
        labels,
        visible,
    ), (
        (sets[3], sets[4], sets[5]),
        (strides[3], strides[4], strides[5]),
        infrared_scales,
        infrared_labels,
        infrared,
    )


@triton.jit
def load_rows(
    rows: tl.tensor,
    stride: tl.tensor,
    members: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    K: tl.constexpr,
) -> Any:
    """Return ``columns`` of the rows of ``members``, [members, columns]."""
    return tl.load(rows + (members * stride)[:, None] + columns[None, :], mask=mask, other=0).to(K.A)


@triton.jit
def centers(
    modality: tl.tuple, identity: tl.tensor, columns: tl.tensor, dimensions: tl.tensor, K: tl.constexpr
) -> Any:
    """Return ``columns`` of the three centers of ``identity`` in a modality, and a sample's share in them."""
    MEMBERS: tl.constexpr = K.MEMBERS
    sets, strides, scales, labels, count = modality
    c0 = tl.zeros(columns.shape, K.A)
    c1 = tl.zeros(columns.shape, K.A)
    c2 = tl.zeros(columns.shape, K.A)
    number = tl.full((), 0, tl.int32)
    for start in range(0, count, K.LABELS):
        ranks, found = ranks_from(labels, count, identity, start, K)
        for before in range(0, found, MEMBERS):
            wanted = before + 1 + tl.arange(0, MEMBERS)
            members = members_of(ranks, wanted, start, K)
            mask = (wanted <= found)[:, None] & (columns < dimensions)[None, :]
            x0 = load_rows(sets[0], strides[0], members, columns, mask, K)
            x1 = load_rows(sets[1], strides[1], members, columns, mask, K)
            x2 = load_rows(sets[2], strides[2], members, columns, mask, K)
            if K.NORMALIZE:
                rows = count.to(tl.int64)
                x0 *= _factor(scales, members, wanted <= found)[:, None]
                x1 *= _factor(scales + rows, members, wanted <= found)[:, None]
                x2 *= _factor(scales + 2 * rows, members, wanted <= found)[:, None]
            c0 += tl.sum(x0, 0)
            c1 += tl.sum(x1, 0)
            c2 += tl.sum(x2, 0)
        number += found
    share = quotient(tl.full((), 1, K.A), number.to(K.A))
    return c0 * share, c1 * share, c2 * share, share


# --- rows of length one -----------------------------------------------------------------------------------


@triton.jit
def scales_of(weights: tl.tensor, visible: tl.tensor, infrared: tl.tensor) -> Any:
    """Return where the scales of each modality's rows begin, behind the weights and the roles."""
    scales = weights + (WEIGHTS + 1) * visible.to(tl.int64) + infrared
    return scales, scales + 3 * visible.to(tl.int64)


@triton.jit
def _factor(scales: tl.tensor, rows: tl.tensor, mask: tl.tensor) -> Any:
    """Return the factors that normalize the rows, and 0 where ``mask`` is false."""
    return tl.abs(tl.load(scales + rows, mask=mask, other=0))


@triton.jit
def quotient(a: tl.tensor, b: tl.tensor) -> Any:
    """Return a / b rounded to nearest; in float32 the operator only approximates it."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(a: tl.tensor) -> Any:
    """Return √a rounded to nearest."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)
