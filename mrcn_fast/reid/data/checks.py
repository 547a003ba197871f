"""What all readers of data sets check and log: who has images of both modalities, and what is searched."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from mrcn_fast.reid.data.types import DatasetError, Modality, Sample, Search, TrainingSet

_log = logging.getLogger(__name__)


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
