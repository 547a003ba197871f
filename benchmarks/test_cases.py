"""The cases of `mrcn_fast.benchmark` under pytest-benchmark: ``pytest benchmarks``, grouped by case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mrcn_fast import backends, benchmark

CASES = {case.name: case for case in benchmark.cases()}
RIVALS = {
    "block": ("fused", "eager", "compile", "compile collapsed", "floor"),
    "cqc": ("fused", "vectorized", "loop"),
}


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    status = backends()["cpu"]
    if not status.usable:
        pytest.skip(status.reason)
    benchmark.keep_pages_warm()


@pytest.fixture(scope="module")
def rivals_of() -> Callable[[str], dict[str, Callable[[], Any]]]:
    """The rivals of a case, made and checked once for its benchmarks; only the last case's are kept."""
    kept: dict[str, dict[str, Callable[[], Any]]] = {}

    def get(name: str) -> dict[str, Callable[[], Any]]:
        if name not in kept:
            kept.clear()
            torch._dynamo.reset()
            kept[name] = CASES[name].rivals()
            benchmark.check(kept[name])
        return kept[name]

    return get


@pytest.mark.parametrize(("name", "rival"), [(n, r) for n in CASES for r in RIVALS[n.split()[0]]])
def test_case(benchmark: Any, rivals_of: Callable[..., Any], name: str, rival: str) -> None:
    benchmark.group = name
    call = rivals_of(name)[rival]
    benchmark.pedantic(call, rounds=7, warmup_rounds=2)
