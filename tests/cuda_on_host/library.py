"""The CUDA backend on the processor: builds tests/cuda_on_host, loads it, and serves as dispatch asks it to.

`SANITIZE` ("thread" or "address", from MRCN_FAST_TEST_SANITIZE) is what the kernels are compiled with; the
process then has to start with the sanitizer's runtime loaded, as tests/test_cuda_on_host.py starts it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mrcn_fast.backends import cpu, shapes

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "mrcn_fast_cuda_on_host"
SANITIZE = os.environ.get("MRCN_FAST_TEST_SANITIZE", "")
DEVICES = ()
MOST_HOLDING = 64


class NotBuilt(RuntimeError):
    """The emulated kernels could not be compiled; the message ends with the compiler's."""


def _tool(name: str) -> str:
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=search)
    if found is None:
        raise NotBuilt(f"{name} was not found; get it: {sys.executable} -m pip install {name}")
    return found


@functools.cache
def build(target: str = "cuda_on_host", sanitize: str = SANITIZE) -> Path:
    """The directory with ``target``, compiled where its sources are newer; processes wait for one another."""
    directory = ROOT / "build" / "-".join(filter(None, ["cuda-on-host", sanitize]))
    directory.mkdir(parents=True, exist_ok=True)
    torch_found = importlib.util.find_spec("torch")
    assert torch_found is not None and torch_found.origin is not None
    cmake = _tool("cmake")
    configure = [
        *(cmake, "-S", str(Path(__file__).parent), "-B", str(directory), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DTORCH_ROOT={Path(torch_found.origin).parent}",
        f"-DSANITIZE={sanitize}",
    ]
    # Not with a sanitizer's runtime in the compiler.
    compiling = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", str(directory), "--target", target]):
            run = subprocess.run(
                command, env=compiling, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if run.returncode != 0:
                raise NotBuilt(f"tests/cuda_on_host was not built:\n{run.stdout[-8000:]}")
    return directory


def load() -> None:
    """Register the operations, with the shapes that they have on a CUDA device."""
    torch.ops.load_library(str(build() / "libcuda_on_host.so"))
    for name, fake in cpu.fakes("cuda").items():
        torch.library.register_fake(f"{NAMESPACE}::{name}")(fake)
    if os.environ.get("MRCN_FAST_CUDA_HELD") == "1":
        # A sample is held by up to 64 blocks, for which the device must have a place.
        emulator().cuda_on_host_set(MOST_HOLDING, 4, 0, 1 << 20)


def emulator() -> ctypes.CDLL:
    """The emulator's settings: tests/cuda_on_host/cuda_on_host.h says what they are."""
    library = ctypes.CDLL(str(build() / "libcuda_on_host.so"))
    library.cuda_on_host_set.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_longlong)
    library.cuda_on_host_busy.argtypes = (ctypes.c_int,)
    library.cuda_on_host_launches.restype = ctypes.c_longlong
    return library


def status() -> tuple[bool, str]:
    return True, "CUDA C++ kernels on the processor"


def serves(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it serves CPU tensors, got a tensor on {device_type!r}"
    return None if dtype in shapes.DTYPES else f"got {dtype}"


def operation(name: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, NAMESPACE), name).default
