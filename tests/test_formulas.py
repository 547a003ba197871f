"""The block's formulas stand twice, in csrc/block/formulas.h and in backends/triton/formulas.py.

Both are evaluated here on the same numbers, function by function, and have to give the same bits. Those of
C++ are compiled for this test without contraction, and Triton's run in its interpreter.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this machine")

from tests.support.triton_formulas import NUMBERS, RESULTS

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "csrc" / "block" / "formulas.h"
COMPILER = shutil.which("g++")

SOURCE = """
#include "block/formulas.h"

template <class R>
void evaluate(long cases, const R* numbers, R* results) {
  using namespace mrcn;
  for (long c = 0; c < cases; ++c) {
    const auto in = [&](int k) { return numbers[k * cases + c]; };
    const R s = in(5), length = in(13);
    const Plane<R> p = describe(in(0), in(4), in(1), in(2), in(3));
    const Plane<R> saved = describe(in(0), R(0), in(1), in(2), in(3));  // the backward has no offset
    const R extreme = extreme_pixel(p, in(6), in(7));
    const Affine<R> maps[] = {
        normalized(p), restituted(p, s, false), restituted(p, s, true), distilled(p, s)};
    const PlaneGradient<R> of = plane_gradient(p, in(10), in(11), in(12), length);
    const R made[] = {p.a, pooled_residual(p), extreme, residual_at(p, extreme), correction(p, s),
        maps[0].scale, maps[0].shift, maps[1].scale, maps[1].shift, maps[2].scale, maps[2].shift,
        maps[3].scale, maps[3].shift, gate_gradient<R>(saved, {in(8), in(9)}), share_of_normalized(s, false),
        share_of_normalized(s, true), of.k1, of.k2, of.gamma, of.beta};
    for (int k = 0; k < int(sizeof(made) / sizeof(R)); ++k) results[k * cases + c] = made[k];
  }
}

extern "C" void evaluate_double(long cases, const double* numbers, double* results) {
  evaluate(cases, numbers, results);
}
extern "C" void evaluate_float(long cases, const float* numbers, float* results) {
  evaluate(cases, numbers, results);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The formulas of C++ as a shared library."""
    if COMPILER is None:
        pytest.skip("there is no g++ here to compile csrc/block/formulas.h with")
    folder = tmp_path_factory.mktemp("formulas")
    (folder / "formulas.cpp").write_text(SOURCE)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(
        [COMPILER, *flags, f"-I{ROOT / 'csrc'}", "formulas.cpp", "-o", "formulas.so"], cwd=folder, check=True
    )
    return ctypes.CDLL(str(folder / "formulas.so"))


def drawn(dtype: torch.dtype) -> Tensor:
    """(numbers, cases): ordinary numbers, some of them replaced by 0, 1, large, infinite or NaN."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn((len(NUMBERS), 128), dtype=dtype, generator=generator)
    numbers[NUMBERS.index("r")].abs_()
    numbers[NUMBERS.index("length")] = torch.randint(1, 3000, (128,), generator=generator).to(dtype)
    special = torch.tensor([0.0, 1.0, -1.0, 1e30, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    rows = torch.randint(0, len(NUMBERS) - 1, (64,), generator=generator)
    numbers[rows, torch.arange(64)] = special[torch.randint(0, 7, (64,), generator=generator)]
    return numbers


def in_triton(numbers: Tensor, folder: Path) -> Tensor:
    """The results of Triton's formulas, from a process in which kernels are interpreted."""
    torch.save(numbers, folder / "numbers.pt")
    subprocess.run(
        [sys.executable, "-m", "tests.support.triton_formulas", folder / "numbers.pt", folder / "results.pt"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        check=True,
    )
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_give_the_same_numbers(dtype: torch.dtype, library: ctypes.CDLL, tmp_path: Path) -> None:
    numbers = drawn(dtype)
    results = torch.full((len(RESULTS), numbers.shape[1]), -12345.0, dtype=dtype)
    run = library.evaluate_double if dtype == torch.float64 else library.evaluate_float
    run(
        ctypes.c_long(numbers.shape[1]),
        ctypes.c_void_p(numbers.data_ptr()),
        ctypes.c_void_p(results.data_ptr()),
    )
    of_triton = in_triton(numbers, tmp_path)
    for name, of_cpp, other in zip(RESULTS, results, of_triton, strict=True):
        assert of_cpp.isfinite().sum() >= 64, f"{name} is hardly ever finite"
        same = (other == of_cpp) | (other.isnan() & of_cpp.isnan())
        assert same.all(), f"{name}: {other[~same]} in Triton, {of_cpp[~same]} in C++"


def test_every_formula_of_cpp_is_compared() -> None:
    functions = set(re.findall(r"^MRCN_HOST_DEVICE .*?(\w+)\(", HEADER.read_text(), re.MULTILINE))
    compared = {name.split()[0] for name in RESULTS}
    # The others contain this one.
    assert functions - {"nothing_if_finite"} == compared
