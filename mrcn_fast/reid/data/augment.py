"""Augmentation and normalization of whole batches of images, on the batch's device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mrcn_fast.reid.training.transfers import to_device

# ImageNet's channel statistics on the scale 0..1, with which pretrained trunks were trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Random erasing (Zhong et al., 2020) as in the field's code: the rectangle's share of the image and its ratio
# of height to width are uniform, and rectangles that don't fit are drawn again.
_ERASED_AREA = (0.02, 0.4)
_ERASED_RATIO = (0.3, 1 / 0.3)
_ERASING_ATTEMPTS = 16
# The weights of grey (ITU-R 601: .299, .587, .114) in 65536ths, as in Pillow; integers give equal results on
# every device.
_GREY = (19595, 38470, 7471)


def normalize(images: Tensor) -> Tensor:
    """Normalize by ImageNet's statistics: uint8 (B, 3, H, W) -> float32 of the same shape, device and layout.

    Raises ValueError for another dtype or shape.

    Example:
        >>> normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).amax()
        tensor(-1.8044)
    """
    _check_images(images)
    scale = 255 * torch.tensor((IMAGENET_MEAN, IMAGENET_STD))[..., None, None]
    mean, deviation = to_device(scale, images.device)
    return images.float().sub_(mean).mul_(1 / deviation)


class Augmentation(nn.Module):
    """Pads, crops, flips, normalizes and erases at random: uint8 (B, 3, H, W) -> float32 of the same shape.

    Each image of a batch has its own crop, flip and rectangle. Erased pixels become ImageNet's mean, which is
    0 after normalization. The pixels stay on the input's device.

    `augment(images, generator)` draws from a CPU generator, by default torch's global one. The number of
    values per image is fixed, so that equal seeds give equal streams on every device; with channel=0, no
    value is drawn for that option.

    Args:
        image_size: (H, W)
        padding: black pixels on each side, before the crop
        flip: probability of the horizontal flip
        erase: probability of random erasing
        channel: probability of CAJ's channel augmentation (Ye et al., 2021) for visible images: all three
            channels become red, green, blue or grey, with equal probability

    Raises:
        ValueError: for another dtype or shape, and for probabilities out of range

    Example:
        >>> augment = Augmentation((64, 32), padding=4, channel=0.5)
        >>> augment(torch.zeros(8, 3, 64, 32, dtype=torch.uint8)).dtype
        torch.float32
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        *,
        padding: int = 10,
        flip: float = 0.5,
        erase: float = 0.5,
        channel: float = 0.0,
    ) -> None:
        super().__init__()
        if padding < 0:
            raise ValueError(f"padding must not be negative; got {padding}")
        for name, probability in (("flip", flip), ("erase", erase), ("channel", channel)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} is a probability, from 0 to 1; got {probability}")
        self.image_size = (image_size[0], image_size[1])
        self.padding = padding
        self.flip = flip
        self.erase = erase
        self.channel = channel

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        _check_images(images)
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"expected images of (height, width) {self.image_size}; got {tuple(images.shape[-2:])}. "
                f"Resize them first (PersonImages does), or make the Augmentation with their size"
            )
        count = images.shape[0]
        crop = torch.rand(count, 3, generator=generator)
        erasing = torch.rand(count, 1 + 2 * _ERASING_ATTEMPTS + 2, generator=generator)
        channels = torch.arange(3)[None]
        if self.channel > 0:
            channels = self._channels(torch.rand(count, 2, generator=generator))
            images = torch.cat((images, _grey(images)), dim=1)
        augmented = normalize(self._crop_and_flip(images, crop, channels))
        return augmented.masked_fill_(to_device(self._erased(erasing), images.device), 0.0)

    def extra_repr(self) -> str:
        return (
            f"{self.image_size}, padding={self.padding}, flip={self.flip}, erase={self.erase}, "
            f"channel={self.channel}"
        )

    def _channels(self, draws: Tensor) -> Tensor:
        """Choose the channels of each image, (B, 3), red to grey as 0 to 3; draws: chance, which."""
        chance, which = draws.split(1, dim=1)
        return torch.where(chance < self.channel, (which * 4).long(), torch.arange(3))

    def _crop_and_flip(self, images: Tensor, draws: Tensor, channels: Tensor) -> Tensor:
        """Crop, flip and select channels of each image in one gather; draws: (B, 3) in [0, 1)."""
        height, width = self.image_size
        offsets = (draws[:, :2] * (2 * self.padding + 1)).long()
        rows = offsets[:, :1] + torch.arange(height)
        columns = torch.arange(width).expand(len(draws), width)
        columns = torch.where(draws[:, 2:] < self.flip, width - 1 - columns, columns) + offsets[:, 1:]
        padded = functional.pad(images, [self.padding] * 4)
        # One index per dimension, which broadcast to (B, 3, H, W).
        return padded[
            torch.arange(len(draws), device=images.device).view(-1, 1, 1, 1),
            to_device(channels, images.device)[:, :, None, None],
            to_device(rows, images.device)[:, None, :, None],
            to_device(columns, images.device)[:, None, None, :],
        ]

    def _erased(self, draws: Tensor) -> Tensor:
        """Choose the erased pixels, (B, 1, H, W); draws: chance, (area, ratio) per attempt, top, left."""
        height, width = self.image_size
        chance, attempts, corner = draws.split([1, 2 * _ERASING_ATTEMPTS, 2], dim=1)
        area = _between(_ERASED_AREA, attempts[:, 0::2]) * height * width
        ratio = _between(_ERASED_RATIO, attempts[:, 1::2])
        tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (tall < height) & (wide < width)
        first = fits.int().argmax(dim=1, keepdim=True)
        applied = (chance < self.erase) & fits.any(dim=1, keepdim=True)
        tall, wide = (torch.where(applied, side.gather(1, first), 0.0) for side in (tall, wide))
        top = (corner[:, :1] * (height - tall + 1)).floor()
        left = (corner[:, 1:] * (width - wide + 1)).floor()
        rows, columns = torch.arange(height), torch.arange(width)
        inside_rows = (rows >= top) & (rows < top + tall)
        inside_columns = (columns >= left) & (columns < left + wide)
        return inside_rows[:, None, :, None] & inside_columns[:, None, None, :]


def _grey(images: Tensor) -> Tensor:
    """Compute grey values: uint8 (B, 3, H, W) -> uint8 (B, 1, H, W)."""
    weights = to_device(torch.tensor(_GREY, dtype=torch.int32), images.device).view(3, 1, 1)
    return (((images * weights).sum(1, keepdim=True, dtype=torch.int32) + 0x8000) >> 16).to(torch.uint8)


def _between(bounds: tuple[float, float], draws: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * draws


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"expected a uint8 tensor (batch, 3, height, width), as PersonImages batches give; got "
            f"{images.dtype} {tuple(images.shape)}"
        )
