"""Whether the fields of a checkpoint fit each other, and the network and the optimizer that its run has.

checkpoint.py has checked the types of the fields before. Each check raises SettingError, which names a field.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from mrcn_fast.reid.data.sampler import batches_of_epoch
from mrcn_fast.reid.kinds import Count, CountOrZero, Weight
from mrcn_fast.reid.messages import refused
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.settings import SettingError, checked, record
from mrcn_fast.reid.training.journal import LINE
from mrcn_fast.reid.training.optimizer import freeze, make_optimizer
from mrcn_fast.reid.training.random_state import python_state

if TYPE_CHECKING:
    from mrcn_fast.reid.training.checkpoint import Checkpoint

_ABOVE_ZERO = Annotated[FiniteFloat, Field(ge=sys.float_info.min)]
_SCALER = record(
    "scaler",
    {
        "scale": _ABOVE_ZERO,
        "growth_factor": _ABOVE_ZERO,
        "backoff_factor": _ABOVE_ZERO,
        "growth_interval": Count,
        "_growth_tracker": CountOrZero,
    },
)
# What an optimizer keeps for each parameter, and the values of a group; a later torch may add others.
_STATES = {
    "SGD": record("momentum", {"momentum_buffer": Any}),
    "AdamW": record("moments", {"step": Any, "exp_avg": Any, "exp_avg_sq": Any}),
}
_GROUPS = {
    "SGD": ("params", "scale", "lr", "weight_decay", "momentum", "nesterov"),
    "AdamW": ("params", "scale", "lr", "weight_decay", "betas", "eps"),
}
_CUDA_STATE = 16  # bytes: seed and offset
_DIGEST = re.compile("[0-9a-f]{64}")


def check_state(checkpoint: Checkpoint) -> None:
    """Check that the fields of a checkpoint fit each other. Raises SettingError, which names one."""
    _check_identity(checkpoint)
    check_place(checkpoint)
    # What a network of the caller's must have, only the caller knows: see `load_weights`.
    if "model" not in checkpoint.parts:
        _check_network(checkpoint)
    check_scaler(checkpoint)
    for process, state in enumerate(checkpoint.random):
        _check_random(state, f"random[{process}]")


def _check(holds: bool, place: str, value: object, expected: str) -> None:
    if not holds:
        raise SettingError(refused(place, value, expected))


def _check_identity(checkpoint: Checkpoint) -> None:
    config, data = checkpoint.config, checkpoint.data
    _check(data.name == config.dataset, "data.name", data.name, repr(config.dataset))
    _check(data.split == config.split, "data.split", data.split, str(config.split))
    _check(_DIGEST.fullmatch(data.fingerprint) is not None, "data.fingerprint", data.fingerprint, "a SHA-256")
    people = list(data.identities)
    _check(people != [] and people == sorted(set(people)), "data.identities", people, "ascending numbers")
    _check(min(data.images) > 0, "data.images", data.images, "at least one of each modality")
    began, digest = config.initial, checkpoint.weights
    if began is None:
        _check(digest is None, "weights", digest, "none, as in the configuration")
    else:
        _check(_DIGEST.fullmatch(digest or "") is not None, "weights", digest, f"the SHA-256 of {began}")


def check_place(checkpoint: Checkpoint) -> None:
    """Check that step, epoch and batch belong together."""
    config, step, epoch, batch = checkpoint.config, checkpoint.step, checkpoint.epoch, checkpoint.batch
    processes = len(checkpoint.random)
    _check(processes > 0, "random", checkpoint.random, "a state of each process")
    pairs = config.identities * config.images * config.accumulate * processes
    batches = config.batches or batches_of_epoch(max(checkpoint.data.images), pairs)
    _check(0 <= batch < batches, "batch", batch, f"0 to {batches - 1}, a batch of an epoch")
    _check(0 <= epoch <= config.epochs, "epoch", epoch, f"0 to {config.epochs}, an epoch of the run")
    # Where images were left out, an epoch may have fewer batches than their number says.
    least = epoch * (1 if config.skip_unreadable and config.batches is None else batches) + batch
    most = min(epoch * batches + batch, config.steps or sys.maxsize)
    expected = f"{least}" if least == most else f"{least} to {most}"
    _check(least <= step <= most, "step", step, f"{expected}, after {epoch} epochs and {batch} batches")
    if checkpoint.metrics:
        line = checked(LINE, checkpoint.metrics, "metrics")
        _check(0 < line["step"] <= step, "metrics.step", line["step"], f"1 to {step}")
        _check(0 <= line["epoch"] <= epoch, "metrics.epoch", line["epoch"], f"0 to {epoch}")


def _check_network(checkpoint: Checkpoint) -> None:
    """Check that the weights and the state of the library's own optimizer fit the configuration."""
    parts = sum(name.endswith("classifier.weight") for name in checkpoint.model)
    _check(
        checkpoint.config.parts == parts, "config.parts", checkpoint.config.parts, f"{parts}, as in the model"
    )
    try:
        # The meta device has names, shapes and types, but no memory.
        with torch.device("meta"):
            network = ReIDModel(len(checkpoint.data.identities), **checkpoint.config.model_arguments())
        freeze(network, checkpoint.config.freeze)
        # A class that the file names is imported where its run goes on, and not where it is scored.
        known = "optimizer" not in checkpoint.parts and not checkpoint.config.own_optimizer
        optimizer = make_optimizer(network, checkpoint.config) if known else None
    except ValueError as error:
        raise SettingError(f"config: {error}") from error
    check_weights(checkpoint.model, network.state_dict())
    if checkpoint.config.ema is None:
        _check(not checkpoint.raw, "raw", sorted(checkpoint.raw)[:4], "empty: only a run with ema has it")
    else:
        check_weights(checkpoint.raw, network.state_dict(), "raw")
    if optimizer is not None:
        _check_optimizer(checkpoint.optimizer, optimizer)


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str = "model") -> None:
    """Check the names, shapes, types and values of weights. Raises SettingError, which names the place."""
    for name, tensor in found.items():
        _check(name in expected, f"{place}.{name}", tensor, "no value of this name")
    for name, wanted in expected.items():
        if name not in found:
            raise SettingError(f"got no {place}.{name}, expected {_described(wanted)}")
        _check_tensor(found[name], wanted, f"{place}.{name}")
        if name.endswith(("running_var", "num_batches_tracked")) and bool((found[name] < 0).any()):
            raise SettingError(f"got {place}.{name} with values below 0, expected none")


def _check_tensor(found: object, expected: Tensor, place: str) -> None:
    wanted = (expected.dtype, expected.shape, torch.strided, "cpu")
    if not isinstance(found, Tensor) or (found.dtype, found.shape, found.layout, found.device.type) != wanted:
        raise SettingError(refused(place, found, _described(expected)))
    if not all_finite(found):
        raise SettingError(f"got {place} with values that are not finite, expected finite ones")


def _described(tensor: Tensor) -> str:
    return f"a dense tensor of {tensor.dtype} {tuple(tensor.shape)} on the CPU"


def _check_optimizer(found: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer).__name__
    expected, groups = optimizer.state_dict()["param_groups"], found["param_groups"]
    _check(len(groups) == len(expected), "optimizer.param_groups", groups, f"{len(expected)} of them")
    for number, (group, own) in enumerate(zip(groups, expected, strict=True)):
        check_group(group, own, f"optimizer.param_groups[{number}]", required=_GROUPS[kind])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, values in checked(dict[int, Any], found["state"], "optimizer.state").items():
        place = f"optimizer.state[{key}]"
        state = checked(_STATES[kind], values, place)
        _check(0 <= key < len(parameters), place, values, f"one of {len(parameters)} parameters")
        for name, tensor in state.items():
            if tensor is None and kind == "SGD":  # without momentum
                continue
            like = torch.empty(()) if name == "step" else parameters[key]
            _check_tensor(tensor, like, f"{place}.{name}")


def check_group(
    values: Mapping[str, Any], expected: Mapping[str, Any], place: str, *, required: Iterable[str] = ()
) -> None:
    """Check that all values but the learning rate, which the schedule changes, are the configuration's."""
    for name in (*values, *(name for name in required if name not in values)):
        there = values.get(name)
        if name == "lr":
            checked(Weight, there, f"{place}.lr")
            continue
        wanted = expected.get(name, "nothing")
        _check(type(there) is type(wanted) and there == wanted, f"{place}.{name}", there, f"{wanted!r}")


def check_scaler(checkpoint: Checkpoint) -> None:
    if checkpoint.config.precision == "16-mixed":
        checked(_SCALER, checkpoint.scaler, "scaler")
    else:
        _check(not checkpoint.scaler, "scaler", checkpoint.scaler, "nothing in it: only 16-mixed has one")


def _check_random(state: Mapping[str, Any], place: str) -> None:
    try:
        torch.Generator().set_state(state["torch"])
    except (RuntimeError, TypeError):
        _check(False, f"{place}.torch", state["torch"], "a state of torch's generator")
    for number, tensor in enumerate(state["cuda"]):
        _check_tensor(tensor, torch.empty(_CUDA_STATE, dtype=torch.uint8), f"{place}.cuda[{number}]")
    try:
        random.Random().setstate(python_state(state["python"]))
    except (TypeError, ValueError, OverflowError):
        _check(False, f"{place}.python", state["python"], "a state of Python's generator")


def all_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The extremes are NaN if any value is, and need no mask."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
