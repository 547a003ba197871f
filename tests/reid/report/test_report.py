"""The report: one page that needs nothing else, with the scores of the networks, as a browser shows it."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mrcn_fast import dispatch
from mrcn_fast.cli import main
from mrcn_fast.reid.data import DatasetError, RegDB
from mrcn_fast.reid.evaluation.results import ResultError
from mrcn_fast.reid.evaluation.scoring import score_checkpoint
from mrcn_fast.reid.evaluation.trained import open_trained
from mrcn_fast.reid.report import choose_subject, write_report
from mrcn_fast.reid.report.charts import draw_cmc, draw_losses
from mrcn_fast.reid.report.command import time_block
from mrcn_fast.reid.training.config import TrainConfig
from tests.reid.conftest import TINY, quiet, train
from tests.support.browser import NEEDS_CHROMIUM, look

# The name of a run's folder, which the page shows, because both runs are of one model.
NAME = "<script>alert(1)&"


@pytest.fixture(scope="module")
def runs(tiny_regdb: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two trained networks."""
    values: dict[str, Any] = TINY | {"data": str(tiny_regdb), "dataset": "regdb", "epochs": 1}
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / "first", folder / NAME]
    for seed, path in enumerate(paths):
        train(TrainConfig(**values, seed=seed, out=str(path)))
    return paths


@pytest.fixture(scope="module")
def page(runs: list[Path], tiny_regdb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of both runs, as the command writes it."""
    out = tmp_path_factory.mktemp("report") / "page.html"
    flags = ["--data", str(tiny_regdb), "--out", str(out), "--queries=2", "--accelerator=cpu"]
    assert main(["report", "--runs", *map(str, runs), *flags]) == 0
    return out


def test_the_blocks_times_name_the_backend_that_served(tiny_regdb: Path, tmp_path: Path) -> None:
    values = TINY | {"data": str(tiny_regdb), "dataset": "regdb", "steps": 1}
    for gate in ("se", "cbam"):
        run = train(TrainConfig(**values, gate=gate, out=str(tmp_path / gate))).checkpoint_path
        trained = open_trained(run, tiny_regdb, accelerator="cpu")
        times = time_block(trained)
        assert times is not None and times.backend == trained.backend
        assert (times.backend == "reference") == (gate == "cbam" or not dispatch.backends()["cpu"].usable)


def test_the_page_needs_no_other_file(page: Path) -> None:
    text = page.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(source.startswith("data:") for source in sources)
    assert "url(" not in text and "@import" not in text
    pictures = [source for source in sources if source.startswith("data:image/")]
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as image:
            image.load()
            assert len(set(image.convert("L").getextrema())) == 2
    # Four training people in both spectra; four terms of the training, curves, distances and the block; for
    # each of two queries its image, and for each network the gallery of four people with two images each.
    assert len(pictures) == 4 * 2 + 4 + 3 + 2 * (1 + 2 * 8)


def test_names_are_text(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert "MRCN, &lt;script&gt;alert(1)&amp;" in text


def test_the_scores_are_those_of_the_test(page: Path, runs: list[Path], tiny_regdb: Path) -> None:
    shown = re.findall(r'data-name="(?:Rank-1|Rank-10|mAP|mINP)">([\d.]+)<', page.read_text())
    expected = []
    for run in runs:
        result = score_checkpoint(run, tiny_regdb, accelerator="cpu", progress=quiet())
        mean = result["searches"][result["headline"]]["mean"]
        expected += [f"{100 * mean[name]:.1f}" for name in ("rank1", "rank10", "mAP", "mINP")]
    assert shown == expected


def test_the_queries_are_infrared_where_the_protocol_has_such_a_search(tiny_regdb: Path) -> None:
    subject = choose_subject(RegDB(tiny_regdb), queries=3)
    assert (subject.headline.name, subject.listed.name) == ("visible-to-infrared", "infrared-to-visible")
    assert {sample.modality for sample in subject.query} == {"infrared"}
    assert len({sample.identity for sample in subject.query}) == len(subject.query) == 3


def test_a_page_is_replaced_only_if_asked(page: Path, runs: list[Path], tiny_regdb: Path) -> None:
    before = page.read_bytes()
    with pytest.raises(ResultError, match=r"page\.html: is there already\. .*--overwrite"):
        write_report([str(runs[0])], str(tiny_regdb), str(page), progress=quiet())
    with pytest.raises(ValueError, match=r"got runs=\[\], expected at least one"):
        write_report([], str(tiny_regdb), str(page), progress=quiet())
    assert page.read_bytes() == before


def test_a_network_without_block_has_no_times(tiny_regdb: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = TINY | {"dataset": "regdb", "epochs": 1, "batches": 1, "model": "baseline"}
    config = TrainConfig(data=str(tiny_regdb), out=str(tmp_path / "baseline"), **values)
    train(dataclasses.replace(config))
    out = tmp_path / "page.html"
    write_report([config.out], str(tiny_regdb), str(out), accelerator="cpu", progress=quiet())
    text = out.read_text()
    assert "One network on a tree of RegDB" in text
    assert "plain PyTorch" not in text


def test_unreadable_training_images_are_left_out_of_the_page(tiny_regdb: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(tiny_regdb, tmp_path / "tree")
    visible = RegDB(tree).training().visible
    broken, whole = [image for image in visible if image.identity == visible[0].identity]
    broken.path.write_bytes(b"broken")
    values: dict[str, Any] = TINY | {"dataset": "regdb", "steps": 1, "model": "baseline"}
    train(TrainConfig(data=str(tree), out=str(tmp_path / "run"), skip_unreadable=True, **values))
    out = tmp_path / "page.html"
    options: dict[str, Any] = {"accelerator": "cpu", "progress": quiet()}
    with pytest.raises(DatasetError, match=rf"{broken.path.name}: expected a readable image"):
        write_report([str(tmp_path / "run")], str(tree), str(out), **options)
    write_report([str(tmp_path / "run")], str(tree), str(out), skip_unreadable=True, **options)
    assert out.exists()
    first, *others = choose_subject(RegDB(tree), skip_unreadable=True).strip
    assert (first[0], len(others)) == (whole, 3)


def line(step: int, cqc: float) -> dict[str, float]:
    return {"step": step, "identity": 2.0, "triplet": 1.0, "cqc": cqc, "causality": 0.0, "accuracy": 0.5}


def test_the_losses_show_each_network_in_the_terms_it_is_trained_with() -> None:
    names = ["baseline", "MRCN without CQC", "MRCN"]
    figures = draw_losses({name: [line(1, float(name == "MRCN")), line(2, 0.0)] for name in names})
    shown = {
        term: {curve.get_label(): curve.get_color() for curve in figures[term].axes[0].lines}
        for term in figures
    }
    everyone = {"baseline": "#6b6b6b", "MRCN without CQC": "#e69f00", "MRCN": "#0072b2"}
    assert shown == {
        "identity": everyone,
        "triplet": everyone,
        "cqc": {"MRCN": "#0072b2"},
        "accuracy": everyone,
    }


def test_the_matching_curves_are_drawn_in_percent() -> None:
    figure = draw_cmc({"A": torch.tensor([0.5, 0.75]), "B": torch.tensor([0.25, 1.0])})
    curves = {curve.get_label(): np.asarray(curve.get_xydata()).tolist() for curve in figure.axes[0].lines}
    assert curves == {"A": [[1, 50], [2, 75]], "B": [[1, 25], [2, 100]]}


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page(page: Path, tmp_path: Path, width: int) -> None:
    seen = look(page, tmp_path, width=width, height=1500)
    assert len(seen.images) == 4 * 2 + 4 + 3 + 2 * (1 + 2 * 8)
    assert min(seen.images) > 0
    assert seen.console == []
    assert seen.needed <= seen.shown == width
    with Image.open(seen.screenshot) as image:
        pixels = np.asarray(image.convert("RGB"))[:, :width]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


@NEEDS_CHROMIUM
def test_the_browser_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><html><head><title>x</title></head><body style='margin:0'>"
        "<img src='data:image/png;base64,AAAA'><div style='width:900px'>wide</div>"
        "<script>throw new Error('broken')</script></body></html>"
    )
    seen = look(bad, tmp_path, width=390, height=500)
    assert seen.images == [0]
    assert (seen.shown, seen.needed) == (390, 900)
    assert any("broken" in text for text in seen.console)
