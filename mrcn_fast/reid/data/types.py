"""The types that every data set is read into, and the checks that all data sets share."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal, NamedTuple, Protocol

Modality = Literal["visible", "infrared"]

UNKNOWN: Final = -1
"""Identity and camera of an image that belongs to no data set."""

_log = logging.getLogger(__name__)


class DatasetError(ValueError):
    """A data set on disk is not as expected. The message has the path, the expected and the found."""


class Sample(NamedTuple):
    """An image on disk: its path, its modality, and the data set's own numbers of its identity and camera."""

    path: Path
    identity: int
    camera: int
    modality: Modality


class TrainingSet(NamedTuple):
    """The training images by modality, and the sorted identities, which have images of both modalities."""

    visible: tuple[Sample, ...]
    infrared: tuple[Sample, ...]
    identities: tuple[int, ...]


class Search(NamedTuple):
    """A retrieval that is scored: queries of one modality and, per trial, a gallery of the other."""

    name: str  # all-search, indoor-search, visible-to-infrared or infrared-to-visible (query to gallery)
    protocol: str  # as `evaluation.score` takes it
    settings: str  # the other choices that the scores depend on, in words; "" without any
    query: tuple[Sample, ...]
    galleries: tuple[tuple[Sample, ...], ...]  # one per trial


class PersonDataset(Protocol):
    """A data set, read from the tree that its owners ship.

    Attributes:
        name: the name in checkpoints and results
        root: the root of the tree
        split: 1 for data sets that have one split

    `searches` takes the options that the data set's protocol leaves open. The first search is the headline.
    """

    name: ClassVar[str]
    root: Path
    split: int

    def training(self) -> TrainingSet: ...

    @property
    def searches(self) -> Callable[..., list[Search]]: ...


def at_least(least: int, name: str, value: int) -> int:
    """Convert an integer of Python or NumPy. Raises ValueError for other types and below `least` (0 or 1)."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer; got {value!r}") from None
    if whole < least:
        bound = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{name} must {bound}; got {value}")
    return whole


def pair_modalities(samples: Iterable[Sample], name: str) -> TrainingSet:
    """Make a training set of the identities that have images of both modalities.

    Identities with images of one modality can't be paired. They are left out, and a warning names and counts
    them. `name` is the data set's name in messages. Raises DatasetError if no identity remains.
    """
    samples = tuple(samples)
    by_modality = identities_by_modality(samples)
    paired = by_modality["visible"] & by_modality["infrared"]
    _report_unpaired(samples, by_modality, name)
    if not paired:
        raise DatasetError(
            f"{name}: no training identity has images of both modalities; found {_counted(by_modality)}, "
            f"none in common; check that the camera folders belong to one data set"
        )
    kept = [s for s in samples if s.identity in paired]
    training = TrainingSet(
        visible=tuple(s for s in kept if s.modality == "visible"),
        infrared=tuple(s for s in kept if s.modality == "infrared"),
        identities=tuple(sorted(paired)),
    )
    _log.info(
        "%s: training images: %d visible and %d infrared ones of %d identities",
        *(name, len(training.visible), len(training.infrared), len(training.identities)),
    )
    return training


def check_test(samples: Iterable[Sample], name: str) -> None:
    """Raise DatasetError unless some test identity has images of both modalities, and so a match.

    A warning names and counts the identities with images of one modality, because they have no match.
    """
    by_modality = identities_by_modality(samples)
    if not set.intersection(*by_modality.values()):
        raise DatasetError(
            f"{name}: expected test identities with images of both modalities; found "
            f"{_counted(by_modality)}, none in common. Check that lists and images belong together"
        )
    for modality, identities in by_modality.items():
        if missing := sorted(set.union(*by_modality.values()) - identities):
            _log.warning(
                "%s: %d test identities without %s images: %s",
                *(name, len(missing), modality, ", ".join(map(str, missing))),
            )


def log_searches(searches: Iterable[Search], name: str) -> None:
    """Log the number of images in the searches of a data set."""
    for search in searches:
        sizes = sorted({len(gallery) for gallery in search.galleries})
        _log.info(
            "%s, %s: %d queries of %d identities, galleries: %d of %s images",
            *(name, search.name, len(search.query), len({s.identity for s in search.query})),
            *(len(search.galleries), " to ".join(map(str, {sizes[0]: None, sizes[-1]: None}))),
        )


def identities_by_modality(samples: Iterable[Sample]) -> dict[Modality, set[int]]:
    """Collect the identities that have images of each modality."""
    found: dict[Modality, set[int]] = {"visible": set(), "infrared": set()}
    for sample in samples:
        found[sample.modality].add(sample.identity)
    return found


def _counted(by_modality: Mapping[Modality, set[int]]) -> str:
    return " and ".join(
        f"{len(identities)} identities with {modality} images" for modality, identities in by_modality.items()
    )


def _report_unpaired(samples: Sequence[Sample], by_modality: dict[Modality, set[int]], name: str) -> None:
    only_visible = by_modality["visible"] - by_modality["infrared"]
    only_infrared = by_modality["infrared"] - by_modality["visible"]
    for missing, identities in (("infrared", only_visible), ("visible", only_infrared)):
        if identities:
            images = sum(s.identity in identities for s in samples)
            _log.warning(
                "%s: left out %d training identities without %s images (%d images): %s",
                name,
                len(identities),
                missing,
                images,
                ", ".join(map(str, sorted(identities))),
            )
