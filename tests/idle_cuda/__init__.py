"""Triton's own way to a launch without a GPU: its CUDA driver on a libcuda.so.1 that runs nothing.

The kernels are compiled for an H100; their launches get as far as `cuLaunchKernelEx`, which counts them.
After `use` was called, the backend "triton" serves the process's CPU tensors, and computes nothing.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from mrcn_fast import dispatch

SOURCE = Path(__file__).with_name("idle_cuda.cpp")
CAPABILITY = (9, 0)


class Launches:
    """The launches that the library has counted."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.idle_cuda_launches.restype = ctypes.c_long

    def count(self) -> int:
        return int(self.library.idle_cuda_launches())

    def programs(self, number: int) -> list[int]:
        """Of the last so many launches, at most sixteen, the first of them first."""
        return [int(self.library.idle_cuda_programs(before)) for before in reversed(range(number))]


def use(directory: Path) -> Launches:
    """Build the library in ``directory``, and let Triton launch on it from now on."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(directory)
    # From now on, loading libcuda.so.1 gives this library.
    library = ctypes.CDLL(str(_build(directory)), mode=ctypes.RTLD_GLOBAL)
    triton.runtime.driver.set_active(_driver())
    # The backend takes CPU tensors only if this is set. Triton itself decides whether it interprets kernels.
    vars(dispatch.KERNELS["triton"])["INTERPRETED"] = True
    return Launches(library)


def _build(directory: Path) -> Path:
    target = directory / "libcuda.so.1"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    include = Path(nvidia.__file__).with_name("include")
    options = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{target.name}", f"-I{include}"]
    subprocess.run([*compiler, *options, str(SOURCE), "-o", str(target)], check=True)
    return target


def _driver() -> nvidia.CudaDriver:
    made = nvidia.CudaDriver()
    made.get_current_device = lambda: 0
    made.set_current_device = lambda device: None
    made.get_current_stream = lambda device: 0
    made.get_device_capability = lambda device: CAPABILITY
    made.get_current_target = lambda: GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)
    return made
