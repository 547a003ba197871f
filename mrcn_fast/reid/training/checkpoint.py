"""Checkpoints: the whole state of a run in one file, which is written atomically and checked when it is read.

`Trainer.save` writes checkpoint.pth, which resuming and scoring read. It is a dictionary that torch.save
wrote, with `format`, the fields of `Checkpoint`, and `digest`, the SHA-256 of each field. On processors with
instructions for it, SHA-256 is the fastest of hashlib's digests: it takes 0.2 s for the 200 MB of a ResNet-50
and its momentum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import torch
from lightning_fabric.utilities import move_data_to_device
from pydantic import Field, FiniteFloat, InstanceOf, WithJsonSchema
from torch import Tensor, nn

from mrcn_fast.files import write_atomically
from mrcn_fast.reid.data.sampler import batches_of_epoch
from mrcn_fast.reid.data.types import PersonDataset, Sample, TrainingSet
from mrcn_fast.reid.kinds import Count, CountOrZero, Weight
from mrcn_fast.reid.messages import refused, shown
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.settings import SettingError, checked, record
from mrcn_fast.reid.stored import StoredError, read_torch
from mrcn_fast.reid.training.config import FREE_ON_RESUME, ConfigError, TrainConfig
from mrcn_fast.reid.training.journal import LINE
from mrcn_fast.reid.training.optimizer import freeze, make_optimizer

FORMAT = 7
CHECKPOINT_NAME = "checkpoint.pth"
# The checkpoint with the best validation.
BEST_NAME = "best.pth"
# The results of scoring, which are written beside the checkpoint.
RESULT_NAMES = "test-*.json"
# The least number of images whose contents go into the fingerprint of a data set (if it has so many).
_READ = 16


class CheckpointError(ValueError):
    """A checkpoint is missing, unreadable, or of another architecture or data set."""


class DataIdentity(NamedTuple):
    """The data set that a network was trained on; it prevents scoring on another one by mistake."""

    name: str
    split: int
    fingerprint: str  # of the training files, see `fingerprint`
    identities: tuple[int, ...]  # sorted; class i of the classifier is identities[i]
    images: tuple[int, int]  # visible, infrared

    def __str__(self) -> str:
        return (
            f"{self.name}, split {self.split}, {len(self.identities)} identities, {self.images[0]} visible "
            f"and {self.images[1]} infrared training images, fingerprint {self.fingerprint[:12]}"
        )


def data_identity(dataset: PersonDataset, training: TrainingSet) -> DataIdentity:
    """Make the identity of a training set."""
    counts = (len(training.visible), len(training.infrared))
    digest = fingerprint(dataset.root, (*training.visible, *training.infrared))
    return DataIdentity(dataset.name, dataset.split, digest, tuple(training.identities), counts)


def fingerprint(root: Path, samples: Iterable[Sample]) -> str:
    """Compute the SHA-256 of the images' paths below the root, their file sizes and identities, in order.

    To read all contents would take minutes on the real data, and so the sizes stand for them. Because all
    bitmaps of a data set have one size, the contents of 16 to 31 images, spread evenly, count too.
    """
    samples = tuple(samples)
    digest = hashlib.sha256()
    for sample in samples:
        place = Path(sample.path).relative_to(root).as_posix()
        # File names are bytes that need not be UTF-8.
        line = f"{place}\t{_size(sample.path)}\t{sample.identity}\n"
        digest.update(line.encode(errors="surrogateescape"))
    for sample in samples[:: max(1, len(samples) // _READ)]:
        # Code that needs an unreadable image refuses it or leaves it out.
        with contextlib.suppress(OSError):
            digest.update(Path(sample.path).read_bytes())
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        # A broken or circular link counts as an unreadable image.
        return None


def weights_fingerprint(path: str | Path | None) -> str | None:
    """SHA-256 of a file of initial weights; None for random weights. Raises OSError."""
    return None if path is None else hashlib.sha256(checkpoint_file(path).read_bytes()).hexdigest()


def checkpoint_file(path: str | Path) -> Path:
    """The path of a file, or of the checkpoint in a folder."""
    path = Path(path)
    return path / CHECKPOINT_NAME if path.is_dir() else path


class Checkpoint(NamedTuple):
    """The whole state of a run after `step` steps; `epoch` and `batch` are those of the next batch.

    `model` is what is scored. In a run with `ema` it is the moving average, and `raw` has the weights that
    the run trains; in others `raw` is empty.
    """

    config: TrainConfig
    data: DataIdentity
    weights: str | None  # `weights_fingerprint` of the initial weights
    model: dict[str, Any]
    raw: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]  # state of the precision plugin: of the gradient scaler in 16-mixed
    random: list[dict[str, Any]]  # `random_state` of each process of the run
    step: int
    epoch: int
    batch: int
    metrics: dict[str, float]
    parts: dict[str, str]  # names of the caller's own "model", "loss" and "optimizer", where they were given


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of a process's random generators: torch's on the CPU and on its device, and Python's."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore a `random_state`; the state of CUDA only where both devices are of CUDA."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
    random.setstate(_python_state(state["python"]))


def _python_state(state: Sequence[Any]) -> tuple[Any, ...]:
    """Convert a stored state for `random.setstate`. Raises ValueError or TypeError for anything else."""
    version, internal, gauss = state
    return version, tuple(internal), None if gauss is None else float(gauss)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically. Raises OSError, and keeps the earlier file, on failure."""
    fields = checkpoint._asdict() | {
        "config": checkpoint.config.as_dict(),
        "data": checkpoint.data._asdict(),
    }
    fields = move_data_to_device(fields, torch.device("cpu"))
    content = {"format": FORMAT, "digest": _digests(fields), **fields}
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the checkpoint in a folder, onto the CPU; nothing in the file is executed.

    The types and ranges of all fields are checked, whether the fields fit each other, and whether the content
    is bit by bit what was written. Raises CheckpointError with the path, the field, the expected and the
    found.

    Example:
        >>> config = TrainConfig(data="data/regdb", dataset="regdb", out="runs/loaded", depth=18,
        ...     height=64, width=32, identities=2, images=2, steps=1, workers=0)
        >>> load_checkpoint(Trainer(config).fit()).step
        1
    """
    path = checkpoint_file(path)
    if not path.is_file():
        below = sorted(str(found.parent) for found in path.parent.glob(f"*/{CHECKPOINT_NAME}"))
        there = f"; found some in {', '.join(below[:5])}" if below else ""
        raise CheckpointError(
            f"{path}: no such file{there}; expected a checkpoint that `mrcn-fast train` wrote"
        )
    content = _read(path)
    try:
        checkpoint = _conforming(content)
    except SettingError as error:
        raise CheckpointError(f"{path}: this checkpoint was damaged or edited: {error}") from error
    found = _digests(content)
    if changed := [name for name, digest in found.items() if content["digest"][name] != digest]:
        raise CheckpointError(
            f"{path}: this checkpoint was damaged or edited: {', '.join(changed)}: expected what was "
            "written (by its SHA-256), found something else. Copy the file again, or take another checkpoint"
        )
    return checkpoint


def _read(path: Path) -> Mapping[str, Any]:
    """Read the dictionary in the file. Raises CheckpointError for another content or format."""
    try:
        content = read_torch(path)
    except StoredError as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint that `mrcn-fast train` wrote, found a file that can't be read as "
            f"one: {error}"
        ) from None
    if not isinstance(content, Mapping) or "format" not in content:
        found = (
            f"the keys {', '.join(sorted(map(str, content))[:8])}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise CheckpointError(f"{path}: expected a checkpoint that `mrcn-fast train` wrote, found {found}")
    found = content["format"]
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, found {shown(found)}")
    return content


def _digests(fields: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of each field of a checkpoint, as hexadecimal digits."""
    return {name: content_digest(fields[name]) for name in Checkpoint._fields}


def content_digest(value: object) -> str:
    """SHA-256 of plain values and tensors on the CPU: their types, shapes, order and bytes."""
    tensors: list[Tensor] = []
    digest = hashlib.sha256(repr(_without_tensors(value, tensors)).encode())
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_tensors(value: object, tensors: list[Tensor]) -> object:
    """Replace containers by lists and tensors by their types, and add the tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return [str(value.dtype), *value.shape]
    if isinstance(value, Mapping):
        return [(name, _without_tensors(item, tensors)) for name, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, tensors) for item in value]
    return value


_AnyTensor = Annotated[InstanceOf[Tensor], WithJsonSchema({"format": "tensor"})]

_RANDOM = record("random", {"torch": _AnyTensor, "cuda": list[_AnyTensor], "python": Any})
# The types of a checkpoint's fields. The functions below check everything else.
_STORED = record(
    "checkpoint",
    {
        "format": int,
        "digest": record("digest", dict.fromkeys(Checkpoint._fields, str)),
        "config": dict[str, Any],
        "data": record("data", get_type_hints(DataIdentity)),
        "weights": str | None,
        "model": dict[str, _AnyTensor],
        "raw": dict[str, _AnyTensor],
        "optimizer": record("optimizer", {"state": Any, "param_groups": list[dict[str, Any]]}),
        "scaler": dict[str, Any],
        "random": list[_RANDOM],  # type: ignore[valid-type]
        "step": int,
        "epoch": int,
        "batch": int,
        "metrics": dict[str, Any],
        "parts": dict[Literal["model", "loss", "optimizer"], str],
    },
)
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


def _conforming(content: Mapping[str, Any]) -> Checkpoint:
    """Make a checkpoint from a file's dictionary. Raises SettingError for the first value that is unfit."""
    values = checked(_STORED, content, "")
    values["config"] = _config(values["config"])
    values["data"] = DataIdentity(**values["data"])
    checkpoint = Checkpoint(**{name: values[name] for name in Checkpoint._fields})
    _check_identity(checkpoint)
    _check_place(checkpoint)
    # What a network of the caller's must have, only the caller knows: see `load_weights`.
    if "model" not in checkpoint.parts:
        _check_network(checkpoint)
    _check_scaler(checkpoint)
    for process, state in enumerate(checkpoint.random):
        _check_random(state, f"random[{process}]")
    return checkpoint


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
    _check_weights(checkpoint.model, network.state_dict())
    if checkpoint.config.ema is None:
        _check(not checkpoint.raw, "raw", sorted(checkpoint.raw)[:4], "empty: only a run with ema has it")
    else:
        _check_weights(checkpoint.raw, network.state_dict(), "raw")
    if optimizer is not None:
        _check_optimizer(checkpoint.optimizer, optimizer)


def _check(holds: bool, place: str, value: object, expected: str) -> None:
    if not holds:
        raise SettingError(refused(place, value, expected))


def _config(values: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.from_dict(values)
    except ConfigError as error:
        raise SettingError(f"config: {error}") from error


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


def _check_place(checkpoint: Checkpoint) -> None:
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


def _check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str = "model") -> None:
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
        _check_group(group, own, f"optimizer.param_groups[{number}]", required=_GROUPS[kind])
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


def _check_group(
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


def _check_scaler(checkpoint: Checkpoint) -> None:
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
        random.Random().setstate(_python_state(state["python"]))
    except (TypeError, ValueError, OverflowError):
        _check(False, f"{place}.python", state["python"], "a state of Python's generator")


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
    weights = weights_fingerprint(given.initial)
    if checkpoint.weights != weights:
        expected = _weights_in_words(checkpoint.config.initial, checkpoint.weights)
        found = _weights_in_words(given.initial, weights)
        differing.append(f"weights: expected {expected} (checkpoint), found {found} (given)")
    if differing:
        raise CheckpointError(
            f"{path}: can't go on with this run under other values than it began with:\n  "
            + "\n  ".join(differing)
        )


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


def all_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The extremes are NaN if any value is, and need no mask."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def load_weights(path: str | Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the weights of a checkpoint. Raises CheckpointError for a network of another architecture."""
    try:
        _check_weights(state, model.state_dict())
    except SettingError as error:
        raise CheckpointError(f"{path}: this checkpoint is of another architecture: {error}") from error
    model.load_state_dict(state)


def load_optimizer(path: str | Path, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the optimizer's state. Raises CheckpointError where it is of other parameters or settings."""
    own = optimizer.state_dict()["param_groups"]
    try:
        for number, (group, expected) in enumerate(zip(state["param_groups"], own, strict=False)):
            _check_group(group, expected, f"optimizer.param_groups[{number}]")
        optimizer.load_state_dict(dict(state))
    except ValueError as error:
        raise CheckpointError(f"{path}: the optimiser's state doesn't fit the network.\n{error}") from error


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
