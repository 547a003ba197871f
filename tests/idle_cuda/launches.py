"""Launches as Triton itself makes them, on a driver that runs none.

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
from tests import cases, idle_cuda
from tests.cases import Case, CQCCase

# Every operation, gate and layout that the kernels read, and the launches of a call and its backward.
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
    """The kernels that Triton was asked for, and not what it had compiled of them."""
    names: list[str] = []
    run = JITFunction.run

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", recorded)
    # On a GPU nobody waits for the number of identities, which nobody has written here.
    monkeypatch.setattr(sys.modules["mrcn_fast.cqc"], "_check_count", lambda *_: None)
    return names


def evaluation(case: Case | CQCCase) -> Callable[[], object]:
    if isinstance(case, CQCCase):
        loss = cases.cqc_problem(case)
        return lambda: cases.evaluate_cqc(loss, "triton")
    block = cases.problem(case)
    return lambda: cases.evaluate(block, "triton")


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
    p = cases.problem(Case("pair", "se"))
    before = launches.count()
    for _ in range(2):
        outputs = cases.call(p.case, p.inputs, p.parameters, "triton")
        torch.autograd.grad(outputs[2], p.inputs[1], p.gradients[2])
    assert launches.count() - before == 12


def test_addresses_that_are_no_multiple_of_16(launches: idle_cuda.Launches, asked: list[str]) -> None:
    """Triton compiles anew for them, whatever it compiled before, and is asked at every call."""
    case = Case("pair", "se", shape=(2, 5, 4, 4))
    aligned, odd = cases.problem(case), cases.problem(case)
    buffer = torch.zeros(odd.inputs[0].numel() + 1)
    moved = buffer[1:].view(case.shape).requires_grad_()
    odd = odd._replace(inputs=(moved, odd.inputs[1]))
    for _ in range(2):
        cases.evaluate(aligned, "triton")
        asked.clear()
        cases.evaluate(odd, "triton")
        assert len(asked) == 6
