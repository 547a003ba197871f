"""The library without each private part of torch that it uses: it is slower, or leaves out a special case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import lowering
from torch.autograd import forward_ad

from mrcn_fast import CQCLoss, MRCNBlock, autograd, dispatch, internals
from tests.support import matrix
from tests.support.matrix import DEVICE, KERNEL_BACKENDS
from tests.support.tensors import random


def test_a_part_that_torch_does_not_have_is_none() -> None:
    assert internals._private("_C._is_tracing") is torch._C._is_tracing
    assert internals._private("_C.no_such_part") is internals._private("_no.such.part") is None


@pytest.fixture
def forget() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def block_of(backend: str) -> MRCNBlock:
    torch.manual_seed(0)
    return MRCNBlock(5, reduction=2, backend=backend, device=DEVICE, dtype=torch.float64)


def loss_of(backend: str) -> Callable[[Tensor], Tensor]:
    labels = torch.tensor([0, 0, 1, 1], device=DEVICE)

    def loss(sets: Tensor) -> Tensor:
        made = CQCLoss(margin=3.0, backend=backend)(sets.unbind(), labels)
        assert isinstance(made, Tensor)
        return made

    return loss


def refuse(*_: object) -> None:
    raise AssertionError("this call should take the way of ordinary calls")


@matrix.backends(*KERNEL_BACKENDS)
def test_transforms(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, loss, maps, sets = block_of(backend), loss_of(backend), random(3, 2, 5, 4, 3), random(3, 6, 4, 8)
    maps, sets = maps.to(DEVICE), sets.to(DEVICE)
    monkeypatch.setattr(internals, "_transforms_active", None)
    each = torch.func.vmap(lambda x: block(x, x, concat=True))(maps)
    same(each, torch.stack([block(x, x, concat=True) for x in maps]))
    leaf = maps[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(block(leaf, leaf, concat=True).square().sum(), leaf)
    same(torch.func.grad(lambda x: block(x, x, concat=True).square().sum())(maps[0]), want)
    same(torch.func.vmap(loss)(sets), torch.stack([loss(s) for s in sets]))
    with monkeypatch.context() as ordinary:
        ordinary.setattr(autograd, "_run_checked", refuse)
        block(maps[0], maps[0])


@matrix.backends(*KERNEL_BACKENDS)
def test_batched_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = block_of(backend), random(2, 5, 4, 3).to(DEVICE).requires_grad_()
    made = block(x, x, concat=True)
    given = torch.stack([torch.ones_like(made), made.detach()])
    want = [torch.autograd.grad(made, x, g, retain_graph=True)[0] for g in given]
    monkeypatch.setattr(internals, "_is_batched", None)
    (got,) = torch.autograd.grad(made, x, given, is_grads_batched=True, retain_graph=True)
    same(got, torch.stack(want))
    with monkeypatch.context() as ordinary:
        ordinary.setattr(autograd, "differentiable", refuse)
        torch.autograd.grad(made, x, given[0])


@matrix.backends(*KERNEL_BACKENDS)
def test_forward_mode(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, tangent = random(2, 5, 4, 3).to(DEVICE), random(2, 5, 4, 3, seed=1).to(DEVICE)
    want = torch.func.jvp(lambda x: block_of("reference")(x, x, concat=True), (x,), (tangent,))[1]
    block = block_of(backend)
    unpack_dual = forward_ad.unpack_dual
    level = forward_ad._current_level
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        monkeypatch.delattr(forward_ad, "_current_level")
        # torch's own function reads the part that is gone.
        monkeypatch.setattr(forward_ad, "unpack_dual", lambda t: unpack_dual(t, level=level + 1))
        made = block(dual, dual, concat=True)
        monkeypatch.undo()
        same(forward_ad.unpack_dual(made).tangent, want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@matrix.backends(*KERNEL_BACKENDS)
def test_traced_by_jit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "_is_tracing", internals._private("jit.is_tracing"))
    block, x = block_of(backend).requires_grad_(False), random(2, 5, 4, 3).to(DEVICE)
    traced = torch.jit.trace(lambda x: block(x, x, concat=True), x)
    same(traced(2 * x), block(2 * x, 2 * x, concat=True))


@matrix.backends(*KERNEL_BACKENDS)
def test_torch_compile_without_constants(backend: str, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    for function in (dispatch.choose, dispatch._tuned_for):
        monkeypatch.delattr(function, "_dynamo_marked_constant")
    block, x = block_of(backend), random(2, 5, 4, 3).to(DEVICE)
    compiled = torch.compile(block, backend="eager")
    same(compiled(x, x, concat=True), block(x, x, concat=True))


@matrix.backends(*KERNEL_BACKENDS)
def test_no_assertion_in_a_graph(backend: str, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    monkeypatch.setattr(internals, "_assert_async", None)
    loss, sets = loss_of(backend), random(6, 4, 8).to(DEVICE)
    same(torch.compile(loss, backend="aot_eager", fullgraph=True)(sets), loss(sets))


def test_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "_register_decomposition", None)
    assert internals.register_decomposition(torch.ops.aten.add.Tensor)(refuse) is refuse


@pytest.mark.parametrize("part", ["lowerings", "get_layout_constraint_tag", "make_fallback"])
def test_no_lowering_of_inductor(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(lowering, part)
    internals.keep_whole_in_inductor(torch.ops.mrcn_fast.block_forward.default)


class Renamed:
    """A module whose parameters and hooks stand under other names than torch's."""

    def __init__(self) -> None:
        self.weight = torch.ones(2)
        self.gate = nn.Identity()


def test_modules_with_other_private_parts() -> None:
    module: Any = Renamed()
    assert internals.parameters(module, ("weight",))[0] is module.weight
    assert internals.submodule(module, "gate") is module.gate
    assert internals.has_forward_hooks(module)
    assert not internals.has_forward_hooks(nn.Identity())
