"""`mrcn-fast table`: train and score what a table of the paper lacks, and print ours beside the paper's."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.progress import Progress

from mrcn_fast.benchmark import machine
from mrcn_fast.files import write_json
from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.console import in_words
from mrcn_fast.reid.data import SYSUMM01, WRITERS, RegDB, is_whole, open_dataset, recognize
from mrcn_fast.reid.data.synthetic.writers import is_synthetic
from mrcn_fast.reid.devices import check_device
from mrcn_fast.reid.evaluation.protocol import search_fingerprint, searches_of
from mrcn_fast.reid.evaluation.results import HEADLINE, check_free
from mrcn_fast.reid.kinds import AnyPath
from mrcn_fast.reid.paper.made_tables import DISTANCES, draw_curves, load_made_table, markdown
from mrcn_fast.reid.paper.recipes import TableSpec, load_table
from mrcn_fast.reid.paper.runs import (
    Run,
    TablePlan,
    check_rows,
    options_of,
    repeated,
    result_of,
    runs_of,
    seconds_of_training,
)
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.checkpoint import CHECKPOINT_NAME, content_digest
from mrcn_fast.reid.training.config import FREE_ON_RESUME, ConfigError
from mrcn_fast.reid.training.data_identity import data_identity
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

# The options of SYSU-MM01's and LLCM's protocols that a table takes.
OPTIONS: Final = ("trials", "shots", "draw")

log = logging.getLogger(__name__)

# The recipe that scales a row down to synthetic trees, and those trees.
OVERLAY = "synthetic"
_SYNTHETIC_SIZE = (48, 24)
SYNTHETIC = (RegDB.name, SYSUMM01.name)
"""The data sets that synthetic trees are written of."""
_FOLDERS = {RegDB.name: "regdb", SYSUMM01.name: "sysu"}


@check_arguments
def run_table(
    name: str,
    data: Sequence[AnyPath],
    *,
    options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **plan: Any,
) -> dict[str, Any]:
    """Make a table of the paper from the trees under `data`, and write it to `out`/table-`name`.json.

    Each row trains its recipe under `out`/recipe, on RegDB once per split. The columns of a data set without
    a tree have no scores. Tables share finished runs of equal data and values, with their scores. An
    interrupted run goes on.

    A row has the mean and standard deviation over its runs by the paper's pairing of the test features, under
    "pairings" the means by the others, and under "distances" those of Figure 5, with its δ. Where the paper
    draws curves, `out`/table-`name`.png has ours.

    Args:
        name: the table's name
        data: roots of the data sets' trees
        options: the protocol's options (shots, draw, trials), for the data sets that have them
        overwrite: replace a table of other options, plan, data sets or images; the runs stay
        progress: bars to add to; by default this function shows its own
        plan: the fields of `TablePlan`

    Returns:
        the table, with the number of runs that this call trained and the seconds that it took

    Raises:
        ConfigError: for an unknown table or option, trees of other data sets, and values that a table sets
        CheckpointError: for an existing run of other data, initial weights or values
        ResultError: before anything is trained, for an existing table that `overwrite` would replace
    """
    planned, spec = TablePlan(**plan), load_table(name)
    if unknown := sorted(set(options or {}) - set(OPTIONS)):
        raise ConfigError(f"got options {', '.join(unknown)}, expected some of {', '.join(OPTIONS)}")
    trees = _trees(spec, data)
    runs_of_rows = check_table(name, trees, **plan)
    record, chart = (Path(planned.out) / f"table-{name}{suffix}" for suffix in (".json", ".png"))
    made_of = _made_of(runs_of_rows, dict(options or {}))
    if not overwrite:
        check_free(record, [chart] if spec.curve else [], made_of)
    _announce(spec, trees, runs_of_rows)
    begun = time.perf_counter()
    rows, trained = _make_rows(spec, runs_of_rows, dict(options or {}), progress)
    table = {
        "table": name,
        "synthetic": any(is_synthetic(tree) for tree in trees.values()),
        "splits": planned.splits if "regdb" in trees else None,
        "seeds": planned.seeds,
        "overlay": planned.overlay,
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


def check_table(name: str, trees: Mapping[str, Path], **plan: Any) -> list[dict[str, list[Run]]]:
    """Configure the runs of each row by data set, without reading the trees or writing anything.

    `plan` are the fields of `TablePlan`. Raises ConfigError for a value that a run doesn't take or that a row
    sets itself, and for a device or a precision that this machine doesn't have; OSError where `out` takes no
    files.
    """
    planned = TablePlan(**plan)
    check_folder(planned.out, "the table and its runs")
    configured = [
        {
            dataset: runs_of(recipe, dataset, trees[dataset], planned)
            for dataset, recipe in row.recipes.items()
            if dataset in trees
        }
        for row in load_table(name).rows
    ]
    for dataset, tree in trees.items():
        check_rows([run for of_row in configured for run in of_row.get(dataset, ())], dataset, tree, planned)
    runs = [
        {
            dataset: [again for run in of for again in repeated(run, planned.seeds)]
            for dataset, of in row.items()
        }
        for row in configured
    ]
    for config in (run.config for of_row in runs for of in of_row.values() for run in of):
        check_device(config.accelerator, config.precision)
    return runs


def _announce(
    spec: TableSpec, trees: Mapping[str, Path], runs_of_rows: Sequence[Mapping[str, Sequence[Run]]]
) -> None:
    """Log which trainings the table needs, how many of them are there, and how long the others take."""
    for dataset in sorted({column.dataset for column in spec.columns.values()} - trees.keys()):
        log.warning("%s: the columns of %s are left out: its tree is not given", spec.title, dataset)
    for dataset, tree in trees.items():
        runs = {run.config.out: run for row in runs_of_rows for run in row.get(dataset, ())}
        missing = [run for out, run in runs.items() if not Path(out, CHECKPOINT_NAME).exists()]
        log.info(
            "%s: %d trainings on %s, of which %d are begun or done",
            *(spec.title, len(runs), tree, len(runs) - len(missing)),
        )
        if missing:
            seconds = seconds_of_training(missing[0].config)
            log.info(
                "One of the %d others takes about %s here, all together about %s, and scoring comes on top",
                *(len(missing), in_words(seconds), in_words(len(missing) * seconds)),
            )


def _make_rows(
    spec: TableSpec,
    runs_of_rows: Sequence[Mapping[str, Sequence[Run]]],
    options: dict[str, Any],
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], int]:
    """Make the rows of a table, and count the runs that were trained for them."""
    rows, trained = [], 0
    for row, runs in zip(spec.rows, runs_of_rows, strict=True):
        results: dict[str, list[dict[str, Any]]] = {}
        for dataset, of in runs.items():
            results[dataset] = [result_of(run, options, progress) for run in of]
            trained += sum(result.pop("trained") for result in results[dataset])
        rows.append({"title": row.title, **_over_runs(spec, results), "runs": _kept(results)})
    return rows, trained


def synthetic_places(folder: Path, datasets: Sequence[str] = SYNTHETIC) -> dict[str, Path]:
    """The folders that `synthetic_trees` writes, by data set."""
    return {dataset: folder / _FOLDERS[dataset] for dataset in datasets}


def synthetic_trees(folder: Path, progress: Progress, datasets: Sequence[str] = SYNTHETIC) -> list[Path]:
    """Write the synthetic trees of data sets under `folder` where they don't exist yet.

    Raises FolderInUseError where another process writes them.
    """
    # With a modality gap of 1, such short trainings learn little that holds in both modalities.
    looks: dict[str, Any] = {
        "modality_gap": 0.6,
        "infrared_colour": 0.4,
        "pose_spread": 0.4,
        "camera_style": 0.4,
    }
    sizes = {
        "regdb": {"identities": 112, "images": 8, "splits": 1},
        "sysu": {"identities": 72, "test_identities": 16, "images_per_camera": 4},
    }
    trees = list(synthetic_places(folder, datasets).values())
    with held(folder, "writes synthetic trees"):
        for tree in trees:
            if is_whole(tree):
                continue
            layout = tree.name
            task = progress.add_task(f"{layout} images", total=None, status="")
            WRITERS[layout](
                tree,
                **sizes[layout],
                **looks,
                image_size=_SYNTHETIC_SIZE,
                progress=lambda done, total, task=task: progress.update(task, completed=done, total=total),
            )
    return trees


def _trees(spec: TableSpec, data: Sequence[str | Path]) -> dict[str, Path]:
    """Find the tree of each data set of the table."""
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


def _made_of(runs_of_rows: Sequence[Mapping[str, Sequence[Run]]], options: dict[str, Any]) -> dict[str, Any]:
    """What distinguishes a table from others of its name, known before anything is trained.

    Raises what the data sets raise for options that they don't have.
    """
    runs = [run for row in runs_of_rows for of in row.values() for run in of]
    images: dict[str, dict[str, str]] = {}
    for run in runs:
        config = run.config
        tree = f"{config.dataset}, split {config.split}"
        if tree not in images:
            dataset = open_dataset(
                config.dataset, config.data, split=config.split, hold_out_val=config.validate_on == "val"
            )
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
    """The scores of a row in each column, over its runs and as shares of 1.

    "ours" are the means by the paper's pairing, "std" the standard deviations of several runs, "pairings" the
    means by the other pairings, and "distances" the mean distances of visible-infrared pairs of images.
    """
    row: dict[str, Any] = {"ours": {}, "std": {}, "pairings": {}, "distances": {}}
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
        if found := _distances(searches):
            row["distances"][key] = found
    return row


def _distances(searches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the runs, and δ's standard deviation over several; none where a search had no such pair."""
    each = [search["distances"] for search in searches]
    if any(of[name] is None for of in each for name in DISTANCES):
        return {}
    means = {name: statistics.fmean(of[name] for of in each) for name in DISTANCES}
    return means | ({"std": statistics.stdev(of["delta"] for of in each)} if len(each) > 1 else {})


def _mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {score: statistics.fmean(of[score] for of in scores) for score in HEADLINE}


def _kept(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What a table keeps of its runs in order to find and to compare them."""
    return {
        dataset: [
            {key: run[key] for key in ("checkpoint", "step", "split", "searches", "config")}
            for run in of_runs
        ]
        for dataset, of_runs in results.items()
    }
