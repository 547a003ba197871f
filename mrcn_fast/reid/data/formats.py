"""The formats and suffixes of image files, for the readers of all data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from PIL import Image

# The formats by Pillow's names. Pillow reads others too, of which some, such as EPS, run other programs, and
# no data set has those. The content says the format: a JPEG file named .bmp is read.
_SUFFIXES: Final = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
FORMATS: Final = tuple(_SUFFIXES)
SUFFIXES: Final = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)


# Pillow knows these by name only, or has other programs read them.
_NOT_READ: Final = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))


def is_image(name: str, suffixes: Sequence[str] = SUFFIXES) -> bool:
    """Whether a file of this name counts as an image of the data set; case doesn't matter.

    Hidden files don't count, because archivers and file managers leave some beside the images, such as
    "._0001.jpg".
    """
    return not name.startswith(".") and name.lower().endswith(tuple(suffixes))


def pillow_formats() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The formats that this Pillow reads by itself, and the suffixes of their files, both sorted.

    People's own images come in formats that no data set has, such as AVIF, GIF or JPEG 2000.
    """
    Image.init()
    formats = sorted(set(Image.OPEN) - _NOT_READ)
    # JPEG's reader makes MPO of files with several pictures, whose suffix is its own.
    suffixes = (s for s, name in Image.registered_extensions().items() if name in {*formats, "MPO"})
    return tuple(formats), tuple(sorted({*suffixes, *SUFFIXES}))
