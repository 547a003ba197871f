"""Synthetic data sets in the trees of the published ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from mrcn_fast.reid.data.people import make_person
from mrcn_fast.reid.data.rendering import Camera, make_camera, make_pose, render
from mrcn_fast.reid.data.samples import DatasetError, Modality
from mrcn_fast.reid.data.sysu_mm01 import CAMERAS, VISIBLE_CAMERAS

# The file that names a tree as synthetic, and as one that may be written anew.
MARKER: Final = "synthetic.json"
_NOTE: Final = "synthetic person images, rendered by mrcn_fast; no real person is shown"

# Separate random streams, so that a camera's style, say, does not change with the number of identities.
_PERSON, _CAMERA, _ROOM, _IMAGE, _SPLIT = range(5)
# SYSU-MM01's cameras 2 and 3 stand in one room.
_SYSU_ROOMS: Final = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}
_JPEG_QUALITY: Final = 92


def write_sysu(
    root: str | Path,
    *,
    identities: int = 60,
    test_identities: int = 20,
    images_per_camera: int = 6,
    image_size: tuple[int, int] = (128, 64),
    seed: int = 0,
    modality_gap: float = 1.0,
    camera_style: float = 1.0,
    pose_spread: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic data set in SYSU-MM01's tree, for `SYSUMM01` to read; the path of its root.

    `identities` people in all, of them `test_identities` for the test and a quarter of the others for
    validation; each is seen `images_per_camera` times by each of the six cameras (3 and 6 infrared).
    image_size: (height, width). The strengths, 1 by default and 0 for none: modality_gap, how far infrared
    differs from visible; camera_style, how far the cameras' light, noise and rooms differ; pose_spread, how
    far view, pose and crop do. `progress` is called with the images written and all images.

    Equal arguments write identical bytes. `root`/synthetic.json names the tree as synthetic, with its
    parameters. An earlier synthetic tree at `root` is replaced. Raises ValueError for parameters out of
    range, DatasetError if `root` holds anything else.
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
    _check_parameters(parameters)
    root = Path(root)
    _claim(root, parameters)
    cameras = {camera: _sysu_camera(camera, parameters) for camera in CAMERAS}
    total, written = identities * len(CAMERAS) * images_per_camera, 0
    for identity in range(1, identities + 1):
        person = make_person(np.random.default_rng((seed, _PERSON, identity)))
        for number, camera in cameras.items():
            folder = root / f"cam{number}" / f"{identity:04d}"
            folder.mkdir(parents=True)
            for index in range(1, images_per_camera + 1):
                generator = np.random.default_rng((seed, _IMAGE, identity, number, index))
                pose = make_pose(generator, camera, camera_style=camera_style, pose_spread=pose_spread)
                image = render(person, camera, pose, image_size, generator)
                image.save(folder / f"{index:04d}.jpg", quality=_JPEG_QUALITY)
                written += 1
                if progress:
                    progress(written, total)
    _write_splits(root / "exp", identities, test_identities, seed)
    return root


def _sysu_camera(number: int, parameters: dict[str, Any]) -> Camera:
    seed, (height, width) = parameters["seed"], parameters["image_size"]
    modality: Modality = "visible" if number in VISIBLE_CAMERAS else "infrared"
    return make_camera(
        np.random.default_rng((seed, _CAMERA, number)),
        modality,
        (height, width),
        np.random.default_rng((seed, _ROOM, _SYSU_ROOMS[number])),
        modality_gap=parameters["modality_gap"],
        camera_style=parameters["camera_style"],
        pose_spread=parameters["pose_spread"],
    )


def _write_splits(folder: Path, identities: int, test_identities: int, seed: int) -> None:
    """exp/*_id.txt: disjoint train, val and test identities, and all of them as available."""
    order = (np.random.default_rng((seed, _SPLIT)).permutation(identities) + 1).tolist()
    test, others = order[:test_identities], order[test_identities:]
    validation = max(1, len(others) // 4)
    splits = {"train": others[validation:], "val": others[:validation], "test": test, "available": order}
    folder.mkdir()
    for split, members in splits.items():
        (folder / f"{split}_id.txt").write_text(_line(members), encoding="utf-8")


def _line(identities: Iterable[int]) -> str:
    return ",".join(str(identity) for identity in sorted(identities)) + "\n"


def _claim(root: Path, parameters: dict[str, Any]) -> None:
    """Make `root` an empty synthetic tree with its marker; never remove anything that is not one."""
    if root.exists() and not root.is_dir():
        raise DatasetError(f"{root}: expected a folder to write to, or none; found a file")
    if root.is_dir() and any(root.iterdir()):
        if not _is_synthetic(root):
            found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8])
            raise DatasetError(
                f"{root}: expected an empty folder or an earlier synthetic data set (with {MARKER}); found "
                f"{found}. Nothing was written: choose another folder"
            )
        for name in [*(f"cam{camera}" for camera in CAMERAS), "exp"]:
            if (root / name).is_dir():
                shutil.rmtree(root / name)
    root.mkdir(parents=True, exist_ok=True)
    # First of all, so that an interrupted run can be repeated.
    note = {"what": _NOTE, **parameters}
    (root / MARKER).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _is_synthetic(root: Path) -> bool:
    try:
        note = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(note, dict) and note.get("what") == _NOTE


def _check_parameters(parameters: dict[str, Any]) -> None:
    for name, least in (("identities", 3), ("test_identities", 1), ("images_per_camera", 1), ("seed", 0)):
        if parameters[name] < least:
            raise ValueError(f"{name} must be at least {least}; got {parameters[name]}")
    if parameters["identities"] > 9999 or parameters["images_per_camera"] > 9999:
        raise ValueError("identities and images_per_camera have four digits in the tree; got more than 9999")
    # One for train_id.txt and one for val_id.txt.
    if parameters["test_identities"] > parameters["identities"] - 2:
        raise ValueError(
            f"test_identities must leave at least 2 identities for the training; got "
            f"{parameters['test_identities']} of {parameters['identities']}"
        )
    if min(parameters["image_size"]) < 16:
        raise ValueError(f"image_size must be (height, width) of at least 16; got {parameters['image_size']}")
    for name in ("modality_gap", "camera_style", "pose_spread"):
        if not 0 <= parameters[name] <= 2:
            raise ValueError(f"{name} must be from 0 (none) over 1 (default) to 2; got {parameters[name]}")
