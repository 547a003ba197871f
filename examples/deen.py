"""Block and loss in a network like DEEN, which adds embeddings of its own to a batch.

DEEN (Zhang and Wang 2023) has branches of dilated convolutions after a stage, whose outputs are further
samples of the batch. The block stands before them, so that the branches see all six sets. The loss compares
the six sets of the trunk and, in one more term for each, those of the branches.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast import CQCLoss, MRCNBlock
from mrcn_fast.reid import BatchHardTriplet, Head, PartPool, Trunk


class DEEN(nn.Module):
    def __init__(self, classes: int, branches: int = 2) -> None:
        super().__init__()
        self.trunk = Trunk(18)
        channels = self.trunk.channels[2]
        self.block = MRCNBlock(channels)  # the block
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
            for dilation in range(1, branches + 1)
        )
        self.pool, self.head = PartPool(1), Head(self.trunk.channels[4], classes)

    def forward(self, visible: Tensor, infrared: Tensor) -> tuple[Tensor, Tensor]:
        stems = self.trunk.stem(visible, "visible"), self.trunk.stem(infrared, "infrared")
        maps = self.block(*self.trunk.layers(torch.cat(stems), 1, 2).chunk(2), concat=True)
        grown = torch.cat((maps, *(F.relu(branch(maps)) for branch in self.branches)))
        pooled = self.pool(self.trunk.layers(grown, 3, 4))[0]
        return pooled, self.head(pooled)  # (1 + branches) times six sets


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(2).repeat_interleave(2)  # one modality's labels: the batches are paired
    visible, infrared = torch.rand(2, 4, 3, 64, 32)
    network, triplet, causal = DEEN(classes=2), BatchHardTriplet(), CQCLoss(reduction="mean", normalize=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        pooled, logits = network(visible, infrared)
        everywhere = labels.repeat(len(pooled) // len(labels))
        loss = F.cross_entropy(logits, everywhere) + triplet(pooled, everywhere)
        six_each = pooled.split(6 * len(labels))  # the trunk's six sets, then those of each branch
        loss = loss + 1.2 * torch.stack([causal(six, labels) for six in six_each]).mean()  # the loss
        apart = [F.cosine_similarity(six_each[0], six).mean() for six in six_each[1:]]
        loss = loss + 0.1 * torch.stack(apart).mean()  # branches unlike the trunk, so that they add something
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
