"""Writers of synthetic data sets: one per published data set, in the tree that its owners ship."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, NamedTuple

import numpy as np
from pydantic import Field

from mrcn_fast.reid.data.datasets import llcm, sysu_mm01
from mrcn_fast.reid.data.datasets.regdb import CAMERA_OF
from mrcn_fast.reid.data.synthetic.body import Spectrum
from mrcn_fast.reid.data.synthetic.people import make_person
from mrcn_fast.reid.data.synthetic.rendering import Camera, make_camera, make_pose, render
from mrcn_fast.reid.data.synthetic.tree import (
    MARKER,
    check_test_share,
    claim,
    is_synthetic,
)
from mrcn_fast.reid.data.types import Modality
from mrcn_fast.reid.kinds import NUMPY, AnyPath, ImagesOfPerson, Pair, People, Seed, Share, Split, Strength
from mrcn_fast.reid.settings import SettingError, check_arguments, check_fields

__all__ = [
    "MARKER",
    "OPTIONS",
    "WRITERS",
    "LLCMOptions",
    "RegDBOptions",
    "SYSUOptions",
    "is_synthetic",
    "write_llcm",
    "write_regdb",
    "write_sysu",
]

# Called with the number of images written so far and the number of all images.
Advance = Callable[[int, int], None]

# Each purpose has a random stream of its own, so that, for example, the style of a camera does not change
# with the number of identities.
_PERSON, _CAMERA, _ROOM, _IMAGE, _SPLIT = range(5)
# SYSU-MM01's cameras 2 and 3 stand in the same room of a building.
_SYSU_ROOMS: Final = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}
# LLCM numbers places, and each place has a sensor per spectrum. Here the infrared cameras count from 11.
_LLCM_INFRARED: Final = 10
_JPEG_QUALITY: Final = 92

_Pixels = Annotated[int, Field(ge=16, le=4096), NUMPY]
# At least two people are for the training and one for the test.
_Trained = Annotated[int, Field(ge=3, le=9999), NUMPY]


@dataclass(kw_only=True)
class _Options:
    """The values that every synthetic data set has. Raises SettingError for a value out of range."""

    layout: ClassVar[str]

    image_size: Pair[_Pixels] = (128, 64)
    """Height and width of the images in pixels."""
    seed: Seed = 0
    """Seed of people, cameras, images and splits."""
    modality_gap: Strength = 1.0
    """How far the brightness of a surface in infrared differs from that in visible light; 0: not at all."""
    infrared_colour: Share = 0.0
    """How much of the colour an infrared image keeps; 0: none, as the image of an infrared camera."""
    camera_style: Strength = 1.0
    """How far light, noise and rooms differ between the cameras; 0: not at all."""
    pose_spread: Strength = 1.0
    """How far view, pose and crop differ between the images of a person; 0: not at all."""

    def __post_init__(self) -> None:
        check_fields(self, SettingError)

    def parameters(self) -> dict[str, Any]:
        """The layout and all values: those of the layout first, as synthetic.json lists them."""
        values = asdict(self)
        shared = {name: values.pop(name) for name in _Options.__dataclass_fields__ if name in values}
        return {"layout": self.layout} | values | shared

    def camera(self, number: int, room: int, modality: Modality) -> Camera:
        """The camera with this number in this room."""
        return make_camera(
            np.random.default_rng((self.seed, _CAMERA, number)),
            modality,
            self.image_size,
            np.random.default_rng((self.seed, _ROOM, room)),
            infrared_spectrum=Spectrum(self.modality_gap, self.infrared_colour),
            camera_style=self.camera_style,
            pose_spread=self.pose_spread,
        )


@dataclass(kw_only=True)
class SYSUOptions(_Options):
    """The values of a synthetic data set in SYSU-MM01's tree."""

    layout = "sysu"

    identities: _Trained = 60
    """People in all."""
    test_identities: People = 20
    """People for the test; a quarter of the others are for validation."""
    images_per_camera: ImagesOfPerson = 6
    """Images of each person by each of the six cameras, of which 3 and 6 are infrared."""


@dataclass(kw_only=True)
class RegDBOptions(_Options):
    """The values of a synthetic data set in RegDB's tree."""

    layout = "regdb"

    identities: Annotated[int, Field(ge=4, le=9999), NUMPY] = 80
    """People in all. In each split, half of them (rounded down) are for the training."""
    images: ImagesOfPerson = 10
    """Images of each person by the visible and by the infrared camera."""
    splits: Split = 10
    """Random splits into training and test."""


@dataclass(kw_only=True)
class LLCMOptions(_Options):
    """The values of a synthetic data set in LLCM's tree."""

    layout = "llcm"

    identities: _Trained = 40
    """People in all."""
    test_identities: People = 14
    """People for the test."""
    images_per_camera: ImagesOfPerson = 3
    """Images of each person by each of the nine visible and the eight infrared cameras."""


@check_arguments
def write_sysu(root: AnyPath, *, progress: Advance | None = None, **options: Any) -> Path:
    """Write a synthetic data set in SYSU-MM01's tree, which `SYSUMM01` reads.

    Equal arguments write identical bytes. `root`/synthetic.json marks the tree as synthetic and holds its
    parameters. An earlier synthetic tree at `root` is replaced, whatever its layout.

    Args:
        root: the folder to write to; it is made where it isn't there
        progress: called with the number of images written so far and the number of all images
        options: the fields of `SYSUOptions`

    Returns:
        the path of the tree's root

    Raises:
        ValueError: for parameters out of range
        DatasetError: if `root` holds anything but a synthetic tree
    """
    chosen = SYSUOptions(**options)
    parameters = chosen.parameters()
    check_test_share(parameters)
    root = Path(root)
    claim(root, parameters)
    cameras = {
        number: chosen.camera(number, room, "visible" if number in sysu_mm01.VISIBLE_CAMERAS else "infrared")
        for number, room in _SYSU_ROOMS.items()
    }
    shots = [
        _Shot(f"cam{camera}/{identity:04d}/{index:04d}.jpg", identity, camera, index)
        for identity in range(1, chosen.identities + 1)
        for camera in sysu_mm01.CAMERAS
        for index in range(1, chosen.images_per_camera + 1)
    ]
    _write_images(root, chosen, shots, cameras, progress)
    _write_sysu_identities(root / "exp", chosen)
    return root


@check_arguments
def write_regdb(root: AnyPath, *, progress: Advance | None = None, **options: Any) -> Path:
    """Write a synthetic data set in RegDB's tree, which `RegDB` reads.

    The visible and the infrared camera stand in one room. Infrared images look near infrared, as in the other
    layouts, although RegDB's are thermal. `root`, `progress`, the result and the errors are those of
    `write_sysu`; `options` are the fields of `RegDBOptions`.
    """
    chosen = RegDBOptions(**options)
    root = Path(root)
    claim(root, chosen.parameters())
    cameras = {number: chosen.camera(number, 1, modality) for modality, number in CAMERA_OF.items()}
    shots = [
        _Shot(
            _regdb_place(identity, modality, (identity - 1) * chosen.images + index), identity, camera, index
        )
        for identity in range(1, chosen.identities + 1)
        for modality, camera in CAMERA_OF.items()
        for index in range(1, chosen.images + 1)
    ]
    _write_images(root, chosen, shots, cameras, progress)
    _write_regdb_lists(root / "idx", shots, chosen)
    return root


@check_arguments
def write_llcm(root: AnyPath, *, progress: Advance | None = None, **options: Any) -> Path:
    """Write a synthetic data set in LLCM's tree, which `LLCM` reads.

    A visible and an infrared camera with equal numbers stand in one room. `root`, `progress`, the result and
    the errors are those of `write_sysu`; `options` are the fields of `LLCMOptions`.
    """
    chosen = LLCMOptions(**options)
    parameters = chosen.parameters()
    check_test_share(parameters)
    root = Path(root)
    claim(root, parameters)
    cameras = {number: chosen.camera(number, number, "visible") for number in llcm.VISIBLE_CAMERAS}
    for number in llcm.INFRARED_CAMERAS:
        cameras[_LLCM_INFRARED + number] = chosen.camera(_LLCM_INFRARED + number, number, "infrared")
    test = set(_shuffled(chosen.identities, (chosen.seed, _SPLIT))[: chosen.test_identities])
    shots = [
        _Shot(_llcm_place(identity, camera, index, identity in test), identity, camera, index)
        for identity in range(1, chosen.identities + 1)
        for camera in cameras
        for index in range(1, chosen.images_per_camera + 1)
    ]
    _write_images(root, chosen, shots, cameras, progress)
    _write_llcm_lists(root / "idx", [shot for shot in shots if shot.identity not in test], test)
    return root


OPTIONS: Final[dict[str, type[_Options]]] = {
    options.layout: options for options in (SYSUOptions, RegDBOptions, LLCMOptions)
}
WRITERS: Final[dict[str, Callable[..., Path]]] = {
    "sysu": write_sysu,
    "regdb": write_regdb,
    "llcm": write_llcm,
}


class _Shot(NamedTuple):
    """One image to render: its path below the root, and that it is image `number` of a person by a camera."""

    place: str
    identity: int
    camera: int
    number: int


def _write_images(
    root: Path,
    options: _Options,
    shots: Sequence[_Shot],
    cameras: Mapping[int, Camera],
    progress: Advance | None,
) -> None:
    """Render and save `shots`, in the format that the suffixes of their names say."""
    people = {
        identity: make_person(np.random.default_rng((options.seed, _PERSON, identity)))
        for identity in {shot.identity for shot in shots}
    }
    strengths = {"camera_style": options.camera_style, "pose_spread": options.pose_spread}
    for written, shot in enumerate(shots, start=1):
        camera = cameras[shot.camera]
        generator = np.random.default_rng((options.seed, _IMAGE, shot.identity, shot.camera, shot.number))
        pose = make_pose(generator, camera, **strengths)
        image = render(people[shot.identity], camera, pose, options.image_size, generator)
        path = root / shot.place
        path.parent.mkdir(parents=True, exist_ok=True)
        # Bitmaps have no quality; Pillow ignores it there.
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


def _write_sysu_identities(folder: Path, options: SYSUOptions) -> None:
    """Write exp/*_id.txt: disjoint train, val and test identities, and all of them as available."""
    order = _shuffled(options.identities, (options.seed, _SPLIT))
    test, others = order[: options.test_identities], order[options.test_identities :]
    validation = max(1, len(others) // 4)
    splits = {"train": others[validation:], "val": others[:validation], "test": test, "available": order}
    _write_lists(folder, {f"{split}_id.txt": _line(members) for split, members in splits.items()})


def _write_regdb_lists(folder: Path, shots: Sequence[_Shot], options: RegDBOptions) -> None:
    """Write idx/{train,test}_{visible,thermal}_N.txt; labels count from 0 in each list."""
    lists: dict[str, str] = {}
    for split in range(1, options.splits + 1):
        order = _shuffled(options.identities, (options.seed, _SPLIT, split))
        half = options.identities // 2
        for part, members in (("train", set(order[:half])), ("test", set(order[half:]))):
            for kind in ("visible", "thermal"):
                listed = [
                    shot for shot in shots if shot.identity in members and shot.place.lower().startswith(kind)
                ]
                lists[f"{part}_{kind}_{split}.txt"] = _listed(listed)
    _write_lists(folder, lists)


def _write_llcm_lists(folder: Path, training: Sequence[_Shot], test: Iterable[int]) -> None:
    """Write idx/train_{vis,nir}.txt and idx/test_id.txt."""
    lists = {"test_id.txt": _line(test)}
    for kind in ("vis", "nir"):
        places = [shot for shot in training if shot.place.startswith(f"{kind}/")]
        lists[f"train_{kind}.txt"] = _listed(places)
    _write_lists(folder, lists)


def _write_lists(folder: Path, lists: Mapping[str, str]) -> None:
    """Write the lists in `folder`, by which `is_whole` knows a tree: all of them or none."""
    part = folder.with_name(f"{folder.name}.part")
    # An interrupted writing may have left one.
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name, text in lists.items():
        (part / name).write_text(text, encoding="utf-8")
    part.rename(folder)


def _shuffled(identities: int, key: tuple[int, ...]) -> list[int]:
    return (np.random.default_rng(key).permutation(identities) + 1).tolist()


def _listed(shots: Sequence[_Shot]) -> str:
    """Lines of paths and labels; the labels number the identities from 0."""
    labels = {identity: label for label, identity in enumerate(sorted({shot.identity for shot in shots}))}
    return "".join(f"{shot.place} {labels[shot.identity]}\n" for shot in shots)


def _line(identities: Iterable[int]) -> str:
    return ",".join(str(identity) for identity in sorted(identities)) + "\n"
