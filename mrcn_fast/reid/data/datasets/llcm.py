"""The reader of LLCM's tree, idx/*.txt, test_vis/camN/dddd and test_nir/camN/dddd.

Y. Zhang and H. Wang, "Diverse Embedding Expansion Network and Low-Light Cross-Modality Benchmark for
Visible-Infrared Person Re-identification", CVPR 2023.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar, Final, NamedTuple

from mrcn_fast.reid.data.checks import check_test, log_searches, pair_modalities
from mrcn_fast.reid.data.datasets.lists import (
    Listed,
    check_apart,
    check_identities,
    check_images,
    check_people,
    people_of,
    read_identities,
    read_list,
)
from mrcn_fast.reid.data.datasets.trees import (
    LeftOut,
    by_place,
    check_folders,
    images_in,
    numbered,
    unknown_cameras,
)
from mrcn_fast.reid.data.types import DatasetError, Modality, Sample, Search, TrainingSet, at_least


class _Side(NamedTuple):
    """The folders of a modality; its training list must not name images in the `foreign` ones."""

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
    """LLCM, read from the tree under `root` as published, without preprocessing.

    Training identities are the labels of the lists, from 0. Test identities are the numbers in test_id.txt.
    The camera of a test image is that of its folder. The camera of a training image is named by a folder of
    its path (cam5) or a word of its file name (c05); otherwise it is 0, because the training doesn't depend
    on it.

    All images in the folders of test identities are read, in any format. A warning counts other entries in
    the test folders.

    Raises DatasetError, with the path, the expected and the found, for a missing tree, list or listed image,
    malformed lines, lists of the other modality or of test images, a label of several people, a person in
    both training and test, and a test identity or a camera without images.
    """

    name: ClassVar[str] = "llcm"
    split: int = 1

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        cameras = [f"{side.test}/cam{camera}" for side in _SIDES.values() for camera in side.cameras]
        check_folders(self.root, ["idx", *cameras], f"LLCM's tree ({_TREE})")
        self._name = f"{self.name} at {self.root}"
        path = self.root / "idx" / "test_id.txt"
        self.test_identities: tuple[int, ...] = tuple(read_identities(path))
        lists = {modality: self._list(modality) for modality in _SIDES}
        check_people({self._path(modality): listed for modality, listed in lists.items()})
        check_apart(path, set().union(*map(people_of, lists.values())), self.test_identities)
        self._training = [
            Sample(self.root / line.place, line.label, _camera_of(line.place), modality)
            for modality, listed in lists.items()
            for line in listed
        ]
        self._left_out = LeftOut(self.root)
        self._folders = {modality: self._numbered(side) for modality, side in _SIDES.items()}
        self._left_out.log(self._name)
        cameras_folders = [folders for side in self._folders.values() for folders in side.values()]
        check_identities(path, self.test_identities, set().union(*cameras_folders))

    def training(self) -> TrainingSet:
        """Make the training set of the images in the training lists, in their order.

        Identities with images of one modality are left out; a warning names and counts them.
        """
        return pair_modalities(self._training, self._name)

    def searches(self, trials: int = 10) -> list[Search]:
        """Make the searches of both directions, "infrared-to-visible" first.

        The query has all test images of one modality. The gallery has one image of the other modality per
        identity and camera, drawn as in the field's code: Python's generator is seeded with the trial, from
        0, and makes one choice over the sorted files per identity and camera. A warning names identities
        without images of a modality.

        Raises ValueError for less than one trial, DatasetError for a camera without images of test
        identities.
        """
        at_least(1, "trials", trials)
        directions: tuple[tuple[Modality, Modality], ...] = (("infrared", "visible"), ("visible", "infrared"))
        searches = [
            Search(
                name=f"{query}-to-{gallery}",
                protocol="llcm",
                settings="single-shot, random draw",
                query=tuple(self._test[query]),
                galleries=tuple(_draw(self._test[gallery], trial) for trial in range(trials)),
            )
            for query, gallery in directions
        ]
        log_searches(searches, self._name)
        return searches

    def _path(self, modality: Modality) -> Path:
        return self.root / "idx" / _SIDES[modality].training

    def _list(self, modality: Modality) -> list[Listed]:
        path = self._path(modality)
        listed = read_list(path, _SIDES[modality].foreign, example=_EXAMPLE)
        check_images(self.root, path, listed)
        return listed

    def _numbered(self, side: _Side) -> dict[int, dict[int, Path]]:
        """Find the folders of a modality's test images by camera and identity."""
        self._left_out.add(self.root / side.test, unknown_cameras(self.root / side.test, side.cameras))
        return {
            camera: numbered(self.root / side.test / f"cam{camera}", self._left_out)
            for camera in side.cameras
        }

    @cached_property
    def _test(self) -> dict[Modality, list[Sample]]:
        """Collect the test images by modality, sorted by identity, camera and file name."""
        # The folders are listed once for all directions and trials.
        images = {modality: self._images(modality) for modality in _SIDES}
        self._left_out.log(self._name)
        samples = [*images["visible"], *images["infrared"]]
        path = self.root / "idx" / "test_id.txt"
        check_identities(path, self.test_identities, {s.identity for s in samples})
        check_test(samples, self._name)
        return images

    def _images(self, modality: Modality) -> list[Sample]:
        side, folders = _SIDES[modality], self._folders[modality]
        samples = [
            Sample(folders[camera][identity] / name, identity, camera, modality)
            for identity in self.test_identities
            for camera in side.cameras
            if identity in folders[camera]
            for name in images_in(folders[camera][identity], self._left_out)
        ]
        empty = sorted(set(side.cameras) - {s.camera for s in samples})
        if empty:
            raise DatasetError(
                f"{self.root / side.test / f'cam{empty[0]}'}: expected images of the identities that "
                f"idx/test_id.txt names; found none. Check that idx belongs to these images"
            )
        return samples


def _draw(samples: Iterable[Sample], trial: int) -> tuple[Sample, ...]:
    # A generator of its own gives the same numbers as the global one, and leaves that unchanged.
    generator = random.Random(trial)
    return tuple(generator.choice(files) for files in by_place(samples))


def _camera_of(place: PurePosixPath) -> int:
    words = [*place.parts[:-1], *place.stem.split("_")]
    named = (re.fullmatch(r"c(?:am)?0*([1-9]\d*)", word.lower()) for word in words)
    return next((int(name[1]) for name in named if name), 0)
