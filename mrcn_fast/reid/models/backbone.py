"""Backbones of the caller's own in place of the ResNet."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from mrcn_fast.block import MODALITIES, Modality
from mrcn_fast.checks import check_choice


class StagedTrunk(nn.Module):
    """A trunk of modules that each map images or maps to maps, for `ReIDModel(classes, trunk=...)`.

    The first module is the stem: the infrared stem is a copy of it, with the same weights at the start. The
    other stages are shared by both modalities. Blocks can be inserted after each of them.

    Args:
        stages: modules (N, C, H, W) -> (N, C', H', W'); the first takes images (N, 3, H, W)
        channels: the channels of the maps that each stage gives

    Raises:
        ValueError: for no stage, and for another number of channels than stages

    Example:
        >>> stem, layer = nn.Conv2d(3, 32, 4, stride=4), nn.Conv2d(32, 64, 2, stride=2)
        >>> model = ReIDModel(classes=5, trunk=StagedTrunk([stem, layer], channels=[32, 64]), stages=(0,))
        >>> images = torch.rand(2, 3, 64, 32)
        >>> model(images, images).pooled.shape
        torch.Size([1, 12, 64])
    """

    def __init__(self, stages: Sequence[nn.Module], channels: Sequence[int]) -> None:
        super().__init__()
        if not stages or len(stages) != len(channels):
            raise ValueError(
                f"got {len(stages)} stages and channels={tuple(channels)}, expected a number for each stage"
            )
        self.channels = tuple(channels)
        self.visible, self.infrared = stages[0], copy.deepcopy(stages[0])
        self.shared = nn.ModuleList(stages[1:])

    def stem(self, images: Tensor, modality: Modality) -> Tensor:
        """Compute stage 0 of a modality. Raises ValueError for an unknown one."""
        check_choice("modality", modality, MODALITIES)
        return cast(Tensor, getattr(self, modality)(images))

    def layers(self, x: Tensor, first: int, last: int) -> Tensor:
        """Apply the shared stages from `first` (1 is the one after the stem) to `last`, inclusive."""
        for stage in range(first, last + 1):
            x = self.shared[stage - 1](x)
        return x
