"""Distances of visible and infrared features within and between people: the paper's Figure 5 and its δ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mrcn_fast.reid.data.types import Modality, Sample

# Vectors of length 1 are at most 2 apart. Distances are counted in equal bins from 0 to that.
FARTHEST, BINS = 2.0, 4000
_PAIRS_AT_ONCE = 1 << 21


class Distances(NamedTuple):
    """The distances of visible-infrared pairs of images: of the same person (intra) and of two (inter)."""

    intra: NDArray[np.int64]  # counts in equal bins from 0 to 2
    inter: NDArray[np.int64]
    intra_mean: float  # over all pairs; NaN without a pair
    inter_mean: float

    @property
    def delta(self) -> float:
        """The paper's δ: the mean distance of two people, minus that of two images of one person."""
        return self.inter_mean - self.intra_mean


def distances(visible: Tensor, visible_ids: Tensor, infrared: Tensor, infrared_ids: Tensor) -> Distances:
    """Count the Euclidean distances of all visible-infrared pairs of features, scaled to length 1.

    Working memory is that of 2 million pairs for any V and N. Raises ValueError for features that are not
    finite.

    Shape:
        visible, infrared: (V, D) and (N, D)
        visible_ids, infrared_ids: (V,) and (N,), integers
    """
    visible, infrared = unit_features(visible, "visible"), unit_features(infrared, "infrared")
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    sums = torch.zeros(2, dtype=torch.float64)
    for rows in torch.arange(len(visible)).split(max(1, _PAIRS_AT_ONCE // max(1, len(infrared)))):
        apart = (2 - 2 * visible[rows] @ infrared.T).clamp_(0, FARTHEST**2).sqrt_()
        same = visible_ids[rows, None] == infrared_ids
        places = (apart * (BINS / FARTHEST)).long().clamp_(max=BINS - 1)
        for kind, chosen in enumerate((same, ~same)):
            counts[kind] += torch.bincount(places[chosen], minlength=BINS)
            sums[kind] += apart[chosen].double().sum()
    means = (sums / counts.sum(dim=1)).tolist()
    return Distances(counts[0].numpy(), counts[1].numpy(), *means)


def distances_of(
    images: Mapping[Modality, Sequence[Sample]], features: Mapping[Modality, Tensor]
) -> Distances:
    """Count the distances of all visible-infrared pairs of images, whose features are in their order."""
    people = {side: torch.tensor([sample.identity for sample in images[side]]) for side in images}
    return distances(features["visible"], people["visible"], features["infrared"], people["infrared"])


def unit_features(features: Tensor, name: str) -> Tensor:
    """Scale features to length 1, in float32. Raises ValueError for features that aren't finite."""
    if features.dim() != 2 or not features.isfinite().all():
        raise ValueError(
            f"{name} must be finite features (images, size); got {tuple(features.shape)}"
            + " with NaN or infinity" * (features.dim() == 2)
        )
    # Without this scaling, the squares may overflow or vanish.
    largest = features.double().abs().amax(dim=1, keepdim=True)
    return F.normalize(features / largest.masked_fill_(largest == 0, 1), dim=1).float()
