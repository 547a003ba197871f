"""RegDB's reader: the lists as published, both directions, and clear errors for a tree that isn't whole."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import pytest

from mrcn_fast.reid.data import RegDB
from tests.reid.data.refusals import refused

# The people of each list, by their number in the tree; label 0 is the first.
PEOPLE = {"train": (285, 7, 30), "test": (4, 112)}
FOLDERS = {"visible": "Visible", "thermal": "Thermal"}


def line(kind: str, person: int, image: int, label: int) -> str:
    return f"{FOLDERS[kind]}/{person}/male back_{kind[0]}_{image:05d}_{person}.bmp {label}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images of each person and modality, with a space in their names; splits 1 and 3."""
    root = tmp_path / "RegDB"
    (root / "idx").mkdir(parents=True)
    for part, people in PEOPLE.items():
        for kind in FOLDERS:
            lines = [line(kind, p, i, label) for label, p in enumerate(people) for i in (1, 2)]
            for split in (1, 3):
                (root / "idx" / f"{part}_{kind}_{split}.txt").write_text("".join(lines))
            for place in (text.rsplit(" ", 1)[0] for text in lines):
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                (root / place).touch()
    return root


def write(root: Path, name: str, *lines: str) -> None:
    (root / "idx" / name).write_text("".join(lines))


def test_training_is_the_lists(root: Path) -> None:
    data = RegDB(root)
    assert (data.name, data.split, data.root) == ("regdb", 1, root)
    training = data.training()
    assert training.identities == (0, 1, 2)
    assert [(s.path.parent.name, s.identity) for s in training.infrared] == [
        ("285", 0), ("285", 0), ("7", 1), ("7", 1), ("30", 2), ("30", 2),
    ]  # fmt: skip
    assert training.visible[3].path == root / "Visible" / "7" / "male back_v_00002_7.bmp"
    assert {(s.camera, s.modality) for s in training.visible} == {(1, "visible")}
    assert {(s.camera, s.modality) for s in training.infrared} == {(2, "infrared")}


def test_searches_go_both_ways(root: Path) -> None:
    forth, back = RegDB(root).searches()
    assert (forth.name, forth.protocol, forth.settings) == ("visible-to-infrared", "regdb", "")
    assert (back.name, back.protocol) == ("infrared-to-visible", "regdb")
    assert forth.galleries == (back.query,)
    assert back.galleries == (forth.query,)
    assert [(s.path.parent.name, s.identity, s.modality) for s in forth.query] == [
        ("4", 0, "visible"), ("4", 0, "visible"), ("112", 1, "visible"), ("112", 1, "visible"),
    ]  # fmt: skip
    assert {s.modality for s in back.query} == {"infrared"}


def test_published_counts(tmp_path: Path) -> None:
    """206 people x 10 images a modality in each list."""
    for kind, folder in FOLDERS.items():
        (tmp_path / "idx").mkdir(exist_ok=True)
        for part, first in (("train", 1), ("test", 207)):
            lines = [line(kind, first + p, i, p) for p in range(206) for i in range(1, 11)]
            write(tmp_path, f"{part}_{kind}_10.txt", *lines)
        for person in range(1, 413):
            (tmp_path / folder / str(person)).mkdir(parents=True)
            for image in range(1, 11):
                (tmp_path / line(kind, person, image, 0).rsplit(" ", 1)[0]).touch()
    data = RegDB(tmp_path, split=10)
    training = data.training()
    assert (len(training.identities), len(training.visible), len(training.infrared)) == (206, 2060, 2060)
    for search in data.searches():
        assert (len(search.query), [len(gallery) for gallery in search.galleries]) == (2060, [2060])


def test_each_split_has_its_lists(root: Path) -> None:
    write(root, "test_visible_3.txt", line("visible", 112, 2, 1))
    assert [len(RegDB(root, split=split).searches()[0].query) for split in (1, 3)] == [4, 1]
    with refused(match=r"train_visible_2.txt: expected the list of split 2.*splits 1, 3"):
        RegDB(root, split=2)
    for split in (0, 11, -1):
        with pytest.raises(ValueError, match=f"split must be from 1 to 10; got {split}"):
            RegDB(root, split=split)


def test_lists_of_windows(root: Path) -> None:
    """A byte order mark, backslashes, carriage returns and blank lines do no harm."""
    text = (root / "idx" / "train_thermal_1.txt").read_text()
    expected = RegDB(root).training()
    other = "\ufeff" + text.replace("/", "\\").replace("\n", "\r\n") + "\r\n \r\n"
    (root / "idx" / "train_thermal_1.txt").write_bytes(other.encode())
    assert RegDB(root).training() == expected


def test_one_modality_is_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(root, "train_thermal_1.txt", line("thermal", 285, 1, 0), line("thermal", 30, 1, 2))
    with caplog.at_level(logging.WARNING):
        assert RegDB(root).training().identities == (0, 2)
    assert "split 1: left out 1 training identities without infrared images (2 images): 1" in caplog.text


def test_a_missing_list_is_refused(root: Path) -> None:
    for name in ("test_thermal_1.txt", "test_thermal_3.txt"):
        (root / "idx" / name).unlink()
    with refused(match=r"test_thermal_1.txt: expected the list .*found no such file, but test_visible_1"):
        RegDB(root)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("\n", " \n"), r"train_visible_1.txt: expected lines such as 'Visible/285.*found an empty list"),
        (("Visible/7/a.bmp\n",), r"line 1: expected lines such as .*; found 'Visible/7/a.bmp'"),
        (("{}", "Visible/7/a.bmp one\n"), r"line 2: expected lines .*found 'Visible/7/a.bmp one'"),
        (("{}", "Visible/7/a.bmp -1\n"), r"line 2: .*found 'Visible/7/a.bmp -1'"),
        (("\n", "7\n"), r"line 2: .*found '7'"),
        (("/etc/passwd 0\n",), r"line 1: .*found '/etc/passwd 0'"),
        (("Visible/../../a.bmp 0\n",), r"line 1: .*found 'Visible/../../a.bmp 0'"),
    ],
)
def test_malformed_lists(root: Path, lines: tuple[str, ...], message: str) -> None:
    write(root, "train_visible_1.txt", *(text.format(line("visible", 7, 1, 1)) for text in lines))
    with refused(match=message):
        RegDB(root)


def test_one_image_has_one_label(root: Path) -> None:
    write(root, "test_visible_1.txt", line("visible", 4, 1, 0), line("visible", 4, 1, 1))
    with refused(match=r"line 2: expected one label .*found 1, and 0 .*Visible/4"):
        RegDB(root)


@pytest.mark.parametrize("part", ["train", "test"])
def test_swapped_modalities_are_refused(root: Path, part: str) -> None:
    visible, thermal = (root / "idx" / f"{part}_{kind}_1.txt" for kind in FOLDERS)
    texts = visible.read_text(), thermal.read_text()
    visible.write_text(texts[1])
    thermal.write_text(texts[0])
    with refused(match=rf"{part}_visible_1.txt, line 1: expected no image of Thermal.*interchanged"):
        RegDB(root)
    # One line is enough, and either list.
    visible.write_text(texts[0])
    thermal.write_text(texts[1] + texts[0].splitlines()[0])
    last = len(texts[1].splitlines()) + 1
    with refused(match=rf"{part}_thermal_1.txt, line {last}: expected no image of Vis"):
        RegDB(root)


def test_missing_images_are_named_and_counted(root: Path) -> None:
    for image in (1, 2):
        (root / "Thermal" / "112" / f"male back_t_0000{image}_112.bmp").unlink()
    shutil.rmtree(root / "Thermal" / "4")
    with refused(
        match=r"4.male back_t_00001_4.bmp: expected this image, which .*test_thermal_1.txt names in line 1; "
        r"found no such file. 4 of the list's images are missing"
    ):
        RegDB(root)


def test_training_images_in_the_test_are_refused(root: Path) -> None:
    train = (root / "idx" / "train_thermal_1.txt").read_text().splitlines(keepends=True)
    test = (root / "idx" / "test_thermal_1.txt").read_text()
    write(root, "test_thermal_1.txt", test, train[0].replace(" 0\n", " 2\n"))
    with refused(match=r"idx: expected training images of split 1 .*found 1 in both: .*285"):
        RegDB(root)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_label_is_one_person(root: Path, part: str) -> None:
    """Two people under a label, across the modalities or in one, would be trained and scored as one."""
    path = root / "idx" / f"{part}_thermal_1.txt"
    text = path.read_text()
    # As of another split: labels 0 and 1 are exchanged.
    path.write_text(re.sub(r" ([01])$", lambda label: f" {1 - int(label[1])}", text, flags=re.MULTILINE))
    first, second = PEOPLE[part][:2]
    with refused(
        match=rf"{part}_thermal_1.txt, line 1: expected one person for a label, .*; found label 1 for folder "
        rf"Thermal/{first}, but label 1 for folder Visible/{second} in .*{part}_visible_1.txt, line 3"
    ):
        RegDB(root)
    # One line is enough, in one list as well: a person who stands in another's place.
    path.write_text(text.replace(line("thermal", second, 2, 1), line("thermal", second, 2, 0)))
    with refused(match=rf"line 4: .* found label 0 for folder Thermal/{second}, but "):
        RegDB(root)
    path.write_text(text.replace(line("thermal", second, 2, 1), line("thermal", second, 2, 7)))
    with refused(match=r"line 4: .* label 7 for folder .*, but label 1 for folder "):
        RegDB(root)


def test_folders_without_a_number_name_no_person(root: Path) -> None:
    for kind, folder in FOLDERS.items():
        (root / folder / "285").rename(root / folder / "anna")
        path = root / "idx" / f"train_{kind}_1.txt"
        path.write_text(path.read_text().replace("/285/", "/anna/"))
    assert RegDB(root).training().identities == (0, 1, 2)


def test_people_of_training_and_test_are_apart(root: Path) -> None:
    """Other images of the same people are found too."""
    for kind, folder in FOLDERS.items():
        new = root / line(kind, 7, 3, 0).rsplit(" ", 1)[0]
        new.touch()
        path = root / "idx" / f"test_{kind}_1.txt"
        path.write_text(path.read_text() + line(kind, 7, 3, 2))
        assert new.parent.parent.name == folder
    with refused(match=r"idx: expected test people apart .*; found 1 in both: 7\."):
        RegDB(root)


def test_a_line_twice_counts_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = RegDB(root).training()
    path = root / "idx" / "train_visible_1.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[3], lines[0]]))
    with caplog.at_level(logging.WARNING):
        assert RegDB(root).training() == expected
    assert caplog.messages == [f"{path}: left out 2 lines that repeat an earlier one: 7, 8"]


def test_files_that_differ_in_their_suffix_are_one_picture(root: Path) -> None:
    text = line("visible", 7, 1, 1).replace(".bmp", ".PNG")
    (root / text.rsplit(" ", 1)[0]).touch()
    path = root / "idx" / "train_visible_1.txt"
    path.write_text(path.read_text() + text)
    with refused(match=r"line 7: expected one image of a name; found .*PNG, and .*line 3"):
        RegDB(root)


def test_a_list_names_images(root: Path) -> None:
    path = root / "idx" / "train_visible_1.txt"
    whole = path.read_text()
    for name in ("7.txt", "7", "._7.bmp", "7.gif", "7.mat"):
        (root / "Visible" / "7" / name).touch()
        path.write_text(whole + f"Visible/7/{name} 1\n")
        with refused(match=r"line 7: expected the name of an image, .*\.jpg.*; found 'Vis"):
            RegDB(root)
    (root / "Visible" / "7" / "folder.bmp").mkdir()
    path.write_text(whole + "Visible/7/folder.bmp 1\n")
    with refused(match=r"folder.bmp: expected this image, .* in line 7; found no such file"):
        RegDB(root)


@pytest.mark.parametrize("label", ["9" * 10, "9" * 5000, "1.0", "nan", "1e3", "\u0663", "0x1"])
def test_labels_are_numbers(root: Path, label: str) -> None:
    write(root, "train_visible_1.txt", f"Visible/7/a.bmp {label}\n")
    with refused(match=r"train_visible_1.txt, line 1: expected lines such as") as caught:
        RegDB(root)
    assert len(str(caught.value)) < 500


def test_a_list_of_another_encoding_is_refused(root: Path) -> None:
    path = root / "idx" / "train_visible_1.txt"
    path.write_text(path.read_text(), encoding="utf-16")
    with refused(match=r"train_visible_1.txt, line 1: expected lines such as"):
        RegDB(root)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_need_not_be_utf8(root: Path) -> None:
    place = os.fsencode(root) + b"/Visible/7/m\xe4nnlich.bmp"
    Path(os.fsdecode(place)).touch()
    path = root / "idx" / "train_visible_1.txt"
    path.write_bytes(path.read_bytes() + b"Visible/7/m\xe4nnlich.bmp 1\n")
    assert RegDB(root).training().visible[-1].path == Path(os.fsdecode(place))


def test_the_log_counts_the_images(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = RegDB(root, split=3)
        data.training()
        data.searches()
    assert caplog.messages == [
        f"regdb at {root}, split 3: training images: 6 visible and 6 infrared ones of 3 identities",
        f"regdb at {root}, split 3, visible-to-infrared: 4 queries of 2 identities, galleries: 1 of 4 images",
        f"regdb at {root}, split 3, infrared-to-visible: 4 queries of 2 identities, galleries: 1 of 4 images",
    ]


def test_test_identities_of_one_modality(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(root, "test_thermal_1.txt", line("thermal", 112, 1, 1))
    with caplog.at_level(logging.WARNING):
        RegDB(root)
    assert caplog.messages == [f"regdb at {root}, split 1: 1 test identities without infrared images: 0"]
    write(root, "test_visible_1.txt", line("visible", 4, 1, 0))
    with refused(
        match=r"split 1: expected test identities with images of both modalities; found 1 identities with "
        r"visible images and 1 identities with infrared images, none in common"
    ):
        RegDB(root)
