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
    """First row and the one behind the last of each of `parts` horizontal stripes of a map.

    Adaptive pooling's: from floor(i rows / parts) to ceil((i + 1) rows / parts). All have one height; where
    `parts` does not divide `rows`, neighbours share a row.

    Raises ValueError for no part, and when there are more parts than rows.
    """
    if parts < 1:
        raise ValueError(f"got {parts} parts, expected at least 1")
    if parts > rows:
        raise ValueError(
            f"got a last feature map of {rows} rows for {parts} parts, expected a row a part at least; "
            f"take higher images (a row is 16 pixels) or at most {rows} parts"
        )
    return [(i * rows // parts, -(-(i + 1) * rows // parts)) for i in range(parts)]


class PartPool(nn.Module):
    """Pools a map in horizontal stripes: (N, D, H, W) -> (parts, N, D).

    `kind` "average" takes the mean, "gem" the generalized mean (mean of max(x, 1e-6)^p)^(1/p) with one p for
    all stripes that is learned and starts at 3 (Radenović et al. 2018), in float32 at least.

    Stripes of which neighbours share a row are told once, at INFO. Raises ValueError when there are more
    parts than rows.
    """

    @check_arguments
    def __init__(self, parts: Count, kind: PoolName = "average") -> None:
        super().__init__()
        self.parts = parts
        self.kind = kind
        self.p = nn.Parameter(torch.full((), 3.0)) if kind == "gem" else None
        self._told = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[2]
        bounds = stripes(rows, self.parts)
        if rows % self.parts and not self._told and not torch.compiler.is_compiling():
            self._told = True
            log.info(
                "%d rows in %d parts: rows %s, neighbours sharing one",
                *(rows, self.parts, ", ".join(f"{a} to {b - 1}" for a, b in bounds)),
            )
        if self.p is None:
            return _means(x, bounds)
        with torch.autocast(x.device.type, enabled=False):
            # A power of a half-precision number overflows; autocast would leave it in its dtype on a CPU.
            precise = x if x.dtype == torch.float64 else x.float()
            return _means(precise.clamp(min=1e-6).pow(self.p), bounds).pow(1 / self.p)

    def extra_repr(self) -> str:
        return f"parts={self.parts}, kind={self.kind!r}"


def _means(x: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    # Not torch's adaptive pooling: where stripes share rows its backward on CUDA adds in no fixed order.
    if len(bounds) == 1:
        return x.mean(dim=(2, 3))[None]
    rows = x.mean(dim=3)
    return torch.stack([rows[:, :, first:end].mean(dim=2) for first, end in bounds])


class Head(nn.Module):
    """BNNeck and classifier of one part (Luo et al. 2019): (M, D) pooled features -> (M, classes) logits."""

    @check_arguments
    def __init__(self, features: Count, classes: Count) -> None:
        super().__init__()
        self.neck = nn.BatchNorm1d(features)
        self.neck.bias.requires_grad_(False)  # BNNeck: centred on the origin, where the cosine is measured
        self.classifier = nn.Linear(features, classes, bias=False)
        nn.init.normal_(self.neck.weight, 1.0, 0.01)
        nn.init.normal_(self.classifier.weight, 0.0, 0.001)

    def forward(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.neck(pooled)))
