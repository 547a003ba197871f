"""Scoring a checkpoint on a data set's test images: `mrcn-fast test`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from rich.progress import Progress
from torch import Tensor

from mrcn_fast.reid.checkpoint import (
    CHECKPOINT_NAME,
    build_model,
    check_data,
    data_identity,
    load_checkpoint,
    write_json,
)
from mrcn_fast.reid.console import progress_bars
from mrcn_fast.reid.data import Sample
from mrcn_fast.reid.evaluation import score
from mrcn_fast.reid.extraction import extract
from mrcn_fast.reid.model import ReIDModel, use_layout
from mrcn_fast.reid.training import DATASETS

HEADLINE = ("rank1", "rank10", "rank20", "mAP", "mINP")


def score_checkpoint(
    checkpoint: str | Path,
    data: str | Path,
    *,
    mode: str = "all",
    shots: int = 1,
    trials: int = 10,
    draw: str = "random",
    other_data: bool = False,
    backend: str | None = None,
    accelerator: str = "auto",
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a checkpoint, infrared query against visible gallery, and write the result beside it as JSON.

    Everything about the network comes from the checkpoint. A score is the mean over the trials, with their
    standard deviation (of a sample); the JSON's name says mode, shots and draw.

    Args:
        checkpoint: the file `mrcn-fast train` wrote, or the folder it is in
        data: root of the data set's tree
        mode: all or indoor: the gallery's cameras
        shots: gallery images of an identity and camera: 1, or 10 for multi-shot
        trials: gallery draws to average over
        draw: how a gallery is drawn: random (the field's PyTorch code) or official (rand_perm_cam.mat)
        other_data: score on a tree other than the one trained on, which is refused else
        backend: backend of the block; none: the best that serves
        accelerator: where to compute, as lightning-fabric names it
        batch_size: images a pass
        workers: processes that decode images; 0: this one
        progress: bars to add to, in place of own ones

    Returns the result, with its file as "path". Raises CheckpointError where the checkpoint or, unless
    `other_data`, the data set isn't the one trained on, DatasetError and ValueError for what the data set
    can't give.
    """
    if trials < 1:
        raise ValueError(f"got trials={trials}, expected at least 1")
    path = Path(checkpoint)
    path = path / CHECKPOINT_NAME if path.is_dir() else path
    state = load_checkpoint(path)
    config = state.config
    dataset = DATASETS[config.dataset](data)
    if not other_data:
        check_data(path, state, data_identity(config.dataset, dataset.root, dataset.training()))
    query = list(dataset.query())
    galleries = [dataset.gallery(mode, shots=shots, trial=trial, draw=draw) for trial in range(trials)]
    # The trials share most of their images; each is read and passed through the network once.
    places: dict[Path, int] = {}
    images: list[Sample] = []
    for sample in (sample for gallery in galleries for sample in gallery):
        if sample.path not in places:
            places[sample.path] = len(images)
            images.append(sample)

    fabric = Fabric(accelerator=accelerator, devices=1, precision=config.precision)
    model = build_model(path, state, backend)
    use_layout(model, config.channels_last)
    # The wrapper brings device and precision, and must be told of methods besides forward.
    fabric_module = fabric.setup_module(model)
    fabric_module.mark_forward_method("extract")
    wrapped = cast(ReIDModel, fabric_module)
    own = progress is None
    bars = progress_bars() if progress is None else progress
    if own:
        bars.start()
    task = bars.add_task(f"features of {config.model}", total=len(query) + len(images), status="")
    try:
        options: dict[str, Any] = dict(
            batch_size=batch_size,
            workers=workers,
            advance=lambda count: bars.advance(task, count),
        )
        query_features = extract(wrapped, query, "infrared", config, **options)
        gallery_features = extract(wrapped, images, "visible", config, **options)
    finally:
        if own:
            bars.stop()

    rows = []
    for gallery in galleries:
        index = torch.tensor([places[sample.path] for sample in gallery], device=gallery_features.device)
        # The field's distance: minus the dot product of features whose sets have length 1.
        distance = -(query_features @ gallery_features[index].T)
        rows.append(score_trial(distance, query, gallery, config.dataset))
    result = {
        "dataset": config.dataset,
        "mode": mode,
        "shots": shots,
        "draw": draw,
        "trials": trials,
        "queries": len(query),
        "valid_queries": [row["valid_queries"] for row in rows],
        "gallery_images": len(galleries[0]),
        "mean": {name: statistics.fmean(row[name] for row in rows) for name in HEADLINE},
        "std": {
            name: statistics.stdev(row[name] for row in rows) if trials > 1 else 0.0 for name in HEADLINE
        },
        "per_trial": rows,
        "checkpoint": str(path),
        "step": state.step,
        "epoch": state.epoch,
        "trained_on": state.data._asdict(),
        "data": str(data),
        "config": config.as_dict(),
    }
    written = path.with_name(f"test-{mode}-{shots}shot-{draw}.json")
    result["path"] = str(written)
    write_json(written, result)
    return result


def score_trial(distance: Tensor, query: list[Sample], gallery: list[Sample], dataset: str) -> dict[str, Any]:
    """Scores of one trial under the data set's protocol, from (queries, gallery) distances."""
    scores = score(
        distance,
        torch.tensor([sample.identity for sample in query]),
        torch.tensor([sample.identity for sample in gallery]),
        query_cameras=torch.tensor([sample.camera for sample in query]),
        gallery_cameras=torch.tensor([sample.camera for sample in gallery]),
        protocol=PROTOCOLS[dataset],
        max_rank=20,
    )
    ranks = {f"rank{rank}": float(scores.cmc[rank - 1]) for rank in (1, 10, 20)}
    return ranks | {"mAP": scores.mAP, "mINP": scores.mINP, "valid_queries": scores.valid_queries}


PROTOCOLS = {"sysu-mm01": "sysu"}


def describe(result: dict[str, Any]) -> str:
    """A result in a few lines: what was measured, then the figures in percent, mean ± standard deviation."""
    valid = sorted(set(result["valid_queries"]))
    valid_text = str(valid[0]) if len(valid) == 1 else f"{valid[0]} to {valid[-1]}"
    names = {"rank1": "Rank-1", "rank10": "Rank-10", "rank20": "Rank-20"}
    lines = [
        f"{result['dataset']}, {result['mode']}-search, {result['shots']} shot{'s' * (result['shots'] > 1)}, "
        f"{result['draw']} draw, {result['trials']} trial{'s' * (result['trials'] > 1)}, "
        f"{valid_text} of {result['queries']} queries valid, {result['gallery_images']} gallery images each"
    ]
    lines += [
        f"  {names.get(name, name):8s}{100 * result['mean'][name]:6.2f} ± {100 * result['std'][name]:.2f}"
        for name in HEADLINE
    ]
    return "\n".join([*lines, f"written to {result['path']}"])
