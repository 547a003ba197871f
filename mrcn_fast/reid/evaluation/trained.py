"""A trained network, alone or on a data set: a checkpoint is opened, and gives test features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from lightning_fabric import Fabric
from pydantic import SkipValidation
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import Dataset

from mrcn_fast.memory import enough_memory
from mrcn_fast.reid.data import open_dataset, recognize
from mrcn_fast.reid.data.types import Modality, PersonDataset, Sample
from mrcn_fast.reid.devices import open_fabric, serving_backend
from mrcn_fast.reid.evaluation.extraction import extract
from mrcn_fast.reid.kinds import AnyPath, BackendName, Count, PathText, Precision, Split, Workers
from mrcn_fast.reid.models.interface import ReIDNetwork
from mrcn_fast.reid.models.network import ReIDModel, use_layout
from mrcn_fast.reid.settings import SettingError, check_arguments, check_fields
from mrcn_fast.reid.training.checkpoint import CHECKPOINT_NAME, Checkpoint, CheckpointError, load_checkpoint
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.data_identity import data_identity
from mrcn_fast.reid.training.parts import check_model
from mrcn_fast.reid.training.restoring import build_model, check_data, load_weights


@dataclass(frozen=True)
class Network:
    """A checkpoint's network, ready to give features."""

    path: Path
    state: Checkpoint
    config: TrainConfig
    model: nn.Module
    fabric: Fabric
    precision: Precision  # of the network here; `config` has the training's
    backend: str  # that serves the network's blocks here; "" for a network without blocks

    @property
    def reid_model(self) -> ReIDModel:
        """The network as one of the library's. Raises TypeError for a network of the caller's."""
        if not isinstance(self.model, ReIDModel):
            raise TypeError(f"{self.path}: got {type(self.model).__name__}, expected a ReIDModel")
        return self.model

    def features(
        self,
        samples: Sequence[Sample],
        modality: Modality,
        *,
        batch_size: int = 64,
        workers: int = 0,
        images: Dataset[Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Extract the test features of images of one modality, in their order.

        `images` replaces the files of the samples, for example with a cache of them. `model.test_sets` names
        the chunks of equal length that a feature consists of.

        Returns:
            (len(samples), D), float32, on the CPU

        Raises:
            ValueError: for a sample of another modality
            DatasetError: for an image that can't be read
            MemoryShortageError: where an allocation fails
        """
        advance = None
        if progress is not None:
            task = progress.add_task(
                f"{modality} features of {self.path.parent.name}", total=len(samples), status=""
            )
            advance = partial(progress.advance, task)
        less = "Less is needed for a smaller --batch-size and for fewer --workers"
        with enough_memory(f"{modality} features in batches of {batch_size}", less):
            return extract(
                cast(ReIDNetwork, self.model),
                samples,
                modality,
                self.config,
                fabric=self.fabric,
                batch_size=batch_size,
                workers=workers,
                images=images,
                advance=advance,
            )


@dataclass(frozen=True)
class Trained(Network):
    """A checkpoint's network, ready to give features, and the data set that it is evaluated on."""

    dataset: PersonDataset


@check_arguments
def open_network(
    checkpoint: AnyPath,
    *,
    backend: BackendName | None = None,
    accelerator: str = "auto",
    precision: Precision | None = None,
    model: nn.Module | None = None,
    open_device: SkipValidation[Callable[[str, Precision], Fabric]] = open_fabric,
) -> Network:
    """Open a checkpoint (the file or its folder) for images of any origin.

    The network computes in `precision`, by default the training's. A run with a network of your own needs the
    same network as `model`, which then has the checkpoint's weights. `open_device` opens the accelerator in a
    precision; where it opens several, with a process on each, the processes share the work.

    Raises:
        CheckpointError: where the checkpoint can't be used; and for a `model` that it isn't of, or none where
            it needs one
        ConfigError, BackendError: for an accelerator, a precision or a backend that this machine doesn't have
    """
    path = Path(checkpoint)
    path = path / CHECKPOINT_NAME if path.is_dir() else path
    state = load_checkpoint(path)
    config = state.config
    precision = precision or config.precision or "32-true"
    fabric = open_device(accelerator, precision)
    serving = "" if model else serving_backend(config, backend, fabric, precision)
    model = build_model(path, state, backend) if model is None else _filled(path, state, model, backend)
    use_layout(model, config.channels_last)
    fabric.to_device(model)
    return Network(path, state, config, model, fabric, precision, serving)


@check_arguments
def open_trained(
    checkpoint: AnyPath,
    data: AnyPath,
    *,
    split: Split | None = None,
    other_data: bool = False,
    backend: BackendName | None = None,
    accelerator: str = "auto",
    precision: Precision | None = None,
    permutations: AnyPath | None = None,
    model: nn.Module | None = None,
) -> Trained:
    """Open a checkpoint (the file or its folder) for the data set under `data`.

    `split` is only checked, because a network is evaluated on the split that it was trained on. The network
    computes in `precision`, by default the training's. A run with a network of your own needs the same
    network as `model`, which then has the checkpoint's weights.

    Raises:
        CheckpointError: where the checkpoint can't be used, is of another split or, unless `other_data`, of
            another data set; and for a `model` that it isn't of, or none where it needs one
        ConfigError, BackendError: for an accelerator, a precision or a backend that this machine doesn't have

    Example:
        >>> config = TrainConfig(data="data/regdb", dataset="regdb", out="runs/opened", depth=18,
        ...     height=64, width=32, identities=2, images=2, steps=1, workers=0)
        >>> trained = open_trained(Trainer(config).fit(), "data/regdb")
        >>> trained.features(trained.dataset.searches()[0].query, "visible").shape[1]
        1024
    """
    network = open_network(
        checkpoint, backend=backend, accelerator=accelerator, precision=precision, model=model
    )
    return on_dataset(network, data, split=split, other_data=other_data, permutations=permutations)


def on_dataset(
    network: Network,
    data: AnyPath,
    *,
    split: int | None = None,
    other_data: bool = False,
    permutations: AnyPath | None = None,
) -> Trained:
    """Join an opened network and the data set under `data`, as `open_trained` does."""
    path, state, config = network.path, network.state, network.config
    if split is not None and split != state.data.split:
        raise CheckpointError(
            f"{path}: expected a checkpoint of split {split}, found one of split {state.data.split}: its "
            f"training images are test images of other splits. Give the checkpoint trained on split {split}"
        )
    found = recognize(data)
    if found != config.dataset and not other_data:
        raise CheckpointError(
            f"{path}: this checkpoint belongs to another data set: expected a tree of {config.dataset}, "
            f"found one of {found} at {data}. Give the tree it was trained on, or ask for --other-data"
        )
    dataset = open_dataset(
        found,
        data,
        split=state.data.split if found == "regdb" else 1,
        permutations=permutations,
        hold_out_val=config.validate_on == "val" and found == config.dataset,
    )
    if not other_data:
        check_data(path, state, data_identity(dataset, dataset.training()))
    return Trained(**vars(network), dataset=dataset)


def _filled(path: Path, state: Checkpoint, model: nn.Module, backend: str | None) -> nn.Module:
    """Give the caller's network the weights of its checkpoint."""
    check_model(model, state.config)
    if backend is not None:
        raise ConfigError(f"got backend={backend!r} with a network of your own: set it in the network")
    if "model" not in state.parts:
        raise CheckpointError(f"{path}: this run trained the library's own network: give no model")
    load_weights(path, model, state.model)
    return model


@dataclass(kw_only=True)
class NetworkOptions:
    """How a trained network gives test features of images. Raises SettingError for a value that is unfit."""

    skip_unreadable: bool = False
    """Leave out images that can't be read, named and counted, instead of stopping at the first."""
    backend: BackendName | None = None
    """Backend of the block; none: the best that serves."""
    accelerator: str = "auto"
    """Where to compute, as lightning-fabric names it."""
    precision: Precision | None = None
    """What to compute in, as lightning-fabric names it; none: as the checkpoint was trained."""
    batch_size: Count = 64
    """Images per forward pass."""
    workers: Workers = 0
    """Processes that decode images; 0: this one."""

    def __post_init__(self) -> None:
        check_fields(self, SettingError)

    def features(
        self,
        network: Network,
        samples: Sequence[Sample],
        modality: Modality,
        progress: Progress,
        images: Dataset[Tensor] | None = None,
    ) -> Tensor:
        """`network.features` with these options."""
        return network.features(
            samples,
            modality,
            batch_size=self.batch_size,
            workers=self.workers,
            images=images,
            progress=progress,
        )


@dataclass(kw_only=True)
class EvaluationOptions(NetworkOptions):
    """How a network is opened on a data set and gives test features, for scoring and for figures alike.

    Raises SettingError for a value that a field doesn't take.
    """

    permutations: PathText | None = None
    """Path of SYSU-MM01's official gallery draw, rand_perm_cam.mat; none: it lies in the tree."""
    split: Split | None = None
    """Refuse a checkpoint of another split than this; none: any split."""
    other_data: bool = False
    """Take a tree other than the training data's, which is refused otherwise."""

    def open(self, checkpoint: AnyPath, data: AnyPath, model: nn.Module | None = None) -> Trained:
        """`open_trained` with these options."""
        return on_dataset(
            self.network(checkpoint, model),
            data,
            split=self.split,
            other_data=self.other_data,
            permutations=self.permutations,
        )

    def open_device(self, accelerator: str, precision: Precision) -> Fabric:
        """Open the device, or several with a process on each."""
        return open_fabric(accelerator, precision)

    def network(self, checkpoint: AnyPath, model: nn.Module | None) -> Network:
        """`open_network` with these options."""
        return open_network(
            checkpoint,
            backend=self.backend,
            accelerator=self.accelerator,
            precision=self.precision,
            model=model,
            open_device=self.open_device,
        )
