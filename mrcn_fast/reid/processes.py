"""The processes of a run on several devices: what they exchange, and how they end together."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

import torch
from lightning_fabric import Fabric
from torch import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")

# Seconds between two signs of life, how many may be missing, and seconds in which a process ends by itself.
_PERIOD: Final = 1.0
_MISSING: Final = 20
_GRACE: Final = 10.0


class ProcessError(RuntimeError):
    """Another process of the run has ended or can't be reached."""


class _OtherFailedError(RuntimeError):
    """The failure of another process, which that process reports."""


def is_first() -> bool:
    """Whether this process writes the files and messages of a run: the first one, or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


class Processes:
    """The processes of a run, of which this is number `rank` of `count`.

    Where a method exchanges values, all processes must call it in the same order. The values go through the
    hosts (gloo), and no GPU waits for them. A single process gets back what it gives.

    Example:
        >>> processes = Processes(open_fabric("cpu", "32-true"))
        >>> processes.count, processes.means([2.0, 4.0])
        (1, [2.0, 4.0])
        >>> processes.each(str, [1, 2, 3])
        ['1', '2', '3']
    """

    def __init__(self, fabric: Fabric) -> None:
        self.rank, self.count = fabric.global_rank, fabric.world_size

    @property
    def first(self) -> bool:
        """Whether this process writes the files and messages of the run."""
        return self.rank == 0

    def means(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the processes; it is the same in all of them."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums, group=_hosts())
        means: list[float] = (sums / self.count).tolist()
        return means

    def gathered(self, value: Item) -> list[Item]:
        """The values of all processes, in their order."""
        if self.count == 1:
            return [value]
        values: list[Item] = [value] * self.count
        distributed.all_gather_object(values, value, group=_hosts())
        return values

    def from_first(self, function: Callable[[], Result]) -> Result | None:
        """Call a function in the first process alone, and wait for it; returns its result in all."""
        return self.gathered(function() if self.first else None)[0]

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.gathered(None)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this process: every `count`-th one, from number `rank` on."""
        return items[self.rank :: self.count]

    def each(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Apply a function to items, each of which one process works on; returns all results, in order."""
        shares = self.gathered([function(item) for item in self.share(items)])
        return [shares[number % self.count][number // self.count] for number in range(len(items))]

    @contextmanager
    def together(self, advice: Callable[[], str] = str) -> Iterator[None]:
        """A context in which an exception in one process ends all of them, with one message.

        The first process that fails raises its exception. The others raise SystemExit with status 1, or with
        the status of the failing process where that ended by SystemExit or KeyboardInterrupt. Where a process
        vanishes without an exception, ProcessError is raised; `advice` gives the end of its message.
        """
        if self.count == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            lost = _lost(error)
            if lost and threading.current_thread() is threading.main_thread():
                # The launcher sends it because of the lost process; this one is ending already.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if isinstance(error, _OtherFailedError):
                _watch().wait_for_failure(_GRACE)
            status = _watch().fail(_exit_status(error))
            if status is not None:
                raise SystemExit(status) from None
            if lost:
                raise ProcessError(
                    f"process {self.rank} of {self.count}: another process has ended or can't be reached, "
                    f"and so this one ends. {advice()}".rstrip()
                ) from error
            raise


def connect(fabric: Fabric) -> None:
    """Prepare the exchanges between the processes that `fabric` has connected; all of them call this."""
    if fabric.world_size > 1:
        _hosts()
        _watch()


def other_failed() -> Exception:
    """The exception to raise where another process has failed and will report it."""
    return _OtherFailedError("another process of the run has failed")


@functools.cache
def _hosts() -> distributed.ProcessGroup:
    group = distributed.new_group(backend="gloo")
    assert isinstance(group, distributed.ProcessGroup)
    return group


@functools.cache
def _watch() -> _Watch:
    watch = _Watch(distributed.get_rank(), distributed.get_world_size())
    watch.start()
    atexit.register(watch.finish)
    return watch


def _lost(error: BaseException) -> bool:
    """Whether torch raised an error because it can't reach another process."""
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _exit_status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = error.code if isinstance(error, SystemExit) else 1
    return code if isinstance(code, int) else 1


class _Watch(threading.Thread):
    """Ends this process where another one has failed or has vanished, also where a GPU waits for it forever.

    The processes leave signs of life in the key-value store by which they found each other, and the status of
    the first failure. Each process watches the next one, and the last watches the first. The main thread has
    some seconds to end by itself; then the process is ended.
    """

    def __init__(self, rank: int, count: int) -> None:
        super().__init__(daemon=True, name="watch-processes")
        self._rank, self._count = rank, count
        self._launcher = os.getppid()
        self._prefix = f"mrcn-fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        # A connection of its own: that of torch's process groups may be waiting for something.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = distributed.TCPStore(host, port, is_master=False)  # type: ignore[attr-defined]
        self._failed = threading.Event()
        self._noted: str | None = None  # the process that failed first, and its status
        self._first_finished = False

    def fail(self, status: int) -> int | None:
        """Note that this process fails with an exit status; returns the status of an earlier failure."""
        own = f"{self._rank} {status}"
        with suppress(RuntimeError):  # the store may have ended with another process
            self._noted = self._noted or self._store.compare_set(self._key("failed"), "", own).decode()
            # The watching thread may not come to it before this process ends.
            self._store.set(self._key("noticed", self._rank), "")
            self._stay_for("noticed")
        return None if self._noted in (None, own) else int(self._noted.split()[1])

    def wait_for_failure(self, seconds: float) -> None:
        """Wait until another process has failed, but not longer than some seconds."""
        self._failed.wait(seconds)

    def finish(self) -> None:
        """Note that this process ends as it should."""
        with suppress(RuntimeError):  # the store may have ended with another process
            self._store.set(self._key("finished", self._rank), "")
            self._stay_for("finished")

    def _key(self, *names: object) -> str:
        return "/".join((self._prefix, *map(str, names)))

    def _stay_for(self, mark: str) -> None:
        """Let the first process wait until the others have left a mark in the store, which it may hold."""
        until = time.monotonic() + _GRACE / 2  # after _GRACE the watching thread ends the process
        others = [self._key(mark, rank) for rank in range(1, self._count)]
        while self._rank == 0 and time.monotonic() < until and not self._store.check(others):
            time.sleep(_PERIOD / 10)

    def run(self) -> None:
        """Leave signs of life until another process has failed or vanished, and then end this one."""
        try:
            reason = self._until_a_failure()
        except RuntimeError:
            if self._first_finished:  # and the store with it, as it should
                return
            reason = "the process that connects the others has ended"
        self._failed.set()
        time.sleep(_GRACE)
        if reason:
            print(f"mrcn-fast: process {self._rank} ends: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    def _until_a_failure(self) -> str | None:
        watched = (self._rank + 1) % self._count
        seen, missing, number = b"", 0, 0
        while True:
            number += 1
            self._store.set(self._key("alive", self._rank), str(number))
            if self._store.check([self._key("failed")]):
                self._noted = self._store.get(self._key("failed")).decode()
                self._store.set(self._key("noticed", self._rank), "")
                return None
            if os.getppid() != self._launcher:
                return "the process that started it has ended"
            self._first_finished = self._store.check([self._key("finished", 0)])
            if self._store.check([self._key("alive", watched)]):
                found = self._store.get(self._key("alive", watched))
                ended = self._store.check([self._key("finished", watched)])
                missing = 0 if ended or found != seen else missing + 1
                seen = found
            if missing > _MISSING:
                return f"process {watched} has given no sign of life for {missing * _PERIOD:.0f} s"
            time.sleep(_PERIOD)
