"""The center-quadruplet causal loss (eq. 8-10): function and module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mrcn_fast import dispatch, reference
from mrcn_fast.autograd import CQCFunction, distinct, unstack
from mrcn_fast.backends import shapes

REDUCTIONS = ("sum", "mean", "none")
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def cqc_loss(
    features: Sequence[Tensor] | Tensor,
    labels: Tensor,
    infrared_labels: Tensor | None = None,
    *,
    margin: float = 0.2,
    reduction: str = "sum",
    detach_negative: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Center-quadruplet causal loss over the identities present in both modalities (eq. 8-10).

    Args:
        features: `MRCNFeatures` of six pooled sets in the order v, v+, v-, n-, n+, n: the first three
            (B_v, D), the last three (B_n, D); or all of them stacked, (3 B_v + 3 B_n, D). float32, float64,
            bfloat16 or float16; the two half dtypes are computed in float32 and give a float32 loss.
        labels: (B_v,) integer identities of the visible samples, in any order; below 2^63 - 1.
        infrared_labels: (B_n,) of the infrared ones; ``labels`` where left out.
        margin: α.
        reduction: "sum" over identities (the paper), "mean" over them, or "none".
        detach_negative: take the pushed distances D(c±, c_own) as constants.
        backend: "cpu", "triton", "cuda", "reference", or None for what serves.

    Returns:
        The scalar loss; for "none" a pair: the loss of each identity (I,) and the identities (I,), ascending.

    Raises:
        TypeError: not six tensors or one, or a dtype that does not fit.
        ValueError: a shape, label count, device or name that does not fit, or no identity in both modalities
            (inside `torch.compile` that is a RuntimeError; on a GPU, which is not waited for, the sum is 0
            and the mean NaN).
        RuntimeError: the backend asked for can't serve the call.

    Equivalent to:
        ``losses, identities = mrcn_fast.reference.cqc_loss(features, labels, infrared_labels)``, then
        ``losses.sum()``.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(map(repr, REDUCTIONS))}")
    labels = _check_labels("labels", labels)
    infrared_labels = labels if infrared_labels is None else _check_labels("infrared_labels", infrared_labels)
    tensors = _check_features(features, labels, infrared_labels)
    losses, identities, total = _losses(
        tensors, labels, infrared_labels, float(margin), detach_negative, backend, reduction == "none"
    )
    if reduction == "none":
        return losses, identities
    return total if reduction == "sum" else total / identities


def _losses(
    features: tuple[Tensor, ...],
    labels: Tensor,
    infrared_labels: Tensor,
    margin: float,
    detach_negative: bool,
    requested: str | None,
    each: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses an identity, the identities (their number unless ``each``), the sum of the losses."""
    backend = dispatch.choose(requested, features[0].device.type, features[0].dtype)
    if backend == "reference":
        sets = [f.to(shapes.precise(f.dtype)) for f in unstack(features, labels, infrared_labels)]
        _check_count(
            torch.tensor(reference.shared_identities(labels, infrared_labels).shape[0], device="cpu"),
            labels,
            infrared_labels,
        )
        with dispatch.without_autocast(features[0].device.type):
            losses, present = reference.cqc_loss(
                sets, labels, infrared_labels, margin=margin, detach_negative=detach_negative
            )
        count = torch.tensor(present.shape[0], device="cpu")
        return losses, present if each else count, losses.sum()
    total, losses, identities, count = CQCFunction.apply(
        backend, margin, detach_negative, *distinct(labels, infrared_labels, *features)
    )
    _check_count(count, labels, infrared_labels)
    if not each:
        return losses, count, total
    identities, slots = identities.sort()  # those of slots left over are the largest
    number = int(count)
    if not torch.compiler.is_compiling():
        _check_count(torch.tensor(number, device="cpu"), labels, infrared_labels)
    return losses[slots[:number]], identities[:number], total


class CQCLoss(nn.Module):
    """Center-quadruplet causal loss (eq. 8-10) as a module; see `cqc_loss` for shapes, dtypes and errors.

    Args:
        margin: α, 0.2 in the paper.
        reduction: "sum" over identities (the paper), "mean" over them, or "none" (losses and identities).
        detach_negative: take the pushed distances as constants.
        backend: "cpu", "triton", "cuda", "reference", or None for what serves.
    """

    def __init__(
        self,
        margin: float = 0.2,
        reduction: str = "sum",
        detach_negative: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction: got {reduction!r}, expected one of {', '.join(map(repr, REDUCTIONS))}"
            )
        self.margin, self.reduction, self.detach_negative, self.backend = (
            margin,
            reduction,
            detach_negative,
            backend,
        )

    def forward(
        self, features: Sequence[Tensor] | Tensor, labels: Tensor, infrared_labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of six pooled feature sets; see `cqc_loss`."""
        return cqc_loss(
            features,
            labels,
            infrared_labels,
            margin=self.margin,
            reduction=self.reduction,
            detach_negative=self.detach_negative,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}, detach_negative={self.detach_negative}"


def _check_labels(name: str, labels: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}, expected an integer tensor (B,)")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name}: got dtype {labels.dtype}, expected integers; convert with .long()")
    if labels.dim() != 1 or labels.shape[0] == 0:
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, expected (B,) with B >= 1")
    return labels.long()


def _check_features(
    features: Sequence[Tensor] | Tensor, labels: Tensor, infrared_labels: Tensor
) -> tuple[Tensor, ...]:
    tensors = (features,) if isinstance(features, Tensor) else tuple(features)
    if len(tensors) not in (1, 6) or not all(isinstance(f, Tensor) for f in tensors):
        raise TypeError(
            f"features: got {len(tensors)} of {', '.join(sorted({type(f).__name__ for f in tensors}))}, "
            "expected six tensors v, v+, v-, n-, n+, n or one that stacks them"
        )
    visible, infrared = labels.shape[0], infrared_labels.shape[0]
    rows = [3 * visible + 3 * infrared] if len(tensors) == 1 else [visible] * 3 + [infrared] * 3
    first = tensors[0]
    dimensions, dtype, device = first.shape[-1:], first.dtype, first.device
    for f, expected in zip(tensors, rows, strict=True):
        shape = f.shape
        if len(shape) != 2 or shape[1:] != dimensions:
            raise ValueError(
                f"features: got shape {tuple(shape)}, expected (B, D), one D for all; pool the maps first"
            )
        if shape[0] != expected:
            raise ValueError(
                f"features: got {shape[0]} rows for {visible} visible and {infrared} infrared labels, "
                f"expected {expected}"
            )
        if f.dtype != dtype or dtype not in shapes.DTYPES:
            raise TypeError(
                f"features: got dtypes {dtype} and {f.dtype}, expected one of float32, float64, bfloat16 and "
                "float16"
            )
        if f.device != device:
            raise ValueError(f"features: got devices {device} and {f.device}, expected one")
    for name, other in (("labels", labels), ("infrared_labels", infrared_labels)):
        if other.device != device:
            raise ValueError(f"{name}: got device {other.device}, expected the features' {device}")
    return tensors


def _check_count(count: Tensor, labels: Tensor, infrared_labels: Tensor) -> None:
    message = (
        "labels and infrared_labels: got no identity that is in both, expected at least one; "
        "sample the two modalities with the same identities"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(count > 0, message)
    elif count.device.type == "cpu" and int(count) == 0:
        raise ValueError(f"{message} (visible {_some(labels)}, infrared {_some(infrared_labels)})")


def _some(labels: Tensor, limit: int = 8) -> str:
    known = torch.unique(labels)
    return f"{known[:limit].tolist()}{' ...' if known.shape[0] > limit else ''}"
