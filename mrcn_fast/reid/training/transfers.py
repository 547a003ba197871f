"""Transfers to and from a GPU during which the host goes on to launch kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to `device`; a CUDA device copies it asynchronously, from pinned memory."""
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from memory that isn't pinned would wait for all work launched before.
    return tensor.pin_memory().to(device, non_blocking=True)


class Readings:
    """An asynchronous copy of the numbers of a (K,) tensor to the host.

    `values()` waits for the copy, but not for work that was launched after it.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def values(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._numbers.tolist()
        return found
