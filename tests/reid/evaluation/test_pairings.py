"""The three ways to compare the two test features of an image."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.progress import Progress

from mrcn_fast.reid.evaluation import extraction, trained
from mrcn_fast.reid.evaluation.pairings import (
    HEADLINE_PAIRING,
    PAIRINGS,
    Pairing,
    exchange,
    paired,
    pairings_of,
)
from mrcn_fast.reid.evaluation.results import describe, kept_result
from mrcn_fast.reid.evaluation.scoring import score_checkpoint
from mrcn_fast.reid.evaluation.trained import open_trained
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.trainer import Trainer

QUIET: dict[str, Any] = {"progress": Progress(disable=True)}


@pytest.fixture(scope="module")
def finished(tiny_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(tiny_run, out=str(tmp_path_factory.mktemp("run")), steps=1)
    return Trainer(config).fit(progress=Progress(disable=True))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_pairing_is_its_sum_of_products(pairing: Pairing) -> None:
    query, gallery = torch.randn(5, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    (v, v_plus), (n, n_plus) = query.chunk(2, dim=1), gallery.chunk(2, dim=1)
    paper, crossed = v @ n.T + v_plus @ n_plus.T, v @ n_plus.T + v_plus @ n.T
    expected = {"paper": paper, "crossed": crossed, "all": paper + crossed}[pairing]
    first, second = paired(query, gallery, pairing)
    torch.testing.assert_close(first @ second.T, expected)


def test_one_set_has_one_pairing() -> None:
    assert pairings_of(1) == (HEADLINE_PAIRING,)
    assert pairings_of(2) == PAIRINGS


def test_exchanged_modalities_are_reported_above_ten_points() -> None:
    assert exchange({"paper": 0.5}) is None
    assert exchange({"paper": 0.5, "crossed": 0.59, "all": 0.9}) is None
    assert exchange({"paper": 0.9, "crossed": 0.5, "all": 0.9}) is None
    output = exchange({"paper": 0.712, "crossed": 0.934, "all": 0.9})
    assert output is not None
    assert output.startswith("modalities exchanged: rank-1 is 71.2 by the paper's pairing")
    assert "93.4 by the crossed one" in output


def test_results_have_all_pairings(
    finished: Path, tiny_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exchanged features, the scores of the paper's and the crossed pairing change places."""
    own = Path(shutil.copy(finished, tmp_path / "checkpoint.pth"))
    plain = score_checkpoint(own, tiny_tree, mode="both", trials=2, **QUIET)
    extract = extraction.extract

    def exchanged(model, samples, modality, *arguments, **options):  # type: ignore[no-untyped-def]
        features = extract(model, samples, modality, *arguments, **options)
        return features.roll(features.shape[1] // 2, dims=1) if modality == "infrared" else features

    monkeypatch.setattr(trained, "extract", exchanged)
    result = score_checkpoint(own, tiny_tree, mode="both", trials=2, **QUIET)
    assert list(result["searches"]) == ["all-search", "indoor-search"]
    for name, search in result["searches"].items():
        before = plain["searches"][name]
        assert list(search["pairings"]) == ["crossed", "all"]
        for statistic in ("mean", "std"):
            assert search["pairings"]["crossed"][statistic] == before[statistic]
            assert search[statistic] == before["pairings"]["crossed"][statistic]
            assert search["pairings"]["all"][statistic] == before["pairings"]["all"][statistic]
    output = describe(result)
    crossed = 100 * result["searches"]["all-search"]["pairings"]["crossed"]["mean"]["rank1"]
    assert f"v·n₊ + v₊·n: Rank-1 {crossed:.2f}, mAP " in output


def test_results_have_the_distances_of_figure_5(
    finished: Path, tiny_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each person has a direction of their own, one person is 0 apart, and two people √2."""
    own = Path(shutil.copy(finished, tmp_path / "checkpoint.pth"))

    def by_person(model, samples, modality, *_, **__):  # type: ignore[no-untyped-def]
        return 3 * torch.eye(64)[[sample.identity for sample in samples]]

    monkeypatch.setattr(trained, "extract", by_person)
    result = score_checkpoint(own, tiny_tree, trials=2, **QUIET)
    found = result["searches"]["all-search"]["distances"]
    root = 2**0.5
    assert found == pytest.approx({"intra": 0.0, "inter": root, "delta": root}, abs=1e-6)
    assert "δ 1.414: distance 0.000 within people, 1.414 between" in describe(result)


@pytest.mark.parametrize(
    ("pairings", "message"),
    [
        (None, "got searches.all-search.pairings=None, expected values by name"),
        ({"crossed": {}}, "got no searches.all-search.pairings.crossed.mean, expected values by name"),
        ({"all": {"mean": {}}}, "got no searches.all-search.pairings.all.mean.rank1, expected a number"),
    ],
)
def test_a_result_without_whole_pairings_is_not_kept(
    finished: Path,
    tiny_tree: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    pairings: Any,
    message: str,
) -> None:
    own = Path(shutil.copy(finished, tmp_path / "checkpoint.pth"))
    score_checkpoint(own, tiny_tree, trials=1, **QUIET)
    (path,) = tmp_path.glob("test-*.json")
    result = json.loads(path.read_text())
    assert kept_result(tmp_path, result) == result
    result["searches"]["all-search"]["pairings"] = pairings
    path.write_text(json.dumps(result))
    assert kept_result(tmp_path, result) is None
    assert f"{path}: not taken for a result: {message}" in caplog.text


def test_exchanged_modalities_give_a_warning(
    finished: Path,
    tiny_tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Features whose F matches no other F, while F₊ of one modality is F of the other."""
    own = Path(shutil.copy(finished, tmp_path / "checkpoint.pth"))
    size = cast(ReIDModel, open_trained(own, tiny_tree).model).feature_size // 2

    def met_the_wrong_way(model, samples, modality, *_, **__):  # type: ignore[no-untyped-def]
        of_person = torch.eye(size)[[sample.identity % size for sample in samples]]
        others = of_person.roll(size // 2, dims=1)
        sets = (of_person, others) if modality == "visible" else (others, of_person)
        return torch.cat(sets, dim=1)

    monkeypatch.setattr(trained, "extract", met_the_wrong_way)
    with caplog.at_level(logging.WARNING):
        result = score_checkpoint(own, tiny_tree, trials=2, **QUIET)
    assert result["searches"]["all-search"]["pairings"]["crossed"]["mean"]["rank1"] == 1
    warnings = [record.message for record in caplog.records if "modalities exchanged" in record.message]
    assert len(warnings) == 1
    assert "all-search" in warnings[0]


def test_a_network_of_one_set_has_no_other_pairing(
    tiny_config: TrainConfig, tiny_tree: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, out=str(tmp_path), model="baseline", steps=1)
    result = score_checkpoint(Trainer(config).fit(progress=Progress(disable=True)), tiny_tree, **QUIET)
    assert result["searches"]["all-search"]["pairings"] == {}
