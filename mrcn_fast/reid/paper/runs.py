"""The runs of a table: their configurations, and their trainings and scores where those are missing."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from mrcn_fast.reid.data import open_dataset
from mrcn_fast.reid.data.types import PersonDataset
from mrcn_fast.reid.devices import check_device
from mrcn_fast.reid.evaluation.protocol import searches_of
from mrcn_fast.reid.evaluation.results import kept_result
from mrcn_fast.reid.evaluation.scoring import Conditions, outline, score_checkpoint
from mrcn_fast.reid.kinds import AnyPath, Count, Split
from mrcn_fast.reid.paper.recipes import load_recipe
from mrcn_fast.reid.settings import SettingError, check_fields
from mrcn_fast.reid.training.checkpoint import CHECKPOINT_NAME, Checkpoint, CheckpointError, load_checkpoint
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.data_identity import data_identity
from mrcn_fast.reid.training.restoring import check_config, check_data
from mrcn_fast.reid.training.run_folder import run_files
from mrcn_fast.reid.training.speed import resolved
from mrcn_fast.reid.training.trainer import Trainer

log = logging.getLogger(__name__)

# Makes a configuration from the values of a recipe; the command line adds its flags here.
Configure = Callable[[Mapping[str, Any]], TrainConfig]


def _configuration(values: Mapping[str, Any]) -> TrainConfig:
    return TrainConfig(**values)


class Run(NamedTuple):
    """A training that a table needs."""

    recipe: str
    config: TrainConfig


@dataclasses.dataclass(kw_only=True)
class TablePlan:
    """Which runs a table has, and where they are. Raises SettingError for a value that is unfit."""

    out: AnyPath = "runs/tables"
    """Folder for the runs and the table."""
    splits: Split = 10
    """RegDB's splits to train on: the first so many."""
    seeds: Count = 1
    """Trainings of each row: with its seed, and with the seeds after it under `out`/recipe-seed-N."""
    overlay: str | None = None
    """A recipe whose values override those of each row's."""
    configure: Configure = _configuration
    """Makes the configuration of a run from the values of its recipe."""

    def __post_init__(self) -> None:
        check_fields(self, SettingError)


def runs_of(recipe: str, dataset: str, tree: Path, plan: TablePlan) -> list[Run]:
    """The runs of a recipe on the tree of a data set: one per split of RegDB, or one."""
    values = load_recipe(recipe) | ({} if plan.overlay is None else load_recipe(plan.overlay))
    several = dataset == "regdb"
    runs = []
    for split in range(1, plan.splits + 1) if several else (1,):
        folder = Path(plan.out) / (f"{recipe}-split-{split}" if several else recipe)
        own = {"dataset": dataset, "data": str(tree), "out": str(folder), "split": split}
        config = resolved(plan.configure(values | own))
        _check_own(config, own)
        check_device(config.accelerator, config.precision)
        runs.append(Run(recipe, config))
    return runs


def check_rows(runs: Sequence[Run], dataset: str, tree: Path, plan: TablePlan) -> None:
    """Refuse flags for the network, and for the values in which the rows of a column differ.

    With such a flag, the rows would be one network under several titles, also where it is one of another
    model, which has no gates or stages to differ in. `runs` are those of all rows, as `runs_of` gives them.

    Raises ConfigError.
    """
    plain = dataclasses.replace(plan, configure=_configuration)
    expected = [own for recipe in _recipes(runs) for own in runs_of(recipe, dataset, tree, plain)]
    by_folder = {own.config.out: own.config for own in expected}
    for name in (field.name for field in dataclasses.fields(TrainConfig)):
        if name != "model" and len({repr(getattr(own, name)) for own in by_folder.values()}) == 1:
            continue
        for config in (run.config for run in runs):
            if (got := getattr(config, name)) != (wanted := getattr(by_folder[config.out], name)):
                raise ConfigError(
                    f"got {name}={got!r}, expected {wanted!r} for {Path(config.out).name}: "
                    f"a table sets {name} of each row itself"
                )


def _recipes(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.recipe for run in runs))


def repeated(run: Run, seeds: int) -> list[Run]:
    """The run, and its repetitions with the next seeds after its own."""
    config = run.config
    others = [
        dataclasses.replace(config, seed=seed, out=f"{config.out}-seed-{seed}")
        for seed in range(config.seed + 1, config.seed + seeds)
    ]
    return [run, *(run._replace(config=other) for other in others)]


def _check_own(config: TrainConfig, own: Mapping[str, Any]) -> None:
    """Refuse flags for values that a table sets, because its columns would show the scores of other runs."""
    for name, value in own.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"got {name}={getattr(config, name)}, expected {value}: a table sets {', '.join(own)} of its "
                f"runs itself. Leave --{name} out; --splits N takes the first N splits of RegDB"
            )


def seconds_of_training(config: TrainConfig) -> float:
    """Estimate how long a training takes here, from its second step. Only the cache of images is written."""
    trainer = Trainer(config)
    batch = next(iter(trainer.batches.of(0)))
    trainer.step(batch)
    begun = time.perf_counter()
    trainer.step(batch)
    seconds = time.perf_counter() - begun
    trainer.batches.close()
    return trainer.total_steps * seconds


def result_of(run: Run, options: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    """Train and score a run where that is missing; the result says under "trained" whether it was."""
    config = run.config
    begun = time.perf_counter()
    dataset = open_dataset(
        config.dataset, config.data, split=config.split, hold_out_val=config.validate_on == "val"
    )
    checkpoint, trained = _trained(config, dataset, progress)
    options = options_of(config.dataset, options)
    searches = searches_of(dataset, options)
    # Scores are taken over from any device and backend.
    conditions = Conditions(
        rerank=False,
        k1=None,
        k2=None,
        skip_unreadable=config.skip_unreadable,
        precision=config.precision or "32-true",
        backend="",
        device="",
    )
    wanted = outline(load_checkpoint(checkpoint), dataset, searches, conditions)
    if kept := kept_result(checkpoint.parent, wanted):
        return kept | {"trained": trained}
    result = score_checkpoint(
        checkpoint,
        config.data,
        backend=config.backend,
        accelerator=config.accelerator,
        skip_unreadable=config.skip_unreadable,
        cache=config.cache,
        workers=config.workers,
        progress=progress,
        **options,
    )
    log.info("%s: %.0f s", config.out, time.perf_counter() - begun)
    return result | {"trained": trained}


def options_of(dataset: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of the table that the protocol of this data set takes."""
    if dataset == "sysu-mm01":
        return {"mode": "both"} | options
    return {} if dataset == "regdb" else options


def _trained(config: TrainConfig, dataset: PersonDataset, progress: Progress | None) -> tuple[Path, bool]:
    """Train a run to its end; return its checkpoint, and whether there was anything to train."""
    path = Path(config.out) / CHECKPOINT_NAME
    if path.exists():
        state = load_checkpoint(path)
        _check_run(path, state, config, dataset)
        if state.epoch >= config.epochs or (config.steps is not None and state.step >= config.steps):
            return path, False
    return Trainer(config).fit(resume=bool(run_files(path.parent)), progress=progress), True


def _check_run(path: Path, state: Checkpoint, config: TrainConfig, dataset: PersonDataset) -> None:
    """Refuse an existing run, finished or not, of other data or values than the table's."""
    try:
        check_data(path, state, data_identity(dataset, dataset.training()))
        check_config(path, state, config)
        _check_length(path, state, config)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nFor a table of new runs give another folder (--out), or delete {path.parent}"
        ) from error


def _check_length(path: Path, state: Checkpoint, config: TrainConfig) -> None:
    """Refuse a run that is longer than it should be; a shorter one goes on."""
    for name, reached, end in (("epochs", state.epoch, config.epochs), ("steps", state.step, config.steps)):
        if end is not None and reached > end:
            raise CheckpointError(f"{path}: expected a run of {end} {name}, found one of {reached}")
