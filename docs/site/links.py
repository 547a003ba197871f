"""The pages' links, which lead to files of the repository as written, and to pages of the site when built."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
# Pages of the site that lie outside docs/, by their place on the site.
OUTSIDE: Final = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "log.md": "benchmarks/LOG.md",
}
_PLACES: Final = {origin: place for place, origin in OUTSIDE.items()} | {"README.md": "README.md"}
_LINK: Final = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
# Code is matched too, so that what looks like a link in it stays.
_LINK_OR_CODE: Final = re.compile(rf"```.*?```|{_LINK.pattern}|`[^`\n]+`", re.DOTALL)


def links_of(markdown: str) -> Iterator[tuple[str, str]]:
    """List the links and pictures of a page that lead into the repository, each as (path, #anchor)."""
    for found in _LINK_OR_CODE.finditer(markdown):
        if not found[0].startswith("`") and not _is_address(found[3]):
            yield found[3], found[4] or ""


def target(place: str, path: str) -> str:
    """Name the file of the repository that a path leads to, from the page at a place of the site."""
    origin = OUTSIDE.get(place, f"docs/{place}")
    return os.path.normpath(os.path.join(os.path.dirname(origin), path))


def on_site(markdown: str, place: str) -> str:
    """Write a page's links for the site. What the site doesn't have is named without a link."""
    return _LINK_OR_CODE.sub(
        lambda found: found[0] if found[0].startswith("`") else _link_on_site(found, place), markdown
    )


def _is_address(path: str) -> bool:
    return path.startswith(("http:", "https:", "mailto:"))


def _link_on_site(link: re.Match[str], place: str) -> str:
    picture, text, path, anchor = link[1], link[2], link[3], link[4] or ""
    if not path or _is_address(path):
        return link[0]
    found = target(place, path)
    if found.startswith("docs/"):
        there = found.removeprefix("docs/")
    elif found in _PLACES:
        there = _PLACES[found]
    elif Path(found).parts[0] == "examples":
        there, anchor = "examples.md", f"#{Path(found).stem}"
    elif found.endswith((".png", ".svg")):
        there = found
    else:
        return text
    relative = os.path.relpath(there, os.path.dirname(place) or ".")
    return f"{picture}[{text}]({relative}{anchor})"
