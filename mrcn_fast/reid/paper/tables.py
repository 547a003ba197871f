"""`mrcn-fast table`: train and score what a table of the paper lacks, and print ours beside the paper's."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress
from typing_extensions import NotRequired, TypedDict

from mrcn_fast.benchmark import machine
from mrcn_fast.files import write_atomically, write_json
from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.data import SYSUMM01, WRITERS, RegDB, is_whole, open_dataset, recognize
from mrcn_fast.reid.data.synthetic.writers import is_synthetic
from mrcn_fast.reid.data.types import PersonDataset
from mrcn_fast.reid.devices import check_device
from mrcn_fast.reid.documents import DocumentError, read_json
from mrcn_fast.reid.evaluation.pairings import HEADLINE_PAIRING, PAIRINGS, TITLES, exchange
from mrcn_fast.reid.evaluation.protocol import search_fingerprint, searches_of
from mrcn_fast.reid.evaluation.results import HEADLINE, check_free, kept_result
from mrcn_fast.reid.evaluation.scoring import Conditions, outline, score_checkpoint
from mrcn_fast.reid.kinds import AnyPath, Count, Share, Split
from mrcn_fast.reid.messages import shown
from mrcn_fast.reid.paper.recipes import Row, TableSpec, load_recipe, load_table
from mrcn_fast.reid.settings import SettingError, check_arguments, checked, with_more
from mrcn_fast.reid.training.checkpoint import (
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointError,
    check_config,
    check_data,
    content_digest,
    data_identity,
    load_checkpoint,
)
from mrcn_fast.reid.training.config import FREE_ON_RESUME, ConfigError, TrainConfig
from mrcn_fast.reid.training.run_folder import held, run_files
from mrcn_fast.reid.training.trainer import Trainer

log = logging.getLogger(__name__)

SCORE_TITLES = {"rank1": "R-1", "rank10": "R-10", "rank20": "R-20", "mAP": "mAP", "mINP": "mINP"}

# The recipe that scales a row down to synthetic trees, and those trees.
OVERLAY = "synthetic"
_SYNTHETIC_SIZE = (48, 24)

# Recipe values -> the configuration: where flags come in.
Configure = Callable[[Mapping[str, Any]], TrainConfig]


class Run(NamedTuple):
    """One training that a table needs."""

    recipe: str
    config: TrainConfig


@with_more
class _Machine(TypedDict):
    cpu: str
    threads: int
    torch: str
    date: str


_Scores = dict[str, Share]


@with_more
class _MadeRow(TypedDict):
    ours: dict[str, _Scores]
    # Tables made by earlier versions lack these.
    std: NotRequired[dict[str, _Scores]]
    pairings: NotRequired[dict[str, dict[str, _Scores]]]


@with_more
class _MadeTable(TypedDict):
    """What `markdown` reads of a table that `run_table` wrote."""

    table: str
    synthetic: bool
    trained: int
    seconds: float
    machine: _Machine
    rows: list[_MadeRow]


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
            results[dataset] = [_result(run, dict(options or {}), progress) for run in of]
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
        _draw_curves(spec, table, chart)
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
                for run in _runs(recipe, dataset, trees[dataset], Path(out), splits, overlay, configure)
                for again in _repeated(run, seeds)
            ]
            for dataset, recipe in row.recipes.items()
            if dataset in trees
        }
        for row in load_table(name).rows
    ]
    for config in (run.config for runs in plan for of in runs.values() for run in of):
        check_device(config.accelerator, config.precision)
    return plan


def load_made_table(path: str | Path, name: str) -> dict[str, Any]:
    """The table `name` that `run_table` wrote. Raises DocumentError for a file that is anything else."""
    path = Path(path)
    expected = f"table {name} as `mrcn-fast table {name}` writes it"
    try:
        table: dict[str, Any] = checked(_MadeTable, read_json(path, expected), "table")
    except SettingError as error:
        raise DocumentError(f"{path}: expected {expected}; {error}") from None
    if table["table"] != name:
        raise DocumentError(f"{path}: expected {expected}; found table {shown(table['table'])}")
    spec = load_table(name)
    if len(table["rows"]) != len(spec.rows):
        raise DocumentError(
            f"{path}: expected {expected}, of {len(spec.rows)} rows; found {len(table['rows'])}"
        )
    for place, row in enumerate(table["rows"]):
        if (strange := _strange_scores(spec, row)) is not None:
            raise DocumentError(
                f"{path}: expected {expected}; found other scores in row {place + 1}: {shown(strange)}"
            )
    return table


def _strange_scores(spec: TableSpec, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first of a row's scores that `markdown` can't print."""
    for part in ("ours", "std"):
        for key, found in row.get(part, {}).items():
            if key not in spec.columns or not set(spec.columns[key].scores) <= found.keys():
                return {key: found}
    for key, by_pairing in row.get("pairings", {}).items():
        names = set(by_pairing)
        whole = not names or names == set(PAIRINGS) - {HEADLINE_PAIRING}
        if key not in row["ours"] or not whole or any("rank1" not in of for of in by_pairing.values()):
            return {key: by_pairing}
    return None


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


def markdown(table: Mapping[str, Any]) -> str:
    """A table as Markdown: our figures in percent, the paper's in brackets beside them."""
    spec = load_table(table["table"])
    header = ["Methods"]
    for column in spec.columns.values():
        header += [f"{column.title} {SCORE_TITLES[score]}" for score in column.scores]
    lines = [_line(header), _line(["---"] * len(header))]
    for row, ours in zip(spec.rows, table["rows"], strict=True):
        lines.append(_line([row.title, *_cells(spec, row, ours)]))
    title = f"{spec.title}: ours (the paper's), in percent"
    if any(row.get("std") for row in table["rows"]):
        title += "; mean ± standard deviation over the runs"
    notes = _pairing_lines(spec, table["rows"])
    notes += ["", spec.note] if spec.note else []
    if table["synthetic"]:
        notes += ["", "Synthetic data and scaled-down training: the figures say nothing about the paper's."]
    if table["trained"]:
        where, minutes = table["machine"], table["seconds"] / 60
        notes += [
            "",
            f"{table['trained']} runs trained and scored in {minutes:.0f} minutes on {where['cpu']},",
        ]
        notes += [f"{where['threads']} threads, torch {where['torch']}; {where['date']}."]
    return "\n".join([title, "", *lines, *notes])


def _cells(spec: TableSpec, row: Row, made: Mapping[str, Any]) -> list[str]:
    cells = []
    spread = made.get("std", {})
    for key, column in spec.columns.items():
        paper = row.paper.get(key, [None] * len(column.scores))
        for score, published in zip(column.scores, paper, strict=True):
            own = f"{100 * made['ours'][key][score]:.1f}" if key in made["ours"] else "–"
            if key in spread:
                own += f" ± {100 * spread[key][score]:.1f}"
            quoted = "–" if published is None else f"{published:.1f}"
            cells.append(f"{own} ({quoted})" if row.recipes else quoted)
    return cells


def _pairing_lines(spec: TableSpec, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rank-1 by each pairing of the rows whose network has two test features; no lines without such rows."""
    rank1 = [
        {key: _rank1(row, key) for key, found in row.get("pairings", {}).items() if found} for row in rows
    ]
    keys = [key for key in spec.columns if any(key in found for found in rank1)]
    if not keys:
        return []
    header = ["Rank-1 by pairing"]
    header += [f"{spec.columns[key].title} {TITLES[pairing]}" for key in keys for pairing in PAIRINGS]
    lines, warnings = ["", _line(header), _line(["---"] * len(header))], []
    for row, found in zip(spec.rows, rank1, strict=True):
        if not found:
            continue
        cells = [f"{100 * found[key][p]:.1f}" if key in found else "–" for key in keys for p in PAIRINGS]
        lines.append(_line([row.title, *cells]))
        told = {key: exchange(by_pairing) for key, by_pairing in found.items()}
        warnings += [f"{row.title}, {spec.columns[key].title}: {text}." for key, text in told.items() if text]
    return lines + [line for warning in warnings for line in ("", warning)]


def _rank1(row: Mapping[str, Any], key: str) -> dict[str, float]:
    others = {pairing: scores["rank1"] for pairing, scores in row["pairings"][key].items()}
    return {HEADLINE_PAIRING: row["ours"][key]["rank1"], **others}


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _draw_curves(spec: TableSpec, table: Mapping[str, Any], path: Path) -> None:
    """The columns' scores over the rows, a panel a column."""
    # Not pyplot, which would choose the caller's backend.
    from matplotlib.figure import Figure

    keys = [key for key in spec.columns if key in table["rows"][0]["ours"]]
    figure = Figure(figsize=(5 * len(keys), 3.6), layout="constrained")
    for panel, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        column = spec.columns[key]
        for score in column.scores:
            values = [100 * row["ours"][key][score] for row in table["rows"]]
            panel.plot([float(row.title) for row in spec.rows], values, "o-", label=SCORE_TITLES[score])
        panel.set(title=column.title, xlabel=spec.curve, ylabel="percent")
        panel.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


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


def _runs(
    recipe: str,
    dataset: str,
    tree: Path,
    out: Path,
    splits: int,
    overlay: str | None,
    configure: Configure,
) -> list[Run]:
    values = load_recipe(recipe) | ({} if overlay is None else load_recipe(overlay))
    several = dataset == "regdb"
    runs = []
    for split in range(1, splits + 1) if several else (1,):
        folder = out / (f"{recipe}-split-{split}" if several else recipe)
        own = {"dataset": dataset, "data": str(tree), "out": str(folder), "split": split}
        config = configure(values | own)
        _check_own(config, own)
        check_device(config.accelerator, config.precision)
        runs.append(Run(recipe, config))
    return runs


def _repeated(run: Run, seeds: int) -> list[Run]:
    """The run, and it again with each of the seeds after its own."""
    config = run.config
    others = [
        dataclasses.replace(config, seed=seed, out=f"{config.out}-seed-{seed}")
        for seed in range(config.seed + 1, config.seed + seeds)
    ]
    return [run, *(run._replace(config=other) for other in others)]


def _check_own(config: TrainConfig, own: Mapping[str, Any]) -> None:
    """Refuse flags for what a table sets itself: it would count a run for another than it is."""
    for name, value in own.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"got {name}={getattr(config, name)}, expected {value}: a table sets {', '.join(own)} of its "
                f"runs itself. Leave --{name} out; --splits N takes the first N splits of RegDB"
            )


def _result(run: Run, options: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    """The scores of a run, and whether it was "trained" for them; both done where that is missing."""
    config = run.config
    begun = time.perf_counter()
    dataset = open_dataset(config.dataset, config.data, split=config.split)
    checkpoint, trained = _trained(config, dataset, progress)
    options = _options_of(config.dataset, options)
    searches = searches_of(dataset, options)
    # Scores are taken over whatever the device and the backend were.
    conditions = Conditions(
        rerank=False,
        k1=None,
        k2=None,
        skip_unreadable=config.skip_unreadable,
        precision=config.precision,
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


def _options_of(dataset: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a data set's protocol, from the table's."""
    if dataset == "sysu-mm01":
        return {"mode": "both"} | options
    return {} if dataset == "regdb" else options


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
            searches = searches_of(dataset, _options_of(config.dataset, options))
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


def _trained(config: TrainConfig, dataset: PersonDataset, progress: Progress | None) -> tuple[Path, bool]:
    """The checkpoint of a finished run, and whether it had to be begun or gone on with."""
    path = Path(config.out) / CHECKPOINT_NAME
    if path.exists():
        state = load_checkpoint(path)
        _check_run(path, state, config, dataset)
        if state.epoch >= config.epochs or (config.steps is not None and state.step >= config.steps):
            return path, False
    return Trainer(config).fit(resume=bool(run_files(path.parent)), progress=progress), True


def _check_run(path: Path, state: Checkpoint, config: TrainConfig, dataset: PersonDataset) -> None:
    """Refuse a run in the way that isn't the table's, finished or not."""
    try:
        check_data(path, state, data_identity(dataset, dataset.training()))
        check_config(path, state, config)
        _check_length(path, state, config)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nFor a table of new runs give another folder (--out), or delete {path.parent}"
        ) from error


def _check_length(path: Path, state: Checkpoint, config: TrainConfig) -> None:
    """A shorter run goes on to where it should end; a longer one can't go back."""
    for name, reached, end in (("epochs", state.epoch, config.epochs), ("steps", state.step, config.steps)):
        if end is not None and reached > end:
            raise CheckpointError(f"{path}: expected a run of {end} {name}, found one of {reached}")


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
