"""NaN and infinity come out where the reference has them, for any subset of gradients.

After a NaN anywhere, every result is NaN, infinite or finite where the reference is. After an infinity that
holds for the outputs; in gradients the order of a sum decides between an infinity and the NaN of two
infinities, so that there only what is finite is compared, and only where the reference's forward is finite.
"""

from __future__ import annotations

import math
import random as randomly
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mrcn_fast.operations import OPERATIONS
from tests.support import block_cases, matrix
from tests.support.block_cases import Case, Problem
from tests.support.matrix import DTYPES, GATES, KERNEL_BACKENDS, MODES, RESTITUTE_TO
from tests.support.tensors import nonfinite

# Among the shapes are planes of two elements and fewer channels than ECA's kernel is long; the last shape has
# whole vectors of channels and of pixels.
SHAPES = [(2, 5, 4, 3), (1, 3, 1, 2), (3, 17, 3, 3), (2, 2, 5, 7), (1, 40, 9, 5)]
DRAWS = 12


def subset_gradients(p: Problem, outputs: Sequence[Tensor], given: Sequence[int]) -> list[Tensor | None]:
    """The gradients of the inputs and parameters for a loss of some outputs; None where there is none."""
    made, upstream = [outputs[k] for k in given], [p.gradients[k] for k in given]
    return list(torch.autograd.grad(made, (*p.inputs, *p.parameters), upstream, allow_unused=True))


def reference_problem(p: Problem, dtype: torch.dtype) -> Problem:
    def leaves(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(t.detach().to("cpu", dtype).requires_grad_() for t in tensors)

    return Problem(
        p.case, leaves(p.inputs), leaves(p.parameters), tuple(g.to("cpu", dtype) for g in p.gradients)
    )


def draw(
    seed: int,
    mode: str,
    gate: str,
    dtype: torch.dtype,
    layout: str,
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
) -> tuple[Problem, list[int], list[str]]:
    """A problem with one to three values that are not finite, the outputs with a gradient, and the values."""
    chance = randomly.Random(f"{seed} {mode} {gate} {dtype} {layout}")
    case = Case(
        mode,
        gate,
        chance.choice(RESTITUTE_TO) if OPERATIONS[mode].restitutes else "normalized",
        chance.choice(shapes),
        dtype,
        layouts=(layout, layout),
        gradient_layout=layout,
        hidden=chance.choice([1, 2, 4]),
        seed=seed,
    )
    p = block_cases.problem(block_cases.away_from_kinks(case))
    count = len(p.gradients)
    given = sorted(chance.sample(range(count), chance.randint(1, count)))
    put = []
    for _ in range(chance.randint(1, 3)):
        kind = chance.choice(["inputs", "inputs", "gradients", "parameters"])
        tensors = getattr(p, kind)
        index = chance.randrange(len(tensors))
        target = tensors[index].detach()
        at = tuple(chance.randrange(size) for size in target.shape)
        value = chance.choice([math.nan, math.nan, math.nan, math.inf, -math.inf])
        target[at] = value
        put.append(f"{value} in {kind}[{index}] at {at}")
    return p, given, put


def differences(p: Problem, given: list[int], put: list[str], backend: str) -> list[str]:
    """The results that are not finite where the reference is, or finite where the reference is not."""
    outputs = block_cases.call(p.case, p.inputs, p.parameters, backend)
    # The reference of half dtypes is computed in float32, which overflows no earlier than the kernels.
    precise = torch.float64 if p.case.dtype == torch.float64 else torch.float32
    known = reference_problem(p, precise)
    expected = block_cases.call(known.case, known.inputs, known.parameters, "reference")
    drawn = f"{p.case}, gradients of {given}, {', '.join(put)}"
    lines = []
    for name, got, want in zip(block_cases.output_names(p.case.mode), outputs, expected, strict=True):
        if not torch.equal(nonfinite(got.cpu()), nonfinite(want.to(p.case.dtype))):
            lines.append(f"{drawn}: {name}")
    infinite = any("inf" in line for line in put)
    if infinite and not all(x.isfinite().all() for x in expected):
        return lines
    names = (*block_cases.input_names(p.case.mode), *block_cases.parameter_names(p.case.gate))
    found = subset_gradients(p, outputs, given)
    wanted = subset_gradients(known, expected, given)
    for name, got_g, want_g in zip(names, found, wanted, strict=True):
        if got_g is None or want_g is None:
            # The reference slices the stacked parameters: the gradient of an unused slice is zero, not None.
            zero = got_g is None and (want_g is None or bool((want_g == 0).all()))
            if not zero:
                lines.append(f"{drawn}: grad {name} is {got_g} and not {want_g}")
        elif infinite:
            if not torch.equal(got_g.cpu().isfinite(), want_g.isfinite()):
                lines.append(f"{drawn}: grad {name} is finite elsewhere")
        elif not torch.equal(got_g.cpu().isnan(), want_g.isnan()):
            lines.append(
                f"{drawn}: grad {name}, {int(got_g.isnan().sum())} for {int(want_g.isnan().sum())} NaN"
            )
    return lines


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mode", MODES)
def test_values_that_are_not_finite(
    mode: str, gate: str, dtype: torch.dtype, layout: str, backend: str
) -> None:
    lines: list[str] = []
    for seed in range(DRAWS):
        lines += differences(*draw(seed, mode, gate, dtype, layout), backend)
    assert not lines, f"{len(lines)} differ:\n" + "\n".join(lines[:10])


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("gradients", [[0], [1], [2], [3], [1, 2]], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_set_without_a_gradient_brings_no_nan(layout: str, gradients: list[int], backend: str) -> None:
    """A NaN in one plane reaches every channel, but only through the sets whose gate sees it."""
    p = block_cases.problem(Case("pair", shape=(2, 8, 4, 3), layouts=(layout, layout)))
    p.inputs[1].detach()[0, 0, 0, 0] = math.nan
    for g in p.gradients:
        g[:, 0] = 0
    assert differences(p, gradients, ["nan in infrared"], backend) == []


def assert_large_values_stay_finite(gate: str, layout: str, value: float, backend: str) -> None:
    """The squares overflow float32: variances are infinite, and the normalized features are zero.

    Where the reference's own sums overflow, as some do beside the largest number, nothing is compared.
    """
    p = block_cases.problem(Case("pair", gate, shape=(2, 8, 12, 6), layouts=(layout, layout)))
    for x in p.inputs:
        if value < 1e38:
            x.detach().sub_(x.detach().mean(dim=(2, 3), keepdim=True)).mul_(value)
        else:
            x.detach()[0, 0, 5, 3] = value
    outputs = block_cases.call(p.case, p.inputs, p.parameters, backend)
    expected = block_cases.evaluate_reference(p, torch.float32)
    for name, got in zip(block_cases.output_names("pair"), outputs, strict=True):
        known = expected[name].isfinite()
        assert known.any() and (value > 1e38 or known.all())
        # Their size depends on the gates, and so on the sign of means that are rounding errors.
        assert got[known].isfinite().all(), f"{name}: {int((~got[known].isfinite()).sum())} are not finite"


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("value", [1e37, torch.finfo(torch.float32).max], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "spatially sliced"])
@pytest.mark.parametrize("gate", GATES)
def test_large_values_stay_finite(gate: str, layout: str, value: float, backend: str) -> None:
    assert_large_values_stay_finite(gate, layout, value, backend)
