"""Evaluation: from a checkpoint to scores.

scoring.py scores a checkpoint: `mrcn-fast test`. trained.py opens the checkpoint, and extraction.py extracts
its test features. protocol.py has the searches of a data set's protocol, and pairings.py the ways to compare
two test features. scores.py computes CMC, mAP and mINP, reranking.py the re-ranked distances, distances.py
those within and between people (Figure 5), and results.py names, finds and describes results on disk. `score`
is the function for features of your own.
"""

from mrcn_fast.reid.evaluation.scores import PROTOCOLS, Scores, average, score, skipped_images

__all__ = ["PROTOCOLS", "Scores", "average", "score", "skipped_images"]
