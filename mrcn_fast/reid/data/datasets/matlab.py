"""The reader of cell arrays of numbers in MATLAB files (MathWorks, "MAT-File Format", level 5).

scipy reads such files too, but a damaged file can crash the process there.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The data types of elements: numbers by NumPy's letters, then the types that are no plain numbers.
_NUMBERS: Final = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_MATRIX: Final = 14
_COMPRESSED: Final = 15
# The classes of matrices: cells, and all numbers from double to uint64.
_CELLS: Final = 1
_NUMERIC: Final = range(6, 16)
_COMPLEX: Final = 0x0800

_HEADER: Final = 128  # bytes
# The most bytes of an uncompressed variable (the published file has 300 kB), and the deepest nesting of
# cells.
_MOST_BYTES: Final = 1 << 26
_DEEPEST: Final = 8


class MatlabError(ValueError):
    """A file is not MATLAB's, is damaged, or has other content than cells and numbers."""


class Cells(NamedTuple):
    """A cell array: its shape, and its cells in column-major order."""

    shape: tuple[int, ...]
    items: list[Value]


Value = Cells | NDArray[np.generic]

_EMPTY: Final = np.empty((0, 0), np.uint8)


def read_variable(path: Path, name: str) -> Value:
    """Read the variable `name` of a file: an array of the stored type, or Cells.

    Raises MatlabError where the file doesn't have such a variable, and OSError where it can't be read.
    """
    content = path.read_bytes()
    order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER])
    if order is None:
        raise MatlabError("no MATLAB file of version 5 to 7")
    if struct.unpack(f"{order}H", content[124:126])[0] != 0x0100:
        raise MatlabError("a MATLAB file of version 7.3; save it anew with MATLAB's option -v7")
    names = []
    elements = _Elements(content[_HEADER:], order)
    while elements:
        kind, data = elements.next()
        if kind == _COMPRESSED:
            kind, data = _Elements(_decompressed(data), order).next()
        if kind == _MATRIX and data:
            found = _name(data, order)
            if found == name:
                return _value(data, order, depth=0)
            names.append(found)
    raise MatlabError(f"no such variable, but {', '.join(names) or 'none'}")


class _Elements:
    """Iterate over the data elements in `content`: (type, data)."""

    def __init__(self, content: bytes, order: str) -> None:
        self._content = content
        self._order = order
        self._place = 0

    def __bool__(self) -> bool:
        return self._place < len(self._content)

    def next(self) -> tuple[int, bytes]:
        start = self._place
        if start + 8 > len(self._content):
            raise MatlabError("a MATLAB file that is cut off")
        kind, size = struct.unpack_from(f"{self._order}II", self._content, start)
        if kind >> 16:
            # A small element has its size in the upper half of the type, and its data in place of the size.
            kind, size, data, self._place = kind & 0xFFFF, kind >> 16, start + 4, start + 8
            most = 4
        else:
            data, most = start + 8, len(self._content) - start - 8
            self._place = data + size
            # Compressed elements are not padded.
            if kind != _COMPRESSED:
                self._place += -size % 8
        if size > most:
            raise MatlabError("a MATLAB file that is cut off or damaged")
        return kind, self._content[data : data + size]


def _decompressed(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(data, _MOST_BYTES)
    except zlib.error as error:
        raise MatlabError(f"a damaged MATLAB file ({error})") from error
    if not inflater.eof:
        raise MatlabError(f"a damaged MATLAB file, or a variable of more than {_MOST_BYTES} bytes")
    return content


def _name(data: bytes, order: str) -> str:
    elements = _Elements(data, order)
    _, _, (_, name) = elements.next(), elements.next(), elements.next()
    return name.decode("ascii", "replace")


def _value(data: bytes, order: str, depth: int) -> Value:
    """Read the cells or numbers of a matrix element. An element without content is an empty array."""
    if not data:
        return _EMPTY
    elements = _Elements(data, order)
    (_, flags), (_, sizes), _ = elements.next(), elements.next(), elements.next()
    if len(flags) != 8 or not sizes or len(sizes) % 4:
        raise MatlabError("a damaged MATLAB file")
    word = struct.unpack(f"{order}I", flags[:4])[0]
    shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
    if min(shape) < 0:
        raise MatlabError(f"a damaged MATLAB file, with an array of shape {shape}")
    if word & 0xFF == _CELLS and depth < _DEEPEST:
        return Cells(shape, _cells(elements, math.prod(shape), order, depth))
    if word & 0xFF in _NUMERIC and not word & _COMPLEX:
        return _numbers(*elements.next(), shape, order)
    raise MatlabError("something else than cells and real numbers")


def _cells(elements: _Elements, count: int, order: str, depth: int) -> list[Value]:
    items: list[Value] = []
    # The loop ends with the elements, so that a damaged count doesn't fill the memory.
    for _ in range(count):
        kind, data = elements.next()
        if kind != _MATRIX:
            raise MatlabError("a damaged MATLAB file, with a cell that is none")
        items.append(_value(data, order, depth + 1))
    return items


def _numbers(kind: int, data: bytes, shape: tuple[int, ...], order: str) -> NDArray[np.generic]:
    if kind not in _NUMBERS:
        raise MatlabError(f"a damaged MATLAB file, with numbers of type {kind}")
    dtype = np.dtype(order + _NUMBERS[kind])
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise MatlabError(f"a damaged MATLAB file, with {len(data)} bytes for an array of shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape, order="F")
