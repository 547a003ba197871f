"""The memory of freed CPU outputs: whom it serves next, and how much of it is kept."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from mrcn_fast import MRCNBlock, release_memory
from tests import cases
from tests.processes import ROOT

PAGE = 4096
# 2 MiB a map, the least that is kept; in the second one a map is half as large again.
SHAPE, LARGER = (4, 64, 64, 32), (6, 64, 64, 32)

# MB that a release returns to the system, of maps of 8, then of 12 MB, four at once.
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


def pair(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    first, second = (cases.random(*shape, seed=seed + i, dtype=torch.float32) for i in range(2))
    return first, second


def places(maps: tuple[Tensor, ...]) -> list[int]:
    """Where the made maps lie; the first and last are the inputs."""
    return sorted(x.data_ptr() for x in maps[1:5])


@pytest.fixture
def block() -> MRCNBlock:
    torch.manual_seed(0)
    return MRCNBlock(SHAPE[1], backend="cpu").requires_grad_(False)


@cases.backends("cpu")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_freed_outputs_serve_the_next(backend: str, layout: torch.memory_format, block: MRCNBlock) -> None:
    inputs = [x.contiguous(memory_format=layout) for x in pair(SHAPE, 0)]
    release_memory()
    first = places(block(*inputs))
    second = places(block(*inputs))
    # Each begins at another line of a page maybe.
    assert all(abs(a - b) < PAGE for a, b in zip(first, second, strict=True))


@cases.backends("cpu")
def test_what_lives_is_nobody_elses(backend: str, block: MRCNBlock) -> None:
    kept = [block(*pair(SHAPE, seed)) for seed in (0, 10)]
    before = [[x.clone() for x in maps] for maps in kept]
    view = kept[1][1][0]
    kept[1:] = []
    for seed in range(20, 26):
        block(*pair(SHAPE if seed % 2 else LARGER, seed))
    assert all(torch.equal(*both) for both in zip(kept[0], before[0], strict=True))
    assert torch.equal(view, before[1][1][0])


@cases.backends("cpu")
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


@cases.backends("cpu")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_is_kept_than_was_in_use_at_once(backend: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KEPT], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    # Four maps of 12 MB, without the four of 8 before them; pages beside them may come and go.
    assert 46 < float(run.stdout) < 54
