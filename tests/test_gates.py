"""The gates: their parameters, their initialization, their kernels, and the gate that kernels can't fuse."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrcn_fast import MRCNBlock, SNRBlock, dispatch, mrcn_restitution, reference
from mrcn_fast.gates import GATES, CBAMGate, ECAGate, SEGate, make_gate
from tests.support import block_cases, matrix
from tests.support.block_cases import Case
from tests.support.matrix import DEVICE, KERNEL_BACKENDS, MODES
from tests.support.tensors import random, same_bits


def test_the_known_gates() -> None:
    assert tuple(kind for kind, gate in GATES.items() if gate.unfused is None) == matrix.GATES
    assert set(GATES) - set(matrix.GATES) == {"cbam"}


@pytest.mark.parametrize("kind", matrix.GATES)
@pytest.mark.parametrize("count", [1, 4])
def test_parameters_come_in_order_with_a_slice_a_gate(kind: str, count: int) -> None:
    gate = make_gate(kind, 24, count, reduction=8, dtype=torch.float64)
    shapes = [tuple(p.shape) for p in gate.parameter_list()]
    if kind == "eca":
        assert shapes == [(count, 3)]
    else:
        assert shapes == [(count, 3, 24), (count, 3), (count, 24, 3), (count, 24)]
    assert [id(p) for p in gate.parameter_list()] == [id(p) for p in gate.parameters()]
    assert all(p.dtype == torch.float64 for p in gate.parameters())


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_parametrized_parameters_are_what_the_block_uses(backend: str) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    block = MRCNBlock(8, backend=backend, device=DEVICE)
    pair = [random(3, 8, 5, 4, seed=seed, dtype=torch.float32) for seed in range(2)]
    chosen = [(block, "norm_weight"), (block.gate, "fc1_weight")]
    with torch.no_grad():
        for module, name in chosen:
            module.get_parameter(name).uniform_()
        expected = block(*pair)
        for module, name in chosen:
            module.get_parameter(name).mul_(0.5)
            nn.utils.parametrize.register_parametrization(module, name, Doubled())
        for got, wanted in zip(block(*pair), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("channels", "size"),
    # t = int(|log2 C + 1| / 2) as the authors' code has it, made odd: C = 64: 3.5 -> 3; 256: 4.5 -> 4 -> 5.
    [(1, 1), (2, 1), (8, 3), (16, 3), (32, 3), (64, 3), (128, 5), (256, 5), (512, 5), (2048, 7)],
)
def test_eca_chooses_its_kernel_by_the_channels(channels: int, size: int) -> None:
    t = int(abs((math.log2(channels) + 1) / 2))
    assert size == (t if t % 2 else t + 1)
    assert make_gate("eca", channels, 4).parameter_list()[0].shape == (4, size)


def test_initialization_is_linears() -> None:
    """Values are uniform in ±1/√fan_in: they nearly reach the bounds, with the mean and variance expected."""
    torch.manual_seed(0)
    gate = SEGate(256, 4, reduction=4)
    for p, fan_in in (
        (gate.fc1_weight, 256),
        (gate.fc2_weight, 64),
        (gate.fc1_bias, 256),
        (gate.fc2_bias, 64),
    ):
        bound = 1 / math.sqrt(fan_in)
        values = p.detach()
        assert 0.95 * bound < values.abs().max() <= bound
        assert abs(values.mean()) < 0.2 * bound
        assert abs(values.var() / (bound**2 / 3) - 1) < 0.25
    linear = nn.Linear(256, 64)
    assert linear.weight.abs().max() <= 1 / math.sqrt(256) and linear.bias.abs().max() <= 1 / math.sqrt(256)
    convolution = CBAMGate(8, 50).spatial_weight.detach()
    assert convolution.shape == (50, 2, 7, 7)
    assert 0.95 / math.sqrt(98) < convolution.abs().max() <= 1 / math.sqrt(98)
    eca = ECAGate(2048, 50)
    assert 0.9 / math.sqrt(7) < eca.weight.abs().max() <= 1 / math.sqrt(7)


def test_the_four_gates_start_differently() -> None:
    for kind in matrix.GATES:
        first = make_gate(kind, 64, 4).parameter_list()[0]
        assert not any(torch.equal(first[0], first[i]) for i in (1, 2, 3))


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", matrix.GATES)
def test_each_gate_drives_its_own_set(kind: str, backend: str) -> None:
    check_each_gate_drives_its_own_set(kind, backend)


def test_each_whole_cbam_drives_its_own_set() -> None:
    check_each_gate_drives_its_own_set("cbam", "reference")


def check_each_gate_drives_its_own_set(kind: str, backend: str) -> None:
    """A change in one of the gates A_v1, A_n1, A_v2, A_n2 moves one set: v+, n+, n-, v- in this order."""
    block = MRCNBlock(6, reduction=2, gate=kind, backend=backend, device=DEVICE, dtype=torch.float64)
    visible, infrared = random(2, 6, 3, 4, seed=1), random(2, 6, 3, 4, seed=2)
    before = block(visible, infrared)
    for i, moved in enumerate(
        ("visible_restituted", "infrared_restituted", "infrared_compensated", "visible_compensated")
    ):
        with torch.no_grad():
            for p in block.gate.parameters():
                p[i] += 0.5
        after = block(visible, infrared)
        with torch.no_grad():
            for p in block.gate.parameters():
                p[i] -= 0.5
        for name in before._fields:
            same = torch.allclose(getattr(before, name), getattr(after, name), rtol=1e-9, atol=1e-9)
            assert same == (name != moved), f"gate {i}: {name}"


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", matrix.GATES)
def test_a_saturated_gate_is_exact(kind: str, backend: str) -> None:
    """s = 1 gives the input (F̃ + M = F) and s = 0 gives F̃; logits of ±1000 overflow no exponential."""
    block = SNRBlock(5, reduction=1, gate=kind, backend=backend, device=DEVICE, dtype=torch.float64)
    # ECA has no bias, so the sign of its weight decides where all means are positive.
    features = random(2, 5, 3, 4).abs() + 1
    for logit in (1000.0, -1000.0):
        with torch.no_grad():
            for p in block.gate.parameters():
                p.zero_()
            last = block.gate.parameter_list()[-1]
            last.fill_(logit) if kind != "eca" else last[:, last.shape[1] // 2].fill_(logit)
        restituted, contaminated, normalized = block(features)
        full, none = (restituted, contaminated) if logit > 0 else (contaminated, restituted)
        torch.testing.assert_close(full, features)
        torch.testing.assert_close(none, normalized)
        block.zero_grad()
        (restituted.square().sum() + contaminated.sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@matrix.backends(*KERNEL_BACKENDS)
def test_wide_kernels_and_hidden_layers(backend: str) -> None:
    """ECA's kernel is longer than the number of channels, or there are more hidden units than channels."""
    for case in (
        Case(gate="eca", shape=(2, 3, 3, 4), hidden=5),
        Case(gate="se", shape=(2, 3, 3, 4), hidden=19),
        Case(gate="cbam-channel", shape=(2, 40, 2, 2), hidden=37),
        Case(gate="se", shape=(5, 66, 2, 3), hidden=21),
        Case(gate="se", shape=(5, 66, 2, 3), hidden=21, dtype=torch.float64),
    ):
        block_cases.check_accuracy(case, backend)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_cbams_gradient_at_tied_maxima(mode: str, layout: str, backend: str) -> None:
    """There are few values, so that most planes reach their maximum and minimum in several places."""
    for seed in range(4):
        p = block_cases.problem(
            Case(
                mode,
                "cbam-channel",
                shape=(2, 5, 9, 7),
                dtype=torch.float64,
                layouts=(layout, layout),
                gradient_layout=layout,
                seed=seed,
            )
        )
        for x in p.inputs:
            x.detach().mul_(2).round_().div_(2)
        assert not block_cases.near_kink(p)
        results, truth = block_cases.evaluate(p, backend), block_cases.evaluate_reference(p, torch.float64)
        for name, result in results.items():
            torch.testing.assert_close(result, truth[name], rtol=1e-11, atol=1e-11)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("constant", [True, False])
def test_cbams_gradient_below_the_rounding_of_the_residual(constant: bool, layout: str, backend: str) -> None:
    """With planes of 1e-28 beside β, eager PyTorch finds the maximum of M in all pixels, the kernels in one.

    The sum of the gradient over a plane is the same, and so are all other results.
    """
    p = block_cases.problem(Case("restitute", "cbam-channel", shape=(2, 5, 4, 3), layouts=(layout, layout)))
    (x,) = p.inputs
    x.detach().copy_(torch.full_like(x, 1e-28) if constant else 1e-28 * x.detach())
    results, eager = block_cases.evaluate(p, backend), block_cases.evaluate_reference(p, torch.float32)
    got, want = results.pop("grad features"), eager.pop("grad features")
    for name, result in results.items():
        scale = float(eager[name].abs().max())
        torch.testing.assert_close(result, eager[name], rtol=1e-4, atol=1e-5 * scale + 1e-20)
    if constant:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        return
    torch.testing.assert_close(
        got.sum(dim=(2, 3)), want.sum(dim=(2, 3)), rtol=1e-4, atol=1e-4 * float(want.abs().max())
    )
    # M decreases with the input here (γ/σ is some 300): its maximum is where the input has its minimum or its
    # maximum, and no other pixel differs from eager PyTorch's gradient by more than its even share.
    share = (got - want).flatten(2)
    lowest, highest = x.flatten(2).argmin(dim=2), x.flatten(2).argmax(dim=2)
    at = share.abs().argmax(dim=2)
    assert bool(((at == lowest) | (at == highest)).all())


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", matrix.GATES)
def test_snrs_restitution_alone_is_bitwise_the_first_of_three(kind: str, backend: str) -> None:
    """Training and inference compute the same features; the gradients are those of the first output."""
    block = SNRBlock(8, reduction=4, gate=kind, backend=backend, device=DEVICE)
    features = random(3, 8, 5, 4, dtype=torch.float32)
    assert same_bits(block.restitute(features), block(features).restituted)
    weight = random(3, 8, 5, 4, seed=1, dtype=torch.float32)
    leaves = tuple(block.parameters())
    alone = torch.autograd.grad((block.restitute(features) * weight).sum(), leaves)
    of_three = torch.autograd.grad((block(features).restituted * weight).sum(), leaves)
    for got, want in zip(alone, of_three, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --- the whole CBAM, which no kernel can fuse -------------------------------------------------------------


def whole_cbam(backend: str | None = None, dtype: torch.dtype = torch.float64) -> MRCNBlock:
    torch.manual_seed(0)
    return MRCNBlock(4, reduction=2, gate="cbam", backend=backend, device=DEVICE, dtype=dtype)


def snr_cbam(dtype: torch.dtype = torch.float64) -> SNRBlock:
    torch.manual_seed(0)
    return SNRBlock(4, reduction=2, gate="cbam", device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("mode", [*MODES, "snr restitute"])
def test_whole_cbams_derivatives(mode: str) -> None:
    mrcn, snr = whole_cbam(), snr_cbam()
    functions: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        "pair": lambda v, n: tuple(mrcn(v, n))[1:5],
        "concat": lambda v, n: (mrcn(v, n, concat=True),),
        "restitute": lambda n: (mrcn.restitute(n, "infrared"),),
        "snr": lambda x: tuple(snr(x)),
        "snr restitute": lambda x: (snr.restitute(x),),
    }
    count = 2 if mode in ("pair", "concat") else 1
    maps = tuple(random(2, 4, 1, 3, seed=s).requires_grad_() for s in range(1, 1 + count))
    parameters = tuple((snr if "snr" in mode else mrcn).parameters())

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return functions[mode](*tensors[:count])  # the parameters are the block's own, changed in place

    assert torch.autograd.gradcheck(run, (*maps, *parameters))
    assert torch.autograd.gradgradcheck(run, (*maps, *parameters), fast_mode=True)


def test_whole_cbam_is_the_channel_part_where_the_spatial_part_says_one_half() -> None:
    """A spatial weight of zero gives σ(0) = 1/2 everywhere."""
    block, channels = whole_cbam(), MRCNBlock(4, reduction=2, gate="cbam-channel", backend="reference")
    channels.to(DEVICE, torch.float64)
    of_channels = {k: v for k, v in block.state_dict().items() if k != "gate.spatial_weight"}
    channels.load_state_dict(of_channels)
    with torch.no_grad():
        block.gate.parameter_list()[-1].zero_()
    features = random(2, 4, 5, 6)
    normalized = nn.functional.instance_norm(features)
    half = (block.restitute(features, "visible") - normalized) * 2
    torch.testing.assert_close(half, channels.restitute(features, "visible") - normalized)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_whole_cbam_refuses_the_kernels_with_the_reason(backend: str) -> None:
    features = random(2, 4, 3, 3)
    for call in (
        lambda: whole_cbam(backend)(features, features),
        lambda: whole_cbam(backend).restitute(features, "visible"),
    ):
        with pytest.raises(
            RuntimeError, match=rf"'{backend}' can't serve this call: CBAM's spatial part"
        ) as e:
            call()
        assert "gate='cbam-channel'" in str(e.value) and "unset to fall back" in str(e.value)


def test_whole_cbam_takes_the_reference_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MRCN_FAST_BACKEND", raising=False)
    features = random(2, 4, 3, 3)
    with caplog.at_level(logging.INFO, "mrcn_fast"):
        for backend in (None, "auto"):
            got = whole_cbam(backend).restitute(features, "visible")
            assert same_bits(got, whole_cbam("reference").restitute(features, "visible"))
    (record,) = (r for r in caplog.records if r.name == "mrcn_fast")
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("using the reference backend (CBAM's spatial part")
    # Kernels still serve the loss and the other gates.
    assert dispatch.unserved("reference", DEVICE, torch.float32, "cbam") is None
    assert dispatch.choose("reference", DEVICE, torch.float32, "cbam") == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_cbam_keeps_dtype_and_layout(dtype: torch.dtype) -> None:
    block = whole_cbam(dtype=torch.float32)
    features = random(2, 4, 6, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        sets = block(features, features)
    for x in sets[1:5]:
        assert x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)


def test_whole_cbam_is_one_graph() -> None:
    mrcn, snr = whole_cbam(dtype=torch.float32), snr_cbam(torch.float32)

    def network(visible: Tensor, infrared: Tensor) -> Tensor:
        return mrcn(snr(visible).restituted, snr.restitute(infrared), concat=True).square().mean()

    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    maps = tuple(random(2, 4, 5, 6, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    leaves = (*maps, *mrcn.parameters(), *snr.parameters())
    for got, want in zip(*(torch.autograd.grad(f(*maps), leaves) for f in (compiled, network)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 2, 4), (1, 2), (1, 4, 2), (1, 4)], "got (Tensor, Tensor, Tensor, Tensor), expected 5 tensors"),
        (
            [(1, 2, 4), (1, 2), (1, 4, 2), (1, 4), (1, 2, 5, 5)],
            "got shape (1, 2, 5, 5), expected (1, 2, 7, 7)",
        ),
    ],
)
def test_whole_cbams_parameters_are_checked(shapes: list[tuple[int, ...]], message: str) -> None:
    features = random(2, 4, 3, 3)
    with pytest.raises(ValueError) as error:
        mrcn_restitution(
            features, random(1, 4), random(1, 4), [random(*shape) for shape in shapes], gate="cbam"
        )
    assert message in str(error.value)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_far_out_and_not_finite(backend: str, dtype: torch.dtype) -> None:
    """Logits of any size, beyond the overflow of e^x too; infinities and NaN are as in eager PyTorch."""
    torch.manual_seed(0)
    block, plain = (
        MRCNBlock(19, device=DEVICE, dtype=dtype, backend=name) for name in (backend, "reference")
    )
    with torch.no_grad():
        bias = block.gate.parameter_list()[3]
        for gate, end in enumerate((1200.0, 12.0, 95.0, 710.0)):
            bias[gate] = torch.linspace(-end, end, 19, dtype=dtype)
        bias[0, 3:6] = torch.tensor((math.inf, -math.inf, math.nan), dtype=dtype)
    plain.load_state_dict(block.state_dict())
    maps = torch.randn(2, 2, 19, 4, 5, device=DEVICE, dtype=dtype).unbind()
    tolerance = 2e-6 if dtype == torch.float32 else 4e-15
    for made, expected in zip(block(*maps), plain(*maps), strict=True):
        torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


# --- parameters and attention as tools see them -----------------------------------------------------------


@pytest.mark.parametrize("kind", list(GATES))
def test_what_is_left_out_of_weight_decay(kind: str) -> None:
    block = MRCNBlock(16, gate=kind)
    names = dict(block.named_parameters())
    left_out = block.no_weight_decay()
    assert left_out <= set(names)
    # In separate modules γ, β and biases would be vectors; of the other parameters only ECA's kernel is one.
    vectors = {name for name, p in names.items() if p[0].dim() <= 1}
    assert vectors - left_out == ({"gate.weight"} if kind == "eca" else set())


@pytest.mark.parametrize("kind", list(GATES))
def test_each_gates_parameters_by_modality_and_role(kind: str) -> None:
    block = MRCNBlock(8, gate=kind)
    order = [("visible", "restitution"), ("infrared", "restitution")]
    order += [("visible", "compensation"), ("infrared", "compensation")]
    for index, (modality, role) in enumerate(order):
        found = block.gate_parameters(modality, role)  # type: ignore[arg-type]
        for name, p in found.items():
            stacked = getattr(block.gate, name)
            assert p.data_ptr() == stacked[index].data_ptr() and torch.equal(p, stacked[index])
    with torch.no_grad():
        block.norm_parameters("infrared")[0].fill_(3)
    assert block.norm_weight[:, 0].tolist() == [1, 3]
    with pytest.raises(ValueError, match="role: got 'both', expected one of 'restitution', 'compensation'"):
        block.gate_parameters("visible", "both")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(GATES))
def test_the_attention_is_what_the_block_uses(kind: str) -> None:
    """F₊ = F̃ + M A₁(M), F₋ = F̃ + A₂(M) M of the other modality, with M = F - F̃ (eq. 3 to 7)."""
    torch.manual_seed(0)
    block = MRCNBlock(6, gate=kind, reduction=1, dtype=torch.float64)
    visible, infrared = random(2, 3, 6, 9, 8).cpu().unbind()
    made, found = block(visible, infrared), block.attention(visible, infrared)
    shape = (3, 6, 9, 8) if kind == "cbam" else (3, 6)
    assert all(a.shape == shape for a in found)
    v_restitution, n_restitution, v_compensation, n_compensation = (
        a if a.dim() == 4 else a[:, :, None, None] for a in found
    )
    norms = [
        reference.instance_norm(visible, *block.norm_parameters("visible")),
        reference.instance_norm(infrared, *block.norm_parameters("infrared")),
    ]
    residuals = visible - norms[0], infrared - norms[1]
    for got, want in (
        (made.visible_restituted, norms[0] + residuals[0] * v_restitution),
        (made.infrared_restituted, norms[1] + residuals[1] * n_restitution),
        (made.visible_compensated, norms[0] + residuals[1] * n_compensation),
        (made.infrared_compensated, norms[1] + residuals[0] * v_compensation),
    ):
        torch.testing.assert_close(got, want)
    snr = SNRBlock(6, gate=kind, dtype=torch.float64)
    s = snr.attention(visible)
    assert s.shape == shape
    (gradient,) = torch.autograd.grad(found.visible_restitution.sum(), block.norm_bias)
    assert bool(gradient[0].any()) and not bool(gradient[1].any())


def test_hooks_on_a_gate_fire() -> None:
    block, calls = MRCNBlock(6), list[Any]()
    features = random(2, 3, 6, 4, 3, dtype=torch.float32).cpu()
    before = block(*features)
    handle = block.gate.register_forward_hook(
        lambda module, inputs, output: calls.append((inputs[1], output))
    )
    hooked = block(*features)
    assert [index for index, _ in calls] == [0, 1, 2, 3]
    seen = [attention for _, attention in calls]
    assert all(torch.equal(a, b) for a, b in zip(seen, block.attention(*features), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, hooked, strict=True))
    calls.clear()
    block.restitute(features[0], "infrared")
    assert [index for index, _ in calls] == [1]
    handle.remove()
    calls.clear()
    block(*features)
    assert calls == []
    snr = SNRBlock(6)
    snr.gate.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs)))
    snr(features[0])
    snr.restitute(features[0])
    assert len(calls) == 2


@matrix.backends("reference", *KERNEL_BACKENDS)
def test_a_gate_without_a_gradient_has_none(backend: str) -> None:
    """With zeros as its gradient, weight decay and momentum would move it."""
    snr = SNRBlock(6, backend=backend, device=DEVICE)
    snr(random(2, 6, 4, 3, dtype=torch.float32)).normalized.sum().backward()
    assert all(p.grad is None for p in snr.gate.parameters())
    assert snr.norm_weight.grad is not None and snr.norm_bias.grad is not None
