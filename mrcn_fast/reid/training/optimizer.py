"""The parameters that a run trains, and its optimizer, with groups of learning rate and weight decay."""

from __future__ import annotations

import pkgutil
import shlex
from collections.abc import Sequence
from typing import Any, Final

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.config import ConfigError, TrainConfig

# Arguments of an optimizer that the configuration has.
_CONFIGURED: Final = ("lr", "weight_decay")


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
    """Make the optimizer of a run: SGD with Nesterov momentum, AdamW with PyTorch's betas, or another class.

    What the network's `head()` gives, BNNeck and classifier, learns at the full rate, and all other
    parameters at the share `trunk_lr` of it. In a network without `head`, all learn at the full rate. The
    share of a group is its `scale`, by which the trainer multiplies the scheduled rate.

    With `selective_decay`, vectors and what `without_decay` names are in groups without weight decay. With
    the speed "auto", one kernel of SGD or AdamW updates all parameters, and rounds otherwise than PyTorch's
    default. Another optimizer is a class that `optimizer` names: it is imported, and gets the groups and the
    arguments that stand after its name (see `named_optimizer`).

    Raises ConfigError for a class that can't be imported, is no optimizer, or doesn't take the arguments.

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
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.own_optimizer:
        return _made(*named_optimizer(config.optimizer), groups, shared)
    shared["fused"] = True if config.speed == "auto" else None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **shared)
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, **shared)


def check_optimizer(config: TrainConfig) -> None:
    """Raise ConfigError for a named optimizer that can't be imported, or doesn't take its arguments."""
    if config.own_optimizer:
        named_optimizer(config.optimizer)


def named_optimizer(text: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Import the class of an optimizer, and read the arguments that stand after its dotted name.

    An argument is written as name=value, where the value is YAML. jsonargparse reads them by the names and
    types of the class. The configuration has learning rate and weight decay, which are no arguments here.

    Raises ConfigError for a class that can't be imported or is no optimizer, and for unfit arguments.

    Example:
        >>> kind, arguments = named_optimizer("torch.optim.RAdam betas=[0.9,0.95] eps=1e-6")
        >>> kind.__name__, arguments["betas"], arguments["eps"]
        ('RAdam', (0.9, 0.95), 1e-06)
    """
    name, *words = _words(text)
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # a module may raise anything while it is imported
        raise ConfigError(f"optimizer: can't import {name}: {error}") from None
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise ConfigError(f"optimizer: got {name}, expected a class of optimizers, such as torch.optim.RAdam")
    if issubclass(found, torch.optim.SparseAdam):
        raise ConfigError(f"optimizer: got {name}, expected one for dense gradients, which the network has")
    parser = ArgumentParser(exit_on_error=False)
    names = parser.add_class_arguments(found, skip={"params", *_CONFIGURED})
    for word in words:
        if word.partition("=")[0] not in names or "=" not in word:
            raise ConfigError(
                f"optimizer: got the argument {word!r} of {name}, expected name=value with a name among "
                f"{', '.join(names)}; lr and weight_decay are settings of the run"
            )
    try:
        return found, parser.parse_args([f"--{word}" for word in words]).as_dict()
    except ArgumentError as error:
        raise ConfigError(f"optimizer: {' '.join(str(error).split())}") from None


def argument_names(kind: type[torch.optim.Optimizer]) -> set[str]:
    """The names of an optimizer's arguments but `params`, with those that it passes on as **options.

    Example:
        >>> sorted(argument_names(torch.optim.Adagrad) & {"lr", "lr_decay", "momentum"})
        ['lr', 'lr_decay']
    """
    return set(ArgumentParser().add_class_arguments(kind, skip={"params"}, fail_untyped=False))


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"optimizer: got {text!r}, {error}") from None


def _made(
    kind: type[torch.optim.Optimizer],
    arguments: dict[str, Any],
    groups: list[dict[str, Any]],
    shared: dict[str, Any],
) -> torch.optim.Optimizer:
    """Make a named optimizer, with those of the shared values that it takes."""
    taken = argument_names(kind)
    shared = {name: value for name, value in shared.items() if name in taken}
    try:
        return kind(groups, **shared, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {kind.__name__} refuses the run's values: {error}") from error


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
