"""ResNet-18 and -50 with a stem for each modality, and ImageNet weights from a file.

Modules carry torchvision's names (conv1, bn1, layer1 ... layer4, downsample.0), so a file of torchvision's or
timm's ResNet weights fits as it is; torchvision itself is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mrcn_fast.block import MODALITIES, Modality


class WeightsError(ValueError):
    """A weights file that is missing, unreadable or does not fit the network."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18): (N, C, H, W) -> (N, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return cast(Tensor, self.relu(self.bn2(self.conv2(x)) + identity))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, a shortcut (ResNet-50): (N, C, H, W) -> (N, 4 width, H/stride, ...)."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        # The stride sits in the 3x3 convolution, as in torchvision; its weights were trained that way.
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return cast(Tensor, self.relu(self.bn3(self.conv3(x)) + identity))


def _shortcut(channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class Stem(nn.Module):
    """One modality's own first layers: (N, 3, H, W) -> (N, 64, H/4, W/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.maxpool(self.relu(self.bn1(self.conv1(x)))))


BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class Trunk(nn.Module):
    """A ResNet whose stem exists twice, `visible` and `infrared`, and whose layers 1 to 4 are shared.

    Stage 0 is the stem's end, stage k the end of layer k. The last stride is 1, as in the field's baselines:
    layer4 keeps layer3's resolution, so a (N, 3, H, W) image gives (N, `channels[4]`, H/16, W/16).

    Raises ValueError for a depth other than 18 or 50.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(
                f"got depth={depth}, expected one of {sorted(BLOCKS)}: the ResNets this trunk knows"
            )
        kind, counts = BLOCKS[depth]
        self.depth = depth
        self.visible = Stem()
        self.infrared = Stem()
        widths = (64, 128, 256, 512)
        strides = (1, 2, 2, 1)
        channels = [64]
        for index, (width, stride, count) in enumerate(zip(widths, strides, counts, strict=True), start=1):
            blocks = [kind(channels[-1], width, stride)]
            blocks += [kind(width * kind.expansion, width, 1) for _ in range(count - 1)]
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
            channels.append(width * kind.expansion)
        self.channels = tuple(channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, images: Tensor, modality: Modality) -> Tensor:
        """Stage 0 of one modality: (N, 3, H, W) -> (N, 64, H/4, W/4). ValueError for an unknown modality."""
        if modality not in MODALITIES:
            raise ValueError(f"got modality {modality!r}, expected one of {list(MODALITIES)}")
        return cast(Tensor, getattr(self, modality)(images))

    def layers(self, x: Tensor, first: int, last: int) -> Tensor:
        """The shared layers `first` to `last`, both included; none where first > last."""
        for index in range(first, last + 1):
            x = getattr(self, f"layer{index}")(x)
        return x

    def load_imagenet(self, path: str | Path) -> None:
        """Load a ResNet of this depth in torchvision's format: conv1, bn1 into both stems; `fc` is ignored.

        `path` is a .pth (a state_dict) or .safetensors file. Raises WeightsError naming the keys when
        anything is missing, left over or of another shape: weights that were silently skipped are the field's
        commonest cause of scores near zero.
        """
        path = Path(path)
        given = {key: value for key, value in read_weights(path).items() if not key.startswith("fc.")}
        expected = self._imagenet_keys()
        # Files from before torch 0.4.1 have no counter of BatchNorm's batches; nothing reads it at fixed
        # momentum.
        missing = [k for k in expected if k not in given and not k.endswith("num_batches_tracked")]
        unexpected = [k for k in given if k not in expected]
        shapes = [
            f"{k}: found {tuple(given[k].shape)}, expected {tuple(own[0].shape)}"
            for k, own in expected.items()
            if k in given and given[k].shape != own[0].shape
        ]
        problems = [
            f"{title}: {_listed(keys)}"
            for title, keys in (
                ("missing", missing),
                ("not expected", unexpected),
                ("of another shape", shapes),
            )
            if keys
        ]
        if problems:
            raise WeightsError(
                f"{path}: expected the weights of a ResNet-{self.depth} under torchvision's key names, found "
                + "; ".join(problems)
                + ". Give a file of this depth, or the depth of this file."
            )
        with torch.no_grad():
            for key, targets in expected.items():
                for target in targets:
                    if key in given:
                        target.copy_(given[key])

    def _imagenet_keys(self) -> dict[str, list[Tensor]]:
        """torchvision's key -> the tensors of this trunk it fills: two for the stem, one for the rest."""
        keys: dict[str, list[Tensor]] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            for modality in MODALITIES:
                name = name.removeprefix(f"{modality}.")
            keys.setdefault(name, []).append(tensor)
        return keys


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """A state_dict from a .safetensors or torch file, on the CPU; nothing in the file is executed.

    Raises WeightsError with the path when it is missing, unreadable or holds something else.
    """
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file; expected ImageNet weights in torchvision's format (.pth, .safetensors)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise whatever the broken bytes lead them to
        raise WeightsError(f"{path}: can't be read as weights ({type(error).__name__}: {error})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = (
            f"a mapping with the keys {_listed(map(str, state))}"
            if isinstance(state, Mapping)
            else type(state)
        )
        raise WeightsError(f"{path}: expected a state_dict (names to tensors), found {found}")
    return state


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    tail = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + tail
