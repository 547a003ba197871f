"""The paper's total loss (eq. 11): label-smoothed cross entropy + lambda1 * triplet + lambda2 * CQC.

And SNR's dual causality loss, for the model it belongs to.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast import CQCLoss, SNRFeatures
from mrcn_fast.reid.kinds import BackendName, Share, Weight
from mrcn_fast.reid.models.network import TrainingOutput
from mrcn_fast.reid.settings import check_arguments

_NO_LABEL: Final = torch.iinfo(torch.int64).min


class LossParts(NamedTuple):
    """The total and what it is made of, unweighted; scalars, float32.

    `cqc` is 0 for models without it and where its weight is 0; so is `causality`, which only SNR has.
    """

    total: Tensor
    identity: Tensor
    triplet: Tensor
    cqc: Tensor
    causality: Tensor


class BatchHardTriplet(nn.Module):
    """Batch-hard triplet loss: each anchor with its furthest positive and nearest negative, the mean of all.

    (M, D) features, not normalised, and (M,) labels -> scalar, float32; Euclidean distance. With
    `soft_margin` the hinge max(0, margin + d_p - d_n) gives way to log(1 + exp(d_p - d_n)) and the margin is
    not used. An anchor without another of its label, or without one of another label, is not in the mean.
    The host never waits for the device. Raises ValueError where features and labels don't fit together.
    Source: Hermans, Beyer and Leibe 2017.
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
            # Minus infinity where one of the two is missing: such an anchor adds 0.
            apart = furthest - nearest
            each = F.softplus(apart) if self.soft_margin else F.relu(self.margin + apart)
            return each.sum() / apart.isfinite().sum().clamp(min=1)

    def extra_repr(self) -> str:
        return "soft_margin=True" if self.soft_margin else f"margin={self.margin}"


# Pooled features shorter than this have no direction: mean(F̃) is exactly β, which starts at 0 and would
# leave rounding errors to be compared.
SHORTEST = 1e-2


def dual_causality(styles: SNRFeatures, labels: Tensor) -> Tensor:
    """SNR's dual causality loss at one plug (Jin et al. 2020): a scalar, float32.

    `styles` has the pooled features (M, C) of both modalities, F̃+ restituted, F̃- contaminated, F̃ normalized;
    `labels` (M,) are their identities. With d(x, y) = 0.5 - cos(x, y) / 2, anchor a, positive p, negative n:

        L+ = Softplus(d(F̃+_a, F̃+_p) - d(F̃_a, F̃_p)) + Softplus(d(F̃_a, F̃_n) - d(F̃+_a, F̃+_n))
        L- = Softplus(d(F̃_a, F̃_p) - d(F̃-_a, F̃-_p)) + Softplus(d(F̃-_a, F̃-_n) - d(F̃_a, F̃_n))

    so that restitution tells identities better apart than normalization alone, and contamination worse. Each
    Softplus has one pair, so its mean over every positive or negative of an anchor, and over the anchors, is
    what triplets drawn at random give on average, without the draw. An anchor without a positive or negative
    adds nothing there.

    The mean of a normalized plane is β whatever the image, so d(F̃, F̃) is 0 and F̃ a fixed mark between the
    two. Features shorter than 0.01 are divided by 0.01 and not by their length.

    Raises ValueError where features and labels don't fit together.
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
    """d of every two rows, (M, M), as a quarter of the squared distance of unit vectors: 0 for equal rows."""
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=1, eps=SHORTEST)
        squares = unit.square().sum(dim=1)
        return (squares[:, None] + squares) / 4 - unit @ unit.T / 2


def _mean_where(wanted: Tensor, values: Tensor) -> Tensor:
    """The mean of each row's wanted values, 0 for a row without any: (M, M) -> (M,)."""
    return (values * wanted).sum(dim=1) / wanted.sum(dim=1).clamp(min=1)


class ReIDLoss(nn.Module):
    """Eq. 11 over the sets and parts of a training step, and SNR's dual causality loss.

    `loss(output, labels)` takes the model's TrainingOutput and the (B,) class indices of a batch (the same
    for both modalities, as the batches are paired) and returns LossParts. Identity, triplet and CQC are the
    means over the parts. The number of sets says which CQC there is: six have eq. 10; four are v, x_v, x_n, n
    with either restituted or compensated features between the originals, and have eq. 8 or 9 alone, which are
    one formula; two have none. `causality` is the sum over SNR's plugs. A term whose weight is 0 is
    not computed.

    `cqc_features` are "pooled", as the model makes them, or "unit", divided by their length; `cqc_reduction`
    is "sum" over the batch's identities or "mean"; `backend` serves the CQC loss as `mrcn_fast.CQCLoss` takes
    it. Raises ValueError for other values, when the output is
    not two, four or six sets of B, and, on the CPU, for labels that are no classes.
    """

    @check_arguments
    def __init__(
        self,
        *,
        label_smoothing: Share = 0.1,
        triplet_weight: Weight = 1.0,
        triplet_margin: Weight = 0.3,
        soft_margin: bool = False,
        cqc_weight: Weight = 1.2,
        cqc_margin: Weight = 0.2,
        cqc_features: Literal["pooled", "unit"] = "pooled",
        cqc_reduction: Literal["sum", "mean"] = "sum",
        detach_negative: bool = False,
        causality_weight: Weight = 0.1,
        backend: BackendName | None = None,
    ) -> None:
        super().__init__()
        self.triplet_weight = triplet_weight
        self.cqc_weight = cqc_weight
        self.causality_weight = causality_weight
        # No label means that its image is left out.
        self.identity = nn.CrossEntropyLoss(ignore_index=_NO_LABEL, label_smoothing=label_smoothing)
        self.triplet = BatchHardTriplet(triplet_margin, soft_margin)
        self.cqc = CQCLoss(
            cqc_margin,
            reduction=cqc_reduction,
            detach_negative=detach_negative,
            normalize=cqc_features == "unit",
            backend=backend,
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
                f"got {rows} features a part for {len(labels)} labels, expected two sets, four (v, v+, n+, n "
                "or v, v-, n-, n) or six (v, v+, v-, n-, n+, n) of one feature a label"
                + "; pass one modality's labels, not those of both"
                * of_both
            )
        everywhere = labels.repeat(sets)
        identity = self._identity(logits.float().flatten(0, 1), everywhere.repeat(parts))
        # All sets as one pool, as the first author's later code (DEEN) does, and not a loss a set: only a
        # pool that holds both modalities mines the cross-modality positives and negatives that retrieval will
        # meet.
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
        except IndexError:  # on the CPU; a GPU would have to be waited for
            least, most = (int(label) for label in labels.aminmax())
            raise ValueError(
                f"got labels from {least} to {most}, expected classes from 0 to {logits.shape[1] - 1}"
            ) from None

    def _cqc(self, pooled: Tensor, labels: Tensor, sets: int) -> Tensor:
        if sets == 6:
            return cast(Tensor, self.cqc(pooled, labels))
        v, of_v, of_n, n = pooled.chunk(4)
        # Eq. 10 with one kind of features in both places is eq. 8 (or 9) twice.
        return cast(Tensor, self.cqc((v, of_v, of_v, of_n, of_n, n), labels)) / 2


def _check_rows(name: str, features: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or labels.dim() != 1 or len(features) != len(labels):
        raise ValueError(
            f"got {name} {tuple(features.shape)} and labels {tuple(labels.shape)}, expected (M, D) and (M,): "
            "a label a row"
        )


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 1 or not len(labels) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"got labels of {labels.dtype} {tuple(labels.shape)}, expected integers (B,), each pair's class"
        )
