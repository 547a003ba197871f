"""Triton's kernels compiled ahead of time, without a GPU, and what the compilers say of their resources.

NVIDIA's figures come from the cubin, AMD's from the assembly.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The names of dtypes in a kernel's signature.
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Usage(NamedTuple):
    """What a compiled kernel uses.

    ``spilled`` is in registers or in bytes of memory per thread. ``scalars`` are AMD's scalar registers that
    are kept in lanes of vector registers, and not in memory.
    """

    registers: int
    spilled: int
    scalars: int
    shared: int


def usage(source: ASTSource, target: GPUTarget, folder: Path, **options: Any) -> Usage:
    """Compile a kernel with Triton's ``options``."""
    kernel = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        numbers = dict(re.findall(r"\.(\w+): +(\d+)", kernel.asm["amdgcn"]))
        spilled = int(numbers["vgpr_spill_count"]) + int(numbers["private_segment_fixed_size"])
        scalars = int(numbers["sgpr_spill_count"])
        return Usage(int(numbers["vgpr_count"]), spilled, scalars, kernel.metadata.shared)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told))
    return Usage(
        int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]), 0, kernel.metadata.shared
    )
