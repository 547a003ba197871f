"""`mrcn-fast bench scorer`: `evaluation.score` beside a loop over queries, as published scorers have it.

In the result lines "fused" is `score` with its checks. "loop" computes precision one rank at a time, as
published scorers do, and "array loop" by whole arrays. A case is timed only after `score` gave the results of
the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mrcn_fast import benchmark
from mrcn_fast.benchmark.options import add_case_flags, print_names, read_options
from mrcn_fast.flags import Flags
from mrcn_fast.reid.evaluation.scores import score

GOALS = {"loop": 20.0}
DTYPES = {"fp32": np.float32, "fp64": np.float64}
# The relative error of the scores that is still rounding: both are sums of a few thousand float64 numbers.
TOLERANCE = 1e-9


class Problem(NamedTuple):
    """The arguments of one scoring: `distance` (Q, G), the others (Q,) or (G,)."""

    distance: NDArray[Any]
    query_ids: NDArray[np.int64]
    gallery_ids: NDArray[np.int64]
    query_cameras: NDArray[np.int64]
    gallery_cameras: NDArray[np.int64]
    protocol: str


def sysu_problem(dtype: type, shots: int, *, identities: int = 96, queries: int = 3803) -> Problem:
    """Make a problem of the size of SYSU-MM01's all-search.

    It has 3,803 queries, `shots` times 301 gallery images and 96 identities.
    """
    generator = np.random.default_rng(0)
    # As in SYSU-MM01, not every camera has seen everybody: 301 of 96 x 4 pairs exist.
    often, seldom = ([(i, camera) for i in range(identities) for camera in pair] for pair in ((1, 4), (2, 5)))
    seen = generator.permutation(seldom)[: len(seldom) * 109 // 192].tolist()
    places = np.array(sorted([*often, *map(tuple, seen)]))
    gallery_ids, gallery_cameras = places.repeat(shots, axis=0).T.copy()
    query_ids = np.sort(generator.integers(0, identities, queries))
    query_cameras = generator.choice((3, 6), queries)
    distance = _distance(query_ids, gallery_ids, dtype)
    return Problem(distance, query_ids, gallery_ids, query_cameras, gallery_cameras, "sysu")


def regdb_problem(dtype: type, *, identities: int = 206) -> Problem:
    """Make a problem of the size of a RegDB split: ten images per identity and side, 2,060 x 2,060."""
    ids = np.arange(identities).repeat(10)
    camera = np.ones_like(ids)
    return Problem(_distance(ids, ids, dtype), ids, ids, camera, camera, "regdb")


def _distance(query_ids: NDArray[np.int64], gallery_ids: NDArray[np.int64], dtype: type) -> NDArray[Any]:
    """Return minus the dot products of features around their identities' centers; the mAP is about 0.5."""
    generator = np.random.default_rng(1)
    centers = generator.standard_normal((1 + max(query_ids.max(), gallery_ids.max()), 64))
    sides = []
    for ids in (query_ids, gallery_ids):
        features = centers[ids] + 1.5 * generator.standard_normal((len(ids), 64))
        sides.append(features / np.linalg.norm(features, axis=1, keepdims=True))
    return (-sides[0] @ sides[1].T).astype(dtype)


def fused_scores(problem: Problem, max_rank: int = 20) -> tuple[Tensor, ...]:
    """Return CMC, mAP, mINP and the number of valid queries by `evaluation.score`."""
    scores = score(
        problem.distance,
        problem.query_ids,
        problem.gallery_ids,
        query_cameras=problem.query_cameras,
        gallery_cameras=problem.gallery_cameras,
        protocol=problem.protocol,
        max_rank=max_rank,
    )
    return scores.cmc, *map(_tensor, scores[1:])


def looped_scores(
    problem: Problem, max_rank: int = 20, *, arrays: bool = False, stable: bool = False
) -> tuple[Tensor, ...]:
    """Return the scores of `fused_scores` by a loop over queries, whose images are sorted before the loop.

    Args:
        problem: what is scored
        max_rank: the length of the CMC
        arrays: whether precision is computed by whole arrays instead of one rank at a time
        stable: whether equal distances stay in gallery order
    """
    order = problem.distance.argsort(axis=1, kind="stable" if stable else None)
    ranked_ids = problem.gallery_ids[order]
    ranked_cameras = problem.gallery_cameras[order]
    curves, precisions, penalties = [], [], []
    for query, (identity, camera) in enumerate(zip(problem.query_ids, problem.query_cameras, strict=True)):
        ids = ranked_ids[query]
        if problem.protocol == "sysu":
            ids = ids[~((camera == 3) & (ranked_cameras[query] == 2))]
        matched = ids == identity
        if not matched.any():
            continue
        found = matched.cumsum()
        if arrays:
            precision = found / np.arange(1, len(found) + 1)
        else:
            # Published code divides one numpy integer by one Python float; this takes most of the time.
            precision = np.array([count / (place + 1.0) for place, count in enumerate(found)])
        precisions.append(precision[matched].mean())
        penalties.append(found[-1] / (1 + np.flatnonzero(matched)[-1]))
        if problem.protocol == "sysu":
            _, first = np.unique(ids, return_index=True)
            matched = matched[np.sort(first)]
        curve = np.minimum(matched[:max_rank].cumsum(), 1)
        curves.append(np.pad(curve, (0, max_rank - len(curve)), mode="edge"))
    means = [np.mean(values) for values in (precisions, penalties)]
    return torch.from_numpy(np.mean(curves, axis=0)), *map(_tensor, (*means, len(curves)))


def _tensor(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def calls(make: Callable[[], Problem]) -> dict[str, Callable[[], Any]]:
    """Make "fused", "loop" and "array loop", and EXACT, with which "fused" is compared."""
    problem = make()
    return {
        "fused": partial(fused_scores, problem),
        "loop": partial(looped_scores, problem),
        "array loop": partial(looped_scores, problem, arrays=True),
        benchmark.EXACT: partial(looped_scores, problem, arrays=True, stable=True),
    }


def cases() -> list[benchmark.Case]:
    """Return every case, in the order of the table."""
    problems: dict[str, Callable[[type], Problem]] = {
        "score sysu single-shot 3803x301": partial(sysu_problem, shots=1),
        "score sysu multi-shot 3803x3010": partial(sysu_problem, shots=10),
        "score regdb 2060x2060": regdb_problem,
    }
    return [
        benchmark.Case(f"{name} {dtype}", partial(calls, partial(make, DTYPES[dtype])), GOALS)
        for name, make in problems.items()
        for dtype in DTYPES
    ]


def measured(case: benchmark.Case, seconds: float) -> dict[str, Any]:
    """Return the result line of a case, after `score` was checked; at least three interleaved rounds."""
    made = case.calls()
    benchmark.check(made, TOLERANCE)
    del made[benchmark.EXACT]
    return benchmark.row(case, benchmark.measure(made, seconds, least=3))


# --- the command --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The flags of `bench scorer`."""

    only: str
    seconds: float
    out: Path | None
    list: bool


def flags() -> Flags:
    """Return the flags of `bench scorer`."""
    found = Flags("bench scorer", "time the scorer against a loop over queries, on the CPU")
    add_case_flags(found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mrcn-fast bench scorer argv...`; the status is 1 where a goal was missed."""
    parser = flags()
    options = read_options(Options, parser, argv)
    chosen = [case for case in cases() if options.only in case.name]
    if options.list:
        print_names(chosen)
        return 0
    if not chosen:
        return parser.refuse(f"got --only {options.only!r}, which no case's name contains; --list lists them")
    # numpy sorts, and the allocator decides about pages, as for a user.
    where = benchmark.machine() | {"numpy": np.__version__, "pages": "the allocator's"}
    print(f"{benchmark.described(where)}, numpy {where['numpy']}")
    print("median of interleaved rounds; ratios are the loop's time over the scorer's\n")
    any_missed = False
    for case in chosen:
        result = measured(case, options.seconds)
        benchmark.print_row(result)
        any_missed = any_missed or bool(result["missed"])
        if options.out:
            benchmark.write(options.out, where | result)
    return 1 if any_missed else 0
