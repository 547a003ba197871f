"""A small tree of SYSU-MM01 with empty files, for the tests of its reader."""

from __future__ import annotations

from pathlib import Path

from mrcn_fast.reid.data import Sample

# Images of each identity by camera; 3 has no infrared, 4 no visible images, 7 is not seen by camera 1.
COUNTS = {
    1: {1: 2, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1},
    2: {1: 1, 2: 2, 3: 1, 4: 1, 5: 1, 6: 2},
    3: {1: 1, 4: 2},
    4: {6: 1},
    6: {1: 3, 2: 3, 3: 2, 4: 12, 5: 3, 6: 2},
    7: {2: 11, 3: 1, 5: 3, 6: 1},
    12: {1: 4, 4: 4, 6: 3},
}


def write_tree(root: Path) -> Path:
    """Write the tree of `COUNTS` under `root`, and return it."""
    for identity, cameras in COUNTS.items():
        for camera, images in cameras.items():
            folder = root / f"cam{camera}" / f"{identity:04d}"
            folder.mkdir(parents=True)
            for image in range(1, images + 1):
                (folder / f"{image:04d}.jpg").touch()
    (root / "cam1" / "0001" / "Thumbs.db").touch()
    (root / "cam1" / "0001" / "._0001.jpg").touch()
    (root / "exp").mkdir()
    for split, text in {"train": "3,1\n", "val": "2, 4", "test": "12,7,6", "available": "1"}.items():
        (root / "exp" / f"{split}_id.txt").write_text(text)
    return root


def names(samples: list[Sample]) -> list[tuple[int, int, str]]:
    """The identity, the camera and the file name of each sample."""
    return [(s.identity, s.camera, s.path.name) for s in samples]
