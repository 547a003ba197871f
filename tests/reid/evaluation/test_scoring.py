"""Scores of a checkpoint: which searches, from which images, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from mrcn_fast import cli
from mrcn_fast.memory import MemoryShortageError
from mrcn_fast.reid.data import SYSUMM01, DatasetError, RegDB, Sample, write_sysu
from mrcn_fast.reid.data.types import Search
from mrcn_fast.reid.devices import open_fabric
from mrcn_fast.reid.evaluation import reranking
from mrcn_fast.reid.evaluation.extraction import extract
from mrcn_fast.reid.evaluation.scoring import Trained, describe, open_trained, score_checkpoint, searches_of
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.restoring import build_model
from mrcn_fast.reid.training.trainer import Trainer

QUIET: dict[str, Any] = {"accelerator": "cpu", "progress": Progress(disable=True)}


@pytest.fixture(scope="module")
def regdb_run(tiny_run: TrainConfig, tiny_regdb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of one step on RegDB's split 2."""
    out = str(tmp_path_factory.mktemp("regdb-run"))
    config = dataclasses.replace(
        tiny_run, data=str(tiny_regdb), dataset="regdb", split=2, stages=(1,), steps=1, out=out
    )
    return Trainer(config).fit(progress=Progress(disable=True))


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run's checkpoint, beside which results may be written."""
    return Path(shutil.copy(finished, tmp_path / "checkpoint.pth"))


def test_a_checkpoint_and_the_tree_suffice_to_score(own: Path, tiny_tree: Path) -> None:
    result = score_checkpoint(own, tiny_tree, trials=3, **QUIET)
    assert json.loads(Path(result["path"]).read_text()) == json.loads(json.dumps(result))
    assert Path(result["path"]).parent == own.parent
    name = r"test-step-6-all-search-single-shot-random-draw-3-trials-[0-9a-f]{8}\.json"
    assert re.fullmatch(name, Path(result["path"]).name)
    assert (result["dataset"], result["split"], result["headline"]) == ("sysu-mm01", 1, "all-search")
    (search,) = result["searches"].values()
    # 3 test people, cameras 3 and 6, two images each; the gallery has cameras 1, 2, 4, 5.
    assert (search["queries"], search["gallery_images"]) == (12, [12, 12, 12])
    assert search["valid_queries"] == [12, 12, 12]
    assert search["mean"]["rank10"] == 1
    for name in ("rank1", "mAP", "mINP"):
        values = [row[name] for row in search["per_trial"]]
        mean = sum(values) / 3
        assert search["mean"][name] == pytest.approx(mean)
        assert search["std"][name] == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    text = describe(result)
    assert "all-search, single-shot, random draw, 3 trials, 12 of 12 queries valid, 12 gallery images" in text


def test_both_modes_share_one_extraction(own: Path, tiny_tree: Path) -> None:
    both = score_checkpoint(own, tiny_tree, mode="both", trials=2, **QUIET)
    assert list(both["searches"]) == ["all-search", "indoor-search"]
    for mode in ("all", "indoor"):
        alone = score_checkpoint(own, tiny_tree, mode=mode, trials=2, **QUIET)["searches"]
        assert alone == {f"{mode}-search": both["searches"][f"{mode}-search"]}


def test_regdb_is_scored_in_both_directions(regdb_run: Path, tiny_regdb: Path) -> None:
    result = score_checkpoint(regdb_run, tiny_regdb, split=2, **QUIET)
    assert (result["dataset"], result["split"]) == ("regdb", 2)
    assert list(result["searches"]) == ["visible-to-infrared", "infrared-to-visible"]
    assert result["headline"] == "visible-to-infrared"
    for search in result["searches"].values():
        assert (search["trials"], search["queries"], search["gallery_images"]) == (1, 8, [8])
        assert search["std"]["mAP"] == 0
    assert "regdb, split 2, infrared-to-visible, 1 trial, 8 of 8 queries valid" in describe(result)


def test_llcm_is_scored_in_both_directions(tiny_config: TrainConfig, tiny_llcm: Path) -> None:
    config = dataclasses.replace(tiny_config, data=str(tiny_llcm), dataset="llcm", steps=1)
    path = Trainer(config).fit(progress=Progress(disable=True))
    result = score_checkpoint(path, tiny_llcm, trials=2, **QUIET)
    # 3 people, an image each in 9 visible and 8 infrared cameras.
    sizes = {name: (s["queries"], s["gallery_images"]) for name, s in result["searches"].items()}
    assert sizes == {"infrared-to-visible": (24, [27, 27]), "visible-to-infrared": (27, [24, 24])}


def test_a_result_says_that_its_scores_are_reranked(own: Path, tiny_tree: Path) -> None:
    plain = score_checkpoint(own, tiny_tree, trials=1, **QUIET)
    reranked = score_checkpoint(own, tiny_tree, trials=1, rerank=True, **QUIET)
    assert (plain["rerank"], reranked["rerank"]) == (False, True)
    assert "re-ranked" in describe(reranked)
    assert plain["path"] != reranked["path"]
    assert plain["searches"] != reranked["searches"]


def test_no_result_replaces_another(own: Path, tiny_tree: Path, tiny_regdb: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_tree, tmp_path / "broken")
    SYSUMM01(broken).query()[0].path.write_bytes(b"not an image")
    other = write_sysu(
        tmp_path / "other", identities=7, test_identities=3, images_per_camera=2, image_size=(32, 16), seed=1
    )
    named = own.with_name("best.pth")
    shutil.copy(own, named)
    earlier = own.with_name("step-4.pth")
    checkpoint = load_checkpoint(own)
    save_checkpoint(earlier, checkpoint._replace(step=4, epoch=1, batch=1, metrics={}))
    kept: dict[str, bytes] = {}

    def scored(path: Path = own, tree: Path = tiny_tree, **options: Any) -> Path:
        written = Path(score_checkpoint(path, tree, **QUIET | {"trials": 2} | options)["path"])
        # Every earlier result is still there, as it was.
        assert written.name not in kept
        assert {name: own.with_name(name).read_bytes() for name in kept} == kept
        kept[written.name] = written.read_bytes()
        return written

    first = scored()
    assert "-1-trial-" in scored(trials=1).name
    assert "reranked" in scored(rerank=True).name
    scored(rerank=True, k1=5)
    scored(rerank=True, k2=2)
    assert "without-unreadable" in scored(skip_unreadable=True).name
    assert "32-true" not in first.name
    # oneDNN's bfloat16 convolutions of maps as small as these give NaN on processors with AMX.
    with torch.backends.mkldnn.flags(enabled=False):
        assert "bf16-mixed" in scored(precision="bf16-mixed").name
    scored(backend="reference")
    scored(mode="indoor")
    scored(shots=10)
    scored(tree=broken, skip_unreadable=True)
    scored(tree=other, other_data=True)
    assert "other-data" in scored(tree=tiny_regdb, other_data=True, trials=None).name
    assert scored(named).name.startswith("test-best-step-6-")
    long = own.with_name(f"{'x' * 200}.pth")
    shutil.copy(own, long)
    assert scored(long).name.startswith(f"test-{'x' * 80}-step-6-")
    assert scored(earlier).name.startswith("test-step-4-step-4-")
    # The same measurement once more is the same file.
    again = score_checkpoint(own, tiny_tree, trials=2, **QUIET)
    assert Path(again["path"]) == first and first.read_bytes() == kept[first.name]


def test_a_cache_gives_the_same_scores(own: Path, tiny_tree: Path, tmp_path: Path) -> None:
    plain = score_checkpoint(own, tiny_tree, trials=2, **QUIET)
    for _ in range(2):
        result = score_checkpoint(own, tiny_tree, trials=2, cache=str(tmp_path / "cache"), **QUIET)
        assert result["searches"] == plain["searches"]
    assert list((tmp_path / "cache").rglob("*.npy"))


def test_scores_do_not_depend_on_the_batch(finished: Path, tiny_tree: Path) -> None:
    checkpoint = load_checkpoint(finished)
    model = build_model(finished, checkpoint)
    samples = SYSUMM01(tiny_tree).query()[:5]
    fabric = open_fabric("cpu", "32-true")
    whole, single = (
        extract(model, samples, "infrared", checkpoint.config, fabric=fabric, batch_size=size)
        for size in (5, 1)
    )
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)
    assert model.training


def test_the_reference_gives_the_same_features(finished: Path, tiny_tree: Path) -> None:
    samples = SYSUMM01(tiny_tree).query()[:5]
    fused, plain = (
        open_trained(finished, tiny_tree, backend=backend, accelerator="cpu").features(samples, "infrared")
        for backend in (None, "reference")
    )
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


# What is refused.


def test_visible_and_infrared_swapped_are_refused(finished: Path, tiny_tree: Path) -> None:
    trained = open_trained(finished, tiny_tree, accelerator="cpu")
    with pytest.raises(ValueError, match="got an image of modality 'infrared', expected 'visible'"):
        trained.features(SYSUMM01(tiny_tree).query(), "visible")


def test_a_query_without_modality_is_refused(
    own: Path, tiny_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = SYSUMM01(tiny_tree).searches(trials=1)[0]
    nothing: Any = None
    unknown = [sample._replace(modality=nothing) for sample in search.query]

    def with_query(query: list[Sample]) -> None:
        searches: list[Search] = [search._replace(query=tuple(query))]
        monkeypatch.setattr(SYSUMM01, "searches", lambda self: searches)

    with_query([*search.query[1:], *unknown[:1]])
    with pytest.raises(ValueError, match=r"got a query of None and infrared .*gallery of visible images"):
        score_checkpoint(own, tiny_tree, **QUIET)
    with_query(list(search.galleries[0]))
    with pytest.raises(ValueError, match="got a query of visible and a gallery of visible"):
        score_checkpoint(own, tiny_tree, **QUIET)
    trained = open_trained(own, tiny_tree, accelerator="cpu")
    with pytest.raises(ValueError, match="got an image of modality None, expected 'infrared'"):
        trained.features(unknown, "infrared")


def test_another_split_is_refused(regdb_run: Path, tiny_regdb: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint of split 1, found one of split 2"):
        score_checkpoint(regdb_run, tiny_regdb, split=1, **QUIET)


def test_another_data_set_is_refused(regdb_run: Path, tiny_tree: Path, tiny_regdb: Path, own: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a tree of regdb, found one of sysu-mm01"):
        score_checkpoint(regdb_run, tiny_tree, **QUIET)
    with pytest.raises(CheckpointError, match="expected a tree of sysu-mm01, found one of regdb"):
        score_checkpoint(own, tiny_regdb, **QUIET)
    # Asked for, it is scored by the protocol of the tree that is there.
    result = score_checkpoint(own, tiny_regdb, other_data=True, **QUIET)
    assert (result["dataset"], result["trained_on"]["name"]) == ("regdb", "sysu-mm01")


def test_options_of_another_protocol_are_refused(regdb_run: Path, tiny_regdb: Path) -> None:
    with pytest.raises(ValueError, match="regdb's protocol has no draw, mode"):
        score_checkpoint(regdb_run, tiny_regdb, mode="all", draw="random", **QUIET)
    with pytest.raises(ValueError, match="has no split, expected mode or shots or draw or trials"):
        searches_of(SYSUMM01.__new__(SYSUMM01), {"split": 1})
    with pytest.raises(ValueError, match="has no mode, expected no option"):
        searches_of(RegDB.__new__(RegDB), {"mode": "all"})


def test_a_folder_that_cant_be_written_to_is_refused_before_scoring(
    finished: Path, tiny_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*arguments: Any, **more: Any) -> None:
        pytest.fail("features were computed first")

    monkeypatch.setattr(Trained, "features", computed)
    # Not even root can write there.
    with finished.open("rb") as file, pytest.raises(OSError, match=r"/dev/fd: .*can't be written to"):
        score_checkpoint(f"/dev/fd/{file.fileno()}", tiny_tree, **QUIET)


@pytest.fixture
def tree(tiny_tree: Path, tmp_path: Path) -> Path:
    """A copy that a test damages. It keeps the sizes of files, by which a checkpoint knows its data set."""
    return Path(shutil.copytree(tiny_tree, tmp_path / "tree"))


def damage(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(("modality", "lost"), [("infrared", 12), ("visible", 12)])
def test_a_modality_without_readable_images_is_refused(
    own: Path, tree: Path, modality: str, lost: int
) -> None:
    search = SYSUMM01(tree).searches(trials=1)[0]
    side = search.query if modality == "infrared" else search.galleries[0]
    for sample in side:
        damage(sample.path)
    with pytest.raises(
        DatasetError,
        match=rf"{side[0].path}: this image can't be read, .*no {modality} image is left. Left out were "
        rf"{lost} of {lost} {modality} images",
    ):
        score_checkpoint(own, tree, trials=1, skip_unreadable=True, **QUIET)
    assert not list(own.parent.glob("test-*.json"))


def test_a_gallery_without_readable_images_is_refused(own: Path, tree: Path) -> None:
    """Only one of several trials has such a gallery."""
    for sample in SYSUMM01(tree).gallery("indoor", trial=1):
        damage(sample.path)
    with pytest.raises(
        DatasetError, match=r"no visible image is left. Left out were \d+ of \d+ visible images"
    ):
        score_checkpoint(own, tree, mode="indoor", trials=2, skip_unreadable=True, **QUIET)


def test_readable_images_without_a_match_are_refused(own: Path, tree: Path) -> None:
    first = SYSUMM01(tree).test_identities[0]
    search = SYSUMM01(tree).searches(trials=1)[0]
    for sample in (*search.query, *search.galleries[0]):
        if (sample.identity == first) == (sample.modality == "visible"):
            damage(sample.path)
    with pytest.raises(DatasetError, match=r"no test identity has images of both modalities. Left out were"):
        score_checkpoint(own, tree, trials=1, skip_unreadable=True, **QUIET)


def test_a_link_to_nowhere_is_an_unreadable_image(own: Path, tmp_path: Path) -> None:
    tree = write_sysu(
        tmp_path / "tree", identities=7, test_identities=3, images_per_camera=2, image_size=(32, 16)
    )
    path = SYSUMM01(tree).query()[0].path
    path.unlink()
    path.symlink_to("nowhere.jpg")
    result = score_checkpoint(own, tree, trials=1, skip_unreadable=True, **QUIET)
    assert result["unreadable"] == [str(path)]


def test_unreadable_images_are_named_or_counted(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = write_sysu(
        tmp_path / "tree", identities=7, test_identities=3, images_per_camera=2, image_size=(32, 16)
    )
    dataset = SYSUMM01(tree)
    search = dataset.searches(trials=1)[0]
    broken = [search.query[0].path, search.galleries[0][1].path]
    for path in broken:
        path.write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=str(broken[0])):
        score_checkpoint(own, tree, trials=1, **QUIET)
    with caplog.at_level(logging.WARNING, logger="mrcn_fast"):
        result = score_checkpoint(own, tree, trials=1, skip_unreadable=True, **QUIET)
    assert sorted(map(str, broken)) == result["unreadable"]
    assert all(str(path) in caplog.text for path in broken)
    scored = result["searches"]["all-search"]
    assert (scored["queries"], scored["gallery_images"]) == (11, [11])
    assert "left out 2 images that can't be read" in describe(result)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_need_not_be_utf8(own: Path, tmp_path: Path) -> None:
    tree = write_sysu(
        tmp_path / os.fsdecode(b"tr\xffee"),
        identities=7,
        test_identities=3,
        images_per_camera=2,
        image_size=(32, 16),
    )
    for sample in SYSUMM01(tree).query():
        sample.path.rename(sample.path.with_name(os.fsdecode(b"\xe4") + sample.path.name))
    result = score_checkpoint(own, tree, trials=1, **QUIET)
    assert json.loads(Path(result["path"]).read_text())["data"] == str(tree)


def test_a_link_in_a_circle_is_an_unreadable_image(own: Path, tree: Path) -> None:
    path = SYSUMM01(tree).query()[0].path
    path.unlink()
    path.symlink_to(path.name)
    result = score_checkpoint(own, tree, trials=1, skip_unreadable=True, **QUIET)
    assert result["unreadable"] == [str(path)]


def test_a_failed_allocation_is_reported(
    own: Path, tiny_tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def huge(*_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(ReIDModel, "extract", huge)
    given = ["--checkpoint", str(own), "--data", str(tiny_tree), "--accelerator=cpu", "--batch-size=9"]
    assert cli.main(["test", *given]) == 2
    (output,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"infrared features in batches of 9, could not allocate {1 << 60} bytes" in output
    assert "--batch-size" in output
    assert list(own.parent.glob("test-*.json")) == []
    monkeypatch.undo()
    monkeypatch.setattr(reranking, "rerank", huge)
    with pytest.raises(MemoryShortageError, match="without --rerank"):
        score_checkpoint(own, tiny_tree, trials=1, rerank=True, **QUIET)
