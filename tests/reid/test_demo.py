"""The demo, small: it leaves what it promises, and trains all contenders alike from one pretraining."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from mrcn_fast.reid.demo import COLUMNS, CONTENDERS, DemoConfig, run_demo, train_config
from mrcn_fast.reid.evaluation.results import ResultError
from mrcn_fast.reid.training.checkpoint import load_checkpoint, weights_fingerprint
from mrcn_fast.reid.training.config import ConfigError
from mrcn_fast.reid.training.run_folder import FolderInUseError, held

ROWS = ["baseline", "mrcn-without-cqc", "mrcn"]


# The names of the tasks whose progress the demo shows.
TASKS: list[str] = []


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    """A finished demo of three steps."""
    config = DemoConfig(
        out=str(tmp_path_factory.mktemp("demo") / "runs"),
        identities=16,
        images=2,
        height=64,
        width=32,
        pretraining_identities=16,
        pretraining_steps=2,
        steps=3,
        rounds=1,
        accelerator="cpu",
    )
    TASKS.clear()  # a process may make this fixture more than once
    add_task = Progress.add_task

    def noted(bars: Progress, description: str, *arguments: Any, **options: Any) -> Any:
        TASKS.append(description)
        return add_task(bars, description, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "add_task", noted)
        run_demo(config)
    return config


def test_no_two_tasks_bear_one_name(demo: DemoConfig) -> None:
    assert {f"steps of {name}" for name in ("pretraining", *ROWS)} < set(TASKS)
    assert len(TASKS) == len(set(TASKS)), TASKS


def test_everything_goes_under_one_folder(demo: DemoConfig) -> None:
    out = Path(demo.out)
    assert {path.name for path in out.iterdir()} == {
        *(".lock", "data", "pretraining", "index.html", "results.json"),
        *ROWS,
    }
    for name in ROWS:
        names = {path.name for path in (out / name).iterdir()} - {".lock", "checkpoint.pth", "metrics.jsonl"}
        (scores,) = names
        assert scores.startswith("test-step-3-visible-to-infrared-infrared-to-visible-1-trial-")


def test_contenders_are_trained_alike(demo: DemoConfig) -> None:
    assert list(CONTENDERS) == ROWS
    runs = [load_checkpoint(Path(demo.out) / name) for name in ROWS]
    assert [(run.config.model, run.config.cqc_weight) for run in runs] == [
        ("baseline", 1.2),
        ("mrcn", 0.0),
        ("mrcn", 1.2),
    ]
    first = runs[0]
    for run in runs:
        assert run.step == 3
        assert run.data == first.data
        # Their own values put back: nothing else differs.
        alike = dataclasses.replace(run.config, model="baseline", cqc_weight=1.2, out=first.config.out)
        assert alike == first.config


def test_contenders_begin_from_one_pretraining(demo: DemoConfig) -> None:
    folder = Path(demo.out) / "pretraining"
    pretraining = load_checkpoint(folder)
    assert pretraining.step == 2
    weights = torch.load(folder / "weights.pth", weights_only=True)
    for name, theirs in (("conv1.weight", "visible.conv1.weight"), ("layer4.1.bn2.bias",) * 2):
        assert torch.equal(weights[name], pretraining.model[f"trunk.{theirs}"])
    for name in ROWS:
        assert load_checkpoint(Path(demo.out) / name).weights == weights_fingerprint(folder / "weights.pth")


def test_the_pretraining_sees_other_people_in_visible_light(demo: DemoConfig) -> None:
    trees = [Path(demo.out) / "data", Path(demo.out) / "pretraining" / "data"]
    ours, theirs = (json.loads((tree / "synthetic.json").read_text()) for tree in trees)
    assert (theirs["modality_gap"], theirs["infrared_colour"]) == (0, 1)
    assert ours["modality_gap"] > 0 and ours["infrared_colour"] < 1
    assert theirs["seed"] != ours["seed"]
    config = load_checkpoint(trees[1].parent).config
    assert (config.model, config.triplet_weight, config.weights) == ("baseline", 0, None)


def test_results_hold_scores_times_and_shares(demo: DemoConfig) -> None:
    results = json.loads((Path(demo.out) / "results.json").read_text())
    assert list(results["scores"]) == ["chance", *ROWS]
    assert list(results["distances"]) == ROWS
    for distances in results["distances"].values():
        # Unit features after a ReLU and a BNNeck: anything from equal to opposite.
        assert set(distances) == {"one person", "two people"}
        assert all(0 < value < 2 for value in distances.values())
    for scores in results["scores"].values():
        # A network of three steps may have no query right at rank 1.
        assert 0 <= scores["rank1"] <= scores["rank10"] <= 1
        assert 0 < scores["mAP"] <= 1 and 0 < scores["mINP"] <= 1
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
    # Eight people: a random ranking finds the right one first in an eighth of the queries.
    assert results["scores"]["chance"]["rank1"] == pytest.approx(1 / 8, abs=0.1)
    assert set(results["pairings"]["mrcn"]) == {"crossed", "all"}
    assert results["pairings"]["baseline"] == {}


def test_the_page_has_the_demos_scores_and_times(demo: DemoConfig) -> None:
    page = (Path(demo.out) / "index.html").read_text()
    results = json.loads((Path(demo.out) / "results.json").read_text())
    # The page computes its scores from features, and results.json has those of `score_checkpoint`.
    for scores in results["scores"].values():
        cells = "".join(
            f'<td data-name="{title}">{100 * scores[name]:.1f}</td>' for name, title in COLUMNS.items()
        )
        assert cells in page
    titles = re.findall(r"<tr><td>([^<]*)</td>", page)
    assert titles == ["chance", "two-stream baseline", "MRCN without CQC", "MRCN"]
    rank1 = [100 * results["scores"][name]["rank1"] for name in ROWS]
    gain = f"With the CQC loss on unit features too: {rank1[2] - rank1[1]:+.1f} points of Rank-1"
    assert gain in page
    assert f"The fused block takes {results['milliseconds']['block automatic']:.2f} ms" in page
    for term in ("identity", "triplet", "cqc", "accuracy"):
        assert f'alt="{term} over the training steps"' in page


def test_the_steps_are_those_asked_for(tmp_path: Path) -> None:
    for steps in (1, 7, 120, 125):
        config = train_config(DemoConfig(steps=steps), "mrcn", tmp_path, tmp_path / "weights.pth")
        assert config.batches is not None
        assert config.epochs * config.batches >= steps == config.steps


def test_a_second_demo_replaces_the_first(demo: DemoConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run_demo(dataclasses.replace(demo, steps=1), overwrite=True)
    output = capsys.readouterr().out
    assert f"{Path(demo.out) / 'index.html'} shows what was trained and found" in output
    for part in ("Rank-1", "Rank-10", "mAP", "mINP", "ms per step", "chance"):
        assert part in output
    for title in ("two-stream baseline", "MRCN without CQC", "MRCN"):
        assert any(line.split("│")[1].strip() == title for line in output.splitlines() if "│" in line)
    assert load_checkpoint(Path(demo.out) / "mrcn").step == 1


def test_another_demo_is_not_replaced(tmp_path: Path, finished: Path) -> None:
    config = DemoConfig(out=str(tmp_path), accelerator="cpu", steps=1)
    record = tmp_path / "results.json"
    values = {name: value for name, value in dataclasses.asdict(config).items() if name != "out"}
    record.write_text(json.dumps({"made_of": values | {"steps": 2, "seed": 3}}))
    before = record.read_bytes()
    with pytest.raises(ResultError, match=rf"{record}: is there already, .* in steps, seed\. .*--overwrite"):
        run_demo(config)
    assert record.read_bytes() == before
    record.unlink()
    # A run of the same folder name that isn't a demo's.
    shutil.copytree(finished.parent, tmp_path / "mrcn")
    with pytest.raises(ResultError, match=rf"{tmp_path / 'mrcn'}: is there already, and no record says"):
        run_demo(config)
    assert (tmp_path / "mrcn" / "checkpoint.pth").read_bytes() == finished.read_bytes()


@pytest.mark.parametrize("values", [{"images": 10000}, {"seed": 2**63 - 1}])
def test_sizes_that_cannot_be_written_are_refused_at_once(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ConfigError, match=f"got {name}={value}, expected"):
        DemoConfig(**values)


def test_two_demos_in_one_folder_are_refused(tmp_path: Path) -> None:
    with held(tmp_path, "runs a demo"), pytest.raises(FolderInUseError, match="another process runs a demo"):
        run_demo(DemoConfig(out=str(tmp_path), accelerator="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
