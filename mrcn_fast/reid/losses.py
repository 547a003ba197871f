"""The paper's total loss (eq. 11): label-smoothed cross entropy + lambda1 * triplet + lambda2 * CQC."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn

from mrcn_fast import CQCLoss
from mrcn_fast.reid.model import TrainingOutput


class LossParts(NamedTuple):
    """The total and what it is made of, unweighted; scalars, float32. `cqc` is 0 for the baseline."""

    total: Tensor
    identity: Tensor
    triplet: Tensor
    cqc: Tensor


class BatchHardTriplet(nn.Module):
    """Batch-hard triplet loss: each anchor with its furthest positive and nearest negative, the mean of all.

    (M, D) features, not normalised, and (M,) labels -> scalar, float32; Euclidean distance. With
    `soft_margin` the hinge max(0, margin + d_p - d_n) gives way to log(1 + exp(d_p - d_n)) and the margin is
    not used. Source: Hermans, Beyer and Leibe 2017.
    """

    def __init__(self, margin: float = 0.3, soft_margin: bool = False) -> None:
        super().__init__()
        distance = LpDistance(normalize_embeddings=False)
        self.miner = BatchHardMiner(distance=distance)
        # The mean over all anchors: the library's own default leaves the satisfied ones out of the
        # denominator.
        self.loss = TripletMarginLoss(
            margin=0.0 if soft_margin else margin,
            smooth_loss=soft_margin,
            distance=distance,
            reducer=MeanReducer(),
        )

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            return cast(Tensor, self.loss(features, labels, self.miner(features, labels)))


class ReIDLoss(nn.Module):
    """Eq. 11 over the sets of a training step.

    `loss(output, labels)` takes the model's TrainingOutput and the (B,) class indices of a batch (the same
    for both modalities, as the batches are paired) and returns LossParts. Six sets get all three terms; the
    baseline's two have no CQC. Raises ValueError when the output is not two or six sets of B.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.1,
        triplet_weight: float = 1.0,
        triplet_margin: float = 0.3,
        soft_margin: bool = False,
        cqc_weight: float = 1.2,
        cqc_margin: float = 0.2,
        cqc_reduction: str = "sum",
        detach_negative: bool = False,
    ) -> None:
        super().__init__()
        self.triplet_weight = triplet_weight
        self.cqc_weight = cqc_weight
        self.identity = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.triplet = BatchHardTriplet(triplet_margin, soft_margin)
        self.cqc = CQCLoss(cqc_margin, reduction=cqc_reduction, detach_negative=detach_negative)

    def forward(self, output: TrainingOutput, labels: Tensor) -> LossParts:
        pooled, logits = output
        sets = len(pooled) // len(labels)
        if sets not in (2, 6) or sets * len(labels) != len(pooled):
            raise ValueError(
                f"got {len(pooled)} features for {len(labels)} labels, expected two sets (v, n) or six "
                "(v, v+, v-, n-, n+, n) of one feature a label"
            )
        everywhere = labels.repeat(sets)
        identity = self.identity(logits.float(), everywhere)
        # All sets as one pool, as the first author's later code (DEEN) does, and not a loss a set: only a
        # pool that holds both modalities mines the cross-modality positives and negatives that retrieval will
        # meet.
        triplet = self.triplet(pooled, everywhere)
        cqc = self.cqc(pooled, labels) if sets == 6 else pooled.new_zeros((), dtype=torch.float32)
        total = identity + self.triplet_weight * triplet + self.cqc_weight * cqc
        return LossParts(total, identity, triplet, cqc)
