"""The block's results on every kernel backend: their accuracy, and where they are not finite."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrcn_fast.operations import OPERATIONS
from tests.support import block_cases, matrix
from tests.support.block_cases import NETWORK_VALUES, Case
from tests.support.matrix import CUDA_ON_HOST, DTYPES, GATES, KERNEL_BACKENDS, MODES, PRECISE_DTYPES, SETTINGS
from tests.support.tensors import LAYOUTS, nonfinite


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@pytest.mark.parametrize("mode", MODES)
@matrix.examples(25)
@given(data=st.data())
def test_accuracy(backend: str, mode: str, dtype: torch.dtype, data: st.DataObject) -> None:
    block_cases.check_accuracy(data.draw(block_cases.cases(mode, dtype)), backend)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_accuracy_in_every_layout(mode: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    for gate in GATES:
        for shape in ((3, 5, 7, 9), (2, 19, 3, 4)):
            case = Case(mode, gate, shape=shape, dtype=dtype, seed=2)
            block_cases.check_accuracy(case.in_layout(layout), backend)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if len(OPERATIONS[mode].inputs) == 2])
@pytest.mark.parametrize(
    "layouts", list(itertools.permutations(("contiguous", "channels_last", "transposed"), 2))
)
def test_accuracy_where_the_pair_has_two_layouts(layouts: tuple[str, str], mode: str, backend: str) -> None:
    for gradient_layout in ("contiguous", "channels_last", "expanded scalar"):
        block_cases.check_accuracy(
            Case(mode, shape=(2, 5, 7, 9), layouts=layouts, gradient_layout=gradient_layout), backend
        )


@matrix.backends(*KERNEL_BACKENDS)
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
            case = Case(mode, gate, shape=shape, dtype=dtype, seed=5)
            block_cases.check_accuracy(case.in_layout(layout), backend)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_accuracy_where_the_mean_is_large(mode: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    """With a mean of 1000 and σ = 0.1 the rule holds as for other values.

    A variance computed as E[x²] - E[x]² would have no correct digit in float32 (1e6 · 6e-8 > 0.1²).
    """
    for gate in GATES:
        for shape in ((2, 5, 17, 15), (1, 2, 67, 61)):
            case = Case(mode, gate, shape=shape, dtype=dtype, values="large mean")
            block_cases.check_accuracy(case.in_layout(layout), backend)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_variance_where_the_mean_is_large(mode: str, layout: str, backend: str) -> None:
    """The normalized features are accurate by themselves, which the rule can't see beside a mean of 1000.

    With s = 1/2 in every gate and restitution to F̃, F₊ = F̃ / 2 + F / 2; with SNR F̃ is an output. The test
    compares the deviation of F̃ from its own mean over a plane, which does not depend on the mean of F.
    """
    p = block_cases.problem(Case(mode, shape=(2, 5, 17, 15), values="large mean").in_layout(layout))
    with torch.no_grad():
        for q in p.parameters[2:]:
            q.zero_()
    results, truth = block_cases.evaluate(p, backend), block_cases.evaluate_reference(p, torch.float64)
    for name in block_cases.output_names(mode):
        got, want = results[name].double(), truth[name]
        got, want = (x - x.mean(dim=(2, 3), keepdim=True) for x in (got, want))
        # A float32 near 1000 is rounded by up to 3e-5, which F̃ multiplies by γ / σ, which is 10 to 20.
        assert (got - want).abs().max() < 2e-3 * want.abs().max(), name


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("values", [*NETWORK_VALUES, "large mean", "constant planes"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_accuracy_of_values_from_network_layers(mode: str, layout: str, values: str, backend: str) -> None:
    """In rectified and pooled maps, unlike in normal numbers, sums don't cancel and many pixels are equal."""
    gate, shape = ("se", (2, 16, 18, 9)) if mode in ("pair", "snr") else ("cbam-channel", (1, 24, 16, 20))
    case = Case(mode, gate, shape=shape, values=values, hidden=4).in_layout(layout)
    block_cases.check_distribution(case, backend, draws=20 if CUDA_ON_HOST else 60)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("values", ["zero planes", "constant planes"])
@pytest.mark.parametrize("dtype", PRECISE_DTYPES)
@pytest.mark.parametrize(("mode", "gate", "restitute_to"), SETTINGS)
def test_constant_planes(
    mode: str, gate: str, restitute_to: str, dtype: torch.dtype, values: str, backend: str
) -> None:
    for layout in ("contiguous", "channels_last"):
        case = Case(mode, gate, restitute_to, (2, 3, 5, 7), dtype, values=values).in_layout(layout)
        results = block_cases.evaluate(block_cases.problem(case), backend)
        assert all(r.isfinite().all() for r in results.values())
        block_cases.check_accuracy(case, backend)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "gate", "restitute_to"), SETTINGS)
def test_nonfinite_values_come_out_where_the_reference_has_them(
    mode: str, gate: str, restitute_to: str, dtype: torch.dtype, value: float, backend: str
) -> None:
    """Each tensor in turn has one such value; inputs and gradients have it in a vector's body or in its tail.

    The outputs have NaN, inf and -inf where the reference has them, and after a NaN the gradients are finite
    where the reference's are. (After an infinity, the order of a sum decides between inf and inf - inf.)
    ECA's reference is computed in float32 on the CPU, because by dtype and device torch's convolutions differ
    in whether they multiply the padding by a NaN or an infinity.
    """
    lines = []
    for layout in (
        ("contiguous", "channels_last") if dtype in (torch.float32, torch.bfloat16) else ("contiguous",)
    ):
        case = Case(mode, gate, restitute_to, (2, 3, 5, 7), dtype).in_layout(layout)
        fresh = block_cases.problem(case)
        where = (0, 17, -1) if dtype == torch.float32 else (17,)
        places = [("inputs", i, at) for i in range(len(fresh.inputs)) for at in where]
        places += [("gradients", i, at) for i in range(len(fresh.gradients)) for at in where]
        places += [("parameters", i, 0) for i in range(len(fresh.parameters))]
        for kind, index, at in places:
            p = block_cases.problem(case)
            target = getattr(p, kind)[index].detach()
            coordinates = torch.unravel_index(torch.tensor(at % target.numel()), target.shape)
            target[coordinates] = value
            results = {name: x.cpu() for name, x in block_cases.evaluate(p, backend).items()}
            expected = block_cases.evaluate_reference(p, torch.float32 if gate == "eca" else dtype, "cpu")
            for name, result in results.items():
                if not name.startswith("grad "):
                    same = torch.equal(nonfinite(result), nonfinite(expected[name]))
                else:
                    same = math.isinf(value) or torch.equal(result.isfinite(), expected[name].isfinite())
                if not same:
                    lines.append(
                        f"{layout}, {value} in {kind}[{index}] at {at}: {name} has "
                        f"{int((~result.isfinite()).sum())} non-finite values, the reference "
                        f"{int((~expected[name].isfinite()).sum())}"
                    )
    assert not lines, "\n".join(lines)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_nan_of_any_bits_in_a_parameter_stays_nan_in_bf16(layout: str, bits: int, backend: str) -> None:
    """Rounding by adding half of the last place would turn a NaN whose bits are all set into a number."""
    drawn = block_cases.problem(Case(shape=(2, 64, 12, 11), dtype=torch.bfloat16).in_layout(layout))
    for index in (0, 1):  # norm_weight, norm_bias
        parameters = [p.detach().float().requires_grad_() for p in drawn.parameters]
        parameters[index].detach().view(torch.int32)[0, 37] = bits
        p = drawn._replace(parameters=tuple(parameters))
        results, expected = block_cases.evaluate(p, backend), block_cases.evaluate_reference(p, torch.float32)
        for name, result in results.items():
            assert torch.equal(result.isnan(), expected[name].isnan()), f"parameter {index}: {name}"
