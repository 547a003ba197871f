"""What `torch.vmap` makes of the operations: rules that torch's dispatcher calls for a mapped dimension.

Samples are independent of one another in the block, so a forward whose parameters are not mapped takes the
mapped dimension as more samples: one call for all. Everything else, such as a backward, whose parameter
gradients are sums over samples, is called once for each place of the mapped dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mrcn_fast.backends import shapes
from mrcn_fast.operations import LOSS, OPERATIONS, Operation

Rule = Callable[..., tuple[Any, Any]]


def register(namespace: str, operation: Callable[[str], Callable[..., Any]], lib: Any = None) -> None:
    """Registers the rules of all operations of ``namespace``; ``operation(name)`` gives each."""
    rules: dict[str, Callable[[Callable[..., Any]], Rule]] = {}
    for name in (LOSS.forward, LOSS.backward):
        rules[name] = _one_by_one
    for block in OPERATIONS.values():
        rules[block.forward] = _folding(block)
        rules[block.backward] = _one_by_one
    for name, rule in rules.items():
        torch.library.register_vmap(f"{namespace}::{name}", rule(operation(name)), lib=lib)


def _one_by_one(operation: Callable[..., Any]) -> Rule:
    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        made = []
        for i in range(info.batch_size):
            found = operation(*(_selected(a, d, i) for a, d in zip(arguments, in_dims, strict=True)))
            made.append(found if isinstance(found, tuple) else (found,))
        stacked = tuple(torch.stack(each) for each in zip(*made, strict=True))
        return (stacked[0], 0) if len(stacked) == 1 else (stacked, (0,) * len(stacked))

    return rule


def _folding(block: Operation) -> Callable[[Callable[..., Any]], Rule]:
    count = len(block.inputs)

    def of(operation: Callable[..., Any]) -> Rule:
        one_by_one = _one_by_one(operation)

        def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
            if any(dim is not None for dim in _flat(in_dims[count:])):
                return one_by_one(info, in_dims, *arguments)
            mapped = [
                x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                for x, dim in zip(arguments[:count], in_dims, strict=False)
            ]
            samples = mapped[0].shape[1]
            *sets, saved = operation(*(x.flatten(0, 1) for x in mapped), *arguments[count:])
            # A result with all six sets has them one after the other, each with all samples.
            parts = [x.unflatten(0, (block.batches, info.batch_size, samples)) for x in sets]
            made = [x.movedim(1, 0).flatten(1, 2) for x in parts]
            at = shapes.sample_dimension(saved)
            return (*made, saved.unflatten(at, (info.batch_size, samples))), (*[0] * len(made), at)

        return rule

    return of


def _selected(argument: Any, dim: Any, index: int) -> Any:
    """The argument's slice at a place of the mapped dimension; of a list, each tensor's."""
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        dims = dim if isinstance(dim, Sequence) else [dim] * len(argument)
        return [_selected(a, d, index) for a, d in zip(argument, dims, strict=True)]
    return argument.select(dim, index) if isinstance(argument, Tensor) and dim is not None else argument


def _flat(dims: Sequence[Any]) -> list[Any]:
    return [d for dim in dims for d in (_flat(dim) if isinstance(dim, Sequence) else [dim])]
