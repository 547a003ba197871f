"""The study of the CQC loss's readings: what is run, what is kept, what its result says."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from mrcn_fast import cli
from mrcn_fast.reid.documents import DocumentError
from mrcn_fast.reid.evaluation.pairings import PAIRINGS
from mrcn_fast.reid.evaluation.results import HEADLINE, ResultError
from mrcn_fast.reid.paper import study
from mrcn_fast.reid.paper.study import DIRECTION, ROWS, StudyConfig, markdown, run_study, summary
from mrcn_fast.reid.training.config import ConfigError
from mrcn_fast.reid.training.run_folder import held
from mrcn_fast.reid.training.trainer import Trainer

SIZES: dict[str, Any] = {
    "identities": 8, "images": 4, "height": 64, "width": 32, "pretraining_identities": 8,
    "pretraining_steps": 1, "steps": 1, "accelerator": "cpu",
}  # fmt: skip
QUIET = Progress(disable=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyConfig, dict[str, Any]]:
    """A study of two rows with a seed each, and its result."""
    config = StudyConfig(out=str(tmp_path_factory.mktemp("new") / "folder" / "study"), **SIZES)
    return config, run_study(config, rows=["without-cqc", "unit-mean"], seeds=[3], progress=QUIET)


def test_scores_each_row_by_every_pairing(made: tuple[StudyConfig, dict[str, Any]]) -> None:
    config, result = made
    assert list(result["rows"]) == ["without-cqc", "unit-mean"]
    assert result["not run"] == [name for name in ROWS if name not in ("without-cqc", "unit-mean")]
    for row in result["rows"].values():
        for direction in (DIRECTION, "infrared-to-visible"):
            assert list(row["scores"]["3"][direction]) == list(PAIRINGS)
            for pairing in PAIRINGS:
                assert set(row["scores"]["3"][direction][pairing]) == set(HEADLINE)
    gain = result["rows"]["unit-mean"]["gain"]
    ours, without = (
        result["rows"][name]["scores"]["3"][DIRECTION]["paper"]["rank1"]
        for name in ("unit-mean", "without-cqc")
    )
    assert gain == {
        "by_seed": {"3": ours - without}, "mean": ours - without, "standard_error": None, "accepted": False,
    }  # fmt: skip
    assert json.loads((Path(config.out) / "study.json").read_text()) == result


def test_each_row_is_trained_by_its_own_values(made: tuple[StudyConfig, dict[str, Any]]) -> None:
    out = Path(made[0].out)
    trained = {
        name: json.loads((out / name / "seed-3" / "result.json").read_text())["config"]
        for name in ("without-cqc", "unit-mean")
    }
    differing = {key for key, value in trained["unit-mean"].items() if trained["without-cqc"][key] != value}
    # The values of unit-mean are those that TrainConfig has by default.
    assert differing == {"out", "cqc_weight"}
    assert (trained["unit-mean"]["cqc_features"], trained["unit-mean"]["cqc_reduction"]) == ("unit", "mean")
    assert trained["unit-mean"]["weights"] == str(out / "pretraining" / "weights.pth")


def test_a_run_has_the_steps_asked_for(tmp_path: Path) -> None:
    for steps in (1, 79, 2000, 2050, 3000):
        config = study.run_config(
            StudyConfig(steps=steps), "unit-mean", 0, tmp_path, tmp_path / "weights.pth"
        )
        assert config.batches is not None
        assert config.epochs * config.batches >= steps == config.steps


def test_finished_runs_are_not_repeated(
    made: tuple[StudyConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = made

    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("was trained again")

    monkeypatch.setattr(study, "Trainer", nothing)
    monkeypatch.setattr(study, "pretrain", nothing)
    again = run_study(config, rows=["unit-mean"], seeds=[3], progress=QUIET)
    assert again["rows"] == result["rows"]


def test_an_interrupted_run_goes_on(
    made: tuple[StudyConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = []

    class Watched(Trainer):
        def fit(self, **arguments: Any) -> Path:
            resumed.append(arguments["resume"])
            return super().fit(**arguments)

    monkeypatch.setattr(study, "Trainer", Watched)
    config = made[0]
    (Path(config.out) / "unit-mean" / "seed-3" / "result.json").unlink()
    run_study(config, rows=["unit-mean"], seeds=[3], progress=QUIET)
    assert resumed == [True]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    made: tuple[StudyConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config = made[0]
    weights = Path(config.out) / "pretraining" / "weights.pth"
    training = study.run_config(config, "unit-mean", 3, config.tree, weights)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    study._run(dataclasses.replace(training, out=str(tmp_path)), QUIET)
    assert (tmp_path / "result.json").exists()


def test_a_run_of_another_process_is_left_to_it(
    made: tuple[StudyConfig, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    config = made[0]
    with caplog.at_level("INFO"), held(Path(config.out) / "baseline" / "seed-3", "trains"):
        result = run_study(config, rows=["baseline"], seeds=[3], progress=QUIET)
    assert "baseline with seed 3: left to the process that trains it" in caplog.messages
    assert "baseline" not in result["rows"]


def test_other_values_need_another_folder(made: tuple[StudyConfig, dict[str, Any]]) -> None:
    other = dataclasses.replace(made[0], steps=2)
    with pytest.raises(ResultError, match="holds a study that differs from this one in steps"):
        run_study(other, progress=QUIET)


def test_runs_of_unknown_values_are_not_taken_over(
    made: tuple[StudyConfig, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "study"
    shutil.copytree(made[0].out, out)
    (out / "study.json").unlink()
    other = dataclasses.replace(made[0], out=str(out), steps=2)
    with pytest.raises(ResultError, match=r"study\.json: is missing, .* which study .*data belongs to"):
        run_study(other, rows=["without-cqc"], seeds=[3], progress=QUIET)


def test_a_copied_folder_is_no_run_and_a_damaged_result_is_refused(tmp_path: Path) -> None:
    config = StudyConfig(out=str(tmp_path), **SIZES)
    _finish(config, "baseline", 0, 0.5)
    shutil.copytree(tmp_path / "baseline" / "seed-0", tmp_path / "baseline" / "seed-0-old")
    assert list(summary(config)["rows"]["baseline"]["scores"]) == ["0"]
    path = tmp_path / "baseline" / "seed-0" / "result.json"
    for content in ("", "{}"):
        path.write_text(content)
        with pytest.raises(DocumentError, match=re.escape(str(path))):
            summary(config)


def test_sizes_that_file_names_do_not_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got images=10000, expected an integer from 1 to 9999"):
        StudyConfig(out=str(tmp_path), **SIZES | {"images": 10000})


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(ResultError, match=r"study\.json: expected the result of `mrcn-fast study cqc`"):
        run_study(StudyConfig(out=str(tmp_path), **SIZES), progress=QUIET)
    with pytest.raises(ConfigError, match="got rows pooled, expected some of without-cqc, "):
        run_study(StudyConfig(out=str(tmp_path), **SIZES), rows=["pooled"], progress=QUIET)


def _finish(config: StudyConfig, name: str, seed: int, rank1: float) -> None:
    """Write the result of a run that had this rank-1 in every direction and by every pairing."""
    folder = Path(config.out) / name / f"seed-{seed}"
    folder.mkdir(parents=True)
    scores = {
        d: {p: dict.fromkeys(HEADLINE, rank1) for p in PAIRINGS} for d in (DIRECTION, "infrared-to-visible")
    }
    (folder / "result.json").write_text(json.dumps({"scores": scores}))


@pytest.mark.parametrize(
    ("gains", "accepted"),
    [
        ([0.05, 0.06, 0.07], True),
        ([0.05, 0.06], False),  # too few seeds
        ([0.20, 0.21, -0.01], False),  # one is lost
        ([0.01, 0.01, 0.30], False),  # the mean is 0.107, its standard error 0.097
    ],
)
def test_a_gain_is_accepted_by_the_rule(tmp_path: Path, gains: list[float], accepted: bool) -> None:
    config = StudyConfig(out=str(tmp_path), **SIZES)
    for seed, gain in enumerate(gains):
        _finish(config, "without-cqc", seed, 0.5)
        _finish(config, "unit-mean", seed, 0.5 + gain)
    _finish(config, "unit-mean", 9, 0.0)  # has no run without CQC to compare it with
    row = summary(config)["rows"]["unit-mean"]
    mean = sum(gains) / len(gains)
    error = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))
    assert list(row["gain"]["by_seed"].values()) == pytest.approx(gains)
    assert (row["gain"]["mean"], row["gain"]["standard_error"]) == pytest.approx((mean, error))
    assert row["gain"]["accepted"] is accepted
    assert row["over_seeds"][DIRECTION]["crossed"]["mAP"]["mean"] == pytest.approx(
        sum([0.5 + gain for gain in gains]) / (len(gains) + 1)
    )


def test_markdown_has_a_line_per_row_and_names_rows_without_runs(tmp_path: Path) -> None:
    config = StudyConfig(out=str(tmp_path), **SIZES)
    for seed, rank1 in enumerate((0.60, 0.62, 0.64)):
        _finish(config, "without-cqc", seed, rank1)
        _finish(config, "unit-mean", seed, rank1 + 0.1 + 0.01 * seed)
    lines = markdown(summary(config)).splitlines()
    assert lines[2] == "| MRCN without CQC | 0, 1, 2 | 62.0 ± 1.2 | 62.0 ± 1.2 | 62.0 ± 1.2 |  |  |"
    assert lines[3].endswith("| 73.0 ± 1.7 | 11.0 ± 0.6 | yes |")
    assert lines[-1].startswith("Not run: pooled-sum, baseline, ")


def test_the_command_checks_rows_and_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "cqc", "--rows", "unit"]) == 2
    errors = capsys.readouterr().err
    assert "got --rows unit, expected " in errors
    assert "without-cqc" in errors
    assert cli.main(["study", "sgd"]) == 2
    assert "cqc" in capsys.readouterr().err
