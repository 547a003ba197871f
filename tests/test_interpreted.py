"""Runs tests/interpreted, where Triton's kernels are interpreted, in a process of its own."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.support.processes import run_pytest

# Triton has builds for Linux alone, where [dev] installs it, so that there it must not be missing.
ABSENT = importlib.util.find_spec("triton") is None


@pytest.mark.slow(seconds=120)
@pytest.mark.skipif(ABSENT and sys.platform != "linux", reason="Triton has no build for this machine")
def test_the_triton_kernels_in_the_interpreter() -> None:
    printed = run_pytest("tests/interpreted", environment={"TRITON_INTERPRET": "1"})
    assert "skipped" not in printed.splitlines()[-1], "skipped where it must run"
