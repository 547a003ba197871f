"""`make gpu-check`: check the kernels on this machine's GPU, then time them.

It runs from the checkout with any Python that has torch for the GPU, Triton, and for the tests pytest,
hypothesis and numpy. It downloads nothing. Each part runs only if the parts before it have passed:

- build: the C++ and CUDA libraries for this GPU, where there is nvcc and they are not there yet
- tests: the correctness matrix, of both backends, in several processes where there is pytest-xdist
- sanitizer: a part of the tests of the CUDA C++ backend under CUDA's compute-sanitizer
- benchmark: both backends side by side
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK_TESTS = tuple(f"tests/test_block{part}.py" for part in ("", "_accuracy", "_derivatives", "_memory"))
TESTS = (*BLOCK_TESTS, *(f"tests/test_{name}.py" for name in ("gpu", "cqc", "gates", "compile", "rule")))
# These check that a training step never waits for the GPU, and the CUDA graph of steps; they need [reid].
TRAINING_TESTS = tuple(f"tests/reid/training/test_{name}.py" for name in ("transfers", "speed"))
TEST_PACKAGES = ("pytest", "hypothesis", "numpy")
PARTS = ("build", "tests", "sanitizer", "benchmark")
BUILD_PACKAGES = ("pybind11", "setuptools", "ninja")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# Each kernel at the edges of shapes and in every layout. Under a sanitizer a test takes up to a hundred times
# as long.
SANITIZED = (
    *("tests/test_block_accuracy.py", "tests/test_cqc.py"),
    *("-k", "cuda and float32 and (shapes_at_the_edges or in_every_layout)"),
)


def lacking(parts: Sequence[str]) -> str | None:
    """Return what ``parts`` need and this machine lacks, or None."""
    python = f"{sys.executable} ({sys.version.split()[0]})"
    if importlib.util.find_spec("torch") is None:
        return f"{python} has no torch; name a Python that has: make gpu-check PYTHON=/path/to/python"
    import torch

    if not torch.cuda.is_available():
        built = f"built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPUs'}"
        if torch.version.hip:
            built = f"built for HIP {torch.version.hip}"
        return (
            f"there is no GPU that torch can use: torch {torch.__version__} of {python}, {built}, sees none"
        )
    from mrcn_fast import backends

    status = backends()["triton"]
    if not status.usable:
        return f"the Triton backend can't run: {status.reason}"
    absent = [name for name in TEST_PACKAGES if importlib.util.find_spec(name) is None]
    if {"tests", "sanitizer"} & set(parts) and absent:
        return (
            f"the tests need {', '.join(absent)}, which {python} lacks; install them, or measure unchecked "
            "with ARGS='--part benchmark' (each case still compares its own result first)"
        )
    return None


def unbuildable() -> str | None:
    """Return why the CUDA C++ backend is not built here, or None where it will be."""
    import setup
    from mrcn_fast import backends

    if backends()["cuda"].usable:
        return "it is built"
    if absent := [name for name in BUILD_PACKAGES if importlib.util.find_spec(name) is None]:
        return f"{sys.executable} lacks {', '.join(absent)}"
    try:
        setup.find_nvcc()
    except setup.NativeBuildError as error:
        return str(error)
    return None


def unsanitizable(building: bool) -> str | None:
    """Return why nothing runs under compute-sanitizer, or None where tests do."""
    from mrcn_fast import backends

    if not building and not backends()["cuda"].usable:
        return f"the CUDA C++ backend can't run: {backends()['cuda'].reason}"
    return None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on PATH"


def environment() -> dict[str, str]:
    """Return this process's environment, changed for the parts.

    The checkout is imported first, the tests put their problems on the GPU, and builds are for this GPU
    alone.
    """
    import torch

    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    major, minor = torch.cuda.get_device_capability()
    built = {"MRCN_FAST_CUDA": "1", "MRCN_FAST_CUDA_ARCHS": f"{major}{minor}"}
    return built | os.environ | {"PYTHONPATH": path, "MRCN_FAST_TEST_DEVICE": "cuda"}


def chosen_tests() -> tuple[str, ...]:
    return TESTS if importlib.util.find_spec("lightning_fabric") is None else TESTS + TRAINING_TESTS


def side_by_side() -> list[str]:
    """Return pytest's arguments for several processes; none without pytest-xdist."""
    if importlib.util.find_spec("xdist") is None:
        return []
    number = processes(4 << 30)
    return ["-n", str(number), "--dist", "loadgroup"] if number > 1 else []


def processes(memory: int) -> int:
    """Return how many processes run side by side, if each needs this many bytes of the GPU's memory.

    There are no more than processors, because the processes compile most of the time.
    """
    import torch

    there = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(os.cpu_count() or 1, there // memory))


def commands(
    parts: Sequence[str], results: Path, tests: Sequence[str], bench: Sequence[str]
) -> list[list[str]]:
    """Return the commands that run in this order until one fails."""
    python = sys.executable
    pytest = [python, "-m", "pytest"]
    # Every tensor gets its own memory, so that an access outside of it is found.
    sanitized = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1"]
    runs = {
        "build": [[python, "setup.py", "-q", "build_ext", "--inplace"]],
        "tests": [[*pytest, *(tests or (*side_by_side(), *chosen_tests()))]],
        "sanitizer": [[*sanitized, "--tool", tool, *pytest, *SANITIZED] for tool in SANITIZERS],
        "benchmark": [
            [python, "-m", "mrcn_fast", "bench", "kernels", "--device", "cuda", "--out", str(results), *bench]
        ],
    }
    return [command for part in PARTS if part in parts for command in runs[part]]


def results_file(gpu: str) -> Path:
    """Return the file of a GPU's results: nvidia-h200.jsonl for ``NVIDIA H200``."""
    return ROOT / "benchmarks" / "results" / f"{re.sub('[^a-z0-9.]+', '-', gpu.lower()).strip('-')}.jsonl"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="make gpu-check", description="check and time the kernels on a GPU"
    )
    options.add_argument("--part", action="append", choices=PARTS, help="only this part (default: all)")
    options.add_argument(
        "--tests",
        type=shlex.split,
        default=[],
        metavar="ARGS",
        help="pytest's arguments instead of the whole matrix: --tests='-n 8 tests/test_gpu.py'",
    )
    options.add_argument(
        "--only", default="", metavar="TEXT", help="benchmark cases whose name contains TEXT"
    )
    options.add_argument("--seconds", default="2", help="measuring time of a benchmark case (default 2)")
    return options


def main(argv: list[str] | None = None) -> int:
    """Return 0 if all parts passed and every goal was met, 1 if not, 2 if this machine can't run them."""
    options = parser().parse_args(argv)
    parts = options.part or PARTS
    sys.path.insert(0, str(ROOT))
    if reason := lacking(parts):
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 2
    import torch

    left_out = {"build": unbuildable()} if "build" in parts else {}
    if "sanitizer" in parts:
        left_out["sanitizer"] = unsanitizable("build" in parts and left_out["build"] is None)
    for part, reason in left_out.items():
        if reason:
            print(f"gpu-check: without {part}: {reason}", flush=True)
    parts = [part for part in parts if not left_out.get(part)]
    results = results_file(torch.cuda.get_device_name())
    bench = ["--only", options.only, "--seconds", options.seconds, "--workers", str(processes(8 << 30))]
    for command in commands(parts, results, options.tests, bench):
        print(f"gpu-check: {' '.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
