"""The console on stderr, for log lines, notices and progress: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mrcn_fast import streams


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on without output where the reader of stderr has gone; the command's result is elsewhere."""
        self.quiet = True
        streams.silence(sys.stderr)


console = _Console(stderr=True)


class ProgressLines(Progress):
    """Progress for a log: a line about each running task every 15 s, and one where a task ends.

    Tasks are added and updated as those of rich's Progress.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write lines; further calls change nothing."""
        if self._thread is None:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._write_regularly, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Write no more lines."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def update(self, task_id: TaskID, **values: Any) -> None:
        """Update a task as rich's Progress does; write a line if it ends here."""
        with self._ending(task_id):
            super().update(task_id, **values)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task as rich's Progress does; write a line if it ends here."""
        with self._ending(task_id):
            super().advance(task_id, advance)

    @contextmanager
    def _ending(self, task_id: TaskID) -> Iterator[None]:
        ended = self._tasks[task_id].finished
        yield
        task = self._tasks[task_id]
        if task.finished and not ended:
            taken = in_words(task.finished_time or 0)
            self._write(f"{task.description}: {task.completed:.0f} of {task.total:.0f} done in {taken}")

    def _write_regularly(self) -> None:
        while not self._stopped.wait(streams.SECONDS_BETWEEN_LINES):
            for task in self.tasks:
                if not task.finished:
                    self._write(_state(task))

    def _write(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _state(task: Task) -> str:
    """Say how far a task is: "training mrcn: 120 of 400, loss 2.31, about 40 s left"."""
    parts = [f"{task.completed:.0f} of {task.total:.0f}" if task.total else "begun"]
    if status := task.fields.get("status"):
        parts.append(status)
    if task.time_remaining is not None:
        parts.append(f"about {in_words(task.time_remaining)} left")
    return f"{task.description}: {', '.join(parts)}"


def in_words(seconds: float) -> str:
    """Write a duration as people say it.

    >>> in_words(40), in_words(150), in_words(9000), in_words(400000)
    ('40 s', '2.5 minutes', '2.5 hours', '4.6 days')
    """
    units = {"s": 1, "minutes": 60, "hours": 3600}
    unit = next((unit for unit, size in units.items() if seconds < 90 * size), "days")
    digits = 0 if unit == "s" else 1
    return f"{seconds / units.get(unit, 86400):.{digits}f}".removesuffix(".0") + f" {unit}"


def progress_bars() -> Progress:
    """Make bars on a terminal, with a text at the end (`status`) and log lines above them, else lines."""
    if not console.is_terminal:
        return ProgressLines(console)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


def notice(title: str, text: str) -> None:
    """Show a text in a frame that nobody overlooks."""
    console.print(Panel(Text(text), title=title, border_style="bold red", width=min(console.width, 100)))


def log_to_console(level: int = logging.INFO) -> None:
    """Show the library's log lines on the console; further calls change nothing."""
    logger = logging.getLogger("mrcn_fast")
    logger.setLevel(level)
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        handler = RichHandler(console=console, show_path=False, markup=False, highlighter=None)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


@contextmanager
def log_to_file(path: Path, *, append: bool) -> Iterator[None]:
    """Write the log lines of this context into a file too, and the exception by which it ends, if any.

    The lines are those that the level of the logger "mrcn_fast" lets through, each with time and level. Those
    that can't be written are left out. Without a line there is no file. An existing file goes, or with
    `append` the lines come after its own.
    """
    logger = logging.getLogger("mrcn_fast")
    if not append:
        path.unlink(missing_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True, errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # A full disk stops a run by what it must write, and not by this file.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        ended = f"ended by {type(error).__name__}: {error}"
        handler.handle(logger.makeRecord(logger.name, logging.ERROR, "", 0, ended, (), None))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
