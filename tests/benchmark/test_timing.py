"""The checks of results, the times and the memory of calls; no test depends on a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from mrcn_fast import benchmark
from mrcn_fast.benchmark import timing
from mrcn_fast.benchmark.suites import problems
from mrcn_fast.benchmark.suites.problems import Problem


@pytest.mark.parametrize(
    "spoil",
    [
        lambda first, last: (first, last * float("nan")),
        lambda first, last: (first, last / 0.0),
        lambda first, last: (first, last[:, :1]),
    ],
    ids=["nan", "infinite", "another shape"],
)
def test_an_unfit_last_result_is_an_infinite_error(spoil: Callable[..., Any]) -> None:
    results = torch.ones(2), torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="off by inf"):
        benchmark.check({"fused": lambda: spoil(*results), "eager": lambda: results})


def test_a_wrong_second_call_is_found() -> None:
    """From the second call on, Triton's launches take another path."""
    right, wrong = (torch.ones(2),), (torch.tensor([1.0, 1.1]),)
    calls = iter([right, wrong])
    with pytest.raises(RuntimeError, match="at the second call"):
        benchmark.check({"fused": lambda: next(calls), "eager": lambda: right})


def test_the_peak_is_what_the_system_counts() -> None:
    def call() -> torch.Tensor:
        scratch = torch.ones(8 << 20)  # 32 MB
        return scratch[: 4 << 20].clone()

    call()
    peak = benchmark.peak_bytes(call)
    if peak is None:
        pytest.skip("this system doesn't tell what a process has at its peak")
    assert 47e6 < peak < 56e6


def test_saved_bytes_are_those_that_autograd_keeps() -> None:
    """The fused block keeps only statistics, four bytes per number; eager keeps six maps."""
    n, c = 2, 32
    calls = problems.map_calls(Problem("block", "forward+backward", (n, c, 9, 8)))
    # Of each plane the mean, what rounding left of it, and 1/σ; the hidden layers of four gates.
    assert 0 < timing.saved_bytes(calls["fused"]) <= 4 * n * (2 * 3 * c + 4 * 2)
    assert timing.saved_bytes(calls["eager"]) > 6 * 4 * n * c * 72
    x = torch.ones(5, requires_grad=True)
    assert timing.saved_bytes(lambda: torch.autograd.grad((x * x).sum(), x)) == 0
    assert timing.saved_bytes(lambda: torch.autograd.grad(x.exp().sum(), x)) == 20


class FakeEvent:
    """A GPU event for which the GPU is the host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.at - self.at)


def test_every_round_has_an_order_of_its_own() -> None:
    """No call always follows the same call, whose lines it would always find in the caches."""
    log: list[str] = []
    calls: timing.Calls = {name: partial(log.append, name) for name in "abcd"}
    timing.measure(calls, 0.0, least=40)
    rounds = [log[k : k + 4] for k in range(8, len(log), 4)]  # behind two calls of each to get ready
    assert len(rounds) == 40 and all(sorted(one) == list("abcd") for one in rounds)
    assert {one.index("a") for one in rounds} == {0, 1, 2, 3}
    before = {one[one.index("a") - 1] for one in rounds if one.index("a") > 0}
    assert before == {"b", "c", "d"}


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_calls_are_measured_in_turn_on_a_gpu(waits: bool, hot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call runs once per round, and behind a pause longer than its host takes, unless it waits itself.

    Before the call other data or the same call fills the cache.
    """
    log: list[str] = []
    fakes: dict[str, Callable[..., Any]] = {
        "Event": FakeEvent,
        "_sleep": lambda cycles: log.append(f"pause {cycles}"),
        "synchronize": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "pause_rate", lambda: 1e9)
    monkeypatch.setattr(timing, "cache_filler", lambda: lambda: log.append("fill"))

    def eager() -> None:
        time.sleep(2e-3)
        log.append("eager")

    forms: timing.Calls = {"fused": lambda: log.append("fused"), "eager": eager}
    timings, costs = timing.measure_gpu(forms, 0.0, waits, hot, least=3)
    entries = 2 if waits else 3  # of a call: the pause, what is in the cache, the call
    calls = [log[k : k + entries] for k in range(len(log) - 6 * entries, len(log), entries)]
    kinds = [entry[-1] for entry in calls]
    assert [entry[-2] for entry in calls] == (kinds if hot else ["fill"] * 6)
    if not waits:
        pauses = {
            kind: int(entry[0].removeprefix("pause ")) for kind, entry in zip(kinds, calls, strict=True)
        }
        assert pauses["fused"] >= 1e5 and pauses["eager"] >= (2 if hot else 1) * 1e9 * 4e-3
    assert [sorted(kinds[k : k + 2]) for k in (0, 2, 4)] == [["eager", "fused"]] * 3
    assert timings["eager"].median > 1.9e-3 > timings["fused"].median
    assert costs["eager"].host > 1.9e3 and costs["eager"].peak == 250
