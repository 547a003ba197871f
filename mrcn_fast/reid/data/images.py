"""Samples on disk as uint8 image tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from mrcn_fast.reid.data.samples import DatasetError, Sample


class PersonImages(Dataset[torch.Tensor]):
    """The images of `samples`, in order, converted to RGB and resized to `image_size` = (height, width).

    `images[i]` is a uint8 (3, height, width) tensor. Augmentation and normalisation act later, on whole
    batches (`Augmentation`, `normalize`). Raises DatasetError naming the file where an image cannot be
    read.
    """

    def __init__(self, samples: Sequence[Sample], image_size: tuple[int, int]) -> None:
        height, width = image_size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be (height, width) of at least 1 pixel each; got {image_size}")
        self.samples = tuple(samples)
        self.image_size = (height, width)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        sample = self.samples[index]
        height, width = self.image_size
        try:
            with Image.open(sample.path) as file:
                image = file.convert("RGB")
        # Pillow's decoders raise SyntaxError and ValueError besides OSError on damaged files.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DatasetError(
                f"{sample.path}: expected a readable image of identity {sample.identity}, camera "
                f"{sample.camera}; found: {error}. Copy the file from the data set again"
            ) from error
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
