"""`mrcn-fast bench host` for the GPU backends on a machine without a GPU, with launches that do nothing.

    python benchmarks/host_time.py --backend triton

Backend "cuda" has the operations of tests/cuda_on_host and a launch that does nothing; backend "triton" has
the driver of tests/idle_cuda, whose launches run nothing. The rest is as on a GPU, except that the allocator
is the CPU's and that there is no stream. It stands outside the package because it needs these parts of
tests/.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mrcn_fast import dispatch  # noqa: E402
from mrcn_fast.benchmark import results  # noqa: E402
from mrcn_fast.benchmark.suites import host  # noqa: E402


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


USE = {"cuda": use_cuda, "triton": use_triton}


def ignore_count(*_: object) -> None:
    """Replace the check of the number of identities, for which no call on a GPU waits."""


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description="host time of the block with launches that do nothing")
    options.add_argument("--backend", choices=list(USE), default="cuda", help="default cuda")
    options.add_argument("--out", type=Path, metavar="FILE", help="append the result to FILE as a JSON line")
    given = options.parse_args(argv)
    USE[given.backend]()
    sys.modules["mrcn_fast.cqc"]._check_count = ignore_count  # type: ignore[attr-defined]
    found = host.measure_host(given.backend)
    host.print_times(found)
    if given.out:
        case = f"host time of {given.backend}, stubbed launch {'x'.join(map(str, host.SHAPE))}"
        results.write(given.out, host.result(case, found))


if __name__ == "__main__":
    main()
