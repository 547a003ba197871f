"""The CQC loss as Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mrcn_fast import cqc_loss, dispatch, reference
from mrcn_fast.backends.triton import cqc
from tests.support import cqc_cases, tensors
from tests.support.cqc_cases import FORMS, LENGTHS, CQCCase, CQCProblem
from tests.support.matrix import DTYPES, PRECISE_DTYPES
from tests.support.tensors import FEATURE_LAYOUTS, different_bits, nonfinite

BACKEND = "triton"
NOTHING = torch.iinfo(torch.int64).max
COUNTS = {
    "P x K": ((2, 2), (2, 2)),
    "unequal counts": ((1, 3, 2), (2, 1, 4)),
    "identities in one modality only": ((2, 0, 3, 1), (1, 2, 2, 0)),
    "one identity, one sample": ((1,), (1,)),
}
# Two of `FORMS`, because each test takes long.
SOME_FORMS = pytest.mark.parametrize(("stacked", "normalize"), [(True, False), (False, True)])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks of labels, of members and of columns at a handful of samples."""
    original, launchers = cqc.constants, (cqc.forward_launcher, cqc.backward_launcher)

    def constants(*arguments: Any, **flags: Any) -> cqc.Constants:
        return dataclasses.replace(original(*arguments, **flags), LABELS=4, DIMENSIONS=8, MEMBERS=2)

    monkeypatch.setattr(cqc, "constants", constants)
    for launcher in launchers:
        launcher.cache_clear()
    yield
    for launcher in launchers:
        launcher.cache_clear()


def operation(name: str) -> Any:
    return dispatch.KERNELS[BACKEND].operation(name)


def raw_forward(p: CQCProblem) -> tuple[Tensor, ...]:
    features = [f.detach() for f in p.features]
    made: tuple[Tensor, ...] = operation("cqc_forward")(
        features, p.labels, p.infrared_labels, 0.2, False, p.case.normalize
    )
    return made


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@pytest.mark.parametrize(
    ("counts", "normalize"),
    [*((counts, False) for counts in COUNTS), ("unequal counts", True), ("one identity, one sample", True)],
)
def test_accuracy(counts: str, normalize: bool, dtype: torch.dtype) -> None:
    case = CQCCase(*COUNTS[counts], 17, dtype, stacked=True, seed=1, normalize=normalize)
    cqc_cases.check_accuracy(case, BACKEND)


@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@FORMS
@pytest.mark.parametrize("detach_negative", [False, True])
def test_accuracy_in_small_blocks(
    detach_negative: bool, stacked: bool, normalize: bool, dtype: torch.dtype, small_blocks: None
) -> None:
    reduction = "mean" if stacked == normalize else "none"
    # The gradient of each normalized row makes the centers again: fewer rows, in two blocks instead of three.
    visible, infrared, dimensions = (
        ((3, 0, 2), (1, 2, 3), 11) if normalize else ((5, 0, 3, 1), (1, 2, 6, 0), 19)
    )
    case = CQCCase(
        visible, infrared, dimensions, dtype, stacked, reduction, detach_negative, 1.0, normalize=normalize
    )
    cqc_cases.check_accuracy(case, BACKEND)


@pytest.mark.parametrize("layout", FEATURE_LAYOUTS)
@SOME_FORMS
def test_accuracy_in_every_layout(stacked: bool, normalize: bool, layout: str) -> None:
    if stacked and layout == "expanded rows":  # all rows of all sets the same: nothing but ties
        layout = "contiguous"
    case = CQCCase(stacked=stacked, layout=layout, dimensions=33, seed=1, normalize=normalize)
    cqc_cases.check_accuracy(case, BACKEND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [False, True])
def test_accuracy_at_the_papers_size(normalize: bool, dtype: torch.dtype) -> None:
    cqc_cases.check_accuracy(CQCCase((4,) * 4, (4,) * 4, 2048, dtype, normalize=normalize), BACKEND)


def test_many_identities(small_blocks: None) -> None:
    labels = torch.arange(30).repeat_interleave(2)[
        torch.randperm(60, generator=torch.Generator().manual_seed(0))
    ]
    infrared_labels = torch.arange(15, 45).flip(0)
    sets = [tensors.random(b, 2, seed=i).requires_grad_() for i, b in enumerate([60] * 3 + [30] * 3)]
    found = []
    for name in (BACKEND, "reference"):
        losses, identities = cqc_loss(sets, labels, infrared_labels, reduction="none", backend=name)
        found.append((losses, identities, *torch.autograd.grad(losses.sum(), sets)))
    assert torch.equal(found[0][1], torch.arange(15, 30))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_labels_may_be_strided_and_large() -> None:
    features = [tensors.random(4, 3, seed=i) for i in range(6)]
    labels = torch.tensor([2**62, 0, -(2**62), 0, NOTHING, 0, 5, 0])[::2]
    losses, identities = cqc_loss(features, labels, reduction="none", backend=BACKEND)
    expected, known = reference.cqc_loss(features, labels, labels)
    assert torch.equal(identities, known) and known.tolist() == [-(2**62), 5, 2**62, NOTHING]
    torch.testing.assert_close(losses, expected)


def test_coinciding_centers_have_no_direction() -> None:
    """Their distance is exactly zero, however large they are, and so it is clamped."""
    features = [torch.full((6, 5), 1e3 / 3).requires_grad_() for _ in range(6)]
    loss = cqc_loss(features, torch.tensor([0, 0, 0, 1, 1, 1]), backend=BACKEND)
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss, torch.tensor(1.6))
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, features))


def test_a_distance_below_the_clamp_has_no_gradient() -> None:
    """With 1e-8 in one set, D² is below 1e-12, where it is clamped, and the loss is that of D = 1e-6."""
    features = [torch.ones(4, 3, dtype=torch.float64).requires_grad_() for _ in range(6)]
    features[1].detach()[:, 0] += 1e-8
    labels = torch.tensor([0, 0, 1, 1])
    losses = [cqc_loss(features, labels, backend=name) for name in (BACKEND, "reference")]
    torch.testing.assert_close(*losses, rtol=1e-15, atol=0.0)
    assert isinstance(losses[0], Tensor)
    assert not any(gradient.any() for gradient in torch.autograd.grad(losses[0], features))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("stacked", "dtype"), [(False, torch.float32), (True, torch.float64)])
def test_rows_that_are_clamped_or_overflow(
    stacked: bool, dtype: torch.dtype, length: float, small_blocks: None
) -> None:
    case = CQCCase((2, 1), (1, 2), 9, dtype, stacked, "none", margin=3.0, normalize=True)
    for row in (0, 10) if stacked else (0,):
        cqc_cases.check_short_rows(case, row, length, BACKEND)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("detach_negative", [False, True])
@SOME_FORMS
def test_nonfinite_values_come_out_where_the_reference_has_them(
    stacked: bool, normalize: bool, detach_negative: bool, value: float
) -> None:
    case = CQCCase((2, 1), (1, 2), 9, torch.float32, stacked, "none", detach_negative, normalize=normalize)
    for index, at in itertools.product(range(1 if stacked else 6), (0, 11)):
        p = cqc_cases.problem(case)
        p.features[index].detach().view(-1)[at] = value
        results, expected = (cqc_cases.evaluate(p, name) for name in (BACKEND, "reference"))
        assert torch.equal(nonfinite(results["loss"]), nonfinite(expected["loss"]))
        if math.isnan(value) or normalize:
            for name, result in results.items():
                assert torch.equal(result.isfinite(), expected[name].isfinite()), (index, at, name)


# --- derivatives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@SOME_FORMS
def test_gradcheck(stacked: bool, normalize: bool, reduction: str) -> None:
    """Along random directions; whole gradients are compared with the reference's."""
    case = CQCCase((1, 3, 0), (2, 1, 1), 3, torch.float64, stacked, reduction, margin=1.0, seed=4)
    p = cqc_cases.problem(case._replace(normalize=normalize))
    assert not cqc_cases.near_kink(p)

    def loss(*features: Tensor) -> Tensor:
        found = cqc_cases.call(p, features, BACKEND)
        return found[0] if isinstance(found, tuple) else found

    assert torch.autograd.gradcheck(loss, p.features, fast_mode=True)
    results, expected = (cqc_cases.evaluate(p, name) for name in (BACKEND, "reference"))
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradgradcheck(normalize: bool) -> None:
    case = CQCCase((1, 2), (2, 1), 3, torch.float64, reduction="none", margin=1.0, seed=3)
    p = cqc_cases.problem(case._replace(normalize=normalize))
    assert not cqc_cases.near_kink(p)

    def loss(*features: Tensor) -> Tensor:
        return cqc_cases.call(p, features, BACKEND)[0]

    assert torch.autograd.gradgradcheck(loss, p.features, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@SOME_FORMS
def test_opcheck(stacked: bool, normalize: bool, dtype: torch.dtype) -> None:
    p = cqc_cases.problem(CQCCase((2, 0, 3), (1, 2, 2), dtype=dtype, stacked=stacked, normalize=normalize))
    features = [f.detach() for f in p.features]
    labels = (p.labels, p.infrared_labels)
    torch.library.opcheck(operation("cqc_forward"), (features, *labels, 0.2, False, normalize))
    total, losses, _, _, saved = raw_forward(p)
    for gradient in (torch.ones_like(total), torch.ones_like(losses)):
        arguments = (gradient, features, *labels, saved, True, normalize)
        torch.library.opcheck(operation("cqc_backward"), arguments)


# --- results: where they stand, that they are written, that they repeat -----------------------------------


def test_a_slot_is_the_first_visible_sample_of_its_identity() -> None:
    labels, infrared_labels = torch.tensor([7, 3, 9, 3, 7]), torch.tensor([3, 4, 7])
    features = [tensors.random(b, 3, seed=i) for i, b in enumerate([5] * 3 + [3] * 3)]
    total, losses, identities, count, _ = operation("cqc_forward")(
        features, labels, infrared_labels, 0.2, False, False
    )
    assert identities.tolist() == [7, 3, NOTHING, NOTHING, NOTHING] and count.item() == 2
    expected, _ = reference.cqc_loss(features, labels, infrared_labels)
    torch.testing.assert_close(losses, torch.tensor([expected[1], expected[0], 0, 0, 0]))
    torch.testing.assert_close(total, expected.sum())


def test_no_identity_in_both_modalities_is_counted_as_none() -> None:
    p = cqc_cases.problem(CQCCase((2, 0), (0, 3)))
    total, losses, identities, count, _ = raw_forward(p)
    assert total == 0 and not losses.any() and (identities == NOTHING).all() and count == 0


@pytest.mark.parametrize("dtype", DTYPES)
@SOME_FORMS
def test_every_element_of_every_result_is_written(stacked: bool, normalize: bool, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills what it allocates with NaN
    try:
        assert torch.empty(3).isnan().all()
        for counts, dimensions in itertools.product(COUNTS.values(), (1, 21)):
            p = cqc_cases.problem(CQCCase(*counts, dimensions, dtype, stacked, normalize=normalize))
            for name, result in cqc_cases.evaluate(p, BACKEND).items():
                assert result.isfinite().all(), name
            assert all(result.isfinite().all() for result in raw_forward(p))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("normalize", [False, True])
def test_one_counter_serves_launch_after_launch(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch.zeros((), dtype=torch.int32)
    monkeypatch.setattr(cqc, "arrivals_counter", lambda device: counter)
    p = cqc_cases.problem(CQCCase(*COUNTS["unequal counts"], normalize=normalize))
    first = cqc_cases.evaluate(p, BACKEND)
    for _ in range(2):
        assert counter == 0
        assert not different_bits(first, cqc_cases.evaluate(p, BACKEND))


def test_a_stream_keeps_its_counter_and_a_captured_launch_gets_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for a GPU's streams."""
    current, capturing, real = 1, False, torch.zeros
    fakes: dict[str, Callable[..., Any]] = {
        "is_current_stream_capturing": lambda: capturing,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=current),
        "stream": contextlib.nullcontext,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, dtype: real(*shape, dtype=dtype))
    monkeypatch.setattr(cqc, "_counters", {})
    gpu, other_gpu = torch.device("cuda", 0), torch.device("cuda", 1)
    first = cqc.arrivals_counter(gpu)
    assert first.dtype == torch.int32 and first == 0
    assert cqc.arrivals_counter(gpu) is first and cqc.arrivals_counter(other_gpu) is not first
    capturing = True
    captured = cqc.arrivals_counter(gpu)
    assert captured is not first and cqc.arrivals_counter(gpu) is not captured
    capturing, current = False, 2
    assert cqc.arrivals_counter(gpu) is not first
    current = 1
    assert cqc.arrivals_counter(gpu) is first
