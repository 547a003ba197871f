"""What a run or a scoring takes from a checkpoint, after a check that the checkpoint belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.settings import SettingError
from mrcn_fast.reid.training.checkpoint import Checkpoint, CheckpointError, weights_fingerprint
from mrcn_fast.reid.training.checkpoint_checks import check_group, check_weights
from mrcn_fast.reid.training.config import FREE_ON_RESUME, TrainConfig
from mrcn_fast.reid.training.data_identity import DataIdentity
from mrcn_fast.reid.training.optimizer import argument_names


def check_data(path: str | Path, checkpoint: Checkpoint, given: DataIdentity) -> None:
    """Raise CheckpointError for a tree other than the training's; the message has both."""
    if checkpoint.data != given:
        raise CheckpointError(
            f"{path}: this checkpoint belongs to another data set.\n"
            f"  expected (trained on): {checkpoint.data}\n"
            f"  found (given):         {given}\n"
            "Give the tree it was trained on."
        )


def check_config(path: str | Path, checkpoint: Checkpoint, given: TrainConfig) -> None:
    """Refuse to resume a run with other values than it began with.

    The file of the initial weights may have moved. Raises CheckpointError, which names the values, and
    OSError where the weights can't be read.
    """
    began, now = checkpoint.config.as_dict(), given.as_dict()
    differing = [
        f"{name}: expected {began[name]!r} (checkpoint), found {now[name]!r} (given)"
        for name in began
        if name not in FREE_ON_RESUME and began[name] != now[name]
    ]
    if (weights := other_weights(checkpoint, given)) is not None:
        differing.append(weights)
    if differing:
        raise CheckpointError(
            f"{path}: can't go on with this run under other values than it began with:\n  "
            + "\n  ".join(differing)
        )


def other_weights(checkpoint: Checkpoint, given: TrainConfig) -> str | None:
    """How a configuration's initial weights differ from those that a run began with; None where they don't.

    Raises OSError where they can't be read.
    """
    weights = weights_fingerprint(given.initial)
    if checkpoint.weights == weights:
        return None
    expected = _weights_in_words(checkpoint.config.initial, checkpoint.weights)
    found = _weights_in_words(given.initial, weights)
    return f"weights: expected {expected} (checkpoint), found {found} (given)"


def check_processes(path: str | Path, checkpoint: Checkpoint, count: int) -> None:
    """Raise CheckpointError where a run would go on with another number of processes than it began with.

    The batches of a step and the length of an epoch depend on this number.
    """
    began = len(checkpoint.random)
    if began != count:
        raise CheckpointError(
            f"{path}: can't go on with this run in another number of processes than it began in: expected "
            f"{began} (checkpoint), found {count} (given). Give {began} in all, by --devices and --nodes or "
            "by the launcher"
        )


def _weights_in_words(path: str | None, digest: str | None) -> str:
    return "random ones" if digest is None else f"{path!r} with fingerprint {digest[:12]}"


def load_weights(path: str | Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the weights of a checkpoint. Raises CheckpointError for a network of another architecture."""
    try:
        check_weights(state, model.state_dict())
    except SettingError as error:
        raise CheckpointError(f"{path}: this checkpoint is of another architecture: {error}") from error
    model.load_state_dict(state)


def load_optimizer(path: str | Path, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the optimizer's state. Raises CheckpointError where it is of other parameters or arguments.

    Values of a group that are no arguments of the optimizer belong to its state: some change in training.
    """
    own = optimizer.state_dict()["param_groups"]
    arguments = {"scale"} | argument_names(type(optimizer))
    try:
        for number, (group, expected) in enumerate(zip(state["param_groups"], own, strict=False)):
            given = {name: value for name, value in group.items() if name in arguments}
            check_group(given, expected, f"optimizer.param_groups[{number}]")
        optimizer.load_state_dict(dict(state))
    except ValueError as error:
        raise CheckpointError(f"{path}: the optimizer's state doesn't fit this run.\n{error}") from error


def build_model(path: str | Path, checkpoint: Checkpoint, backend: str | None = None) -> ReIDModel:
    """Build the trained network of a checkpoint.

    `backend` replaces the training's backend, which isn't part of the architecture. Raises CheckpointError
    for a run with a network of the caller's own.
    """
    if "model" in checkpoint.parts:
        raise CheckpointError(
            f"{path}: this run trained a network of its caller's own ({checkpoint.parts['model']}), which "
            "this library can't build. Give it in Python: "
            "mrcn_fast.reid.score_checkpoint(checkpoint, data, model=...)"
        )
    arguments = checkpoint.config.model_arguments() | {"backend": backend}
    model = ReIDModel(len(checkpoint.data.identities), **arguments)
    load_weights(path, model, checkpoint.model)
    return model
