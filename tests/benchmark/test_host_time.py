"""`bench host` and benchmarks/host_time.py print each call; no test depends on a time."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mrcn_fast import backends, cli
from mrcn_fast.benchmark.suites import host
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


def test_the_suite_measures_a_backend_that_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not backends()["cpu"].usable:
        pytest.skip(backends()["cpu"].reason)
    monkeypatch.setattr(host, "RUNS", 2)
    monkeypatch.setattr(host, "CALLS", 1)
    threads = torch.get_num_threads()
    file = tmp_path / "host.jsonl"
    assert cli.main(["bench", "host", "--out", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["case"] == "host time of cpu on cpu, 16x64x9x4" and len(line["host_us"]) == 7
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "triton"], "backend 'triton' can't serve this call"),
        (["--device", "cuda"], "nothing to measure: --device cuda: there is no GPU here"),
    ],
)
def test_a_backend_that_cant_serve(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "host", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the stand-ins for a GPU are written for Linux")
@pytest.mark.parametrize("backend", ["cuda", TRITON])
def test_host_time(backend: str) -> None:
    command = [sys.executable, str(SCRIPT), "--backend", backend]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 7 and all(re.fullmatch(r".{30} +\d+\.\d us \(.*\)", line) for line in lines), lines
