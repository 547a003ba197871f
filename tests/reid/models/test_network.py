"""The network: its sets, streams, parts and test features, and what goes through it together."""

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mrcn_fast.gates import GATES
from mrcn_fast.reid.models import blocks
from mrcn_fast.reid.models.heads import Head, PartPool, stripes
from mrcn_fast.reid.models.network import MODELS, ReIDModel, TrainingOutput, use_layout
from mrcn_fast.reid.training.losses import ReIDLoss
from tests.support.matrix import backends

# Where a pair's training sets hold the test sets, (visible, infrared) each.
TEST_SETS = {
    "baseline": [(0, 1)],
    "snr": [(0, 1)],
    "mrcn": [(0, 5), (1, 4)],
    "mrm": [(0, 3), (1, 2)],
    "mcm": [(0, 3)],
}


# --- the models -------------------------------------------------------------------------------------------


def images(count: int, height: int = 32, width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A paired batch, visible and infrared."""
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(count, 3, height, width, generator=generator, dtype=dtype) for _ in range(2)]


def build(**arguments: Any) -> ReIDModel:
    """A ResNet-18 for five identities, the same at each call; the blocks' γ and β aren't the initial ones."""
    torch.manual_seed(0)
    model = ReIDModel(5, depth=18, **arguments)
    with torch.no_grad():
        for block in model.blocks:
            for p in (block.norm_weight, block.norm_bias):
                p.add_(0.3 * torch.randn(p.shape))
    return model


def heads_of(model: ReIDModel) -> list[Head]:
    return [cast(Head, head) for head in model.heads]


@pytest.mark.parametrize(
    ("model", "gate"),
    [("baseline", "se"), *((model, gate) for model in MODELS[1:] for gate in GATES)],
)
def test_every_model_trains_with_every_gate(model: str, gate: str) -> None:
    """In a step with two blocks, every parameter gets a finite gradient."""
    network = build(model=model, gate=gate, stages=(1, 2), pool="gem")
    output = network(*images(2))
    assert output.pooled.shape == (1, network.sets * 2, 512)
    assert output.logits.shape == (1, network.sets * 2, 5)
    assert len(output.styles) == (2 if model == "snr" else 0)
    parts = ReIDLoss()(output, torch.tensor([0, 1]))
    assert (parts.cqc > 0) == (network.sets > 2)
    assert (parts.causality > 0) == (model == "snr")
    parts.total.backward()
    for name, p in network.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name
            assert p.grad.any(), f"{name}: a dead parameter"


@pytest.mark.parametrize(("model", "used"), [("mrm", (0, 1)), ("mcm", (2, 3))])
def test_half_a_block_trains_its_own_gates(model: str, used: tuple[int, int]) -> None:
    network = build(model=model, stages=(1, 3))
    network(*images(3)).pooled.square().sum().backward()
    for block in network.blocks:
        for p in block.gate.parameters():
            assert p.grad is not None
            assert [bool(gate.any()) for gate in p.grad] == [i in used for i in range(4)]


@pytest.mark.parametrize("stage", range(5))
def test_mrcn_gives_six_sets_from_every_stage(stage: int) -> None:
    model = ReIDModel(5, depth=18, stages=[stage])
    pooled, logits, styles = model(*images(3))
    assert (pooled.shape, logits.shape, styles) == ((1, 18, 512), (1, 18, 5), ())
    assert model.sets == 6 and model.stages == (stage,)
    assert model.blocks[0].channels == model.trunk.channels[stage]
    (pooled.sum() + logits.sum()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_sets_are_the_papers_in_its_order() -> None:
    model = build(stages=(1,)).eval()
    visible, infrared = images(2, 64, 32)
    with torch.inference_mode():
        pooled = model(visible, infrared).pooled[0]
        v = model.trunk.layers(model.trunk.stem(visible, "visible"), 1, 1)
        n = model.trunk.layers(model.trunk.stem(infrared, "infrared"), 1, 1)
        for index, features in enumerate(model.blocks[0](v, n)):
            alone = model.trunk.layers(features, 2, 4).mean(dim=(2, 3))
            torch.testing.assert_close(pooled[2 * index : 2 * index + 2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["mrcn", "mrm", "mcm", "snr"])
def test_each_stream_is_a_stack_of_blocks(model: str) -> None:
    """With two blocks, each stream is followed from the stems to the last map."""
    network = build(model=model, stages=(0, 2)).eval()
    first, second = cast(list[Any], network.blocks)
    trunk = network.trunk
    visible, infrared = images(2)

    def between(x: Tensor) -> Tensor:
        return trunk.layers(x, 1, 2)

    with torch.inference_mode():
        pooled = network(visible, infrared).pooled[0]
        v, n = trunk.stem(visible, "visible"), trunk.stem(infrared, "infrared")
        if model == "snr":
            streams = [second(between(first(x).restituted)).restituted for x in (v, n)]
        else:
            restituted = [
                second.restitute(between(first.restitute(x, modality)), modality)
                for x, modality in ((v, "visible"), (n, "infrared"))
            ]
            once = first(v, n)
            twice = second(between(once.visible_compensated), between(once.infrared_compensated))
            compensated = [twice.visible_compensated, twice.infrared_compensated]
            of_v, of_n = {
                "mrm": ([restituted[0]], [restituted[1]]),
                "mcm": ([compensated[0]], [compensated[1]]),
                "mrcn": ([restituted[0], compensated[0]], [compensated[1], restituted[1]]),
            }[model]
            streams = [between(v), *of_v, *of_n, between(n)]
        expected = trunk.layers(torch.cat(streams), 3, 4).mean(dim=(2, 3))
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)


def test_the_baseline_has_two_sets_and_no_block() -> None:
    model = ReIDModel(5, model="baseline", depth=18)
    pooled, logits, _ = model(*images(3))
    assert (pooled.shape, logits.shape) == ((1, 6, 512), (1, 6, 5))
    assert model.blocks == () and model.stages == ()
    assert not any(name.startswith("plug") for name in model.state_dict())
    assert ReIDModel(5, model="baseline", depth=18, stages=()).sets == 2


def test_snrs_styles_are_the_means_of_both_modalities_maps() -> None:
    model = build(model="snr", stages=(1,)).eval()
    visible, infrared = images(3)
    with torch.inference_mode():
        (style,) = model(visible, infrared).styles
        for i, x in enumerate((model.trunk.stem(visible, "visible"), model.trunk.stem(infrared, "infrared"))):
            maps = model.blocks[0](model.trunk.layers(x, 1, 1))
            for got, want in zip(style, maps, strict=True):
                assert got.shape == (6, 64)
                torch.testing.assert_close(
                    got[3 * i : 3 * i + 3], want.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5
                )


# --- test features ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("model", MODELS)
def test_test_features_are_those_of_training(model: str, parts: int) -> None:
    """With two blocks, a feature has set after set and in a set part after part, each a unit vector."""
    network = build(model=model, stages=(0, 3), parts=parts, pool="gem").eval()
    visible, infrared = images(2, 64, 32)
    with torch.inference_mode():
        for head in heads_of(network):
            assert head.neck.running_mean is not None
            head.neck.running_mean.normal_()
        pooled = network(visible, infrared).pooled
        alone = network.extract(visible, "visible"), network.extract(infrared, "infrared")
        sets = torch.stack(
            [F.normalize(head.neck(p)) for head, p in zip(heads_of(network), pooled, strict=True)]
        )
        sets = sets.unflatten(1, (network.sets, 2))  # (parts, sets, B, D)
    assert len(network.test_sets) == len(TEST_SETS[model])
    for modality, found in enumerate(alone):
        expected = [sets[part, pair[modality]] for pair in TEST_SETS[model] for part in range(parts)]
        torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
        assert found.shape == (2, network.feature_size) and found.dtype == torch.float32
        torch.testing.assert_close(found.view(2, -1, 512).norm(dim=2), torch.ones(2, len(expected)))
    assert (alone[0] - alone[1]).norm() > 1e-3


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("baseline", ("original",)),
        ("snr", ("restituted",)),
        ("mrcn", ("original", "restituted")),
        ("mrm", ("original", "restituted")),
        ("mcm", ("original",)),
    ],
)
def test_the_test_sets_have_names(model: str, names: tuple[str, ...]) -> None:
    network = ReIDModel(5, model=model, depth=50, parts=4)
    assert network.test_sets == names
    assert network.feature_size == len(names) * 4 * 2048


def test_original_and_restituted_differ() -> None:
    model = build().eval()
    with torch.inference_mode():
        original, restituted = model.extract(images(3)[0], "visible").chunk(2, dim=1)
        own = heads_of(model)[0].neck(
            model.trunk.layers(model.trunk.stem(images(3)[0], "visible"), 1, 4).mean(dim=(2, 3))
        )
    torch.testing.assert_close(original, F.normalize(own), rtol=1e-4, atol=1e-5)
    assert (original - restituted).norm() > 1e-3


# --- pooling, parts, heads --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "parts", "expected"),
    [
        (18, 1, [(0, 18)]),
        (18, 3, [(0, 6), (6, 12), (12, 18)]),
        (18, 4, [(0, 5), (4, 9), (9, 14), (13, 18)]),
        (3, 2, [(0, 2), (1, 3)]),
        (2, 2, [(0, 1), (1, 2)]),
    ],
)
def test_stripes_by_hand(rows: int, parts: int, expected: list[tuple[int, int]]) -> None:
    assert stripes(rows, parts) == expected
    x = torch.arange(float(rows))[None, None, :, None].expand(2, 3, rows, 2)
    adaptive = nn.AdaptiveAvgPool2d((parts, 1))(x)[..., 0].permute(2, 0, 1)
    torch.testing.assert_close(PartPool(parts)(x), adaptive)


def test_average_and_gem_of_stripes_by_hand() -> None:
    # Rows [1, 3] and [2, -5]: the generalized mean with p = 3 is ((1 + 27) / 2)^(1/3), and with 1e-6 for what
    # is not above it ((8 + 1e-18) / 2)^(1/3).
    x = torch.tensor([[1.0, 3.0], [2.0, -5.0]])[None, None]
    torch.testing.assert_close(PartPool(2)(x), torch.tensor([2.0, -1.5]).view(2, 1, 1))
    gem = PartPool(2, "gem")
    torch.testing.assert_close(gem(x), torch.tensor([14.0, 4.0]).pow(1 / 3).view(2, 1, 1))
    torch.testing.assert_close(PartPool(1, "gem")(x), torch.tensor([[[9.0 ** (1 / 3)]]]))
    # With p = 1 it is the mean; p learns.
    assert gem.p is not None
    with torch.no_grad():
        gem.p.fill_(1.0)
    torch.testing.assert_close(gem(x), torch.tensor([2.0, 1.0]).view(2, 1, 1))
    gem(x).sum().backward()
    assert gem.p.grad is not None and gem.p.grad.isfinite() and gem.p.grad != 0


def test_gem_is_computed_in_float32() -> None:
    x = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)  # its cube is 27 million
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = PartPool(1, "gem")(x)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.tensor([[[300.0]]]))


def test_uneven_stripes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pool = PartPool(2)
    with caplog.at_level(logging.INFO, "mrcn_fast.reid.models.heads"):
        pool(torch.rand(1, 2, 4, 1))
        assert not caplog.records
        pool(torch.rand(1, 2, 3, 1))
        pool(torch.rand(1, 2, 5, 1))
    assert [r.getMessage() for r in caplog.records] == [
        "3 rows in 2 parts: rows 0 to 1, 1 to 2, neighbours sharing one"
    ]


def test_more_parts_than_rows_are_refused() -> None:
    model = ReIDModel(5, depth=18, parts=3)
    with pytest.raises(ValueError, match="got a last feature map of 2 rows for 3 parts"):
        model(*images(2))
    with pytest.raises(ValueError, match="2 rows for 3 parts"):
        model.extract(images(2)[0], "visible")


def test_each_part_has_a_head_of_its_own() -> None:
    model = build(parts=2)
    assert [name for name, _ in model.heads.named_parameters()] == [
        f"{part}.{name}" for part in (0, 1) for name in ("neck.weight", "neck.bias", "classifier.weight")
    ]
    assert {id(p) for p in model.head()} == {id(p) for p in model.heads.parameters()}
    with torch.no_grad():
        heads_of(model)[1].classifier.weight.zero_()
    output = model(*images(2))
    assert output.logits[0].any() and not output.logits[1].any()


def test_the_neck_is_centred_and_the_classifier_has_no_bias() -> None:
    for head in heads_of(ReIDModel(5, depth=18, parts=2)):
        assert not head.neck.bias.requires_grad
        assert not head.neck.bias.any()
        assert head.classifier.bias is None


# --- backends and layouts ---------------------------------------------------------------------------------


def results(network: ReIDModel) -> dict[str, Tensor]:
    """The outputs, all gradients, and the test features after the step, in float64."""
    pair = [x.requires_grad_() for x in images(3, 64, dtype=torch.float64)]
    output: TrainingOutput = network.train()(*pair)
    found = {"pooled": output.pooled, "logits": output.logits}
    for i, style in enumerate(output.styles):
        found |= {f"{name} {i}": f for name, f in style._asdict().items()}
    generator = torch.Generator().manual_seed(1)
    weighted = [(f * torch.randn(f.shape, generator=generator, dtype=f.dtype)).sum() for f in found.values()]
    torch.stack(weighted).sum().backward()
    named = {"visible": pair[0], "infrared": pair[1], **dict(network.named_parameters())}
    found |= {f"grad {name}": p.grad for name, p in named.items() if p.grad is not None}
    with torch.inference_mode():
        found["extracted"] = network.eval().extract(pair[0], "visible")
    return {name: f.detach() for name, f in found.items()}


@backends("cpu")
@pytest.mark.parametrize("model", ["mrcn", "mrm", "mcm", "snr"])
def test_kernels_and_reference_agree(model: str, backend: str) -> None:
    """Outputs and all gradients agree in float64, with two blocks and several parts."""
    settings = {"model": model, "stages": (0, 2), "parts": 2, "pool": "gem"}
    fused, plain = (results(build(backend=b, **settings).double()) for b in (backend, "reference"))
    assert fused.keys() == plain.keys()
    for name, want in plain.items():
        scale = float(want.abs().max())
        tolerance = 1e-5 if name == "extracted" else 1e-8 * scale  # extracted features are float32
        assert (fused[name] - want).abs().max() <= tolerance, name


def test_the_backend_reaches_every_block() -> None:
    model = ReIDModel(5, depth=18, stages=(0, 2, 4), backend="reference")
    assert [block.backend for block in model.blocks] == ["reference"] * 3
    for name in ("cpu", None):
        model.set_backend(name)
        assert [block.backend for block in model.blocks] == [name] * 3
    with pytest.raises(ValueError, match="got backend='gpu', expected one of"):
        model.set_backend("gpu")


def test_channels_last_gives_the_same() -> None:
    model = build(stages=(1,), parts=2).eval()
    pair = images(2, 64, 32)
    with torch.inference_mode():
        expected = model(*pair)
        layout = use_layout(model, True)
        assert model.trunk.visible.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        found = model(*(side.contiguous(memory_format=layout) for side in pair))
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-4, atol=1e-4)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "snrr"}, "got model='snrr', expected one of"),
        ({"depth": 34}, "got depth=34, expected one of"),
        ({"stages": (0, 5)}, r"got stages\[1\]=5, expected an integer from 0 to 4"),
        ({"stages": (2, 0)}, r"got stages=\(2, 0\), expected increasing values"),
        ({"stages": (1, 1)}, r"got stages=\(1, 1\), expected"),
        ({"stages": ()}, r"got stages=\(\), expected"),
        ({"stages": (5,), "model": "baseline"}, r"got stages\[0\]=5, expected"),
        ({"gate": "sse"}, "got gate='sse', expected one of"),
        ({"gate": "sse", "model": "baseline"}, "got gate='sse', expected one of"),
        ({"restitute_to": "nothing", "model": "snr"}, "got restitute_to='nothing', expected one of"),
        ({"backend": "gpu"}, "got backend='gpu', expected one of"),
        ({"pool": "max"}, "got pool='max', expected one of"),
        ({"parts": 0}, "got parts=0, expected"),
        ({"reduction": 0}, "got reduction=0, expected an integer"),
        ({"classes": 0}, "got classes=0"),
        ({"classes": 2.5}, "got classes=2.5, expected an integer"),
        ({"depth": "18"}, "got depth='18', expected one of 18, 50"),
        ({"stages": 0}, "got stages=0, expected a list of values, each an integer"),
        ({"gate": ["se"]}, r"got gate=\['se'\], expected one of"),
        ({"parts": True}, "got parts=True, expected an integer"),
    ],
)
def test_unknown_names_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReIDModel(**({"classes": 5, "depth": 18} | arguments))  # type: ignore[arg-type]


def test_a_gate_that_no_kernel_fuses_refuses_the_kernels() -> None:
    model = ReIDModel(5, depth=18, gate="cbam", backend="cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' can't serve this call: CBAM's spatial part"):
        model(*images(2))


def test_numpy_integers_are_taken() -> None:
    numbers: dict[str, Any] = {"classes": np.int64(5), "depth": np.int32(18), "parts": np.int8(2)}
    model = ReIDModel(**numbers, stages=np.array([0, 2]).tolist())
    assert (model.parts, len(model.blocks)) == (2, 2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            torch.zeros(2, 3, 32, 16, dtype=torch.uint8),
            r"got visible of torch.uint8 .*normalize",
        ),
        (torch.zeros(3, 32, 16), r"got visible of torch.float32 \(3, 32, 16\), expected"),
        (torch.zeros(2, 1, 32, 16), r"\(2, 1, 32, 16\), expected a floating-point tensor \(N, 3, H, W\)"),
        (np.zeros((2, 3, 32, 16), np.float32), "got visible of ndarray, expected a floating-point tensor"),
    ],
)
def test_inputs_other_than_images_are_refused(batch: Any, message: str) -> None:
    model = ReIDModel(5, depth=18)
    with pytest.raises(ValueError, match=message):
        model(batch, batch)
    with pytest.raises(ValueError, match=message.replace("visible", "images")):
        model.extract(batch, "visible")


def test_unequal_batches_and_unknown_modalities_are_refused() -> None:
    model = ReIDModel(5, depth=18)
    with pytest.raises(ValueError, match="expected equal shapes"):
        model(torch.rand(3, 3, 32, 16), torch.rand(2, 3, 32, 16))
    with pytest.raises(ValueError, match="got modality 'rgb', expected one of"):
        model.extract(torch.rand(1, 3, 32, 16), "rgb")  # type: ignore[arg-type]


def test_the_old_names_of_the_blocks_go_on_working() -> None:
    with pytest.warns(DeprecationWarning, match="MRCNPlug is called RestitutionCompensation now"):
        assert blocks.MRCNPlug is blocks.RestitutionCompensation
    with pytest.raises(AttributeError, match="no attribute 'Socket'"):
        blocks.Socket  # noqa: B018
