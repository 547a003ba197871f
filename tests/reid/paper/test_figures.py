"""Figures: what is chosen for them, and that they come from checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.progress import Progress

from mrcn_fast.reid.data import LLCM, SYSUMM01, DatasetError, RegDB, Sample, write_regdb, write_sysu
from mrcn_fast.reid.data.types import Modality, Search
from mrcn_fast.reid.evaluation.results import ResultError
from mrcn_fast.reid.evaluation.trained import open_trained
from mrcn_fast.reid.paper import figures
from mrcn_fast.reid.paper.figures import all_test_images, choose_people, choose_queries, make_figures
from mrcn_fast.reid.training.checkpoint import CheckpointError
from mrcn_fast.reid.training.config import TrainConfig
from tests.reid.conftest import quiet, train

# --- what is chosen -----------------------------------------------------------------------------------------


def test_all_test_images_of_each_data_set(tiny_tree: Path, tiny_regdb: Path, tiny_llcm: Path) -> None:
    for dataset, visible, infrared in (
        (SYSUMM01(tiny_tree), 3 * 4 * 2, 3 * 2 * 2),
        (RegDB(tiny_regdb), 4 * 2, 4 * 2),
        (LLCM(tiny_llcm), 3 * 9, 3 * 8),
    ):
        found = all_test_images(dataset)
        assert {m: len(samples) for m, samples in found.items()} == {"visible": visible, "infrared": infrared}
        for modality, samples in found.items():
            assert {s.modality for s in samples} == {modality} and len(set(samples)) == len(samples)


def test_people_are_drawn_by_the_seed(caplog: pytest.LogCaptureFixture) -> None:
    def side(modality: Modality, first: int) -> list[Sample]:
        return [Sample(Path(f"{modality}/{i}"), i, 1, modality) for i in range(first, first + 30)]

    images: dict[Modality, list[Sample]] = {"visible": side("visible", 0), "infrared": side("infrared", 5)}
    chosen = choose_people(images, 20, seed=0)
    assert len(chosen) == 20 and chosen <= set(range(5, 30))
    assert chosen == choose_people(images, 20, seed=0) != choose_people(images, 20, seed=1)
    assert not caplog.records
    assert choose_people(images, 26, seed=0) == set(range(5, 30))
    assert "shows all 25 test people; 26 were asked for" in caplog.text


@pytest.fixture
def search() -> Search:
    """Five people, three queries each; camera 3 skips the only image of person 4, and there is none of 5."""
    query = [Sample(Path(f"root/cam3/{i}/{k}.jpg"), i, 3, "infrared") for i in range(1, 6) for k in range(3)]
    gallery = [Sample(Path(f"root/cam1/{i}/0.jpg"), i, 1, "visible") for i in range(1, 4)]
    gallery.append(Sample(Path("root/cam2/4/0.jpg"), 4, 2, "visible"))
    return Search("all-search", "sysu", "", tuple(query), (tuple(gallery),))


def test_queries_are_drawn_by_the_seed(search: Search) -> None:
    chosen = choose_queries(search, 3, None, seed=0)
    assert sorted(search.query[row].identity for row in chosen) == [1, 2, 3]
    assert chosen == choose_queries(search, 3, None, seed=0)
    assert any(chosen != choose_queries(search, 3, None, seed=seed) for seed in range(1, 5))
    assert choose_queries(search, 2, None, seed=0) == chosen[:2]
    assert len(choose_queries(search, 9, None, seed=0)) == 3
    with pytest.raises(ValueError, match="no query has a match"):
        choose_queries(search._replace(query=search.query[9:]), 3, None, seed=0)


def test_queries_by_their_paths(search: Search) -> None:
    assert choose_queries(search, 9, ["cam3/2/1.jpg", "5/0.jpg"], seed=0) == [4, 12]
    for path, found in (("1.jpg", 5), ("cam3/2/9.jpg", 0), ("m3/2/1.jpg", 0)):
        with pytest.raises(
            ValueError, match=f"{path}: expected a path, or its end, .* found {found} queries"
        ):
            choose_queries(search, 1, [path], seed=0)
    with pytest.raises(ValueError, match="got no paths of queries, expected at least one"):
        choose_queries(search, 1, [], seed=0)


# --- from checkpoints ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(
    finished: Path, tiny_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The figures of a finished run and of its network before training, and the function's result."""
    out = tmp_path_factory.mktemp("figures")
    result = make_figures(
        [str(finished)],
        str(tiny_tree),
        str(out),
        people=3,
        queries=2,
        initial=True,
        accelerator="cpu",
        progress=Progress(disable=True),
    )
    return out, result


def test_figures_of_a_checkpoint(made: tuple[Path, dict[str, Any]], finished: Path) -> None:
    out, result = made
    names = ["distances.png", "tsne.png", "ranking.png", "figures.json"]
    assert result["files"] == [str(out / name) for name in names]
    for name in names[:3]:
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 300
            assert len(set(image.convert("L").getextrema())) == 2
    written = json.loads((out / "figures.json").read_text())
    assert written == json.loads(json.dumps({key: result[key] for key in result if key != "files"}))
    assert list(written["columns"]) == ["initial", "MRCN"]
    initial, trained = written["columns"].values()
    assert (initial["step"], trained["step"]) == (0, 6)
    assert initial["checkpoint"] == trained["checkpoint"] == str(finished)
    assert initial["delta"] != trained["delta"]
    # 3 people, 8 visible and 4 infrared images each.
    assert trained["pairs"] == {"intra": 3 * 8 * 4, "inter": 6 * 8 * 4}
    assert trained["delta"] == pytest.approx(trained["inter_mean"] - trained["intra_mean"])
    assert len(written["tsne_images"]) == len(trained["tsne"]) == 3 * (8 + 4)
    assert (written["search"]["name"], written["search"]["gallery"]) == ("all-search", 24)


def test_distances_of_no_pairs_are_null(tiny_config: TrainConfig, tmp_path: Path) -> None:
    # With one person in the test, no pair is of two people.
    tree = write_sysu(
        tmp_path / "tree", identities=5, test_identities=1, images_per_camera=2, image_size=(32, 16)
    )
    run = train(dataclasses.replace(tiny_config, data=str(tree), out=str(tmp_path / "run"), steps=1))
    make_figures([str(run.out)], str(tree), str(tmp_path / "f"), accelerator="cpu", progress=quiet())

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads((tmp_path / "f" / "figures.json").read_text(), parse_constant=refuse)
    for column in written["columns"].values():
        assert column["inter_mean"] is None and column["delta"] is None
        assert column["intra_mean"] > 0


def test_the_lists_in_the_numbers_follow_the_protocol(made: tuple[Path, dict[str, Any]]) -> None:
    _, result = made
    for column in result["columns"].values():
        for query, found in zip(result["queries"], column["ranking"], strict=True):
            person = int(Path(query).parent.name)
            assert len(found) == figures.LISTED
            assert all(image["correct"] == (image["identity"] == person) for image in found)
            if "cam3" in Path(query).parts:
                assert not any("cam2" in Path(image["path"]).parts for image in found)


def test_the_network_before_training_is_the_one_that_training_began_with(
    finished: Path, tiny_tree: Path
) -> None:
    from mrcn_fast.reid.training.trainer import Trainer

    trained = open_trained(finished, tiny_tree, accelerator="cpu")
    began = Trainer(trained.config).model.state_dict()
    figures._forget_training(trained)
    now = trained.model.state_dict()
    assert began.keys() == now.keys()
    assert all(torch.equal(began[name], now[name]) for name in began)


def test_a_changed_file_of_initial_weights_is_refused(
    tiny_config: TrainConfig, resnet18: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "resnet18.pth"
    shutil.copy(resnet18, weights)
    run = train(dataclasses.replace(tiny_config, weights=str(weights), steps=1))
    trained = open_trained(run.checkpoint_path, tiny_config.data, accelerator="cpu")
    figures._forget_training(trained)
    state = torch.load(weights)
    torch.save(state | {"conv1.weight": 2 * state["conv1.weight"]}, weights)
    with pytest.raises(CheckpointError, match=r"has changed: weights: expected .*, found .*\(given"):
        figures._forget_training(trained)


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"checkpoints": []}, r"got checkpoints=\[\], expected at least one"),
        ({"people": 0}, "got people=0, expected an integer from 1"),
        ({"queries": 0}, "got queries=0, expected an integer from 1"),
    )
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            make_figures(**({"checkpoints": ["x"], "data": "x", "out": str(tmp_path)} | change))


def test_a_map_of_too_few_images_is_refused_before_features_are_extracted(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_regdb(tmp_path / "regdb", identities=8, images=1, splits=1, image_size=(32, 16))
    run = train(dataclasses.replace(tiny_config, dataset="regdb", data=str(data), steps=1))
    monkeypatch.setattr(figures, "_columns", None)
    with pytest.raises(ValueError, match="a t-SNE map needs at least 3 images; got 2"):
        make_figures([str(run.checkpoint_path)], str(data), str(tmp_path / "out"), people=1)


def test_checkpoints_of_several_splits_are_refused(
    tiny_config: TrainConfig, tiny_regdb: Path, tmp_path: Path
) -> None:
    """A network would be shown on the people that it was trained on."""
    config = dataclasses.replace(tiny_config, dataset="regdb", data=str(tiny_regdb), steps=1)
    runs = [dataclasses.replace(config, split=split, out=str(tmp_path / f"{split}")) for split in (1, 2)]
    checkpoints = [str(train(run).checkpoint_path) for run in runs]
    with pytest.raises(CheckpointError, match=r"of one split, .*; found .* of split 1, .* of split 2"):
        make_figures(checkpoints, config.data, str(tmp_path), accelerator="cpu", progress=quiet())


def test_unreadable_images_are_left_out_where_asked_for(
    finished: Path, tiny_tree: Path, tmp_path: Path
) -> None:
    tree = Path(shutil.copytree(tiny_tree, tmp_path / "tree"))
    data = SYSUMM01(tree)
    query, gallery = data.query(), data.gallery("all", shots=10)
    broken = [query[0].path, gallery[3].path]
    for path in broken:
        path.write_bytes(bytes(path.stat().st_size))
    settings: dict[str, Any] = {
        "people": 3, "queries": 3, "accelerator": "cpu", "progress": Progress(disable=True),
    }  # fmt: skip
    with pytest.raises(DatasetError, match=r"expected a readable image"):
        make_figures([str(finished)], str(tree), str(tmp_path / "out"), **settings)
    settings["skip_unreadable"] = True
    result = make_figures([str(finished)], str(tree), str(tmp_path / "out"), **settings)
    assert result["unreadable"] == sorted(map(str, broken))
    assert result["test_images"] == {"visible": 23, "infrared": 11}
    assert result["search"]["gallery"] == 23
    assert not {str(path) for path in broken} & {*result["tsne_images"], *result["queries"]}
    for sample in query:
        sample.path.write_bytes(bytes(sample.path.stat().st_size))
    with pytest.raises(DatasetError, match=r"no infrared image is left. Left out were .* 12 of 12 infrared"):
        make_figures([str(finished)], str(tree), str(tmp_path / "out"), **settings)


def test_other_figures_are_not_replaced(
    made: tuple[Path, dict[str, Any]], finished: Path, tiny_tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "figures"
    shutil.copytree(made[0], out)
    before = {path: path.read_bytes() for path in out.iterdir()}

    def make(**changes: Any) -> None:
        values: dict[str, Any] = {"people": 3, "queries": 2, "initial": True, "accelerator": "cpu"}
        values |= {"progress": Progress(disable=True)} | changes
        make_figures([str(finished)], str(tiny_tree), str(out), **values)

    for change, named in (
        ({"seed": 1}, "seed"),
        ({"people": 2}, "people"),
        ({"initial": False}, "networks"),
        ({"precision": "bf16-mixed"}, "precision"),
        ({"backend": "reference"}, "backend"),
        ({"skip_unreadable": True}, "skip_unreadable"),
    ):
        with pytest.raises(ResultError, match=rf"figures\.json: is there already, .*{named}.*--overwrite"):
            make(**change)
    (out / "figures.json").unlink()
    with pytest.raises(ResultError, match=r"distances\.png: is there already, and no record says"):
        make()
    assert {path: path.read_bytes() for path in out.iterdir()} == {
        path: content for path, content in before.items() if path.name != "figures.json"
    }
    make(overwrite=True)
    make()
    assert {path: path.read_bytes() for path in out.iterdir()} == before
