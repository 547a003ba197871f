"""Which files are images: the formats that are read, and the suffixes that a folder's images have.

The only place that says so, for every reader.
"""

from __future__ import annotations

from typing import Final

# The formats by Pillow's names. Pillow reads more, but some run other programs, as EPS does, and none of
# those is a data set's. The content decides about the format: a JPEG file named .bmp is read.
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
    """Whether a file of this name counts as an image of the data set.

    Case doesn't matter. Hidden names don't count: they are what archivers and file managers leave beside the
    images, such as "._0001.jpg".
    """
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)
