"""Modules of this package that have moved: an import by the former name works for one release, and warns."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

_PACKAGE: Final = "mrcn_fast.reid."
# Former name and present name, both below `mrcn_fast.reid`.
MOVED: Final = {
    "batches": "training.batches",
    "checkpoint": "training.checkpoint",
    "config": "training.config",
    "data.figure": "data.synthetic.body",
    "data.lists": "data.datasets.lists",
    "data.llcm": "data.datasets.llcm",
    "data.matlab": "data.datasets.matlab",
    "data.people": "data.synthetic.people",
    "data.permutations": "data.datasets.permutations",
    "data.regdb": "data.datasets.regdb",
    "data.rendering": "data.synthetic.rendering",
    "data.samples": "data.types",
    "data.synthetic_tree": "data.synthetic.tree",
    "data.sysu_mm01": "data.datasets.sysu_mm01",
    "data.trees": "data.datasets.trees",
    "drawing": "paper.plots",
    "extraction": "evaluation.extraction",
    "figures": "paper.figures",
    "heads": "models.heads",
    "losses": "training.losses",
    "metrics": "training.journal",
    "model": "models.network",
    "optimizer": "training.optimizer",
    "pairings": "evaluation.pairings",
    "plugs": "models.blocks",
    "pretraining": "training.pretraining",
    "recipes": "paper.recipes",
    "reranking": "evaluation.reranking",
    "resnet": "models.resnet",
    "results": "evaluation.results",
    "run_folder": "training.run_folder",
    "scoring": "evaluation.scoring",
    "study": "paper.study",
    "tables": "paper.tables",
    "transfers": "training.transfers",
}


class _Moved(MetaPathFinder, Loader):
    """Finds a module by its former name, and gives the module of the present name in its place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PACKAGE) or fullname.removeprefix(_PACKAGE) not in MOVED:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        former = module.__name__
        present = _PACKAGE + MOVED[former.removeprefix(_PACKAGE)]
        warnings.warn(f"{former} is {present} now", DeprecationWarning, stacklevel=2)
        # The import system takes what stands here when this method is done.
        sys.modules[former] = importlib.import_module(present)


def serve_former_names() -> None:
    """Let imports by the former names work from now on. Further calls change nothing."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
