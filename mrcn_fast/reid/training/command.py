"""`mrcn-fast train`: its flags, and where the values of a run come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from mrcn_fast.flags import Flags, Reader, path_text
from mrcn_fast.reid.console import log_to_console
from mrcn_fast.reid.data import recognize
from mrcn_fast.reid.kinds import PathText
from mrcn_fast.reid.launching import found_launch
from mrcn_fast.reid.models.resnet import imagenet_file
from mrcn_fast.reid.paper.recipes import load_recipe
from mrcn_fast.reid.processes import is_first
from mrcn_fast.reid.settings import kinds_of
from mrcn_fast.reid.training.checkpoint import CHECKPOINT_NAME, load_checkpoint
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.new_run import check_new_run
from mrcn_fast.reid.training.trainer import Trainer

# The titles of the groups of TrainConfig's fields in --help, by the first field of each.
TRAINING_GROUPS: Final = {
    "data": "data set and files",
    "model": "network",
    "height": "images of a batch and their augmentation",
    "label_smoothing": "losses",
    "epochs": "schedule and optimizer",
    "seed": "machine and records",
}


def train(flags: Flags, argv: list[str]) -> int:
    """Run `mrcn-fast train`, and return its exit status."""
    _add_flags(flags)
    given = flags.given(argv)
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    config = TrainConfig(**_values(flags, given, resume))
    resume = resume is not False
    if found_launch() is None:  # of several processes, the first one checks it when all have met
        check_new_run(config, resume=resume, overwrite=overwrite)
    log_to_console()
    path = Trainer(config).fit(resume=resume, overwrite=overwrite)
    if is_first():
        print(path)
    return 0


def _add_flags(flags: Flags) -> None:
    flags.epilog = f"--weights for the paper's ResNet-50: {imagenet_file(50)}"
    flags.group("where the values come from")
    flags.add(
        "--recipe",
        Reader(str, "the name of a recipe or the path of a .yaml file"),
        None,
        "the values of a row of the paper's tables, such as regdb-mrcn; flags override them",
    )
    flags.add_setting(
        "--config", PathText, None, "YAML file like a recipe, whose values override the recipe's"
    )
    flags.group("an earlier run")
    flags.add(
        "--resume",
        Reader(_resumed, "the run's folder; without one, the run in --out"),
        False,
        "go on with a run, exactly; its checkpoint has all other values",
        nargs="?",
        const="true",
        metavar="DIR",
    )
    flags.add_setting("--overwrite", bool, False, "replace the run in --out")
    flags.add_of(TrainConfig, skip={"dataset"}, groups=TRAINING_GROUPS)
    flags.group(TRAINING_GROUPS["data"])
    kind = kinds_of(TrainConfig)["dataset"]
    flags.add_setting("--dataset", kind, None, "which data set it is; by default the tree's folders tell")


def _resumed(word: str) -> bool | str:
    """Read --resume: whether to go on with the run in --out, or the folder of a run."""
    return {"true": True, "false": False}.get(word, path_text(word))


def _values(flags: Flags, given: dict[str, Any], resume: bool | str) -> dict[str, Any]:
    """The values of a run: its checkpoint's where it goes on, then the recipe's, then the given flags'."""
    if isinstance(resume, str):
        out = given.setdefault("out", resume)
        if Path(out) != Path(resume):
            flags.error(f"got --resume {resume} and --out {out}, expected one folder: leave out --out")
    recipes = [given.pop(name) for name in ("recipe", "config") if name in given]
    own: dict[str, Any] = {}
    for recipe in recipes:
        own |= load_recipe(recipe)
    own |= given
    values: dict[str, Any] = {}
    checkpoint = Path(own.setdefault("out", TrainConfig.out)) / CHECKPOINT_NAME
    if resume and checkpoint.is_file():
        values |= load_checkpoint(checkpoint).config.as_dict()
    values |= own
    if resume and not values.get("data"):
        flags.error(
            f"got --resume, but no run with a checkpoint: {checkpoint} isn't there; give the run's folder, "
            "or --data to begin the run"
        )
    if not values.get("data"):
        flags.error("--data is missing: give the root of the data set's tree")
    if "dataset" not in values:
        values["dataset"] = recognize(values["data"])
    return values
