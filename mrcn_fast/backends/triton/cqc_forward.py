"""The loss's forward in Triton (eq. 8-10): `forward_kernel`.

No identity is brought to the host and none is sorted: the earliest visible sample of an identity leads it,
and the leader's index is the identity's slot in every padded result. A program finds its sample's role by
scanning the labels; only leaders read features. Where rows are normalized, a leader first measures the rows
of its identity, and leaves their scales to the backward.

The last program to finish adds up the losses, in the order of the slots and with no atomic operation on a
float: the sum has the same bits on every run (tests/test_protocol_cqc.py has the protocol as a model).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from mrcn_fast.backends.triton.cqc_rows import (
    FOLLOWER,
    LEADER,
    LEAST_SQUARE,
    LEAST_SQUARED_LENGTH,
    LONELY,
    NO_IDENTITY,
    WEIGHTS,
    centers,
    first_of,
    load_rows,
    members_of,
    modalities,
    quotient,
    ranks_from,
    root,
    scales_of,
)


@triton.jit
def _measure(modality: tl.tuple, identity: tl.tensor, dimensions: tl.tensor, K: tl.constexpr) -> None:
    """Store what normalizes the rows of ``identity`` in a modality's three sets.

    Other threads read it: a barrier has to follow.
    """
    MEMBERS: tl.constexpr = K.MEMBERS
    sets, strides, scales, labels, count = modality
    for start in range(0, count, K.LABELS):
        ranks, found = ranks_from(labels, count, identity, start, K)
        for before in range(0, found, MEMBERS):
            wanted = before + 1 + tl.arange(0, MEMBERS)
            members = members_of(ranks, wanted, start, K)
            s0 = tl.zeros([MEMBERS], K.A)
            s1 = tl.zeros([MEMBERS], K.A)
            s2 = tl.zeros([MEMBERS], K.A)
            for first in range(0, dimensions, K.DIMENSIONS):
                columns = first + tl.arange(0, K.DIMENSIONS)
                mask = (wanted <= found)[:, None] & (columns < dimensions)[None, :]
                x0 = load_rows(sets[0], strides[0], members, columns, mask, K)
                x1 = load_rows(sets[1], strides[1], members, columns, mask, K)
                x2 = load_rows(sets[2], strides[2], members, columns, mask, K)
                s0 += tl.sum(x0 * x0, 1)
                s1 += tl.sum(x1 * x1, 1)
                s2 += tl.sum(x2 * x2, 1)
            rows = count.to(tl.int64)
            tl.store(scales + members, _scale(s0, K), mask=wanted <= found)
            tl.store(scales + rows + members, _scale(s1, K), mask=wanted <= found)
            tl.store(scales + 2 * rows + members, _scale(s2, K), mask=wanted <= found)


@triton.jit
def _scale(square: tl.tensor, K: tl.constexpr) -> Any:
    """Return 1 / a row's length, of its square; negative where it is clamped and has no gradient."""
    floor = tl.full((), LEAST_SQUARED_LENGTH, K.A)
    one = tl.full((), 1, K.A)
    clamped = square < floor
    scale = quotient(one, root(tl.where(clamped, floor, square)))
    return tl.where(clamped, -scale, scale)


@triton.jit
def _clear_scales(scales: tl.tensor, sample: tl.tensor, count: tl.tensor, K: tl.constexpr) -> None:
    """Clear the scales of a sample's three rows, which no leader measures."""
    nothing = tl.full((), 0, K.A)
    rows = count.to(tl.int64)
    tl.store(scales + sample, nothing)
    tl.store(scales + rows + sample, nothing)
    tl.store(scales + 2 * rows + sample, nothing)


@triton.jit
def _add_squares(squares: tl.tuple, moved: tl.tensor, other: tl.tensor, own: tl.tensor) -> Any:
    """Return the squares of a hinge's two distances, by column, with those of more columns added."""
    pulled, pushed = squares
    return pulled + (moved - other) * (moved - other), pushed + (moved - own) * (moved - own)


@triton.jit
def _hinge(squares: tl.tuple, margin: tl.tensor, weights: tl.tensor, K: tl.constexpr) -> Any:
    """Return [α + D pulled - D pushed]₊ of `_add_squares`, and store the two weights of its distances.

    A weight is ∂loss/∂D divided by D; the backward multiplies differences of centers by it.
    """
    pulled_square, pushed_square = tl.sum(squares[0]), tl.sum(squares[1])
    floor = tl.full((), LEAST_SQUARE, K.A)
    zero = tl.full((), 0, K.A)
    one = tl.full((), 1, K.A)
    # The comparisons let a NaN pass, as torch's clamp and relu do.
    pulled = root(tl.where(pulled_square < floor, floor, pulled_square))
    pushed = root(tl.where(pushed_square < floor, floor, pushed_square))
    value = tl.full((), margin, K.A) + pulled - pushed
    inactive = value <= zero
    live_pull = (pulled_square >= floor) & ~inactive
    live_push = (pushed_square >= floor) & ~inactive
    tl.store(weights, tl.where(live_pull, quotient(one, pulled), zero))
    tl.store(weights + 1, tl.where(live_push, -quotient(one, pushed), zero))
    return tl.where(inactive, zero, value)


@triton.jit
def _loss(
    both: tl.tuple,
    identity: tl.tensor,
    margin: tl.tensor,
    weights: tl.tensor,
    dimensions: tl.tensor,
    K: tl.constexpr,
) -> Any:
    """Return the loss of ``identity`` (eq. 8-10), and store the weights of its distances."""
    DIMENSIONS: tl.constexpr = K.DIMENSIONS
    zero = tl.zeros([DIMENSIONS], K.A)
    of_v_plus, of_n_plus, of_v_minus, of_n_minus = (zero, zero), (zero, zero), (zero, zero), (zero, zero)
    for start in range(0, dimensions, DIMENSIONS):
        columns = start + tl.arange(0, DIMENSIONS)
        v, v_plus, v_minus, _ = centers(both[0], identity, columns, dimensions, K)
        n_minus, n_plus, n, _ = centers(both[1], identity, columns, dimensions, K)
        of_v_plus = _add_squares(of_v_plus, v_plus, n, v)
        of_n_plus = _add_squares(of_n_plus, n_plus, v, n)
        of_v_minus = _add_squares(of_v_minus, v_minus, n, v)
        of_n_minus = _add_squares(of_n_minus, n_minus, v, n)
    loss = _hinge(of_v_plus, margin, weights, K)
    loss += _hinge(of_n_plus, margin, weights + 2, K)
    loss += _hinge(of_v_minus, margin, weights + 4, K)
    loss += _hinge(of_n_minus, margin, weights + 6, K)
    return loss


@triton.jit
def _finish(
    losses: tl.tensor, roles: tl.tensor, results: tl.tuple, visible: tl.tensor, K: tl.constexpr
) -> None:
    """Store the sum of the losses and the number of identities from those of all programs."""
    total, number = results
    LABELS: tl.constexpr = K.LABELS
    sums = tl.zeros([LABELS], K.A)
    leaders = tl.zeros([LABELS], tl.int32)
    for start in range(0, visible, LABELS):
        slots = start + tl.arange(0, LABELS)
        here = slots < visible
        # The loads bypass L1, which does not have the other multiprocessors' stores.
        sums += tl.load(losses + slots, mask=here, other=0, cache_modifier=".cg")
        roles_here = tl.load(roles + slots, mask=here, other=0, cache_modifier=".cg")
        leaders += (roles_here == LEADER).to(tl.int32)
    tl.store(total, tl.sum(sums))
    tl.store(number, tl.sum(leaders).to(tl.int64))


@triton.jit(do_not_specialize=["visible", "infrared"])
def forward_kernel(
    # the six sets and their labels
    features: tl.tuple,
    strides: tl.tuple,
    labels: tl.tensor,
    infrared_labels: tl.tensor,
    # results: one slot per visible sample; then the weights, roles and scales for the backward
    losses: tl.tensor,
    identities: tl.tensor,
    weights: tl.tensor,
    total: tl.tensor,
    number: tl.tensor,
    # zero before and after
    arrivals: tl.tensor,
    margin: tl.float64,  # a Python float would come in float32
    visible: tl.tensor,
    infrared: tl.tensor,
    dimensions: tl.tensor,
    K: tl.constexpr,
) -> None:
    """One program per sample: (visible + infrared,)."""
    sample = tl.program_id(0)
    roles = weights + WEIGHTS * visible.to(tl.int64)
    scales, infrared_scales = scales_of(weights, visible, infrared)
    if sample >= visible:
        identity = tl.load(infrared_labels + sample - visible)
        shared = first_of(labels, visible, identity, K) < visible
        tl.store(roles + sample, tl.where(shared, FOLLOWER, LONELY))
        if K.NORMALIZE and not shared:
            _clear_scales(infrared_scales, sample - visible, infrared, K)
    else:
        identity = tl.load(labels + sample)
        leads = first_of(labels, visible, identity, K) == sample
        shared = first_of(infrared_labels, infrared, identity, K) < infrared
        own = weights + WEIGHTS * sample.to(tl.int64)
        if leads & shared:
            both = modalities(features, strides, labels, infrared_labels, weights, visible, infrared, K)
            if K.NORMALIZE:
                _measure(both[0], identity, dimensions, K)
                _measure(both[1], identity, dimensions, K)
                tl.debug_barrier()
            tl.store(losses + sample, _loss(both, identity, margin, own, dimensions, K))
            tl.store(identities + sample, identity)
            tl.store(roles + sample, LEADER)
        else:
            tl.store(own + tl.arange(0, WEIGHTS), tl.zeros([WEIGHTS], K.A))
            tl.store(losses + sample, 0.0)
            tl.store(identities + sample, NO_IDENTITY)
            tl.store(roles + sample, tl.where(shared, FOLLOWER, LONELY))
            if K.NORMALIZE and not shared:
                _clear_scales(scales, sample, visible, K)
        # The last program to count has all others' stores before it: the addition releases a program's own
        # and acquires those of the ones before it. The barrier puts all of a program's threads before it.
        tl.debug_barrier()
        if tl.atomic_add(arrivals, 1, sem="acq_rel") == visible - 1:
            _finish(losses, roles, (total, number), visible, K)
            tl.store(arrivals, 0)
