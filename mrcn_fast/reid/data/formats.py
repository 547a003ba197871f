"""The formats and suffixes of image files, for the readers of all data sets."""

from __future__ import annotations

from typing import Final

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


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image of the data set; case doesn't matter.

    Hidden files don't count, because archivers and file managers leave some beside the images, such as
    "._0001.jpg".
    """
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)
