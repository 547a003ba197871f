"""The README's pictures and the charts are those of the result files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("lightning_fabric", reason="the pictures need the packages of [reid]")
pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")

from PIL import Image

from mrcn_fast.benchmark.forms import FORMS
from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
CHARTS = ROOT / "benchmarks" / "charts"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return load_script("benchmarks/readme_figures.py")


def pixels(path: Path) -> tuple[NDArray[np.uint8], str]:
    """The pixels of a picture, and the version of the software that drew it."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")), image.text["Software"]  # type: ignore[attr-defined]


def assert_drawn_alike(drawn: Path, committed: Path) -> None:
    """Compare the pixels of pictures; those that two versions of matplotlib drew may differ."""
    (new, version), (old, version_then) = pixels(drawn), pixels(committed)
    if version == version_then:
        assert new.shape == old.shape
        assert np.abs(new.astype(int) - old).mean() < 0.5, f"{committed} differs: make readme-figures"


def test_the_readmes_pictures_are_those_of_the_result_files(figures: ModuleType, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    for path in figures.draw_readme(tmp_path):
        committed = CHARTS / path.name
        assert f"benchmarks/charts/{path.name}" in readme
        with Image.open(committed) as old, Image.open(path) as new:
            assert old.text["Description"] == new.text["Description"]  # type: ignore[attr-defined]
            assert old.width <= 1200 and old.height <= 800
        assert_drawn_alike(path, committed)


def test_the_speeds_are_the_readmes(figures: ModuleType) -> None:
    """The chart shows what the table of the README has, the fused form first."""
    with Image.open(CHARTS / "readme-speed.png") as image:
        shown = json.loads(image.text["Description"])  # type: ignore[attr-defined]
    assert shown == figures.measured_speeds()
    assert len(shown) == 2
    table = (ROOT / "docs" / "performance.md").read_text()
    for times, case in zip(shown.values(), (machine.case for machine in figures.MACHINES), strict=True):
        assert list(times) == ["fused", "compile collapsed", "compile", "eager"]
        row = next(row for row in table.splitlines() if row.startswith(f"| {case} |"))
        ratios = [float(ratio) for ratio in re.findall(r"([\d.]+) ×", row)]
        expected = [times[form] / times["fused"] for form in ("eager", "compile", "compile collapsed")]
        assert [ratios[0], *ratios[2:4]] == pytest.approx(expected, abs=0.06)


def test_the_ranking_lists_are_of_the_synthetic_people(figures: ModuleType) -> None:
    ranking = json.loads(figures.RANKING.read_text())
    assert ranking["search"] == "infrared-to-visible"
    for of in ranking["lists"]:
        kind, person, _ = of["query"].split("/")
        assert kind == "Thermal"
        assert len(set(of["found"])) == len(of["found"]) == ranking["people"]["images"]
        for found, correct in zip(of["found"], of["correct"], strict=True):
            assert found.split("/")[0] == "Visible"
            assert (found.split("/")[1] == person) == correct


@pytest.mark.slow
def test_the_charts_are_those_of_the_result_files(figures: ModuleType, tmp_path: Path) -> None:
    drawn = figures.draw_measured(tmp_path)
    readme = {f"readme-{name}.png" for name in ("ranking", "block", "speed")}
    assert {path.name for path in CHARTS.iterdir()} == readme | {path.name for path in drawn}
    for path in drawn:
        assert_drawn_alike(path, CHARTS / path.name)


def test_each_form_has_a_colour_of_its_own() -> None:
    assert len({form.color for form in FORMS.values()}) == len(FORMS)
    assert next(iter(FORMS)) == "fused"
