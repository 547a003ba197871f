"""Scoring a checkpoint on a data set's test images: `mrcn-fast test`."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import Dataset

from mrcn_fast.files import write_json
from mrcn_fast.memory import enough_memory
from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.console import progress_bars
from mrcn_fast.reid.data.cache import cached
from mrcn_fast.reid.data.types import Modality, PersonDataset, Sample, Search
from mrcn_fast.reid.devices import open_devices
from mrcn_fast.reid.evaluation import reranking
from mrcn_fast.reid.evaluation.distances import distances_of
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
from mrcn_fast.reid.evaluation.trained import EvaluationOptions, Trained, open_trained
from mrcn_fast.reid.kinds import (
    AnyPath,
    Count,
    Draw,
    PathText,
    Precision,
    Trials,
)
from mrcn_fast.reid.models.interface import test_sets_of
from mrcn_fast.reid.processes import Processes
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.checkpoint import Checkpoint, content_digest

# With the names that protocol.py, results.py and trained.py define, which have been importable from here.
__all__ = [
    "Conditions",
    "ScoringOptions",
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


class Conditions(NamedTuple):
    """What scores depend on besides the network and the images."""

    rerank: bool
    k1: int | None
    k2: int | None
    skip_unreadable: bool
    precision: Precision
    backend: str
    device: str


@dataclass(kw_only=True)
class ScoringOptions(EvaluationOptions):
    """How a checkpoint is scored. An option of one data set is refused for the others.

    Raises ValueError for a value that a field doesn't take, and for `k1` or `k2` without `rerank`.
    """

    mode: Literal["all", "indoor", "both"] | None = None
    """SYSU-MM01: all, indoor or both: the gallery's cameras; none: all."""
    shots: Count | None = None
    """SYSU-MM01: gallery images per identity and camera: 1, or 10 for multi-shot; none: 1."""
    draw: Draw | None = None
    """SYSU-MM01: how a gallery is drawn: random (the field's PyTorch code) or official; none: random."""
    trials: Trials | None = None
    """SYSU-MM01, LLCM: gallery draws to average over; none: 10."""
    rerank: bool = False
    """Re-rank by k-reciprocal neighbours (Zhong et al. 2017); the result says so."""
    k1: Count | None = None
    """Neighbours that re-ranking encodes an image by; none: 20."""
    k2: Count | None = None
    """Neighbours whose encodings re-ranking averages, 1 for no average; none: 6."""
    cache: PathText | None = None
    """Folder for a memory-mapped cache of the resized images; none: no cache."""
    devices: Count | None = None
    """Devices of each machine, with a process on each; none: as torchrun or srun started, else one."""
    nodes: Count | None = None
    """Machines that score together; none: as torchrun or srun started, else one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rerank and (self.k1, self.k2) != (None, None):
            raise ValueError(
                f"got k1={self.k1}, k2={self.k2} without rerank; only re-ranking reads them: give --rerank"
            )

    def open_device(self, accelerator: str, precision: Precision) -> Fabric:
        """Open the device, or several with a process on each."""
        return open_devices(accelerator, precision, self.devices, self.nodes)

    def of_protocol(self) -> dict[str, Any]:
        """The options of the data set's protocol that were given."""
        options = {"mode": self.mode, "shots": self.shots, "draw": self.draw, "trials": self.trials}
        return {name: value for name, value in options.items() if value is not None}

    def conditions(self, trained: Trained) -> Conditions:
        """The conditions of scoring an opened network with these options."""
        return Conditions(
            rerank=self.rerank,
            k1=(self.k1 or reranking.K1) if self.rerank else None,
            k2=(self.k2 or reranking.K2) if self.rerank else None,
            skip_unreadable=self.skip_unreadable,
            precision=trained.precision,
            backend=trained.backend,
            device=trained.fabric.device.type,
        )


@check_arguments
def score_checkpoint(
    checkpoint: AnyPath,
    data: AnyPath,
    *,
    model: nn.Module | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score a checkpoint by its data set's protocol, and write the result beside it as JSON.

    The file's name says what was measured (see `results.result_name`), so that no result replaces one of
    another measurement. A run may be scored while it trains; the result names the step of the checkpoint.

    SYSU-MM01 searches the visible gallery for infrared queries; RegDB and LLCM are scored in both directions.
    A score is the mean over the trials, with their sample standard deviation. The headline is the paper's way
    to compare F and F₊; the two others of `pairings` are under "pairings" of each search. A warning is logged
    where the crossed pairing scores far above the headline. Under "distances" are the mean distances of the
    search's visible-infrared pairs of images, of one person ("intra") and of two ("inter"), and the paper's δ
    (Figure 5), their difference. Features have length 1 for these.

    On several devices, the processes share images and trials, the first one writes the result, and all return
    it. The scores are those of one process.

    Args:
        checkpoint: the file that `mrcn-fast train` wrote, or its folder
        data: root of the data set's tree
        model: the network, where the run trained one of your own; it gets the checkpoint's weights
        progress: bars to add to; by default this function shows its own
        options: the fields of `ScoringOptions`

    Returns:
        the result, with its file as "path"

    Raises:
        CheckpointError: where the checkpoint or, unless `other_data`, the data set isn't the training's
        DatasetError, ValueError: for options that the data set doesn't have, and where the readable images
            are too few
        OSError: where the checkpoint's folder or the cache's can't be written to
        MemoryShortageError: where an allocation fails

    All but the last are raised before anything is computed.

    Example:
        >>> config = TrainConfig(data="data/regdb", dataset="regdb", out="runs/scored", depth=18,
        ...     height=64, width=32, identities=2, images=2, steps=2, workers=0)
        >>> result = score_checkpoint(Trainer(config).fit(), "data/regdb")
        >>> list(result["searches"])
        ['visible-to-infrared', 'infrared-to-visible']
    """
    chosen = ScoringOptions(**options)
    if chosen.cache is not None:
        check_folder(chosen.cache, "the cache")
    trained = chosen.open(checkpoint, data, model)
    with Processes(trained.fabric).together():
        return _written_scores(trained, chosen, data, progress)


def _written_scores(
    trained: Trained, chosen: ScoringOptions, data: AnyPath, progress: Progress | None
) -> dict[str, Any]:
    """Score an opened network, and write the result beside its checkpoint."""
    searches = searches_of(trained.dataset, chosen.of_protocol())
    check_folder(trained.path.parent, "the scores beside the checkpoint")
    conditions = chosen.conditions(trained)
    _check_neighbours(searches, conditions)
    result = outline(trained.state, trained.dataset, searches, conditions)
    written = trained.path.with_name(result_name(result, trained.path.stem))
    with progress_bars() if progress is None else nullcontext(progress) as bars:
        scored, unreadable = score_searches(trained, searches, chosen, bars)
    for search, scores in zip(searches, scored, strict=True):
        result["searches"][search.name] |= scores
    result |= {
        "headline": searches[0].name,
        "unreadable": sorted(map(str, unreadable)),
        "checkpoint": str(trained.path),
        "epoch": trained.state.epoch,
        "data": str(data),
        "path": str(written),
    }
    processes = Processes(trained.fabric)
    if processes.first:
        write_json(written, result)
    processes.wait()
    return result


def score_searches(
    trained: Trained, searches: Sequence[Search], options: ScoringOptions, bars: Progress
) -> tuple[list[dict[str, Any]], set[Path]]:
    """Score an opened network by searches, and log a warning where training exchanged the modalities.

    Returns:
        the scores of each search as they stand in a result, and the unreadable images that were left out

    Raises:
        DatasetError, ValueError: where an image can't be read or, left out, leaves too few
        MemoryShortageError: where an allocation fails
    """
    conditions = options.conditions(trained)
    samples, unreadable = _readable_images(searches, options)
    kept = [without(search, unreadable) for search in searches]
    _check_neighbours(kept, conditions)
    tables = _feature_tables(trained, samples, _cache_name(searches), options, bars)
    scored = _score_searches(trained, kept, tables, conditions)
    for search, scores in zip(searches, scored, strict=True):
        if warning := exchange(_rank1(scores)):
            log.warning("%s, %s: %s", trained.path, search.name, warning)
    return scored, unreadable


def outline(
    state: Checkpoint, dataset: PersonDataset, searches: Sequence[Search], conditions: Conditions
) -> dict[str, Any]:
    """Return a result without its scores: everything that says what is measured."""
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
    """Raise ValueError where re-ranking wants more neighbours than a search has images."""
    if conditions.k1 is None or conditions.k2 is None:
        return
    for search in searches:
        for gallery in search.galleries:
            reranking.check_neighbours(len(search.query), len(gallery), conditions.k1, conditions.k2)


class _Trial(NamedTuple):
    """The scores of one trial by pairing, and its mean distances within and between people, and δ."""

    scores: dict[Pairing, dict[str, Any]]
    distances: dict[str, float]


class _FeatureTable:
    """The features of images, found by the path of the image."""

    def __init__(self, samples: Sequence[Sample], features: Tensor) -> None:
        self._rows = {sample.path: row for row, sample in enumerate(samples)}
        self._features = features

    def of(self, samples: Iterable[Sample]) -> Tensor:
        return self._features[[self._rows[sample.path] for sample in samples]]


def _readable_images(
    searches: Sequence[Search], options: ScoringOptions
) -> tuple[dict[Modality, list[Sample]], set[Path]]:
    """The images of the searches by modality, and the paths of those left out as unreadable."""
    samples = images_by_modality(searches)
    return only_readable(samples, workers=options.workers) if options.skip_unreadable else (samples, set())


def _feature_tables(
    trained: Trained,
    samples: Mapping[Modality, Sequence[Sample]],
    cache_name: str,
    options: ScoringOptions,
    bars: Progress,
) -> dict[Modality, _FeatureTable]:
    """Extract the features of the images of each modality."""
    tables: dict[Modality, _FeatureTable] = {}
    for modality, images in samples.items():
        source: Dataset[Tensor] | None = None
        if options.cache is not None:
            config, dataset = trained.config, trained.dataset
            source = cached(
                images,
                (config.height, config.width),
                filter=config.filter,
                folder=options.cache,
                name=f"{dataset.name}-split{dataset.split}-{cache_name}-{modality}",
                workers=options.workers,
            )
        features = options.features(trained, images, modality, bars, source)
        tables[modality] = _FeatureTable(images, features)
    return tables


def _score_searches(
    trained: Trained,
    searches: Sequence[Search],
    tables: Mapping[Modality, _FeatureTable],
    conditions: Conditions,
) -> list[dict[str, Any]]:
    """Score each search by all pairings that the network's features have."""
    less = "Less is needed without --rerank, with fewer --shots or by a smaller --mode"
    pairings = pairings_of(len(test_sets_of(trained.model)))
    trials = [(search, gallery) for search in searches for gallery in search.galleries]
    processes = Processes(trained.fabric)
    with enough_memory("the distances of queries and gallery images", less):
        rows = iter(
            processes.each(lambda trial: _score_gallery(*trial, tables, conditions, pairings), trials)
        )
    return [_search_scores(search, [next(rows) for _ in search.galleries]) for search in searches]


def _score_gallery(
    search: Search,
    gallery: Sequence[Sample],
    tables: Mapping[Modality, _FeatureTable],
    conditions: Conditions,
    pairings: Sequence[Pairing],
) -> _Trial:
    """Score one trial of a search by each pairing, and measure its distances within and between people."""
    images = {search.query[0].modality: search.query, gallery[0].modality: gallery}
    found = {modality: tables[modality].of(side) for modality, side in images.items()}
    query, features = found.values()
    scores = {
        pairing: score_trial(
            _distance(*paired(query, features, pairing), conditions), search.query, gallery, search.protocol
        )
        for pairing in pairings
    }
    apart = distances_of(images, found)
    return _Trial(scores, {"intra": apart.intra_mean, "inter": apart.inter_mean, "delta": apart.delta})


def _search_scores(search: Search, trials: Sequence[_Trial]) -> dict[str, Any]:
    """The scores of a search by the paper's pairing and, under "pairings", by the others.

    "distances" are those of Figure 5, over the pairs of query and gallery images.
    """
    rows = {pairing: [trial.scores[pairing] for trial in trials] for pairing in trials[0].scores}
    headline = rows.pop(HEADLINE_PAIRING)
    return {
        "queries": len(search.query),
        "valid_queries": [row["valid_queries"] for row in headline],
        "gallery_images": [len(gallery) for gallery in search.galleries],
        **_over_trials(headline),
        "per_trial": headline,
        "pairings": {pairing: _over_trials(rows) for pairing, rows in rows.items()},
        "distances": _mean_distances([trial.distances for trial in trials]),
    }


def _mean_distances(trials: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Means over the trials, None where no pair of images is of one person, or none of two people."""
    means = {name: statistics.fmean(trial[name] for trial in trials) for name in trials[0]}
    return {name: None if math.isnan(mean) else mean for name, mean in means.items()}


def _distance(query: Tensor, gallery: Tensor, conditions: Conditions) -> Tensor:
    """Return the field's distance, minus the dot product, or the re-ranked distance."""
    if conditions.k1 is None or conditions.k2 is None:
        return -(query @ gallery.T)
    return reranking.rerank(query, gallery, k1=conditions.k1, k2=conditions.k2)


def _over_trials(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation of the scores over the trials; the latter is 0 for one trial."""
    values = {name: [row[name] for row in rows] for name in HEADLINE}
    return {
        "mean": {name: statistics.fmean(of_trials) for name, of_trials in values.items()},
        "std": {
            name: statistics.stdev(of_trials) if len(rows) > 1 else 0.0 for name, of_trials in values.items()
        },
    }


def _rank1(search: Mapping[str, Any]) -> dict[str, float]:
    """The rank-1 of a search by each pairing."""
    others = {pairing: scores["mean"]["rank1"] for pairing, scores in search["pairings"].items()}
    return {HEADLINE_PAIRING: search["mean"]["rank1"], **others}


def score_trial(
    distance: Tensor, query: Sequence[Sample], gallery: Sequence[Sample], protocol: str
) -> dict[str, Any]:
    """Score one trial from its (queries, gallery) distances: shares of 1 by the names in `HEADLINE`."""
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
