"""The block's derivatives on every kernel backend, and torch's own checks of its operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mrcn_fast import MRCNBlock
from mrcn_fast.gates import FUSED
from mrcn_fast.operations import OPERATIONS
from tests.support import block_cases, matrix
from tests.support.block_cases import Case, Problem, randomized
from tests.support.matrix import DEVICE, DTYPES, GATES, KERNEL_BACKENDS, MODES, SETTINGS
from tests.support.tensors import random, same_bits


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mode", "gate", "restitute_to"), SETTINGS)
def test_gradcheck(
    mode: str, gate: str, restitute_to: str, layout: str, backend: str, ops_run: list[str]
) -> None:
    case = Case(mode, gate, restitute_to, (2, 3, 2, 3), torch.float64).in_layout(layout)
    p = block_cases.problem(case)
    assert not block_cases.near_kink(p)
    assert torch.autograd.gradcheck(partial(p.run, backend), p.leaves)
    assert {OPERATIONS[mode].forward, OPERATIONS[mode].backward} <= set(ops_run)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize(("mode", "gate", "restitute_to"), SETTINGS)
def test_gradgradcheck(mode: str, gate: str, restitute_to: str, backend: str, ops_run: list[str]) -> None:
    p = block_cases.problem(Case(mode, gate, restitute_to, (1, 2, 1, 3), torch.float64, eps=0.1))
    assert not block_cases.near_kink(p)
    assert torch.autograd.gradgradcheck(partial(p.run, backend), p.leaves)
    assert OPERATIONS[mode].forward in ops_run


def second_order(backend: str, visible: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of a gradient penalty where infrared is a function of visible."""
    block = randomized(MRCNBlock(3, reduction=4, backend=backend, device=DEVICE, dtype=torch.float64))
    features = block(visible, make(visible))
    first = torch.autograd.grad(sum(f.pow(3).sum() for f in features), visible, create_graph=True)[0]
    return torch.autograd.grad(first.square().sum(), visible)[0]


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("related", ["the same tensor", "a function of it"])
def test_double_backward_where_one_input_depends_on_the_other(backend: str, related: str) -> None:
    visible = random(2, 3, 4, 3).requires_grad_()

    def make(x: Tensor) -> Tensor:
        return x if related == "the same tensor" else x.square() + 1

    torch.testing.assert_close(second_order(backend, visible, make), second_order("reference", visible, make))


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_first_gradients_are_the_same_with_create_graph(mode: str, backend: str) -> None:
    p = block_cases.problem(Case(mode, dtype=torch.float64))
    outputs = p.run(backend, *p.leaves)
    plain = torch.autograd.grad(outputs, p.leaves, p.gradients, retain_graph=True)
    graphed = torch.autograd.grad(outputs, p.leaves, p.gradients, create_graph=True)
    for a, b in zip(plain, graphed, strict=True):
        assert b.requires_grad and not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@matrix.backends(*KERNEL_BACKENDS)
def test_first_gradients_in_float16_with_create_graph(backend: str) -> None:
    """They are computed in float32, as without it, because sums over planes overflow float16."""
    case = Case("concat", shape=(16, 4, 72, 32), dtype=torch.float16, parameter_dtype=torch.float32)
    p = block_cases.problem(case)
    gradients = [g + 2 for g in p.gradients]
    outputs = p.run(backend, *p.leaves)
    plain = torch.autograd.grad(outputs, p.leaves, gradients, retain_graph=True)
    graphed = torch.autograd.grad(outputs, p.leaves, gradients, create_graph=True)
    assert max(float(g.abs().max()) for g in plain[2:]) > torch.finfo(torch.float16).max
    for a, b in zip(plain, graphed, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=1e-3 * float(a.abs().max()))


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if OPERATIONS[mode].results > 1])
def test_any_outputs_may_be_left_out_of_the_loss(mode: str, backend: str) -> None:
    p = block_cases.problem(Case(mode, dtype=torch.float64))
    number = len(p.gradients)
    for size in range(1, number):
        for chosen in itertools.combinations(range(number), size):
            found = []
            for name in (backend, "reference"):
                outputs = p.run(name, *p.leaves)
                some, gradients = [outputs[i] for i in chosen], [p.gradients[i] for i in chosen]
                found.append(torch.autograd.grad(some, p.leaves, gradients, allow_unused=True))
            for leaf, got, want in zip(p.leaves, *found, strict=True):
                zero = torch.zeros_like(leaf)
                torch.testing.assert_close(
                    zero if got is None else got, zero if want is None else want, rtol=1e-11, atol=1e-11
                )


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_single_tensor_may_require_gradients(mode: str, backend: str) -> None:
    p = block_cases.problem(Case(mode))
    everything = block_cases.evaluate(p, backend)
    names = (*block_cases.input_names(mode), *block_cases.parameter_names(p.case.gate))
    for position, name in enumerate(names):
        leaves = [x.detach().requires_grad_(i == position) for i, x in enumerate(p.leaves)]
        outputs = p.run(backend, *leaves)
        used = [(o, g) for o, g in zip(outputs, p.gradients, strict=True) if o.requires_grad]
        (gradient,) = torch.autograd.grad([o for o, _ in used], leaves[position], [g for _, g in used])
        assert same_bits(gradient, everything[f"grad {name}"]), name


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_accumulate_over_calls(mode: str, backend: str) -> None:
    p = block_cases.problem(Case(mode, dtype=torch.float64))
    once = block_cases.evaluate(p, backend)
    for _ in range(2):
        torch.autograd.backward(p.run(backend, *p.leaves), p.gradients)
    for name, leaf in zip(block_cases.input_names(mode), p.inputs, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once[f"grad {name}"])
    for name, leaf in zip(block_cases.parameter_names("se"), p.parameters, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once[f"grad {name}"])


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_an_input_changed_before_the_backward_is_noticed(mode: str, backend: str) -> None:
    p = block_cases.problem(Case(mode))
    first = p.inputs[0] * 1
    outputs = p.run(backend, first, *p.leaves[1:])
    first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outputs, p.gradients)


def op_arguments(p: Problem) -> tuple[list[Any], list[Any], str]:
    """The tensors that the forward operation takes, the flags of both operations, and their name."""
    case = p.case
    norm_weight, norm_bias, *gate_parameters = (q.detach() for q in p.parameters)
    tensors = [*(x.detach() for x in p.inputs), norm_weight, norm_bias, gate_parameters]
    operation = OPERATIONS[case.mode]
    return tensors, list(operation.flags(case.restitute_to)), operation.op


# A mode's shapes and strides follow from its inputs, whatever the gate, and a gate's from its parameters,
# whatever the mode; no shape follows from `restitute_to`.
OPCHECKED = [
    *(("pair", gate, "normalized", "contiguous") for gate in GATES),
    *((mode, "cbam-channel", "input", "contiguous") for mode in MODES if OPERATIONS[mode].restitutes),
    ("snr", "eca", "normalized", "contiguous"),
    *((mode, "se", "normalized", "channels_last") for mode in MODES),
    *((mode, "se", "normalized", "spatially sliced") for mode in MODES),
]


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize(("mode", "gate", "restitute_to", "layout"), OPCHECKED)
def test_opcheck(mode: str, gate: str, restitute_to: str, layout: str, backend: str) -> None:
    p = block_cases.problem(Case(mode, gate, restitute_to, layouts=(layout, layout), gradient_layout=layout))
    tensors, flags, op = op_arguments(p)
    forward, backward = matrix.operations(op, backend)
    arguments = (*tensors, FUSED.index(gate), p.case.eps, *flags)
    torch.library.opcheck(forward, arguments)
    *_, statistics = forward(*arguments)
    inputs, parameters = tensors[: len(p.inputs)], tensors[len(p.inputs) :]
    torch.library.opcheck(
        backward, (*p.gradients, *inputs, statistics, *parameters, FUSED.index(gate), *flags)
    )


# The results' dtypes follow from the inputs' alike in every mode.
@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize(("mode", "dtype"), [*zip(MODES, itertools.cycle(DTYPES[::-1]), strict=False)])
def test_opcheck_of_every_dtype_and_missing_gradients(mode: str, dtype: torch.dtype, backend: str) -> None:
    p = block_cases.problem(Case(mode, "cbam-channel", dtype=dtype))
    tensors, flags, op = op_arguments(p)
    forward, backward = matrix.operations(op, backend)
    arguments = (*tensors, FUSED.index(p.case.gate), p.case.eps, *flags)
    torch.library.opcheck(forward, arguments)
    *_, statistics = forward(*arguments)
    inputs, parameters = tensors[: len(p.inputs)], tensors[len(p.inputs) :]
    gradients: list[Tensor | None] = [*p.gradients]
    if len(gradients) > 1:
        gradients[1] = None
    torch.library.opcheck(
        backward,
        (*gradients, *inputs, statistics, *parameters, FUSED.index(p.case.gate), *flags),
    )
