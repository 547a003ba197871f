"""Samples on disk as uint8 image tensors, and which of them can be read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import torch
from PIL import Image
from torch.utils.data import Dataset

from mrcn_fast.reid.data.loading import Batches
from mrcn_fast.reid.data.samples import DatasetError, Sample

# Pillow's filters, by name. The field's preprocessing asks for ANTIALIAS, as lanczos was called once.
FILTERS: Final = ("bilinear", "bicubic", "lanczos")

# Unreadable files that are named in the log; beyond that they are only counted.
_NAMED: Final = 20
# Images that a process checks at a time.
_CHECKED: Final = 64
# Pillow's decoders raise SyntaxError and ValueError besides OSError on damaged files.
_DAMAGED: Final = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class PersonImages(Dataset[torch.Tensor]):
    """The images of `samples`, in order, converted to RGB and resized to `image_size` = (height, width).

    `images[i]` is a uint8 (3, height, width) tensor; `filter` is one of FILTERS. Augmentation and
    normalisation act later, on whole batches (`Augmentation`, `normalize`). Raises ValueError for a size or
    filter that there is not, DatasetError naming the file where an image cannot be read or has more than 8
    bits a channel.
    """

    def __init__(
        self, samples: Sequence[Sample], image_size: tuple[int, int], *, filter: str = "lanczos"
    ) -> None:
        height, width = image_size
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be (height, width) of at least 1 pixel each; got {image_size}")
        if filter not in FILTERS:
            raise ValueError(f"unknown filter {filter!r}; known: {', '.join(FILTERS)}")
        self.samples = tuple(samples)
        self.image_size = (height, width)
        self.filter = filter

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return _opened(self.samples[index], self._tensor)

    def _tensor(self, image: Image.Image) -> torch.Tensor:
        height, width = self.image_size
        # A grey image is resized once, not thrice: its channels are equal, and resizing keeps them so.
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling[self.filter.upper()])
        # Channel by channel Pillow copies out twice as fast as it makes the array that is then permuted.
        planes = [channel.tobytes() for channel in image.split()]
        content = bytearray().join(planes if len(planes) == 3 else planes * 3)
        return torch.frombuffer(content, dtype=torch.uint8).view(3, height, width)


def readable(samples: Sequence[Sample], *, workers: int = 0) -> tuple[list[Sample], list[Sample]]:
    """(kept, unreadable): the samples whose images can be read, and those whose can't, both in order.

    Every image is decoded whole, by `workers` processes or this one. The first unreadable files are logged by
    name with the reason, and all are counted by modality.
    """
    samples = tuple(samples)
    if samples:
        _log.info("Checking that %d images can be read", len(samples))
    checked = Batches(_Reasons(samples), list, batch_size=_CHECKED, workers=workers)
    reasons = [reason for batch in checked for reason in batch]
    kept: list[Sample] = []
    unreadable: list[Sample] = []
    for sample, reason in zip(samples, reasons, strict=True):
        (kept if reason is None else unreadable).append(sample)
        if reason is not None and len(unreadable) <= _NAMED:
            _log.warning("Left out: %s", reason)
    if unreadable:
        counts = Counter(str(sample.modality) for sample in unreadable)
        _log.warning(
            "Left out %d of %d images that can't be read: %s",
            len(unreadable),
            len(samples),
            ", ".join(f"{count} {modality}" for modality, count in sorted(counts.items())),
        )
    return kept, unreadable


class _Reasons(Dataset[str | None]):
    """Why a sample's image can't be read; None where it can."""

    def __init__(self, samples: tuple[Sample, ...]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> str | None:
        try:
            _opened(self.samples[index], lambda image: image.load())
        except DatasetError as error:
            return str(error)
        return None


def _opened(sample: Sample, use: Callable[[Image.Image], Result]) -> Result:
    """What `use` makes of the sample's image; DatasetError naming the file where it can't be decoded."""
    try:
        with Image.open(sample.path) as image:
            # Pillow cuts such values off at 255, and nothing says which of them is white.
            if image.mode.startswith(("I", "F")):
                raise DatasetError(
                    f"{sample.path}: expected 8 bits a channel; found Pillow's mode {image.mode}. Scale the "
                    "data set's images to 8 bits first"
                )
            return use(image)
    except DatasetError:
        raise
    except _DAMAGED as error:
        raise DatasetError(
            f"{sample.path}: expected a readable image of identity {sample.identity}, camera "
            f"{sample.camera}; found: {error}. Copy the file from the data set again"
        ) from error
