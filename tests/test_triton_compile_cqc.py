"""The CQC kernels compiled ahead of time, without a GPU: registers, spills, shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed here")

from triton.compiler import ASTSource  # noqa: E402

from mrcn_fast.backends import shapes  # noqa: E402
from mrcn_fast.backends.triton import cqc  # noqa: E402
from mrcn_fast.backends.triton.cqc_backward import backward_kernel  # noqa: E402
from mrcn_fast.backends.triton.cqc_forward import forward_kernel  # noqa: E402
from tests.support.ahead import TARGETS, TYPES, usage  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: there is nothing to compile"
)

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
        element, sums = TYPES[dtype], TYPES[shapes.precise(dtype)]
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


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills(
    target: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    options: dict[str, Any] = {"enable_fp_fusion": cqc.OPTIONS["enable_fp_fusion"]}
    if TARGETS[target].backend == "cuda":
        options["maxnreg"] = cqc.REGISTERS
    found = {
        kernel.name: usage(source(kernel), TARGETS[target], tmp_path, num_warps=kernel.warps, **options)
        for kernel in kernels()
    }
    for name, used in found.items():
        told = f"{used.registers:4} registers, {used.spilled} spilled, {used.scalars} scalars in lanes, "
        told += f"{used.shared} bytes shared"
        record_property("resources", f"cqc_{name:40} {target:10} {told}")
    assert not {name for name, used in found.items() if used.spilled}
    # The kernels of normalized rows have more addresses than gfx942 has scalar registers: up to 31 of them.
    assert {name for name, used in found.items() if used.scalars} <= {
        n for n in found if n.startswith("unit")
    }
    assert max(used.scalars for used in found.values()) <= 31
