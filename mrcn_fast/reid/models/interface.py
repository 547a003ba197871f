"""What training and scoring need of a network, whoever wrote it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from mrcn_fast.block import Modality
from mrcn_fast.reid.models.blocks import SetName
from mrcn_fast.reid.models.network import TrainingOutput


class ReIDNetwork(Protocol):
    """A network that `Trainer` trains and `score_checkpoint` scores: an `nn.Module` with these two methods.

    `network(visible, infrared)` takes two batches of augmented and normalized images, (B, 3, H, W) each, with
    the same identity at the same position. It returns a `TrainingOutput` of one part or several and of two,
    four or six sets. `network.extract(images, modality)` takes (N, 3, H, W) of one modality in eval mode and
    returns the test features, (N, D), which are compared by their dot product and so usually have length 1.

    Two attributes are optional. `head()` gives the parameters that learn at the full rate, while the others
    learn at the share `trunk_lr` of it; without it all learn at the full rate. `test_sets` names the sets
    that a test feature joins in chunks of equal length; without it a feature is one set. With F and F₊, in
    this order, it is ("original", "restituted"), and scores come by all pairings of the two.

    Example:
        >>> def scores_of(network: ReIDNetwork, visible: Tensor, infrared: Tensor) -> Tensor:
        ...     return network.extract(visible, "visible") @ network.extract(infrared, "infrared").T
        >>> images = torch.rand(2, 3, 32, 16)
        >>> scores_of(ReIDModel(classes=3, depth=18).eval(), images, images).shape
        torch.Size([2, 2])
    """

    training: bool

    def __call__(self, visible: Tensor, infrared: Tensor, /) -> TrainingOutput: ...

    def extract(self, images: Tensor, modality: Modality, /) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


def test_sets_of(network: object) -> tuple[SetName, ...]:
    """The sets that a network's test feature consists of: one, unless its `test_sets` says otherwise."""
    return getattr(network, "test_sets", ("original",))


def check_output(output: object, batch: int) -> TrainingOutput:
    """Check what a network gave in training for `batch` pairs of images.

    Raises TypeError for anything but a TrainingOutput, and ValueError for shapes that don't fit.
    """
    if not isinstance(output, TrainingOutput):
        raise TypeError(
            f"the network gave {type(output).__name__} in training, expected a "
            "mrcn_fast.reid.TrainingOutput(pooled, logits)"
        )
    pooled, logits = output.pooled, output.logits
    shapes = f"pooled {tuple(pooled.shape)} and logits {tuple(logits.shape)}"
    if pooled.dim() != 3 or logits.dim() != 3 or pooled.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"the network gave {shapes}, expected (parts, sets * B, D) and (parts, sets * B, classes); a "
            "network without parts has one, which pooled[None] and logits[None] make"
        )
    if pooled.shape[1] % batch:
        raise ValueError(f"the network gave {shapes} for {batch} pairs, expected as many rows in each set")
    return output


def check_features(features: object, images: int) -> Tensor:
    """Check what `extract` of a network gave. Raises ValueError for anything but (images, D)."""
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != images:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"the network's extract gave {found} for {images} images, expected ({images}, D)")
    return features
