"""Runs tests/interpreted, where Triton's kernels are interpreted, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Triton has builds for Linux alone, and there it is no accident that it is missing: [dev] brings it.
ABSENT = importlib.util.find_spec("triton") is None


@pytest.mark.skipif(ABSENT and sys.platform != "linux", reason="Triton has no build for this machine")
def test_the_triton_kernels_in_the_interpreter() -> None:
    folder = Path(__file__).parent / "interpreted"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", folder, "-q", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(run.stdout)
    assert run.returncode == 0, "tests/interpreted failed: see its output above"
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 0, "no test ran"
    assert "skipped" not in run.stdout.splitlines()[-1], "skipped where it must run"
