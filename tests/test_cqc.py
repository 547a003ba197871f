"""The center-quadruplet causal loss of every kernel backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mrcn_fast import CQCLoss, MRCNFeatures, cqc_loss, reference
from tests.support import cqc_cases, matrix
from tests.support.cqc_cases import FORMS, LENGTHS, CQCCase, CQCProblem
from tests.support.matrix import DEVICE, DTYPES, KERNEL_BACKENDS, PRECISE_DTYPES
from tests.support.rule import array
from tests.support.tensors import FEATURE_LAYOUTS, different_bits, misaligned, nonfinite, random, same_bits

REDUCTIONS = ("sum", "mean", "none")
COUNTS = {
    "P x K": ((2, 2, 2), (2, 2, 2)),
    "unequal counts": ((1, 3, 2), (2, 1, 4)),
    "identities in one modality only": ((2, 0, 3, 1), (1, 2, 2, 0)),
    "one identity, one sample": ((1,), (1,)),
}


# --- what the loss takes and gives ------------------------------------------------------------------------


@matrix.backends("reference", *KERNEL_BACKENDS)
@FORMS
def test_reductions(stacked: bool, normalize: bool, backend: str) -> None:
    p = cqc_cases.problem(CQCCase((2, 0, 3, 1), (1, 2, 2, 4), dtype=torch.float64, stacked=stacked))
    features = p.features[0] if stacked else p.features
    rows = [6] * 3 + [9] * 3
    sets = p.features[0].split(rows) if stacked else p.features
    losses, identities = reference.cqc_loss(sets, p.labels, p.infrared_labels, normalize=normalize)
    assert len(identities) == 3 and (losses > 0).all()

    def loss(reduction: str) -> Tensor | tuple[Tensor, Tensor]:
        return cqc_loss(
            features, p.labels, p.infrared_labels, reduction=reduction, normalize=normalize, backend=backend
        )

    each = loss("none")
    assert isinstance(each, tuple)
    torch.testing.assert_close(each[0], losses)
    assert torch.equal(each[1], identities) and each[1].dtype == torch.int64
    for reduction, expected in (("sum", losses.sum()), ("mean", losses.mean())):
        got = loss(reduction)
        assert isinstance(got, Tensor) and got.shape == ()
        torch.testing.assert_close(got, expected)


@matrix.backends("reference", *KERNEL_BACKENDS)
def test_module_is_the_function(backend: str) -> None:
    features = MRCNFeatures(*(random(4, 3, seed=i) for i in range(6)))
    labels = torch.tensor([1, 0, 1, 0], device=DEVICE)
    chosen: list[dict[str, Any]] = [
        {},
        {"margin": 0.7, "detach_negative": True},
        {"reduction": "mean"},
        {"normalize": True},
    ]
    for settings_ in chosen:
        got = CQCLoss(**settings_, backend=backend)(features, labels)
        for other in (None, labels):
            function = cqc_loss(features, labels, other, **settings_, backend=backend)
            assert isinstance(got, Tensor) and isinstance(function, Tensor)
            assert same_bits(got, function)


@matrix.backends("reference", *KERNEL_BACKENDS)
def test_defaults_are_the_papers(backend: str) -> None:
    """The margin is 0.2 and the loss a sum: equal distances make it four margins per identity."""
    features = [torch.zeros(4, 3, device=DEVICE)] * 6
    loss = cqc_loss(features, torch.tensor([0, 0, 5, 5], device=DEVICE), backend=backend)
    torch.testing.assert_close(loss, torch.tensor(8 * 0.2, device=DEVICE))


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer_labels(dtype: torch.dtype, backend: str) -> None:
    features = [random(4, 3, seed=i) for i in range(6)]
    labels = torch.tensor([100, 7, 7, 100], device=DEVICE)
    expected = cqc_loss(features, labels, backend="reference")
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(cqc_loss(features, labels.to(dtype), backend=backend), expected)


@matrix.backends(*KERNEL_BACKENDS)
def test_labels_may_be_strided_and_large(backend: str) -> None:
    features = [random(4, 3, seed=i) for i in range(6)]
    labels = torch.tensor([2**62, 0, -(2**62), 0, 2**62, 0, 5, 0], device=DEVICE)[::2]
    losses, identities = cqc_loss(features, labels, reduction="none", backend=backend)
    expected, known = reference.cqc_loss(features, labels, labels)
    assert torch.equal(identities, known) and known.tolist() == [-(2**62), 5, 2**62]
    torch.testing.assert_close(losses, expected)


@matrix.backends(*KERNEL_BACKENDS)
def test_many_identities(backend: str) -> None:
    """There are more identities and samples than any block or table of a kernel holds."""
    labels = torch.arange(3000).repeat_interleave(2)[torch.randperm(6000)].to(DEVICE)
    infrared_labels = torch.arange(1500, 4500, device=DEVICE).flip(0)
    sets = [random(6000, 2, seed=i) for i in range(3)] + [random(3000, 2, seed=i + 3) for i in range(3)]
    for s in sets:
        s.requires_grad_()
    found = []
    for name in (backend, "reference"):
        losses, identities = cqc_loss(sets, labels, infrared_labels, reduction="none", backend=name)
        found.append((losses, identities, *torch.autograd.grad(losses.sum(), sets)))
    assert torch.equal(found[0][1], torch.arange(1500, 3000, device=DEVICE))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@matrix.backends("reference", *KERNEL_BACKENDS)
def test_coinciding_centers_give_finite_gradients(backend: str) -> None:
    """Where distances are zero, D² is clamped at 1e-12 and has no gradient."""
    features = [torch.ones(4, 3, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in range(6)]
    loss = cqc_loss(features, torch.tensor([0, 0, 1, 1], device=DEVICE), backend=backend)
    torch.testing.assert_close(loss, torch.tensor(1.6, dtype=torch.float64, device=DEVICE))
    for gradient in torch.autograd.grad(loss, features):
        assert not gradient.any()


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lonely_modality", [0, 1])
def test_samples_of_an_identity_in_one_modality_only_get_no_gradient(
    lonely_modality: int, normalize: bool, backend: str
) -> None:
    counts = ((2, 3), (2, 0))
    case = CQCCase(counts[lonely_modality], counts[1 - lonely_modality], dtype=torch.float64, margin=3.0)
    p = cqc_cases.problem(case._replace(normalize=normalize))
    found = cqc_cases.evaluate(p, backend)
    for i, labels in enumerate([p.labels] * 3 + [p.infrared_labels] * 3):
        lonely = ~torch.isin(labels, p.labels) | ~torch.isin(labels, p.infrared_labels)
        gradient = found[f"grad {i}"]
        assert not gradient[lonely].any() and gradient[~lonely].any()


# --- normalized features -----------------------------------------------------------------------------------


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized_features_may_have_any_length(dtype: torch.dtype, backend: str) -> None:
    """Rows scaled by powers of two give the loss's same bits, and gradients scaled by their inverse."""
    p = cqc_cases.problem(CQCCase((2, 3), (1, 2), 33, dtype, margin=1.0, normalize=True))
    scales = [2.0 ** torch.randint(-3, 4, (f.shape[0], 1), device=DEVICE).to(dtype) for f in p.features]
    scaled = p._replace(
        features=tuple((f.detach() * s).requires_grad_() for f, s in zip(p.features, scales, strict=True))
    )
    one, other = cqc_cases.evaluate(p, backend), cqc_cases.evaluate(scaled, backend)
    assert same_bits(one["loss"], other["loss"])
    for i, s in enumerate(scales):
        back = other[f"grad {i}"] * s
        # Below 2^-14 float16 has fewer bits, and scaling back rounds.
        torch.testing.assert_close(back, one[f"grad {i}"], rtol=0, atol=0 if dtype != torch.float16 else 1e-6)


@matrix.backends("reference", *KERNEL_BACKENDS)
@FORMS
def test_normalizing_is_torchs(stacked: bool, normalize: bool, backend: str) -> None:
    p = cqc_cases.problem(CQCCase((2, 0, 3), (1, 2, 4), 33, torch.float64, stacked, normalize=normalize))
    found = cqc_cases.evaluate(p, backend)
    units = [F.normalize(f) if normalize else f for f in p.features]
    loss = cqc_loss(units[0] if stacked else units, p.labels, p.infrared_labels, backend="reference")
    assert isinstance(loss, Tensor)
    expected = (loss, *torch.autograd.grad(loss, p.features, p.gradient))
    for got, want in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_that_are_clamped_or_overflow(
    length: float, stacked: bool, dtype: torch.dtype, backend: str
) -> None:
    """A short or long row, alone in its center or not, has the reference's value and gradient."""
    case = CQCCase((2, 1), (1, 2), 9, dtype, stacked, "none", margin=3.0, normalize=True)
    for row in (0, 4, 10, 17) if stacked else (0, 1, 2):
        cqc_cases.check_short_rows(case, row, length, backend)


@matrix.backends("reference", *KERNEL_BACKENDS)
def test_a_row_of_zeros_gets_the_gradient_of_a_constant_divisor(backend: str) -> None:
    """The gradient is g / 1e-12, as of torch's own normalize, whose second derivatives are not finite."""
    sets = [random(2, 3, seed=i).requires_grad_() for i in range(6)]
    sets[1].detach()[0] = 0
    labels = torch.tensor([0, 1], device=DEVICE)
    units = [F.normalize(f) for f in sets]
    of_units = torch.autograd.grad(cqc_loss(units, labels, margin=9.0, backend="reference"), units[1])[0]
    loss = cqc_loss(sets, labels, margin=9.0, normalize=True, backend=backend)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, sets[1], create_graph=True)
    torch.testing.assert_close(gradient[0], of_units[0] / 1e-12)
    (second,) = torch.autograd.grad((gradient * 1e-12).sum(), sets[1])
    assert second.isfinite().all()


# --- derivatives -------------------------------------------------------------------------------------------


def loss_of(p: CQCProblem, backend: str) -> Callable[..., Tensor]:
    def run(*features: Tensor) -> Tensor:
        loss = cqc_cases.call(p, features, backend)
        return loss[0] if isinstance(loss, tuple) else loss

    return run


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@FORMS
def test_gradcheck(
    stacked: bool, normalize: bool, reduction: str, counts: str, backend: str, ops_run: list[str]
) -> None:
    case = CQCCase(*COUNTS[counts], 4, torch.float64, stacked, reduction, margin=1.0, normalize=normalize)
    p = cqc_cases.problem(case._replace(seed=3))
    assert not cqc_cases.near_kink(p)
    assert torch.autograd.gradcheck(loss_of(p, backend), p.features)
    assert {"cqc_forward", "cqc_backward"} <= set(ops_run)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("detach_negative", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@FORMS
def test_gradgradcheck(
    stacked: bool, normalize: bool, reduction: str, detach_negative: bool, backend: str, ops_run: list[str]
) -> None:
    # In two dimensions a row of length 1 can move in one direction only.
    dimensions = 3 if normalize else 2
    case = CQCCase((1, 2), (2, 1), dimensions, torch.float64, stacked, reduction, detach_negative)
    p = cqc_cases.problem(case._replace(margin=1.0, seed=3, normalize=normalize))
    assert not cqc_cases.near_kink(p)
    assert torch.autograd.gradgradcheck(loss_of(p, backend), p.features)
    assert "cqc_forward" in ops_run


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@FORMS
def test_detached_negatives_have_the_references_gradient(
    stacked: bool, normalize: bool, reduction: str, counts: str, backend: str
) -> None:
    """Finite differences can't see a detach, so the gradients are compared with the reference's."""
    case = CQCCase(*COUNTS[counts], 4, torch.float64, stacked, reduction, margin=1.0, normalize=normalize)
    detached = cqc_cases.problem(case._replace(detach_negative=True))
    results, expected = (cqc_cases.evaluate(detached, name) for name in (backend, "reference"))
    attached = cqc_cases.evaluate(cqc_cases.problem(case), backend)
    assert same_bits(results["loss"], attached["loss"])
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12)
    assert any(not torch.allclose(results[name], attached[name]) for name in results)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("related", ["the same tensor", "a function of it"])
def test_double_backward_where_one_set_depends_on_another(
    related: str, normalize: bool, backend: str
) -> None:
    v = random(4, 3).requires_grad_()
    others = [random(4, 3, seed=i) for i in range(4)]
    labels = torch.tensor([0, 1, 0, 1], device=DEVICE)
    found = []
    for name in (backend, "reference"):
        v_plus = v if related == "the same tensor" else v.square() + 1
        loss = cqc_loss([v, v_plus, *others], labels, margin=2.0, normalize=normalize, backend=name)
        assert isinstance(loss, Tensor)
        (first,) = torch.autograd.grad(loss, v, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), v)[0])
    torch.testing.assert_close(*found)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("position", range(6))
def test_a_single_set_may_require_gradients(position: int, backend: str) -> None:
    p = cqc_cases.problem(CQCCase(normalize=position % 2 == 0))
    everything = cqc_cases.evaluate(p, backend)
    leaves = [f.detach().requires_grad_(i == position) for i, f in enumerate(p.features)]
    loss = cqc_cases.call(p, leaves, backend)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, leaves[position], p.gradient)
    assert same_bits(gradient, everything[f"grad {position}"])


# Every form of the features, every dtype and both flags: what the results are follows from each by itself.
@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize(
    ("stacked", "normalize", "detach_negative", "dtype"),
    [
        (False, False, False, torch.float32),
        (False, True, True, torch.float64),
        (True, False, True, torch.bfloat16),
        (True, True, False, torch.float16),
    ],
)
def test_opcheck(
    stacked: bool, normalize: bool, detach_negative: bool, dtype: torch.dtype, backend: str
) -> None:
    layout = "transposed" if stacked == normalize else "contiguous"
    p = cqc_cases.problem(CQCCase((2, 0, 3), (1, 2, 2), dtype=dtype, stacked=stacked, layout=layout))
    features = [f.detach() for f in p.features]
    forward, backward = matrix.operations("cqc", backend)
    labels = (p.labels, p.infrared_labels)
    arguments = (features, *labels, 0.2, detach_negative, normalize)
    torch.library.opcheck(forward, arguments)
    total, losses, _, _, saved = forward(*arguments)
    for gradient in (torch.ones_like(total), torch.ones_like(losses)):
        torch.library.opcheck(backward, (gradient, features, *labels, saved, detach_negative, normalize))


# --- accuracy, non-finite values, stale memory --------------------------------------------------------------


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("detach_negative", [False, True])
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@matrix.examples(40)
@given(data=st.data())
def test_accuracy(backend: str, dtype: torch.dtype, detach_negative: bool, data: st.DataObject) -> None:
    cqc_cases.check_accuracy(data.draw(cqc_cases.cases(dtype, detach_negative)), backend)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@pytest.mark.parametrize("layout", FEATURE_LAYOUTS)
@FORMS
def test_accuracy_in_every_layout(
    stacked: bool, normalize: bool, layout: str, dtype: torch.dtype, backend: str
) -> None:
    # If all rows of all six sets were the same, all distances would tie.
    if stacked and layout == "expanded rows":
        layout = "contiguous"
    case = CQCCase((4,) * 4, (4,) * 4, 257, dtype, stacked, layout=layout, seed=1, normalize=normalize)
    cqc_cases.check_accuracy(case, backend)


@matrix.backends(*KERNEL_BACKENDS)
def test_one_dimension(backend: str) -> None:
    """The directions are 1 and -1, and their sums are whole numbers divided by the count of samples."""
    p = cqc_cases.problem(CQCCase((1, 2), (2, 1), 1, torch.float64))
    results, expected = (cqc_cases.evaluate(p, name) for name in (backend, "reference"))
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-13, atol=1e-13)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
def test_accuracy_at_the_papers_size(dtype: torch.dtype, backend: str) -> None:
    for stacked, normalize in itertools.product([False, True], [False, True]):
        case = CQCCase((4,) * 4, (4,) * 4, 2048, dtype, stacked, normalize=normalize)
        cqc_cases.check_accuracy(case, backend)


@matrix.backends("reference", *KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_is_computed_in_float32_or_better(normalize: bool, dtype: torch.dtype, backend: str) -> None:
    """The loss and the tensors kept for the backward are precise under autocast too."""
    p = cqc_cases.problem(CQCCase(dimensions=64, dtype=dtype, normalize=normalize))
    plain = cqc_cases.evaluate(p, backend)
    assert plain["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        loss = cqc_cases.call(p, p.features, backend)
    assert isinstance(loss, Tensor) and same_bits(loss, plain["loss"])
    for i, gradient in enumerate(torch.autograd.grad(loss, p.features, p.gradient)):
        assert gradient.dtype == dtype and same_bits(gradient, plain[f"grad {i}"])
    wide = cqc_cases.truth(p)["loss"]
    # The error would be some 4e-3 in bfloat16 and 5e-4 in float16.
    assert abs(array(plain["loss"]) - wide) <= 1e-5 * abs(wide)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's memory is aligned by its allocator")
@pytest.mark.filterwarnings("ignore:The given buffer")
@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("stacked", [False, True])
def test_memory_that_begins_anywhere(stacked: bool, backend: str) -> None:
    p = cqc_cases.problem(CQCCase((2, 3), (2, 3), 5, torch.float32, stacked))
    moved = p._replace(features=tuple(map(misaligned, p.features)))
    assert different_bits(cqc_cases.evaluate(p, backend), cqc_cases.evaluate(moved, backend)) == []


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@FORMS
def test_nonfinite_values_come_out_where_the_reference_has_them(
    stacked: bool, normalize: bool, dtype: torch.dtype, value: float, backend: str
) -> None:
    """Losses are finite, infinite or NaN as the reference's; after a NaN so are finite gradients."""
    case = CQCCase((2, 1), (1, 2), 9, dtype, stacked, "none", normalize=normalize)
    lines = []
    for index in range(len(cqc_cases.problem(case).features)):
        for at in (0, 11, -1):
            p = cqc_cases.problem(case)
            target = p.features[index].detach()
            target.view(-1)[at] = value
            results, expected = (cqc_cases.evaluate(p, name) for name in (backend, "reference"))
            for name, result in results.items():
                got, want = nonfinite(result), nonfinite(expected[name])
                if name != "loss" and math.isinf(value) and not normalize:
                    continue
                if name != "loss":
                    got, want = got > 0, want > 0
                if not torch.equal(got, want):
                    lines.append(f"{value} in set {index} at {at}: {name} {result}, not {expected[name]}")
    assert not lines, "\n".join(lines)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@FORMS
def test_every_element_of_every_result_is_written(
    stacked: bool, normalize: bool, dtype: torch.dtype, backend: str
) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills what it allocates with NaN
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        for counts, dimensions in itertools.product(COUNTS.values(), (1, 5, 257)):
            p = cqc_cases.problem(CQCCase(*counts, dimensions, dtype, stacked, normalize=normalize))
            for name, result in cqc_cases.evaluate(p, backend).items():
                assert result.isfinite().all(), name
    finally:
        torch.use_deterministic_algorithms(False)
