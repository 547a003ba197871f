"""What a search found: as text for a terminal, as JSON, and as a page with the pictures in it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from PIL import Image

from mrcn_fast.files import write_atomically
from mrcn_fast.reid.data.formats import pillow_formats
from mrcn_fast.reid.data.images import decoded
from mrcn_fast.reid.data.types import UNKNOWN, DatasetError, Sample
from mrcn_fast.reid.search.features import Features
from mrcn_fast.reid.search.nearest import Hits

# The largest width and height of a picture in a page.
_PICTURE: Final = (96, 192)
_HEAD: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Search results</title>
<style>
body { font: 14px system-ui, sans-serif; margin: 1.5rem; }
section { border-top: 1px solid #bbb; padding: .75rem 0; }
ol { display: flex; flex-wrap: wrap; gap: .5rem; list-style: none; margin: 0; padding: 0; }
figure { margin: 0; width: 112px; overflow-wrap: anywhere; }
figure img { width: 96px; }
.query { padding-right: .5rem; border-right: 4px solid #888; }
.missing { display: block; width: 96px; height: 64px; border: 1px dashed #888; color: #666; }
</style>
</head>
<body>
"""


class Hit(NamedTuple):
    """A gallery image that was found for a query."""

    rank: int  # from 1
    row: int  # in the gallery
    name: str
    score: float


@dataclass(frozen=True)
class Found:
    """The result of a search: queries, gallery, and the hits of each query."""

    query: Features
    gallery: Features
    hits: Hits
    notes: tuple[str, ...] = ()  # sentences about the search, such as an index's recall

    def of(self, query: int) -> list[Hit]:
        """The hits of a query, the nearest first."""
        scores, rows = self.hits.scores[query].tolist(), self.hits.rows[query].tolist()
        return [
            Hit(rank, row, self.gallery.name(row), score)
            for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
            if row >= 0
        ]


def as_text(found: Found, most: int) -> Iterator[str]:
    """Describe the hits of the first `most` queries in lines for a terminal."""
    count = found.query.rows.count
    for query in range(min(most, count)):
        yield visible(found.query.name(query))
        for hit in found.of(query):
            yield f"{hit.rank:6d}  {hit.score:7.4f}  {visible(hit.name)}"
    if count > most:
        yield f"{count - most} more queries aren't shown: --json or --html write all {count}"
    yield from found.notes


def as_json(found: Found) -> dict[str, Any]:
    """Put the hits into plain values. A byte of a name that is no UTF-8 is a lone surrogate, as in Python."""
    return {
        "query": found.query.origin,
        "gallery": found.gallery.origin,
        "notes": list(found.notes),
        "queries": [
            {"name": found.query.name(query), "hits": [hit._asdict() for hit in found.of(query)]}
            for query in range(found.query.rows.count)
        ],
    }


def write_page(path: str | Path, found: Found) -> None:
    """Write the hits as a page whose pictures are inside it, query by query. Raises OSError.

    A picture that isn't there or can't be read is replaced by the reason.
    """

    def write(file: BinaryIO) -> None:
        for part in _page(found):
            file.write(part.encode())

    write_atomically(path, write)


def visible(name: str) -> str:
    """Make all characters of a name visible: controls, format marks and bytes of no text are escaped."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape", "surrogatepass").decode()
        for sign in name
    )


def _page(found: Found) -> Iterator[str]:
    yield _HEAD
    origins = (html.escape(visible(side.origin)) for side in (found.query, found.gallery))
    yield "<h1>{} in {}</h1>\n".format(*origins)
    yield "<p>Scores are cosine similarities: 1 is the same direction, 0 a right angle.</p>\n"
    yield from (f"<p>{html.escape(visible(note))}</p>\n" for note in found.notes)
    for query in range(found.query.rows.count):
        yield "<section><ol>\n"
        yield _figure("query", "query", found.query, query)
        for hit in found.of(query):
            yield _figure("hit", f"{hit.rank}: {hit.score:.4f}", found.gallery, hit.row)
        yield "</ol></section>\n"
    yield "</body>\n</html>\n"


def _figure(kind: str, title: str, features: Features, row: int) -> str:
    name = html.escape(visible(features.name(row)))
    try:
        shown = f'<img src="{_picture(features.picture(row))}" alt="{name}">'
    except DatasetError as error:
        shown = f'<span class="missing" title="{html.escape(visible(str(error)))}">no picture</span>'
    caption = f"<figcaption><b>{html.escape(title)}</b><br>{name}</figcaption>"
    return f'<li class="{kind}"><figure>{shown}{caption}</figure></li>\n'


def _picture(path: Path | None) -> str:
    """A small picture of an image file as a data URI. Raises DatasetError where there is none."""
    if path is None:
        raise DatasetError("the features have no names and folder of their images")
    formats, _ = pillow_formats()
    image = decoded(Sample(path, UNKNOWN, UNKNOWN, "visible"), formats)
    image.thumbnail(_PICTURE, Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
