"""The cases of `mrcn_fast.benchmark` under pytest-benchmark: ``pytest benchmarks``, grouped by case.

Those of the suite that MRCN_FAST_BENCH_SUITE names (table, stages, sweep; default table), on the GPU where
torch has one and else on the CPU. A GPU's own times, by its events, stand in a benchmark's extra_info beside
the host's, with whether the L2 cache was cold (filled with something else) or hot.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mrcn_fast.benchmark import EXACT, check
from mrcn_fast.benchmark.command import unmeasurable
from mrcn_fast.benchmark.suites.kernels import cases
from mrcn_fast.benchmark.timing import TOLERANCES, keep_pages_warm, measure_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {case.name: case for case in cases(os.environ.get("MRCN_FAST_BENCH_SUITE", "table"), DEVICE)}
MAPS = ("fused", "eager", "instance_norm", "compile", "compile collapsed", "floor")
RIVALS = {name: ("fused", "vectorized", "loop") if "cqc" in name else MAPS for name in CASES}


@pytest.fixture(scope="module", autouse=True)
def measurable() -> None:
    if reason := unmeasurable(DEVICE):
        pytest.skip(reason)
    keep_pages_warm()


@pytest.fixture(scope="module")
def rivals_of() -> Callable[[str], dict[str, Callable[[], Any]]]:
    """The rivals of a case, made and checked once for its benchmarks; only the last case's are kept."""
    kept: dict[str, dict[str, Callable[[], Any]]] = {}

    def get(name: str) -> dict[str, Callable[[], Any]]:
        if name not in kept:
            kept.clear()
            torch._dynamo.reset()
            rivals = CASES[name].rivals()
            check(rivals, TOLERANCES[CASES[name].dtype])
            rivals.pop(EXACT, None)
            kept[name] = rivals
        return kept[name]

    return get


@pytest.mark.parametrize(("name", "rival"), [(name, rival) for name in CASES for rival in RIVALS[name]])
def test_case(benchmark: Any, rivals_of: Callable[..., Any], name: str, rival: str) -> None:
    if rival not in rivals_of(name):
        pytest.skip("too large for the plain forms")
    call = rivals_of(name)[rival]
    benchmark.group = name
    if DEVICE == "cpu":
        benchmark.pedantic(call, rounds=7, warmup_rounds=2)
        return
    timings, costs = measure_gpu({rival: call}, 0.5, CASES[name].waits, CASES[name].hot)
    benchmark.extra_info |= {
        "gpu_ms": [round(1e3 * seconds, 4) for seconds in timings[rival]],
        "l2": "hot" if CASES[name].hot else "cold",
        "peak_bytes": costs[rival].peak,
    }

    def waited() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(waited, rounds=20, warmup_rounds=2)
