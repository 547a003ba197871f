"""The images of samples as uint8 tensors, and the check which of them can be read."""

from __future__ import annotations

import logging
import operator
import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import Dataset

from mrcn_fast.reid.data.checks import identities_by_modality
from mrcn_fast.reid.data.formats import FORMATS
from mrcn_fast.reid.data.loading import Batches
from mrcn_fast.reid.data.types import UNKNOWN, DatasetError, Sample

# Pillow's filters by name. The field's preprocessing uses ANTIALIAS, the earlier name of lanczos.
FILTERS: Final = ("bilinear", "bicubic", "lanczos")

# The most unreadable files that are named in the log; further ones are only counted.
_NAMED: Final = 20
# The number of images that a process checks at a time.
_CHECKED: Final = 64
# The errors that Pillow raises for damaged files. Those of the first and last rows were seen.
_DAMAGED: Final = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, struct.error,
    EOFError, LookupError, ArithmeticError, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
# The operation that turns an image upright, by its EXIF orientation; 1 is upright.
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_log = logging.getLogger(__name__)


class PersonImages(Dataset[torch.Tensor]):
    """The images of `samples`, turned upright by their EXIF orientation, in RGB and resized.

    `images[i]` is a uint8 (3, height, width) tensor. Augmentation and normalization follow later, on whole
    batches (`Augmentation`, `normalize`).

    Args:
        samples: the images' files
        image_size: (height, width)
        filter: one of FILTERS
        formats: the formats that an image may have, by Pillow's names

    Raises:
        ValueError: for an unknown filter or a size below 1
        DatasetError: with the file, for an image that can't be read, has none of the `formats`, one channel
            of more than 8 bits, several pictures, or transparent pixels

    Of several channels of 16 bits, Pillow gives the higher 8.

    Example:
        >>> samples = open_dataset("regdb", "data/regdb").training().infrared
        >>> images = PersonImages(samples, (288, 128))
        >>> images[0].shape, len(images) == len(samples)
        (torch.Size([3, 288, 128]), True)
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: tuple[int, int],
        *,
        filter: str = "lanczos",
        formats: Sequence[str] = FORMATS,
    ) -> None:
        try:
            height, width = map(operator.index, image_size)
        except (TypeError, ValueError):
            height = width = 0
        if height < 1 or width < 1:
            raise ValueError(f"image_size must be (height, width) of at least 1 pixel each; got {image_size}")
        if filter not in FILTERS:
            raise ValueError(f"unknown filter {filter!r}; known: {', '.join(FILTERS)}")
        self.samples = tuple(samples)
        self.image_size = (height, width)
        self.filter = filter
        self.formats = tuple(formats)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = decoded(self.samples[index], self.formats)
        height, width = self.image_size
        # A grey image is resized as one channel, because resizing keeps equal channels equal.
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling[self.filter.upper()])
        # Pillow copies single channels twice as fast as it makes an array whose axes are then permuted.
        planes = [channel.tobytes() for channel in image.split()]
        content = bytearray().join(planes if len(planes) == 3 else planes * 3)
        return torch.frombuffer(content, dtype=torch.uint8).view(3, height, width)


def readable(
    samples: Sequence[Sample], *, workers: int = 0, formats: Sequence[str] = FORMATS
) -> tuple[list[Sample], list[Sample]]:
    """Split samples into (kept, unreadable), both in order, by whether their images can be read.

    Every image is decoded completely, by `workers` processes or by this one. The first unreadable files are
    logged with the reason, and all of them are counted by modality.
    """
    samples = tuple(samples)
    if samples:
        _log.info("Checking that %d images can be read", len(samples))
    checked = Batches(_Reasons(samples, tuple(formats)), list, batch_size=_CHECKED, workers=workers)
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


def check_left(
    kept: Sequence[Sample], unreadable: Sequence[Sample], part: str, *, identities: int = 1
) -> None:
    """Raise DatasetError where too few images remain without the `unreadable` ones.

    At least `identities` must have images of both modalities in `kept`. The message says `part`, "training"
    or "test", names an image and counts all. Without unreadable images nothing is checked.
    """
    left = identities_by_modality(kept)
    paired = left["visible"] & left["infrared"]
    if not unreadable or len(paired) >= identities:
        return
    lost, still = (Counter(sample.modality for sample in samples) for samples in (unreadable, kept))
    counts = ", ".join(f"{lost[m]} of {lost[m] + still[m]} {m} images" for m in left if lost[m])
    lacking = f"a batch needs {identities} different identities; got {len(paired)}"
    if not paired:
        gone = [f"no {modality} image is left" for modality, found in left.items() if not found]
        lacking = "; ".join([f"no {part} identity has images of both modalities", *gone])
    raise DatasetError(
        f"{unreadable[0].path}: this image can't be read, and without those that can't, {lacking}. Left out "
        f"were {counts}: copy them from the data set again"
    )


class _Reasons(Dataset[str | None]):
    """The reason why the image of each sample can't be read; None where it can."""

    def __init__(self, samples: tuple[Sample, ...], formats: tuple[str, ...]) -> None:
        self.samples = samples
        self.formats = formats

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> str | None:
        try:
            decoded(self.samples[index], self.formats)
        except DatasetError as error:
            return str(error)
        return None


def decoded(sample: Sample, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decode an image, upright, in Pillow's mode L or RGB. Raises DatasetError where that fails."""
    try:
        with Image.open(sample.path, formats=formats) as image:
            refusal = _refusal(image)
            if refusal is None:
                image.load()
                upright = _upright(image)
                refusal = _transparency(upright)
            if refusal is None:
                return upright if upright.mode in ("L", "RGB") else upright.convert("RGB")
    except _DAMAGED as error:
        raise DatasetError(_damaged(sample, _reason(sample, error, formats))) from error
    raise DatasetError(f"{sample.path}: {refusal}")


def _refusal(image: Image.Image) -> str | None:
    """The reason why an image can't be converted correctly, found before decoding; None where it can."""
    # Pillow clips such values at 255, and the file doesn't say which value is white.
    if image.mode.startswith(("I", "F")):
        return (
            f"expected 8 bits a channel; found Pillow's mode {image.mode}. Scale the data set's images to 8 "
            f"bits first"
        )
    # Phones store previews after the picture (MPO); the first picture is the image.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return f"expected one picture in the file; found several ({image.format}). Keep the one that is meant"
    return None


def _upright(image: Image.Image) -> Image.Image:
    """Turn a decoded image as its EXIF orientation says."""
    # ImageOps.exif_transpose isn't used, because it also rewrites the EXIF data and fails on unusual ones.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGED:
        # Viewers, too, show an image with unreadable EXIF data as it is stored.
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _transparency(image: Image.Image) -> str | None:
    """The reason to refuse an image that is transparent; None where every pixel is opaque."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    least, _ = image.convert("RGBA").getchannel("A").getextrema()
    if least == 255:
        return None
    return (
        "expected an opaque image; found transparent pixels, whose colour is arbitrary. Put it before a "
        "background first"
    )


def _damaged(sample: Sample, reason: str) -> str:
    if sample.identity == UNKNOWN:
        return (
            f"{sample.path}: expected a readable image; found: {reason}. Copy the file again, or leave "
            "it out with --skip-unreadable"
        )
    return (
        f"{sample.path}: expected a readable image of identity {sample.identity}, camera {sample.camera}; "
        f"found: {reason}. Copy the file from the data set again"
    )


def _reason(sample: Sample, error: BaseException, formats: tuple[str, ...]) -> str:
    """Say what is wrong with a file that can't be decoded."""
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.getsize(sample.path) == 0
        return "an empty file" if empty else f"content of none of the formats {', '.join(formats)}"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more pixels than a person's picture can have: {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"damaged data: {error}"
