"""`mrcn-fast demo`: synthetic data, baseline and MRCN trained alike and scored, and what the block costs."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, cast

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from mrcn_fast.block import MODALITIES
from mrcn_fast.dispatch import choose
from mrcn_fast.files import write_json
from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.console import progress_bars
from mrcn_fast.reid.data import RegDB
from mrcn_fast.reid.data.types import Modality
from mrcn_fast.reid.devices import check_device
from mrcn_fast.reid.evaluation.extraction import extract
from mrcn_fast.reid.evaluation.results import HEADLINE, check_free
from mrcn_fast.reid.evaluation.scoring import score_checkpoint, score_trial
from mrcn_fast.reid.kinds import NUMPY, Count, Height, ImagesOfPerson, PathText, Width
from mrcn_fast.reid.report import BlockTimes, Network, Subject, choose_subject, write_page
from mrcn_fast.reid.training.batches import Batch
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.losses import ReIDLoss
from mrcn_fast.reid.training.pretraining import SyntheticConfig, pretrain
from mrcn_fast.reid.training.run_folder import held
from mrcn_fast.reid.training.trainer import Trainer

log = logging.getLogger(__name__)

RESULTS_NAME, PAGE_NAME = "results.json", "index.html"
_RANDOM_RANKINGS: Final = 10
COLUMNS = {"rank1": "Rank-1", "rank10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}


class Contender(NamedTuple):
    """A trained row of the table: its title, the values that only it has, and the sentence of what it is."""

    title: str
    values: dict[str, Any]
    shows: str


CONTENDERS: Final = {
    "baseline": Contender(
        "two-stream baseline", {"model": "baseline"}, "A ResNet with a stem for each modality"
    ),
    "mrcn-without-cqc": Contender(
        "MRCN without CQC", {"model": "mrcn", "cqc_weight": 0.0}, "With MRCN's block behind the stem"
    ),
    "mrcn": Contender("MRCN", {"model": "mrcn"}, "With the CQC loss on unit features too"),
}


# A batch has more people than the paper's 4, because a short training gains more from people than from
# images.
BATCH_IDENTITIES: Final = 8
# Identities have four digits in a synthetic tree, and half of them are for the training.
People = Annotated[int, Field(ge=2 * BATCH_IDENTITIES, le=9999), NUMPY]
# The pretraining takes the seed after it.
_Seed = Annotated[int, Field(ge=0, le=2**63 - 2), NUMPY]


@dataclasses.dataclass(kw_only=True)
class DemoConfig(SyntheticConfig):
    """The demo's size, which two cores train in 6 to 15 minutes. All networks get the same."""

    out: PathText = "runs/demo"
    identities: People = 112
    images: ImagesOfPerson = 8
    # Images of 48 x 16 at a modality gap of 0.6 take half the time. The scores then have the paper's order at
    # seeds 10 to 12, but not at seeds 0 and 1.
    height: Height = 48
    width: Width = 24
    pretraining_identities: People = 240
    pretraining_steps: Count = 300
    steps: Count = 240
    rounds: Count = 7
    """Rounds of the interleaved time measurement."""
    seed: _Seed = 0
    """Seed of data, weights and batches. The people of the pretraining are those of the seed after it."""


def run_demo(config: DemoConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Run the demo, print its table, and return the results as results.json holds them.

    Writes under `config.out`: data/ (RegDB's tree), pretraining/ (a tree, a checkpoint, weights.pth), a
    folder for each of `CONTENDERS` (checkpoint, metrics, scores), results.json, and index.html, a page about
    all of it that needs no other file. An earlier demo of the same values is replaced. Other files with these
    names are replaced only with `overwrite`.

    Raises:
        ResultError: for other files with these names, without `overwrite`
        FolderInUseError: where another demo runs in this folder
        DatasetError: where `out`/data or `out`/pretraining/data holds anything but a synthetic tree
    """
    out = Path(config.out)
    check_folder(out, "the demo")
    # Values that a network can't be trained with are refused before any data is written.
    configs = [train_config(config, name, out, out) for name in CONTENDERS]
    check_device(config.accelerator, configs[0].precision)
    made_of = {name: value for name, value in dataclasses.asdict(config).items() if name != "out"}
    others = [out / name for name in ("data", "pretraining", *CONTENDERS, PAGE_NAME)]
    with held(out, "runs a demo"):
        if not overwrite:
            check_free(out / RESULTS_NAME, others, made_of)
        # This record is written first, so that an interrupted demo may be run again.
        write_json(out / RESULTS_NAME, {"made_of": made_of})
        try:
            results = {"made_of": made_of} | _results(config)
        except (KeyboardInterrupt, SystemExit):
            log.warning("The demo was stopped. Run it again: it starts anew, and replaces what it wrote")
            raise
        write_json(out / RESULTS_NAME, results)
    # A log gets a fixed width, so that the lines of the table stay whole.
    console = Console(width=None if _is_watched() else 110)
    with console.capture() as table:
        console.print(_table(results))
    print(table.get(), end="")
    print(f"{out / PAGE_NAME} shows what was trained and found: open it in a browser")
    return results


def _results(config: DemoConfig) -> dict[str, Any]:
    """Make data, train, score, measure and write the page: everything but the table."""
    seconds: dict[str, float] = {}
    trainers: dict[str, Trainer] = {}
    features: dict[str, dict[Modality, Tensor]] = {}
    pairings: dict[str, dict[str, dict[str, float]]] = {}
    with progress_bars() as bars:
        with _timed(seconds, "data"):
            tree = config.write_people(config.seed, bars)
        with _timed(seconds, "pretraining"):
            weights = _pretrained(config, bars)
        scores = {"chance": _chance(tree, config.seed)}
        subject = choose_subject(RegDB(tree), seed=config.seed)
        for name in CONTENDERS:
            trainers[name] = trainer = Trainer(train_config(config, name, tree, weights))
            with _timed(seconds, f"training {name}"):
                checkpoint = trainer.fit(overwrite=True, progress=bars)
            with _timed(seconds, f"scoring {name}"):
                result = score_checkpoint(checkpoint, tree, accelerator=config.accelerator, progress=bars)
                features[name] = _features(trainer, subject)
            search = result["searches"][result["headline"]]
            scores[name] = search["mean"]
            pairings[name] = {pairing: of["mean"] for pairing, of in search["pairings"].items()}
        with _timed(seconds, "measuring"):
            times = measure(trainers, config.rounds, bars)
    results = {
        "scores": scores,
        "pairings": pairings,
        "distances": {name: _distances(of, subject) for name, of in features.items()},
        "milliseconds": times,
        "block_share": {
            name: times[f"block {name}"] / times[f"mrcn {name}"] for name in ("automatic", "reference")
        },
        "backend": choose(None, trainers["mrcn"].fabric.device.type, torch.float32),
        "seconds": seconds,
    }
    networks = [
        Network(of.title, of.shows, trainers[name].journal.lines, features[name])
        for name, of in CONTENDERS.items()
    ]
    block = _block_times(results, trainers["mrcn"])
    page = Path(config.out) / PAGE_NAME
    write_page(
        page, "The demo of mrcn_fast, on synthetic people", subject, networks, block, chance=scores["chance"]
    )
    return results


def train_config(config: DemoConfig, name: str, tree: Path, weights: Path) -> TrainConfig:
    """The configuration of one of `CONTENDERS`; they differ only in `out` and in the row's values."""
    scaled = _scaled(config, tree, Path(config.out) / name, config.steps)
    return dataclasses.replace(scaled, weights=str(weights), **CONTENDERS[name].values)


def _scaled(config: DemoConfig, tree: Path, out: Path, steps: int) -> TrainConfig:
    """The paper's recipe at the demo's size, with the CQC loss on unit features."""
    batches = max(1, steps // 10)
    return config.training(
        tree,
        out,
        steps,
        # Chosen on seeds 10 to 12: on images this small the block gains more behind the stem, where the paper
        # has it on SYSU-MM01, than behind stage 1, where the paper has it on RegDB.
        stages=(0,),
        # A batch has 16 images per modality, as in the paper, but of more people.
        identities=BATCH_IDENTITIES,
        images=2,
        padding=3,
        batches=batches,
        epochs=-(-steps // batches),
        # The paper's schedule in ten epochs. The trunk comes from a short pretraining or from random weights,
        # and so learns as fast as the head.
        warmup_epochs=1,
        milestones=(7, 9),
        lr=0.03,
        warmup_lr=0.003,
        trunk_lr=1.0,
        seed=config.seed,
        log_every=max(1, steps // 60),
    )


def _is_watched() -> bool:
    # A process may be started without stdout.
    return sys.stdout is not None and sys.stdout.isatty()


class _timed:
    """A context manager that sets `into[name]` to the seconds that its body takes."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = round(time.perf_counter() - self.begun, 2)


def _pretrained(config: DemoConfig, bars: Progress) -> Path:
    """Pretrain a ResNet on other people, and return the file of its weights."""
    tree = config.write_other_people(config.seed + 1, bars)
    training = _scaled(config, tree, config.pretraining, config.pretraining_steps)
    return pretrain(training, config.pretraining / "weights.pth", progress=bars)


def _chance(tree: Path, seed: int) -> dict[str, float]:
    """The mean scores of a few random rankings under the same protocol."""
    search = RegDB(tree).searches()[0]
    (gallery,) = search.galleries
    generator = torch.Generator().manual_seed(seed)
    rows = [
        score_trial(
            torch.rand(len(search.query), len(gallery), generator=generator),
            *(search.query, gallery, search.protocol),
        )
        for _ in range(_RANDOM_RANKINGS)
    ]
    return {name: statistics.fmean(row[name] for row in rows) for name in HEADLINE}


def _features(trainer: Trainer, subject: Subject) -> dict[Modality, Tensor]:
    """Extract the features of all test images."""
    return {
        modality: extract(
            trainer.model, subject.images[modality], modality, trainer.config, fabric=trainer.fabric
        )
        for modality in MODALITIES
    }


def _distances(features: dict[Modality, Tensor], subject: Subject) -> dict[str, float]:
    """Mean distances of unit features of the test people, which show whether modalities or people lie apart.

    "one person": from a person's visible to their infrared images; "two people": between visible images of
    different people.
    """
    visible, infrared = (F.normalize(features[modality]) for modality in MODALITIES)
    people, sought = (
        torch.tensor([s.identity for s in subject.images[modality]])[:, None] for modality in MODALITIES
    )
    return {
        "one person": torch.cdist(visible, infrared)[people == sought.T].mean().item(),
        "two people": torch.cdist(visible, visible)[people != people.T].mean().item(),
    }


def _block_times(results: dict[str, Any], mrcn: Trainer) -> BlockTimes:
    """The measured times of the block, and its share of a training step, for the page."""
    maps, *_ = _block_inputs(mrcn, next(iter(mrcn.batches.of(0))))
    times, shares = results["milliseconds"], results["block_share"]
    return BlockTimes(
        times["block automatic"],
        times["block reference"],
        results["backend"],
        mrcn.fabric.device.type,
        " × ".join(map(str, maps.shape)),
        f"The block is {100 * shares['automatic']:.1f} % of a training step of MRCN, and in plain PyTorch "
        f"{100 * shares['reference']:.1f} %.",
    )


def measure(trainers: dict[str, Trainer], rounds: int, bars: Progress) -> dict[str, float]:
    """Measure a training step of each network, and the block's forward and backward pass alone.

    The block runs on the feature maps of a training batch. The measured steps change the trainers' weights.

    Returns:
        milliseconds, the medians of interleaved rounds, under "baseline", "mrcn automatic", "mrcn reference",
        "block automatic" and "block reference"
    """
    mrcn, baseline = trainers["mrcn"], trainers["baseline"]
    batch = next(iter(mrcn.batches.of(0)))
    block_inputs = _block_inputs(mrcn, batch)

    def with_backend(name: str | None, work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            mrcn.model.set_backend(name)
            cast(ReIDLoss, mrcn.loss).cqc.backend = name
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
    """The maps of both modalities at stage 0 of a batch, and a gradient of the six sets."""
    with torch.no_grad(), trainer.fabric.autocast():
        v = trainer.model.trunk.stem(trainer.prepared(batch.visible, "visible"), "visible")
        n = trainer.model.trunk.stem(trainer.prepared(batch.infrared, "infrared"), "infrared")
    gradient = torch.randn(6 * len(v), *v.shape[1:], device=v.device, dtype=v.dtype)
    gradient = gradient.contiguous(memory_format=trainer.layout)
    return v.requires_grad_(), n.requires_grad_(), gradient


def _block_pass(trainer: Trainer, v: torch.Tensor, n: torch.Tensor, gradient: torch.Tensor) -> None:
    (block,) = trainer.model.blocks
    with trainer.fabric.autocast():
        maps = block.first(v, n).maps
    torch.autograd.grad(maps, (v, n, *block.parameters()), gradient)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(results: dict[str, Any]) -> Table:
    """The demo's short table, with scores in percent."""
    data, times = results["made_of"], results["milliseconds"]
    table = Table(
        title="Synthetic people, visible to infrared by RegDB's protocol\n"
        f"ResNet-18 at {data['height']} x {data['width']}, {data['steps']} steps after "
        f"{data['pretraining_steps']} of pretraining"
    )
    table.add_column("")
    for name in (*COLUMNS.values(), "ms per step"):
        table.add_column(name, justify="right")
    steps = {"baseline": times["baseline"], "mrcn": times["mrcn automatic"]}
    for row, scores in results["scores"].items():
        title = CONTENDERS[row].title if row in CONTENDERS else row
        taken = f"{steps[row]:.0f}" if row in steps else ""
        table.add_row(title, *(f"{100 * scores[name]:.1f}" for name in COLUMNS), taken)
    return table
