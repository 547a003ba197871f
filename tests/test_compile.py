"""torch.compile and torch.export of networks around the block and the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._inductor import lowering
from torch._inductor.utils import fresh_cache, run_and_get_code

from mrcn_fast import CQCLoss, MRCNBlock, MRCNFeatures, SNRBlock
from tests.support import block_cases, matrix
from tests.support.block_cases import Case
from tests.support.matrix import DEVICE, GATES, KERNEL_BACKENDS, MODES


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Network(nn.Module):
    """conv -> block(concat=True) -> conv -> pool -> CQC."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = MRCNBlock(8, reduction=4, backend=backend)
        self.trunk = nn.Conv2d(8, 6, 3)
        self.loss = CQCLoss(margin=1.0, backend=backend)
        self.to(DEVICE)

    def forward(self, visible: Tensor, infrared: Tensor, labels: Tensor) -> Tensor:
        sets = self.block(self.stem(visible), self.stem(infrared), concat=True)
        loss = self.loss(torch.relu(self.trunk(sets)).mean(dim=(2, 3)), labels)
        assert isinstance(loss, Tensor)
        return loss


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    visible, infrared = (torch.randn(size, 3, 6, 5, generator=generator).to(DEVICE) for _ in range(2))
    return visible, infrared, torch.arange(size, device=DEVICE) // 2


def gradients(run: Any, network: nn.Module, size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """The loss, and the gradients of the parameters and of the images, by name."""
    visible, infrared, labels = batch(size, seed)
    leaves = {"visible": visible.requires_grad_(), "infrared": infrared.requires_grad_()}
    leaves |= dict(network.named_parameters())
    loss = run(visible, infrared, labels)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, found, strict=True))}


def assert_equal_within_rounding(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, expected in want.items():
        torch.testing.assert_close(
            got[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=None
        )


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.filterwarnings("error:Dynamo")
def test_the_whole_network_is_one_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning, each of which a process sees once."""
    monkeypatch.setattr("torch._dynamo.utils.warn_once_cache", set())
    network = Network(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    assert_equal_within_rounding(gradients(compiled, network), gradients(network, network))
    assert counter.frame_count == 1


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
def test_inductor(memory_format: torch.memory_format, backend: str) -> None:
    network = Network(backend).to(memory_format=memory_format)  # type: ignore[call-overload]
    compiled = torch.compile(network, fullgraph=True)
    assert_equal_within_rounding(gradients(compiled, network), gradients(network, network))


@matrix.backends("cpu")
@pytest.mark.parametrize("ci", ["", "true"], ids=["desk", "ci"])
def test_inductor_takes_no_operation_apart(ci: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with CI in the environment, where torch refuses operations that are decomposed for export."""
    network = MRCNBlock(4, reduction=2, backend=backend)
    monkeypatch.setenv("CI", ci)
    monkeypatch.delitem(lowering.lowerings, torch.ops.mrcn_fast.block_forward.default, raising=False)
    x = torch.randn(2, 4, 3, 3, device=DEVICE)
    with torch.no_grad(), fresh_cache():
        made, (code,) = run_and_get_code(torch.compile(network, fullgraph=True), x, x)
    assert "mrcn_fast.block_forward" in code
    torch.testing.assert_close(tuple(made), tuple(network(x, x)))


# A gate is traced alike in every mode.
@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize(
    ("mode", "gate"), [*((mode, "se") for mode in MODES), *(("pair", gate) for gate in GATES if gate != "se")]
)
def test_every_operation_in_one_graph(mode: str, gate: str, backend: str) -> None:
    p = block_cases.problem(Case(mode, gate, dtype=torch.float64, layouts=("channels_last",) * 2))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(*tensors: Tensor) -> tuple[Tensor, ...]:
        return block_cases.call(p.case, tensors[: len(p.inputs)], tensors[len(p.inputs) :], backend)

    outputs = compiled(*p.inputs, *p.parameters)
    eager = block_cases.evaluate(p, backend)
    for output, name in zip(outputs, block_cases.output_names(mode), strict=True):
        assert output.stride() == eager[name].stride(), name
    for name, got in block_cases.with_gradients(p, outputs).items():
        torch.testing.assert_close(got, eager[name], rtol=1e-11, atol=1e-11)


@matrix.backends(*KERNEL_BACKENDS)
def test_a_dynamic_batch_is_compiled_once(backend: str) -> None:
    network = Network(backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True)

    def run(visible: Tensor, infrared: Tensor, labels: Tensor) -> Tensor:
        for x in (visible, infrared, labels):
            torch._dynamo.mark_dynamic(x, 0)
        return compiled(visible, infrared, labels)

    for size in (4, 6, 10, 8):
        assert_equal_within_rounding(gradients(run, network, size), gradients(network, network, size))
    assert counter.frame_count == 1


@matrix.backends("reference", *KERNEL_BACKENDS)
def test_growing_batches_recompile_at_most_once(backend: str) -> None:
    """Nothing is marked dynamic: the second size makes the batch dynamic, and nothing is compiled again."""
    block = MRCNBlock(8, reduction=4, backend=backend, device=DEVICE)
    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for size in (2, 3, 4, 5, 6):
        x = torch.randn(size, 8, 6, 5, device=DEVICE)
        torch.testing.assert_close(compiled(x, x + 1, concat=True), block(x, x + 1, concat=True))
    assert counter.frame_count <= 2


@matrix.backends(*KERNEL_BACKENDS)
def test_block_and_loss_with_symbolic_sizes_and_numbers(backend: str) -> None:
    """With dynamic=True Dynamo makes a symbolic number of the margin too."""
    block, loss = MRCNBlock(8, reduction=4, backend=backend, device=DEVICE), CQCLoss(0.3, backend=backend)

    def run(visible: Tensor, infrared: Tensor, labels: Tensor) -> Any:
        return loss(block(visible, infrared, concat=True).mean(dim=(2, 3)), labels)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for people in (2, 3):
        pair = torch.randn(2, 2 * people, 8, 6, 5, device=DEVICE)
        labels = torch.arange(people, device=DEVICE).repeat_interleave(2)
        visible, infrared = pair.unbind()
        torch.testing.assert_close(compiled(visible, infrared, labels), run(visible, infrared, labels))


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_one_tensor_in_two_places(normalize: bool, backend: str) -> None:
    """Dynamo can't trace an autograd Function that gets one tensor twice."""
    block, loss = MRCNBlock(3, backend=backend, device=DEVICE), CQCLoss(normalize=normalize, backend=backend)
    x, labels = torch.randn(4, 3, 5, 4, device=DEVICE), torch.tensor([0, 0, 1, 1], device=DEVICE)

    def run(x: Tensor) -> Tensor:
        total = loss([f.mean(dim=(2, 3)) for f in block(x, x)], labels, labels)
        assert isinstance(total, Tensor)
        return total

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), run(x))
    x.requires_grad_()
    got, want = (torch.autograd.grad(form(x), x) for form in (compiled, run))
    torch.testing.assert_close(got, want)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.skipif(DEVICE != "cpu", reason="an assertion that fails on a GPU ends the process's use of it")
def test_no_identity_in_both_modalities_is_an_error_inside_a_graph(backend: str) -> None:
    loss = CQCLoss(backend=backend)
    compiled = torch.compile(lambda f, a, b: loss(f, a, b), backend="aot_eager", fullgraph=True)
    features, labels = [torch.randn(4, 3) for _ in range(6)], torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(compiled(features, labels, labels), loss(features, labels, labels))
    with pytest.raises(RuntimeError, match="no identity that is in both"):
        compiled(features, labels, labels + 5)


@matrix.backends(*KERNEL_BACKENDS)
def test_autocast_in_a_graph(backend: str) -> None:
    network = Network(backend)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    visible, infrared, labels = batch(4)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        got, want = compiled(visible, infrared, labels), network(visible, infrared, labels)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


# --- export -----------------------------------------------------------------------------------------------


class Retrieval(nn.Module):
    """Six pooled sets while training, the restituted features of one modality for retrieval."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = MRCNBlock(8, reduction=4, backend=backend)
        self.style = SNRBlock(8, reduction=4, backend=backend)
        self.to(DEVICE)

    def forward(self, visible: Tensor, infrared: Tensor) -> Tensor:
        v, n = self.stem(visible), self.stem(infrared)
        if self.training:
            features: MRCNFeatures = self.block(v, n)
            return torch.cat(features).mean(dim=(2, 3))
        return self.block.restitute(self.style(v).restituted, "visible").mean(dim=(2, 3))


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(training: bool, backend: str) -> None:
    module = Retrieval(backend).train(training)
    visible, infrared, _ = batch(4)
    size = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        module, (visible, infrared), dynamic_shapes={"visible": {0: size}, "infrared": {0: size}}
    )
    exported = program.module()
    for number in (4, 7):
        visible, infrared, _ = batch(number, seed=number)
        torch.testing.assert_close(exported(visible, infrared), module(visible, infrared))
