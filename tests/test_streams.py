"""What is printed on streams that lack signs, are full, or are not read."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrcn_fast import cli, streams
from mrcn_fast.streams import announced, printable

TEXT = "50 ± 2 – 16×64 é δ"


def printed(text: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> bytes:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with printable():
        print(text, end="")
    assert stream.errors == "strict"
    stream.flush()
    return raw.getvalue()


def test_every_stream_takes_every_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(TEXT, "utf-8", monkeypatch) == TEXT.encode()
    assert printed(TEXT, "ascii", monkeypatch) == rb"50 +/- 2 - 16x64 \xe9 delta"
    assert printed(TEXT, "latin-1", monkeypatch) == b"50 \xb1 2 - 16\xd764 \xe9 delta"
    for encoding in ("utf-8", "ascii"):
        # A file name's bytes, whatever they are; what is neither byte nor sign.
        assert printed(os.fsdecode(b"a\xff\xb1"), encoding, monkeypatch) == b"a\xff\xb1"
        assert printed("a\ud800", encoding, monkeypatch) == rb"a\ud800"


def test_streams_of_other_makers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with printable():
        print(TEXT)
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info"]) == 0


def info(**options: object) -> subprocess.CompletedProcess[bytes]:
    """`mrcn-fast info` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(  # type: ignore[call-overload]
        [sys.executable, "-m", "mrcn_fast.cli", "info"], stderr=subprocess.PIPE, env=environment, **options
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_what_is_printed(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = info(stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said() -> None:
    with open("/dev/full", "wb") as full:
        done = info(stdout=full)
    assert done.returncode == 2
    assert done.stderr == b"mrcn-fast: error: the output: No space left on device\n"


def test_a_long_step_is_announced_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_LINES", 0.02)
    with announced("compiling two baselines"):
        time.sleep(0.2)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "compiling two baselines"
    assert others and all(re.fullmatch(r"compiling two baselines: \d+ s so far", line) for line in others)
    time.sleep(0.05)
    assert not capsys.readouterr().err
