"""Parts of the caller's own in a run: the network, the loss and the optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mrcn_fast.reid.models.network import TrainingOutput
from mrcn_fast.reid.training.checkpoint import Checkpoint, CheckpointError
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.losses import LossParts

Loss = Callable[[TrainingOutput, Tensor], LossParts | Tensor]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def check_model(model: object, config: TrainConfig) -> None:
    """Refuse a network that can't be scored, and settings that would have no effect on it.

    Raises TypeError for a module without `extract`, and ConfigError for `weights`, `init`, `backend`,
    `freeze` and `compile`.
    """
    if not isinstance(model, nn.Module) or not callable(getattr(model, "extract", None)):
        raise TypeError(
            f"model: got {_name(model)}, expected an nn.Module with extract(images, modality), see "
            "mrcn_fast.reid.ReIDNetwork"
        )
    for name in ("weights", "init", "backend", "freeze", "compile"):
        if (value := getattr(config, name)) not in (None, (), False):
            raise ConfigError(
                f"got {name}={value!r} with a network of your own, expected none: set it in the network"
            )


def check_loss(loss: object) -> None:
    """Refuse a loss with parameters or buffers, which would be neither trained nor saved."""
    if not callable(loss):
        raise TypeError(f"loss: got {_name(loss)}, expected a function of the network's output and labels")
    if isinstance(loss, nn.Module) and (names := list(loss.state_dict())):
        raise ValueError(
            f"loss: got {_name(loss)} with {', '.join(names[:4])}, expected a loss without parameters and "
            "buffers: a run trains and saves those of the network alone. Keep them in the network"
        )


def loss_parts(value: object) -> LossParts:
    """Make LossParts of what a loss gave; a scalar is a total without terms."""
    if isinstance(value, LossParts):
        return value
    if not isinstance(value, Tensor) or value.dim():
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"the loss gave {found}, expected mrcn_fast.reid.LossParts or a scalar tensor")
    none = value.detach().new_zeros(())
    return LossParts(value, none, none, none, none)


def own_optimizer(make: object, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the caller's optimizer. Its learning rates are those at `config.lr`, and follow the schedule.

    Raises TypeError where `make` isn't a function that gives an optimizer, and ConfigError for `lr` 0.
    """
    if isinstance(make, torch.optim.Optimizer) or not callable(make):
        raise TypeError(
            f"optimizer: got {_name(make)}, expected a function that makes one of the network, such as "
            "lambda network: torch.optim.AdamW(network.parameters(), lr=3e-4)"
        )
    optimizer = make(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: the function gave {_name(optimizer)}, expected an optimizer of torch")
    if config.lr == 0:
        raise ConfigError(
            "got lr=0.0 with an optimizer of your own, expected the rate that its own belong to"
        )
    for group in optimizer.param_groups:
        group.setdefault("scale", float(group["lr"]) / config.lr)
    return optimizer


def named_parts(**parts: object) -> dict[str, str]:
    """The names of the classes or functions of the parts that the caller gave; None is no part."""
    return {kind: _name(part) for kind, part in parts.items() if part is not None}


def check_parts(path: Path, checkpoint: Checkpoint, given: Mapping[str, str]) -> None:
    """Raise CheckpointError where a run would go on with other parts than it began with."""
    if checkpoint.parts != given:
        names = ", ".join(f"{kind}=..." for kind in checkpoint.parts)
        advice = f"Give the same parts again: Trainer(config, {names})" if names else "Give none of them"
        raise CheckpointError(
            f"{path}: can't go on with this run with other parts than it began with: expected "
            f"{_in_words(checkpoint.parts)}, found {_in_words(given)}. {advice}"
        )


def _in_words(parts: Mapping[str, str]) -> str:
    return " and ".join(f"the {kind} {name}" for kind, name in parts.items()) or "the library's own parts"


def _name(part: object) -> str:
    while isinstance(part, functools.partial):
        part = part.func
    name: str = getattr(part, "__qualname__", type(part).__qualname__)
    return name
