"""Test features, retrieval scores by each data set's protocol, re-ranking, and results on disk."""

from mrcn_fast.reid.evaluation.scores import score

__all__ = ["score"]
