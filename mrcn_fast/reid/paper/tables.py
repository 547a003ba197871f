"""`mrcn-fast table`: train and score what a table of the paper lacks, and print ours beside the paper's."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from mrcn_fast.benchmark import machine
from mrcn_fast.files import write_json
from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.data import SYSUMM01, WRITERS, RegDB, is_whole, open_dataset, recognize
from mrcn_fast.reid.data.synthetic.writers import is_synthetic
from mrcn_fast.reid.devices import check_device
from mrcn_fast.reid.evaluation.protocol import search_fingerprint, searches_of
from mrcn_fast.reid.evaluation.results import HEADLINE, check_free
from mrcn_fast.reid.kinds import AnyPath, Count, Split
from mrcn_fast.reid.paper.made_tables import draw_curves, load_made_table, markdown
from mrcn_fast.reid.paper.recipes import TableSpec, load_table
from mrcn_fast.reid.paper.runs import Configure, Run, options_of, repeated, result_of, runs_of
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.checkpoint import content_digest, data_identity
from mrcn_fast.reid.training.config import FREE_ON_RESUME, ConfigError, TrainConfig
from mrcn_fast.reid.training.run_folder import held

# With the names of made_tables.py, which have been importable from here.
__all__ = [
    "OVERLAY",
    "check_table",
    "load_made_table",
    "markdown",
    "run_table",
    "synthetic_places",
    "synthetic_trees",
]

log = logging.getLogger(__name__)

# The recipe that scales a row down to synthetic trees, and those trees.
OVERLAY = "synthetic"
_SYNTHETIC_SIZE = (48, 24)


@check_arguments
def run_table(
    name: str,
    data: Sequence[AnyPath],
    *,
    out: AnyPath = "runs/tables",
    splits: Split = 10,
    seeds: Count = 1,
    options: Mapping[str, Any] | None = None,
    overlay: str | None = None,
    configure: Configure = lambda values: TrainConfig(**values),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a table of the paper from the trees under `data`; returns and writes `out`/table-`name`.json.

    Each row trains its recipe (RegDB: once for each of the first `splits` splits) under `out`/recipe, unless
    a finished run of the same data and values is there; one that was interrupted goes on. With `seeds` above
    1 each of these trainings is repeated with the next seeds, under `out`/recipe-seed-N. Rows of several
    tables share their runs, and scores beside a run are taken over where they are of the same images.
    `options` are the protocol's (mode, shots, draw, trials), where a data set has them. `overlay` is a recipe
    laid over each row's; `configure` makes its TrainConfig. Columns whose data set is not among the trees
    stay empty.

    Where the paper draws curves, so does `out`/table-`name`.png.

    A row has the mean over its runs and, where there are several, their standard deviation, by the paper's
    pairing of the test features; under "pairings" the means by the others
    (`mrcn_fast.reid.evaluation.pairings`).

    The result counts the runs that were trained in this call, and the seconds it took. A table that is there
    already, of other options, splits, seeds, data sets, values or images, is only replaced if `overwrite`;
    the runs stay.

    Raises ConfigError for an unknown table, for trees of which none is of its data sets, and where
    `configure` sets a run's data set, data, out or split; CheckpointError for a run in the way that is of
    another data set, of other initial weights or of other values; ResultError, before anything is trained,
    for a table in the way.
    """
    spec = load_table(name)
    trees = _trees(spec, data)
    plan = check_table(name, trees, out=out, splits=splits, seeds=seeds, overlay=overlay, configure=configure)
    record, chart = (Path(out) / f"table-{name}{suffix}" for suffix in (".json", ".png"))
    made_of = _made_of([run for runs in plan for of in runs.values() for run in of], dict(options or {}))
    if not overwrite:
        check_free(record, [chart] if spec.curve else [], made_of)
    rows, trained = [], 0
    begun = time.perf_counter()
    for row, runs in zip(spec.rows, plan, strict=True):
        results: dict[str, list[dict[str, Any]]] = {}
        for dataset, of in runs.items():
            results[dataset] = [result_of(run, dict(options or {}), progress) for run in of]
            trained += sum(result.pop("trained") for result in results[dataset])
        rows.append({"title": row.title, **_over_runs(spec, results), "runs": _told(results)})
    table = {
        "table": name,
        "synthetic": any(is_synthetic(tree) for tree in trees.values()),
        "splits": splits if "regdb" in trees else None,
        "seeds": seeds,
        "overlay": overlay,
        "made_of": made_of,
        "trained": trained,
        "seconds": round(time.perf_counter() - begun, 1),
        "machine": machine(),
        "rows": rows,
    }
    write_json(record, table)
    if spec.curve:
        draw_curves(spec, table, chart)
    log.info("Table %s: written to %s", name, record)
    return table


def check_table(
    name: str,
    trees: Mapping[str, Path],
    *,
    out: str | Path,
    splits: int,
    seeds: int,
    overlay: str | None,
    configure: Configure,
) -> list[dict[str, list[Run]]]:
    """The runs of each row by data set, all of them configured; nothing is read of the trees, nor written.

    Raises ConfigError for a value that a run doesn't take, and for a device or a precision that this machine
    doesn't have; OSError where `out` takes no files.
    """
    check_folder(out, "the table and its runs")
    plan = [
        {
            dataset: [
                again
                for run in runs_of(recipe, dataset, trees[dataset], Path(out), splits, overlay, configure)
                for again in repeated(run, seeds)
            ]
            for dataset, recipe in row.recipes.items()
            if dataset in trees
        }
        for row in load_table(name).rows
    ]
    for config in (run.config for runs in plan for of in runs.values() for run in of):
        check_device(config.accelerator, config.precision)
    return plan


def synthetic_places(folder: Path) -> dict[str, Path]:
    """Where `synthetic_trees` writes the tree of each data set."""
    return {RegDB.name: folder / "regdb", SYSUMM01.name: folder / "sysu"}


def synthetic_trees(folder: Path, progress: Progress) -> list[Path]:
    """The synthetic trees of RegDB and SYSU-MM01 under `folder`, written where they aren't there.

    Raises FolderInUseError where another process writes them.
    """
    # At a modality gap of 1 so short a training learns little that holds in both.
    looks: dict[str, Any] = {"modality_gap": 0.6, "pose_spread": 0.4, "camera_style": 0.4}
    sizes = {
        "regdb": {"identities": 112, "images": 8, "splits": 1},
        "sysu": {"identities": 72, "test_identities": 16, "images_per_camera": 4},
    }
    trees = {layout: folder / layout for layout in sizes}
    with held(folder, "writes synthetic trees"):
        for layout, tree in trees.items():
            if is_whole(tree):
                continue
            task = progress.add_task(f"{layout} images", total=None, status="")
            WRITERS[layout](
                tree,
                **sizes[layout],
                **looks,
                image_size=_SYNTHETIC_SIZE,
                progress=lambda done, total, task=task: progress.update(task, completed=done, total=total),
            )
    return list(trees.values())


def _trees(spec: TableSpec, data: Sequence[str | Path]) -> dict[str, Path]:
    """The tree of each data set."""
    wanted = sorted({column.dataset for column in spec.columns.values()})
    trees: dict[str, Path] = {}
    for tree in map(Path, data):
        dataset = recognize(tree)
        if dataset in trees:
            raise ConfigError(
                f"got two trees of {dataset}, {trees[dataset]} and {tree}; expected one of each"
            )
        trees[dataset] = tree
    trees = {dataset: tree for dataset, tree in trees.items() if dataset in wanted}
    if not trees:
        given = ", ".join(map(str, data)) or "none"
        raise ConfigError(f"{spec.title}: expected the tree of {' or '.join(wanted)}; got {given}")
    return trees


def _made_of(runs: Sequence[Run], options: dict[str, Any]) -> dict[str, Any]:
    """What tells a table from others of its name, before anything is trained for it.

    Raises what the data sets raise for options that they don't have.
    """
    images: dict[str, dict[str, str]] = {}
    for run in runs:
        config = run.config
        tree = f"{config.dataset}, split {config.split}"
        if tree not in images:
            dataset = open_dataset(config.dataset, config.data, split=config.split)
            searches = searches_of(dataset, options_of(config.dataset, options))
            images[tree] = {search.name: search_fingerprint(dataset, search) for search in searches}
            images[tree]["training"] = data_identity(dataset, dataset.training()).fingerprint
    free = FREE_ON_RESUME - {"epochs", "steps"}
    values = [
        {name: value for name, value in run.config.as_dict().items() if name not in free} for run in runs
    ]
    return {
        **options,
        "data sets": sorted(images),
        "values of the runs": content_digest(values),
        "images": content_digest(images),
    }


def _over_runs(spec: TableSpec, results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A row's scores in each column, as shares of 1, over its runs.

    "ours" are the means by the paper's pairing, "std" the standard deviations of several runs, and "pairings"
    the means by the other pairings.
    """
    row: dict[str, Any] = {"ours": {}, "std": {}, "pairings": {}}
    for key, column in spec.columns.items():
        if column.dataset not in results:
            continue
        searches = [result["searches"][column.search] for result in results[column.dataset]]
        row["ours"][key] = _mean([search["mean"] for search in searches])
        if len(searches) > 1:
            each = {score: [search["mean"][score] for search in searches] for score in HEADLINE}
            row["std"][key] = {score: statistics.stdev(values) for score, values in each.items()}
        row["pairings"][key] = {
            pairing: _mean([search["pairings"][pairing]["mean"] for search in searches])
            for pairing in searches[0]["pairings"]
        }
    return row


def _mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {score: statistics.fmean(of[score] for of in scores) for score in HEADLINE}


def _told(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What a table keeps of its runs: enough to find them and to compare them."""
    return {
        dataset: [
            {key: run[key] for key in ("checkpoint", "step", "split", "searches", "config")}
            for run in of_runs
        ]
        for dataset, of_runs in results.items()
    }
