"""Every private part of torch that the library uses, and how the library goes on without it.

The benchmark suites use two more, which nothing else needs: a GPU's pause, and settings of the compiler.

Each part serves speed or a special case. Where a torch no longer has it, a plain way takes its place, which
is slower or leaves the special case out, and tests/test_internals.py runs that way. All parts were seen to
work with torch 2.11, 2.12 and 2.13.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.data import DataLoader

_F = TypeVar("_F", bound=Callable[..., Any])


def _private(path: str) -> Any:
    """The part of torch at a dotted path, or None where this torch does not have it."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# These are looked up once, because every call of an operation asks them.
_transforms_active = _private("_C._are_functorch_transforms_active")
_is_batched = _private("_C._functorch.is_legacy_batchedtensor")
_is_tracing = _private("_C._is_tracing") or _private("jit.is_tracing")
_assert_async = _private("_assert_async")
_register_decomposition = _private("_decomp.register_decomposition")


def under_transform(tensors: Iterable[object]) -> bool:
    """Whether one of `torch.func`'s transforms (vmap, grad, vjp, ...) is active.

    Uses ``torch._C._are_functorch_transforms_active``. Without it the answer is whether a transform has
    wrapped one of the call's tensors. A call inside a transform that gets none of its tensors is then refused
    by torch.
    """
    if _transforms_active is None:
        return _any_wrapped(tensors)
    return bool(_transforms_active())


def has_batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a tensor holds several, as `torch.autograd.grad` with ``is_grads_batched`` passes them.

    Uses ``torch._C._functorch.is_legacy_batchedtensor``. Without it any wrapped tensor counts as batched.
    """
    if _is_batched is None:
        return _any_wrapped(tensors)
    return any([t is not None and _is_batched(t) for t in tensors])


def _any_wrapped(tensors: Iterable[object]) -> bool:
    """Whether one of the tensors is a transform's wrapper around another: it has no memory of its own."""
    for t in tensors:
        if isinstance(t, Tensor):
            try:
                t.untyped_storage()
            except NotImplementedError:
                return True
    return False


def in_forward_mode(tensors: Iterable[object]) -> bool:
    """Whether forward-mode derivatives are being computed.

    Uses ``torch.autograd.forward_ad._current_level``, which takes 0.1 µs where the public ``unpack_dual``
    takes 0.4 µs for each of a call's eight tensors. Without it ``unpack_dual`` is asked for tangents.
    """
    level = getattr(forward_ad, "_current_level", None)
    if level is None:
        unpacked = (forward_ad.unpack_dual(t) for t in tensors if isinstance(t, Tensor))
        return any(dual.tangent is not None for dual in unpacked)
    return bool(level >= 0)


def recorded_by_jit() -> bool:
    """Whether `torch.jit.trace` records, which knows the derivatives of torch's own operations alone.

    Uses ``torch._C._is_tracing``, and without it `torch.jit.is_tracing`, which calls it.
    """
    return bool(_is_tracing())


def assume_constant(function: _F) -> _F:
    """Let torch.compile call the function once, while it traces, and take the result as a constant.

    Sets ``_dynamo_marked_constant``, as `torch.compiler.assume_constant_result` does, without the two seconds
    of importing torch._dynamo. Where the mark has no effect, torch.compile traces through the function or
    breaks the graph there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def always_equal(size: int, number: int) -> bool:
    """Whether a size equals the number in every run of code that is being traced, without a guard for it.

    Uses ``torch.fx.experimental.symbolic_shapes.statically_known_true``. Without it the answer is False.
    """
    try:
        from torch.fx.experimental.symbolic_shapes import statically_known_true
    except ImportError:
        return False
    return bool(statically_known_true(size == number))


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Make the compiled graph raise RuntimeError where the condition does not hold.

    Uses ``torch._assert_async``. Without it nothing is checked, as in eager mode on a GPU.
    """
    if _assert_async is not None:
        _assert_async(condition, message)


def register_decomposition(operation: Any) -> Callable[[_F], _F]:
    """A decorator that registers a function as the decomposition of an operation, for exporters.

    Uses ``torch._decomp.register_decomposition``. Without it nothing is registered, and exporters that know
    standard operators alone, such as ONNX's, refuse the operation.
    """
    if _register_decomposition is None:
        return lambda function: function
    registered: Callable[[_F], _F] = _register_decomposition(operation)
    return registered


def decompositions(namespace: str) -> dict[Any, Callable[..., Any]]:
    """The decompositions that are registered for the operations of a namespace.

    Uses ``torch._decomp.decomposition_table``. Without it there are none.
    """
    table = _private("_decomp.decomposition_table") or {}
    return {op: made for op, made in table.items() if getattr(op, "namespace", None) == namespace}


def keep_whole_in_inductor(operation: Any) -> None:
    """Let Inductor call an operation that has a decomposition for exporters.

    Inductor does so by itself, but where the environment variable ``CI`` is set it takes the decomposition
    for a mistake in torch and stops. Uses ``torch._inductor.lowering``. Without it nothing is done.
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


def parameters(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """The module's attributes of these names, which are parameters or stand in for one.

    Uses ``nn.Module._parameters``, because `nn.Module.__getattr__` takes a microsecond for each parameter. A
    parameter that is not there is parametrized or a replica's, and is looked up as an attribute. Without
    ``_parameters`` all are.
    """
    known: dict[str, Tensor | None] = getattr(module, "_parameters", {})
    found = []
    for name in names:  # a comprehension takes longer
        p = known.get(name)
        found.append(getattr(module, name) if p is None else p)
    return found


def submodule(module: nn.Module, name: str) -> Any:
    """The module's child of this name, or what stands in for it.

    Uses ``nn.Module._modules``, because `nn.Module.__getattr__` takes a microsecond. Without it, or without
    the child there, it is looked up as an attribute.
    """
    child = getattr(module, "_modules", {}).get(name)
    return getattr(module, name) if child is None else child


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a call of the module would call a hook that is registered on it.

    Uses ``nn.Module._forward_hooks`` and ``_forward_pre_hooks``. Without them the answer is True, and the
    module is called for hooks that may not be there.
    """
    return bool(getattr(module, "_forward_hooks", True) or getattr(module, "_forward_pre_hooks", True))


def end_workers(loader: DataLoader[Any]) -> None:
    """End the persistent processes of a loader, if it has started them.

    Uses ``DataLoader._iterator`` and the iterator's ``_shutdown_workers``. Without them SIGTERM is sent to
    all daemonic processes that this one has started. Python sends it to them again when this process ends,
    which ends those that outlive one SIGTERM.
    """
    iterator = getattr(loader, "_iterator", loader)
    if iterator is None:
        return
    if shutdown := getattr(iterator, "_shutdown_workers", None):
        shutdown()
    else:
        for process in multiprocessing.active_children():
            if process.daemon:
                process.terminate()
    loader._iterator = None  # the next iteration starts new processes


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
