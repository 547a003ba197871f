"""What only the emulator can show of the CUDA kernels: tests/test_cuda_on_host.py runs it.

Blocks start in any order, and only some are resident at once: the results must have the same bits, and no
wait may last for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mrcn_fast import MRCNBlock, cqc_loss, mrcn_block, tuning
from tests.cuda_on_host import library
from tests.support import block_cases, cqc_cases
from tests.support.block_cases import Case
from tests.support.cqc_cases import CQCCase
from tests.support.matrix import GATES, MODES
from tests.support.tensors import different_bits

BACKEND = "cuda"
L2 = 1 << 20
# The number of blocks that the device claims to hold, and the number that run at once.
CROWDS = ((1, 1), (2, 1), (5, 2), (7, 7), (7, -7))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture
def emulator() -> Iterator[Any]:
    emulated = library.emulator()
    yield emulated
    emulated.cuda_on_host_set(4, 2, 0, L2)
    emulated.cuda_on_host_stub(0)
    emulated.cuda_on_host_busy(0)


def case(mode: str, gate: str, **settings: Any) -> Case:
    layout = settings.pop("layout", "contiguous")
    return Case(mode, gate, layouts=(layout, layout), gradient_layout=layout, **settings)


def block(drawn: Case) -> Callable[[], dict[str, Tensor]]:
    p = block_cases.problem(drawn)
    return lambda: block_cases.evaluate(p, BACKEND)


def loss(drawn: CQCCase) -> Callable[[], dict[str, Tensor]]:
    p = cqc_cases.problem(drawn)
    return lambda: cqc_cases.evaluate(p, BACKEND)


# The problems are small, because the emulator runs the threads of a launch in turn. They have several
# samples, blocks of channels and chunks, and cache lines that are full, half full and unaligned.
PROBLEMS = {
    f"{mode} {gate} {layout}": block(
        case(mode, gate, shape=(3, 9, height, width), layout=layout, dtype=dtype, hidden=3)
    )
    for (mode, gate, layout), (height, width), dtype in zip(
        itertools.product(MODES, GATES, ("contiguous", "channels_last")),
        itertools.cycle([(4, 8), (3, 5), (8, 9)]),
        itertools.cycle(DTYPES),
        strict=False,
    )
} | {
    f"cqc {dtype}{' normalized' * normalize}": loss(
        CQCCase((3, 1, 0, 9), (2, 9, 1, 1), 19, dtype, stacked, normalize=normalize)
    )
    for normalize in (False, True)
    for dtype, stacked in zip(DTYPES, (False, True, False), strict=True)
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_bits_in_any_order_and_crowd(name: str, emulator: Any) -> None:
    first = None
    for (blocks, resident), seed in itertools.product(CROWDS, range(3)):
        emulator.cuda_on_host_set(blocks, resident, seed, L2)
        results = PROBLEMS[name]()
        first = first or results
        assert not different_bits(first, results), f"{blocks} blocks, {resident} resident, seed {seed}"


@pytest.mark.parametrize("l2_bytes", [1, 1 << 12, 1 << 30])
def test_the_same_bits_with_any_number_of_samples_ahead(l2_bytes: int, emulator: Any) -> None:
    run = block(case("pair", "se", shape=(6, 9, 4, 8)))
    emulator.cuda_on_host_set(1, 1, 0, 1)
    first = run()
    emulator.cuda_on_host_set(9, 3, 1, l2_bytes)
    assert not different_bits(first, run())


# Those in float32, the only type of the sanitized kernels.
@pytest.mark.parametrize("name", [*PROBLEMS][:: len(DTYPES)])
def test_sanitized(name: str, emulator: Any) -> None:
    emulator.cuda_on_host_set(3, 2, 1, L2)
    results = PROBLEMS[name]()
    assert all(result.isfinite().all() for result in results.values())


# --- samples held in shared memory ------------------------------------------------------------------------

HOLDING = [gate for gate in GATES if gate != "cbam-channel"]
# From the shape to the blocks of its largest group, forward or backward. Some blocks hold several channels of
# planes, or ranges of pixels or planes; lines are whole, half full and unaligned.
HELD_SHAPES = {(3, 9, 4, 8): 2, (3, 21, 8, 9): 11, (3, 9, 3, 5): 1, (3, 20, 16, 17): 32}
HELD = {
    f"{mode} {gate} {layout}": case(mode, gate, shape=shape, layout=layout, dtype=dtype, hidden=3)
    for (mode, gate, layout), shape, dtype in zip(
        itertools.product(MODES, HOLDING, ("contiguous", "channels_last")),
        itertools.cycle(HELD_SHAPES),
        itertools.cycle((torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32)),
        strict=False,
    )
}
# Room for each group of HELD.
ROOM = 100


def devices(drawn: Case) -> tuple[int, int, int]:
    """How many blocks run at once: one sample of the case at a time, two, and all three."""
    largest = HELD_SHAPES[drawn.shape]
    return largest, 2 * largest + 1, 3 * largest + 2


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRCN_FAST_CUDA_HELD", "1")


def results_by(forward: str, backward: str, drawn: Case) -> dict[str, Tensor]:
    """The results by the kernels "held" or "tickets" of each direction."""
    p = block_cases.problem(drawn)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MRCN_FAST_CUDA_HELD", str(int(forward == "held")))
        made = block_cases.call(p.case, p.inputs, p.parameters, BACKEND)
        environment.setenv("MRCN_FAST_CUDA_HELD", str(int(backward == "held")))
        return block_cases.with_gradients(p, made)


@pytest.mark.parametrize("name", HELD)
def test_a_held_sample_gives_the_same_bits_on_any_device(name: str, held: None, emulator: Any) -> None:
    first = None
    run = block(HELD[name])
    for seed, blocks in enumerate(devices(HELD[name])):
        emulator.cuda_on_host_set(blocks, 1, seed, L2)
        results = run()
        first = first or results
        assert not different_bits(first, results), f"{blocks} blocks, seed {seed}"


@pytest.mark.parametrize("name", HELD)
def test_a_held_sample_is_as_accurate_as_the_rule_asks(name: str, held: None, emulator: Any) -> None:
    emulator.cuda_on_host_set(ROOM, 1, 7, L2)
    block_cases.check_accuracy(HELD[name], BACKEND)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gate", HOLDING)
def test_held_modes_agree_bitwise(gate: str, layout: str, held: None, emulator: Any) -> None:
    emulator.cuda_on_host_set(ROOM, 1, 3, L2)
    p = block_cases.problem(case("pair", gate, shape=(2, 20, 8, 9), layout=layout, hidden=3))
    visible, infrared = p.inputs
    with torch.no_grad():
        pair = block_cases.call(p.case, p.inputs, p.parameters, BACKEND)
        (stacked,) = block_cases.call(p.case._replace(mode="concat"), p.inputs, p.parameters, BACKEND)
        own = [parameter[:1] for parameter in p.parameters]
        (alone,) = block_cases.call(p.case._replace(mode="restitute"), (visible,), own, BACKEND)
    assert torch.equal(stacked, torch.cat([visible, *pair, infrared]))
    assert torch.equal(alone, pair[0])


# The device can't hold one sample; it can't beside other work; it can't with multiprocessors left free.
@pytest.mark.parametrize(("blocks", "busy", "margin"), [(1, 0, "0"), (16, 15, "0"), (16, 0, "16")])
def test_without_a_place_for_a_sample_the_ticket_kernels_serve(
    blocks: int, busy: int, margin: str, held: None, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = case("pair", "se", shape=(2, 20, 8, 9))
    emulator.cuda_on_host_set(16, 2, 1, L2)
    tickets = results_by("tickets", "tickets", drawn)
    # The kernels add in different orders.
    assert "visible_restituted" in different_bits(tickets, results_by("held", "tickets", drawn))
    assert "grad visible" in different_bits(tickets, results_by("tickets", "held", drawn))
    emulator.cuda_on_host_set(blocks, 1, 1, L2)
    emulator.cuda_on_host_busy(busy)
    monkeypatch.setenv("MRCN_FAST_SM_MARGIN", margin)
    before = emulator.cuda_on_host_launches()
    assert not different_bits(tickets, block(drawn)())
    assert emulator.cuda_on_host_launches() == before + 2


@pytest.mark.parametrize(
    "drawn",
    [
        case("pair", "cbam-channel"),
        case("pair", "se", dtype=torch.float64),
        case("pair", "se", shape=(1, 64, 24, 24)),
        case("pair", "se", shape=(1, 4, 2, 2), hidden=257),
    ],
    ids=["cbam", "float64", "too large", "too many hidden units"],
)
def test_what_is_not_held_the_ticket_kernels_serve(drawn: Case, held: None, emulator: Any) -> None:
    emulator.cuda_on_host_set(ROOM, 3, 1, L2)
    assert not different_bits(results_by("tickets", "tickets", drawn), block(drawn)())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_planes_are_held_where_that_was_measured_to_be_faster(
    layout: str, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MRCN_FAST_CUDA_HELD", raising=False)
    emulator.cuda_on_host_set(ROOM, 1, 1, L2)
    drawn = case("pair", "se", shape=(2, 20, 8, 9), layout=layout)
    tickets = results_by("tickets", "tickets", drawn)
    planes = tuning.planes_of("se", torch.float32, layout == "channels_last", drawn.shape)

    def held_ways(asked: Case, measured: tuning.Planes, *ways: str) -> set[str]:
        choice = tuning.Choice(drawn.shape, "cuda", ways, "2026-11-30", {})
        library.hold(-1, tuning.held_numbers({planes._replace(channels=7): choice, measured: choice}))
        differing = different_bits(results_by("tickets", "tickets", asked), block(asked)())
        return {"backward" if name.startswith("grad ") else "forward" for name in differing}

    # The kernels add in different orders, and a backward takes the statistics that its forward saved.
    both = {"forward", "backward"}
    try:
        assert held_ways(drawn, planes, "forward") == both
        assert held_ways(drawn._replace(shape=(3, 20, 9, 8)), planes, *both) == both, "any N"
        assert held_ways(drawn, planes, "backward") == {"backward"}
        monkeypatch.setenv("MRCN_FAST_CUDA_HELD", "0")
        assert held_ways(drawn, planes, *both) == set()
        monkeypatch.setenv("MRCN_FAST_CUDA_HELD", "1")
        assert held_ways(drawn, planes) == both
        monkeypatch.delenv("MRCN_FAST_CUDA_HELD")
        for other in (
            planes._replace(gate="eca"),
            planes._replace(dtype=torch.bfloat16),
            planes._replace(channels_last=not planes.channels_last),
            planes._replace(channels=21),
            planes._replace(pixels=73),
        ):
            assert held_ways(drawn, other, *both) == set()
        assert held_ways(drawn, planes, *both) == both
    finally:
        library.hold(-1, [])
    assert not different_bits(tickets, block(drawn)()), "nothing is held any more"
    with pytest.raises(RuntimeError, match="set_held: got 3 numbers"):
        library.hold(-1, [1, 2, 3])


@pytest.mark.parametrize("name", [*HELD][::3])
def test_sanitized_held(name: str, held: None, emulator: Any) -> None:
    drawn = HELD[name]._replace(dtype=torch.float32)
    emulator.cuda_on_host_set(devices(drawn)[1], 1, 1, L2)
    assert all(result.isfinite().all() for result in block(drawn)().values())


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MRCN_FAST_CUDA_HELD", "yes", "expected 0 or 1"),
        ("MRCN_FAST_SM_MARGIN", "-1", "expected a number of multiprocessors from 0 to 1000"),
        ("MRCN_FAST_SM_MARGIN", "4x", "expected a number of multiprocessors from 0 to 1000"),
    ],
)
def test_a_wrong_choice_of_kernels(
    variable: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match=f"{variable}: got '{value}', {expected}"):
        block(case("pair", "se"))()


# --- launches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holding", ["0", "1"])
@pytest.mark.parametrize("mode", MODES)
def test_one_launch_forward_and_one_backward(
    mode: str, holding: str, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRCN_FAST_CUDA_HELD", holding)
    p = block_cases.problem(case(mode, "se"))
    before = emulator.cuda_on_host_launches()
    outputs = block_cases.call(p.case, p.inputs, p.parameters, BACKEND)
    assert emulator.cuda_on_host_launches() == before + 1
    torch.autograd.grad(outputs, (*p.inputs, *p.parameters), p.gradients)
    assert emulator.cuda_on_host_launches() == before + 2


@pytest.mark.parametrize("holding", ["0", "1"])
@pytest.mark.parametrize("concat", [False, True])
def test_the_module_launches_once_each_way(
    concat: bool, holding: str, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRCN_FAST_CUDA_HELD", holding)
    block = MRCNBlock(8, backend=BACKEND)
    visible, infrared = (torch.randn(2, 8, 3, 4, requires_grad=True) for _ in range(2))
    before = emulator.cuda_on_host_launches()
    made = block(visible, infrared, concat=concat)
    assert emulator.cuda_on_host_launches() == before + 1
    (made if concat else torch.cat(made)).sum().backward()
    assert emulator.cuda_on_host_launches() == before + 2
    block.requires_grad_(False).restitute(visible.detach(), "visible")
    assert emulator.cuda_on_host_launches() == before + 3


@pytest.mark.parametrize("normalize", [False, True])
def test_one_launch_of_the_loss_each_way(normalize: bool, emulator: Any) -> None:
    p = cqc_cases.problem(CQCCase())
    before = emulator.cuda_on_host_launches()
    total = cqc_loss(p.features, p.labels, p.infrared_labels, normalize=normalize, backend=BACKEND)
    assert isinstance(total, Tensor) and emulator.cuda_on_host_launches() == before + 1
    torch.autograd.grad(total, p.features)
    assert emulator.cuda_on_host_launches() == before + 2


def test_an_error_names_kernel_shape_and_device(emulator: Any) -> None:
    p = block_cases.problem(case("pair", "se", shape=(2, 5, 4, 3)))
    visible, infrared = p.inputs
    norm_weight, norm_bias, *gate = p.parameters
    emulator.cuda_on_host_fail(719)
    message = r"the block's forward on device .* for 2 samples of 5 channels of 12 pixels, float32: error 719"
    with pytest.raises(RuntimeError, match=message):
        mrcn_block(visible, infrared, norm_weight, norm_bias, gate, backend=BACKEND)
    outputs = block_cases.call(p.case, p.inputs, p.parameters, BACKEND)
    emulator.cuda_on_host_fail(700)
    with pytest.raises(RuntimeError, match=r"the block's backward on device .*: error 700"):
        torch.autograd.grad(outputs, visible, p.gradients)
    q = cqc_cases.problem(CQCCase())
    emulator.cuda_on_host_fail(2)
    with pytest.raises(RuntimeError, match="error 2"):
        cqc_loss(q.features, q.labels, q.infrared_labels, backend=BACKEND)
