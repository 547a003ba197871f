"""The blocks that each network inserts between two stages of its trunk, and the feature sets they make.

The first block of a network makes the sets of features from a pair of feature maps. Each later block takes
every set one step further, so that a set is the result of a stack of blocks, as in SNR. The original features
pass all blocks unchanged.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mrcn_fast import MRCNBlock, SNRBlock, SNRFeatures
from mrcn_fast.block import Modality

SetName = Literal["original", "restituted"]


class BlockOutput(NamedTuple):
    """What a block returns in training."""

    maps: Tensor  # (sets * B, C, H, W), set after set
    styles: tuple[SNRFeatures, ...] = ()  # SNR's pooled features, (2B, C)


class ModelBlock(nn.Module):
    """The interface of the block of every network.

    `sets` is the number of feature sets in training: first those of visible images, then as many of infrared
    ones. `test_sets` names the sets of one modality at test.
    """

    sets: ClassVar[int]
    test_sets: ClassVar[tuple[SetName, ...]]
    backend: str | None

    def first(self, visible: Tensor, infrared: Tensor) -> BlockOutput:
        """Make the sets from a pair of feature maps, (B, C, H, W) each."""
        raise NotImplementedError

    def later(self, maps: Tensor) -> BlockOutput:
        """Take the sets (sets * B, C, H, W) of an earlier block one step further."""
        raise NotImplementedError

    def at_test(self, sets: tuple[Tensor, ...], modality: Modality) -> Tensor:
        """Make `test_sets` of one modality as one batch, from the original or an earlier block's sets."""
        raise NotImplementedError


class RestitutionCompensation(MRCNBlock, ModelBlock):
    """Restitution and compensation, the paper's MRCN: v, v+, v-, n-, n+, n in training, F and F+ at test.

    A later block restitutes the restituted sets and compensates the pair of compensated sets, so that F+ at
    test is the chain of restitutions.
    """

    sets = 6
    test_sets = ("original", "restituted")

    def first(self, visible: Tensor, infrared: Tensor) -> BlockOutput:
        return BlockOutput(self(visible, infrared, concat=True))

    def later(self, maps: Tensor) -> BlockOutput:
        v, v_restituted, v_compensated, n_compensated, n_restituted, n = maps.chunk(6)
        compensated = self(v_compensated, n_compensated)
        sets = (
            v,
            self.restitute(v_restituted, "visible"),
            compensated.visible_compensated,
            compensated.infrared_compensated,
            self.restitute(n_restituted, "infrared"),
            n,
        )
        return BlockOutput(torch.cat(sets))

    def at_test(self, sets: tuple[Tensor, ...], modality: Modality) -> Tensor:
        return torch.cat((sets[0], self.restitute(sets[-1], modality)))


class Restitution(RestitutionCompensation):
    """Restitution alone, the paper's MRM: v, v+, n+, n in training, F and F+ at test.

    No gradient reaches the slices of the block's parameters that belong to the compensation gates.
    """

    sets = 4

    def first(self, visible: Tensor, infrared: Tensor) -> BlockOutput:
        return self._restituted(visible, visible, infrared, infrared)

    def later(self, maps: Tensor) -> BlockOutput:
        return self._restituted(*maps.chunk(4))

    def _restituted(self, v: Tensor, of_v: Tensor, of_n: Tensor, n: Tensor) -> BlockOutput:
        restituted = self.restitute(of_v, "visible"), self.restitute(of_n, "infrared")
        return BlockOutput(torch.cat((v, *restituted, n)))


class Compensation(MRCNBlock, ModelBlock):
    """Compensation alone, the paper's MCM: v, v-, n-, n in training, F at test, as compensation needs a pair.

    No gradient reaches the slices of the block's parameters that belong to the restitution gates.
    """

    sets = 4
    test_sets = ("original",)

    def first(self, visible: Tensor, infrared: Tensor) -> BlockOutput:
        return self._compensated(visible, visible, infrared, infrared)

    def later(self, maps: Tensor) -> BlockOutput:
        return self._compensated(*maps.chunk(4))

    def _compensated(self, v: Tensor, of_v: Tensor, of_n: Tensor, n: Tensor) -> BlockOutput:
        made = self(of_v, of_n)
        return BlockOutput(torch.cat((v, made.visible_compensated, made.infrared_compensated, n)))

    def at_test(self, sets: tuple[Tensor, ...], modality: Modality) -> Tensor:
        return sets[0]


class SharedRestitution(SNRBlock, ModelBlock):
    """SNR's block (Jin et al. 2020), shared by both modalities: v+, n+ in training, F+ at test.

    The original maps are not passed on. The styles are the spatial means of the restituted, the contaminated
    and the normalized maps, which the dual causality loss compares.
    """

    sets = 2
    test_sets = ("restituted",)

    def first(self, visible: Tensor, infrared: Tensor) -> BlockOutput:
        return self.later(torch.cat((visible, infrared)))

    def later(self, maps: Tensor) -> BlockOutput:
        features: SNRFeatures = self(maps)
        pooled = SNRFeatures._make(f.mean(dim=(2, 3)) for f in features)
        return BlockOutput(features.restituted, (pooled,))

    def at_test(self, sets: tuple[Tensor, ...], modality: Modality) -> Tensor:
        return self.restitute(sets[0])


AnyBlock = RestitutionCompensation | Compensation | SharedRestitution
BLOCKS: dict[str, type[RestitutionCompensation] | type[Compensation] | type[SharedRestitution]] = {
    "snr": SharedRestitution,
    "mrcn": RestitutionCompensation,
    "mrm": Restitution,
    "mcm": Compensation,
}


def make_block(
    model: str, channels: int, *, gate: str, reduction: int, restitute_to: str, backend: str | None
) -> AnyBlock:
    """Make the block of the network `model` for maps of `channels` channels; SNR ignores `restitute_to`."""
    kind = BLOCKS[model]
    if issubclass(kind, SharedRestitution):
        return kind(channels, reduction=reduction, gate=gate, backend=backend)
    return kind(channels, reduction=reduction, gate=gate, restitute_to=restitute_to, backend=backend)


_RENAMED = {
    "Plug": "ModelBlock",
    "Plugged": "BlockOutput",
    "MRCNPlug": "RestitutionCompensation",
    "RestitutionPlug": "Restitution",
    "CompensationPlug": "Compensation",
    "SNRPlug": "SharedRestitution",
    "AnyPlug": "AnyBlock",
    "PLUGS": "BLOCKS",
    "make_plug": "make_block",
}


def __getattr__(name: str) -> Any:
    """Find a renamed object by its old name, which the next release drops."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is called {_RENAMED[name]} now", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
