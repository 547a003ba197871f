"""The reference against numbers worked out by hand, torch's own modules, and the paper's invariants."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mrcn_fast import MRCNBlock, reference
from tests.support import block_cases, cqc_cases, extended
from tests.support.block_cases import Case
from tests.support.cqc_cases import CQCCase
from tests.support.matrix import GATES, MODES, RESTITUTE_TO
from tests.support.rule import array

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3 / 4


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def plane(*values: float) -> Tensor:
    """(1, 1, 1, W)."""
    return tensor(*values)[None, None, None]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- instance normalization and residual ------------------------------------------------------------------


def test_equation_1_and_2_by_hand() -> None:
    # [1, 3]: μ = 2, variance ((1 - 2)² + (3 - 2)²) / 2 = 1, with ε = 3 σ = √4 = 2;
    # (F - μ) / σ = [-1/2, 1/2]; γ = 3, β = 10: [8.5, 11.5].
    close(reference.instance_norm(plane(1, 3), tensor(3.0), tensor(10.0), eps=3.0), plane(8.5, 11.5))


def test_equation_1_takes_each_plane_by_itself() -> None:
    # Two samples, two channels, ε = 0. [0, 2]: μ = 1, σ = 1. [0, 4]: μ = 2, σ = 2. [5, 7]: μ = 6, σ = 1.
    # [-9, 3]: μ = -3, σ = 6. Each normalizes to [-1, 1]; channel 0: γ = 1, β = 0; channel 1: γ = 2, β = 1.
    features = tensor([[[0.0, 2.0]], [[0.0, 4.0]]], [[[5.0, 7.0]], [[-9.0, 3.0]]])
    expected = tensor([[[-1.0, 1.0]], [[-1.0, 3.0]]], [[[-1.0, 1.0]], [[-1.0, 3.0]]])
    close(reference.instance_norm(features, tensor(1.0, 2.0), tensor(0.0, 1.0), eps=0.0), expected)


def test_the_default_epsilon_is_1e_5() -> None:
    got = reference.instance_norm(plane(1, 3), tensor(1.0), tensor(0.0))
    close(got, plane(-1 / math.sqrt(1 + 1e-5), 1 / math.sqrt(1 + 1e-5)))


def test_equation_3_by_hand() -> None:
    # F = [1, 3], F̃ = [-1.5, 2.5] as γ = 2, β = 1/2, ε = 0: M = [2.5, 0.5].
    normalized = reference.instance_norm(plane(1, 3), tensor(2.0), tensor(0.5), eps=0.0)
    close(normalized, plane(-1.5, 2.5))
    close(reference.residual(plane(1, 3), normalized), plane(2.5, 0.5))


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 7, 1, 2), (3, 1, 6, 1)])
def test_instance_norm_is_torchs(shape: tuple[int, int, int, int]) -> None:
    features, (weight, bias) = random(*shape), random(2, shape[1], seed=1)
    module = nn.InstanceNorm2d(shape[1], eps=1e-3, affine=True, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    close(reference.instance_norm(features, weight, bias, eps=1e-3), module(features))


def test_the_mean_of_the_residual_is_the_mean_minus_beta() -> None:
    features, weight, bias = random(3, 5, 7, 4), random(5, seed=1), random(5, seed=2)
    removed = reference.residual(features, reference.instance_norm(features, weight, bias))
    close(removed.mean(dim=(2, 3)), features.mean(dim=(2, 3)) - bias)


# --- gates ------------------------------------------------------------------------------------------------


def test_se_gate_by_hand() -> None:
    # M = [2.5, 0.5]: GAP = 1.5; fc1: 2 · 1.5 - 2 = 1, ReLU 1; fc2: ln 3 · 1 + 0; σ(ln 3) = 0.75.
    parameters = [tensor([2.0]), tensor(-2.0), tensor([LN3]), tensor(0.0)]
    close(reference.se_gate(plane(2.5, 0.5), parameters), tensor([0.75]))


def test_se_gate_cuts_negative_hidden_values() -> None:
    # GAP = 1.5; fc1: -2 · 1.5 = -3, ReLU 0; fc2: 0 + ln 3; were it not cut: σ(-3 ln 3 + ln 3) = 0.1.
    parameters = [tensor([-2.0]), tensor(0.0), tensor([LN3]), tensor(LN3)]
    close(reference.se_gate(plane(2.5, 0.5), parameters), tensor([0.75]))


def test_eca_gate_by_hand() -> None:
    # Three channels with means 1, 2, 4, kernel [a, b, c] = [1, 10, 100] · ln 3 / 210 padded with zeros:
    # channel 0: 10 · 1 + 100 · 2 = 210; 1: 1 · 1 + 10 · 2 + 100 · 4 = 421; 2: 1 · 2 + 10 · 4 = 42.
    residual = tensor([[[0.0, 2.0]], [[1.0, 3.0]], [[4.0, 4.0]]])
    unit = LN3 / 210
    got = reference.eca_gate(residual, [tensor(1.0, 10.0, 100.0) * unit])
    sigmoid = [1 / (1 + math.exp(-value * unit)) for value in (210, 421, 42)]
    assert sigmoid[0] == pytest.approx(0.75)
    close(got, tensor(sigmoid))


def test_cbam_channel_gate_by_hand() -> None:
    # M = [-1, 3]: GAP = 1, GMP = 3; fc1 has weight 1, bias -1: 0 and 2 after the ReLU; fc2 has weight 1/2,
    # bias ln 3 / 2 - 1/2, once for each branch: (0 + 1) + 2 (ln 3 / 2 - 1/2) = ln 3; σ = 0.75.
    parameters = [tensor([1.0]), tensor(-1.0), tensor([0.5]), tensor(LN3 / 2 - 0.5)]
    close(reference.cbam_channel_gate(plane(-1, 3), parameters), tensor([0.75]))


def test_se_gate_is_a_composition_of_linears() -> None:
    residual = random(3, 8, 5, 4)
    module = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid()
    ).double()
    close(reference.se_gate(residual, list(module.parameters())), module(residual))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_eca_gate_is_a_convolution_over_channels(size: int) -> None:
    residual = random(3, 8, 5, 4)
    convolution = nn.Conv1d(1, 1, size, padding=size // 2, bias=False, dtype=torch.float64)
    pooled = nn.AdaptiveAvgPool2d(1)(residual)[..., 0].transpose(1, 2)
    expected = torch.sigmoid(convolution(pooled))[:, 0]
    close(reference.eca_gate(residual, [convolution.weight[0, 0]]), expected)


def test_cbam_channel_gate_is_one_mlp_on_both_poolings() -> None:
    residual = random(3, 8, 5, 4)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)).double()
    expected = torch.sigmoid(mlp(nn.AdaptiveAvgPool2d(1)(residual)) + mlp(nn.AdaptiveMaxPool2d(1)(residual)))
    close(reference.cbam_channel_gate(residual, list(mlp.parameters())), expected)


def test_cbam_channel_gate_spreads_the_gradient_of_a_tied_maximum() -> None:
    residual = plane(3, 1, 3).requires_grad_()
    # Only the maximum branch passes the ReLU: GAP = 7/3 < 2.5 < GMP = 3.
    parameters = [tensor([1.0]), tensor(-2.5), tensor([1.0]), tensor(0.0)]
    gate = reference.cbam_channel_gate(residual, parameters)
    (gradient,) = torch.autograd.grad(gate.sum(), residual)
    s = 1 / (1 + math.exp(-0.5))
    close(gradient, plane(1, 0, 1) * s * (1 - s) / 2)


def test_spatial_gate_by_hand() -> None:
    # Two channels, [1, -3, 2] and [3, 1, 0]: mean [2, -1, 1], maximum [3, 1, 2]. The kernel looks at the mean
    # to the left (x 1) and at the maximum itself (x 10): 0 + 30, 2 + 10, -1 + 20; in units of ln 3 / 12 the
    # middle one is σ(ln 3) = 0.75.
    features = tensor([[1.0, -3.0, 2.0]], [[3.0, 1.0, 0.0]])[None]
    weight = torch.zeros(2, 7, 7, dtype=torch.float64)
    weight[0, 3, 2], weight[1, 3, 3] = LN3 / 12, 10 * LN3 / 12
    got = reference.spatial_gate(features, weight)
    expected = plane(*(1 / (1 + math.exp(-value * LN3 / 12)) for value in (30, 12, 19)))
    assert expected[0, 0, 0, 1] == pytest.approx(0.75)
    close(got, expected)


def test_cbam_weighs_places_after_channels() -> None:
    # Channel gates 0.5 and 0.25 whatever they see; M is 4 and -8 in its channels at the first place, 0 and 8
    # at the second. Channel-gated: 2 and -2, 0 and 2: maxima 2 and 2 (of M itself 4 and 8), means 0 and 1.
    # The kernel takes maximum + mean in the place: σ(2 u) and σ(3 u), u = ln 3 / 2.
    residual = tensor([[4.0, 0.0]], [[-8.0, 8.0]])[None]
    of_channels = [tensor([0.0, 0.0]), tensor(0.0), tensor([0.0], [0.0]), tensor(0.0, -LN3 / 2)]
    weight = torch.zeros(2, 7, 7, dtype=torch.float64)
    weight[:, 3, 3] = LN3 / 2
    first, second = 0.75, 1 / (1 + math.exp(-1.5 * LN3))
    expected = tensor([[0.5 * first, 0.5 * second]], [[0.25 * first, 0.25 * second]])[None]
    parameters = [*of_channels, weight]
    close(reference.cbam_gate(residual, parameters), expected)
    close(reference.attention(residual, "cbam", parameters), expected)
    close(reference.distill(residual, "cbam", parameters), residual * expected)


def test_cbam_is_a_composition_of_modules() -> None:
    residual = random(3, 8, 9, 5)
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)).double()
    convolution = nn.Conv2d(2, 1, 7, padding=3, bias=False, dtype=torch.float64)
    channels = torch.sigmoid(mlp(nn.AdaptiveAvgPool2d(1)(residual)) + mlp(nn.AdaptiveMaxPool2d(1)(residual)))
    gated = residual * channels[:, :, None, None]
    pooled = torch.cat((gated.mean(1, keepdim=True), gated.max(1, keepdim=True).values), 1)
    parameters = [*mlp.parameters(), convolution.weight[0]]
    close(reference.distill(residual, "cbam", parameters), gated * torch.sigmoid(convolution(pooled)))


# --- restitution and compensation -------------------------------------------------------------------------


def constant_gate(s: float) -> list[Tensor]:
    """SE parameters of one channel whose gate is s whatever it sees."""
    return [tensor([0.0]), tensor(0.0), tensor([0.0]), tensor(math.log(s / (1 - s)))]


def test_equation_4_by_hand() -> None:
    # M = [2.5, 0.5], s = 0.75: [1.875, 0.375].
    close(reference.distill(plane(2.5, 0.5), "se", constant_gate(0.75)), plane(1.875, 0.375))


def test_equation_5_by_hand() -> None:
    # F̃ = [-1.5, 2.5], M₊ = [1.875, 0.375]: F₊ = [0.375, 2.875]; as printed, F = [1, 3]: [2.875, 3.375].
    arguments = (plane(1, 3), plane(-1.5, 2.5), plane(1.875, 0.375))
    close(reference.restitute(*arguments), plane(0.375, 2.875))
    close(reference.restitute(*arguments, "input"), plane(2.875, 3.375))


def test_equation_7_by_hand() -> None:
    close(reference.compensate(plane(-1.5, 2.5), plane(4, 8)), plane(2.5, 10.5))


def pair_by_hand() -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """A pair of one-channel planes and parameters; what comes out stands in the test below."""
    gates = [constant_gate(s) for s in (0.75, 0.5, 0.25, 0.125)]  # A_v1, A_n1, A_v2, A_n2
    stacked = [torch.stack(p) for p in zip(*gates, strict=True)]
    return plane(1, 3), plane(10, 2), tensor([2.0], [1.0]), tensor([0.5], [-1.0]), stacked


def test_equations_1_to_7_by_hand() -> None:
    # Visible: F̃_v = [-1.5, 2.5], M_v = [2.5, 0.5].
    # Infrared: μ = 6, σ = 4, normalized [1, -1] - 1: F̃_n = [0, -2], M_n = [10, 4].
    # v+ = F̃_v + 0.75 M_v = [0.375, 2.875]        n+ = F̃_n + 0.5 M_n = [5, 0]
    # v- = F̃_v + 0.125 M_n = [-0.25, 3]           n- = F̃_n + 0.25 M_v = [0.625, -1.875]
    visible, infrared, weight, bias, gate_parameters = pair_by_hand()
    got = reference.mrcn_block(visible, infrared, weight, bias, gate_parameters, eps=0.0)
    expected = (
        visible,
        plane(0.375, 2.875),
        plane(-0.25, 3),
        plane(0.625, -1.875),
        plane(5, 0),
        infrared,
    )
    for g, e in zip(got, expected, strict=True):
        close(g, e)


def test_equation_5_as_printed_changes_only_the_restituted_sets() -> None:
    # v+ = F_v + 0.75 M_v = [2.875, 3.375], n+ = F_n + 0.5 M_n = [15, 4].
    visible, infrared, weight, bias, gate_parameters = pair_by_hand()
    got = reference.mrcn_block(
        visible, infrared, weight, bias, gate_parameters, eps=0.0, restitute_to="input"
    )
    close(got[1], plane(2.875, 3.375))
    close(got[4], plane(15, 4))
    default = reference.mrcn_block(visible, infrared, weight, bias, gate_parameters, eps=0.0)
    for i in (0, 2, 3, 5):
        close(got[i], default[i])


def test_restitution_alone_is_the_pairs() -> None:
    visible, infrared, weight, bias, gate_parameters = pair_by_hand()
    for i, (features, index) in enumerate(((visible, 1), (infrared, 4))):
        alone = reference.restitution(features, weight[i], bias[i], [p[i] for p in gate_parameters], eps=0.0)
        together = reference.mrcn_block(visible, infrared, weight, bias, gate_parameters, eps=0.0)
        close(alone, together[index])


def test_snr_by_hand() -> None:
    # F̃ = [-1.5, 2.5], M = [2.5, 0.5], s = 0.75: F̃ + 0.75 M and F̃ + 0.25 M = [-0.875, 2.625].
    got = reference.snr_block(plane(1, 3), tensor(2.0), tensor(0.5), constant_gate(0.75), eps=0.0)
    for g, e in zip(got, (plane(0.375, 2.875), plane(-0.875, 2.625), plane(-1.5, 2.5)), strict=True):
        close(g, e)


@pytest.mark.parametrize("gate", [*GATES, "cbam"])
def test_restituted_is_between_input_and_normalized(gate: str) -> None:
    """F₊ = s · F + (1 - s) · F̃."""
    features = random(3, 8, 5, 4)
    block = MRCNBlock(8, gate=gate, reduction=4, backend="reference", dtype=torch.float64)
    with torch.no_grad():
        for i, p in enumerate(block.parameters()):
            p.copy_(random(*p.shape, seed=10 + i))
    weight, bias = block.norm_weight[1], block.norm_bias[1]
    parameters = [p[1] for p in block.gate.parameter_list()]
    normalized = reference.instance_norm(features, weight, bias)
    s = reference.attention(features - normalized, gate, parameters)
    assert s.min() > 0 and s.max() < 1 and s.std() > 0.01
    close(block.restitute(features, "infrared"), s * features + (1 - s) * normalized)


# --- center-quadruplet causal loss ------------------------------------------------------------------------


def test_centers_by_hand() -> None:
    features = tensor([0.0, 2.0], [10.0, 10.0], [4.0, 6.0], [-1.0, -1.0])
    labels = torch.tensor([5, 9, 5, 7])
    close(reference.centers(features, labels, torch.tensor([5, 9])), tensor([2.0, 4.0], [10.0, 10.0]))


def test_distance_by_hand() -> None:
    # A 3-4-5 triangle, and the clamp: equal rows are 1e-6 apart with gradient zero.
    a = tensor([3.0, 4.0], [1.0, 1.0]).requires_grad_()
    b = tensor([0.0, 0.0], [1.0, 1.0])
    got = reference.distance(a, b)
    close(got, tensor(5.0, 1e-6))
    (gradient,) = torch.autograd.grad(got.sum(), a)
    close(gradient, tensor([0.6, 0.8], [0.0, 0.0]))


def test_shared_identities_are_those_in_both_ascending() -> None:
    got = reference.shared_identities(torch.tensor([9, 3, 3, 1, -4]), torch.tensor([-4, 9, 2, 9]))
    assert got.tolist() == [-4, 9]


# Centers of identity 0 and their distances; α = 0.2. D(c_v, c_n) = 5.
C_V, C_N = (0.0, 0.0), (3.0, 4.0)
C_V_PLUS = (3.0, 0.0)  # 4 from c_n, 3 from c_v: hinge α + 4 - 3 = 1.2
C_N_PLUS = (0.0, 4.0)  # 4 from c_v, 3 from c_n: α + 1 = 1.2
C_V_MINUS = (3.0, 4.0)  # at c_n, 5 from c_v: α + 1e-6 - 5 < 0, cut to 0
C_N_MINUS = (6.0, 8.0)  # 10 from c_v, 5 from c_n: α + 5 = 5.2


def test_equation_8_by_hand() -> None:
    got = reference.cqc_half(tensor(C_V), tensor(C_N), tensor(C_V_PLUS), tensor(C_N_PLUS), 0.2)
    close(got, tensor(2.4))


def test_equation_9_by_hand() -> None:
    got = reference.cqc_half(tensor(C_V), tensor(C_N), tensor(C_V_MINUS), tensor(C_N_MINUS), 0.2)
    close(got, tensor(5.2))


def sets_by_hand() -> tuple[list[Tensor], Tensor, Tensor]:
    """Two identities, 40 and 7; of 40 the centers above from two samples each, of 7 one sample each.

    Identity 7 lies at 0 but for v+ at (0, 3): D(c_v+, c_n) = D(c_v+, c_v) = 3, hinge α. The three other
    hinges have two distances of 1e-6: α each. Together 0.8. Identity 99 is visible only.
    """

    def visible(center: tuple[float, float], other: tuple[float, float] = (0.0, 0.0)) -> Tensor:
        x, y = center
        return tensor((x - 1, y + 2), other, (x + 1, y - 2), (50.0, 60.0))

    def infrared(center: tuple[float, float]) -> Tensor:
        x, y = center
        return tensor((0.0, 0.0), (x + 4, y + 1), (x - 4, y - 1))

    sets = [visible(C_V), visible(C_V_PLUS, (0.0, 3.0)), visible(C_V_MINUS)]
    sets += [infrared(C_N_MINUS), infrared(C_N_PLUS), infrared(C_N)]
    return sets, torch.tensor([40, 7, 40, 99]), torch.tensor([7, 40, 40])


def test_equation_10_by_hand() -> None:
    sets, labels, infrared_labels = sets_by_hand()
    losses, identities = reference.cqc_loss(sets, labels, infrared_labels)
    assert identities.tolist() == [7, 40]
    close(losses, tensor(0.8, 2.4 + 5.2))


def test_unit_rows_by_hand() -> None:
    """What is shorter than 1e-12 is divided by that, and the gradient is that of a constant divisor."""
    rows = tensor((3.0, -4.0), (0.0, 0.0), (3e-13, 4e-13), (0.0, 2e-12)).requires_grad_()
    units = reference.unit_rows(rows)
    close(units, tensor((0.6, -0.8), (0.0, 0.0), (0.3, 0.4), (0.0, 1.0)))
    # (g - u (u·g)) / length, with g = (1, 2): u·g = -1 of the first row and 2 of the last.
    (gradient,) = torch.autograd.grad(units, rows, tensor(*[(1.0, 2.0)] * 4))
    close(gradient[0], tensor(0.32, 0.24))
    close(gradient[1:] * 1e-12, tensor((1.0, 2.0), (1.0, 2.0), (0.5, 0.0)))


def test_equation_10_of_unit_rows_by_hand() -> None:
    """Whatever lengths the rows have: c_v = (1, 0), c_n = (0, 1), √2 apart.

    n- stays at n, with a hinge of α + √2 - 1e-6. The other made centers are at the other modality's original:
    α + 1e-6 - √2, cut to 0.
    """
    v, n = tensor((1.0, 0.0)), tensor((0.0, 1.0))
    sets = [3 * v, 5 * n, 0.1 * n, 7 * n, 2 * v, n]
    labels = torch.tensor([4])
    losses, _ = reference.cqc_loss(sets, labels, labels, normalize=True)
    close(losses, tensor(0.2 + 2**0.5 - 1e-6))
    by_sample, counts = reference.cqc_loss_by_sample(sets, labels, labels, normalize=True)
    close(by_sample, losses)
    assert counts.all()


def test_equation_10_gradient_by_hand() -> None:
    # For v+ of identity 40: ∂D(c_v+, c_n) = (0, -4) / 4, ∂D(c_v+, c_v) = (3, 0) / 3, so (-1, -1) for the
    # center and half of that for each of its two samples. With the negative detached (0, -1) / 2.
    # For v+ of identity 7 both distances have one direction, (0, 1) - (0, 1); detached (0, 1).
    # Identity 99 has no gradient.
    for detached, expected in (
        (False, tensor((-0.5, -0.5), (0.0, 0.0), (-0.5, -0.5), (0.0, 0.0))),
        (True, tensor((0.0, -0.5), (0.0, 1.0), (0.0, -0.5), (0.0, 0.0))),
    ):
        sets, labels, infrared_labels = sets_by_hand()
        sets[1].requires_grad_()
        losses, _ = reference.cqc_loss(sets, labels, infrared_labels, detach_negative=detached)
        (gradient,) = torch.autograd.grad(losses.sum(), sets[1])
        close(gradient, expected)


# --- the reference's derivatives against the chain rule written out by hand -------------------------------


needs_long_double = pytest.mark.skipif(
    not extended.PRECISE,
    reason="long double is a float64 on this machine: nothing more precise to compare with",
)


@needs_long_double
@pytest.mark.parametrize("restitute_to", RESTITUTE_TO)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mode", MODES)
def test_block_agrees_with_long_double(mode: str, gate: str, restitute_to: str) -> None:
    case = Case(mode, gate, restitute_to, (3, 7, 5, 4), torch.float64, hidden=3)
    p = block_cases.problem(case)
    check_relative(block_cases.evaluate(p, "reference"), block_cases.truth(p))


@needs_long_double
@pytest.mark.parametrize("detach_negative", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("normalize", [False, True])
def test_cqc_agrees_with_long_double(normalize: bool, reduction: str, detach_negative: bool) -> None:
    case = CQCCase(
        (2, 0, 3, 1), (1, 2, 2, 4), 6, torch.float64, reduction=reduction, detach_negative=detach_negative
    )
    p = cqc_cases.problem(case._replace(normalize=normalize))
    check_relative(cqc_cases.evaluate(p, "reference"), cqc_cases.truth(p))


def check_relative(results: dict[str, Tensor], truth: dict[str, extended.Array]) -> None:
    """Within 1e-14 of the largest value: some 50 rounding errors of float64, no place for a wrong term."""
    assert results.keys() == truth.keys()
    for name, result in results.items():
        error = abs(array(result) - truth[name]).max()
        assert error <= 1e-14 * abs(truth[name]).max(), name
        assert abs(truth[name]).max() > 0, name


def test_everything_is_twice_differentiable() -> None:
    features = random(2, 3, 2, 3).requires_grad_()
    parameters = [random(*s, seed=5 + i).requires_grad_() for i, s in enumerate([(3,), (3,)])]
    gate_parameters = [random(*s, seed=9 + i) for i, s in enumerate([(2, 3), (2,), (3, 2), (3,)])]

    spatial = random(2, 7, 7, seed=20)

    def run(f: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (
            reference.restitution(f, w, b, gate_parameters, gate="cbam-channel"),
            reference.restitution(f, w, b, [*gate_parameters, spatial], gate="cbam"),
        )

    check: Callable[..., bool] = torch.autograd.gradgradcheck
    assert check(run, (features, *parameters))
