"""`mrcn-fast bench host`: the host's time per call, from the operation alone to forward and backward.

On a GPU the host only launches kernels, and doesn't wait for them. On the CPU the kernels' own time, which
the row "operation" shows, is part of every row. For comparison there is an autograd Function that takes,
saves and returns as many tensors as the block's and computes nothing: what torch itself needs.
benchmarks/host_time.py measures the same for the GPU backends on a machine without a GPU, with launches that
do nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from mrcn_fast import CQCLoss, MRCNBlock, dispatch, mrcn_block
from mrcn_fast.benchmark import results
from mrcn_fast.benchmark.options import read_options
from mrcn_fast.benchmark.timing import Calls, check_measurable, quantiles
from mrcn_fast.flags import DEVICE, PATH, Flags, one_of
from mrcn_fast.gates import FUSED

# Of a map and of the loss's features: so small that a GPU finishes a call before the host has made the next
# one.
SHAPE: Final = (16, 64, 9, 4)
FEATURES: Final = (96, 64)
RUNS: Final = 30
CALLS: Final = 200


def measure_host(backend: str, device: str = "cpu") -> dict[str, list[float]]:
    """Measure the host's time of each of `calls`, with one thread.

    Args:
        backend: a name from `dispatch.KERNELS`
        device: where the tensors are

    Returns:
        Microseconds per call, by name: 20th percentile, median and 80th percentile of the means of runs.

    Raises:
        BackendError: the backend can't serve tensors on that device.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: microseconds(call, device) for name, call in calls(backend, device).items()}
    finally:
        torch.set_num_threads(threads)


def calls(backend: str, device: str = "cpu") -> Calls:
    """Make the calls that are measured, by name; the arguments are those of `measure_host`."""
    dispatch.choose(backend, torch.device(device).type, torch.float32)
    block = MRCNBlock(SHAPE[1], backend=backend, device=device)
    maps = [torch.randn(SHAPE, device=device, requires_grad=True) for _ in range(2)]
    visible, infrared = maps
    gradients = [torch.randn(SHAPE, device=device) for _ in range(4)]
    leaves = [*maps, *block.parameters()]
    norm_weight, norm_bias, gate = block.norm_weight, block.norm_bias, block.gate.parameter_list()
    operation, nothing = dispatch.KERNELS[backend].operation("block_forward"), empty_function()
    loss = CQCLoss(backend=backend)
    pooled = torch.randn(FEATURES, device=device, requires_grad=True)
    labels = torch.arange(4, device=device).repeat_interleave(4)

    def without_gradients(call: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(call)

    return {
        "operation": without_gradients(
            lambda: operation(*maps, norm_weight, norm_bias, gate, FUSED.index("se"), 1e-5, False)
        ),
        "mrcn_block, no gradients": without_gradients(
            lambda: mrcn_block(visible, infrared, norm_weight, norm_bias, gate, backend=backend)
        ),
        "module, no gradients": without_gradients(lambda: block(*maps)),
        "module": lambda: block(*maps),
        "module, forward and backward": lambda: torch.autograd.grad(block(*maps)[1:5], leaves, gradients),
        "empty Function, both": lambda: torch.autograd.grad(nothing(*leaves), leaves, gradients),
        "loss, forward and backward": lambda: torch.autograd.grad(loss(pooled, labels), pooled),
    }


def empty_function() -> Callable[..., tuple[Tensor, ...]]:
    """Return an autograd Function with as many inputs, saved tensors and outputs as the block's.

    None of its tensors is computed.
    """

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
            ctx.save_for_backward(tensors[0].detach(), *tensors)
            return tuple(torch.empty_like(tensors[0]) for _ in range(4))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch.empty_like(t) for t in ctx.saved_tensors[1:])

    apply: Callable[..., tuple[Tensor, ...]] = Nothing.apply
    return apply


def microseconds(call: Callable[[], object], device: str = "cpu") -> list[float]:
    """Return the 20th percentile, median and 80th percentile of the mean times per call of runs."""
    means = []
    for _ in range(RUNS):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append(1e6 * (time.perf_counter() - start) / CALLS)
    return [round(q, 1) for q in quantiles(means)]


def print_times(found: dict[str, list[float]]) -> None:
    """Print a result of `measure_host`, one line per call."""
    for name, (low, median, high) in found.items():
        print(f"{name:<30} {median:6.1f} us ({low} to {high})")


def result(case: str, found: dict[str, list[float]], device: str = "cpu") -> results.Line:
    """Return a result of `measure_host` as a result line."""
    return results.machine(device) | {"case": case, "host_us": found}


# --- the command --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The flags of `bench host`."""

    device: str
    backend: str | None
    out: Path | None

    @property
    def serving(self) -> str:
        """The backend that is measured."""
        return self.backend or ("cpu" if self.device == "cpu" else "triton")


def flags() -> Flags:
    """Return the flags of `bench host`."""
    found = Flags("bench host", "measure what a call costs the host before its kernels run")
    found.add("--device", DEVICE, "cpu", "where the tensors are")
    known = one_of(tuple(dispatch.KERNELS))
    found.add("--backend", known, None, "which kernels; cpu on the CPU and triton on a GPU where left out")
    found.add("--out", PATH, None, "append the result to this file as a JSON line")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mrcn-fast bench host argv...`: measure, and print a line per call."""
    options = read_options(Options, flags(), argv)
    check_measurable(options.device)
    found = measure_host(options.serving, options.device)
    print_times(found)
    if options.out:
        case = f"host time of {options.serving} on {options.device}, {'x'.join(map(str, SHAPE))}"
        results.write(options.out, result(case, found, options.device))
    return 0
