"""SYSU-MM01 as its owners ship it, camN/dddd/*.jpg and exp/*_id.txt: training set, query and galleries.

A. Wu et al., "RGB-Infrared Cross-Modality Person Re-Identification", ICCV 2017.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from mrcn_fast.reid.data.samples import (
    DatasetError,
    Modality,
    Sample,
    Search,
    TrainingSet,
    pair_modalities,
)
from mrcn_fast.reid.data.trees import by_place, check_folders, few, image_names, read_identities

if TYPE_CHECKING:
    import numpy as np

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
    """The data set under `root`, read as published, without preprocessing.

    `permutations` is the path of the official gallery draw, rand_perm_cam.mat; by default it is looked for in
    `root` and in `root`/exp when a gallery with draw="official" is asked for.

    Raises DatasetError, naming the path, the expected and the found, for a missing tree or exp file,
    malformed identities, identities in both training and test, and an empty camera.
    """

    name: ClassVar[str] = "sysu-mm01"
    split: int = 1

    def __init__(self, root: str | Path, *, permutations: str | Path | None = None) -> None:
        self.root = Path(root)
        self._permutations = None if permutations is None else Path(permutations)
        self._listed: dict[tuple[int, int], list[Sample]] = {}
        check_folders(
            self.root, [*(f"cam{camera}" for camera in CAMERAS), "exp"], f"SYSU-MM01's tree ({_TREE})"
        )
        train, validation, test = (
            read_identities(self.root / "exp" / f"{split}_id.txt") for split in ("train", "val", "test")
        )
        self.training_identities: tuple[int, ...] = tuple(sorted({*train, *validation}))
        self.test_identities: tuple[int, ...] = tuple(test)
        shared = sorted(set(self.training_identities) & set(test))
        if shared:
            raise DatasetError(
                f"{self.root / 'exp'}: expected test identities apart from the train and val ones; found "
                f"{len(shared)} in both: {few(shared)}"
            )
        for camera in CAMERAS:
            self._check_camera(camera)

    def training(self) -> TrainingSet:
        """All images of the train and val identities that have both modalities.

        Identities with one modality only are left out; a warning names and counts them. Samples are sorted by
        identity, camera and file name. Raises DatasetError if a camera has no image of these identities.
        """
        samples = self._samples(self.training_identities, CAMERAS, "training")
        return pair_modalities(samples, f"{self.name} at {self.root}")

    def searches(
        self, mode: str = "all", shots: int = 1, draw: str = "random", trials: int = 10
    ) -> list[Search]:
        """The query against the galleries of trials 0 ... `trials` - 1: "all-search" or "indoor-search".

        mode "both" gives both, all-search first; the other arguments are `gallery`'s. Raises what `gallery`
        raises, and ValueError for less than one trial.
        """
        if trials < 1:
            raise ValueError(f"trials must be at least 1; got {trials}")
        if mode not in (*GALLERY_CAMERAS, "both"):
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(GALLERY_CAMERAS)}, both")
        query = tuple(self.query())
        settings = f"{'single' if shots == 1 else shots}-shot, {draw} draw"
        return [
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

    def query(self) -> list[Sample]:
        """All infrared images (cameras 3 and 6) of the test identities, by identity, camera and file name."""
        return self._samples(self.test_identities, INFRARED_CAMERAS, "test")

    def gallery(
        self, mode: str = "all", *, shots: int = 1, trial: int = 0, draw: str = "random"
    ) -> list[Sample]:
        """The visible images to search in: `shots` (or all, if there are fewer) an identity and camera.

        mode: "all" (cameras 1, 2, 4, 5) or "indoor" (1, 2). shots: 1 (single-shot) or 10 (multi-shot) as
        published. draw: "random" as the field's PyTorch code draws: Python's generator seeded with `trial`,
        one choice over the sorted files for each identity and, in it, each camera (for more shots one
        sample without replacement in the choice's place); "official": the first `shots` of row `trial` of
        rand_perm_cam.mat. The two draws' scores are not the same number. trial: from 0; the published
        protocol averages trials 0 ... 9.

        Sorted by identity and camera. Raises ValueError for an unknown mode or draw, or shots or trial out of
        range; DatasetError for a missing or unfitting rand_perm_cam.mat and for a camera without test images.
        """
        if mode not in GALLERY_CAMERAS:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(GALLERY_CAMERAS)}")
        if draw not in DRAWS:
            raise ValueError(f"unknown draw {draw!r}; known: {', '.join(DRAWS)}")
        if shots < 1 or trial < 0:
            raise ValueError(
                f"shots must be at least 1 and trial at least 0; got shots={shots}, trial={trial}"
            )
        # Not the global generator: the same numbers, without disturbing anybody's stream.
        generator = random.Random(trial)
        gallery: list[Sample] = []
        for files in by_place(self._samples(self.test_identities, GALLERY_CAMERAS[mode], "test")):
            if draw == "official":
                gallery += self._official_draw(files, shots, trial)
            elif shots == 1:
                gallery.append(generator.choice(files))
            else:
                gallery += generator.sample(files, min(shots, len(files)))
        return gallery

    def _official_draw(self, files: Sequence[Sample], shots: int, trial: int) -> list[Sample]:
        identity, camera = files[0].identity, files[0].camera
        path, cameras = self._official_permutations
        per_identity = cameras[camera - 1, 0]
        rows = per_identity[identity - 1, 0] if identity <= per_identity.shape[0] else None
        if rows is None or rows.ndim != 2 or rows.shape[1] != len(files):
            found = 0 if rows is None or rows.ndim != 2 else rows.shape[1]
            raise DatasetError(
                f"{path}: expected permutations of the {len(files)} images in {files[0].path.parent}; found "
                f"{found} places. It belongs to another tree, or files are missing: use draw='random' or "
                f"copy the data set again"
            )
        if trial >= rows.shape[0]:
            raise ValueError(
                f"trial must be below {rows.shape[0]}, the number of draws in {path}; got {trial}"
            )
        return [files[place - 1] for place in rows[trial, :shots].tolist()]

    @cached_property
    def _official_permutations(self) -> tuple[Path, np.ndarray]:
        """The path of rand_perm_cam.mat; its cells: [camera - 1, 0][identity - 1, 0] is (trials, images)."""
        # scipy is needed by this draw only.
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        places = [self.root / PERMUTATIONS, self.root / "exp" / PERMUTATIONS]
        if self._permutations is not None:
            places = [self._permutations]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise DatasetError(
                f"{places[0]}: expected the official gallery draw {PERMUTATIONS} (from SYSU-MM01's "
                f"evaluation code) here{'' if len(places) == 1 else f' or in {places[1].parent}'}; found no "
                f"such file. Give its path, or use draw='random', whose scores are not the same number"
            )
        try:
            cells = loadmat(path)["rand_perm_cam"]
        except (OSError, ValueError, KeyError, NotImplementedError, TypeError, MatReadError) as error:
            raise DatasetError(
                f"{path}: expected a MATLAB file with the cell array rand_perm_cam; found: {error!r}"
            ) from error
        if cells.dtype != object or cells.shape != (len(CAMERAS), 1):
            raise DatasetError(
                f"{path}: expected rand_perm_cam as {len(CAMERAS)} x 1 cells, one a camera; found "
                f"{cells.dtype} {cells.shape}"
            )
        return path, cells

    def _samples(self, identities: Iterable[int], cameras: Sequence[int], split: str) -> list[Sample]:
        """The images of these identities and cameras, sorted by identity, camera and file name."""
        samples = [s for identity in identities for camera in cameras for s in self._files(identity, camera)]
        empty = sorted(set(cameras) - {s.camera for s in samples})
        if empty:
            raise DatasetError(
                f"{self.root / f'cam{empty[0]}'}: expected .jpg images of the {split} identities that exp "
                f"names; found none. Check that exp belongs to these images"
            )
        return samples

    def _files(self, identity: int, camera: int) -> list[Sample]:
        # Listed once: ten trials draw from the same folders, and network disks are slow to list.
        if (identity, camera) not in self._listed:
            self._listed[identity, camera] = self._list_files(identity, camera)
        return self._listed[identity, camera]

    def _list_files(self, identity: int, camera: int) -> list[Sample]:
        folder = self.root / f"cam{camera}" / f"{identity:04d}"
        modality: Modality = "visible" if camera in VISIBLE_CAMERAS else "infrared"
        return [Sample(folder / name, identity, camera, modality) for name in image_names(folder)]

    def _check_camera(self, camera: int) -> None:
        folder = self.root / f"cam{camera}"
        if not any(image_names(folder / entry) for entry in os.listdir(folder)):
            raise DatasetError(
                f"{folder}: expected folders 0001, 0002, ... of .jpg images; found an empty camera "
                f"({len(os.listdir(folder))} entries, none with images)"
            )
