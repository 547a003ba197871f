"""`torch.func`, forward-mode derivatives, batched gradients, and tracers other than torch.compile.

The results of the transforms are compared with those without them, or with plain loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode

from mrcn_fast import CQCLoss, MRCNBlock, SNRBlock, cqc_loss
from mrcn_fast.operations import OPERATIONS
from tests.support import block_cases, matrix
from tests.support.block_cases import Case, Problem
from tests.support.matrix import DEVICE, KERNEL_BACKENDS, MODES
from tests.support.tensors import random


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def block_of(backend: str, **settings: Any) -> MRCNBlock:
    torch.manual_seed(0)
    return MRCNBlock(5, reduction=2, backend=backend, device=DEVICE, dtype=torch.float64, **settings)


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def mapped(case: Case, *seeds: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Problem]]:
    """The stacked inputs and parameters of several problems, and the problems."""
    problems = [block_cases.problem(case._replace(seed=seed)) for seed in seeds]
    inputs = tuple(torch.stack(x).detach() for x in zip(*(p.inputs for p in problems), strict=True))
    parameters = tuple(torch.stack(x).detach() for x in zip(*(p.parameters for p in problems), strict=True))
    return inputs, parameters, problems


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_vmap_takes_more_samples(mode: str, layout: str, gradients: bool, backend: str) -> None:
    case = Case(mode, shape=(2, 5, 4, 3), dtype=torch.float64, layouts=(layout, layout))
    inputs, _, problems = mapped(case, 0, 1, 2)
    parameters = problems[0].parameters
    with torch.set_grad_enabled(gradients):
        got = torch.func.vmap(lambda *x: block_cases.call(case, x, parameters, backend))(*inputs)
        want = [block_cases.call(case, x, parameters, backend) for x in zip(*inputs, strict=True)]
    for of_vmap, each in zip(got, zip(*want, strict=True), strict=True):
        same(of_vmap, torch.stack(each))
        assert of_vmap.requires_grad == gradients


@matrix.backends(*KERNEL_BACKENDS)
def test_vmap_of_one_input_alone(backend: str) -> None:
    block, (x, y) = block_of(backend), random(2, 3, 2, 5, 4, 3).unbind()
    got = torch.func.vmap(lambda a: block(a, y[0], concat=True))(x)
    same(got, torch.stack([block(a, y[0], concat=True) for a in x]))
    got = torch.func.vmap(lambda a: block(a, y[0], concat=True), in_dims=1)(x.movedim(0, 1))
    same(got, torch.stack([block(a, y[0], concat=True) for a in x]))


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_vmap_over_parameters_is_an_ensemble(mode: str, backend: str) -> None:
    case = Case(mode, shape=(2, 5, 4, 3), dtype=torch.float64)
    _, parameters, problems = mapped(case, 0, 1, 2)
    inputs = tuple(x.detach() for x in problems[0].inputs)
    got = torch.func.vmap(lambda *p: block_cases.call(case, inputs, p, backend))(*parameters)
    for i, p in enumerate(problems):
        for of_vmap, alone in zip(got, block_cases.call(case, inputs, p.parameters, backend), strict=True):
            same(of_vmap[i], alone)


def cubed(block: nn.Module, parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    made = torch.func.functional_call(block, parameters, inputs)
    total: Tensor = sum((x**3).sum() for x in made)
    return total


@matrix.backends(*KERNEL_BACKENDS)
def test_grad_and_gradients_of_each_sample(backend: str) -> None:
    block, (x, y) = block_of(backend), random(2, 3, 2, 5, 4, 3).unbind()
    known = parameters_of(block)

    def loss(parameters: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return cubed(block, parameters, a, b)

    want = []
    for a, b in zip(x, y, strict=True):
        leaves = {name: p.clone().requires_grad_() for name, p in known.items()}
        found = torch.autograd.grad(loss(leaves, a, b), list(leaves.values()))
        want.append(dict(zip(leaves, found, strict=True)))
    same(torch.func.grad(loss)(known, x[0], y[0]), want[0])
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(known, x, y)
    same(each, {name: torch.stack([w[name] for w in want]) for name in known})


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_jacobians_both_ways(mode: str, backend: str) -> None:
    case = Case(mode, shape=(1, 2, 2, 2), dtype=torch.float64, eps=0.1)
    p = block_cases.problem(case)
    first, *others = (x.detach() for x in p.inputs)
    parameters = tuple(q.detach() for q in p.parameters)

    def run(x: Tensor, name: str = backend) -> Tensor:
        return torch.cat(block_cases.call(case, (x, *others), parameters, name))

    want = torch.autograd.functional.jacobian(lambda x: run(x, "reference"), first)
    same(torch.func.jacrev(run)(first), want)
    same(torch.func.jacfwd(run)(first), want)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
def test_forward_mode(gradients: bool, backend: str) -> None:
    block, x, tangent = block_of(backend), random(2, 5, 4, 3), random(2, 5, 4, 3, seed=1)
    want = torch.func.jvp(lambda x: block_of("reference")(x, x, concat=True), (x,), (tangent,))[1]
    with torch.set_grad_enabled(gradients):
        same(torch.func.jvp(lambda x: block(x, x, concat=True), (x,), (tangent,))[1], want)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            same(torch.autograd.forward_ad.unpack_dual(block(dual, dual, concat=True)).tangent, want)


@matrix.backends(*KERNEL_BACKENDS)
def test_batched_gradients(backend: str) -> None:
    p = block_cases.problem(Case("pair", dtype=torch.float64))
    outputs = block_cases.call(p.case, p.inputs, p.parameters, backend)
    leaves = (*p.inputs, *p.parameters)
    given = [torch.stack([g, 2 * g, g.flip(0)]) for g in p.gradients]
    batched = torch.autograd.grad(outputs, leaves, given, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(outputs, leaves, [g[i] for g in given], retain_graph=True)
        same([g[i] for g in batched], list(alone))


def six(seed: int = 0) -> Tensor:
    return random(6, 4, 8, seed=seed)


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_transforms_of_the_loss(normalize: bool, backend: str) -> None:
    labels, others = torch.tensor([[0, 0, 1, 1], [2, 0, 2, 0]], device=DEVICE)

    def loss(sets: Tensor, labels: Tensor = labels) -> Tensor:
        total = cqc_loss(sets.unbind(), labels, margin=3.0, normalize=normalize, backend=backend)
        assert isinstance(total, Tensor)
        return total

    sets = torch.stack([six(0), six(1)])
    leaf = sets[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    same(torch.func.grad(loss)(sets[0]), gradient)
    same(torch.func.vmap(loss)(sets), torch.stack([loss(s) for s in sets]))
    of_each = torch.func.vmap(loss)(sets, torch.stack([labels, others]))
    same(of_each, torch.stack([loss(sets[0]), loss(sets[1], others)]))
    tangent = six(5)
    same(torch.func.jvp(loss, (sets[0],), (tangent,))[1], (gradient * tangent).sum())


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_without_data(normalize: bool, backend: str) -> None:
    """Only `reduction="none"` has a shape that depends on the labels' values."""
    labels = torch.tensor([0, 0, 1, 1], device=DEVICE)
    with FakeTensorMode() as mode:
        sets, fake_labels = mode.from_tensor(six()), mode.from_tensor(labels)
        fake = cqc_loss(sets.unbind(), fake_labels, normalize=normalize, backend=backend)
        assert isinstance(fake, Tensor) and fake.shape == ()
    for reduction in ("sum", "mean"):
        leaf = six().to("meta").requires_grad_()
        loss = cqc_loss(leaf.unbind(), labels.to("meta"), reduction=reduction, normalize=normalize)
        assert isinstance(loss, Tensor) and loss.shape == () and loss.device.type == "meta"
        assert torch.autograd.grad(loss, leaf)[0].shape == leaf.shape
    with pytest.raises(ValueError, match="depends on the labels' values"):
        cqc_loss(six().to("meta").unbind(), labels.to("meta"), reduction="none")


# --- tracers ----------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A convolution, the block, a convolution."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.stem, self.trunk = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.block = MRCNBlock(8, reduction=4, backend=backend)
        self.to(DEVICE)

    def forward(self, visible: Tensor, infrared: Tensor) -> Tensor:
        sets = self.block(self.stem(visible), self.stem(infrared), concat=True)
        traced: Tensor = self.trunk(sets)
        return traced


def images(batch: int = 2) -> tuple[Tensor, Tensor]:
    visible, infrared = random(2, batch, 3, 6, 6, dtype=torch.float32).unbind()
    return visible, infrared


@matrix.backends("reference", *KERNEL_BACKENDS)
def test_symbolic_trace(backend: str) -> None:
    network = Network(backend)
    traced = torch.fx.symbolic_trace(network)
    assert "mrcn_block" in traced.code
    same(traced(*images()), network(*images()))
    block = MRCNBlock(3, reduction=1, backend=backend, device=DEVICE)
    same(tuple(torch.fx.symbolic_trace(block)(*images())), tuple(block(*images())))
    snr = SNRBlock(3, reduction=1, backend=backend, device=DEVICE)
    same(tuple(torch.fx.symbolic_trace(snr)(images()[0])), tuple(snr(images()[0])))
    labels = torch.tensor([0, 0, 1, 1], device=DEVICE)
    for normalize in (False, True):
        loss = CQCLoss(normalize=normalize, backend=backend)
        same(torch.fx.symbolic_trace(loss)(six().unbind(), labels), loss(six().unbind(), labels))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.skipif(DEVICE != "cpu", reason="torch.ao quantizes for processors")
@matrix.backends(*KERNEL_BACKENDS)
def test_prepare_fx(backend: str) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    network = Network(backend).eval()
    prepared = prepare_fx(network, get_default_qconfig_mapping(), images())
    same(prepared(*images()), network(*images()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@matrix.backends(*KERNEL_BACKENDS)
def test_a_traced_module_has_gradients(backend: str) -> None:
    network = Network(backend)
    traced = torch.jit.trace(network, images())
    leaves = list(network.parameters())
    want = torch.autograd.grad(network(*images(3)).square().sum(), leaves)
    found = torch.autograd.grad(traced(*images(3)).square().sum(), list(traced.parameters()))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def forget() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@matrix.backends(*KERNEL_BACKENDS)
def test_training_through_cpp_wrapper(backend: str, forget: None) -> None:
    network = Network(backend)
    leaves = list(network.parameters())
    want = torch.autograd.grad(network(*images()).square().sum(), leaves)
    with inductor.patch(cpp_wrapper=True):
        compiled = torch.compile(network, fullgraph=True)
        found = torch.autograd.grad(compiled(*images()).square().sum(), leaves)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_the_table_names_each_gate_once() -> None:
    for operation in OPERATIONS.values():
        used = [s.gate for s in operation.sets if s.gate is not None]
        assert sorted(set(used)) == list(range(len(operation.gates)))
