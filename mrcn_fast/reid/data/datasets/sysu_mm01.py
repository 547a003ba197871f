"""The reader of SYSU-MM01's tree, camN/dddd/*.jpg and exp/*_id.txt.

A. Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final

from mrcn_fast.reid.data.checks import check_test, log_searches, pair_modalities
from mrcn_fast.reid.data.datasets.lists import check_apart, check_identities, read_identities
from mrcn_fast.reid.data.datasets.permutations import read_permutations
from mrcn_fast.reid.data.datasets.trees import (
    LeftOut,
    by_place,
    check_folders,
    contents,
    entries,
    images_in,
    numbered,
    unknown_cameras,
)
from mrcn_fast.reid.data.types import DatasetError, Sample, Search, TrainingSet, at_least

VISIBLE_CAMERAS: Final = (1, 2, 4, 5)
INFRARED_CAMERAS: Final = (3, 6)
CAMERAS: Final = (1, 2, 3, 4, 5, 6)
GALLERY_CAMERAS: Final = {"all": VISIBLE_CAMERAS, "indoor": (1, 2)}
DRAWS: Final = ("random", "official")
PERMUTATIONS: Final = "rand_perm_cam.mat"

_TREE: Final = (
    "cam1 ... cam6, each with folders 0001, 0002, ... of .jpg files, and exp/{train,val,test}_id.txt"
)


class SYSUMM01:
    """SYSU-MM01, read from the tree under `root` as published, without preprocessing.

    `permutations` is the path of the official gallery draw, rand_perm_cam.mat. By default, a gallery with
    draw="official" looks for it in `root` and in `root`/exp.

    The training set has the identities of train_id.txt and val_id.txt, as in the field, or with
    `hold_out_val` those of train_id.txt alone.

    All images in the folders of identities are read, in any format. A warning counts other entries there.

    Raises DatasetError, with the path, the expected and the found, for a missing tree or exp file, malformed
    identities, an identity in both training and test, an identity without images, and an empty camera.
    """

    name: ClassVar[str] = "sysu-mm01"
    split: int = 1

    def __init__(
        self, root: str | Path, *, permutations: str | Path | None = None, hold_out_val: bool = False
    ) -> None:
        self.root = Path(root)
        self._given = None if permutations is None else Path(permutations)
        check_folders(
            self.root, [*(f"cam{camera}" for camera in CAMERAS), "exp"], f"SYSU-MM01's tree ({_TREE})"
        )
        self._name = f"{self.name} at {self.root}"
        exp = self.root / "exp"
        lists = {split: read_identities(exp / f"{split}_id.txt") for split in ("train", "val", "test")}
        both = tuple(sorted({*lists["train"], *lists["val"]}))
        self.test_identities: tuple[int, ...] = tuple(lists["test"])
        check_apart(exp, both, self.test_identities)
        self.validation_identities: tuple[int, ...] = tuple(lists["val"])
        held_out = self.validation_identities if hold_out_val else ()
        self.training_identities: tuple[int, ...] = tuple(sorted(set(both) - set(held_out)))
        self._left_out = LeftOut(self.root)
        self._left_out.add(self.root, unknown_cameras(self.root, CAMERAS))
        self._folders = {camera: self._camera(camera) for camera in CAMERAS}
        self._left_out.log(self._name)
        for split, identities in lists.items():
            check_identities(exp / f"{split}_id.txt", identities, set().union(*self._folders.values()))

    def validation(self) -> SYSUMM01:
        """The same data set, whose searches are among the identities of val_id.txt.

        They follow the test protocol. Of the identities, there are 99 in the published lists.
        """
        other = copy.copy(self)
        other.test_identities = self.validation_identities
        vars(other).pop("_test", None)  # of the test identities, where they have been listed
        return other

    def training(self) -> TrainingSet:
        """Make the training set of all images of the training identities.

        Identities with images of one modality are left out; a warning names and counts them. Samples are
        sorted by identity, camera and file name. Raises DatasetError for an identity or camera without
        images.
        """
        samples = self._samples(self.training_identities)
        self._check_cameras(samples, CAMERAS, "training")
        return pair_modalities(samples, self._name)

    def searches(
        self, mode: str = "all", shots: int = 1, draw: str = "random", trials: int = 10
    ) -> list[Search]:
        """Make "all-search" or "indoor-search", with galleries of trials 0 to `trials` - 1.

        Mode "both" gives both, all-search first. The other arguments and the errors are those of `gallery`.
        Raises ValueError for less than one trial.
        """
        at_least(1, "trials", trials)
        if mode not in (*GALLERY_CAMERAS, "both"):
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(GALLERY_CAMERAS)}, both")
        query = tuple(self.query())
        settings = f"{'single' if shots == 1 else shots}-shot, {draw} draw"
        searches = [
            Search(
                name=f"{cameras}-search",
                protocol="sysu",
                settings=settings,
                query=query,
                galleries=tuple(
                    tuple(self.gallery(cameras, shots=shots, trial=trial, draw=draw))
                    for trial in range(trials)
                ),
            )
            for cameras in (GALLERY_CAMERAS if mode == "both" else (mode,))
        ]
        log_searches(searches, self._name)
        return searches

    def query(self) -> list[Sample]:
        """Collect the infrared images (cameras 3 and 6) of the test identities, sorted as in `training`."""
        return self._test_images(INFRARED_CAMERAS)

    def gallery(
        self, mode: str = "all", *, shots: int = 1, trial: int = 0, draw: str = "random"
    ) -> list[Sample]:
        """Draw the visible images of a trial's gallery, sorted by identity and camera.

        Args:
            mode: "all" (cameras 1, 2, 4, 5) or "indoor" (1, 2)
            shots: images per identity and camera, or all if there are fewer; published are 1 and 10
            draw: "random" draws as the field's PyTorch code: Python's generator is seeded with `trial`, and
                makes a choice over the sorted files per identity and camera (for more shots, a sample without
                replacement). "official" takes the first `shots` of row `trial` of rand_perm_cam.mat. Scores
                of the two differ.
            trial: from 0; the published protocol averages trials 0 to 9

        Raises:
            ValueError: for an unknown mode or draw, and for shots or trial out of range
            DatasetError: for a missing or unfit rand_perm_cam.mat, and for a camera without test images
        """
        if mode not in GALLERY_CAMERAS:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(GALLERY_CAMERAS)}")
        if draw not in DRAWS:
            raise ValueError(f"unknown draw {draw!r}; known: {', '.join(DRAWS)}")
        at_least(1, "shots", shots)
        at_least(0, "trial", trial)
        # A generator of its own gives the same numbers as the global one, and leaves that unchanged.
        generator = random.Random(trial)
        gallery: list[Sample] = []
        for files in by_place(self._test_images(GALLERY_CAMERAS[mode])):
            if draw == "official":
                gallery += self._official_draw(files, shots, trial)
            elif shots == 1:
                gallery.append(generator.choice(files))
            else:
                gallery += generator.sample(files, min(shots, len(files)))
        return gallery

    def _official_draw(self, files: Sequence[Sample], shots: int, trial: int) -> list[Sample]:
        path, permutations = self._permutations
        rows = permutations.get((files[0].identity, files[0].camera), ())
        places = len(rows[0]) if len(rows) else 0
        if places != len(files):
            raise DatasetError(
                f"{path}: expected permutations of the {len(files)} images in {files[0].path.parent}; found "
                f"{places} places. It belongs to another tree, or files are missing: use draw='random' or "
                f"copy the data set again"
            )
        if trial >= len(rows):
            raise ValueError(f"trial must be below {len(rows)}, the number of draws in {path}; got {trial}")
        return [files[place - 1] for place in rows[trial][:shots]]

    @cached_property
    def _permutations(self) -> tuple[Path, Mapping[tuple[int, int], Sequence[Sequence[int]]]]:
        """Find rand_perm_cam.mat, and read its permutations by identity and camera, one per trial."""
        places = [self.root / PERMUTATIONS, self.root / "exp" / PERMUTATIONS]
        if self._given is not None:
            places = [self._given]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise DatasetError(
                f"{places[0]}: expected the official gallery draw {PERMUTATIONS} (from SYSU-MM01's "
                f"evaluation code) here{'' if len(places) == 1 else f' or in {places[1].parent}'}; found no "
                f"such file. Give its path, or use draw='random', whose scores are not the same number"
            )
        return path, read_permutations(path, len(CAMERAS))

    @cached_property
    def _test(self) -> list[Sample]:
        """All images of the test identities, sorted by identity, camera and file name."""
        # The folders are listed once for all trials, because that is slow on network disks.
        samples = self._samples(self.test_identities)
        check_test(samples, self._name)
        return samples

    def _test_images(self, cameras: Sequence[int]) -> list[Sample]:
        samples = [sample for sample in self._test if sample.camera in cameras]
        self._check_cameras(samples, cameras, "test")
        return samples

    def _samples(self, identities: Sequence[int]) -> list[Sample]:
        """Collect the images of these identities, sorted by identity, camera and file name."""
        samples = [
            Sample(
                self._folders[camera][identity] / name,
                identity,
                camera,
                "visible" if camera in VISIBLE_CAMERAS else "infrared",
            )
            for identity in identities
            for camera in CAMERAS
            if identity in self._folders[camera]
            for name in images_in(self._folders[camera][identity], self._left_out)
        ]
        self._left_out.log(self._name)
        check_identities(self.root / "exp", identities, {s.identity for s in samples})
        return samples

    def _check_cameras(self, samples: Iterable[Sample], cameras: Iterable[int], split: str) -> None:
        if empty := sorted(set(cameras) - {s.camera for s in samples}):
            raise DatasetError(
                f"{self.root / f'cam{empty[0]}'}: expected images of the {split} identities that exp names; "
                f"found none. Check that exp belongs to these images"
            )

    def _camera(self, camera: int) -> dict[int, Path]:
        """Find the folders of a camera by identity; at least one has images."""
        path = self.root / f"cam{camera}"
        folders = numbered(path, self._left_out)
        if not any(contents(folder).images for folder in folders.values()):
            raise DatasetError(
                f"{path}: expected folders 0001, 0002, ... of images; found an empty camera: {entries(path)}"
            )
        return folders
