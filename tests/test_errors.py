"""Bad input: each public call says what it got, what it expected and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mrcn_fast import (
    CQCLoss,
    MRCNBlock,
    SNRBlock,
    checks,
    cqc_loss,
    mrcn_block,
    mrcn_restitution,
    snr_block,
)
from mrcn_fast.gates import make_gate
from tests.support import matrix
from tests.support.errors import refuses
from tests.support.matrix import KERNEL_BACKENDS

SHAPE = (2, 4, 3, 3)
both_backends = matrix.backends("reference", *KERNEL_BACKENDS)


def parameters(channels: int = 4, modalities: int = 2, gates: int = 4, **options: Any) -> list[Tensor]:
    """norm_weight, norm_bias and SE parameters."""
    shapes = [(modalities, channels), (modalities, channels)]
    gate = [(gates, 2, channels), (gates, 2), (gates, channels, 2), (gates, channels)]
    return [torch.ones(shape, **options) for shape in (*shapes, *gate)]


# --- feature maps -----------------------------------------------------------------------------------------

BAD_MAPS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "no tensor": ([[1.0]], TypeError, ("got list", "expected a tensor (N, C, H, W)")),
    "three dimensions": (
        torch.ones(4, 3, 3),
        ValueError,
        ("got 3 dimensions (4, 3, 3)", "expected four, (N, C, H, W)"),
    ),
    "pooled": (torch.ones(2, 4), ValueError, ("got 2 dimensions (2, 4)", "expected four")),
    "integers": (
        torch.ones(SHAPE, dtype=torch.int64),
        TypeError,
        ("got dtype torch.int64", "expected float32, float64, bfloat16 or float16", ".float()"),
    ),
    "eight bits": (
        torch.ones(SHAPE).to(torch.float8_e4m3fn),
        TypeError,
        ("got dtype torch.float8_e4m3fn", "expected float32, float64, bfloat16 or float16"),
    ),
    "complex": (
        torch.ones(SHAPE, dtype=torch.complex64),
        TypeError,
        ("got dtype torch.complex64", "expected"),
    ),
    "one pixel": (
        torch.ones(2, 4, 1, 1),
        ValueError,
        ("got planes of 1 x 1", "expected at least 2 elements", "before pooling"),
    ),
    "no pixel": (torch.ones(2, 4, 0, 3), ValueError, ("got planes of 0 x 3", "expected at least 2")),
    "no channel": (torch.ones(2, 0, 3, 3), ValueError, ("got no channels", "expected C >= 1")),
}

# No kernel of ours sees these, because torch's dispatcher refuses them.
NOT_DENSE: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "sparse": (torch.ones(SHAPE).to_sparse(), TypeError, ("got layout torch.sparse_coo", ".to_dense()")),
    "mkldnn": (torch.ones(SHAPE).to_mkldnn(), TypeError, ("got layout torch._mkldnn", ".to_dense()")),
}


@both_backends
@pytest.mark.parametrize("kind", [*BAD_MAPS, *NOT_DENSE])
def test_feature_maps(kind: str, backend: str) -> None:
    bad, error, parts = (BAD_MAPS | NOT_DENSE)[kind]
    good = torch.ones(SHAPE)
    norm_weight, norm_bias, *gate = parameters(modalities=1, gates=1)
    calls: dict[str, tuple[str, Callable[[], Any]]] = {
        "mrcn_block": ("visible", lambda: MRCNBlock(4, backend=backend)(bad, bad)),
        "second of the pair": ("infrared", lambda: MRCNBlock(4, backend=backend)(good, bad)),
        "concat": ("visible", lambda: MRCNBlock(4, backend=backend)(bad, good, concat=True)),
        "restitute": ("features", lambda: MRCNBlock(4, backend=backend).restitute(bad, "visible")),
        "mrcn_restitution": (
            "features",
            lambda: mrcn_restitution(bad, norm_weight, norm_bias, gate, backend=backend),
        ),
        "SNRBlock": ("features", lambda: SNRBlock(4, backend=backend)(bad)),
        "snr_block": ("features", lambda: snr_block(bad, norm_weight, norm_bias, gate, backend=backend)),
    }
    for name, call in calls.values():
        with refuses(error, f"{name}: ", *parts):
            call()


@both_backends
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_nested_tensor(backend: str) -> None:
    maps = torch.nested.nested_tensor([torch.ones(4, 3, 3), torch.ones(4, 2, 3)])
    with refuses(TypeError, "visible: got a nested tensor", "expected a dense tensor"):
        MRCNBlock(4, backend=backend)(maps, maps)


@both_backends
def test_pairs(backend: str) -> None:
    block = MRCNBlock(4, backend=backend)
    with refuses(ValueError, "got shapes (2, 4, 3, 3) and (3, 4, 3, 3)", "expected equal", "restitute("):
        block(torch.ones(SHAPE), torch.ones(3, 4, 3, 3))
    with refuses(ValueError, "got shapes (2, 4, 3, 3) and (2, 4, 3, 2)", "expected equal"):
        block(torch.ones(SHAPE), torch.ones(2, 4, 3, 2), concat=True)
    with refuses(TypeError, "got dtypes torch.float32 and torch.bfloat16", "expected one dtype"):
        block(torch.ones(SHAPE), torch.ones(SHAPE, dtype=torch.bfloat16))
    with refuses(ValueError, "got devices cpu and meta", "expected one device"):
        block(torch.ones(SHAPE), torch.ones(SHAPE, device="meta"))


# With the reduction 1, the gates' weights are so large that samples share their reading.
@both_backends
@pytest.mark.parametrize(("channels", "reduction"), [(4, 16), (512, 1)])
def test_an_empty_batch_gives_empty_sets(channels: int, reduction: int, backend: str) -> None:
    """A batch without samples is allowed: a rank of a distributed run may have none."""
    block = MRCNBlock(channels, reduction=reduction, backend=backend)
    empty = torch.ones(0, channels, 3, 3, requires_grad=True)
    assert block(empty, empty.detach(), concat=True).shape == (0, channels, 3, 3)
    features = block(empty, empty.detach())
    assert all(f.shape == (0, channels, 3, 3) for f in features)
    features.visible_restituted.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in block.parameters())


# --- parameters -------------------------------------------------------------------------------------------


@both_backends
def test_parameters_that_dont_fit(backend: str) -> None:
    x = torch.ones(SHAPE)

    def run(changed: list[Tensor], features: Tensor = x, **settings: Any) -> None:
        norm_weight, norm_bias, *gate = changed
        mrcn_block(features, features, norm_weight, norm_bias, gate, backend=backend, **settings)

    run(parameters())
    with refuses(ValueError, "concat: got 'no'", "expected True or False"):
        run(parameters(), concat="no")
    for gate in (make_gate("se", 4, 4), dict(enumerate(parameters()[2:])), None, parameters()[2]):
        with refuses(TypeError, f"gate_parameters: got {type(gate).__name__}", "gate.parameter_list()"):
            mrcn_block(x, x, *parameters()[:2], gate, backend=backend)  # type: ignore[call-overload]
    for position, name in ((0, "norm_weight"), (1, "norm_bias")):
        wrong = parameters()
        wrong[position] = torch.ones(2, 5)
        with refuses(ValueError, f"{name}: got shape (2, 5)", "expected (2, 4)", "4 channels"):
            run(wrong)
        wrong[position] = 1.0  # type: ignore[call-overload]
        with refuses(TypeError, f"{name}: got float", "expected a tensor (2, 4)"):
            run(wrong)
    for position, shape in ((2, (4, 2, 5)), (3, (4, 3)), (4, (4, 4, 3)), (5, (3, 4))):
        wrong = parameters()
        expected = tuple(wrong[position].shape)
        wrong[position] = torch.ones(shape)
        with refuses(ValueError, "gate_parameters of 'se'", f"got shape {shape}", f"expected {expected}"):
            run(wrong)
    with refuses(ValueError, "gate_parameters of 'se'", "got (Tensor, Tensor, Tensor)", "expected 4 tensors"):
        run(parameters()[:-1])
    with refuses(ValueError, "gate_parameters of 'se'", "got (Tensor, Tensor, Tensor, NoneType)"):
        run([*parameters()[:-1], None])  # type: ignore[list-item]
    with refuses(ValueError, "gate_parameters of 'eca'", "got (Tensor, ", "expected 1 tensor"):
        run(parameters(), gate="eca")
    with refuses(ValueError, "gate_parameters of 'se'", "got a width of 0", "expected at least 1"):
        run([*parameters()[:2], *[torch.ones(s) for s in ((4, 0, 4), (4, 0), (4, 4, 0), (4, 4))]])
    with refuses(ValueError, "gate_parameters of 'eca'", "got a kernel of 2", "expected an odd"):
        run([*parameters()[:2], torch.ones(4, 2)], gate="eca")
    for own, dtype, known in (
        (torch.float64, torch.float32, "expected torch.float32; convert the block with .to(torch.float32)"),
        (torch.float16, torch.float32, "expected torch.float32; convert"),
        (torch.float64, torch.bfloat16, "expected torch.bfloat16 or torch.float32; convert"),
        (torch.float32, torch.float64, "expected torch.float64; convert the block with .to(torch.float64)"),
    ):
        with refuses(TypeError, f"parameters: got dtype {own} for features of {dtype}", known):
            run(parameters(dtype=own), x.to(dtype))
    with refuses(TypeError, "got dtypes torch.float32 and torch.bfloat16", "expected one dtype for all"):
        run([*parameters()[:5], torch.ones(4, 4, dtype=torch.bfloat16)], x.bfloat16())
    with refuses(ValueError, "parameters: got device meta", "expected the features' cpu"):
        run(parameters(device="meta"))


@both_backends
def test_another_number_of_channels(backend: str) -> None:
    for call in (
        lambda: MRCNBlock(8, backend=backend)(torch.ones(SHAPE), torch.ones(SHAPE)),
        lambda: MRCNBlock(8, backend=backend).restitute(torch.ones(SHAPE), "visible"),
        lambda: SNRBlock(8, backend=backend)(torch.ones(SHAPE)),
    ):
        with refuses(ValueError, "norm_weight: got shape", "8)", "expected", "4)", "4 channels"):
            call()


def test_constructors() -> None:
    for module in (MRCNBlock, SNRBlock):
        for channels in (0, -3, 4.0, True):
            with refuses(ValueError, f"channels: got {channels!r}", "expected an integer of at least 1"):
                module(channels)  # type: ignore[arg-type]
        with refuses(ValueError, "reduction: got 0", "expected an integer of at least 1"):
            module(4, reduction=0)
        for eps in (0.0, -1e-5, float("nan")):
            with refuses(ValueError, f"eps: got {eps!r}", "expected a number above 0"):
                module(4, eps=eps)
        with refuses(ValueError, "gate: got 'se-net'", "'se', 'eca', 'cbam-channel'"):
            module(4, gate="se-net")
        with refuses(ValueError, "backend: got 'gpu'", "expected one of", "'cpu'", "'reference'"):
            module(4, backend="gpu")
    with refuses(ValueError, "restitute_to: got 'features'", "'normalized', 'input'"):
        MRCNBlock(4, restitute_to="features")
    with refuses(ValueError, "reduction: got 'max'", "'sum', 'mean', 'none'"):
        CQCLoss(reduction="max")
    for name in ("normalize", "detach_negative"):
        with refuses(ValueError, f"{name}: got 'no'", "expected True or False"):
            CQCLoss(**{name: "no"})  # type: ignore[arg-type]


@both_backends
def test_names_in_calls(backend: str) -> None:
    x = torch.ones(SHAPE)
    norm_weight, norm_bias, *gate = parameters()
    with refuses(ValueError, "modality: got 'thermal'", "'visible', 'infrared'"):
        MRCNBlock(4, backend=backend).restitute(x, "thermal")  # type: ignore[arg-type]
    with refuses(ValueError, "gate: got 'none'", "'se', 'eca', 'cbam-channel'"):
        mrcn_block(x, x, norm_weight, norm_bias, gate, gate="none", backend=backend)
    with refuses(ValueError, "restitute_to: got ''", "'normalized', 'input'"):
        mrcn_block(x, x, norm_weight, norm_bias, gate, restitute_to="", backend=backend)


# --- who checks the tensors -------------------------------------------------------------------------------


def pair(**changed: Any) -> list[Any]:
    """The tensors of a pair's call, of which some are others."""
    names = (
        "visible",
        "infrared",
        "norm_weight",
        "norm_bias",
        "fc1_weight",
        "fc1_bias",
        "fc2_weight",
        "fc2_bias",
    )
    fitting = dict(zip(names, [torch.ones(SHAPE), torch.ones(SHAPE), *parameters()], strict=True))
    return list((fitting | changed).values())


BAD_PAIRS: dict[str, list[Any]] = {
    **{f"visible: {kind}": pair(visible=bad[0], infrared=bad[0]) for kind, bad in BAD_MAPS.items()},
    "infrared: no tensor": pair(infrared=[[1.0]]),
    "infrared: another batch": pair(infrared=torch.ones(3, 4, 3, 3)),
    "infrared: another dtype": pair(infrared=torch.ones(SHAPE).bfloat16()),
    "infrared: another device": pair(infrared=torch.ones(SHAPE, device="meta")),
    "norm_weight: no tensor": pair(norm_weight=1.0),
    "norm_weight: another shape": pair(norm_weight=torch.ones(2, 5)),
    "norm_bias: another shape": pair(norm_bias=torch.ones(1, 4)),
    "fc1_weight: another shape": pair(fc1_weight=torch.ones(4, 2, 5)),
    "fc1_weight: no width": pair(fc1_weight=torch.ones(4, 0, 4)),
    "fc2_bias: another shape": pair(fc2_bias=torch.ones(3, 4)),
    "fc2_bias: no tensor": pair(fc2_bias=None),
    "fc2_bias: missing": pair()[:-1],
    "fc2_bias: another device": pair(fc2_bias=torch.ones(4, 4, device="meta")),
    "fc2_bias: another dtype": pair(fc2_bias=torch.ones(4, 4).double()),
    "norm_weight: another dtype": pair(norm_weight=torch.ones(2, 4).double()),
    "float64 maps": pair(visible=torch.ones(SHAPE).double(), infrared=torch.ones(SHAPE).double()),
}


def fault_of(message: str) -> str:
    """What a message is about: the two sides name some arguments together."""
    if "device" in message:
        return "device"
    named = re.search("visible|infrared|features|norm_weight|norm_bias|parameters", message)
    assert named, message
    return "maps" if named[0] in ("visible", "infrared", "features") else "parameters"


@matrix.backends("cpu")
@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_cpp_refuses_what_python_says(kind: str, backend: str) -> None:
    """The compiled operations refuse the same tensors; what a user reads is Python's."""
    tensors = BAD_PAIRS[kind]
    with pytest.raises((TypeError, ValueError)) as words:
        checks.check_tensors("pair", "se", tensors)
    operation, _ = matrix.operations("block", backend)
    with pytest.raises(RuntimeError) as refusal:
        operation(*tensors[:4], tensors[4:], 0, 1e-5, False)
    assert fault_of(str(refusal.value)) == fault_of(str(words.value))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(words.type) as read:
            mrcn_block(*tensors[:4], tensors[4:], backend=backend)  # type: ignore[call-overload]
        assert str(read.value) == str(words.value) and read.value.__cause__ is None


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_an_operation_written_in_python_checks_its_tensors(kind: str) -> None:
    tensors = BAD_PAIRS[kind]
    computed: list[Any] = []
    operation = checks.checked("block_forward", lambda *arguments: computed.append(arguments))
    with pytest.raises((TypeError, ValueError)):
        operation(*tensors[:4], tensors[4:], 0, 1e-5, False)
    assert not computed
    operation(*pair()[:4], pair()[4:], 0, 1e-5, False)
    assert len(computed) == 1


# --- the loss ---------------------------------------------------------------------------------------------


def six(rows: int = 4, **options: Any) -> list[Tensor]:
    return [torch.ones(rows, 3, **options) for _ in range(6)]


LABELS = torch.tensor([0, 0, 1, 1])

BAD_LOSSES: dict[str, tuple[Any, Any, Any, type[Exception], tuple[str, ...]]] = {
    "five sets": (six()[:5], LABELS, None, TypeError, ("features: got 5", "expected six tensors")),
    "no tensors": ([1.0] * 6, LABELS, None, TypeError, ("features: got 6 of float", "expected six tensors")),
    "maps": (
        [torch.ones(4, 3, 2, 2)] * 6,
        LABELS,
        None,
        ValueError,
        ("features: got shape (4, 3, 2, 2)", "expected (B, D)", "pool the maps first"),
    ),
    "two widths": (
        [*six()[:5], torch.ones(4, 2)],
        LABELS,
        None,
        ValueError,
        ("features: got shape (4, 2)", "expected (B, D), one D for all"),
    ),
    "integer features": (
        six(dtype=torch.int64),
        LABELS,
        None,
        TypeError,
        ("features: got dtype torch.int64", "expected float32, float64, bfloat16 or float16", ".float()"),
    ),
    "two dtypes": (
        [*six()[:5], torch.ones(4, 3, dtype=torch.float64)],
        LABELS,
        None,
        TypeError,
        ("features: got dtypes torch.float32 and torch.float64", "expected one dtype for all", ".float()"),
    ),
    "sparse features": (
        [f.to_sparse() for f in six()],
        LABELS,
        None,
        TypeError,
        ("features: got layout torch.sparse_coo", "expected a dense tensor", ".to_dense()"),
    ),
    "too few labels": (
        six(),
        LABELS[:3],
        None,
        ValueError,
        ("features: got 4 rows for 3 visible and 3 infrared labels", "expected 3"),
    ),
    "too few infrared labels": (
        six(),
        LABELS,
        LABELS[:3],
        ValueError,
        ("features: got 4 rows for 4 visible and 3 infrared labels", "expected 3"),
    ),
    "stacked rows": (
        torch.ones(23, 3),
        LABELS,
        None,
        ValueError,
        ("features: got 23 rows for 4 visible and 4 infrared labels", "expected 24"),
    ),
    "float labels": (
        six(),
        LABELS.float(),
        None,
        TypeError,
        ("labels: got dtype torch.float32", "expected integers", ".long()"),
    ),
    "boolean labels": (six(), LABELS.bool(), None, TypeError, ("labels: got dtype torch.bool", "expected")),
    "float infrared labels": (six(), LABELS, LABELS.float(), TypeError, ("infrared_labels: got dtype",)),
    "a list of labels": (
        six(),
        [0, 0, 1, 1],
        None,
        TypeError,
        ("labels: got list", "expected an integer tensor"),
    ),
    "labels with two dimensions": (
        six(),
        LABELS[:, None],
        None,
        ValueError,
        ("labels: got shape (4, 1)", "expected (B,)"),
    ),
    "no labels": (six(0), LABELS[:0], None, ValueError, ("labels: got shape (0,)", "B >= 1")),
    "labels elsewhere": (
        six(),
        LABELS.to("meta"),
        None,
        ValueError,
        ("labels: got device meta", "expected the features' cpu"),
    ),
    "features on two devices": (
        [torch.ones(4, 3), *six(device="meta")[1:]],
        LABELS,
        None,
        ValueError,
        ("features: got device", "cpu", "meta", "expected"),
    ),
    "no identity in both": (
        six(),
        LABELS,
        LABELS + 5,
        ValueError,
        ("got no identity that is in both", "expected at least one", "[0, 1]", "[5, 6]"),
    ),
}


@both_backends
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_losses(kind: str, reduction: str, backend: str) -> None:
    features, labels, infrared_labels, error, parts = BAD_LOSSES[kind]
    with refuses(error, *parts):
        cqc_loss(features, labels, infrared_labels, reduction=reduction, backend=backend)
    with refuses(error, *parts):
        CQCLoss(reduction=reduction, backend=backend)(features, labels, infrared_labels)


def test_the_plain_loss_stays_where_its_features_are() -> None:
    """The loss is on the features' device, whatever device new tensors are made on by default."""
    features = six()
    with torch.device("meta"):
        loss = cqc_loss(features, LABELS, reduction="mean", backend="reference")
        assert isinstance(loss, Tensor) and loss.device.type == "cpu"
        with refuses(ValueError, "got no identity that is in both"):
            cqc_loss(features, LABELS, LABELS + 7, backend="reference")


def test_maps_that_have_only_a_shape() -> None:
    block = MRCNBlock(4, device="meta")
    x = torch.ones(SHAPE, device="meta")
    assert block(x, x, concat=True).shape == (12, 4, 3, 3)
    assert block.restitute(x, "visible").device.type == "meta"


def test_an_unknown_reduction() -> None:
    with refuses(ValueError, "reduction: got 'max'", "'sum', 'mean', 'none'"):
        cqc_loss(six(), LABELS, reduction="max")


def test_flags_of_the_loss() -> None:
    for flag in ("l2", None, 2):
        with refuses(ValueError, f"normalize: got {flag!r}", "expected True or False"):
            cqc_loss(six(), LABELS, normalize=flag)  # type: ignore[arg-type]
    assert cqc_loss(six(), LABELS, normalize=1) == cqc_loss(six(), LABELS, normalize=True)  # type: ignore[arg-type]
