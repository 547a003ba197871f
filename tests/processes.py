"""Tests in a process of their own, where what they need is decided when a process starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_pytest(*arguments: str, environment: Mapping[str, str]) -> str:
    """What pytest printed, of tests that all passed; ``environment`` is added to this process's."""
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
