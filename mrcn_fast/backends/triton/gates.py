"""The channel gates in Triton, forward, for a few channels of one sample or for all of them."""

from __future__ import annotations

import triton
import triton.language as tl

from mrcn_fast.backends.triton.formulas import (
    add_shares,
    matrix,
    plane,
    pooled_residual,
    vector,
)


@triton.jit
def hidden_layer(row, shares, bias, g, b, r, FORWARD: tl.constexpr, K: tl.constexpr):
    """Return the hidden layer of gate g and branch b: from the shares, or in the backward as it was saved."""
    at = (g * K.BRANCHES + b) * K.R
    if FORWARD:
        before = add_shares(shares + at, r, K.GATES * K.BRANCHES * K.R, K) + vector(
            bias + g * K.R, r, r < K.R, K
        )
        hidden = tl.where(before < 0.0, 0.0, before)  # a NaN passes, as in torch.relu
    else:
        hidden = vector(row + at, r, r < K.R, K)
    return hidden


@triton.jit
def excite(row, shares, parameters, g, c, inside, rank, C, FORWARD: tl.constexpr, K: tl.constexpr):
    """Return the sigmoid's argument of SE and CBAM; the program of rank 0 saves the hidden layers."""
    BRANCHES: tl.constexpr = K.BRANCHES
    RB: tl.constexpr = K.RB
    _, biases, more_weights, more_biases = parameters
    x = BRANCHES * vector(more_biases, g * C + c, inside, K)
    for first in range(0, K.R, RB):
        r = first + tl.arange(0, RB)
        weight = matrix(more_weights, g * C + c, r, K.R, inside, r < K.R, K)
        for b in tl.static_range(BRANCHES):  # W (h + h') would lose the NaN of infinity times zero
            hidden = hidden_layer(row, shares, biases, g, b, r, FORWARD, K)
            x += tl.sum(weight * hidden[None, :], axis=1)
            if FORWARD:
                tl.store(row + (g * BRANCHES + b) * K.R + r, hidden, mask=r < tl.where(rank == 0, K.R, 0))
    return x


@triton.jit
def layers(parameters, g, r, c, inside, C, K: tl.constexpr):
    """Return both layers of gate g for the hidden numbers r: weights [r, c], biases [r], weights [c, r]."""
    weights, biases, more_weights, _ = parameters
    return (
        matrix(weights, g * K.R + r, c, C, r < K.R, inside, K),
        vector(biases, g * K.R + r, r < K.R, K),
        matrix(more_weights, g * C + c, r, K.R, inside, r < K.R, K),
    )


@triton.jit
def _add_layers(x, layer, z, row, g, b: tl.constexpr, r, K: tl.constexpr):
    """Return x, increased by the shares of the hidden numbers r of branch b, and save these in the row."""
    weight, bias, more_weight = layer
    before = tl.sum(weight * z[None, :], axis=1) + bias
    hidden = tl.where(before < 0.0, 0.0, before)
    tl.store(row + (g * K.BRANCHES + b) * K.R + r, hidden, mask=r < K.R)
    return x + tl.sum(more_weight * hidden[None, :], axis=1)


@triton.jit
def whole_gates(z, extreme_z, row, parameters, m, c, inside, C, K: tl.constexpr):
    """Return s of modality m's one or two gates, in a program that has all channels' pooled residuals."""
    RB: tl.constexpr = K.RB
    z, extreme_z = tl.where(inside, z, 0.0), tl.where(inside, extreme_z, 0.0)
    other = m + K.GATES - K.MODALITIES
    x0 = K.BRANCHES * vector(parameters[3], m * C + c, inside, K)
    x1 = K.BRANCHES * vector(parameters[3], other * C + c, inside, K)
    for first in range(0, K.R, RB):
        r = first + tl.arange(0, RB)
        layer0 = layers(parameters, m, r, c, inside, C, K)
        layer1 = layer0
        if K.MODALITIES == 2:  # the reads start before the program waits for the first gate's sums
            layer1 = layers(parameters, other, r, c, inside, C, K)
        x0 = _add_layers(x0, layer0, z, row, m, 0, r, K)
        if K.BRANCHES == 2:
            x0 = _add_layers(x0, layer0, extreme_z, row, m, 1, r, K)
        if K.MODALITIES == 2:
            x1 = _add_layers(x1, layer1, z, row, other, 0, r, K)
            if K.BRANCHES == 2:
                x1 = _add_layers(x1, layer1, extreme_z, row, other, 1, r, K)
    return 1.0 / (1.0 + tl.exp(-x0)), 1.0 / (1.0 + tl.exp(-x1))


@triton.jit
def convolve(planes, weight, g, m, c, C, K: tl.constexpr):
    """Return the sigmoid's argument of ECA, a convolution over the channels' pooled residuals."""
    x = tl.zeros(c.shape, K.A)
    for t in range(K.R):
        neighbour = c + t - K.R // 2
        inside = (neighbour >= 0) & (neighbour < C)
        mean, _, a, shift = plane(planes, m, neighbour, inside, C, K)
        # The zeros of the padding count too: a weight that is not finite makes them NaN.
        z = tl.where(inside, pooled_residual(mean, a, shift), 0.0)
        x += tl.load(weight + g * K.R + t).to(K.A) * z
    return x


@triton.jit
def gate_value(planes, shares, parameters, g, c, inside, rank, C, FORWARD: tl.constexpr, K: tl.constexpr):
    """Return s of gate g for the channels `c`; `parameters` stand in the order of mrcn_fast/gates.py."""
    if K.GATE == "eca":
        x = convolve(planes, parameters[0], g, g % K.MODALITIES, c, C, K)
    else:
        row = planes[0] + 2 * K.MODALITIES * C
        x = excite(row, shares, parameters, g, c, inside, rank, C, FORWARD, K)
    return 1.0 / (1.0 + tl.exp(-x))
