"""`mrcn-fast study cqc`: which reading of the CQC loss (eq. 8-10) helps, measured on synthetic people.

The paper doesn't say which features the loss compares, whether they are divided by their length, or whether
a gradient is stopped; its equations are a sum over identities, and the authors' later code takes the mean.
Each reading is a row of this study. All rows start from one pretraining, are trained alike with several
seeds, and are scored by the three pairings of `mrcn_fast.reid.evaluation.pairings`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.progress import Progress

from mrcn_fast.benchmark import machine
from mrcn_fast.files import write_json
from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.data import is_whole
from mrcn_fast.reid.devices import check_device
from mrcn_fast.reid.documents import DocumentError, read_json
from mrcn_fast.reid.evaluation.pairings import HEADLINE_PAIRING, PAIRINGS, TITLES
from mrcn_fast.reid.evaluation.results import HEADLINE, ResultError
from mrcn_fast.reid.evaluation.scoring import score_checkpoint
from mrcn_fast.reid.kinds import Count, PathText
from mrcn_fast.reid.settings import SettingError, checked, record
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.pretraining import SyntheticConfig, pretrain
from mrcn_fast.reid.training.run_folder import FolderInUseError, held, run_files
from mrcn_fast.reid.training.trainer import Trainer

log = logging.getLogger(__name__)

RESULT_NAME: Final = "study.json"
SEEDS: Final = (0, 1, 2)
DIRECTION: Final = "visible-to-infrared"
_RUN_RESULT: Final = "result.json"
_SEED_FOLDER: Final = re.compile(r"seed-\d+")
_RESULT: Final = record("result", {"scores": dict[str, Any]}, more=True)
_WITHOUT: Final = "without-cqc"
_EPOCHS: Final = 80
# A gain is accepted if it is positive at each of at least _LEAST_SEEDS seeds and its mean is above
# _STANDARD_ERRORS standard errors.
_LEAST_SEEDS: Final = 3
_STANDARD_ERRORS: Final = 2


class Row(NamedTuple):
    """A way to train: its title, and the values of the configuration in which it differs from other rows."""

    title: str
    values: dict[str, Any]


def _reading(features: str, reduction: str, **more: Any) -> dict[str, Any]:
    return {"model": "mrcn", "cqc_features": features, "cqc_reduction": reduction} | more


# The most informative rows come first, because a study may be stopped before its end.
ROWS: Final = {
    _WITHOUT: Row("MRCN without CQC", {"model": "mrcn", "cqc_weight": 0.0}),
    "unit-mean": Row("unit features, mean", _reading("unit", "mean")),
    "pooled-sum": Row("pooled features, sum", _reading("pooled", "sum")),
    "baseline": Row("two-stream baseline", {"model": "baseline"}),
    "pooled-mean": Row("pooled features, mean", _reading("pooled", "mean")),
    "unit-sum": Row("unit features, sum", _reading("unit", "sum")),
    "pooled-mean-detached": Row(
        "pooled features, mean, gradient stopped", _reading("pooled", "mean", detach_negative=True)
    ),
    "pooled-mean-weight-0.1": Row(
        "pooled features, mean, λ2 = 0.1", _reading("pooled", "mean", cqc_weight=0.1)
    ),
    "unit-mean-mrm": Row("MRM: unit features, mean", _reading("unit", "mean", model="mrm")),
    "unit-mean-mcm": Row("MCM: unit features, mean", _reading("unit", "mean", model="mcm")),
}


@dataclasses.dataclass(kw_only=True)
class StudyConfig(SyntheticConfig):
    """The study's size. All rows get the same data, pretraining and number of steps."""

    out: PathText = "runs/study-cqc"
    """Folder for everything the study writes; processes that share it share the runs."""
    steps: Count = 2000
    """Training steps of each run; the paper's schedule of 80 epochs is scaled to them."""


def run_study(
    config: StudyConfig,
    *,
    rows: Sequence[str] = tuple(ROWS),
    seeds: Sequence[int] = SEEDS,
    progress: Progress,
) -> dict[str, Any]:
    """Train and score those of the rows and seeds that are missing; returns and writes `out`/study.json.

    Writes under `config.out`: data/, pretraining/, a folder for each row and seed, and study.json. A finished
    run is not repeated, and an interrupted run goes on. A run that another process trains is left to that
    process, and the result is without it. The result has all finished runs, also those of earlier calls.

    Raises ConfigError for an unknown row, ResultError for a folder with a study of other values or with runs
    but no study.json, DocumentError for a damaged result of a run, and FolderInUseError where another process
    writes the images or pretrains.
    """
    out = Path(config.out)
    if unknown := sorted(set(rows) - set(ROWS)):
        raise ConfigError(f"got rows {', '.join(unknown)}, expected some of {', '.join(ROWS)}")
    check_folder(out, "the study")
    check_device(config.accelerator, "32-true")
    _check_values(out, config)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RESULT_NAME, summary(config))
    tree = _once(config.tree, config.write_people, 0, progress)
    weights = _weights(config, progress)
    for seed in seeds:
        for name in rows:
            try:
                _run(run_config(config, name, seed, tree, weights), progress)
            except FolderInUseError:
                log.info("%s with seed %d: left to the process that trains it", name, seed)
            write_json(out / RESULT_NAME, summary(config))
    return summary(config)


def run_config(config: StudyConfig, name: str, seed: int, tree: Path, weights: Path) -> TrainConfig:
    """The configuration of a row's run: the paper's recipe for RegDB at the study's size."""
    shared = _scaled(config, tree, Path(config.out) / name / f"seed-{seed}", config.steps)
    return dataclasses.replace(shared, seed=seed, weights=str(weights), **ROWS[name].values)


def _scaled(config: StudyConfig, tree: Path, out: Path, steps: int) -> TrainConfig:
    return config.training(
        tree,
        out,
        steps,
        stages=(1,),
        padding=max(1, round(10 * config.height / 288)),
        epochs=_EPOCHS,
        # Rounded up, so that `steps` ends the run before the last epoch does.
        batches=-(-steps // _EPOCHS),
        log_every=max(1, steps // 80),
    )


def _once(root: Path, write: Callable[[int, Progress], Path], seed: int, progress: Progress) -> Path:
    """Write the images under `root` where they don't exist yet."""
    with held(root.parent, "writes the study's images"):
        return root if is_whole(root) else write(seed, progress)


def _weights(config: StudyConfig, progress: Progress) -> Path:
    """Pretrain the ResNet where its weights don't exist yet."""
    path = config.pretraining / "weights.pth"
    if path.exists():
        return path
    tree = _once(config.pretraining / "data", config.write_other_people, 1, progress)
    # The trunk starts from random weights, and so learns as fast as the head.
    training = dataclasses.replace(
        _scaled(config, tree, config.pretraining / "run", config.pretraining_steps),
        trunk_lr=1.0,
        lr=0.03,
        warmup_lr=0.003,
    )
    return pretrain(training, path, resume=_begun(training), progress=progress)


def _begun(training: TrainConfig) -> bool:
    return bool(run_files(Path(training.out)))


def _run(training: TrainConfig, progress: Progress) -> None:
    """Train and score a run, unless its result is there."""
    path = Path(training.out) / _RUN_RESULT
    if path.exists():
        return
    checkpoint = Trainer(training).fit(resume=_begun(training), progress=progress)
    result = score_checkpoint(checkpoint, training.data, accelerator=training.accelerator, progress=progress)
    scores = {
        name: {HEADLINE_PAIRING: search["mean"]}
        | {pairing: of["mean"] for pairing, of in search["pairings"].items()}
        for name, search in result["searches"].items()
    }
    write_json(path, {"config": training.as_dict(), "scores": scores})


def _run_result(path: Path) -> dict[str, Any]:
    """Read the result of a run. Raises DocumentError for another file."""
    expected = "the result of a run of `mrcn-fast study cqc`"
    try:
        result: dict[str, Any] = checked(_RESULT, read_json(path, expected), "")
    except SettingError as error:
        raise DocumentError(f"{path}: expected {expected}: {error}") from None
    return result


def summary(config: StudyConfig) -> dict[str, Any]:
    """Summarize the finished runs, as study.json holds them.

    Each row has the scores of each seed by direction and pairing, as shares of 1, their mean and standard
    error, and the gain in rank-1 over MRCN without CQC. Rows without a run are listed under "not run".
    """
    runs = {name: _finished(Path(config.out) / name) for name in ROWS}
    return {
        "made_of": _made_of(config),
        "machine": machine(),
        "rows": {name: _row(name, found, runs[_WITHOUT]) for name, found in runs.items() if found},
        "not run": [name for name, found in runs.items() if not found],
    }


def _made_of(config: StudyConfig) -> dict[str, Any]:
    """The values that a study's scores depend on."""
    free = ("out", "accelerator")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


def _finished(folder: Path) -> dict[int, dict[str, Any]]:
    """The scores of a row's finished runs by seed."""
    results = {
        int(path.parent.name.removeprefix("seed-")): path
        for path in folder.glob(f"seed-*/{_RUN_RESULT}")
        # Not of a folder that somebody copied, such as seed-0-old.
        if _SEED_FOLDER.fullmatch(path.parent.name)
    }
    return {seed: _run_result(path)["scores"] for seed, path in sorted(results.items())}


def _row(name: str, runs: Mapping[int, Any], without: Mapping[int, Any]) -> dict[str, Any]:
    """A row of the result, from its runs' scores by seed and from those without CQC."""
    row = {
        "title": ROWS[name].title,
        "values": ROWS[name].values,
        "scores": {str(seed): scores for seed, scores in runs.items()},
        "over_seeds": _over_seeds(list(runs.values())),
    }
    seeds = sorted(runs.keys() & without.keys())
    if name == _WITHOUT or not seeds:
        return row
    return row | {"gain": _gain({seed: _rank1(runs[seed]) - _rank1(without[seed]) for seed in seeds})}


def _rank1(scores: Mapping[str, Any]) -> float:
    value: float = scores[DIRECTION][HEADLINE_PAIRING]["rank1"]
    return value


def _over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of each score by direction and pairing."""
    return {
        direction: {
            pairing: {
                score: _statistics([run[direction][pairing][score] for run in runs]) for score in HEADLINE
            }
            for pairing in pairings
        }
        for direction, pairings in runs[0].items()
    }


def _gain(gains: Mapping[int, float]) -> dict[str, Any]:
    """The gain in rank-1 over MRCN without CQC by seed, and whether it is accepted.

    It is accepted if it is positive at each of at least three seeds and its mean is above two standard
    errors.
    """
    found = _statistics(list(gains.values()))
    error = found["standard_error"]
    accepted = (
        len(gains) >= _LEAST_SEEDS
        and min(gains.values()) > 0
        and error is not None
        and found["mean"] > _STANDARD_ERRORS * error
    )
    return {"by_seed": {str(seed): gain for seed, gain in gains.items()}, **found, "accepted": accepted}


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    """The mean and its standard error, which is None for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def _check_values(out: Path, config: StudyConfig) -> None:
    """Refuse a folder with a study of other values, or of unknown ones. Raises ResultError."""
    path = out / RESULT_NAME
    if not path.exists():
        # A study writes this file first.
        for place in (config.tree, config.pretraining, *map(out.joinpath, ROWS)):
            if place.exists():
                raise ResultError(
                    f"{path}: is missing, and nothing else says which study {place} belongs to. Put the file "
                    "back, or give another folder (--out)"
                )
        return
    try:
        found = dict(json.loads(path.read_bytes())["made_of"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ResultError(
            f"{path}: expected the result of `mrcn-fast study cqc`. Give another folder (--out)"
        ) from None
    asked = _made_of(config)
    if differing := [name for name in asked if found.get(name) != asked[name]]:
        raise ResultError(
            f"{out}: holds a study that differs from this one in {', '.join(differing)}. "
            "Give another folder (--out)"
        )


def markdown(result: Mapping[str, Any]) -> str:
    """A study as Markdown: rank-1 in percent by each pairing, mean ± standard error, and the gain."""
    header = ["Row", "seeds", *(TITLES[pairing] for pairing in PAIRINGS), "gain of CQC", "accepted"]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in result["rows"].values():
        by_pairing = row["over_seeds"][DIRECTION]
        cells = [_cell(by_pairing[p]["rank1"]) if p in by_pairing else "" for p in PAIRINGS]
        gain = row.get("gain")
        cells += [_cell(gain), "yes" if gain["accepted"] else "no"] if gain else ["", ""]
        lines.append(_line([row["title"], ", ".join(row["scores"]), *cells]))
    made_of = result["made_of"]
    notes = [
        "",
        f"Synthetic data; {DIRECTION}, rank-1 in percent, mean ± standard error over the seeds; "
        f"{made_of['steps']} steps.",
        "The gain is over MRCN without CQC at the same seeds, by the paper's pairing. It is accepted if it",
        f"is positive at each of at least {_LEAST_SEEDS} seeds and its mean is above {_STANDARD_ERRORS} "
        "standard errors.",
    ]
    if result["not run"]:
        notes += [f"Not run: {', '.join(result['not run'])}."]
    return "\n".join([*lines, *notes])


def _cell(found: Mapping[str, Any]) -> str:
    error = found["standard_error"]
    return f"{100 * found['mean']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
