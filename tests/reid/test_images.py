"""Images of samples: Pillow's pixels for every filter and mode, and which files can be read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mrcn_fast.reid.data import DatasetError, PersonImages, Sample
from mrcn_fast.reid.data.images import FILTERS, readable

SIZE = (24, 10)


def picture(seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (61, 33, 3), dtype=np.uint8))


def sample(path: Path, modality: Any = "visible") -> Sample:
    return Sample(path, 7, 3, modality)


@pytest.fixture
def tree(tmp_path: Path) -> list[Sample]:
    """Six images; 1, 3 and 4 can't be read."""
    samples = []
    for index in range(6):
        path = tmp_path / f"{index:04d}.jpg"
        picture(index).save(path)
        samples.append(sample(path, "infrared" if index == 4 else "visible"))
    samples[1].path.write_bytes(samples[1].path.read_bytes()[:500])
    samples[3].path.unlink()
    samples[4].path.write_bytes(b"no image")
    return samples


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "jpg"), ("L", "jpg"), ("P", "png"), ("RGBA", "png")])
def test_pixels_are_pillows(filter: str, mode: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    picture().convert(mode).save(path)
    with Image.open(path) as file:
        assert file.mode == mode
        resized = file.convert("RGB").resize((SIZE[1], SIZE[0]), Image.Resampling[filter.upper()])
    got = PersonImages([sample(path)], SIZE, filter=filter)[0]
    assert got.is_contiguous()
    assert torch.equal(got, torch.from_numpy(np.array(resized)).permute(2, 0, 1))


def test_the_default_filter_is_the_fields(tmp_path: Path) -> None:
    picture().save(tmp_path / "image.png")
    samples = [sample(tmp_path / "image.png")]
    by_filter = {filter: PersonImages(samples, SIZE, filter=filter)[0] for filter in FILTERS}
    default = PersonImages(samples, SIZE)[0]
    assert [filter for filter, image in by_filter.items() if torch.equal(image, default)] == ["lanczos"]


def test_an_image_is_nobody_elses_memory(tmp_path: Path) -> None:
    picture().save(tmp_path / "image.png")
    images = PersonImages([sample(tmp_path / "image.png")], SIZE)
    first = images[0]
    before = first.clone()
    images[0].zero_()
    assert torch.equal(first, before)


def test_an_unknown_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown filter 'nearest'; known: bilinear, bicubic, lanczos"):
        PersonImages([], SIZE, filter="nearest")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_and_counted(
    workers: int, tree: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        kept, unreadable = readable(tree, workers=workers)
    assert kept == [tree[0], tree[2], tree[5]]
    assert unreadable == [tree[1], tree[3], tree[4]]
    assert torch.equal(torch.get_rng_state(), state)
    *named, counted = [record.getMessage() for record in caplog.records]
    assert len(named) == 3
    for message, left_out in zip(named, unreadable, strict=True):
        assert message.startswith(f"Left out: {left_out.path}: expected a readable image of identity 7")
    assert counted == "Left out 3 of 6 images that can't be read: 1 infrared, 2 visible"


def test_of_many_unreadable_images_some_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [sample(tmp_path / f"{index:04d}.jpg") for index in range(70)]
    with caplog.at_level(logging.WARNING):
        assert readable(samples) == ([], samples)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 21
    assert messages[-1] == "Left out 70 of 70 images that can't be read: 70 visible"


def test_where_all_can_be_read_nothing_is_said(tree: list[Sample], caplog: pytest.LogCaptureFixture) -> None:
    good = [tree[0], tree[2]]
    with caplog.at_level(logging.WARNING):
        assert readable(good) == (good, [])
        assert readable([]) == ([], [])
    assert not caplog.records


def test_an_image_whose_pixels_are_cut_is_unreadable(tmp_path: Path) -> None:
    """Its header alone would pass."""
    path = tmp_path / "cut.jpg"
    picture().save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with Image.open(path) as file:
        assert file.size == (33, 61)
    assert readable([sample(path)]) == ([], [sample(path)])
    with pytest.raises(DatasetError, match=r"cut.jpg: expected a readable image .*found: .*[Tt]runcated"):
        PersonImages([sample(path)], SIZE)[0]


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_more_than_8_bits_are_refused(mode: str, dtype: type, tmp_path: Path) -> None:
    """They would come out white."""
    path = tmp_path / "deep.tiff"
    Image.fromarray(np.full((61, 33), 3000, dtype)).save(path)
    with Image.open(path) as file:
        assert file.mode == mode
    with pytest.raises(DatasetError, match=rf"^\S+deep.tiff: expected 8 bits a channel; .* mode {mode}"):
        PersonImages([sample(path)], SIZE)[0]
    assert readable([sample(path)]) == ([], [sample(path)])
