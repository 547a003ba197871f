"""The conversion of callers' arrays to tensors: torch's, NumPy's or lists, of any byte order and layout."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

# NumPy's kinds of numbers: Booleans, signed and unsigned integers, floats and complex numbers.
_NUMBERS: Final = "biufc"
_TEXT: Final = "US"


def as_tensor(value: Tensor | ArrayLike, name: str) -> Tensor:
    """Convert values to a dense tensor on their device, without a gradient; `name` is the argument's.

    Raises ValueError for anything but an array of numbers, such as text or rows of different lengths.
    """
    if isinstance(value, Tensor):
        kinds = {
            "meta": value.is_meta,
            "nested": value.is_nested,
            "quantized": value.is_quantized,
            str(value.layout): value.layout != torch.strided,
        }
        if strange := [kind for kind, is_it in kinds.items() if is_it]:
            raise ValueError(f"{name} must be a dense array of numbers; got a {strange[0]} tensor")
        return value.detach()
    array = _array(value, name)
    if array.dtype.kind not in _NUMBERS:
        raise ValueError(f"{name} must be an array of numbers; got {_described(value, array)}")
    if array.dtype.itemsize > 8 and array.dtype.kind == "f":
        array = array.astype(np.float64)  # torch has no longer floats
    # A dense copy in this machine's byte order where the array isn't writable or dense.
    native = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def as_text(value: Any, name: str) -> np.ndarray | None:
    """Convert values to an array of text; None for other values."""
    if isinstance(value, Tensor):
        return None
    array = _array(value, name)
    if array.dtype.kind == "O" and array.size and all(isinstance(item, str) for item in array.flat):
        array = array.astype(str)
    return array.astype(str) if array.dtype.kind in _TEXT else None


def _array(value: Any, name: str) -> np.ndarray:
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(f"{name} must be a whole array; got a masked one. Fill it, or leave the masked out")
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        kind = type(value).__name__
        raise ValueError(
            f"{name} must be an array of numbers; got {kind} whose rows differ in length or kind"
        ) from None


def _described(value: object, array: np.ndarray) -> str:
    if array.dtype.kind in _TEXT:
        return f"text {array.shape}"
    return f"{type(value).__name__} of {array.dtype} {array.shape}"
