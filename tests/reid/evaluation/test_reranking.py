"""Re-ranking against the definition, an image at a time, and what it is for: better scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrcn_fast.reid.evaluation.reranking import rerank
from mrcn_fast.reid.evaluation.scores import score

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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
    """Query and gallery features, and the identities of both; each identity has `images` in both."""
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
    """Some neighbourhood is expanded, so that the comparison with the loop covers the expansion."""
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


def test_lambda_1_gives_the_given_distance_alone() -> None:
    query, gallery, _ = people(6, 5, 0.8)
    got = rerank(query, gallery, weight=1.0)
    assert torch.equal(got.argsort(dim=1), torch.cdist(query.double(), gallery.double()).argsort(dim=1))


def test_equal_images_have_finite_distances() -> None:
    assert torch.isfinite(rerank(torch.ones(4, 3), torch.ones(5, 3), k1=4, k2=2)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_other_dtypes_are_taken(dtype: torch.dtype) -> None:
    query, gallery, _ = people(6, 5, 0.8)
    query, gallery = query.to(dtype), gallery.to(dtype)
    assert torch.equal(rerank(query, gallery), rerank(query.double(), gallery.double()))


def scaled(query: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """The same features in float64 at a scale that the loop above can square."""
    largest = max(float(side.double().abs().max()) for side in (query, gallery))
    power = 2.0 ** math.frexp(largest)[1]
    return query.double() / power, gallery.double() / power


def times(factor: float, dtype: torch.dtype = torch.float32) -> Change:
    return lambda q, g: (q.to(dtype) * factor, g.to(dtype) * factor)


def moved(distance: float, dtype: torch.dtype = torch.float32) -> Change:
    return lambda q, g: (q.to(dtype) + distance, g.to(dtype) + distance)


def with_one_far(factor: float) -> Change:
    return lambda q, g: (torch.cat((q[:1] * factor, q[1:])), g)


CHANGES: dict[str, Change] = {
    **{f"times {factor}": times(factor) for factor in (1e19, 1e38, 1e-20, 1e-30, 1e-44)},
    **{f"float64 times {factor}": times(factor, torch.float64) for factor in (1e300, 1e-300)},
    "far from the origin": moved(1e4),
    "float64, farther": moved(1e8, torch.float64),
    "modalities far apart": lambda q, g: (q + 1e5, g - 1e5),
    "one 1e19 times as far": with_one_far(1e19),
    "one 1e37 times as far": with_one_far(1e37),
    "some that are zero": lambda q, g: (torch.cat((q[:4] * 0, q[4:])), g),
    "equal queries": lambda q, g: (q[:1].expand(len(q), -1), g),
    "each twice": lambda q, g: (torch.cat((q, q)), g),
    "two values": lambda q, g: (torch.full_like(q, 3e38), torch.full_like(g, -3e38)),
    "one number each": lambda q, g: (q[:, :1], g[:, :1]),
    "many numbers each": lambda q, g: (q.repeat(1, 1000)[:12], g.repeat(1, 1000)[:12]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_finite_features_give_the_loops_distances(name: str) -> None:
    query, gallery = CHANGES[name](*people(6, 5, 0.8)[:2])
    got = rerank(query, gallery, k2=3)
    expected = looped(*scaled(query, gallery), 20, 3, 0.3)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("k2", [1, 6, 60])
def test_as_many_neighbours_as_there_are(k2: int) -> None:
    query, gallery, _ = people(6, 5, 0.8)
    got = rerank(query, gallery, k1=59, k2=k2)
    np.testing.assert_allclose(got.numpy(), looped(query, gallery, 59, k2, 0.3), rtol=0, atol=2e-6)


def test_arrays_of_every_kind_are_taken() -> None:
    query, gallery, _ = people(6, 5, 0.8)
    expected = rerank(query, gallery)
    array = query.numpy()
    read_only = array.copy()
    read_only.flags.writeable = False
    kinds: list[Any] = [
        array, array.astype(">f4"), np.asfortranarray(array), array[::-1][::-1], read_only, array.tolist(),
        list(query), array.astype(np.longdouble), query.clone().requires_grad_(),
    ]  # fmt: skip
    for kind in kinds:
        assert torch.equal(rerank(kind, gallery), expected), type(kind)
    twenty: Any = np.int64(20)
    assert torch.equal(rerank(query, gallery, k1=twenty, weight=np.float64(0.3)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 30}, r"k1 must be .* below the number of images, 30 \(10 queries and 20 of the gallery\)"),
        ({"k1": 0}, "got k1=0, expected an integer from 1"),
        ({"k2": 22}, r"k2 must be from 1 .* to k1 \+ 1 = 21.*got 22"),
        ({"k2": 0}, "got k2=0, expected an integer from 1"),
        ({"weight": 1.5}, "got weight=1.5, expected a number from 0 to 1"),
        ({"chunk": 0}, "got chunk=0, expected an integer from 1"),
        ({"query_features": torch.zeros(10)}, r"query_features must be .*got torch.float32 \(10,\)"),
        ({"gallery_features": torch.zeros(0, 4)}, r"gallery_features must be .*\(0, 4\)"),
        ({"gallery_features": torch.zeros(20, 4).int()}, "gallery_features must be floating-point"),
        ({"gallery_features": torch.zeros(20, 5)}, r"must have one size and device; got \(10, 4\)"),
        ({"query_features": torch.full((10, 4), torch.nan)}, "query_features must be finite.*image 0"),
        ({"query_features": [["a"]]}, r"query_features must be an array of numbers; got text \(1, 1\)"),
        ({"query_features": [[1.0], [1.0, 2.0]]}, "got list whose rows differ in length or kind"),
        ({"query_features": None}, "query_features must be an array of numbers; got NoneType"),
        ({"query_features": torch.zeros(10, 4).to_sparse()}, "must be a dense array of numbers; got a torch"),
        (
            {"query_features": torch.zeros(10, 4, device="meta")},
            "must be a dense .*; got a meta",
        ),
        ({"k1": 2.0}, "got k1=2.0, expected an integer"),
        ({"k2": "6"}, "got k2='6', expected an integer"),
        ({"weight": math.nan}, "got weight=nan, expected a finite number from 0 to 1"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    given = {"query_features": torch.zeros(10, 4), "gallery_features": torch.zeros(20, 4)} | change
    with pytest.raises(ValueError, match=message):
        rerank(**given)
