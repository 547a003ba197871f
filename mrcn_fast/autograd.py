"""The autograd Functions around the kernels.

One Function serves all block operations (mrcn_fast/operations.py), because all of them save the same: their
inputs, which the layer before keeps anyway, and the last result of their backend's forward, which are O(N·C)
statistics. No feature map that the block has made is kept. The second derivative goes through the reference.

`torch.func`'s transforms (vmap, grad, vjp, jacrev) need a Function with ``setup_context``, whose call takes
torch longer. `TransformedBlockFunction` serves them alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrcn_fast import dispatch, internals, plain, reference
from mrcn_fast.backends import shapes
from mrcn_fast.checks import check_settings, check_tensors
from mrcn_fast.gates import FUSED, MOST_PARAMETERS
from mrcn_fast.operations import LOSS, OPERATIONS, SETS, rows_of_sets

# The identity in the loss's slots that are not used.
NOBODY = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class BlockCall:
    """A block operation with all that a call of it takes besides tensors."""

    mode: str
    gate: str
    eps: float
    restitute_to: str
    inputs: int
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    number: int  # the gate's
    flags: tuple[bool, ...]  # the operations' last argument, where they have one

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The arguments of `forward` for these tensors: the inputs, γ, β and the gate's parameters."""
        n = self.inputs + 2
        return *tensors[:n], list(tensors[n:]), self.number, self.eps, *self.flags

    def run_reference(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The feature sets through the reference, computed as precisely as the kernels do."""
        return plain.run_precisely(self.mode, self.gate, self.eps, self.restitute_to, tensors)


def make_block_call(mode: str, backend: str, gate: str, eps: float, restitute_to: str) -> BlockCall:
    """The call of an operation on a backend's kernels. Raises ValueError where a setting does not fit."""
    check_settings(gate, eps, restitute_to)
    operation, kernels = OPERATIONS[mode], dispatch.KERNELS[backend]
    return BlockCall(
        mode,
        gate,
        float(eps),
        restitute_to,
        len(operation.inputs),
        kernels.operation(operation.forward),
        kernels.operation(operation.backward),
        FUSED.index(gate),
        operation.flags(restitute_to),
    )


def _find_gradients(mode: str, given: tuple[bool, ...]) -> tuple[bool, ...]:
    """For each input, γ, β and each of a gate's parameters: whether a result with a gradient was made of it.

    ``given`` says of each result whether it has a gradient.
    """
    used, by_gate = OPERATIONS[mode].used_by(given)
    return (*used, any(used), any(used), *[by_gate] * MOST_PARAMETERS)


# What a call costs the host is measured in microseconds. torch.compile leaves caches out, and warns of each.
block_call = functools.cache(make_block_call)
_gets_gradient = functools.cache(_find_gradients)


class BlockFunction(torch.autograd.Function):
    """(call, inputs, norm_weight, norm_bias, *gate_parameters) -> the feature sets that are made."""

    @staticmethod
    def forward(ctx: Any, call: BlockCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        *sets, statistics = call.forward(*call.arguments(tensors))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(statistics, *tensors)
        ctx.call = call
        return tuple(sets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        call: BlockCall = ctx.call
        statistics, *tensors = ctx.saved_tensors
        if needs_reference(gradients):
            return None, *differentiable(lambda *t: call.run_reference(t), gradients, tensors)
        n = call.inputs
        found = call.backward(
            *gradients,
            *tensors[:n],
            statistics,
            *tensors[n : n + 2],
            tensors[n + 2 :],
            call.number,
            *call.flags,
        )
        # A tensor of which no set with a gradient was made gets None, as in eager PyTorch. With zeros an
        # optimizer would decay the weight.
        find = _find_gradients if torch.compiler.is_compiling() else _gets_gradient
        wanted = find(call.mode, tuple([g is not None for g in gradients]))
        count = len(tensors)
        return None, *[g if has else None for g, has in zip(found[:count], wanted, strict=False)]


class TransformedBlockFunction(torch.autograd.Function):
    """`BlockFunction` for `torch.func`'s transforms. What is saved for the backward is a result too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: BlockCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = call.forward(*call.arguments(tensors))
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        call: BlockCall = ctx.call

        def again(*tensors: Tensor) -> tuple[Tensor, ...]:
            return call.run_reference(tensors)

        return None, *vector_jacobian_product(again, gradients[:-1], ctx.saved_tensors)


def run_block(
    mode: str, requested: str | None, gate: str, eps: float, restitute_to: str, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The feature sets that the operation ``mode`` makes of a call's tensors.

    An ordinary call goes to the kernels unchecked, because they refuse tensors that don't fit (checks.py says
    who checks what). Only a RuntimeError, which they raise then, leads to the checks here.
    """
    check_settings(gate, eps, restitute_to)
    first = tensors[0]
    if (
        torch.compiler.is_compiling()
        or type(first) is not Tensor
        or internals.under_transform(tensors)
        or internals.in_forward_mode(tensors)
    ):
        return _run_checked(mode, requested, gate, eps, restitute_to, tensors)
    try:
        backend = dispatch.choose_for_plain(requested, first, gate)
        if backend == "reference":
            return _run_checked(mode, backend, gate, eps, restitute_to, tensors)
        if internals.recorded_by_jit():  # it would warn about the checks
            return plain.run_reference(mode, gate, eps, restitute_to, tensors)
        call = block_call(mode, backend, gate, eps, restitute_to)
        if torch.is_grad_enabled():
            return BlockFunction.apply(call, *tensors)
        return call.forward(*call.arguments(tensors))[:-1]  # without the time that a Function takes
    except RuntimeError:
        if fault := _fault(mode, gate, tensors):
            raise fault from None
        raise


def _run_checked(
    mode: str, requested: str | None, gate: str, eps: float, restitute_to: str, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """`run_block` for calls in which no kernel sees the tensors as they are.

    These are calls in plain PyTorch, while tracing, or inside a transform.
    """
    check_tensors(mode, gate, tensors)
    first = tensors[0]
    backend = dispatch.choose_for(requested, first, gate)
    compiling = torch.compiler.is_compiling()
    if backend == "reference" or (not compiling and internals.in_forward_mode(tensors)):
        return plain.run_reference(mode, gate, eps, restitute_to, tensors)
    call = (make_block_call if compiling else block_call)(mode, backend, gate, eps, restitute_to)
    if not compiling and internals.under_transform(tensors):
        return TransformedBlockFunction.apply(call, *tensors)[:-1]
    if not torch.is_grad_enabled():
        return call.forward(*call.arguments(tensors))[:-1]
    return BlockFunction.apply(call, *distinct(*tensors))


def _fault(mode: str, gate: str, tensors: tuple[Tensor, ...]) -> TypeError | ValueError | None:
    """The error that `check_tensors` raises for the tensors, or None."""
    try:
        check_tensors(mode, gate, tensors)
    except (TypeError, ValueError) as error:
        return error
    return None


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, with a view in place of each repetition: a traced Function takes no tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        t.view_as(t) if any(t is earlier for earlier in tensors[:i]) else t for i, t in enumerate(tensors)
    )


def needs_reference(gradients: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward has to consist of torch's operations.

    With ``create_graph=True`` the backward is differentiated itself, and with ``is_grads_batched=True`` each
    gradient holds several.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or internals.has_batched(gradients)


def differentiable(
    function: Callable[..., tuple[Tensor, ...]],
    gradients: tuple[Tensor | None, ...],
    tensors: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*tensors)`` to its tensors, as differentiable functions of all of them.

    It differentiates by views of the tensors, because one tensor may be computed from another and only the
    direct gradient is wanted.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [t.view_as(t) for t in tensors]
        outputs = function(*views)
    wanted = [v for v in views if v.requires_grad]
    given = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    if not wanted or not given:
        return (None,) * len(tensors)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in given], wanted, [g for _, g in given], create_graph=create_graph, allow_unused=True
        )
    )
    return tuple(next(found) if v.requires_grad else None for v in views)


def vector_jacobian_product(
    function: Callable[..., tuple[Tensor, ...]],
    gradients: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The gradients of ``function(*tensors)`` inside transforms, which may be nested."""
    outputs, product, *_ = torch.func.vjp(function, *tensors)
    given = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, gradients, strict=True))
    found: tuple[Tensor, ...] = product(given)
    return found


class CQCSettings(NamedTuple):
    """The arguments of the loss that are no tensors."""

    backend: str
    margin: float
    detach_negative: bool
    normalize: bool

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `reference.cqc_loss`."""
        return {
            "margin": self.margin, "detach_negative": self.detach_negative, "normalize": self.normalize,
        }  # fmt: skip


def run_cqc(
    settings: CQCSettings, labels: Tensor, infrared_labels: Tensor, features: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Total (), losses (B_v,), identities (B_v,), count (), and what is saved for the backward."""
    kernel = dispatch.KERNELS[settings.backend].operation(LOSS.forward)
    made: tuple[Tensor, ...] = kernel(
        features, labels, infrared_labels, settings.margin, settings.detach_negative, settings.normalize
    )
    return made


def run_cqc_reference(
    settings: CQCSettings, labels: Tensor, infrared_labels: Tensor, features: Sequence[Tensor]
) -> Tensor:
    """The loss of each identity in ascending order, (I,), through the reference."""
    losses, _ = reference.cqc_loss(
        unstack([f.to(shapes.precise(f.dtype)) for f in features], labels, infrared_labels),
        labels,
        infrared_labels,
        **settings.options(),
    )
    return losses


class CQCFunction(torch.autograd.Function):
    """(settings, labels, infrared_labels, *features) -> total (), losses (B_v,), identities (B_v,), count ().

    ``features`` are the six sets, or one tensor that stacks them. Losses and identities stand in slots, one
    for each visible sample, in an order that the backend chooses. An unused slot has the loss 0 and the
    identity `NOBODY`.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: CQCSettings, labels: Tensor, infrared_labels: Tensor, *features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total, losses, identities, count, saved = run_cqc(settings, labels, infrared_labels, features)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(identities, count)
        ctx.save_for_backward(labels, infrared_labels, identities, saved, *features)
        ctx.settings = settings
        return total, losses, identities, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        settings: CQCSettings = ctx.settings
        labels, infrared_labels, identities, saved, *features = ctx.saved_tensors
        of_total, of_losses = gradients[:2]
        if of_total is None and of_losses is None:
            return (None,) * (3 + len(features))
        if needs_reference(gradients):

            def again(*features: Tensor) -> tuple[Tensor, Tensor]:
                losses = run_cqc_reference(settings, labels, infrared_labels, features)
                return losses.sum(), losses

            # The reference has the identities in ascending order, and no unused slots.
            slots = identities.argsort()[: int((identities != NOBODY).sum())]
            of_identities = None if of_losses is None else of_losses[slots]
            return (None,) * 3 + differentiable(again, (of_total, of_identities), features)
        gradient = of_losses if of_total is None else of_total
        if of_total is not None and of_losses is not None:
            gradient = of_total + of_losses
        kernel = dispatch.KERNELS[settings.backend].operation(LOSS.backward)
        stacked = kernel(
            gradient, features, labels, infrared_labels, saved, settings.detach_negative, settings.normalize
        )
        sets = unstack([stacked], labels, infrared_labels) if len(features) == len(SETS) else (stacked,)
        return (None,) * 3 + tuple(sets)


def unstack(features: Any, labels: Tensor, infrared_labels: Tensor) -> list[Tensor]:
    """The six sets, from six tensors or from one that stacks them, (3 B_v + 3 B_n, D)."""
    if len(features) == len(SETS):
        return list(features)
    return list(features[0].split(rows_of_sets(labels.shape[0], infrared_labels.shape[0])))
