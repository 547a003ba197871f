"""Check that the kernels are still fast, on a machine that may be busy with other work.

Absolute times are not compared, but the time of a baseline over the fused time, both measured in turn in one
process. The fastest round of each counts, which other processes disturb least. On any machine the ratio must
be more than half of that in the newest committed results of the case, so that only a kernel that lost its
advantage fails. One layout is compared with the other, with every instruction set that the machine has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mrcn_fast import MRCNBlock, backends
from mrcn_fast.benchmark import check
from mrcn_fast.benchmark.results import newest
from mrcn_fast.benchmark.suites.kernels import cases
from mrcn_fast.benchmark.timing import keep_pages_warm
from tests.support.processes import INSTRUCTION_SETS, instruction_set, run_pytest

RESULTS = Path(__file__).parent / "results" / "cpu-amd-epyc-zen4-2-threads.jsonl"
# Case -> its baseline.
BASELINES = {
    "block forward 16x64x72x32 nchw": "eager",
    "block forward+backward 16x64x72x32 nchw": "eager",
    "block forward 16x64x72x32 channels_last": "eager",
    "block forward+backward 16x64x72x32 channels_last": "eager",
    "cqc forward+backward 4x4x2048": "loop",
}
ROUNDS = 25


@pytest.mark.parametrize("name", BASELINES)
def test_the_ratio_to_the_baseline_holds(name: str) -> None:
    status = backends()["cpu"]
    if not status.usable:
        pytest.skip(status.reason)
    keep_pages_warm()
    (case,) = (case for case in cases() if case.name == name)
    calls = case.calls()
    check(calls)
    fused, plain = fastest([calls["fused"], calls[BASELINES[name]]])
    (results,) = newest(RESULTS).values()
    committed = results[name]["ratios"][BASELINES[name]]
    assert plain / fused > committed / 2, (
        f"{name}: {BASELINES[name]} takes {plain / fused:.1f} times the fused {1e3 * fused:.2f} ms; "
        f"committed results have {committed:.1f}"
    )


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_layouts_with_each_instruction_set(isa: str) -> None:
    run_pytest(__file__, "-k", "channels_last_costs", environment=instruction_set(isa))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_costs_at_most_twice_as_much(dtype: torch.dtype) -> None:
    if not backends()["cpu"].usable:
        pytest.skip(backends()["cpu"].reason)
    keep_pages_warm()
    block = MRCNBlock(256, backend="cpu")
    planes = torch.randn(2, 16, 256, 72, 32).to(dtype).unbind()
    pixels = [x.contiguous(memory_format=torch.channels_last) for x in planes]
    with torch.no_grad():
        one, other = fastest([lambda: block(*planes), lambda: block(*pixels)])
    assert other < 2 * one, f"channels_last takes {1e3 * other:.2f} ms, NCHW {1e3 * one:.2f}"


def fastest(calls: list[Callable[[], Any]]) -> list[float]:
    """Return the seconds of each call's fastest round; the calls take turns."""
    least = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            least[place] = min(least[place], time.perf_counter() - start)
    return least
