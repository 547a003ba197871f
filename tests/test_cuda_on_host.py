"""The CUDA backend without a GPU: its kernels on the processor (tests/cuda_on_host).

The kernels are tested by every backend's tests, in processes of their own in which the emulator serves as
the backend "cuda": once plainly, and once under the sanitizers, which find races between the kernels' threads
and accesses outside their memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_on_host import library
from tests.support.matrix import CUDA_ON_HOST
from tests.support.processes import run_pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator is written for Linux"),
    pytest.mark.skipif(CUDA_ON_HOST, reason="starts the processes of which this is one"),
]

SANITIZERS = {
    "thread": ("libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0"}),
    "address": ("libasan.so", {"ASAN_OPTIONS": "detect_leaks=0"}),
}


def run_tests(*arguments: str, sanitize: str = "", held: bool = False) -> None:
    environment = {"MRCN_FAST_TEST_CUDA_ON_HOST": "1", "MRCN_FAST_TEST_SANITIZE": sanitize}
    environment["MRCN_FAST_CUDA_HELD"] = str(int(held))
    if sanitize:
        name, options = SANITIZERS[sanitize]
        environment |= options | {"LD_PRELOAD": runtime(name)}
    printed = run_pytest(*arguments, environment=environment)
    assert "WARNING: ThreadSanitizer" not in printed and "ERROR: AddressSanitizer" not in printed


def runtime(name: str) -> str:
    """The sanitizer's library of the compiler."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], stdout=subprocess.PIPE, text=True, check=True
    )
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return path


def run_toys(sanitize: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = library.build("test_cuda_on_host", sanitize) / "test_cuda_on_host"
    return subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("sanitize", ["", *SANITIZERS])
def test_the_emulator(sanitize: str) -> None:
    """Barriers, exchanges, counters, deadlocks that are reported, and threads that leave too early."""
    run = run_toys(sanitize)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("fault", "sanitize", "report"),
    [
        ("barrier", "thread", "ThreadSanitizer: data race"),
        ("order", "thread", "ThreadSanitizer: data race"),
        ("bounds", "address", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_a_sanitizer_sees_what_is_wrong(fault: str, sanitize: str, report: str) -> None:
    """If it did not, the kernels would pass under it whatever they did."""
    run = run_toys(sanitize, fault)
    assert run.returncode != 0 and report in run.stdout, run.stdout


def test_how_a_gpu_holds_a_sample() -> None:
    """The tables of docs/design/cuda.md, from (C, H·W, bytes) to blocks and bytes of lines, NCHW and then
    channels_last: two numbers of the forward and two of the backward.
    """
    held = {
        (64, 2304, 2): ((8, 73728, 8, 221184), (8, 73728, 8, 221184)),
        (64, 2304, 4): ((16, 73728, 16, 180224), (16, 73728, 16, 180224)),
        (256, 2304, 2): ((16, 147456, 32, 221184), (16, 147456, 32, 221184)),
        (256, 2304, 4): ((32, 147456, 64, 180224), (32, 147456, 64, 180224)),
        (512, 576, 2): ((16, 98304, 32, 147456), (16, 73728, 16, 221184)),
        (512, 576, 4): ((32, 81920, 32, 196608), (16, 147456, 32, 180224)),
    }
    samples = [(*sample, layout) for sample in held for layout in (0, 1)]
    expected = [numbers for layouts in held.values() for numbers in layouts]
    # Such a sample is too large.
    samples.append((512, 2304, 4, 1))
    expected.append((0, 0, 0, 0))
    asked = "".join(" ".join(map(str, sample)) + "\n" for sample in samples)
    program = library.build("print_holds", "") / "print_holds"
    printed = subprocess.run([program], input=asked, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert [tuple(map(int, line.split())) for line in printed.splitlines()] == expected


# A choice of the tests, because the processor runs a kernel's threads in turn; tests/cuda_on_host/launches.py
# has every operation. This runs all: MRCN_FAST_TEST_CUDA_ON_HOST=1 python -m pytest tests/test_block*.py
RUNS = {
    "block": (
        *("tests/test_block.py", "tests/test_block_accuracy.py", "tests/test_block_memory.py"),
        "-k",
        "(shapes_at_the_edges and float32) or (in_every_layout and pair and bfloat16) "
        "or where_the_mean_is_large or every_element or bitwise or (nonfinite and pair and se and not input)",
    ),
    "derivatives": (
        "tests/test_block_derivatives.py",
        "-k",
        "(test_gradcheck and se and normalized and contiguous) "
        "or test_opcheck_of_every_dtype_and_missing_gradients",
    ),
    "gates": ("tests/test_gates.py", "-k", "cuda"),
    "cqc": (
        "tests/test_cqc.py",
        "-k",
        "(in_every_layout and float32) or nonfinite or every_element or coinciding "
        "or (test_gradcheck and none) or clamped_or_overflow or torchs",
    ),
}


# The held kernels have no float64 and no CBAM. Their other tests are in launches.py.
HELD = (
    *("tests/test_block.py", "tests/test_block_accuracy.py", "tests/test_nonfinite.py"),
    "tests/test_block_derivatives.py",
    "-k",
    "(restitution_alone and not cbam) or (accuracy_where_the_mean_is_large and pair and dtype0) "
    "or (shapes_at_the_edges and pair and float32 and (shape1 or shape3 or shape5)) "
    "or (not_finite and pair and (se or eca) and (dtype0 or dtype2)) or (left_out_of_the_loss and pair)",
)


@pytest.mark.parametrize("run", RUNS)
def test_what_every_backend_must_hold(run: str) -> None:
    run_tests(*RUNS[run])


def test_what_the_held_kernels_must_hold() -> None:
    run_tests(*HELD, held=True)


def test_launches() -> None:
    run_tests("tests/cuda_on_host/launches.py")


@pytest.mark.parametrize("sanitize", SANITIZERS)
def test_sanitized(sanitize: str) -> None:
    run_tests("tests/cuda_on_host/launches.py", "-k", "sanitized", sanitize=sanitize)
