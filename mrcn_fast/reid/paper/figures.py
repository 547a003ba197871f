"""The paper's Figures 5 and 6 of trained networks: `mrcn-fast figures`."""

from __future__ import annotations

import inspect
import logging
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import Field
from rich.progress import Progress
from torch import Tensor

from mrcn_fast.files import write_atomically, write_json
from mrcn_fast.memory import enough_memory
from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.console import progress_bars
from mrcn_fast.reid.data import PersonImages
from mrcn_fast.reid.data.types import Modality, PersonDataset, Sample, Search
from mrcn_fast.reid.evaluation.protocol import only_readable, search_fingerprint, searches_of, without
from mrcn_fast.reid.evaluation.results import check_free
from mrcn_fast.reid.evaluation.scores import skipped_images
from mrcn_fast.reid.evaluation.trained import Trained, open_trained
from mrcn_fast.reid.kinds import NUMPY, BackendName, Count, PathText, Precision, Split, Workers
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.paper import plots
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.checkpoint import content_digest, fingerprint
from mrcn_fast.reid.training.config import TrainConfig

TITLES = {"baseline": "baseline", "snr": "SNR", "mrm": "MRM", "mcm": "MCM", "mrcn": "MRCN"}
INITIAL = "initial"

PICTURES = ("distances.png", "tsne.png", "ranking.png")

_LISTED = 10  # images of a ranking list
_THUMBNAIL = 192  # pixels of an image's height in it

_log = logging.getLogger(__name__)


@check_arguments
def make_figures(
    checkpoints: Sequence[PathText],
    data: PathText,
    out: PathText = "runs/figures",
    *,
    people: Count = 20,
    queries: Count = 4,
    query_paths: Sequence[PathText] | None = None,
    initial: bool = False,
    seed: Annotated[int, Field(ge=0, le=2**32 - 1), NUMPY] = 0,
    permutations: PathText | None = None,
    split: Split | None = None,
    other_data: bool = False,
    skip_unreadable: bool = False,
    backend: BackendName | None = None,
    accelerator: str = "auto",
    precision: Precision | None = None,
    batch_size: Count = 64,
    workers: Workers = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw the paper's Figures 5 and 6 for some checkpoints of one data set, and write their numbers.

    Under `out`: distances.png, the distances of all visible-infrared pairs of test images, of one person and
    of two, with their means and δ; tsne.png, the t-SNE map of some people; ranking.png, the first ten gallery
    images of some queries of the headline search (SYSU-MM01: all-search, multi-shot, the first draw), without
    those that the protocol skips; figures.json, the numbers in all of them.

    Args:
        checkpoints: files that `mrcn-fast train` wrote, or their folders; a column or block each
        data: root of the data set's tree
        out: folder for the figures
        people: how many are drawn by `seed` for the t-SNE map
        queries: how many are drawn by `seed` for the ranking lists, each of another person
        query_paths: query images of the ranking lists in place of drawn ones, by their paths' ends
        initial: a first column for the network of the first checkpoint before its training
        seed: of people, queries and the t-SNE map
        permutations: path of SYSU-MM01's rand_perm_cam.mat: lists are of the official draw then
        split: refuse a checkpoint of another split than this
        other_data: take a tree other than the one trained on, which is refused else
        skip_unreadable: leave out images that can't be read, named and counted, which are an error else
        backend: backend of the block; none: the best that serves
        accelerator: where to compute, as lightning-fabric names it
        precision: what to compute in, as lightning-fabric names it; none: as each checkpoint was trained
        batch_size: images a pass
        workers: processes that decode images; 0: this one
        overwrite: replace figures of other networks, images or values in `out`, which is refused else
        progress: bars to add to, in place of own ones

    Returns what figures.json holds, and the files as "files". Raises CheckpointError and DatasetError as
    scoring does, ValueError for query paths that are not among the queries that are left, and ResultError,
    before anything is computed, for other figures in `out`.
    """
    if not checkpoints:
        raise ValueError("got checkpoints=[], expected at least one")
    check_folder(out, "the figures")
    opened = [
        open_trained(
            path,
            data,
            split=split,
            other_data=other_data,
            backend=backend,
            accelerator=accelerator,
            precision=precision,
            permutations=permutations,
        )
        for path in ([checkpoints[0]] if initial else []) + list(checkpoints)
    ]
    if initial:
        _forget_training(opened[0])
    titles = _titles(opened, initial)
    dataset = opened[0].dataset
    search = _ranked_search(dataset, permutations)
    images = all_test_images(dataset)
    unreadable: set[Path] = set()
    if skip_unreadable:
        images, unreadable = only_readable(images, workers=workers)
        search = without(search, unreadable)
    subject = _Subject(
        images,
        choose_people(images, people, seed),
        search,
        choose_queries(search, queries, query_paths, seed),
    )
    folder = Path(out)
    record = folder / "figures.json"
    made_of = _made_of(subject, dataset, dict(zip(titles, opened, strict=True)), seed)
    made_of |= {"skip_unreadable": skip_unreadable}
    if not overwrite:
        check_free(record, [folder / name for name in PICTURES], made_of)
    columns: dict[str, _Column] = {}
    with progress_bars() if progress is None else nullcontext(progress) as bars:
        task = bars.add_task("figures", total=len(opened), status="")
        for title, trained in zip(titles, opened, strict=True):
            bars.update(task, status=title)
            features = {
                modality: trained.features(
                    samples, modality, batch_size=batch_size, workers=workers, progress=bars
                )
                for modality, samples in images.items()
            }
            with enough_memory("the distances of all test images", "Less is needed on a smaller data set"):
                columns[title] = _column(subject, features, seed)
            bars.advance(task)
    folder.mkdir(parents=True, exist_ok=True)
    figures = _drawn(subject, columns, opened[0].config)
    # Never the numbers of other pictures beside these.
    record.unlink(missing_ok=True)
    for name, figure in zip(PICTURES, figures, strict=True):
        _save(figure, folder / name)
    result = (
        {"made_of": made_of}
        | _numbers(subject, dataset, seed)
        | {
            "unreadable": sorted(map(str, unreadable)),
            "columns": {
                title: {
                    "checkpoint": str(trained.path),
                    "step": 0 if title == INITIAL else trained.state.step,
                    "precision": trained.precision,
                }
                | _column_numbers(subject, columns[title])
                for title, trained in zip(titles, opened, strict=True)
            },
        }
    )
    write_json(record, result)
    return result | {"files": [str(folder / name) for name in (*PICTURES, record.name)]}


class _Subject(NamedTuple):
    """What all columns show: the test images by modality, the map's people, a search, rows of its query."""

    images: dict[Modality, list[Sample]]
    people: set[int]
    search: Search
    queries: list[int]

    def mapped(self) -> list[tuple[Modality, int]]:
        """Modality and row of the images in the t-SNE map, in its order."""
        return [
            (modality, row)
            for modality, samples in self.images.items()
            for row, sample in enumerate(samples)
            if sample.identity in self.people
        ]

    def query(self) -> list[Sample]:
        return [self.search.query[row] for row in self.queries]


class _Column(NamedTuple):
    """What one network gives for it."""

    distances: plots.Distances
    points: NDArray[np.float32]
    ranking: plots.Ranking


def _column(subject: _Subject, features: Mapping[Modality, Tensor], seed: int) -> _Column:
    images, gallery = subject.images, subject.search.galleries[0]
    apart = plots.distances(
        features["visible"],
        _identities(images["visible"]),
        features["infrared"],
        _identities(images["infrared"]),
    )
    points = plots.tsne_map(torch.stack([features[m][row] for m, row in subject.mapped()]), seed=seed)
    places = {s.path: (m, row) for m, samples in images.items() for row, s in enumerate(samples)}
    query, found = (
        torch.stack([features[m][row] for m, row in (places[sample.path] for sample in side)])
        for side in (subject.query(), gallery)
    )
    lists = plots.ranking(-(query @ found.T), **_labels(subject.search, subject.query()), count=_LISTED)
    return _Column(apart, points, lists)


def _drawn(subject: _Subject, columns: Mapping[str, _Column], config: TrainConfig) -> tuple[Figure, ...]:
    """The figures in the order of PICTURES; images in lists have the shape that `config` gives them."""
    mapped = [subject.images[modality][row] for modality, row in subject.mapped()]
    size = (_THUMBNAIL, max(1, round(_THUMBNAIL * config.width / config.height)))
    return (
        plots.draw_distances({title: c.distances for title, c in columns.items()}),
        plots.draw_tsne(
            {title: c.points for title, c in columns.items()},
            [sample.identity for sample in mapped],
            [sample.modality == "infrared" for sample in mapped],
        ),
        plots.draw_rankings(
            {title: _rows(subject, c.ranking, size) for title, c in columns.items()}, count=_LISTED
        ),
    )


def _made_of(
    subject: _Subject, dataset: PersonDataset, opened: Mapping[str, Trained], seed: int
) -> dict[str, Any]:
    """What tells these figures from others, before anything is computed."""
    return {
        "networks": {title: content_digest(trained.state.model) for title, trained in opened.items()},
        "precision": [trained.precision for trained in opened.values()],
        "backend": [trained.backend for trained in opened.values()],
        "device": [trained.fabric.device.type for trained in opened.values()],
        "images": fingerprint(dataset.root, chain(*subject.images.values())),
        "search": [subject.search.name, subject.search.settings, search_fingerprint(dataset, subject.search)],
        "people": sorted(subject.people),
        "queries": subject.queries,
        "seed": seed,
    }


def all_test_images(dataset: PersonDataset) -> dict[Modality, list[Sample]]:
    """All images that a data set's searches can see, by modality, sorted by identity, camera and path."""
    options = {"shots": sys.maxsize, "trials": 1}
    known = inspect.signature(dataset.searches).parameters
    searches = dataset.searches(**{name: value for name, value in options.items() if name in known})
    samples = {s for search in searches for s in (*search.query, *search.galleries[0])}
    ordered = sorted(samples, key=lambda s: (s.identity, s.camera, str(s.path)))
    modalities: tuple[Modality, ...] = ("visible", "infrared")
    return {modality: [s for s in ordered if s.modality == modality] for modality in modalities}


def choose_people(images: Mapping[Modality, Sequence[Sample]], people: int, seed: int) -> set[int]:
    """Identities with images of both modalities, drawn by `seed`; all, with a warning, if there are fewer."""
    both = sorted(set.intersection(*({s.identity for s in side} for side in images.values())))
    if len(both) < people:
        _log.warning("the t-SNE map shows all %d test people; %d were asked for", len(both), people)
    return set(random.Random(seed).sample(both, min(people, len(both))))


def choose_queries(search: Search, queries: int, paths: Sequence[str] | None, seed: int) -> list[int]:
    """Rows of `search.query`: those whose paths end so, or drawn by `seed`, each of another person.

    Only queries with a match in the first gallery are drawn; of fewer people than asked for, all. Raises
    ValueError for a path that no query's, or more than one's, ends with.
    """
    if paths is not None:
        return [_query_named(search, path) for path in paths]
    labels = _labels(search, search.query)
    own = labels["query_ids"][:, None] == labels["gallery_ids"]
    matched = (own & ~skipped_images(**labels)).any(dim=1)
    rows = torch.nonzero(matched).flatten().tolist()
    random.Random(seed).shuffle(rows)
    first = {search.query[row].identity: row for row in reversed(rows)}
    chosen = [row for row in rows if first[search.query[row].identity] == row][:queries]
    if not chosen:
        raise ValueError(f"{search.name}: no query has a match in the gallery, so there is no list to show")
    return chosen


def _query_named(search: Search, path: str) -> int:
    parts = Path(path).parts
    rows = [row for row, s in enumerate(search.query) if Path(s.path).parts[-len(parts) :] == parts]
    if len(rows) != 1:
        example = search.query[0].path
        raise ValueError(
            f"{path}: expected a path, or its end, of one query of {search.name}, such as {example}; found "
            f"{len(rows)} queries of that name"
        )
    return rows[0]


def _ranked_search(dataset: PersonDataset, permutations: str | None) -> Search:
    """The headline search; SYSU-MM01's as in the paper's Figure 6, in the multi-shot setting."""
    options: dict[str, Any] = {}
    if dataset.name == "sysu-mm01":
        draw = "random" if permutations is None else "official"
        options = {"mode": "all", "shots": 10, "draw": draw, "trials": 1}
    return searches_of(dataset, options)[0]


def _forget_training(trained: Trained) -> None:
    """Put a network back to where its training began: its seed's weights, and the ImageNet weights given."""
    config = trained.config
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = ReIDModel(len(trained.state.data.identities), **config.model_arguments())
    if config.weights is not None:
        model.trunk.load_imagenet(config.weights)
    trained.model.load_state_dict(model.state_dict())


def _titles(opened: Sequence[Trained], initial: bool) -> list[str]:
    """A column's title is its model's; where that is not one column's alone, with the run's folder."""
    titles = [_title(trained.config) for trained in opened]
    if initial:
        titles[0] = INITIAL
    titles = [
        f"{title}, {trained.path.parent.name}" if titles.count(title) > 1 else title
        for title, trained in zip(titles, opened, strict=True)
    ]
    return [
        f"{title} ({titles[: place + 1].count(title)})" if titles.count(title) > 1 else title
        for place, title in enumerate(titles)
    ]


def _title(config: TrainConfig) -> str:
    title = TITLES[config.model] + "-P" * (config.parts > 1)
    has_cqc = config.model in ("mrcn", "mrm", "mcm")
    return f"{title} without CQC" if has_cqc and config.cqc_weight == 0 else title


def _identities(samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([sample.identity for sample in samples])


def _labels(search: Search, query: Sequence[Sample]) -> dict[str, Any]:
    """What decides which images of the first gallery match or are skipped, as `skipped_images` takes it."""
    gallery = search.galleries[0]
    return {
        "query_ids": _identities(query),
        "gallery_ids": _identities(gallery),
        "query_cameras": torch.tensor([sample.camera for sample in query]),
        "gallery_cameras": torch.tensor([sample.camera for sample in gallery]),
        "protocol": search.protocol,
    }


def _rows(subject: _Subject, lists: plots.Ranking, size: tuple[int, int]) -> list[plots.Row]:
    def pictures(samples: Sequence[Sample]) -> list[NDArray[np.uint8]]:
        images = PersonImages(samples, size)
        return [images[place].permute(1, 2, 0).numpy() for place in range(len(samples))]

    rows = []
    for query, order, correct in zip(subject.query(), lists.order, lists.correct, strict=True):
        found = [subject.search.galleries[0][place] for place in order if place >= 0]
        name = f"person {query.identity}\ncamera {query.camera}"
        rows.append(plots.Row(name, pictures([query])[0], pictures(found), correct.tolist()))
    return rows


def _numbers(subject: _Subject, dataset: PersonDataset, seed: int) -> dict[str, Any]:
    search = subject.search
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "data": str(dataset.root),
        "seed": seed,
        "test_images": {modality: len(samples) for modality, samples in subject.images.items()},
        "tsne_people": sorted(subject.people),
        "tsne_images": [str(subject.images[modality][row].path) for modality, row in subject.mapped()],
        "search": {"name": search.name, "settings": search.settings, "gallery": len(search.galleries[0])},
        "queries": [str(sample.path) for sample in subject.query()],
    }


def _column_numbers(subject: _Subject, column: _Column) -> dict[str, Any]:
    gallery, apart = subject.search.galleries[0], column.distances
    lists = [
        [
            {"path": str(gallery[place].path), "identity": gallery[place].identity, "correct": bool(same)}
            for place, same in zip(order, correct, strict=True)
            if place >= 0
        ]
        for order, correct in zip(*column.ranking, strict=True)
    ]
    return {
        "intra_mean": apart.intra_mean,
        "inter_mean": apart.inter_mean,
        "delta": apart.delta,
        "pairs": {"intra": int(apart.intra.sum()), "inter": int(apart.inter.sum())},
        "tsne": column.points.round(3).tolist(),
        "ranking": lists,
    }


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
