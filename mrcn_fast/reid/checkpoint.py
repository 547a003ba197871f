"""Checkpoints: all of a run's state in one file, written whole or not at all, refused where unfit."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import nn

from mrcn_fast.reid.config import FREE_ON_RESUME, ConfigError, TrainConfig
from mrcn_fast.reid.data.samples import PersonDataset, Sample, TrainingSet
from mrcn_fast.reid.model import ReIDModel
from mrcn_fast.reid.stored import StoredError, read_torch

FORMAT = 3
CHECKPOINT_NAME = "checkpoint.pth"
# The results of scoring, beside it.
RESULT_NAMES = "test-*.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable, or of another architecture or data set."""


class DataIdentity(NamedTuple):
    """Which data set a model was trained on, so that it isn't scored on another by mistake."""

    name: str
    split: int
    fingerprint: str  # of the training files' names, sizes and identities
    identities: tuple[int, ...]  # sorted; class i of the classifier is identities[i]
    images: tuple[int, int]  # visible, infrared

    def __str__(self) -> str:
        return (
            f"{self.name}, split {self.split}, {len(self.identities)} identities, {self.images[0]} visible "
            f"and {self.images[1]} infrared training images, fingerprint {self.fingerprint[:12]}"
        )


def data_identity(dataset: PersonDataset, training: TrainingSet) -> DataIdentity:
    """The identity of a training set."""
    counts = (len(training.visible), len(training.infrared))
    digest = fingerprint(dataset.root, (*training.visible, *training.infrared))
    return DataIdentity(dataset.name, dataset.split, digest, tuple(training.identities), counts)


def fingerprint(root: Path, samples: Iterable[Sample]) -> str:
    """SHA-256 over each image's place below the data set's root, size and person, in their order.

    Sizes stand for the contents: reading every image would take minutes on the real data.
    """
    digest = hashlib.sha256()
    for sample in samples:
        place = Path(sample.path).relative_to(root).as_posix()
        digest.update(f"{place}\t{_size(sample.path)}\t{sample.identity}\n".encode())
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        # A link to nowhere is an unreadable image: whoever reads it refuses it or leaves it out.
        return None


def weights_fingerprint(path: str | Path | None) -> str | None:
    """SHA-256 of a file of initial weights; none for random ones. Raises OSError where it can't be read."""
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Checkpoint(NamedTuple):
    """All of a run's state after `step` steps; `epoch` and `batch` name the batch that comes next."""

    config: TrainConfig
    data: DataIdentity
    weights: str | None  # `weights_fingerprint` of what the run began from
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]  # of the precision plugin: the gradient scaler's state in 16-mixed
    random: dict[str, Any]
    step: int
    epoch: int
    batch: int
    metrics: dict[str, float]


def random_state() -> dict[str, Any]:
    """State of the generators that training draws from: torch's, on every device, and Python's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` read; CUDA's only where there are as many devices as then."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: at any time `path` is whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """Write JSON for people and programs, atomically."""
    text = json.dumps(content, indent=2, sort_keys=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically. Raises OSError when the disk doesn't take it; the one before stays."""
    content = checkpoint._asdict() | {
        "format": FORMAT,
        "config": checkpoint.config.as_dict(),
        "data": checkpoint.data._asdict(),
    }
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    A folder stands for the checkpoint in it. Raises CheckpointError naming the path, what was expected, what
    found.
    """
    path = Path(path)
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint that `mrcn-fast train` wrote")
    try:
        content = read_torch(path)
    except StoredError as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint that `mrcn-fast train` wrote, found a file that can't be read as "
            f"one: {error}"
        ) from None
    expected = {"format", *Checkpoint._fields}
    if not isinstance(content, Mapping) or not expected <= set(content):
        found = (
            f"the keys {', '.join(sorted(map(str, content))[:8])}"
            if isinstance(content, Mapping)
            else type(content)
        )
        raise CheckpointError(f"{path}: expected a checkpoint that `mrcn-fast train` wrote, found {found}")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, found {content['format']}")
    try:
        config = TrainConfig.from_dict(content["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: expected the configuration of this version of mrcn_fast, found {error}"
        ) from error
    data = DataIdentity(**content["data"])
    values = {key: content[key] for key in Checkpoint._fields}
    return Checkpoint(**(values | {"config": config, "data": data}))


def check_data(path: str | Path, checkpoint: Checkpoint, given: DataIdentity) -> None:
    """Refuse a tree other than the one trained on. Raises CheckpointError with both."""
    if checkpoint.data != given:
        raise CheckpointError(
            f"{path}: this checkpoint belongs to another data set.\n"
            f"  expected (trained on): {checkpoint.data}\n"
            f"  found (given):         {given}\n"
            "Give the tree it was trained on."
        )


def check_config(path: str | Path, checkpoint: Checkpoint, given: TrainConfig) -> None:
    """Refuse to go on with a run under other values than it began with.

    The initial weights are the same wherever their file lies. Raises CheckpointError naming the values, and
    OSError where the weights can't be read.
    """
    began, now = checkpoint.config.as_dict(), given.as_dict()
    differing = [
        f"{name}: expected {began[name]!r} (checkpoint), found {now[name]!r} (given)"
        for name in began
        if name not in FREE_ON_RESUME and began[name] != now[name]
    ]
    weights = weights_fingerprint(given.weights)
    if checkpoint.weights != weights:
        expected = _told_weights(checkpoint.config.weights, checkpoint.weights)
        found = _told_weights(given.weights, weights)
        differing.append(f"weights: expected {expected} (checkpoint), found {found} (given)")
    if differing:
        raise CheckpointError(
            f"{path}: can't go on with this run under other values than it began with:\n  "
            + "\n  ".join(differing)
        )


def _told_weights(path: str | None, digest: str | None) -> str:
    return "random ones" if digest is None else f"{path!r} with fingerprint {digest[:12]}"


def load_weights(path: str | Path, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load all of a checkpoint's weights. Raises CheckpointError for a network of another architecture."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: this checkpoint is of another architecture.\n{error}") from error


def load_optimizer(path: str | Path, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a checkpoint's optimiser state. Raises CheckpointError when it is of other parameters."""
    try:
        optimizer.load_state_dict(dict(state))
    except ValueError as error:
        raise CheckpointError(f"{path}: the optimiser's state doesn't fit the network.\n{error}") from error


def build_model(path: str | Path, checkpoint: Checkpoint, backend: str | None = None) -> ReIDModel:
    """The trained network of a checkpoint, from nothing but its own configuration.

    `backend` replaces the block's: that isn't part of the architecture.
    """
    arguments = checkpoint.config.model_arguments() | {"backend": backend}
    model = ReIDModel(len(checkpoint.data.identities), **arguments)
    load_weights(path, model, checkpoint.model)
    return model
