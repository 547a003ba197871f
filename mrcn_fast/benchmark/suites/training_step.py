"""Whole training steps, in the field's habit and with one thing of this library's added at a time.

`mrcn-fast bench --step` prints a table a model. A step is forward, losses, backward and optimiser on random
images that are on the device already; loading has `bench --loader`. The habit: float32, contiguous, eager,
MRCN's block in plain PyTorch, its six sets joined by torch.cat, a loop over identities in the loss.

Steps take turns. Before, each one's first loss is compared with the habit's, from the same weights and
images, and the sizes of its gradients: not their directions, for through fifty layers of a trunk that has
learned nothing, bf16's point elsewhere altogether.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from mrcn_fast import benchmark
from mrcn_fast.benchmark.command import SECONDS, unmeasurable
from mrcn_fast.benchmark.suites.baselines import LoopedCQC
from mrcn_fast.block import MODALITIES
from mrcn_fast.flags import DEVICE, PATH, Flags, one_of
from mrcn_fast.outputs import check_file
from mrcn_fast.reid.devices import check_alone
from mrcn_fast.reid.models.blocks import MRCNPlug, Plugged
from mrcn_fast.reid.models.network import ModelName, ReIDModel, use_layout
from mrcn_fast.reid.settings import checked, kinds_of, with_more
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.losses import ReIDLoss
from mrcn_fast.reid.training.optimizer import make_optimizer

HABIT: Final = "habit"
# What is added, in this order: each step has all before it too.
ADDITIONS: Final = {
    "mrcn": ("fused block", "concat", "fused CQC", "channels_last", "bf16", "compiled trunk", "CUDA graphs"),
    "baseline": ("channels_last", "bf16", "compiled trunk", "CUDA graphs"),
}
# Of the first loss, relative, through fifty layers: bf16 rounds to 8 bits, and TF32, in which torch lets GPUs
# convolve float32, to 11 (on an H200 the losses were 1e-2 and 2e-4 off).
TOLERANCES: Final = {"32": 1e-4, "tf32": 1e-3, "bf16": 2e-2}
# Of the gradients' lengths, of trunk, blocks and heads each (bf16's were up to 0.1 off).
GRADIENTS: Final = 0.3
# Training identities of SYSU-MM01: the classifier's size.
_CLASSES: Final = 395
_LEAST_ROUNDS: Final = 3
# What of a configuration the command line sets.
_SIZE: Final = ("depth", "identities", "images", "height", "width")


class Plan(NamedTuple):
    """One column of the comparison: what is added to the habit."""

    name: str
    added: frozenset[str]

    def precision(self, device: str) -> str:
        """What convolutions round to there: one of TOLERANCES."""
        if "bf16" in self.added:
            return "bf16"
        return "32" if torch.device(device).type == "cpu" or not torch.backends.cudnn.allow_tf32 else "tf32"


def plans(model: ModelName, device: str) -> list[Plan]:
    """The habit, then one more thing at a time; CUDA graphs where there is CUDA."""
    names = [name for name in ADDITIONS[model] if name != "CUDA graphs" or device != "cpu"]
    steps = [Plan(f"+ {name}", frozenset(names[: count + 1])) for count, name in enumerate(names)]
    return [Plan(HABIT, frozenset()), *steps]


class JoinedPlug(MRCNPlug):
    """MRCN's plug as the field has it: the six sets made apart, then joined by torch.cat."""

    def first(self, visible: Tensor, infrared: Tensor) -> Plugged:
        return Plugged(torch.cat(self(visible, infrared)))


class Captured:
    """`work` as one CUDA graph: a call replays it, and returns what `work` had returned, computed anew.

    Nothing in `work` may wait for the GPU. `peak_bytes`: what it takes at most, which the graph then keeps.
    """

    # Triton, Inductor and cuDNN are then through with compiling and choosing.
    WARM_UPS: Final = 3

    def __init__(self, work: Callable[[], Tensor]) -> None:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(self.WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(beside)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = work()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._result


class Step:
    """A training step by a plan: `step()` takes it and returns the loss. All start from the same weights."""

    def __init__(self, config: TrainConfig, plan: Plan, device: str) -> None:
        self.plan, self.device = plan, device
        added = plan.added
        torch.manual_seed(config.seed)
        self.model = ReIDModel(_CLASSES, **config.model_arguments()).to(device)
        if config.model == "mrcn":
            self.model.set_backend(None if "fused block" in added else "reference")
            if "concat" not in added:
                self._join_by_cat(config)
        self.layout = use_layout(self.model, "channels_last" in added)
        if "compiled trunk" in added:
            for part in self.model.trunk.children():
                part.compile(dynamic=False)
        self.optimizer = make_optimizer(self.model, config)
        self.loss = ReIDLoss(**config.loss_arguments())
        if "fused CQC" not in added:
            self.loss.register_module("cqc", LoopedCQC())
        self.images, self.labels = _batch(config, device, self.layout)
        self.model.train()
        self.graph: Captured | None = None

    def _join_by_cat(self, config: TrainConfig) -> None:
        (plug,) = self.model.blocks
        joined = JoinedPlug(plug.channels, reduction=plug.reduction, backend=plug.backend).to(self.device)
        joined.load_state_dict(plug.state_dict())
        self.model.plugs = nn.ModuleList([joined])

    def __call__(self) -> Tensor:
        if "CUDA graphs" in self.plan.added and self.graph is None:
            self.graph = Captured(self._gradients)
        loss = self.graph() if self.graph else self._gradients()
        self.optimizer.step()
        return loss

    def _gradients(self) -> Tensor:
        """Forward, losses and backward; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            total = self.loss(self.model(*self.images), self.labels).total
        total.backward()
        return total.detach()

    def block(self) -> Callable[[], Any] | None:
        """The block's forward and backward alone, on maps as this step has them; None without a block."""
        if not self.model.blocks:
            return None
        with torch.no_grad(), self._autocast():
            maps = [self.model.trunk.stem(x, m) for x, m in zip(self.images, MODALITIES, strict=True)]
        maps = [x.detach().requires_grad_() for x in maps]
        (plug,) = self.model.blocks

        def forward() -> Tensor:
            with self._autocast():
                return plug.first(*maps).maps

        gradient = torch.randn_like(forward())

        def both() -> Any:
            return torch.autograd.grad(forward(), (*maps, *plug.parameters()), gradient)

        return both

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            torch.device(self.device).type, torch.bfloat16, enabled="bf16" in self.plan.added
        )


def _batch(config: TrainConfig, device: str, layout: torch.memory_format) -> tuple[list[Tensor], Tensor]:
    """Random normalised images of both modalities, and their labels."""
    rows = config.identities * config.images
    generator = torch.Generator().manual_seed(1)
    shape = (rows, 3, config.height, config.width)
    images = [torch.randn(shape, generator=generator).to(device, memory_format=layout) for _ in range(2)]
    return images, torch.arange(config.identities).repeat_interleave(config.images).to(device)


def measure_steps(config: TrainConfig, *, device: str = "cpu", seconds: float = 60.0) -> dict[str, Any]:
    """The steps of one model as a line of results.

    "ms" has [20th percentile, median, 80th percentile] by plan; "images_per_second" and "ratios", how many
    times the habit's images a second, are of the medians; "peak_bytes" is what a step takes besides weights;
    "block_share" is the time of the block's forward and backward alone over the step's. "failed" says why
    there is none of a plan, where nothing compiles, say.

    Raises RuntimeError where a plan's first loss or its gradients are not the habit's.
    """
    torch._dynamo.reset()
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
        "ratios": {name: round(medians[HABIT] / median, 3) for name, median in medians.items()},
        "peak_bytes": {name: _peak(step, device) for name, step in steps.items()},
        "block_share": {name: round(share, 4) for name, share in shares.items()},
        "failed": failed,
    }


def _first_losses(steps: dict[str, Step]) -> tuple[dict[str, float], dict[str, str]]:
    """The loss of each first step, and of those that could not be taken the reason. The habit's must be."""
    losses: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, step in steps.items():
        try:
            losses[name] = float(step())
        except Exception as error:
            if name == HABIT:
                raise
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
    return losses, failed


def _checked(steps: dict[str, Step], losses: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The relative errors of the first losses, and the largest of the gradients' lengths.

    RuntimeError at the first that is more than rounding.
    """
    sizes: dict[str, dict[str, float]] = {}
    errors: dict[str, float] = {}
    off: dict[str, float] = {}
    for name, step in steps.items():
        errors[name] = abs(losses[name] - losses[HABIT]) / abs(losses[HABIT])
        allowed = TOLERANCES[step.plan.precision(step.device)]
        if not errors[name] < allowed:
            raise RuntimeError(
                f"{name}: the first loss is {losses[name]}, the habit's is {losses[HABIT]}: off by "
                f"{errors[name]:.1e}, expected under {allowed:.0e}"
            )
        sizes[name] = _gradient_sizes(step.model)
        off[name] = 0.0
        for part, habits in sizes[HABIT].items():
            size = sizes[name][part]
            apart = abs(size - habits) / max(habits, 1e-30)
            if not apart < GRADIENTS:  # nor where one is no number
                raise RuntimeError(
                    f"{name}: the gradient of the {part} is {size:.3g} long, the habit's is {habits:.3g}: "
                    f"off by {apart:.1e}, expected under {GRADIENTS:.0e}"
                )
            off[name] = max(off[name], apart)
    return _rounded(errors), _rounded(off)


def _rounded(errors: dict[str, float]) -> dict[str, float]:
    return {name: round(error, 7) for name, error in errors.items()}


def _gradient_sizes(model: ReIDModel) -> dict[str, float]:
    """The length of the gradient that a step has left, of each of the model's parts; 0 where it left none."""
    sizes = {}
    for part, module in model.named_children():
        found = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        sizes[part] = float(torch.cat(found).norm()) if found else 0.0
    return sizes


def _timed(steps: dict[str, Step], seconds: float, device: str) -> dict[str, benchmark.Timing]:
    """Interleaved; the steps are warm, but for the compiled ones' second call."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        if "compiled trunk" in step.plan.added:
            step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[HABIT]) < _LEAST_ROUNDS:
        for name, step in steps.items():
            call = _waiting(step, device)
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: benchmark.Timing(*benchmark.quantiles(times)) for name, times in taken.items()}


def _waiting(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`call`, and on a GPU until it is done there."""
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
    """The result as a Markdown table."""
    where = result["gpu"] if "gpu" in result else f"{result['cpu']}, {result['threads']} threads"
    print(f"{result['case']}, ResNet-{result['depth']}; {where}, torch {result['torch']}; {result['date']}\n")
    print(
        "| | a step | images a second | × the habit | memory | the block's share |\n"
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
    """What `print_steps` reads of a line."""

    case: str
    date: str
    torch: str
    depth: int
    ms: dict[str, list[float]]
    ratios: dict[str, float]
    images_per_second: dict[str, float]
    peak_bytes: dict[str, int | None]
    block_share: dict[str, float]


def _newest(file: Path) -> list[dict[str, Any]]:
    """The newest result of each model; ValueError, naming the file, where there is none."""
    expected = "lines as --step --out writes them"
    lines = benchmark.read(file, lambda line: checked(_Steps, line, "result"), expected)
    found = {line["case"]: line for line in lines if HABIT in line["ms"]}
    if not found:
        raise ValueError(f"{file}: expected {expected}; found none of steps")
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    """`mrcn-fast bench --step`: measure, and print a table a model."""
    flags = Flags("bench --step", "time whole training steps")
    known = one_of(tuple(ADDITIONS))
    flags.add("--model", known, None, "only this model; both, MRCN last", nargs="+", action="extend")
    flags.add_of(TrainConfig, skip=kinds_of(TrainConfig).keys() - set(_SIZE))
    flags.add("--seconds", SECONDS, 60.0, "least measuring time a model")
    flags.add("--device", DEVICE, "cpu", "where to measure")
    flags.add("--out", PATH, None, "append the results to this file as JSON lines")
    flags.add("--table", PATH, None, "measure nothing; print this file's results")
    options = argparse.Namespace(**flags.values(argv))
    if options.out:
        check_file(options.out, "the results")
    if options.table:
        try:
            found = _newest(options.table)
        except ValueError as error:
            return flags.refuse(str(error))
        for result in found:
            print_steps(result)
        return 0
    check_alone()
    if reason := unmeasurable(options.device):
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 2
    size = {name: getattr(options, name) for name in _SIZE}
    configs = [TrainConfig(data="", model=model, **size) for model in options.model or ("baseline", "mrcn")]
    for config in configs:
        result = measure_steps(config, device=options.device, seconds=options.seconds)
        print_steps(result)
        if options.out:
            benchmark.write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
