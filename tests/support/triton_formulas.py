"""Evaluates the formulas of backends/triton/formulas.py in Triton's interpreter, for tests/test_formulas.py.

    TRITON_INTERPRET=1 python -m tests.support.triton_formulas NUMBERS RESULTS

NUMBERS is a file of torch with a tensor (numbers, cases); RESULTS is written, with a tensor (results, cases).
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mrcn_fast.backends.triton import formulas as f

# The rows of NUMBERS and of RESULTS; tests/test_formulas.py has them in the same order in C++.
NUMBERS = ("mean", "r", "gamma", "beta", "offset", "s", "x", "y", "S", "T", "U", "V", "dz", "length")
RESULTS = (
    "describe",
    "pooled_residual",
    "extreme_pixel",
    "residual_at",
    "correction",
    "normalized",
    "normalized shift",
    "restituted",
    "restituted shift",
    "restituted to_input",
    "restituted to_input shift",
    "distilled",
    "distilled shift",
    "gate_gradient",
    "share_of_normalized",
    "share_of_normalized to_input",
    "plane_gradient k1",
    "plane_gradient k2",
    "plane_gradient gamma",
    "plane_gradient beta",
)


class Constants(NamedTuple):
    """The constants that the formulas read of a kernel."""

    A: tl.dtype
    CASES: int  # a power of two
    READ: int
    MADE: int


@triton.jit
def evaluate(numbers: tl.tensor, results: tl.tensor, K: tl.constexpr) -> None:
    """Evaluate every formula for all cases: one program."""
    CASES: tl.constexpr = K.CASES
    READ: tl.constexpr = K.READ
    MADE: tl.constexpr = K.MADE
    c = tl.arange(0, CASES)
    inside = c < CASES
    read = ()  # type: tuple
    for k in tl.static_range(READ):
        read += (f.vector(numbers + k * CASES, c, inside, K),)
    _, _, _, _, offset, s, x, y, S, T, U, V, dz, length = read
    mean, r, a, beta = f.plane((numbers, numbers + 2 * CASES, numbers + 3 * CASES), 0, c, inside, CASES, K)
    extreme = f.extreme_pixel(a, x, y)
    made = (a, f.pooled_residual(mean, a, beta), extreme, f.extreme_residual(mean, a, beta, extreme))  # type: tuple
    made += (f.correction(s, offset),)
    made += f.normalized(offset, a, beta)
    made += f.restituted(s, mean, offset, a, beta, False)
    made += f.restituted(s, mean, offset, a, beta, True)
    made += f.distilled(s, mean, offset, a, beta)
    made += (f.gate_gradient(mean, a, beta, S, T),)
    made += (f.share_of_normalized(s, False), f.share_of_normalized(s, True))
    made += f.plane_gradient(r, a, U, V, dz, length)
    for k in tl.static_range(MADE):
        f.keep(results, k, made[k], c, inside, CASES)


def main(source: str, target: str) -> None:
    """Evaluate the formulas for the numbers in the file ``source``."""
    numbers = torch.load(source)
    cases = numbers.shape[1]
    results = numbers.new_empty((len(RESULTS), cases))
    kind = tl.float64 if numbers.dtype == torch.float64 else tl.float32
    evaluate[(1,)](numbers, results, Constants(kind, cases, len(NUMBERS), len(RESULTS)))
    torch.save(results, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
