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
        features: `MRCNFeatures` of six pooled sets in the order v, v+, v-, n-, n+, n: the first three
            (B_v, D), the last three (B_n, D); or all of them stacked, (3 B_v + 3 B_n, D). float32, float64,
            bfloat16 or float16; the two half dtypes are computed in float32 and give a float32 loss.
        labels: (B_v,) integer identities of the visible samples, in any order; below 2^63 - 1.
        infrared_labels: (B_n,) of the infrared ones; ``labels`` where left out.
        margin: α.
        reduction: "sum" over identities (the paper), "mean" over them, or "none".
        detach_negative: take the pushed distances D(c±, c_own) as constants.
        normalize: divide each feature row by its Euclidean length (at least 1e-12) before the centers are
            made: c is the mean of f / ‖f‖. The paper does not say which features its loss takes. Of the same
            author's other center losses MMN's normalizes and DEEN's does not. Centers of unit features are
            at most 2 apart, so that α = 0.2 means the same however long the features are; without it the
            loss is nearly blind to α where features are long. It is fused: nothing of the features' size
            is made beside their gradient. A row shorter than 1e-12 is divided by that constant.
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
        ``losses.sum()``. With ``normalize=True`` the features are ``torch.nn.functional.normalize(f)``.
    """
    check_reduction(reduction)
    check_margin(margin)
    detach_negative = check_flag("detach_negative", detach_negative)
    normalize = check_flag("normalize", normalize)
    if has_torch_function((labels,)) and not isinstance(labels, Tensor):  # such as torch.fx's Proxy
        made: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            cqc_loss, (labels,), features, labels, infrared_labels, margin=margin, reduction=reduction,
            detach_negative=detach_negative, normalize=normalize, backend=backend,
        )  # fmt: skip
        return made
    labels = check_labels("labels", labels)
    infrared_labels = labels if infrared_labels is None else check_labels("infrared_labels", infrared_labels)
    tensors = check_features(features, labels, infrared_labels)
    settings = CQCSettings("", float(margin), detach_negative, normalize)
    slots = _slots(backend, settings, labels, infrared_labels, tensors)
    _check_count(slots.number, labels, infrared_labels)
    if reduction == "none":
        return _each(slots, labels, infrared_labels)
    return slots.total if reduction == "sum" else slots.total / slots.number


class _Slots(NamedTuple):
    """The loss as the kernels give it: a slot for each visible sample, of which ``number`` are used.

    The others have loss 0 and the identity `NOBODY`.
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
        # The literal form loops over the identities that it finds in the labels.
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
    identities, order = slots.identities.sort()  # the slots left over are the last
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
        backend: "cpu", "triton", "cuda", "reference", or None for what serves.
        normalize: divide each feature row by its length first, so that the margin does not depend on how long
            the features are. As the paper writes its equations they are taken as they come (False).
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
        check_margin(margin)
        self.margin, self.reduction, self.backend = margin, reduction, backend
        self.detach_negative = check_flag("detach_negative", detach_negative)
        self.normalize = check_flag("normalize", normalize)

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
    """Refuses a batch without a shared identity, where the number can be looked at without waiting for it."""
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
