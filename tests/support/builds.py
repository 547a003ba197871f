"""What the tests of the build, of the packages and of the Makefile share."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

LIBRARY = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
RECORD = "_native_build.json"
CUDA_LIBRARY = "_cuda.so"
SETTINGS = (
    *("CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "CUDACXX", "CUDA_HOME", "PYTHONPATH"),
    *("MRCN_FAST_NATIVE", "MRCN_FAST_ISAS", "MRCN_FAST_CUDA", "MRCN_FAST_CUDA_ARCHS", "MRCN_FAST_BACKEND"),
)


def run(
    *command: str | Path, cwd: Path, check: bool = True, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command with none of the caller's build settings but `settings`; its whole output where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment.update(settings or {})
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=True, timeout=600
    )
    if check and done.returncode != 0:
        pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done
