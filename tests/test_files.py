"""Files that are written whole: what a failed, a killed and a refused write leave."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from mrcn_fast.files import append, remove_leftovers, write_atomically, write_json

LIMIT = 4096


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file of this process may grow beyond LIMIT bytes: the system refuses as it does on a full disk."""
    # Bytecode that the limit cuts off would be kept, and every later process would fail to read it.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def a_tensor(file: BinaryIO) -> None:
    torch.save({"a": torch.ones(10 * LIMIT)}, file)


def bytes_at_once(file: BinaryIO) -> None:
    file.write(bytes(10 * LIMIT))


def a_little_too_much(file: BinaryIO) -> None:
    """What Python keeps back until the file is closed."""
    file.write(bytes(LIMIT + 1))


@pytest.mark.parametrize("write", [a_tensor, bytes_at_once, a_little_too_much])
def test_a_full_disk_is_reported_with_path_and_reason(tmp_path: Path, full_disk: None, write: object) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError) as error:
        write_atomically(path, write)  # type: ignore[arg-type]
    assert error.value.errno == errno.EFBIG
    assert str(path) in str(error.value) and os.strerror(errno.EFBIG) in str(error.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_meets_a_full_disk(tmp_path: Path, full_disk: None) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.subplots().plot([1, 2])
    path = tmp_path / "figure.png"
    with pytest.raises(OSError, match=r"figure\.png") as error:
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
    assert error.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "lines"
    append(path, b"x" * (LIMIT - 10) + b"\n")
    before = path.read_bytes()
    with pytest.raises(OSError, match="lines"):
        append(path, b"y" * 100 + b"\n")
    assert path.read_bytes() == before
    append(path, b"z\n")
    assert path.read_bytes() == before + b"z\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_the_reason_is_reported_of_what_has_no_length() -> None:
    with pytest.raises(OSError, match="/dev/full") as error:
        append("/dev/full", b"a line\n")
    assert error.value.errno == errno.ENOSPC


def test_a_defect_of_the_writer_stays_its_own_error(tmp_path: Path) -> None:
    def broken(file: BinaryIO) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        write_atomically(tmp_path / "file", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_made(tmp_path: Path) -> None:
    write_json(tmp_path / "some" / "folder" / "file.json", {"a": 1})
    assert json.loads((tmp_path / "some" / "folder" / "file.json").read_text()) == {"a": 1}


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match=r"taken/folder/file\.json"):
        write_json(tmp_path / "taken" / "folder" / "file.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_what_the_dead_left_goes_with_the_next_write(tmp_path: Path, dead: int) -> None:
    left = tmp_path / f".file.json.{dead}.tmp"
    # Of another file, of a process that runs, and of a name that only looks like it.
    others = [f".other.json.{dead}.tmp", f".file.json.{os.getppid()}.tmp", ".file.json.x.tmp"]
    for name in (left.name, *others):
        (tmp_path / name).write_text("half")
    write_json(tmp_path / "file.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"file.json", *others}
    # A number too large for a process, and this process's own, which writes nothing now.
    for pid in (10**30, os.getpid()):
        (tmp_path / f".file.json.{pid}.tmp").write_text("half")
    assert len(remove_leftovers(tmp_path, "*.json")) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"file.json", *others[1:]}
