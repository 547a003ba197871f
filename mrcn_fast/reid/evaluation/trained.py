"""A trained network on a data set: a checkpoint is opened, and gives test features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from mrcn_fast.memory import enough_memory
from mrcn_fast.reid.data import open_dataset, recognize
from mrcn_fast.reid.data.types import Modality, PersonDataset, Sample
from mrcn_fast.reid.devices import open_fabric, serving_backend
from mrcn_fast.reid.evaluation.extraction import extract
from mrcn_fast.reid.kinds import AnyPath, BackendName, Precision, Split
from mrcn_fast.reid.models.network import ReIDModel, use_layout
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.checkpoint import (
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointError,
    build_model,
    check_data,
    data_identity,
    load_checkpoint,
)
from mrcn_fast.reid.training.config import TrainConfig


class Trained(NamedTuple):
    """A checkpoint's network, ready to give features, and the data set it is looked at on."""

    path: Path
    state: Checkpoint
    config: TrainConfig
    dataset: PersonDataset
    model: ReIDModel
    fabric: Fabric
    precision: Precision  # what the network computes in here; `config` has the training's
    backend: str  # what serves its blocks here, "" without blocks

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
        """Test features of images of one modality, in their order: (n, `model.feature_size`), float32, CPU.

        `model.test_sets` names the equal chunks of a feature. `images` stands in for the files, such as a
        cache of them. Raises ValueError for a sample of another modality, DatasetError for an image that
        can't be read, MemoryShortageError where an allocation fails.
        """
        advance = None
        if progress is not None:
            task = progress.add_task(f"{modality} features", total=len(samples), status="")
            advance = partial(progress.advance, task)
        less = "Less is needed for a smaller --batch_size and for fewer --workers"
        with enough_memory(f"{modality} features in batches of {batch_size}", less):
            return extract(
                self.model,
                samples,
                modality,
                self.config,
                fabric=self.fabric,
                batch_size=batch_size,
                workers=workers,
                images=images,
                advance=advance,
            )


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
) -> Trained:
    """The network of a checkpoint (the file, or the folder it is in) beside the data set under `data`.

    `split` is only checked: a model is looked at on the split it was trained on. The network computes in
    `precision`, by default the one it was trained in. Raises CheckpointError where the checkpoint can't be
    used, is of another split or, unless `other_data`, of another data set; ConfigError and BackendError for
    an accelerator, a precision or a backend that is not to be had here.
    """
    path = Path(checkpoint)
    path = path / CHECKPOINT_NAME if path.is_dir() else path
    state = load_checkpoint(path)
    config = state.config
    precision = precision or config.precision
    fabric = open_fabric(accelerator, precision)
    serving = serving_backend(config, backend, fabric, precision)
    if split is not None and split != state.data.split:
        raise CheckpointError(
            f"{path}: expected a checkpoint of split {split}, found one of split {state.data.split}: its "
            f"training images are test images of other splits. Give the checkpoint trained on split {split}"
        )
    found = recognize(data)
    if found != config.dataset and not other_data:
        raise CheckpointError(
            f"{path}: this checkpoint belongs to another data set: expected a tree of {config.dataset}, "
            f"found one of {found} at {data}. Give the tree it was trained on, or ask for --other_data"
        )
    dataset = open_dataset(
        found, data, split=state.data.split if found == "regdb" else 1, permutations=permutations
    )
    if not other_data:
        check_data(path, state, data_identity(dataset, dataset.training()))
    model = build_model(path, state, backend)
    use_layout(model, config.channels_last)
    fabric.to_device(model)
    return Trained(path, state, config, dataset, model, fabric, precision, serving)
