"""A network of your own, with MRCN's block, trained and scored by this library.

The network gives `TrainingOutput` in training and features from `extract` at test. Data set, batches, losses,
schedule, checkpoints and scores are the library's. The data are synthetic people in RegDB's tree.
"""

import tempfile

from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast import MRCNBlock
from mrcn_fast.block import Modality
from mrcn_fast.reid import TrainConfig, Trainer, TrainingOutput, open_dataset, score_checkpoint
from mrcn_fast.reid.data import write_regdb


class Network(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({name: nn.Conv2d(3, 32, 7, 4, 3) for name in ("visible", "infrared")})
        self.block = MRCNBlock(32)
        self.trunk = nn.Sequential(
            nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(64, classes)

    def forward(self, visible: Tensor, infrared: Tensor) -> TrainingOutput:
        six = self.block(self.stems["visible"](visible), self.stems["infrared"](infrared), concat=True)
        pooled = self.trunk(six)
        return TrainingOutput(pooled[None], self.classifier(pooled)[None])

    def extract(self, images: Tensor, modality: Modality) -> Tensor:
        return F.normalize(self.trunk(self.block.restitute(self.stems[modality](images), modality)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = write_regdb(f"{folder}/regdb", identities=8, images=4, image_size=(64, 32))
        config = TrainConfig(
            data=str(data), dataset="regdb", out=f"{folder}/run", accelerator="cpu", workers=0, epochs=2,
            batches=4, identities=2, height=64, width=32,
        )  # fmt: skip
        network = Network(classes=len(open_dataset("regdb", data).training().identities))
        checkpoint = Trainer(config, model=network).fit()
        result = score_checkpoint(checkpoint, data, model=network, accelerator="cpu")
    for name, search in result["searches"].items():
        print(f"{name}: rank-1 {search['mean']['rank1']:.1%}, mAP {search['mean']['mAP']:.1%}")


if __name__ == "__main__":
    main()
