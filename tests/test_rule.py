"""The rule of `tests.support.rule`: what it notices, and what it lets pass."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support import block_cases, matrix
from tests.support.block_cases import Case
from tests.support.matrix import MODES
from tests.support.rule import DRAWS, LEAD, Verdict, judge, verdicts


@pytest.mark.parametrize("mode", MODES)
def test_the_rule_notices_a_wrong_result(mode: str) -> None:
    p = block_cases.problem(Case(mode, shape=(2, 3, 4, 5)))
    eager, truth = block_cases.evaluate_reference(p, torch.float32), block_cases.truth(p)
    assert all(v.ratio <= 1 for v in verdicts(eager, eager, truth).values())
    for name, result in eager.items():
        for wrong in (result + 1e-5 * result.abs().max(), result * math.nan, torch.zeros_like(result)):
            found = verdicts(eager | {name: wrong}, eager, truth)
            assert [other for other, v in found.items() if v.ratio > 1] == [name]


@matrix.backends("cpu")
def test_the_rule_knows_what_cancelled(backend: str) -> None:
    """γ's gradient is 9e-19 in the truth, 0 in eager PyTorch and 4e-15 in the kernels; others are 322."""
    case = Case("snr", "eca", shape=(5, 1, 8, 2), dtype=torch.float64, gradient_layout="expanded scalar")
    block_cases.check_accuracy(case._replace(values="uneven", hidden=5, seed=11819), backend)


def test_the_rule_looks_twice_before_it_fails() -> None:
    """A single draw may exceed the bound; the median may not, and no draw may exceed it by far."""

    def run(*ratios: float) -> None:
        drawn = iter(ratios)
        judge(Case(), "none", lambda case: {"loss": Verdict(next(drawn), "loss", 0.0, 0.0, 0.0)})

    enough = [0.5] * (LEAD + 1)
    run(0.9)
    run(1.1, *enough)
    with pytest.raises(StopIteration):
        run(1.1, *enough[1:])
    for number, ratios in (
        (DRAWS + 1, (1.1, *[1.1] * DRAWS)),
        (DRAWS + 1, (1.1, *[0.5, 1.1] * (DRAWS // 2))),
        (LEAD + 2, (65.0, *enough)),
        (LEAD + 4, (1.1, 65.0, 0.5, *enough)),
        (LEAD + 2, (math.inf, *enough)),
    ):
        with pytest.raises(pytest.fail.Exception, match=rf"loss; .* of the bound, over {number} draws"):
            run(*ratios)
