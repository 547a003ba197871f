"""The configuration of a training run: flags, YAML files, checkpoints and results all have these values.

Each field says where its default comes from: "paper" (its Implementation Details and ablations), "field" (the
paper is silent, and the code of other authors agrees), or "ours" (a choice of this library).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Final, Literal

from pydantic import Field, FiniteFloat

from mrcn_fast.reid.kinds import (
    INCREASING,
    NUMPY,
    OPTIMIZERS,
    BackendName,
    Count,
    CountOrZero,
    Height,
    OptimizerText,
    PathOrEmpty,
    PathText,
    Precision,
    Seed,
    Several,
    Share,
    Split,
    Weight,
    Width,
    Workers,
)
from mrcn_fast.reid.models.network import ModelOptions
from mrcn_fast.reid.settings import SettingError, check_fields, checked, kinds_of, record
from mrcn_fast.reid.training.losses import LossOptions

# The most bytes that the images of one modality may have in a batch; more must be a typing error.
_LARGEST_BATCH: Final = 2**32

# Four decode as fast as a GPU trains; more than there are cores only hinder each other.
_CORES: Final = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
DEFAULT_WORKERS: Final = min(4, _CORES)


class ConfigError(ValueError):
    """A configuration doesn't describe a run that can be trained."""


@dataclass
class DataOptions:
    """The files of a run."""

    data: PathOrEmpty
    """Root of the data set's tree, as its owners ship it."""
    out: PathText = "runs/train"
    """Folder for checkpoint, metrics and results."""
    dataset: Literal["sysu-mm01", "regdb", "llcm"] = "sysu-mm01"
    """Data set whose tree `data` is."""
    split: Split = 1
    """RegDB's split, 1 to 10; the other data sets have one."""
    filter: Literal["bilinear", "bicubic", "lanczos"] = "lanczos"
    """Pillow's filter that resizes images (field: lanczos, which Pillow long called ANTIALIAS)."""
    cache: PathText | None = None
    """Folder for a memory-mapped cache of the resized images; none: images are decoded each time."""
    skip_unreadable: bool = False
    """Leave out images that can't be read, named and counted, instead of stopping at one."""
    weights: PathText | None = None
    """ImageNet weights of the ResNet in torchvision's format, .pth or .safetensors (field: pretrained)."""
    init: PathText | None = None
    """Checkpoint or state_dict of a trained network that this one begins with; classifiers may differ."""


@dataclass(kw_only=True)
class BatchOptions:
    """The images of a training batch and their augmentation."""

    height: Height = 288
    """Image height in pixels (paper)."""
    width: Width = 128
    """Image width in pixels (paper)."""
    identities: Annotated[int, Field(ge=2, le=10**9), NUMPY] = 4
    """P, identities in a batch (paper); a triplet needs two."""
    images: Count = 4
    """K, images of an identity and modality in a batch (paper)."""
    batches: Count | None = None
    """Steps in an epoch; none: floor(N / pairs) + 1, N the larger modality's image count (field)."""
    accumulate: Annotated[int, Field(ge=1, le=10_000), NUMPY] = 1
    """Batches of each process in a step, whose losses are averaged (field: 1)."""
    padding: CountOrZero = 10
    """Pixels of padding before the random crop (field)."""
    flip: Share = 0.5
    """Probability of the horizontal flip (paper: flip; field: .5)."""
    erase: Share = 0.5
    """Probability of random erasing (paper: erasing; field: .5)."""
    channel_augmentation: Share = 0.0
    """Probability that a visible image becomes one of its channels or its grey (CAJ's; paper: none)."""


@dataclass(kw_only=True)
class TrainConfig(LossOptions, BatchOptions, ModelOptions, DataOptions):
    """The values of a training run: data, network, batches, loss, and here the schedule and the machine.

    Raises ConfigError for values that are unfit or don't fit each other.

    Example:
        >>> TrainConfig(data="data/regdb", dataset="regdb", stages=(1,)).cqc_weight
        1.2
    """

    epochs: Count = 80
    """Epochs (paper)."""
    steps: Count | None = None
    """Stop after this many steps in all, whatever `epochs` says; none: no limit."""
    lr: Weight = 0.1
    """Learning rate of BNNeck and classifier after the warm-up (paper)."""
    warmup_lr: Weight = 0.01
    """Learning rate of the first epoch (paper)."""
    warmup_epochs: CountOrZero = 10
    """Epochs of linear warm-up from warmup_lr to lr (paper)."""
    milestones: Annotated[Several[CountOrZero], INCREASING] = (20, 60)
    """Epochs from which the learning rate is `decay` times what it was (paper: .01 from 20, .001 from 60)."""
    decay: Weight = 0.1
    """Factor of the learning rate at a milestone (paper)."""
    trunk_lr: Weight = 0.1
    """Learning rate of everything but BNNeck and classifier, as a share of theirs (field)."""
    optimizer: OptimizerText = "sgd"
    """sgd (paper), adamw, or a class with its arguments: "torch.optim.RAdam eps=1e-6". All but SGD want other
    rates: --lr, --warmup-lr, --trunk-lr and --weight-decay."""
    momentum: Share = 0.9
    """SGD momentum (paper), Nesterov's (field); AdamW has none."""
    weight_decay: Weight = 5e-4
    """Weight decay (field)."""
    selective_decay: bool = False
    """Leave vectors and what `no_weight_decay()` of the blocks names out of weight decay (field: no)."""
    clip_norm: Annotated[FiniteFloat, Field(ge=1e-6), NUMPY] | None = None
    """Greatest norm of the gradient of all parameters, which is scaled down to it; none: any (field)."""
    ema: Annotated[FiniteFloat, Field(ge=0, lt=1), NUMPY] | None = None
    """Decay of an exponential moving average of the weights, which is then scored; none: no average."""
    freeze: Several[Literal["stem", "layer1", "layer2", "layer3", "layer4"]] = ()
    """Layers of the ResNet that stay as they are, with the statistics of their BatchNorms (field: none)."""

    seed: Seed = 0
    """Seed of the initial weights, the sampler and the augmentation."""
    backend: BackendName | None = None
    """Backend of block and CQC loss: reference, cpu, ...; none: the best that serves."""
    accelerator: str = "auto"
    """Where to train, as lightning-fabric names it: auto, cpu, cuda, ..."""
    devices: Count | None = None
    """Devices of each machine, with a process on each; none: as torchrun or srun started, else one."""
    nodes: Count | None = None
    """Machines that train together; none: as torchrun or srun started, else one."""
    gather: bool = False
    """Compute the losses over the features of all processes; false: each process over its own."""
    sync_batchnorm: bool = True
    """On several GPUs, take BatchNorm's statistics over the images of all; false: each over its own."""
    speed: Literal["auto", "plain"] = "auto"
    """auto: what measured fastest on the device; plain: float32, NCHW, eager, bitwise reproducible."""
    precision: Precision | None = None
    """Precision, as lightning-fabric names it; none: as `speed` chooses."""
    channels_last: bool | None = None
    """Keep activations in the channels_last memory layout; none: as `speed` chooses."""
    compile: bool = False
    """Compile the trunk with torch.compile, for which the first step takes minutes."""
    workers: Workers = DEFAULT_WORKERS
    """Processes that decode images, by default 4 or as many as there are cores; 0: the training's own."""
    log_every: Count = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Count = 500
    """Steps between two checkpoints, besides one at the end of each epoch."""
    logger: Literal["none", "csv", "tensorboard"] = "none"
    """What gets the metrics besides metrics.jsonl: csv/metrics.csv or TensorBoard's files, in `out`."""
    validate_every: Count | None = None
    """Epochs between two scorings by the data set's test protocol; the best is best.pth; none: no scoring."""
    validate_on: Literal["test", "val"] = "test"
    """People of these scorings: the test's, or SYSU-MM01's val list, not trained on then (field: test)."""

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if self.speed == "plain":
            self.precision = self.precision or "32-true"
            self.channels_last = bool(self.channels_last)
        if self.split != 1 and self.dataset != "regdb":
            raise ConfigError(
                f"got split={self.split}, expected 1: {self.dataset} has one split, RegDB has ten"
            )
        if self.validate_on == "val" and self.dataset != "sysu-mm01":
            raise ConfigError(
                f"got validate_on='val' on {self.dataset}, expected 'test': only sysu-mm01 has a list of "
                "validation identities"
            )
        if self.weights is not None and self.init is not None:
            raise ConfigError(
                f"got weights={self.weights!r} and init={self.init!r}, expected one of them: ImageNet "
                "weights of the ResNet, or the weights of a trained network"
            )
        self.check_stages(ConfigError)
        side = max(self.height, self.width)
        if self.padding > side:
            raise ConfigError(f"got padding={self.padding}, expected at most {side}, an image's longer side")
        # The trunk halves the number of rows four times.
        rows = -(-self.height // 16)
        if self.parts > rows:
            raise ConfigError(
                f"got parts={self.parts}, expected at most {rows} at height={self.height}: the last feature "
                "map has a row for 16 pixels, and each part needs a row"
            )
        batch = self.identities * self.images * self.height * self.width * 3
        if batch > _LARGEST_BATCH:
            raise ConfigError(
                f"got identities={self.identities}, images={self.images}, height={self.height} and "
                f"width={self.width}, which make a batch of {batch} bytes of pixels in each modality, "
                f"expected at most {_LARGEST_BATCH}"
            )

    @property
    def own_optimizer(self) -> bool:
        """Whether `optimizer` names a class, of which the library knows neither the state nor the kernels."""
        return self.optimizer not in OPTIMIZERS

    @property
    def initial(self) -> str | None:
        """The file of the initial weights, `weights` or `init`; none: random weights."""
        return self.weights if self.init is None else self.init

    def model_arguments(self) -> dict[str, Any]:
        """The options of `ReIDModel` in this run."""
        return {field.name: getattr(self, field.name) for field in fields(ModelOptions)}

    def loss_arguments(self) -> dict[str, Any]:
        """The options of `ReIDLoss` in this run."""
        return {field.name: getattr(self, field.name) for field in fields(LossOptions)}

    def as_dict(self) -> dict[str, Any]:
        """Return the values in plain types, for a checkpoint or JSON."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Invert `as_dict`. Raises ConfigError, which names a value that is missing, unknown or unfit."""
        try:
            return cls(**checked(_kind(), dict(values), ""))
        except SettingError as error:
            raise ConfigError(str(error)) from None


@functools.cache
def _kind() -> Any:
    return record("TrainConfig", kinds_of(TrainConfig))


# The values that may differ when a run is resumed: they say where files are and how far or how fast it runs,
# but not what it computes. Data and weights may have moved, but must be the same: checkpoints have
# fingerprints.
FREE_ON_RESUME = frozenset(
    (
        "data", "out", "cache", "weights", "init", "epochs", "steps", "backend", "accelerator", "devices",
        "nodes", "workers", "log_every", "checkpoint_every", "logger", "validate_every",
    )
)  # fmt: skip


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The learning rate of BNNeck and classifier in an epoch, by the paper's schedule.

    It grows linearly from `warmup_lr` in epoch 0 to `lr` in epoch `warmup_epochs`. From each milestone on,
    also from one within the warm-up, it is multiplied by `decay`.
    """
    rate = config.lr
    if epoch < config.warmup_epochs:
        rate = config.warmup_lr + (config.lr - config.warmup_lr) * epoch / config.warmup_epochs
    return rate * config.decay ** sum(epoch >= milestone for milestone in config.milestones)
