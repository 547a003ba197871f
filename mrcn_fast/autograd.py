"""The autograd Functions around the kernels.

One Function serves the four block operations (`MODES`), since all of them save the same: their inputs, which
the layer before keeps anyway, and what their backend's forward gives last: statistics, O(N·C). Nothing the
size of a feature map that the block made itself is kept. The second derivative goes through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrcn_fast import dispatch, reference
from mrcn_fast.backends import shapes


class Mode(NamedTuple):
    """A block operation: its ops are ``<op>_forward`` and ``<op>_backward``."""

    op: str
    inputs: int  # feature maps it takes: a pair or one
    restitutes: bool  # knows restitute_to


MODES = {
    "pair": Mode("block", 2, True),
    "concat": Mode("block_concat", 2, True),
    "restitute": Mode("restitute", 1, True),
    "snr": Mode("snr", 1, False),
}


# The identity of a slot of the loss that none was left for.
NOBODY = torch.iinfo(torch.int64).max


def run_block(
    mode: str, backend: str, gate: str, eps: float, restitute_to: str, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """The feature sets that the operation makes, then the statistics for its backward."""
    op, count, restitutes = MODES[mode]
    inputs, (norm_weight, norm_bias), parameters = split(tensors, count)
    flags = (restitute_to == "input",) if restitutes else ()
    kernel = dispatch.KERNELS[backend].operation(f"{op}_forward")
    made: tuple[Tensor, ...] = kernel(*inputs, norm_weight, norm_bias, list(parameters), gate, eps, *flags)
    return made


class BlockFunction(torch.autograd.Function):
    """(inputs, norm_weight, norm_bias, *gate_parameters) -> the feature sets that the operation makes."""

    @staticmethod
    def forward(
        ctx: Any,
        mode: str,
        backend: str,
        gate: str,
        eps: float,
        restitute_to: str,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        *sets, statistics = run_block(mode, backend, gate, eps, restitute_to, *tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(statistics, *tensors)
        ctx.settings = (mode, backend, gate, eps, restitute_to)
        return tuple(sets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        mode, backend, gate, eps, restitute_to = ctx.settings
        statistics, *tensors = ctx.saved_tensors
        op, count, restitutes = MODES[mode]
        inputs, (norm_weight, norm_bias), parameters = split(tuple(tensors), count)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True

            def again(*tensors: Tensor) -> tuple[Tensor, ...]:
                inputs, (norm_weight, norm_bias), parameters = split(tensors, count)
                # The half dtypes in float32, as the kernels have them.
                precise = [x.to(shapes.precise(x.dtype)) for x in inputs]
                made = dispatch.run_reference(
                    mode, precise, norm_weight, norm_bias, parameters, gate, eps, restitute_to
                )
                return tuple(x.to(inputs[0].dtype) for x in made)

            return (None,) * 5 + differentiable(again, gradients, tensors)
        flags = (restitute_to == "input",) if restitutes else ()
        kernel = dispatch.KERNELS[backend].operation(f"{op}_backward")
        *of_tensors, of_gate = kernel(
            *gradients, *inputs, statistics, norm_weight, norm_bias, list(parameters), gate, *flags
        )
        return (None,) * 5 + (*of_tensors, *of_gate)


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, a view for each that came before: tracing a Function refuses one tensor in two places."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        t.view_as(t) if any(t is earlier for earlier in tensors[:i]) else t for i, t in enumerate(tensors)
    )


def split(
    tensors: tuple[Tensor, ...], count: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs, instance-norm parameters, gate parameters."""
    return tensors[:count], tensors[count : count + 2], tensors[count + 2 :]


def differentiable(
    function: Callable[..., tuple[Tensor, ...]],
    gradients: tuple[Tensor | None, ...],
    tensors: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``function(*tensors)`` to its tensors, as differentiable functions of all of them.

    Views stand in for the tensors: one may be computed from another, and only the direct gradient is
    asked for.
    """
    views = [t.view_as(t) for t in tensors]
    outputs = function(*views)
    wanted = [v for v in views if v.requires_grad]
    given = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    if not wanted or not given:
        return (None,) * len(tensors)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in given], wanted, [g for _, g in given], create_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if v.requires_grad else None for v in views)


class CQCFunction(torch.autograd.Function):
    """(labels, infrared_labels, *features) -> total (), losses (B_v,), identities (B_v,), count ().

    ``features`` is the six sets or all of them stacked. Losses and identities stand in slots, one for each
    visible sample, in an order of the backend's own; slots left over have loss 0 and the identity `NOBODY`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        margin: float,
        detach_negative: bool,
        labels: Tensor,
        infrared_labels: Tensor,
        *features: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernel = dispatch.KERNELS[backend].operation("cqc_forward")
        total, losses, identities, count, saved = kernel(
            features, labels, infrared_labels, margin, detach_negative
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(identities, count)
        ctx.save_for_backward(labels, infrared_labels, identities, saved, *features)
        ctx.settings = (backend, margin, detach_negative)
        return total, losses, identities, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        backend, margin, detach_negative = ctx.settings
        labels, infrared_labels, identities, saved, *features = ctx.saved_tensors
        of_total, of_losses = gradients[:2]
        if of_total is None and of_losses is None:
            return (None,) * (5 + len(features))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True

            def again(*features: Tensor) -> tuple[Tensor, Tensor]:
                precise = [f.to(shapes.precise(f.dtype)) for f in features]
                losses, _ = reference.cqc_loss(
                    unstack(precise, labels, infrared_labels),
                    labels,
                    infrared_labels,
                    margin=margin,
                    detach_negative=detach_negative,
                )
                return losses.sum(), losses

            # The reference has the identities in ascending order, and no slots left over.
            slots = identities.argsort()[: int((identities != NOBODY).sum())]
            of_identities = None if of_losses is None else of_losses[slots]
            return (None,) * 5 + differentiable(again, (of_total, of_identities), features)
        gradient = of_losses if of_total is None else of_total
        if of_total is not None and of_losses is not None:
            gradient = of_total + of_losses
        kernel = dispatch.KERNELS[backend].operation("cqc_backward")
        stacked = kernel(gradient, features, labels, infrared_labels, saved, detach_negative)
        sets = unstack([stacked], labels, infrared_labels) if len(features) == 6 else (stacked,)
        return (None,) * 5 + tuple(sets)


def unstack(features: Any, labels: Tensor, infrared_labels: Tensor) -> list[Tensor]:
    """The six sets, of six tensors or of one (3 B_v + 3 B_n, D)."""
    if len(features) == 6:
        return list(features)
    return list(features[0].split([labels.shape[0]] * 3 + [infrared_labels.shape[0]] * 3))
