"""`make gpu-probe` without a GPU: its order, its budget, and its decisions from made-up measurements."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.processes import make_outside_an_environment
from tests.support.scripts import load_script


@pytest.fixture
def gpu_probe() -> ModuleType:
    return load_script("benchmarks/gpu_probe.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    done = make_outside_an_environment("gpu-probe")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"gpu-probe: there is no GPU here that torch {torch.__version__} can use" in done.stderr


def test_its_flags(gpu_probe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = gpu_probe.parser().parse_args(["--only", "E3", "--only", "E0", "--budget", "60"])
    assert options.only == ["E3", "E0"] and options.budget == 60 and options.out is None
    assert gpu_probe.parser().parse_args(["--build"]).build == "90"
    with pytest.raises(SystemExit):
        gpu_probe.parser().parse_args(["--only", "E8"])
    assert "invalid choice: 'E8'" in capsys.readouterr().err


class Runs:
    """Experiments that take as long as they are given, or as `takes` says, on a clock of their own."""

    def __init__(self, gpu_probe: ModuleType, **takes: float) -> None:
        self.probe, self.takes = gpu_probe, takes
        self.now = 1000.0
        self.order: list[tuple[str, float]] = []
        self.kept: list[dict[str, Any]] = []

    def run(self, name: str, seconds: float) -> Any:
        self.order.append((name, seconds))
        self.now += min(seconds, self.takes.get(name, seconds))
        return self.probe.Outcome({}, "no reason")

    def all(self, budget: float) -> int:
        undecided: int = self.probe.probe(
            list(self.probe.EXPERIMENTS), budget, self.kept.append, self.run, lambda: self.now
        )
        return undecided


def test_all_fit_into_the_budget_whatever_each_takes(gpu_probe: ModuleType) -> None:
    runs = Runs(gpu_probe)
    assert runs.all(gpu_probe.BUDGET) == 8
    assert [name for name, _ in runs.order] == [f"E{k}" for k in range(8)]
    assert runs.now - 1000 <= gpu_probe.BUDGET <= 480
    assert [line["case"] for line in runs.kept] == [f"gpu-probe E{k}" for k in range(8)]


def test_a_small_budget_is_kept(gpu_probe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(gpu_probe, E0=1, E1=1)
    runs.all(100)
    assert runs.order == [("E0", 30), ("E1", 45), ("E2", 30), ("E3", 68)]
    assert runs.now - 1000 == 100
    assert "E4 bulk copies (0 s): undecided: only 0 s were left" in capsys.readouterr().out
    assert runs.kept[-1]["lacking"] == "only 0 s were left"


def both(way: str, us: float, floor: float) -> dict[str, float]:
    name = f"{way} 256 bf16 channels_last"
    return {name: us, f"{name} floor": floor}


@pytest.mark.parametrize(
    ("name", "measured", "told"),
    [
        ("E0", {"clusters of 16 at 147 KiB": 7}, "stay with the barrier"),
        ("E0", {"clusters of 16 at 147 KiB": 8}, "look at clusters again"),
        (
            "E1",
            {f"{way} {c}": 10.7 for way in ("forward", "backward", "writes alone") for c in (64, 256)},
            "forward 10.7 and 10.7 us",
        ),
        (
            "E2",
            {"group of 8": 1.3, "group of 16": 1.5, "group of 32": 2.9},
            "2.9 us at most: the predictions",
        ),
        ("E2", {"group of 8": 1.3, "group of 16": 1.5, "group of 32": 3.1}, "loses its case"),
        ("E3", both("forward", 36, 30) | both("backward", 50, 40), "the default forward and backward"),
        ("E3", both("forward", 36.1, 30) | both("backward", 46, 40), "(1.20 floors), 46.0 us"),
        ("E3", both("forward", 36.1, 30) | both("backward", 46, 40), "the default backward"),
        ("E3", both("forward", 40, 30) | both("backward", 51, 40), "no default"),
        (
            "E5",
            both("forward", 62, 30) | both("backward", 125, 40),
            "84 -> 62 us, backward 250 -> 125 us: the",
        ),
        ("E5", both("forward", 62, 30) | both("backward", 220, 40), "the model is wrong"),
        ("E6", {"L2 hits, percent": 19}, "comes from memory"),
        ("E6", {"L2 hits, percent": 51}, "at their end"),
        (
            "E7",
            {"+ CUDA graph": 15, "+ compiled trunk": 11, "+ bf16": 41, "+ fused optimizer": 40.8},
            "compiled trunk -4.0 ms in a graph, fused optimizer -0.2 ms without one: compile the trunk",
        ),
        (
            "E7",
            {"+ CUDA graph": 15, "+ compiled trunk": 14.5, "+ bf16": 41, "+ fused optimizer": 41},
            "leave the trunk",
        ),
    ],
)
def test_decisions(name: str, measured: dict[str, float], told: str, gpu_probe: ModuleType) -> None:
    decision = gpu_probe.decision_of(gpu_probe.EXPERIMENTS[name], gpu_probe.Outcome(measured))
    assert told in decision
    first = next(iter(measured))
    less = {key: value for key, value in measured.items() if key != first}
    lacking = gpu_probe.decision_of(gpu_probe.EXPERIMENTS[name], gpu_probe.Outcome(less))
    assert lacking == f"undecided: {first} was not measured"
    ended = gpu_probe.Outcome(less, "it was ended after 9 s")
    assert "undecided: it was ended" in gpu_probe.decision_of(gpu_probe.EXPERIMENTS[name], ended)


def test_an_experiment_in_its_process(
    gpu_probe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert gpu_probe.run_apart("E4", 60) == gpu_probe.Outcome({}, "no kernel uses bulk copies")
    popen, code = subprocess.Popen, dict[str, str]()

    def instead(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", code["runs"]], **options)

    monkeypatch.setattr(gpu_probe.subprocess, "Popen", instead)
    # Its own process goes on after it has printed something, and one that it has started too.
    code["runs"] = (
        "import subprocess, sys; print('{\"a\": 1.5}', flush=True); print('[1', flush=True); "
        f"subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', {str(tmp_path)!r}])"
    )
    assert gpu_probe.run_apart("E0", 2) == gpu_probe.Outcome({"a": 1.5}, "it was ended after 2 s")
    if Path("/proc").is_dir():
        assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _content(p)]
    code["runs"] = "print('{\"a\": 1.5}'); raise RuntimeError('CUDA\\'s error 2')"
    assert gpu_probe.run_apart("E0", 30) == gpu_probe.Outcome({"a": 1.5}, "RuntimeError: CUDA's error 2")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended meanwhile
        return b""


NCU = """==PROF== Connected to process 1
a line of the program
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","output_kernel","dram__bytes_read.sum","byte","37,748,736"
"0","1","output_kernel","lts__t_sector_hit_rate.pct","%","18.5"
"0","1","output_kernel","another.sum","byte","1"
"""


def test_what_ncu_prints(gpu_probe: ModuleType) -> None:
    assert gpu_probe.ncu_metrics(NCU) == {"bytes read from memory": 37748736, "L2 hits, percent": 18.5}
    assert gpu_probe.ncu_metrics("==ERROR== no permission") == {}


def test_without_ncu(gpu_probe: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu_probe.shutil, "which", lambda _: None)
    assert gpu_probe.main(["--run", "E6"]) == 0
    assert json.loads(capsys.readouterr().out) == {"lacking": "ncu is not on PATH"}


def test_the_steps_are_there(gpu_probe: ModuleType) -> None:
    training_step = pytest.importorskip("mrcn_fast.benchmark.suites.training_step")
    assert set(gpu_probe.STEPS) <= {plan.name for plan in training_step.plans("mrcn", "cuda")}


def test_its_own_kernels(
    gpu_probe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(gpu_probe, "LIBRARY", tmp_path / "libgpu_probe.so")
    with monkeypatch.context() as without:
        without.setenv("CUDACXX", "no-such-nvcc")
        assert gpu_probe.main(["--build"]) == 2
        assert "libgpu_probe.so is not there, and nvcc was not found" in capsys.readouterr().err
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    assert gpu_probe.main(["--build", "90"]) == 0
    probe = gpu_probe.library()
    if torch.cuda.is_available():
        assert gpu_probe.checked(probe.gpu_probe_blocks(74 * 1024)) > 0
    else:
        with pytest.raises(RuntimeError, match="CUDA's error"):
            gpu_probe.checked(probe.gpu_probe_blocks(74 * 1024))
        assert probe.gpu_probe_clusters(8, 74 * 1024) < 0
