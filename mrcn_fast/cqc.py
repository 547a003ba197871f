"""The center-quadruplet causal loss (eq. 8-10): function and module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from mrcn_fast import dispatch, internals, plain, reference
from mrcn_fast.autograd import NOBODY, CQCFunction, CQCSettings, distinct, unstack
from mrcn_fast.backends import shapes
from mrcn_fast.checks import (
    check_features,
    check_flag,
    check_labels,
    check_margin,
    check_reduction,
)


def cqc_loss(
    features: Sequence[Tensor] | Tensor,
    labels: Tensor,
    infrared_labels: Tensor | None = None,
    *,
    margin: float = 0.2,
    reduction: str = "sum",
    detach_negative: bool = False,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Center-quadruplet causal loss over the identities present in both modalities (eq. 8-10).

    Args:
        features: `MRCNFeatures` of six pooled sets in the order v, v+, v-, n-, n+, n: the first three are
            (B_v, D), the last three (B_n, D); or all of them stacked, (3 B_v + 3 B_n, D). float32, float64,
            bfloat16 or float16; the two half dtypes are computed in float32 and give a float32 loss.
        labels: (B_v,) integer identities of the visible samples, in any order; below 2^63 - 1.
        infrared_labels: (B_n,) identities of the infrared samples; without it they are ``labels``.
        margin: α.
        reduction: "sum" over identities (the paper), "mean" over them, or "none".
        detach_negative: take the pushed distances D(c±, c_own) as constants.
        normalize: divide each feature row by its Euclidean length (at least 1e-12) first, so that a center is
            the mean of f / ‖f‖; see `CQCLoss` for when to use it. No normalized features are stored.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses one (see `mrcn_fast.backends`).

    Returns:
        The scalar loss; for "none" a pair: the loss of each identity (I,) and the identities (I,), ascending.

    Raises:
        TypeError: there are not six tensors or one, or a dtype does not fit.
        ValueError: a shape, a number of labels, a device or a name does not fit, or no identity is in both
            modalities. (The last is a RuntimeError in `torch.compile`; on a GPU the sum is 0, the mean NaN.)
        RuntimeError: the backend that was asked for can't serve the call.

    Equivalent to:
        ``losses, identities = mrcn_fast.reference.cqc_loss(features, labels, infrared_labels)``, then
        ``losses.sum()``. With ``normalize=True`` the features are ``torch.nn.functional.normalize(f)``.

    Example:
        >>> features, labels = torch.randn(6 * 4, 8), torch.tensor([3, 3, 7, 7])  # six sets, stacked
        >>> losses, identities = cqc_loss(features, labels, reduction="none")
        >>> losses.shape, identities
        (torch.Size([2]), tensor([3, 7]))
    """
    check_reduction(reduction)
    settings = _checked(margin, detach_negative, normalize)
    if has_torch_function((labels,)) and not isinstance(labels, Tensor):  # such as torch.fx's Proxy
        return handle_torch_function(
            cqc_loss, (labels,), features, labels, infrared_labels, margin=margin, reduction=reduction,
            detach_negative=detach_negative, normalize=normalize, backend=backend,
        )  # fmt: skip
    labels = check_labels("labels", labels)
    infrared_labels = labels if infrared_labels is None else check_labels("infrared_labels", infrared_labels)
    tensors = check_features(features, labels, infrared_labels)
    slots = _slots(backend, settings, labels, infrared_labels, tensors)
    _check_count(slots.number, labels, infrared_labels)
    if reduction == "none":
        return _each(slots, labels, infrared_labels)
    return slots.total if reduction == "sum" else slots.total / slots.number


def _checked(margin: float, detach_negative: bool, normalize: bool) -> CQCSettings:
    """The settings of a loss, for a backend that is not chosen yet. Raises ValueError where one is wrong."""
    check_margin(margin)
    detach_negative = check_flag("detach_negative", detach_negative)
    return CQCSettings("", float(margin), detach_negative, check_flag("normalize", normalize))


class _Slots(NamedTuple):
    """The loss as the kernels give it: one slot for each visible sample, of which ``number`` are used.

    An unused slot has the loss 0 and the identity `NOBODY`.
    """

    total: Tensor  # ()
    losses: Tensor  # (B_v,)
    identities: Tensor  # (B_v,)
    number: Tensor  # ()


def _slots(
    requested: str | None,
    settings: CQCSettings,
    labels: Tensor,
    infrared_labels: Tensor,
    features: tuple[Tensor, ...],
) -> _Slots:
    first = features[0]
    backend = dispatch.choose(requested, first.device.type, first.dtype)
    compiling = torch.compiler.is_compiling()
    given = (labels, infrared_labels, *features)
    needs_plain = not compiling and (
        internals.under_transform(given) or internals.in_forward_mode(given) or internals.recorded_by_jit()
    )
    if backend != "reference" and not needs_plain:
        settings = settings._replace(backend=backend)
        return _Slots(*CQCFunction.apply(settings, *distinct(labels, infrared_labels, *features)))
    with plain.without_autocast(first.device.type):
        # The literal form reads the labels' values, because it loops over the identities.
        literal = not (needs_plain or compiling) and type(labels) is Tensor and labels.device.type != "meta"
        form = _literal_slots if literal else _slots_by_sample
        sets = [f.to(shapes.precise(f.dtype)) for f in unstack(features, labels, infrared_labels)]
        return form(settings, labels, infrared_labels, sets)


def _literal_slots(
    settings: CQCSettings, labels: Tensor, infrared_labels: Tensor, sets: list[Tensor]
) -> _Slots:
    if reference.shared_identities(labels, infrared_labels).shape[0] == 0:
        raise ValueError(_nobody_shared(labels, infrared_labels))
    losses, identities = reference.cqc_loss(sets, labels, infrared_labels, **settings.options())
    return _Slots(losses.sum(), losses, identities, torch.tensor(losses.shape[0], device="cpu"))


def _slots_by_sample(
    settings: CQCSettings, labels: Tensor, infrared_labels: Tensor, sets: list[Tensor]
) -> _Slots:
    losses, counts = reference.cqc_loss_by_sample(sets, labels, infrared_labels, **settings.options())
    identities = torch.where(counts, labels, torch.full_like(labels, NOBODY))
    return _Slots(losses.sum(), losses, identities, counts.sum())


def _each(slots: _Slots, labels: Tensor, infrared_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each identity and the identities, ascending: their number is read from the device."""
    if slots.number.device.type == "meta":
        raise ValueError(
            "reduction: got 'none' with tensors on the meta device, expected 'sum' or 'mean': how many "
            "identities there are depends on the labels' values"
        )
    identities, order = slots.identities.sort()  # the unused slots are the last
    number = int(slots.number)
    if not torch.compiler.is_compiling() and number == 0:
        raise ValueError(_nobody_shared(labels, infrared_labels))
    return slots.losses[order[:number]], identities[:number]


class CQCLoss(nn.Module):
    """Center-quadruplet causal loss (eq. 8-10) as a module; see `cqc_loss` for shapes, dtypes and errors.

    Args:
        margin: α, 0.2 in the paper.
        reduction: "sum" over identities (the paper), "mean" over them, or "none" (losses and identities).
        detach_negative: take the pushed distances as constants.
        backend: "cpu", "triton", "cuda" or "reference"; None chooses one (see `mrcn_fast.backends`).
        normalize: divide each feature row by its Euclidean length first. The centers of unit features are at
            most 2 apart, so that α = 0.2 means the same for features of any length; without it, the margin
            hardly counts where features are long. The paper does not say which features its loss takes, and
            its equations take them as they are (False). Of the same author's other center losses, MMN's
            normalizes the features and DEEN's does not.

    Example:
        >>> features, labels = torch.randn(6, 8, 32), torch.arange(4).repeat_interleave(2)
        >>> CQCLoss()(features.unbind(), labels).shape
        torch.Size([])
    """

    def __init__(
        self,
        margin: float = 0.2,
        reduction: str = "sum",
        detach_negative: bool = False,
        backend: str | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        checked = _checked(margin, detach_negative, normalize)
        self.margin, self.reduction, self.backend = margin, reduction, backend
        self.detach_negative, self.normalize = checked.detach_negative, checked.normalize

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
            normalize=self.normalize,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"margin={self.margin}, reduction={self.reduction!r}, detach_negative={self.detach_negative}, "
            f"normalize={self.normalize}"
        )


_NOBODY_SHARED = (
    "labels and infrared_labels: got no identity that is in both, expected at least one; "
    "sample the two modalities with the same identities"
)


def _nobody_shared(labels: Tensor, infrared_labels: Tensor) -> str:
    return f"{_NOBODY_SHARED} (visible {_some(labels)}, infrared {_some(infrared_labels)})"


def _check_count(count: Tensor, labels: Tensor, infrared_labels: Tensor) -> None:
    """Refuse a batch without a shared identity, where reading the number makes nobody wait for a device."""
    if torch.compiler.is_compiling():
        internals.assert_in_graph(count > 0, _NOBODY_SHARED)
        return
    # A fake tensor, or one inside a transform, has no value to look at.
    has_value = type(count) is Tensor and not internals.under_transform((count, labels, infrared_labels))
    if has_value and count.device.type == "cpu" and int(count) == 0:
        raise ValueError(_nobody_shared(labels, infrared_labels))


def _some(labels: Tensor, limit: int = 8) -> str:
    known = torch.unique(labels)
    return f"{known[:limit].tolist()}{' ...' if known.shape[0] > limit else ''}"
