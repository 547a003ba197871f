"""Augmentation: reproducible, each part on its own, and what stays is the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mrcn_fast.reid.data import Augmentation, normalize
from mrcn_fast.reid.data.augment import IMAGENET_MEAN, IMAGENET_STD

SIZE = (24, 12)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(
        1, 256, (64, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_normalize(images: torch.Tensor) -> None:
    got = normalize(images)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), (images.double() / 255 - mean) / std, atol=1e-6, rtol=1e-6)


def test_without_augmentation_images_are_only_normalized(images: torch.Tensor) -> None:
    got = Augmentation(SIZE, padding=0, flip=0, erase=0)(images)
    assert torch.equal(got, normalize(images))


def test_certain_flip_mirrors(images: torch.Tensor) -> None:
    got = Augmentation(SIZE, padding=0, flip=1, erase=0)(images)
    assert torch.equal(got, normalize(images).flip(-1))


def test_crops_are_windows_of_the_padded_images(images: torch.Tensor) -> None:
    padding = 2
    got = Augmentation(SIZE, padding=padding, flip=0.5, erase=0)(images)
    padded = torch.nn.functional.pad(images, [padding] * 4)
    windows = {
        (top, left, flipped): normalize(window.flip(-1) if flipped else window)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        for flipped in (False, True)
        for window in [padded[:, :, top : top + SIZE[0], left : left + SIZE[1]]]
    }
    found = [
        {place for place, window in windows.items() if torch.equal(got[image], window[image])}
        for image in range(len(images))
    ]
    assert all(found)
    drawn = {place for places in found for place in places}
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(range(2 * padding + 1))
    assert {flipped for _, _, flipped in drawn} == {False, True}


def test_erases_rectangles_within_the_published_ranges(images: torch.Tensor) -> None:
    count = 2000
    many = images[:1].expand(count, -1, -1, -1)
    erased = Augmentation(SIZE, padding=0, flip=0, erase=0.5)(many) == 0
    assert torch.equal(erased[:, 0], erased[:, 1])
    mask = erased[:, 0]
    rows, columns, area = mask.any(2).sum(1), mask.any(1).sum(1), mask.sum((1, 2))
    # A full rectangle, or nothing.
    assert torch.equal(area, rows * columns)
    touched = area > 0
    assert touched.float().mean().item() == pytest.approx(0.5, abs=0.05)
    # Sides are rounded to whole pixels.
    share = area[touched] / (SIZE[0] * SIZE[1])
    assert share.min() > 0.005
    assert share.max() <= 0.48
    assert share.max() > 0.3
    assert rows.max() < SIZE[0]
    assert columns.max() < SIZE[1]
    assert mask.any(0).all()


def test_certain_and_no_erasing(images: torch.Tensor) -> None:
    assert (Augmentation(SIZE, erase=1, padding=0)(images) == 0).any(-1).any(-1).all()
    assert not (Augmentation(SIZE, erase=0, padding=0)(images) == 0).any()


def greys(images: torch.Tensor) -> torch.Tensor:
    """Pillow's grey of each image, (B, 1, H, W)."""
    pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L") for image in images)
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])[:, None]


def test_channels_become_one_of_them_or_grey_each_as_likely(images: torch.Tensor) -> None:
    many = images.repeat(40, 1, 1, 1)
    got = Augmentation(SIZE, padding=0, flip=0, erase=0, channel=0.8)(many, torch.Generator().manual_seed(1))
    planes = torch.cat((many, greys(many)), dim=1)
    forms = {"unchanged": many} | {str(k): planes[:, k : k + 1].expand_as(many) for k in range(4)}
    found = {name: (got == normalize(form.contiguous())).flatten(1).all(1) for name, form in forms.items()}
    assert torch.equal(torch.stack(list(found.values())).sum(0), torch.ones(len(many)))
    for share in (found[name].float().mean().item() for name in forms):
        assert share == pytest.approx(0.2, abs=0.03)


def test_channels_are_augmented_with_the_crop_and_before_erasing(images: torch.Tensor) -> None:
    """With the same generator, crop, flip and rectangle are those without channel augmentation."""
    alone = Augmentation(SIZE, padding=3, erase=1)
    augment = Augmentation(SIZE, padding=3, erase=1, channel=1)
    got = augment(images, torch.Generator().manual_seed(5))
    plain = alone(images, torch.Generator().manual_seed(5))
    assert torch.equal(got == 0, plain == 0)
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_STD, IMAGENET_MEAN))
    kept = (got != 0).all(1, keepdim=True)
    pixels = torch.where(kept, got * std + mean, 0.0)
    torch.testing.assert_close(pixels, pixels[:, :1].expand_as(pixels), atol=1e-6, rtol=0)


def test_no_channel_augmentation_draws_nothing(images: torch.Tensor) -> None:
    """The stream of earlier seeds stays: 3 values per image, then 35."""
    generator, counted = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    Augmentation(SIZE)(images, generator)
    for values in (3, 35):
        torch.rand(len(images), values, generator=counted)
    assert torch.equal(generator.get_state(), counted.get_state())
    Augmentation(SIZE, channel=0.1)(images, generator)
    for values in (3, 35, 2):
        torch.rand(len(images), values, generator=counted)
    assert torch.equal(generator.get_state(), counted.get_state())


def test_reproducible_from_the_global_and_a_passed_generator(images: torch.Tensor) -> None:
    augment = Augmentation(SIZE)
    torch.manual_seed(3)
    first, second = augment(images), augment(images)
    torch.manual_seed(3)
    assert torch.equal(augment(images), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    passed = augment(images, torch.Generator().manual_seed(3))
    assert torch.equal(passed, first)
    assert torch.equal(torch.get_rng_state(), state)


def test_input_is_left_as_it_is_and_batches_of_none_work(images: torch.Tensor) -> None:
    before = images.clone()
    Augmentation(SIZE)(images)
    assert torch.equal(images, before)
    assert Augmentation(SIZE)(images[:0]).shape == (0, 3, *SIZE)


def test_bad_arguments(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a uint8 tensor .*torch.float32"):
        Augmentation(SIZE)(images.float())
    with pytest.raises(ValueError, match=r"got torch.uint8 \(3, 24, 12\)"):
        normalize(images[0])
    with pytest.raises(ValueError, match=r"\(32, 12\); got \(24, 12\)"):
        Augmentation((32, 12))(images)
    with pytest.raises(ValueError, match="erase is a probability"):
        Augmentation(SIZE, erase=1.5)
    with pytest.raises(ValueError, match="channel is a probability"):
        Augmentation(SIZE, channel=-0.1)
    with pytest.raises(ValueError, match="padding must not be negative"):
        Augmentation(SIZE, padding=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_seed_is_one_stream_on_every_device(images: torch.Tensor) -> None:
    augment = Augmentation(SIZE, channel=0.5)
    torch.manual_seed(3)
    on_cpu = augment(images)
    torch.manual_seed(3)
    on_device = augment(images.cuda())
    assert on_device.is_cuda
    torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-6, atol=1e-6)
