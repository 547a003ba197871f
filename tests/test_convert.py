"""Conversion of weights: plain blocks compute what ours do, and what doesn't fit is named."""

from __future__ import annotations

import doctest
import logging
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mrcn_fast import MRCNBlock, SNRBlock, convert

CHANNELS, WIDTH = 32, 2


class PlainGate(nn.Module):
    """Squeeze and excitation of a residual, by linear layers or 1x1 convolutions."""

    def __init__(self, conv: bool, bias: bool) -> None:
        super().__init__()
        self.conv = conv

        def layer(a: int, b: int) -> nn.Module:
            return nn.Conv2d(a, b, 1, bias=bias) if conv else nn.Linear(a, b, bias=bias)

        self.fc = nn.Sequential(layer(CHANNELS, WIDTH), nn.ReLU(), layer(WIDTH, CHANNELS), nn.Sigmoid())

    def forward(self, residual: Tensor) -> Tensor:
        means = residual.mean(dim=(2, 3), keepdim=True)
        attention = self.fc(means) if self.conv else self.fc(means.flatten(1))[:, :, None, None]
        return cast(Tensor, attention * residual)


class PlainBlock(nn.Module):
    """Restitution and compensation as published two-stream networks are written: one module a part."""

    def __init__(self, conv: bool = False, bias: bool = True, affine: bool = True) -> None:
        super().__init__()
        self.norm_v = nn.InstanceNorm2d(CHANNELS, affine=affine)
        self.norm_n = nn.InstanceNorm2d(CHANNELS, affine=affine)
        self.restitution_v, self.restitution_n = PlainGate(conv, bias), PlainGate(conv, bias)
        self.compensation_v, self.compensation_n = PlainGate(conv, bias), PlainGate(conv, bias)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, v: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        plain_v, plain_n = self.norm_v(v), self.norm_n(n)
        removed_v, removed_n = v - plain_v, n - plain_n
        return (
            v,
            plain_v + self.restitution_v(removed_v),
            plain_v + self.compensation_n(removed_n),
            plain_n + self.compensation_v(removed_v),
            plain_n + self.restitution_n(removed_n),
            n,
        )


class PlainSNR(nn.Module):
    """SNR's module: one normalization, one gate with layers of other names."""

    def __init__(self) -> None:
        super().__init__()
        self.IN = nn.InstanceNorm2d(CHANNELS, affine=True)
        self.style_reweight_layer = nn.ModuleDict(
            {"fc1": nn.Conv2d(CHANNELS, WIDTH, 1), "fc2": nn.Conv2d(WIDTH, CHANNELS, 1)}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        plain = self.IN(x)
        removed, gate = x - plain, self.style_reweight_layer
        attention = gate["fc2"](gate["fc1"](removed.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid()
        return plain + attention * removed, plain + (1 - attention) * removed, plain


def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    v, n = torch.randn(2, 3, CHANNELS, 6, 4, dtype=torch.float64)
    return v.requires_grad_(), n.requires_grad_()


def compare(plain: nn.Module, block: nn.Module, *maps: Tensor) -> None:
    """Outputs and the gradients of the inputs are equal, up to rounding in float64."""
    found, expected = block(*maps), plain(*maps)
    weights = [torch.randn_like(x) for x in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(made, weights, strict=True)), maps)
        for made in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


FORMS: list[dict[str, Any]] = [{}, {"conv": True}, {"bias": False}, {"affine": False, "conv": True}]


@pytest.mark.parametrize("form", FORMS, ids=["linear", "conv", "without-bias", "without-affine"])
def test_a_plain_block_becomes_ours_and_comes_back(
    form: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mrcn_fast")
    plain = PlainBlock(**form).double()
    block = convert.mrcn_from_plain(plain.state_dict())
    assert (block.channels, block.gate.parameter_list()[0].shape[1]) == (CHANNELS, WIDTH)
    assert block.norm_weight.dtype == torch.float64
    compare(plain, block, *pair())
    for said, absent in (
        ("no biases of the gates (they are 0)", not form.get("bias", True)),
        ("no weights of the normalizations (γ is 1, β is 0)", not form.get("affine", True)),
    ):
        assert (said in caplog.text) == absent
    again = PlainBlock(**form).double()
    again.load_state_dict(convert.to_plain(block, again.state_dict()))
    compare(again, block, *pair())
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), again.parameters(), strict=True))


def test_the_gradients_of_the_weights_are_those_of_the_plain_block() -> None:
    plain = PlainBlock().double()
    block = convert.mrcn_from_plain(plain.state_dict())
    for module in (plain, block):
        torch.cat(module(*pair())).square().sum().backward()
    plain_gradients = {name: cast(Tensor, p.grad) for name, p in plain.named_parameters()}
    for parameter in block.parameters():
        parameter.data = cast(Tensor, parameter.grad)
    for name, gradient in convert.to_plain(block, plain_gradients).items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-9, atol=1e-9)


def test_snrs_block_becomes_ours_and_comes_back() -> None:
    plain = PlainSNR().double()
    block = convert.snr_from_plain(plain.state_dict())
    compare(plain, block, pair()[0])
    again = PlainSNR().double()
    again.load_state_dict(convert.to_plain(block, again.state_dict()))
    compare(again, block, pair()[0])


def test_names_and_prefix_of_a_network_of_ones_own() -> None:
    plain = nn.ModuleDict({"stem": nn.Conv2d(3, CHANNELS, 1), "mrcn": PlainBlock()})
    state = {f"module.{name}": tensor for name, tensor in plain.state_dict().items()}
    state = {name.replace("norm_v", "IN_rgb"): tensor for name, tensor in state.items()}
    names = convert.mrcn_names(norms=("IN_rgb", "norm_n"))
    block = convert.mrcn_from_plain(state, names, prefix="mrcn.")
    assert torch.equal(block.norm_weight[0], state["module.mrcn.IN_rgb.weight"])
    block.norm_weight.data.fill_(7)
    back = convert.to_plain(block, state, names, prefix="mrcn.")
    assert back.keys() == state.keys()
    assert bool((back["module.mrcn.IN_rgb.weight"] == 7).all())
    assert back["module.stem.weight"] is state["module.stem.weight"]


def test_exchanged_gates_give_another_block() -> None:
    plain = PlainBlock().double()
    names = convert.mrcn_names(gates=("restitution_v", "restitution_n", "compensation_n", "compensation_v"))
    found = convert.mrcn_from_plain(plain.state_dict(), names)(*pair())
    assert not torch.allclose(found[2], plain(*pair())[2])


def test_what_does_not_fit_is_named() -> None:
    state = dict(PlainBlock().state_dict())
    del state["norm_v.bias"], state["compensation_n.fc.2.weight"]
    state["norm_v.running_mean"] = torch.zeros(CHANNELS)
    with pytest.raises(ValueError) as error:
        convert.mrcn_from_plain(state)
    missing, unexpected = str(error.value).split("; unexpected: ")
    assert "missing: norm_v.bias, compensation_n.fc.2.weight" in missing
    assert unexpected.startswith("norm_v.running_mean. ")

    state = dict(PlainBlock().state_dict())
    state["restitution_n.fc.2.weight"] = torch.zeros(CHANNELS, WIDTH + 1)
    with pytest.raises(
        ValueError, match=r"shape: restitution_n.fc.2.weight: got \(32, 3\), expected \(32, 2\)"
    ):
        convert.mrcn_from_plain(state)
    state["restitution_v.fc.0.weight"] = torch.zeros(CHANNELS)
    with pytest.raises(ValueError, match=r"fc.0.weight: got \(32,\), expected \(hidden width, channels\)"):
        convert.mrcn_from_plain(state)
    with pytest.raises(ValueError, match="prefix"):
        convert.mrcn_from_plain(PlainBlock().state_dict(), prefix="block.")


def test_what_a_plain_block_can_not_hold_is_refused() -> None:
    like = PlainBlock(bias=False).state_dict()
    with pytest.raises(ValueError, match=r"no place for restitution_v.fc.0.bias"):
        convert.to_plain(MRCNBlock(CHANNELS), like)
    with pytest.raises(ValueError, match=r"gate='eca'"):
        convert.to_plain(MRCNBlock(CHANNELS, gate="eca"), PlainBlock().state_dict())
    with pytest.raises(ValueError, match=r"\(64,\)"):
        convert.to_plain(SNRBlock(64), PlainSNR().state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert.mrcn_names(norms="norm"), "norms: got 'norm', expected 2 names"),
        (lambda: convert.mrcn_from_plain({}, {"norm": "IN"}), "got the parts norm, expected visible.norm"),
        (
            lambda: convert.mrcn_from_plain({}, convert.mrcn_names(norms=("a", "a"))),
            "got a for several parts",
        ),
        (lambda: convert.snr_from_plain({"net": cast(Tensor, {})}), "whose 'net' is dict"),
    ],
)
def test_wrong_names_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_a_width_that_no_reduction_gives_is_refused() -> None:
    gate = nn.ModuleDict({"fc1": nn.Linear(10, 4), "fc2": nn.Linear(4, 10)})
    plain = nn.ModuleDict({"IN": nn.InstanceNorm2d(10, affine=True), "style_reweight_layer": gate})
    with pytest.raises(ValueError, match="hidden width 4 for 10 channels"):
        convert.snr_from_plain(plain.state_dict())


def two_stream() -> nn.Module:
    return nn.ModuleDict(
        {
            "trunk": nn.ModuleDict({"visible": nn.Conv2d(3, 4, 1), "infrared": nn.Conv2d(3, 4, 1)}),
            "neck": nn.BatchNorm1d(4),
            "classifier": nn.Linear(4, 5),
        }
    )


THEIRS = {"visible_module.visible.": "trunk.visible.", "thermal_module.thermal.": "trunk.infrared."}


def theirs() -> dict[str, Tensor]:
    state = two_stream().state_dict()
    state = {
        name.replace("trunk.visible", "visible_module.visible").replace(
            "trunk.infrared", "thermal_module.thermal"
        ): torch.ones_like(tensor)
        for name, tensor in state.items()
    }
    return {f"module.{name}": tensor for name, tensor in state.items()}


def test_a_network_loads_by_name_and_says_what_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mrcn_fast")
    network, state = two_stream(), theirs()
    before = network.state_dict()["classifier.weight"].clone()
    del state["module.classifier.bias"], state["module.neck.num_batches_tracked"]
    state["module.classifier.weight"] = torch.ones(7, 4)
    state["module.visible_module.visible.layer1.weight"] = torch.ones(1)
    found = convert.load_by_name(network, state, THEIRS, optional="classifier.")
    assert bool((network.state_dict()["trunk.infrared.weight"] == 1).all())
    assert torch.equal(network.state_dict()["classifier.weight"], before)
    assert found.missing == ("neck.num_batches_tracked", "classifier.weight", "classifier.bias")
    assert set(found.unused) == {"classifier.weight", "visible_module.visible.layer1.weight"}
    assert "not loaded" in caplog.text
    assert "classifier.weight: got (7, 4), expected (5, 4), classifier.bias" in caplog.text
    assert "not used: " in caplog.text and "visible_module.visible.layer1.weight" in caplog.text


def test_a_network_that_lacks_more_is_refused_and_stays() -> None:
    network, state = two_stream(), theirs()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    del state["module.thermal_module.thermal.weight"]
    with pytest.raises(ValueError, match=r"missing or of the wrong shape: trunk.infrared.weight\. It has"):
        convert.load_by_name(network, state, THEIRS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_examples_run() -> None:
    names = {"torch": torch, "nn": nn}
    assert doctest.testmod(convert, extraglobs=names).attempted >= 6
    assert doctest.testmod(convert, extraglobs=names).failed == 0
