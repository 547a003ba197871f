"""The searches of a data set's protocol, their images, and searches without unreadable images."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mrcn_fast.block import MODALITIES
from mrcn_fast.reid.data.images import check_left, readable
from mrcn_fast.reid.data.types import Modality, PersonDataset, Sample, Search
from mrcn_fast.reid.training.data_identity import fingerprint


def searches_of(dataset: PersonDataset, options: dict[str, Any]) -> list[Search]:
    """Make the searches of a data set's protocol. Raises ValueError for an option that it doesn't have."""
    known = inspect.signature(dataset.searches).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{dataset.name}'s protocol has no {', '.join(unknown)}, expected "
            + (" or ".join(known) if known else "no option")
        )
    return dataset.searches(**options)


def search_fingerprint(dataset: PersonDataset, search: Search) -> str:
    """Compute the `fingerprint` of the query and of the galleries of all trials."""
    return fingerprint(dataset.root, chain(search.query, *search.galleries))


def images_by_modality(searches: Sequence[Search]) -> dict[Modality, list[Sample]]:
    """Collect the images of the searches by modality, each once, because searches share most of them.

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
    """Split test images into the readable ones, by modality, and the paths of the others, which are logged.

    Raises DatasetError where no identity has readable images of both modalities.
    """
    every = [sample for images in samples.values() for sample in images]
    kept, unreadable = readable(every, workers=workers)
    check_left(kept, unreadable, "test")
    by_modality = {m: [sample for sample in kept if sample.modality == m] for m in samples}
    return by_modality, {sample.path for sample in unreadable}


def without(search: Search, unreadable: Collection[Path]) -> Search:
    """Remove the images at these paths from a search.

    Raises DatasetError where a gallery then has no match for any query.
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
