"""Measure calls in turn on the CPU or a GPU, and the memory that a call takes.

On a GPU the time of a call is the time between two of the GPU's events. Before each call the L2 cache is
filled with other data; for a case that is hot, the same call fills it. A case that never waits for the GPU is
queued behind a pause on the GPU, so that its time is the GPU's alone; the host's time for a call is reported
beside it. A case that waits is timed with the host's part, as a user sees it: the loop and the vectorized
form of the loss wait to learn the number of identities.
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

from mrcn_fast import backends, dispatch, release_memory
from mrcn_fast.backends.cpu import memory_in_use

# What is timed in turn, by name: "fused", its baselines, and "floor".
Calls = dict[str, Callable[[], Any]]

# The name of a call that is not timed. The fused result is compared with its result where the baselines' own
# rounding is too coarse, or where they would not fit into memory.
EXACT: Final = "exact"

# The end of the name of a baseline that Inductor compiled with autotuning. Of a baseline's two compilations
# the faster one counts.
AUTOTUNED: Final = " autotuned"

# The largest error of the fused result, relative to the largest value, that is still rounding.
TOLERANCES: Final = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """One problem that is measured.

    Attributes:
        name: identifies the case in result files, so it never changes
        calls: makes the calls that are timed, among them "fused"
        goals: the limit of each goal. The name of a baseline: its time over the fused time, at least.
            "floor": the fused time over the floor's, at most. "host": microseconds of the host per fused
            call, at most. "memory": peak memory over the bytes of the results, at most.
        device: where it runs, as torch names devices
        dtype: of the feature maps
        waits: on a GPU: whether a baseline waits for the GPU by itself
        hot: on a GPU: whether the L2 cache holds what it can of the call before
        facts: what reports sort by: operation, way, shape, layout, dtype, bytes of a volume and of the
            results
    """

    name: str
    calls: Callable[[], Calls]
    goals: dict[str, float]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    waits: bool = False
    hot: bool = False
    facts: dict[str, Any] = {}  # noqa: RUF012  a NamedTuple's default, never written


class Timing(NamedTuple):
    """Seconds per call: 20th percentile, median, 80th percentile."""

    low: float
    median: float
    high: float


class Cost(NamedTuple):
    """What a call takes besides the GPU's time: microseconds of the host, and bytes at its peak."""

    host: float
    peak: int


def default_kernels(device: str) -> str:
    """Return the backend that serves a device's tensors where nothing was measured for them."""
    return "cpu" if torch.device(device).type == "cpu" else "triton"


def unmeasurable(device: str) -> str | None:
    """Return why nothing can be measured on ``device``, or None where it can."""
    wanted = os.environ.get(dispatch.ENVIRONMENT_VARIABLE) or "auto"
    serving = default_kernels(device)
    if wanted not in ("auto", serving):
        return (
            f"{dispatch.ENVIRONMENT_VARIABLE} is {wanted!r}, so that what is timed as the fused form would "
            f"not be {serving!r}; unset it"
        )
    if serving == "triton":
        if not torch.cuda.is_available():
            return (
                f"--device {device}: there is no GPU here that torch can use "
                "(torch.cuda.is_available() is False)"
            )
        if (torch.device(device).index or 0) >= torch.cuda.device_count():
            return f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here, counted from 0"
    status = backends()[serving]
    return None if status.usable else status.reason


def check_measurable(device: str) -> None:
    """Raise ValueError with the reason where nothing can be measured on ``device``."""
    if reason := unmeasurable(device):
        raise ValueError(f"nothing to measure: {reason}")


# --- the correctness gate -----------------------------------------------------------------------------


def largest_error(fused: Any, plain: Any) -> float:
    """Return the largest difference of any result, relative to the largest value of that result.

    It is infinite where a result has another shape, or a number that is not finite.
    """
    return max(_error(a, b) for a, b in zip(fused, plain, strict=True))


def _error(fused: Tensor, plain: Tensor) -> float:
    if fused.shape != plain.shape:
        return math.inf
    error = float((fused - plain).abs().max() / plain.abs().max().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def check(calls: Calls, tolerance: float = 1e-4) -> None:
    """Compare the fused results with a baseline's, twice, so that no wrong result is timed.

    Two calls are compared because the first one compiles and the second one may reach its kernels another
    way.

    Args:
        calls: the fused calls, whose names start with "fused", and one named EXACT, "eager" or "vectorized"
        tolerance: the largest relative error that passes

    Raises:
        RuntimeError: a fused result differs by more than the tolerance.
    """
    plain = next(calls[name] for name in (EXACT, "eager", "vectorized") if name in calls)
    for call in ("first", "second"):
        expected = plain()  # once, because each call takes the next set of tensors
        for name in (name for name in calls if name.startswith("fused")):
            error = largest_error(calls[name](), expected)
            if not error < tolerance:
                raise RuntimeError(
                    f"the {name} result is off by {error:.1e} (relative) at the {call} call, expected under "
                    f"{tolerance:.0e}"
                )


# --- the CPU -------------------------------------------------------------------------------------------


def measure(calls: Calls, seconds: float, least: int = 7) -> dict[str, Timing]:
    """Time the calls in turn, each once per round.

    Args:
        calls: what is timed
        seconds: how long rounds are started
        least: the smallest number of rounds
    """
    for call in calls.values():
        call()
        call()

    def timed(name: str) -> float:
        start = time.perf_counter()
        result = calls[name]()
        taken = time.perf_counter() - start
        del result
        return taken

    return _in_turn(calls, seconds, least, timed)


def _in_turn(calls: Calls, seconds: float, least: int, timed: Callable[[str], float]) -> dict[str, Timing]:
    """Time every call once per round by `timed`, which makes the call of a name and returns its seconds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    orders = _orders(calls)
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name in next(orders):
            taken[name].append(timed(name))
        rounds += 1
    return {name: Timing(*quantiles(times)) for name, times in taken.items()}


def _orders(calls: Calls) -> Iterator[list[str]]:
    """Draw the order of the calls anew for each round.

    A call pays for what the call before it left in the caches, such as the lines that a copy wrote. In a
    fixed order it would always pay for the same call.
    """
    shuffled = random.Random(0)
    while True:
        yield shuffled.sample(list(calls), len(calls))


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Return the 20th percentile, the median and the 80th percentile."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], statistics.median(times), cuts[7]


# glibc's numbers for the settings of mallopt, and the values that it starts with.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _MMAP_MAX = -3, -1, -4
_SMALL, _MANY = 128 * 1024, 65536

# Linux's numbers for setting and reading a flag with prctl.
_NO_HUGE_PAGES, _NO_HUGE_PAGES_NOW = 41, 42


def _mallopt(*settings: tuple[int, int]) -> bool:
    if platform.system() != "Linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(bool(mallopt(*setting)) for setting in settings)


def keep_pages_warm() -> bool:
    """Keep freed memory in the process, so that results lie on pages that were touched before (glibc only).

    Returns:
        Whether the C library took the setting.
    """
    return _mallopt((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))


def keep_pages_fresh() -> bool:
    """Give every large tensor new pages, and return them to the system with the tensor (glibc only).

    glibc itself does so with tensors of more than 32 MiB. The memory that mrcn_fast keeps for its outputs
    stays.

    Returns:
        Whether the C library took the setting.
    """
    return _mallopt((_MMAP_MAX, _MANY), (_MMAP_THRESHOLD, _SMALL))


def peak_bytes(call: Callable[[], Any], times: int = 3) -> int | None:
    """Return the peak memory of a call: by how many bytes the process grows while it runs.

    It includes scratch memory, results and what autograd keeps, as the system counts pages. Huge pages are
    turned off meanwhile: the one at a tensor's end would count whole, although its rest is free for the next
    tensor. A first call also makes what stays, such as compiled code and the threads' stacks: call once
    before.

    Args:
        call: what is measured
        times: how often; the smallest result counts

    Returns:
        The bytes; None where the system doesn't tell them.
    """
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.access(clear, os.W_OK) else None
    if trim is None:
        return None
    prctl = ctypes.CDLL(None).prctl
    before = prctl(_NO_HUGE_PAGES_NOW, 0, 0, 0, 0)
    prctl(_NO_HUGE_PAGES, 1, 0, 0, 0)
    try:
        # The smallest one, because whatever else the process does meanwhile only adds to it.
        return min(_grown(call, clear, status, trim) for _ in range(times))
    finally:
        prctl(_NO_HUGE_PAGES, before, 0, 0, 0)


class Growth(NamedTuple):
    """The memory that calls leave behind: bytes in use per call, and resident bytes of all calls."""

    in_use: float
    resident: int


def growth(call: Callable[[], Any], calls: int = 100, before: int = 10) -> Growth | None:
    """Return by how much repeated calls make the process larger, after their results are gone.

    Args:
        call: what is repeated
        calls: how many times it is counted
        before: how many calls come before; they fill what is kept for later calls

    Returns:
        The growth; None where the system doesn't tell it (without glibc 2.33).
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
    """Return the bytes that the C library has given out and that mrcn_fast holds.

    Returns:
        The bytes; None without glibc 2.33 or newer.
    """
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if platform.system() == "Linux" else None
    if mallinfo is None:
        return None
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return int(info.uordblks) + int(info.hblkhd) + sum(memory_in_use())


def saved_bytes(call: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps from the forward to the backward of a call that does both.

    Leaves that require gradients, such as inputs and parameters, don't count: their memory is there anyway.
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
    calls: Calls, seconds: float, waits: bool = False, hot: bool = False, least: int = 20
) -> tuple[dict[str, Timing], dict[str, Cost]]:
    """Time the calls in turn as `measure` does, by the GPU's events.

    Args:
        calls: what is timed
        seconds: how long rounds are started
        waits: whether a call waits for the GPU by itself; its time then includes the host's
        hot: whether the same call, in place of other data, fills the L2 cache before a call
        least: the smallest number of rounds
    """
    fill = cache_filler()
    costs = {name: cost_on_gpu(call) for name, call in calls.items()}
    rate = pause_rate()

    def timed(name: str) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if not waits:
            # Long enough for the host to queue the whole call: the GPU finds no gaps then.
            queued = 2 if hot else 1
            torch.cuda._sleep(int(rate * (2e-6 * queued * costs[name].host + 1e-4)))
        (calls[name] if hot else fill)()
        start.record()
        result = calls[name]()
        stop.record()
        stop.synchronize()
        del result
        return 1e-3 * start.elapsed_time(stop)

    return _in_turn(calls, seconds, least, timed), costs


def cost_on_gpu(call: Callable[[], Any], times: int = 20) -> Cost:
    """Return the cost of a call that finds the GPU idle, after it was compiled and its memory reserved."""
    for _ in range(3):
        call()
    host = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        host.append(1e6 * (time.perf_counter() - start))
        del result
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return Cost(statistics.median(host), torch.cuda.max_memory_allocated() - before)


def cache_filler() -> Callable[[], Any]:
    """Return a call that reads four times what the current GPU's L2 cache holds.

    It reads and doesn't write, so that the cache has no lines that the GPU must write later.
    """
    device = torch.cuda.current_device()
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.ones(size // 4, device=device).sum


def pause_rate(cycles: int = 20_000_000) -> float:
    """Return how many cycles `torch.cuda._sleep` counts per second."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    stop.record()
    stop.synchronize()
    return cycles / (1e-3 * start.elapsed_time(stop))
