"""The reader of SYSU-MM01's official gallery draw, rand_perm_cam.mat."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from mrcn_fast.reid.data.datasets.matlab import Cells, MatlabError, Value, read_variable
from mrcn_fast.reid.data.datasets.trees import few
from mrcn_fast.reid.data.types import DatasetError

_VARIABLE: Final = "rand_perm_cam"

# (identity, camera) -> per trial, the order of the identity's images in that camera, from 1.
Permutations = dict[tuple[int, int], list[list[int]]]


def read_permutations(path: Path, cameras: int) -> Permutations:
    """Read the permutations in a MATLAB file, which has `cameras` x 1 cells with a cell per identity each.

    Identities without images in a camera are left out. Raises DatasetError, with the file, camera and
    identity, for another type of file, values that are not integers, and rows that are no permutations.
    """
    expected = f"a MATLAB file with the cell array {_VARIABLE}, {cameras} x 1 cells"
    try:
        variable = read_variable(path, _VARIABLE)
    except (OSError, MatlabError) as error:
        raise DatasetError(f"{path}: expected {expected}; found: {error}") from error
    if not isinstance(variable, Cells) or variable.shape != (cameras, 1):
        raise DatasetError(f"{path}: expected {expected}; found {_described(variable)}")
    permutations: Permutations = {}
    for camera, people in enumerate(variable.items, start=1):
        if not isinstance(people, Cells) or people.shape != (len(people.items), 1):
            raise DatasetError(
                f"{path}: expected a column of cells, one an identity, for camera {camera}; found "
                f"{_described(people)}"
            )
        for identity, rows in enumerate(people.items, start=1):
            if isinstance(rows, Cells) or rows.size:
                where = f"{path}, camera {camera}, identity {identity}"
                permutations[identity, camera] = _checked(where, rows)
    return permutations


def _checked(where: str, rows: Value) -> list[list[int]]:
    if isinstance(rows, Cells) or rows.ndim != 2 or rows.dtype.kind not in "iu":
        raise DatasetError(
            f"{where}: expected (trials, images) integers, places of images from 1; found {_described(rows)}"
        )
    wrong = (np.sort(rows, axis=1) != np.arange(1, rows.shape[1] + 1)).any(axis=1)
    if wrong.any():
        trial = int(wrong.argmax())
        raise DatasetError(
            f"{where}, trial {trial}: expected each place from 1 to {rows.shape[1]} once; found "
            f"{few(rows[trial].tolist(), 20)}. Copy the file from SYSU-MM01's evaluation code again"
        )
    found: list[list[int]] = rows.tolist()
    return found


def _described(value: Value) -> str:
    if isinstance(value, Cells):
        return f"cells of shape {value.shape}"
    return f"{value.dtype} numbers of shape {value.shape}"
