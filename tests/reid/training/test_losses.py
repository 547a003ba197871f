"""The total loss against numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mrcn_fast import SNRFeatures, reference
from mrcn_fast.reid.models.network import TrainingOutput
from mrcn_fast.reid.training.losses import BatchHardTriplet, ReIDLoss, dual_causality
from tests.support.matrix import backends

# Two people on a line: 0 and 1, 3 and 7. Furthest positives 1, 1, 4, 4; nearest negatives 3, 2, 2, 6.
POINTS = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
PEOPLE = torch.tensor([0, 0, 1, 1])


def test_batch_hard_triplet_by_hand() -> None:
    # Hinges: .3 + 1 - 3, .3 + 1 - 2, .3 + 4 - 2, .3 + 4 - 6; the mean is over all four anchors.
    assert BatchHardTriplet(0.3)(POINTS, PEOPLE).item() == pytest.approx(2.3 / 4, abs=1e-5)


def test_soft_margin_by_hand() -> None:
    expected = sum(math.log1p(math.exp(d)) for d in (1 - 3, 1 - 2, 4 - 2, 4 - 6)) / 4
    assert BatchHardTriplet(0.3, soft_margin=True)(POINTS, PEOPLE).item() == pytest.approx(expected, abs=1e-5)


def test_triplet_is_computed_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = BatchHardTriplet(0.3)(POINTS.bfloat16(), PEOPLE)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2.3 / 4, abs=1e-5)


def test_triplet_of_equal_points_has_finite_gradients() -> None:
    points = torch.zeros(4, 3, requires_grad=True)
    loss = BatchHardTriplet(0.3)(points, PEOPLE)
    loss.backward()
    assert loss.item() == pytest.approx(0.3)
    assert points.grad is not None
    assert torch.isfinite(points.grad).all()


@pytest.mark.parametrize("soft_margin", [False, True])
def test_batch_hard_triplet_anchor_by_anchor(soft_margin: bool) -> None:
    """Some anchors have no positive, and in one batch no anchor has a negative."""
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = BatchHardTriplet(0.3, soft_margin)
    for labels in (torch.tensor([0, 1, 0, 2, 1, 3, 0, 1, 4]), torch.zeros(9, dtype=torch.int64)):
        hinges = []
        for anchor in range(9):
            away = (features - features[anchor]).norm(dim=1)
            positives = [away[i] for i in range(9) if labels[i] == labels[anchor] and i != anchor]
            negatives = [away[i] for i in range(9) if labels[i] != labels[anchor]]
            if positives and negatives:
                apart = max(positives) - min(negatives)
                hinges.append(F.softplus(apart) if soft_margin else F.relu(0.3 + apart))
        expected = torch.stack(hinges).mean() if hinges else 0 * features.sum()
        got = loss(features, labels)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, features)[0] for x in (got, expected)))


def one_part(pooled: Tensor, logits: Tensor) -> TrainingOutput:
    return TrainingOutput(pooled[None], logits[None])


def baseline_output() -> TrainingOutput:
    """One image a person and modality: v at 0 and 10, n at 1 and 4; logits that say nothing."""
    return one_part(torch.tensor([[0.0], [10.0], [1.0], [4.0]]), torch.zeros(4, 2))


def six_sets() -> TrainingOutput:
    """Two people at each place, person 1 a hundred further on: v 0, v+ 2, v- 3, n- 1, n+ 1, n 4."""
    places = torch.tensor([0.0, 2.0, 3.0, 1.0, 1.0, 4.0])
    return one_part(torch.stack((places, places + 100), 1).reshape(12, 1), torch.zeros(12, 2))


def random_output(sets: int, parts: int, *, batch: int = 6, seed: int = 0) -> TrainingOutput:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(parts, sets * batch, 5, generator=generator)
    return TrainingOutput(pooled, torch.randn(parts, sets * batch, 3, generator=generator))


# Equations 8 to 10 to the letter.
AS_PRINTED: Any = {"cqc_features": "pooled", "cqc_reduction": "sum"}
THREE_PEOPLE = torch.tensor([0, 0, 1, 1, 2, 2])


def test_identity_loss_is_label_smoothed() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(4, 1)
    output = one_part(torch.rand(4, 2), logits)
    log_p = [2 - math.log(math.exp(2) + 2), -math.log(math.exp(2) + 2)]
    for labels, target in ((torch.tensor([0, 0]), 0), (torch.tensor([1, 1]), 1)):
        expected = -(0.9 * log_p[target] + 0.1 / 3 * (log_p[0] + 2 * log_p[1]))
        # A single person has no negatives, so only the identity term is looked at.
        assert ReIDLoss(triplet_weight=0)(output, labels).identity.item() == pytest.approx(expected, abs=1e-5)


def test_all_sets_are_mined_together() -> None:
    # Within a modality nobody has a positive: only the pool of both has triplets.
    parts = ReIDLoss()(baseline_output(), torch.tensor([0, 1]))
    # v0: +1 -4; v1: +6 -9; n0: +1 -3; n1: +6 -3.
    assert parts.triplet.item() == pytest.approx((0.3 + 6 - 3) / 4, abs=1e-5)


def test_two_sets_have_no_cqc_and_no_causality() -> None:
    parts = ReIDLoss()(baseline_output(), torch.tensor([0, 1]))
    assert parts.cqc.item() == 0 and parts.causality.item() == 0
    assert parts.total.item() == pytest.approx((parts.identity + parts.triplet).item())


def test_cqc_and_the_weights_by_hand() -> None:
    # [.2 + D(v+, n) - D(v+, v)] = .2 + 2 - 2, [.2 + D(n+, v) - D(n+, n)] = .2 + 1 - 3 < 0,
    # [.2 + D(v-, n) - D(v-, v)] = .2 + 1 - 3 < 0, [.2 + D(n-, v) - D(n-, n)] = .2 + 1 - 3 < 0.
    labels = torch.tensor([0, 1])
    parts = ReIDLoss(triplet_weight=0.5, cqc_weight=2.0, **AS_PRINTED)(six_sets(), labels)
    assert parts.cqc.item() == pytest.approx(2 * 0.2, abs=1e-5)
    assert parts.triplet.item() == 0
    assert parts.identity.item() == pytest.approx(math.log(2), abs=1e-5)
    assert parts.total.item() == pytest.approx(math.log(2) + 2.0 * 0.4, abs=1e-5)
    mean = ReIDLoss(cqc_features="pooled", cqc_reduction="mean")(six_sets(), labels)
    assert mean.cqc.item() == pytest.approx(0.2, abs=1e-5)


def test_unit_features_are_compared_by_direction_alone() -> None:
    """The loss doesn't depend on the features' lengths, and equals the loss after F.normalize."""
    pooled, logits, styles = random_output(6, 2)
    unit = ReIDLoss(cqc_margin=1.5)
    pooled_features = ReIDLoss(cqc_margin=1.5, cqc_features="pooled")
    got = unit(TrainingOutput(pooled, logits, styles), THREE_PEOPLE).cqc
    longer = unit(TrainingOutput(7 * pooled, logits, styles), THREE_PEOPLE).cqc
    want = pooled_features(TrainingOutput(F.normalize(pooled, dim=2), logits, styles), THREE_PEOPLE).cqc
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(longer, want)
    assert got != pooled_features(TrainingOutput(pooled, logits, styles), THREE_PEOPLE).cqc


def test_four_sets_have_half_of_the_cqc_by_hand() -> None:
    # v 0, v+ 2, n+ 1, n 4: of the hinges above only that of v+ is left, 0.2 a person.
    pooled = torch.tensor([0.0, 100, 2, 102, 1, 101, 4, 104])[:, None]
    parts = ReIDLoss(**AS_PRINTED)(one_part(pooled, torch.zeros(8, 2)), torch.tensor([0, 1]))
    assert parts.cqc.item() == pytest.approx(2 * 0.2, abs=1e-5)


@backends("cpu", "reference")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_half_the_cqc_is_equation_8_or_9(reduction: Literal["sum", "mean"], backend: str) -> None:
    """Value and gradient, against the reference's own function of the four centers."""
    pooled = random_output(4, 1).pooled[0].double().requires_grad_()
    loss = ReIDLoss(cqc_margin=1.5, cqc_features="pooled", cqc_reduction=reduction, backend=backend)
    got = loss(one_part(pooled, torch.zeros(24, 3)), THREE_PEOPLE).cqc
    identities = torch.arange(3)
    v, of_v, of_n, n = (reference.centers(f, THREE_PEOPLE, identities) for f in pooled.chunk(4))
    each = reference.cqc_half(v, n, of_v, of_n, 1.5)
    assert (each > 0).all() and each.std() > 0
    want = each.sum() if reduction == "sum" else each.mean()
    torch.testing.assert_close(got, want.to(got.dtype))
    torch.testing.assert_close(*(torch.autograd.grad(x, pooled)[0] for x in (got, want)))


@pytest.mark.parametrize("sets", [4, 6])
def test_without_a_weight_no_cqc_is_computed(sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ReIDLoss(cqc_weight=0)

    def fail(*_: object) -> Tensor:
        raise AssertionError("the CQC loss was computed")

    monkeypatch.setattr(loss.cqc, "forward", fail)
    parts = loss(random_output(sets, 2), THREE_PEOPLE)
    assert parts.cqc.item() == 0
    assert parts.total.item() == pytest.approx((parts.identity + parts.triplet).item(), rel=1e-5)


def test_without_a_weight_no_triplet_is_mined(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ReIDLoss(triplet_weight=0)

    def fail(*_: object) -> Tensor:
        raise AssertionError("the triplet loss was computed")

    monkeypatch.setattr(loss.triplet, "forward", fail)
    parts = loss(random_output(2, 1), THREE_PEOPLE)
    assert parts.triplet.item() == 0
    assert parts.total.item() == pytest.approx(parts.identity.item(), rel=1e-5)


@pytest.mark.parametrize("sets", [2, 4, 6])
def test_losses_are_the_means_over_parts(sets: int) -> None:
    output = random_output(sets, 3)
    loss = ReIDLoss()
    together = loss(output, THREE_PEOPLE)
    alone = [
        loss(one_part(pooled, logits), THREE_PEOPLE)
        for pooled, logits in zip(output.pooled, output.logits, strict=True)
    ]
    for name, got in together._asdict().items():
        each = [getattr(parts, name).item() for parts in alone]
        assert got.item() == pytest.approx(sum(each) / 3, rel=1e-5), name
        assert got.dtype == torch.float32 and got.shape == ()


@backends("cpu")
@pytest.mark.parametrize("sets", [4, 6])
def test_the_backend_reaches_the_cqc_loss(sets: int, backend: str) -> None:
    assert ReIDLoss(backend=backend).cqc.backend == backend
    totals, gradients = [], []
    for name in (backend, "reference"):
        output = random_output(sets, 2)
        output.pooled.requires_grad_()
        totals.append(ReIDLoss(backend=name)(output, THREE_PEOPLE).total)
        gradients.append(torch.autograd.grad(totals[-1], output.pooled)[0])
    torch.testing.assert_close(*totals)
    torch.testing.assert_close(*gradients)


def test_the_defaults_are_the_papers_with_the_accepted_reading_of_cqc() -> None:
    loss = ReIDLoss()
    assert (loss.triplet_weight, loss.cqc_weight) == (1.0, 1.2)
    assert (loss.cqc.margin, loss.cqc.reduction, loss.cqc.normalize) == (0.2, "mean", True)
    assert loss.identity.label_smoothing == 0.1
    assert loss.causality_weight == 0.1


@pytest.mark.parametrize("rows", [6, 10, 13])
def test_other_numbers_of_sets_are_refused(rows: int) -> None:
    output = one_part(torch.rand(rows, 3), torch.rand(rows, 2))
    with pytest.raises(ValueError, match=f"got {rows} features per part for 2 labels"):
        ReIDLoss()(output, torch.tensor([0, 1]))


def test_labels_of_both_modalities_are_named() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    for sets in (6, 2):
        output = one_part(torch.rand(2 * sets, 3), torch.rand(2 * sets, 2))
        with pytest.raises(ValueError, match=r"for 4 labels, .* pass one modality's labels"):
            ReIDLoss()(output, labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2], "got labels from 0 to 2, expected classes from 0 to 1"),
        ([-100, 0], "got labels from -100 to 0"),
        ([0.0, 1.0], "got labels of torch.float32"),
        ([True, False], "got labels of torch.bool"),
        ([[0, 1]], r"got labels of torch.int64 \(1, 2\)"),
        ([], r"\(0,\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: list[Any], message: str) -> None:
    output = one_part(torch.rand(12, 3), torch.rand(12, 2))
    with pytest.raises(ValueError, match=message):
        ReIDLoss()(output, torch.tensor(labels))


def test_features_and_labels_of_other_lengths_are_refused() -> None:
    features, labels = torch.rand(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"got features \(4, 3\) and labels \(2,\), expected"):
        BatchHardTriplet()(features, labels)
    with pytest.raises(ValueError, match=r"got styles \(4, 3\) and labels \(2,\)"):
        dual_causality(SNRFeatures(features, features, features), labels)


def test_labels_of_other_integers_are_taken() -> None:
    output = one_part(torch.rand(12, 3), torch.rand(12, 2))
    expected = ReIDLoss()(output, torch.tensor([0, 1])).total
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(ReIDLoss()(output, torch.tensor([0, 1], dtype=dtype)).total, expected)


def test_unfit_options_of_the_loss_are_refused() -> None:
    for values, message in (
        ({"triplet_margin": torch.nan}, "got triplet_margin=nan, expected a finite number"),
        ({"label_smoothing": 2.0}, "got label_smoothing=2.0, expected a number from 0 to 1"),
        ({"cqc_weight": "1.2"}, "got cqc_weight='1.2', expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            ReIDLoss(**values)


def test_a_reduction_without_a_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match="got cqc_reduction='none', expected one of sum, mean"):
        ReIDLoss(cqc_reduction="none")
    with pytest.raises(ValueError, match="got cqc_features='raw', expected one of pooled, unit"):
        ReIDLoss(cqc_features="raw")


# --- SNR's dual causality loss ----------------------------------------------------------------------------


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_dual_causality_by_hand() -> None:
    # Two of person 0, one of person 1, on the axes x, y and -x; d is 0.5 for a right angle, 0 for equal and 1
    # for opposite directions, whatever the lengths.
    x, y, back = (2.0, 0.0), (0.0, 3.0), (-5.0, 0.0)
    styles = SNRFeatures(
        restituted=torch.tensor([x, x, back]),  # positive 0, negatives 1 and 1
        contaminated=torch.tensor([x, back, x]),  # positive 1, negatives 0 and 1
        normalized=torch.tensor([x, y, y]),  # positive 0.5, negatives 0.5 and 0
    )
    labels = torch.tensor([0, 0, 1])
    # Positives: restituted 0 - 0.5, contaminated 0.5 - 1, for both anchors of person 0; person 1 has none.
    positive = softplus(-0.5) + softplus(-0.5)
    # Negatives, normalized - restituted and contaminated - normalized: anchor 0 with 2, anchor 1 with 2.
    first = softplus(0.5 - 1) + softplus(0 - 0.5)
    second = softplus(0 - 1) + softplus(1 - 0)
    expected = (positive + first + positive + second + (first + second) / 2) / 3
    assert dual_causality(styles, labels).item() == pytest.approx(expected, abs=1e-5)


def test_dual_causality_is_the_papers_over_all_triplets() -> None:
    """Jin et al.'s two equations, summed literally over anchor, positive and negative."""
    generator = torch.Generator().manual_seed(0)
    styles = SNRFeatures._make(torch.randn(8, 5, generator=generator) for _ in range(3))
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])

    def d(features: Tensor, a: int, b: int) -> float:
        return 0.5 - F.cosine_similarity(features[a], features[b], dim=0).item() / 2

    each = []
    for a in range(8):
        for p in range(8):
            for n in range(8):
                if p == a or labels[p] != labels[a] or labels[n] == labels[a]:
                    continue
                plus, minus, norm = styles
                each.append(
                    softplus(d(plus, a, p) - d(norm, a, p))
                    + softplus(d(norm, a, n) - d(plus, a, n))
                    + softplus(d(norm, a, p) - d(minus, a, p))
                    + softplus(d(minus, a, n) - d(norm, a, n))
                )
    assert dual_causality(styles, labels).item() == pytest.approx(sum(each) / len(each), abs=1e-5)


def test_dual_causality_prefers_restitution_that_separates_people() -> None:
    people = torch.eye(2).repeat(2, 1)  # each person in a direction of its own, in both modalities
    mixed = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # by modality
    norm = torch.full((4, 2), 0.7)
    labels = torch.tensor([0, 1, 0, 1])
    good, bad = (
        dual_causality(SNRFeatures(a, b, norm), labels) for a, b in ((people, mixed), (mixed, people))
    )
    assert good < 4 * math.log(2) < bad


def test_features_without_a_direction_are_at_distance_0() -> None:
    """mean(F̃) is β, at first 0 except for rounding, which must give neither noise nor a huge gradient."""
    noise = (1e-8 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1])
    loss = dual_causality(SNRFeatures(noise, noise, noise), labels)
    loss.backward()
    assert loss.item() == pytest.approx(4 * math.log(2), abs=1e-6)
    assert noise.grad is not None and noise.grad.abs().max() < 1e-3


def test_people_without_positives_or_negatives_add_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    styles = SNRFeatures._make(torch.randn(2, 3, generator=generator).requires_grad_() for _ in range(3))
    for labels in (torch.tensor([0, 0]), torch.tensor([0, 1])):
        loss = dual_causality(styles, labels)
        assert loss.isfinite() and loss > 0
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, styles))


def test_causality_is_the_weighted_sum_over_blocks() -> None:
    labels = torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(0)
    styles = tuple(
        SNRFeatures._make(torch.randn(4, 6, generator=generator).bfloat16() for _ in range(3))
        for _ in range(2)
    )
    output = baseline_output()._replace(styles=styles)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = ReIDLoss(causality_weight=0.5)(output, labels)
    each = [dual_causality(style, torch.tensor([0, 1, 0, 1])).item() for style in styles]
    assert parts.causality.dtype == torch.float32
    assert parts.causality.item() == pytest.approx(sum(each), abs=1e-6)
    rest = (parts.identity + parts.triplet).item()
    assert parts.total.item() == pytest.approx(rest + 0.5 * sum(each), abs=1e-5)
    assert ReIDLoss(causality_weight=0)(output, labels).causality.item() == 0
