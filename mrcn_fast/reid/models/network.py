"""The re-identification network: two stems, a shared ResNet with inserted blocks, BNNecks and classifiers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast import SNRFeatures
from mrcn_fast.block import Modality
from mrcn_fast.reid.kinds import (
    INCREASING,
    BackendName,
    Count,
    Depth,
    GateName,
    RestituteTo,
    Several,
    Stage,
)
from mrcn_fast.reid.models.blocks import BLOCKS, AnyBlock, SetName, make_block
from mrcn_fast.reid.models.heads import Head, PartPool, PoolName
from mrcn_fast.reid.models.resnet import Trunk
from mrcn_fast.reid.settings import SettingError, check_arguments, check_fields

ModelName = Literal["baseline", "snr", "mrcn", "mrm", "mcm"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)


class TrainingOutput(NamedTuple):
    """What the network gives the losses in training, by part and, within a part, set after set.

    There are six sets (v, v+, v-, n-, n+, n), four (v, v+, n+, n or v, v-, n-, n) or two (v, n or v+, n+). A
    network without parts has one part.

    Example:
        >>> pooled = torch.rand(12, 64)  # six sets of two images
        >>> output = TrainingOutput(pooled[None], nn.Linear(64, 5)(pooled)[None])
        >>> output.logits.shape
        torch.Size([1, 12, 5])
    """

    pooled: Tensor  # (parts, sets * B, D), before the BNNeck and not normalized: for triplet and CQC loss
    logits: Tensor  # (parts, sets * B, classes): for the identity loss
    styles: tuple[SNRFeatures, ...] = ()  # SNR's pooled features (2B, C) of each block, for causality loss


@dataclass(kw_only=True)
class ModelOptions:
    """The architecture of a network. Raises SettingError (a ValueError) for a value that is unfit.

    `TrainConfig` has the same fields, and its module says what "paper" and "field" mean.
    """

    model: ModelName = "mrcn"
    """mrcn; mrm or mcm, half of it; snr; baseline, the plain two-stream network (paper, Tables 2 and 4)."""
    depth: Depth = 50
    """Layers of the ResNet (paper: 50)."""
    stages: Annotated[Several[Stage], INCREASING] = (0,)
    """Stages with a block behind them, 0 (stem) to 4 (paper, Table 3: 0 on SYSU-MM01, 1 on RegDB)."""
    gate: GateName = "se"
    """Attention of restitution and compensation: se, eca, cbam or cbam-channel (paper: se)."""
    reduction: Count = 16
    """Dimension reduction of the gate (paper)."""
    restitute_to: RestituteTo = "normalized"
    """What eq. 5 adds the restituted residual to: normalized, as its sentence says, or input, as printed."""
    parts: Count = 1
    """Horizontal stripes with a head each; above 1 this is MRCN-P (the authors' earlier code: 4)."""
    pool: PoolName = "average"
    """Pooling of the last feature map (field: average)."""
    backend: BackendName | None = None
    """Backend of the blocks; none: the best that serves."""

    def __post_init__(self) -> None:
        check_fields(self, SettingError)
        self.check_stages(SettingError)

    def check_stages(self, error: type[ValueError]) -> None:
        """Raise `error` where a network with blocks has no stage for them."""
        if not self.stages and self.model != "baseline":
            raise error(f"got stages=(), expected at least one stage for the blocks of {self.model}")


class ReIDModel(nn.Module):
    """A two-stream ResNet with a block inserted after one or several stages.

    In training, `model(visible, infrared)` takes two paired batches (B, 3, H, W) and returns TrainingOutput.
    Both batches have the same identity at the same position, because eq. 7 mixes sample i of one modality
    with sample i of the other. At test, `model.extract(images, modality)` takes one modality alone.

    With several insertion points, each set of features passes a stack of blocks: the originals v and n pass
    unchanged, v+ and n+ are restituted again, and v- and n- are compensated again. F+ at test is the chain of
    restitutions.

    The networks "mrm" and "mcm" have the whole block of MRCN. The gates that they don't use are slices of the
    block's parameters, whose gradient is zero.

    Args:
        classes: the number of training identities
        trunk: a trunk of your own, such as `StagedTrunk`, in place of the ResNet of `depth`
        options: the fields of `ModelOptions`; the baseline ignores `stages` and the fields of the block

    Raises:
        ValueError: for unknown names, depths and stages, for batches of unequal shape, and for a last map
            with fewer rows than parts

    Example:
        >>> model = ReIDModel(395, depth=18)
        >>> images = torch.randn(2, 3, 64, 32)
        >>> model(images, images).logits.shape  # six sets of two images
        torch.Size([1, 12, 395])
    """

    @check_arguments
    def __init__(self, classes: Count, *, trunk: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        chosen = ModelOptions(**options)
        self.model = chosen.model
        # Without a block there is no stage to split at: both modalities are one batch from the stems on.
        self.stages = () if chosen.model == "baseline" else chosen.stages
        self.parts = chosen.parts
        # A trunk of the caller's has what is used of Trunk here: `channels`, `stem` and `layers`.
        self.trunk = Trunk(chosen.depth) if trunk is None else cast(Trunk, trunk)
        self._last = len(self.trunk.channels) - 1
        if self.stages and self.stages[-1] > self._last:
            raise ValueError(f"got stages={self.stages}, expected stages from 0 to {self._last} of the trunk")
        # Checkpoints name the parameters of the blocks by this attribute.
        self.plugs = nn.ModuleList(
            make_block(
                chosen.model,
                self.trunk.channels[stage],
                gate=chosen.gate,
                reduction=chosen.reduction,
                restitute_to=chosen.restitute_to,
                backend=chosen.backend,
            )
            for stage in self.stages
        )
        self.pool = PartPool(chosen.parts, chosen.pool)
        self.heads = nn.ModuleList(Head(self.trunk.channels[-1], classes) for _ in range(chosen.parts))

    @property
    def sets(self) -> int:
        """Number of feature sets in training, six, four or two; half of them are of each modality."""
        return 2 if self.model == "baseline" else BLOCKS[self.model].sets

    @property
    def test_sets(self) -> tuple[SetName, ...]:
        """The sets that a test feature consists of, in order: F ("original"), F+ ("restituted") or both."""
        return ("original",) if self.model == "baseline" else BLOCKS[self.model].test_sets

    @property
    def feature_size(self) -> int:
        """Length of a test feature, which joins all parts of all test sets."""
        return len(self.test_sets) * self.parts * self.trunk.channels[-1]

    @property
    def blocks(self) -> tuple[AnyBlock, ...]:
        """The blocks in the order of `stages`; the baseline has none."""
        return tuple(cast(AnyBlock, block) for block in self.plugs)

    def head(self) -> Iterator[nn.Parameter]:
        """The parameters of the BNNecks and classifiers, which learn at the full rate."""
        return self.heads.parameters()

    @check_arguments
    def set_backend(self, backend: BackendName | None) -> None:
        """Run every block on this backend from now on. Raises ValueError for an unknown one."""
        for block in self.blocks:
            block.backend = backend

    def forward(self, visible: Tensor, infrared: Tensor) -> TrainingOutput:
        """Compute what the losses need of two paired batches, (B, 3, H, W) each."""
        for name, images in (("visible", visible), ("infrared", infrared)):
            _check_images(name, images)
        if visible.shape != infrared.shape:
            raise ValueError(
                f"got visible {tuple(visible.shape)} and infrared {tuple(infrared.shape)}, expected equal "
                "shapes: equation 7 mixes sample i of one modality with sample i of the other"
            )
        maps, styles = self._sets(self.trunk.stem(visible, "visible"), self.trunk.stem(infrared, "infrared"))
        pooled = self.pool(maps)
        logits = torch.stack([head(part) for head, part in zip(self.heads, pooled, strict=True)])
        return TrainingOutput(pooled, logits, styles)

    def extract(self, images: Tensor, modality: Modality) -> Tensor:
        """Compute the test features of one modality: (N, 3, H, W) -> (N, `feature_size`), float32.

        As in the paper, a test feature consists of F and F+, or of the set that the network has;
        compensation is not used. The feature of each set and part is L2-normalized after its BNNeck. The
        features are then concatenated by set, in the order of `test_sets`, and within a set by part. Call
        this in eval mode and without gradients.
        """
        _check_images("images", images)
        maps, reached = self.trunk.stem(images, modality), 0
        for index, (stage, block) in enumerate(zip(self.stages, self.blocks, strict=True)):
            maps = self.trunk.layers(maps, reached + 1, stage)
            sets = maps.unflatten(0, (len(self.test_sets) if index else 1, -1)).unbind()
            maps = block.at_test(sets, modality)
            reached = stage
        pooled = self.pool(self.trunk.layers(maps, reached + 1, self._last))
        features = torch.stack([cast(Head, h).neck(part) for h, part in zip(self.heads, pooled, strict=True)])
        features = F.normalize(features.float(), dim=2)
        # (parts, sets * N, D) -> (N, sets, parts, D)
        return features.unflatten(1, (len(self.test_sets), -1)).permute(2, 1, 0, 3).flatten(1)

    def _sets(self, v: Tensor, n: Tensor) -> tuple[Tensor, tuple[SNRFeatures, ...]]:
        """Compute the last maps of all sets as one batch, from the maps of the stems, and the styles."""
        if not self.blocks:
            return self.trunk.layers(torch.cat((v, n)), 1, self._last), ()
        first, *later = zip(self.stages, self.blocks, strict=True)
        reached, block = first
        if reached > 0:
            v, n = self.trunk.layers(torch.cat((v, n)), 1, reached).chunk(2)
        maps, styles = block.first(v, n)
        for stage, block in later:
            maps, more = block.later(self.trunk.layers(maps, reached + 1, stage))
            styles += more
            reached = stage
        return self.trunk.layers(maps, reached + 1, self._last), styles


def _check_images(name: str, images: object) -> None:
    expected = "expected a floating-point tensor (N, 3, H, W)"
    if not isinstance(images, Tensor):
        raise ValueError(f"got {name} of {type(images).__name__}, {expected}")
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"got {name} of {images.dtype} {tuple(images.shape)}, {expected}; mrcn_fast.reid.data.normalize "
            "makes one of uint8 images"
        )


def use_layout(model: nn.Module, channels_last: bool | None) -> torch.memory_format:
    """Put a network's weights into a memory layout, and return that layout for the network's inputs."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]
    return layout
