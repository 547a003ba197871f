"""The optimizer of a run: SGD, with two groups of parameters that have different learning rates."""

from __future__ import annotations

import torch

from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.config import TrainConfig


def make_optimizer(model: ReIDModel, config: TrainConfig) -> torch.optim.SGD:
    """Make SGD with Nesterov momentum.

    BNNeck and classifier learn at the full rate, all other parameters at the share `trunk_lr` of it. The
    share of a group is its `scale`, by which the trainer multiplies the scheduled rate.
    """
    head = list(model.head())
    in_head = {id(parameter) for parameter in head}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_head]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.requires_grad], "scale": scale}
        for parameters, scale in ((head, 1.0), (rest, config.trunk_lr))
    ]
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
