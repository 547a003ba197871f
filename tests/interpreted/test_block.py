"""The block's Triton kernels against the reference, by the rule of tests/support/rule.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mrcn_fast
from mrcn_fast import MRCNBlock, dispatch
from mrcn_fast.backends import triton as backend
from mrcn_fast.backends.triton import plan as planning
from mrcn_fast.backends.triton import tiles
from mrcn_fast.gates import FUSED
from mrcn_fast.operations import OPERATIONS
from tests import test_nonfinite
from tests.support import block_cases, matrix
from tests.support.block_cases import Case
from tests.support.matrix import GATES, MODES, SETTINGS
from tests.support.tensors import LAYOUTS, arrange, different_bits, nonfinite, same_bits

SMALL = (2, 3, 3, 5)
# The seed of values that hold the rule at once. Others break it by luck and are drawn again, at length.
FIRST = 2


def case(mode: str, gate: str = "se", restitute_to: str = "normalized", **settings: Any) -> Case:
    """A case all of whose maps have one layout."""
    layout = settings.pop("layout", "contiguous")
    shape = settings.pop("shape", SMALL)
    return Case(mode, gate, restitute_to, shape, layouts=(layout, layout), gradient_layout=layout, **settings)


TILES = ("whole planes", "parts")


@pytest.fixture(params=TILES)
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Tiles so small that every loop, mask and partial sum has several rounds; their name."""

    def configure(channels: int, length: int, *_: Any) -> tiles.Config:
        whole = request.param == "whole planes"
        first = tiles.Tile(2, length if whole else 12, 4, 4, 2)
        between = tiles.Tile(2 if whole else tiles.next_power(channels), 0, 0, 4)
        last = tiles.Tile(2, 12, 4, 4, 2)
        return tiles.Config(first, between, last, first, between, last)

    monkeypatch.setattr(planning, "configure", configure)
    monkeypatch.setattr(planning, "LAYER_CHANNELS", 2)
    monkeypatch.setattr(planning, "LAYER_HIDDEN", 2)
    planning.plan.cache_clear()
    yield request.param
    planning.plan.cache_clear()


# --- accuracy ---------------------------------------------------------------------------------------------

WAYS = {
    "float32": (torch.float32, "contiguous"),
    "float64": (torch.float64, "channels_last"),
    "bfloat16": (torch.bfloat16, "channels_last"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("mode", "gate", "restitute_to"), SETTINGS)
def test_accuracy(mode: str, gate: str, restitute_to: str, way: str) -> None:
    dtype, layout = WAYS[way]
    shape = SMALL if dtype == torch.float32 else (1, *SMALL[1:])
    block_cases.check_accuracy(
        case(mode, gate, restitute_to, dtype=dtype, layout=layout, shape=shape), "triton"
    )


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "channels_last"),
        (torch.float64, "contiguous"),
        (torch.bfloat16, "contiguous"),
        (torch.float16, "contiguous"),
    ],
)
def test_accuracy_of_the_other_ways(dtype: torch.dtype, layout: str) -> None:
    drawn = case("pair", "cbam-channel", dtype=dtype, layout=layout, parameter_dtype=None)
    block_cases.check_accuracy(drawn, "triton")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("mode", "gate"), [("pair", "se"), ("concat", "cbam-channel"), ("snr", "eca"), ("restitute", "se")]
)
def test_accuracy_over_many_tiles(mode: str, gate: str, layout: str, tiny: str) -> None:
    drawn = case(mode, gate, shape=(1, 5, 3, 5), layout=layout, hidden=3, seed=FIRST)
    block_cases.check_accuracy(drawn, "triton")


@pytest.mark.parametrize("gate", ["se", "eca"])
def test_accuracy_where_tiles_end_with_the_plane(gate: str, tiny: str) -> None:
    block_cases.check_accuracy(case("pair", gate, shape=(1, 4, 2, 8), hidden=4), "triton")


@pytest.mark.parametrize("mode", MODES)
@matrix.examples(3)
@given(data=st.data())
def test_accuracy_of_anything(mode: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    block_cases.check_accuracy(data.draw(block_cases.cases(mode, dtype, elements=100)), "triton")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_accuracy_where_the_mean_is_large(layout: str, tiny: str) -> None:
    drawn = case("snr", shape=(1, 2, 7, 5), values="large mean", layout=layout)
    block_cases.check_accuracy(drawn, "triton")
    results = block_cases.evaluate(block_cases.problem(drawn), "triton")
    truth = block_cases.evaluate_reference(block_cases.problem(drawn), torch.float64)
    # F̃ by itself, which has lost the mean of 1000: E[x²] - E[x]² would leave it no digit.
    torch.testing.assert_close(results["normalized"].double(), truth["normalized"], rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mode", MODES)
def test_values_that_are_not_finite(mode: str, gate: str, layout: str, tiny: str) -> None:
    seed = TILES.index(tiny)  # other values for each kind of tiles
    drawn = test_nonfinite.draw(seed, mode, gate, torch.float32, layout, [SMALL])
    assert test_nonfinite.differences(*drawn, "triton") == []


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [1e37, torch.finfo(torch.float32).max], ids=str)
def test_large_values_stay_finite(value: float, layout: str) -> None:
    test_nonfinite.assert_large_values_stay_finite("cbam-channel", layout, value, "triton")


@pytest.mark.parametrize("values", ["zero planes", "constant planes"])
def test_accuracy_of_planes_without_variance(values: str) -> None:
    for gate in GATES:
        drawn = case("pair", gate, shape=(1, 3, 3, 5), values=values)
        assert all(
            r.isfinite().all() for r in block_cases.evaluate(block_cases.problem(drawn), "triton").values()
        )
        block_cases.check_accuracy(drawn, "triton")


# --- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_accuracy_in_every_layout(layout: str) -> None:
    mode = "pair" if "sliced" in layout else "snr"
    block_cases.check_accuracy(case(mode, shape=(2, 3, 3, 4), layout=layout, seed=FIRST), "triton")


def test_accuracy_where_every_map_has_its_own_layout() -> None:
    for layouts, gradient_layout in (
        (("contiguous", "channels_last"), "transposed"),
        (("channels_last", "channel-sliced"), "expanded scalar"),
    ):
        drawn = Case("pair", shape=SMALL, layouts=layouts, gradient_layout=gradient_layout)
        block_cases.check_accuracy(drawn, "triton")


@pytest.mark.parametrize("layout", ["channel-sliced", "channels_last channel-sliced"])
@pytest.mark.parametrize("mode", MODES)
def test_results_have_their_inputs_layout(mode: str, layout: str) -> None:
    results = block_cases.evaluate(
        block_cases.problem(case(mode, shape=(2, 5, 4, 3), layout=layout)), "triton"
    )
    memory_format = torch.channels_last if "channels_last" in layout else torch.contiguous_format
    for name in (*block_cases.output_names(mode), *(f"grad {n}" for n in block_cases.input_names(mode))):
        assert results[name].is_contiguous(memory_format=memory_format), name


@pytest.mark.parametrize("mode", MODES)
def test_no_samples(mode: str) -> None:
    p = block_cases.problem(case(mode, shape=(0, 3, 4, 5)))
    results = block_cases.evaluate(p, "triton")
    for name, leaf in zip(("norm_weight", "norm_bias"), p.parameters, strict=False):
        assert torch.equal(results[f"grad {name}"], torch.zeros_like(leaf))
    assert all(r.numel() == 0 for name, r in results.items() if name in block_cases.output_names(mode))


# --- derivatives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str, gate: str) -> None:
    drawn = block_cases.away_from_kinks(case(mode, gate, shape=(1, 2, 1, 3), dtype=torch.float64, eps=0.1))
    p = block_cases.problem(drawn)
    count = len(p.inputs)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return block_cases.call(drawn, tensors[:count], tensors[count:], "triton")

    assert torch.autograd.gradcheck(run, (*p.inputs, *p.parameters), fast_mode=True)


@pytest.mark.parametrize(
    ("mode", "chosen"), [("pair", c) for c in ((0,), (1,), (2,), (3,), (0, 2))] + [("snr", (1,))]
)
def test_any_outputs_may_be_left_out_of_the_loss(mode: str, chosen: tuple[int, ...]) -> None:
    p = block_cases.problem(case(mode, "cbam-channel", dtype=torch.float64))
    leaves = (*p.inputs, *p.parameters)
    found = []
    for name in ("triton", "reference"):
        outputs = block_cases.call(p.case, p.inputs, p.parameters, name)
        wanted = [outputs[i] for i in chosen], leaves, [p.gradients[i] for i in chosen]
        found.append(torch.autograd.grad(*wanted, allow_unused=True))
    for leaf, got, want in zip(leaves, *found, strict=True):
        zero = torch.zeros_like(leaf)
        torch.testing.assert_close(
            zero if got is None else got, zero if want is None else want, rtol=1e-11, atol=1e-11
        )


# --- every element is written, every run gives the same bits ----------------------------------------------


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """torch fills what it allocates with NaN: results and scratch."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("mode", MODES)
def test_every_element_of_every_result_is_written(mode: str, layout: str, empty_is_nan: None) -> None:
    assert torch.empty(3).isnan().all()
    for gate, shape in zip(GATES, [(1, 1, 1, 2), (2, 3, 5, 7), (1, 6, 3, 3)], strict=True):
        p = block_cases.problem(case(mode, gate, shape=shape, layout=layout))
        for name, result in block_cases.evaluate(p, "triton").items():
            assert result.isfinite().all(), f"{name} of {p.case}"


@pytest.mark.parametrize("mode", MODES)
def test_two_runs_give_the_same_bits(mode: str, tiny: str) -> None:
    p = block_cases.problem(case(mode, "cbam-channel", shape=(1, 3, 2, 5)))
    first = block_cases.evaluate(p, "triton")
    block_cases.poison_memory(p)
    assert different_bits(first, block_cases.evaluate(p, "triton")) == []


@pytest.mark.parametrize("gate", GATES)
def test_restitution_alone_is_bitwise_the_pairs(gate: str) -> None:
    module = MRCNBlock(3, reduction=1, gate=gate, backend="triton")
    visible, infrared = torch.randn(2, 2, 3, 4, 5).unbind()
    features = module(visible, infrared)
    assert same_bits(module.restitute(visible, "visible"), features.visible_restituted)
    assert same_bits(module.restitute(infrared, "infrared"), features.infrared_restituted)
    assert same_bits(module(visible, infrared, concat=True), torch.cat(features))


# --- values that are not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "gate", "value"),
    [("pair", g, v) for g in GATES for v in (math.nan, math.inf)] + [("snr", "se", -math.inf)],
)
def test_nonfinite_values_come_out_where_the_reference_has_them(mode: str, gate: str, value: float) -> None:
    """One such value in a tensor in turn: the rule of tests/test_block_accuracy.py.

    With two samples: with one, torch's convolution, ECA's reference, lets the padding meet a NaN.
    """
    drawn = case(mode, gate)
    fresh = block_cases.problem(drawn)
    places = [("inputs", 0, 17), ("inputs", 0, 0), ("gradients", 1, -1)]
    places += [("parameters", i, 0) for i in range(len(fresh.parameters))]
    for kind, index, at in places:
        p = block_cases.problem(drawn)
        target = getattr(p, kind)[index].detach()
        target[torch.unravel_index(torch.tensor(at % target.numel()), target.shape)] = value
        results, expected = (
            block_cases.evaluate(p, "triton"),
            block_cases.evaluate_reference(p, torch.float32),
        )
        for name, result in results.items():
            if not name.startswith("grad "):
                same = torch.equal(nonfinite(result), nonfinite(expected[name]))
            else:
                same = math.isinf(value) or torch.equal(result.isfinite(), expected[name].isfinite())
            assert same, f"{value} in {kind}[{index}] at {at}: {name}"


# --- torch's side -----------------------------------------------------------------------------------------


def operation(name: str) -> Any:
    return backend.operation(name)


@pytest.mark.parametrize("gate", ["se", "cbam-channel"])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode: str, gate: str) -> None:
    p = block_cases.problem(case(mode, gate, shape=(1, 2, 2, 3), layout="channels_last"))
    norm_weight, norm_bias, *gate_parameters = (q.detach() for q in p.parameters)
    inputs = [x.detach() for x in p.inputs]
    flags = [False] if OPERATIONS[mode].restitutes else []
    parameters = (norm_weight, norm_bias, gate_parameters, FUSED.index(gate))
    forward, backward = (operation(f"{OPERATIONS[mode].op}_{way}") for way in ("forward", "backward"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, (*inputs, *parameters, 1e-5, *flags), test_utils=tests)
    *_, statistics = forward(*inputs, *parameters, 1e-5, *flags)
    gradients: list[Tensor | None] = [*p.gradients]
    if len(gradients) > 1:
        gradients[1] = None
    torch.library.opcheck(backward, (*gradients, *inputs, statistics, *parameters, *flags), test_utils=tests)


@pytest.mark.parametrize("concat", [False, True])
def test_the_block_is_one_graph(concat: bool) -> None:
    module = MRCNBlock(3, reduction=1, backend="triton", dtype=torch.float64)
    visible, infrared = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).requires_grad_().unbind()

    def total(run: Any) -> Tensor:
        features = run(visible, infrared, concat=concat)
        return features.square().mean() if concat else sum(f.square().mean() for f in features)

    leaves = [visible, infrared, *module.parameters()]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(total(compiled), leaves)
    for a, b in zip(got, torch.autograd.grad(total(module), leaves), strict=True):
        torch.testing.assert_close(a, b)
    explained = torch._dynamo.explain(module)(visible, infrared, concat=concat)
    assert explained.graph_break_count == 0


def test_a_fake_has_the_strides_of_the_result() -> None:
    module = MRCNBlock(3, reduction=1, backend="triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for layout in ("contiguous", "channels_last", "transposed"):
        visible, infrared = (arrange(torch.randn(2, 3, 4, 5), layout) for _ in range(2))
        for a, b in zip(compiled(visible, infrared), module(visible, infrared), strict=True):
            assert a.stride() == b.stride()


# --- dispatch ---------------------------------------------------------------------------------------------


def test_the_interpreter_serves_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    status = mrcn_fast.backends()["triton"]
    assert status.usable and "interpreter" in status.reason
    assert dispatch.choose("triton", "cpu", torch.float32) == "triton"
    assert dispatch.choose(None, "cpu", torch.float32) != "triton"
    with pytest.raises(RuntimeError, match="serves CPU tensors, got a tensor on 'cuda'"):
        dispatch.choose("triton", "cuda", torch.float32)
    with pytest.raises(RuntimeError, match=r"got torch\.float8_e5m2"):
        dispatch.choose("triton", "cpu", torch.float8_e5m2)
