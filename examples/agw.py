"""Block and loss in a network like AGW: one line in the forward pass, one in the loss.

AGW (Ye et al. 2021) has a stem for each modality, a shared ResNet, generalized-mean pooling, a BNNeck and a
classifier. The block stands behind layer 1, and the network trains on the six sets as one batch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast import CQCLoss, MRCNBlock
from mrcn_fast.block import Modality
from mrcn_fast.reid import BatchHardTriplet, Head, PartPool, Trunk


class AGW(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = Trunk(18)
        self.block = MRCNBlock(self.trunk.channels[1])  # the block
        self.pool, self.head = PartPool(1, "gem"), Head(self.trunk.channels[4], classes)

    def forward(self, visible: Tensor, infrared: Tensor) -> tuple[Tensor, Tensor]:
        stems = self.trunk.stem(visible, "visible"), self.trunk.stem(infrared, "infrared")
        visible, infrared = self.trunk.layers(torch.cat(stems), 1, 1).chunk(2)
        maps = self.block(visible, infrared, concat=True)  # was: torch.cat((visible, infrared))
        pooled = self.pool(self.trunk.layers(maps, 2, 4))[0]
        return pooled, self.head(pooled)

    def extract(self, images: Tensor, modality: Modality) -> Tensor:
        maps = self.trunk.layers(self.trunk.stem(images, modality), 1, 1)
        maps = torch.cat((maps, self.block.restitute(maps, modality)))  # F, F₊
        features = F.normalize(self.head.neck(self.pool(self.trunk.layers(maps, 2, 4))[0]))
        return torch.cat(features.chunk(2), dim=1)


def main() -> None:
    torch.manual_seed(0)
    labels = torch.arange(2).repeat_interleave(2)  # one modality's labels: the batches are paired
    visible, infrared = torch.rand(2, 4, 3, 64, 32)
    network, triplet, causal = AGW(classes=2), BatchHardTriplet(), CQCLoss(reduction="mean", normalize=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        pooled, logits = network(visible, infrared)
        loss = F.cross_entropy(logits, labels.repeat(6)) + triplet(pooled, labels.repeat(6))
        loss = loss + 1.2 * causal(pooled, labels)  # the loss: all six sets, labels once
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.3f}")
    with torch.no_grad():
        print("test features", tuple(network.eval().extract(infrared, "infrared").shape))


if __name__ == "__main__":
    main()
