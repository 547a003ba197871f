"""Scoring a checkpoint on a data set's test images: `mrcn-fast test`."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from mrcn_fast.files import write_json
from mrcn_fast.memory import enough_memory
from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.console import progress_bars
from mrcn_fast.reid.data.cache import cached
from mrcn_fast.reid.data.types import Modality, PersonDataset, Sample, Search
from mrcn_fast.reid.evaluation import reranking
from mrcn_fast.reid.evaluation.pairings import HEADLINE_PAIRING, Pairing, exchange, paired, pairings_of
from mrcn_fast.reid.evaluation.protocol import (
    images_by_modality,
    only_readable,
    search_fingerprint,
    searches_of,
    without,
)
from mrcn_fast.reid.evaluation.results import HEADLINE, describe, result_name, slug
from mrcn_fast.reid.evaluation.scores import score
from mrcn_fast.reid.evaluation.trained import Trained, open_trained
from mrcn_fast.reid.kinds import (
    AnyPath,
    BackendName,
    Count,
    Draw,
    PathText,
    Precision,
    Split,
    Trials,
    Workers,
)
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.checkpoint import Checkpoint, content_digest

# With the names that protocol.py, results.py and trained.py define, which have been importable from here.
__all__ = [
    "Conditions",
    "Trained",
    "describe",
    "only_readable",
    "open_trained",
    "outline",
    "score_checkpoint",
    "score_trial",
    "search_fingerprint",
    "searches_of",
    "without",
]

log = logging.getLogger(__name__)


@check_arguments
def score_checkpoint(
    checkpoint: AnyPath,
    data: AnyPath,
    *,
    mode: Literal["all", "indoor", "both"] | None = None,
    shots: Count | None = None,
    draw: Draw | None = None,
    trials: Trials | None = None,
    permutations: PathText | None = None,
    rerank: bool = False,
    k1: Count | None = None,
    k2: Count | None = None,
    split: Split | None = None,
    other_data: bool = False,
    skip_unreadable: bool = False,
    cache: PathText | None = None,
    backend: BackendName | None = None,
    accelerator: str = "auto",
    precision: Precision | None = None,
    batch_size: Count = 64,
    workers: Workers = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a checkpoint by its data set's protocol, and write the result beside it as JSON.

    The file's name tells what was measured (see `results.result_name`), so that no result replaces one of
    another measurement: of other options, images, steps or precision, on another backend or device. A run may
    be scored while it trains; the result is of its last checkpoint then, whose step it names.

    Everything about the network comes from the checkpoint. SYSU-MM01 searches the visible gallery for
    infrared queries; RegDB and LLCM are scored in both directions, from one extraction. A score is the mean
    over the trials, with their standard deviation (of a sample). The headline is the paper's way to compare
    F and F₊; the other two of `pairings` are under "pairings" of each search, and a crossed one far above the
    headline is logged as a warning.

    Args:
        checkpoint: the file `mrcn-fast train` wrote, or the folder it is in
        data: root of the data set's tree
        mode: SYSU-MM01: all, indoor or both: the gallery's cameras; none: all
        shots: SYSU-MM01: gallery images of an identity and camera: 1, or 10 for multi-shot; none: 1
        draw: SYSU-MM01: how a gallery is drawn: random (the field's PyTorch code) or official; none: random
        trials: SYSU-MM01, LLCM: gallery draws to average over; none: 10
        permutations: path of the official draw, rand_perm_cam.mat; none: it lies in the tree
        rerank: re-rank by k-reciprocal neighbours (Zhong et al. 2017); the result says so
        k1: neighbours that re-ranking encodes an image by; none: 20
        k2: neighbours whose encodings re-ranking averages, 1 for none; none: 6
        split: refuse a checkpoint of another split than this
        other_data: score on a tree other than the one trained on, which is refused else
        skip_unreadable: leave out images that can't be read, named and counted, which are an error else
        cache: folder for a memory-mapped cache of the resized images; none: no cache
        backend: backend of the block; none: the best that serves
        accelerator: where to compute, as lightning-fabric names it
        precision: what to compute in, as lightning-fabric names it; none: as the checkpoint was trained
        batch_size: images a pass
        workers: processes that decode images; 0: this one
        progress: bars to add to, in place of own ones

    Returns the result, with its file as "path". Raises CheckpointError where the checkpoint or, unless
    `other_data`, the data set isn't the one trained on; DatasetError and ValueError for what the data set
    can't give or, with `skip_unreadable`, what is left of it can't; OSError where the checkpoint's folder or
    the cache's can't be written to, all of it before anything is computed; MemoryShortageError where an
    allocation fails.
    """
    if not rerank and (k1, k2) != (None, None):
        raise ValueError(f"got k1={k1}, k2={k2} without rerank, which alone reads them: ask for --rerank")
    if rerank:
        k1, k2 = k1 or reranking.K1, k2 or reranking.K2
    if cache is not None:
        check_folder(cache, "the cache")
    trained = open_trained(
        checkpoint,
        data,
        split=split,
        other_data=other_data,
        backend=backend,
        accelerator=accelerator,
        precision=precision,
        permutations=permutations,
    )
    options = {"mode": mode, "shots": shots, "draw": draw, "trials": trials}
    searches = searches_of(
        trained.dataset, {name: value for name, value in options.items() if value is not None}
    )
    check_folder(trained.path.parent, "the scores beside the checkpoint")
    conditions = Conditions(
        *(rerank, k1, k2, skip_unreadable, trained.precision, trained.backend, trained.fabric.device.type)
    )
    _check_neighbours(searches, conditions)
    result = outline(trained.state, trained.dataset, searches, conditions)
    written = trained.path.with_name(result_name(result, trained.path.stem))
    samples = images_by_modality(searches)
    unreadable: set[Path] = set()
    if skip_unreadable:
        samples, unreadable = only_readable(samples, workers=workers)
    kept = [without(search, unreadable) for search in searches]
    _check_neighbours(kept, conditions)
    tables: dict[Modality, _FeatureTable] = {}
    with progress_bars() if progress is None else nullcontext(progress) as bars:
        for modality, images in samples.items():
            source = None
            if cache is not None:
                source = _cached(trained, images, cache, f"{_cache_name(searches)}-{modality}", workers)
            features = trained.features(
                images, modality, batch_size=batch_size, workers=workers, images=source, progress=bars
            )
            tables[modality] = _FeatureTable(images, features)
    less = "Less is needed without --rerank, with fewer --shots or by a smaller --mode"
    pairings = pairings_of(len(trained.model.test_sets))
    with enough_memory("the distances of queries and gallery images", less):
        for search, left in zip(searches, kept, strict=True):
            result["searches"][search.name] |= _score_search(left, tables, conditions, pairings)
    for name, search in result["searches"].items():
        if told := exchange(_rank1(search)):
            log.warning("%s, %s: %s", trained.path, name, told)
    result |= {
        "headline": searches[0].name,
        "unreadable": sorted(map(str, unreadable)),
        "checkpoint": str(trained.path),
        "epoch": trained.state.epoch,
        "data": str(data),
        "path": str(written),
    }
    write_json(written, result)
    return result


class Conditions(NamedTuple):
    """How scores are made: what they depend on besides the network and the images."""

    rerank: bool
    k1: int | None
    k2: int | None
    skip_unreadable: bool
    precision: Precision
    backend: str
    device: str


def outline(
    state: Checkpoint, dataset: PersonDataset, searches: Sequence[Search], conditions: Conditions
) -> dict[str, Any]:
    """A result before there are scores in it: all that its measurement consists of."""
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "step": state.step,
        "network": content_digest(state.model),
        **conditions._asdict(),
        "searches": {
            search.name: {
                "protocol": search.protocol,
                "settings": search.settings,
                "trials": len(search.galleries),
                "fingerprint": search_fingerprint(dataset, search),
            }
            for search in searches
        },
        "trained_on": state.data._asdict(),
        "config": state.config.as_dict(),
    }


def _cache_name(searches: Sequence[Search]) -> str:
    return slug(["test", *(search.name for search in searches), searches[0].settings])


def _check_neighbours(searches: Sequence[Search], conditions: Conditions) -> None:
    """Refuse more neighbours for re-ranking than a search has images. Raises ValueError."""
    if conditions.k1 is None or conditions.k2 is None:
        return
    for search in searches:
        for gallery in search.galleries:
            reranking.check_neighbours(len(search.query), len(gallery), conditions.k1, conditions.k2)


def _cached(
    trained: Trained, samples: Sequence[Sample], folder: str, part: str, workers: int
) -> Dataset[Tensor]:
    config, dataset = trained.config, trained.dataset
    return cached(
        samples,
        (config.height, config.width),
        filter=config.filter,
        folder=folder,
        name=f"{dataset.name}-split{dataset.split}-{part}",
        workers=workers,
    )


class _FeatureTable:
    """Features of images by the image's path."""

    def __init__(self, samples: Sequence[Sample], features: Tensor) -> None:
        self._rows = {sample.path: row for row, sample in enumerate(samples)}
        self._features = features

    def of(self, samples: Iterable[Sample]) -> Tensor:
        return self._features[[self._rows[sample.path] for sample in samples]]


def _score_search(
    search: Search,
    tables: dict[Modality, _FeatureTable],
    conditions: Conditions,
    pairings: Sequence[Pairing],
) -> dict[str, Any]:
    """A search's scores by the paper's pairing, and under "pairings" those by the others."""
    query = tables[search.query[0].modality].of(search.query)
    rows: dict[Pairing, list[dict[str, Any]]] = {pairing: [] for pairing in pairings}
    for gallery in search.galleries:
        features = tables[gallery[0].modality].of(gallery)
        for pairing in pairings:
            distance = _distance(*paired(query, features, pairing), conditions)
            rows[pairing].append(score_trial(distance, search.query, gallery, search.protocol))
    headline = rows.pop(HEADLINE_PAIRING)
    return {
        "queries": len(search.query),
        "valid_queries": [row["valid_queries"] for row in headline],
        "gallery_images": [len(gallery) for gallery in search.galleries],
        **_over_trials(headline),
        "per_trial": headline,
        "pairings": {pairing: _over_trials(trials) for pairing, trials in rows.items()},
    }


def _distance(query: Tensor, gallery: Tensor, conditions: Conditions) -> Tensor:
    """Minus the dot product, which is the field's distance; or the re-ranked distance."""
    if conditions.k1 is None or conditions.k2 is None:
        return -(query @ gallery.T)
    return reranking.rerank(query, gallery, k1=conditions.k1, k2=conditions.k2)


def _over_trials(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean of the trials' scores, and their standard deviation (of a sample; 0 with one trial)."""
    values = {name: [row[name] for row in rows] for name in HEADLINE}
    return {
        "mean": {name: statistics.fmean(of_trials) for name, of_trials in values.items()},
        "std": {
            name: statistics.stdev(of_trials) if len(rows) > 1 else 0.0 for name, of_trials in values.items()
        },
    }


def _rank1(search: Mapping[str, Any]) -> dict[str, float]:
    """A search's rank-1 by pairing."""
    others = {pairing: scores["mean"]["rank1"] for pairing, scores in search["pairings"].items()}
    return {HEADLINE_PAIRING: search["mean"]["rank1"], **others}


def score_trial(
    distance: Tensor, query: Sequence[Sample], gallery: Sequence[Sample], protocol: str
) -> dict[str, Any]:
    """Scores of one trial from (queries, gallery) distances: shares of 1 by the names in `HEADLINE`."""
    scores = score(
        distance,
        torch.tensor([sample.identity for sample in query]),
        torch.tensor([sample.identity for sample in gallery]),
        query_cameras=torch.tensor([sample.camera for sample in query]),
        gallery_cameras=torch.tensor([sample.camera for sample in gallery]),
        protocol=protocol,
        max_rank=20,
    )
    ranks = {f"rank{rank}": float(scores.cmc[rank - 1]) for rank in (1, 10, 20)}
    return ranks | {"mAP": scores.mAP, "mINP": scores.mINP, "valid_queries": scores.valid_queries}
