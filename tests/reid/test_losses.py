"""The total loss against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mrcn_fast.reid.losses import BatchHardTriplet, ReIDLoss
from mrcn_fast.reid.model import TrainingOutput

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


def baseline_output() -> TrainingOutput:
    """One image a person and modality: v at 0 and 10, n at 1 and 4; logits that say nothing."""
    return TrainingOutput(torch.tensor([[0.0], [10.0], [1.0], [4.0]]), torch.zeros(4, 2))


def test_identity_loss_is_label_smoothed() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(4, 1)
    output = TrainingOutput(torch.rand(4, 2), logits)
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


def test_the_baseline_has_no_cqc() -> None:
    parts = ReIDLoss()(baseline_output(), torch.tensor([0, 1]))
    assert parts.cqc.item() == 0
    assert parts.total.item() == pytest.approx((parts.identity + parts.triplet).item())


def test_cqc_and_the_weights_by_hand() -> None:
    # Two people at each place, person 1 a hundred further on. v 0, v+ 2, v- 3, n- 1, n+ 1, n 4:
    # [.2 + D(v+, n) - D(v+, v)] = .2 + 2 - 2, [.2 + D(n+, v) - D(n+, n)] = .2 + 1 - 3 < 0,
    # [.2 + D(v-, n) - D(v-, v)] = .2 + 1 - 3 < 0, [.2 + D(n-, v) - D(n-, n)] = .2 + 1 - 3 < 0.
    places = torch.tensor([0.0, 2.0, 3.0, 1.0, 1.0, 4.0])
    pooled = torch.stack((places, places + 100), 1).reshape(12, 1)
    output = TrainingOutput(pooled, torch.zeros(12, 2))
    parts = ReIDLoss(triplet_weight=0.5, cqc_weight=2.0)(output, torch.tensor([0, 1]))
    assert parts.cqc.item() == pytest.approx(2 * 0.2, abs=1e-5)
    assert parts.triplet.item() == 0
    assert parts.identity.item() == pytest.approx(math.log(2), abs=1e-5)
    assert parts.total.item() == pytest.approx(math.log(2) + 2.0 * 0.4, abs=1e-5)
    mean = ReIDLoss(cqc_reduction="mean")(output, torch.tensor([0, 1]))
    assert mean.cqc.item() == pytest.approx(0.2, abs=1e-5)


def test_the_defaults_are_the_papers() -> None:
    loss = ReIDLoss()
    assert (loss.triplet_weight, loss.cqc_weight) == (1.0, 1.2)
    assert (loss.cqc.margin, loss.cqc.reduction) == (0.2, "sum")
    assert loss.identity.label_smoothing == 0.1


@pytest.mark.parametrize("rows", [6, 10, 13])
def test_other_numbers_of_sets_are_refused(rows: int) -> None:
    output = TrainingOutput(torch.rand(rows, 3), torch.rand(rows, 2))
    with pytest.raises(ValueError, match=f"got {rows} features for 2 labels"):
        ReIDLoss()(output, torch.tensor([0, 1]))
