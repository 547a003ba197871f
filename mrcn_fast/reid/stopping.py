"""Ctrl-C and SIGTERM, by which a run is asked to end after its step.

A terminal and a scheduler send such a signal to the processes that decode images, too. These outlive it, so
that the run can take its step to the end.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

# The signals, and Python's own handling of each.
_DEFAULTS: Final[dict[signal.Signals, Any]] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class StopRequests:
    """A context in which the first Ctrl-C or SIGTERM is noted as `received` instead of ending the process.

    The second signal has its usual effect. A signal that the caller handles or ignores stays as it is, and so
    does a handler that is set within the context. In a thread other than the main one, where Python sets no
    handlers, the context changes nothing.

    Example:
        >>> with StopRequests() as requests:
        ...     signal.raise_signal(signal.SIGTERM)
        >>> requests.received.name
        'SIGTERM'
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._replaced: list[signal.Signals] = []
        self._at_once = False

    def __enter__(self) -> StopRequests:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._replaced = [number for number in _DEFAULTS if signal.getsignal(number) == _DEFAULTS[number]]
            for number in self._replaced:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if self._at_once:
            self.grant()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context within this one, in which a signal is granted at once."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _restore(self) -> None:
        while self._replaced:
            number = self._replaced.pop()
            if signal.getsignal(number) == self._note:
                signal.signal(number, _DEFAULTS[number])

    def grant(self) -> None:
        """End with what the received signal means, if there is one.

        Raises KeyboardInterrupt for Ctrl-C, and SystemExit with status 143, as shells give it, for SIGTERM.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)


def outlive_one_signal(worker: int) -> None:
    """Make a DataLoader's process ignore the first Ctrl-C and SIGTERM; its `worker_init_fn`.

    The process ends with the one that it serves, and at the second signal.
    """
    for number in _DEFAULTS:
        signal.signal(number, _end_at_the_next)


def _end_at_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
