"""What the kernels are measured against, and how: cases, rivals, interleaved timing, result lines.

`mrcn-fast bench` prints the table; ``pytest benchmarks`` runs the same cases under pytest-benchmark. A case
is timed only after its fused result was compared with the reference on the same inputs.

On a GPU (``--device cuda``) time is what its events say. The rivals go round several sets of tensors, so that
none finds its own in the cache. What never waits for the GPU is queued behind a pause there: its time is the
GPU's alone, and what the host takes for a call stands beside it. What does wait, as the loop and the
vectorised form of the loss do to learn the number of identities, is timed as a user has it, host and all.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mrcn_fast import backends, reference
from mrcn_fast.block import MRCNBlock, MRCNFeatures
from mrcn_fast.cqc import cqc_loss

SHAPES = ((16, 256, 72, 32), (16, 64, 72, 32), (8, 512, 36, 16))
GPU_SHAPES = ((16, 64, 72, 32), (16, 256, 72, 32), (64, 256, 72, 32))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
FORWARD_VOLUMES, BACKWARD_VOLUMES = (
    6,
    8,
)  # compulsory traffic: every input read once, every output written once


# A rival's other form, compiled with Inductor's autotuning: whichever is faster counts.
AUTOTUNED = " autotuned"

# Not timed: what the fused result is compared with where the plain forms' own rounding is too coarse.
EXACT = "exact"

# Error of the fused result, relative to the largest value, that is still rounding.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """One thing that is measured: ``rivals()`` makes the callables, the fused one under "fused"."""

    name: str
    rivals: Callable[[], dict[str, Callable[[], Any]]]
    # rival -> how many times its time must be of the fused one's; "floor" -> at most so many floors;
    # "host" -> at most so many microseconds of the host for a fused call
    goals: dict[str, float]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    waits: bool = False  # a rival waits for the GPU by itself


class Timing(NamedTuple):
    """Seconds of one call: 20th percentile, median, 80th percentile."""

    low: float
    median: float
    high: float


# --- the rivals: what a user would write or pick without this library ---------------------------------


def collapsed_block(
    block: MRCNBlock, visible: Tensor, infrared: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The block as one statistics pass and one elementwise pass, in plain PyTorch, for torch.compile."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = block.gate.parameter_list()
    affine, pooled = [], []
    for m, x in enumerate((visible, infrared)):
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        a = block.norm_weight[m] * torch.rsqrt(variance + block.eps)
        affine.append((a, block.norm_bias[m] - a * mean))
        pooled.append(mean - block.norm_bias[m])
    z = torch.stack((pooled[0], pooled[1], pooled[0], pooled[1]))
    hidden = F.relu(torch.baddbmm(fc1_bias[:, None], z, fc1_weight.mT))
    s = torch.sigmoid(torch.baddbmm(fc2_bias[:, None], hidden, fc2_weight.mT))

    def spread(t: Tensor) -> Tensor:
        return t[:, :, None, None]

    (a_v, d_v), (a_n, d_n) = affine
    return (
        spread(a_v + s[0] * (1 - a_v)) * visible + spread((1 - s[0]) * d_v),
        spread(a_v) * visible + spread(s[3] * (1 - a_n)) * infrared + spread(d_v - s[3] * d_n),
        spread(a_n) * infrared + spread(s[2] * (1 - a_v)) * visible + spread(d_n - s[2] * d_v),
        spread(a_n + s[1] * (1 - a_n)) * infrared + spread((1 - s[1]) * d_n),
    )


def looped_cqc(
    features: Sequence[Tensor], labels: Tensor, infrared_labels: Tensor, margin: float = 0.2
) -> Tensor:
    """The loss with a loop over identities, as training code of the field has it."""
    f_v, f_vr, f_vc, f_nc, f_nr, f_n = features
    total = features[0].new_zeros(())
    for identity in labels.unique():
        own, other = labels == identity, infrared_labels == identity
        c_v, c_n = f_v[own].mean(0), f_n[other].mean(0)
        for center, far, near in (
            (f_vr[own].mean(0), c_n, c_v),
            (f_nr[other].mean(0), c_v, c_n),
            (f_vc[own].mean(0), c_n, c_v),
            (f_nc[other].mean(0), c_v, c_n),
        ):
            pulled, pushed = torch.dist(center, far), torch.dist(center, near)
            total = total + F.relu(margin + pulled - pushed)
    return total


def vectorized_cqc(
    features: Sequence[Tensor], labels: Tensor, infrared_labels: Tensor, margin: float = 0.2
) -> Tensor:
    """The loss with all centers of a set by one index_add, for labels that both modalities share."""
    identities, own = labels.unique(return_inverse=True)
    other = torch.searchsorted(identities, infrared_labels)
    centers = []
    for f, index in zip(features, [own] * 3 + [other] * 3, strict=True):
        count = torch.bincount(index, minlength=len(identities)).to(f.dtype)[:, None]
        centers.append(f.new_zeros(len(identities), f.shape[1]).index_add_(0, index, f) / count)
    c_v, c_vr, c_vc, c_nc, c_nr, c_n = centers
    moved, far, near = (
        torch.stack((c_vr, c_nr, c_vc, c_nc)),
        torch.stack((c_n, c_v, c_n, c_v)),
        torch.stack((c_v, c_n, c_v, c_n)),
    )
    return F.relu(margin + reference.distance(moved, far) - reference.distance(moved, near)).sum()


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """torch.compile at its best for fixed shapes."""
    return torch.compile(function, dynamic=False, mode=mode)


# --- cases --------------------------------------------------------------------------------------------


def copy_of(
    volumes: int, elements: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], Any]:
    """The floor: a copy that reads and writes ``volumes`` feature maps in all."""
    half = elements * volumes // 2

    def pair() -> tuple[Tensor, Tensor]:
        source = torch.randn(half, device=device, dtype=dtype)
        return torch.empty_like(source), source

    pairs = itertools.cycle([pair() for _ in range(rotation(device, 2 * half * dtype.itemsize))])

    def copy() -> Tensor:
        target, source = next(pairs)
        return target.copy_(source)

    return copy


def rotation(device: str, set_bytes: int) -> int:
    """How many sets of tensors the rivals go round: on a GPU, together four times what its cache holds."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // set_bytes))


def block_rivals(
    shape: tuple[int, int, int, int],
    layout: str,
    backward: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], Any]]:
    """Fused, eager reference, compiled reference, compiled collapsed form, and the copy that is the floor."""
    torch.manual_seed(0)
    block = MRCNBlock(shape[1], device=device, dtype=dtype)
    plain = MRCNBlock(shape[1], device=device, dtype=dtype, backend="reference")
    plain.load_state_dict(block.state_dict())

    def tensor() -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])

    number = rotation(device, 6 * dtype.itemsize * torch.Size(shape).numel())
    inputs = [tuple(tensor().requires_grad_() for _ in range(2)) for _ in range(number)]
    gradients = [tuple(tensor() for _ in range(4)) for _ in range(number)]

    def run(form: Callable[[Tensor, Tensor], Any], parameters: Sequence[Tensor]) -> Callable[[], Any]:
        given = itertools.cycle(zip(inputs, gradients, strict=True))

        def forward() -> Any:
            maps, _ = next(given)
            with torch.no_grad():
                return form(*maps)

        def both() -> Any:
            maps, of_outputs = next(given)
            return torch.autograd.grad(form(*maps), (*maps, *parameters), of_outputs)

        return both if backward else forward

    def literal(visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
        return plain(visible, infrared)[1:5]

    def fused(visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
        return block(visible, infrared)[1:5]

    def collapsed(visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
        return collapsed_block(plain, visible, infrared)

    def exact() -> Any:
        wide = MRCNBlock(shape[1], device=device, backend="reference")
        wide.load_state_dict(block.state_dict())
        maps = [x.detach().float().requires_grad_() for x in inputs[0]]
        outputs = wide(*maps)[1:5]
        if not backward:
            return tuple(o.detach() for o in outputs)
        of_outputs = [g.float() for g in gradients[0]]
        return torch.autograd.grad(outputs, (*maps, *wide.parameters()), of_outputs)

    own = list(plain.parameters())
    volumes = FORWARD_VOLUMES + (BACKWARD_VOLUMES if backward else 0)
    rivals = {
        "fused": run(fused, list(block.parameters())),
        "eager": run(literal, own),
        "compile": run(compiled(literal), own),
        "compile collapsed": run(compiled(collapsed), own),
        "floor": copy_of(volumes, inputs[0][0].numel(), device, dtype),
    }
    if dtype != torch.float32:
        rivals[EXACT] = exact
    if device != "cpu":
        rivals |= {
            f"compile{AUTOTUNED}": run(compiled(literal, "max-autotune-no-cudagraphs"), own),
            f"compile collapsed{AUTOTUNED}": run(compiled(collapsed, "max-autotune-no-cudagraphs"), own),
        }
    return rivals


def cqc_rivals(
    identities: int, images: int, dimensions: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], Any]]:
    """Fused, vectorised eager and the loop over identities, forward and backward."""
    torch.manual_seed(0)
    labels = torch.arange(identities, device=device).repeat_interleave(images)
    rows = identities * images
    sets = [
        MRCNFeatures(
            *(torch.randn(rows, dimensions, device=device, dtype=dtype).requires_grad_() for _ in range(6))
        )
        for _ in range(rotation(device, 6 * rows * dimensions * dtype.itemsize))
    ]

    def run(form: Callable[..., Any]) -> Callable[[], Any]:
        given = itertools.cycle(sets)

        def both() -> Any:
            features = next(given)
            return torch.autograd.grad(form(features, labels, labels), features)

        return both

    def exact() -> Any:
        features = [f.detach().float().requires_grad_() for f in sets[0]]
        losses, _ = reference.cqc_loss(features, labels, labels)
        return torch.autograd.grad(losses.sum(), features)

    rivals = {"fused": run(cqc_loss), "vectorized": run(vectorized_cqc), "loop": run(looped_cqc)}
    return rivals if dtype == torch.float32 else rivals | {EXACT: exact}


def block_goals(shape: tuple[int, int, int, int], layout: str, backward: bool) -> dict[str, float]:
    if shape != (16, 256, 72, 32):
        return {"compile": 3.0 if backward else (4.0 if shape[1] == 512 else 3.5)}
    goals = {"compile": 3.0, "eager": 8.0} if backward else {"compile": 3.2, "eager": 7.0}
    return goals | ({"floor": 1.5 if backward else 1.15} if layout == "nchw" else {})


def cases() -> list[Case]:
    """Every case, in the order of the table."""
    found = []
    for layout in LAYOUTS:
        for shape in SHAPES:
            for backward in (False, True):
                name = f"block forward{'+backward' * backward} {'x'.join(map(str, shape))} {layout}"
                found.append(
                    Case(
                        name,
                        partial(block_rivals, shape, layout, backward),
                        block_goals(shape, layout, backward),
                    )
                )
    goals = {"vectorized": 5.0, "loop": 15.0}
    found.append(Case("cqc forward+backward 4x4x2048", partial(cqc_rivals, 4, 4, 2048), goals))
    return found


def gpu_block_goals(
    shape: tuple[int, int, int, int], layout: str, backward: bool, dtype: torch.dtype
) -> dict[str, float]:
    large = dtype.itemsize * torch.Size(shape).numel() >= 32e6
    if not backward:
        return {"host": 40.0} | ({"floor": 1 / 0.8} if large else {})
    if shape[0] != 16:
        # Six volumes at 80 % of the copy's bandwidth, eight at 70 %.
        return {
            "floor": (FORWARD_VOLUMES / 0.8 + BACKWARD_VOLUMES / 0.7) / (FORWARD_VOLUMES + BACKWARD_VOLUMES)
        }
    return {"compile": 2.0, "compile collapsed": 1.5, "eager": 6.0}


def gpu_cases(device: str, dtypes: Sequence[str]) -> list[Case]:
    """Those of a GPU, in the order of the table."""
    found = []
    for name, layout, shape, backward in itertools.product(dtypes, LAYOUTS, GPU_SHAPES, (False, True)):
        dtype = DTYPES[name]
        found.append(
            Case(
                f"gpu block forward{'+backward' * backward} {'x'.join(map(str, shape))} {layout} {name}",
                partial(block_rivals, shape, layout, backward, device, dtype),
                gpu_block_goals(shape, layout, backward, dtype),
                device,
                dtype,
            )
        )
    for name, (identities, images) in itertools.product(dtypes, ((4, 4), (16, 8))):
        found.append(
            Case(
                f"gpu cqc forward+backward {identities}x{images}x2048 {name}",
                partial(cqc_rivals, identities, images, 2048, device, DTYPES[name]),
                {"vectorized": 4.0, "loop": 10.0},
                device,
                DTYPES[name],
                waits=True,
            )
        )
    return found


# --- measuring ----------------------------------------------------------------------------------------


def keep_pages_warm() -> bool:
    """Let freed memory stay with the process, so that outputs stand on pages touched before (glibc only)."""
    if platform.system() != "Linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    no_mmap, no_trim = (-4, 0), (-1, 2**31 - 1)
    return bool(mallopt(*no_mmap)) and bool(mallopt(*no_trim))


def largest_error(fused: Any, plain: Any) -> float:
    """The largest difference of any result, relative to the largest value of that result."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(fused, plain, strict=True)
    )


def check(rivals: dict[str, Callable[[], Any]], tolerance: float = 1e-4) -> None:
    """Raises RuntimeError where the fused result is not the plain one's; nothing is timed then."""
    plain = next(rivals[name] for name in (EXACT, "eager", "vectorized") if name in rivals)
    error = largest_error(rivals["fused"](), plain())
    if not error < tolerance:
        raise RuntimeError(
            f"the fused result is off by {error:.1e} (relative), expected under {tolerance:.0e}"
        )


def measure(rivals: dict[str, Callable[[], Any]], seconds: float, least: int = 7) -> dict[str, Timing]:
    """Interleaved timing (A B C A B C ...) until ``seconds`` are over, at least so many rounds."""
    for rival in rivals.values():
        rival()
        rival()
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, rival in rivals.items():
            start = time.perf_counter()
            result = rival()
            taken[name].append(time.perf_counter() - start)
            del result
        rounds += 1
    return {name: Timing(*quantiles(times)) for name, times in taken.items()}


class Cost(NamedTuple):
    """What a call takes besides the GPU's time: microseconds of the host, and bytes at its peak."""

    host: float
    peak: int


def measure_gpu(
    rivals: dict[str, Callable[[], Any]], seconds: float, waits: bool, least: int = 20
) -> tuple[dict[str, Timing], dict[str, Cost]]:
    """As `measure`, by the GPU's events; unless the rivals wait by themselves, of the GPU's time alone."""
    costs = {name: cost_on_gpu(rival) for name, rival in rivals.items()}
    rate = pause_rate()
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, rival in rivals.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if not waits:
                # Long enough for the host to queue the whole call: the GPU finds no gaps then.
                torch.cuda._sleep(int(rate * (2e-6 * costs[name].host + 1e-4)))
            start.record()
            result = rival()
            stop.record()
            stop.synchronize()
            taken[name].append(1e-3 * start.elapsed_time(stop))
            del result
        rounds += 1
    return {name: Timing(*quantiles(times)) for name, times in taken.items()}, costs


def cost_on_gpu(rival: Callable[[], Any], calls: int = 20) -> Cost:
    """Of a call that finds the GPU idle, compiled and with its memory reserved."""
    for _ in range(3):
        rival()
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = rival()
        times.append(1e6 * (time.perf_counter() - start))
        del result
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rival()
    torch.cuda.synchronize()
    return Cost(statistics.median(times), torch.cuda.max_memory_allocated() - before)


def pause_rate(cycles: int = 20_000_000) -> float:
    """Cycles of `torch.cuda._sleep` a second."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    stop.record()
    stop.synchronize()
    return cycles / (1e-3 * start.elapsed_time(stop))


def quantiles(times: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], statistics.median(times), cuts[7]


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a result line says of where it was measured."""
    try:
        here = Path(__file__).parents[1]
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    where = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": backends()["cpu" if device == "cpu" else "triton"].reason,
    }
    if device != "cpu":
        where |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
            "triton": importlib.metadata.version("triton"),
        }
    return where


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def row(case: Case, timings: dict[str, Timing], costs: dict[str, Cost] | None = None) -> dict[str, Any]:
    """One result: milliseconds of every rival, ratios to the fused time, and which goals hold."""
    fused = timings["fused"].median
    ratios = {name: t.median / fused for name, t in timings.items() if name not in ("fused", "floor")}
    if "floor" in timings:
        ratios["floors"] = fused / timings["floor"].median
    result: dict[str, Any] = {
        "case": case.name,
        "ms": {name: [round(1e3 * s, 4) for s in t] for name, t in timings.items()},
        "ratios": {name: round(r, 3) for name, r in ratios.items()},
        "goals": case.goals,
        "missed": [name for name, goal in case.goals.items() if missed(name, goal, ratios, costs)],
    }
    if costs:
        result["host_us"] = {name: round(cost.host, 1) for name, cost in costs.items()}
        result["peak_bytes"] = {name: cost.peak for name, cost in costs.items()}
    return result


def missed(name: str, goal: float, ratios: dict[str, float], costs: dict[str, Cost] | None) -> bool:
    if name == "floor":
        return ratios["floors"] > goal
    if name == "host":
        return costs is None or costs["fused"].host > goal
    return min(ratios[name], ratios.get(name + AUTOTUNED, math.inf)) < goal


def print_row(result: dict[str, Any]) -> None:
    ms, ratios = result["ms"], result["ratios"]
    cells = [f"{result['case']:<52}", f"{ms['fused'][1]:9.3f} ms"]
    cells += [f"{name} {ratio:5.2f}x" for name, ratio in ratios.items() if name != "floors"]
    if "host_us" in result:
        cells.append(f"host {result['host_us']['fused']:.0f} us")
    if "floors" in ratios:
        cells.append(f"{ratios['floors']:.2f} floors of {ms['floor'][1]:.2f} ms")
    cells.append(f"below the goal: {', '.join(result['missed'])}" if result["missed"] else "goals met")
    print("  ".join(cells), flush=True)


def described(where: dict[str, Any]) -> str:
    """The machine of a result line, in a line."""
    if "gpu" in where:
        return f"{where['gpu']}, torch {where['torch']}, CUDA {where['cuda']}, Triton {where['triton']}"
    return f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, {where['pages']} pages"


def print_table(file: Path) -> None:
    """The newest result of every case in ``file`` as a Markdown table, under its machine's name."""
    newest = {r["case"]: r for r in map(json.loads, file.read_text().splitlines())}
    last = next(reversed(newest.values()))
    print(f"{described(last)}; {last['date']}\n")
    print(
        "| case | fused | eager | torch.compile | compile of the collapsed form | floors |\n"
        "|---|---|---|---|---|---|"
    )
    for case, result in newest.items():
        names = ("loop", "vectorized") if "cqc" in case else ("eager", "compile")
        ratios = [result["ratios"].get(name) for name in (*names, "compile collapsed")]
        cells = [f"{result['ms']['fused'][1]:.2f} ms", *("–" if r is None else f"{r:.1f} ×" for r in ratios)]
        floors = result["ratios"].get("floors")
        print(f"| {case} | {' | '.join(cells)} | {'–' if floors is None else f'{floors:.2f}'} |")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="mrcn-fast bench",
        description="time the kernels against their rivals",
        epilog="`mrcn-fast bench --scorer` times the retrieval scores, `bench --loader` the images.",
    )
    options.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="cpu (default), or cuda, with cases of its own"
    )
    options.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="on a GPU: only this dtype; may be given again (default: all)",
    )
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    options.add_argument("--seconds", type=float, default=8.0, help="measuring time of a case (default 8)")
    options.add_argument(
        "--pages",
        choices=("warm", "fresh"),
        default="warm",
        help="outputs on memory used before (warm, default) or as the allocator gives it (fresh)",
    )
    options.add_argument("--out", type=Path, metavar="FILE", help="append the results to FILE as JSON lines")
    options.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing; print FILE's newest results as Markdown"
    )
    options.add_argument("--list", action="store_true", help="print the cases' names and stop")
    return options


def main(argv: list[str] | None = None) -> int:
    """``mrcn-fast bench``: measure the cases and print a line for each; 1 where a goal was missed."""
    options = parser().parse_args(argv)
    if options.table:
        print_table(options.table)
        return 0
    on_cpu = torch.device(options.device).type == "cpu"
    known = cases() if on_cpu else gpu_cases(options.device, options.dtype or list(DTYPES))
    chosen = [case for case in known if options.only in case.name]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        print(f"--only: got {options.only!r}, which no case's name contains; see --list", file=sys.stderr)
        return 2
    if reason := unmeasurable(options.device, options.dtype):
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 2
    where = machine(options.device)
    if on_cpu:
        where["pages"] = options.pages if options.pages == "fresh" or keep_pages_warm() else "fresh"
    print(f"{described(where)}, {where['kernels']}")
    print("median of interleaved rounds; ratios are the rival's time over the fused one's\n")
    any_missed = False
    for case in chosen:
        result = measured(case, options.seconds)
        print_row(result)
        any_missed = any_missed or bool(result["missed"])
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(where | result) + "\n")
    return 1 if any_missed else 0


def unmeasurable(device: str, dtypes: Sequence[str] | None) -> str | None:
    """Why nothing can be measured on ``device``; None where something can."""
    if torch.device(device).type == "cpu":
        if dtypes:
            return "--dtype is for --device cuda; on a CPU the cases are in fp32"
        status = backends()["cpu"]
    elif not torch.cuda.is_available():
        return (
            f"--device {device}: there is no GPU here that torch can use (torch.cuda.is_available() is False)"
        )
    else:
        status = backends()["triton"]
    return None if status.usable else status.reason


def measured(case: Case, seconds: float) -> dict[str, Any]:
    """The result of a case, its fused form checked first."""
    torch._dynamo.reset()
    rivals = case.rivals()
    check(rivals, TOLERANCES[case.dtype])
    rivals.pop(EXACT, None)
    if case.device == "cpu":
        return row(case, measure(rivals, seconds))
    with torch.cuda.device(case.device):
        return row(case, *measure_gpu(rivals, seconds, case.waits))


if __name__ == "__main__":
    sys.exit(main())
