"""The re-identification network: two stems, a shared ResNet with blocks plugged in, BNNecks, classifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, cast, get_args

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
    Stage,
)
from mrcn_fast.reid.models.blocks import PLUGS, AnyPlug, SetName, make_plug
from mrcn_fast.reid.models.heads import Head, PartPool, PoolName
from mrcn_fast.reid.models.resnet import Trunk
from mrcn_fast.reid.settings import check_arguments

ModelName = Literal["baseline", "snr", "mrcn", "mrm", "mcm"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)


class TrainingOutput(NamedTuple):
    """What the losses read, part after part (one without parts) and in a part set after set.

    The sets are six (v, v+, v-, n-, n+, n), four (v, v+, n+, n or v, v-, n-, n) or two (v, n or v+, n+).
    """

    pooled: Tensor  # (parts, sets * B, D), before the BNNeck, not normalised: triplet and CQC
    logits: Tensor  # (parts, sets * B, classes): identity loss
    styles: tuple[SNRFeatures, ...] = ()  # SNR: pooled (2B, C) features at each plug, for its causality loss


class ReIDModel(nn.Module):
    """Two-stream ResNet with a block plugged in behind one stage or several.

    Args:
        classes: the number of training identities.
        model: "baseline", no block; "mrcn", restitution and compensation; "mrm" or "mcm", one of the two;
            "snr", SNR's block in their place, shared by the modalities.
        depth: 18 or 50.
        stages: where blocks sit, ascending: 0 (after the stem's max-pool) to 4 (after layer4). The baseline
            ignores them.
        gate, reduction, restitute_to, backend: as `mrcn_fast.MRCNBlock` takes them; SNR has no
            `restitute_to`.
        parts: stripes of the last map, each with a BNNeck and a classifier of its own (MRCN-P: 4).
        pool: "average" or "gem", see `heads.PartPool`.

    In training `model(visible, infrared)` takes two paired batches (B, 3, H, W), the same identity at each
    place (eq. 7 mixes sample i with sample i), and returns TrainingOutput. At test `model.extract(images,
    modality)` takes one modality alone.

    With several plugs each set is a stack of blocks: v and n pass the later ones untouched, v+ and n+ are
    restituted again, v- and n- compensated again; F+ at test is the chain of restitutions.

    "mrm" and "mcm" have MRCN's whole block: the gates they don't use are slices of its parameters, and the
    gradient of those slices is zero.

    Raises ValueError for unknown names, depths and stages, for batches of unequal shape, and for a last map
    with fewer rows than parts.
    """

    @check_arguments
    def __init__(
        self,
        classes: Count,
        *,
        model: ModelName = "mrcn",
        depth: Depth = 50,
        stages: Annotated[Sequence[Stage], INCREASING] = (0,),
        gate: GateName = "se",
        reduction: Count = 16,
        restitute_to: RestituteTo = "normalized",
        parts: Count = 1,
        pool: PoolName = "average",
        backend: BackendName | None = None,
    ) -> None:
        super().__init__()
        if not stages and model != "baseline":
            raise ValueError(f"got stages=(), expected at least one for the blocks of {model}")
        # Without a block there is no stage to split at: both modalities are one batch from the stems on.
        self.stages = () if model == "baseline" else tuple(stages)
        self.model = model
        self.parts = parts
        self.trunk = Trunk(depth)
        self.plugs = nn.ModuleList(
            make_plug(
                model,
                self.trunk.channels[stage],
                gate=gate,
                reduction=reduction,
                restitute_to=restitute_to,
                backend=backend,
            )
            for stage in self.stages
        )
        self.pool = PartPool(parts, pool)
        self.heads = nn.ModuleList(Head(self.trunk.channels[-1], classes) for _ in range(parts))

    @property
    def sets(self) -> int:
        """Sets of features a pair of batches gives in training: six, four or two; half of each modality."""
        return 2 if self.model == "baseline" else PLUGS[self.model].sets

    @property
    def test_sets(self) -> tuple[SetName, ...]:
        """The sets in a test feature, in its order: F ("original"), F+ ("restituted") or both."""
        return ("original",) if self.model == "baseline" else PLUGS[self.model].test_sets

    @property
    def feature_size(self) -> int:
        """Length of a test feature: each part of each test set side by side."""
        return len(self.test_sets) * self.parts * self.trunk.channels[-1]

    @property
    def blocks(self) -> tuple[AnyPlug, ...]:
        """The blocks in the order of `stages`; none for the baseline."""
        return tuple(cast(AnyPlug, plug) for plug in self.plugs)

    def head(self) -> Iterator[nn.Parameter]:
        """The parameters of BNNecks and classifiers, which learn at the full rate."""
        return self.heads.parameters()

    @check_arguments
    def set_backend(self, backend: BackendName | None) -> None:
        """Let every block run on this backend from now on, as `backend` chose it. ValueError if unknown."""
        for block in self.blocks:
            block.backend = backend

    def forward(self, visible: Tensor, infrared: Tensor) -> TrainingOutput:
        """Paired batches (B, 3, H, W) of the same identities -> TrainingOutput."""
        _check_images("visible", visible)
        _check_images("infrared", infrared)
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
        """Test features of one modality alone: (N, 3, H, W) -> (N, `feature_size`), float32.

        The paper's: F and F+ (compensation is not used), or the one of them that the model has. The feature
        of each set and part after its BNNeck is L2-normalised; then they are concatenated, set after set as
        `test_sets` names them, in a set part after part. Call it in eval mode and without gradients.
        """
        _check_images("images", images)
        maps, reached = self.trunk.stem(images, modality), 0
        for index, (stage, plug) in enumerate(zip(self.stages, self.blocks, strict=True)):
            maps = self.trunk.layers(maps, reached + 1, stage)
            sets = maps.unflatten(0, (len(self.test_sets) if index else 1, -1)).unbind()
            maps = plug.at_test(sets, modality)
            reached = stage
        pooled = self.pool(self.trunk.layers(maps, reached + 1, 4))
        features = torch.stack([cast(Head, h).neck(part) for h, part in zip(self.heads, pooled, strict=True)])
        features = F.normalize(features.float(), dim=2)
        # (parts, sets * N, D) -> (N, sets, parts, D)
        return features.unflatten(1, (len(self.test_sets), -1)).permute(2, 1, 0, 3).flatten(1)

    def _sets(self, v: Tensor, n: Tensor) -> tuple[Tensor, tuple[SNRFeatures, ...]]:
        """The last maps of all sets as one batch, from the stems'; and the styles."""
        if not self.blocks:
            return self.trunk.layers(torch.cat((v, n)), 1, 4), ()
        first, *later = zip(self.stages, self.blocks, strict=True)
        reached, plug = first
        if reached > 0:
            v, n = self.trunk.layers(torch.cat((v, n)), 1, reached).chunk(2)
        maps, styles = plug.first(v, n)
        for stage, plug in later:
            maps, more = plug.later(self.trunk.layers(maps, reached + 1, stage))
            styles += more
            reached = stage
        return self.trunk.layers(maps, reached + 1, 4), styles


def _check_images(name: str, images: object) -> None:
    expected = "expected a floating-point tensor (N, 3, H, W)"
    if not isinstance(images, Tensor):
        raise ValueError(f"got {name} of {type(images).__name__}, {expected}")
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"got {name} of {images.dtype} {tuple(images.shape)}, {expected}; mrcn_fast.reid.data.normalize "
            "makes one of uint8 images"
        )


def use_layout(model: nn.Module, channels_last: bool) -> torch.memory_format:
    """Put a network's weights into a memory layout; returns it, for the network's inputs."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]
    return layout
