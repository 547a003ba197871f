"""Images of samples: Pillow's pixels for every filter and mode, and which files can be read."""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps

from mrcn_fast.reid.data import DatasetError, PersonImages, Sample
from mrcn_fast.reid.data.formats import FORMATS
from mrcn_fast.reid.data.images import FILTERS, check_left, readable
from tests.reid.data.refusals import damaged_copies

SIZE = (24, 10)


def picture(seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (61, 33, 3), dtype=np.uint8))


def sample(path: Path, modality: Any = "visible") -> Sample:
    return Sample(path, 7, 3, modality)


def read(path: Path, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return PersonImages([sample(path)], size)[0]


def expected(image: Image.Image, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """The pixels of an RGB image as PersonImages gives them."""
    resized = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


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
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("LA", "png"),
        ("1", "png"), ("P", "bmp"), ("1", "bmp"), ("CMYK", "tiff"), ("YCbCr", "tiff"), ("L", "pgm"),
    ],
)  # fmt: skip
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


def test_images_share_no_memory(tmp_path: Path) -> None:
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


def test_without_unreadable_images_nothing_is_logged(
    tree: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    good = [tree[0], tree[2]]
    with caplog.at_level(logging.WARNING):
        assert readable(good) == (good, [])
        assert readable([]) == ([], [])
    assert not caplog.records


def test_an_image_whose_pixels_are_cut_is_unreadable(tmp_path: Path) -> None:
    """Its header alone is whole."""
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
    """Conversion to 8 bits would make them white."""
    path = tmp_path / "deep.tiff"
    Image.fromarray(np.full((61, 33), 3000, dtype)).save(path)
    with Image.open(path) as file:
        assert file.mode == mode
    with pytest.raises(DatasetError, match=rf"^\S+deep.tiff: expected 8 bits a channel; .* mode {mode}"):
        PersonImages([sample(path)], SIZE)[0]
    assert readable([sample(path)]) == ([], [sample(path)])


def test_of_three_channels_of_16_bits_the_higher_8_are_read(tmp_path: Path) -> None:
    path = tmp_path / "deep.ppm"
    path.write_bytes(b"P6 33 61 65535\n" + np.full((61, 33, 3), (0, 30_000, 65_535), ">u2").tobytes())
    assert PersonImages([sample(path)], (61, 33))[0].amax(dim=(1, 2)).tolist() == [0, 117, 255]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_an_image_is_seen_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    """0 and 9 are no orientations."""
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture().save(path, exif=exif)
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
    assert upright.size == ((61, 33) if 5 <= orientation <= 8 else (33, 61))
    assert torch.equal(read(path), expected(upright.convert("RGB")))


def test_an_orientation_that_cant_be_read_turns_nothing(tmp_path: Path) -> None:
    path = tmp_path / "odd.jpg"
    picture().save(path, exif=b"Exif\0\0MM\xff* no EXIF data")
    with Image.open(path) as file:
        assert torch.equal(read(path), expected(file.convert("RGB")))


def test_the_content_decides_about_the_format(tmp_path: Path) -> None:
    picture().save(tmp_path / "image.png")
    (tmp_path / "image.png").rename(tmp_path / "image.bmp")
    assert torch.equal(read(tmp_path / "image.bmp"), expected(picture()))


def test_other_programs_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, **more: Any) -> None:
        pytest.fail("Ghostscript was asked")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path = tmp_path / "image.bmp"
    picture().save(path, "EPS")
    with pytest.raises(
        DatasetError, match=r"image.bmp: .* found: content of none of the formats JPEG, PNG, "
    ):
        read(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DatasetError, match=r"empty.jpg: .* found: an empty file. Copy"):
        read(tmp_path / "empty.jpg")


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """40,000 x 40,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))))
    with pytest.raises(
        DatasetError, match=r"bomb.png: .* found: more pixels than a person's picture can have"
    ):
        read(path)
    assert readable([sample(path)]) == ([], [sample(path)])


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_more_than_one_picture_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"several.{suffix}"
    picture().save(path, save_all=True, append_images=[picture(1)])
    with pytest.raises(DatasetError, match=r"several.\w+: expected one picture in the file; found several"):
        read(path)
    assert readable([sample(path)]) == ([], [sample(path)])


def test_previews_behind_a_picture_do_no_harm(tmp_path: Path) -> None:
    """Phones store such previews."""
    path = tmp_path / "photo.jpg"
    picture().save(path, "MPO", save_all=True, append_images=[picture(1).resize((8, 8))])
    with Image.open(path) as file:
        assert (file.format, getattr(file, "n_frames", 1)) == ("MPO", 2)
        assert torch.equal(read(path), expected(file.convert("RGB")))


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp")])
def test_transparent_pixels_are_refused(mode: str, suffix: str, tmp_path: Path) -> None:
    """The colour of transparent pixels was never visible."""
    path = tmp_path / f"transparent.{suffix}"
    image = picture().convert(mode)
    if mode == "P":
        image.save(path, transparency=image.getpixel((3, 4)))
    else:
        image.putpixel((3, 4), (*([9] * (len(mode) - 1)), 128))
        image.save(path, lossless=True)
    with pytest.raises(DatasetError, match=r"transparent.\w+: expected an opaque image; found transparent"):
        read(path)
    assert readable([sample(path)]) == ([], [sample(path)])


@pytest.mark.filterwarnings("ignore")  # Pillow's about odd tags
@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_gives_pixels_or_a_dataset_error(format: str, tmp_path: Path) -> None:
    content = io.BytesIO()
    exif = {"exif": Image.Exif()} if format in ("JPEG", "PNG", "TIFF", "WEBP") else {}
    picture().save(content, format, **exif)
    path, damaged = tmp_path / "image", 0
    for broken in damaged_copies(content.getvalue(), 150, first=100, cut=0.3):
        path.write_bytes(broken)
        try:
            assert read(path).shape == (3, *SIZE)
        except DatasetError as error:
            damaged += 1
            assert str(error).startswith(f"{path}: expected ")
    assert damaged > 20


def test_the_readable_images_must_be_enough(tmp_path: Path) -> None:
    visible, infrared = (
        [Sample(tmp_path / f"{modality}{i}.jpg", i, 1, modality) for i in range(4)]
        for modality in ("visible", "infrared")
    )
    check_left([], [], "test")
    check_left(visible[:1] + infrared[:1], visible[1:] + infrared[1:], "test")
    with pytest.raises(
        DatasetError,
        match=r"infrared0.jpg: this image can't be read, and .* no test identity has images of both "
        r"modalities; no infrared image is left. Left out were 1 of 4 visible images, 4 of 4 infrared images",
    ):
        check_left(visible[1:], infrared + visible[:1], "test")
    with pytest.raises(DatasetError, match=r"no training identity has images of both modalities. Left out"):
        check_left(visible[:2] + infrared[2:], visible[2:] + infrared[:2], "training")
    with pytest.raises(
        DatasetError, match=r"a batch needs 3 different identities; got 2. Left out were 2 of 4"
    ):
        check_left(visible[2:] + infrared, visible[:2], "training", identities=3)


@pytest.mark.parametrize("size", [(48.5, 24), (float("nan"), 24), ("48", "24"), (48,), (0, 24)])
def test_a_size_is_whole_pixels(size: Any) -> None:
    with pytest.raises(
        ValueError, match=r"image_size must be \(height, width\) of at least 1 pixel each; got"
    ):
        PersonImages([], size)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_need_not_be_utf8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / os.fsdecode(b"\xe4\xff.png")
    picture().save(path)
    assert torch.equal(read(path), expected(picture()))
    path.write_bytes(b"")
    assert readable([sample(path)], workers=1) == ([], [sample(path)])
    assert "\udcff.png: expected a readable image" in caplog.messages[0]


def test_images_are_rgb_of_the_size(tmp_path: Path) -> None:
    colour = np.zeros((8, 6, 3), dtype=np.uint8)
    colour[:4] = (250, 20, 130)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(np.full((20, 10), 90, dtype=np.uint8)).save(tmp_path / "grey.jpg")
    samples = [Sample(tmp_path / name, 1, 1, "visible") for name in ("colour.png", "grey.jpg")]
    images = PersonImages(samples, (8, 6))
    assert len(images) == 2
    assert torch.equal(images[0], torch.from_numpy(colour).permute(2, 0, 1))
    assert (images[1].dtype, images[1].shape) == (torch.uint8, (3, 8, 6))
    assert torch.equal(images[1], torch.full((3, 8, 6), 90, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"image_size must be \(height, width\)"):
        PersonImages(samples, (0, 6))


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut"])
def test_unreadable_images_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "0042.jpg"
    if damage != "missing":
        generator = np.random.default_rng(0)
        Image.fromarray(generator.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(path)
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"no image", "cut": whole[: len(whole) // 2]}[damage])
    images = PersonImages([Sample(path, 7, 3, "infrared")], (64, 32))
    with pytest.raises(
        DatasetError, match=r"0042.jpg: expected a readable image of identity 7, camera 3; found"
    ):
        images[0]
