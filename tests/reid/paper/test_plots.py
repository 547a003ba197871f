"""Drawings: what they show against a loop over pairs and the scores, and what is drawn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.patches import StepPatch
from torch import Tensor

from mrcn_fast.reid.evaluation import distances as evaluation_distances
from mrcn_fast.reid.evaluation.distances import distances
from mrcn_fast.reid.evaluation.scores import score
from mrcn_fast.reid.paper import plots
from mrcn_fast.reid.paper.plots import draw_distances, draw_rankings, draw_tsne, ranking, tsne_map


def people(count: int, images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around their identity's centre, and the identities."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(count).repeat_interleave(images)
    centers = torch.randn(count, 8, generator=torch.Generator().manual_seed(99))
    return centers[ids] + 0.5 * torch.randn(len(ids), 8, generator=generator), ids


# --- Figure 5: distances ------------------------------------------------------------------------------------


def test_distances_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    (visible, visible_ids), (infrared, infrared_ids) = people(5, 7), people(6, 4, seed=1)
    found = distances(visible, visible_ids, infrared, infrared_ids)
    apart: dict[bool, list[float]] = {True: [], False: []}
    for v, i in zip(visible.double(), visible_ids, strict=True):
        for n, j in zip(infrared.double(), infrared_ids, strict=True):
            apart[bool(i == j)].append(float((v / v.norm() - n / n.norm()).norm()))
    assert found.intra_mean == pytest.approx(np.mean(apart[True]), abs=1e-6)
    assert found.inter_mean == pytest.approx(np.mean(apart[False]), abs=1e-6)
    assert found.delta == pytest.approx(np.mean(apart[False]) - np.mean(apart[True]), abs=2e-6)
    edges = np.linspace(0, 2, len(found.intra) + 1)
    for counts, values in ((found.intra, apart[True]), (found.inter, apart[False])):
        expected, _ = np.histogram(values, edges)
        assert counts.sum() == len(values)
        # A distance on an edge may fall on either side of it.
        assert np.abs(counts.cumsum() - expected.cumsum()).max() <= 1
    monkeypatch.setattr(evaluation_distances, "_PAIRS_AT_ONCE", 50)
    chunked = distances(visible, visible_ids, infrared, infrared_ids)
    for counts, expected in ((chunked.intra, found.intra), (chunked.inter, found.inter)):
        assert np.abs(counts.cumsum() - expected.cumsum()).max() <= 1
    assert chunked.delta == pytest.approx(found.delta, abs=1e-6)


def test_the_length_of_features_does_not_matter() -> None:
    (visible, ids), (infrared, _) = people(4, 3), people(4, 3, seed=1)
    found = distances(10 * visible, ids, infrared / 7, ids)
    assert found.delta == pytest.approx(distances(visible, ids, infrared, ids).delta, abs=1e-6)


def test_distances_at_both_ends() -> None:
    """Equal features are in the first bin, opposite ones in the last."""
    one, ids = torch.tensor([[3.0, 4.0]]), torch.tensor([1])
    found = distances(one, ids, torch.cat((one, -one)), torch.tensor([1, 2]))
    assert (found.intra[0], found.inter[-1]) == (1, 1)
    assert found.delta == pytest.approx(2)


def test_the_drawn_distances_add_up() -> None:
    (visible, ids), (infrared, _) = people(5, 7), people(5, 7, seed=1)
    figure = draw_distances({"baseline": distances(visible, ids, infrared, ids)} | {
        "MRCN": distances(visible, ids, visible, ids)
    })  # fmt: skip
    assert [panel.get_title() for panel in figure.axes] == ["baseline", "MRCN"]
    assert len({panel.get_xlim() for panel in figure.axes}) == 1
    for panel in figure.axes:
        bars = [cast(StepPatch, patch).get_data()[0] for patch in panel.patches]
        assert [values.sum() for values in bars] == pytest.approx([100, 100])
        assert panel.texts[0].get_text().startswith("δ = ")
    with pytest.raises(ValueError, match="at least one column"):
        draw_distances({})


# --- Figure 5: t-SNE ----------------------------------------------------------------------------------------


def test_the_map_keeps_people_together_and_is_the_same_again() -> None:
    features, ids = people(6, 10)
    points = tsne_map(features, seed=3)
    assert points.shape == (60, 2)
    assert np.array_equal(points, tsne_map(features, seed=3))
    nearest = np.linalg.norm(points[:, None] - points, axis=2) + 1e9 * np.eye(60)
    assert (ids.numpy()[nearest.argmin(axis=1)] == ids.numpy()).mean() > 0.9
    with pytest.raises(ValueError, match="at least 3 images; got 2"):
        tsne_map(features[:2])


def test_features_that_are_not_finite_are_refused() -> None:
    bad, ids = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]]), torch.tensor([0, 1])
    good = torch.eye(2)
    for visible, infrared, name in ((bad, good, "visible"), (good, bad, "infrared")):
        with pytest.raises(ValueError, match=rf"{name} must be finite features .*\(2, 2\) with NaN"):
            distances(visible, ids, infrared, ids)
    with pytest.raises(ValueError, match="features must be finite features"):
        tsne_map(torch.full((4, 2), torch.nan))
    labels: dict[str, Any] = dict.fromkeys(
        ("query_ids", "gallery_ids", "query_cameras", "gallery_cameras"), ids
    )
    with pytest.raises(ValueError, match="distance must be finite; got NaN or infinity"):
        ranking(bad, **labels, protocol="regdb")


@pytest.mark.parametrize("factor", [1e-40, 1e-30, 1e38])
def test_the_features_scale_does_not_matter(factor: float) -> None:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    ids = torch.arange(6) % 3
    one, other = (distances(side, ids, side.flip(0), ids) for side in (features, features * factor))
    assert one.intra_mean == pytest.approx(other.intra_mean, abs=1e-3)
    assert one.inter_mean == pytest.approx(other.inter_mean, abs=1e-3)


def test_titles_may_be_any_folders_name(tmp_path: Path) -> None:
    image = np.zeros((8, 4, 3), np.uint8)
    title = "a$\\frac$ " + os.fsdecode(b"\xff")
    figure = draw_rankings({title: [plots.Row("", image, [image], [True])]}, count=1)
    figure.savefig(tmp_path / "x.png")
    assert figure.subfigs[0].get_suptitle() == "a\\$\\frac\\$ \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("count", [20, 23])
def test_the_map_is_drawn_by_person_and_modality(count: int) -> None:
    ids = [identity for identity in range(count) for _ in range(4)]
    infrared = [place % 2 == 1 for place in range(len(ids))]
    points = np.random.default_rng(0).standard_normal((len(ids), 2)).astype(np.float32)
    (panel,) = draw_tsne({"MRCN": points}, ids, infrared).axes
    dots, crosses = panel.collections
    assert np.array_equal(np.asarray(dots.get_offsets()), points[::2])
    assert np.array_equal(np.asarray(crosses.get_offsets()), points[1::2])
    assert len(np.unique(dots.get_facecolor(), axis=0)) == count


# --- Figure 6 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["sysu", "llcm", "regdb"])
def test_the_lists_are_those_that_are_scored(protocol: str) -> None:
    generator = torch.Generator().manual_seed(0)
    distance = torch.randint(0, 12, (40, 50), generator=generator).float()
    labels: dict[str, Any] = {
        "query_ids": torch.arange(40) % 8,
        "gallery_ids": torch.arange(50) % 8,
        "query_cameras": torch.arange(40) % 2 * 3 + 3 if protocol == "sysu" else torch.arange(40) % 3,
        "gallery_cameras": torch.arange(50) % 5 + 1 if protocol == "sysu" else torch.arange(50) % 3,
        "protocol": protocol,
    }
    whole = ranking(distance, **labels, count=50)
    assert ranking(distance, **labels).order.tolist() == whole.order[:, :10].tolist()
    precisions = []
    for correct, order in zip(whole.correct, whole.order, strict=True):
        assert not correct[order < 0].any()
        places = 1 + np.flatnonzero(correct)
        precisions.append(np.mean(np.arange(1, len(places) + 1) / places))
    assert score(distance, **labels).mAP == pytest.approx(np.mean(precisions), abs=1e-12)
    assert (whole.order < 0).any() == (protocol != "regdb")


def test_frames_show_right_and_wrong_matches() -> None:
    image = np.full((8, 4, 3), 128, dtype=np.uint8)
    row = plots.Row("person 1", image, [image] * 3, [True, False, True])
    figure = draw_rankings({"baseline": [row], "MRCN": [row, row]}, count=4)
    colors = [
        matplotlib.colors.to_hex(panel.spines["left"].get_edgecolor())
        for panel in figure.axes
        if panel.images
    ]
    query = matplotlib.colors.to_hex(plots.QUERY)
    assert colors == [query, plots.CORRECT, plots.WRONG, plots.CORRECT] * 3
    assert [part.get_suptitle() for part in figure.subfigs] == ["baseline", "MRCN"]


# A program that has chosen its own backend keeps it.
UNTOUCHED = """
import sys
import numpy as np
from mrcn_fast.reid.paper.plots import Row, draw_rankings
image = np.zeros((8, 4, 3), np.uint8)
draw_rankings({"MRCN": [Row("", image, [image], [True])]}, count=1).savefig(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", UNTOUCHED, str(tmp_path / "x.png")], check=True)
    assert (tmp_path / "x.png").stat().st_size > 0
