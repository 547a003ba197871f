"""Loggers of a run besides metrics.jsonl: a CSV file or TensorBoard, through Lightning Fabric's loggers."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from lightning_fabric.loggers.csv_logs import CSVLogger
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor

from mrcn_fast.reid.data.types import Modality, Sample, Search
from mrcn_fast.reid.evaluation.distances import distances_of
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.journal import StepResult
from mrcn_fast.reid.training.run_folder import CSV_NAME

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUERIES: Final = 4  # with a ranking list in TensorBoard
_HEIGHT: Final = 96  # of their images in pixels


class RunLog:
    """Sends the lines of a run's journal to a logger, and to TensorBoard ranking lists too.

    The names of the values are `train/loss`, `train/lr`, `train/images_per_second` and so on, and
    `validation/SEARCH/rank1` and so on. `validation/distance_within`, `validation/distance_between` and
    `validation/delta` are the mean distances of visible-infrared pairs of test images of one person and of
    two people, and their difference, which is the paper's δ. Features have length 1 for them.

    Args:
        config: of the run; `logger` says which logger, in the run's folder
        step: the steps that the run has taken; what the logger has after them is dropped
        processes: the number of processes of the run, of which the first one logs
    """

    def __init__(self, config: TrainConfig, step: int = 0, processes: int = 1) -> None:
        self._images = 2 * config.identities * config.images * config.accumulate * processes
        self._seed = config.seed
        width = max(1, round(_HEIGHT * config.width / config.height))
        self._size = (_HEIGHT, width)
        self._logger = _opened(config.logger, Path(config.out), step)

    def line(self, line: Mapping[str, Any]) -> None:
        """Send a line of the journal, of steps or of a validation."""
        values = _of_validation(line) if "validation" in line else self._of_steps(line)
        self._logger.log_metrics(values, line["step"])

    def features(self, step: int, searches: Sequence[Search], features: Mapping[Sample, Tensor]) -> None:
        """Send the distances of a validation's features, and to TensorBoard ranking lists of four queries."""
        images: dict[Modality, list[Sample]] = {
            modality: [sample for sample in features if sample.modality == modality]
            for modality in ("visible", "infrared")
        }
        stacked = {
            modality: torch.stack([features[sample] for sample in side]) for modality, side in images.items()
        }
        found = distances_of(images, stacked)
        values = {"distance_within": found.intra_mean, "distance_between": found.inter_mean}
        values["delta"] = found.delta
        self._logger.log_metrics({f"validation/{name}": value for name, value in values.items()}, step)
        if isinstance(self._logger, TensorBoardLogger):
            search = next((s for s in searches if s.query[0].modality == "infrared"), searches[0])
            figure = self._ranking(search, images, stacked)
            self._logger.experiment.add_figure(f"validation/{search.name}", figure, step)

    def close(self) -> None:
        """Write what the logger still keeps."""
        self._logger.finalize("success")

    def _of_steps(self, line: Mapping[str, float]) -> dict[str, float]:
        values = {name: line[name] for name in (*StepResult._fields, "lr")}
        values["images_per_second"] = self._images / max(line["step_seconds"] + line["wait_seconds"], 1e-9)
        return {f"train/{name}": value for name, value in values.items()}

    def _ranking(
        self,
        search: Search,
        images: Mapping[Modality, Sequence[Sample]],
        features: Mapping[Modality, Tensor],
    ) -> Figure:
        from mrcn_fast.reid.paper import plots
        from mrcn_fast.reid.paper.figures import LISTED, choose_queries, pictures_of, ranking_of

        query = [search.query[row] for row in choose_queries(search, _QUERIES, None, self._seed)]
        lists = ranking_of(images, features, search, query)
        rows = pictures_of(query, search.galleries[0], lists, self._size)
        return plots.draw_rankings({search.name.replace("-", " "): rows}, count=LISTED)


def check_logger(name: Literal["none", "csv", "tensorboard"]) -> None:
    """Raise ConfigError for a logger whose package is not installed."""
    if name == "tensorboard":
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ModuleNotFoundError:
            raise ConfigError(
                "got logger='tensorboard', and TensorBoard is not installed: pip install tensorboard. "
                "--logger csv needs no package"
            ) from None


def _opened(name: str, out: Path, step: int) -> Logger:
    if name == "csv":
        # Fabric's logger begins its file anew.
        kept = _rows(out / CSV_NAME, step)
        logger = CSVLogger(out, name="csv", version="", flush_logs_every_n_steps=1)
        for row in kept:
            logger.log_metrics(row, int(row["step"]))
        return logger
    return TensorBoardLogger(out, name="tensorboard", version="", purge_step=step + 1 if step else None)


def _rows(path: Path, step: int) -> list[dict[str, Tensor | float]]:
    """Take the rows up to a step out of a CSV file, which is removed. A row that was cut is left out."""
    if not path.is_file():
        return []
    rows: list[dict[str, Tensor | float]] = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(ValueError):
                rows.append({name: float(value) for name, value in row.items() if value})
    path.unlink()
    return [row for row in rows if row["step"] <= step]


def _of_validation(line: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"validation/{search}/{score}": value
        for search, scores in line["searches"].items()
        for score, value in scores.items()
    }
