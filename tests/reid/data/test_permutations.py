"""SYSU-MM01's official draw: what the reader takes from rand_perm_cam.mat, and which files it refuses."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mrcn_fast.reid.data import SYSUMM01, DatasetError
from mrcn_fast.reid.data.datasets.permutations import read_permutations
from mrcn_fast.reid.data.datasets.sysu_mm01 import PERMUTATIONS
from tests.reid.data.refusals import damaged_copies, refused
from tests.reid.data.sysu_tree import COUNTS, names, write_tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "SYSU-MM01")


def save_permutations(
    path: Path, *, trials: int = 10, changed: dict[tuple[int, int], int] | None = None
) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    generator = np.random.default_rng(0)
    cameras = np.empty((6, 1), dtype=object)
    for camera in range(1, 7):
        cells = np.empty((12, 1), dtype=object)
        for identity in range(1, 13):
            count = COUNTS.get(identity, {}).get(camera, 0)
            count = (changed or {}).get((camera, identity), count)
            rows = [generator.permutation(count) + 1 for _ in range(trials)]
            cells[identity - 1, 0] = np.array(rows, dtype=np.uint8).reshape(trials, count)
        cameras[camera - 1, 0] = cells
    scipy_io.savemat(path, {"rand_perm_cam": cameras})


@pytest.mark.parametrize("place", ["beside", "exp", "given"])
def test_official_draw_takes_the_first_of_a_row(root: Path, tmp_path: Path, place: str) -> None:
    path = {"beside": root, "exp": root / "exp", "given": tmp_path}[place] / PERMUTATIONS
    save_permutations(path)
    cells = pytest.importorskip("scipy.io").loadmat(path)["rand_perm_cam"]
    data = SYSUMM01(root, permutations=path if place == "given" else None)
    for shots in (1, 10):
        expected = [
            (identity, camera, f"{number:04d}.jpg")
            for identity in (6, 7, 12)
            for camera in (1, 2)
            if camera in COUNTS[identity]
            for number in cells[camera - 1, 0][identity - 1, 0][4, :shots].tolist()
        ]
        assert names(data.gallery("indoor", shots=shots, trial=4, draw="official")) == expected


def test_official_draw_of_another_tree_is_refused(root: Path) -> None:
    with refused(match=rf"{PERMUTATIONS}: expected the official gallery draw"):
        SYSUMM01(root).gallery(draw="official")
    path = root / PERMUTATIONS
    save_permutations(path, changed={(4, 6): 13})
    with refused(match=r"permutations of the 12 images in .*cam4.0006; found 13 places"):
        SYSUMM01(root).gallery(draw="official")
    save_permutations(path, trials=3)
    with pytest.raises(ValueError, match="trial must be below 3"):
        SYSUMM01(root).gallery(draw="official", trial=3)
    path.write_text("no MATLAB file")
    with refused(match="expected a MATLAB file"):
        SYSUMM01(root).gallery(draw="official")


@pytest.mark.parametrize("compress", [False, True])
def test_the_official_draw_may_be_compressed(root: Path, compress: bool) -> None:
    path = root / PERMUTATIONS
    save_permutations(path)
    expected = SYSUMM01(root).gallery(draw="official", trial=4)
    scipy_io = pytest.importorskip("scipy.io")
    cells = scipy_io.loadmat(path)["rand_perm_cam"]
    others = {"before": np.arange(6.0), "text": "a text", "struct": {"field": 1}}
    scipy_io.savemat(path, {**others, "rand_perm_cam": cells}, do_compression=compress)
    assert SYSUMM01(root).gallery(draw="official", trial=4) == expected


def changed_rows(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], object]:
    """Change the permutations of person 6 in camera 4."""

    def changed(cells: np.ndarray) -> np.ndarray:
        cells[3, 0][5, 0] = change(cells[3, 0][5, 0])
        return cells

    return changed


def with_place(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def changed(rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.int16)
        rows[2, 1] = value
        return rows

    return changed


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (changed_rows(lambda rows: rows.astype(float)), "camera 4, identity 6: .*found float64 numbers"),
        (changed_rows(lambda rows: rows + 0.5), "camera 4, identity 6: .*found float64 numbers"),
        (changed_rows(lambda rows: rows * np.nan), "camera 4, identity 6: .*found float64 numbers"),
        (
            changed_rows(lambda rows: rows - 1),
            "camera 4, identity 6, trial 0: expected each place from 1 to 12",
        ),
        (
            changed_rows(lambda rows: rows + 1),
            "camera 4, identity 6, trial 0: expected each place from 1 to 12",
        ),
        (
            changed_rows(with_place(13)),
            "camera 4, identity 6, trial 2: expected each place from 1 to 12 once",
        ),
        (
            changed_rows(with_place(-1)),
            "camera 4, identity 6, trial 2: expected each place from 1 to 12 once",
        ),
        (
            changed_rows(lambda rows: rows[:, [0, *range(11)]]),
            "trial 0: expected each place from 1 to 12 once",
        ),
        (
            changed_rows(lambda rows: rows[:, :, None].repeat(2, 2)),
            r"found uint8 numbers of shape \(10, 12, 2\)",
        ),
        (changed_rows(lambda rows: rows[:, :11]), "found 11 places|trial 0: expected each place"),
        (lambda cells: cells[:5], r"6 x 1 cells; found cells of shape \(5, 1\)"),
        (lambda cells: cells.T, r"6 x 1 cells; found cells of shape \(1, 6\)"),
        (lambda cells: np.arange(6.0)[:, None], r"6 x 1 cells; found float64 numbers of shape \(6, 1\)"),
        (lambda cells: "text", "found: something else than cells and real numbers"),
        (lambda cells: np.array([1j]), "found: something else than cells and real numbers"),
    ],
)
def test_an_official_draw_that_is_none_is_refused(
    root: Path, change: Callable[[np.ndarray], object], found: str
) -> None:
    path = root / PERMUTATIONS
    save_permutations(path)
    scipy_io = pytest.importorskip("scipy.io")
    scipy_io.savemat(path, {"rand_perm_cam": change(scipy_io.loadmat(path)["rand_perm_cam"])})
    with refused(match=rf"{PERMUTATIONS}.*{found}"):
        SYSUMM01(root).gallery(draw="official")


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("text", "no MATLAB file of version 5 to 7"),
        ("empty", "no MATLAB file of version 5 to 7"),
        ("pickle", "no MATLAB file of version 5 to 7"),
        ("version 4", "no MATLAB file of version 5 to 7"),
        ("version 7.3", "a MATLAB file of version 7.3; save it anew"),
        ("cut", "a MATLAB file that is cut off"),
        ("other", "no such variable, but test_id"),
    ],
)
def test_other_files_are_no_official_draw(root: Path, kind: str, found: str) -> None:
    path = root / PERMUTATIONS
    save_permutations(path)
    whole, version4, other = path.read_bytes(), io.BytesIO(), io.BytesIO()
    scipy_io = pytest.importorskip("scipy.io")
    scipy_io.savemat(version4, {"rand_perm_cam": np.arange(6.0)}, format="4")
    scipy_io.savemat(other, {"test_id": np.arange(6.0)})
    content = {
        "text": b"no MATLAB file",
        "empty": b"",
        "pickle": pickle.dumps({"rand_perm_cam": [1, 2, 3] * 99}),
        "version 4": version4.getvalue(),
        "version 7.3": whole[:124] + b"\x00\x02IM" + bytes(512),
        "cut": whole[: len(whole) // 2],
        "other": other.getvalue(),
    }
    path.write_bytes(content[kind])
    with refused(match=rf"{PERMUTATIONS}: expected a MATLAB file .*; found: {found}"):
        SYSUMM01(root).gallery(draw="official")


@pytest.mark.parametrize("compress", [False, True])
def test_a_damaged_official_draw_is_refused_or_the_same(root: Path, compress: bool) -> None:
    """Some of these files end the process in scipy's reader."""
    path = root / PERMUTATIONS
    save_permutations(path)
    scipy_io = pytest.importorskip("scipy.io")
    cells = scipy_io.loadmat(path)["rand_perm_cam"]
    scipy_io.savemat(path, {"rand_perm_cam": cells}, do_compression=compress)
    errors = 0
    for broken in damaged_copies(path.read_bytes(), 300, first=400, cut=0.2):
        path.write_bytes(broken)
        try:
            read_permutations(path, 6)
        except DatasetError as error:
            errors += 1
            assert str(error).startswith(str(path))
    assert errors > 50


def test_official_searches(root: Path) -> None:
    save_permutations(root / PERMUTATIONS)
    data = SYSUMM01(root)
    (search,) = data.searches("indoor", draw="official", trials=10)
    assert search.settings == "single-shot, official draw"
    assert list(search.galleries[7]) == data.gallery("indoor", trial=7, draw="official")
    with pytest.raises(ValueError, match="trial must be below 10"):
        data.searches(draw="official", trials=11)
