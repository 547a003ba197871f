"""Checkpoints: the whole state of a run in one file, which is written atomically and checked when it is read.

`Trainer.save` writes checkpoint.pth, which resuming and scoring read. It is a dictionary that torch.save
wrote, with `format`, the fields of `Checkpoint`, and `digest`, the SHA-256 of each field. On processors with
instructions for it, SHA-256 is the fastest of hashlib's digests: it takes 0.2 s for the 200 MB of a ResNet-50
and its momentum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import torch
from lightning_fabric.utilities import move_data_to_device
from pydantic import InstanceOf, WithJsonSchema
from torch import Tensor

from mrcn_fast.files import write_atomically
from mrcn_fast.reid.messages import shown
from mrcn_fast.reid.settings import SettingError, checked, record
from mrcn_fast.reid.stored import StoredError, read_torch
from mrcn_fast.reid.training.checkpoint_checks import check_state
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.data_identity import DataIdentity

FORMAT = 7
CHECKPOINT_NAME = "checkpoint.pth"
# The checkpoint with the best validation.
BEST_NAME = "best.pth"
# The results of scoring, which are written beside the checkpoint.
RESULT_NAMES = "test-*.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, unreadable, or of another architecture or data set."""


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
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT}, found {shown(found)}; read it with the version of "
            "mrcn_fast that wrote it, or train again"
        )
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
# The types of a checkpoint's fields. `check_state` checks everything else.
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


def _conforming(content: Mapping[str, Any]) -> Checkpoint:
    """Make a checkpoint from a file's dictionary. Raises SettingError for the first value that is unfit."""
    values = checked(_STORED, content, "")
    values["config"] = _config(values["config"])
    values["data"] = DataIdentity(**values["data"])
    checkpoint = Checkpoint(**{name: values[name] for name in Checkpoint._fields})
    check_state(checkpoint)
    return checkpoint


def _config(values: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.from_dict(values)
    except ConfigError as error:
        raise SettingError(f"config: {error}") from error
