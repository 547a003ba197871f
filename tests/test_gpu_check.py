"""`make gpu-check` where there is no GPU: what it says, and what it would run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mrcn_fast
from mrcn_fast.dispatch import BackendStatus

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were a GPU that the Triton backend serves."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (SXM)")
    monkeypatch.setattr(mrcn_fast, "backends", lambda: {"triton": BackendStatus(True, "Triton on a GPU")})
    return monkeypatch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    """From make, with nothing installed or built on the way."""
    done = subprocess.run(
        # ARGS too: `make test ARGS=...` hands its own down to every make below it.
        ["make", "gpu-check", f"PYTHON={sys.executable}", "VENV=no-such-environment", "ARGS="],
        cwd=ROOT,
        env=os.environ | {"MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"gpu-check: there is no GPU that torch can use: torch {torch.__version__}" in done.stderr
    assert sys.executable in done.stderr and "Traceback" not in done.stderr
    assert not (ROOT / "no-such-environment").exists()


def test_what_is_lacking(gpu_check: ModuleType, gpu: pytest.MonkeyPatch) -> None:
    assert gpu_check.lacking(("tests", "benchmark")) is None
    gpu.setattr(gpu_check, "TEST_PACKAGES", ("pytest", "no_such_package"))
    assert "the tests need no_such_package, which" in gpu_check.lacking(("tests", "benchmark"))
    assert gpu_check.lacking(("benchmark",)) is None
    gpu.setattr(mrcn_fast, "backends", lambda: {"triton": BackendStatus(False, "Triton is too old")})
    assert gpu_check.lacking(("benchmark",)) == "the Triton backend can't run: Triton is too old"


def test_a_benchmark_follows_tests_that_pass(gpu_check: ModuleType, gpu: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    status = 0

    def run(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        assert env["MRCN_FAST_TEST_DEVICE"] == "cuda"
        assert env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, status)

    gpu.setattr(gpu_check.subprocess, "run", run)
    assert gpu_check.main(["--only", "cqc"]) == 0
    tests, bench = ran
    assert tests == ["pytest", *gpu_check.TESTS] and all((ROOT / test).exists() for test in gpu_check.TESTS)
    results = str(ROOT / "benchmarks" / "results" / "nvidia-h200-sxm.jsonl")
    assert bench[:5] == ["mrcn_fast.benchmark", "--device", "cuda", "--out", results]
    assert bench[5:] == ["--only", "cqc", "--seconds", "2"]
    ran.clear()
    status = 1
    assert gpu_check.main([]) == 1 and [command[0] for command in ran] == ["pytest"]
    ran.clear()
    assert gpu_check.main(["--tests=-n 8 tests/test_gpu.py"]) == 1
    assert ran == [["pytest", "-n", "8", "tests/test_gpu.py"]]
    ran.clear()
    assert gpu_check.main(["--part", "benchmark"]) == 1
    assert [command[0] for command in ran] == ["mrcn_fast.benchmark"]
