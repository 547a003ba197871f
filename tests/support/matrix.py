"""What the tests run over: devices, backends, dtypes, and the table of operations with its modes and gates.

`MODES`, `GATES` and `SETTINGS` come from `mrcn_fast.operations` and `mrcn_fast.gates`, so that an operation
or a gate that is entered there is tested without an entry here.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings

import mrcn_fast
from mrcn_fast import dispatch
from mrcn_fast.gates import FUSED
from mrcn_fast.operations import OPERATIONS
from tests.support import extended

REQUIRED = os.environ.get("MRCN_FAST_REQUIRE_CPU") == "1"

# DEVICE is where the tests make their tensors, KERNEL_BACKENDS are compared with the reference there. With
# CUDA_ON_HOST the CUDA kernels run on the processor: tests/test_cuda_on_host.py starts such processes.
DEVICE = os.environ.get("MRCN_FAST_TEST_DEVICE") or "cpu"
CUDA_ON_HOST = os.environ.get("MRCN_FAST_TEST_CUDA_ON_HOST") == "1"
KERNEL_BACKENDS = ("cuda",) if CUDA_ON_HOST else ("cpu",) if DEVICE == "cpu" else ("triton", "cuda")
OPTIONAL = () if CUDA_ON_HOST else ("cuda",)  # it is built only where there is nvcc

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PRECISE_DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            dtype == torch.float64 and not extended.PRECISE,
            reason="long double is a float64 on this machine: nothing more precise to compare with",
        ),
        id=str(dtype)[6:],
    )
    for dtype in DTYPES
]
GATES = FUSED
MODES = tuple(OPERATIONS)
RESTITUTE_TO = ("normalized", "input")
# Each mode with each gate, and with both readings of eq. 5 where the operation takes `restitute_to`.
SETTINGS = [
    (mode, gate, restitute_to)
    for mode, gate, restitute_to in itertools.product(MODES, GATES, RESTITUTE_TO)
    if OPERATIONS[mode].restitutes or restitute_to == "normalized"
]


def backends(*names: str) -> pytest.MarkDecorator:
    """Run the test once per backend; a backend that can't be used is skipped, unless it is required."""
    status = mrcn_fast.backends()

    def parameter(name: str) -> Any:
        required = name in KERNEL_BACKENDS and (REQUIRED or DEVICE != "cpu") and name not in OPTIONAL
        absent, reason = not status[name].usable and not required, status[name].reason
        if name == "cpu" and DEVICE != "cpu":
            absent, reason = True, f"the problems are on {DEVICE!r} (MRCN_FAST_TEST_DEVICE)"
        return pytest.param(name, marks=pytest.mark.skipif(absent, reason=f"{name}: {reason}"))

    return pytest.mark.parametrize("backend", [parameter(name) for name in names])


def operations(op: str, backend: str) -> tuple[Any, Any]:
    """The forward and the backward of ``op`` as torch knows them, after their kernels were loaded."""
    kernels = dispatch.KERNELS[backend]
    assert kernels.serves(DEVICE, torch.float32) is None
    return kernels.operation(f"{op}_forward"), kernels.operation(f"{op}_backward")


def examples(number: int) -> settings:
    """Hypothesis draws ``number`` cases, an eighth of them where the processor runs a kernel's threads.

    A failing case is reported without shrinking: a smaller case would fail by luck alone.
    """
    number = -(-number // 8) if CUDA_ON_HOST else number
    return settings(max_examples=number, phases=(Phase.explicit, Phase.reuse, Phase.generate))
