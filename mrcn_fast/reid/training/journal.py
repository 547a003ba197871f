"""What training measures: a step's figures, their journal on disk, and the watch for collapsed embeddings."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import FiniteFloat
from torch import Tensor

from mrcn_fast.files import append, write_atomically
from mrcn_fast.reid.settings import checked, record

log = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
DAMAGED_NAME = "metrics.jsonl.damaged"

# Embeddings whose spread falls below this share of their length have collapsed. Networks that learn from
# random weights were seen down to 0.01, pretrained ones are far above.
COLLAPSED_SPREAD = 1e-3


class StepResult(NamedTuple):
    """What one step measured: the total loss and its unweighted parts, and the spread of the embeddings."""

    loss: float
    identity: float
    triplet: float
    cqc: float
    causality: float
    accuracy: float  # share of all sets' samples that the classifier names right
    spread: float  # see `embedding_spread`

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self))


def embedding_spread(pooled: Tensor) -> Tensor:
    """Spread of (parts, M, D) embeddings, a scalar: root of their total variance over their mean's length.

    The parts of an image count as one embedding.
    """
    pooled = pooled.detach().float().transpose(0, 1).flatten(1)
    variance = pooled.var(dim=0, correction=0).sum()
    return (variance / pooled.mean(dim=0).square().sum().clamp_min(1e-24)).sqrt()


class CollapseWatch:
    """Warns when the embeddings have been a point for 20 steps, and again every 1,000 while it lasts."""

    def __init__(self) -> None:
        self._steps = 0

    def look(self, step: int, result: StepResult) -> bool:
        """Take in a step's result; whether it warned."""
        self._steps = self._steps + 1 if result.spread < COLLAPSED_SPREAD else 0
        if self._steps % 1000 != 20:
            return False
        log.warning(
            "step %d: the embeddings have collapsed: for %d steps their spread has been below %g of their "
            "length (now %.1e, triplet loss %.3f). Training seldom recovers from this: lower the learning "
            "rate, or try --soft_margin true.",
            *(step, self._steps, COLLAPSED_SPREAD, result.spread, result.triplet),
        )
        return True


_MEANS = (*StepResult._fields, "step_seconds", "wait_seconds")
# The kind of a line.
LINE = record("line", {"step": int, "epoch": int, "lr": FiniteFloat, **dict.fromkeys(_MEANS, FiniteFloat)})


class Journal:
    """metrics.jsonl: a JSON line for each stretch of steps, with the means over it.

    `lines` holds what the file does. Besides StepResult's fields a line has step, epoch (from 0), lr, and the
    mean seconds a step took (`step_seconds`) and waited for its batch (`wait_seconds`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, float]] = []
        self._steps: list[tuple[float, ...]] = []

    def add(self, result: StepResult, step_seconds: float, wait_seconds: float) -> None:
        """Take in one step."""
        self._steps.append((*result, step_seconds, wait_seconds))

    def write(self, step: int, epoch: int, lr: float) -> None:
        """Write a line for the steps since the one before; nothing where there are none."""
        if not self._steps:
            return
        means = (sum(column) / len(self._steps) for column in zip(*self._steps, strict=True))
        line = {"step": step, "epoch": epoch, "lr": lr, **dict(zip(_MEANS, means, strict=True))}
        self._steps.clear()
        self.lines.append(line)
        append(self.path, f"{json.dumps(line)}\n".encode())

    def clear(self) -> None:
        """Begin anew: the file of an earlier run goes, with what was damaged of it."""
        self.lines.clear()
        self.path.unlink(missing_ok=True)
        self.damaged_path.unlink(missing_ok=True)

    @property
    def damaged_path(self) -> Path:
        """Where damaged lines of the file are set aside."""
        return self.path.with_name(DAMAGED_NAME)

    def return_to(self, step: int) -> None:
        """Read the file of an interrupted run and drop the lines after `step`: those steps are run again.

        Lines that are damaged, or that don't follow the ones before, go to `damaged_path`, with a warning.
        """
        self.lines.clear()
        if not self.path.exists():
            return
        damaged: dict[int, bytes] = {}
        reached = 0.0
        for number, text in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            line = _line(text)
            if line is None or line["step"] <= reached:
                damaged[number] = text
                continue
            reached = line["step"]
            if reached <= step:
                self.lines.append(line)
        self._set_aside({number: text for number, text in damaged.items() if text})
        kept = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_atomically(self.path, lambda file: file.write(kept.encode()))

    def _set_aside(self, damaged: Mapping[int, bytes]) -> None:
        if not damaged:
            return
        append(self.damaged_path, b"".join(text + b"\n" for text in damaged.values()))
        log.warning(
            "%s: damaged in line %s: moved to %s. The run goes on without it",
            *(self.path, ", ".join(map(str, damaged)), self.damaged_path.name),
        )

    def summary(self) -> str:
        """The last line for people."""
        if not self.lines:
            return "nothing measured yet"
        last = self.lines[-1]
        return (
            f"loss {last['loss']:.3f} (identity {last['identity']:.3f}, triplet {last['triplet']:.3f}, "
            f"cqc {last['cqc']:.3f}), accuracy {last['accuracy']:.2f}, spread {last['spread']:.3f}, "
            f"{last['step_seconds'] * 1000:.0f} ms a step, lr {last['lr']:g}"
        )


def _line(text: bytes) -> dict[str, float] | None:
    """The values of a line of the file; none where it is damaged."""
    try:
        line: dict[str, float] = checked(LINE, json.loads(text), "")
    except (ValueError, RecursionError):  # of JSON, of UTF-8, of a value; of nested brackets
        return None
    return line
