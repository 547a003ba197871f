"""The center-quadruplet causal loss (eq. 8-10): one launch forward, one backward.

No identity is brought to the host and none is sorted: the earliest visible sample of an identity leads it,
and the leader's index is the identity's slot in every padded result. A program finds out what its sample is
by scanning the labels; only leaders read features.

The losses are added up by whichever program is the last to finish, in the order of the slots and with no
atomic operation on a float: the sum is bitwise the same on every run (tests/test_protocol_cqc.py has the
protocol as a model).

Where rows are normalized, a leader measures those of its identity before it makes the centers, and leaves
their scales to the backward. There a row's gradient wants the whole row: each sample has one program, which
makes its three rows and reads all of its identity's twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrcn_fast.backends import shapes
from mrcn_fast.backends.triton.launch import Arguments, Launcher, on_device

# What a sample is. The forward leaves it behind the weights, and the backward of all but leaders is one load.
LONELY = tl.constexpr(0)  # only one modality has its identity
LEADER = tl.constexpr(1)  # the earliest visible sample of an identity that both modalities have
FOLLOWER = tl.constexpr(2)  # of such an identity, but another sample leads it

# The identity of a slot that has none: the last one in order.
NO_IDENTITY = tl.constexpr(torch.iinfo(torch.int64).max)

# Two distances for each of the four hinges.
WEIGHTS = tl.constexpr(8)

# Below it the root's gradient is not finite: the distance is clamped and its gradient zero.
LEAST_SQUARE = tl.constexpr(1e-12)

# The square of a row's length is clamped in the same way where rows are normalized.
LEAST_SQUARED_LENGTH = tl.constexpr(1e-24)


# --- the samples of an identity -------------------------------------------------------------------------


@triton.jit
def _first(labels: tl.tensor, count: tl.tensor, identity: tl.tensor, LABELS: tl.constexpr) -> Any:
    """The first sample of ``identity``, or ``count``."""
    found = count
    start = 0
    while (start < count) & (found == count):
        samples = start + tl.arange(0, LABELS)
        here = samples < count
        same = here & (tl.load(labels + samples, mask=here, other=0) == identity)
        found = tl.min(tl.where(same, samples, count))
        start += LABELS
    return found


@triton.jit
def _ranks(
    labels: tl.tensor, count: tl.tensor, identity: tl.tensor, start: tl.tensor, LABELS: tl.constexpr
) -> Any:
    """From ``start`` on, 1, 2, ... at the samples of ``identity`` and 0 at others; and how many there are."""
    samples = start + tl.arange(0, LABELS)
    here = samples < count
    same = (here & (tl.load(labels + samples, mask=here, other=0) == identity)).to(tl.int32)
    return same * tl.cumsum(same, 0), tl.sum(same)


@triton.jit
def _members(ranks: tl.tensor, wanted: tl.tensor, start: tl.tensor, LABELS: tl.constexpr) -> Any:
    """The samples of the ranks ``wanted``, as rows of 64 bits."""
    samples = start + tl.arange(0, LABELS)
    return tl.sum(tl.where(ranks[None, :] == wanted[:, None], samples[None, :], 0), 1).to(tl.int64)


# --- the six sets ---------------------------------------------------------------------------------------


@triton.jit
def _sets(
    tensors: tl.tuple, strides: tl.tuple, visible: tl.tensor, infrared: tl.tensor, STACKED: tl.constexpr
) -> Any:
    """Where the first row of each set is: those of a stack follow one another in one tensor."""
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
def _load(
    rows: tl.tensor,
    stride: tl.tensor,
    members: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    A: tl.constexpr,
) -> Any:
    return tl.load(rows + (members * stride)[:, None] + columns[None, :], mask=mask, other=0).to(A)


@triton.jit
def _centers(
    sets: tl.tuple,
    strides: tl.tuple,
    scales: tl.tensor,
    labels: tl.tensor,
    count: tl.tensor,
    identity: tl.tensor,
    columns: tl.tensor,
    dimensions: tl.tensor,
    NORMALIZE: tl.constexpr,
    A: tl.constexpr,
    LABELS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> Any:
    """``columns`` of the centers of ``identity`` in a modality's three sets, and a sample's share in them.

    ``scales`` are those of the modality's rows; they are read with ``NORMALIZE`` alone.
    """
    c0 = tl.zeros(columns.shape, A)
    c1 = tl.zeros(columns.shape, A)
    c2 = tl.zeros(columns.shape, A)
    number = tl.full((), 0, tl.int32)
    for start in range(0, count, LABELS):
        ranks, found = _ranks(labels, count, identity, start, LABELS)
        for before in range(0, found, MEMBERS):
            wanted = before + 1 + tl.arange(0, MEMBERS)
            members = _members(ranks, wanted, start, LABELS)
            mask = (wanted <= found)[:, None] & (columns < dimensions)[None, :]
            x0 = _load(sets[0], strides[0], members, columns, mask, A)
            x1 = _load(sets[1], strides[1], members, columns, mask, A)
            x2 = _load(sets[2], strides[2], members, columns, mask, A)
            if NORMALIZE:
                rows = count.to(tl.int64)
                x0 *= _factor(scales, members, wanted <= found)[:, None]
                x1 *= _factor(scales + rows, members, wanted <= found)[:, None]
                x2 *= _factor(scales + 2 * rows, members, wanted <= found)[:, None]
            c0 += tl.sum(x0, 0)
            c1 += tl.sum(x1, 0)
            c2 += tl.sum(x2, 0)
        number += found
    share = _quotient(tl.full((), 1, A), number.to(A))
    return c0 * share, c1 * share, c2 * share, share


@triton.jit
def _measure(
    sets: tl.tuple,
    strides: tl.tuple,
    scales: tl.tensor,
    labels: tl.tensor,
    count: tl.tensor,
    identity: tl.tensor,
    dimensions: tl.tensor,
    A: tl.constexpr,
    LABELS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> None:
    """Store what normalizes the rows of ``identity`` in a modality's three sets.

    A barrier has to follow: other threads read it.
    """
    for start in range(0, count, LABELS):
        ranks, found = _ranks(labels, count, identity, start, LABELS)
        for before in range(0, found, MEMBERS):
            wanted = before + 1 + tl.arange(0, MEMBERS)
            members = _members(ranks, wanted, start, LABELS)
            s0 = tl.zeros([MEMBERS], A)
            s1 = tl.zeros([MEMBERS], A)
            s2 = tl.zeros([MEMBERS], A)
            for first in range(0, dimensions, DIMENSIONS):
                columns = first + tl.arange(0, DIMENSIONS)
                mask = (wanted <= found)[:, None] & (columns < dimensions)[None, :]
                x0 = _load(sets[0], strides[0], members, columns, mask, A)
                x1 = _load(sets[1], strides[1], members, columns, mask, A)
                x2 = _load(sets[2], strides[2], members, columns, mask, A)
                s0 += tl.sum(x0 * x0, 1)
                s1 += tl.sum(x1 * x1, 1)
                s2 += tl.sum(x2 * x2, 1)
            rows = count.to(tl.int64)
            tl.store(scales + members, _scale(s0, A), mask=wanted <= found)
            tl.store(scales + rows + members, _scale(s1, A), mask=wanted <= found)
            tl.store(scales + 2 * rows + members, _scale(s2, A), mask=wanted <= found)


@triton.jit
def _scale(square: tl.tensor, A: tl.constexpr) -> Any:
    """1 / a row's length, of the square; with a minus where it is clamped, and the length has no gradient."""
    floor = tl.full((), LEAST_SQUARED_LENGTH, A)
    one = tl.full((), 1, A)
    clamped = square < floor
    scale = _quotient(one, _root(tl.where(clamped, floor, square)))
    return tl.where(clamped, -scale, scale)


@triton.jit
def _factor(scales: tl.tensor, rows: tl.tensor, mask: tl.tensor) -> Any:
    """What the rows are multiplied with; 0 where ``mask`` is not."""
    return tl.abs(tl.load(scales + rows, mask=mask, other=0))


@triton.jit
def _quotient(a: tl.tensor, b: tl.tensor) -> Any:
    """a / b rounded to nearest: in float32 the operator is an approximation."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _root(a: tl.tensor) -> Any:
    """√a rounded to nearest."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def _scales(weights: tl.tensor, visible: tl.tensor, infrared: tl.tensor) -> Any:
    """Where the scales of the rows of each modality are, behind the weights and the roles."""
    scales = weights + (WEIGHTS + 1) * visible.to(tl.int64) + infrared
    return scales, scales + 3 * visible.to(tl.int64)


# --- forward --------------------------------------------------------------------------------------------


@triton.jit
def _clear_scales(scales: tl.tensor, sample: tl.tensor, count: tl.tensor, A: tl.constexpr) -> None:
    """Of a sample's three rows, which nobody measures."""
    nothing = tl.full((), 0, A)
    rows = count.to(tl.int64)
    tl.store(scales + sample, nothing)
    tl.store(scales + rows + sample, nothing)
    tl.store(scales + 2 * rows + sample, nothing)


@triton.jit
def _hinge(
    pulled_square: tl.tensor, pushed_square: tl.tensor, margin: tl.tensor, weights: tl.tensor, A: tl.constexpr
) -> Any:
    """[α + D pulled - D pushed]₊; stores ∂loss/∂D divided by D of both, which the backward multiplies
    differences of centers with."""
    floor = tl.full((), LEAST_SQUARE, A)
    zero = tl.full((), 0, A)
    one = tl.full((), 1, A)
    # The comparisons let a NaN pass, as torch's clamp and relu do.
    pulled = _root(tl.where(pulled_square < floor, floor, pulled_square))
    pushed = _root(tl.where(pushed_square < floor, floor, pushed_square))
    value = tl.full((), margin, A) + pulled - pushed
    inactive = value <= zero
    live_pull = (pulled_square >= floor) & ~inactive
    live_push = (pushed_square >= floor) & ~inactive
    tl.store(weights, tl.where(live_pull, _quotient(one, pulled), zero))
    tl.store(weights + 1, tl.where(live_push, -_quotient(one, pushed), zero))
    return tl.where(inactive, zero, value)


@triton.jit
def _finish(
    losses: tl.tensor,
    roles: tl.tensor,
    total: tl.tensor,
    number: tl.tensor,
    visible: tl.tensor,
    A: tl.constexpr,
    LABELS: tl.constexpr,
) -> None:
    """The sum of the losses and the number of identities, of what all programs have written."""
    sums = tl.zeros([LABELS], A)
    leaders = tl.zeros([LABELS], tl.int32)
    for start in range(0, visible, LABELS):
        slots = start + tl.arange(0, LABELS)
        here = slots < visible
        # From L2, past an L1 that knows nothing of the other multiprocessors' stores.
        sums += tl.load(losses + slots, mask=here, other=0, cache_modifier=".cg")
        roles_here = tl.load(roles + slots, mask=here, other=0, cache_modifier=".cg")
        leaders += (roles_here == LEADER).to(tl.int32)
    tl.store(total, tl.sum(sums))
    tl.store(number, tl.sum(leaders).to(tl.int64))


@triton.jit(do_not_specialize=["visible", "infrared"])
def forward_kernel(
    features: tl.tuple,
    strides: tl.tuple,
    labels: tl.tensor,
    infrared_labels: tl.tensor,
    losses: tl.tensor,
    identities: tl.tensor,
    weights: tl.tensor,
    total: tl.tensor,
    number: tl.tensor,
    arrivals: tl.tensor,
    margin: tl.float64,  # a Python float would come in float32
    visible: tl.tensor,
    infrared: tl.tensor,
    dimensions: tl.tensor,
    STACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    A: tl.constexpr,
    LABELS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> None:
    """Grid: (visible + infrared samples,). ``arrivals`` is zero before and after."""
    sample = tl.program_id(0)
    roles = weights + WEIGHTS * visible.to(tl.int64)
    scales, infrared_scales = _scales(weights, visible, infrared)
    if sample >= visible:
        identity = tl.load(infrared_labels + sample - visible)
        shared = _first(labels, visible, identity, LABELS) < visible
        tl.store(roles + sample, tl.where(shared, FOLLOWER, LONELY))
        if NORMALIZE and not shared:
            _clear_scales(infrared_scales, sample - visible, infrared, A)
    else:
        identity = tl.load(labels + sample)
        leads = _first(labels, visible, identity, LABELS) == sample
        shared = _first(infrared_labels, infrared, identity, LABELS) < infrared
        own = weights + WEIGHTS * sample.to(tl.int64)
        if leads & shared:
            sets = _sets(features, strides, visible, infrared, STACKED)
            visible_sets = (sets[0], sets[1], sets[2])
            infrared_sets = (sets[3], sets[4], sets[5])
            visible_strides = (strides[0], strides[1], strides[2])
            infrared_strides = (strides[3], strides[4], strides[5])
            if NORMALIZE:
                _measure(
                    visible_sets,
                    visible_strides,
                    scales,
                    labels,
                    visible,
                    identity,
                    dimensions,
                    A,
                    LABELS,
                    DIMENSIONS,
                    MEMBERS,
                )
                _measure(
                    infrared_sets,
                    infrared_strides,
                    infrared_scales,
                    infrared_labels,
                    infrared,
                    identity,
                    dimensions,
                    A,
                    LABELS,
                    DIMENSIONS,
                    MEMBERS,
                )
                tl.debug_barrier()
            v_plus_n = tl.zeros([DIMENSIONS], A)
            v_plus_v = tl.zeros([DIMENSIONS], A)
            n_plus_v = tl.zeros([DIMENSIONS], A)
            n_plus_n = tl.zeros([DIMENSIONS], A)
            v_minus_n = tl.zeros([DIMENSIONS], A)
            v_minus_v = tl.zeros([DIMENSIONS], A)
            n_minus_v = tl.zeros([DIMENSIONS], A)
            n_minus_n = tl.zeros([DIMENSIONS], A)
            for start in range(0, dimensions, DIMENSIONS):
                columns = start + tl.arange(0, DIMENSIONS)
                v, v_plus, v_minus, _ = _centers(
                    visible_sets,
                    visible_strides,
                    scales,
                    labels,
                    visible,
                    identity,
                    columns,
                    dimensions,
                    NORMALIZE,
                    A,
                    LABELS,
                    MEMBERS,
                )
                n_minus, n_plus, n, _ = _centers(
                    infrared_sets,
                    infrared_strides,
                    infrared_scales,
                    infrared_labels,
                    infrared,
                    identity,
                    columns,
                    dimensions,
                    NORMALIZE,
                    A,
                    LABELS,
                    MEMBERS,
                )
                v_plus_n += (v_plus - n) * (v_plus - n)
                v_plus_v += (v_plus - v) * (v_plus - v)
                n_plus_v += (n_plus - v) * (n_plus - v)
                n_plus_n += (n_plus - n) * (n_plus - n)
                v_minus_n += (v_minus - n) * (v_minus - n)
                v_minus_v += (v_minus - v) * (v_minus - v)
                n_minus_v += (n_minus - v) * (n_minus - v)
                n_minus_n += (n_minus - n) * (n_minus - n)
            loss = _hinge(tl.sum(v_plus_n), tl.sum(v_plus_v), margin, own, A)
            loss += _hinge(tl.sum(n_plus_v), tl.sum(n_plus_n), margin, own + 2, A)
            loss += _hinge(tl.sum(v_minus_n), tl.sum(v_minus_v), margin, own + 4, A)
            loss += _hinge(tl.sum(n_minus_v), tl.sum(n_minus_n), margin, own + 6, A)
            tl.store(losses + sample, loss)
            tl.store(identities + sample, identity)
            tl.store(roles + sample, LEADER)
        else:
            tl.store(own + tl.arange(0, WEIGHTS), tl.zeros([WEIGHTS], A))
            tl.store(losses + sample, 0.0)
            tl.store(identities + sample, NO_IDENTITY)
            tl.store(roles + sample, tl.where(shared, FOLLOWER, LONELY))
            if NORMALIZE and not shared:
                _clear_scales(scales, sample, visible, A)
        # Whoever is the last to count has all others' stores before it: the addition releases a program's own
        # and acquires those of the ones before it. The barrier puts all of a program's threads before it.
        tl.debug_barrier()
        if tl.atomic_add(arrivals, 1, sem="acq_rel") == visible - 1:
            _finish(losses, roles, total, number, visible, A, LABELS)
            tl.store(arrivals, 0)


# --- backward -------------------------------------------------------------------------------------------


@triton.jit
def _pull(
    moved: tl.tensor,
    other: tl.tensor,
    own: tl.tensor,
    of_other: tl.tensor,
    of_own: tl.tensor,
    weights: tl.tensor,
    scale: tl.tensor,
    DETACH: tl.constexpr,
) -> Any:
    """The gradients of one hinge: of its own center, and added to those of the two originals' centers."""
    step = scale * tl.load(weights) * (moved - other)
    of_other -= step
    # Left out and not times zero: what is detached may be infinite.
    if not DETACH:
        push = scale * tl.load(weights + 1) * (moved - own)
        of_own -= push
        step += push
    return step, of_other, of_own


@triton.jit
def _gradients(
    sets: tl.tuple,
    strides: tl.tuple,
    scales: tl.tuple,
    labels: tl.tuple,
    counts: tl.tuple,
    identity: tl.tensor,
    weights: tl.tensor,
    scale: tl.tensor,
    columns: tl.tensor,
    dimensions: tl.tensor,
    NORMALIZE: tl.constexpr,
    DETACH: tl.constexpr,
    A: tl.constexpr,
    LABELS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> Any:
    """``columns`` of the gradient that each row of ``identity`` gets in each of the six sets.

    ``scales``, ``labels`` and ``counts`` are those of the two modalities. With ``NORMALIZE`` the gradients
    are those of the normalized rows.
    """
    v, v_plus, v_minus, visible_share = _centers(
        (sets[0], sets[1], sets[2]),
        (strides[0], strides[1], strides[2]),
        scales[0],
        labels[0],
        counts[0],
        identity,
        columns,
        dimensions,
        NORMALIZE,
        A,
        LABELS,
        MEMBERS,
    )
    n_minus, n_plus, n, infrared_share = _centers(
        (sets[3], sets[4], sets[5]),
        (strides[3], strides[4], strides[5]),
        scales[1],
        labels[1],
        counts[1],
        identity,
        columns,
        dimensions,
        NORMALIZE,
        A,
        LABELS,
        MEMBERS,
    )
    g_v = tl.zeros(columns.shape, A)
    g_n = tl.zeros(columns.shape, A)
    g_v_plus, g_n, g_v = _pull(v_plus, n, v, g_n, g_v, weights, scale, DETACH)
    g_n_plus, g_v, g_n = _pull(n_plus, v, n, g_v, g_n, weights + 2, scale, DETACH)
    g_v_minus, g_n, g_v = _pull(v_minus, n, v, g_n, g_v, weights + 4, scale, DETACH)
    g_n_minus, g_v, g_n = _pull(n_minus, v, n, g_v, g_n, weights + 6, scale, DETACH)
    return (
        g_v * visible_share,
        g_v_plus * visible_share,
        g_v_minus * visible_share,
        g_n_minus * infrared_share,
        g_n_plus * infrared_share,
        g_n * infrared_share,
    )


@triton.jit
def _write(
    sets: tl.tuple,
    rows: tl.tensor,
    mask: tl.tensor,
    g0: tl.tensor,
    g1: tl.tensor,
    g2: tl.tensor,
    columns: tl.tensor,
    dimensions: tl.tensor,
) -> None:
    """Store ``columns`` of the three gradients in every one of the dense ``rows`` where ``mask`` is."""
    at = (rows * dimensions)[:, None] + columns[None, :]
    here = mask[:, None] & (columns < dimensions)[None, :]
    tl.store(sets[0] + at, g0[None, :], mask=here)
    tl.store(sets[1] + at, g1[None, :], mask=here)
    tl.store(sets[2] + at, g2[None, :], mask=here)


@triton.jit
def _write_members(
    sets: tl.tuple,
    labels: tl.tensor,
    count: tl.tensor,
    identity: tl.tensor,
    g0: tl.tensor,
    g1: tl.tensor,
    g2: tl.tensor,
    columns: tl.tensor,
    dimensions: tl.tensor,
    LABELS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> None:
    """`_write` to every sample of ``identity``."""
    for start in range(0, count, LABELS):
        ranks, found = _ranks(labels, count, identity, start, LABELS)
        for before in range(0, found, MEMBERS):
            wanted = before + 1 + tl.arange(0, MEMBERS)
            members = _members(ranks, wanted, start, LABELS)
            _write(sets, members, wanted <= found, g0, g1, g2, columns, dimensions)


@triton.jit(do_not_specialize=["visible", "infrared"])
def backward_kernel(
    gradient: tl.tensor,
    gradient_stride: tl.tensor,
    features: tl.tuple,
    strides: tl.tuple,
    gradients: tl.tuple,
    labels: tl.tensor,
    infrared_labels: tl.tensor,
    weights: tl.tensor,
    visible: tl.tensor,
    infrared: tl.tensor,
    dimensions: tl.tensor,
    STACKED: tl.constexpr,
    DETACH: tl.constexpr,
    A: tl.constexpr,
    LABELS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> None:
    """Grid: (samples x blocks of D,), in one dimension since the others of a grid end at 65,535.

    A leader writes the rows of all its identity's samples.
    """
    blocks = tl.cdiv(dimensions, DIMENSIONS)
    sample = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * DIMENSIONS + tl.arange(0, DIMENSIONS)
    role = tl.load(weights + WEIGHTS * visible.to(tl.int64) + sample)
    if role != FOLLOWER:
        dense = (dimensions, dimensions, dimensions, dimensions, dimensions, dimensions)
        targets = _sets(gradients, dense, visible, infrared, True)
        visible_targets = (targets[0], targets[1], targets[2])
        infrared_targets = (targets[3], targets[4], targets[5])
        if role == LEADER:
            identity = tl.load(labels + sample)
            sets = _sets(features, strides, visible, infrared, STACKED)
            own = weights + WEIGHTS * sample.to(tl.int64)
            scale = tl.load(gradient + sample.to(tl.int64) * gradient_stride).to(A)
            g_v, g_v_plus, g_v_minus, g_n_minus, g_n_plus, g_n = _gradients(
                sets,
                strides,
                (weights, weights),
                (labels, infrared_labels),
                (visible, infrared),
                identity,
                own,
                scale,
                columns,
                dimensions,
                False,
                DETACH,
                A,
                LABELS,
                MEMBERS,
            )
            _write_members(
                visible_targets,
                labels,
                visible,
                identity,
                g_v,
                g_v_plus,
                g_v_minus,
                columns,
                dimensions,
                LABELS,
                MEMBERS,
            )
            _write_members(
                infrared_targets,
                infrared_labels,
                infrared,
                identity,
                g_n_minus,
                g_n_plus,
                g_n,
                columns,
                dimensions,
                LABELS,
                MEMBERS,
            )
        else:
            nothing = tl.zeros([DIMENSIONS], A)
            row = tl.arange(0, 1).to(tl.int64) + sample
            everything = row >= 0
            if sample < visible:
                _write(visible_targets, row, everything, nothing, nothing, nothing, columns, dimensions)
            else:
                _write(
                    infrared_targets,
                    row - visible,
                    everything,
                    nothing,
                    nothing,
                    nothing,
                    columns,
                    dimensions,
                )


# --- backward of normalized rows ------------------------------------------------------------------------


@triton.jit
def _own_gradients(
    sets: tl.tuple,
    strides: tl.tuple,
    scales: tl.tuple,
    labels: tl.tuple,
    counts: tl.tuple,
    identity: tl.tensor,
    weights: tl.tensor,
    scale: tl.tensor,
    columns: tl.tensor,
    dimensions: tl.tensor,
    is_visible: tl.tensor,
    DETACH: tl.constexpr,
    A: tl.constexpr,
    LABELS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> Any:
    """The three of `_gradients` that a sample of one modality gets."""
    g_v, g_v_plus, g_v_minus, g_n_minus, g_n_plus, g_n = _gradients(
        sets,
        strides,
        scales,
        labels,
        counts,
        identity,
        weights,
        scale,
        columns,
        dimensions,
        True,
        DETACH,
        A,
        LABELS,
        MEMBERS,
    )
    g0 = tl.where(is_visible, g_v, g_n_minus)
    g1 = tl.where(is_visible, g_v_plus, g_n_plus)
    g2 = tl.where(is_visible, g_v_minus, g_n)
    return g0, g1, g2


@triton.jit
def _unit(
    row: tl.tensor, scale: tl.tensor, columns: tl.tensor, dimensions: tl.tensor, A: tl.constexpr
) -> Any:
    """``columns`` of a normalized row."""
    return tl.load(row + columns, mask=columns < dimensions, other=0).to(A) * tl.abs(scale)


@triton.jit
def _along(product: tl.tensor, scale: tl.tensor) -> Any:
    """u·g of a row, or 0 where its length has no gradient: that of a NaN has one."""
    along = tl.sum(product)
    return tl.where(scale < 0, tl.zeros_like(along), along)


@triton.jit(do_not_specialize=["visible", "infrared"])
def unit_backward_kernel(
    gradient: tl.tensor,
    gradient_stride: tl.tensor,
    features: tl.tuple,
    strides: tl.tuple,
    gradients: tl.tuple,
    labels: tl.tensor,
    infrared_labels: tl.tensor,
    weights: tl.tensor,
    visible: tl.tensor,
    infrared: tl.tensor,
    dimensions: tl.tensor,
    STACKED: tl.constexpr,
    DETACH: tl.constexpr,
    A: tl.constexpr,
    LABELS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> None:
    """Grid: (samples,). A row that is normalized to u gets (g - u (u·g)) / its length."""
    sample = tl.program_id(0)
    is_visible = sample < visible
    row = tl.where(is_visible, sample, sample - visible).to(tl.int64)
    dense = (dimensions, dimensions, dimensions, dimensions, dimensions, dimensions)
    targets = _sets(gradients, dense, visible, infrared, True)
    target0 = tl.where(is_visible, targets[0], targets[3]) + row * dimensions
    target1 = tl.where(is_visible, targets[1], targets[4]) + row * dimensions
    target2 = tl.where(is_visible, targets[2], targets[5]) + row * dimensions
    role = tl.load(weights + WEIGHTS * visible.to(tl.int64) + sample)
    if role == LONELY:
        nothing = tl.zeros([DIMENSIONS], A)
        for start in range(0, dimensions, DIMENSIONS):
            columns = start + tl.arange(0, DIMENSIONS)
            tl.store(target0 + columns, nothing, mask=columns < dimensions)
            tl.store(target1 + columns, nothing, mask=columns < dimensions)
            tl.store(target2 + columns, nothing, mask=columns < dimensions)
    else:
        identity = tl.load(tl.where(is_visible, labels, infrared_labels) + row)
        slot = _first(labels, visible, identity, LABELS).to(tl.int64)
        scale = tl.load(gradient + slot * gradient_stride).to(A)
        slot_weights = weights + WEIGHTS * slot
        scales = _scales(weights, visible, infrared)
        own = tl.where(is_visible, scales[0], scales[1]) + row
        rows = tl.where(is_visible, visible, infrared).to(tl.int64)
        scale0 = tl.load(own)
        scale1 = tl.load(own + rows)
        scale2 = tl.load(own + 2 * rows)
        sets = _sets(features, strides, visible, infrared, STACKED)
        row0 = tl.where(is_visible, sets[0] + row * strides[0], sets[3] + row * strides[3])
        row1 = tl.where(is_visible, sets[1] + row * strides[1], sets[4] + row * strides[4])
        row2 = tl.where(is_visible, sets[2] + row * strides[2], sets[5] + row * strides[5])
        product0 = tl.zeros([DIMENSIONS], A)
        product1 = tl.zeros([DIMENSIONS], A)
        product2 = tl.zeros([DIMENSIONS], A)
        for start in range(0, dimensions, DIMENSIONS):
            columns = start + tl.arange(0, DIMENSIONS)
            g0, g1, g2 = _own_gradients(
                sets,
                strides,
                scales,
                (labels, infrared_labels),
                (visible, infrared),
                identity,
                slot_weights,
                scale,
                columns,
                dimensions,
                is_visible,
                DETACH,
                A,
                LABELS,
                MEMBERS,
            )
            product0 += _unit(row0, scale0, columns, dimensions, A) * g0
            product1 += _unit(row1, scale1, columns, dimensions, A) * g1
            product2 += _unit(row2, scale2, columns, dimensions, A) * g2
        along0 = _along(product0, scale0)
        along1 = _along(product1, scale1)
        along2 = _along(product2, scale2)
        for start in range(0, dimensions, DIMENSIONS):
            columns = start + tl.arange(0, DIMENSIONS)
            g0, g1, g2 = _own_gradients(
                sets,
                strides,
                scales,
                (labels, infrared_labels),
                (visible, infrared),
                identity,
                slot_weights,
                scale,
                columns,
                dimensions,
                is_visible,
                DETACH,
                A,
                LABELS,
                MEMBERS,
            )
            of0 = (g0 - _unit(row0, scale0, columns, dimensions, A) * along0) * tl.abs(scale0)
            of1 = (g1 - _unit(row1, scale1, columns, dimensions, A) * along1) * tl.abs(scale1)
            of2 = (g2 - _unit(row2, scale2, columns, dimensions, A) * along2) * tl.abs(scale2)
            tl.store(target0 + columns, of0, mask=columns < dimensions)
            tl.store(target1 + columns, of1, mask=columns < dimensions)
            tl.store(target2 + columns, of2, mask=columns < dimensions)


# --- launchers ------------------------------------------------------------------------------------------

# Centers that coincide are at a distance of exactly zero only where each is rounded on its own: a fused
# multiply-add of one center's share with the other's would leave a rounding error, and a direction with it.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}

# A leader has a multiprocessor nearly to itself: ptxas shall not spill to make room for others.
REGISTERS = 255
if torch.version.hip is None:
    OPTIONS["maxnreg"] = REGISTERS

# In the forward one program an identity reads; in the backward one for every block of its columns: there the
# blocks are small, to be many. In the backward of normalized rows a program has all columns.
FORWARD_WARPS, BACKWARD_WARPS, UNIT_BACKWARD_WARPS = 8, 2, 8

# Members of an identity whose rows are on their way at once: a leader is alone with its reads, and latency is
# what they cost.
MEMBERS = 4


_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrivals_counter(device: torch.device) -> Tensor:
    """An int32 zero that a forward on the current stream may count in, and leaves zero.

    One for each stream, where launches follow one another: no launch is spent on clearing it. A captured
    graph may be replayed on another stream beside this one: its launches get counters of their own, which
    the graph clears.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = (device, stream.cuda_stream)
    if key not in _counters:
        _counters.setdefault(key, _kept_zero(device, stream))
    return _counters[key]


def _kept_zero(device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    """An int32 zero that nothing overwrites, cleared on ``stream``.

    Made on a thread of its own: while torch.compile warms up its graphs, what the calling thread allocates
    comes from their memory, which their replays take for free.
    """

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros((), dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def six(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A tensor for each set; a stack's six times."""
    return tuple(tensors) if len(tensors) == 6 else (tensors[0],) * 6


def constants(dtype: torch.dtype, samples: int, dimensions: int, warps: int) -> dict[str, Any]:
    """The kernels' block sizes: a thread reads 16 bytes of a row at once, and four labels.

    They follow from the shapes alone, so the order of every sum does too.
    """
    columns = 32 * warps * (16 // dtype.itemsize)
    return {
        "A": tl.float64 if dtype == torch.float64 else tl.float32,
        "LABELS": min(32 * warps * 4, triton.next_power_of_2(samples)),
        "DIMENSIONS": min(columns, triton.next_power_of_2(max(1, dimensions))),
        "MEMBERS": MEMBERS,
    }


@functools.cache
def _launcher(kernel: Any, warps: int, **constants: Any) -> Launcher:
    return Launcher(kernel, constants, num_warps=warps, **OPTIONS)


def forward(
    features: Sequence[Tensor],
    labels: Tensor,
    infrared_labels: Tensor,
    margin: float,
    detach_negative: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total (), losses (B_v,), identities (B_v,), count (), and what the backward needs.

    Losses and identities stand in the slots of the identities' leaders; other slots have a loss of 0 and the
    largest int64 as identity.
    """
    readable = [f if f.stride(1) == 1 else f.contiguous() for f in features]
    labels, infrared_labels = labels.contiguous(), infrared_labels.contiguous()
    first, visible, infrared = readable[0], labels.shape[0], infrared_labels.shape[0]
    dtype, dimensions = shapes.precise(first.dtype), first.shape[1]
    total, losses = first.new_empty((), dtype=dtype), first.new_empty(visible, dtype=dtype)
    number, identities = labels.new_empty(()), torch.empty_like(labels)
    weights = first.new_empty(shapes.cqc_saved_on_gpu(visible, infrared, normalize), dtype=dtype)
    sets = six(readable)
    chosen = constants(first.dtype, max(visible, infrared), dimensions, FORWARD_WARPS)
    launch = _launcher(
        forward_kernel, FORWARD_WARPS, STACKED=len(features) == 1, NORMALIZE=normalize, **chosen
    )
    with on_device(first.device):
        given = Arguments(
            first.device,
            {
                "labels": labels,
                "infrared_labels": infrared_labels,
                "losses": losses,
                "identities": identities,
                "weights": weights,
                "total": total,
                "number": number,
                "arrivals": arrivals_counter(first.device),
            },
            {"strides": tuple([f.stride(0) for f in sets]), "dimensions": dimensions},
            {"margin": margin, "visible": visible, "infrared": infrared},
            {"features": sets},
        )
        launch(visible + infrared, given)
    return total, losses, identities, number, weights


def backward(
    gradient: Tensor,
    features: Sequence[Tensor],
    labels: Tensor,
    infrared_labels: Tensor,
    weights: Tensor,
    detach_negative: bool,
    normalize: bool,
) -> Tensor:
    """The gradient of the six sets, stacked; ``gradient`` is () or, a slot each, (B_v,)."""
    readable = [f if f.stride(1) == 1 else f.contiguous() for f in features]
    labels, infrared_labels = labels.contiguous(), infrared_labels.contiguous()
    first, visible, infrared = readable[0], labels.shape[0], infrared_labels.shape[0]
    dimensions = first.shape[1]
    stacked = first.new_empty((3 * (visible + infrared), dimensions))
    kernel = unit_backward_kernel if normalize else backward_kernel
    warps = UNIT_BACKWARD_WARPS if normalize else BACKWARD_WARPS
    chosen = constants(first.dtype, max(visible, infrared), dimensions, warps)
    blocks = 1 if normalize else triton.cdiv(dimensions, chosen["DIMENSIONS"])
    sets = six(readable)
    launch = _launcher(kernel, warps, STACKED=len(features) == 1, DETACH=detach_negative, **chosen)
    given = Arguments(
        first.device,
        {"gradient": gradient, "labels": labels, "infrared_labels": infrared_labels, "weights": weights},
        {
            "strides": tuple([f.stride(0) for f in sets]),
            "dimensions": dimensions,
            "gradient_stride": gradient.stride(0) if gradient.dim() else 0,
        },
        {"visible": visible, "infrared": infrared},
        {"features": sets, "gradients": six([stacked])},
    )
    with on_device(first.device):
        launch((visible + infrared) * blocks, given)
    return stacked


# --- for torch ------------------------------------------------------------------------------------------

# As csrc/schemas.h has them.
SCHEMAS: dict[str, str] = {
    "cqc_forward": "(Tensor[] features, Tensor labels, Tensor infrared_labels, float margin, "
    "bool detach_negative, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cqc_backward": "(Tensor gradient, Tensor[] features, Tensor labels, Tensor infrared_labels, "
    "Tensor saved, bool detach_negative, bool normalize) -> Tensor",
}

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"cqc_forward": forward, "cqc_backward": backward}


def _saved(labels: Tensor, infrared_labels: Tensor, normalize: bool) -> tuple[int, ...]:
    return (shapes.cqc_saved_on_gpu(labels.shape[0], infrared_labels.shape[0], normalize),)


FAKES: dict[str, Callable[..., Any]] = {
    "cqc_forward": shapes.cqc_forward_fake(_saved),
    "cqc_backward": shapes.cqc_backward_fake,
}
