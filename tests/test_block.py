"""The block operations of every kernel backend: accuracy, derivatives, layouts, non-finite values, memory."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mrcn_fast
from mrcn_fast import MRCNBlock, MRCNFeatures, SNRBlock, dispatch, reference
from mrcn_fast.gates import FUSED
from tests import cases
from tests.cases import (
    DEVICE,
    DTYPES,
    GATES,
    KERNEL_BACKENDS,
    LAYOUTS,
    MODES,
    PRECISE_DTYPES,
    RESTITUTE_TO,
    Case,
)

# Every mode with every gate, and where it is known both readings of eq. 5.
OPERATIONS = [
    (mode, gate, restitute_to)
    for mode, gate, restitute_to in itertools.product(MODES, GATES, RESTITUTE_TO)
    if mode != "snr" or restitute_to == "normalized"
]
OPS = {"pair": "block", "concat": "block_concat", "restitute": "restitute", "snr": "snr"}


@pytest.fixture
def ops_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled operations as they are called."""
    names: list[str] = []
    for module in dispatch.KERNELS.values():

        def operation(name: str, original: Callable[..., Any] = module.operation) -> Callable[..., Any]:
            names.append(name)
            return original(name)

        monkeypatch.setattr(module, "operation", operation)
    return names


# --- the public interface ---------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return cases.random(*shape, seed=seed, dtype=dtype)


PACKAGE = Path(mrcn_fast.__file__).parent


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("concat", [True, False])
def test_four_frames_from_the_module_to_the_kernels_operation(
    concat: bool, gradients: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """module, function, the call's route, autograd Function: no frame of ours beside these."""
    kernels = dispatch.KERNELS[backend]
    frames: list[str] = []

    def operation(name: str, original: Callable[..., Any] = kernels.operation) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            stack = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe())]
            frames[:] = [code.co_name for code in stack if PACKAGE in Path(code.co_filename).parents]
            return original(name)(*arguments)

        return call

    monkeypatch.setattr(kernels, "operation", operation)
    block, x = mrcn(backend), random(2, 8, 3, 3).to(DEVICE)
    with torch.set_grad_enabled(gradients):
        block(x, x, concat=concat)
    assert frames == ["forward"] * gradients + ["run_block", "mrcn_block", "forward"]


def randomized(module: nn.Module) -> nn.Module:
    """``module`` with parameters unlike the initial ones, the same at each call."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=100 + i) * 0.5 + 0.3)
    return module


def mrcn(backend: str, channels: int = 8, **settings: Any) -> MRCNBlock:
    block = randomized(MRCNBlock(channels, reduction=4, backend=backend, device=DEVICE, **settings))
    assert isinstance(block, MRCNBlock)
    return block


@cases.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize(("gate", "restitute_to"), list(itertools.product(GATES, RESTITUTE_TO)))
def test_module_gives_the_papers_six_sets(backend: str, gate: str, restitute_to: str) -> None:
    block = mrcn(backend, gate=gate, restitute_to=restitute_to, dtype=torch.float64, eps=1e-3)
    visible, infrared = (random(3, 8, 5, 4, seed=s, dtype=torch.float64) for s in (1, 2))
    expected = reference.mrcn_block(
        visible,
        infrared,
        block.norm_weight,
        block.norm_bias,
        block.gate.parameter_list(),
        gate=gate,
        eps=1e-3,
        restitute_to=restitute_to,
    )
    features = block(visible, infrared)
    assert isinstance(features, MRCNFeatures)
    for name, got, want in zip(MRCNFeatures._fields, features, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12), name
    assert features.visible is visible and features.infrared is infrared
    torch.testing.assert_close(
        block(visible, infrared, concat=True), torch.cat(expected), rtol=1e-12, atol=1e-12
    )


@cases.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("gate", GATES)
def test_restitution_alone_is_bitwise_the_pairs(backend: str, gate: str) -> None:
    """Training and inference see the same features."""
    block = mrcn(backend, gate=gate)
    visible, infrared = random(3, 8, 5, 4, seed=1), random(3, 8, 5, 4, seed=2)
    features = block(visible, infrared)
    for got, want in (
        (block.restitute(visible, "visible"), features.visible_restituted),
        (block.restitute(infrared, "infrared"), features.infrared_restituted),
        (block(visible, infrared, concat=True), torch.cat(features)),
    ):
        assert cases.same_bits(got, want)


@cases.backends("reference", *KERNEL_BACKENDS)
def test_restitution_takes_any_batch_and_trains_only_its_own_parameters(backend: str) -> None:
    block = mrcn(backend)
    for batch in (1, 2, 7):
        assert block.restitute(random(batch, 8, 5, 4), "infrared").shape == (batch, 8, 5, 4)
    block.restitute(random(2, 8, 5, 4), "infrared").square().sum().backward()
    for name, p in block.named_parameters():
        assert p.grad is not None
        # Infrared restitution is gate 1 of A_v1, A_n1, A_v2, A_n2 and modality 1.
        others = [i for i in range(p.shape[0]) if i != 1]
        assert p.grad[1].abs().sum() > 0, name
        assert not p.grad[others].any(), name


@cases.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("gate", GATES)
def test_snr_module(backend: str, gate: str) -> None:
    block = randomized(
        SNRBlock(8, reduction=4, gate=gate, backend=backend, device=DEVICE, dtype=torch.float64)
    )
    features = random(3, 8, 5, 4, dtype=torch.float64)
    got = block(features)
    norm_weight, norm_bias, *gate_parameters = [p[0] for p in block.parameters()]
    want = reference.snr_block(features, norm_weight, norm_bias, gate_parameters, gate=gate)
    assert got._fields == ("restituted", "contaminated", "normalized")
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


PARAMETERS: dict[str, dict[str, tuple[int, ...]]] = {
    "se": {
        "norm_weight": (2, 48),
        "norm_bias": (2, 48),
        "gate.fc1_weight": (4, 3, 48),
        "gate.fc1_bias": (4, 3),
        "gate.fc2_weight": (4, 48, 3),
        "gate.fc2_bias": (4, 48),
    },
    "eca": {"norm_weight": (2, 48), "norm_bias": (2, 48), "gate.weight": (4, 3)},
}
PARAMETERS["cbam-channel"] = PARAMETERS["se"]


@pytest.mark.parametrize("gate", GATES)
def test_a_checkpoints_names_and_shapes_are_stable(gate: str) -> None:
    block = MRCNBlock(48, gate=gate)
    assert {name: tuple(p.shape) for name, p in block.state_dict().items()} == PARAMETERS[gate]
    assert [name for name, _ in block.named_parameters()] == list(PARAMETERS[gate])
    assert not block.norm_bias.any() and bool((block.norm_weight == 1).all())


def test_the_hidden_width_is_at_least_one() -> None:
    assert MRCNBlock(5).state_dict()["gate.fc1_weight"].shape == (4, 1, 5)
    assert MRCNBlock(40, reduction=16).state_dict()["gate.fc1_weight"].shape == (4, 2, 40)


def test_parameters_are_made_where_and_as_asked() -> None:
    block = MRCNBlock(8, device="meta", dtype=torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in block.parameters())


def test_reset_parameters_starts_over() -> None:
    block = MRCNBlock(8, reduction=2)
    torch.manual_seed(3)
    block.reset_parameters()
    first = copy.deepcopy(block.state_dict())
    randomized(block)
    torch.manual_seed(3)
    block.reset_parameters()
    assert all(torch.equal(first[name], p) for name, p in block.state_dict().items())


@cases.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("gate", GATES)
def test_copies_run_like_the_original(backend: str, gate: str) -> None:
    block = mrcn(backend, gate=gate, eps=1e-3, restitute_to="input")
    visible, infrared = random(2, 8, 5, 4, seed=1), random(2, 8, 5, 4, seed=2)
    expected = block(visible, infrared, concat=True)
    saved, whole = io.BytesIO(), io.BytesIO()
    torch.save(block.state_dict(), saved)
    torch.save(block, whole)
    saved.seek(0)
    whole.seek(0)
    loaded = MRCNBlock(
        8, reduction=4, gate=gate, eps=1e-3, restitute_to="input", backend=backend, device=DEVICE
    )
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    copies = {
        "deepcopy": copy.deepcopy(block),
        "pickle": pickle.loads(pickle.dumps(block)),
        "torch.save of the module": torch.load(whole, weights_only=False),
        "state_dict": loaded,
    }
    for name, other in copies.items():
        assert cases.same_bits(other(visible, infrared, concat=True), expected), name
        assert all(p is not q for p, q in zip(other.parameters(), block.parameters(), strict=True)), name


@cases.backends("reference", *KERNEL_BACKENDS)
def test_functional_call(backend: str) -> None:
    block, other = mrcn(backend), MRCNBlock(8, reduction=4, backend=backend, device=DEVICE)
    visible, infrared = random(2, 8, 5, 4, seed=1), random(2, 8, 5, 4, seed=2)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    got = torch.func.functional_call(other, parameters, (visible, infrared), {"concat": True})
    assert cases.same_bits(got, block(visible, infrared, concat=True))
    got.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters.values())
    assert all(p.grad is None for p in other.parameters())


@cases.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_no_graph_is_kept_where_none_is_wanted(backend: str, mode: str) -> None:
    p = cases.problem(Case(mode))
    with torch.no_grad():
        assert not any(o.requires_grad for o in cases.call(p.case, p.inputs, p.parameters, backend))
    with torch.inference_mode():
        silent = cases.call(p.case, p.inputs, p.parameters, backend)
    for a, b in zip(silent, cases.call(p.case, p.inputs, p.parameters, backend), strict=True):
        assert cases.same_bits(a, b)


# --- derivatives ------------------------------------------------------------------------------------------


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mode", "gate", "restitute_to"), OPERATIONS)
def test_gradcheck(
    mode: str, gate: str, restitute_to: str, layout: str, backend: str, ops_run: list[str]
) -> None:
    case = Case(
        mode,
        gate,
        restitute_to,
        (2, 3, 2, 3),
        torch.float64,
        layouts=(layout, layout),
        gradient_layout=layout,
    )
    p = cases.problem(case)
    assert not cases.near_kink(p)
    count = len(p.inputs)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return cases.call(case, tensors[:count], tensors[count:], backend)

    assert torch.autograd.gradcheck(run, (*p.inputs, *p.parameters))
    assert {f"{OPS[mode]}_forward", f"{OPS[mode]}_backward"} <= set(ops_run)


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize(("mode", "gate", "restitute_to"), OPERATIONS)
def test_gradgradcheck(mode: str, gate: str, restitute_to: str, backend: str, ops_run: list[str]) -> None:
    case = Case(mode, gate, restitute_to, (1, 2, 1, 3), torch.float64, eps=0.1)
    p = cases.problem(case)
    assert not cases.near_kink(p)
    count = len(p.inputs)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return cases.call(case, tensors[:count], tensors[count:], backend)

    assert torch.autograd.gradgradcheck(run, (*p.inputs, *p.parameters))
    assert f"{OPS[mode]}_forward" in ops_run


def second_order(backend: str, visible: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of a gradient penalty where infrared is a function of visible."""
    block = mrcn(backend, 3, dtype=torch.float64)
    features = block(visible, make(visible))
    first = torch.autograd.grad(sum(f.pow(3).sum() for f in features), visible, create_graph=True)[0]
    return torch.autograd.grad(first.square().sum(), visible)[0]


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("related", ["the same tensor", "a function of it"])
def test_double_backward_where_one_input_depends_on_the_other(backend: str, related: str) -> None:
    visible = random(2, 3, 4, 3, dtype=torch.float64).requires_grad_()

    def make(x: Tensor) -> Tensor:
        return x if related == "the same tensor" else x.square() + 1

    torch.testing.assert_close(second_order(backend, visible, make), second_order("reference", visible, make))


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_first_gradients_are_the_same_with_create_graph(mode: str, backend: str) -> None:
    p = cases.problem(Case(mode, dtype=torch.float64))
    leaves = (*p.inputs, *p.parameters)
    outputs = cases.call(p.case, p.inputs, p.parameters, backend)
    plain = torch.autograd.grad(outputs, leaves, p.gradients, retain_graph=True)
    graphed = torch.autograd.grad(outputs, leaves, p.gradients, create_graph=True)
    for a, b in zip(plain, graphed, strict=True):
        assert b.requires_grad and not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@cases.backends(*KERNEL_BACKENDS)
def test_first_gradients_of_halves_with_create_graph(backend: str) -> None:
    """In float32 as without: the sums over planes are beyond float16, and its parameters are float32."""
    case = Case("concat", shape=(16, 4, 72, 32), dtype=torch.float16, parameter_dtype=torch.float32)
    p = cases.problem(case)
    leaves, gradients = (*p.inputs, *p.parameters), [g + 2 for g in p.gradients]
    outputs = cases.call(case, p.inputs, p.parameters, backend)
    plain = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
    graphed = torch.autograd.grad(outputs, leaves, gradients, create_graph=True)
    assert max(float(g.abs().max()) for g in plain[2:]) > torch.finfo(torch.float16).max
    for a, b in zip(plain, graphed, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=1e-3 * float(a.abs().max()))


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", ["pair", "snr"])
def test_any_outputs_may_be_left_out_of_the_loss(mode: str, backend: str) -> None:
    p = cases.problem(Case(mode, dtype=torch.float64))
    leaves = (*p.inputs, *p.parameters)
    number = len(p.gradients)
    for size in range(1, number):
        for chosen in itertools.combinations(range(number), size):
            found = []
            for name in (backend, "reference"):
                outputs = cases.call(p.case, p.inputs, p.parameters, name)
                found.append(
                    torch.autograd.grad(
                        [outputs[i] for i in chosen],
                        leaves,
                        [p.gradients[i] for i in chosen],
                        allow_unused=True,
                    )
                )
            for leaf, got, want in zip(leaves, *found, strict=True):
                zero = torch.zeros_like(leaf)
                torch.testing.assert_close(
                    zero if got is None else got, zero if want is None else want, rtol=1e-11, atol=1e-11
                )


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_single_tensor_may_require_gradients(mode: str, backend: str) -> None:
    p = cases.problem(Case(mode))
    everything = cases.evaluate(p, backend)
    names = (*cases.input_names(mode), *cases.parameter_names(p.case.gate))
    for position, name in enumerate(names):
        leaves = [x.detach().requires_grad_(i == position) for i, x in enumerate((*p.inputs, *p.parameters))]
        outputs = cases.call(p.case, leaves[: len(p.inputs)], leaves[len(p.inputs) :], backend)
        used = [(o, g) for o, g in zip(outputs, p.gradients, strict=True) if o.requires_grad]
        (gradient,) = torch.autograd.grad([o for o, _ in used], leaves[position], [g for _, g in used])
        assert cases.same_bits(gradient, everything[f"grad {name}"]), name


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_accumulate_over_calls(mode: str, backend: str) -> None:
    p = cases.problem(Case(mode, dtype=torch.float64))
    once = cases.evaluate(p, backend)
    for _ in range(2):
        torch.autograd.backward(cases.call(p.case, p.inputs, p.parameters, backend), p.gradients)
    for name, leaf in zip(cases.input_names(mode), p.inputs, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once[f"grad {name}"])
    for name, leaf in zip(cases.parameter_names("se"), p.parameters, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once[f"grad {name}"])


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_an_input_changed_before_the_backward_is_noticed(mode: str, backend: str) -> None:
    p = cases.problem(Case(mode))
    first = p.inputs[0] * 1
    outputs = cases.call(p.case, (first, *p.inputs[1:]), p.parameters, backend)
    first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(outputs, p.gradients)


def op_arguments(p: cases.Problem) -> tuple[list[Any], list[Any], str]:
    """Arguments of the forward operation, those of the gate and flags for the backward, the operation."""
    case = p.case
    norm_weight, norm_bias, *gate_parameters = (q.detach() for q in p.parameters)
    tensors = [*(x.detach() for x in p.inputs), norm_weight, norm_bias, gate_parameters]
    flags = [] if case.mode == "snr" else [case.restitute_to == "input"]
    return tensors, flags, OPS[case.mode]


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize(
    ("mode", "gate", "restitute_to", "layout"),
    [(*operation, "contiguous") for operation in OPERATIONS]
    + [
        (mode, "se", "normalized", layout)
        for mode in MODES
        for layout in ("channels_last", "spatially sliced")
    ],
)
def test_opcheck(mode: str, gate: str, restitute_to: str, layout: str, backend: str) -> None:
    p = cases.problem(Case(mode, gate, restitute_to, layouts=(layout, layout), gradient_layout=layout))
    tensors, flags, op = op_arguments(p)
    forward, backward = cases.operations(op, backend)
    arguments = (*tensors, FUSED.index(gate), p.case.eps, *flags)
    torch.library.opcheck(forward, arguments)
    *_, statistics = forward(*arguments)
    inputs, parameters = tensors[: len(p.inputs)], tensors[len(p.inputs) :]
    torch.library.opcheck(
        backward, (*p.gradients, *inputs, statistics, *parameters, FUSED.index(gate), *flags)
    )


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_every_dtype_and_missing_gradients(mode: str, dtype: torch.dtype, backend: str) -> None:
    p = cases.problem(Case(mode, "cbam-channel", dtype=dtype))
    tensors, flags, op = op_arguments(p)
    forward, backward = cases.operations(op, backend)
    arguments = (*tensors, FUSED.index(p.case.gate), p.case.eps, *flags)
    torch.library.opcheck(forward, arguments)
    *_, statistics = forward(*arguments)
    inputs, parameters = tensors[: len(p.inputs)], tensors[len(p.inputs) :]
    gradients: list[Tensor | None] = [*p.gradients]
    if len(gradients) > 1:
        gradients[1] = None
    torch.library.opcheck(
        backward,
        (*gradients, *inputs, statistics, *parameters, FUSED.index(p.case.gate), *flags),
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's memory is aligned by its allocator")
@pytest.mark.filterwarnings("ignore:The given buffer")
@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_memory_that_begins_anywhere(mode: str, dtype: torch.dtype, backend: str) -> None:
    p = cases.problem(Case(mode, dtype=dtype))
    moved = p._replace(
        inputs=tuple(map(cases.misaligned, p.inputs)),
        parameters=tuple(map(cases.misaligned, p.parameters)),
        gradients=tuple(map(cases.misaligned, p.gradients)),
    )
    assert all(t.data_ptr() % t.element_size() == 1 for t in (*moved.inputs, *moved.parameters))
    assert cases.different_bits(cases.evaluate(p, backend), cases.evaluate(moved, backend)) == []


# --- accuracy ---------------------------------------------------------------------------------------------


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@pytest.mark.parametrize("mode", MODES)
@cases.examples(25)
@given(data=st.data())
def test_accuracy(backend: str, mode: str, dtype: torch.dtype, data: st.DataObject) -> None:
    cases.check_accuracy(data.draw(cases.block_cases(mode, dtype)), backend)


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_accuracy_in_every_layout(mode: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    for gate in GATES:
        for shape in ((3, 5, 7, 9), (2, 19, 3, 4)):
            case = Case(
                mode, gate, shape=shape, dtype=dtype, layouts=(layout, layout), gradient_layout=layout, seed=2
            )
            cases.check_accuracy(case, backend)


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", ["pair", "concat"])
@pytest.mark.parametrize(
    "layouts", list(itertools.permutations(("contiguous", "channels_last", "transposed"), 2))
)
def test_accuracy_where_the_pair_has_two_layouts(layouts: tuple[str, str], mode: str, backend: str) -> None:
    for gradient_layout in ("contiguous", "channels_last", "expanded scalar"):
        cases.check_accuracy(
            Case(mode, shape=(2, 5, 7, 9), layouts=layouts, gradient_layout=gradient_layout), backend
        )


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (1, 2, 67, 61), (1, 67, 1, 2), (3, 1, 2, 1), (1, 1, 31, 129), (2, 128, 2, 4)]
)
def test_accuracy_of_shapes_at_the_edges(
    shape: tuple[int, int, int, int], mode: str, dtype: torch.dtype, backend: str
) -> None:
    for layout in ("contiguous", "channels_last"):
        for gate in GATES:
            case = Case(
                mode, gate, shape=shape, dtype=dtype, layouts=(layout, layout), gradient_layout=layout, seed=5
            )
            cases.check_accuracy(case, backend)


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_accuracy_where_the_mean_is_large(mode: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    """Mean 1000, σ 0.1: the rule as everywhere, against float64 of the same float32 inputs.

    E[x²] - E[x]² would leave no correct digit of the variance in float32 (1e6 · 6e-8 > 0.1²).
    """
    for gate in GATES:
        for shape in ((2, 5, 17, 15), (1, 2, 67, 61)):
            cases.check_accuracy(
                Case(
                    mode,
                    gate,
                    shape=shape,
                    dtype=dtype,
                    layouts=(layout, layout),
                    gradient_layout=layout,
                    values="large mean",
                ),
                backend,
            )


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_variance_where_the_mean_is_large(mode: str, layout: str, backend: str) -> None:
    """The normalized part by itself, which beside a mean of 1000 the rule above can't see.

    With s = 1/2 in every gate and restitution to F̃, F₊ = F̃ / 2 + F / 2; with SNR F̃ is an output. What is
    compared is F̃'s deviation from its own mean over a plane, which is γ n whatever the mean of F.
    """
    case = Case(
        mode, shape=(2, 5, 17, 15), values="large mean", layouts=(layout, layout), gradient_layout=layout
    )
    p = cases.problem(case)
    with torch.no_grad():
        for q in p.parameters[2:]:
            q.zero_()
    results, truth = cases.evaluate(p, backend), cases.evaluate_reference(p, torch.float64)
    for name in cases.output_names(mode):
        got, want = results[name].double(), truth[name]
        got, want = (x - x.mean(dim=(2, 3), keepdim=True) for x in (got, want))
        # A float32 near 1000 is rounded by up to 3e-5, F̃ has slopes γ / σ of 10 to 20: 20 · 3e-5 · a few.
        assert (got - want).abs().max() < 2e-3 * want.abs().max(), name


@pytest.mark.parametrize("mode", MODES)
def test_the_rule_notices_a_wrong_result(mode: str) -> None:
    p = cases.problem(Case(mode, shape=(2, 3, 4, 5)))
    eager, truth = cases.evaluate_reference(p, torch.float32), cases.block_truth(p)
    assert all(v.ratio <= 1 for v in cases.verdicts(eager, eager, truth).values())
    for name, result in eager.items():
        for wrong in (result + 1e-5 * result.abs().max(), result * math.nan, torch.zeros_like(result)):
            found = cases.verdicts(eager | {name: wrong}, eager, truth)
            assert [other for other, v in found.items() if v.ratio > 1] == [name]


@cases.backends("cpu")
def test_the_rule_knows_what_cancelled(backend: str) -> None:
    """The truth has 9e-19 for γ's gradient, eager 0 and the kernels 4e-15, where other values are 322."""
    case = Case("snr", "eca", shape=(5, 1, 8, 2), dtype=torch.float64, gradient_layout="expanded scalar")
    cases.check_accuracy(case._replace(values="uneven", hidden=5, seed=11819), backend)


def test_the_rule_looks_twice_before_it_fails() -> None:
    """Once too far is luck, mostly too far or once much too far is not."""

    def run(*ratios: float) -> None:
        drawn = iter(ratios)
        cases.judge(Case(), "none", lambda case: {"loss": cases.Verdict(next(drawn), "loss", 0.0, 0.0, 0.0)})

    rest = [0.5] * cases.DRAWS
    run(0.9)
    run(1.1, *rest)
    for ratios in ((1.1, *[1.1] * cases.DRAWS), (65.0, *rest), (1.1, 65.0, *rest), (math.inf, *rest)):
        with pytest.raises(pytest.fail.Exception, match=r"loss; .* of the bound, over 25 draws"):
            run(*ratios)


# --- layout of the results --------------------------------------------------------------------------------

RESULT_LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "batch-sliced": torch.contiguous_format,
    "channel-sliced": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last channel-sliced": torch.channels_last,
}


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", RESULT_LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_results_have_their_inputs_layout(mode: str, layout: str, backend: str) -> None:
    p = cases.problem(Case(mode, shape=(2, 5, 4, 3), layouts=(layout, layout), gradient_layout=layout))
    results = cases.evaluate(p, backend)
    for name in (*cases.output_names(mode), *(f"grad {n}" for n in cases.input_names(mode))):
        assert results[name].is_contiguous(memory_format=RESULT_LAYOUTS[layout]), (
            f"{name} has strides {results[name].stride()}"
        )


@cases.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_large_results(mode: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    """Written past the caches, odd planes too; a sample alone is not, and has the same bits."""
    case = Case(mode, shape=(8, 32, 83, 101), dtype=dtype, layouts=(layout, layout), gradient_layout=layout)
    p = cases.problem(case)

    def results(samples: slice) -> list[Tensor]:
        inputs = [x[samples] for x in p.inputs]
        outputs = cases.call(case, inputs, p.parameters, backend)
        of_outputs = [g.unflatten(0, (-1, 8))[:, samples].flatten(0, 1) for g in p.gradients]
        return [*outputs, *torch.autograd.grad(outputs, inputs, of_outputs)]

    whole = results(slice(None))
    for i in (0, 5):
        for large, small in zip(whole, results(slice(i, i + 1)), strict=True):
            assert cases.same_bits(large[i::8], small)

    for result in whole:
        assert result.is_contiguous(memory_format=RESULT_LAYOUTS[layout])
        assert result.storage_offset() == 0
        assert result.untyped_storage().nbytes() == result.nbytes
        assert result.data_ptr() % 64 == 0
    outputs, of_inputs = whole[: len(p.gradients)], whole[len(p.gradients) :]
    for read, written in ((p.inputs, outputs), ((*p.inputs, *p.gradients), of_inputs)):
        for k, one in enumerate(written):
            for other in (*read, *written[:k]):
                away = (one.data_ptr() - other.data_ptr()) % 4096
                assert min(away, 4096 - away) >= 128, "both lie at the same place of their pages"


# --- stale memory -----------------------------------------------------------------------------------------


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """torch fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("mode", MODES)
def test_every_element_of_every_result_is_written(
    mode: str, layout: str, dtype: torch.dtype, backend: str, empty_is_nan: None
) -> None:
    assert torch.empty(3, device=DEVICE).isnan().all()
    for gate, shape in itertools.product(GATES, [(1, 1, 1, 2), (2, 3, 5, 7), (1, 17, 3, 3), (2, 2, 67, 61)]):
        p = cases.problem(
            Case(mode, gate, shape=shape, dtype=dtype, layouts=(layout, layout), gradient_layout=layout)
        )
        for name, result in cases.evaluate(p, backend).items():
            assert result.isfinite().all(), f"{name} of {p.case}"


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_over_from_freed_memory(mode: str, layout: str, backend: str) -> None:
    """Scratch buffers that torch doesn't allocate are poisoned too, by what was freed before."""
    for gate, shape in itertools.product(GATES, [(2, 3, 5, 7), (1, 17, 3, 3)]):
        p = cases.problem(Case(mode, gate, shape=shape, layouts=(layout, layout), gradient_layout=layout))
        clean = cases.evaluate(p, backend)
        for _ in range(5):
            cases.poison_memory(p)
            assert cases.different_bits(clean, cases.evaluate(p, backend)) == []


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("values", [*cases.NETWORK_VALUES, "large mean", "constant planes"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_accuracy_of_what_networks_make_in_every_layout(
    mode: str, layout: str, values: str, backend: str
) -> None:
    """Rectified and pooled maps are unlike normal numbers: sums do not cancel, and many pixels are equal."""
    gate, shape = ("se", (2, 16, 18, 9)) if mode in ("pair", "snr") else ("cbam-channel", (1, 24, 16, 20))
    case = Case(
        mode, gate, shape=shape, layouts=(layout, layout), gradient_layout=layout, values=values, hidden=4
    )
    cases.check_distribution(case, backend, draws=20 if cases.CUDA_ON_HOST else 60)


# --- values that are not finite, planes without variance --------------------------------------------------


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "gate", "restitute_to"), OPERATIONS)
def test_nonfinite_values_come_out_where_the_reference_has_them(
    mode: str, gate: str, restitute_to: str, dtype: torch.dtype, value: float, backend: str
) -> None:
    """One such value in each tensor in turn; in inputs and gradients in a vector's body and in the tail.

    The outputs have NaN, inf and -inf at the reference's places, and after a NaN the gradients are finite
    where the reference's are. (After an infinity the order of a sum decides between inf and inf - inf.) ECA's
    reference is taken in float32 on the CPU: torch's convolutions differ by dtype and device in whether the
    padding meets a NaN or an infinity.
    """
    lines = []
    for layout in (
        ("contiguous", "channels_last") if dtype in (torch.float32, torch.bfloat16) else ("contiguous",)
    ):
        case = Case(
            mode,
            gate,
            restitute_to,
            (2, 3, 5, 7),
            dtype,
            layouts=(layout, layout),
            gradient_layout=layout,
        )
        fresh = cases.problem(case)
        where = (0, 17, -1) if dtype == torch.float32 else (17,)
        places = [("inputs", i, at) for i in range(len(fresh.inputs)) for at in where]
        places += [("gradients", i, at) for i in range(len(fresh.gradients)) for at in where]
        places += [("parameters", i, 0) for i in range(len(fresh.parameters))]
        for kind, index, at in places:
            p = cases.problem(case)
            target = getattr(p, kind)[index].detach()
            coordinates = torch.unravel_index(torch.tensor(at % target.numel()), target.shape)
            target[coordinates] = value
            results = {name: x.cpu() for name, x in cases.evaluate(p, backend).items()}
            expected = cases.evaluate_reference(p, torch.float32 if gate == "eca" else dtype, "cpu")
            for name, result in results.items():
                if not name.startswith("grad "):
                    same = torch.equal(cases.nonfinite(result), cases.nonfinite(expected[name]))
                else:
                    same = math.isinf(value) or torch.equal(result.isfinite(), expected[name].isfinite())
                if not same:
                    lines.append(
                        f"{layout}, {value} in {kind}[{index}] at {at}: {name} has "
                        f"{int((~result.isfinite()).sum())} non-finite values, the reference "
                        f"{int((~expected[name].isfinite()).sum())}"
                    )
    assert not lines, "\n".join(lines)


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_nan_of_a_parameter_stays_one_in_bf16_in_every_layout(
    layout: str, bits: int, backend: str
) -> None:
    """Rounding by adding half of the last place would make a number of a NaN whose bits are all set."""
    case = Case(shape=(2, 64, 12, 11), dtype=torch.bfloat16, layouts=(layout, layout), gradient_layout=layout)
    drawn = cases.problem(case)
    for index in (0, 1):  # norm_weight, norm_bias
        parameters = [p.detach().float().requires_grad_() for p in drawn.parameters]
        parameters[index].detach().view(torch.int32)[0, 37] = bits
        p = drawn._replace(parameters=tuple(parameters))
        results, expected = cases.evaluate(p, backend), cases.evaluate_reference(p, torch.float32)
        for name, result in results.items():
            assert torch.equal(result.isnan(), expected[name].isnan()), f"parameter {index}: {name}"


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("values", ["zero planes", "constant planes"])
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@pytest.mark.parametrize(("mode", "gate", "restitute_to"), OPERATIONS)
def test_constant_planes(
    mode: str, gate: str, restitute_to: str, dtype: torch.dtype, values: str, backend: str
) -> None:
    for layout in ("contiguous", "channels_last"):
        case = Case(
            mode,
            gate,
            restitute_to,
            (2, 3, 5, 7),
            dtype,
            layouts=(layout, layout),
            gradient_layout=layout,
            values=values,
        )
        results = cases.evaluate(cases.problem(case), backend)
        assert all(r.isfinite().all() for r in results.values())
        cases.check_accuracy(case, backend)


# --- memory, autocast -------------------------------------------------------------------------------------


def kept_for_backward(run: Callable[[], Any], given: set[int]) -> int:
    """Bytes of the storages that autograd keeps besides those in ``given`` (data pointers)."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = run()
    del held
    return sum(kept.values())


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(16, 256, 72, 32), (16, 64, 72, 32), (8, 512, 36, 16)])
def test_under_one_percent_of_a_volume_is_kept_for_backward(
    shape: tuple[int, int, int, int], layout: torch.memory_format, backend: str
) -> None:
    visible, infrared = (
        torch.ones(shape, device=DEVICE).contiguous(memory_format=layout).requires_grad_() for _ in range(2)
    )
    volume = visible.numel() * visible.element_size()
    for gate, concat in itertools.product(GATES, (False, True)):
        block = MRCNBlock(shape[1], gate=gate, backend=backend, device=DEVICE)
        given = {x.untyped_storage().data_ptr() for x in (visible, infrared, *block.parameters())}
        extra = kept_for_backward(lambda b=block, c=concat: b(visible, infrared, concat=c), given)  # type: ignore[misc]
        assert extra < volume / 100, (
            f"{gate}, concat={concat}: {extra} bytes, {extra / volume:.2%} of a volume"
        )


def test_what_is_kept_is_counted() -> None:
    """The reference keeps feature maps: the count above would see them."""
    visible, infrared = (torch.ones(2, 4, 8, 8).requires_grad_() for _ in range(2))
    block = MRCNBlock(4, backend="reference")
    given = {x.untyped_storage().data_ptr() for x in (visible, infrared, *block.parameters())}
    extra = kept_for_backward(lambda: block(visible, infrared), given)
    assert extra > 4 * visible.numel() * visible.element_size()


@cases.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_under_autocast_the_block_keeps_its_inputs_dtype(mode: str, dtype: torch.dtype, backend: str) -> None:
    p = cases.problem(Case(mode, dtype=dtype, parameter_dtype=torch.float32))
    plain = cases.evaluate(p, backend)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        outputs = cases.call(p.case, p.inputs, p.parameters, backend)
    cast = cases.with_gradients(p, outputs)
    assert all(o.dtype == dtype for o in outputs)
    assert cases.different_bits(plain, cast) == []
