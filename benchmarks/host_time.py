"""What a call costs the host before its kernels run: `python benchmarks/host_time.py --backend triton`.

On a machine without a GPU: backend "cuda" with the operations of tests/cuda_on_host and a launch that does
nothing, backend "triton" with the driver of tests/idle_cuda, whose launches run nothing; everything else as
on a GPU but the allocator (the CPU's) and the stream. Microseconds a call, 20th percentile, median and 80th
of the means of runs; `--out` appends them as a result line. Beside the block's stands what torch itself takes
for a Function of as many tensors that computes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from mrcn_fast import CQCLoss, MRCNBlock, dispatch, mrcn_block  # noqa: E402
from mrcn_fast.benchmark import results  # noqa: E402
from mrcn_fast.benchmark.timing import quantiles  # noqa: E402
from mrcn_fast.gates import FUSED  # noqa: E402

SHAPE = (16, 64, 9, 4)
FEATURES = (96, 64)
RUNS, CALLS = 30, 200


def use_cuda() -> None:
    """Serve CPU tensors with the backend "cuda", whose launches do nothing."""
    os.environ["MRCN_FAST_TEST_CUDA_ON_HOST"] = "1"
    from tests.cuda_on_host import library

    library.load()
    dispatch.KERNELS["cuda"] = library
    library.emulator().cuda_on_host_stub(1)


def use_triton() -> None:
    """Serve CPU tensors with the backend "triton", whose launches run nothing."""
    from tests import idle_cuda

    idle_cuda.use(Path(tempfile.mkdtemp()))


def look_away(*_: object) -> None:
    """On a GPU nobody waits for the number of identities."""


USE = {"cuda": use_cuda, "triton": use_triton}


def forms(backend: str) -> dict[str, Callable[[], object]]:
    """What is timed, from the operation alone to a module's forward and backward."""
    USE[backend]()
    torch.set_num_threads(1)
    sys.modules["mrcn_fast.cqc"]._check_count = look_away  # type: ignore[attr-defined]
    block = MRCNBlock(SHAPE[1], backend=backend)
    maps = [torch.randn(SHAPE, requires_grad=True) for _ in range(2)]
    visible, infrared = maps
    gradients = [torch.randn(SHAPE) for _ in range(4)]
    leaves = [*maps, *block.parameters()]
    norm_weight, norm_bias, gate = block.norm_weight, block.norm_bias, block.gate.parameter_list()
    dispatch.choose(backend, "cpu", torch.float32)
    operation, nothing = dispatch.KERNELS[backend].operation("block_forward"), empty_function()
    loss = CQCLoss(backend=backend)
    pooled = torch.randn(FEATURES, requires_grad=True)
    labels = torch.arange(4).repeat_interleave(4)

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
    options.add_argument("--backend", choices=list(USE), default="cuda", help="default cuda")
    options.add_argument("--out", type=Path, metavar="FILE", help="append the result to FILE as a JSON line")
    given = options.parse_args(argv)
    found = {name: microseconds(call) for name, call in forms(given.backend).items()}
    for name, (low, median, high) in found.items():
        print(f"{name:<30} {median:6.1f} us ({low} to {high})")
    if given.out:
        shape = "x".join(map(str, SHAPE))
        case = f"host time of {given.backend}, stubbed launch {shape}"
        results.write(given.out, results.machine() | {"case": case, "host_us": found})


if __name__ == "__main__":
    main()
