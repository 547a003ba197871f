"""The field's scores of features of any framework, from two files of features."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import torch
from pydantic import SkipValidation
from torch import Tensor

from mrcn_fast.memory import enough_memory
from mrcn_fast.reid.evaluation.scores import PROTOCOLS, Scores, score
from mrcn_fast.reid.kinds import OneOf
from mrcn_fast.reid.search.features import FeatureError, Features
from mrcn_fast.reid.search.nearest import check_sizes, unit
from mrcn_fast.reid.settings import check_arguments

Protocol = Annotated[str, OneOf(PROTOCOLS)]
Metric = Literal["cosine", "euclidean"]
_RANKS: Final = (1, 10, 20)


@check_arguments
def score_features(
    query: SkipValidation[Features],
    gallery: SkipValidation[Features],
    protocol: Protocol,
    metric: Metric = "cosine",
) -> Scores:
    """Score the retrieval of one trial from features with identities and, for "sysu" and "llcm", cameras.

    Args:
        query, gallery: features of one size
        protocol: "sysu", "regdb" or "llcm", as `evaluation.score` takes it
        metric: "cosine", the angle of two features, or "euclidean", the distance of the features as they are

    Raises:
        FeatureError: for missing identities or cameras, different sizes and, by the cosine, for features that
            are zero or not finite
        ValueError: for an unknown protocol or metric, and where no query has a match
        MemoryShortageError: where the distances don't fit into memory
    """
    check_sizes(query, gallery)
    identities = [_needed(side, "identities", protocol) for side in (query, gallery)]
    cameras: list[Tensor | None] = [None, None]
    if protocol != "regdb":
        cameras = [_needed(side, "cameras", protocol) for side in (query, gallery)]
    with enough_memory("the distances of all pairs", "Score fewer queries at a time"):
        return score(
            _distance(query, gallery, metric),
            *identities,
            query_cameras=cameras[0],
            gallery_cameras=cameras[1],
            protocol=protocol,
            max_rank=max(_RANKS),
        )


def as_values(scores: Scores) -> dict[str, Any]:
    """Put scores into plain values, as shares of 1."""
    ranks = {f"rank{rank}": float(scores.cmc[rank - 1]) for rank in _RANKS}
    return ranks | {"mAP": scores.mAP, "mINP": scores.mINP, "valid_queries": scores.valid_queries}


def _needed(features: Features, name: str, protocol: str) -> Tensor:
    found: Tensor | None = getattr(features, name)
    if found is None:
        raise FeatureError(
            f"{features.origin}: expected the key {name}, an integer for each feature, which the protocol "
            f"{protocol} needs; found none. Add it to the file"
        )
    return found


@torch.inference_mode()
def _distance(query: Features, gallery: Features, metric: Metric) -> Tensor:
    if metric == "cosine":
        return -(unit(query, 0, query.rows.count) @ unit(gallery, 0, gallery.rows.count).T)
    # In float32 the products that torch makes of many rows lose the distances of long features.
    sought, searched = (side.rows.read(0, side.rows.count).double() for side in (query, gallery))
    return torch.cdist(sought, searched)
