"""The console on stderr, for log lines and progress bars."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mrcn_fast.streams import silence


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on without output where the reader of stderr has gone; the command's result is elsewhere."""
        self.quiet = True
        silence(sys.stderr)


console = _Console(stderr=True)


def progress_bars(disable: bool = False) -> Progress:
    """Make progress bars with a text at the end (`status`); log lines appear above them."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=disable,
    )


def log_to_console(level: int = logging.INFO) -> None:
    """Show the library's log lines on the console; further calls change nothing."""
    logger = logging.getLogger("mrcn_fast")
    logger.setLevel(level)
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        handler = RichHandler(console=console, show_path=False, markup=False, highlighter=None)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
