"""A small network trained with fused and with reference kernels ends at the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrcn_fast import CQCLoss, MRCNBlock
from tests.support import matrix
from tests.support.matrix import GATES, KERNEL_BACKENDS
from tests.support.tensors import different_bits

STEPS = 50
IDENTITIES, IMAGES = 4, 3


class Network(nn.Module):
    """Two stems, the block, a shared convolution, pooling, a classifier; float32."""

    def __init__(self, backend: str, **settings: Any) -> None:
        super().__init__()
        self.visible, self.infrared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.block = MRCNBlock(8, reduction=4, backend=backend, **settings)
        self.trunk = nn.Conv2d(8, 12, 3, stride=2)
        self.classifier = nn.Linear(12, IDENTITIES)

    def forward(self, visible: Tensor, infrared: Tensor) -> Tensor:
        pair = (torch.relu(self.visible(visible)), torch.relu(self.infrared(infrared)))
        pooled: Tensor = torch.relu(self.trunk(self.block(*pair, concat=True))).mean(dim=(2, 3))
        return pooled


def train(
    backend: str, memory_format: torch.memory_format, **settings: Any
) -> tuple[dict[str, Tensor], list[float]]:
    """The trained weights, and the loss of each step."""
    torch.manual_seed(0)
    network = Network(backend, **settings).to(memory_format=memory_format)  # type: ignore[call-overload]
    criterion = CQCLoss(backend=backend)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    labels = torch.arange(IDENTITIES).repeat_interleave(IMAGES)
    offsets = torch.randn(IDENTITIES, 1, 6, 5)[labels]
    losses = []
    for _ in range(STEPS):
        visible = (torch.randn(len(labels), 3, 6, 5) + offsets).contiguous(memory_format=memory_format)
        infrared = (torch.randn(len(labels), 1, 6, 5) + offsets).contiguous(memory_format=memory_format)
        pooled = network(visible, infrared)
        identity = nn.functional.cross_entropy(network.classifier(pooled), labels.repeat(6))
        loss = identity + 0.1 * criterion(pooled, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {name: p.detach() for name, p in network.named_parameters()}, losses


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
@pytest.mark.parametrize("gate", GATES)
def test_fused_and_reference_end_at_the_same_weights(
    gate: str, memory_format: torch.memory_format, backend: str
) -> None:
    """After 50 steps of SGD in float32 the weights agree within 1e-4 of each tensor's largest weight.

    One step rounds by some 1e-7, which momentum and the later steps increase to 1e-6 or 1e-5.
    """
    fused, fused_losses = train(backend, memory_format, gate=gate)
    plain, plain_losses = train("reference", memory_format, gate=gate)
    # The comparison means something only if training changed the weights.
    assert sum(plain_losses[-5:]) < 0.9 * sum(plain_losses[:5])
    for name, weight in plain.items():
        error = (fused[name] - weight).abs().max() / weight.abs().max()
        assert error < 1e-4, f"{name}: {float(error):.1e} of the largest weight"
    torch.testing.assert_close(fused_losses, plain_losses, rtol=1e-4, atol=0)


@matrix.backends("reference", *KERNEL_BACKENDS)
def test_a_seed_gives_the_same_weights_to_the_bit(backend: str) -> None:
    first, first_losses = train(backend, torch.contiguous_format)
    second, second_losses = train(backend, torch.contiguous_format)
    assert first_losses == second_losses
    assert different_bits(first, second) == []


def test_the_block_learns() -> None:
    """Training changes every parameter of the block."""
    torch.manual_seed(0)
    start = {name: p.detach().clone() for name, p in Network("reference").named_parameters()}
    end, _ = train("reference", torch.contiguous_format)
    assert all((end[name] - p).abs().max() > 1e-3 for name, p in start.items() if name.startswith("block"))
