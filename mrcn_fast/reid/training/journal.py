"""The measurements of training steps, their journal on disk, and the warning of collapsed embeddings."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import FiniteFloat
from torch import Tensor

from mrcn_fast.files import append, write_atomically
from mrcn_fast.reid.settings import by_name, checked, record

if TYPE_CHECKING:
    from mrcn_fast.reid.training.loggers import RunLog

log = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
DAMAGED_NAME = "metrics.jsonl.damaged"

# Embeddings whose spread is below this share of their length have collapsed. Networks that learn from random
# weights were seen to reach 0.01, and pretrained networks stay far above.
COLLAPSED_SPREAD = 1e-3
# The share of a step's time from which waiting for its batch is worth a word.
_LONG_WAIT = 0.1


class StepResult(NamedTuple):
    """The measurements of a step: the total loss, its unweighted terms, accuracy and spread."""

    loss: float
    identity: float
    triplet: float
    cqc: float
    causality: float
    accuracy: float  # share of the samples of all sets that are classified correctly
    spread: float  # see `embedding_spread`

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self))


def embedding_spread(pooled: Tensor) -> Tensor:
    """Compute the spread of (parts, M, D) embeddings, a scalar.

    It is the root of their total variance, divided by the length of their mean. The parts of an image count
    as one embedding.
    """
    pooled = pooled.detach().float().transpose(0, 1).flatten(1)
    variance = pooled.var(dim=0, correction=0).sum()
    return (variance / pooled.mean(dim=0).square().sum().clamp_min(1e-24)).sqrt()


class CollapseWatch:
    """Logs a warning when embeddings have collapsed for 20 steps, and again every 1,000 steps after that."""

    def __init__(self) -> None:
        self._steps = 0

    def look(self, step: int, result: StepResult) -> bool:
        """Look at the result of a step; returns whether a warning was logged."""
        self._steps = self._steps + 1 if result.spread < COLLAPSED_SPREAD else 0
        if self._steps % 1000 != 20:
            return False
        log.warning(
            "step %d: the embeddings have collapsed: for %d steps their spread has been below %g of their "
            "length (now %.1e, triplet loss %.3f). Training seldom recovers from this: lower the learning "
            "rate, or try --soft-margin.",
            *(step, self._steps, COLLAPSED_SPREAD, result.spread, result.triplet),
        )
        return True


_MEANS = (*StepResult._fields, "step_seconds", "wait_seconds")
# The type of a line, as `checked` takes it.
LINE = record("line", {"step": int, "epoch": int, "lr": FiniteFloat, **dict.fromkeys(_MEANS, FiniteFloat)})
_SCORES = record("scores", dict.fromkeys(("rank1", "rank10", "rank20", "mAP", "mINP"), FiniteFloat))
# The same for the line of a validation.
VALIDATION = record(
    "validation",
    {"step": int, "epoch": int, "validation": str, "headline": str, "searches": by_name(_SCORES)},
)


class Journal:
    """The file metrics.jsonl, whose JSON lines have the means over some steps each.

    Besides the fields of StepResult, a line has step, epoch (from 0), lr, and the mean seconds per step
    (`step_seconds`) and of waiting for its batch (`wait_seconds`). The line of a validation has step, epoch,
    `validation` (the protocol in words), `headline` (the first search's name) and `searches`, which has the
    scores of each search. `lines` and `validations` have the content of the file.

    Of the processes of a run, all keep the lines, and one of them writes the file (`writes`). Where there
    is a `log`, it gets each line too.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.lines: list[dict[str, float]] = []
        self.validations: list[dict[str, Any]] = []
        self.log: RunLog | None = None
        self._steps: list[tuple[float, ...]] = []

    def add(self, result: StepResult, step_seconds: float, wait_seconds: float) -> None:
        """Add a step to the next line."""
        self._steps.append((*result, step_seconds, wait_seconds))

    def write(self, step: int, epoch: int, lr: float) -> None:
        """Write a line for the steps since the last line, if there are any."""
        if not self._steps:
            return
        means = (sum(column) / len(self._steps) for column in zip(*self._steps, strict=True))
        line = {"step": step, "epoch": epoch, "lr": lr, **dict(zip(_MEANS, means, strict=True))}
        self._steps.clear()
        self._append(self.lines, line)

    def write_validation(self, line: dict[str, Any]) -> None:
        """Write the line of a validation."""
        self._append(self.validations, line)

    def _append(self, lines: list[dict[str, Any]], line: dict[str, Any]) -> None:
        lines.append(line)
        if self.writes:
            append(self.path, f"{json.dumps(line)}\n".encode())
        if self.log is not None:
            self.log.line(line)

    def clear(self) -> None:
        """Remove the file of an earlier run, and the file of its damaged lines."""
        self._forget()
        if not self.writes:
            return
        self.path.unlink(missing_ok=True)
        self.damaged_path.unlink(missing_ok=True)

    @property
    def damaged_path(self) -> Path:
        """The file that damaged lines are moved to."""
        return self.path.with_name(DAMAGED_NAME)

    def return_to(self, step: int) -> None:
        """Read the file of an interrupted run, and drop the lines after `step`, which the run repeats.

        Lines that are damaged or out of order are moved to `damaged_path`, with a warning.
        """
        self._forget()
        if not self.path.exists():
            return
        damaged: dict[int, bytes] = {}
        kept = ""
        for number, text in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            line, lines = _line(text), self.lines
            if line is None:
                line, lines = _line(text, VALIDATION), self.validations
            if line is None or (lines and line["step"] <= lines[-1]["step"]):
                damaged[number] = text
            elif line["step"] <= step:
                lines.append(line)
                kept += json.dumps(line) + "\n"
        if not self.writes:
            return
        self._set_aside({number: text for number, text in damaged.items() if text})
        write_atomically(self.path, lambda file: file.write(kept.encode()))

    def _forget(self) -> None:
        self.lines.clear()
        self.validations.clear()
        self._steps.clear()

    def _set_aside(self, damaged: Mapping[int, bytes]) -> None:
        if not damaged:
            return
        append(self.damaged_path, b"".join(text + b"\n" for text in damaged.values()))
        log.warning(
            "%s: damaged in line %s: moved to %s. The run goes on without it",
            *(self.path, ", ".join(map(str, damaged)), self.damaged_path.name),
        )

    def summary(self) -> str:
        """The last line in words."""
        if not self.lines:
            return "nothing measured yet"
        last = self.lines[-1]
        step, wait = last["step_seconds"], last["wait_seconds"]
        loading = ""
        if wait > _LONG_WAIT * (step + wait):
            loading = (
                f" after {wait * 1000:.0f} ms of waiting for its batch (loading is the bottleneck: try more "
                "--workers, or --cache FOLDER)"
            )
        return (
            f"loss {last['loss']:.3f} (identity {last['identity']:.3f}, triplet {last['triplet']:.3f}, "
            f"cqc {last['cqc']:.3f}), accuracy {last['accuracy']:.2f}, spread {last['spread']:.3f}, "
            f"{step * 1000:.0f} ms per step{loading}, lr {last['lr']:g}"
        )


def read_lines(path: Path) -> list[dict[str, float]]:
    """Read the whole lines about steps in a run's metrics.jsonl; where there is no file, there are none."""
    texts = path.read_bytes().split(b"\n") if path.is_file() else []
    return [line for line in map(_line, texts) if line is not None]


def _line(text: bytes, kind: Any = LINE) -> dict[str, Any] | None:
    """Read the values of a line of the file; None where it is damaged or of another kind."""
    try:
        line: dict[str, Any] = checked(kind, json.loads(text), "")
    except (ValueError, RecursionError):  # JSON, UTF-8 or a value is wrong; brackets are nested too deeply
        return None
    return line
