"""`make gpu-probe`: the experiments that decide about the block's GPU kernels, in at most eight minutes.

    python benchmarks/gpu_probe.py --build             # where there is nvcc: compile what the probe carries
    python benchmarks/gpu_probe.py --out probe.jsonl   # on the machine with the GPU

The experiments run one after the other, each in a process of its own that is ended when its time is over.
What it had measured by then counts. Each experiment prints its decision, or what it lacks for one, and
becomes a line of the file of results. Where several kernels are measured, the newest ones come first. No GPU
has run this yet.

- E0: how many clusters and cooperative blocks fit the GPU
- E1: the block's maps moved without any dependency, which replaces the floors
- E2: a barrier of groups of blocks
- E3: the kernels that hold a sample, also in a CUDA graph
- E4: bulk copies; no kernel has them yet
- E5: the CUDA kernels that read every input twice
- E6: what Triton's last forward launch finds in L2, by ncu
- E7: training steps: a CUDA graph, a compiled trunk, a fused optimizer
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
SOURCE: Final = ROOT / "benchmarks" / "gpu_probe.cu"
LIBRARY: Final = ROOT / "build" / "gpu-probe" / "libgpu_probe.so"
# Seconds for all experiments, so that the whole command takes less than eight minutes; and the fewest with
# which one is begun, because torch alone takes some to start.
BUDGET: Final = 460.0
LEAST: Final = 15.0

KIB: Final = 1024
HELD: Final = "MRCN_FAST_CUDA_HELD"
# N, C, H and W at which the kernels are judged.
SMALL: Final = (16, 64, 72, 32)
LARGE: Final = (16, 256, 72, 32)

Measured = Mapping[str, float]
# What an experiment yields, one at a time: a name and a number.
Found = Iterator[tuple[str, float]]


class Lacking(Exception):
    """An experiment can't run here; the message says what it lacks."""


class Experiment(NamedTuple):
    """An experiment.

    Attributes:
        does: what it does, for people
        seconds: how long it may take
        run: measures
        decide: says what follows from what was measured; raises KeyError where that is not enough
    """

    does: str
    seconds: float
    run: Callable[[], Found]
    decide: Callable[[Measured], str]


# --- E0 to E2: the GPU itself -----------------------------------------------------------------------------


def build(arch: str) -> list[str]:
    """Return the command that compiles the probe's own kernels for GPUs such as sm_90."""
    sys.path.insert(0, str(ROOT))
    import setup

    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
    code = f"arch=compute_{arch},code=sm_{arch}"
    return [setup.find_nvcc(), *options, "-gencode", code, str(SOURCE), "-o", str(LIBRARY)]


def library() -> ctypes.CDLL:
    """Load the probe's own kernels, which are compiled first where that was not done yet."""
    if not LIBRARY.is_file():
        import torch

        major, minor = torch.cuda.get_device_capability()
        compile_library(f"{major}{minor}")
    loaded = ctypes.CDLL(str(LIBRARY))
    pointers = ctypes.POINTER(ctypes.c_uint64)
    loaded.gpu_probe_move.argtypes = (
        *(pointers, ctypes.c_int, pointers, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p),
    )
    loaded.gpu_probe_barrier.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p),
    )
    return loaded


def compile_library(arch: str) -> None:
    """Compile the probe's own kernels. Raises Lacking where that fails."""
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    try:
        command = build(arch)
    except Exception as error:  # the class of setup.py's error is loaded with it
        raise Lacking(f"{LIBRARY.name} is not there, and {error}") from error
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Lacking(f"nvcc failed: {done.stderr.strip()[-500:]}")


def checked(result: int) -> int:
    """Return a result of the library. Raises RuntimeError for an error of CUDA."""
    if result < 0:
        raise RuntimeError(f"CUDA's error {-result}")
    return result


def occupancy() -> Found:
    """E0: clusters and cooperative blocks that run at once."""
    probe = library()
    for size in (16, 8, 4):
        for kib in (74, 147, 221):
            yield f"clusters of {size} at {kib} KiB", checked(probe.gpu_probe_clusters(size, kib * KIB))
    for kib in (221, 147, 74):
        yield f"blocks at {kib} KiB", checked(probe.gpu_probe_blocks(kib * KIB))


def decide_occupancy(found: Measured) -> str:
    clusters = found["clusters of 16 at 147 KiB"]
    again = "look at clusters again" if clusters >= 8 else "stay with the barrier in global memory"
    return f"{clusters:.0f} clusters of 16 at 147 KiB: {again}"


# Reads and writes of a forward, of a backward, and of the outputs alone.
MOVED: Final = {"forward": (2, 4), "backward": (6, 2), "writes alone": (0, 4)}


def moving() -> Found:
    """E1: microseconds that the maps take to be moved, with a cold cache."""
    import torch

    from mrcn_fast.benchmark.timing import measure_gpu

    probe = library()
    stream = torch.cuda.current_stream().cuda_stream
    for shape in (LARGE, SMALL):
        size = shape[0] * shape[1] * shape[2] * shape[3]
        maps = [torch.zeros(size, dtype=torch.bfloat16, device="cuda") for _ in range(8)]

        def call(reads: int, writes: int, maps: Any = maps, size: int = size) -> Callable[[], int]:
            def addresses(tensors: Any) -> Any:
                return (ctypes.c_uint64 * 8)(*(t.data_ptr() for t in tensors))

            given = (addresses(maps[:reads]), reads, addresses(maps[reads : reads + writes]), writes)
            return lambda: checked(probe.gpu_probe_move(*given, size // 8, stream))

        calls = {name: call(*moved) for name, moved in MOVED.items()}
        for name, timing in measure_gpu(calls, 1.0)[0].items():
            yield f"{name} {shape[1]}", 1e6 * timing.median


def decide_moving(found: Measured) -> str:
    told = [f"{name} {found[f'{name} 64']:.1f} and {found[f'{name} 256']:.1f} us" for name in MOVED]
    return f"floors at 16x64 and 16x256 in bf16: {', '.join(told)}"


ROUNDS: Final = 200


def barriers() -> Found:
    """E2: microseconds of a barrier of groups of blocks, with 128 blocks in all."""
    import torch

    from mrcn_fast.benchmark.timing import measure_gpu

    probe = library()
    counters = torch.zeros(32 * 128, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream

    def call(group: int, rounds: int) -> Callable[[], None]:
        def run() -> None:
            counters.zero_()
            checked(probe.gpu_probe_barrier(counters.data_ptr(), 128, group, rounds, stream))

        return run

    for group in (8, 16, 32):
        times, _ = measure_gpu({"none": call(group, 0), "all": call(group, ROUNDS)}, 0.5)
        yield f"group of {group}", 1e6 * (times["all"].median - times["none"].median) / ROUNDS


def decide_barriers(found: Measured) -> str:
    slowest = max(found[f"group of {group}"] for group in (8, 16, 32))
    holds = "the backward at 64 loses its case" if slowest > 3 else "the predictions hold"
    return f"a barrier takes {slowest:.1f} us at most: {holds}"


# --- E3 to E6: the block ----------------------------------------------------------------------------------


def block_times(backend: str, held: str, kinds: Sequence[tuple[str, str]], graph: bool) -> Found:
    """Measure the block forward and backward, in microseconds, beside a copy of its bytes.

    Args:
        backend: whose kernels
        held: the value of MRCN_FAST_CUDA_HELD
        kinds: dtypes and layouts
        graph: whether forward and backward together are measured in a CUDA graph too
    """
    import torch

    from mrcn_fast.benchmark.suites.problems import DTYPES, OPERATIONS, Problem, backend_calls, copy_of
    from mrcn_fast.benchmark.timing import EXACT, TOLERANCES, check, measure_gpu

    os.environ[HELD] = held
    for dtype, layout in kinds:
        for shape in (LARGE, SMALL):
            for way in ("forward", "backward", *["forward+backward"] * graph):
                problem = Problem("block", way, shape, layout, dtype, "cuda")
                made = backend_calls(problem, [backend])
                check({"fused": made[backend], EXACT: made[EXACT]}, TOLERANCES[DTYPES[dtype]])
                volumes = OPERATIONS["block"].volumes(way)
                elements = volumes * shape[0] * shape[1] * shape[2] * shape[3]
                calls = {"": made[backend], " floor": copy_of(elements, "cuda", DTYPES[dtype])}
                if way == "forward+backward":
                    calls = {" in a graph": in_graph(torch, made[backend])}
                for name, timing in measure_gpu(calls, 0.6)[0].items():
                    yield f"{way} {shape[1]} {dtype} {layout}{name}", 1e6 * timing.median


def in_graph(torch: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call as a CUDA graph, which is captured once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], Any] = graph.replay
    return replay


BOTH: Final = (("bf16", "channels_last"), ("fp32", "nchw"))


def held() -> Found:
    """E3: the kernels that hold a sample."""
    yield from block_times("cuda", "1", BOTH, graph=True)


def decide_held(found: Measured) -> str:
    forward, backward = (found[f"{way} 256 bf16 channels_last"] for way in ("forward", "backward"))
    floors = [found[f"{way} 256 bf16 channels_last floor"] for way in ("forward", "backward")]
    ways = [name for name, us, most in (("forward", forward, 36), ("backward", backward, 50)) if us <= most]
    told = f"{forward:.1f} us forward ({forward / floors[0]:.2f} floors), "
    told += f"{backward:.1f} us backward ({backward / floors[1]:.2f} floors) at 16x256: "
    return told + (f"the default {' and '.join(ways)}" if ways else "no default")


def bulk_copies() -> Found:
    """E4: nothing to measure yet."""
    raise Lacking("no kernel uses bulk copies")


def decide_bulk_copies(found: Measured) -> str:
    raise KeyError("a kernel with bulk copies")


def tickets() -> Found:
    """E5: the CUDA kernels that read every input twice."""
    yield from block_times("cuda", "0", BOTH[:1], graph=False)


# What the kernels took before they made a sample's coefficients once (nvidia-h200.jsonl), at 16x256.
TICKETS_BEFORE: Final = {"forward": 84.0, "backward": 250.0}


def decide_tickets(found: Measured) -> str:
    us = {way: found[f"{way} 256 bf16 channels_last"] for way in TICKETS_BEFORE}
    less = {way: 1 - us[way] / before for way, before in TICKETS_BEFORE.items()}
    told = ", ".join(f"{way} {TICKETS_BEFORE[way]:.0f} -> {us[way]:.0f} us" for way in us)
    wrong = "the model is wrong, look at the stalls" if min(less.values()) < 0.15 else "the model holds"
    return f"{told}: {wrong}"


METRICS: Final = {
    "lts__t_sector_hit_rate.pct": "L2 hits, percent",
    "dram__bytes_read.sum": "bytes read from memory",
    "dram__bytes_write.sum": "bytes written to memory",
}


def l2_hits() -> Found:
    """E6: what Triton's last forward launch finds in L2."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise Lacking("ncu is not on PATH")
    options = ["--csv", "--print-units", "base", "--clock-control", "none", "--launch-count", "1"]
    chosen = ["--kernel-name", "regex:output_kernel", "--metrics", ",".join(METRICS)]
    done = subprocess.run(
        [ncu, *options, *chosen, sys.executable, __file__, "--call"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = ncu_metrics(done.stdout)
    if not found:
        raise Lacking(f"ncu measured nothing: {(done.stdout + done.stderr).strip()[-300:]}")
    yield from found.items()


def ncu_metrics(printed: str) -> dict[str, float]:
    """Read the metrics in what `ncu --csv` printed; the program's own lines stand before the table."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    return {
        METRICS[row["Metric Name"]]: float(row["Metric Value"].replace(",", ""))
        for row in rows
        if row.get("Metric Name") in METRICS
    }


def call_triton() -> None:
    """Make the forward at 16x256 in bf16 channels_last by Triton's kernels, for ncu."""
    import torch

    from mrcn_fast import MRCNBlock

    block = MRCNBlock(LARGE[1], backend="triton", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(LARGE, device="cuda").to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.no_grad():
        block(x, x)
    torch.cuda.synchronize()


def decide_l2_hits(found: Measured) -> str:
    hits = found["L2 hits, percent"]
    end = "three launches are at their end" if hits > 50 else "a second reading comes from memory"
    return f"{hits:.0f} % L2 hits in Triton's last launch: {end}"


# --- E7: training steps -----------------------------------------------------------------------------------

STEPS: Final = ("+ CUDA graph", "+ compiled trunk", "+ bf16", "+ fused optimizer")


def steps() -> Found:
    """E7: milliseconds of the GPU for training steps of MRCN at the paper's size."""
    from mrcn_fast.benchmark.suites.training_step import Step, plans
    from mrcn_fast.benchmark.timing import measure_gpu
    from mrcn_fast.reid.training.config import TrainConfig

    config = TrainConfig(data="", model="mrcn")
    known = {plan.name: plan for plan in plans("mrcn", "cuda")}
    for name in STEPS:
        step = Step(config, known[name], "cuda")
        for _ in range(Step.WARM_UPS):
            step()
        yield name, 1e3 * measure_gpu({name: step}, 3.0, least=5)[0][name].median


def decide_steps(found: Measured) -> str:
    of_trunk = found["+ compiled trunk"] - found["+ CUDA graph"]
    of_optimizer = found["+ fused optimizer"] - found["+ bf16"]
    default = "compile the trunk by default" if of_trunk < -1 else "leave the trunk as it is"
    return (
        f"compiled trunk {of_trunk:+.1f} ms in a graph, fused optimizer {of_optimizer:+.1f} ms without one: "
        f"{default}"
    )


EXPERIMENTS: Final = {
    "E0": Experiment("clusters and cooperative blocks that fit", 30, occupancy, decide_occupancy),
    "E1": Experiment("maps moved without dependencies", 45, moving, decide_moving),
    "E2": Experiment("a barrier of groups of blocks", 30, barriers, decide_barriers),
    "E3": Experiment("the held kernels", 95, held, decide_held),
    "E4": Experiment("bulk copies", 15, bulk_copies, decide_bulk_copies),
    "E5": Experiment("the ticket kernels", 45, tickets, decide_tickets),
    "E6": Experiment("L2 hits of Triton's last launch", 60, l2_hits, decide_l2_hits),
    "E7": Experiment("training steps", 135, steps, decide_steps),
}


# --- one experiment, in its process -----------------------------------------------------------------------


def run_here(name: str) -> int:
    """Measure an experiment and print each number as a line of JSON, and what it lacks."""
    try:
        for key, value in EXPERIMENTS[name].run():
            print(json.dumps({key: round(value, 3)}), flush=True)
    except Lacking as error:
        print(json.dumps({"lacking": str(error)}), flush=True)
    return 0


class Outcome(NamedTuple):
    """What an experiment gave: its numbers, and why there are no more of them, where there should be."""

    measured: dict[str, float]
    lacking: str = ""


def outcome_of(printed: str, failure: str) -> Outcome:
    """Read what an experiment's process printed."""
    measured: dict[str, float] = {}
    lacking = failure
    for line in printed.splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # what a library printed
            continue
        if isinstance(found, dict):
            lacking = found.pop("lacking", lacking)
            measured |= found
    return Outcome(measured, lacking)


def run_apart(name: str, seconds: float) -> Outcome:
    """Run an experiment in a process of its own, for at most so many seconds."""
    command = [sys.executable, __file__, "--run", name]
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=printed, stderr=errors, start_new_session=True)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # With the processes that it has started, such as ncu or compilers.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        text, told = (_read(file) for file in (printed, errors))
    failure = f"it was ended after {seconds:.0f} s" if status is None else ""
    if status:
        failure = (told.strip().splitlines() or [f"exit status {status}"])[-1]
    return outcome_of(text, failure)


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


# --- all of them ------------------------------------------------------------------------------------------


def decision_of(experiment: Experiment, outcome: Outcome) -> str:
    """Say what follows from an outcome, or what is lacking for a decision."""
    try:
        return experiment.decide(outcome.measured)
    except KeyError as missing:
        return f"undecided: {outcome.lacking or f'{missing.args[0]} was not measured'}"


def probe(
    names: Sequence[str],
    budget: float,
    keep: Callable[[dict[str, Any]], object],
    run: Callable[[str, float], Outcome] = run_apart,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run experiments until the budget is spent; print a decision for each.

    Args:
        names: from EXPERIMENTS, in the order in which they run
        budget: seconds for all of them
        keep: gets the result of each experiment as soon as it is there
        run: runs an experiment for at most so many seconds
        clock: gives the time in seconds

    Returns:
        How many experiments ended without a decision.
    """
    end, undecided = clock() + budget, 0
    for name in names:
        experiment, start = EXPERIMENTS[name], clock()
        left = end - start
        outcome = (
            run(name, min(experiment.seconds, left))
            if left >= LEAST
            else Outcome({}, f"only {max(left, 0):.0f} s were left")
        )
        decision = decision_of(experiment, outcome)
        undecided += decision.startswith("undecided")
        print(f"{name} {experiment.does} ({clock() - start:.0f} s): {decision}", flush=True)
        for key, value in outcome.measured.items():
            print(f"     {key}: {value:g}", flush=True)
        result = {"case": f"gpu-probe {name}", "measured": outcome.measured, "decision": decision}
        keep(result | ({"lacking": outcome.lacking} if outcome.lacking else {}))
    return undecided


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="make gpu-probe", description="run the experiments that decide about the GPU kernels"
    )
    options.add_argument(
        "--only", action="append", choices=list(EXPERIMENTS), help="only this experiment (default: all)"
    )
    options.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"for all (default {BUDGET:.0f})"
    )
    options.add_argument("--out", type=Path, metavar="FILE", help="append the results as JSON lines")
    options.add_argument(
        "--build", nargs="?", const="90", metavar="ARCH", help="compile the probe for sm_ARCH (90) and stop"
    )
    options.add_argument("--run", choices=list(EXPERIMENTS), help=argparse.SUPPRESS)
    options.add_argument("--call", action="store_true", help=argparse.SUPPRESS)
    return options


def main(argv: list[str] | None = None) -> int:
    """Return 0 if every experiment led to a decision, 1 if one did not, 2 if this machine can't run them."""
    options = parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    if options.run:
        return run_here(options.run)
    if options.call:
        call_triton()
        return 0
    if options.build:
        try:
            compile_library(options.build)
        except Lacking as error:
            print(f"gpu-probe: {error}", file=sys.stderr)
            return 2
        print(LIBRARY)
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-probe: there is no GPU here that torch {torch.__version__} can use", file=sys.stderr)
        return 2
    from mrcn_fast.benchmark import results

    os.environ["MRCN_FAST_TUNE"] = "0"
    where = results.machine("cuda")
    print(results.described(where), flush=True)

    def keep(result: dict[str, Any]) -> None:
        if options.out:
            results.write(options.out, where | result)

    return 1 if probe(options.only or list(EXPERIMENTS), options.budget, keep) else 0


if __name__ == "__main__":
    sys.exit(main())
