"""Synthetic trees: readable as the published ones, the same bytes from one seed, a gap of the spectra."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mrcn_fast.reid.data import (
    LLCM,
    SYSUMM01,
    WRITERS,
    DatasetError,
    PersonImages,
    RegDB,
    Sample,
    is_whole,
    write_llcm,
    write_regdb,
    write_sysu,
)
from mrcn_fast.reid.data.synthetic import writers
from mrcn_fast.reid.data.synthetic.body import VISIBLE, Pose, Spectrum, seen
from mrcn_fast.reid.data.synthetic.people import Person, Surface
from mrcn_fast.reid.data.synthetic.rendering import Camera
from mrcn_fast.reid.data.synthetic.writers import is_synthetic

SMALL: dict[str, Any] = {
    "identities": 6,
    "test_identities": 2,
    "images_per_camera": 2,
    "image_size": (48, 24),
}
# Of each layout, a small tree.
LAYOUTS: dict[str, dict[str, Any]] = {
    "sysu": SMALL,
    "regdb": {"identities": 7, "images": 2, "splits": 2, "image_size": (32, 16)},
    "llcm": {"identities": 5, "test_identities": 2, "images_per_camera": 1, "image_size": (32, 16)},
}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sysu(tmp_path_factory.mktemp("synthetic"), **SMALL)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with enough people to match, in default light and pose."""
    root = tmp_path_factory.mktemp("crowd")
    return write_sysu(root, identities=26, test_identities=24, images_per_camera=2, image_size=(64, 32))


def test_is_read_as_sysu_mm01(tree: Path) -> None:
    data = SYSUMM01(tree)
    training = data.training()
    assert len(training.identities) == 4
    assert (len(training.visible), len(training.infrared)) == (4 * 4 * 2, 4 * 2 * 2)
    assert not set(training.identities) & set(data.test_identities)
    assert len(data.query()) == 2 * 2 * 2
    assert [len(data.gallery(mode)) for mode in ("all", "indoor")] == [2 * 4, 2 * 2]
    available = (tree / "exp" / "available_id.txt").read_text().strip()
    assert available == "1,2,3,4,5,6"
    for sample in (*training.visible, *training.infrared):
        with Image.open(sample.path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 48))


def test_is_read_as_regdb(tmp_path: Path) -> None:
    root = write_regdb(tmp_path / "regdb", **LAYOUTS["regdb"])
    assert sorted(p.name for p in (root / "idx").iterdir()) == [
        f"{part}_{kind}_{split}.txt"
        for part in ("test", "train")
        for kind in ("thermal", "visible")
        for split in (1, 2)
    ]
    people: dict[str, set[tuple[str, ...]]] = {"train": set(), "test": set()}
    for split in (1, 2):
        data = RegDB(root, split=split)
        training, (search, _) = data.training(), data.searches()
        # The smaller half of seven people is trained on.
        assert training.identities == (0, 1, 2)
        assert (len(training.visible), len(training.infrared)) == (3 * 2, 3 * 2)
        assert (len(search.query), len(search.galleries[0])) == (4 * 2, 4 * 2)
        sides = {"train": training.visible + training.infrared, "test": search.query + search.galleries[0]}
        for part, samples in sides.items():
            seen_here = {(s.identity, s.path.parent.name) for s in samples}
            # One person a label, in both modalities.
            assert len(seen_here) == len({label for label, _ in seen_here})
            people[part].add(tuple(sorted(name for _, name in seen_here)))
            for sample in samples:
                assert sample.path.parent.parent.name == (
                    "Visible" if sample.modality == "visible" else "Thermal"
                )
                with Image.open(sample.path) as image:
                    assert (image.format, image.mode, image.size) == ("BMP", "RGB", (16, 32))
    assert len(people["train"]) == len(people["test"]) == 2
    with pytest.raises(DatasetError, match="found no such file, but those of splits 1, 2"):
        RegDB(root, split=3)


def test_is_read_as_llcm(tmp_path: Path) -> None:
    root = write_llcm(tmp_path / "llcm", **LAYOUTS["llcm"])
    data = LLCM(root)
    training = data.training()
    assert training.identities == (0, 1, 2)
    assert (len(training.visible), len(training.infrared)) == (3 * 9, 3 * 8)
    assert {s.camera for s in training.visible} == set(range(1, 10))
    assert {s.camera for s in training.infrared} == {1, 2, 4, 5, 6, 7, 8, 9}
    people = [{int(s.path.parent.name) for s in side} for side in (training.visible, training.infrared)]
    assert people[0] == people[1] == set(range(1, 6)) - set(data.test_identities)
    sizes = {s.name: (len(s.query), len(s.galleries[0])) for s in data.searches()}
    assert sizes == {"infrared-to-visible": (2 * 8, 2 * 9), "visible-to-infrared": (2 * 9, 2 * 8)}
    with Image.open(training.infrared[0].path) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (16, 32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_writes_the_same_bytes(layout: str, tmp_path: Path) -> None:
    trees = [
        contents(WRITERS[layout](tmp_path / name, **LAYOUTS[layout], seed=seed))
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    assert trees[0] == trees[1]
    images = [name for name in trees[0] if name.endswith((".jpg", ".bmp"))]
    assert len(images) > 20
    assert not any(trees[2].get(name) == trees[0][name] for name in images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_image_is_another(layout: str, tmp_path: Path) -> None:
    files = contents(WRITERS[layout](tmp_path / "tree", **LAYOUTS[layout]))
    images = [data for name, data in files.items() if name.endswith((".jpg", ".bmp"))]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_is_a_moment_of_its_own(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two images share a draw: a pose repeated in both modalities would give a person away."""
    strides = []

    def blank(person: Person, camera: Camera, pose: Pose, size: tuple[int, int], _: object) -> Image.Image:
        strides.append(pose.stride)
        return Image.new("RGB", (size[1], size[0]))

    monkeypatch.setattr(writers, "render", blank)
    WRITERS[layout](tmp_path / "tree", **LAYOUTS[layout])
    assert len(set(strides)) == len(strides) > 20


def test_names_itself_synthetic(tree: Path) -> None:
    assert is_synthetic(tree) and is_synthetic(str(tree))
    assert not is_synthetic(tree / "cam1")
    note = json.loads((tree / "synthetic.json").read_text())
    assert "synthetic" in note["what"]
    assert (note["seed"], note["identities"], note["image_size"]) == (0, 6, [48, 24])
    assert (note["modality_gap"], note["camera_style"], note["pose_spread"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("layout", "images"), [("sysu", 72), ("regdb", 28), ("llcm", 85)])
def test_progress_counts_to_the_end(layout: str, images: int, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    WRITERS[layout](tmp_path, **LAYOUTS[layout], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, images) for done in range(1, images + 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tree_with_some_of_its_lists_is_not_whole(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finds it writes it again, and then nothing of the first attempt is there."""
    root, write, written = tmp_path / "tree", Path.write_text, []

    def fails_at_the_second_list(path: Path, *arguments: Any, **options: Any) -> int:
        if path.suffix == ".txt":
            written.append(path)
        if len(written) == 2:
            raise OSError("the disk is full")
        return write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fails_at_the_second_list)
        with pytest.raises(OSError, match="the disk is full"):
            WRITERS[layout](root, **LAYOUTS[layout])
    assert not is_whole(root)
    (written[0].parent / "of_the_first_attempt.txt").touch()
    WRITERS[layout](root, **LAYOUTS[layout])
    assert is_whole(root)
    assert contents(root) == contents(WRITERS[layout](tmp_path / "other", **LAYOUTS[layout]))


def test_replaces_its_own_tree_and_nothing_else(tmp_path: Path) -> None:
    root = write_sysu(tmp_path / "tree", **SMALL)
    write_sysu(root, **{**SMALL, "identities": 4})
    assert len(list((root / "cam1").iterdir())) == 4
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "cam1").mkdir()
    marker = json.loads((root / "synthetic.json").read_text())
    # Another program's marker, or one of a layout that this version doesn't know, claims nothing.
    for note in (None, "{}", "not json", json.dumps(marker | {"layout": "market"})):
        if note is not None:
            (foreign / "synthetic.json").write_text(note)
        for layout, values in LAYOUTS.items():
            with pytest.raises(
                DatasetError, match=r"foreign: expected an empty folder .*found cam1.*Nothing was"
            ):
                WRITERS[layout](foreign, **values)
        assert (foreign / "cam1").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="found a file"):
        write_sysu(tmp_path / "file", **SMALL)


@pytest.mark.parametrize("later", LAYOUTS)
@pytest.mark.parametrize("earlier", LAYOUTS)
def test_replaces_a_tree_of_another_layout(earlier: str, later: str, tmp_path: Path) -> None:
    fresh = contents(WRITERS[later](tmp_path / "fresh", **LAYOUTS[later]))
    root = WRITERS[earlier](tmp_path / "tree", **LAYOUTS[earlier])
    (root / "notes").mkdir()
    (root / "notes" / "cam1.txt").write_text("kept")
    WRITERS[later](root, **LAYOUTS[later])
    assert contents(root) == fresh | {"notes/cam1.txt": b"kept"}


def test_folders_that_the_earlier_layout_does_not_own_are_kept(tmp_path: Path) -> None:
    root = write_sysu(tmp_path / "tree", **SMALL)
    (root / "idx").mkdir()
    (root / "idx" / "mine.txt").touch()
    before = contents(root)
    for layout in ("regdb", "llcm"):
        with pytest.raises(
            DatasetError, match=r"tree: expected nothing in the way .*sysu; found idx. Nothing"
        ):
            WRITERS[layout](root, **LAYOUTS[layout])
        assert contents(root) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"test_identities": 5},
            "got test_identities=5 with identities=6, expected at least 2 identities more",
        ),
        ({"images_per_camera": 0}, "got images_per_camera=0, expected an integer from 1 to 9999"),
        ({"modality_gap": -0.1}, "got modality_gap=-0.1, expected a number from 0 to 2"),
        ({"pose_spread": float("nan")}, "got pose_spread=nan, expected a finite number from 0 to 2"),
        ({"image_size": (48, 8)}, r"got image_size\[1\]=8, expected an integer from 16 to 4096"),
    ],
)
def test_bad_parameters(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_sysu(tmp_path / "tree", **{**SMALL, **change})
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("regdb", {"identities": 3}, "got identities=3, expected an integer from 4 to 9999"),
        ("regdb", {"images": 0}, "got images=0, expected an integer from 1 to 9999"),
        ("regdb", {"splits": 11}, "got splits=11, expected an integer from 1 to 10"),
        ("regdb", {"splits": 0}, "got splits=0, expected an integer from 1 to 10"),
        ("regdb", {"camera_style": 2.1}, "got camera_style=2.1, expected a number from 0 to 2"),
        (
            "llcm",
            {"test_identities": 4},
            "got test_identities=4 with identities=5, expected at least 2 identities more",
        ),
        ("llcm", {"identities": 10_000}, "got identities=10000, expected an integer from 3 to 9999"),
        ("llcm", {"seed": -1}, "got seed=-1, expected an integer from 0"),
    ],
)
def test_bad_parameters_of_the_other_layouts(tmp_path: Path, layout: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WRITERS[layout](tmp_path / "tree", **{**LAYOUTS[layout], **change})
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize(("layout", "reader"), [("sysu", SYSUMM01), ("regdb", RegDB), ("llcm", LLCM)])
def test_infrared_is_grey_and_visible_is_not(
    layout: str, reader: Callable[[Path], SYSUMM01 | RegDB | LLCM], tmp_path: Path
) -> None:
    training = reader(WRITERS[layout](tmp_path / "tree", **LAYOUTS[layout])).training()
    for samples, grey in ((training.infrared, True), (training.visible, False)):
        images = PersonImages(samples, LAYOUTS[layout]["image_size"])
        for image in (images[index] for index in range(len(images))):
            colour = (image.amax(0) - image.amin(0)).float().mean()
            assert (colour < 1) == grey


def test_infrared_is_the_response_of_the_surface_and_its_share_of_colour() -> None:
    cloth = Surface(visible=(0.8, 0.2, 0.1), infrared=0.7)
    luminance = 0.299 * 0.8 + 0.587 * 0.2 + 0.114 * 0.1
    np.testing.assert_allclose(seen(cloth, VISIBLE), cloth.visible, atol=1e-6)
    np.testing.assert_allclose(seen(cloth, Spectrum(gap=1.0, colour=0.0)), [0.7] * 3, atol=1e-6)
    half = luminance + 0.5 * (0.7 - luminance)
    np.testing.assert_allclose(seen(cloth, Spectrum(gap=0.5, colour=0.0)), [half] * 3, atol=1e-6)
    chroma = np.array(cloth.visible) - luminance
    np.testing.assert_allclose(seen(cloth, Spectrum(0.5, 0.25)), half + 0.25 * chroma, atol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.0])
def test_infrared_images_are_grey_unless_asked_for_colour(gap: float, tmp_path: Path) -> None:
    def colourfulness(root: Path, image: str) -> float:
        pixels = np.asarray(Image.open(root / image).convert("RGB")).astype(float)
        return float(np.ptp(pixels, axis=2).mean())

    grey = write_regdb(tmp_path / "grey", **LAYOUTS["regdb"], modality_gap=gap)
    tinted = write_regdb(tmp_path / "tinted", **LAYOUTS["regdb"], modality_gap=gap, infrared_colour=0.25)
    infrared = next((grey / "Thermal").rglob("*.bmp")).relative_to(grey).as_posix()
    visible = next((grey / "Visible").rglob("*.bmp")).relative_to(grey).as_posix()
    assert colourfulness(grey, infrared) == 0
    assert colourfulness(tinted, infrared) > 2
    assert (grey / visible).read_bytes() == (tinted / visible).read_bytes()


def test_without_style_gap_and_pose_all_cameras_see_one_picture(tmp_path: Path) -> None:
    none: dict[str, Any] = {"modality_gap": 0.0, "camera_style": 0.0, "pose_spread": 0.0}
    none["infrared_colour"] = 1.0
    root = write_sysu(tmp_path / "plain", **SMALL, **none)
    for identity in ("0001", "0002"):
        pictures = {
            (root / f"cam{c}" / identity / f"000{i}.jpg").read_bytes() for c in range(1, 7) for i in (1, 2)
        }
        assert len(pictures) == 1
    assert (root / "cam1/0001/0001.jpg").read_bytes() != (root / "cam1/0002/0001.jpg").read_bytes()


@pytest.mark.parametrize("strength", ["modality_gap", "camera_style", "pose_spread"])
def test_each_strength_changes_the_pictures(tree: Path, tmp_path: Path, strength: str) -> None:
    root = write_sysu(tmp_path / "none", **{**SMALL, strength: 0.0})
    assert contents(root)["cam3/0001/0001.jpg"] != contents(tree)["cam3/0001/0001.jpg"]
    same_visible = contents(root)["cam1/0001/0001.jpg"] == contents(tree)["cam1/0001/0001.jpg"]
    assert same_visible == (strength == "modality_gap")


def test_colour_matches_within_a_spectrum_but_not_across(crowd: Path) -> None:
    """The colours of the clothes find most people in another visible camera, and hardly any in infrared."""
    data = SYSUMM01(crowd)
    gallery = by_camera(data.gallery("all", shots=2), 1)
    visible = rank1(by_camera(data.gallery("all", shots=2), 4), gallery, colour_histogram)
    across = rank1(by_camera(data.query(), 6), gallery, colour_histogram)
    assert visible > 0.5
    assert across < 0.2
    # Brightness, all that an infrared camera has, does not do it either: each material reflects as it likes.
    assert rank1(by_camera(data.query(), 6), gallery, grey_histogram) < 0.25


def by_camera(samples: list[Sample], camera: int) -> list[Sample]:
    return [sample for sample in samples if sample.camera == camera]


def rank1(query: list[Sample], gallery: list[Sample], feature: Callable[[NDArray], NDArray]) -> float:
    def features(samples: list[Sample]) -> torch.Tensor:
        images = PersonImages(samples, (64, 32))
        pictures = [images[index].permute(1, 2, 0).numpy() for index in range(len(images))]
        return torch.from_numpy(np.stack([feature(picture) for picture in pictures]))

    nearest = torch.cdist(features(query), features(gallery), p=1).argmin(dim=1).tolist()
    hits = [gallery[j].identity == sample.identity for sample, j in zip(query, nearest, strict=True)]
    return float(np.mean(hits))


def colour_histogram(picture: NDArray) -> NDArray:
    """Chroma, which light does not change, of the upper and the lower half of the body."""
    middle = picture[:, 8:24].astype(np.float64)
    chroma = middle / (middle.sum(axis=2, keepdims=True) + 30)
    return np.concatenate([joint_histogram(chroma[rows]) for rows in (slice(14, 32), slice(32, 54))])


def joint_histogram(chroma: NDArray) -> NDArray:
    counts, _, _ = np.histogram2d(
        chroma[..., 0].ravel(), chroma[..., 1].ravel(), bins=12, range=[[0.1, 0.6], [0.1, 0.6]]
    )
    return counts.ravel() / counts.sum()


def grey_histogram(picture: NDArray) -> NDArray:
    grey = picture[:, 8:24].astype(np.float64).mean(axis=2)
    grey = (grey - grey.mean()) / (grey.std() + 1)
    halves = (grey[14:32], grey[32:54])
    return np.concatenate([np.histogram(half, bins=16, range=(-3, 3), density=True)[0] for half in halves])
