"""The paper's total loss (eq. 11) and, for the network "snr", SNR's dual causality loss.

The total is the label-smoothed cross entropy + lambda1 * triplet loss + lambda2 * CQC loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast import CQCLoss, SNRFeatures
from mrcn_fast.reid.kinds import BackendName, Share, Weight
from mrcn_fast.reid.models.network import TrainingOutput
from mrcn_fast.reid.settings import SettingError, check_arguments, check_fields

_NO_LABEL: Final = torch.iinfo(torch.int64).min


class LossParts(NamedTuple):
    """The total loss and its unweighted terms; all are scalars in float32.

    A term is 0 where its weight is 0. `cqc` is also 0 for networks without a block, and `causality` for all
    networks but SNR's.

    Example:
        >>> identity, none = torch.tensor(2.0), torch.tensor(0.0)
        >>> LossParts(identity, identity, none, none, none).total
        tensor(2.)
    """

    total: Tensor
    identity: Tensor
    triplet: Tensor
    cqc: Tensor
    causality: Tensor


class BatchHardTriplet(nn.Module):
    """The batch-hard triplet loss of Hermans, Beyer and Leibe (2017).

    The loss is the mean over all anchors of max(0, margin + d_p - d_n), where d_p is the Euclidean distance
    to the anchor's furthest positive and d_n the distance to its nearest negative. With `soft_margin` it is
    the mean of log(1 + exp(d_p - d_n)), without a margin. The mean leaves out anchors that have no positive
    or no negative. The host never waits for the device.

    Shape:
        features: (M, D), not normalized
        labels: (M,)
        result: a scalar in float32

    Raises:
        ValueError: where features and labels don't fit together

    Example:
        >>> BatchHardTriplet()(torch.tensor([[0.0], [1.0], [1.2]]), torch.tensor([0, 0, 1]))
        tensor(0.6000)
    """

    @check_arguments
    def __init__(self, margin: Weight = 0.3, soft_margin: bool = False) -> None:
        super().__init__()
        self.margin = margin
        self.soft_margin = soft_margin

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        _check_rows("features", features, labels)
        same = labels[:, None] == labels
        others = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            distances = torch.cdist(features, features)
            furthest = distances.masked_fill(~others, -torch.inf).amax(dim=1)
            nearest = distances.masked_fill(same, torch.inf).amin(dim=1)
            # An anchor without a positive or a negative has minus infinity here, and so adds 0.
            apart = furthest - nearest
            each = F.softplus(apart) if self.soft_margin else F.relu(self.margin + apart)
            return each.sum() / apart.isfinite().sum().clamp(min=1)

    def extra_repr(self) -> str:
        return "soft_margin=True" if self.soft_margin else f"margin={self.margin}"


# Pooled features shorter than this have no direction of their own: mean(F̃) is exactly β, which starts at 0,
# so that without this bound the loss would compare rounding errors.
SHORTEST = 1e-2


def dual_causality(styles: SNRFeatures, labels: Tensor) -> Tensor:
    """SNR's dual causality loss at one block (Jin et al. 2020).

    With d(x, y) = 0.5 - cos(x, y) / 2, anchor a, positive p and negative n, the loss is L+ + L-:

        L+ = Softplus(d(F̃+_a, F̃+_p) - d(F̃_a, F̃_p)) + Softplus(d(F̃_a, F̃_n) - d(F̃+_a, F̃+_n))
        L- = Softplus(d(F̃_a, F̃_p) - d(F̃-_a, F̃-_p)) + Softplus(d(F̃-_a, F̃-_n) - d(F̃_a, F̃_n))

    so that restitution separates identities better than normalization alone does, and contamination
    separates them worse. Each Softplus depends on one pair. Its mean over all positives or negatives of an
    anchor, and over all anchors, is therefore the expected value for triplets drawn at random. An anchor
    without a positive (or negative) adds nothing to the terms of positives (or negatives).

    The mean of a normalized plane is β for every image, so that d(F̃, F̃) is 0 and F̃ is a fixed reference
    between the two. Features shorter than 0.01 are divided by 0.01 instead of their length.

    Args:
        styles: pooled features (M, C) of both modalities: F̃+ restituted, F̃- contaminated, F̃ normalized
        labels: (M,), the identity of each row

    Returns:
        a scalar in float32

    Raises:
        ValueError: where features and labels don't fit together
    """
    for features in styles:
        _check_rows("styles", features, labels)
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    restituted, contaminated, normalized = (_cosine_distances(features) for features in styles)
    better = restituted - normalized
    worse = normalized - contaminated
    nearer = F.softplus(better) + F.softplus(worse)
    further = F.softplus(-better) + F.softplus(-worse)
    return (_mean_where(positive, nearer) + _mean_where(~same, further)).mean()


def _cosine_distances(features: Tensor) -> Tensor:
    """The distance d of every two rows, (M, M).

    It is a quarter of the squared distance of unit vectors, which is exactly 0 for equal rows.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=1, eps=SHORTEST)
        squares = unit.square().sum(dim=1)
        return (squares[:, None] + squares) / 4 - unit @ unit.T / 2


def _mean_where(wanted: Tensor, values: Tensor) -> Tensor:
    """The mean of the wanted values of each row, (M, M) -> (M,); it is 0 for a row without any."""
    return (values * wanted).sum(dim=1) / wanted.sum(dim=1).clamp(min=1)


@dataclass(kw_only=True)
class LossOptions:
    """The values of the total loss. Raises SettingError (a ValueError) for a value that is unfit.

    `TrainConfig` has the same fields, and its module says what "paper", "field" and "ours" mean.
    """

    label_smoothing: Share = 0.1
    """Epsilon of the label-smoothed cross entropy (paper: smoothed; .1 is its source's)."""
    triplet_weight: Weight = 1.0
    """lambda1 (paper)."""
    triplet_margin: Weight = 0.3
    """Margin of the batch-hard triplet loss (field; the paper is silent)."""
    soft_margin: bool = False
    """Soft margin in place of the triplet's hinge (ours, an option)."""
    cqc_weight: Weight = 1.2
    """lambda2 (paper, Figure 4)."""
    cqc_margin: Weight = 0.2
    """alpha, the margin of the CQC loss (paper)."""
    cqc_features: Literal["pooled", "unit"] = "unit"
    """What the CQC loss compares: pooled features, or unit ones, divided by their length (paper: silent)."""
    cqc_reduction: Literal["sum", "mean"] = "mean"
    """CQC over the identities of a batch (paper: sum; the authors' later code: mean)."""
    detach_negative: bool = False
    """Stop the gradient of CQC's second distances (the authors' later code; paper: no)."""
    causality_weight: Weight = 0.1
    """Weight of SNR's dual causality loss at each block, for model snr (Jin et al. 2020, first stages)."""
    backend: BackendName | None = None
    """Backend of the CQC loss, as `mrcn_fast.CQCLoss` takes it."""

    def __post_init__(self) -> None:
        check_fields(self, SettingError)


class ReIDLoss(nn.Module):
    """Eq. 11 over the sets and parts of a training step, and SNR's dual causality loss.

    Identity, triplet and CQC loss are means over the parts, and `causality` is the sum over SNR's blocks. A
    term whose weight is 0 is not computed.

    The number of sets decides about the CQC loss. Six sets have eq. 10. Four sets are v, x_v, x_n, n with
    either restituted or compensated features x; they have eq. 8 or 9 alone, which are one formula. Two sets
    have no CQC loss.

    Args:
        options: the fields of `LossOptions`

    Shape:
        output: the network's TrainingOutput of a pair of batches of B images each
        labels: (B,), the class of each pair; it is the same in both modalities, as the batches are paired
        result: LossParts

    Raises:
        ValueError: where the output is not two, four or six sets of B images and, on the CPU, for labels that
            are no classes

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> output = TrainingOutput(torch.rand(1, 24, 64), torch.rand(1, 24, 2))  # six sets of four
        >>> ReIDLoss(cqc_weight=0.5)(output, labels).total.shape
        torch.Size([])
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        chosen = LossOptions(**options)
        self.triplet_weight = chosen.triplet_weight
        self.cqc_weight = chosen.cqc_weight
        self.causality_weight = chosen.causality_weight
        # By default, torch leaves out images with the label -100; here every label must be a class.
        self.identity = nn.CrossEntropyLoss(ignore_index=_NO_LABEL, label_smoothing=chosen.label_smoothing)
        self.triplet = BatchHardTriplet(chosen.triplet_margin, chosen.soft_margin)
        self.cqc = CQCLoss(
            chosen.cqc_margin,
            reduction=chosen.cqc_reduction,
            detach_negative=chosen.detach_negative,
            normalize=chosen.cqc_features == "unit",
            backend=chosen.backend,
        )

    def forward(self, output: TrainingOutput, labels: Tensor) -> LossParts:
        pooled, logits, styles = output
        parts, rows = pooled.shape[:2]
        _check_labels(labels)
        labels = labels.long()
        sets = rows // len(labels)
        if sets not in (2, 4, 6) or sets * len(labels) != rows:
            of_both = rows in (len(labels), 3 * len(labels))
            raise ValueError(
                f"got {rows} features per part for {len(labels)} labels, expected two sets, four (v, v+, n+, "
                "n or v, v-, n-, n) or six (v, v+, v-, n-, n+, n) of one feature per label"
                + "; pass one modality's labels, not those of both"
                * of_both
            )
        everywhere = labels.repeat(sets)
        identity = self._identity(logits.float().flatten(0, 1), everywhere.repeat(parts))
        # The triplet loss mines in all sets together, as the first author's later code (DEEN) does: only a
        # pool of both modalities has the cross-modality positives and negatives that retrieval meets.
        triplet = cqc = causality = identity.new_zeros(())
        if self.triplet_weight:
            triplet = torch.stack([self.triplet(part, everywhere) for part in pooled]).mean()
        if sets > 2 and self.cqc_weight:
            cqc = torch.stack([self._cqc(part, labels, sets) for part in pooled]).mean()
        if styles and self.causality_weight:
            causality = torch.stack([dual_causality(style, labels.repeat(2)) for style in styles]).sum()
        total = (
            identity
            + self.triplet_weight * triplet
            + self.cqc_weight * cqc
            + self.causality_weight * causality
        )
        return LossParts(total, identity, triplet, cqc, causality)

    def _identity(self, logits: Tensor, labels: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return cast(Tensor, self.identity(logits, labels))
        try:
            return cast(Tensor, self.identity(logits, labels))
        except IndexError:  # only on the CPU: a GPU checks its labels after the host has gone on
            least, most = (int(label) for label in labels.aminmax())
            raise ValueError(
                f"got labels from {least} to {most}, expected classes from 0 to {logits.shape[1] - 1}"
            ) from None

    def _cqc(self, pooled: Tensor, labels: Tensor, sets: int) -> Tensor:
        if sets == 6:
            return cast(Tensor, self.cqc(pooled, labels))
        v, of_v, of_n, n = pooled.chunk(4)
        # Eq. 10 with the same features as restituted and compensated ones is twice eq. 8 (or 9).
        return cast(Tensor, self.cqc((v, of_v, of_v, of_n, of_n, n), labels)) / 2


def _check_rows(name: str, features: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or labels.dim() != 1 or len(features) != len(labels):
        raise ValueError(
            f"got {name} {tuple(features.shape)} and labels {tuple(labels.shape)}, expected (M, D) and (M,): "
            "one label per row"
        )


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 1 or not len(labels) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"got labels of {labels.dtype} {tuple(labels.shape)}, expected integers (B,), each pair's class"
        )
