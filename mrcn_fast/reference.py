"""The paper's equations in plain PyTorch: one function per equation, literal and twice differentiable.

Every kernel is compared with these functions, and they are the backend ``"reference"``. They are written to
be read beside the paper, not to be fast: the normalized features F̃ and the residual M exist here as tensors,
which the kernels never form. Nothing here casts: PyTorch's type promotion decides the dtype of a result.

Shapes: features ``(N, C, H, W)``; instance-norm parameters ``(C,)`` a modality; gate parameters of one
gate without the leading gate dimension (`se_gate` and the others say which).

Example:
    >>> maps = torch.arange(8.0).view(1, 2, 2, 2)
    >>> normalized = instance_norm(maps, torch.ones(2), torch.zeros(2))
    >>> residual(maps, normalized).mean(dim=(2, 3))  # the mean of what normalization removed
    tensor([[1.5000, 5.5000]])
    >>> distance(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    tensor([5.])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

GateParameters = Sequence[Tensor]

# Squared distances and squared lengths are clamped at these before the root, so that its gradient is finite.
# The same two numbers are in csrc/cqc/hinges.h and backends/triton/cqc_rows.py.
LEAST_SQUARE = 1e-12
LEAST_SQUARED_LENGTH = 1e-24


# --- instance normalization and residual (eq. 1-3) ---------------------------------------------------


def instance_norm(features: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """F̃ = γ (F - μ(F)) / σ(F) + β over each plane, biased variance (eq. 1, 2)."""
    mean = features.mean(dim=(2, 3), keepdim=True)
    variance = features.var(dim=(2, 3), unbiased=False, keepdim=True)
    return weight[:, None, None] * (features - mean) / torch.sqrt(variance + eps) + bias[:, None, None]


def residual(features: Tensor, normalized: Tensor) -> Tensor:
    """M = F - F̃, what normalization removed (eq. 3)."""
    return features - normalized


# --- gates A(M): (N, C, H, W) -> (N, C), and of "cbam" (N, C, H, W); values in (0, 1) -----------------


def excite(pooled: Tensor, parameters: GateParameters) -> Tensor:
    """The two fully connected layers of SE and CBAM with a ReLU between them, before the sigmoid.

    ``pooled`` is (N, C); ``parameters`` fc1_weight (R, C), fc1_bias (R,), fc2_weight (C, R), fc2_bias (C,).
    """
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    return F.linear(F.relu(F.linear(pooled, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def se_gate(residual: Tensor, parameters: GateParameters) -> Tensor:
    """Squeeze-and-excitation (Hu et al. 2018), the gate of the paper: σ(fc2 ReLU(fc1 GAP(M)))."""
    return torch.sigmoid(excite(residual.mean(dim=(2, 3)), parameters))


def eca_gate(residual: Tensor, parameters: GateParameters) -> Tensor:
    """Efficient channel attention (Wang et al. 2020): σ(conv1d over the channels of GAP(M)).

    ``parameters`` is one weight (K,), K odd. The channels are padded with K // 2 zeros on each side.
    The zeros are multiplied like any number: zero times a NaN or infinite weight is NaN. (Whether `F.conv1d`
    multiplies its padding depends on the dtype, the size and the device.)
    """
    (weight,) = parameters
    half = weight.shape[0] // 2
    padded = F.pad(residual.mean(dim=(2, 3)), (half, half))
    return torch.sigmoid(padded.unfold(1, weight.shape[0], 1) @ weight)


def cbam_channel_gate(residual: Tensor, parameters: GateParameters) -> Tensor:
    """Channel part of CBAM (Woo et al. 2018): σ(mlp(GAP(M)) + mlp(GMP(M))), one MLP for both.

    Where several pixels share the maximum, its gradient is spread evenly over them (`torch.amax`).
    """
    average, maximum = residual.mean(dim=(2, 3)), residual.amax(dim=(2, 3))
    return torch.sigmoid(excite(average, parameters) + excite(maximum, parameters))


def spatial_gate(features: Tensor, weight: Tensor) -> Tensor:
    """Spatial part of CBAM (Woo et al. 2018): σ(f([mean; maximum])) over channels, -> (N, 1, H, W).

    f is the convolution with ``weight`` (2, K, K), K = 7, with zeros around the map. It has no bias and no
    batch normalization, as in the paper's equation. Where several channels share the maximum, its gradient is
    spread evenly over them.
    """
    mean, maximum = features.mean(dim=1), features.amax(dim=1)
    pooled = torch.stack((mean, maximum), dim=1)
    return torch.sigmoid(F.conv2d(pooled, weight[None], padding=weight.shape[-1] // 2))


def cbam_gate(residual: Tensor, parameters: GateParameters) -> Tensor:
    """The whole CBAM (Woo et al. 2018): its channel part A_c(M), times the spatial part of M x A_c(M).

    ``parameters`` are those of `cbam_channel_gate`, then the weight (2, 7, 7) of `spatial_gate`.
    """
    *of_channels, spatial_weight = parameters
    channels = cbam_channel_gate(residual, of_channels)[:, :, None, None]
    return channels * spatial_gate(residual * channels, spatial_weight)


GATES: dict[str, Callable[[Tensor, GateParameters], Tensor]] = {
    "se": se_gate,
    "eca": eca_gate,
    "cbam-channel": cbam_channel_gate,
    "cbam": cbam_gate,
}


def attention(residual: Tensor, gate: str, parameters: GateParameters) -> Tensor:
    """A(M) in the shape in which it multiplies M: (N, C, 1, 1), and (N, C, H, W) for "cbam"."""
    weights = GATES[gate](residual, parameters)
    return weights if weights.dim() == 4 else weights[:, :, None, None]


# --- restitution and compensation (eq. 4-7) -----------------------------------------------------------


def distill(residual: Tensor, gate: str, parameters: GateParameters) -> Tensor:
    """M₊ = M x A₁(M) (eq. 4), or M₋ = M x A₂(M) (eq. 6) where A₂'s parameters are given."""
    return residual * attention(residual, gate, parameters)


def restitute(
    features: Tensor, normalized: Tensor, distilled: Tensor, restitute_to: str = "normalized"
) -> Tensor:
    """F₊ = F̃ + M₊ (eq. 5 as the paper's text and abstract say), or F + M₊ as printed (``"input"``)."""
    return (normalized if restitute_to == "normalized" else features) + distilled


def compensate(normalized: Tensor, other_distilled: Tensor) -> Tensor:
    """F₋ = F̃ + M₋ of the other modality (eq. 7)."""
    return normalized + other_distilled


# --- whole blocks --------------------------------------------------------------------------------------


def restitution(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: GateParameters,
    *,
    gate: str = "se",
    eps: float = 1e-5,
    restitute_to: str = "normalized",
) -> Tensor:
    """F₊ of one modality alone (eq. 1, 3, 4, 5); norm parameters (C,), gate parameters of one gate."""
    normalized = instance_norm(features, norm_weight, norm_bias, eps)
    distilled = distill(residual(features, normalized), gate, gate_parameters)
    return restitute(features, normalized, distilled, restitute_to)


def mrcn_block(
    visible: Tensor,
    infrared: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: GateParameters,
    *,
    gate: str = "se",
    eps: float = 1e-5,
    restitute_to: str = "normalized",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The six feature sets v, v+, v-, n-, n+, n of a pair (eq. 1-7).

    ``norm_weight`` and ``norm_bias`` are (2, C), visible then infrared; every gate parameter has a leading
    dimension of 4: A_v1, A_n1, A_v2, A_n2.
    """
    a_v1, a_n1, a_v2, a_n2 = zip(*(p.unbind(0) for p in gate_parameters), strict=True)
    visible_normalized = instance_norm(visible, norm_weight[0], norm_bias[0], eps)
    infrared_normalized = instance_norm(infrared, norm_weight[1], norm_bias[1], eps)
    visible_residual = residual(visible, visible_normalized)
    infrared_residual = residual(infrared, infrared_normalized)

    visible_restituted = restitute(
        visible, visible_normalized, distill(visible_residual, gate, a_v1), restitute_to
    )
    infrared_restituted = restitute(
        infrared, infrared_normalized, distill(infrared_residual, gate, a_n1), restitute_to
    )
    visible_compensated = compensate(visible_normalized, distill(infrared_residual, gate, a_n2))
    infrared_compensated = compensate(infrared_normalized, distill(visible_residual, gate, a_v2))
    return (
        visible,
        visible_restituted,
        visible_compensated,
        infrared_compensated,
        infrared_restituted,
        infrared,
    )


def snr_block(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_parameters: GateParameters,
    *,
    gate: str = "se",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """F̃ + sM, F̃ + (1 - s)M and F̃ of one batch (SNR, Jin et al. 2020); parameters as in `restitution`."""
    normalized = instance_norm(features, norm_weight, norm_bias, eps)
    removed = residual(features, normalized)
    s = attention(removed, gate, gate_parameters)
    return normalized + s * removed, normalized + (1 - s) * removed, normalized


# --- center-quadruplet causal loss (eq. 8-10) -----------------------------------------------------------


def shared_identities(labels: Tensor, infrared_labels: Tensor) -> Tensor:
    """The identities present in both modalities, ascending."""
    identities = torch.unique(labels)
    return identities[torch.isin(identities, infrared_labels)]


def centers(features: Tensor, labels: Tensor, identities: Tensor) -> Tensor:
    """Mean feature of each identity: (B, D), (B,), (I,) -> (I, D)."""
    return torch.stack([features[labels == identity].mean(dim=0) for identity in identities])


def unit_rows(features: Tensor) -> Tensor:
    """Each row divided by its Euclidean length, which is clamped at 1e-12 as `distance` is: (B, D)."""
    return features / (features * features).sum(dim=1, keepdim=True).clamp(min=LEAST_SQUARED_LENGTH).sqrt()


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance of rows, D² clamped at 1e-12 before the root so that its gradient is finite."""
    return (a - b).square().sum(dim=-1).clamp(min=LEAST_SQUARE).sqrt()


def center_hinge(
    center: Tensor, other_original: Tensor, own_original: Tensor, margin: float, detach_negative: bool = False
) -> Tensor:
    """[α + D(center, other modality's original) - D(center, own original)]₊ of each identity, (I,)."""
    negative = distance(center, own_original)
    return F.relu(
        margin + distance(center, other_original) - (negative.detach() if detach_negative else negative)
    )


def cqc_half(
    c_v: Tensor, c_n: Tensor, c_v_new: Tensor, c_n_new: Tensor, margin: float, detach_negative: bool = False
) -> Tensor:
    """L_MRM (eq. 8, restituted centers) or L_MCM (eq. 9, compensated centers) of each identity, (I,)."""
    return center_hinge(c_v_new, c_n, c_v, margin, detach_negative) + center_hinge(
        c_n_new, c_v, c_n, margin, detach_negative
    )


def cqc_loss(
    features: Sequence[Tensor],
    labels: Tensor,
    infrared_labels: Tensor,
    *,
    margin: float = 0.2,
    detach_negative: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """L_CQC (eq. 10) of each identity, (I,), and the identities, (I,).

    ``features`` are the six sets v, v+, v-, n-, n+, n, each (B, D) with the labels of its modality. With
    ``normalize`` they are replaced by their `unit_rows`.
    """
    features = [unit_rows(f) for f in features] if normalize else features
    identities = shared_identities(labels, infrared_labels)
    set_labels = [labels] * 3 + [infrared_labels] * 3
    six = [centers(f, of, identities) for f, of in zip(features, set_labels, strict=True)]
    return cqc_of_six_centers(six, margin, detach_negative), identities


def cqc_of_six_centers(six: Sequence[Tensor], margin: float, detach_negative: bool = False) -> Tensor:
    """L_CQC (eq. 10) of each identity, (I,), from the centers of the six sets in the paper's order."""
    c_v, c_v_restituted, c_v_compensated, c_n_compensated, c_n_restituted, c_n = six
    made = (c_v_restituted, c_n_restituted, c_v_compensated, c_n_compensated)
    return cqc_of_centers(c_v, c_n, made, margin, detach_negative)


def cqc_of_centers(
    c_v: Tensor,
    c_n: Tensor,
    made: tuple[Tensor, Tensor, Tensor, Tensor],
    margin: float,
    detach_negative: bool = False,
) -> Tensor:
    """L_CQC = L_MRM + L_MCM (eq. 10) of each identity, (I,).

    ``made`` are the centers of v+, n+, v- and n-.
    """
    c_v_restituted, c_n_restituted, c_v_compensated, c_n_compensated = made
    restitution_loss = cqc_half(c_v, c_n, c_v_restituted, c_n_restituted, margin, detach_negative)
    compensation_loss = cqc_half(c_v, c_n, c_v_compensated, c_n_compensated, margin, detach_negative)
    return restitution_loss + compensation_loss


def cqc_loss_by_sample(
    features: Sequence[Tensor],
    labels: Tensor,
    infrared_labels: Tensor,
    *,
    margin: float = 0.2,
    detach_negative: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """`cqc_loss` with shapes that depend on no value, for tracing, transforms and tensors without data.

    Returns:
        A loss for each visible sample, (B_v,), and whether it counts, (B_v,). The loss of an identity stands
        at its first visible sample; the other samples have the loss 0.
    """
    features = [unit_rows(f) for f in features] if normalize else features
    same, across = labels[:, None] == labels, infrared_labels[:, None] == labels
    place = torch.arange(labels.shape[0], device=labels.device)
    first = same.long().argmax(dim=1)  # argmax gives the first of equal values
    counts = (first == place) & across.any(dim=0)
    # Infrared samples whose identity no visible sample has are gathered in one more place, behind the others.
    infrared_first = torch.where(across.any(dim=1), across.long().argmax(dim=1), labels.shape[0])

    def centers(set_features: Tensor, at: Tensor) -> Tensor:
        zeros = set_features.new_zeros(labels.shape[0] + 1, set_features.shape[1])
        ones = torch.ones_like(at, dtype=set_features.dtype)
        members = ones.new_zeros(labels.shape[0] + 1).index_add(0, at, ones)
        return (zeros.index_add(0, at, set_features) / members.clamp(min=1)[:, None])[:-1]

    places = [first] * 3 + [infrared_first] * 3
    six = [centers(f, at) for f, at in zip(features, places, strict=True)]
    losses = cqc_of_six_centers(six, margin, detach_negative)
    return torch.where(counts, losses, torch.zeros_like(losses)), counts
