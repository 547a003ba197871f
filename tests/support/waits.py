"""Operations for which the host of a GPU waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# The host learns what these return, or how large it is, when all launches before have ended.
_WAITING = (
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "_unique2", "unique_dim", "bincount",
    "equal", "is_nonzero", "repeat_interleave.Tensor",
)  # fmt: skip
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


def name_of(function: Any) -> str:
    """The name of an operation of a TorchDispatchMode, without aten."""
    name: str = function._schema.name.removeprefix("aten::")
    return name


def waits(function: Any, arguments: Sequence[Any]) -> bool:
    """Whether the host of a GPU would wait for an operation on these arguments."""
    name = name_of(function)
    indices = arguments[1] if name in _INDEXING else ()
    by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
    return name in _WAITING or by_mask
