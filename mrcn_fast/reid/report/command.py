"""`mrcn-fast report`: a page about trained runs of one data set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import Field
from rich.progress import Progress

from mrcn_fast.block import MODALITIES
from mrcn_fast.dispatch import choose_for
from mrcn_fast.outputs import check_file
from mrcn_fast.reid.console import progress_bars
from mrcn_fast.reid.evaluation.results import ResultError
from mrcn_fast.reid.evaluation.trained import EvaluationOptions, Trained
from mrcn_fast.reid.kinds import NUMPY, Count, PathText
from mrcn_fast.reid.models.blocks import AnyBlock, RestitutionCompensation
from mrcn_fast.reid.paper.figures import titles_of
from mrcn_fast.reid.report.charts import BlockTimes
from mrcn_fast.reid.report.page import Network, Subject, choose_subject, write_page
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.journal import METRICS_NAME, read_lines

SHOWS: Final = {
    "baseline": "A two-stream ResNet without a block",
    "snr": "With SNR's block",
    "mrm": "With the restitution of MRCN's block alone",
    "mcm": "With the compensation of MRCN's block alone",
    "mrcn": "With MRCN's block",
}
_ROUNDS: Final = 7
_LONGEST_SECONDS: Final = 5.0


@dataclass(kw_only=True)
class ReportOptions(EvaluationOptions):
    """What a report shows, and how the networks are opened. Raises SettingError for a value that is unfit."""

    queries: Count = 4
    """Queries with a ranking list, each of another person, drawn by `seed`."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1), NUMPY] = 0
    """Seed of the queries."""
    overwrite: bool = False
    """Replace the file `out`, which is refused otherwise."""


@check_arguments
def write_report(
    runs: Sequence[PathText],
    data: PathText,
    out: PathText = "runs/report.html",
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Write one HTML page about trained runs of a data set; it needs no other file.

    The page has images of the training people, the scores of the headline search as `mrcn-fast test` gives
    them, the curves of the training, the cumulative matching curves (CMC), the distances within and between
    people and ranking lists of the first and the last run, and the block's time against plain PyTorch.

    Args:
        runs: folders that `mrcn-fast train` wrote, or their checkpoints; the first is what the others are
            compared with
        data: root of the data set's tree
        out: the page's file
        progress: bars to add to; by default this function shows its own
        options: the fields of `ReportOptions`

    Returns:
        the path of the page

    Raises:
        CheckpointError, DatasetError: as `score_checkpoint` raises them
        ResultError: before anything is computed, for an existing file, unless `overwrite`
        OSError: where the file can't be written

    Example:
        >>> write_report(["runs/regdb-baseline", "runs/regdb-mrcn"], "RegDB", "page.html")  # doctest: +SKIP
    """
    chosen = ReportOptions(**options)
    if not runs:
        raise ValueError("got runs=[], expected at least one")
    path = Path(out)
    check_file(path, "the report")
    if path.exists() and not chosen.overwrite:
        raise ResultError(f"{path}: is there already. Give another file (--out), or replace it (--overwrite)")
    opened = [chosen.open(run, data) for run in runs]
    subject = choose_subject(
        opened[0].dataset,
        queries=chosen.queries,
        seed=chosen.seed,
        skip_unreadable=chosen.skip_unreadable,
        workers=chosen.workers,
    )
    with progress_bars() if progress is None else nullcontext(progress) as bars:
        networks = [
            _network(title, trained, chosen, subject, bars)
            for title, trained in zip(titles_of(opened), opened, strict=True)
        ]
        block = next(filter(None, map(time_block, reversed(opened))), None)
    write_page(path, "Person re-identification: a report", subject, networks, block)
    return path


def _network(
    title: str, trained: Trained, chosen: ReportOptions, subject: Subject, bars: Progress
) -> Network:
    """What the page shows of a trained network."""
    shows = f"{SHOWS[trained.config.model]}, {trained.state.step:,} training steps"
    features = {
        modality: chosen.features(trained, subject.images[modality], modality, bars)
        for modality in MODALITIES
    }
    return Network(title, shows, read_lines(trained.path.with_name(METRICS_NAME)), features)


def time_block(trained: Trained) -> BlockTimes | None:
    """Measure the forward and backward pass of a network's first block, on maps of a training batch's size.

    The fused and the plain block take turns for seven rounds, or for five seconds.

    Returns:
        the medians; None for a network without MRCN's block
    """
    blocks = [block for block in trained.reid_model.blocks if isinstance(block, RestitutionCompensation)]
    if not blocks:
        return None
    config, device = trained.config, trained.fabric.device
    images = torch.zeros(1, 3, config.height, config.width, device=device)
    with torch.no_grad(), trained.fabric.autocast():
        maps = trained.reid_model.trunk.stem(images, "visible")
        maps = trained.reid_model.trunk.layers(maps, 1, trained.reid_model.stages[0])
    shape = (config.identities * config.images, *maps.shape[1:])
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    v, n = (
        torch.randn(shape, device=device, dtype=maps.dtype).contiguous(memory_format=layout).requires_grad_()
        for _ in range(2)
    )
    seconds: dict[str, list[float]] = {"fused": [], "reference": []}
    begun = time.perf_counter()
    for round_ in range(_ROUNDS + 1):
        for name, taken in seconds.items():
            taken.append(_pass_seconds(blocks[0], v, n, None if name == "fused" else name))
        if round_ and time.perf_counter() - begun > _LONGEST_SECONDS:
            break
    # The first round warms up.
    fused, plain = (1000 * statistics.median(taken[1:]) for taken in seconds.values())
    backend = choose_for(None, v, config.gate)
    return BlockTimes(fused, plain, backend, device.type, " × ".join(map(str, shape)))


def _pass_seconds(block: AnyBlock, v: torch.Tensor, n: torch.Tensor, backend: str | None) -> float:
    """The seconds of a forward and backward pass on a backend; the block then has its own again."""
    own, block.backend = block.backend, backend
    try:
        _wait(v.device)
        begun = time.perf_counter()
        maps = block.first(v, n).maps
        torch.autograd.grad(maps, (v, n), torch.ones_like(maps))
        _wait(v.device)
        return time.perf_counter() - begun
    finally:
        block.backend = own


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
