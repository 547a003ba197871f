"""Synthetic data sets in the trees of the published ones: one writer a layout, for the readers here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
from pydantic import Field

from mrcn_fast.reid.data.datasets import llcm, sysu_mm01
from mrcn_fast.reid.data.datasets.regdb import CAMERA_OF
from mrcn_fast.reid.data.synthetic.people import make_person
from mrcn_fast.reid.data.synthetic.rendering import Camera, make_camera, make_pose, render
from mrcn_fast.reid.data.synthetic.tree import (
    MARKER,
    check_test_share,
    claim,
    is_synthetic,
)
from mrcn_fast.reid.data.types import Modality
from mrcn_fast.reid.kinds import NUMPY, AnyPath, Pair, People, Seed, Split, Strength
from mrcn_fast.reid.settings import check_arguments

__all__ = ["MARKER", "WRITERS", "is_synthetic", "write_llcm", "write_regdb", "write_sysu"]

# Called with the images written and all images.
Advance = Callable[[int, int], None]

# Separate random streams, so that a camera's style, say, does not change with the number of identities.
_PERSON, _CAMERA, _ROOM, _IMAGE, _SPLIT = range(5)
# SYSU-MM01's cameras 2 and 3 stand in one room.
_SYSU_ROOMS: Final = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}
# LLCM numbers places, with a sensor for each spectrum; here the infrared ones count from 11.
_LLCM_INFRARED: Final = 10
_JPEG_QUALITY: Final = 92

_Pixels = Annotated[int, Field(ge=16, le=4096), NUMPY]
# Of whom one is for the test.
_Trained = Annotated[int, Field(ge=3, le=9999), NUMPY]


@check_arguments
def write_sysu(
    root: AnyPath,
    *,
    identities: _Trained = 60,
    test_identities: People = 20,
    images_per_camera: People = 6,
    image_size: Pair[_Pixels] = (128, 64),
    seed: Seed = 0,
    modality_gap: Strength = 1.0,
    camera_style: Strength = 1.0,
    pose_spread: Strength = 1.0,
    progress: Advance | None = None,
) -> Path:
    """Write a synthetic data set in SYSU-MM01's tree, for `SYSUMM01` to read; the path of its root.

    `identities` people in all, of them `test_identities` for the test and a quarter of the others for
    validation; each is seen `images_per_camera` times by each of the six cameras (3 and 6 infrared).
    image_size: (height, width). The strengths, 1 by default and 0 for none: modality_gap, how far infrared
    differs from visible; camera_style, how far the cameras' light, noise and rooms differ; pose_spread, how
    far view, pose and crop do. `progress` is called with the images written and all images.

    Equal arguments write identical bytes. `root`/synthetic.json names the tree as synthetic, with its
    parameters. An earlier synthetic tree at `root` is replaced, whatever its layout. Raises ValueError for
    parameters out of range, DatasetError if `root` holds anything else.
    """
    parameters = {
        "layout": "sysu",
        "identities": identities,
        "test_identities": test_identities,
        "images_per_camera": images_per_camera,
        "image_size": list(image_size),
        "seed": seed,
        "modality_gap": modality_gap,
        "camera_style": camera_style,
        "pose_spread": pose_spread,
    }
    check_test_share(parameters)
    root = Path(root)
    claim(root, parameters)
    studio = _Studio.of(parameters)
    cameras = {
        number: studio.camera(number, room, "visible" if number in sysu_mm01.VISIBLE_CAMERAS else "infrared")
        for number, room in _SYSU_ROOMS.items()
    }
    shots = [
        _Shot(f"cam{camera}/{identity:04d}/{index:04d}.jpg", identity, camera, index)
        for identity in range(1, identities + 1)
        for camera in sysu_mm01.CAMERAS
        for index in range(1, images_per_camera + 1)
    ]
    studio.write(root, shots, cameras, progress)
    _write_sysu_identities(root / "exp", identities, test_identities, seed)
    return root


@check_arguments
def write_regdb(
    root: AnyPath,
    *,
    identities: Annotated[int, Field(ge=4, le=9999), NUMPY] = 80,
    images: People = 10,
    splits: Split = 10,
    image_size: Pair[_Pixels] = (128, 64),
    seed: Seed = 0,
    modality_gap: Strength = 1.0,
    camera_style: Strength = 1.0,
    pose_spread: Strength = 1.0,
    progress: Advance | None = None,
) -> Path:
    """Write a synthetic data set in RegDB's tree, for `RegDB` to read; the path of its root.

    `identities` people, each seen `images` times by the visible and by the infrared camera, which stand in
    one room. In each of `splits` splits, half of them (the smaller half, if they are odd) are for the
    training and the others for the test. The thermal images are near infrared ones, as in the other layouts.

    The other arguments, and what is raised and replaced, are `write_sysu`'s. Equal arguments write identical
    bytes.
    """
    parameters = {
        "layout": "regdb",
        "identities": identities,
        "images": images,
        "splits": splits,
        "image_size": list(image_size),
        "seed": seed,
        "modality_gap": modality_gap,
        "camera_style": camera_style,
        "pose_spread": pose_spread,
    }
    root = Path(root)
    claim(root, parameters)
    studio = _Studio.of(parameters)
    cameras = {number: studio.camera(number, 1, modality) for modality, number in CAMERA_OF.items()}
    shots = [
        _Shot(_regdb_place(identity, modality, (identity - 1) * images + index), identity, camera, index)
        for identity in range(1, identities + 1)
        for modality, camera in CAMERA_OF.items()
        for index in range(1, images + 1)
    ]
    studio.write(root, shots, cameras, progress)
    _write_regdb_lists(root / "idx", shots, identities, splits, seed)
    return root


@check_arguments
def write_llcm(
    root: AnyPath,
    *,
    identities: _Trained = 40,
    test_identities: People = 14,
    images_per_camera: People = 3,
    image_size: Pair[_Pixels] = (128, 64),
    seed: Seed = 0,
    modality_gap: Strength = 1.0,
    camera_style: Strength = 1.0,
    pose_spread: Strength = 1.0,
    progress: Advance | None = None,
) -> Path:
    """Write a synthetic data set in LLCM's tree, for `LLCM` to read; the path of its root.

    `identities` people in all, of them `test_identities` for the test; each is seen `images_per_camera` times
    by each of the nine visible cameras and the eight infrared ones; those with equal numbers stand in one
    room.

    The other arguments, and what is raised and replaced, are `write_sysu`'s. Equal arguments write identical
    bytes.
    """
    parameters = {
        "layout": "llcm",
        "identities": identities,
        "test_identities": test_identities,
        "images_per_camera": images_per_camera,
        "image_size": list(image_size),
        "seed": seed,
        "modality_gap": modality_gap,
        "camera_style": camera_style,
        "pose_spread": pose_spread,
    }
    check_test_share(parameters)
    root = Path(root)
    claim(root, parameters)
    studio = _Studio.of(parameters)
    cameras = {number: studio.camera(number, number, "visible") for number in llcm.VISIBLE_CAMERAS}
    for number in llcm.INFRARED_CAMERAS:
        cameras[_LLCM_INFRARED + number] = studio.camera(_LLCM_INFRARED + number, number, "infrared")
    test = set(_shuffled(identities, (seed, _SPLIT))[:test_identities])
    shots = [
        _Shot(_llcm_place(identity, camera, index, identity in test), identity, camera, index)
        for identity in range(1, identities + 1)
        for camera in cameras
        for index in range(1, images_per_camera + 1)
    ]
    studio.write(root, shots, cameras, progress)
    training = [shot for shot in shots if shot.identity not in test]
    folder = root / "idx"
    folder.mkdir()
    for kind in ("vis", "nir"):
        places = [shot for shot in training if shot.place.startswith(f"{kind}/")]
        (folder / f"train_{kind}.txt").write_text(_listed(places), encoding="utf-8")
    (folder / "test_id.txt").write_text(_line(test), encoding="utf-8")
    return root


WRITERS: Final[dict[str, Callable[..., Path]]] = {
    "sysu": write_sysu,
    "regdb": write_regdb,
    "llcm": write_llcm,
}


class _Shot(NamedTuple):
    """One image to be made: its place below the root, and whose `number`-th by which camera it is."""

    place: str
    identity: int
    camera: int
    number: int


@dataclass(frozen=True)
class _Studio:
    """What all images of a tree have in common."""

    seed: int
    image_size: tuple[int, int]
    modality_gap: float
    camera_style: float
    pose_spread: float

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> _Studio:
        height, width = parameters["image_size"]
        names = ("seed", "modality_gap", "camera_style", "pose_spread")
        return cls(image_size=(height, width), **{name: parameters[name] for name in names})

    def camera(self, number: int, room: int, modality: Modality) -> Camera:
        return make_camera(
            np.random.default_rng((self.seed, _CAMERA, number)),
            modality,
            self.image_size,
            np.random.default_rng((self.seed, _ROOM, room)),
            modality_gap=self.modality_gap,
            camera_style=self.camera_style,
            pose_spread=self.pose_spread,
        )

    def write(
        self, root: Path, shots: Sequence[_Shot], cameras: Mapping[int, Camera], progress: Advance | None
    ) -> None:
        """Render and save `shots`, in the format that their names' suffixes say."""
        people = {
            identity: make_person(np.random.default_rng((self.seed, _PERSON, identity)))
            for identity in {shot.identity for shot in shots}
        }
        for written, shot in enumerate(shots, start=1):
            camera = cameras[shot.camera]
            generator = np.random.default_rng((self.seed, _IMAGE, shot.identity, shot.camera, shot.number))
            pose = make_pose(generator, camera, camera_style=self.camera_style, pose_spread=self.pose_spread)
            image = render(people[shot.identity], camera, pose, self.image_size, generator)
            path = root / shot.place
            path.parent.mkdir(parents=True, exist_ok=True)
            # A bitmap has no quality, and ignores it.
            image.save(path, quality=_JPEG_QUALITY)
            if progress:
                progress(written, len(shots))


def _regdb_place(identity: int, modality: Modality, serial: int) -> str:
    folder, letter = ("Visible", "v") if modality == "visible" else ("Thermal", "t")
    return f"{folder}/{identity}/person_{letter}_{serial:05d}_{identity}.bmp"


def _llcm_place(identity: int, camera: int, index: int, test: bool) -> str:
    kind = "vis" if camera < _LLCM_INFRARED else "nir"
    number = camera % _LLCM_INFRARED
    folder = f"test_{kind}/cam{number}" if test else kind
    return f"{folder}/{identity:04d}/{identity:04d}_c{number:02d}_f{index:04d}_{kind}.jpg"


def _write_sysu_identities(folder: Path, identities: int, test_identities: int, seed: int) -> None:
    """exp/*_id.txt: disjoint train, val and test identities, and all of them as available."""
    order = _shuffled(identities, (seed, _SPLIT))
    test, others = order[:test_identities], order[test_identities:]
    validation = max(1, len(others) // 4)
    splits = {"train": others[validation:], "val": others[:validation], "test": test, "available": order}
    folder.mkdir()
    for split, members in splits.items():
        (folder / f"{split}_id.txt").write_text(_line(members), encoding="utf-8")


def _write_regdb_lists(folder: Path, shots: Sequence[_Shot], identities: int, splits: int, seed: int) -> None:
    """idx/{train,test}_{visible,thermal}_N.txt: labels count from 0 in each list."""
    folder.mkdir()
    for split in range(1, splits + 1):
        order = _shuffled(identities, (seed, _SPLIT, split))
        half = identities // 2
        for part, members in (("train", set(order[:half])), ("test", set(order[half:]))):
            for kind in ("visible", "thermal"):
                listed = [
                    shot for shot in shots if shot.identity in members and shot.place.lower().startswith(kind)
                ]
                path = folder / f"{part}_{kind}_{split}.txt"
                path.write_text(_listed(listed), encoding="utf-8")


def _shuffled(identities: int, key: tuple[int, ...]) -> list[int]:
    return (np.random.default_rng(key).permutation(identities) + 1).tolist()


def _listed(shots: Sequence[_Shot]) -> str:
    """Lines of places and labels, which number the identities from 0."""
    labels = {identity: label for label, identity in enumerate(sorted({shot.identity for shot in shots}))}
    return "".join(f"{shot.place} {labels[shot.identity]}\n" for shot in shots)


def _line(identities: Iterable[int]) -> str:
    return ",".join(str(identity) for identity in sorted(identities)) + "\n"
