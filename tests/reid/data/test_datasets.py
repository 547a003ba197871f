"""Data sets are recognized by their trees and opened by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mrcn_fast.reid.data import DATASETS, LLCM, SYSUMM01, DatasetError, RegDB, open_dataset, recognize


def test_trees_are_recognized_and_opened(tiny_tree: Path, tiny_regdb: Path, tiny_llcm: Path) -> None:
    assert list(DATASETS) == ["sysu-mm01", "regdb", "llcm"]
    for root, kind in ((tiny_tree, SYSUMM01), (tiny_regdb, RegDB), (tiny_llcm, LLCM)):
        name = recognize(str(root))
        assert DATASETS[name] is kind
        data = open_dataset(name, root)
        assert type(data) is kind
        assert (data.name, data.root, data.split) == (name, root, 1)


def test_options_reach_their_data_set(tiny_tree: Path, tiny_regdb: Path, tmp_path: Path) -> None:
    assert open_dataset("regdb", tiny_regdb, split=2).split == 2
    data = open_dataset("sysu-mm01", tiny_tree, permutations=tmp_path / "elsewhere.mat")
    with pytest.raises(DatasetError, match=r"elsewhere.mat: expected the official gallery draw"):
        data.searches(draw="official")


@pytest.mark.parametrize("name", ["sysu-mm01", "llcm"])
def test_options_of_another_data_set_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} has one split, 1; got split=2. regdb has ten"):
        open_dataset(name, tmp_path, split=2)
    with pytest.raises(ValueError, match="unknown data set 'market'; known: sysu-mm01, regdb, llcm"):
        open_dataset("market", tmp_path)
    for other in ("regdb", "llcm"):
        with pytest.raises(ValueError, match=f"{other} has no official gallery draw, as sysu-mm01 has; got"):
            open_dataset(other, tmp_path, permutations="rand_perm_cam.mat")


@pytest.mark.parametrize(
    ("name", "fixture", "title", "of_another", "folder", "of_incomplete"),
    [
        (
            "sysu-mm01",
            "tiny_tree",
            "SYSU-MM01",
            "cam1, cam2, .* exp",
            "cam5",
            "cam1, cam2, cam3, cam4, cam6, exp",
        ),
        ("regdb", "tiny_regdb", "RegDB", "Visible, .*idx", "Thermal", "Visible, idx"),
        ("llcm", "tiny_llcm", "LLCM", "idx, test_vis/cam1, .* and 10 more", "test_nir/cam8", "idx, nir"),
    ],
)
def test_incomplete_trees_are_refused(
    name: str,
    fixture: str,
    title: str,
    of_another: str,
    folder: str,
    of_incomplete: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """The message names the folders that are missing and those that were found."""
    root = tmp_path / "tree"
    shutil.copytree(request.getfixturevalue(fixture), root)
    read: Any = DATASETS[name]
    with pytest.raises(DatasetError, match=rf"nowhere: expected {title}'s tree .*found no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=rf"found no {of_another}, but tree"):
        read(tmp_path)
    shutil.rmtree(root / folder)
    with pytest.raises(DatasetError, match=rf"found no {folder}, but {of_incomplete}"):
        read(root)


def test_folders_that_are_no_tree(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere: expected the tree of a data set: .*no such folder"):
        recognize(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"file: expected the tree of a data set: .*; found a file$"):
        recognize(tmp_path / "file")
    (tmp_path / "file").unlink()
    with pytest.raises(DatasetError, match=r"found an empty folder"):
        recognize(tmp_path)
    (tmp_path / "idx").mkdir()
    with pytest.raises(DatasetError, match=r"regdb \(idx beside Visible or Thermal\).*found idx$"):
        recognize(tmp_path)
    # A damaged tree is known all the same, so that its reader can say what it lacks.
    (tmp_path / "Thermal").mkdir()
    assert recognize(tmp_path) == "regdb"
    (tmp_path / "test_nir").mkdir()
    with pytest.raises(DatasetError, match=r"found those of regdb and llcm in one: Thermal, idx, test_nir"):
        recognize(tmp_path)
