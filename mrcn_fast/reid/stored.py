"""The readers of files of torch and safetensors, which execute nothing and describe other files."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from mrcn_fast.memory import shortage

# Files that users give by mistake, by their first bytes.
_SIGNS: Final = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file: fetch the file with `git lfs pull`",
    b"<": "a web page or XML: the download needs another address, or a login",
    b"{": "JSON text",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\xfd7zXZ": "an xz archive: unpack it",
    b"BZh": "a bzip2 archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"%PDF": "a PDF document",
}
_ZIP, _PICKLE = b"PK", b"\x80"
_DAMAGED: Final = "a torch file that is cut short or damaged: copy it again"
_SAVE_TENSORS: Final = "save its tensors alone, as torch.save(model.state_dict(), path) does"
_BLANK: Final = b" \t\r\n\xef\xbb\xbf"


class StoredError(ValueError):
    """A file can't be read. The message says what was found, without the path."""


def read_torch(path: Path) -> Any:
    """Read a file of `torch.save`, of any name, with its tensors on the CPU.

    Raises StoredError for another type of file, a damaged file, and one that has more than tensors and plain
    values.
    """
    begin = _begin(path)
    if not begin.startswith((_ZIP, _PICKLE)):
        raise StoredError(_found(path, begin))
    if begin.startswith(_ZIP):
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise anything for broken bytes
        missing = shortage(error)
        if missing is not None:
            raise StoredError(f"a file for which there is not enough memory{missing}") from error
        # torch's message isn't shown, because it advises to execute the file's content.
        raise StoredError(_unreadable(path, begin)) from None


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors file onto the CPU. Raises StoredError for any other file."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """Open a .safetensors file, whose tensors are read one by one. Raises StoredError for any other file."""
    begin = _begin(path)
    if not _is_safetensors(path, begin):
        found = "a file that torch.save wrote: name it .pth"
        raise StoredError(found if begin.startswith((_ZIP, _PICKLE)) else _found(path, begin))
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError:
        raise StoredError("a safetensors file that is cut short or damaged: copy it again") from None


def _begin(path: Path) -> bytes:
    if path.is_dir():
        raise StoredError("a folder: give a file")
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise StoredError(f"a file that can't be read ({error.strerror})") from error


def _found(path: Path, begin: bytes) -> str:
    """Describe a file that torch.save didn't write."""
    if not begin:
        return "an empty file: copy it again"
    if _is_safetensors(path, begin):
        return "a safetensors file: name it .safetensors"
    text = begin.lstrip(_BLANK)
    for sign, name in _SIGNS.items():
        if text.startswith(sign):
            return name
    if all(sign in _BLANK or 32 <= sign < 127 for sign in begin):
        return f"text that begins with {text[:20].decode('ascii', 'replace')!r}"
    return "bytes that neither torch nor safetensors wrote"


def _is_safetensors(path: Path, begin: bytes) -> bool:
    """Whether a file begins with the length of a header and the header."""
    return begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= path.stat().st_size


def _check_archive(path: Path) -> None:
    """Raise StoredError for a zip archive that torch.save didn't write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise StoredError(_DAMAGED) from None
    if any("/code/" in name for name in names):
        raise StoredError(f"a TorchScript archive: {_SAVE_TENSORS}")
    if not any(name.endswith("/data.pkl") for name in names):
        raise StoredError(f"a zip archive of other files ({', '.join(names[:3])})")


def _unreadable(path: Path, begin: bytes) -> str:
    """Say why torch.load refused a file that begins like one of torch.save."""
    if begin.startswith(_PICKLE):
        return (
            f"pickled Python objects, or a damaged file; objects would run code of the file: {_SAVE_TENSORS}"
        )
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch reads broken bytes here, which may raise anything
        unknown = []
    if unknown:
        names = ", ".join(sorted(unknown)[:3])
        return f"pickled Python objects ({names}), which would run code of the file: {_SAVE_TENSORS}"
    return _DAMAGED
