"""Visible-infrared person re-identification on top of the MRCN block.

`data` has data sets and batches, `models` the network, `training` the loop and its files, `evaluation` test
features and scores, `paper` the tables and figures, `report` the page about trained networks, and `search`
the search in one's own images. export.py writes the test path for ONNX and torch.export. demo.py is
`mrcn-fast demo`. The other modules serve all of them: settings.py checks values against annotations, of
which kinds.py has the common ones and messages.py the messages; devices.py opens the devices,
launching.py starts a process for each and processes.py lets them exchange values and end together,
documents.py reads YAML and JSON within limits, stored.py reads files of torch and safetensors, arrays.py
converts the arrays of callers, console.py has log lines and progress bars, and stopping.py notes Ctrl-C and
SIGTERM.
moved.py lets modules be imported by the names they had before.

The names in `__all__` are the parts that the command line uses. They are imported from their modules when
they are first asked for, so that `import mrcn_fast.reid` needs torch alone.

Example:
    >>> from mrcn_fast.reid import TrainConfig
    >>> TrainConfig(data="data/regdb", dataset="regdb").epochs
    80
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from mrcn_fast.reid.moved import serve_former_names

if TYPE_CHECKING:
    from mrcn_fast.reid.data.augment import Augmentation, normalize
    from mrcn_fast.reid.data.datasets.registry import open_dataset
    from mrcn_fast.reid.data.images import PersonImages
    from mrcn_fast.reid.data.loading import Batches
    from mrcn_fast.reid.evaluation.extraction import extract
    from mrcn_fast.reid.evaluation.reranking import rerank
    from mrcn_fast.reid.evaluation.scores import score
    from mrcn_fast.reid.evaluation.scoring import score_checkpoint
    from mrcn_fast.reid.evaluation.trained import open_trained
    from mrcn_fast.reid.models.backbone import StagedTrunk
    from mrcn_fast.reid.models.heads import Head, PartPool
    from mrcn_fast.reid.models.interface import ReIDNetwork
    from mrcn_fast.reid.models.network import ReIDModel, TrainingOutput
    from mrcn_fast.reid.models.resnet import Trunk
    from mrcn_fast.reid.training.batches import TrainingBatches
    from mrcn_fast.reid.training.callbacks import Callback
    from mrcn_fast.reid.training.checkpoint import load_checkpoint
    from mrcn_fast.reid.training.config import TrainConfig
    from mrcn_fast.reid.training.losses import BatchHardTriplet, LossParts, ReIDLoss
    from mrcn_fast.reid.training.optimizer import make_optimizer, without_decay
    from mrcn_fast.reid.training.trainer import Trainer

__all__ = [
    "Augmentation",
    "BatchHardTriplet",
    "Batches",
    "Callback",
    "Head",
    "LossParts",
    "PartPool",
    "PersonImages",
    "ReIDLoss",
    "ReIDModel",
    "ReIDNetwork",
    "StagedTrunk",
    "TrainConfig",
    "Trainer",
    "TrainingBatches",
    "TrainingOutput",
    "Trunk",
    "extract",
    "load_checkpoint",
    "make_optimizer",
    "normalize",
    "open_dataset",
    "open_trained",
    "rerank",
    "score",
    "score_checkpoint",
    "without_decay",
]

# The module of each name, below this package.
_MODULES: Final = {
    "data.augment": ("Augmentation", "normalize"),
    "data.datasets.registry": ("open_dataset",),
    "data.images": ("PersonImages",),
    "data.loading": ("Batches",),
    "evaluation.extraction": ("extract",),
    "evaluation.reranking": ("rerank",),
    "evaluation.scores": ("score",),
    "evaluation.scoring": ("score_checkpoint",),
    "evaluation.trained": ("open_trained",),
    "models.backbone": ("StagedTrunk",),
    "models.heads": ("Head", "PartPool"),
    "models.interface": ("ReIDNetwork",),
    "models.network": ("ReIDModel", "TrainingOutput"),
    "models.resnet": ("Trunk",),
    "training.batches": ("TrainingBatches",),
    "training.callbacks": ("Callback",),
    "training.checkpoint": ("load_checkpoint",),
    "training.config": ("TrainConfig",),
    "training.losses": ("BatchHardTriplet", "LossParts", "ReIDLoss"),
    "training.optimizer": ("make_optimizer", "without_decay"),
    "training.trainer": ("Trainer",),
}
_PLACES: Final = {name: module for module, names in _MODULES.items() for name in names}

serve_former_names()


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs the packages of [reid], of which {error.name} is not installed: "
            "pip install 'mrcn-fast[reid]'",
            name=error.name,
        ) from error
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
