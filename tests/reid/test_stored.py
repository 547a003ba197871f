"""Files in place of torch's: each is named for what it is, nothing in it is run, no advice is to run it."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from mrcn_fast.reid.stored import StoredError, read_safetensors, read_torch

STATE = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}


def saved(content: object, **options: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def archive(**files: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
OTHERS = [
    (b"", "an empty file"),
    (LFS, "a Git LFS pointer"),
    (b"\n <!DOCTYPE html><html></html>", "a web page or XML"),
    (b"<?xml version='1.0'?><Error/>", "a web page or XML"),
    (b'{"error": "not found"}', "JSON text"),
    (b"Not Found", "text that begins with 'Not Found'"),
    (gzip.compress(b"x", mtime=0), "a gzip archive"),
    (array(), "a NumPy array"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (bytes(range(3, 200)), "bytes that neither torch nor safetensors wrote"),
]


@pytest.mark.parametrize(("content", "message"), OTHERS)
def test_other_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    for read in (read_torch, read_safetensors):
        with pytest.raises(StoredError) as error:
            read(path)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (save(STATE), "a safetensors file: name it .safetensors"),
        (
            saved(nn.Linear(2, 2)),
            "pickled Python objects (torch.nn.modules.linear.Linear), which would run code",
        ),
        (saved(nn.Linear(2, 2), _use_new_zipfile_serialization=False), "pickled Python objects"),
        (pickle.dumps(Path("x")), "pickled Python objects"),
        (archive(a="x", b="y"), "a zip archive of other files (a, b)"),
        (saved(STATE)[:-100], "a torch file that is cut short or damaged"),
        (b"PK\x03\x04", "a torch file that is cut short or damaged"),
    ],
)
def test_unreadable_torch_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(StoredError) as error:
        read_torch(path)
    assert message in str(error.value)


def test_a_torchscript_archive_is_named(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "script.pth"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(path))
    recwarn.clear()
    with pytest.raises(StoredError, match="a TorchScript archive: save its tensors alone"):
        read_torch(path)
    assert not len(recwarn)


def test_written_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for content in (saved(STATE), saved(STATE, _use_new_zipfile_serialization=False)):
        path.write_bytes(content)
        assert all(torch.equal(value, STATE[name]) for name, value in read_torch(path).items())
        with pytest.raises(StoredError, match=r"a file that torch\.save wrote: name it \.pth"):
            read_safetensors(path)
    path.write_bytes(save(STATE))
    assert all(torch.equal(value, STATE[name]) for name, value in read_safetensors(path).items())


def test_damaged_files_raise_stored_errors_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    generator = random.Random(0)
    sources = (saved(STATE), saved(STATE, _use_new_zipfile_serialization=False), save(STATE))
    for number in range(300):
        content = bytearray(sources[number % 3])
        for _ in range(generator.randint(1, 3)):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content[: generator.randint(1, 2 * len(content))])
        for read in (read_torch, read_safetensors):
            try:
                read(path)
            except StoredError as error:
                assert "weights_only" not in str(error) and "\n" not in str(error)


def test_places_without_a_file(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "a folder"), (tmp_path / "absent", "No such file")):
        with pytest.raises(StoredError, match=message):
            read_torch(path)
