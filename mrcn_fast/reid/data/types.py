"""The types that every data set is read into."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol

Modality = Literal["visible", "infrared"]

UNKNOWN: Final = -1
"""Identity and camera of an image that belongs to no data set."""


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


_MOVED: Final = ("check_test", "identities_by_modality", "log_searches", "pair_modalities")


def __getattr__(name: str) -> Any:
    """Find a function that is in checks.py now; the next release drops its former place."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mrcn_fast.reid.data import checks

    warnings.warn(f"{__name__}.{name} is {checks.__name__}.{name} now", DeprecationWarning, stacklevel=2)
    return getattr(checks, name)
