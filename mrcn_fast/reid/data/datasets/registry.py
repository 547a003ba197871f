"""The data sets by name, and the recognition of a data set by its tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from mrcn_fast.reid.data.datasets.llcm import LLCM
from mrcn_fast.reid.data.datasets.regdb import RegDB
from mrcn_fast.reid.data.datasets.sysu_mm01 import SYSUMM01
from mrcn_fast.reid.data.datasets.trees import check_is_folder, entries
from mrcn_fast.reid.data.types import DatasetError, PersonDataset

DATASETS: Final[dict[str, type[PersonDataset]]] = {
    dataset.name: dataset for dataset in (SYSUMM01, RegDB, LLCM)
}
# The folders by which a tree is recognized: all of the first, or any of the second in a damaged tree.
_SIGNS: Final = {
    SYSUMM01.name: (("exp",), tuple(f"cam{camera}" for camera in range(1, 7))),
    RegDB.name: (("idx",), ("Visible", "Thermal")),
    LLCM.name: (("idx",), ("test_vis", "test_nir")),
}


def open_dataset(
    name: str,
    root: str | Path,
    *,
    split: int = 1,
    permutations: str | Path | None = None,
    hold_out_val: bool = False,
) -> PersonDataset:
    """Open a data set.

    Args:
        name: "sysu-mm01", "regdb" or "llcm"
        root: the root of its tree
        split: of RegDB, from 1 to 10
        permutations: path of SYSU-MM01's rand_perm_cam.mat
        hold_out_val: leave SYSU-MM01's validation identities out of the training set

    Raises:
        ValueError: for an unknown name, and for a split, permutations or validation identities of another
            data set
        DatasetError: for a damaged tree

    Example:
        >>> dataset = open_dataset("regdb", "data/regdb", split=1)
        >>> [search.name for search in dataset.searches()]
        ['visible-to-infrared', 'infrared-to-visible']
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    if split != 1 and name != RegDB.name:
        raise ValueError(f"{name} has one split, 1; got split={split}. {RegDB.name} has ten")
    if permutations is not None and name != SYSUMM01.name:
        raise ValueError(
            f"{name} has no official gallery draw, as {SYSUMM01.name} has; got permutations={permutations}"
        )
    if name == SYSUMM01.name:
        return SYSUMM01(root, permutations=permutations, hold_out_val=hold_out_val)
    if hold_out_val:
        raise ValueError(f"{name} has no list of validation identities, as {SYSUMM01.name} has")
    opened: Callable[[str | Path], PersonDataset] = DATASETS[name]
    return RegDB(root, split=split) if name == RegDB.name else opened(root)


def recognize(root: str | Path) -> str:
    """Recognize a data set by the names of the folders in its tree, and return its name.

    Raises DatasetError, which names the entries, for the tree of no data set or of several.
    """
    root = Path(root)
    expected = "the tree of a data set: " + "; ".join(
        f"{name} ({', '.join(always)} beside {' or '.join(some)})" for name, (always, some) in _SIGNS.items()
    )
    check_is_folder(root, expected)
    names = [
        name
        for name, (always, some) in _SIGNS.items()
        if all((root / folder).is_dir() for folder in always)
        and any((root / folder).is_dir() for folder in some)
    ]
    if len(names) != 1:
        both = f"those of {' and '.join(names)} in one: " if names else ""
        raise DatasetError(f"{root}: expected {expected}; found {both}{entries(root)}")
    return names[0]


def is_whole(root: str | Path) -> bool:
    """Whether a tree was written completely; the lists of identities are written last."""
    try:
        recognize(root)
    except DatasetError:
        return False
    return True
