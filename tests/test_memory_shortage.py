"""Allocations that fail: the message has the bytes that were wanted, whichever allocator it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mrcn_fast.memory import MemoryShortageError, enough_memory

HUGE = 1 << 60


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has"),
            "about 1610612736",
        ),
        (
            RuntimeError("unable to mmap 2359336 bytes from file </torch_1_2>: Cannot allocate memory"),
            "2359336",
        ),
        (MemoryError("Unable to allocate 7.45 KiB for an array"), "about 7628"),
    ],
    ids=["CUDA", "shared", "numpy"],
)
def test_the_bytes_are_reported(error: Exception, amount: str) -> None:
    expected = pytest.raises(MemoryShortageError, match=rf"work, could not allocate {amount} bytes\. Less")
    with expected as raised, enough_memory("work", "Less"):
        raise error
    assert raised.value.__cause__ is error


def test_what_really_fails_is_reported() -> None:
    expected = pytest.raises(
        MemoryShortageError, match=rf"for a, could not allocate {HUGE} bytes\. Take less"
    )
    with expected, enough_memory("b", "More"), enough_memory("a", "Take less"):
        torch.empty(HUGE, dtype=torch.uint8)
    expected = pytest.raises(MemoryShortageError, match=rf"for a, could not allocate about {HUGE} bytes")
    with expected, enough_memory("a", "Take less"):
        np.empty(HUGE, dtype=np.uint8)
    # The process goes on.
    assert torch.ones(3).sum() == 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904]"),
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
    ],
    ids=str,
)
def test_a_shortage_without_a_number_is_one_too(error: Exception) -> None:
    expected = pytest.raises(MemoryShortageError, match=r"^not enough memory for work\. Less$")
    with expected, enough_memory("work", "Less"):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("a defect"), ValueError("tried to allocate 3 bytes"), KeyError()]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, enough_memory("work", "Less"):
        raise error
    assert raised.value is error
