"""Pages in Chromium without a window: whether they show what they should."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on PATH")

# Added to a copy of the page: it tells the frame around it what the browser made of the page.
_PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
images: [...document.images].map(image => image.naturalWidth),
shown: document.documentElement.clientWidth, needed: document.documentElement.scrollWidth}), "*"))</script>
"""
# Chromium has no window of less than 500 pixels, but a frame may be as narrow as a phone.
_FRAME = """<!DOCTYPE html><title>no answer</title><body style="margin:0">
<script>addEventListener("message", event => document.title = event.data)</script>
<iframe src="{src}" width="{width}" height="{height}" style="border:0"></iframe>
"""


class Seen(NamedTuple):
    """What the browser made of a page."""

    images: list[int]  # their widths; 0: not loaded
    shown: int  # the width of the page in pixels
    needed: int  # the width that its content needs
    console: list[str]  # lines of the console, which errors write
    screenshot: Path


def look(page: Path, folder: Path, *, width: int, height: int) -> Seen:
    """Open a page in a frame of this size; `folder` gets the browser's profile, copies and the screenshot."""
    copy, frame, screenshot = (folder / name for name in ("copy.html", "frame.html", "seen.png"))
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("<head>", f"<head>{_PROBE}", 1), encoding="utf-8")
    frame.write_text(_FRAME.format(src=copy.as_uri(), width=width, height=height), encoding="utf-8")
    size = f"--window-size={max(500, width)},{height}"
    done = _chromium(folder, size, "--virtual-time-budget=5000", "--dump-dom", frame.as_uri())
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found, f"Chromium gave no page: {done.stderr[-2000:]}"
    answer = json.loads(html.unescape(found[1]))
    _chromium(folder, size, f"--screenshot={screenshot}", frame.as_uri())
    return Seen(**answer, console=re.findall(r".*CONSOLE.*", done.stderr), screenshot=screenshot)


def _chromium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    quiet = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--hide-scrollbars",
    )
    logged = ("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}")
    return subprocess.run(
        [CHROMIUM, *quiet, *logged, *arguments], capture_output=True, text=True, timeout=240, check=True
    )
