"""The cases of `mrcn-fast bench kernels` under pytest-benchmark: ``pytest benchmarks``, grouped by case.

MRCN_FAST_BENCH_SUITE names the suite: table (default), stages or sweep. The cases run on the GPU if torch has
one, and else on the CPU. On a GPU, pytest-benchmark shows the host's times; a benchmark's extra_info has the
GPU's own, by its events, and whether the L2 cache was cold (filled with other data) or hot.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mrcn_fast.benchmark import EXACT, check
from mrcn_fast.benchmark.suites.kernels import cases
from mrcn_fast.benchmark.timing import TOLERANCES, Calls, keep_pages_warm, measure_gpu, unmeasurable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {case.name: case for case in cases(os.environ.get("MRCN_FAST_BENCH_SUITE", "table"), DEVICE)}
MAPS = ("fused", "eager", "instance_norm", "compile", "compile collapsed", "floor")
CALLS = {name: ("fused", "vectorized", "loop") if "cqc" in name else MAPS for name in CASES}


@pytest.fixture(scope="module", autouse=True)
def measurable() -> None:
    if reason := unmeasurable(DEVICE):
        pytest.skip(reason)
    keep_pages_warm()


@pytest.fixture(scope="module")
def calls_of() -> Callable[[str], Calls]:
    """Make and check the calls of a case once for all its benchmarks; only the last case's are kept."""
    kept: dict[str, Calls] = {}

    def get(name: str) -> Calls:
        if name not in kept:
            kept.clear()
            torch._dynamo.reset()
            calls = CASES[name].calls()
            check(calls, TOLERANCES[CASES[name].dtype])
            calls.pop(EXACT, None)
            kept[name] = calls
        return kept[name]

    return get


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in CASES for form in CALLS[name]])
def test_case(benchmark: Any, calls_of: Callable[[str], Calls], name: str, form: str) -> None:
    if form not in calls_of(name):
        pytest.skip("too large for the baselines")
    call = calls_of(name)[form]
    benchmark.group = name
    if DEVICE == "cpu":
        benchmark.pedantic(call, rounds=7, warmup_rounds=2)
        return
    timings, costs = measure_gpu({form: call}, 0.5, CASES[name].waits, CASES[name].hot)
    benchmark.extra_info |= {
        "gpu_ms": [round(1e3 * seconds, 4) for seconds in timings[form]],
        "l2": "hot" if CASES[name].hot else "cold",
        "peak_bytes": costs[form].peak,
    }

    def waited() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(waited, rounds=20, warmup_rounds=2)
