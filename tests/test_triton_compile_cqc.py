"""The CQC kernels compiled ahead of time, without a GPU: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mrcn_fast.backends import shapes  # noqa: E402
from mrcn_fast.backends.triton import cqc  # noqa: E402
from mrcn_fast.backends.triton.cqc_backward import backward_kernel  # noqa: E402
from mrcn_fast.backends.triton.cqc_forward import forward_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: there is nothing to compile"
)

TARGETS = {
    "cuda 80": GPUTarget("cuda", 80, 32),
    "cuda 90": GPUTarget("cuda", 90, 32),
    "cuda 100": GPUTarget("cuda", 100, 32),
    "hip gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
DIMENSIONS = 2048
FORMS = ((16, False), (128, True))  # the paper's 4 x 4 samples in six tensors, 16 x 8 in one


class Kernel(NamedTuple):
    """A kernel with what its arguments are; what is no constant and no pointer is an integer."""

    name: str
    function: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int


def kernels() -> Iterator[Kernel]:
    """Every kernel at the paper's shapes in `FORMS`, in the dtypes that networks are trained in."""
    for dtype in (torch.float32, torch.bfloat16):
        element = DTYPES[dtype]
        sums = DTYPES[shapes.precise(dtype)]
        known = dict.fromkeys(("labels", "infrared_labels", "identities", "number"), "i64") | {
            "arrivals": "i32"
        }
        known |= dict.fromkeys(("losses", "weights", "total", "gradient"), sums)
        known |= dict.fromkeys(("features", "gradients"), element)
        for samples, stacked in FORMS:
            form = f"{element} {samples} samples{', stacked' * stacked}"
            for name, function, normalize, warps in (
                ("forward", forward_kernel, False, cqc.FORWARD_WARPS),
                ("unit forward", forward_kernel, True, cqc.FORWARD_WARPS),
                ("backward", backward_kernel, False, cqc.BACKWARD_WARPS),
                ("unit backward", backward_kernel, True, cqc.UNIT_BACKWARD_WARPS),
            ):
                chosen = cqc.constants(
                    dtype, samples, DIMENSIONS, warps, stacked=stacked, normalize=normalize
                )
                yield Kernel(f"{name} {form}", function, known, {"K": chosen}, warps)


def source(kernel: Kernel) -> ASTSource:
    """The kernel as a call with aligned pointers, rows and columns would specialize it."""
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(kernel.function.arg_names):
        if name in kernel.constants:
            signature[name] = "constexpr"
        elif name == "margin":
            signature[name] = "fp64"
        elif name in ("features", "gradients", "strides"):
            kind = f"*{kernel.pointers[name]}" if name in kernel.pointers else "i32"
            signature[name] = (kind,) * 6
            attributes |= {(i, k): aligned for k in range(6)}
        else:
            signature[name] = f"*{kernel.pointers[name]}" if name in kernel.pointers else "i32"
            if name in kernel.pointers or name == "dimensions":
                attributes[(i,)] = aligned
    constants = {(kernel.function.arg_names.index(name),): value for name, value in kernel.constants.items()}
    return ASTSource(kernel.function, signature, constants, attributes)


class Usage(NamedTuple):
    """What the binary says of itself; ``stack`` is bytes a thread, which spills alone take here.

    ``scalars`` are AMD's scalar registers that are kept in lanes of vector registers, and not in memory.
    """

    registers: int
    stack: int
    scalars: int
    shared: int


def usage(kernel: Kernel, target: GPUTarget, folder: Path) -> Usage:
    options: dict[str, Any] = {"num_warps": kernel.warps, "enable_fp_fusion": cqc.OPTIONS["enable_fp_fusion"]}
    if target.backend == "cuda":
        options["maxnreg"] = cqc.REGISTERS
    compiled = triton.compile(source(kernel), target=target, options=options)
    if target.backend == "hip":
        told = {
            name: int(value)
            for name, value in re.findall(r"\.(\w+): +(\d+)", compiled.asm["amdgcn"])
            if value
        }
        spilled = told["vgpr_spill_count"] + told["private_segment_fixed_size"]
        return Usage(told["vgpr_count"], spilled, told["sgpr_spill_count"], compiled.metadata.shared)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    told_by = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    text = subprocess.run(told_by, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], 0, compiled.metadata.shared)


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills(
    target: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found = {kernel.name: usage(kernel, TARGETS[target], tmp_path) for kernel in kernels()}
    for name, used in found.items():
        told = f"{used.registers:4} registers, {used.stack} spilled, {used.scalars} scalars in lanes, "
        told += f"{used.shared} bytes shared"
        record_property("resources", f"cqc_{name:40} {target:10} {told}")
    assert not {name for name, used in found.items() if used.stack}
    # The kernels of normalized rows have more addresses than gfx942 has scalar registers: up to 31 of them.
    assert {name for name, used in found.items() if used.scalars} <= {
        n for n in found if n.startswith("unit")
    }
    assert max(used.scalars for used in found.values()) <= 31
