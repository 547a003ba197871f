"""ResNet-18 and ResNet-50 with a stem per modality, and the loading of ImageNet weights.

Modules have torchvision's names (conv1, bn1, layer1 ... layer4, downsample.0), so that files of the ResNet
weights of torchvision and timm fit. torchvision itself is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mrcn_fast.block import MODALITIES, Modality
from mrcn_fast.reid.kinds import Depth
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.stored import StoredError, read_safetensors, read_torch

# The end of the names of BatchNorm's integer counts of batches.
_COUNTER = "num_batches_tracked"
_WANTED = "ImageNet weights in torchvision's format (.pth, .safetensors)"
# The files of torchvision's weights IMAGENET1K_V1, by the depth of the ResNet.
_IMAGENET_FILES = {18: "resnet18-f37072fd.pth", 50: "resnet50-0676ba61.pth"}


class WeightsError(ValueError):
    """A weights file is missing, unreadable or doesn't fit the network."""


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
        # The 3x3 convolution has the stride, as in torchvision, whose weights were trained that way.
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
    """The first layers, which each modality has of its own: (N, 3, H, W) -> (N, 64, H/4, W/4)."""

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
    """A ResNet with two stems, `visible` and `infrared`, and shared layers 1 to 4.

    Stage 0 ends with the stem, and stage k with layer k. The stride of layer4 is 1, as in the field's
    baselines, so that a (N, 3, H, W) image gives (N, `channels[4]`, H/16, W/16).

    Raises ValueError for a depth other than 18 or 50.

    Example:
        >>> trunk = Trunk(18)
        >>> trunk.layers(trunk.stem(torch.rand(1, 3, 64, 32), "visible"), 1, 4).shape
        torch.Size([1, 512, 4, 2])
    """

    @check_arguments
    def __init__(self, depth: Depth) -> None:
        super().__init__()
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
        """Compute stage 0: (N, 3, H, W) -> (N, 64, H/4, W/4). Raises ValueError for an unknown modality."""
        if modality not in MODALITIES:
            raise ValueError(f"got modality {modality!r}, expected one of {list(MODALITIES)}")
        return cast(Tensor, getattr(self, modality)(images))

    def layers(self, x: Tensor, first: int, last: int) -> Tensor:
        """Apply the shared layers from `first` to `last`, inclusive; none where first > last."""
        for index in range(first, last + 1):
            x = getattr(self, f"layer{index}")(x)
        return x

    def load_imagenet(self, path: str | Path) -> None:
        """Load the weights of a ResNet of this depth in torchvision's format.

        Both stems get conv1 and bn1, and `fc` is ignored. `path` is a .pth file (a state_dict) or a
        .safetensors file. Raises WeightsError with the keys, and loads nothing, where anything is missing,
        unexpected, of another shape, not floating-point or not finite: weights that were skipped silently are
        the field's commonest cause of scores near zero.
        """
        path = Path(path).expanduser()
        given = {key: value for key, value in read_weights(path).items() if not key.startswith("fc.")}
        expected = self._imagenet_keys()
        # Files from before torch 0.4.1 have no counts of batches, which BatchNorm with a fixed momentum
        # doesn't read.
        missing = [k for k in expected if k not in given and not k.endswith(_COUNTER)]
        problems = {
            "missing": missing,
            "not expected": [k for k in given if k not in expected],
            "of another shape": [
                f"{k}: found {tuple(given[k].shape)}, expected {tuple(own[0].shape)}"
                for k, own in expected.items()
                if k in given and given[k].shape != own[0].shape
            ],
        }
        if any(problems.values()):
            raise WeightsError(
                f"{path}: expected the weights of a ResNet-{self.depth} under torchvision's key names, found "
                + "; ".join(f"{title}: {_listed(keys)}" for title, keys in problems.items() if keys)
                + f". {_advice(given, expected)}"
            )
        check_values(path, given)
        with torch.no_grad():
            for key, targets in expected.items():
                for target in targets:
                    if key in given:
                        target.copy_(given[key])

    def _imagenet_keys(self) -> dict[str, list[Tensor]]:
        """Map torchvision's keys to the tensors that they fill: two in the stems, one elsewhere."""
        keys: dict[str, list[Tensor]] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            for modality in MODALITIES:
                name = name.removeprefix(f"{modality}.")
            keys.setdefault(name, []).append(tensor)
        return keys


def imagenet_file(depth: int) -> str:
    """Say which file has the ImageNet weights of a ResNet of this depth, and how to get it."""
    name = _IMAGENET_FILES[depth]
    return (
        f"{name}, torchvision's ResNet-{depth} with the weights IMAGENET1K_V1: "
        f"curl -O https://download.pytorch.org/models/{name}"
    )


def check_weights_file(path: str | Path) -> None:
    """Raise WeightsError for a path without a file; the file is not read."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise WeightsError(
            f"{path}: expected {_WANTED}; found {found}. The paper's are in {imagenet_file(50)}"
        )


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read a state_dict from a .safetensors or torch file onto the CPU; nothing in the file is executed.

    Raises WeightsError with the path for a file that is missing, unreadable or of another content.
    """
    check_weights_file(path)
    expected = f"{path}: expected {_WANTED}"
    try:
        state = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    except StoredError as error:
        raise WeightsError(f"{expected}; can't be read: found {error}") from None
    return check_state(path, state)


def check_state(path: Path, state: object) -> Mapping[str, Tensor]:
    """Return what a file has as a state_dict. Raises WeightsError, with the path, for anything else."""
    expected = f"{path}: expected a state_dict (names to tensors)"
    if not isinstance(state, Mapping):
        raise WeightsError(f"{expected}, found {type(state).__name__}")
    strange = [
        key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strange or not state:
        found = f"a mapping with the keys {_listed(map(str, state), most=8)}" if state else "an empty mapping"
        inner = [str(key) for key, value in state.items() if _is_state(value)]
        advice = ""
        if inner:
            advice = f": save {inner[0]!r} of it alone"
        elif strange:
            advice = f": {strange[0]!r} is no tensor with a name"
        raise WeightsError(f"{expected}, found {found}{advice}")
    return state


def _is_state(value: object) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(tensor, Tensor) for tensor in value.values())


def check_values(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise WeightsError, with the key, for values that a network can't compute with."""
    for key, value in weights.items():
        if value.layout != torch.strided or value.is_meta or value.is_nested:
            raise WeightsError(
                f"{path}: expected dense tensors, found a sparse, nested or empty one in {key}"
            )
        if not value.is_floating_point() and not key.endswith(_COUNTER):
            raise WeightsError(
                f"{path}: expected floating-point weights, found {value.dtype} in {key}. Give the weights "
                "that the network had before it was quantized"
            )
        plain = value.float()
        if not plain.isfinite().all():
            raise WeightsError(
                f"{path}: expected finite weights, found NaN or infinity in {key}. Give another file: no "
                "training can begin from this one"
            )
        if key.endswith("running_var") and bool((plain < 0).any()):
            raise WeightsError(
                f"{path}: expected variances, found negative values in {key}. Give another file"
            )


def _advice(given: Mapping[str, Tensor], expected: Mapping[str, object]) -> str:
    """Advise what to do about a file with unexpected keys."""
    first = "conv1.weight"
    prefixes = [key.removesuffix(first) for key in given if key.endswith(f".{first}")]
    for prefix in sorted(prefixes, key=len):
        if all(prefix + key in given for key in expected if not key.endswith(_COUNTER)):
            return (
                f"Its keys begin with {prefix!r}, as a wrapper of the network saves them. Save it without: "
                f"{{key.removeprefix({prefix!r}): value for key, value in state.items()}}"
            )
    for depth in BLOCKS:
        with torch.device("meta"):
            keys = Trunk(depth)._imagenet_keys()
        if keys.keys() != expected.keys() and all(k in given for k in keys if not k.endswith(_COUNTER)):
            return f"These are the weights of a ResNet-{depth}: give that depth, or another file."
    return "Give a file that torchvision or timm has for this depth."


def _listed(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    tail = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + tail
