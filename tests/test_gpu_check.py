"""`make gpu-check` without a GPU: its messages, and the commands that it would run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import mrcn_fast
from mrcn_fast.dispatch import BackendStatus
from tests.support.processes import make_outside_an_environment
from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu_check() -> ModuleType:
    return load_script("benchmarks/gpu_check.py")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were a GPU that the Triton backend serves."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (SXM)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=13 << 30))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for name in ("MRCN_FAST_CUDA", "MRCN_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    found(monkeypatch, triton=True, cuda=False)
    monkeypatch.syspath_prepend(ROOT)
    return monkeypatch


def found(gpu: pytest.MonkeyPatch, **usable: bool) -> None:
    gpu.setattr(
        mrcn_fast, "backends", lambda: {name: BackendStatus(u, f"{name}: {u}") for name, u in usable.items()}
    )


class Runs:
    """The commands that gpu-check runs, each ending with ``status``."""

    def __init__(self, gpu_check: ModuleType, gpu: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.status = 0
        gpu.setattr(gpu_check.subprocess, "run", self)

    def __call__(
        self, command: list[str], *, env: dict[str, str], **_: object
    ) -> subprocess.CompletedProcess[str]:
        assert env["MRCN_FAST_TEST_DEVICE"] == "cuda"
        assert env["MRCN_FAST_CUDA"] == "1" and env["MRCN_FAST_CUDA_ARCHS"] == "90"
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        self.commands.append(command)
        return subprocess.CompletedProcess(command, self.status)

    def taken(self) -> list[list[str]]:
        taken, self.commands = self.commands, []
        return taken


@pytest.fixture
def runs(gpu_check: ModuleType, gpu: pytest.MonkeyPatch) -> Runs:
    return Runs(gpu_check, gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    """make says so, and installs and builds nothing first."""
    done = make_outside_an_environment("gpu-check")
    assert done.returncode != 0
    assert f"gpu-check: there is no GPU that torch can use: torch {torch.__version__}" in done.stderr
    assert sys.executable in done.stderr and "Traceback" not in done.stderr
    assert not (ROOT / "no-such-environment").exists()


def test_what_is_lacking(gpu_check: ModuleType, gpu: pytest.MonkeyPatch) -> None:
    assert gpu_check.lacking(("tests", "benchmark")) is None
    gpu.setattr(gpu_check, "TEST_PACKAGES", ("pytest", "no_such_package"))
    assert "the tests need no_such_package, which" in gpu_check.lacking(("tests", "benchmark"))
    assert gpu_check.lacking(("benchmark",)) is None
    found(gpu, triton=False)
    assert gpu_check.lacking(("benchmark",)) == "the Triton backend can't run: triton: False"


PYTEST = [sys.executable, "-m", "pytest"]
PROCESSES = ["-n", "3", "--dist", "loadgroup"]  # 13 GiB
BENCHMARK = [sys.executable, "-m", "mrcn_fast"]


def test_a_training_step_is_tested_where_it_can_be(gpu_check: ModuleType, gpu: pytest.MonkeyPatch) -> None:
    for found, chosen in ((None, gpu_check.TESTS), ("it", gpu_check.TESTS + gpu_check.TRAINING_TESTS)):
        gpu.setattr(gpu_check.importlib.util, "find_spec", lambda name, found=found: found)
        assert gpu_check.chosen_tests() == chosen


def test_each_part_follows_one_that_passed(
    gpu_check: ModuleType, runs: Runs, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(gpu_check, "unbuildable", lambda: None)
    gpu.setattr(gpu_check.shutil, "which", lambda name: f"/bin/{name}")
    assert gpu_check.main(["--only", "cqc"]) == 0
    build, tests, *sanitized, bench = runs.taken()
    assert build == [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    assert tests == [*PYTEST, *PROCESSES, *gpu_check.chosen_tests()]
    assert all((ROOT / test).exists() for test in gpu_check.TESTS + gpu_check.TRAINING_TESTS)
    for tool, command in zip(gpu_check.SANITIZERS, sanitized, strict=True):
        assert command[2:] == [
            *("compute-sanitizer", "--error-exitcode", "1", "--tool", tool, *PYTEST, *gpu_check.SANITIZED)
        ]
    results = str(ROOT / "benchmarks" / "results" / "nvidia-h200-sxm.jsonl")
    assert bench == [
        *(*BENCHMARK, "bench", "kernels", "--device", "cuda", "--out", results),
        *("--only", "cqc", "--seconds", "2", "--workers", "1"),  # 8 of the 13 GiB
    ]
    runs.status = 1
    assert gpu_check.main([]) == 1 and runs.taken() == [build]
    assert gpu_check.main(["--part", "tests", "--tests=-n 8 tests/test_gpu.py"]) == 1
    assert runs.taken() == [[*PYTEST, "-n", "8", "tests/test_gpu.py"]]
    assert gpu_check.main(["--part", "benchmark"]) == 1
    assert [command[:3] for command in runs.taken()] == [BENCHMARK]


def test_without_xdist_or_memory_the_tests_run_in_one_process(
    gpu_check: ModuleType, gpu: pytest.MonkeyPatch
) -> None:
    assert gpu_check.side_by_side() == PROCESSES
    gpu.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=7 << 30))
    assert gpu_check.side_by_side() == []
    gpu.undo()
    gpu.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert gpu_check.side_by_side() == []


def test_what_can_be_neither_built_nor_sanitized_is_left_out_and_told(
    gpu_check: ModuleType, runs: Runs, gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.setenv("CUDACXX", "no-such-nvcc")
    assert gpu_check.main([]) == 0
    assert [command[:3] for command in runs.taken()] == [PYTEST, BENCHMARK]
    printed = capsys.readouterr().out
    assert "without build: nvcc was not found: CUDACXX=no-such-nvcc" in printed
    assert "without sanitizer: the CUDA C++ backend can't run: cuda: False" in printed

    found(gpu, triton=True, cuda=True)
    gpu.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.main([]) == 0
    assert [command[:3] for command in runs.taken()] == [PYTEST, BENCHMARK]
    printed = capsys.readouterr().out
    assert "without build: it is built" in printed
    assert "without sanitizer: compute-sanitizer is not on PATH" in printed


def test_the_sanitized_choice_names_tests(gpu_check: ModuleType) -> None:
    """A choice without any test would stop every run, and only on machines with a GPU."""
    listed = subprocess.run(
        [*PYTEST, *gpu_check.SANITIZED, "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"MRCN_FAST_TEST_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stdout + listed.stderr
    for name in ("test_block_accuracy.py", "test_cqc.py"):
        assert f"tests/{name}::test_accuracy_in_every_layout[" in listed.stdout
    assert "triton" not in listed.stdout
