"""The cases of the block: drawing one, evaluating it with any backend, and holding it against the rule.

A `Case` names an operation with its shapes, dtypes and layouts; `problem` makes its tensors on `DEVICE`;
`evaluate` runs it with any backend; `check_accuracy` holds the results against `tests.support.rule`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import mrcn_fast
from mrcn_fast.gates import GATES as GATE_MODULES
from mrcn_fast.operations import OPERATIONS
from mrcn_fast.plain import run_reference
from tests.support import extended
from tests.support.matrix import DEVICE, GATES, RESTITUTE_TO
from tests.support.rule import Verdict, array, judge, ratio, verdicts
from tests.support.tensors import LAYOUTS, arrange, random


class Case(NamedTuple):
    """A block operation on given shapes, dtypes and layouts; everything random follows from ``seed``."""

    mode: str = "pair"
    gate: str = "se"
    restitute_to: str = "normalized"
    shape: tuple[int, int, int, int] = (2, 5, 4, 3)
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None  # None: dtype
    layouts: tuple[str, str] = ("contiguous", "contiguous")  # of visible and infrared
    gradient_layout: str = "contiguous"
    # "normal", "large mean", "uneven", a name of NETWORK_VALUES, or "zero planes" and "constant planes", in
    # which every other plane is constant.
    values: str = "normal"
    hidden: int = 2  # the width R of SE and CBAM; the length of ECA's kernel is 2 hidden - 1
    eps: float = 1e-5
    seed: int = 0

    def in_layout(self, layout: str) -> Case:
        """The same case with the inputs and the gradients of the outputs in one layout."""
        return self._replace(layouts=(layout, layout), gradient_layout=layout)


class Problem(NamedTuple):
    """The tensors of a `Case`: leaves that require gradients, and the gradients of the outputs."""

    case: Case
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]  # norm_weight, norm_bias, then the gate's
    gradients: tuple[Tensor, ...]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that the outputs are differentiated by."""
        return *self.inputs, *self.parameters

    def run(self, backend: str, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The operation's outputs for other leaves."""
        count = len(self.inputs)
        return call(self.case, leaves[:count], leaves[count:], backend)


def _bright_corner(x: Tensor) -> Tensor:
    """Rectified, and zero except in the first row: the plane's first values in memory are unlike the rest."""
    rows = torch.arange(x.shape[2])[:, None]
    return torch.relu(x + 1) * (rows == 0)


# What the layers of a network make of normal numbers: values like those that the block gets in the paper.
NETWORK_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "rectified": torch.relu,
    "max-pooled": lambda x: F.max_pool2d(torch.relu(x), 3, 1, 1),
    "sparse": lambda x: torch.relu(x - 1.28),  # a tenth of the pixels is active
    "saturated": lambda x: (2 * x + 1).clamp(0, 1),
    "bright corner": _bright_corner,
}


def draw_values(case: Case, generator: torch.Generator) -> Tensor:
    """(N, C, H, W) float64 as ``case.values`` says."""
    n, c, _, _ = case.shape
    x = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    if case.values == "large mean":
        return 1000 + 0.1 * x
    if case.values in NETWORK_VALUES:
        return NETWORK_VALUES[case.values](x)
    shift = torch.randn(n, c, 1, 1, generator=generator, dtype=torch.float64)
    if case.values == "uneven":
        decades = 1.0 if case.dtype == torch.float16 else 3.0
        spread = 2 * torch.rand(1, c, 1, 1, generator=generator, dtype=torch.float64) - 1
        return (x + shift) * 10 ** (decades * spread)
    if case.values.endswith(" planes"):
        x[:, ::2], shift[:, ::2] = 0.0, 0.0 if case.values == "zero planes" else -2.5
    return x + shift


def draw_parameters(case: Case, generator: torch.Generator) -> list[Tensor]:
    """norm_weight, norm_bias and the gate's parameters, float64."""
    operation, channels = OPERATIONS[case.mode], case.shape[1]
    modalities, gates = len(operation.inputs), len(operation.gates)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)

    parameters = [normal(modalities, channels, mean=1.0, std=0.5), normal(modalities, channels, std=0.5)]
    width = 2 * case.hidden - 1 if case.gate == "eca" else case.hidden
    for name, shape in GATE_MODULES[case.gate].shapes(channels, width).items():
        parameters.append(normal(gates, *shape, std=0.5 if name.endswith("_bias") else shape[-1] ** -0.5))
    return parameters


def output_names(mode: str) -> tuple[str, ...]:
    """The results of an operation: the feature sets that it makes, or the tensor that stacks all of them."""
    operation = OPERATIONS[mode]
    return ("stacked sets",) if operation.stacked else tuple(made.name for made in operation.sets)


def input_names(mode: str) -> tuple[str, ...]:
    return OPERATIONS[mode].inputs


def parameter_names(gate: str) -> tuple[str, ...]:
    return ("norm_weight", "norm_bias", *(f"gate.{name}" for name in GATE_MODULES[gate].shapes(2, 1)))


def problem(case: Case, device: str = DEVICE) -> Problem:
    """The tensors of ``case`` on ``device``, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(case.seed)
    inputs = tuple(
        arrange(draw_values(case, generator).to(case.dtype).to(device), layout).detach().requires_grad_()
        for layout, _ in zip(case.layouts, input_names(case.mode), strict=False)
    )
    dtype = case.parameter_dtype or case.dtype
    parameters = tuple(p.to(dtype).to(device).requires_grad_() for p in draw_parameters(case, generator))
    n, c, h, w = case.shape
    batch = OPERATIONS[case.mode].batches * n
    gradients = tuple(
        arrange(
            torch.randn(batch, c, h, w, generator=generator, dtype=torch.float64).to(case.dtype).to(device),
            case.gradient_layout,
        )
        for _ in output_names(case.mode)
    )
    return Problem(case, inputs, parameters, gradients)


def call(
    case: Case, inputs: Sequence[Tensor], parameters: Sequence[Tensor], backend: str
) -> tuple[Tensor, ...]:
    """The outputs of the operation's public function, in the order of `output_names`."""
    operation = OPERATIONS[case.mode]
    norm_weight, norm_bias, *gate_parameters = parameters
    settings: dict[str, Any] = {"gate": case.gate, "eps": case.eps, "backend": backend}
    if operation.restitutes:
        settings["restitute_to"] = case.restitute_to
    if operation.stacked:
        settings["concat"] = True
    function = getattr(mrcn_fast, operation.function)
    return operation.results_of(function(*inputs, norm_weight, norm_bias, gate_parameters, **settings))


def evaluate(p: Problem, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name; a gradient's name is ``grad <input or parameter>``."""
    outputs = call(p.case, p.inputs, p.parameters, backend)
    return with_gradients(p, outputs)


def evaluate_reference(p: Problem, dtype: torch.dtype, device: str | None = None) -> dict[str, Tensor]:
    """The reference's results, with all tensors cast to ``dtype`` (and moved to ``device``)."""
    to: dict[str, Any] = {"dtype": dtype, "device": device}
    cast = Problem(
        p.case,
        tuple(x.detach().to(**to).requires_grad_() for x in p.inputs),
        tuple(x.detach().to(**to).requires_grad_() for x in p.parameters),
        tuple(g.to(**to) for g in p.gradients),
    )
    case = p.case
    outputs = run_reference(case.mode, case.gate, case.eps, case.restitute_to, cast.leaves)
    return with_gradients(cast, outputs)


def with_gradients(p: Problem, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """``outputs`` of ``p`` and the gradients of its leaves, by name."""
    results = dict(zip(output_names(p.case.mode), outputs, strict=True))
    names = (*input_names(p.case.mode), *parameter_names(p.case.gate))
    found = torch.autograd.grad(outputs, p.leaves, p.gradients)
    for name, leaf, gradient in zip(names, p.leaves, found, strict=True):
        assert gradient.dtype == leaf.dtype, f"gradient of {name} is {gradient.dtype}, not {leaf.dtype}"
        results[f"grad {name}"] = gradient
    return {name: result.detach() for name, result in results.items()}


def truth(p: Problem) -> dict[str, extended.Array]:
    """The true outputs and gradients: the reference in float64, and in long double for a float64 case."""
    if p.case.dtype == torch.float64:
        return extended.block(
            p.case.mode,
            [array(x) for x in p.inputs],
            [array(x) for x in p.parameters],
            [array(x) for x in p.gradients],
            gate=p.case.gate,
            eps=p.case.eps,
            restitute_to=p.case.restitute_to,
            output_names=output_names(p.case.mode),
            input_names=input_names(p.case.mode),
            parameter_names=parameter_names(p.case.gate),
        )
    return {name: array(x) for name, x in evaluate_reference(p, torch.float64).items()}


def check_accuracy(case: Case, backend: str) -> None:
    """Fail if the results of a block operation break the rule."""

    def compare(drawn: Case) -> dict[str, Verdict] | None:
        p = problem(drawn)
        if near_kink(p):
            return None
        return verdicts(evaluate(p, backend), evaluate_reference(p, drawn.dtype), truth(p))

    judge(away_from_kinks(case), backend, compare)


def check_distribution(case: Case, backend: str, draws: int = 60) -> None:
    """Fail if the median draw breaks the rule, or the errors' 99th percentile exceeds twice its bound."""
    found: dict[str, list[Verdict]] = {}
    for seed in range(case.seed, case.seed + draws):
        p = problem(case._replace(seed=seed))
        if near_kink(p):
            continue
        eager, exact = evaluate_reference(p, case.dtype), truth(p)
        for name, verdict in verdicts(evaluate(p, backend), eager, exact).items():
            found.setdefault(name, []).append(verdict)
    assert found, f"every draw of {case} is near a kink"
    lines = []
    for name, each in found.items():
        median = statistics.median(v.ratio for v in each)
        fused, eager_error, unit = (
            float(np.quantile([getattr(v, kind) for v in each], 0.99)) for kind in ("fused", "eager", "unit")
        )
        high = ratio(fused, 1.5 * eager_error + unit)
        if median > 1 or high > 2:
            lines.append(
                f"{name}: {median:.2f} of the bound in the median of {len(each)} draws, {high:.2f} high"
            )
    if lines:
        pytest.fail("\n".join([f"backend {backend!r}, {case}", *lines]), pytrace=False)


def away_from_kinks(case: Case) -> Case:
    """``case`` with the first seed, counted from its own, at which no gradient jumps."""
    seeds = (case._replace(seed=seed) for seed in range(case.seed, case.seed + 1000))
    return next(c for c in seeds if not near_kink(problem(c, "cpu")))


def near_kink(p: Problem) -> bool:
    """Whether rounding can change the side of a ReLU or the place of M's maximum, where gradients jump."""
    norm_weight, norm_bias, *gate_parameters = (q.detach().double() for q in p.parameters)
    for modality, x in enumerate(x.detach().double() for x in p.inputs):
        deviation = torch.sqrt(x.var(dim=(2, 3), unbiased=False) + p.case.eps)
        slope = 1 - norm_weight[modality] / deviation
        if p.case.gate == "cbam-channel" and bool((slope.abs() < 1e-4).any()):
            return True
        if "gate.fc1_weight" not in parameter_names(p.case.gate):
            continue  # a gate without hidden layers has no ReLU
        z = x.mean(dim=(2, 3)) - norm_bias[modality]
        pooled = [z]
        if p.case.gate == "cbam-channel":
            normalized = (1 - slope)[:, :, None, None] * (x - x.mean(dim=(2, 3), keepdim=True))
            pooled.append((x - normalized - norm_bias[modality][:, None, None]).amax(dim=(2, 3)))
        for each in pooled:
            before = torch.einsum("nc,grc->gnr", each, gate_parameters[0]) + gate_parameters[1][:, None]
            if bool((before.abs() < 1e-4 * (1 + float(each.abs().max()))).any()):
                return True
    return False


# (H, W) of the feature maps that `shapes` draws.
PLANES = (
    (1, 2),
    (2, 1),
    (1, 3),
    (7, 1),
    (2, 2),
    (3, 5),
    (4, 4),
    (9, 7),
    (16, 8),
    (17, 15),
    (1, 65),
    (33, 31),
)
CHANNELS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 37)


def shapes(elements: int = 20_000) -> st.SearchStrategy[tuple[int, int, int, int]]:
    """(N, C, H, W) with odd sizes, H·W = 2, H or W = 1, prime channels, at most ``elements`` values."""
    plane = st.one_of(st.sampled_from(PLANES), st.tuples(st.integers(1, 20), st.integers(2, 20)))
    large = st.tuples(st.integers(1, 2), st.sampled_from((1, 2, 3)), st.just((67, 61)))
    small = st.tuples(st.integers(1, 5), st.sampled_from(CHANNELS), plane)
    drawn = st.one_of(small, small, small, large)
    return drawn.map(lambda d: (d[0], d[1], *d[2])).filter(lambda s: math.prod(s) <= elements)


@st.composite
def cases(
    draw: st.DrawFn, mode: str, dtype: torch.dtype, elements: int = 20_000, layouts: Sequence[str] = LAYOUTS
) -> Case:
    """A `Case` of ``mode`` and ``dtype`` with everything else drawn, away from kinks."""
    gradient_layout = draw(st.sampled_from([*layouts, "expanded scalar"]))
    values = ["normal", "normal", "uneven"]
    if dtype in (torch.float32, torch.float64):
        values.append("large mean")
    # Rectified planes may be zero. There 1/σ is 316, and the terms that a constant gradient gets from the
    # plane's mean cancel one by one in the reference, but only up to 316 rounding units in the kernels' sums.
    if gradient_layout != "expanded scalar":
        values += NETWORK_VALUES
    return Case(
        mode=mode,
        gate=draw(st.sampled_from(GATES)),
        restitute_to=draw(st.sampled_from(RESTITUTE_TO)) if OPERATIONS[mode].restitutes else "normalized",
        shape=draw(shapes(elements)),
        dtype=dtype,
        parameter_dtype=draw(st.sampled_from([None, torch.float32])) if dtype != torch.float64 else None,
        layouts=(draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts))),
        gradient_layout=gradient_layout,
        values=draw(st.sampled_from(values)),
        hidden=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**16)),
    )


def randomized(module: nn.Module) -> nn.Module:
    """``module`` with parameters unlike the initial ones, the same at each call."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=100 + i, dtype=torch.float32) * 0.5 + 0.3)
    return module


def poison_memory(p: Problem, times: int = 4) -> None:
    """Leave NaN in freed memory that the allocator will use for the outputs and gradients of ``p``."""
    n, c, h, w = p.case.shape

    def nan(*shape: int, dtype: torch.dtype) -> Tensor:
        return p.inputs[0].new_full(shape, math.nan, dtype=dtype)

    for _ in range(times):
        held = [nan(k * n, c, h, w, dtype=p.case.dtype) for k in (1, 1, 1, 1, 1, 6)]
        for dtype in (torch.float32, torch.float64):
            held += [nan(k, n, c, m, dtype=dtype) for k in (1, 2) for m in (2, 4)]
            held += [nan(n, c, dtype=dtype) for _ in range(8)]
        held += [torch.full_like(q, math.nan, requires_grad=False) for q in p.parameters]
        del held
