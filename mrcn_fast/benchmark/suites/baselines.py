"""The baselines: what a user would write in PyTorch, or take from it, without this library.

Each function computes the results of a module of the library with the module's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast import reference
from mrcn_fast.block import MRCNBlock, SNRBlock


def collapsed_block(block: MRCNBlock, visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
    """Compute the block as one statistics pass and one elementwise pass, for torch.compile.

    Args:
        block: whose parameters are used
        visible: (N, C, H, W)
        infrared: of the same shape

    Returns:
        The four made sets, in the paper's order, each of the inputs' shape.
    """
    (a_v, d_v, z_v), (a_n, d_n, z_n) = (_affine(block, m, x) for m, x in enumerate((visible, infrared)))
    s = _gates(block.gate.parameter_list(), torch.stack((z_v, z_n, z_v, z_n)))
    return (
        _spread(a_v + s[0] * (1 - a_v)) * visible + _spread((1 - s[0]) * d_v),
        _spread(a_v) * visible + _spread(s[3] * (1 - a_n)) * infrared + _spread(d_v - s[3] * d_n),
        _spread(a_n) * infrared + _spread(s[2] * (1 - a_v)) * visible + _spread(d_n - s[2] * d_v),
        _spread(a_n + s[1] * (1 - a_n)) * infrared + _spread((1 - s[1]) * d_n),
    )


def collapsed_concat(block: MRCNBlock, visible: Tensor, infrared: Tensor) -> tuple[Tensor]:
    """Compute `collapsed_block` with the six sets in one batch, (6N, C, H, W)."""
    return (torch.cat((visible, *collapsed_block(block, visible, infrared), infrared)),)


def collapsed_restitution(block: MRCNBlock, visible: Tensor) -> tuple[Tensor]:
    """Compute the visible modality's F₊ as `collapsed_block` does."""
    a, d, z = _affine(block, 0, visible)
    s = _gates([p[:1] for p in block.gate.parameter_list()], z[None])[0]
    return (_spread(a + s * (1 - a)) * visible + _spread((1 - s) * d),)


def collapsed_snr(block: SNRBlock, features: Tensor) -> tuple[Tensor, ...]:
    """Compute SNR's three maps as `collapsed_block` does."""
    a, d, z = _affine(block, 0, features)
    s = _gates(block.gate.parameter_list(), z[None])[0]
    return (
        _spread(a + s * (1 - a)) * features + _spread((1 - s) * d),
        _spread(a + (1 - s) * (1 - a)) * features + _spread(s * d),
        _spread(a) * features + _spread(d),
    )


def library_block(block: MRCNBlock, visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
    """Compute the block by the paper's equations, with PyTorch's own instance normalization.

    Args and results are those of `collapsed_block`.
    """
    f_v, f_n = (_normalized(block, m, x) for m, x in enumerate((visible, infrared)))
    m_v, m_n = visible - f_v, infrared - f_n
    z_v, z_n = m_v.mean(dim=(2, 3)), m_n.mean(dim=(2, 3))
    s = [_spread(gate) for gate in _gates(block.gate.parameter_list(), torch.stack((z_v, z_n, z_v, z_n)))]
    return f_v + s[0] * m_v, f_v + s[3] * m_n, f_n + s[2] * m_v, f_n + s[1] * m_n


def library_concat(block: MRCNBlock, visible: Tensor, infrared: Tensor) -> tuple[Tensor]:
    """Compute `library_block` with the six sets in one batch, (6N, C, H, W)."""
    return (torch.cat((visible, *library_block(block, visible, infrared), infrared)),)


def library_restitution(block: MRCNBlock, visible: Tensor) -> tuple[Tensor]:
    """Compute the visible modality's F₊ as `library_block` does."""
    normalized = _normalized(block, 0, visible)
    residual = visible - normalized
    s = _gates([p[:1] for p in block.gate.parameter_list()], residual.mean(dim=(2, 3))[None])[0]
    return (normalized + _spread(s) * residual,)


def library_snr(block: SNRBlock, features: Tensor) -> tuple[Tensor, ...]:
    """Compute SNR's three maps as `library_block` does."""
    normalized = _normalized(block, 0, features)
    residual = features - normalized
    s = _spread(_gates(block.gate.parameter_list(), residual.mean(dim=(2, 3))[None])[0])
    return normalized + s * residual, normalized + (1 - s) * residual, normalized


def _normalized(block: MRCNBlock | SNRBlock, modality: int, x: Tensor) -> Tensor:
    return F.instance_norm(
        x, weight=block.norm_weight[modality], bias=block.norm_bias[modality], eps=block.eps
    )


def _affine(block: MRCNBlock | SNRBlock, modality: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a and d of F̃ = aF + d, and the mean of M = F - F̃, which is μ - β, each (N, C)."""
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
    a = block.norm_weight[modality] * torch.rsqrt(variance + block.eps)
    bias = block.norm_bias[modality]
    return a, bias - a * mean, mean - bias


def _gates(parameters: Sequence[Tensor], pooled: Tensor) -> Tensor:
    """Compute SE gates from pooled residuals; both are (gates, N, C)."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    hidden = F.relu(torch.baddbmm(fc1_bias[:, None], pooled, fc1_weight.mT))
    return torch.sigmoid(torch.baddbmm(fc2_bias[:, None], hidden, fc2_weight.mT))


def _spread(t: Tensor) -> Tensor:
    return t[:, :, None, None]


def looped_cqc(
    features: Sequence[Tensor], labels: Tensor, infrared_labels: Tensor, margin: float = 0.2
) -> Tensor:
    """Compute the CQC loss with a loop over identities, as published training code does.

    Args:
        features: the six sets, each (B, D), in the paper's order
        labels: (B,), of the visible images
        infrared_labels: (B,), of the infrared images
        margin: of the hinge

    Returns:
        The loss, summed over identities: a scalar.
    """
    f_v, f_vr, f_vc, f_nc, f_nr, f_n = features
    total = features[0].new_zeros(())
    for identity in labels.unique():
        own, other = labels == identity, infrared_labels == identity
        c_v, c_n = f_v[own].mean(0), f_n[other].mean(0)
        for center, far, near in (
            (f_vr[own].mean(0), c_n, c_v),
            (f_nr[other].mean(0), c_v, c_n),
            (f_vc[own].mean(0), c_n, c_v),
            (f_nc[other].mean(0), c_v, c_n),
        ):
            pulled, pushed = torch.dist(center, far), torch.dist(center, near)
            total = total + F.relu(margin + pulled - pushed)
    return total


class LoopedCQC(nn.Module):
    """`looped_cqc` as a module like `mrcn_fast.CQCLoss`: (6B, D) features, (B,) labels -> scalar."""

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return looped_cqc(features.chunk(6), labels, labels)


def vectorized_cqc(
    features: Sequence[Tensor], labels: Tensor, infrared_labels: Tensor, margin: float = 0.2
) -> Tensor:
    """Compute the CQC loss with all centers of a set by one index_add.

    Args and result are those of `looped_cqc`; both modalities must have the same identities.
    """
    identities, own = labels.unique(return_inverse=True)
    other = torch.searchsorted(identities, infrared_labels)
    centers = []
    for f, index in zip(features, [own] * 3 + [other] * 3, strict=True):
        count = torch.bincount(index, minlength=len(identities)).to(f.dtype)[:, None]
        centers.append(f.new_zeros(len(identities), f.shape[1]).index_add_(0, index, f) / count)
    c_v, c_vr, c_vc, c_nc, c_nr, c_n = centers
    moved, far, near = (
        torch.stack((c_vr, c_nr, c_vc, c_nc)),
        torch.stack((c_n, c_v, c_n, c_v)),
        torch.stack((c_v, c_n, c_v, c_n)),
    )
    return F.relu(margin + reference.distance(moved, far) - reference.distance(moved, near)).sum()


def of_unit_rows(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss of features that torch normalizes first."""
    return lambda features, *labels: loss([F.normalize(f) for f in features], *labels)


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """Compile a function for fixed shapes, which is what torch.compile does best."""
    return torch.compile(function, dynamic=False, mode=mode)
