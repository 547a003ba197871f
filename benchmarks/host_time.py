"""What a call of the block costs the host before its kernels run: `python benchmarks/host_time.py`.

Backend "cuda" on a machine without a GPU: the operations of tests/cuda_on_host with a launch that does
nothing, everything else as on a GPU but the allocator (the CPU's) and the stream. Microseconds a call, 20th
percentile, median and 80th of the means of runs; `--out` appends them as a result line. Beside them stands
what torch itself takes for a Function of as many tensors that computes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ["MRCN_FAST_TEST_CUDA_ON_HOST"] = "1"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from mrcn_fast import MRCNBlock, dispatch, mrcn_block  # noqa: E402
from mrcn_fast.benchmark import results  # noqa: E402
from mrcn_fast.benchmark.timing import quantiles  # noqa: E402
from tests.cuda_on_host import library  # noqa: E402

SHAPE = (16, 64, 9, 4)
RUNS, CALLS = 30, 200


def forms() -> dict[str, Callable[[], object]]:
    """What is timed, from the operation alone to a module's forward and backward."""
    library.load()
    dispatch.KERNELS["cuda"] = library
    library.emulator().cuda_on_host_stub(1)
    torch.set_num_threads(1)
    block = MRCNBlock(SHAPE[1], backend="cuda")
    maps = [torch.randn(SHAPE, requires_grad=True) for _ in range(2)]
    visible, infrared = maps
    gradients = [torch.randn(SHAPE) for _ in range(4)]
    leaves = [*maps, *block.parameters()]
    norm_weight, norm_bias, gate = block.norm_weight, block.norm_bias, block.gate.parameter_list()
    operation, nothing = library.operation("block_forward"), empty_function()

    def without_gradients(call: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(call)

    return {
        "operation": without_gradients(
            lambda: operation(*maps, norm_weight, norm_bias, gate, "se", 1e-5, False)
        ),
        "mrcn_block, no gradients": without_gradients(
            lambda: mrcn_block(visible, infrared, norm_weight, norm_bias, gate, backend="cuda")
        ),
        "module, no gradients": without_gradients(lambda: block(*maps)),
        "module": lambda: block(*maps),
        "module, forward and backward": lambda: torch.autograd.grad(block(*maps)[1:5], leaves, gradients),
        "empty Function, both": lambda: torch.autograd.grad(nothing(*leaves), leaves, gradients),
    }


def empty_function() -> Callable[..., tuple[Tensor, ...]]:
    """As many tensors in, saved and out as the block's Function has, none of them computed."""

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


def microseconds(call: Callable[[], object]) -> list[float]:
    """20th percentile, median, 80th."""
    means = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append(1e6 * (time.perf_counter() - start) / CALLS)
    return [round(q, 1) for q in quantiles(means)]


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description="host time of the block with launches that do nothing")
    options.add_argument("--out", type=Path, metavar="FILE", help="append the result to FILE as a JSON line")
    out = options.parse_args(argv).out
    found = {name: microseconds(call) for name, call in forms().items()}
    for name, (low, median, high) in found.items():
        print(f"{name:<30} {median:6.1f} us ({low} to {high})")
    if out:
        shape = "x".join(map(str, SHAPE))
        case = f"host time, stubbed launch {shape}"
        results.write(out, results.machine() | {"case": case, "host_us": found})


if __name__ == "__main__":
    main()
