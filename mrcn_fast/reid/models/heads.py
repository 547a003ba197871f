"""From the last feature map to logits: pooling into parts, BNNeck, classifier."""

from __future__ import annotations

import logging
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from mrcn_fast.reid.kinds import Count
from mrcn_fast.reid.settings import check_arguments

log = logging.getLogger(__name__)

PoolName = Literal["average", "gem"]
POOLS: tuple[PoolName, ...] = get_args(PoolName)


def stripes(rows: int, parts: int) -> list[tuple[int, int]]:
    """Divide the rows of a map into `parts` horizontal stripes, as adaptive pooling does.

    Stripe i has the rows from floor(i rows / parts) to ceil((i + 1) rows / parts), exclusive. All stripes
    have the same height; where `parts` doesn't divide `rows`, neighbours share a row.

    Returns the bounds of each stripe. Raises ValueError for no part and for more parts than rows.
    """
    if parts < 1:
        raise ValueError(f"got {parts} parts, expected at least 1")
    if parts > rows:
        raise ValueError(
            f"got a last feature map of {rows} rows for {parts} parts, expected at least one row per part; "
            f"take higher images (a row is 16 pixels) or at most {rows} parts"
        )
    return [(i * rows // parts, -(-(i + 1) * rows // parts)) for i in range(parts)]


class PartPool(nn.Module):
    """Pools a map in horizontal stripes: (N, D, H, W) -> (parts, N, D).

    `kind` "average" takes the mean. "gem" takes the generalized mean (mean of max(x, 1e-6)^p)^(1/p) of
    Radenović et al. (2018), in float32 or better. All stripes share one learned p, which starts at 3.

    Where neighbouring stripes share a row, this is logged once, at level INFO. Raises ValueError for more
    parts than rows.

    Example:
        >>> PartPool(3, "gem")(torch.rand(2, 64, 18, 8)).shape
        torch.Size([3, 2, 64])
    """

    @check_arguments
    def __init__(self, parts: Count, kind: PoolName = "average") -> None:
        super().__init__()
        self.parts = parts
        self.kind = kind
        self.p = nn.Parameter(torch.full((), 3.0)) if kind == "gem" else None
        self._logged = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[2]
        bounds = stripes(rows, self.parts)
        if rows % self.parts and not self._logged and not torch.compiler.is_compiling():
            self._logged = True
            log.info(
                "%d rows in %d parts: rows %s, neighbours sharing one",
                *(rows, self.parts, ", ".join(f"{a} to {b - 1}" for a, b in bounds)),
            )
        if self.p is None:
            return _means(x, bounds)
        with torch.autocast(x.device.type, enabled=False):
            # Powers overflow in half precision, and autocast on the CPU would keep the dtype.
            precise = x if x.dtype == torch.float64 else x.float()
            return _means(precise.clamp(min=1e-6).pow(self.p), bounds).pow(1 / self.p)

    def extra_repr(self) -> str:
        return f"parts={self.parts}, kind={self.kind!r}"


def _means(x: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    # torch's adaptive pooling isn't used, because its backward pass on CUDA adds in no fixed order.
    if len(bounds) == 1:
        return x.mean(dim=(2, 3))[None]
    rows = x.mean(dim=3)
    return torch.stack([rows[:, :, first:end].mean(dim=2) for first, end in bounds])


class Head(nn.Module):
    """BNNeck and classifier of one part (Luo et al. 2019): (M, D) pooled features -> (M, classes) logits.

    Example:
        >>> head = Head(features=64, classes=5)
        >>> head(torch.rand(6, 64)).shape, head.neck(torch.rand(6, 64)).shape
        (torch.Size([6, 5]), torch.Size([6, 64]))
    """

    @check_arguments
    def __init__(self, features: Count, classes: Count) -> None:
        super().__init__()
        self.neck = nn.BatchNorm1d(features)
        self.neck.bias.requires_grad_(False)  # features stay centred, as for the cosine
        self.classifier = nn.Linear(features, classes, bias=False)
        nn.init.normal_(self.neck.weight, 1.0, 0.01)
        nn.init.normal_(self.classifier.weight, 0.0, 0.001)

    def forward(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.neck(pooled)))
