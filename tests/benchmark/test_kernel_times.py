"""benchmarks/kernel_times.py: what it makes of the profiler's events; the events need a GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def kernel_times() -> ModuleType:
    return load_script("benchmarks/kernel_times.py")


def test_a_kernel_is_known_by_its_place_in_a_call(kernel_times: ModuleType) -> None:
    """A call may launch a kernel twice; one slow call of three doesn't change the median."""
    found = [
        kernel_times.Kernel(name, 10.0 * call + place, time + (100.0 if call == 1 else 0.0))
        for call in range(3)
        for place, (name, time) in enumerate([("sums", 4.0), ("copy", 1.0), ("sums", 6.0)])
    ]
    assert kernel_times.medians(found, 3) == [("sums", 4.0), ("copy", 1.0), ("sums", 6.0)]


def test_a_kernel_of_unequal_calls_has_its_mean_time(kernel_times: ModuleType) -> None:
    found = [kernel_times.Kernel(name, 0.0, 3.0) for name in ("a", "b", "a")]
    assert kernel_times.medians(found, 2) == [("a", 3.0), ("b", 1.5)]
    assert kernel_times.medians([], 2) == []


def test_the_lines(kernel_times: ModuleType) -> None:
    lines = kernel_times.lines("case", [("first", 4.0), ("second", 6.0)], 5.0)
    assert lines == ["case: 10.0 us, 2.00 floors of 5.0 us", "       4.0  first", "       6.0  second"]
    assert kernel_times.lines("case", [("first", 4.0)], None)[0] == "case: 4.0 us"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_message_says_that_there_is_no_gpu(
    kernel_times: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernel_times.main([]) == 2
    assert "there is no GPU here that torch can use" in capsys.readouterr().err
