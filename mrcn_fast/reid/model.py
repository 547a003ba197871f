"""The re-identification network: two stems, a shared ResNet with the MRCN block, BNNeck, classifier."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast import MRCNBlock
from mrcn_fast.block import Modality
from mrcn_fast.reid.resnet import Trunk

ModelName = Literal["mrcn", "baseline"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
STAGES = range(5)


class TrainingOutput(NamedTuple):
    """What the losses read, set after set: six (v, v+, v-, n-, n+, n), or the baseline's two (v, n)."""

    pooled: Tensor  # (sets * B, D), before the BNNeck, not normalised: triplet and CQC
    logits: Tensor  # (sets * B, classes): identity loss


class ReIDModel(nn.Module):
    """Two-stream ResNet with the MRCN block after one stage, or without it (`model="baseline"`).

    Arguments: `classes`, the number of training identities; `model`, "mrcn" or "baseline"; `depth`, 18 or 50;
    `stage`, 0 (after the stem's max-pool) to 4 (after layer4), where the block sits; `gate`, `reduction`,
    `restitute_to` and `backend` as MRCNBlock takes them.

    In training `model(visible, infrared)` takes two paired batches (B, 3, H, W), the same identity at each
    place (eq. 7 mixes sample i with sample i), and returns TrainingOutput. At test `model.extract(images,
    modality)` takes one modality alone.

    Raises ValueError for unknown names, depths and stages, and for batches of unequal shape.
    """

    def __init__(
        self,
        classes: int,
        *,
        model: ModelName = "mrcn",
        depth: int = 50,
        stage: int = 0,
        gate: str = "se",
        reduction: int = 16,
        restitute_to: str = "normalized",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if model not in MODELS:
            raise ValueError(f"got model={model!r}, expected one of {list(MODELS)}")
        if stage not in STAGES:
            raise ValueError(f"got stage={stage}, expected 0 (after the stem) to 4 (after layer4)")
        if classes < 1:
            raise ValueError(f"got classes={classes}, expected the number of training identities, at least 1")
        self.trunk = Trunk(depth)
        self.block: MRCNBlock | None = None
        if model == "mrcn":
            self.block = MRCNBlock(
                self.trunk.channels[stage],
                reduction=reduction,
                gate=gate,
                restitute_to=restitute_to,
                backend=backend,
            )
        # Without a block there is no stage to split at: both modalities are one batch from the stems on.
        self.stage = stage if model == "mrcn" else 0
        self.pool = nn.AdaptiveAvgPool2d(1)
        features = self.trunk.channels[-1]
        self.neck = nn.BatchNorm1d(features)
        self.neck.bias.requires_grad_(False)  # BNNeck: centred on the origin, where the cosine is measured
        self.classifier = nn.Linear(features, classes, bias=False)
        nn.init.normal_(self.neck.weight, 1.0, 0.01)
        nn.init.normal_(self.classifier.weight, 0.0, 0.001)

    @property
    def sets(self) -> int:
        """Sets of features a pair of batches gives in training: six, or two for the baseline."""
        return 2 if self.block is None else 6

    @property
    def feature_size(self) -> int:
        """Length of a test feature: F and F+ side by side, or F alone for the baseline."""
        return self.neck.num_features * (1 if self.block is None else 2)

    def forward(self, visible: Tensor, infrared: Tensor) -> TrainingOutput:
        """Paired batches (B, 3, H, W) of the same identities -> TrainingOutput."""
        if visible.shape != infrared.shape:
            raise ValueError(
                f"got visible {tuple(visible.shape)} and infrared {tuple(infrared.shape)}, expected equal "
                "shapes: equation 7 mixes sample i of one modality with sample i of the other"
            )
        v, n = self.trunk.stem(visible, "visible"), self.trunk.stem(infrared, "infrared")
        if self.block is None:
            x = torch.cat((v, n))
        else:
            if self.stage > 0:
                v, n = self.trunk.layers(torch.cat((v, n)), 1, self.stage).chunk(2)
            x = self.block(v, n, concat=True)
        pooled = self._pooled(x)
        return TrainingOutput(pooled, self.classifier(self.neck(pooled)))

    def extract(self, images: Tensor, modality: Modality) -> Tensor:
        """Test features of one modality alone: (N, 3, H, W) -> (N, `feature_size`), float32.

        The paper's: F and F+ (compensation is not used), each set's feature after the BNNeck L2-normalised,
        then concatenated; the baseline has F alone. Call it in eval mode and without gradients.
        """
        x = self.trunk.layers(self.trunk.stem(images, modality), 1, self.stage)
        if self.block is not None:
            x = torch.cat((x, self.block.restitute(x, modality)))
        features = self.neck(self._pooled(x))
        features = F.normalize(features.float(), dim=1)
        return torch.cat(features.chunk(self.feature_size // self.neck.num_features), dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.pool(self.trunk.layers(x, self.stage + 1, 4)).flatten(1))


def use_layout(model: nn.Module, channels_last: bool) -> torch.memory_format:
    """Put a network's weights into a memory layout; returns it, for the network's inputs."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]
    return layout
