"""The field's retrieval scores, CMC, mAP and mINP, by the protocols of SYSU-MM01, RegDB and LLCM."""

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

# SYSU-MM01's cameras 2 and 3 see the same place, so that a query of camera 3 skips gallery images of 2.
_SYSU_QUERY_CAMERA: Final = 3
_SYSU_SKIPPED_CAMERA: Final = 2

# The number of distances that one thread and all threads together work on at a time. Working memory is below
# 40 bytes per distance, and so below 20 MB per thread and 320 MB in all.
_CHUNK_ELEMENTS: Final = 1 << 19
_ELEMENTS: Final = 1 << 23

# The longest CMC curve: it is longer than any gallery, and a longer one would only fill memory.
_LONGEST_CURVE: Final = 1 << 20

# The dtypes that torch sorts and compares; other dtypes become float64.
_COMPUTED: Final = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
)

_Result = TypeVar("_Result")


class Scores(NamedTuple):
    """The scores of a trial, as shares of 1 and averaged over the queries that have a match."""

    cmc: Tensor  # (max_rank,), float64 on the CPU; cmc[k - 1] is Rank-k
    mAP: float
    mINP: float
    valid_queries: int  # that have a match


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
    """Compute Rank-k (CMC), mAP and mINP of a retrieval.

    The average precision AP of a query is the mean of k / rank(k) over its matches, where rank(k) is the rank
    of its k-th match among the images. Its inverse negative penalty INP is the number of its matches divided
    by the rank of the last one. mAP and mINP are their means over the queries that have a match. Images of
    equal distance rank in the order of the gallery.

    The protocol says which gallery images a query skips, and what the CMC ranks:
      - "sysu": a query of camera 3 skips camera 2; the CMC ranks identities, each by its nearest image;
      - "llcm": a query skips images of its own identity by its own camera; the CMC ranks identities;
      - "regdb": a query skips nothing; the CMC ranks images.

    Args:
        distance: (queries, gallery), of any real dtype and on any device; smaller is nearer
        query_ids, gallery_ids: the identity of each row and column, integers or text
        query_cameras, gallery_cameras: the camera of each row and column, integers; for "sysu" and "llcm"
        protocol: "sysu", "regdb" or "llcm"
        max_rank: length of the CMC curve

    All of them may be tensors, NumPy arrays or lists.

    Raises:
        ValueError: for shapes and types that don't fit, missing cameras, an unknown protocol, distances that
            are not finite, and where no query has a match

    Example:
        >>> scores = score([[0.1, 0.9], [0.3, 0.2]], [1, 2], [1, 2], protocol="regdb", max_rank=2)
        >>> scores.cmc.tolist(), scores.mAP, scores.mINP
        ([1.0, 1.0], 1.0, 1.0)
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
    """Find the gallery images that each query skips: bool (queries, gallery).

    `score` and the ranking lists leave out the same images by this function.

    Args:
        query_ids, query_cameras: integers, one per query
        gallery_ids, gallery_cameras: integers, one per gallery image
        protocol: one of `PROTOCOLS`

    Raises:
        ValueError: for an unknown protocol, and for shapes and types that don't fit
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
    """`skipped_images` for arguments that were checked."""
    if protocol == "sysu":
        skipping, skipped = query_cameras == _SYSU_QUERY_CAMERA, gallery_cameras == _SYSU_SKIPPED_CAMERA
        return skipping[:, None] & skipped
    if protocol == "llcm":
        return (query_ids[:, None] == gallery_ids) & (query_cameras[:, None] == gallery_cameras)
    return torch.zeros(len(query_ids), len(gallery_ids), dtype=torch.bool, device=query_ids.device)


def average(trials: Sequence[Scores]) -> Scores:
    """Average the scores of several trials of one protocol, as SYSU-MM01 and LLCM report ten.

    Raises ValueError for no trial, and for trials of different protocols: those have CMC curves of different
    lengths or different numbers of valid queries, which gallery draws don't change.
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
    """The checked arguments of `score`, and the gallery by identity."""

    distance: Tensor
    queries: Tensor
    gallery: Tensor
    cameras: tuple[Tensor, Tensor] | None
    protocol: str
    columns: Tensor  # (G,), the index of each image's identity among the gallery's sorted identities
    matches: Tensor  # (identities, most), see `_match_table`
    own: Tensor  # (Q,), the row of each query in `matches`


def _score_rows(problem: _Problem, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score the queries in `rows`.

    Returns, (rows,) each: whether the query has a match, the number of images or identities before its first
    match, AP and INP. The last three mean nothing without a match. The host doesn't wait for a GPU here.
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
    """On the CPU, run each operation on one thread; yield the number of threads that can share the rows.

    If the threads shared each operation instead, they would wait for each other after every one.
    """
    if device.type != "cpu":
        yield 1
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for this thread, and for threads that start before it is restored
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _by_threads(work: Callable[[Tensor], _Result], chunks: Sequence[Tensor], threads: int) -> list[_Result]:
    """Apply `work` to each chunk, and return the results in the order of the chunks."""
    if min(threads, len(chunks)) == 1:
        return list(map(work, chunks))
    with ThreadPoolExecutor(min(threads, len(chunks))) as pool:
        return list(pool.map(work, chunks))


def _images_before(values: Tensor, places: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
    """Count the images before each match, (Q, M), and make values that have no ties at the matches, (Q, G).

    `values` (Q, G) are infinite for skipped images and are changed in place; `places` (Q, M) are the columns
    of the matches where `matched`.
    """
    if values.device.type != "cpu":
        return _images_before_stably(values, places)
    ordered = _sorted_rows(values)
    nearest = values.gather(1, places)
    before = torch.searchsorted(ordered, nearest)
    # A match is tied where the next value in order equals its own.
    next_value = ordered.gather(1, (before + 1).clamp_(max=ordered.shape[1] - 1))
    last = before == ordered.shape[1] - 1
    tied = torch.nonzero(((next_value == nearest) & ~last & matched).any(dim=1)).flatten()
    if len(tied):
        # Only rows with ties need a stable sort. The positions in its order replace the distances there.
        positions = _stable_positions(values[tied])
        before[tied] = positions.gather(1, places[tied])
        values[tied] = positions.to(values.dtype)
    return before, values


def _images_before_stably(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    # On a GPU a stable sort costs no more than another, and to look for ties first would wait for the GPU.
    positions = _stable_positions(values)
    return positions.gather(1, places), positions.to(values.dtype)


def _identities_before(
    values: Tensor, places: Tensor, matched: Tensor, columns: Tensor, identities: int
) -> Tensor:
    """Count the other identities that have an image before the query's nearest match, (Q,)."""
    first = values.gather(1, places).masked_fill_(~matched, torch.inf).amin(dim=1, keepdim=True)
    nearest = values.new_full((len(values), identities), torch.inf)
    nearest.scatter_reduce_(1, columns.expand_as(values), values, "amin")
    return (nearest < first).sum(dim=1)


def _precision_and_penalty(before: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
    """Compute AP and INP of each query, float64 (Q,), from the ranks of its matches; NaN without a match."""
    count = matched.sum(dim=1)
    ranks = before.masked_fill(~matched, torch.iinfo(before.dtype).max - 1).sort(dim=1).values + 1
    found = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    precisions = (found / ranks.double()).masked_fill_(found > count[:, None], 0)
    last = ranks.gather(1, (count[:, None] - 1).clamp_(min=0)).squeeze(1)
    penalty = count / last.double()
    return precisions.sum(dim=1) / count, penalty


def _sorted_rows(values: Tensor) -> Tensor:
    # NumPy sorts values several times faster than torch, which sorts indices along with them.
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


def _stable_positions(values: Tensor) -> Tensor:
    """The rank of each element in its row, from 0; equal elements rank in the order of their columns."""
    order = values.argsort(dim=1, stable=True)
    places = torch.arange(values.shape[1], device=values.device)
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))


def _match_table(columns: Tensor, identities: int) -> Tensor:
    """List the gallery columns of each identity, (identities, most); unused entries are -1."""
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
    """The dtype to sort in, which holds both the distances and the ranks of a row exactly."""
    if distance.dtype in (torch.float32, torch.float64):
        # float32 doesn't hold all ranks above 2**24.
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
    """Convert the identities of both sides to int64, and check their lengths where those are known."""
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
    """Number the names, in the same way on both sides."""
    _, numbers = np.unique(np.concatenate((queries.ravel(), gallery.ravel())), return_inverse=True)
    first, second = np.split(numbers, [queries.size])
    return first.reshape(queries.shape), second.reshape(gallery.shape)


def _integers(value: Tensor | ArrayLike, name: str, length: int | None) -> Tensor:
    """Convert integers to int64, (length,); None stands for any length."""
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
    # The extremes are NaN if any value is, and need no mask as large as the rows.
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
    """Find the row and column of the first value that is not finite."""
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
