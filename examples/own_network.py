"""The block and the loss in a small network of your own, trained for a few steps.

The network has a stem for each modality, the block, and a shared trunk that all six sets pass as one batch.
At test time a modality is alone: `MRCNBlock.restitute` makes F₊ of it, and the test feature is F beside F₊.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast import CQCLoss, MRCNBlock
from mrcn_fast.block import Modality

PEOPLE, IMAGES_EACH = 4, 4


class Network(nn.Module):
    """Two stems, the block, one trunk, and a classifier for the six sets."""

    def __init__(self, people: int) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({name: _convolution(3, 32) for name in ("visible", "infrared")})
        self.block = MRCNBlock(32)
        self.trunk = nn.Sequential(_convolution(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(64, people)

    def forward(self, visible: Tensor, infrared: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled features of the six sets, stacked, and their logits."""
        maps = self.stems["visible"](visible), self.stems["infrared"](infrared)
        pooled = self.trunk(self.block(*maps, concat=True))
        return pooled, self.classifier(pooled)

    @torch.no_grad()
    def extract(self, images: Tensor, modality: Modality) -> Tensor:
        """Return the test features of images of one modality: F and F₊, each of length 1, side by side."""
        maps = self.stems[modality](images)
        both = torch.cat((maps, self.block.restitute(maps, modality)))
        return torch.cat(F.normalize(self.trunk(both)).chunk(2), dim=1)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(PEOPLE).repeat_interleave(IMAGES_EACH)
    # A person is a coloured pattern, of which infrared light shows one channel, inverted.
    patterns = F.interpolate(torch.rand(PEOPLE, 3, 4, 2), size=(32, 16))[labels]
    visible = patterns + 0.1 * torch.randn_like(patterns)
    infrared = 1 - patterns[:, :1].expand(-1, 3, -1, -1) + 0.1 * torch.randn_like(patterns)

    network, causal = Network(PEOPLE), CQCLoss(reduction="mean", normalize=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(40):
        pooled, logits = network(visible, infrared)
        loss = F.cross_entropy(logits, labels.repeat(6)) + causal(pooled, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    network.eval()
    query, gallery = network.extract(infrared, "infrared"), network.extract(visible, "visible")
    nearest = (query @ gallery.T).argmax(dim=1)
    print(f"rank-1 on the training images: {(labels[nearest] == labels).float().mean().item():.0%}")


if __name__ == "__main__":
    main()
