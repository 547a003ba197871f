"""The page of a report: what its networks were trained on, how they score, and what they find."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mrcn_fast.files import write_atomically
from mrcn_fast.reid.data.images import readable
from mrcn_fast.reid.data.types import Modality, PersonDataset, Sample, Search, TrainingSet
from mrcn_fast.reid.evaluation.distances import Distances, distances_of
from mrcn_fast.reid.evaluation.protocol import only_readable, searches_of, without
from mrcn_fast.reid.evaluation.scores import Scores, average, score
from mrcn_fast.reid.paper import plots
from mrcn_fast.reid.paper.figures import (
    all_test_images,
    choose_queries,
    features_of,
    labels_of,
    pictures,
    ranking_of,
)
from mrcn_fast.reid.report.charts import BlockTimes, draw_block, draw_cmc, draw_losses

_TITLES: Final = {"sysu-mm01": "SYSU-MM01", "regdb": "RegDB", "llcm": "LLCM"}
_DOTS_PER_INCH: Final = 160
_THUMBNAIL: Final = (128, 64)  # height and width in pixels
_STRIP: Final = 12  # people in the strip of training images
_LONGEST_CURVE: Final = 20


class Network(NamedTuple):
    """A trained network on the page."""

    title: str
    shows: str  # what distinguishes it, as the beginning of a sentence
    journal: Sequence[Mapping[str, float]]  # the lines of its metrics.jsonl
    features: Mapping[Modality, Tensor]  # of the subject's images, in their order


class Subject(NamedTuple):
    """The data set that all networks are compared on."""

    dataset: PersonDataset
    images: dict[Modality, list[Sample]]  # all test images by modality
    headline: Search  # that the scores are of
    listed: (
        Search  # that the ranking lists are of; the query is infrared where the protocol has such a search
    )
    query: list[Sample]  # of the ranking lists
    strip: list[tuple[Sample, Sample]]  # a visible and an infrared training image of some people


class _Shown(NamedTuple):
    """What the page has of one network."""

    network: Network
    scores: Scores
    distances: Distances
    ranking: plots.Ranking


def choose_subject(
    dataset: PersonDataset,
    *,
    queries: int = 4,
    seed: int = 0,
    skip_unreadable: bool = False,
    workers: int = 0,
) -> Subject:
    """Choose test and training images, searches, and the queries with a ranking list, each of another person.

    Args:
        dataset: the data set
        queries: the number of queries with a ranking list; fewer where there are fewer people
        seed: the queries are drawn with it
        skip_unreadable: leave out images that can't be read
        workers: processes that look for them

    Raises:
        DatasetError: where too few images can be read
        ValueError: where no query has a match
    """
    images, searches = all_test_images(dataset), searches_of(dataset, {})
    if skip_unreadable:
        images, unreadable = only_readable(images, workers=workers)
        searches = [without(search, unreadable) for search in searches]
    listed = next((s for s in searches if s.query[0].modality == "infrared"), searches[0])
    chosen = choose_queries(listed, queries, None, seed)
    query = [listed.query[row] for row in chosen]
    strip = _strip(dataset.training(), skip_unreadable=skip_unreadable, workers=workers)
    return Subject(dataset, images, searches[0], listed, query, strip)


def _strip(training: TrainingSet, *, skip_unreadable: bool, workers: int) -> list[tuple[Sample, Sample]]:
    """The first image in each modality of people that are spread evenly over the training set."""
    step = max(1, len(training.identities) // _STRIP)
    people = training.identities[::step][:_STRIP]
    images = [sample for sample in (*training.visible, *training.infrared) if sample.identity in people]
    if skip_unreadable:
        images, _ = readable(images, workers=workers)
    first = {(sample.identity, sample.modality): sample for sample in reversed(images)}
    pairs = [(first.get((person, "visible")), first.get((person, "infrared"))) for person in people]
    return [(visible, infrared) for visible, infrared in pairs if visible and infrared]


def write_page(
    path: Path,
    title: str,
    subject: Subject,
    networks: Sequence[Network],
    block: BlockTimes | None,
    *,
    chance: Mapping[str, float] | None = None,
) -> None:
    """Write the page, a single HTML file whose pictures are data URIs, atomically.

    The scores are of the headline search, as `mrcn-fast test` gives them. The distances and ranking lists
    are of the first and the last network.

    Args:
        path: the file to write
        title: the page's title
        subject: what the networks are compared on
        networks: at least one
        block: times of the block; None leaves their section out
        chance: the scores of random rankings, as shares of 1, for a first row

    Raises:
        OSError: where the file can't be written
        ValueError: for features that aren't finite
    """
    shown = [_shown(subject, network) for network in networks]
    ends = shown if len(shown) == 1 else [shown[0], shown[-1]]
    values = {
        "title": title,
        "dataset": _TITLES.get(subject.dataset.name, subject.dataset.name),
        "search": subject.headline.name.replace("-", " "),
        "test": {modality: len(samples) for modality, samples in subject.images.items()},
        "networks": len(shown),
        "training": _training(subject),
        "rows": _rows(shown, chance),
        "losses": _losses(networks),
        "cmc": _figure_uri(draw_cmc({of.network.title: of.scores.cmc for of in shown})),
        "best": max(shown, key=lambda of: float(of.scores.cmc[0])),
        "ends": ends,
        "distances": _figure_uri(
            plots.draw_distances({of.network.title: of.distances for of in ends}, stacked=True)
        ),
        "lists": _lists(subject, ends),
        "block": block,
        "block_chart": block and _figure_uri(draw_block(block)),
    }
    template = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template).render(values)
    # The name of a folder may hold bytes that are no text.
    write_atomically(path, lambda file: file.write(page.encode("utf-8", "replace")))


def _shown(subject: Subject, network: Network) -> _Shown:
    images, features = subject.images, network.features
    return _Shown(
        network,
        _scores(subject, features),
        distances_of(images, features),
        ranking_of(images, features, subject.listed, subject.query),
    )


def _scores(subject: Subject, features: Mapping[Modality, Tensor]) -> Scores:
    """Score the headline search: the mean over its galleries."""
    search = subject.headline
    query = features_of(search.query, subject.images, features)
    return average(
        [
            score(
                -(query @ features_of(gallery, subject.images, features).T),
                **labels_of(search, search.query, gallery),
                max_rank=_LONGEST_CURVE,
            )
            for gallery in search.galleries
        ]
    )


def _rows(shown: Sequence[_Shown], chance: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """The rows of the table: title, scores in percent, and a sentence with the gain over the row above."""
    rows: list[dict[str, Any]] = []
    if chance is not None:
        cells = [100 * chance[name] for name in ("rank1", "rank10", "mAP", "mINP")]
        rows.append({"title": "chance", "cells": cells, "sentence": "Random rankings."})
    before: float | None = None
    for of in shown:
        rank1, rank10 = (100 * float(of.scores.cmc[rank - 1]) for rank in (1, 10))
        sentence = of.network.shows
        if before is not None:
            sentence += f": {rank1 - before:+.1f} points of Rank-1 against the row above"
        cells = [rank1, rank10, 100 * of.scores.mAP, 100 * of.scores.mINP]
        rows.append({"title": of.network.title, "cells": cells, "sentence": f"{sentence}."})
        before = rank1
    return rows


def _losses(networks: Sequence[Network]) -> dict[str, str]:
    """The charts of the training, by the name of the term; networks without a journal are not in them."""
    journals = {network.title: network.journal for network in networks if network.journal}
    return {term: _figure_uri(figure) for term, figure in draw_losses(journals).items()}


def _training(subject: Subject) -> dict[str, Any]:
    """The numbers of the training data, and images of some of its people in both modalities."""
    training = subject.dataset.training()
    return {
        "people": len(training.identities),
        "visible": len(training.visible),
        "infrared": len(training.infrared),
        "strip": [
            [(_image_uri(image), _named(sample)) for sample, image in zip(pair, _read(pair), strict=True)]
            for pair in subject.strip
        ],
    }


def _lists(subject: Subject, ends: Sequence[_Shown]) -> list[dict[str, Any]]:
    """The ranking lists: for each query the images that each of the networks finds."""
    gallery = subject.listed.galleries[0]
    lists = []
    for row, (query, image) in enumerate(zip(subject.query, _read(subject.query), strict=True)):
        found = []
        for of in ends:
            places = [place for place in of.ranking.order[row].tolist() if place >= 0]
            hits = [
                {"uri": _image_uri(hit), "name": _named(gallery[place]), "right": bool(right)}
                for place, hit, right in zip(
                    places, _read([gallery[p] for p in places]), of.ranking.correct[row], strict=False
                )
            ]
            found.append({"title": of.network.title, "hits": hits})
        lists.append({"uri": _image_uri(image), "name": _named(query), "found": found})
    return lists


def _read(samples: Sequence[Sample]) -> list[NDArray[np.uint8]]:
    return pictures(samples, _THUMBNAIL)


def _named(sample: Sample) -> str:
    return f"person {sample.identity}, camera {sample.camera}, {sample.modality}"


def _image_uri(image: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _figure_uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
