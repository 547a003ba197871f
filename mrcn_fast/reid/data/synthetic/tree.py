"""The folder of a synthetic tree: its marker, and the check that nothing else is replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mrcn_fast.reid.data.datasets.trees import entries
from mrcn_fast.reid.data.types import DatasetError

# The file that marks a tree as synthetic, so that it may be replaced.
MARKER: Final = "synthetic.json"
_NOTE: Final = "synthetic person images, rendered by mrcn_fast; no real person is shown"
# The folders that each layout writes besides the marker; nothing else is ever removed.
FOLDERS: Final = {
    "sysu": ("cam1", "cam2", "cam3", "cam4", "cam5", "cam6", "exp"),
    "regdb": ("Visible", "Thermal", "idx"),
    "llcm": ("vis", "nir", "test_vis", "test_nir", "idx"),
}


def is_synthetic(root: str | Path) -> bool:
    """Whether this library wrote the tree at `root`, in any layout."""
    return _layout(Path(root)) is not None


def claim(root: Path, parameters: Mapping[str, Any]) -> None:
    """Make `root` an empty synthetic tree with a marker; only an earlier synthetic tree is removed.

    Raises DatasetError where `root` has other content.
    """
    if root.exists() and not root.is_dir():
        raise DatasetError(f"{root}: expected a folder to write to, or none; found a file")
    if root.is_dir() and any(root.iterdir()):
        earlier = _layout(root)
        if earlier is None:
            raise DatasetError(
                f"{root}: expected an empty folder or an earlier synthetic data set (with {MARKER}); found "
                f"{entries(root)}. Nothing was written: choose another folder"
            )
        foreign = [
            name
            for name in FOLDERS[parameters["layout"]]
            if name not in FOLDERS[earlier] and (root / name).exists()
        ]
        if foreign:
            raise DatasetError(
                f"{root}: expected nothing in the way of the new tree but the earlier synthetic one, of the "
                f"layout {earlier}; found {', '.join(foreign)}. Nothing was written: choose another folder"
            )
        for name in FOLDERS[earlier]:
            if (root / name).is_dir():
                shutil.rmtree(root / name)
    root.mkdir(parents=True, exist_ok=True)
    # The marker is written first, so that an interrupted writing can be repeated.
    note = {"what": _NOTE, **parameters}
    (root / MARKER).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def check_replaceable(root: Path, parameters: Mapping[str, Any]) -> None:
    """Raise DatasetError where `root` has a synthetic data set of other parameters."""
    if not is_synthetic(root):
        return
    earlier = json.loads((root / MARKER).read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(parameters))
    names = sorted(name for name in asked if earlier.get(name) != asked[name])
    if names:
        values = ", ".join(f"{name} {earlier.get(name)!r} instead of {asked[name]!r}" for name in names)
        raise DatasetError(
            f"{root}: expected a new folder or a synthetic data set of the same values; found one with "
            f"{values}. Give another folder, or --overwrite to replace it"
        )


def check_test_share(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError unless two identities remain for the training."""
    if parameters["test_identities"] > parameters["identities"] - 2:
        raise ValueError(
            f"got test_identities={parameters['test_identities']} with identities="
            f"{parameters['identities']}, expected at least 2 identities more than test_identities"
        )


def _layout(root: Path) -> str | None:
    """Read the layout from the marker in `root`; None without such a marker."""
    try:
        note = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(note, dict) or note.get("what") != _NOTE:
        return None
    layout = note.get("layout")
    return layout if isinstance(layout, str) and layout in FOLDERS else None
