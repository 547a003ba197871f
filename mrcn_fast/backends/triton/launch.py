"""Launches that skip Triton's own way to a kernel where the same call has gone it before.

`kernel[grid](...)` finds out at every call what its arguments make of the kernel, which for forty of them
takes longer than many of these kernels run, and its launcher asks the driver about every tensor. Both answers
are the same for the same types, integers and alignments: those are remembered here with what was compiled.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

# Triton compiles otherwise for a pointer that is no multiple of it, and for an integer of 64 bits.
ALIGNMENT = 16
FIRST_LONG = 2**31


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it ``device`` where it is another."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class Arguments:
    """What the kernels of a call are given, and what Triton makes of it: found out once for all of them.

    Integers are specialized on; numbers are not (`do_not_specialize`), but for how many bits they need.
    """

    def __init__(
        self,
        device: torch.device,
        tensors: Sequence[Tensor | None],
        integers: tuple[int, ...],
        numbers: tuple[float, ...],
    ) -> None:
        self.tensors, self.integers, self.numbers = tensors, integers, numbers
        self.addresses = [0 if t is None else t.data_ptr() for t in tensors]
        self.key = (device.index, integers, *[None if t is None else t.dtype for t in tensors])
        self.plain = self._are_plain()

    def _are_plain(self) -> bool:
        """Whether nothing but `key` decides what is compiled, as nearly always."""
        if functools.reduce(operator.or_, self.addresses) % ALIGNMENT or max(self.numbers) >= FIRST_LONG:
            return False
        # On AMD offsets into a small tensor have 32 bits.
        return torch.version.hip is None or all(
            t is None or t.untyped_storage().nbytes() < FIRST_LONG for t in self.tensors
        )


class Launcher:
    """A kernel with its constants and options.

    ``arrange`` makes of a call's tensors, integers and numbers what this kernel takes before its constants.
    """

    def __init__(
        self,
        kernel: Any,
        constants: Sequence[Any],
        arrange: Callable[[Sequence[Any], tuple[int, ...], tuple[float, ...]], tuple[Any, ...]],
        **options: Any,
    ) -> None:
        self.kernel, self.constants, self.arrange, self.options = kernel, constants, arrange, options
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(self, programs: int, given: Arguments) -> None:
        """Launch so many programs on the current device and stream."""
        compiled = self._compiled.get(given.key) if given.plain else None
        if compiled is not None:  # an address for every tensor: the driver need not be asked about it
            arguments = self.arrange(given.addresses, given.integers, given.numbers)
            compiled[(programs, 1, 1)](*arguments, *self.constants)
            return
        arguments = self.arrange(given.tensors, given.integers, given.numbers)
        made = self.kernel[(programs,)](*arguments, *self.constants, **self.options)
        if given.plain and isinstance(made, CompiledKernel):  # in the interpreter it is not
            self._compiled[given.key] = made
