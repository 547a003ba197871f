"""The loss's backward in Triton: `backward_kernel`, which makes the gradients of plain or of normalized rows.

Without normalization all samples of an identity have the same gradient, which the leader's program writes to
each. The gradient of a normalized row depends on the whole row. Then each sample has one program, which makes
its three rows and reads all rows of its identity twice.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mrcn_fast.backends.triton.cqc_rows import (
    FOLLOWER,
    LEADER,
    LONELY,
    WEIGHTS,
    centers,
    first_of,
    members_of,
    modalities,
    ranks_from,
    sets_of,
)


@triton.jit
def _pull(
    moved: tl.tensor,
    other: tl.tensor,
    own: tl.tensor,
    of_other: tl.tensor,
    of_own: tl.tensor,
    weights: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
) -> Any:
    """Return one hinge's gradients: of the moved center, and added to those of the two original centers."""
    step = scale * tl.load(weights) * (moved - other)
    of_other -= step
    # Left out, not multiplied by zero, because a detached center may be infinite.
    if not K.DETACH:
        push = scale * tl.load(weights + 1) * (moved - own)
        of_own -= push
        step += push
    return step, of_other, of_own


@triton.jit
def _slot_of(slots: tl.tuple, slot: tl.tensor, K: tl.constexpr) -> Any:
    """Return the weights of the identity at ``slot``, and the gradient of its loss.

    ``slots`` are the weights of all slots, the gradients of their losses, and the stride of these.
    """
    weights, gradient, gradient_stride = slots
    return weights + WEIGHTS * slot, tl.load(gradient + slot * gradient_stride).to(K.A)


@triton.jit
def _gradients(
    both: tl.tuple,
    identity: tl.tensor,
    slot: tl.tuple,
    columns: tl.tensor,
    dimensions: tl.tensor,
    K: tl.constexpr,
) -> Any:
    """Return ``columns`` of the gradients that each row of ``identity`` gets in a modality's three sets.

    They come as three gradients of the visible modality and three of the infrared one. With K.NORMALIZE they
    are those of the normalized rows.
    """
    weights, scale = slot
    v, v_plus, v_minus, visible_share = centers(both[0], identity, columns, dimensions, K)
    n_minus, n_plus, n, infrared_share = centers(both[1], identity, columns, dimensions, K)
    g_v = tl.zeros(columns.shape, K.A)
    g_n = tl.zeros(columns.shape, K.A)
    g_v_plus, g_n, g_v = _pull(v_plus, n, v, g_n, g_v, weights, scale, K)
    g_n_plus, g_v, g_n = _pull(n_plus, v, n, g_v, g_n, weights + 2, scale, K)
    g_v_minus, g_n, g_v = _pull(v_minus, n, v, g_n, g_v, weights + 4, scale, K)
    g_n_minus, g_v, g_n = _pull(n_minus, v, n, g_v, g_n, weights + 6, scale, K)
    return (
        (g_v * visible_share, g_v_plus * visible_share, g_v_minus * visible_share),
        (g_n_minus * infrared_share, g_n_plus * infrared_share, g_n * infrared_share),
    )


@triton.jit
def _role_of(weights: tl.tensor, sample: tl.tensor, visible: tl.tensor) -> Any:
    return tl.load(weights + WEIGHTS * visible.to(tl.int64) + sample)


# --- plain rows -------------------------------------------------------------------------------------------


@triton.jit
def _write(
    targets: tl.tuple,
    rows: tl.tensor,
    mask: tl.tensor,
    gradients: tl.tuple,
    columns: tl.tensor,
    dimensions: tl.tensor,
) -> None:
    """Store ``columns`` of the three gradients in each of the ``rows`` where ``mask`` is true."""
    at = (rows * dimensions)[:, None] + columns[None, :]
    here = mask[:, None] & (columns < dimensions)[None, :]
    for k in tl.static_range(3):
        tl.store(targets[k] + at, gradients[k][None, :], mask=here)


@triton.jit
def _write_members(
    targets: tl.tuple,
    modality: tl.tuple,
    identity: tl.tensor,
    gradients: tl.tuple,
    columns: tl.tensor,
    dimensions: tl.tensor,
    K: tl.constexpr,
) -> None:
    """Store the three gradients in the rows of every sample of ``identity``."""
    _, _, _, labels, count = modality
    for start in range(0, count, K.LABELS):
        ranks, found = ranks_from(labels, count, identity, start, K)
        for before in range(0, found, K.MEMBERS):
            wanted = before + 1 + tl.arange(0, K.MEMBERS)
            members = members_of(ranks, wanted, start, K)
            _write(targets, members, wanted <= found, gradients, columns, dimensions)


@triton.jit
def _plain_rows(
    both: tl.tuple, targets: tl.tuple, slots: tl.tuple, dimensions: tl.tensor, K: tl.constexpr
) -> None:
    """Store a block of columns of a sample's rows; a leader stores the rows of all its identity's samples."""
    DIMENSIONS: tl.constexpr = K.DIMENSIONS
    visible, labels = both[0][4], both[0][3]
    blocks = tl.cdiv(dimensions, DIMENSIONS)
    sample = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * DIMENSIONS + tl.arange(0, DIMENSIONS)
    role = _role_of(slots[0], sample, visible)
    if role != FOLLOWER:
        visible_targets = (targets[0], targets[1], targets[2])
        infrared_targets = (targets[3], targets[4], targets[5])
        if role == LEADER:
            identity = tl.load(labels + sample)
            slot = _slot_of(slots, sample.to(tl.int64), K)
            of_visible, of_infrared = _gradients(both, identity, slot, columns, dimensions, K)
            _write_members(visible_targets, both[0], identity, of_visible, columns, dimensions, K)
            _write_members(infrared_targets, both[1], identity, of_infrared, columns, dimensions, K)
        else:
            nothing = tl.zeros([DIMENSIONS], K.A)
            zeros = (nothing, nothing, nothing)
            row = tl.arange(0, 1).to(tl.int64) + sample
            everything = row >= 0
            if sample < visible:
                _write(visible_targets, row, everything, zeros, columns, dimensions)
            else:
                _write(infrared_targets, row - visible, everything, zeros, columns, dimensions)


# --- normalized rows --------------------------------------------------------------------------------------


@triton.jit
def _own_gradients(
    both: tl.tuple,
    identity: tl.tensor,
    slot: tl.tuple,
    columns: tl.tensor,
    dimensions: tl.tensor,
    is_visible: tl.tensor,
    K: tl.constexpr,
) -> Any:
    """Return the three of `_gradients` that a sample of one modality gets."""
    of_visible, of_infrared = _gradients(both, identity, slot, columns, dimensions, K)
    return (
        tl.where(is_visible, of_visible[0], of_infrared[0]),
        tl.where(is_visible, of_visible[1], of_infrared[1]),
        tl.where(is_visible, of_visible[2], of_infrared[2]),
    )


@triton.jit
def _unit(
    row: tl.tensor, scale: tl.tensor, columns: tl.tensor, dimensions: tl.tensor, K: tl.constexpr
) -> Any:
    """Return ``columns`` of a normalized row."""
    return tl.load(row + columns, mask=columns < dimensions, other=0).to(K.A) * tl.abs(scale)


@triton.jit
def _along(product: tl.tensor, scale: tl.tensor) -> Any:
    """Return u·g of a row, or 0 where its length has no gradient; the length of a NaN has one."""
    along = tl.sum(product)
    return tl.where(scale < 0, tl.zeros_like(along), along)


@triton.jit
def _of_row(
    row: tl.tensor,
    scale: tl.tensor,
    g: tl.tensor,
    along: tl.tensor,
    columns: tl.tensor,
    dimensions: tl.tensor,
    K: tl.constexpr,
) -> Any:
    """Return ``columns`` of a row's gradient, from the gradient g of the normalized row."""
    return (g - _unit(row, scale, columns, dimensions, K) * along) * tl.abs(scale)


@triton.jit
def _unit_rows(
    both: tl.tuple, targets: tl.tuple, slots: tl.tuple, dimensions: tl.tensor, K: tl.constexpr
) -> None:
    """Store a sample's rows. The gradient of a row that is normalized to u is (g - u (u·g)) / its length."""
    DIMENSIONS: tl.constexpr = K.DIMENSIONS
    (v0, v1, v2), (v0_stride, v1_stride, v2_stride), scales, labels, visible = both[0]
    (n0, n1, n2), (n0_stride, n1_stride, n2_stride), infrared_scales, infrared_labels, infrared = both[1]
    sample = tl.program_id(0)
    is_visible = sample < visible
    row = tl.where(is_visible, sample, sample - visible).to(tl.int64)
    target0 = tl.where(is_visible, targets[0], targets[3]) + row * dimensions
    target1 = tl.where(is_visible, targets[1], targets[4]) + row * dimensions
    target2 = tl.where(is_visible, targets[2], targets[5]) + row * dimensions
    if _role_of(slots[0], sample, visible) == LONELY:
        nothing = tl.zeros([DIMENSIONS], K.A)
        for start in range(0, dimensions, DIMENSIONS):
            columns = start + tl.arange(0, DIMENSIONS)
            tl.store(target0 + columns, nothing, mask=columns < dimensions)
            tl.store(target1 + columns, nothing, mask=columns < dimensions)
            tl.store(target2 + columns, nothing, mask=columns < dimensions)
    else:
        identity = tl.load(tl.where(is_visible, labels, infrared_labels) + row)
        leader = first_of(labels, visible, identity, K).to(tl.int64)
        slot = _slot_of(slots, leader, K)
        own = tl.where(is_visible, scales, infrared_scales) + row
        rows = tl.where(is_visible, visible, infrared).to(tl.int64)
        scale0 = tl.load(own)
        scale1 = tl.load(own + rows)
        scale2 = tl.load(own + 2 * rows)
        row0 = tl.where(is_visible, v0 + row * v0_stride, n0 + row * n0_stride)
        row1 = tl.where(is_visible, v1 + row * v1_stride, n1 + row * n1_stride)
        row2 = tl.where(is_visible, v2 + row * v2_stride, n2 + row * n2_stride)
        product0 = tl.zeros([DIMENSIONS], K.A)
        product1 = tl.zeros([DIMENSIONS], K.A)
        product2 = tl.zeros([DIMENSIONS], K.A)
        for start in range(0, dimensions, DIMENSIONS):
            columns = start + tl.arange(0, DIMENSIONS)
            g0, g1, g2 = _own_gradients(both, identity, slot, columns, dimensions, is_visible, K)
            product0 += _unit(row0, scale0, columns, dimensions, K) * g0
            product1 += _unit(row1, scale1, columns, dimensions, K) * g1
            product2 += _unit(row2, scale2, columns, dimensions, K) * g2
        along0 = _along(product0, scale0)
        along1 = _along(product1, scale1)
        along2 = _along(product2, scale2)
        for start in range(0, dimensions, DIMENSIONS):
            columns = start + tl.arange(0, DIMENSIONS)
            g0, g1, g2 = _own_gradients(both, identity, slot, columns, dimensions, is_visible, K)
            of0 = _of_row(row0, scale0, g0, along0, columns, dimensions, K)
            of1 = _of_row(row1, scale1, g1, along1, columns, dimensions, K)
            of2 = _of_row(row2, scale2, g2, along2, columns, dimensions, K)
            tl.store(target0 + columns, of0, mask=columns < dimensions)
            tl.store(target1 + columns, of1, mask=columns < dimensions)
            tl.store(target2 + columns, of2, mask=columns < dimensions)


# --- the kernel -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["visible", "infrared"])
def backward_kernel(
    gradient: tl.tensor,
    gradient_stride: tl.tensor,
    # the six sets, and the gradients that are made of them
    features: tl.tuple,
    strides: tl.tuple,
    gradients: tl.tuple,
    labels: tl.tensor,
    infrared_labels: tl.tensor,
    weights: tl.tensor,
    visible: tl.tensor,
    infrared: tl.tensor,
    dimensions: tl.tensor,
    K: tl.constexpr,
) -> None:
    """One program per sample with K.NORMALIZE, and else one per sample and block of columns.

    The grid has one dimension, because the others of a grid end at 65,535.
    """
    both = modalities(features, strides, labels, infrared_labels, weights, visible, infrared, K)
    dense = (dimensions, dimensions, dimensions, dimensions, dimensions, dimensions)
    targets = sets_of(gradients, dense, visible, infrared, True)  # the gradients are stacked and dense
    slots = (weights, gradient, gradient_stride)
    if K.NORMALIZE:
        _unit_rows(both, targets, slots, dimensions, K)
    else:
        _plain_rows(both, targets, slots, dimensions, K)
