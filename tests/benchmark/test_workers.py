"""Cases that are measured in this process or in several."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mrcn_fast import benchmark, cli
from mrcn_fast.benchmark import Case, workers
from mrcn_fast.benchmark.suites import kernels


def test_a_wrong_result_is_not_timed() -> None:
    case = Case("wrong", lambda: {"fused": wrong, "eager": right}, {})
    with pytest.raises(RuntimeError, match="the fused result is off by"):
        workers.measured_case(case, 0.0)


def test_a_wrong_case_is_reported_and_the_next_one_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [sums("first"), sums("wrong", off=1.0), sums("last")]
    monkeypatch.setattr(kernels, "cases", lambda *_: chosen)
    file = tmp_path / "x.jsonl"
    assert cli.main(["bench", "kernels", "--seconds", "0", "--out", str(file)]) == 1
    assert [json.loads(line)["case"] for line in file.read_text().splitlines()] == ["first", "last"]
    assert "wrong: RuntimeError: the fused result is off by" in capsys.readouterr().err


def test_a_baseline_that_does_not_compile_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def backend(*_: object) -> None:
        raise ValueError("64 v.s. 1024")

    broken = torch.compile(right, backend=backend)
    calls = {"fused": right, "eager": right, "compile": right, "compile collapsed": broken}
    found = workers.measured_case(Case("of two", lambda: dict(calls), {"compile collapsed": 2.0}), 0.0)
    assert found["refused"] == {"compile collapsed": "ValueError('64 v.s. 1024')"}
    assert "compile" in found["ratios"] and "compile collapsed" not in found["ratios"]
    assert found["missed"] == []
    benchmark.print_row(found)
    assert "compile collapsed does not compile: ValueError" in capsys.readouterr().out


def right() -> tuple[torch.Tensor]:
    return (torch.ones(2),)


def wrong() -> tuple[torch.Tensor]:
    return (torch.tensor([1.0, 1.1]),)


def test_cases_prepared_side_by_side_are_timed_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong second case is reported, and the others have results."""
    chosen = [sums("first"), sums("wrong", off=1.0), sums("gone"), sums("last")]
    monkeypatch.setattr(kernels, "cases", lambda *_: chosen)
    file = tmp_path / "x.jsonl"
    status = cli.main(["bench", "kernels", "--workers", "3", "--seconds", "0.01", "--out", str(file)])
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["first", "last"]
    assert all(line["ms"].keys() == {"fused", "eager"} and line["commit"] for line in lines)
    assert status == 1
    assert "wrong: RuntimeError: the fused result is off by" in printed.err
    assert "gone: the process that prepared it has ended" in printed.err


def sums(name: str, off: float = 0.0) -> Case:
    return Case(name, partial(_sums, name, off), {})


def _sums(name: str, off: float) -> dict[str, Callable[[], Any]]:
    """Make the calls of a case. It is a function of the module, because another process makes them."""
    if name == "gone":
        os._exit(1)
    x = torch.ones(8)
    return {"fused": lambda: (x + off,), "eager": lambda: (x,)}


def test_cases_are_shared_out_by_their_compilations() -> None:
    chosen = [sums("forward"), sums("forward+backward"), sums("forward"), sums("forward")]
    assert workers.shared_out(chosen, 2) == [[1, 3], [0, 2]]
    assert workers.shared_out(chosen, 9) == [[1], [0], [2], [3]]
