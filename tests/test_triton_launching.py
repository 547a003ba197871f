"""A launcher launches a kernel that it compiled before directly, and asks Triton otherwise.

The tests use a stand-in for Triton, and Triton itself on a driver that runs nothing (tests/idle_cuda).
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton has no build for this machine")

from mrcn_fast import internals  # noqa: E402
from mrcn_fast.backends.triton import launch as launching  # noqa: E402
from mrcn_fast.backends.triton.launch import Arguments, Launcher  # noqa: E402
from tests.support.processes import run_pytest  # noqa: E402

CPU = torch.device("cpu")
INTEGERS = {"channels": 512, "pitch": 64, "row": 16}
# Room to begin at any address: a view of it is a multiple of 16 or not as the test likes.
MEMORY = torch.zeros(256)


class Compiled:
    """What Triton compiled for one call."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """A kernel that compiles at every call."""

    arg_names = ("second", "first", *INTEGERS, "samples", "chunks", "K")

    def __init__(self) -> None:
        self.made: list[Compiled] = []
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def call(*arguments: Any, **options: Any) -> Compiled:
            self.calls.append((grid, arguments, options))
            self.made.append(Compiled())
            return self.made[-1]

        return call


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "COMPILED_KERNEL", Compiled)
    return Kernel()


@pytest.fixture
def launcher(kernel: Kernel) -> Launcher:
    return Launcher(kernel, {"K": "constants"}, num_warps=4)


def aligned(offset: int = 0) -> Tensor:
    """Sixteen numbers that begin ``offset`` numbers behind a multiple of 16 bytes."""
    return MEMORY[-MEMORY.data_ptr() // 4 % 4 + offset :][:16]


def given(
    first: Tensor, second: Tensor | None = None, device: torch.device = CPU, samples: int = 3, **integers: int
) -> Arguments:
    tensors = {"first": first, "unused": first, "second": second}
    return Arguments(device, tensors, INTEGERS | integers, {"samples": samples, "chunks": 5})


def test_the_same_call_again_goes_straight_to_what_it_compiled(kernel: Kernel, launcher: Launcher) -> None:
    x, y = aligned(), aligned(16)
    launcher(7, given(x, None))
    assert kernel.calls == [((7,), (None, x, 512, 64, 16, 3, 5, "constants"), {"num_warps": 4})]
    launcher(9, given(y, None, samples=4))
    assert len(kernel.calls) == 1
    assert kernel.made[0].launches == [((9, 1, 1), (0, y.data_ptr(), 512, 64, 16, 4, 5, "constants"))]


def test_a_group_of_tensors_is_one_argument(kernel: Kernel) -> None:
    kernel.arg_names = ("sets", "samples", "K")
    launcher, sets = Launcher(kernel, {"K": "constants"}), (aligned(), aligned(16))
    for group in (sets, sets, (sets[0].view(torch.int32), sets[1])):
        launcher(1, Arguments(CPU, {}, {}, {"samples": 3}, {"sets": group}))
    assert [arguments for _, arguments, _ in kernel.calls] == [
        (sets, 3, "constants"),
        (group, 3, "constants"),
    ]
    addresses = tuple(t.data_ptr() for t in sets)
    assert kernel.made[0].launches == [((1, 1, 1), (addresses, 3, "constants"))]
    launcher(1, Arguments(CPU, {}, {}, {"samples": 3}, {"sets": (sets[0], aligned(1))}))
    assert len(kernel.calls) == 3, "an odd address in the group"


def test_every_launch_is_tritons_where_compiled_kernels_are_not_known(
    kernel: Kernel, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "COMPILED_KERNEL", None)
    for _ in range(2):
        launcher(1, given(aligned()))
    assert len(kernel.calls) == 2 and not any(made.launches for made in kernel.made)


def test_compiled_kernels_are_known_for_the_tritons_that_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, known in (("3.5.1", False), ("3.6.0", True), ("3.9.2+rocm7", True), ("3.10.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        assert (internals.compiled_kernel_type() is not None) == known, version
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.delattr(triton.compiler, "CompiledKernel")
    assert internals.compiled_kernel_type() is None


def test_a_kernels_parameters_are_its_functions_where_it_does_not_list_them() -> None:
    def function(x: Any, K: Any) -> None: ...

    assert internals.kernel_parameters(SimpleNamespace(fn=function)) == ("x", "K")
    assert internals.kernel_parameters(triton.jit(function)) == ("x", "K")


@pytest.mark.parametrize(
    "other",
    [
        given(aligned().view(torch.int32), aligned()),
        given(aligned(), None),
        given(aligned(), aligned(), pitch=1),
        given(aligned(), aligned(), row=2**31),
        given(aligned(), aligned(), device=torch.device("cuda", 1)),
    ],
    ids=["dtype", "missing tensor", "integer", "long integer", "device"],
)
def test_another_call_is_compiled_by_itself(kernel: Kernel, launcher: Launcher, other: Arguments) -> None:
    first = given(aligned(), aligned())
    for call in (first, other, first, other):
        launcher(1, call)
    assert len(kernel.calls) == 2
    assert [len(made.launches) for made in kernel.made] == [1, 1]


@pytest.mark.parametrize(
    "odd",
    [given(aligned(1), aligned()), given(aligned(), aligned(), samples=2**31)],
    ids=["address", "number"],
)
def test_what_triton_may_compile_otherwise_goes_its_way(
    kernel: Kernel, launcher: Launcher, odd: Arguments
) -> None:
    for _ in range(2):
        launcher(1, given(aligned(), aligned()))
        launcher(1, odd)
    assert len(kernel.calls) == 3
    assert [len(made.launches) for made in kernel.made] == [1, 0, 0]


def test_on_amd_a_large_tensor_goes_tritons_way(
    kernel: Kernel, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(launching, "FIRST_LONG", MEMORY.nbytes)
    for _ in range(2):
        launcher(1, given(aligned()))
    assert len(kernel.calls) == 2
    monkeypatch.setattr(launching, "FIRST_LONG", MEMORY.nbytes + 1)
    for _ in range(2):
        launcher(1, given(aligned()))
    assert len(kernel.calls) == 3


def test_nothing_is_remembered_where_nothing_was_compiled(launcher: Launcher) -> None:
    """As in the interpreter, whose launches return nothing."""
    launcher.kernel = {(1,): lambda *_, **__: None}
    launcher(1, given(aligned()))
    launcher(1, given(aligned()))
    assert not launcher._compiled


FIRST_CALLS = """
import threading, torch
from mrcn_fast import dispatch
together, errors = threading.Barrier(8), []

def first_call():
    together.wait()
    try:
        assert dispatch.KERNELS["triton"].serves("cpu", torch.float32) is None
    except Exception as error:
        errors.append(error)

threads = [threading.Thread(target=first_call) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not errors, errors
"""


def test_first_calls_from_several_threads() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", FIRST_CALLS], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the driver is written for Linux")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU, and a driver that runs everything")
def test_launches_of_triton_itself() -> None:
    run_pytest("tests/idle_cuda/launches.py", environment={"TRITON_INTERPRET": "0"})
