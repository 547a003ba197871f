"""Progress where stderr is no terminal: a line about what runs every 15 s, and one where a task ends."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from mrcn_fast import streams
from mrcn_fast.reid import console
from mrcn_fast.reid.console import ProgressLines, in_words, notice, progress_bars


def wait_for(file: io.StringIO, text: str) -> None:
    end = time.monotonic() + 20
    while text not in file.getvalue():
        assert time.monotonic() < end, file.getvalue()
        time.sleep(0.005)


def test_a_running_task_has_a_line_at_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_LINES", 0.02)
    file = io.StringIO()
    with ProgressLines(Console(file=file, width=40)) as bars:
        unknown = bars.add_task("images", total=None, status="")
        wait_for(file, "images: begun\nimages: begun\n")
        bars.update(unknown, total=3, completed=3)
        task = bars.add_task("steps of mrcn", total=400, status="")
        bars.update(task, completed=100)
        time.sleep(0.01)
        bars.update(task, completed=120, status="epoch 2 loss 2.31 [a] accuracy 0.25")
        wait_for(file, "accuracy 0.25")
        bars.advance(task, 280)
    lines = file.getvalue().splitlines()
    # Long lines stay whole, and a finished task is mentioned once.
    going = r"steps of mrcn: 120 of 400, epoch 2 loss 2.31 \[a\] accuracy 0.25, about \S+ (s|minutes) left"
    assert any(re.fullmatch(going, line) for line in lines), lines
    assert len([line for line in lines if re.fullmatch(r"images: 3 of 3 done in \d+ s", line)]) == 1
    assert [line for line in lines if "done" in line and "mrcn" in line] == [lines[-1]]
    assert re.fullmatch(r"steps of mrcn: 400 of 400 done in \d+ s", lines[-1])


def test_no_line_comes_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SECONDS_BETWEEN_LINES", 0.01)
    file = io.StringIO()
    with ProgressLines(Console(file=file)) as bars:
        bars.add_task("stopped", total=2)
        wait_for(file, "stopped: 0 of 2\n")
    written = file.getvalue()
    time.sleep(0.05)
    assert file.getvalue() == written


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for watched in (False, True):
        monkeypatch.setattr(console, "console", Console(file=io.StringIO(), force_terminal=watched))
        assert isinstance(progress_bars(), ProgressLines) == (not watched)


def test_a_notice_has_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=file, width=60))
    notice("Look", "at [this]")
    first, text, last = file.getvalue().splitlines()
    assert "Look" in first and "at [this]" in text and {len(first), len(text), len(last)} == {60}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (89, "89 s"), (150, "2.5 minutes"), (7200, "2 hours"), (400000, "4.6 days")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
