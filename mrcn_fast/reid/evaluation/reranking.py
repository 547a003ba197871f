"""Re-ranking by k-reciprocal neighbours, which are images that have each other among their nearest.

Z. Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017. An image p is
encoded by its k-reciprocal neighbours, and two images are near where their encodings overlap:

    R(p, k)   = {g : g among p's k nearest images, and p among g's}
    R*(p, k1) = R(p, k1), and R(q, k1/2) of each q in it that shares more than two thirds of R(q, k1/2)
    V(p, g)   = exp(-d(p, g)) for g in R*(p, k1), else 0; each row divided by its sum
    V(p)     <- the mean of V over p's k2 nearest images (local query expansion)
    Jaccard   = 1 - sum_g min(V(p, g), V(q, g)) / sum_g max(V(p, g), V(q, g))
    result    = (1 - weight) * Jaccard + weight * d

An image is its own nearest neighbour, and counts in addition to the k1 others. Where the authors' code, from
which the field's re-ranked scores come, differs from the paper's text, this module follows the code: the rows
of V have the sum 1, and exactly two thirds are not enough.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from torch import Tensor

from mrcn_fast.reid.arrays import as_tensor
from mrcn_fast.reid.kinds import Count, Share
from mrcn_fast.reid.settings import check_arguments

K1, K2, WEIGHT = 20, 6, 0.3

# The number of distances or overlaps that are computed at a time, with 8 to 32 bytes of working memory each.
_CHUNK = 1 << 22


@check_arguments
def rerank(
    query_features: Tensor | ArrayLike,
    gallery_features: Tensor | ArrayLike,
    *,
    k1: Count = K1,
    k2: Count = K2,
    weight: Share = WEIGHT,
    chunk: Count = _CHUNK,
) -> Tensor:
    """Compute distances of queries to gallery images from shared neighbours: float32 (Q, G).

    query_features, gallery_features: (Q, D) and (G, D), floating point, of one device; torch's, numpy's or
    lists. d is the squared Euclidean distance, each image's to all Q + G images divided by its largest, as
    Zhong et al. have it, so that the features' scale doesn't matter. It orders test features, whose sets have
    length 1 each, as their dot product does.
    k1, k2: neighbours of the encoding and of the query expansion; weight: share of d in the result; chunk:
    distances worked on at once, which changes memory, not the result.
    Equal distances rank in the order of the images, queries before gallery.

    Memory: (Q + G)² float32 for d (186 MB for SYSU-MM01's multi-shot gallery), the features four times in
    float64, the result, and below 40 bytes for each of `chunk`. d is made on the features' device, all else
    on the CPU; the result is on the device.

    Raises ValueError for features that don't fit together or are not finite, and for k1, k2 or weight out of
    range.

    Example:
        >>> distance = rerank(torch.eye(3), torch.eye(3).flip(0), k1=2, k2=1)
        >>> distance.argmin(dim=1).tolist()
        [2, 1, 0]
    """
    query, gallery = (
        _features(features, name)
        for name, features in (("query_features", query_features), ("gallery_features", gallery_features))
    )
    _check_pair(query, gallery)
    check_neighbours(len(query), len(gallery), k1, k2)
    queries = len(query)
    distance, nearest = _compared(torch.cat((query, gallery)), k1 + 1, chunk)
    encoding = _encoding(distance, _expanded(nearest, k1))
    if k2 > 1:
        encoding = _indicator(nearest[:, :k2]) @ encoding
        encoding.data /= k2
    overlap = torch.from_numpy(_overlaps(encoding[:queries], encoding[queries:], chunk))
    jaccard = 1 - overlap / (2 - overlap)  # the rows of V have the sum 1: the larger add up to 2 - overlap
    original = distance[:queries, queries:]
    return jaccard.to(original.device).mul_(1 - weight).add_(original, alpha=weight)


def check_neighbours(queries: int, gallery: int, k1: int, k2: int) -> None:
    """Raise ValueError for k1 and k2 that this number of queries and gallery images doesn't allow."""
    images = queries + gallery
    if not 1 <= k1 < images:
        raise ValueError(
            f"k1 must be at least 1 and below the number of images, {images} ({queries} queries and "
            f"{gallery} of the gallery): an image has no more neighbours; got {k1}"
        )
    if not 1 <= k2 <= k1 + 1:
        raise ValueError(
            f"k2 must be from 1 (no query expansion) to k1 + 1 = {k1 + 1}, the neighbours known; got {k2}"
        )


def _compared(features: Tensor, count: int, chunk: int) -> tuple[Tensor, NDArray[np.int64]]:
    """d of all images from their float64 features, float32 (N, N); the `count` nearest of each, itself first.

    Far from the origin, products lose what distances are made of, so lengths are measured from an image of
    middle length; and at a scale at which no square overflows or vanishes.
    """
    features = _scaled(features)
    middle = features.square().sum(dim=1).argsort()[len(features) // 2]
    features = _scaled(features - features[middle])
    squares = features.square().sum(dim=1)
    rounding = (4 + features.shape[1] ** 0.5) * torch.finfo(torch.float64).eps
    images, found = len(features), []
    distance = features.new_empty(images, images, dtype=torch.float32)
    for rows in torch.arange(images, device=features.device).split(max(1, chunk // images)):
        apart = features[rows] @ features.T
        lengths = squares + squares[rows, None]
        apart.mul_(-2).add_(lengths)
        # What rounding leaves between equal images is no distance: they are tied.
        apart.masked_fill_(apart <= lengths.mul_(rounding), 0)
        largest = apart.amax(dim=1, keepdim=True)
        apart.div_(largest.masked_fill_(largest == 0, 1))  # 0 where all images are one
        distance[rows] = apart.float()
        found.append(_nearest(apart, rows, count))
    return distance, torch.cat(found).numpy()


def _nearest(apart: Tensor, rows: Tensor, count: int) -> Tensor:
    """Find the nearest images of those in `rows`, each itself first: (rows, count) on the CPU."""
    # A float64 that isn't negative orders as its bits do. The last of them, which are rounding, give way to
    # the column: no two keys are equal, and what is tied but for rounding is in the order of the images.
    column = (1 << (apart.shape[1] - 1).bit_length()) - 1
    keys = apart.view(torch.int64).bitwise_and(~column)
    keys.bitwise_or_(torch.arange(apart.shape[1], device=apart.device))
    keys[torch.arange(len(rows), device=rows.device), rows] = -1
    near = keys.topk(count, dim=1, largest=False).values.bitwise_and_(column)
    near[:, 0] = rows
    return near.cpu()


def _scaled(features: Tensor) -> Tensor:
    """Scale by the power of two that brings the largest value near 1, which is exact."""
    _, exponent = torch.frexp(features.abs().amax())
    # In two steps: the power itself may be beyond what a float64 holds.
    half = exponent // 2
    return torch.ldexp(torch.ldexp(features, -half), half - exponent)


def _indicator(neighbours: NDArray[np.int64]) -> sparse.csr_array:
    """Make a matrix (N, N) with a row per image, 1 at its neighbours."""
    images, count = neighbours.shape
    starts = np.arange(0, images * count + 1, count)
    ones = np.ones(images * count, dtype=np.float32)
    return sparse.csr_array((ones, neighbours.ravel(), starts), shape=(images, images))


def _expanded(nearest: NDArray[np.int64], k1: int) -> sparse.csr_array:
    """Make R*(p, k1) as a matrix (N, N), whose rows are not zero at its images."""
    wide = _reciprocal(nearest[:, : k1 + 1])
    narrow = _reciprocal(nearest[:, : round(k1 / 2) + 1])
    sizes = np.asarray(narrow.sum(axis=1)).ravel()
    shared = (wide @ narrow.T).multiply(wide).tocoo()  # |R(p, k1) and R(q, k1/2)| at each q in R(p, k1)
    enough = 3 * shared.data > 2 * sizes[shared.col]
    accepted = sparse.csr_array(
        (shared.data[enough], (shared.row[enough], shared.col[enough])), shape=wide.shape
    )
    return (wide + accepted @ narrow).tocsr()


def _reciprocal(neighbours: NDArray[np.int64]) -> sparse.csr_array:
    found = _indicator(neighbours)
    return found.multiply(found.T.tocsr()).tocsr()


def _encoding(distance: Tensor, neighbours: sparse.csr_array) -> sparse.csr_array:
    """Make V: exp(-d) where `neighbours` is not zero, with rows of sum 1."""
    counts = np.diff(neighbours.indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    places = (torch.from_numpy(index).long().to(distance.device) for index in (rows, neighbours.indices))
    values = distance[tuple(places)].neg_().exp_().cpu().numpy()
    sums = np.add.reduceat(values, neighbours.indptr[:-1])  # no row is empty: an image is its own neighbour
    return sparse.csr_array(
        (values / np.repeat(sums, counts), neighbours.indices, neighbours.indptr), shape=neighbours.shape
    )


def _overlaps(query: sparse.csr_array, gallery: sparse.csr_array, chunk: int) -> NDArray[np.float32]:
    """Sum min(V(p, g), V(q, g)) over g for each query p and gallery image q: (Q, G)."""
    queries, images, by_column = query.shape[0], gallery.shape[0], gallery.tocsc()
    found = np.zeros((queries, images), dtype=np.float32)
    # Every weight of a query meets the gallery's weights in its column: that many pairs.
    pairs = np.diff(by_column.indptr)[query.indices].astype(np.int64)
    ends = np.concatenate(([0], pairs.cumsum()))[query.indptr]
    first = 0
    while first < queries:
        last = int(np.searchsorted(ends, ends[first] + chunk, side="right")) - 1
        last = max(first + 1, min(last, first + chunk // images))
        weights = slice(query.indptr[first], query.indptr[last])
        counts = pairs[weights]
        owner = np.repeat(np.arange(len(counts)), counts)
        starts = by_column.indptr[query.indices[weights]] - (counts.cumsum() - counts)
        partner = np.arange(len(owner)) + starts[owner]
        smaller = np.minimum(query.data[weights][owner], by_column.data[partner])
        rows = np.repeat(np.arange(last - first), np.diff(query.indptr[first : last + 1]))
        places = rows[owner] * images + by_column.indices[partner]
        sums = np.bincount(places, smaller, minlength=(last - first) * images)
        found[first:last] = sums.reshape(last - first, -1)
        first = last
    return found


def _features(given: Tensor | ArrayLike, name: str) -> Tensor:
    """Convert to float64, on a device that has it."""
    features = as_tensor(given, name)
    if features.dim() != 2 or not features.numel() or not features.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point (images, size) with at least one of each; got "
            f"{features.dtype} {tuple(features.shape)}"
        )
    precise = features.to("cpu" if features.device.type == "mps" else features.device, torch.float64)
    if not precise.isfinite().all():
        row = int(torch.nonzero(~precise.isfinite())[0, 0])
        raise ValueError(f"{name} must be finite; got NaN or infinity for image {row}")
    return precise


def _check_pair(query: Tensor, gallery: Tensor) -> None:
    if query.shape[1] != gallery.shape[1] or query.device != gallery.device:
        raise ValueError(
            "query_features and gallery_features must have one size and device; got "
            f"{tuple(query.shape)} on {query.device} and {tuple(gallery.shape)} on {gallery.device}"
        )
