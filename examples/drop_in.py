"""The block and the loss on feature maps of your own, and the same in plain PyTorch.

`MRCNBlock` makes six feature sets of a pair of batches. Sample i of both batches shows the same person.
`CQCLoss` compares the centers of the six sets, after they were pooled. The end of the script computes both
with `mrcn_fast.reference`, which has one function per equation of the paper.
"""

import torch

from mrcn_fast import CQCLoss, MRCNBlock, reference


def main() -> None:
    torch.manual_seed(0)
    block, loss = MRCNBlock(64), CQCLoss(margin=0.2)
    visible, infrared = torch.randn(2, 8, 64, 24, 12).unbind()
    labels = torch.tensor([3, 3, 3, 3, 7, 7, 7, 7])

    sets = block(visible, infrared)
    pooled = [features.mean(dim=(2, 3)) for features in sets]
    value = loss(pooled, labels)
    for name, features in zip(sets._fields, sets, strict=True):
        print(f"{name:22} {tuple(features.shape)}")
    print(f"CQC loss of two people: {value.item():.4f}")

    plain = reference.mrcn_block(
        visible, infrared, block.norm_weight, block.norm_bias, block.gate.parameter_list()
    )
    losses, identities = reference.cqc_loss([f.mean(dim=(2, 3)) for f in plain], labels, labels)
    torch.testing.assert_close(tuple(sets), plain)
    torch.testing.assert_close(losses.sum(), value)
    print(f"plain PyTorch gives the same: people {identities.tolist()}, losses {losses.tolist()}")


if __name__ == "__main__":
    main()
