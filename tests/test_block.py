"""The block's modules: what they compute, their parameters, their copies, and autocast."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mrcn_fast
from mrcn_fast import MRCNBlock, MRCNFeatures, SNRBlock, dispatch, reference
from tests.support import block_cases, matrix, tensors
from tests.support.block_cases import Case, randomized
from tests.support.matrix import DEVICE, GATES, KERNEL_BACKENDS, MODES, RESTITUTE_TO
from tests.support.tensors import different_bits, same_bits


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensors.random(*shape, seed=seed, dtype=dtype)


def mrcn(backend: str, channels: int = 8, **settings: Any) -> MRCNBlock:
    block = randomized(MRCNBlock(channels, reduction=4, backend=backend, device=DEVICE, **settings))
    assert isinstance(block, MRCNBlock)
    return block


PACKAGE = Path(mrcn_fast.__file__).parent


@matrix.backends(*KERNEL_BACKENDS)
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


@matrix.backends("reference", *KERNEL_BACKENDS)
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


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("gate", GATES)
def test_restitution_alone_is_bitwise_the_pairs(backend: str, gate: str) -> None:
    """Training and inference compute the same features."""
    block = mrcn(backend, gate=gate)
    visible, infrared = random(3, 8, 5, 4, seed=1), random(3, 8, 5, 4, seed=2)
    features = block(visible, infrared)
    for got, want in (
        (block.restitute(visible, "visible"), features.visible_restituted),
        (block.restitute(infrared, "infrared"), features.infrared_restituted),
        (block(visible, infrared, concat=True), torch.cat(features)),
    ):
        assert same_bits(got, want)


@matrix.backends("reference", *KERNEL_BACKENDS)
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


@matrix.backends("reference", *KERNEL_BACKENDS)
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


@matrix.backends("reference", *KERNEL_BACKENDS)
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
        assert same_bits(other(visible, infrared, concat=True), expected), name
        assert all(p is not q for p, q in zip(other.parameters(), block.parameters(), strict=True)), name


@matrix.backends("reference", *KERNEL_BACKENDS)
def test_functional_call(backend: str) -> None:
    block, other = mrcn(backend), MRCNBlock(8, reduction=4, backend=backend, device=DEVICE)
    visible, infrared = random(2, 8, 5, 4, seed=1), random(2, 8, 5, 4, seed=2)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    got = torch.func.functional_call(other, parameters, (visible, infrared), {"concat": True})
    assert same_bits(got, block(visible, infrared, concat=True))
    got.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters.values())
    assert all(p.grad is None for p in other.parameters())


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_no_graph_is_kept_where_none_is_wanted(backend: str, mode: str) -> None:
    p = block_cases.problem(Case(mode))
    with torch.no_grad():
        assert not any(o.requires_grad for o in block_cases.call(p.case, p.inputs, p.parameters, backend))
    with torch.inference_mode():
        silent = block_cases.call(p.case, p.inputs, p.parameters, backend)
    for a, b in zip(silent, block_cases.call(p.case, p.inputs, p.parameters, backend), strict=True):
        assert same_bits(a, b)


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_under_autocast_the_block_keeps_its_inputs_dtype(mode: str, dtype: torch.dtype, backend: str) -> None:
    p = block_cases.problem(Case(mode, dtype=dtype, parameter_dtype=torch.float32))
    plain = block_cases.evaluate(p, backend)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        outputs = block_cases.call(p.case, p.inputs, p.parameters, backend)
    cast = block_cases.with_gradients(p, outputs)
    assert all(o.dtype == dtype for o in outputs)
    assert different_bits(plain, cast) == []
