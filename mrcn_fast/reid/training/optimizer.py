"""The parameters that a run trains, and its optimizer, with groups of learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.config import TrainConfig


def freeze(model: ReIDModel, layers: Sequence[str]) -> list[nn.Module]:
    """Leave the stems ("stem") or "layer1" to "layer4" of the trunk out of the training; returns the modules.

    Their parameters get no gradient. The caller keeps the modules in eval mode, so that their BatchNorms
    normalize by the statistics that they have.

    Example:
        >>> model = ReIDModel(classes=5, depth=18)
        >>> len(freeze(model, ["stem", "layer1"]))
        3
        >>> next(model.trunk.layer1.parameters()).requires_grad
        False
    """
    frozen: list[nn.Module] = []
    for layer in layers:
        trunk = model.trunk
        frozen += [trunk.visible, trunk.infrared] if layer == "stem" else [trunk.get_submodule(layer)]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a run: SGD with Nesterov momentum, or AdamW with PyTorch's betas and eps.

    What the network's `head()` gives, BNNeck and classifier, learns at the full rate, and all other
    parameters at the share `trunk_lr` of it. In a network without `head`, all learn at the full rate. The
    share of a group is its `scale`, by which the trainer multiplies the scheduled rate.

    With `selective_decay`, vectors and what `without_decay` names are in groups without weight decay. With
    the speed "auto", one kernel updates all parameters, and rounds otherwise than PyTorch's default.

    Example:
        >>> model = ReIDModel(classes=5, depth=18)
        >>> optimizer = make_optimizer(model, TrainConfig(data="", lr=0.2))
        >>> [group["scale"] for group in optimizer.param_groups]
        [1.0, 0.1]
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Of the class: a network may well have a submodule of this name.
    head = getattr(type(model), "head", nn.Module.parameters)
    in_head = set(map(id, head(model)))
    groups: list[dict[str, Any]] = []
    for scale, of_head in ((1.0, True), (config.trunk_lr, False)):
        named = {name: p for name, p in parameters.items() if (id(p) in in_head) == of_head}
        groups += [{"params": own, "scale": scale} | decay for own, decay in _by_decay(model, named, config)]
    shared: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "fused": True if config.speed == "auto" else None,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **shared)
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, **shared)


def without_decay(model: nn.Module) -> set[str]:
    """The names of the parameters that a network's modules leave out of weight decay.

    A module names them, relative to itself, by timm's method `no_weight_decay()`, as `MRCNBlock` does.

    Example:
        >>> sorted(without_decay(torch.nn.Sequential(mrcn_fast.SNRBlock(32))))
        ['0.gate.fc1_bias', '0.gate.fc2_bias', '0.norm_bias', '0.norm_weight']
    """
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }


def _by_decay(
    model: nn.Module, named: dict[str, nn.Parameter], config: TrainConfig
) -> list[tuple[list[nn.Parameter], dict[str, float]]]:
    """Split parameters into those with and those without weight decay, with the setting of each group."""
    if not config.selective_decay:
        return [(list(named.values()), {})] if named else []
    left_out = without_decay(model)
    plain = [p for name, p in named.items() if p.dim() <= 1 or name in left_out]
    decayed = [p for name, p in named.items() if p.dim() > 1 and name not in left_out]
    groups: list[tuple[list[nn.Parameter], dict[str, float]]] = [
        (decayed, {}),
        (plain, {"weight_decay": 0.0}),
    ]
    return [(own, setting) for own, setting in groups if own]
