"""Scoring a checkpoint on a data set's test images: `mrcn-fast test`."""

from __future__ import annotations

import inspect
import logging
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from mrcn_fast.block import MODALITIES
from mrcn_fast.files import write_json
from mrcn_fast.memory import enough_memory
from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.console import progress_bars
from mrcn_fast.reid.data import open_dataset, recognize
from mrcn_fast.reid.data.cache import cached
from mrcn_fast.reid.data.images import check_left, readable
from mrcn_fast.reid.data.types import Modality, PersonDataset, Sample, Search
from mrcn_fast.reid.devices import open_fabric, serving_backend
from mrcn_fast.reid.evaluation import reranking
from mrcn_fast.reid.evaluation.extraction import extract
from mrcn_fast.reid.evaluation.pairings import (
    HEADLINE_PAIRING,
    TITLES,
    Pairing,
    exchange,
    paired,
    pairings_of,
)
from mrcn_fast.reid.evaluation.results import HEADLINE, result_name, slug
from mrcn_fast.reid.evaluation.scores import score
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
from mrcn_fast.reid.models.network import ReIDModel, use_layout
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.checkpoint import (
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointError,
    build_model,
    check_data,
    content_digest,
    data_identity,
    fingerprint,
    load_checkpoint,
)
from mrcn_fast.reid.training.config import TrainConfig

log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A checkpoint's network, ready to give features, and the data set it is looked at on."""

    path: Path
    state: Checkpoint
    config: TrainConfig
    dataset: PersonDataset
    model: ReIDModel
    fabric: Fabric
    precision: Precision  # what the network computes in here; `config` has the training's
    backend: str  # what serves its blocks here, "" without blocks

    def features(
        self,
        samples: Sequence[Sample],
        modality: Modality,
        *,
        batch_size: int = 64,
        workers: int = 0,
        images: Dataset[Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Test features of images of one modality, in their order: (n, `model.feature_size`), float32, CPU.

        `model.test_sets` names the equal chunks of a feature. `images` stands in for the files, such as a
        cache of them. Raises ValueError for a sample of another modality, DatasetError for an image that
        can't be read, MemoryShortageError where an allocation fails.
        """
        advance = None
        if progress is not None:
            task = progress.add_task(f"{modality} features", total=len(samples), status="")
            advance = partial(progress.advance, task)
        less = "Less is needed for a smaller --batch_size and for fewer --workers"
        with enough_memory(f"{modality} features in batches of {batch_size}", less):
            return extract(
                self.model,
                samples,
                modality,
                self.config,
                fabric=self.fabric,
                batch_size=batch_size,
                workers=workers,
                images=images,
                advance=advance,
            )


@check_arguments
def open_trained(
    checkpoint: AnyPath,
    data: AnyPath,
    *,
    split: Split | None = None,
    other_data: bool = False,
    backend: BackendName | None = None,
    accelerator: str = "auto",
    precision: Precision | None = None,
    permutations: AnyPath | None = None,
) -> Trained:
    """The network of a checkpoint (the file, or the folder it is in) beside the data set under `data`.

    `split` is only checked: a model is looked at on the split it was trained on. The network computes in
    `precision`, by default the one it was trained in. Raises CheckpointError where the checkpoint can't be
    used, is of another split or, unless `other_data`, of another data set; ConfigError and BackendError for
    an accelerator, a precision or a backend that is not to be had here.
    """
    path = Path(checkpoint)
    path = path / CHECKPOINT_NAME if path.is_dir() else path
    state = load_checkpoint(path)
    config = state.config
    precision = precision or config.precision
    fabric = open_fabric(accelerator, precision)
    serving = serving_backend(config, backend, fabric, precision)
    if split is not None and split != state.data.split:
        raise CheckpointError(
            f"{path}: expected a checkpoint of split {split}, found one of split {state.data.split}: its "
            f"training images are test images of other splits. Give the checkpoint trained on split {split}"
        )
    found = recognize(data)
    if found != config.dataset and not other_data:
        raise CheckpointError(
            f"{path}: this checkpoint belongs to another data set: expected a tree of {config.dataset}, "
            f"found one of {found} at {data}. Give the tree it was trained on, or ask for --other_data"
        )
    dataset = open_dataset(
        found, data, split=state.data.split if found == "regdb" else 1, permutations=permutations
    )
    if not other_data:
        check_data(path, state, data_identity(dataset, dataset.training()))
    model = build_model(path, state, backend)
    use_layout(model, config.channels_last)
    fabric.to_device(model)
    return Trained(path, state, config, dataset, model, fabric, precision, serving)


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
    samples = _by_modality(searches)
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


def search_fingerprint(dataset: PersonDataset, search: Search) -> str:
    """Of which images a search's scores are: `fingerprint` of the query and of each trial's gallery."""
    return fingerprint(dataset.root, chain(search.query, *search.galleries))


def _cache_name(searches: Sequence[Search]) -> str:
    return slug(["test", *(search.name for search in searches), searches[0].settings])


def searches_of(dataset: PersonDataset, options: dict[str, Any]) -> list[Search]:
    """The searches of a data set's protocol. ValueError for an option that its protocol hasn't."""
    known = inspect.signature(dataset.searches).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{dataset.name}'s protocol has no {', '.join(unknown)}; "
            + (f"it has {', '.join(known)}" if known else "nothing in it is to be chosen")
        )
    return dataset.searches(**options)


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


def _by_modality(searches: Sequence[Search]) -> dict[Modality, list[Sample]]:
    """Each image of the searches once, by modality: trials and directions share most of them.

    Raises ValueError where a search doesn't go from one modality to the other.
    """
    found: dict[Modality, dict[Path, Sample]] = {}
    for search in searches:
        gallery = [sample for trial in search.galleries for sample in trial]
        sides = [{sample.modality for sample in side} for side in (search.query, gallery)]
        if not all(len(side) == 1 and side <= set(MODALITIES) for side in sides) or sides[0] == sides[1]:
            raise ValueError(
                f"{search.name}: got a query of {_names(sides[0])} and a gallery of {_names(sides[1])} "
                "images, expected one modality against the other"
            )
        for sample in (*search.query, *gallery):
            found.setdefault(sample.modality, {})[sample.path] = sample
    return {modality: list(images.values()) for modality, images in found.items()}


def _names(modalities: set[Modality]) -> str:
    return " and ".join(sorted(map(str, modalities))) or "no"


def only_readable(
    samples: Mapping[Modality, Sequence[Sample]], *, workers: int = 0
) -> tuple[dict[Modality, list[Sample]], set[Path]]:
    """The test images that can be read, by modality, and the paths of those that can't.

    `readable` logs the latter. Raises DatasetError where no identity has images of both modalities left.
    """
    every = [sample for images in samples.values() for sample in images]
    kept, unreadable = readable(every, workers=workers)
    check_left(kept, unreadable, "test")
    by_modality = {m: [sample for sample in kept if sample.modality == m] for m in samples}
    return by_modality, {sample.path for sample in unreadable}


def without(search: Search, unreadable: Collection[Path]) -> Search:
    """A search without the images at these paths.

    Raises DatasetError where a gallery is left in which nobody is searched for, or no query.
    """

    if not unreadable:
        return search

    def kept(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(sample for sample in samples if sample.path not in unreadable)

    left = search._replace(query=kept(search.query), galleries=tuple(map(kept, search.galleries)))
    for before, after in zip(search.galleries, left.galleries, strict=True):
        lost = [sample for sample in (*search.query, *before) if sample.path in unreadable]
        check_left((*left.query, *after), lost, "test")
    return left


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


def describe(result: dict[str, Any]) -> str:
    """A result in a few lines: what was measured, then the figures in percent, mean ± standard deviation."""
    names = {"rank1": "Rank-1", "rank10": "Rank-10", "rank20": "Rank-20"}
    lines = []
    for name, search in result["searches"].items():
        trials = search["trials"]
        described = [f"{result['dataset']}, split {result['split']}", name, search["settings"]]
        if result["rerank"]:
            described.append(f"re-ranked with k1={result['k1']} and k2={result['k2']}")
        described.append(f"{trials} trial{'s' * (trials > 1)}")
        described += [
            f"{_range(search['valid_queries'])} of {search['queries']} queries valid",
            f"{_range(search['gallery_images'])} gallery images",
        ]
        lines.append(", ".join(filter(None, described)))
        lines += [
            f"  {names.get(key, key):8s}{100 * search['mean'][key]:6.2f} ± {100 * search['std'][key]:.2f}"
            for key in HEADLINE
        ]
        lines += [
            f"  {TITLES[pairing]}: "
            + ", ".join(f"{names.get(key, key)} {100 * scores['mean'][key]:.2f}" for key in ("rank1", "mAP"))
            for pairing, scores in search["pairings"].items()
        ]
    served = f", backend {result['backend']}" if result["backend"] else ""
    lines.append(f"computed in {result['precision']} on {result['device']}{served}")
    if result["unreadable"]:
        lines.append(f"left out {len(result['unreadable'])} images that can't be read, named in the result")
    return "\n".join([*lines, f"written to {result['path']}"])


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"
