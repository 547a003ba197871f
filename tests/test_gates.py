"""The channel gates: their parameters, initialization, and what the kernels make of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mrcn_fast import MRCNBlock, SNRBlock
from mrcn_fast.gates import GATES, ECAGate, SEGate, make_gate
from tests import cases
from tests.cases import DEVICE, KERNEL_BACKENDS, random


def test_the_known_gates() -> None:
    assert tuple(GATES) == cases.GATES


@pytest.mark.parametrize("kind", cases.GATES)
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
    """Uniform in ±1/√fan_in: bounds held and nearly reached, mean and variance those of the distribution."""
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
    eca = ECAGate(2048, 50)
    assert 0.9 / math.sqrt(7) < eca.weight.abs().max() <= 1 / math.sqrt(7)


def test_the_four_gates_start_differently() -> None:
    for kind in cases.GATES:
        first = make_gate(kind, 64, 4).parameter_list()[0]
        assert not any(torch.equal(first[0], first[i]) for i in (1, 2, 3))


@cases.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", cases.GATES)
def test_each_gate_drives_its_own_set(kind: str, backend: str) -> None:
    """A_v1, A_n1, A_v2, A_n2: a change in gate i moves v+, n+, n-, v- in this order and nothing else."""
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


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("kind", cases.GATES)
def test_a_saturated_gate_is_exact(kind: str, backend: str) -> None:
    """s = 1 gives the input back (F̃ + M = F), s = 0 leaves F̃; logits of ±1000 overflow no exponential."""
    block = SNRBlock(5, reduction=1, gate=kind, backend=backend, device=DEVICE, dtype=torch.float64)
    # Positive means and logits with their sign: ECA has no bias, so its weight decides.
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


@cases.backends(*KERNEL_BACKENDS)
def test_wide_kernels_and_hidden_layers(backend: str) -> None:
    """ECA's kernel wider than the channels; more hidden units than channels."""
    for case in (
        cases.Case(gate="eca", shape=(2, 3, 3, 4), hidden=5),
        cases.Case(gate="se", shape=(2, 3, 3, 4), hidden=19),
        cases.Case(gate="cbam-channel", shape=(2, 40, 2, 2), hidden=37),
    ):
        cases.check_accuracy(case, backend)


@cases.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_cbams_gradient_at_tied_maxima(mode: str, layout: str, backend: str) -> None:
    """Few values, so that most planes reach their maximum and minimum in several places."""
    for seed in range(4):
        p = cases.problem(
            cases.Case(
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
        assert not cases.near_kink(p)
        results, truth = cases.evaluate(p, backend), cases.evaluate_reference(p, torch.float64)
        for name, result in results.items():
            torch.testing.assert_close(result, truth[name], rtol=1e-11, atol=1e-11)
