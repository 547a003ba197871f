"""`mrcn-fast figures`: the paper's Figures 5 and 6 for trained networks."""

from __future__ import annotations

import inspect
import logging
import math
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
from mrcn_fast.reid.evaluation.distances import Distances, distances_of
from mrcn_fast.reid.evaluation.protocol import only_readable, search_fingerprint, searches_of, without
from mrcn_fast.reid.evaluation.results import check_free
from mrcn_fast.reid.evaluation.scores import skipped_images
from mrcn_fast.reid.evaluation.trained import EvaluationOptions, Trained
from mrcn_fast.reid.kinds import NUMPY, Count, PathText
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.paper import plots
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.checkpoint import CheckpointError, content_digest
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.data_identity import fingerprint
from mrcn_fast.reid.training.initial import begin, check_initial
from mrcn_fast.reid.training.restoring import other_weights

TITLES = {"baseline": "baseline", "snr": "SNR", "mrm": "MRM", "mcm": "MCM", "mrcn": "MRCN"}
INITIAL = "initial"

PICTURES = ("distances.png", "tsne.png", "ranking.png")

LISTED = 10  # number of images in a ranking list
_THUMBNAIL = 192  # height of its images in pixels

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FigureOptions(EvaluationOptions):
    """What the figures show, and how the networks are opened. Raises SettingError for a value that is unfit.

    With `permutations`, the ranking lists of SYSU-MM01 are of the official gallery draw.
    """

    people: Count = 20
    """People in the t-SNE map, drawn by `seed`."""
    queries: Count = 4
    """Queries with a ranking list, each of another person, drawn by `seed`."""
    query_paths: Sequence[PathText] | None = None
    """Query images of the ranking lists in place of drawn ones, by the ends of their paths."""
    initial: bool = False
    """Add a first column for the network of the first checkpoint before its training."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1), NUMPY] = 0
    """Seed of people, queries and the t-SNE map."""
    overwrite: bool = False
    """Replace figures of other networks, images or values in `out`, which is refused otherwise."""


@check_arguments
def make_figures(
    checkpoints: Sequence[PathText],
    data: PathText,
    out: PathText = "runs/figures",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Draw the paper's Figures 5 and 6 for checkpoints of one data set and split, with their numbers.

    Writes under `out`:
      - distances.png, the distances of all visible-infrared pairs of test images, of one person and of two,
        with their means and δ;
      - tsne.png, the t-SNE map of some people;
      - ranking.png, the first ten gallery images of some queries of the headline search (SYSU-MM01:
        all-search, multi-shot, the first draw), without the images that the protocol skips;
      - figures.json, the numbers of all three.

    Args:
        checkpoints: files that `mrcn-fast train` wrote, or their folders; each is a column or block
        data: root of the data set's tree
        out: folder for the figures
        progress: bars to add to; by default this function shows its own
        options: the fields of `FigureOptions`

    Returns:
        the content of figures.json, and the paths of all files as "files"

    Raises:
        CheckpointError, DatasetError: as `score_checkpoint` raises them; CheckpointError too for checkpoints
            of several splits
        ValueError: for query paths that name no readable query, and for people with fewer than three images
        ResultError: before anything is computed, for other figures in `out`
    """
    chosen = FigureOptions(**options)
    if not checkpoints:
        raise ValueError("got checkpoints=[], expected at least one")
    check_folder(out, "the figures")
    networks = _open_networks(checkpoints, data, chosen)
    config = next(iter(networks.values())).config
    subject = _choose_subject(next(iter(networks.values())).dataset, chosen)
    folder = Path(out)
    record = folder / "figures.json"
    made_of = _made_of(subject, networks, chosen)
    if not chosen.overwrite:
        check_free(record, [folder / name for name in PICTURES], made_of)
    with progress_bars() if progress is None else nullcontext(progress) as bars:
        columns = _columns(subject, networks, chosen, bars)
    folder.mkdir(parents=True, exist_ok=True)
    figures = _drawn(subject, columns, config)
    # The old numbers go first, so that they never stand beside new pictures.
    record.unlink(missing_ok=True)
    for name, figure in zip(PICTURES, figures, strict=True):
        _save(figure, folder / name)
    result = {"made_of": made_of} | _numbers(subject, chosen.seed)
    result["columns"] = {
        title: _network_numbers(title, trained) | _column_numbers(subject, columns[title])
        for title, trained in networks.items()
    }
    write_json(record, result)
    return result | {"files": [str(folder / name) for name in (*PICTURES, record.name)]}


def _open_networks(checkpoints: Sequence[str], data: str, options: FigureOptions) -> dict[str, Trained]:
    """The network of each column by the column's title."""
    paths = [checkpoints[0], *checkpoints] if options.initial else checkpoints
    opened = [options.open(path, data) for path in paths]
    splits = {trained.dataset.split: trained.path for trained in opened}
    if len(splits) > 1:
        raise CheckpointError(
            "expected checkpoints of one split, because training images of one are test images of another; "
            f"found {', '.join(f'{path} of split {split}' for split, path in sorted(splits.items()))}"
        )
    if options.initial:
        _forget_training(opened[0])
    return dict(zip(titles_of(opened, options.initial), opened, strict=True))


def _choose_subject(dataset: PersonDataset, options: FigureOptions) -> _Subject:
    """Choose the images, people and queries that all columns show."""
    search = _ranked_search(dataset, options.permutations)
    images = all_test_images(dataset)
    unreadable: set[Path] = set()
    if options.skip_unreadable:
        images, unreadable = only_readable(images, workers=options.workers)
        search = without(search, unreadable)
    subject = _Subject(
        dataset,
        images,
        unreadable,
        choose_people(images, options.people, options.seed),
        search,
        choose_queries(search, options.queries, options.query_paths, options.seed),
    )
    plots.check_map_size(len(subject.mapped()))
    return subject


def _columns(
    subject: _Subject, networks: Mapping[str, Trained], options: FigureOptions, bars: Progress
) -> dict[str, _Column]:
    """Extract the features of each network, and what its column shows of them."""
    columns: dict[str, _Column] = {}
    task = bars.add_task("figures", total=len(networks), status="")
    for title, trained in networks.items():
        bars.update(task, status=title)
        features = {
            modality: options.features(trained, samples, modality, bars)
            for modality, samples in subject.images.items()
        }
        with enough_memory("the distances of all test images", "Less is needed on a smaller data set"):
            columns[title] = _column(subject, features, options.seed)
        bars.advance(task)
    return columns


class _Subject(NamedTuple):
    """What all columns show."""

    dataset: PersonDataset
    images: dict[Modality, list[Sample]]  # the test images by modality
    unreadable: set[Path]
    people: set[int]  # in the t-SNE map
    search: Search
    queries: list[int]  # rows of the search's query

    def mapped(self) -> list[tuple[Modality, int]]:
        """The modality and row of each image in the t-SNE map, in the map's order."""
        return [
            (modality, row)
            for modality, samples in self.images.items()
            for row, sample in enumerate(samples)
            if sample.identity in self.people
        ]

    def query(self) -> list[Sample]:
        return [self.search.query[row] for row in self.queries]


class _Column(NamedTuple):
    """What the column of one network shows."""

    distances: Distances
    points: NDArray[np.float32]
    ranking: plots.Ranking


def _column(subject: _Subject, features: Mapping[Modality, Tensor], seed: int) -> _Column:
    points = plots.tsne_map(torch.stack([features[m][row] for m, row in subject.mapped()]), seed=seed)
    return _Column(
        distances_of(subject.images, features),
        points,
        ranking_of(subject.images, features, subject.search, subject.query()),
    )


def features_of(
    samples: Sequence[Sample],
    images: Mapping[Modality, Sequence[Sample]],
    features: Mapping[Modality, Tensor],
) -> Tensor:
    """Select the features of some of the images, (len(samples), D)."""
    rows = {sample.path: row for side in images.values() for row, sample in enumerate(side)}
    return torch.stack([features[sample.modality][rows[sample.path]] for sample in samples])


def ranking_of(
    images: Mapping[Modality, Sequence[Sample]],
    features: Mapping[Modality, Tensor],
    search: Search,
    query: Sequence[Sample],
) -> plots.Ranking:
    """Rank the images of a search's first gallery for some of its queries, by features of `images`."""
    wanted, found = (features_of(side, images, features) for side in (query, search.galleries[0]))
    return plots.ranking(-(wanted @ found.T), **labels_of(search, query, search.galleries[0]), count=LISTED)


def _drawn(subject: _Subject, columns: Mapping[str, _Column], config: TrainConfig) -> tuple[Figure, ...]:
    """Draw the figures, in the order of PICTURES; images in ranking lists have the shape of `config`."""
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
            {
                title: pictures_of(subject.query(), subject.search.galleries[0], c.ranking, size)
                for title, c in columns.items()
            },
            count=LISTED,
        ),
    )


def _made_of(subject: _Subject, opened: Mapping[str, Trained], options: FigureOptions) -> dict[str, Any]:
    """What distinguishes these figures from others, known before anything is computed."""
    dataset = subject.dataset
    return {
        "networks": {title: content_digest(trained.state.model) for title, trained in opened.items()},
        "precision": [trained.precision for trained in opened.values()],
        "backend": [trained.backend for trained in opened.values()],
        "device": [trained.fabric.device.type for trained in opened.values()],
        "images": fingerprint(dataset.root, chain(*subject.images.values())),
        "search": [subject.search.name, subject.search.settings, search_fingerprint(dataset, subject.search)],
        "people": sorted(subject.people),
        "queries": subject.queries,
        "seed": options.seed,
        "skip_unreadable": options.skip_unreadable,
    }


def all_test_images(dataset: PersonDataset) -> dict[Modality, list[Sample]]:
    """Collect all images of a data set's searches, by modality, sorted by identity, camera and path."""
    options = {"shots": sys.maxsize, "trials": 1}
    known = inspect.signature(dataset.searches).parameters
    searches = dataset.searches(**{name: value for name, value in options.items() if name in known})
    samples = {s for search in searches for s in (*search.query, *search.galleries[0])}
    ordered = sorted(samples, key=lambda s: (s.identity, s.camera, str(s.path)))
    modalities: tuple[Modality, ...] = ("visible", "infrared")
    return {modality: [s for s in ordered if s.modality == modality] for modality in modalities}


def choose_people(images: Mapping[Modality, Sequence[Sample]], people: int, seed: int) -> set[int]:
    """Draw identities with images of both modalities; all of them, with a warning, if there are too few."""
    both = sorted(set.intersection(*({s.identity for s in side} for side in images.values())))
    if len(both) < people:
        _log.warning("the t-SNE map shows all %d test people; %d were asked for", len(both), people)
    return set(random.Random(seed).sample(both, min(people, len(both))))


def choose_queries(search: Search, queries: int, paths: Sequence[str] | None, seed: int) -> list[int]:
    """Choose rows of `search.query` by the ends of their paths, or draw them, each of another person.

    Only queries with a match in the first gallery are drawn; all of them, if there are too few people. Raises
    ValueError for an empty list, and for a path with which the path of no query, or of several, ends.
    """
    if paths is not None:
        if not paths:
            raise ValueError("got no paths of queries, expected at least one")
        return [_query_named(search, path) for path in paths]
    labels = labels_of(search, search.query, search.galleries[0])
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
    """The headline search; for SYSU-MM01 it is multi-shot, as in the paper's Figure 6."""
    options: dict[str, Any] = {}
    if dataset.name == "sysu-mm01":
        draw = "random" if permutations is None else "official"
        options = {"mode": "all", "shots": 10, "draw": draw, "trials": 1}
    return searches_of(dataset, options)[0]


def _forget_training(trained: Trained) -> None:
    """Give a network its initial weights: those of its seed, and those of a file if it began with one.

    Raises WeightsError where the file isn't there, and CheckpointError where it has changed.
    """
    config = trained.config
    check_initial(config)
    if (weights := other_weights(trained.state, config)) is not None:
        raise CheckpointError(
            f"{trained.path}: the file that training began from has changed: {weights}. Put the former file "
            "back, or leave --initial out"
        )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = ReIDModel(len(trained.state.data.identities), **config.model_arguments())
    begin(model, config)
    trained.model.load_state_dict(model.state_dict())


def titles_of(opened: Sequence[Trained], initial: bool = False) -> list[str]:
    """Title each column by its model, and by the folder of its run where columns have the same model."""
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


def labels_of(search: Search, query: Sequence[Sample], gallery: Sequence[Sample]) -> dict[str, Any]:
    """The arguments of `score` and `skipped_images` for these images of a search."""
    return {
        "query_ids": _identities(query),
        "gallery_ids": _identities(gallery),
        "query_cameras": torch.tensor([sample.camera for sample in query]),
        "gallery_cameras": torch.tensor([sample.camera for sample in gallery]),
        "protocol": search.protocol,
    }


def pictures(samples: Sequence[Sample], size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Read images and resize them to `size`, (height, width): uint8 (height, width, 3) each."""
    images = PersonImages(samples, size)
    return [images[place].permute(1, 2, 0).numpy() for place in range(len(samples))]


def pictures_of(
    queries: Sequence[Sample], gallery: Sequence[Sample], lists: plots.Ranking, size: tuple[int, int]
) -> list[plots.Row]:
    """Read the images of ranking lists, and resize them to `size`, (height, width)."""
    rows = []
    for query, order, correct in zip(queries, lists.order, lists.correct, strict=True):
        found = [gallery[place] for place in order if place >= 0]
        name = f"person {query.identity}\ncamera {query.camera}"
        rows.append(plots.Row(name, pictures([query], size)[0], pictures(found, size), correct.tolist()))
    return rows


def _numbers(subject: _Subject, seed: int) -> dict[str, Any]:
    dataset, search = subject.dataset, subject.search
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
        "unreadable": sorted(map(str, subject.unreadable)),
    }


def _network_numbers(title: str, trained: Trained) -> dict[str, Any]:
    return {
        "checkpoint": str(trained.path),
        "step": 0 if title == INITIAL else trained.state.step,
        "precision": trained.precision,
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
        "intra_mean": _finite(apart.intra_mean),
        "inter_mean": _finite(apart.inter_mean),
        "delta": _finite(apart.delta),
        "pairs": {"intra": int(apart.intra.sum()), "inter": int(apart.inter.sum())},
        "tsne": column.points.round(3).tolist(),
        "ranking": lists,
    }


def _finite(value: float) -> float | None:
    """The value, or None for the mean of no pairs, as JSON has no NaN."""
    return value if math.isfinite(value) else None


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
