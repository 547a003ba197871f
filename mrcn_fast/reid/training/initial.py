"""The weights that a run begins with: ImageNet's for the ResNet, or those of a trained network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from mrcn_fast.convert import load_by_name
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.models.resnet import WeightsError, check_state, check_values, check_weights_file
from mrcn_fast.reid.stored import StoredError, read_safetensors, read_torch
from mrcn_fast.reid.training.checkpoint import checkpoint_file, load_checkpoint
from mrcn_fast.reid.training.config import TrainConfig

_WANTED: Final = "a checkpoint, the folder of a run or a state_dict (.pth, .safetensors)"


def begin(model: ReIDModel, config: TrainConfig) -> None:
    """Give a network, which has random weights, those of the configuration's `weights` or `init`.

    Raises WeightsError or CheckpointError for a file that can't be used.
    """
    if config.weights is not None:
        model.trunk.load_imagenet(config.weights)
    if config.init is not None:
        initialize(model, config.init)


def check_initial(config: TrainConfig) -> None:
    """Raise WeightsError for a file of initial weights that isn't there; the file is not read."""
    if config.weights is not None:
        check_weights_file(config.weights)
    if config.init is not None and not (file := checkpoint_file(config.init)).is_file():
        found = f"a folder without {file.name}" if Path(config.init).is_dir() else "no such file"
        raise WeightsError(f"{config.init}: expected {_WANTED}; found {found}. Give another path (--init)")


def initialize(model: ReIDModel, path: str | Path) -> None:
    """Load the weights of a checkpoint, its folder or a state_dict into a network, by the names of tensors.

    The file may lack blocks, and may have a classifier of other people; the network's own values stay there.
    What is not loaded and what is not used is logged by name. Files of AGW's layout are read too.

    Raises:
        CheckpointError: for a checkpoint that can't be used
        WeightsError: for a file that can't be read, and where another tensor is missing or of another shape

    Example:
        >>> config = TrainConfig(data="data/regdb", dataset="regdb", out="runs/first", depth=18,
        ...     height=64, width=32, identities=2, images=2, steps=1, workers=0)
        >>> initialize(ReIDModel(7, depth=18), Trainer(config).fit())
    """
    path = checkpoint_file(path)
    state = _state(path)
    may_miss = ("plugs.", *(f"heads.{part}.classifier." for part in range(len(model.heads))))
    lacking = [
        name
        for name in load_by_name(model, state, optional="").missing
        if not name.startswith(may_miss) and not name.endswith("num_batches_tracked")
    ]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise WeightsError(
            f"{path}: expected weights of this network, found none of the right shape for "
            f"{', '.join(lacking[:3])}{more}. Only blocks and classifiers may differ: give a network of the "
            "same --depth and --parts; ImageNet weights are given by --weights"
        )


def _state(path: Path) -> Mapping[str, Tensor]:
    """The network's tensors in a checkpoint or a file with a state_dict."""
    try:
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    except StoredError as error:
        raise WeightsError(f"{path}: expected {_WANTED}; can't be read: found {error}") from None
    if isinstance(content, Mapping) and "format" in content:
        return load_checkpoint(path).model
    state = check_state(path, content)
    check_values(path, state)
    return state
