"""The demo, small: it leaves what it promises, and trains both models alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mrcn_fast.reid.checkpoint import load_checkpoint
from mrcn_fast.reid.demo import DemoConfig, run_demo, train_config


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    """A finished demo of three steps."""
    config = DemoConfig(
        out=str(tmp_path_factory.mktemp("demo") / "runs"),
        identities=14,
        test_identities=4,
        images_per_camera=1,
        height=32,
        width=16,
        steps=3,
        trials=2,
        rounds=1,
        accelerator="cpu",
    )
    run_demo(config)
    return config


def test_everything_goes_under_one_folder(demo: DemoConfig) -> None:
    out = Path(demo.out)
    assert sorted(path.name for path in out.iterdir()) == [
        "baseline",
        "data",
        "losses.png",
        "mrcn",
        "results.json",
    ]
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    for model in ("baseline", "mrcn"):
        names = {path.name for path in (out / model).iterdir()}
        assert names == {"checkpoint.pth", "metrics.jsonl", "test-all-search-single-shot-random-draw.json"}


def test_both_models_are_trained_alike(demo: DemoConfig) -> None:
    baseline, mrcn = (load_checkpoint(Path(demo.out) / model) for model in ("baseline", "mrcn"))
    assert baseline.step == mrcn.step == 3
    assert baseline.data == mrcn.data
    same = dataclasses.replace(mrcn.config, model="baseline", out=baseline.config.out)
    assert same == baseline.config


def test_results_hold_scores_times_and_shares(demo: DemoConfig) -> None:
    results = json.loads((Path(demo.out) / "results.json").read_text())
    assert list(results["scores"]) == ["chance", "baseline", "mrcn"]
    for scores in results["scores"].values():
        assert all(0 < scores[name] <= 1 for name in ("rank1", "rank10", "mAP", "mINP"))
    times = results["milliseconds"]
    assert set(times) == {
        "baseline",
        "mrcn automatic",
        "mrcn reference",
        "block automatic",
        "block reference",
    }
    assert all(value > 0 for value in times.values())
    for name, share in results["block_share"].items():
        assert share == pytest.approx(times[f"block {name}"] / times[f"mrcn {name}"])
    # Four people: a random ranking finds the right one first in a quarter of the queries.
    assert results["scores"]["chance"]["rank1"] == pytest.approx(0.25, abs=0.25)


def test_the_steps_are_those_asked_for(tmp_path: Path) -> None:
    for steps in (1, 7, 120, 125):
        config = train_config(DemoConfig(steps=steps), "mrcn", tmp_path)
        assert config.batches is not None
        assert config.epochs * config.batches >= steps == config.steps


def test_a_second_demo_replaces_the_first(demo: DemoConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run_demo(dataclasses.replace(demo, steps=1, trials=1))
    told = capsys.readouterr().out
    for part in ("Rank-1", "Rank-10", "mAP", "mINP", "ms a step", "two-stream baseline", "MRCN", "chance"):
        assert part in told
    assert load_checkpoint(Path(demo.out) / "mrcn").step == 1
