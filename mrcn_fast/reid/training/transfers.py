"""To a GPU and back without waiting: while it computes, the host goes on and launches what comes next."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The host's `tensor` on `device`; a CUDA device takes it when it comes to it, from pinned memory."""
    if device.type != "cuda":
        return tensor.to(device)
    # From memory that is not pinned, torch waits until everything launched before is done.
    return tensor.pin_memory().to(device, non_blocking=True)


class Readings:
    """The numbers of a (K,) tensor on their way to the host.

    `values()` waits until they are there, and not for what was launched after them.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)  # which makes it pinned memory
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def values(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._numbers.tolist()
        return found
