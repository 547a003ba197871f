"""Transfers to and from a GPU during which the host goes on to launch kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

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


class SideStream:
    """A stream of a CUDA device beside the current one; on other devices work stays where it is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Launch work that doesn't wait for the current stream; `hand_over` what it makes."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def hand_over(self, made: Iterable[Tensor]) -> None:
        """Have the current stream wait for the work, and let it use tensors that were made there."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in made:
            tensor.record_stream(current)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Launch work after what is in the current stream, which then waits for the work."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self.ahead():
            yield
        self.hand_over(())
