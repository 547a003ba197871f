"""What the kernels are measured against, and how: cases, rivals, interleaved timing, result lines.

`mrcn-fast bench` prints the table; ``pytest benchmarks`` runs the same cases under pytest-benchmark. A case
is timed only after its fused result was compared with the reference on the same inputs.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
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
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
FORWARD_VOLUMES, BACKWARD_VOLUMES = (
    6,
    8,
)  # compulsory traffic: every input read once, every output written once


class Case(NamedTuple):
    """One thing that is measured: ``rivals()`` makes the callables, the fused one under "fused"."""

    name: str
    rivals: Callable[[], dict[str, Callable[[], Any]]]
    goals: dict[
        str, float
    ]  # rival -> how many times its time must be of the fused one's; "floor" -> at most so many floors


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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at its best for fixed shapes."""
    return torch.compile(function, dynamic=False)


# --- cases --------------------------------------------------------------------------------------------


def copy_of(volumes: int, elements: int) -> Callable[[], Any]:
    """The floor: a copy that reads and writes ``volumes`` feature maps in all."""
    source = torch.randn(elements * volumes // 2)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def block_rivals(
    shape: tuple[int, int, int, int], layout: str, backward: bool
) -> dict[str, Callable[[], Any]]:
    """Fused, eager reference, compiled reference, compiled collapsed form, and the copy that is the floor."""
    torch.manual_seed(0)
    block = MRCNBlock(shape[1])
    plain = MRCNBlock(shape[1], backend="reference")
    plain.load_state_dict(block.state_dict())

    def tensor() -> Tensor:
        return torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])

    inputs = tuple(tensor().requires_grad_() for _ in range(2))
    gradients = tuple(tensor() for _ in range(4))

    def run(form: Callable[[Tensor, Tensor], Any], parameters: Sequence[Tensor]) -> Callable[[], Any]:
        def forward() -> Any:
            with torch.no_grad():
                return form(*inputs)

        def both() -> Any:
            return torch.autograd.grad(form(*inputs), (*inputs, *parameters), gradients)

        return both if backward else forward

    def literal(visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
        return plain(visible, infrared)[1:5]

    def fused(visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
        return block(visible, infrared)[1:5]

    def collapsed(visible: Tensor, infrared: Tensor) -> tuple[Tensor, ...]:
        return collapsed_block(plain, visible, infrared)

    own = list(plain.parameters())
    volumes = FORWARD_VOLUMES + (BACKWARD_VOLUMES if backward else 0)
    return {
        "fused": run(fused, list(block.parameters())),
        "eager": run(literal, own),
        "compile": run(compiled(literal), own),
        "compile collapsed": run(compiled(collapsed), own),
        "floor": copy_of(volumes, inputs[0].numel()),
    }


def cqc_rivals(identities: int, images: int, dimensions: int) -> dict[str, Callable[[], Any]]:
    """Fused, vectorised eager and the loop over identities, forward and backward."""
    torch.manual_seed(0)
    labels = torch.arange(identities).repeat_interleave(images)
    features = MRCNFeatures(
        *(torch.randn(identities * images, dimensions).requires_grad_() for _ in range(6))
    )

    def run(form: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(form(features, labels, labels), features)

    return {"fused": run(cqc_loss), "vectorized": run(vectorized_cqc), "loop": run(looped_cqc)}


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
    plain = next(rivals[name] for name in ("eager", "vectorized") if name in rivals)
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


def quantiles(times: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], statistics.median(times), cuts[7]


def machine() -> dict[str, Any]:
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
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": backends()["cpu"].reason,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def row(case: Case, timings: dict[str, Timing]) -> dict[str, Any]:
    """One result: milliseconds of every rival, ratios to the fused time, and which goals hold."""
    fused = timings["fused"].median
    ratios = {name: t.median / fused for name, t in timings.items() if name not in ("fused", "floor")}
    if "floor" in timings:
        ratios["floors"] = fused / timings["floor"].median
    missed = [
        name
        for name, goal in case.goals.items()
        if (ratios["floors"] > goal if name == "floor" else ratios[name] < goal)
    ]
    return {
        "case": case.name,
        "ms": {name: [round(1e3 * s, 4) for s in t] for name, t in timings.items()},
        "ratios": {name: round(r, 3) for name, r in ratios.items()},
        "goals": case.goals,
        "missed": missed,
    }


def print_row(result: dict[str, Any]) -> None:
    ms, ratios = result["ms"], result["ratios"]
    cells = [f"{result['case']:<52}", f"{ms['fused'][1]:9.3f} ms"]
    cells += [f"{name} {ratio:5.2f}x" for name, ratio in ratios.items() if name != "floors"]
    if "floors" in ratios:
        cells.append(f"{ratios['floors']:.2f} floors of {ms['floor'][1]:.2f} ms")
    cells.append(f"below the goal: {', '.join(result['missed'])}" if result["missed"] else "goals met")
    print("  ".join(cells), flush=True)


def print_table(file: Path) -> None:
    """The newest result of every case in ``file`` as a Markdown table, under its machine's name."""
    newest = {r["case"]: r for r in map(json.loads, file.read_text().splitlines())}
    last = next(reversed(newest.values()))
    print(
        f"{last['cpu']}, {last['threads']} threads, torch {last['torch']}, {last['pages']} pages; "
        f"{last['date']}\n"
    )
    print(
        "| case | fused | eager | torch.compile | compile of the collapsed form | floors |\n"
        "|---|---|---|---|---|---|"
    )
    for case, result in newest.items():
        names = ("loop", "vectorized") if case.startswith("cqc") else ("eager", "compile")
        ratios = [result["ratios"].get(name) for name in (*names, "compile collapsed")]
        cells = [f"{result['ms']['fused'][1]:.2f} ms", *("–" if r is None else f"{r:.1f} ×" for r in ratios)]
        floors = result["ratios"].get("floors")
        print(f"| {case} | {' | '.join(cells)} | {'–' if floors is None else f'{floors:.2f}'} |")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="mrcn-fast bench", description="time the kernels against their rivals"
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
    chosen = [case for case in cases() if options.only in case.name]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        print(f"--only: got {options.only!r}, which no case's name contains; see --list", file=sys.stderr)
        return 2
    status = backends()["cpu"]
    if not status.usable:
        print(f"nothing to measure: {status.reason}", file=sys.stderr)
        return 2
    pages = options.pages if options.pages == "fresh" or keep_pages_warm() else "fresh"
    where = machine() | {"pages": pages}
    print(
        f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, "
        f"{where['kernels']}; {pages} pages"
    )
    print("median of interleaved rounds; ratios are the rival's time over the fused one's\n")
    missed = False
    for case in chosen:
        torch._dynamo.reset()
        rivals = case.rivals()
        check(rivals)
        result = row(case, measure(rivals, options.seconds))
        print_row(result)
        missed = missed or bool(result["missed"])
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(where | result) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
