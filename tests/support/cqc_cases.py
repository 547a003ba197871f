"""The cases of the loss: drawing one, evaluating it with any backend, and holding it against the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mrcn_fast import cqc_loss
from tests.support import extended
from tests.support.matrix import DEVICE
from tests.support.rule import Verdict, array, judge, verdicts
from tests.support.tensors import FEATURE_LAYOUTS, arrange_rows

# The features as six tensors or as one, as they are or normalized.
FORMS = pytest.mark.parametrize(
    ("stacked", "normalize"), [(False, False), (True, False), (False, True), (True, True)]
)
# Lengths of rows: at and around the length that is clamped, and two whose squares overflow in float32.
LENGTHS = (0.0, 5e-13, 1e-12, 1.5e-12, 1e20, 3e38)


class CQCCase(NamedTuple):
    """A loss on given counts of samples per identity, shuffled; an identity with a count of 0 is absent."""

    visible_counts: tuple[int, ...] = (2, 2)
    infrared_counts: tuple[int, ...] = (2, 2)
    dimensions: int = 5
    dtype: torch.dtype = torch.float32
    stacked: bool = False
    reduction: str = "sum"
    detach_negative: bool = False
    margin: float = 0.2
    layout: str = "contiguous"
    scale: float = 1.0
    seed: int = 0
    normalize: bool = False


class CQCProblem(NamedTuple):
    """The tensors of a `CQCCase`: features that require gradients, and the gradient of the loss."""

    case: CQCCase
    features: tuple[Tensor, ...]  # six, or one
    labels: Tensor
    infrared_labels: Tensor
    gradient: Tensor


def problem(case: CQCCase, device: str = DEVICE) -> CQCProblem:
    """The tensors of ``case``; the identities are large, not consecutive, and every other one is negative."""
    generator = torch.Generator().manual_seed(case.seed)
    identities = torch.tensor([(-1) ** i * (7 + 1009 * i) for i in range(len(case.visible_counts))])

    def labels_of(counts: Sequence[int]) -> Tensor:
        labels = identities.repeat_interleave(torch.tensor(counts))
        return labels[torch.randperm(labels.shape[0], generator=generator)].to(device)

    labels, infrared_labels = labels_of(case.visible_counts), labels_of(case.infrared_counts)
    rows = [labels.shape[0]] * 3 + [infrared_labels.shape[0]] * 3
    sets = [
        case.scale * torch.randn(b, case.dimensions, generator=generator, dtype=torch.float64) for b in rows
    ]
    if case.stacked:
        sets = [torch.cat(sets)]
    features = tuple(
        arrange_rows(s.to(case.dtype).to(device), case.layout).detach().requires_grad_() for s in sets
    )
    present = sum(v > 0 and n > 0 for v, n in zip(case.visible_counts, case.infrared_counts, strict=True))
    shape = (present,) if case.reduction == "none" else ()
    gradient = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(_precise(case.dtype)).to(device)
    )
    return CQCProblem(case, features, labels, infrared_labels, gradient)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def call(p: CQCProblem, features: Sequence[Tensor], backend: str) -> Tensor | tuple[Tensor, Tensor]:
    return cqc_loss(
        features[0] if p.case.stacked else features,
        p.labels,
        p.infrared_labels,
        margin=p.case.margin,
        reduction=p.case.reduction,
        detach_negative=p.case.detach_negative,
        normalize=p.case.normalize,
        backend=backend,
    )


def evaluate(p: CQCProblem, backend: str) -> dict[str, Tensor]:
    """The loss and its gradients by name."""
    loss = call(p, p.features, backend)
    if isinstance(loss, tuple):
        loss = loss[0]
    assert loss.dtype == _precise(p.case.dtype)
    found = torch.autograd.grad(loss, p.features, p.gradient.to(loss.dtype))
    for feature, gradient in zip(p.features, found, strict=True):
        assert gradient.dtype == feature.dtype
    return {"loss": loss.detach(), **{f"grad {i}": g for i, g in enumerate(found)}}


def truth(p: CQCProblem) -> dict[str, extended.Array]:
    """The true loss and gradients: the reference in float64, and in long double for a float64 case."""
    if p.case.dtype == torch.float64:
        return extended.cqc(
            [array(f) for f in p.features],
            p.labels.cpu().numpy(),
            p.infrared_labels.cpu().numpy(),
            array(p.gradient),
            margin=p.case.margin,
            reduction=p.case.reduction,
            detach_negative=p.case.detach_negative,
            normalize=p.case.normalize,
        )
    wide = CQCProblem(
        p.case._replace(dtype=torch.float64),
        tuple(f.detach().double().requires_grad_() for f in p.features),
        p.labels,
        p.infrared_labels,
        p.gradient.double(),
    )
    return {name: array(x) for name, x in evaluate(wide, "reference").items()}


def check_accuracy(case: CQCCase, backend: str) -> None:
    """Fail if the loss or a gradient breaks the rule."""

    def compare(drawn: CQCCase) -> dict[str, Verdict] | None:
        p = problem(drawn)
        if near_kink(p):
            return None
        return verdicts(evaluate(p, backend), evaluate(p, "reference"), truth(p))

    seeds = (case._replace(seed=seed) for seed in range(case.seed, case.seed + 1000))
    judge(next(c for c in seeds if not near_kink(problem(c, "cpu"))), backend, compare)


def check_short_rows(case: CQCCase, row: int, length: float, backend: str) -> None:
    """Fail if the results differ from the reference's by more than rounding, row by row.

    The row numbered ``row`` has the length ``length`` in each set.
    """
    p = problem(case)
    for f in p.features:
        f.detach()[row] = 0
        f.detach()[row, -1] = length
    results, expected = (evaluate(p, name) for name in (backend, "reference"))
    for name, result in results.items():
        unit = torch.finfo(result.dtype).eps * expected[name].abs().amax(dim=-1, keepdim=True)
        assert ((result - expected[name]).abs() <= 8 * unit).all(), f"{name}: {result}, not {expected[name]}"


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, detach_negative: bool = False) -> CQCCase:
    """A `CQCCase` with at least one identity in both modalities.

    Features have two or more dimensions: in one, all directions are 1 or -1, and the gradients cancel.
    """
    number = draw(st.integers(1, 5))
    counts = st.lists(st.integers(0, 4), min_size=number, max_size=number)
    visible = draw(counts)
    infrared = draw(counts)
    shared = draw(st.integers(0, number - 1))
    visible[shared], infrared[shared] = max(1, visible[shared]), max(1, infrared[shared])
    stacked = draw(st.booleans())
    # If all six sets had one row in common, every distance would be zero.
    layouts = FEATURE_LAYOUTS[:-1] if stacked else FEATURE_LAYOUTS
    return CQCCase(
        visible_counts=tuple(visible),
        infrared_counts=tuple(infrared),
        dimensions=draw(st.sampled_from((2, 3, 8, 17, 64, 257))),
        dtype=dtype,
        stacked=stacked,
        reduction=draw(st.sampled_from(("sum", "mean", "none"))),
        detach_negative=detach_negative,
        margin=draw(st.sampled_from((0.0, 0.2, 3.0))),
        layout=draw(st.sampled_from(layouts)),
        scale=draw(st.sampled_from((0.01, 1.0, 30.0))),
        seed=draw(st.integers(0, 2**16)),
        normalize=draw(st.booleans()),
    )


def near_kink(p: CQCProblem) -> bool:
    """Whether rounding can change the side of a hinge, or the direction of a tiny distance."""
    features = [f.detach().double() for f in p.features]
    rows = [p.labels.shape[0]] * 3 + [p.infrared_labels.shape[0]] * 3
    sets = list(features[0].split(rows)) if p.case.stacked else features
    if p.case.normalize:
        sets = [F.normalize(s) for s in sets]
    labels = [p.labels] * 3 + [p.infrared_labels] * 3
    both = set(p.labels.tolist()) & set(p.infrared_labels.tolist())
    for identity in both:
        v, v_plus, v_minus, n_minus, n_plus, n = (
            s[of == identity].mean(0) for s, of in zip(sets, labels, strict=True)
        )
        for new, other, own in ((v_plus, n, v), (n_plus, v, n), (v_minus, n, v), (n_minus, v, n)):
            positive, negative = float((new - other).norm()), float((new - own).norm())
            magnitude = positive + negative + p.case.margin
            if abs(p.case.margin + positive - negative) < 1e-4 * magnitude:
                return True
            if min(positive, negative) < 1e-3 * float(new.norm() + own.norm() + other.norm()):
                return True
    return False
