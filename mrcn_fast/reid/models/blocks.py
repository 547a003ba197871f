"""The blocks between two stages of the trunk, and what each model makes of its feature sets with them.

A model's first plug makes its sets from a pair of feature maps. A later one takes every set one block on:
each set is a stack of modules that starts from the original, as SNR stacks its blocks. The originals pass
every plug untouched.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mrcn_fast import MRCNBlock, SNRBlock, SNRFeatures
from mrcn_fast.block import Modality

SetName = Literal["original", "restituted"]


class Plugged(NamedTuple):
    """The sets behind a plug as one batch (sets * B, C, H, W), and SNR's pooled features (2B, C) of it."""

    maps: Tensor
    styles: tuple[SNRFeatures, ...] = ()


class Plug(nn.Module):
    """What the plugs of every model do; a plug is also the block whose parameters it has.

    `sets` counts the feature sets that training gives, half of them visible, then half infrared; `test_sets`
    names those of one modality at test.
    """

    sets: ClassVar[int]
    test_sets: ClassVar[tuple[SetName, ...]]
    backend: str | None

    def first(self, visible: Tensor, infrared: Tensor) -> Plugged:
        """The sets of a pair of maps, (B, C, H, W) each."""
        raise NotImplementedError

    def later(self, maps: Tensor) -> Plugged:
        """The sets (sets * B, C, H, W) that an earlier plug and the layers behind it gave, one block on."""
        raise NotImplementedError

    def at_test(self, sets: tuple[Tensor, ...], modality: Modality) -> Tensor:
        """`test_sets` of one modality as one batch, from the original alone or an earlier plug's sets."""
        raise NotImplementedError


class MRCNPlug(MRCNBlock, Plug):
    """Restitution and compensation: v, v+, v-, n-, n+, n; at test F and F+.

    Later plugs restitute the restituted sets and compensate the compensated pair, so that F+ at test is the
    chain of restitutions.
    """

    sets = 6
    test_sets = ("original", "restituted")

    def first(self, visible: Tensor, infrared: Tensor) -> Plugged:
        return Plugged(self(visible, infrared, concat=True))

    def later(self, maps: Tensor) -> Plugged:
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
        return Plugged(torch.cat(sets))

    def at_test(self, sets: tuple[Tensor, ...], modality: Modality) -> Tensor:
        return torch.cat((sets[0], self.restitute(sets[-1], modality)))


class RestitutionPlug(MRCNPlug):
    """Restitution alone (the paper's "MRM"): v, v+, n+, n; at test F and F+.

    The block's compensation gates have slices of its parameters that no gradient reaches.
    """

    sets = 4

    def first(self, visible: Tensor, infrared: Tensor) -> Plugged:
        return self._restituted(visible, visible, infrared, infrared)

    def later(self, maps: Tensor) -> Plugged:
        return self._restituted(*maps.chunk(4))

    def _restituted(self, v: Tensor, of_v: Tensor, of_n: Tensor, n: Tensor) -> Plugged:
        restituted = self.restitute(of_v, "visible"), self.restitute(of_n, "infrared")
        return Plugged(torch.cat((v, *restituted, n)))


class CompensationPlug(MRCNBlock, Plug):
    """Compensation alone (the paper's "MCM"): v, v-, n-, n; at test F, as compensation needs a pair.

    The block's restitution gates have slices of its parameters that no gradient reaches.
    """

    sets = 4
    test_sets = ("original",)

    def first(self, visible: Tensor, infrared: Tensor) -> Plugged:
        return self._compensated(visible, visible, infrared, infrared)

    def later(self, maps: Tensor) -> Plugged:
        return self._compensated(*maps.chunk(4))

    def _compensated(self, v: Tensor, of_v: Tensor, of_n: Tensor, n: Tensor) -> Plugged:
        made = self(of_v, of_n)
        return Plugged(torch.cat((v, made.visible_compensated, made.infrared_compensated, n)))

    def at_test(self, sets: tuple[Tensor, ...], modality: Modality) -> Tensor:
        return sets[0]


class SNRPlug(SNRBlock, Plug):
    """SNR's block (Jin et al. 2020), one for both modalities: v+, n+; at test F+. The originals end here.

    Its styles are the spatial means of the restituted, the contaminated and the normalized maps, for the dual
    causality loss.
    """

    sets = 2
    test_sets = ("restituted",)

    def first(self, visible: Tensor, infrared: Tensor) -> Plugged:
        return self.later(torch.cat((visible, infrared)))

    def later(self, maps: Tensor) -> Plugged:
        features: SNRFeatures = self(maps)
        pooled = SNRFeatures._make(f.mean(dim=(2, 3)) for f in features)
        return Plugged(features.restituted, (pooled,))

    def at_test(self, sets: tuple[Tensor, ...], modality: Modality) -> Tensor:
        return self.restitute(sets[0])


AnyPlug = MRCNPlug | CompensationPlug | SNRPlug
PLUGS: dict[str, type[MRCNPlug] | type[CompensationPlug] | type[SNRPlug]] = {
    "snr": SNRPlug,
    "mrcn": MRCNPlug,
    "mrm": RestitutionPlug,
    "mcm": CompensationPlug,
}


def make_plug(
    model: str, channels: int, *, gate: str, reduction: int, restitute_to: str, backend: str | None
) -> AnyPlug:
    """The plug of `model` for maps of `channels` channels; SNR has no choice of `restitute_to`."""
    kind = PLUGS[model]
    if issubclass(kind, SNRPlug):
        return kind(channels, reduction=reduction, gate=gate, backend=backend)
    return kind(channels, reduction=reduction, gate=gate, restitute_to=restitute_to, backend=backend)
