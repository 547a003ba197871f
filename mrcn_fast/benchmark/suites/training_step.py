"""`mrcn-fast bench step`: whole training steps, as published and with this library's additions.

It prints one table per model. The steps are taken by the class that takes them in `mrcn-fast train`, on
random images that are on the device already and augmented; `bench loader` measures loading. The first step is
as in published re-identification code: float32, contiguous, eager, MRCN's block in plain PyTorch, its six
sets joined by torch.cat, and a loop over identities in the loss. Each further step has one addition more. All
but the last one together are `--speed auto`, and the last one is `--compile`.

The steps take turns. Before that, the first loss of each one and the lengths of its gradients are compared
with the published step's, from the same weights and images. The gradients' directions are not compared: after
fifty layers of a trunk that has learned nothing, those of bf16 are unrelated to float32's.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from typing_extensions import TypedDict

from mrcn_fast import benchmark
from mrcn_fast.benchmark.options import SECONDS, read_options
from mrcn_fast.benchmark.results import AS_PUBLISHED
from mrcn_fast.benchmark.suites.baselines import LoopedCQC
from mrcn_fast.benchmark.timing import check_measurable
from mrcn_fast.block import MODALITIES
from mrcn_fast.flags import DEVICE, PATH, Flags, one_of
from mrcn_fast.reid.devices import check_alone
from mrcn_fast.reid.models.blocks import BlockOutput, RestitutionCompensation
from mrcn_fast.reid.models.network import ModelName, ReIDModel, use_layout
from mrcn_fast.reid.settings import checked, kinds_of, with_more
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.fast import FastStep
from mrcn_fast.reid.training.losses import ReIDLoss
from mrcn_fast.reid.training.optimizer import make_optimizer
from mrcn_fast.reid.training.speed import compile_trunk, make_step
from mrcn_fast.streams import announced

# What is added to the published step, in this order. Each step keeps all additions before its own.
_SPEED: Final = ("channels_last", "bf16", "fused optimizer", "CUDA graph", "compiled trunk")
ADDITIONS: Final = {"mrcn": ("fused block", "concat", "fused CQC", *_SPEED), "baseline": _SPEED}
# The relative error of the first loss, after fifty layers, that is still rounding. bf16 rounds to 8 bits, and
# TF32, in which torch lets GPUs convolve float32, to 11; on an H200 the losses differed by 1e-2 and 2e-4.
TOLERANCES: Final = {"32": 1e-4, "tf32": 1e-3, "bf16": 2e-2}
# The same of the gradients' lengths, for the trunk, the blocks and the heads each; bf16's differed by up to
# 0.1.
GRADIENTS: Final = 0.3
# The size of the classifier: SYSU-MM01's training identities.
_CLASSES: Final = 395
_LEAST_ROUNDS: Final = 3
# The fields of a configuration that have flags.
_SIZE: Final = ("depth", "identities", "images", "height", "width")


class Plan(NamedTuple):
    """A step of the comparison: its name, and what it adds to the published step."""

    name: str
    added: frozenset[str]

    def precision(self, device: str) -> str:
        """Return the precision of its convolutions on a device, a name from TOLERANCES."""
        if "bf16" in self.added:
            return "bf16"
        return "32" if torch.device(device).type == "cpu" or not torch.backends.cudnn.allow_tf32 else "tf32"


def plans(model: ModelName, device: str) -> list[Plan]:
    """Return the published step, then the steps with one addition more each; a CUDA graph only with CUDA."""
    names = [name for name in ADDITIONS[model] if name != "CUDA graph" or device != "cpu"]
    steps = [Plan(f"+ {name}", frozenset(names[: count + 1])) for count, name in enumerate(names)]
    return [Plan(AS_PUBLISHED, frozenset()), *steps]


class ConcatenatedSets(RestitutionCompensation):
    """MRCN's part of the trunk as published code has it: the six sets are made, then joined by torch.cat."""

    def first(self, visible: Tensor, infrared: Tensor) -> BlockOutput:
        return BlockOutput(torch.cat(self(visible, infrared)))


class Step:
    """A training step as a plan says: a call takes it and returns the loss.

    All steps of a configuration start from the same weights.
    """

    # After so many steps the compilers are done, and a CUDA graph is captured.
    WARM_UPS: Final = 4

    def __init__(self, config: TrainConfig, plan: Plan, device: str) -> None:
        self.plan, self.device = plan, device
        added = plan.added
        config = dataclasses.replace(
            config,
            speed="auto" if "fused optimizer" in added else "plain",
            precision="bf16-mixed" if "bf16" in added else "32-true",
            channels_last="channels_last" in added,
            compile="compiled trunk" in added,
        )
        torch.manual_seed(config.seed)
        self.model = ReIDModel(_CLASSES, **config.model_arguments())
        if config.model == "mrcn":
            self.model.set_backend(None if "fused block" in added else "reference")
            if "concat" not in added:
                self._join_by_cat(config)
        self.layout = use_layout(self.model, config.channels_last)
        if config.compile:
            compile_trunk(self.model)
        self.loss = ReIDLoss(**config.loss_arguments())
        if "fused CQC" not in added:
            self.loss.register_module("cqc", LoopedCQC())
        self.fabric = _fabric(device, config)
        model, optimizer = self.fabric.setup(self.model, make_optimizer(self.model, config))
        self.training, _ = make_step(
            (),
            (),
            config=config,
            fabric=self.fabric,
            model=model,
            optimizer=optimizer,
            loss=self.loss,
            augment={},
            frozen=(),
            layout=self.layout,
        )
        if isinstance(self.training, FastStep):
            self.training.captures = "CUDA graph" in added
        self.images, self.labels = _batch(config, device, self.layout)

    def _join_by_cat(self, config: TrainConfig) -> None:
        (block,) = self.model.blocks
        joined = ConcatenatedSets(block.channels, reduction=block.reduction, backend=block.backend)
        joined.load_state_dict(block.state_dict())
        self.model.plugs = nn.ModuleList([joined])

    def __call__(self) -> float:
        visible, infrared = self.images
        return self.training.on(visible, infrared, self.labels).loss

    def block(self) -> Callable[[], Any] | None:
        """Return a call of the block's forward and backward alone, on maps as this step has them.

        Returns:
            The call; None for a model without a block.
        """
        if not self.model.blocks:
            return None
        with torch.no_grad(), self.fabric.autocast():
            maps = [self.model.trunk.stem(x, m) for x, m in zip(self.images, MODALITIES, strict=True)]
        maps = [x.detach().requires_grad_() for x in maps]
        (block,) = self.model.blocks

        def forward() -> Tensor:
            with self.fabric.autocast():
                return block.first(*maps).maps

        gradient = torch.randn_like(forward())

        def both() -> Any:
            return torch.autograd.grad(forward(), (*maps, *block.parameters()), gradient)

        return both


def _fabric(device: str, config: TrainConfig) -> Fabric:
    """Open a device by torch's name for it."""
    chosen = torch.device(device)
    return Fabric(
        accelerator=chosen.type,
        devices=1 if chosen.type == "cpu" else [chosen.index or 0],
        precision=config.precision,
    )


def _batch(config: TrainConfig, device: str, layout: torch.memory_format) -> tuple[list[Tensor], Tensor]:
    """Make random normalized images of both modalities, and their labels."""
    rows = config.identities * config.images
    generator = torch.Generator().manual_seed(1)
    shape = (rows, 3, config.height, config.width)
    images = [torch.randn(shape, generator=generator).to(device, memory_format=layout) for _ in range(2)]
    return images, torch.arange(config.identities).repeat_interleave(config.images).to(device)


def measure_steps(config: TrainConfig, *, device: str = "cpu", seconds: float = 60.0) -> dict[str, Any]:
    """Measure the steps of one model.

    Args:
        config: the model and the batch
        device: where to measure
        seconds: how long rounds are started

    Returns:
        A result line whose dictionaries have the plans' names. "ms": [20th percentile, median, 80th
        percentile]. "images_per_second" and "ratios" (over the published step's images per second): of the
        medians. "peak_bytes": peak memory of a step besides weights. "block_share": the time of the block's
        forward and backward alone over the step's. "failed": why a plan has no result, for example because
        nothing compiles.

    Raises:
        RuntimeError: a plan's first loss or its gradients differ from the published step's by more than
            rounding.
    """
    torch.compiler.reset()
    steps = {plan.name: Step(config, plan, device) for plan in plans(config.model, device)}
    losses, failed = _first_losses(steps)
    steps = {name: steps[name] for name in losses}
    errors, off = _checked(steps, losses)
    timings = _timed(steps, seconds, device)
    images = 2 * config.identities * config.images
    medians = {name: timing.median for name, timing in timings.items()}
    blocks = {name: step.block() for name, step in steps.items()}
    shares = {
        name: benchmark.measure({"block": _waiting(block, device)}, 0.0)["block"].median / medians[name]
        for name, block in blocks.items()
        if block is not None
    }
    return benchmark.machine(device) | {
        "case": f"step {config.model} {config.identities}x{config.images} {config.height}x{config.width}",
        "depth": config.depth,
        "pages": "as the allocator gives them",
        "first_loss_error": errors,
        "gradient_size_error": off,
        "ms": {name: [round(1e3 * s, 2) for s in timing] for name, timing in timings.items()},
        "images_per_second": {name: round(images / median, 2) for name, median in medians.items()},
        "ratios": {name: round(medians[AS_PUBLISHED] / median, 3) for name, median in medians.items()},
        "peak_bytes": {name: _peak(step, device) for name, step in steps.items()},
        "block_share": {name: round(share, 4) for name, share in shares.items()},
        "failed": failed,
    }


def _first_losses(steps: dict[str, Step]) -> tuple[dict[str, float], dict[str, str]]:
    """Take each step once; return the losses, and the reasons of the steps that failed.

    An error of the published step is raised.
    """
    losses: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, step in steps.items():
        compiles = "compiled trunk" in step.plan.added
        try:
            with announced(f"{name}: first step{', which compiles the trunk' * compiles}"):
                losses[name] = step()
        except Exception as error:
            if name == AS_PUBLISHED:
                raise
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
    return losses, failed


def _checked(steps: dict[str, Step], losses: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the relative errors of the first losses, and the largest ones of the gradients' lengths.

    Raises:
        RuntimeError: an error is more than rounding.
    """
    sizes: dict[str, dict[str, float]] = {}
    errors: dict[str, float] = {}
    off: dict[str, float] = {}
    for name, step in steps.items():
        errors[name] = abs(losses[name] - losses[AS_PUBLISHED]) / abs(losses[AS_PUBLISHED])
        allowed = TOLERANCES[step.plan.precision(step.device)]
        if not errors[name] < allowed:
            raise RuntimeError(
                f"{name}: the first loss is {losses[name]}, the published step's is {losses[AS_PUBLISHED]}: "
                f"off by {errors[name]:.1e}, expected under {allowed:.0e}"
            )
        sizes[name] = _gradient_sizes(step.model)
        off[name] = 0.0
        for part, expected in sizes[AS_PUBLISHED].items():
            size = sizes[name][part]
            error = abs(size - expected) / max(expected, 1e-30)
            if not error < GRADIENTS:  # which NaN isn't either
                raise RuntimeError(
                    f"{name}: the gradient of the {part} is {size:.3g} long, the published step's is "
                    f"{expected:.3g}: off by {error:.1e}, expected under {GRADIENTS:.0e}"
                )
            off[name] = max(off[name], error)
    return _rounded(errors), _rounded(off)


def _rounded(errors: dict[str, float]) -> dict[str, float]:
    return {name: round(error, 7) for name, error in errors.items()}


def _gradient_sizes(model: ReIDModel) -> dict[str, float]:
    """Return the length of the gradient after a step, of each part of the model; 0 without a gradient."""
    sizes = {}
    for part, module in model.named_children():
        found = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        sizes[part] = float(torch.cat(found).norm()) if found else 0.0
    return sizes


def _timed(steps: dict[str, Step], seconds: float, device: str) -> dict[str, benchmark.Timing]:
    """Time the steps in turn, after those that compile or capture something have done so."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        if {"CUDA graph", "compiled trunk"} & step.plan.added:
            for _ in range(Step.WARM_UPS):
                step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[AS_PUBLISHED]) < _LEAST_ROUNDS:
        for name, step in steps.items():
            call = _waiting(step, device)
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: benchmark.Timing(*benchmark.quantiles(times)) for name, times in taken.items()}


def _waiting(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Return a call that, on a GPU, also waits until the GPU has finished."""
    if torch.device(device).type == "cpu":
        return call

    def waited() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return waited


def _peak(step: Step, device: str) -> int | None:
    if torch.device(device).type == "cpu":
        return benchmark.peak_bytes(step, times=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def print_steps(result: dict[str, Any]) -> None:
    """Print a result of `measure_steps` as a Markdown table."""
    where = result["gpu"] if "gpu" in result else f"{result['cpu']}, {result['threads']} threads"
    print(f"{result['case']}, ResNet-{result['depth']}; {where}, torch {result['torch']}; {result['date']}\n")
    print(
        "| | step | images per second | × as published | peak memory | the block's share |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    for name, (_, median, _) in result["ms"].items():
        peak, share = result["peak_bytes"][name], result["block_share"].get(name)
        cells = (
            name,
            f"{median:,.0f} ms",
            f"{result['images_per_second'][name]:.1f}",
            f"{result['ratios'][name]:.2f}",
            "–" if peak is None else f"{peak / 1e9:.2f} GB",
            "–" if share is None else f"{100 * share:.1f} %",
        )
        print(f"| {' | '.join(cells)} |")
    for name, reason in result.get("failed", {}).items():
        print(f"\n{name} failed: {reason}")
    print()


@with_more
class _Steps(TypedDict):
    """The part of a result line that `print_steps` reads."""

    case: str
    date: str
    torch: str
    depth: int
    ms: dict[str, list[float]]
    ratios: dict[str, float]
    images_per_second: dict[str, float]
    peak_bytes: dict[str, int | None]
    block_share: dict[str, float]


def checked_line(line: dict[str, Any]) -> dict[str, Any]:
    """Return a result line that `print_steps` can print.

    Raises:
        ValueError: the message names what the line lacks.
    """
    return checked(_Steps, line, "result")


# --- the command --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The flags of `bench step`."""

    model: Sequence[ModelName] | None
    depth: int
    identities: int
    images: int
    height: int
    width: int
    seconds: float
    device: str
    out: Path | None

    def configs(self) -> list[TrainConfig]:
        """Return the configuration of each model that is measured."""
        size = {name: getattr(self, name) for name in _SIZE}
        # The loss as printed, which is what the loop in plain PyTorch computes.
        as_printed: dict[str, Any] = {"cqc_features": "pooled", "cqc_reduction": "sum"}
        models = self.model or ("baseline", "mrcn")
        return [TrainConfig(data="", model=model, **as_printed, **size) for model in models]


def flags() -> Flags:
    """Return the flags of `bench step`."""
    found = Flags("bench step", "time whole training steps")
    known = one_of(tuple(ADDITIONS))
    found.add("--model", known, None, "only this model; both, MRCN last", nargs="+", action="extend")
    found.add_of(TrainConfig, skip=kinds_of(TrainConfig).keys() - set(_SIZE))
    found.add("--seconds", SECONDS, 60.0, "least measuring time per model")
    found.add("--device", DEVICE, "cpu", "where to measure")
    found.add("--out", PATH, None, "append the results to this file as JSON lines")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mrcn-fast bench step argv...`: measure, and print a table per model."""
    options = read_options(Options, flags(), argv)
    check_alone()
    check_measurable(options.device)
    for config in options.configs():
        result = measure_steps(config, device=options.device, seconds=options.seconds)
        print_steps(result)
        if options.out:
            benchmark.write(options.out, result)
    return 0
