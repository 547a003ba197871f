"""The optimiser of a run: SGD, with the parameters in groups of their own learning rates."""

from __future__ import annotations

import torch

from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.config import TrainConfig


def make_optimizer(model: ReIDModel, config: TrainConfig) -> torch.optim.SGD:
    """SGD with Nesterov's momentum: BNNeck and classifier at the full rate, the rest at `trunk_lr` of it.

    A group's share stands in its `scale`; the schedule multiplies by it.
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
