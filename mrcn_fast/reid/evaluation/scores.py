"""Retrieval scores as the field defines them: CMC, mAP and mINP of SYSU-MM01, RegDB and LLCM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Final, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from torch import Tensor

from mrcn_fast.reid.arrays import as_tensor, as_text
from mrcn_fast.reid.kinds import NUMPY
from mrcn_fast.reid.settings import check_arguments

PROTOCOLS: Final = ("sysu", "regdb", "llcm")

# SYSU-MM01's cameras 2 and 3 stand in one room: a query of 3 skips the gallery of 2.
_SYSU_QUERY_CAMERA: Final = 3
_SYSU_SKIPPED_CAMERA: Final = 2

# Distances worked on at once, by one thread and by all. Working memory is below 40 bytes an element: 20 MB a
# thread, and 320 MB in all.
_CHUNK_ELEMENTS: Final = 1 << 19
_ELEMENTS: Final = 1 << 23

# A curve longer than any gallery would only fill memory.
_LONGEST_CURVE: Final = 1 << 20

# What torch sorts and compares; other dtypes become float64.
_COMPUTED: Final = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
)

_Result = TypeVar("_Result")


class Scores(NamedTuple):
    """Scores of one trial, as shares of 1, averaged over the `valid_queries` that have a match.

    cmc: float64 (max_rank,) on the CPU, `cmc[k - 1]` is Rank-k.
    """

    cmc: Tensor
    mAP: float
    mINP: float
    valid_queries: int


@check_arguments
def score(
    distance: Tensor | ArrayLike,
    query_ids: Tensor | ArrayLike,
    gallery_ids: Tensor | ArrayLike,
    *,
    query_cameras: Tensor | ArrayLike | None = None,
    gallery_cameras: Tensor | ArrayLike | None = None,
    protocol: str = "sysu",
    max_rank: Annotated[int, Field(ge=1, le=_LONGEST_CURVE), NUMPY] = 20,
) -> Scores:
    """Rank-k (CMC), mAP and mINP of a retrieval.

    distance: (queries, gallery), any real dtype and device, smaller is nearer; query_ids, gallery_ids:
    integers or text, one a row or column; query_cameras, gallery_cameras, for "sysu" and "llcm": integers
    likewise. All may be tensors, numpy's arrays or lists.

    protocol: which gallery images a query skips and what the CMC counts:
      - "sysu": a query of camera 3 skips camera 2; the CMC ranks identities, each by its nearest image;
      - "llcm": a query skips its own identity in its own camera; the CMC ranks identities likewise;
      - "regdb": nothing is skipped; the CMC ranks images.
    AP is the mean over a query's matches of k / rank of the k-th match, INP is matches / rank of the last
    match, both over images. Queries without a match are left out. Equal distances rank in the gallery's
    order.

    Raises ValueError for shapes and kinds that do not fit, missing cameras, an unknown protocol, distances
    that are not finite, and when no query has a match.
    """
    distance = _distances(distance)
    with _undivided_operations(distance.device) as threads:
        queries, gallery = _checked_arguments(distance, query_ids, gallery_ids, protocol, threads)
        cameras = _checked_cameras(query_cameras, gallery_cameras, distance, protocol)
        return _scores(distance, queries, gallery, cameras, protocol, max_rank, threads)


def skipped_images(
    query_ids: Tensor | ArrayLike,
    gallery_ids: Tensor | ArrayLike,
    query_cameras: Tensor | ArrayLike,
    gallery_cameras: Tensor | ArrayLike,
    protocol: str,
) -> Tensor:
    """Which gallery images each query skips by a protocol of `PROTOCOLS`: bool (queries, gallery).

    All arguments but the last: integers, one a query or gallery image. `score` and ranking lists leave out
    the same images by this. Raises ValueError for an unknown protocol, and for other shapes and kinds.
    """
    _check_protocol(protocol)
    queries, gallery = _identities(query_ids, gallery_ids, (None, None))
    cameras = (
        _integers(query_cameras, "query_cameras", len(queries)),
        _integers(gallery_cameras, "gallery_cameras", len(gallery)),
    )
    return _skipped(queries, gallery, *cameras, protocol)


def _skipped(
    query_ids: Tensor, gallery_ids: Tensor, query_cameras: Tensor, gallery_cameras: Tensor, protocol: str
) -> Tensor:
    """`skipped_images` of checked arguments."""
    if protocol == "sysu":
        skipping, skipped = query_cameras == _SYSU_QUERY_CAMERA, gallery_cameras == _SYSU_SKIPPED_CAMERA
        return skipping[:, None] & skipped
    if protocol == "llcm":
        return (query_ids[:, None] == gallery_ids) & (query_cameras[:, None] == gallery_cameras)
    return torch.zeros(len(query_ids), len(gallery_ids), dtype=torch.bool, device=query_ids.device)


def average(trials: Sequence[Scores]) -> Scores:
    """The mean of the scores of several trials of one protocol, as SYSU-MM01 and LLCM report their ten.

    Raises ValueError for no trial, curves of different length, or different numbers of valid queries: a
    gallery draw changes neither, so the trials would not be of one protocol.
    """
    if not trials:
        raise ValueError("expected the scores of at least one trial; got none")
    if strange := {type(trial) for trial in trials} - {Scores}:
        raise ValueError(f"expected trials as `score` gives them; got {strange.pop().__name__}")
    for name, found in (
        ("lengths of the CMC", {len(trial.cmc) for trial in trials}),
        ("numbers of valid queries", {trial.valid_queries for trial in trials}),
    ):
        if len(found) > 1:
            raise ValueError(f"expected trials of one protocol; got different {name}: {sorted(found)}")
    return Scores(
        cmc=torch.stack([trial.cmc for trial in trials]).mean(dim=0),
        mAP=sum(trial.mAP for trial in trials) / len(trials),
        mINP=sum(trial.mINP for trial in trials) / len(trials),
        valid_queries=trials[0].valid_queries,
    )


def _scores(
    distance: Tensor,
    queries: Tensor,
    gallery: Tensor,
    cameras: tuple[Tensor, Tensor] | None,
    protocol: str,
    max_rank: int,
    threads: int,
) -> Scores:
    identities, columns = torch.unique(gallery, return_inverse=True)
    matches = _match_table(columns, len(identities))
    own = torch.searchsorted(identities, queries).clamp_(max=len(identities) - 1)
    known = torch.nonzero(identities[own] == queries).flatten()

    problem = _Problem(distance, queries, gallery, cameras, protocol, columns, matches, own)
    chunks = known.split(_rows_at_once(distance, threads))
    found, ranks, precisions, penalties = zip(
        *_by_threads(partial(_score_rows, problem), chunks, threads), strict=True
    )
    valid = torch.cat(found)
    valid_queries = int(valid.sum())
    if not valid_queries:
        raise ValueError(
            f"no query has a match in the gallery: {len(queries)} queries of {len(queries.unique())} "
            f"identities, {len(gallery)} gallery images of {len(identities)}, protocol {protocol!r}; check "
            f"that both are of one split and that query and gallery cameras are not exchanged"
        )
    nearest = torch.cat(ranks)[valid].clamp_(max=max_rank)
    counts = torch.bincount(nearest, minlength=max_rank + 1)[:max_rank]
    return Scores(
        cmc=(counts.cumsum(0).double() / valid_queries).cpu(),
        mAP=torch.cat(precisions)[valid].mean().item(),
        mINP=torch.cat(penalties)[valid].mean().item(),
        valid_queries=valid_queries,
    )


class _Problem(NamedTuple):
    """What the scores of a query depend on: the checked arguments of `score`, and the gallery by identity."""

    distance: Tensor
    queries: Tensor
    gallery: Tensor
    cameras: tuple[Tensor, Tensor] | None
    protocol: str
    columns: Tensor  # (G,) each image's place among the gallery's sorted identities
    matches: Tensor  # (identities, most) of `_match_table`
    own: Tensor  # (Q,) each query's row in it


def _score_rows(problem: _Problem, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the queries in `rows`: whether they have a match, what the CMC counts before it, AP and INP (rows,).

    Without a match the others are of no meaning. On a GPU nothing here waits for it.
    """
    values = problem.distance[rows].to(_working_dtype(problem.distance))
    places = problem.matches[problem.own[rows]]
    matched, places = places >= 0, places.clamp(min=0)
    if problem.cameras is not None:
        queries, (cameras, gallery_cameras) = problem.queries[rows], problem.cameras
        skipped = _skipped(queries, problem.gallery, cameras[rows], gallery_cameras, problem.protocol)
        values.masked_fill_(skipped, torch.inf)
        matched &= ~skipped.gather(1, places)
    before, keys = _images_before(values, places, matched)
    if problem.protocol == "regdb":
        ranks = before.masked_fill(~matched, len(problem.gallery)).amin(dim=1)
    else:
        ranks = _identities_before(keys, places, matched, problem.columns, len(problem.matches))
    return matched.any(dim=1), ranks, *_precision_and_penalty(before, matched)


@contextmanager
def _undivided_operations(device: torch.device) -> Iterator[int]:
    """On the CPU: each operation on one thread, and how many threads there are to take rows of their own.

    Were all threads to share each operation, they would wait for the slowest of them a hundred times.
    """
    if device.type != "cpu":
        yield 1
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that begin before it is put back
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _by_threads(work: Callable[[Tensor], _Result], chunks: Sequence[Tensor], threads: int) -> list[_Result]:
    """`work` of each chunk, in their order."""
    if min(threads, len(chunks)) == 1:
        return list(map(work, chunks))
    with ThreadPoolExecutor(min(threads, len(chunks))) as pool:
        return list(pool.map(work, chunks))


def _images_before(values: Tensor, places: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
    """How many images each match has before it (Q, M), and values without ties at the matches (Q, G).

    values: (Q, G), skipped images infinite, changed in place; places: (Q, M) columns of the matches, where
    `matched`.
    """
    if values.device.type != "cpu":
        return _images_before_stably(values, places)
    ordered = _sorted_rows(values)
    nearest = values.gather(1, places)
    before = torch.searchsorted(ordered, nearest)
    # A match is tied where the value behind its first place is its own again.
    next_value = ordered.gather(1, (before + 1).clamp_(max=ordered.shape[1] - 1))
    last = before == ordered.shape[1] - 1
    tied = torch.nonzero(((next_value == nearest) & ~last & matched).any(dim=1)).flatten()
    if len(tied):
        # Only such rows pay for a stable sort; their images' positions in it then stand for the distances.
        positions = _stable_positions(values[tied])
        before[tied] = positions.gather(1, places[tied])
        values[tied] = positions.to(values.dtype)
    return before, values


def _images_before_stably(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    # A GPU sorts stably at the price of any sort, and to look for ties first would be to wait for it.
    positions = _stable_positions(values)
    return positions.gather(1, places), positions.to(values.dtype)


def _identities_before(
    values: Tensor, places: Tensor, matched: Tensor, columns: Tensor, identities: int
) -> Tensor:
    """How many other identities have an image before the query's nearest match (Q,)."""
    first = values.gather(1, places).masked_fill_(~matched, torch.inf).amin(dim=1, keepdim=True)
    nearest = values.new_full((len(values), identities), torch.inf)
    nearest.scatter_reduce_(1, columns.expand_as(values), values, "amin")
    return (nearest < first).sum(dim=1)


def _precision_and_penalty(before: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
    """AP and INP of each query, float64 (Q,), from the places of its matches; NaN where it has none."""
    count = matched.sum(dim=1)
    ranks = before.masked_fill(~matched, torch.iinfo(before.dtype).max - 1).sort(dim=1).values + 1
    found = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    precisions = (found / ranks.double()).masked_fill_(found > count[:, None], 0)
    last = ranks.gather(1, (count[:, None] - 1).clamp_(min=0)).squeeze(1)
    penalty = count / last.double()
    return precisions.sum(dim=1) / count, penalty


def _sorted_rows(values: Tensor) -> Tensor:
    # numpy sorts values several times faster than torch, which sorts indices along with them.
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


def _stable_positions(values: Tensor) -> Tensor:
    """The place of each element in its row's order; equal ones in the order of their columns."""
    order = values.argsort(dim=1, stable=True)
    places = torch.arange(values.shape[1], device=values.device)
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))


def _match_table(columns: Tensor, identities: int) -> Tensor:
    """The gallery columns of each identity (identities, most), in order, -1 where it has fewer than most."""
    counts = torch.bincount(columns, minlength=identities)
    starts = counts.cumsum(0) - counts
    order = columns.argsort(stable=True)
    table = columns.new_full((identities, int(counts.max())), -1)
    owner = columns[order]
    table[owner, torch.arange(len(order), device=order.device) - starts[owner]] = order
    return table


def _rows_at_once(distance: Tensor, threads: int) -> int:
    return max(1, min(_CHUNK_ELEMENTS, _ELEMENTS // threads) // distance.shape[1])


def _working_dtype(distance: Tensor) -> torch.dtype:
    """The dtype to sort in: the distance's own, or one that holds its values and the places of a row."""
    if distance.dtype in (torch.float32, torch.float64):
        # Above 2**24 columns float32 cannot tell two places of a row apart.
        return torch.float64 if distance.shape[1] > 1 << 24 else distance.dtype
    return torch.float32 if distance.is_floating_point() else torch.float64


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")


def _distances(value: Tensor | ArrayLike) -> Tensor:
    distance = as_tensor(value, "distance")
    if distance.is_complex():
        raise ValueError(f"distance must be real; got {distance.dtype}")
    if distance.dim() != 2 or not distance.numel():
        raise ValueError(
            f"distance must be (queries, gallery) with at least one of each; got {tuple(distance.shape)}"
        )
    return distance if distance.dtype in _COMPUTED else distance.to(torch.float64)


def _identities(
    query_ids: Tensor | ArrayLike, gallery_ids: Tensor | ArrayLike, lengths: tuple[int | None, int | None]
) -> tuple[Tensor, Tensor]:
    """The identities of both sides, of these lengths where they are known, as int64; text is numbered."""
    names = as_text(query_ids, "query_ids"), as_text(gallery_ids, "gallery_ids")
    if (names[0] is None) != (names[1] is None):
        kinds = ["numbers" if side is None else "text" for side in names]
        raise ValueError(
            f"query_ids and gallery_ids must be of one kind; got {kinds[0]} and {kinds[1]}, of which no two "
            "are equal"
        )
    if names[0] is not None and names[1] is not None:
        query_ids, gallery_ids = _numbered(names[0], names[1])
    return _integers(query_ids, "query_ids", lengths[0]), _integers(gallery_ids, "gallery_ids", lengths[1])


def _numbered(
    queries: NDArray[np.str_], gallery: NDArray[np.str_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A number for each name, the same on both sides."""
    _, numbers = np.unique(np.concatenate((queries.ravel(), gallery.ravel())), return_inverse=True)
    first, second = np.split(numbers, [queries.size])
    return first.reshape(queries.shape), second.reshape(gallery.shape)


def _integers(value: Tensor | ArrayLike, name: str, length: int | None) -> Tensor:
    """int64 (length,), or of any length."""
    tensor = as_tensor(value, name)
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not whole or tensor.dim() != 1 or length not in (None, len(tensor)):
        count = "" if length is None else f"{length} "
        raise ValueError(
            f"{name} must be {count}integers, one for each row or column of distance; got {tensor.dtype} "
            f"{tuple(tensor.shape)}"
        )
    return tensor.to(torch.int64)


def _checked_arguments(
    distance: Tensor,
    query_ids: Tensor | ArrayLike,
    gallery_ids: Tensor | ArrayLike,
    protocol: str,
    threads: int,
) -> tuple[Tensor, Tensor]:
    _check_protocol(protocol)
    rows, columns = distance.shape
    queries, gallery = _identities(query_ids, gallery_ids, (rows, columns))
    # The extremes are NaN if any value is, and found without a mask of the rows' size.
    chunks = distance.split(_rows_at_once(distance, threads))
    extremes = _by_threads(lambda rows: torch.stack(rows.aminmax()), chunks, threads)
    if not torch.stack(extremes).isfinite().all():
        row, column = _not_finite(distance)
        raise ValueError(
            f"distance must be finite; got {distance[row, column].item()} for query {row} and gallery image "
            f"{column}. Look for NaN or infinity in the features"
        )
    return queries.to(distance.device), gallery.to(distance.device)


def _not_finite(values: Tensor) -> tuple[int, int]:
    """The first place in (rows, columns) whose value is not finite."""
    row = next(row for row, rows in enumerate(values) if not rows.isfinite().all())
    return row, int(torch.nonzero(~values[row].isfinite())[0])


def _checked_cameras(
    query_cameras: Tensor | ArrayLike | None,
    gallery_cameras: Tensor | ArrayLike | None,
    distance: Tensor,
    protocol: str,
) -> tuple[Tensor, Tensor] | None:
    if protocol == "regdb":
        return None
    if query_cameras is None or gallery_cameras is None:
        missing = "query_cameras" if query_cameras is None else "gallery_cameras"
        raise ValueError(
            f"protocol {protocol!r} skips gallery images by camera and needs query_cameras and "
            f"gallery_cameras; got no {missing}"
        )
    queries, gallery = distance.shape
    return (
        _integers(query_cameras, "query_cameras", queries).to(distance.device),
        _integers(gallery_cameras, "gallery_cameras", gallery).to(distance.device),
    )
