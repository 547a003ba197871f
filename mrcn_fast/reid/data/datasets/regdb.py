"""The reader of RegDB's tree, Visible/, Thermal/ and idx/*.txt, with its ten splits.

D. T. Nguyen et al., "Person Recognition System Based on a Combination of Body Images from Visible Light and
Thermal Cameras", Sensors 2017; the ten splits: M. Ye et al., AAAI 2018.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from mrcn_fast.reid.data.checks import check_test, log_searches, pair_modalities
from mrcn_fast.reid.data.datasets.lists import (
    Listed,
    check_apart,
    check_images,
    check_people,
    people_of,
    read_list,
)
from mrcn_fast.reid.data.datasets.trees import check_folders, entries, few
from mrcn_fast.reid.data.types import DatasetError, Modality, Sample, Search, TrainingSet

SPLITS: Final = 10
CAMERA_OF: Final[dict[Modality, int]] = {"visible": 1, "infrared": 2}
# By modality: its name in the names of lists, and the folder of the other modality.
_LIST_OF: Final[dict[Modality, str]] = {"visible": "visible", "infrared": "thermal"}
_FOREIGN: Final[dict[Modality, str]] = {"visible": "thermal", "infrared": "visible"}
_TREE: Final = (
    "Visible and Thermal, each with folders 1, 2, ... of .bmp files, and "
    "idx/{train,test}_{visible,thermal}_{1..10}.txt"
)
_EXAMPLE: Final = "Visible/285/male_back_v_05528_285.bmp 0"


class RegDB:
    """RegDB, read from the tree under `root` as published, without preprocessing: one of its splits 1 to 10.

    Identities are the labels of a list. They count from 0 in each list, so that the same number is another
    person in the training than in the test. Camera 1 is visible. Camera 2 is thermal, and its images are the
    infrared ones here. Samples are in the order of the lists.

    Raises ValueError for another split. Raises DatasetError, with the path, the expected and the found, for a
    missing tree, list or listed image, malformed lines, lists of the other modality, a label of several
    people, an image or a person in both training and test, and a test in which nobody has images of both
    modalities.
    """

    name: ClassVar[str] = "regdb"

    def __init__(self, root: str | Path, *, split: int = 1) -> None:
        if split not in range(1, SPLITS + 1):
            raise ValueError(f"split must be from 1 to {SPLITS}; got {split}")
        self.root = Path(root)
        self.split = split
        check_folders(self.root, ("Visible", "Thermal", "idx"), f"RegDB's tree ({_TREE})")
        self._name = f"{self.name} at {self.root}, split {split}"
        people, samples = {}, {}
        for part in ("train", "test"):
            lists = {modality: self._list(part, modality) for modality in CAMERA_OF}
            check_people({self._path(part, modality): listed for modality, listed in lists.items()})
            people[part] = set().union(*map(people_of, lists.values()))
            samples[part] = self._samples(lists)
        self._training, self._test = samples["train"], samples["test"]
        shared = sorted({s.path for s in self._training} & {s.path for s in self._test})
        if shared:
            raise DatasetError(
                f"{self.root / 'idx'}: expected training images of split {split} apart from its test images; "
                f"found {len(shared)} in both: {few(shared, limit=2)}. Copy idx again"
            )
        check_apart(self.root / "idx", people["train"], people["test"])
        check_test(self._test, self._name)

    def training(self) -> TrainingSet:
        """Make the training set of the identities that have images of both modalities.

        Identities with images of one modality are left out; a warning names and counts them.
        """
        return pair_modalities(self._training, self._name)

    def searches(self) -> list[Search]:
        """Make the searches of both directions, "visible-to-infrared" first.

        The query has all test images of one modality, and the only gallery all of the other.
        """
        visible, infrared = (
            tuple(s for s in self._test if s.modality == modality) for modality in ("visible", "infrared")
        )
        searches = [
            Search("visible-to-infrared", "regdb", "", visible, (infrared,)),
            Search("infrared-to-visible", "regdb", "", infrared, (visible,)),
        ]
        log_searches(searches, self._name)
        return searches

    def _samples(self, lists: Mapping[Modality, Sequence[Listed]]) -> list[Sample]:
        return [
            Sample(self.root / line.place, line.label, CAMERA_OF[modality], modality)
            for modality, listed in lists.items()
            for line in listed
        ]

    def _path(self, part: str, modality: Modality) -> Path:
        return self.root / "idx" / f"{part}_{_LIST_OF[modality]}_{self.split}.txt"

    def _list(self, part: str, modality: Modality) -> list[Listed]:
        path = self._path(part, modality)
        if not path.is_file():
            kind = path.stem.rpartition("_")[0]
            names = (re.fullmatch(rf"{kind}_(\d+)\.txt", entry.name) for entry in path.parent.iterdir())
            splits = sorted(int(name[1]) for name in names if name)
            found = f"those of splits {few(splits, SPLITS)}" if splits else entries(path.parent)
            raise DatasetError(
                f"{path}: expected the list of split {self.split}, lines such as {_EXAMPLE!r}; found no such "
                f"file, but {found}"
            )
        listed = read_list(path, {_FOREIGN[modality]}, example=_EXAMPLE)
        check_images(self.root, path, listed)
        return listed
