"""LLCM as its owners ship it, idx/*.txt, test_vis/camN/dddd and test_nir/camN/dddd: training and searches.

Y. Zhang and H. Wang, "Diverse Embedding Expansion Network and Low-Light Cross-Modality Benchmark for
Visible-Infrared Person Re-identification", CVPR 2023.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import ClassVar, Final, NamedTuple

from mrcn_fast.reid.data.samples import (
    DatasetError,
    Modality,
    Sample,
    Search,
    TrainingSet,
    pair_modalities,
)
from mrcn_fast.reid.data.trees import (
    by_place,
    check_folders,
    check_images,
    few,
    image_names,
    read_identities,
    read_list,
)

_log = logging.getLogger(__name__)


class _Side(NamedTuple):
    """Where one modality is in the tree; foreign: the folders that its training list can't name."""

    training: str
    foreign: frozenset[str]
    test: str
    cameras: tuple[int, ...]


VISIBLE_CAMERAS: Final = (1, 2, 3, 4, 5, 6, 7, 8, 9)
INFRARED_CAMERAS: Final = (1, 2, 4, 5, 6, 7, 8, 9)
_SIDES: Final[dict[Modality, _Side]] = {
    "visible": _Side(
        "train_vis.txt", frozenset({"nir", "test_nir", "test_vis"}), "test_vis", VISIBLE_CAMERAS
    ),
    "infrared": _Side(
        "train_nir.txt", frozenset({"vis", "test_nir", "test_vis"}), "test_nir", INFRARED_CAMERAS
    ),
}
_TREE: Final = (
    "test_vis/cam1 ... cam9 and test_nir/cam1, cam2, cam4 ... cam9, each with folders 0001, 0002, ... of "
    ".jpg files, and idx/{train_vis,train_nir,test_id}.txt"
)
_EXAMPLE: Final = "vis/0001/0001_c05_s182093_f9850_vis.jpg 0"


class LLCM:
    """The data set under `root`, read as published, without preprocessing.

    Training identities are the labels of the lists, from 0; test identities are the numbers of test_id.txt.
    A test image's camera is its folder's; a training image's is the one that a folder of its path (cam5) or a
    word of its file name (c05) names, and 0 where none does, for nothing in training depends on it.

    Raises DatasetError, naming the path, the expected and the found, for a missing tree, list or listed
    image, malformed lines, a list whose images are of the other modality or of the test, and a camera
    without images.
    """

    name: ClassVar[str] = "llcm"
    split: int = 1

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        cameras = [f"{side.test}/cam{camera}" for side in _SIDES.values() for camera in side.cameras]
        check_folders(self.root, ["idx", *cameras], f"LLCM's tree ({_TREE})")
        self.test_identities: tuple[int, ...] = tuple(read_identities(self.root / "idx" / "test_id.txt"))
        self._training = [sample for modality in _SIDES for sample in self._read_training(modality)]
        self._test: dict[Modality, list[Sample]] = {}

    def training(self) -> TrainingSet:
        """The images of the training lists, in their order, of the identities that have both modalities.

        Identities with one modality only are left out; a warning names and counts them.
        """
        return pair_modalities(self._training, f"{self.name} at {self.root}")

    def searches(self, trials: int = 10) -> list[Search]:
        """Both directions, "infrared-to-visible" first: all test images of one modality are the query.

        The gallery has one image of the other modality an identity and camera, drawn as the field's code
        does: Python's generator seeded with the trial, from 0, and one choice over the sorted files for each
        identity and, in it, each camera. A warning names identities without images of a modality.

        Raises ValueError for less than one trial, DatasetError for a camera without images of the test
        identities.
        """
        if trials < 1:
            raise ValueError(f"trials must be at least 1; got {trials}")
        directions: tuple[tuple[Modality, Modality], ...] = (("infrared", "visible"), ("visible", "infrared"))
        return [
            Search(
                name=f"{query}-to-{gallery}",
                protocol="llcm",
                settings="single-shot, random draw",
                query=tuple(self._images(query)),
                galleries=tuple(_draw(self._images(gallery), trial) for trial in range(trials)),
            )
            for query, gallery in directions
        ]

    def _read_training(self, modality: Modality) -> list[Sample]:
        side = _SIDES[modality]
        path = self.root / "idx" / side.training
        listed = read_list(path, side.foreign, example=_EXAMPLE)
        check_images(self.root, path, listed)
        return [
            Sample(self.root / line.place, line.label, _camera_of(line.place), modality) for line in listed
        ]

    def _images(self, modality: Modality) -> list[Sample]:
        """The test images of a modality, sorted by identity, camera and file name."""
        # Listed once: each direction and trial takes from the same folders.
        if modality not in self._test:
            self._test[modality] = self._list_images(modality)
        return self._test[modality]

    def _list_images(self, modality: Modality) -> list[Sample]:
        side = _SIDES[modality]
        folders = {camera: _numbered(self.root / side.test / f"cam{camera}") for camera in side.cameras}
        samples = [
            Sample(folders[camera][identity] / name, identity, camera, modality)
            for identity in self.test_identities
            for camera in side.cameras
            if identity in folders[camera]
            for name in image_names(folders[camera][identity])
        ]
        empty = sorted(set(side.cameras) - {s.camera for s in samples})
        if empty:
            raise DatasetError(
                f"{self.root / side.test / f'cam{empty[0]}'}: expected .jpg images of the identities that "
                f"idx/test_id.txt names; found none. Check that idx belongs to these images"
            )
        if unseen := sorted(set(self.test_identities) - {s.identity for s in samples}):
            _log.warning(
                "%s at %s: %d test identities without images in %s: %s",
                self.name,
                self.root,
                len(unseen),
                side.test,
                few(unseen),
            )
        return samples


def _draw(samples: Iterable[Sample], trial: int) -> tuple[Sample, ...]:
    # Not the global generator: the same numbers, without disturbing anybody's stream.
    generator = random.Random(trial)
    return tuple(generator.choice(files) for files in by_place(samples))


def _numbered(camera: Path) -> dict[int, Path]:
    """A camera's folders by the identity that they name."""
    folders: dict[int, Path] = {}
    for name in sorted(os.listdir(camera)):
        if not (name.isascii() and name.isdigit()):
            continue
        if int(name) in folders:
            raise DatasetError(
                f"{camera}: expected one folder an identity; found {folders[int(name)].name} and {name}"
            )
        folders[int(name)] = camera / name
    return folders


def _camera_of(place: PurePosixPath) -> int:
    words = [*place.parts[:-1], *place.stem.split("_")]
    named = (re.fullmatch(r"c(?:am)?0*([1-9]\d*)", word.lower()) for word in words)
    return next((int(name[1]) for name in named if name), 0)
