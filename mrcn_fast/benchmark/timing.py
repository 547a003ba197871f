"""Cases and their interleaved timing, on the CPU and on a GPU; how much memory a call takes.

On a GPU time is what its events say. Before each call the cache is filled with something else or, where a
case says that it is hot, by the same call. What never waits for the GPU is queued behind a pause there: its
time is the GPU's alone, and what the host takes for a call stands beside it. What does wait, as the loop and
the vectorised form of the loss do to learn the number of identities, is timed as a user has it, host and all.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from mrcn_fast import release_memory
from mrcn_fast.backends.cpu import memory_in_use

Rivals = dict[str, Callable[[], Any]]

# Not timed: what the fused result is compared with where the plain forms' own rounding is too coarse, or
# they would not fit into memory.
EXACT: Final = "exact"

# Error of the fused result, relative to the largest value, that is still rounding.
TOLERANCES: Final = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """One thing that is measured: ``rivals()`` makes the callables, the fused one under "fused"."""

    name: str
    rivals: Callable[[], Rivals]
    # rival -> how many times its time must be of the fused one's; "floor" -> at most so many floors;
    # "host" -> at most so many microseconds of the host for a fused call; "memory" -> at most so many times
    # the bytes of what the call gives
    goals: dict[str, float]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    waits: bool = False  # a rival waits for the GPU by itself
    hot: bool = False  # on a GPU: the cache holds what it can of the call before
    # What a report sorts by: operation, way, shape, layout, dtype, bytes of a volume and of the results.
    facts: dict[str, Any] = {}  # noqa: RUF012  a NamedTuple's default, never written


class Timing(NamedTuple):
    """Seconds of one call: 20th percentile, median, 80th percentile."""

    low: float
    median: float
    high: float


class Cost(NamedTuple):
    """What a call takes besides the GPU's time: microseconds of the host, and bytes at its peak."""

    host: float
    peak: int


# --- the correctness gate -----------------------------------------------------------------------------


def largest_error(fused: Any, plain: Any) -> float:
    """The largest difference of any result, relative to the largest value of that result.

    Infinite where a result has another shape, or a number that is not finite.
    """
    return max(_error(a, b) for a, b in zip(fused, plain, strict=True))


def _error(fused: Tensor, plain: Tensor) -> float:
    if fused.shape != plain.shape:
        return math.inf
    error = float((fused - plain).abs().max() / plain.abs().max().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def check(rivals: Rivals, tolerance: float = 1e-4) -> None:
    """Raises RuntimeError where a fused result is not the plain one's; nothing is timed then.

    Of two calls, for the first one compiles, and the next may go another way to its kernels.
    """
    plain = next(rivals[name] for name in (EXACT, "eager", "vectorized") if name in rivals)
    for call in ("first", "second"):
        expected = plain()  # once, for each call takes the next set of tensors
        for name in (name for name in rivals if name.startswith("fused")):
            error = largest_error(rivals[name](), expected)
            if not error < tolerance:
                raise RuntimeError(
                    f"the {name} result is off by {error:.1e} (relative) at the {call} call, expected under "
                    f"{tolerance:.0e}"
                )


# --- the CPU -------------------------------------------------------------------------------------------


def measure(rivals: Rivals, seconds: float, least: int = 7) -> dict[str, Timing]:
    """Interleaved timing, one call of every rival a round, until ``seconds`` are over, at least so many."""
    for rival in rivals.values():
        rival()
        rival()
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    orders = _orders(rivals)
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name in next(orders):
            start = time.perf_counter()
            result = rivals[name]()
            taken[name].append(time.perf_counter() - start)
            del result
        rounds += 1
    return {name: Timing(*quantiles(times)) for name, times in taken.items()}


def _orders(rivals: Rivals) -> Iterator[list[str]]:
    """The rivals of each round, in an order drawn anew.

    A call pays for what the one before it left in the caches, such as the lines that a copy wrote; in one
    order it would always pay for the same one's.
    """
    shuffled = random.Random(0)
    while True:
        yield shuffled.sample(list(rivals), len(rivals))


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], statistics.median(times), cuts[7]


# glibc's names for what mallopt sets, and what it starts with.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _MMAP_MAX = -3, -1, -4
_SMALL, _MANY = 128 * 1024, 65536

# Linux' names for what prctl sets and tells.
_NO_HUGE_PAGES, _NO_HUGE_PAGES_NOW = 41, 42


def _mallopt(*settings: tuple[int, int]) -> bool:
    if platform.system() != "Linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(bool(mallopt(*setting)) for setting in settings)


def keep_pages_warm() -> bool:
    """Let freed memory stay with the process, so that outputs stand on pages touched before (glibc only)."""
    return _mallopt((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))


def keep_pages_fresh() -> bool:
    """Give every large tensor pages of its own, which the system takes back with it (glibc only).

    As glibc itself does with tensors beyond 32 MiB. What mrcn_fast keeps for its outputs stays with it.
    """
    return _mallopt((_MMAP_MAX, _MANY), (_MMAP_THRESHOLD, _SMALL))


def peak_bytes(call: Callable[[], Any], times: int = 3) -> int | None:
    """Bytes that the process grows by while `call` runs, at most; None where the system doesn't tell.

    Scratch memory, results and what autograd keeps, as the system counts pages: small ones, for a huge page
    at a tensor's end is resident whole, though the rest of it is free for what is made next. What a first
    call leaves for good, such as compiled code and the threads' stacks, is no part of it: call once before.
    """
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.access(clear, os.W_OK) else None
    if trim is None:
        return None
    prctl = ctypes.CDLL(None).prctl
    before = prctl(_NO_HUGE_PAGES_NOW, 0, 0, 0, 0)
    prctl(_NO_HUGE_PAGES, 1, 0, 0, 0)
    try:
        # The least of them: whatever else the process does meanwhile only adds.
        return min(_grown(call, clear, status, trim) for _ in range(times))
    finally:
        prctl(_NO_HUGE_PAGES, before, 0, 0, 0)


class Growth(NamedTuple):
    """What calls leave behind when their results are gone: bytes in use a call, and resident bytes in all."""

    in_use: float
    resident: int


def growth(call: Callable[[], Any], calls: int = 100, before: int = 10) -> Growth | None:
    """By how much repeated calls make the process larger; None where the system doesn't say (no glibc 2.33).

    The first calls fill what is kept for the next ones, and are not counted.
    """
    in_use, status = bytes_in_use(), Path("/proc/self/status")
    if in_use is None or not status.exists():
        return None
    for _ in range(before):
        call()
    gc.collect()
    used, resident = bytes_in_use(), _resident(status, "VmRSS")
    for _ in range(calls):
        call()
    gc.collect()
    now = bytes_in_use()
    assert used is not None and now is not None
    return Growth((now - used) / calls, _resident(status, "VmRSS") - resident)


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"),
            *("fordblks", "keepcost"),
        )
    ]


def bytes_in_use() -> int | None:
    """Bytes that the C library has given out and that mrcn_fast holds; None without glibc 2.33 or newer."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if platform.system() == "Linux" else None
    if mallinfo is None:
        return None
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return int(info.uordblks) + int(info.hblkhd) + sum(memory_in_use())


def saved_bytes(call: Callable[[], Any]) -> int:
    """Bytes that autograd keeps from the forward to the backward of a call that does both.

    In tensors of its own: memory of leaves that require gradients, such as inputs and parameters, is there
    anyway.
    """
    kept: dict[int, int] = {}
    given: set[int] = set()
    alive: list[Tensor] = []  # so that no address is given again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        if tensor.is_leaf and tensor.requires_grad:
            given.add(storage.data_ptr())
        alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(size for address, size in kept.items() if address not in given)


def _grown(call: Callable[[], Any], clear: Path, status: Path, trim: Callable[[int], object]) -> int:
    gc.collect()
    # Memory that is kept for later would be taken without growing.
    release_memory()
    trim(0)
    clear.write_text("5")  # the high-water mark begins at what is resident now
    before = _resident(status, "VmRSS")
    result = call()
    grown = _resident(status, "VmHWM") - before
    del result
    return max(grown, 0)


def _resident(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


# --- a GPU --------------------------------------------------------------------------------------------


def measure_gpu(
    rivals: Rivals, seconds: float, waits: bool = False, hot: bool = False, least: int = 20
) -> tuple[dict[str, Timing], dict[str, Cost]]:
    """As `measure`, by the GPU's events; unless the rivals wait by themselves, of the GPU's time alone."""
    fill = cache_filler()
    costs = {name: cost_on_gpu(rival) for name, rival in rivals.items()}
    rate = pause_rate()
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    orders = _orders(rivals)
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name in next(orders):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if not waits:
                # Long enough for the host to queue the whole call: the GPU finds no gaps then.
                calls = 2 if hot else 1
                torch.cuda._sleep(int(rate * (2e-6 * calls * costs[name].host + 1e-4)))
            (rivals[name] if hot else fill)()
            start.record()
            result = rivals[name]()
            stop.record()
            stop.synchronize()
            taken[name].append(1e-3 * start.elapsed_time(stop))
            del result
        rounds += 1
    return {name: Timing(*quantiles(times)) for name, times in taken.items()}, costs


def cost_on_gpu(rival: Callable[[], Any], calls: int = 20) -> Cost:
    """Of a call that finds the GPU idle, compiled and with its memory reserved."""
    for _ in range(3):
        rival()
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = rival()
        times.append(1e6 * (time.perf_counter() - start))
        del result
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rival()
    torch.cuda.synchronize()
    return Cost(statistics.median(times), torch.cuda.max_memory_allocated() - before)


def cache_filler() -> Callable[[], Any]:
    """Reads four times what the current GPU's L2 cache holds: no line is left there to be written later."""
    device = torch.cuda.current_device()
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.ones(size // 4, device=device).sum


def pause_rate(cycles: int = 20_000_000) -> float:
    """Cycles of `torch.cuda._sleep` a second."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    stop.record()
    stop.synchronize()
    return cycles / (1e-3 * start.elapsed_time(stop))
