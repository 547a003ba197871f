"""What every data set is read into: samples and training sets; and the error of a broken tree."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

Modality = Literal["visible", "infrared"]

_log = logging.getLogger(__name__)


class DatasetError(ValueError):
    """A data set on disk is not as expected; the message names the path, the expected and the found."""


class Sample(NamedTuple):
    """One image on disk: its path, the data set's own identity and camera numbers, and its modality."""

    path: Path
    identity: int
    camera: int
    modality: Modality


class TrainingSet(NamedTuple):
    """The training images by modality, and the sorted identities; each has images in both modalities."""

    visible: tuple[Sample, ...]
    infrared: tuple[Sample, ...]
    identities: tuple[int, ...]


class Search(NamedTuple):
    """One retrieval that is scored: queries of one modality, and in each trial a gallery of the other.

    name: "all-search", "indoor-search", "visible-to-infrared" or "infrared-to-visible" (query to gallery);
    protocol: of `evaluation.score`; settings: what else the figures depend on, for people, or "".
    """

    name: str
    protocol: str
    settings: str
    query: tuple[Sample, ...]
    galleries: tuple[tuple[Sample, ...], ...]


class PersonDataset(Protocol):
    """A data set read from the tree that its owners ship.

    name: as checkpoints and results have it; root: of the tree; split: 1 where the data set has one only.
    `searches` takes the options that the data set's protocol leaves open; its first search is the headline.
    """

    name: ClassVar[str]
    root: Path
    split: int

    def training(self) -> TrainingSet: ...

    @property
    def searches(self) -> Callable[..., list[Search]]: ...


def pair_modalities(samples: Iterable[Sample], name: str) -> TrainingSet:
    """The training set of the identities that have both modalities.

    Identities with one modality only cannot be paired: they are left out, and a warning names and counts them
    and their images. `name` names the data set in messages. Raises DatasetError if no identity is left.
    """
    samples = tuple(samples)
    by_modality: dict[Modality, set[int]] = {
        modality: {s.identity for s in samples if s.modality == modality}
        for modality in ("visible", "infrared")
    }
    paired = by_modality["visible"] & by_modality["infrared"]
    _report_unpaired(samples, by_modality, name)
    if not paired:
        raise DatasetError(
            f"{name}: no training identity has images of both modalities; found "
            f"{len(by_modality['visible'])} identities with visible and {len(by_modality['infrared'])} with "
            f"infrared images, none in common; check that the camera folders belong to one data set"
        )
    kept = [s for s in samples if s.identity in paired]
    return TrainingSet(
        visible=tuple(s for s in kept if s.modality == "visible"),
        infrared=tuple(s for s in kept if s.modality == "infrared"),
        identities=tuple(sorted(paired)),
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
