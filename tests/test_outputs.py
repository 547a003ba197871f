"""Places for results: those that can't take any are refused, and nothing is left at the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mrcn_fast.outputs import check_file, check_folder


def test_what_can_be_written_to_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    check_folder(tmp_path, "the run")
    check_folder(tmp_path / "a" / "b", "the run")
    check_file(file, "the results")
    check_file(tmp_path / "c" / "new", "the results")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "kept"


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below" / "it"):
        with pytest.raises(
            OSError, match=rf"{path}: expected a folder for the run; found a file at {file}\."
        ):
            check_folder(path, "the run")
    with pytest.raises(OSError, match=f"{tmp_path}: expected a file for the results; found a folder"):
        check_file(tmp_path, "the results")
    with pytest.raises(OSError, match=f"found a file at {file}"):
        check_file(file / "below", "the results")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=f"found a file at {link}"):
        check_folder(link / "below", "the run")


def test_what_the_system_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="expected a folder for the run; found a name of more than 255 bytes"):
        check_folder(tmp_path / ("x" * 300), "the run")
    if os.path.isdir("/proc/self"):  # a file system that takes nothing, from root neither
        with pytest.raises(
            OSError, match=r"/proc/self/new: expected a folder for the run; found that /proc/self can't"
        ):
            check_folder("/proc/self/new", "the run")
