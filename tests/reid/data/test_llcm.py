"""LLCM's reader: lists and folders as published, the field's draw in both directions, clear errors."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import pytest

from mrcn_fast.reid.data import LLCM
from tests.reid.data.refusals import refused

CAMERAS = {"vis": (1, 2, 3, 4, 5, 6, 7, 8, 9), "nir": (1, 2, 4, 5, 6, 7, 8, 9)}
# The test people; images of each by camera, in either modality: one more than the remainder by 3 or 4.
TEST = (12, 3, 705)
TRAINING = ((1, 0), (2, 1), (44, 2))


def count(kind: str, identity: int, camera: int) -> int:
    """Images of a person: none where camera 5 hasn't seen person 12."""
    return 0 if (identity, camera) == (12, 5) else 1 + (identity + camera) % (3 if kind == "vis" else 4)


def names(kind: str, identity: int, camera: int) -> list[str]:
    return [
        f"{identity:04d}_c{camera:02d}_s{100 + i}_f7_{kind}.jpg" for i in range(count(kind, identity, camera))
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "LLCM"
    (root / "idx").mkdir(parents=True)
    (root / "idx" / "test_id.txt").write_text(",".join(map(str, TEST)) + "\n")
    for kind, cameras in CAMERAS.items():
        lines = []
        for person, label in TRAINING:
            folder = root / kind / f"{person:04d}"
            folder.mkdir(parents=True)
            for camera in (1, 6):
                name = f"{person:04d}_c0{camera}_s1_f7_{kind}.jpg"
                (folder / name).touch()
                lines.append(f"{kind}/{folder.name}/{name} {label}\n")
        (root / "idx" / f"train_{kind}.txt").write_text("".join(lines))
        for camera in cameras:
            for identity in (*TEST, 999):
                folder = root / f"test_{kind}" / f"cam{camera}" / f"{identity:04d}"
                folder.mkdir(parents=True)
                for name in names(kind, identity, camera):
                    (folder / name).touch()
    # Nobody's, so not read: what archivers leave, and folders that aren't people.
    (root / "test_vis" / "cam1" / "0003" / "Thumbs.db").touch()
    (root / "test_vis" / "cam1" / "@eaDir").mkdir()
    return root


def test_training_is_the_lists(root: Path) -> None:
    data = LLCM(root)
    assert (data.name, data.split, data.root) == ("llcm", 1, root)
    training = data.training()
    assert training.identities == (0, 1, 2)
    assert (len(training.visible), len(training.infrared)) == (6, 6)
    assert [(s.path.name, s.identity, s.camera, s.modality) for s in training.infrared[2:4]] == [
        ("0002_c01_s1_f7_nir.jpg", 1, 1, "infrared"),
        ("0002_c06_s1_f7_nir.jpg", 1, 6, "infrared"),
    ]


@pytest.mark.parametrize(
    ("place", "camera"),
    [
        ("vis/0001/0001_c05_s1_f7_vis.jpg", 5),
        ("vis/cam9/0001/picture.jpg", 9),
        ("vis/0001/0001_cab12_vis.jpg", 0),
        ("vis/0001/4.jpg", 0),
        ("vis/0001/0001_c00_vis.jpg", 0),
    ],
)
def test_training_cameras_are_named_or_unknown(root: Path, place: str, camera: int) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).touch()
    (root / "idx" / "train_vis.txt").write_text(f"{place} 0\n")
    assert [s.camera for s in LLCM(root).training().visible] == [camera]


def test_queries_are_all_images_of_a_modality(root: Path) -> None:
    headline, other = LLCM(root).searches(trials=1)
    assert [headline.name, other.name] == ["infrared-to-visible", "visible-to-infrared"]
    for search, kind, modality in ((headline, "nir", "infrared"), (other, "vis", "visible")):
        assert search.protocol == "llcm"
        assert search.settings == "single-shot, random draw"
        assert {s.modality for s in search.query} == {modality}
        assert [(s.identity, s.camera, s.path.name) for s in search.query] == [
            (identity, camera, name)
            for identity in (3, 12, 705)
            for camera in CAMERAS[kind]
            for name in names(kind, identity, camera)
        ]


@pytest.mark.parametrize(("direction", "kind", "modality"), [(0, "vis", "visible"), (1, "nir", "infrared")])
def test_galleries_are_the_fields_draw(root: Path, direction: int, kind: str, modality: str) -> None:
    state = random.getstate()
    search = LLCM(root).searches()[direction]
    assert random.getstate() == state
    assert len(search.galleries) == 10
    for trial, gallery in enumerate(search.galleries):
        random.seed(trial)
        expected = [
            (identity, camera, random.choice(names(kind, identity, camera)))
            for identity in (3, 12, 705)
            for camera in CAMERAS[kind]
            if names(kind, identity, camera)
        ]
        assert [(s.identity, s.camera, s.path.name) for s in gallery] == expected
        assert {s.modality for s in gallery} == {modality}
    random.setstate(state)
    assert LLCM(root).searches(trials=3)[direction].galleries == search.galleries[:3]
    with pytest.raises(ValueError, match="trials must be at least 1; got 0"):
        LLCM(root).searches(trials=0)


def test_folders_are_matched_by_their_number(root: Path) -> None:
    expected = [len(search.query) for search in LLCM(root).searches(trials=1)]
    camera = root / "test_vis" / "cam2"
    (camera / "0003").rename(camera / "00003")
    (camera / "0012").rename(camera / "12")
    searches = LLCM(root).searches(trials=1)
    assert [len(search.query) for search in searches] == expected
    shutil.copytree(camera / "12", camera / "0012")
    with refused(match="cam2: expected one folder an identity; found 0012 and 12"):
        LLCM(root).searches()


def test_unseen_identities_are_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in (root / "test_nir").glob("cam*/0705"):
        shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING):
        search = LLCM(root).searches(trials=1)[0]
    assert {s.identity for s in search.query} == {3, 12}
    assert "1 test identities without infrared images: 705" in caplog.text


def test_missing_or_malformed_lists(root: Path) -> None:
    (root / "idx" / "test_id.txt").write_text("3,x\n")
    with refused(match=r"test_id.txt: expected one line of comma-separated .*found 'x'"):
        LLCM(root)
    (root / "idx" / "test_id.txt").write_text("3\n")
    (root / "idx" / "train_nir.txt").write_text("nir/0001/a.jpg\n")
    with refused(match=r"train_nir.txt, line 1: expected lines such as 'vis/0001"):
        LLCM(root)
    (root / "idx" / "train_nir.txt").write_text("nir/0001/a.jpg 0\n")
    with refused(match=r"0001.a.jpg: expected this image, .*1 of the list's images"):
        LLCM(root)
    (root / "idx" / "train_nir.txt").unlink()
    with refused(match=r"train_nir.txt: .*found no such file, but test_id.txt, train_vis"):
        LLCM(root)


def test_swapped_modalities_and_test_images_are_refused(root: Path) -> None:
    visible, infrared = root / "idx" / "train_vis.txt", root / "idx" / "train_nir.txt"
    texts = visible.read_text(), infrared.read_text()
    visible.write_text(texts[1])
    with refused(match=r"train_vis.txt, line 1: expected no image of nir"):
        LLCM(root)
    visible.write_text(texts[0])
    infrared.write_text(texts[0])
    with refused(match=r"train_nir.txt, line 1: expected no image of vis"):
        LLCM(root)
    infrared.write_text(texts[1] + f"test_nir/cam1/0003/{names('nir', 3, 1)[0]} 3\n")
    with refused(match=r"train_nir.txt, line 7: expected no image of test_nir"):
        LLCM(root)


def test_a_camera_without_test_images_is_refused(root: Path) -> None:
    for identity in TEST:
        shutil.rmtree(root / "test_nir" / "cam4" / f"{identity:04d}")
    with refused(match=r"cam4: expected images of the identities that idx/test_id"):
        LLCM(root).searches()


def test_a_label_is_one_person(root: Path) -> None:
    """The infrared list's labels are one off: each row of a batch would be two people."""
    path = root / "idx" / "train_nir.txt"
    lines = [line.rsplit(" ", 1) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{place} {(int(label) + 1) % 3}\n" for place, label in lines))
    with refused(
        match=r"train_nir.txt, line 1: expected one person for a label, .*; found label 1 for folder "
        r"nir/0001, but label 1 for folder vis/0002 in .*train_vis.txt, line 3"
    ):
        LLCM(root)


def test_people_of_training_and_test_are_apart(root: Path) -> None:
    (root / "idx" / "test_id.txt").write_text("12,3,2,705,44")
    with refused(match=r"test_id.txt: expected test people apart .*; found 2 in both: 2, 44"):
        LLCM(root)


def test_unknown_identities_are_refused_at_once(root: Path) -> None:
    path = root / "idx" / "test_id.txt"
    path.write_text(path.read_text().strip() + ",500")
    with refused(match=r"test_id.txt: expected identities .*; found 1 of 4 .*: 500\."):
        LLCM(root)
    # A folder alone is not enough.
    (root / "test_nir" / "cam1" / "0500").mkdir()
    with refused(match=r"test_id.txt: expected identities .*; found 1 of 4 .*: 500\."):
        LLCM(root).searches()


def test_images_of_every_format_are_read_and_others_named(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [[s.path.stem for s in search.query] for search in LLCM(root).searches(trials=1)]
    for suffix, folder in ((".PNG", "test_vis/cam3/0003"), (".jpeg", "test_nir/cam2/0012")):
        for path in (root / folder).iterdir():
            path.rename(path.with_suffix(suffix))
    (root / "test_vis" / "cam1" / "0003" / "Thumbs.db").unlink()
    (root / "test_vis" / "cam1" / "@eaDir").rmdir()
    for folder in ("test_nir/cam3/0003", "test_vis/cam10", "test_vis/cam1/0003b"):
        (root / folder).mkdir(parents=True)
    (root / "test_vis" / "cam1" / "0003" / "notes.txt").touch()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        data = LLCM(root)
        searches = data.searches(trials=1)
    assert [[s.path.stem for s in search.query] for search in searches] == expected
    assert [message.rpartition(": ")[2] for message in caplog.messages] == [
        "test_vis/cam10, test_vis/cam1/0003b, test_nir/cam3",
        "test_vis/cam1/0003/notes.txt",
    ]


def test_files_that_differ_in_their_suffix_are_one_picture(root: Path) -> None:
    folder = root / "test_nir" / "cam1" / "0003"
    name = names("nir", 3, 1)[0]
    (folder / name.replace(".jpg", ".bmp")).touch()
    with refused(match=r"cam1/0003/\S+: expected one image of a name; found"):
        LLCM(root).searches()


def test_the_log_counts_the_images(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = LLCM(root)
        data.training()
        sizes = [(len(search.query), len(search.galleries[0])) for search in data.searches(trials=3)]
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.INFO] == [
        f"llcm at {root}: training images: 6 visible and 6 infrared ones of 3 identities",
        f"llcm at {root}, infrared-to-visible: {sizes[0][0]} queries of 3 identities, galleries: 3 of "
        f"{sizes[0][1]} images",
        f"llcm at {root}, visible-to-infrared: {sizes[1][0]} queries of 3 identities, galleries: 3 of "
        f"{sizes[1][1]} images",
    ]
