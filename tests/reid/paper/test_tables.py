"""The paper's tables: what is run, what is kept, what is printed and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.progress import Progress

from mrcn_fast import cli
from mrcn_fast.reid.data import write_sysu
from mrcn_fast.reid.documents import DocumentError
from mrcn_fast.reid.evaluation.results import ResultError
from mrcn_fast.reid.evaluation.scoring import score_checkpoint
from mrcn_fast.reid.paper import runs
from mrcn_fast.reid.paper.made_tables import load_made_table, markdown
from mrcn_fast.reid.paper.recipes import load_recipe, load_table
from mrcn_fast.reid.paper.tables import run_table
from mrcn_fast.reid.training.checkpoint import CheckpointError, load_checkpoint
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.trainer import Trainer
from tests.reid.conftest import TINY

OPTIONS: dict[str, Any] = {"trials": 2, "shots": 1, "draw": "random"}

Made = tuple[Path, dict[str, Any]]
MakeAgain = Callable[..., dict[str, Any]]
Watched = tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe that scales every row down to a step."""
    path = tmp_path_factory.mktemp("overlay") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"epochs": 1, "batches": 1}))
    return str(path)


@pytest.fixture(scope="module")
def made(overlay: str, tiny_tree: Path, tiny_regdb: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Table 4 on both trees with both splits of RegDB, and the folder it was made in."""
    out = tmp_path_factory.mktemp("tables")
    return out, run("4", [tiny_regdb, tiny_tree], out, overlay)


@pytest.fixture(scope="module")
def other_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same people and file names as in `tiny_tree`, other pictures."""
    root = tmp_path_factory.mktemp("other") / "sysu"
    return write_sysu(root, identities=7, test_identities=3, images_per_camera=2, image_size=(32, 16), seed=1)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The folders of the runs that are trained, and of those that are scored, as it happens."""
    trained: list[str] = []
    scored: list[str] = []

    class WatchedTrainer(Trainer):
        def fit(self, **arguments: Any) -> Path:
            trained.append(Path(self.config.out).name)
            return super().fit(**arguments)

    def watched_score(checkpoint: Path, *rest: Any, **arguments: Any) -> dict[str, Any]:
        scored.append(checkpoint.parent.name)
        return score_checkpoint(checkpoint, *rest, **arguments)

    monkeypatch.setattr(runs, "Trainer", WatchedTrainer)
    monkeypatch.setattr(runs, "score_checkpoint", watched_score)
    return trained, scored


def run(name: str, data: list[Path], out: Path, overlay: str, **more: Any) -> dict[str, Any]:
    """A table made over one that may be there; its runs and their scores stay."""
    arguments: dict[str, Any] = {"splits": 2, "options": OPTIONS, "progress": Progress(disable=True)}
    arguments |= {"overwrite": True} | more
    return run_table(name, data, out=out, overlay=overlay, **arguments)


@pytest.fixture
def make_again(made: Made, overlay: str, tiny_tree: Path) -> MakeAgain:
    """A function that makes a table in the folder of `made`, by default Table 4 on `tiny_tree`."""

    def make(name: str = "4", data: list[Path] | None = None, **more: Any) -> dict[str, Any]:
        return run(name, data or [tiny_tree], made[0], overlay, **more)

    return make


def test_a_table_trains_and_scores_every_row(made: Made) -> None:
    out, table = made
    folders = {path.parent.name for path in out.glob("*/checkpoint.pth")}
    assert folders == {f"sysu-mm01-{row}" for row in ("baseline", "snr", "mrcn")} | {
        f"regdb-{row}-split-{split}" for row in ("baseline", "snr", "mrcn") for split in (1, 2)
    }
    for folder in folders:
        config = load_checkpoint(out / folder).config
        recipe = load_recipe(folder.partition("-split-")[0])
        assert {name: getattr(config, name) for name in ("dataset", "model")} == {
            name: recipe[name] for name in ("dataset", "model")
        }
        assert (config.depth, config.epochs) == (18, 1)
    assert [row["title"] for row in table["rows"]] == ["baseline", "SNR", "MRCN"]
    for row in table["rows"]:
        runs = row["runs"]["regdb"]
        found = [run["searches"]["visible-to-infrared"]["mean"]["mAP"] for run in runs]
        assert [run["split"] for run in runs] == [1, 2]
        assert row["ours"]["regdb"]["mAP"] == pytest.approx(sum(found) / 2)
        (of_sysu,) = row["runs"]["sysu-mm01"]
        assert row["ours"]["sysu"] == of_sysu["searches"]["all-search"]["mean"]
    assert table["synthetic"]
    assert json.loads((out / "table-4.json").read_text()) == json.loads(json.dumps(table))


def test_it_prints_the_papers_figures_beside_ours(made: Made) -> None:
    _, table = made
    lines = markdown(table).splitlines()
    assert "Table 4" in lines[0]
    mrcn = next(line for line in lines if line.startswith("| MRCN |"))
    ours = table["rows"][2]["ours"]
    assert f"{100 * ours['sysu']['rank1']:.1f} (68.9)" in mrcn
    spread = table["rows"][2]["std"]["regdb"]["mAP"]  # of two splits
    assert f"{100 * ours['regdb']['mAP']:.1f} ± {100 * spread:.1f} (84.6)" in mrcn
    assert any(line.startswith("Synthetic data") for line in lines)
    assert any(line.startswith("9 runs trained and scored in ") for line in lines)


def test_the_distances_of_figure_5_follow(made: Made, tmp_path: Path) -> None:
    _, table = made
    row = table["rows"][2]
    found = [run["searches"]["visible-to-infrared"]["distances"] for run in row["runs"]["regdb"]]
    of_row = row["distances"]["regdb"]
    for name in ("intra", "inter", "delta"):
        assert of_row[name] == pytest.approx(sum(of[name] for of in found) / 2)
    assert of_row["delta"] == pytest.approx(of_row["inter"] - of_row["intra"])
    assert of_row["std"] == pytest.approx(abs(found[0]["delta"] - found[1]["delta"]) / 2**0.5)
    lines = markdown(table).splitlines()
    header = next(k for k, line in enumerate(lines) if line.startswith("| Mean distance (Figure 5) |"))
    assert f"| {of_row['delta']:.3f} ± {of_row['std']:.3f} |" in lines[header + 4]
    table = json.loads(json.dumps(table))
    del table["rows"][2]["distances"]["regdb"]["intra"]
    made_table = tmp_path / "table.json"
    made_table.write_text(json.dumps(table))
    with pytest.raises(DocumentError, match="found other scores in row 3"):
        load_made_table(made_table, "4")


def test_rank1_by_each_pairing_follows(made: Made, tmp_path: Path) -> None:
    _, table = made
    mrcn = table["rows"][2]
    by_pairing = mrcn["pairings"]["sysu"]
    (of_sysu,) = mrcn["runs"]["sysu-mm01"]
    found = of_sysu["searches"]["all-search"]["pairings"]
    assert by_pairing == {name: scores["mean"] for name, scores in found.items()}
    # The baseline has one test feature, which has one pairing.
    assert table["rows"][0]["pairings"]["sysu"] == {}
    table = json.loads(json.dumps(table))
    row = table["rows"][2]
    row["ours"]["sysu"]["rank1"], row["pairings"]["sysu"]["crossed"]["rank1"] = 0.5, 0.75
    lines = markdown(table).splitlines()
    header = next(k for k, line in enumerate(lines) if line.startswith("| Rank-1 by pairing |"))
    assert lines[header + 2].startswith("| MRCN |")
    assert [cell.strip() for cell in lines[header + 2].split("|")[5:7]] == ["50.0", "75.0"]
    assert any(
        line.startswith("MRCN, SYSU-MM01 all-search: modalities exchanged: rank-1 is 50.0") for line in lines
    )
    del row["pairings"]["sysu"]["crossed"]["rank1"]
    made_table = tmp_path / "table.json"
    made_table.write_text(json.dumps(table))
    with pytest.raises(DocumentError, match="found other scores in row 3"):
        load_made_table(made_table, "4")


def test_several_seeds_are_trained_and_their_spread_is_printed(
    overlay: str, tiny_tree: Path, tmp_path: Path
) -> None:
    table = run("4", [tiny_tree], tmp_path, overlay, seeds=2, options=OPTIONS | {"trials": 1})
    trained = {
        path.parent.name: load_checkpoint(path).config.seed for path in tmp_path.glob("*/checkpoint.pth")
    }
    rows = ("sysu-mm01-baseline", "sysu-mm01-snr", "sysu-mm01-mrcn")
    assert trained == dict.fromkeys(rows, 0) | {f"{row}-seed-1": 1 for row in rows}
    for row in table["rows"]:
        first, second = (run["searches"]["all-search"]["mean"]["mAP"] for run in row["runs"]["sysu-mm01"])
        assert row["ours"]["sysu"]["mAP"] == pytest.approx((first + second) / 2)
        assert row["std"]["sysu"]["mAP"] == pytest.approx(abs(first - second) / math.sqrt(2))
    ours, std = (table["rows"][2][part]["sysu"]["mAP"] for part in ("ours", "std"))
    assert f"{100 * ours:.1f} ± {100 * std:.1f} (65.5)" in markdown(table)
    assert "mean ± standard deviation over the runs" in markdown(table)


def test_only_missing_runs_are_trained_and_scored(
    made: Made, make_again: MakeAgain, watched: Watched
) -> None:
    _, table = made
    trained, scored = watched
    again = make_again()
    assert (trained, scored, again["trained"]) == ([], [], 0)
    assert [row["ours"]["sysu"] for row in again["rows"]] == [row["ours"]["sysu"] for row in table["rows"]]
    # Table 2 shares two of its rows; columns without a tree are left out.
    other = make_again("2")
    assert trained == scored == ["sysu-mm01-mrcn-without-cqc", "sysu-mm01-mcm", "sysu-mm01-mrm"]
    assert all(set(row["ours"]) == {"sysu"} for row in other["rows"])
    header, *rows = (line for line in markdown(other).splitlines() if line.startswith("| "))
    assert header == "| Methods | SYSU-MM01 all-search R-1 | SYSU-MM01 all-search mAP |"
    assert any(row.startswith("| MRCN | ") and row.endswith("(65.5) |") for row in rows)
    # Other trials are other scores of the same runs.
    del trained[:], scored[:]
    make_again(options=OPTIONS | {"trials": 1})
    assert (trained, len(scored)) == ([], 3)


def test_an_interrupted_row_goes_on(overlay: str, tiny_regdb: Path, tmp_path: Path) -> None:
    def longer(values: dict[str, Any]) -> TrainConfig:
        return TrainConfig(**(values | {"batches": 2}))

    recipe = load_recipe("regdb-mrcn") | load_recipe(overlay)
    config = longer(recipe | {"data": str(tiny_regdb), "out": str(tmp_path / "regdb-mrcn-split-1")})
    Trainer(dataclasses.replace(config, steps=1)).fit(progress=Progress(disable=True))
    run("4", [tiny_regdb], tmp_path, overlay, splits=1, configure=longer)
    lines = (tmp_path / "regdb-mrcn-split-1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert load_checkpoint(tmp_path / "regdb-mrcn-split-1").step == 2
    # What has gone on for longer is another run.
    with pytest.raises(CheckpointError, match=r"expected a run of 1 steps, found one of 2(.|\n)*--out"):
        run("4", [tiny_regdb], tmp_path, overlay, splits=1, configure=lambda v: longer(v | {"steps": 1}))


def test_scores_are_taken_over_from_a_moved_tree_alone(
    made: Made, make_again: MakeAgain, tiny_tree: Path, other_tree: Path, tmp_path: Path, watched: Watched
) -> None:
    out, _ = made
    trained, scored = watched
    ours = [row["ours"]["sysu"] for row in make_again()["rows"]]
    del scored[:]
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_tree)
    make_again(data=[moved])
    assert (trained, scored) == ([], [])
    # Scores of another tree beside them.
    checkpoint = out / "sysu-mm01-mrcn"
    of_other = score_checkpoint(
        checkpoint, other_tree, other_data=True, mode="both", progress=Progress(disable=True), **OPTIONS
    )
    assert of_other["searches"]["all-search"]["mean"] != ours[2]
    again = make_again()
    assert (trained, scored) == ([], [])
    assert [row["ours"]["sysu"] for row in again["rows"]] == ours


# What a file of scores says otherwise, or has in place of all scores.
OTHER_MEASUREMENTS: list[Any] = [
    {"unreadable": ["cam1/0001/0001.jpg"]},
    {"step": 2},
    {"config": {}},
    {"trained_on": {"fingerprint": "another"}},
    {"precision": "bf16-mixed"},
    {"network": "0" * 64},
    {"searches": {}},
    {"searches": None},
    [],
    None,
]


def test_scores_of_another_measurement_are_not_taken_over(
    made: Made, make_again: MakeAgain, watched: Watched
) -> None:
    out, _ = made
    trained, scored = watched
    folder = out / "sysu-mm01-snr"
    make_again()
    whole = {path: path.read_bytes() for path in folder.glob("test-*.json")}
    for other in OTHER_MEASUREMENTS:
        del scored[:]
        for path, content in whole.items():
            path.write_text(json.dumps(json.loads(content) | other if isinstance(other, dict) else other))
        make_again()
        assert (trained, scored) == ([], ["sysu-mm01-snr"]), other
    for path, content in whole.items():
        path.write_bytes(content)


def test_scores_of_another_backend_are_taken_over(
    made: Made, make_again: MakeAgain, tiny_tree: Path, watched: Watched
) -> None:
    out, _ = made
    trained, scored = watched
    make_again()
    for path in (out / "sysu-mm01-mrcn").glob("test-*.json"):
        path.unlink()
    del scored[:]
    options = OPTIONS | {"mode": "both", "accelerator": "cpu", "progress": Progress(disable=True)}
    score_checkpoint(out / "sysu-mm01-mrcn", tiny_tree, backend="reference", **options)
    # Nor are those of other options in the way.
    score_checkpoint(out / "sysu-mm01-mrcn", tiny_tree, **options | {"trials": 1})
    table = make_again()
    assert (trained, scored) == ([], [])
    assert table["rows"][2]["runs"]["sysu-mm01"][0]["searches"]["all-search"]["trials"] == 2


def test_another_table_is_not_replaced(
    made: Made, make_again: MakeAgain, tiny_tree: Path, tiny_regdb: Path, watched: Watched
) -> None:
    out, _ = made
    both = [tiny_regdb, tiny_tree]
    make_again(data=both)
    record = out / "table-4.json"
    before = record.read_bytes()
    del watched[1][:]
    changes: dict[str, dict[str, Any]] = {
        "trials": {"options": OPTIONS | {"trials": 3}},
        "data sets, values of the runs, images": {"splits": 1},
        "values of the runs": {"configure": lambda v: TrainConfig(**(v | {"steps": 1}))},
    }
    for named, change in changes.items():
        with pytest.raises(ResultError, match=rf"{record}: .* differs from this one in {named}.*--overwrite"):
            make_again(data=both, overwrite=False, **change)
    with pytest.raises(ResultError, match=r"in data sets"):
        make_again(overwrite=False)
    with pytest.raises(ValueError, match="draw"):
        make_again(data=both, options=OPTIONS | {"draw": "any"})
    assert record.read_bytes() == before
    # Where nothing differs it is made again, from the scores that are there.
    assert make_again(data=both, overwrite=False)["rows"] == json.loads(before)["rows"]
    assert watched == ([], [])


def test_a_run_of_other_values_in_the_way_is_refused(make_again: MakeAgain) -> None:
    with pytest.raises(CheckpointError, match=r"under other values(.|\n)*lr: expected 0.02"):
        make_again(configure=lambda values: TrainConfig(**(values | {"lr": 0.5})))


def test_a_run_of_another_tree_in_the_way_is_refused(
    made: Made, make_again: MakeAgain, other_tree: Path
) -> None:
    out, _ = made
    with pytest.raises(CheckpointError, match="belongs to another data set") as error:
        make_again(data=[other_tree])
    assert f"give another folder (--out), or delete {out / 'sysu-mm01-baseline'}" in str(error.value)


def test_a_run_of_other_weights_in_the_way_is_refused(
    made: Made, make_again: MakeAgain, resnet18: Path
) -> None:
    out, _ = made
    with pytest.raises(CheckpointError, match=r"weights: expected random ones .*resnet18\.pth") as error:
        make_again(configure=lambda v: TrainConfig(**v, weights=str(resnet18)))
    assert f"give another folder (--out), or delete {out / 'sysu-mm01-baseline'}" in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("split", 2), ("dataset", "llcm")])
def test_values_that_a_table_sets_are_refused(
    overlay: str, tiny_regdb: Path, tmp_path: Path, name: str, value: Any
) -> None:
    def configure(values: dict[str, Any]) -> TrainConfig:
        return TrainConfig(**(values | {name: value}))

    with pytest.raises(ConfigError, match=rf"got {name}={value}, expected .*Leave --{name} out"):
        run("4", [tiny_regdb], tmp_path, overlay, configure=configure)
    assert not list(tmp_path.iterdir())


def test_unknown_options_are_refused(overlay: str, tiny_tree: Path, tmp_path: Path) -> None:
    for options in ({"mode": "indoor"}, {"shotz": 1}):
        with pytest.raises(ConfigError, match="expected some of trials, shots, draw"):
            run_table("2", [tiny_tree], out=str(tmp_path / "out"), overlay=overlay, options=options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("4", {"model": "baseline"}),
        ("attention", {"gate": "se"}),
        ("3", {"stages": (2,)}),
        # Of these networks the first has no gate and no stage, and the second no CQC loss.
        ("attention", {"model": "baseline"}),
        ("3", {"model": "baseline"}),
        ("figure4", {"model": "snr"}),
    ],
)
def test_values_that_tell_the_rows_apart_are_refused(
    overlay: str, tiny_regdb: Path, tmp_path: Path, table: str, values: dict[str, Any]
) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=rf"got {name}=.*, expected .*: a table sets {name} of each row"):
        run(table, [tiny_regdb], tmp_path, overlay, configure=lambda of: TrainConfig(**(of | values)))
    assert not list(tmp_path.iterdir())


def test_the_curves_are_drawn(overlay: str, tiny_tree: Path, tmp_path: Path) -> None:
    table = run("figure4", [tiny_tree], tmp_path, overlay)
    assert [row["title"] for row in table["rows"]] == ["0", "0.4", "0.8", "1.2", "1.6", "2.0"]
    assert (tmp_path / "table-figure4.png").read_bytes().startswith(b"\x89PNG")


def test_trees_of_other_data_sets_are_refused(
    overlay: str, tiny_tree: Path, tiny_llcm: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"expected the tree of regdb; got {re.escape(str(tiny_tree))}"):
        run("attention", [tiny_tree], tmp_path, overlay)
    with pytest.raises(ConfigError, match="expected the tree of regdb or sysu-mm01"):
        run("2", [tiny_llcm], tmp_path, overlay)
    with pytest.raises(ConfigError, match="got two trees of sysu-mm01"):
        run("2", [tiny_tree, tiny_tree], tmp_path, overlay)
    assert not list(tmp_path.iterdir())


def test_every_run_is_configured_before_the_first_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tables"
    # The stripes fit every image but the scaled-down ones.
    assert cli.main(["table", "1", "--synthetic", "--out", str(out), "--parts", "5"]) == 2
    assert "got parts=5, expected at most 3 at height=48" in capsys.readouterr().err
    assert not out.exists()


def test_only_a_table_that_was_made_is_printed(tmp_path: Path) -> None:
    machine = {"cpu": "a", "threads": 2, "torch": "2", "date": "today"}
    scores = dict.fromkeys(("rank1", "rank10", "rank20", "mAP", "mINP"), 0.5)
    rows: list[Any] = [{"ours": {}} for _ in load_table("4").rows]
    made: dict[str, Any] = {
        "table": "4", "synthetic": False, "trained": 1, "seconds": 2.5, "machine": machine, "rows": rows,
    }  # fmt: skip
    key = next(iter(load_table("4").columns))
    path = tmp_path / "table.json"

    def loaded(**changes: Any) -> dict[str, Any]:
        path.write_text(json.dumps(made | changes))
        return load_made_table(path, "4")

    def first(ours: dict[str, Any]) -> dict[str, Any]:
        return {"rows": [{"ours": ours}, *rows[1:]]}

    assert "50.0" in markdown(loaded(**first({key: scores})))
    assert loaded(draw="official", machine=machine | {"gpu": "b"}) == json.loads(path.read_text())
    for changes, message in (
        ({"table": "2"}, "found table '2'"),
        ({"rows": rows[1:]}, f"of {len(rows)} rows; found {len(rows) - 1}"),
        ({"rows": [{"ours": {"other": scores}}, *rows[1:]]}, "found other scores in row 1"),
        ({"rows": [{"ours": {key: {}}}, *rows[1:]]}, "found other scores in row 1"),
        ({"rows": [{"ours": {key: scores | {"mAP": "high"}}}, *rows[1:]]}, "mAP='high', expected a number"),
        (
            {"rows": [{"ours": {key: scores | {"mAP": math.nan}}}, *rows[1:]]},
            "mAP=nan, expected a finite number",
        ),
        (
            {"rows": [{"ours": {key: scores | {"mAP": 50}}}, *rows[1:]]},
            "mAP=50, expected a number from 0 to 1",
        ),
        ({"rows": 3}, "got table.rows=3, expected a list"),
        ({"machine": {}}, "got no table.machine.cpu, expected text"),
        ({"seconds": "long"}, "got table.seconds='long', expected a number"),
    ):
        with pytest.raises(DocumentError) as error:
            loaded(**changes)
        assert str(path) in str(error.value) and message in str(error.value)


def test_rows_of_other_methods_have_the_papers_figures_alone() -> None:
    empty = {"table": "1", "synthetic": False, "trained": 0, "rows": [{"ours": {}} for _ in range(17)]}
    lines = markdown(empty).splitlines()
    (cmnas,) = (line for line in lines if line.startswith("| CM-NAS |"))
    assert cmnas.startswith("| CM-NAS | 82.8 | 95.1 | 97.7 | 79.3 | 81.7 |")
    (ours,) = (line for line in lines if line.startswith("| MRCN-P |"))
    assert ours.startswith("| MRCN-P | – (95.1) | – (98.8) | – (99.5) | – (89.2) |")
