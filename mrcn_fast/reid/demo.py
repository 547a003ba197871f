"""`mrcn-fast demo`: synthetic data, both models trained alike and scored, and what the block costs."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mrcn_fast.dispatch import choose
from mrcn_fast.reid.batches import Batch
from mrcn_fast.reid.checkpoint import write_json
from mrcn_fast.reid.config import TrainConfig
from mrcn_fast.reid.console import progress_bars
from mrcn_fast.reid.data import SYSUMM01, write_sysu
from mrcn_fast.reid.model import ModelName
from mrcn_fast.reid.scoring import HEADLINE, score_checkpoint, score_trial
from mrcn_fast.reid.training import Trainer

COLUMNS = {"rank1": "Rank-1", "rank10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}
TITLES: dict[ModelName, str] = {"baseline": "two-stream baseline", "mrcn": "MRCN"}


@dataclasses.dataclass
class DemoConfig:
    """The demo's size: what two cores train from random weights in two minutes. Both models get the same."""

    out: str = "runs/demo"
    """Folder for everything the demo writes."""
    identities: int = 72
    """People in the synthetic data set."""
    test_identities: int = 16
    """Those of them who are searched for; training never sees them."""
    images_per_camera: int = 4
    """Images of a person in each of the six cameras."""
    modality_gap: float = 0.6
    """How far infrared differs from visible. At 1 this short a training learns little that holds in both."""
    height: int = 48
    """Image height in pixels."""
    width: int = 24
    """Image width in pixels."""
    steps: int = 130
    """Training steps of each model."""
    trials: int = 10
    """Gallery draws that the scores are averaged over."""
    rounds: int = 7
    """Rounds of the interleaved time measurement."""
    seed: int = 0
    """Seed of data, weights and batches."""
    accelerator: str = "auto"
    """Where to compute, as lightning-fabric names it."""


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo, print its table, and return the results as results.json holds them.

    Writes under `config.out`: data/ (SYSU-MM01's tree), baseline/ and mrcn/ (checkpoint, metrics, scores),
    losses.png, results.json. An earlier demo there is replaced. Raises DatasetError when `out`/data holds
    anything but a synthetic tree.
    """
    out = Path(config.out)
    seconds: dict[str, float] = {}
    with progress_bars() as bars:
        with _timed(seconds, "data"):
            tree = _write_data(config, out / "data", bars)
        trainers: dict[ModelName, Trainer] = {}
        scores: dict[str, dict[str, float]] = {"chance": _chance(tree, config)}
        for model in TITLES:
            trainers[model] = trainer = Trainer(train_config(config, model, tree))
            with _timed(seconds, f"training {model}"):
                checkpoint = trainer.fit(overwrite=True, progress=bars)
            with _timed(seconds, f"scoring {model}"):
                result = score_checkpoint(
                    checkpoint, tree, trials=config.trials, accelerator=config.accelerator, progress=bars
                )
            scores[model] = result["searches"][result["headline"]]["mean"]
        with _timed(seconds, "measuring"):
            times = measure(trainers, config.rounds, bars)
    _plot(trainers, out / "losses.png")
    results = {
        "scores": scores,
        "milliseconds": times,
        "block_share": {
            name: times[f"block {name}"] / times[f"mrcn {name}"] for name in ("automatic", "reference")
        },
        "backend": choose(None, trainers["mrcn"].fabric.device.type, torch.float32),
        "seconds": seconds,
        "config": dataclasses.asdict(config),
    }
    write_json(out / "results.json", results)
    # Where nobody watches, a log keeps the table in one piece.
    Console(width=None if sys.stdout.isatty() else 110).print(_table(results))
    print(f"Everything is in {out}: data/, baseline/, mrcn/, losses.png, results.json")
    return results


def train_config(config: DemoConfig, model: ModelName, tree: Path) -> TrainConfig:
    """The training configuration of one of the two models; they differ in `model` and `out` alone."""
    batches = max(1, config.steps // 10)
    return TrainConfig(
        data=str(tree),
        out=str(Path(config.out) / model),
        model=model,
        depth=18,
        height=config.height,
        width=config.width,
        # The paper's 16 images a modality, but more people: a short training gains more from those.
        identities=8,
        images=2,
        padding=3,
        batches=batches,
        epochs=-(-config.steps // batches),
        steps=config.steps,
        # The paper's schedule in ten epochs, at a rate for random weights: the trunk learns as fast as the
        # head.
        warmup_epochs=1,
        milestones=(7, 9),
        lr=0.03,
        warmup_lr=0.003,
        trunk_lr=1.0,
        # On a random trunk the sum over eight identities outweighs the other losses tenfold and drives the
        # two modalities apart before anything is learned; the mean, the authors' later habit, does not.
        cqc_reduction="mean",
        seed=config.seed,
        accelerator=config.accelerator,
        workers=0,
        log_every=max(1, config.steps // 60),
    )


class _timed:
    """Adds the seconds its body takes to `into[name]`."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = round(time.perf_counter() - self.begun, 2)


def _write_data(config: DemoConfig, root: Path, bars: Progress) -> Path:
    task = bars.add_task("images", total=None, status="")
    return write_sysu(
        root,
        identities=config.identities,
        test_identities=config.test_identities,
        images_per_camera=config.images_per_camera,
        image_size=(config.height, config.width),
        seed=config.seed,
        modality_gap=config.modality_gap,
        pose_spread=0.4,
        camera_style=0.4,
        progress=lambda done, total: bars.update(task, completed=done, total=total),
    )


def _chance(tree: Path, config: DemoConfig) -> dict[str, float]:
    """The scores of a random ranking under the same protocol."""
    search = SYSUMM01(tree).searches(trials=config.trials)[0]
    generator = torch.Generator().manual_seed(config.seed)
    rows = []
    for gallery in search.galleries:
        distance = torch.rand(len(search.query), len(gallery), generator=generator)
        rows.append(score_trial(distance, search.query, gallery, search.protocol))
    return {name: statistics.fmean(row[name] for row in rows) for name in HEADLINE}


def measure(trainers: dict[ModelName, Trainer], rounds: int, bars: Progress) -> dict[str, float]:
    """Milliseconds, medians of interleaved rounds: a step of each model; the block's forward + backward.

    Keys: "baseline", "mrcn automatic", "mrcn reference", "block automatic", "block reference". The block runs
    on the feature maps of a training batch. The weights of the trainers move on.
    """
    mrcn, baseline = trainers["mrcn"], trainers["baseline"]
    batch = next(iter(mrcn.batches.of(0)))
    block_inputs = _block_inputs(mrcn, batch)

    def with_backend(name: str | None, work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            mrcn.model.set_backend(name)
            mrcn.loss.cqc.backend = name
            return work()

        return run

    works: dict[str, Callable[[], object]] = {"baseline": lambda: baseline.step(batch)}
    for title, backend in (("automatic", None), ("reference", "reference")):
        works[f"mrcn {title}"] = with_backend(backend, lambda: mrcn.step(batch))
        works[f"block {title}"] = with_backend(backend, lambda: _block_pass(mrcn, *block_inputs))
    taken: dict[str, list[float]] = {name: [] for name in works}
    task = bars.add_task("measuring", total=rounds, status="")
    for _ in range(rounds):
        for name, work in works.items():
            _synchronize(mrcn.fabric.device)
            begun = time.perf_counter()
            work()
            _synchronize(mrcn.fabric.device)
            taken[name].append(time.perf_counter() - begun)
        bars.advance(task)
    return {name: round(1000 * statistics.median(values), 3) for name, values in taken.items()}


def _block_inputs(trainer: Trainer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stage 0 of a batch for both modalities, and a gradient of the six sets."""
    with torch.no_grad():
        v = trainer.model.trunk.stem(trainer.prepared(batch.visible, "visible"), "visible")
        n = trainer.model.trunk.stem(trainer.prepared(batch.infrared, "infrared"), "infrared")
    gradient = torch.randn(6 * len(v), *v.shape[1:], device=v.device).contiguous(memory_format=trainer.layout)
    return v.requires_grad_(), n.requires_grad_(), gradient


def _block_pass(trainer: Trainer, v: torch.Tensor, n: torch.Tensor, gradient: torch.Tensor) -> None:
    (block,) = trainer.model.blocks
    torch.autograd.grad(block.first(v, n).maps, (v, n, *block.parameters()), gradient)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(results: dict[str, Any]) -> Table:
    """The demo's table; scores in percent."""
    data, times = results["config"], results["milliseconds"]
    table = Table(
        title=f"Synthetic data, modality gap {data['modality_gap']}; SYSU-MM01's all-search, single-shot, "
        f"random draw, {data['trials']} trials;\nResNet-18 at {data['height']} x {data['width']} from random "
        f"weights, {data['steps']} steps",
        caption="the block's share of a training step: its forward and backward alone / the step",
    )
    table.add_column("")
    fused = f"share, {results['backend']}" if results["backend"] != "reference" else "share, fused"
    for name in (*COLUMNS.values(), "ms a step", fused, "share, reference"):
        table.add_column(name, justify="right")
    shares = results["block_share"]
    automatic = f"{100 * shares['automatic']:.1f} %" if results["backend"] != "reference" else "not built"
    cells = {
        "chance": ("", "", ""),
        "baseline": (f"{times['baseline']:.0f}", "", ""),
        "mrcn": (f"{times['mrcn automatic']:.0f}", automatic, f"{100 * shares['reference']:.1f} %"),
    }
    titles = {str(model): title for model, title in TITLES.items()}
    for row, scores in results["scores"].items():
        table.add_row(titles.get(row, row), *(f"{100 * scores[name]:.1f}" for name in COLUMNS), *cells[row])
    return table


def _plot(trainers: dict[ModelName, Trainer], path: Path) -> None:
    """The losses of both models over the steps, one panel a term."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    terms = {
        "identity": "identity loss",
        "triplet": "triplet loss",
        "cqc": "CQC loss",
        "accuracy": "accuracy",
    }
    figure, panels = pyplot.subplots(1, len(terms), figsize=(4 * len(terms), 3.2), layout="constrained")
    for panel, (term, title) in zip(panels, terms.items(), strict=True):
        for model, trainer in trainers.items():
            if term == "cqc" and model == "baseline":
                continue
            lines = trainer.journal.lines
            panel.plot([line["step"] for line in lines], [line[term] for line in lines], label=TITLES[model])
        panel.set(title=title, xlabel="step", ylim=(0, None))
        panel.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
