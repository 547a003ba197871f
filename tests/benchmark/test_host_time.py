"""benchmarks/host_time.py prints each of its forms; how fast a machine is here is no test's business."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from tests.support.processes import ROOT

SCRIPT = ROOT / "benchmarks" / "host_time.py"
TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.skipif(
            importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
        ),
        pytest.mark.skipif(
            torch.cuda.is_available(), reason="here is a GPU, and a driver that runs everything"
        ),
    ],
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the stand-ins for a GPU are written for Linux")
@pytest.mark.parametrize("backend", ["cuda", TRITON])
def test_host_time(backend: str) -> None:
    command = [sys.executable, str(SCRIPT), "--backend", backend]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 7 and all(re.fullmatch(r".{30} +\d+\.\d us \(.*\)", line) for line in lines), lines
