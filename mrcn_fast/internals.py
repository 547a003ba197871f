"""Every private part of torch that the library uses, each with what happens where it is gone.

A torch that renames one of them may make the library slower or leave a special case to torch's own message;
it must not break the library. Seen to be there: torch 2.11 to 2.13.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_F = TypeVar("_F", bound=Callable[..., Any])


# Looked up once, because every call of an operation asks them.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)
_tracing_state = getattr(torch._C, "_get_tracing_state", lambda: None)


def under_transform() -> bool:
    """Whether one of `torch.func`'s transforms (vmap, grad, vjp, ...) is active.

    Without torch's answer: False. The transforms then refuse our Functions in torch's words.
    """
    return bool(_transforms_active())


def has_batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a tensor holds several, as `torch.autograd.grad` with ``is_grads_batched`` passes them.

    Without torch's answer: False. Our operations then refuse such tensors in torch's words.
    """
    return any([t is not None and _is_batched(t) for t in tensors])


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed.

    Without torch's answer: False. Tensors with a tangent are then refused in torch's words.
    """
    return getattr(forward_ad, "_current_level", -1) >= 0


def needs_plain_operations() -> bool:
    """Whether tangents are computed or torch.jit records.

    Both know the derivatives of torch's operations alone.
    """
    return in_forward_mode() or _tracing_state() is not None


def assume_constant(function: _F) -> _F:
    """Let torch.compile call the function once, while it traces, and take the result as a constant.

    It does what `torch.compiler.assume_constant_result` does, without the two seconds of importing
    torch._dynamo. Where the mark is of no effect, torch.compile traces through the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def keep_whole_in_inductor(operation: Any) -> None:
    """Let Inductor call an operation that has a decomposition for exporters.

    Inductor does so by itself, but where the environment has ``CI`` it takes the decomposition for a slip of
    torch's own and stops. Without Inductor, or with one of other names, nothing is done.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operation in getattr(lowering, "lowerings", (operation,)):
        return
    try:
        tag = lowering.get_layout_constraint_tag(operation, with_default=True)
        constraint = lowering.tag_to_layout_constraint(tag)
        lowering.make_fallback(operation, layout_constraint=constraint, warn=False)
    except (AttributeError, TypeError, AssertionError):
        return


# --- Triton: this section's functions are called where Triton is imported already -------------------------

# The oldest and the newest Triton with which a compiled kernel was seen to be launched again.
TRITON_RELAUNCHES = ((3, 6), (3, 9))


def compiled_kernel_type() -> type | None:
    """Return the type of what Triton's ``kernel[grid](...)`` returns, if it can be launched again.

    `backends/triton/launch.py` calls such an object as ``compiled[(x, 1, 1)](*arguments)``, with all the
    kernel's arguments in order, the constants included, and with an address in place of each tensor. It also
    relies on what Triton compiles a kernel for: types, the values of integers, pointers that are multiples of
    16. None of this is documented, and it has changed between versions. Seen to work: Triton 3.6 to 3.9.

    Returns:
        The type; None where it is gone, or with a Triton that was never tried. Every launch then goes through
        ``kernel[grid](...)``, which computes the same and takes more of the host's time.
    """
    triton = importlib.import_module("triton")
    oldest, newest = TRITON_RELAUNCHES
    version = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
    if not oldest <= version <= newest:
        return None
    return getattr(getattr(triton, "compiler", None), "CompiledKernel", None)


def kernel_parameters(kernel: Any) -> tuple[str, ...]:
    """Return the names of a Triton kernel's parameters, in order.

    Seen to have ``arg_names``: the kernels of Triton 3.9, compiled and interpreted. Without it the names come
    from the signature of the function that ``triton.jit`` was given.
    """
    names = getattr(kernel, "arg_names", None)
    return tuple(names if names is not None else inspect.signature(kernel.fn).parameters)
