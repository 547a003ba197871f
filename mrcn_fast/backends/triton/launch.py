"""The host's side of a launch: arguments by name, and a short way to a kernel that was launched before.

At every call ``kernel[grid](...)`` works out what its arguments make of the kernel, which takes longer for
forty arguments than many of these kernels run, and its launcher asks the driver about every tensor. Both
answers are the same for the same types, integers and alignments. A `Launcher` therefore keeps each compiled
kernel under these properties and launches it directly (`internals.compiled_kernel_type`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mrcn_fast import internals

# Triton compiles another kernel for a pointer that is no multiple of this, and for an integer of 64 bits.
ALIGNMENT = 16
FIRST_LONG = 2**31

COMPILED_KERNEL = internals.compiled_kernel_type()

NO_GROUPS: Mapping[str, tuple[Tensor | None, ...]] = {}


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which ``device`` is the current device, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class Arguments:
    """The arguments of a call's kernels, by the names of the kernels' parameters.

    Args:
        device: The device of the tensors.
        tensors: Tensors, or None for a parameter that this call does not use.
        integers: Integers, and tuples of them. Triton compiles a kernel for their values.
        numbers: Numbers that the kernels do not specialize on (`do_not_specialize`), except for their width.
        groups: Parameters that take a tuple of such tensors.

    Attributes:
        addresses: All arguments, with an address in place of each tensor.
        key: What Triton compiles a kernel for, as long as the arguments are ``plain``.
        plain: Whether nothing but ``key`` decides what Triton compiles, which is nearly always so.
    """

    def __init__(
        self,
        device: torch.device,
        tensors: Mapping[str, Tensor | None],
        integers: Mapping[str, int | tuple[int, ...]],
        numbers: Mapping[str, float],
        groups: Mapping[str, tuple[Tensor | None, ...]] = NO_GROUPS,
    ) -> None:
        self._named = tensors, integers, numbers, groups
        given = tensors.values()
        pointers = [0 if t is None else t.data_ptr() for t in given]
        self.key = (device.index, *integers.values(), *[None if t is None else t.dtype for t in given])
        self.addresses = (*pointers, *integers.values(), *numbers.values())
        for group in groups.values():
            places = tuple([0 if t is None else t.data_ptr() for t in group])
            self.key += tuple([None if t is None else t.dtype for t in group])
            self.addresses += (places,)
            pointers += places
        self.plain = self._are_plain(pointers, max(numbers.values()))

    def _are_plain(self, pointers: Sequence[int], largest: float) -> bool:
        if functools.reduce(operator.or_, pointers) % ALIGNMENT or largest >= FIRST_LONG:
            return False
        # On AMD offsets into a small tensor have 32 bits.
        return torch.version.hip is None or all(
            t.untyped_storage().nbytes() < FIRST_LONG
            for value in self.values()
            for t in (value if isinstance(value, tuple) else (value,))
            if isinstance(t, Tensor)
        )

    def names(self) -> tuple[str, ...]:
        """Return the names of all arguments."""
        return tuple(itertools.chain(*self._named))

    def values(self) -> tuple[Any, ...]:
        """Return all arguments, tensors as they are, in the order of `names` and `addresses`."""
        return tuple(itertools.chain(*[named.values() for named in self._named]))


class Launcher:
    """A kernel with its constants and its launch options.

    Args:
        kernel: A Triton kernel. Its compile-time parameters stand after all others.
        constants: The values of the compile-time parameters, by name.
        options: Triton's launch options, such as ``num_warps``.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any], **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self._parameters = internals.kernel_parameters(kernel)
        self.constants = tuple([constants[name] for name in self._parameters if name in constants])
        # By the arguments' keys: what Triton compiled, and what picks the kernel's arguments.
        self._compiled: dict[tuple[Any, ...], tuple[Any, operator.itemgetter[Any]]] = {}

    def _picker(self, given: Arguments) -> operator.itemgetter[Any]:
        """Return what picks the kernel's arguments from ``given``, in the order of its parameters."""
        place = {name: i for i, name in enumerate(given.names())}
        return operator.itemgetter(*[place[name] for name in self._parameters[: -len(self.constants)]])

    def ordered(self, given: Arguments) -> tuple[Any, ...]:
        """Return the kernel's arguments in the order of its parameters, the constants included."""
        return (*self._picker(given)(given.values()), *self.constants)

    def __call__(self, programs: int, given: Arguments) -> None:
        """Launch ``programs`` programs on the current device and stream."""
        known = self._compiled.get(given.key) if given.plain else None
        if known is not None:
            compiled, pick = known
            # Addresses spare the launcher a question to the driver for every tensor.
            compiled[(programs, 1, 1)](*pick(given.addresses), *self.constants)
            return
        made = self.kernel[(programs,)](*self.ordered(given), **self.options)
        # In the interpreter a launch returns nothing.
        if given.plain and COMPILED_KERNEL is not None and isinstance(made, COMPILED_KERNEL):
            self._compiled[given.key] = made, self._picker(given)
