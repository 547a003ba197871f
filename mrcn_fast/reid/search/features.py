"""Files of features: .safetensors with the features, the names of their images, identities and cameras.

The keys of a file, of which only the first is needed:

    features    (images, size) float32, float64, float16 or bfloat16: the feature of each image
    names       uint8: the name of each image as bytes, followed by a zero byte
    folder      uint8: the path as bytes that the names lie below, to show the pictures
    identities  (images,) integers: who is in each image, for scores
    cameras     (images,) integers: the camera of each image, for scores

The metadata of files that `mrcn-fast extract` writes has the SHA-256 of the network and the modality.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, overload

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mrcn_fast.files import write_atomically
from mrcn_fast.reid.stored import StoredError, open_safetensors

SUFFIX: Final = ".safetensors"
_DTYPES: Final = {
    "F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


class FeatureError(ValueError):
    """A file of features isn't as expected. The message has the path, the expected and the found."""


class Rows(Protocol):
    """Features of which some rows are read at a time.

    Attributes:
        count: the number of rows
        size: the length of a feature
    """

    @property
    def count(self) -> int: ...

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Read rows from `start` to before `stop`: float32 (stop - start, size), in memory of its own."""


@dataclass(frozen=True)
class HeldRows:
    """The rows of a tensor (count, size)."""

    features: Tensor

    @property
    def count(self) -> int:
        return len(self.features)

    @property
    def size(self) -> int:
        return self.features.shape[1]

    def read(self, start: int, stop: int) -> Tensor:
        return self.features[start:stop].to(torch.float32, copy=True)


@dataclass(frozen=True)
class StoredRows:
    """The rows in a file, which are read when they are asked for.

    They are not memory-mapped, because mapped pages count as memory of the process.
    """

    path: Path
    first: int  # the position of the first byte
    count: int
    size: int
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        row = self.size * self.dtype.itemsize
        content = bytearray((stop - start) * row)
        with self.path.open("rb") as file:
            file.seek(self.first + start * row)
            if file.readinto(content) != len(content):
                raise FeatureError(f"{self.path}: expected {self.count} features; found a file cut short")
        return torch.frombuffer(content, dtype=self.dtype).view(-1, self.size).float()


class Names(Sequence[str]):
    """The names in a key `names`, decoded one by one, because a million strings take 100 MB."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._ends = np.flatnonzero(np.frombuffer(content, np.uint8) == 0)

    @classmethod
    def of(cls, names: Sequence[str]) -> Names:
        """Encode names, which may be bytes of any encoding, as `os.fsdecode` gives them."""
        return cls(b"".join(os.fsencode(name) + b"\0" for name in names))

    @property
    def content(self) -> bytes:
        return self._content

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.fsdecode(self._content[start : int(self._ends[index])])


@dataclass(frozen=True)
class Features:
    """Features of images with what is known about them.

    Args:
        rows: the features
        origin: where they come from, for messages
        names: the names of the images; None: the images have numbers
        folder: the folder that the names lie below
        identities, cameras: (count,) int64, for scores
        about: the metadata, such as "network" and "modality"
    """

    rows: Rows
    origin: str
    names: Names | None = None
    folder: Path | None = None
    identities: Tensor | None = None
    cameras: Tensor | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def name(self, row: int) -> str:
        """The name of an image, which is its number where it has no name."""
        return str(row) if self.names is None else self.names[row]

    def picture(self, row: int) -> Path | None:
        """The path of an image; None where it isn't known."""
        return None if self.names is None or self.folder is None else self.folder / self.names[row]


def write_features(path: str | Path, features: Features) -> None:
    """Write features in float32, names, folder and metadata. Raises OSError where that can't be written."""
    tensors = {"features": features.rows.read(0, features.rows.count)}
    if features.names is not None:
        tensors["names"] = _bytes(features.names.content)
    if features.folder is not None:
        tensors["folder"] = _bytes(os.fsencode(features.folder))
    content = save(tensors, metadata=dict(features.about))
    write_atomically(path, lambda file: file.write(content))


def read_features(path: str | Path) -> Features:
    """Open a file of features, whose features stay on the disk until they are used.

    Raises FeatureError for a file that is none.
    """
    path = Path(path)
    try:
        with open_safetensors(path) as file:
            return _opened(path, file)
    except StoredError as error:
        raise FeatureError(f"{path}: expected a .safetensors file of features; found {error}") from None


def _opened(path: Path, file: safe_open) -> Features:
    keys = list(file.keys())
    if "features" not in keys:
        raise FeatureError(
            f"{path}: expected the key features, (images, size); found the keys "
            f"{', '.join(keys[:8]) or 'none'}"
        )
    values = file.get_slice("features")
    shape, dtype = values.get_shape(), values.get_dtype()
    if len(shape) != 2 or 0 in shape or dtype not in _DTYPES:
        raise FeatureError(
            f"{path}: expected features (images, size) of {', '.join(_DTYPES)}, at least one; found {dtype} "
            f"{tuple(shape)}"
        )
    held = {
        name: file.get_tensor(name) for name in ("names", "folder", "identities", "cameras") if name in keys
    }
    for name in held.keys() & {"names", "folder"}:
        if held[name].dtype != torch.uint8 or held[name].dim() != 1:
            raise FeatureError(
                f"{path}: expected {name} as bytes, uint8 (bytes,); found {_found(held[name])}"
            )
    names = Names(_content(held["names"])) if "names" in held else None
    if names is not None and (len(names) != shape[0] or not names.content.endswith(b"\0")):
        raise FeatureError(
            f"{path}: expected {shape[0]} names, one for each feature, each followed by a zero byte; found "
            f"{len(names)}"
        )
    return Features(
        StoredRows(path, _position(path), shape[0], shape[1], _DTYPES[dtype]),
        str(path),
        names,
        Path(os.fsdecode(_content(held["folder"]))) if "folder" in held else None,
        _integers(path, held, "identities", shape[0]),
        _integers(path, held, "cameras", shape[0]),
        file.metadata() or {},
    )


def _integers(path: Path, held: Mapping[str, Tensor], name: str, count: int) -> Tensor | None:
    if name not in held:
        return None
    found = held[name]
    if found.dtype.is_floating_point or found.dtype == torch.bool or found.shape != (count,):
        raise FeatureError(
            f"{path}: expected {name} as {count} integers, one for each feature; found {_found(found)}"
        )
    return found.long()


def _position(path: Path) -> int:
    """The position of the first byte of the features in a file that safetensors has checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    first: int = header["features"]["data_offsets"][0]
    return 8 + length + first


def _found(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _bytes(content: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8)
    )


def _content(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
