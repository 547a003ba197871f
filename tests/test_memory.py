"""Memory of CPU calls: freed outputs' memory is used again, nothing leaks, and storages are torch's own."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from mrcn_fast import MRCNBlock, release_memory
from mrcn_fast.backends import cpu
from mrcn_fast.backends.cpu import memory_in_use
from mrcn_fast.benchmark.timing import bytes_in_use, growth
from mrcn_fast.memory import MemoryShortageError, enough_memory
from tests.support import block_cases, cqc_cases, matrix, tensors
from tests.support.block_cases import Case
from tests.support.cqc_cases import CQCCase
from tests.support.matrix import MODES
from tests.support.processes import ROOT

PAGE = 4096
# Maps of 2 MiB, the least that is kept for later outputs, and maps of 3 MiB.
SHAPE, LARGER = (4, 64, 64, 32), (6, 64, 64, 32)

# Prints how many MB a release returns to the system, after calls with four maps of 8 MB, then of 12 MB.
KEPT = """
import ctypes, torch, mrcn_fast
from mrcn_fast import MRCNBlock

def resident():
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

block = MRCNBlock(64)
for rows in (16, 24):
    maps = [torch.randn(rows, 64, 64, 32) for _ in range(2)]
    for _ in range(3):
        with torch.no_grad():
            block(*maps)
before = resident()
mrcn_fast.release_memory()
print(before - resident())
"""

# Forks while another thread takes and gives back memory, and prints how the last child ended, which freed a
# map. A child that can't is ended by SIGALRM.
FORKS = """
import os, signal, threading, torch
from mrcn_fast import MRCNBlock

def work():
    step = 0
    while not ended.is_set():
        block(*maps[step % len(maps)])
        step += 1

torch.set_num_threads(1)
block = MRCNBlock(16, backend="cpu").requires_grad_(False)
maps = [torch.randn(2, batch, 16, 64, 64) for batch in (24, 40, 12, 60, 33)]
made, ended, status = block(*maps[0]), threading.Event(), 0
thread = threading.Thread(target=work)
thread.start()
for _ in range(100):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        del made
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        break
ended.set()
thread.join()
print(status)
"""


def pair(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    first, second = (tensors.random(*shape, seed=seed + i, dtype=torch.float32) for i in range(2))
    return first, second


def places(maps: tuple[Tensor, ...]) -> list[int]:
    """The addresses of the maps that the block makes, which are all but the first and the last."""
    return sorted(x.data_ptr() for x in maps[1:5])


@pytest.fixture
def block() -> MRCNBlock:
    torch.manual_seed(0)
    return MRCNBlock(SHAPE[1], backend="cpu").requires_grad_(False)


@matrix.backends("cpu")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_freed_outputs_serve_the_next(backend: str, layout: torch.memory_format, block: MRCNBlock) -> None:
    inputs = [x.contiguous(memory_format=layout) for x in pair(SHAPE, 0)]
    release_memory()
    first = places(block(*inputs))
    second = places(block(*inputs))
    # Each begins at another line of a page maybe.
    assert all(abs(a - b) < PAGE for a, b in zip(first, second, strict=True))


@matrix.backends("cpu")
def test_what_lives_is_nobody_elses(backend: str, block: MRCNBlock) -> None:
    kept = [block(*pair(SHAPE, seed)) for seed in (0, 10)]
    before = [[x.clone() for x in maps] for maps in kept]
    view = kept[1][1][0]
    kept[1:] = []
    for seed in range(20, 26):
        block(*pair(SHAPE if seed % 2 else LARGER, seed))
    assert all(torch.equal(*both) for both in zip(kept[0], before[0], strict=True))
    assert torch.equal(view, before[1][1][0])


@matrix.backends("cpu")
def test_several_threads_take_and_give_back(backend: str, block: MRCNBlock) -> None:
    def results(seed: int) -> list[Tensor]:
        x, y = (x.requires_grad_() for x in pair(SHAPE, seed))
        made = block(x, y)[1:5]
        return [*made, *torch.autograd.grad(made, (x, y), [torch.ones_like(x)] * 4)]

    expected = [results(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for found, wanted in zip(threads.map(results, range(4)), expected, strict=True):
                assert all(map(torch.equal, found, wanted))


@matrix.backends("cpu")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_frees_outputs(backend: str) -> None:
    words = [sys.executable, "-W", "ignore", "-c", FORKS]
    run = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert run.stdout == "0\n"


@matrix.backends("cpu")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_is_kept_than_was_in_use_at_once(backend: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KEPT], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    # Four maps of 12 MB, without the earlier four of 8 MB; the allocator may use or free some pages besides.
    assert 46 < float(run.stdout) < 54


# --- nothing is left behind -------------------------------------------------------------------------------

counts_bytes = pytest.mark.skipif(bytes_in_use() is None, reason="no mallinfo2: glibc 2.33 or newer has it")


def left_behind(call: Callable[[], object], calls: int) -> float:
    """The bytes still in use after a call: the least of six measurements, since torch's tables grow too."""
    least = math.inf
    for _ in range(6):
        found = growth(call, calls, before=100)
        assert found is not None
        least = min(least, found.in_use)
        if least < 1:
            break
    return least


@counts_bytes
@matrix.backends("cpu")
@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "spatially sliced"])
@pytest.mark.parametrize("mode", MODES)
def test_a_block_call_leaves_no_byte(mode: str, layout: str, gradients: bool, backend: str) -> None:
    p = block_cases.problem(Case(mode, shape=(2, 16, 6, 5), layouts=(layout, layout)))

    def call() -> None:
        with torch.set_grad_enabled(gradients):
            outputs = block_cases.call(p.case, p.inputs, p.parameters, backend)
            if gradients:
                torch.autograd.grad(outputs, (*p.inputs, *p.parameters), p.gradients)

    assert left_behind(call, 300) < 1


@counts_bytes
@matrix.backends("cpu")
@pytest.mark.parametrize("stacked", [True, False])
def test_a_loss_call_leaves_no_byte(stacked: bool, backend: str) -> None:
    p = cqc_cases.problem(CQCCase((4, 4), (4, 4), 16, torch.float32, stacked, normalize=not stacked))
    assert left_behind(lambda: cqc_cases.evaluate(p, backend), 300) < 1


# Prints the resident MB after calls whose shapes change, and after calls with one shape.
RESIDENT = """
import sys, torch, mrcn_fast
from mrcn_fast import MRCNBlock
from mrcn_fast.benchmark.timing import _resident
from pathlib import Path

torch.set_num_threads(1)
changing, gradients, release, calls = (int(word) for word in sys.argv[1:])
block, marks = MRCNBlock(32), []
for k in range(calls):
    rows = 48 + (7 * k % 24 if changing else 24)
    visible, infrared = (torch.randn(1).expand(4, 32, rows, 96).clone() for _ in range(2))
    with torch.set_grad_enabled(bool(gradients)):
        made = block(visible.requires_grad_(bool(gradients)), infrared)
        if gradients:
            made.visible_compensated.sum().backward()
    if release:
        mrcn_fast.release_memory()
    if k % (calls // 4) == calls // 4 - 1:
        marks.append(_resident(Path("/proc/self/status"), "VmRSS") / 2**20)
print(*marks)
"""


@matrix.backends("cpu")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("release", [0, 1], ids=["kept", "released"])
@pytest.mark.parametrize("gradients", [0, 1], ids=["inference", "training"])
@pytest.mark.parametrize("changing", [0, 1], ids=["one shape", "changing shapes"])
def test_resident_memory_is_flat(changing: int, gradients: int, release: int, backend: str) -> None:
    words = [sys.executable, "-c", RESIDENT, *map(str, (changing, gradients, release, 400))]
    run = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    first, *later = map(float, run.stdout.split())
    assert max(later) < 1.1 * first


@matrix.backends("cpu")
def test_a_release_gives_back_all_that_is_kept(backend: str, block: MRCNBlock) -> None:
    release_memory()
    assert memory_in_use()[1] == 0
    kept = block(*pair(SHAPE, 0))
    block(*pair(SHAPE, 10))
    live, lying = memory_in_use()
    four = 4 * 4 * 64 * 64 * 32 * 4
    assert four <= live <= four + 4 * 2 * PAGE and four <= lying <= four + 4 * 2 * PAGE
    release_memory()
    assert memory_in_use() == (live, 0)
    del kept
    assert memory_in_use() == (0, live)


# --- storages are torch's own -----------------------------------------------------------------------------


@matrix.backends("cpu")
def test_the_library_makes_storages_here(backend: str) -> None:
    """Without it large outputs would be slow, and no other test would fail."""
    assert cpu.build_info()["memory"].startswith("that of freed outputs")


@matrix.backends("cpu")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_large_outputs_can_be_resized(backend: str, layout: torch.memory_format, block: MRCNBlock) -> None:
    """FSDP1 and some checkpointing wrappers free a storage in this way, and fill it again later."""
    release_memory()
    made = block(*(x.contiguous(memory_format=layout) for x in pair(SHAPE, 0))).visible_restituted
    before, storage = made.clone(), made.untyped_storage()
    size = storage.size()
    assert storage.resizable() and size == made.numel() * 4 and made.storage_offset() == 0
    live, _ = memory_in_use()
    storage.resize_(0)
    assert storage.size() == 0 and memory_in_use()[0] < live
    storage.resize_(size)
    made.copy_(before)
    assert torch.equal(made, before)
    storage.resize_(2 * size)  # keeps what is there
    assert torch.equal(made, before)


@matrix.backends("cpu")
def test_large_outputs_are_saved_shared_and_viewed(backend: str, block: MRCNBlock) -> None:
    made = block(*pair(SHAPE, 0)).infrared_restituted
    file = io.BytesIO()
    torch.save(made[1:3, ::2], file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), made[1:3, ::2])
    before = made.clone()
    made.share_memory_()
    assert torch.equal(made, before)
    with torch.inference_mode():
        assert block(*pair(SHAPE, 0)).infrared_restituted.is_inference()


@matrix.backends("cpu")
@pytest.mark.slow
def test_a_torch_that_it_was_not_compiled_for_works_without_it(backend: str) -> None:
    code = """
import torch
torch.__version__ = "0.0.0"
from mrcn_fast import MRCNBlock
from mrcn_fast.backends import cpu
block = MRCNBlock(64)
x = torch.randn(2, 4, 64, 64, 32)
made = block(*x)
assert made.visible_restituted.untyped_storage().resizable() and cpu.memory_in_use() == (0, 0)
print(cpu.build_info()["memory"])
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    assert "compiled for torch" in run.stdout and "0.0.0" in run.stdout


# --- too much ---------------------------------------------------------------------------------------------


@matrix.backends("cpu")
@pytest.mark.parametrize("rows", [2**42, 2**42 + 1, 2**43 - 1])
def test_a_view_of_any_size_is_refused(rows: int, backend: str) -> None:
    """The view has more bytes than 64 bits count, or than any machine has."""
    block = MRCNBlock(1, backend=backend).requires_grad_(False)
    view = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**20, rows)
    with pytest.raises(RuntimeError, match=r"more bytes than 64 bits count; use smaller maps"):
        block.restitute(view, "visible")
    assert block.restitute(torch.randn(1, 1, 2, 2), "visible").isfinite().all()


@matrix.backends("cpu")
@pytest.mark.parametrize("shape", [(2**40, 1, 2, 2), (1, 1, 2**20, 2**22)])
def test_an_allocation_that_fails_says_how_much_it_wanted(shape: tuple[int, ...], backend: str) -> None:
    block = MRCNBlock(1, backend=backend).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"can't allocate \d{13,} bytes; use a smaller batch"):
        block.restitute(torch.zeros(1, 1, 1, 1).expand(shape), "visible")
    with (
        pytest.raises(MemoryShortageError, match=r"for a step, could not allocate \d{13,} bytes"),
        enough_memory("a step", "Take a smaller batch"),
    ):
        block.restitute(torch.zeros(1, 1, 1, 1).expand(shape), "visible")
    assert block.restitute(torch.randn(1, 1, 2, 2), "visible").isfinite().all()
