"""The benchmark's cases, goals and messages; its times are nobody's business here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mrcn_fast import benchmark
from mrcn_fast.benchmark import AUTOTUNED, EXACT, Cost, Timing

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def test_the_names_of_the_cpus_cases_stay() -> None:
    """Result files are only added to: a case's history is found by its name."""
    shapes = ("16x256x72x32", "16x64x72x32", "8x512x36x16")
    expected = [
        f"block {way} {shape} {layout}"
        for layout in ("nchw", "channels_last")
        for shape in shapes
        for way in ("forward", "forward+backward")
    ]
    assert [case.name for case in benchmark.cases()] == [*expected, "cqc forward+backward 4x4x2048"]
    assert {case.device for case in benchmark.cases()} == {"cpu"}


def test_a_gpu_has_cases_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--device", "cuda", "--dtype", "bf16", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "gpu block forward+backward 16x64x72x32 channels_last bf16" in names
    assert "gpu cqc forward+backward 16x8x2048 bf16" in names
    assert not any(name.endswith("fp32") for name in names)
    assert not {case.name for case in benchmark.cases()} & set(names)


@no_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert "nothing to measure: --device cuda: there is no GPU here" in said.err and not said.out


def test_a_cpu_knows_no_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--dtype", "bf16"]) == 2
    assert "--dtype is for --device cuda" in capsys.readouterr().err


# --- what is compared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", benchmark.TOLERANCES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", benchmark.LAYOUTS)
def test_the_blocks_rivals_are_right(layout: str, backward: bool, dtype: torch.dtype) -> None:
    rivals = benchmark.block_rivals((2, 8, 5, 4), layout, backward, "cpu", dtype)
    benchmark.check(rivals, benchmark.TOLERANCES[dtype])
    assert (EXACT in rivals) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", benchmark.TOLERANCES, ids=lambda dtype: str(dtype)[6:])
def test_the_losss_rivals_are_right(dtype: torch.dtype) -> None:
    benchmark.check(benchmark.cqc_rivals(3, 2, 33, "cpu", dtype), benchmark.TOLERANCES[dtype])


def test_the_rivals_go_round_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused form and the plain one at the same set at the same call."""
    monkeypatch.setattr(benchmark, "rotation", lambda device, size: 3)
    rivals = benchmark.cqc_rivals(2, 2, 9)
    rounds = [(rivals["fused"](), rivals["vectorized"]()) for _ in range(4)]
    for fused, plain in rounds:
        assert benchmark.largest_error(fused, plain) < 1e-4
    assert torch.equal(rounds[0][0][0], rounds[3][0][0])
    assert not torch.equal(rounds[0][0][0], rounds[1][0][0])


def test_a_wrong_result_is_not_timed() -> None:
    case = benchmark.Case("wrong", lambda: {"fused": wrong, "eager": right}, {})
    with pytest.raises(RuntimeError, match="the fused result is off by"):
        benchmark.measured(case, 0.0)


def right() -> tuple[torch.Tensor]:
    return (torch.ones(2),)


def wrong() -> tuple[torch.Tensor]:
    return (torch.tensor([1.0, 1.1]),)


# --- results ------------------------------------------------------------------------------------------------


def result(goals: dict[str, float], host: float = 10.0, floor: float = 0.5, **times: float) -> dict[str, Any]:
    medians = {"fused": 1.0, "floor": floor} | times
    timings = {name: Timing(0.9 * t, t, 1.1 * t) for name, t in medians.items()}
    return benchmark.row(
        benchmark.Case("a case", dict, goals), timings, {name: Cost(host, 7) for name in timings}
    )


@pytest.mark.parametrize(
    ("goals", "settings", "missed"),
    [
        ({"compile": 2.0}, {"compile": 2.1}, []),
        ({"compile": 2.0}, {"compile": 1.9}, ["compile"]),
        ({"compile": 2.0}, {"compile": 2.1, f"compile{AUTOTUNED}": 1.9}, ["compile"]),
        ({"compile": 2.0}, {"compile": 2.2, f"compile{AUTOTUNED}": 2.1}, []),
        ({"floor": 1.25}, {"floor": 0.81}, []),
        ({"floor": 1.25}, {"floor": 0.79}, ["floor"]),
        ({"host": 40.0}, {"host": 39.0}, []),
        ({"host": 40.0}, {"host": 41.0}, ["host"]),
    ],
)
def test_goals(goals: dict[str, float], settings: dict[str, float], missed: list[str]) -> None:
    """Of a rival's two compilations the faster one counts."""
    assert result(goals, **settings)["missed"] == missed


def test_a_gpus_result_is_printed_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result({}, host=12.3, eager=6.0, compile=2.0)
    assert found["host_us"]["fused"] == 12.3 and found["peak_bytes"]["eager"] == 7
    benchmark.print_row(found)
    assert "host 12 us" in capsys.readouterr().out
    where = {"date": "2026", "gpu": "NVIDIA X", "torch": "2.11", "cuda": "13.0", "triton": "3.6.0"}
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(where | found) + "\n")
    benchmark.print_table(file)
    told = capsys.readouterr().out
    assert "NVIDIA X, torch 2.11, CUDA 13.0, Triton 3.6.0; 2026" in told
    assert "| a case | 1000.00 ms | 6.0 × | 2.0 × | – | 2.00 |" in told


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


@pytest.mark.parametrize("waits", [False, True])
def test_measuring_on_a_gpu(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved; a pause before what does not wait by itself, longer than its host takes."""
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
    monkeypatch.setattr(benchmark, "pause_rate", lambda: 1e9)

    def eager() -> None:
        time.sleep(2e-3)
        log.append("eager")

    rivals: dict[str, Callable[[], Any]] = {"fused": lambda: log.append("fused"), "eager": eager}
    timings, costs = benchmark.measure_gpu(rivals, 0.0, waits, least=3)
    rounds = log[-12:] if not waits else log[-6:]
    kinds = [entry.split()[0] for entry in rounds]
    assert kinds == (["fused", "eager"] if waits else ["pause", "fused", "pause", "eager"]) * 3
    if not waits:
        pauses = [int(entry.split()[1]) for entry in rounds if entry.startswith("pause")]
        assert pauses[0] >= 1e5 and pauses[1] >= 1e9 * 4e-3
    assert timings["eager"].median > 1.9e-3 > timings["fused"].median
    assert costs["eager"].host > 1.9e3 and costs["eager"].peak == 250
