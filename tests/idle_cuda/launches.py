"""Launches through Triton's own host code, on a driver that runs no kernel.

tests/test_triton_launching.py runs this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime import JITFunction

from mrcn_fast.backends.triton import launch
from tests import idle_cuda
from tests.support import block_cases, cqc_cases
from tests.support.block_cases import Case
from tests.support.cqc_cases import CQCCase

# Cases with every operation, gate and layout of the kernels, and the launches of a call with its backward.
CALLS: dict[str, tuple[Case | CQCCase, int]] = {
    "pair se": (Case("pair", "se"), 6),
    "concat eca bf16": (Case("concat", "eca", dtype=torch.bfloat16, layouts=("channels_last",) * 2), 6),
    "snr cbam": (Case("snr", "cbam-channel", layouts=("channels_last",) * 2), 6),
    "restitute": (Case("restitute", "se", restitute_to="input", parameter_dtype=torch.float32), 6),
    "no samples": (Case("pair", "se", shape=(0, 6, 4, 3)), 1),
    "cqc": (CQCCase(), 2),
    "cqc stacked": (CQCCase(stacked=True), 2),
    "cqc normalized": (CQCCase(normalize=True), 2),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> idle_cuda.Launches:
    return idle_cuda.use(tmp_path_factory.mktemp("idle_cuda"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched through Triton's own `run`, and not through a remembered launch."""
    names: list[str] = []
    run = JITFunction.run

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", recorded)
    # The number of identities, for which the check would wait, is written by no kernel here.
    monkeypatch.setattr(sys.modules["mrcn_fast.cqc"], "_check_count", lambda *_: None)
    return names


def evaluation(case: Case | CQCCase) -> Callable[[], object]:
    if isinstance(case, CQCCase):
        loss = cqc_cases.problem(case)
        return lambda: cqc_cases.evaluate(loss, "triton")
    block = block_cases.problem(case)
    return lambda: block_cases.evaluate(block, "triton")


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_launches_what_the_first_one_did(
    name: str, launches: idle_cuda.Launches, asked: list[str]
) -> None:
    case, expected = CALLS[name]
    call, before = evaluation(case), launches.count()
    call()
    assert launches.count() - before == expected == len(asked)
    first = launches.programs(expected)
    call()
    assert launches.count() - before == 2 * expected
    assert launches.programs(expected) == first
    assert len(asked) == expected, "and goes straight to what was compiled"


@pytest.mark.parametrize("name", ["pair se", "cqc normalized"])
def test_without_tritons_compiled_kernels_every_launch_is_asked_for(
    name: str, launches: idle_cuda.Launches, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to go on with a Triton that was never tried: `internals.compiled_kernel_type`."""
    monkeypatch.setattr(launch, "COMPILED_KERNEL", None)
    case, expected = CALLS[name]
    if isinstance(case, Case):  # of a shape that no other test has compiled
        case = case._replace(shape=(3, 7, 4, 3))
    else:
        case = case._replace(dimensions=case.dimensions + 3)
    call, before = evaluation(case), launches.count()
    for _ in range(2):
        call()
    assert launches.count() - before == 2 * expected == len(asked)


def test_gradients_that_are_not_there(launches: idle_cuda.Launches, asked: list[str]) -> None:
    p = block_cases.problem(Case("pair", "se"))
    before = launches.count()
    for _ in range(2):
        outputs = block_cases.call(p.case, p.inputs, p.parameters, "triton")
        torch.autograd.grad(outputs[2], p.inputs[1], p.gradients[2])
    assert launches.count() - before == 12


def test_addresses_that_are_no_multiple_of_16(launches: idle_cuda.Launches, asked: list[str]) -> None:
    """Triton compiles anew for them, whatever it compiled before, and is asked at every call."""
    case = Case("pair", "se", shape=(2, 5, 4, 4))
    aligned, odd = block_cases.problem(case), block_cases.problem(case)
    buffer = torch.zeros(odd.inputs[0].numel() + 1)
    moved = buffer[1:].view(case.shape).requires_grad_()
    odd = odd._replace(inputs=(moved, odd.inputs[1]))
    for _ in range(2):
        block_cases.evaluate(aligned, "triton")
        asked.clear()
        block_cases.evaluate(odd, "triton")
        assert len(asked) == 6
