"""Tensors for the tests: drawn on `DEVICE`, arranged in memory in any layout, and compared to the last bit.

Memory between the elements of a strided tensor holds NaN, so that a kernel that reads it is noticed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.support.matrix import DEVICE

# Of feature maps (N, C, H, W), and of the loss's features (B, D).
LAYOUTS = (
    "contiguous",
    "channels_last",
    "batch-sliced",
    "channel-sliced",
    "channels_last channel-sliced",
    "cropped",
    "spatially sliced",
    "expanded batch",
    "expanded rows",
    "transposed",
    "batch innermost",
)
FEATURE_LAYOUTS = ("contiguous", "row-sliced", "column-sliced", "transposed", "expanded rows")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers on `DEVICE`, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def arrange(values: Tensor, layout: str) -> Tensor:
    """``values`` (N, C, H, W) with the strides that ``layout`` names.

    An expanded layout keeps only those of the values that it repeats.
    """
    n, c, h, w = values.shape

    def hole(*shape: int, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return values.new_full(shape, math.nan).contiguous(memory_format=memory_format)

    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "batch-sliced":
        view = hole(2 * n, c, h, w)[1::2]
    elif layout == "channel-sliced":
        view = hole(n, 2 * c + 1, h, w)[:, 1 : 1 + c]
    elif layout == "channels_last channel-sliced":
        view = hole(n, 2 * c + 1, h, w, memory_format=torch.channels_last)[:, 1 : 1 + c]
    elif layout == "cropped":
        view = hole(n, c, h + 2, w + 3)[:, :, 1 : 1 + h, 2 : 2 + w]
    elif layout == "spatially sliced":
        view = hole(n, c, 2 * h, 3 * w)[:, :, ::2, 1::3]
    elif layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "batch innermost":
        return values.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    elif layout == "expanded batch":
        return values[:1].contiguous().expand(n, c, h, w)
    elif layout == "expanded rows":
        # All rows are one. With W = 1 the plane would be constant, and so it is left as it is.
        return values[:, :, :1].contiguous().expand(n, c, h, w) if w > 1 else values.contiguous()
    elif layout == "expanded scalar":
        return values[0, 0, 0, 0].clone().expand(n, c, h, w)
    else:
        raise ValueError(layout)
    view.copy_(values)
    return view


def arrange_rows(values: Tensor, layout: str) -> Tensor:
    """``values`` (B, D) with the strides that ``layout`` names."""
    b, d = values.shape
    if layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "expanded rows":
        return values[:1].contiguous().expand(b, d)
    holes = {"row-sliced": (2 * b, d), "column-sliced": (b, 2 * d + 1)}[layout]
    hole = values.new_full(holes, math.nan)
    view = hole[1::2] if layout == "row-sliced" else hole[:, 1::2]
    view.copy_(values)
    return view


def misaligned(t: Tensor) -> Tensor:
    """The same values in memory whose address is one byte past a multiple of the element's size."""
    content = bytearray(1 + t.numel() * t.element_size())
    found = torch.frombuffer(content, dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)
    return found.copy_(t.detach()).requires_grad_()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether the two are equal to the last bit, in the sign of zero and the payload of NaN too."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )


def different_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of the results that are not equal to the last bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not same_bits(first[name], second[name])]


def nonfinite(x: Tensor) -> Tensor:
    """0 where ``x`` is finite, 1 for NaN, 2 for inf, 3 for -inf."""
    return torch.isnan(x).int() + 2 * torch.isposinf(x).int() + 3 * torch.isneginf(x).int()
