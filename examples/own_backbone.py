"""Another backbone under MRCN's network: any modules that map images to maps in stages.

`StagedTrunk` gives each modality a stem of its own and shares the other stages. Blocks, pooling, BNNeck and
classifier are the library's. A backbone of torchvision or timm is divided into its stages in the same way.
"""

import tempfile

import torch
from torch import nn

from mrcn_fast.reid import ReIDModel, StagedTrunk, TrainConfig, Trainer, open_dataset, score_checkpoint
from mrcn_fast.reid.data import write_sysu


def stage(inputs: int, outputs: int, patch: int) -> nn.Module:
    """Patches of the map become pixels, and each is mixed with its surroundings, as in ConvNeXt."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, patch, stride=patch),
        nn.Conv2d(outputs, outputs, 7, padding=3, groups=outputs),
        nn.BatchNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 1),
        nn.GELU(),
    )


def main() -> None:
    torch.manual_seed(0)
    trunk = StagedTrunk([stage(3, 32, 4), stage(32, 64, 2), stage(64, 96, 2)], channels=[32, 64, 96])
    with tempfile.TemporaryDirectory() as folder:
        data = write_sysu(
            f"{folder}/sysu", identities=8, test_identities=4, images_per_camera=2, image_size=(64, 32)
        )
        config = TrainConfig(
            data=str(data), out=f"{folder}/run", accelerator="cpu", workers=0, epochs=2, batches=4,
            identities=2, images=4, height=64, width=32,
        )  # fmt: skip
        classes = len(open_dataset("sysu-mm01", data).training().identities)
        network = ReIDModel(classes, trunk=trunk, model="mrcn", stages=(0, 1))
        trainer = Trainer(
            config,
            model=network,
            optimizer=lambda network: torch.optim.AdamW(network.parameters(), lr=1e-3),
        )
        result = score_checkpoint(trainer.fit(), data, model=network, accelerator="cpu")
    for name, search in result["searches"].items():
        print(f"{name}: rank-1 {search['mean']['rank1']:.1%}, mAP {search['mean']['mAP']:.1%}")


if __name__ == "__main__":
    main()
