"""SYSU-MM01's reader: the tree as published, the random draw of the field, and clear errors."""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from mrcn_fast.reid.data import SYSUMM01, PersonImages
from tests.reid.data.refusals import refused
from tests.reid.data.sysu_tree import COUNTS, names, write_tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "SYSU-MM01")


def test_training_has_train_and_val_identities(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        training = SYSUMM01(root).training()
    assert training.identities == (1, 2)
    assert names(list(training.infrared)) == [
        (1, 3, "0001.jpg"), (1, 3, "0002.jpg"), (1, 6, "0001.jpg"),
        (2, 3, "0001.jpg"), (2, 6, "0001.jpg"), (2, 6, "0002.jpg"),
    ]  # fmt: skip
    assert len(training.visible) == 10
    assert {(s.camera, s.modality) for s in (*training.visible, *training.infrared)} == {
        (1, "visible"), (2, "visible"), (4, "visible"), (5, "visible"), (3, "infrared"), (6, "infrared"),
    }  # fmt: skip
    messages = [record.getMessage() for record in caplog.records]
    assert any("left out 1 training identities without infrared images (3 images): 3" in m for m in messages)
    assert any("left out 1 training identities without visible images (1 images): 4" in m for m in messages)


def test_validation_identities_can_be_held_out(root: Path) -> None:
    dataset = SYSUMM01(root, hold_out_val=True)
    assert dataset.training().identities == (1,)
    assert [(s.identity, s.camera) for s in dataset.query()][:2] == [(6, 3), (6, 3)]
    (search,) = dataset.validation().searches(trials=2)
    assert [(s.identity, s.camera) for s in search.query] == [(2, 3), (2, 6), (2, 6), (4, 6)]
    assert {s.identity for gallery in search.galleries for s in gallery} == {2}
    assert {s.identity for s in dataset.query()} == {6, 7, 12}


def test_query_is_all_infrared_test_images(root: Path) -> None:
    query = SYSUMM01(root).query()
    assert [(s.identity, s.camera) for s in query] == [
        (6, 3), (6, 3), (6, 6), (6, 6), (7, 3), (7, 6), (12, 6), (12, 6), (12, 6),
    ]  # fmt: skip
    assert {s.modality for s in query} == {"infrared"}


@pytest.mark.parametrize("trial", [0, 3])
@pytest.mark.parametrize(("mode", "cameras"), [("all", (1, 2, 4, 5)), ("indoor", (1, 2))])
def test_random_draw_is_the_fields(root: Path, mode: str, cameras: tuple[int, ...], trial: int) -> None:
    state = random.getstate()
    got = SYSUMM01(root).gallery(mode, trial=trial)
    assert random.getstate() == state
    random.seed(trial)
    expected = [
        (identity, camera, random.choice([f"{i + 1:04d}.jpg" for i in range(COUNTS[identity][camera])]))
        for identity in (6, 7, 12)
        for camera in cameras
        if camera in COUNTS[identity]
    ]
    assert names(got) == expected
    assert {s.modality for s in got} == {"visible"}


def test_multi_shot_takes_ten_or_all_there_are(root: Path) -> None:
    gallery = SYSUMM01(root).gallery("all", shots=10, trial=1)
    counts = {
        (identity, camera): min(10, COUNTS[identity][camera])
        for identity in (6, 7, 12)
        for camera in (1, 2, 4, 5)
        if camera in COUNTS[identity]
    }
    found = names(gallery)
    assert len(set(found)) == len(found) == sum(counts.values())
    assert {place: sum((i, c) == place for i, c, _ in found) for place in counts} == counts
    assert SYSUMM01(root).gallery("all", shots=10, trial=1) == gallery
    assert SYSUMM01(root).gallery("all", shots=10, trial=2) != gallery


def test_searches_are_the_query_against_each_trials_gallery(root: Path) -> None:
    data = SYSUMM01(root)
    assert data.split == 1
    (search,) = data.searches()
    assert (search.name, search.protocol, search.settings) == (
        "all-search", "sysu", "single-shot, random draw",
    )  # fmt: skip
    assert search.query == tuple(data.query())
    assert search.galleries == tuple(tuple(data.gallery("all", trial=trial)) for trial in range(10))
    both = data.searches("both", shots=10, trials=2)
    assert [found.name for found in both] == ["all-search", "indoor-search"]
    assert {found.settings for found in both} == {"10-shot, random draw"}
    assert both[1].galleries == tuple(
        tuple(data.gallery("indoor", shots=10, trial=trial)) for trial in range(2)
    )
    assert data.searches("indoor", shots=10, trials=2) == both[1:]


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("gallery", {"mode": "outdoor"}, "unknown mode 'outdoor'; known: all, indoor"),
        ("gallery", {"draw": "first"}, "unknown draw 'first'; known: random, official"),
        ("gallery", {"shots": 0}, "shots must be at least 1"),
        ("gallery", {"shots": 2.5}, r"shots must be an integer; got 2\.5"),
        ("gallery", {"trial": 2.5}, r"trial must be an integer; got 2\.5"),
        ("searches", {"mode": "outdoor"}, "unknown mode 'outdoor'; known: all, indoor, both"),
        ("searches", {"draw": "first"}, "unknown draw 'first'"),
        ("searches", {"trials": 0}, "trials must be at least 1; got 0"),
        ("searches", {"trials": 2.5}, r"trials must be an integer; got 2\.5"),
    ],
)
def test_unfit_options_of_a_gallery_are_refused(
    root: Path, method: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(SYSUMM01(root), method)(**values)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, r"found no such file, but available_id.txt, test_id.txt, train_id.txt"),
        ("", "found 0 lines"),
        ("1,2\n3,4\n", "found 2 lines"),
        ("1,two,3", "found 'two'"),
        ("1,,3", "found ''"),
        ("0,1", "found '0'"),
        ("-1,1", "found '-1'"),
    ],
)
def test_malformed_identities(root: Path, text: str | None, found: str) -> None:
    path = root / "exp" / "val_id.txt"
    path.unlink() if text is None else path.write_text(text)
    with refused(match=rf"val_id.txt: expected one line of comma-separated .*{found}"):
        SYSUMM01(root)


def test_identities_of_training_and_test(root: Path) -> None:
    (root / "exp" / "test_id.txt").write_text("2,6")
    with refused(match=r"found 1 in both: 2"):
        SYSUMM01(root)


def test_empty_cameras(root: Path) -> None:
    shutil.rmtree(root / "cam5" / "0006")
    shutil.rmtree(root / "cam5" / "0007")
    with refused(match=r"cam5: expected images of the test identities .*found none"):
        SYSUMM01(root).gallery()
    shutil.rmtree(root / "cam3")
    (root / "cam3" / "0001").mkdir(parents=True)
    with refused(match=r"cam3: .*found an empty camera: 0001"):
        SYSUMM01(root)


def test_no_identity_in_both_modalities(root: Path) -> None:
    (root / "exp" / "train_id.txt").write_text("3")
    (root / "exp" / "val_id.txt").write_text("4")
    for camera in (2, 3, 5):
        folder = root / f"cam{camera}" / ("0004" if camera == 3 else "0003")
        folder.mkdir()
        (folder / "0001.jpg").touch()
    shutil.move(root / "cam3" / "0004", root / "cam3" / "0005")
    (root / "exp" / "val_id.txt").write_text("4,5")
    with refused(match="no training identity has images of both modalities"):
        SYSUMM01(root).training()


@pytest.mark.parametrize(
    "suffix", [".jpeg", ".JPG", ".png", ".Bmp", ".tif", ".TIFF", ".webp", ".ppm", ".pgm"]
)
def test_images_of_every_format_are_read(root: Path, suffix: str) -> None:
    expected = [place[:2] for place in names(SYSUMM01(root).query())]
    for path in root.glob("cam3/*/0001.jpg"):
        path.rename(path.with_suffix(suffix))
    query = SYSUMM01(root).query()
    assert [place[:2] for place in names(query)] == expected
    assert query[0].path.name == f"0001{suffix}"


def test_entries_that_are_no_images_are_named_and_counted(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "cam1" / "0001" / "Thumbs.db").unlink()
    (root / "cam1" / "0001" / "._0001.jpg").unlink()
    before = SYSUMM01(root)
    training, query = before.training(), before.query()
    caplog.clear()
    for folder in ("cam7/0001", "cam1/0001a", "cam1/0001/folder.jpg", "cam2/@eaDir"):
        (root / folder).mkdir(parents=True)
    for file in ("cam7/0001/0001.jpg", "cam2/0001.jpg", "cam1/0001a/0001.jpg", "cam3/0001/0009.gif"):
        (root / file).touch()
    for file in ("cam3/0001/Thumbs.db", "cam3/0001/._0009.jpg", "cam3/0006/noise"):
        (root / file).touch()
    (root / "cam3" / "0001" / "device.jpg").symlink_to(os.devnull)
    with caplog.at_level(logging.WARNING):
        data = SYSUMM01(root)
        assert data.training() == training
        assert data.query() == query
    warnings = [message for message in caplog.messages if "entries that are neither" in message]
    assert [message.rpartition(": ")[2].split(", ") for message in warnings] == [
        ["cam7", "cam1/0001a", "cam2/0001.jpg", "cam2/@eaDir"],
        ["cam1/0001/folder.jpg", "cam3/0001/._0009.jpg", "cam3/0001/0009.gif", "cam3/0001/Thumbs.db",
         "cam3/0001/device.jpg"],
        ["cam3/0006/noise"],
    ]  # fmt: skip
    assert warnings[1].startswith(f"sysu-mm01 at {root}: left out 5 entries that are neither images (.jpg, ")


def test_links_that_lead_nowhere_are_images_that_cant_be_read(root: Path) -> None:
    folder = root / "cam3" / "0006"
    (folder / "0003.jpg").symlink_to("nowhere.jpg")
    (folder / "0004.jpg").symlink_to("0004.jpg")
    found = [sample for sample in SYSUMM01(root).query() if sample.path.parent == folder]
    assert [sample.path.name for sample in found] == ["0001.jpg", "0002.jpg", "0003.jpg", "0004.jpg"]
    for sample in found[2:]:
        with refused(match=rf"{sample.path.name}: expected a readable image .*; found: "):
            PersonImages([sample], (8, 6))[0]


@pytest.mark.parametrize("twin", ["0001.png", "0001.JPG", "0001.jpeg"])
def test_files_that_differ_in_their_suffix_are_one_picture(root: Path, twin: str) -> None:
    (root / "cam3" / "0006" / twin).touch()
    with refused(match=r"cam3/0006/0001.\w+: expected one image of a name; found 0001"):
        SYSUMM01(root).query()


def test_folders_are_matched_by_their_number(root: Path) -> None:
    expected = names(SYSUMM01(root).query())
    (root / "cam3" / "0006").rename(root / "cam3" / "6")
    assert names(SYSUMM01(root).query()) == expected
    shutil.copytree(root / "cam3" / "6", root / "cam3" / "00006")
    with refused(match="cam3: expected one folder an identity; found 00006 and 6"):
        SYSUMM01(root)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_unknown_identities_are_refused_at_once(root: Path, split: str) -> None:
    path = root / "exp" / f"{split}_id.txt"
    path.write_text(path.read_text().strip() + ",500,501")
    with refused(match=rf"{split}_id.txt: expected identities .*; found 2 of .*: 500, 501\."):
        SYSUMM01(root)


@pytest.mark.parametrize("identity", [4, 12])
def test_identities_without_images_are_refused(root: Path, identity: int) -> None:
    for folder in root.glob(f"cam*/{identity:04d}"):
        for path in folder.iterdir():
            path.rename(path.with_suffix(".gif"))
    data = SYSUMM01(root)
    with refused(match=rf"exp: expected identities .*; found 1 of .*: {identity}\."):
        data.training() if identity == 4 else data.searches()


def test_test_identities_of_one_modality_are_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(root / "cam6" / "0012")
    with caplog.at_level(logging.WARNING):
        SYSUMM01(root).searches("both")
    warnings = [message for message in caplog.messages if "test identities" in message]
    assert warnings == [f"sysu-mm01 at {root}: 1 test identities without infrared images: 12"]


def test_the_log_counts_the_images(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = SYSUMM01(root)
        data.training()
        data.searches(trials=2)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.INFO] == [
        f"sysu-mm01 at {root}: training images: 10 visible and 6 infrared ones of 2 identities",
        f"sysu-mm01 at {root}, all-search: 9 queries of 3 identities, galleries: 2 of 8 images",
    ]


def test_lists_of_other_editors(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "exp" / "test_id.txt"
    path.write_bytes("\ufeff\r\n 12 ,\t7,6,7, 0006\r\n\r\n".encode())
    with caplog.at_level(logging.WARNING):
        assert SYSUMM01(root).test_identities == (6, 7, 12)
    assert f"{path}: 2 identities stand there more than once, and count once: 6, 7" in caplog.messages


@pytest.mark.parametrize(
    "text", ["6 7 12", "6;7", "6,7,", "6,-7", "6,7.0", "6,1e1", "6," + "9" * 5000, "\x00"]
)
def test_lists_of_other_forms(root: Path, text: str) -> None:
    (root / "exp" / "test_id.txt").write_text(text)
    with refused(match=r"test_id.txt: expected one line of comma-separated") as caught:
        SYSUMM01(root)
    assert len(str(caught.value)) < 500
