"""Tests in a process of their own, for choices that are made when a process starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mrcn_fast.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
# The instruction sets that the library is compiled for, or "none".
INSTRUCTION_SETS: list[str] = cpu.build_info().get("isas", ["none"])


def run_pytest(*arguments: str, environment: Mapping[str, str]) -> str:
    """Run pytest, with ``environment`` added to this process's, and give what it printed.

    The calling test fails unless at least one test ran and all passed.
    """
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, "failed: see its output above"
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 0, "no test ran"
    return run.stdout


def instruction_set(isa: str) -> dict[str, str]:
    """The environment in which the kernels use ``isa``; skips the test where the machine doesn't have it."""
    environment = {"MRCN_FAST_ISA": isa}
    ask = "from mrcn_fast import backends; status = backends()['cpu']; print(status.usable, status.reason)"
    run = subprocess.run(
        [sys.executable, "-c", ask], env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    usable, reason = run.stdout.strip().split(" ", 1)
    if usable == "False":
        pytest.skip(reason)
    assert f"C++ kernels for {isa}, compiled for" in reason
    return environment


def make_outside_an_environment(target: str) -> subprocess.CompletedProcess[str]:
    """Run a target of the Makefile with this Python, where there is no environment of the Makefile's."""
    return subprocess.run(
        # ARGS is empty, because `make test ARGS=...` passes its own on to every make that it starts.
        ["make", target, f"PYTHON={sys.executable}", "VENV=no-such-environment", "ARGS="],
        cwd=ROOT,
        env=os.environ | {"MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
