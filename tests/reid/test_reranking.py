"""Re-ranking against the definition, an image at a time, and what it is for: better scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrcn_fast.reid.evaluation import score
from mrcn_fast.reid.reranking import rerank


def neighbours(distance: NDArray, image: int, count: int) -> list[int]:
    """The image itself and the `count` others nearest to it, in the order of the images where equal."""
    others = [int(j) for j in np.argsort(distance[image], kind="stable") if j != image]
    return [image, *others[:count]]


def reciprocal(distance: NDArray, image: int, count: int) -> set[int]:
    return {j for j in neighbours(distance, image, count) if image in neighbours(distance, j, count)}


def looped(queries: Tensor, gallery: Tensor, k1: int, k2: int, weight: float) -> NDArray:
    """Zhong et al.'s equations in float64, image by image and pair by pair."""
    features = torch.cat((queries, gallery)).double().numpy()
    images = range(len(features))
    distance = np.array([[((features[i] - features[j]) ** 2).sum() for j in images] for i in images])
    distance /= distance.max(axis=1, keepdims=True)
    encoding = np.zeros_like(distance)
    for p in images:
        near = reciprocal(distance, p, k1)
        expanded = set(near)
        for q in near:
            candidate = reciprocal(distance, q, round(k1 / 2))
            if len(near & candidate) > 2 / 3 * len(candidate):
                expanded |= candidate
        for g in expanded:
            encoding[p, g] = np.exp(-distance[p, g])
        encoding[p] /= encoding[p].sum()
    encoding = np.array([encoding[neighbours(distance, p, k2 - 1)].mean(axis=0) for p in images])
    result = np.zeros((len(queries), len(gallery)))
    for i in range(len(queries)):
        for j in range(len(gallery)):
            p, q = encoding[i], encoding[len(queries) + j]
            jaccard = 1 - np.minimum(p, q).sum() / np.maximum(p, q).sum()
            result[i, j] = (1 - weight) * jaccard + weight * distance[i, len(queries) + j]
    return result


def people(
    identities: int, images: int, noise: float, seed: int = 0, size: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and gallery features, and the identities of either: so many images of each in both."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(identities).repeat_interleave(images)
    centers = torch.randn(identities, size, generator=generator)
    query, gallery = (
        torch.nn.functional.normalize(
            centers[ids] + noise * torch.randn(len(ids), size, generator=generator), dim=1
        )
        for _ in range(2)
    )
    return query, gallery, ids


@pytest.mark.parametrize(
    ("k1", "k2", "weight"),
    [(20, 6, 0.3), (7, 3, 0.3), (5, 1, 0.0), (4, 5, 0.5), (1, 1, 0.3), (59, 6, 0.3), (6, 2, 1.0)],
)
def test_equals_the_loop(k1: int, k2: int, weight: float) -> None:
    query, gallery, _ = people(6, 5, 0.8, seed=k1)
    query, gallery = query[:-3], torch.cat((gallery, query[-3:]))
    got = rerank(query, gallery, k1=k1, k2=k2, weight=weight)
    assert (got.dtype, got.shape) == (torch.float32, (27, 33))
    np.testing.assert_allclose(got.numpy(), looped(query, gallery, k1, k2, weight), rtol=0, atol=2e-6)


def test_expansion_matters() -> None:
    """The loop above would not tell if no neighbourhood were ever expanded."""
    query, gallery, _ = people(6, 5, 0.8, seed=7)
    distance = torch.cdist(torch.cat((query, gallery)).double(), torch.cat((query, gallery)).double()).numpy()
    grown = 0
    for p in range(60):
        near = reciprocal(distance, p, 7)
        for q in near:
            candidate = reciprocal(distance, q, 4)
            grown += len(near & candidate) > 2 / 3 * len(candidate) and not candidate <= near
    assert grown > 10


@pytest.mark.parametrize("seed", range(3))
def test_equal_distances_rank_in_the_order_of_the_images(seed: int) -> None:
    # Small integers: their distances are exact in float32, and mostly ties.
    features = torch.randint(0, 3, (40, 3), generator=torch.Generator().manual_seed(seed)).float()
    got = rerank(features[:15], features[15:], k1=6, k2=3)
    np.testing.assert_allclose(
        got.numpy(), looped(features[:15], features[15:], 6, 3, 0.3), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_chunks_change_nothing(chunk: int) -> None:
    query, gallery, _ = people(6, 5, 0.8)
    assert torch.equal(rerank(query, gallery, chunk=chunk), rerank(query, gallery))


def test_it_improves_the_ranking_of_clustered_features() -> None:
    query, gallery, ids = people(40, 8, 1.0)
    plain = score(-(query @ gallery.T), ids, ids, protocol="regdb")
    better = score(rerank(query, gallery), ids, ids, protocol="regdb")
    assert better.mAP > plain.mAP + 0.03
    assert better.cmc[0] > plain.cmc[0]


def test_the_given_distance_alone() -> None:
    query, gallery, _ = people(6, 5, 0.8)
    got = rerank(query, gallery, weight=1.0)
    assert torch.equal(got.argsort(dim=1), torch.cdist(query.double(), gallery.double()).argsort(dim=1))


def test_images_that_are_all_one() -> None:
    assert torch.isfinite(rerank(torch.ones(4, 3), torch.ones(5, 3), k1=4, k2=2)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_taken(dtype: torch.dtype) -> None:
    query, gallery, _ = people(6, 5, 0.8)
    query, gallery = query.to(dtype), gallery.to(dtype)
    assert torch.equal(rerank(query, gallery), rerank(query.float(), gallery.float()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 30}, r"k1 must be .* below the number of images, 30 \(10 queries and 20 of the gallery\)"),
        ({"k1": 0}, "k1 must be at least 1"),
        ({"k2": 22}, r"k2 must be from 1 .* to k1 \+ 1 = 21.*got 22"),
        ({"k2": 0}, "k2 must be from 1"),
        ({"weight": 1.5}, "weight must be from 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"query_features": torch.zeros(10)}, r"query_features must be .*got torch.float32 \(10,\)"),
        ({"gallery_features": torch.zeros(0, 4)}, r"gallery_features must be .*\(0, 4\)"),
        ({"gallery_features": torch.zeros(20, 4).int()}, "gallery_features must be floating-point"),
        ({"gallery_features": torch.zeros(20, 5)}, r"must have one size and device; got \(10, 4\)"),
        ({"query_features": torch.full((10, 4), torch.nan)}, "query_features must be finite.*image 0"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    given = {"query_features": torch.zeros(10, 4), "gallery_features": torch.zeros(20, 4)} | change
    with pytest.raises(ValueError, match=message):
        rerank(**given)
