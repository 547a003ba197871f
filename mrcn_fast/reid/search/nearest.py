"""The exact search for the nearest features, in chunks that fit into a given memory."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from mrcn_fast.reid.search.features import FeatureError, Features

# Bytes of working memory per pair of a query and a gallery image: the score, its key, and what makes the key.
_PAIR_BYTES: Final = 40
# Larger chunks are not faster.
_MOST_PAIRS: Final = 1 << 22
_MOST_ROWS: Final = 1 << 14
# A key's lower half has the row.
_LAST_ROW: Final = 0xFFFFFFFF
_NO_SIGN: Final = 0x7FFFFFFF


class Hits(NamedTuple):
    """The nearest gallery images of each query, the nearest first."""

    scores: Tensor  # (queries, top) float32: cosine similarities, from -1 to 1
    rows: Tensor  # (queries, top) int64: the images' rows in the gallery


@torch.inference_mode()
def nearest(query: Features, gallery: Features, top: int, *, memory: int) -> Hits:
    """Find the `top` gallery images of each query by cosine similarity.

    All pairs are compared. Images of equal similarity rank in the order of the gallery. The gallery is read
    once, in chunks.

    Args:
        query, gallery: features of one size, with fewer than 2**32 in the gallery
        top: the number of images per query; a smaller gallery gives all its images
        memory: the most bytes to work in, results included, beside what the process has already

    Raises:
        FeatureError: for features of different sizes, and for one that is zero or not finite
        ValueError: where `memory` doesn't hold the queries and a few rows of the gallery

    Example:
        >>> from mrcn_fast.reid.search.features import HeldRows
        >>> one = Features(HeldRows(torch.tensor([[1.0, 0.0]])), "one")
        >>> both = Features(HeldRows(torch.tensor([[0.0, 2.0], [3.0, 0.0]])), "both")
        >>> nearest(one, both, 2, memory=2**20).rows
        tensor([[1, 0]])
    """
    check_sizes(query, gallery)
    top = min(top, gallery.rows.count)
    rows, queries = _chunks(query, gallery, top, memory)
    sought = unit(query, 0, query.rows.count)
    best = torch.full((len(sought), top), torch.iinfo(torch.int64).min)
    for first in range(0, gallery.rows.count, rows):
        images = unit(gallery, first, min(first + rows, gallery.rows.count))
        for start in range(0, len(sought), queries):
            part = slice(start, start + queries)
            keys = _keys(sought[part] @ images.T, first)
            found = keys.topk(min(top, len(images)), dim=1).values
            best[part] = torch.cat((best[part], found), dim=1).topk(top, dim=1).values
    return _hits(best)


def check_sizes(query: Features, gallery: Features) -> None:
    """Raise FeatureError for features of different sizes, which are of different networks."""
    if query.rows.size != gallery.rows.size:
        raise FeatureError(
            f"got queries with {query.rows.size} numbers ({query.origin}) and a gallery with "
            f"{gallery.rows.size} ({gallery.origin}), expected equal sizes: give features of one network"
        )


def unit(features: Features, start: int, stop: int) -> Tensor:
    """Read features and divide each by its length: float32 (stop - start, size)."""
    rows = features.rows.read(start, stop)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    usable = (lengths.isfinite() & (lengths > 0)).flatten()
    if not usable.all():
        row = start + int((~usable).nonzero()[0])
        raise FeatureError(
            f"{features.origin}: expected features that are finite and not zero; found another one for "
            f"{features.name(row)} (row {row}). Extract it again, or leave it out"
        )
    return rows.div_(lengths)


def _chunks(query: Features, gallery: Features, top: int, memory: int) -> tuple[int, int]:
    """The rows of the gallery and the queries that are compared at a time."""
    row = gallery.rows.size * 4
    # The queries, as read and as compared, and the keys of their hits with those that decode them.
    held = query.rows.count * (2 * row + 40 * top)
    # Rows may be stored in another type than the one they are compared in, of at most twice its bytes.
    left, least = memory - held, 3 * row + _PAIR_BYTES + 16 * top
    if left < least:
        raise ValueError(
            f"got {in_mib(memory)} of memory, expected at least {in_mib(held + least)} for "
            f"{query.rows.count} queries of {gallery.rows.size} numbers: give more --memory, or fewer "
            "queries at a time"
        )
    rows = max(1, min(gallery.rows.count, left // 2 // (3 * row), left // 2 // _PAIR_BYTES, _MOST_ROWS))
    queries = max(1, min(left // 2 // (_PAIR_BYTES * rows + 16 * top), _MOST_PAIRS // rows))
    return rows, queries


def in_mib(memory: int) -> str:
    """Bytes as text in MiB, rounded up."""
    return f"{math.ceil(10 * memory / 2**20) / 10} MiB"


def _keys(scores: Tensor, first: int) -> Tensor:
    """Make int64 keys that order scores, and equal scores by falling rows; the first row is `first`.

    The upper half has the score's bits, ordered as an integer; the lower half counts the rows down.
    """
    bits = scores.add_(0.0).view(torch.int32)  # -0 becomes 0
    ordered = (bits ^ ((bits >> 31) & _NO_SIGN)).long()
    rows = torch.arange(first, first + scores.shape[1])
    return ordered.bitwise_left_shift_(32).add_(_LAST_ROW - rows)


def _hits(keys: Tensor) -> Hits:
    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & _NO_SIGN)).view(torch.float32)
    return Hits(scores, _LAST_ROW - (keys & _LAST_ROW))
