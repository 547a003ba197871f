"""The problems that are measured: their calls, and the comparison of the results before a measurement."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mrcn_fast import benchmark
from mrcn_fast.benchmark import EXACT, timing
from mrcn_fast.benchmark.suites import problems
from mrcn_fast.benchmark.suites.problems import OPERATIONS, Problem


def test_compulsory_volumes() -> None:
    """6 and 8 for the pair, 8 with the six sets in one batch, 2 for restitution."""
    assert [OPERATIONS["block"].volumes(way) for way in problems.WAYS] == [6, 8, 14]
    assert OPERATIONS["concat"].volumes("forward") == 8
    assert OPERATIONS["restitution"].volumes("forward") == 2
    assert OPERATIONS["block"].results("forward+backward") == 6


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("way", problems.WAYS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_baselines_are_right(operation: str, way: str, dtype: str) -> None:
    """The fused result is the eager one, and the floor moves the compulsory bytes."""
    problem = Problem(operation, way, (2, 8, 5, 4), "channels_last", dtype)
    calls = problems.map_calls(problem)
    benchmark.check(calls, timing.TOLERANCES[problems.DTYPES[dtype]])
    assert (EXACT in calls) == (dtype != "fp32")
    copied = calls["floor"]()
    assert 2 * copied.numel() == OPERATIONS[operation].volumes(way) * 2 * 8 * 5 * 4


@pytest.mark.parametrize("way", problems.WAYS)
def test_large_volumes_are_compared_in_parts(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples at a time give what all eight give, and a wrong sample in the last part is found."""
    problem = Problem("block", way, (8, 4, 5, 4))
    whole = problems.map_calls(problem)["eager"]()
    monkeypatch.setattr(problems, "LARGEST_WITH_BASELINES", problem.volume_bytes * 3 / 8)
    calls = problems.map_calls(problem, with_baselines=False)
    assert set(calls) == {"fused", EXACT, "floor"}
    assert benchmark.largest_error(calls[EXACT](), whole) < 1e-5
    benchmark.check(calls)
    wrong = [tensor.clone() for tensor in calls["fused"]()]
    wrong[0][7] += 1.0
    with pytest.raises(RuntimeError, match="the fused result is off by"):
        benchmark.check(calls | {"fused": lambda: wrong})


def test_other_kernels_are_timed_beside_the_default_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result is compared first; the reference stands in for a GPU's second backend."""
    assert problems.other_kernels("cpu") == []
    monkeypatch.setattr(problems, "other_kernels", lambda device: ["reference"])
    for calls in (
        problems.map_calls(Problem("block", "forward", (2, 4, 3, 3))),
        problems.cqc_calls(2, 2, 9),
    ):
        assert list(calls)[:2] == ["fused", "fused reference"]
        benchmark.check(calls)
        wrong = [1.5 * tensor for tensor in calls["fused"]()]
        with pytest.raises(RuntimeError, match="the fused reference result is off by"):
            benchmark.check(calls | {"fused reference": lambda wrong=wrong: wrong})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_other_baselines_give_the_reference_results(operation: str) -> None:
    chosen = OPERATIONS[operation]
    torch.manual_seed(0)
    module = chosen.make(8, dtype=torch.float64, backend="reference")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    maps = torch.randn(chosen.inputs, 2, 8, 5, 4, dtype=torch.float64).unbind()
    for form in (chosen.collapsed, chosen.library):
        for plain, other in zip(chosen.call(module, *maps), form(module, *maps), strict=True):
            torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", timing.TOLERANCES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_baselines_of_the_loss_are_right(normalize: bool, dtype: torch.dtype) -> None:
    calls = problems.cqc_calls(3, 2, 33, "cpu", dtype, normalize)
    benchmark.check(calls, timing.TOLERANCES[dtype])
    assert ("unfused" in calls) == normalize
    if dtype == torch.float32:
        for name in calls.keys() - {"fused", "vectorized"}:
            assert benchmark.largest_error(calls[name](), calls["vectorized"]()) < 1e-4


def test_calls_use_their_tensors_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused form and the baseline use the same set at the same call."""
    monkeypatch.setattr(problems, "rotation", lambda device, size: 3)
    for calls in (
        problems.cqc_calls(2, 2, 9),
        problems.map_calls(Problem("block", "backward", (1, 4, 3, 3))),
    ):
        plain = calls.get("vectorized") or calls["eager"]
        rounds = [(calls["fused"](), plain()) for _ in range(4)]
        for fused, expected in rounds:
            assert benchmark.largest_error(fused, expected) < 1e-4
        assert torch.equal(rounds[0][0][0], rounds[3][0][0])
        assert not torch.equal(rounds[0][0][0], rounds[1][0][0])


def test_every_fused_form_is_compared_on_its_own_first_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU there are two fused forms, and each uses several sets of tensors in turn."""
    monkeypatch.setattr(problems, "rotation", lambda device, size: 3)
    monkeypatch.setattr(problems, "other_kernels", lambda device: ["reference"])
    calls = problems.map_calls(Problem("block", "forward+backward", (1, 4, 3, 3)))
    assert [name for name in calls if name.startswith("fused")] == ["fused", "fused reference"]
    benchmark.check(calls)


def test_a_hot_case_uses_one_set_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "rotation", lambda device, size: 3)
    fused = problems.map_calls(Problem("block", "forward", (1, 4, 3, 3), hot=True))["fused"]
    assert torch.equal(fused()[0], fused()[0])


def test_a_floor_larger_than_its_tensors_moves_all_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "_COPIED_AT_ONCE", 64.0)
    moved: list[int] = []
    copy_ = torch.Tensor.copy_

    def counted(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        moved.append(target.numel())
        return copy_(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    problems.copy_of(2 * 37)()
    assert sum(moved) == 37 and max(moved) == 16


MISTAKES: dict[str, Callable[[Any], object]] = {
    "gates without weights": lambda block: [torch.nn.init.zeros_(p) for p in block.gate.parameters()],
    "gates of other places": lambda block: [p.copy_(p.roll(1, 0)) for p in block.gate.parameters()],
    "no norm weight": lambda block: torch.nn.init.ones_(block.norm_weight),
    "no norm bias": lambda block: torch.nn.init.zeros_(block.norm_bias),
}


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_gates_and_norms_are_found(
    mistake: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the parameters and maps of the cases, a block that makes such a mistake is not timed."""

    def call(block: Any, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if block.backend != "reference":
            block = copy.deepcopy(block)
            MISTAKES[mistake](block)
        return tuple(block(*maps)[1:5])

    monkeypatch.setitem(OPERATIONS, "block", OPERATIONS["block"]._replace(call=call))
    calls = problems.map_calls(Problem("block", "forward", (2, 32, 9, 8), "nchw", dtype))
    with pytest.raises(RuntimeError, match="the fused result is off by"):
        benchmark.check(calls, timing.TOLERANCES[problems.DTYPES[dtype]])
