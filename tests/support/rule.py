"""The rule by which the result of a kernel is judged: against the eager reference's own rounding error.

    max|fused - truth| <= 1.5 max|eager - truth| + eps max|truth|        for each output and each gradient,

where eager is the reference in the case's own dtype, eps belongs to the dtype of the tensor compared, and
truth is the reference in float64 from the upcast inputs. For float64 itself that would compare a rounding
error with zero: there truth is `tests.support.extended`, the equations in numpy's long double.

Both sides are rounding errors, and the eager error of a tensor of a few numbers is now and then zero by luck.
So a case that breaks the rule is drawn again with other values, up to `DRAWS` times: the rule must hold for
the median of the draws, and no draw may exceed the bound by a factor of more than `CEILING`. A result that is
systematically worse does not pass.

The draws end early where those within the bound outnumber the others by `LEAD`. That decides as all draws
would: of results that break the rule in 55 % of their draws, 13 % pass either way, and in 60 %, 2 %. Of
results that hold it in 90 %, which all pass either way, it takes 21 draws.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import extended


def array(x: Tensor) -> extended.Array:
    """``x`` in long double, detached and on the CPU."""
    return x.detach().double().cpu().numpy().astype(np.longdouble)


class Verdict(NamedTuple):
    """How far a tensor is from the rule, which holds up to a ratio of 1."""

    ratio: float
    text: str
    fused: float  # the largest error of the kernel's result
    eager: float  # the largest error of the eager reference
    unit: float  # the rounding unit of the largest value


DRAWS, LEAD, CEILING = 100, 16, 64.0


def verdicts(
    results: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, extended.Array]
) -> dict[str, Verdict]:
    """The rule applied to each tensor, by name."""
    assert results.keys() == eager.keys() == truth.keys()
    found = {}
    everywhere = max(_largest(reference) for reference in truth.values())
    for name, result in results.items():
        reference = truth[name]
        assert tuple(result.shape) == reference.shape, f"{name}: {tuple(result.shape)}, not {reference.shape}"
        fused_error = _largest(array(result) - reference)
        eager_error = _largest(array(eager[name]) - reference)
        largest = _largest(reference)
        # A value that cancels has no unit of its own: γ's gradient, where the gradient is constant, is zero
        # or the rounding error of the truth itself. The unit is then that of all results.
        exact = np.longdouble if result.dtype == torch.float64 else np.float64
        size = largest if largest > np.finfo(exact).eps * everywhere else everywhere
        unit = torch.finfo(result.dtype).eps * size
        found[name] = Verdict(
            ratio(fused_error, 1.5 * eager_error + unit),
            f"{name}: error {fused_error:.3e}, of the eager reference {eager_error:.3e}, rounding unit "
            f"{unit:.3e}, largest value {largest:.3e}",
            fused_error,
            eager_error,
            unit,
        )
    return found


def ratio(error: float, bound: float) -> float:
    """The error as a multiple of its bound; 0 where the reference itself overflows and so says nothing."""
    if error == 0 or not math.isfinite(bound):
        return 0.0
    return math.inf if math.isnan(error) or bound == 0 else error / bound


def _largest(x: extended.Array) -> float:
    return float(np.abs(x).max(initial=0.0)) if not np.isnan(x).any() else math.nan


class Case(Protocol):
    """A NamedTuple from whose seed the values follow, such as a case of the block or of the loss."""

    @property
    def seed(self) -> int: ...

    def _replace(self: C, *, seed: int = ...) -> C: ...


C = TypeVar("C", bound=Case)


def _lead(draws: list[Verdict]) -> int:
    """By how many the draws that hold the rule outnumber those that break it."""
    return sum(1 if draw.ratio <= 1 else -1 for draw in draws)


def judge(case: C, backend: str, compare: Callable[[C], dict[str, Verdict] | None]) -> None:
    """Fail if the case breaks the rule, and name what does.

    ``compare`` gives the verdicts on a case, or None where it is near a kink.
    """
    first = compare(case)
    if first is None:
        pytest.fail(f"{case} is near a kink, where gradients jump: choose another seed", pytrace=False)
    broken = {name: [verdict] for name, verdict in first.items() if verdict.ratio > 1}
    if not broken:
        return
    for seed in range(case.seed + 1, case.seed + 1 + DRAWS):
        again = compare(case._replace(seed=seed))
        for name in broken if again else ():
            assert again is not None
            broken[name].append(again[name])
        if min(map(_lead, broken.values())) >= LEAD:
            break
    lines: list[str] = []
    for draws in broken.values():
        ratios = sorted(v.ratio for v in draws)
        median = statistics.median(ratios)
        if median > 1 or ratios[-1] > CEILING:
            lines.append(
                f"{draws[0].text}; {draws[0].ratio:.2f} of the bound, over {len(draws)} draws in the median "
                f"{median:.2f}, at most {ratios[-1]:.2f}"
            )
    if lines:
        pytest.fail("\n".join([f"backend {backend!r}, {case}", *lines]), pytrace=False)
