"""The problems on which kernels are held against the reference, and the rule by which they are judged.

A `Case` names an operation with its shapes, dtypes and layouts; `problem` makes its tensors on `DEVICE`;
`evaluate` runs it with any backend; `check_accuracy` applies the rule:

    max|fused - truth| <= 1.5 max|eager - truth| + eps max|truth|        for each output and each gradient,

where eager is the reference in the case's own dtype, eps belongs to the dtype of the tensor compared, and
truth is the reference in float64 from the upcast inputs. For float64 itself that would compare a rounding
error with zero: there truth is `tests.support.extended`, the equations in numpy's long double.

Both sides are rounding errors, and of a tensor of a few numbers the eager one is now and then zero by luck.
So what breaks the rule is drawn again `DRAWS` times with other values: the rule must hold for the median of
the draws, and no draw may be further from it than `CEILING`. What is systematically worse does not pass.

Memory between the elements of a strided input holds NaN, so that reading it shows.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import mrcn_fast
from mrcn_fast import MRCNFeatures, SNRFeatures, cqc_loss, dispatch, mrcn_block, mrcn_restitution, snr_block
from mrcn_fast.plain import run_reference
from tests.support import extended

REQUIRED = os.environ.get("MRCN_FAST_REQUIRE_CPU") == "1"

# Where the problems are made, and which backends are held against the reference there. The CUDA kernels may
# run on the processor: tests/test_cuda_on_host.py starts such runs.
DEVICE = os.environ.get("MRCN_FAST_TEST_DEVICE") or "cpu"
CUDA_ON_HOST = os.environ.get("MRCN_FAST_TEST_CUDA_ON_HOST") == "1"
KERNEL_BACKENDS = ("cuda",) if CUDA_ON_HOST else ("cpu",) if DEVICE == "cpu" else ("triton", "cuda")
OPTIONAL = () if CUDA_ON_HOST else ("cuda",)  # built where nvcc is

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PRECISE_DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            dtype == torch.float64 and not extended.PRECISE,
            reason="long double is a float64 on this machine: nothing more precise to compare with",
        ),
        id=str(dtype)[6:],
    )
    for dtype in DTYPES
]
GATES = ("se", "eca", "cbam-channel")
RESTITUTE_TO = ("normalized", "input")
MODES = ("pair", "concat", "restitute", "snr")
LAYOUTS = (
    "contiguous",
    "channels_last",
    "batch-sliced",
    "channel-sliced",
    "channels_last channel-sliced",
    "cropped",
    "spatially sliced",
    "expanded batch",
    "expanded rows",
    "transposed",
    "batch innermost",
)
GRADIENT_LAYOUTS = (*LAYOUTS, "expanded scalar")


def backends(*names: str) -> pytest.MarkDecorator:
    """Run the test once a backend; one that can't be used skips with its reason, unless it is required."""
    status = mrcn_fast.backends()

    def parameter(name: str) -> Any:
        required = name in KERNEL_BACKENDS and (REQUIRED or DEVICE != "cpu") and name not in OPTIONAL
        absent, reason = not status[name].usable and not required, status[name].reason
        if name == "cpu" and DEVICE != "cpu":
            absent, reason = True, f"the problems are on {DEVICE!r} (MRCN_FAST_TEST_DEVICE)"
        return pytest.param(name, marks=pytest.mark.skipif(absent, reason=f"{name}: {reason}"))

    return pytest.mark.parametrize("backend", [parameter(name) for name in names])


def operations(op: str, backend: str) -> tuple[Any, Any]:
    """The forward and the backward of ``op`` as torch knows them, once their kernels are loaded."""
    kernels = dispatch.KERNELS[backend]
    assert kernels.serves(DEVICE, torch.float32) is None
    return kernels.operation(f"{op}_forward"), kernels.operation(f"{op}_backward")


def examples(number: int) -> settings:
    """Hypothesis draws ``number`` cases; a failing one is told as it is: smaller ones break by luck.

    An eighth of them where the processor runs a kernel's threads in turn.
    """
    number = -(-number // 8) if CUDA_ON_HOST else number
    return settings(max_examples=number, phases=(Phase.explicit, Phase.reuse, Phase.generate))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers on `DEVICE`, the same on each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


# --- block cases ------------------------------------------------------------------------------------------


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
    # Others: "large mean", "uneven", "zero planes" and "constant planes" (every other one), NETWORK_VALUES.
    values: str = "normal"
    hidden: int = 2  # R of SE and CBAM; ECA's kernel is 2 hidden - 1
    eps: float = 1e-5
    seed: int = 0


class Problem(NamedTuple):
    """The tensors of a `Case`: leaves that require gradients, and the gradients of the outputs."""

    case: Case
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]  # norm_weight, norm_bias, then the gate's
    gradients: tuple[Tensor, ...]


def arrange(values: Tensor, layout: str) -> Tensor:
    """``values`` (N, C, H, W) with the strides that ``layout`` names; expanded ones keep only what fits."""
    n, c, h, w = values.shape

    def hole(*shape: int, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return values.new_full(shape, math.nan).contiguous(memory_format=memory_format)

    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "batch-sliced":
        view = hole(2 * n, c, h, w)[1::2]
    elif layout == "channel-sliced":
        view = hole(n, 2 * c + 1, h, w)[:, 1 : 1 + c]
    elif layout == "channels_last channel-sliced":
        view = hole(n, 2 * c + 1, h, w, memory_format=torch.channels_last)[:, 1 : 1 + c]
    elif layout == "cropped":
        view = hole(n, c, h + 2, w + 3)[:, :, 1 : 1 + h, 2 : 2 + w]
    elif layout == "spatially sliced":
        view = hole(n, c, 2 * h, 3 * w)[:, :, ::2, 1::3]
    elif layout == "transposed":
        return values.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "batch innermost":
        return values.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    elif layout == "expanded batch":
        return values[:1].contiguous().expand(n, c, h, w)
    elif layout == "expanded rows":
        # One row for all, but never a constant plane: with W = 1 that would be the case.
        return values[:, :, :1].contiguous().expand(n, c, h, w) if w > 1 else values.contiguous()
    elif layout == "expanded scalar":
        return values[0, 0, 0, 0].clone().expand(n, c, h, w)
    else:
        raise ValueError(layout)
    view.copy_(values)
    return view


def _bright_corner(x: Tensor) -> Tensor:
    """Rectified, and zero but for the first row: what stands first in memory is like nothing else."""
    rows = torch.arange(x.shape[2])[:, None]
    return torch.relu(x + 1) * (rows == 0)


# What networks make of normal numbers, by name: the values that the block gets where the paper puts it.
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
    channels, hidden = case.shape[1], case.hidden
    modalities, gates = (2, 4) if case.mode in ("pair", "concat") else (1, 1)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)

    norm = [normal(modalities, channels, mean=1.0, std=0.5), normal(modalities, channels, std=0.5)]
    if case.gate == "eca":
        size = 2 * hidden - 1
        return [*norm, normal(gates, size, std=size**-0.5)]
    return [
        *norm,
        normal(gates, hidden, channels, std=channels**-0.5),
        normal(gates, hidden, std=0.5),
        normal(gates, channels, hidden, std=hidden**-0.5),
        normal(gates, channels, std=0.5),
    ]


def output_names(mode: str) -> tuple[str, ...]:
    if mode == "pair":
        return MRCNFeatures._fields[1:5]
    return {"concat": ("six sets",), "restitute": ("restituted",), "snr": SNRFeatures._fields}[mode]


def input_names(mode: str) -> tuple[str, ...]:
    return ("visible", "infrared") if mode in ("pair", "concat") else ("features",)


def parameter_names(gate: str) -> tuple[str, ...]:
    of_gate = ("weight",) if gate == "eca" else ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    return ("norm_weight", "norm_bias", *(f"gate.{name}" for name in of_gate))


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
    batch = 6 * n if case.mode == "concat" else n
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
    """The operation's outputs, in the order of `output_names`."""
    norm_weight, norm_bias, *gate_parameters = parameters
    if case.mode == "snr":
        return tuple(
            snr_block(
                inputs[0],
                norm_weight,
                norm_bias,
                gate_parameters,
                gate=case.gate,
                eps=case.eps,
                backend=backend,
            )
        )
    settings: dict[str, Any] = {
        "gate": case.gate,
        "eps": case.eps,
        "restitute_to": case.restitute_to,
        "backend": backend,
    }
    if case.mode == "restitute":
        return (mrcn_restitution(inputs[0], norm_weight, norm_bias, gate_parameters, **settings),)
    visible, infrared = inputs
    if case.mode == "concat":
        return (
            mrcn_block(visible, infrared, norm_weight, norm_bias, gate_parameters, concat=True, **settings),
        )
    features = mrcn_block(visible, infrared, norm_weight, norm_bias, gate_parameters, **settings)
    assert features.visible is visible and features.infrared is infrared
    return tuple(features[1:5])


def evaluate(p: Problem, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name; the gradients' names are ``grad <input or parameter>``."""
    outputs = call(p.case, p.inputs, p.parameters, backend)
    return with_gradients(p, outputs)


def evaluate_reference(p: Problem, dtype: torch.dtype, device: str | None = None) -> dict[str, Tensor]:
    """The reference computed in ``dtype`` (on ``device``), inputs, parameters and gradients cast to it."""
    to: dict[str, Any] = {"dtype": dtype, "device": device}
    cast = Problem(
        p.case,
        tuple(x.detach().to(**to).requires_grad_() for x in p.inputs),
        tuple(x.detach().to(**to).requires_grad_() for x in p.parameters),
        tuple(g.to(**to) for g in p.gradients),
    )
    norm_weight, norm_bias, *gate_parameters = cast.parameters
    outputs = run_reference(
        p.case.mode,
        cast.inputs,
        norm_weight,
        norm_bias,
        gate_parameters,
        p.case.gate,
        p.case.eps,
        p.case.restitute_to,
    )
    return with_gradients(cast, outputs)


def with_gradients(p: Problem, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """``outputs`` of ``p`` and the gradients of its leaves, by name."""
    results = dict(zip(output_names(p.case.mode), outputs, strict=True))
    leaves = (*p.inputs, *p.parameters)
    names = (*input_names(p.case.mode), *parameter_names(p.case.gate))
    found = torch.autograd.grad(outputs, leaves, p.gradients)
    for name, leaf, gradient in zip(names, leaves, found, strict=True):
        assert gradient.dtype == leaf.dtype, f"gradient of {name} is {gradient.dtype}, not {leaf.dtype}"
        results[f"grad {name}"] = gradient
    return {name: result.detach() for name, result in results.items()}


# --- the rule ---------------------------------------------------------------------------------------------


def array(x: Tensor) -> extended.Array:
    return x.detach().double().cpu().numpy().astype(np.longdouble)


def block_truth(p: Problem) -> dict[str, extended.Array]:
    """Outputs and gradients to compare with: the reference in float64, for float64 in long double."""
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


class Verdict(NamedTuple):
    """How far a tensor is from the rule: it holds up to a ratio of 1."""

    ratio: float
    text: str
    fused: float  # its largest error, that of the eager reference, and a rounding unit of the largest value
    eager: float
    unit: float


DRAWS, CEILING = 24, 64.0


def verdicts(
    results: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, extended.Array]
) -> dict[str, Verdict]:
    """The rule, for each tensor by name."""
    assert results.keys() == eager.keys() == truth.keys()
    found = {}
    everywhere = max(_largest(reference) for reference in truth.values())
    for name, result in results.items():
        reference = truth[name]
        assert tuple(result.shape) == reference.shape, f"{name}: {tuple(result.shape)}, not {reference.shape}"
        fused_error = _largest(array(result) - reference)
        eager_error = _largest(array(eager[name]) - reference)
        largest = _largest(reference)
        # What cancels to nothing has no unit of its own: a constant gradient leaves γ none, or what the
        # truth's own rounding leaves of it.
        exact = np.longdouble if result.dtype == torch.float64 else np.float64
        size = largest if largest > np.finfo(exact).eps * everywhere else everywhere
        unit = torch.finfo(result.dtype).eps * size
        found[name] = Verdict(
            _ratio(fused_error, 1.5 * eager_error + unit),
            f"{name}: error {fused_error:.3e}, of the eager reference {eager_error:.3e}, rounding unit "
            f"{unit:.3e}, largest value {largest:.3e}",
            fused_error,
            eager_error,
            unit,
        )
    return found


def _ratio(error: float, bound: float) -> float:
    # A reference that itself overflows says nothing about the fused result.
    if error == 0 or not math.isfinite(bound):
        return 0.0
    return math.inf if math.isnan(error) or bound == 0 else error / bound


def _largest(x: extended.Array) -> float:
    return float(np.abs(x).max(initial=0.0)) if not np.isnan(x).any() else math.nan


C = TypeVar("C", "Case", "CQCCase")


def judge(case: C, backend: str, compare: Callable[[C], dict[str, Verdict] | None]) -> None:
    """Fail with what breaks the rule, naming the case; ``compare`` gives None for a draw near a kink."""
    first = compare(case)
    if first is None:
        pytest.fail(f"{case} is near a kink, where gradients jump: choose another seed", pytrace=False)
    broken = {name: [verdict] for name, verdict in first.items() if verdict.ratio > 1}
    if not broken:
        return
    for seed in range(case.seed + 1, case.seed + 1 + DRAWS):
        again = compare(case._replace(seed=seed))
        for name in broken if again else ():
            assert again is not None
            broken[name].append(again[name])
    lines: list[str] = []
    for draws in broken.values():
        ratios = sorted(v.ratio for v in draws)
        median = statistics.median(ratios)
        if median > 1 or ratios[-1] > CEILING:
            lines.append(
                f"{draws[0].text}; {draws[0].ratio:.2f} of the bound, over {len(draws)} draws in the median "
                f"{median:.2f}, at most {ratios[-1]:.2f}"
            )
    if lines:
        pytest.fail("\n".join([f"backend {backend!r}, {case}", *lines]), pytrace=False)


def check_accuracy(case: Case, backend: str) -> None:
    """Hold a block operation against the rule."""

    def compare(drawn: Case) -> dict[str, Verdict] | None:
        p = problem(drawn)
        if near_kink(p):
            return None
        return verdicts(evaluate(p, backend), evaluate_reference(p, drawn.dtype), block_truth(p))

    judge(away_from_kinks(case), backend, compare)


def check_distribution(case: Case, backend: str, draws: int = 60) -> None:
    """Hold the rule in the median of the draws, and twice its bound at the 99th percentile of the errors."""
    found: dict[str, list[Verdict]] = {}
    for seed in range(case.seed, case.seed + draws):
        p = problem(case._replace(seed=seed))
        if near_kink(p):
            continue
        eager, truth = evaluate_reference(p, case.dtype), block_truth(p)
        for name, verdict in verdicts(evaluate(p, backend), eager, truth).items():
            found.setdefault(name, []).append(verdict)
    assert found, f"every draw of {case} is near a kink"
    lines = []
    for name, each in found.items():
        median = statistics.median(v.ratio for v in each)
        fused, eager_error, unit = (
            float(np.quantile([getattr(v, kind) for v in each], 0.99)) for kind in ("fused", "eager", "unit")
        )
        high = _ratio(fused, 1.5 * eager_error + unit)
        if median > 1 or high > 2:
            lines.append(
                f"{name}: {median:.2f} of the bound in the median of {len(each)} draws, {high:.2f} high"
            )
    if lines:
        pytest.fail("\n".join([f"backend {backend!r}, {case}", *lines]), pytrace=False)


def away_from_kinks(case: Case) -> Case:
    """``case`` with the first seed from its own on at which no gradient jumps."""
    seeds = (case._replace(seed=seed) for seed in range(case.seed, case.seed + 1000))
    return next(c for c in seeds if not near_kink(problem(c, "cpu")))


def near_kink(p: Problem) -> bool:
    """Whether rounding can choose the other side of a ReLU or of the maximum of M: gradients jump there."""
    norm_weight, norm_bias, *gate_parameters = (q.detach().double() for q in p.parameters)
    for modality, x in enumerate(x.detach().double() for x in p.inputs):
        deviation = torch.sqrt(x.var(dim=(2, 3), unbiased=False) + p.case.eps)
        slope = 1 - norm_weight[modality] / deviation
        if p.case.gate == "cbam-channel" and bool((slope.abs() < 1e-4).any()):
            return True
        if p.case.gate == "eca":
            continue
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


# --- strategies -------------------------------------------------------------------------------------------

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
def block_cases(
    draw: st.DrawFn, mode: str, dtype: torch.dtype, elements: int = 20_000, layouts: Sequence[str] = LAYOUTS
) -> Case:
    """A `Case` of ``mode`` and ``dtype`` with everything else drawn, away from kinks."""
    gradient_layout = draw(st.sampled_from([*layouts, "expanded scalar"]))
    values = ["normal", "normal", "uneven"]
    if dtype in (torch.float32, torch.float64):
        values.append("large mean")
    # Rectified planes may be zero. There 1/σ is 316, and what a constant gradient gets from the plane's mean
    # cancels term by term in the reference, but only up to 316 rounding units in the kernels' sums.
    if gradient_layout != "expanded scalar":
        values += NETWORK_VALUES
    return Case(
        mode=mode,
        gate=draw(st.sampled_from(GATES)),
        restitute_to="normalized" if mode == "snr" else draw(st.sampled_from(RESTITUTE_TO)),
        shape=draw(shapes(elements)),
        dtype=dtype,
        parameter_dtype=draw(st.sampled_from([None, torch.float32])) if dtype != torch.float64 else None,
        layouts=(draw(st.sampled_from(layouts)), draw(st.sampled_from(layouts))),
        gradient_layout=gradient_layout,
        values=draw(st.sampled_from(values)),
        hidden=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**16)),
    )


# --- CQC cases --------------------------------------------------------------------------------------------

# Six tensors or one, as they come or normalized.
FORMS = pytest.mark.parametrize(
    ("stacked", "normalize"), [(False, False), (True, False), (False, True), (True, True)]
)
# Of rows at and around the length at which it is clamped, and two whose squares overflow in float32.
LENGTHS = (0.0, 5e-13, 1e-12, 1.5e-12, 1e20, 3e38)
FEATURE_LAYOUTS = ("contiguous", "row-sliced", "column-sliced", "transposed", "expanded rows")


class CQCCase(NamedTuple):
    """A loss on given counts of samples an identity, shuffled; a count of zero leaves the identity out."""

    visible_counts: tuple[int, ...] = (2, 2)
    infrared_counts: tuple[int, ...] = (2, 2)
    dimensions: int = 5
    dtype: torch.dtype = torch.float32
    stacked: bool = False
    reduction: str = "sum"
    detach_negative: bool = False
    margin: float = 0.2
    layout: str = "contiguous"
    scale: float = 1.0
    seed: int = 0
    normalize: bool = False


class CQCProblem(NamedTuple):
    case: CQCCase
    features: tuple[Tensor, ...]  # six, or one
    labels: Tensor
    infrared_labels: Tensor
    gradient: Tensor


def arrange_rows(values: Tensor, layout: str) -> Tensor:
    """``values`` (B, D) with the strides that ``layout`` names."""
    b, d = values.shape
    if layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "expanded rows":
        return values[:1].contiguous().expand(b, d)
    holes = {"row-sliced": (2 * b, d), "column-sliced": (b, 2 * d + 1)}[layout]
    hole = values.new_full(holes, math.nan)
    view = hole[1::2] if layout == "row-sliced" else hole[:, 1::2]
    view.copy_(values)
    return view


def cqc_problem(case: CQCCase, device: str = DEVICE) -> CQCProblem:
    """The tensors of ``case``; identities are neither small nor consecutive, and negative ones occur."""
    generator = torch.Generator().manual_seed(case.seed)
    identities = torch.tensor([(-1) ** i * (7 + 1009 * i) for i in range(len(case.visible_counts))])

    def labels_of(counts: Sequence[int]) -> Tensor:
        labels = identities.repeat_interleave(torch.tensor(counts))
        return labels[torch.randperm(labels.shape[0], generator=generator)].to(device)

    labels, infrared_labels = labels_of(case.visible_counts), labels_of(case.infrared_counts)
    rows = [labels.shape[0]] * 3 + [infrared_labels.shape[0]] * 3
    sets = [
        case.scale * torch.randn(b, case.dimensions, generator=generator, dtype=torch.float64) for b in rows
    ]
    if case.stacked:
        sets = [torch.cat(sets)]
    features = tuple(
        arrange_rows(s.to(case.dtype).to(device), case.layout).detach().requires_grad_() for s in sets
    )
    present = sum(v > 0 and n > 0 for v, n in zip(case.visible_counts, case.infrared_counts, strict=True))
    shape = (present,) if case.reduction == "none" else ()
    gradient = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(_precise(case.dtype)).to(device)
    )
    return CQCProblem(case, features, labels, infrared_labels, gradient)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def call_cqc(p: CQCProblem, features: Sequence[Tensor], backend: str) -> Tensor | tuple[Tensor, Tensor]:
    return cqc_loss(
        features[0] if p.case.stacked else features,
        p.labels,
        p.infrared_labels,
        margin=p.case.margin,
        reduction=p.case.reduction,
        detach_negative=p.case.detach_negative,
        normalize=p.case.normalize,
        backend=backend,
    )


def evaluate_cqc(p: CQCProblem, backend: str) -> dict[str, Tensor]:
    """The loss and its gradients by name."""
    loss = call_cqc(p, p.features, backend)
    if isinstance(loss, tuple):
        loss = loss[0]
    assert loss.dtype == _precise(p.case.dtype)
    found = torch.autograd.grad(loss, p.features, p.gradient.to(loss.dtype))
    for feature, gradient in zip(p.features, found, strict=True):
        assert gradient.dtype == feature.dtype
    return {"loss": loss.detach(), **{f"grad {i}": g for i, g in enumerate(found)}}


def cqc_truth(p: CQCProblem) -> dict[str, extended.Array]:
    """Loss and gradients to compare with: the reference in float64, for float64 in long double."""
    if p.case.dtype == torch.float64:
        return extended.cqc(
            [array(f) for f in p.features],
            p.labels.cpu().numpy(),
            p.infrared_labels.cpu().numpy(),
            array(p.gradient),
            margin=p.case.margin,
            reduction=p.case.reduction,
            detach_negative=p.case.detach_negative,
            normalize=p.case.normalize,
        )
    wide = CQCProblem(
        p.case._replace(dtype=torch.float64),
        tuple(f.detach().double().requires_grad_() for f in p.features),
        p.labels,
        p.infrared_labels,
        p.gradient.double(),
    )
    return {name: array(x) for name, x in evaluate_cqc(wide, "reference").items()}


def check_cqc_accuracy(case: CQCCase, backend: str) -> None:
    """Hold the loss against the rule."""

    def compare(drawn: CQCCase) -> dict[str, Verdict] | None:
        p = cqc_problem(drawn)
        if cqc_near_kink(p):
            return None
        return verdicts(evaluate_cqc(p, backend), evaluate_cqc(p, "reference"), cqc_truth(p))

    seeds = (case._replace(seed=seed) for seed in range(case.seed, case.seed + 1000))
    judge(next(c for c in seeds if not cqc_near_kink(cqc_problem(c, "cpu"))), backend, compare)


def check_short_rows(case: CQCCase, row: int, length: float, backend: str) -> None:
    """With such a row in each set the loss and each row's gradient are the reference's but for rounding."""
    p = cqc_problem(case)
    for f in p.features:
        f.detach()[row] = 0
        f.detach()[row, -1] = length
    results, expected = (evaluate_cqc(p, name) for name in (backend, "reference"))
    for name, result in results.items():
        unit = torch.finfo(result.dtype).eps * expected[name].abs().amax(dim=-1, keepdim=True)
        assert ((result - expected[name]).abs() <= 8 * unit).all(), f"{name}: {result}, not {expected[name]}"


@st.composite
def cqc_cases(draw: st.DrawFn, dtype: torch.dtype, detach_negative: bool = False) -> CQCCase:
    """A `CQCCase` with at least one identity in both modalities.

    Not in one dimension: there the directions are 1 and -1 and gradients cancel to nothing.
    """
    number = draw(st.integers(1, 5))
    counts = st.lists(st.integers(0, 4), min_size=number, max_size=number)
    visible = draw(counts)
    infrared = draw(counts)
    shared = draw(st.integers(0, number - 1))
    visible[shared], infrared[shared] = max(1, visible[shared]), max(1, infrared[shared])
    stacked = draw(st.booleans())
    # One row for all six sets would leave nothing but distances of zero.
    layouts = FEATURE_LAYOUTS[:-1] if stacked else FEATURE_LAYOUTS
    return CQCCase(
        visible_counts=tuple(visible),
        infrared_counts=tuple(infrared),
        dimensions=draw(st.sampled_from((2, 3, 8, 17, 64, 257))),
        dtype=dtype,
        stacked=stacked,
        reduction=draw(st.sampled_from(("sum", "mean", "none"))),
        detach_negative=detach_negative,
        margin=draw(st.sampled_from((0.0, 0.2, 3.0))),
        layout=draw(st.sampled_from(layouts)),
        scale=draw(st.sampled_from((0.01, 1.0, 30.0))),
        seed=draw(st.integers(0, 2**16)),
        normalize=draw(st.booleans()),
    )


def cqc_near_kink(p: CQCProblem) -> bool:
    """Whether rounding can choose the other side of a hinge, or the direction of a tiny distance."""
    features = [f.detach().double() for f in p.features]
    rows = [p.labels.shape[0]] * 3 + [p.infrared_labels.shape[0]] * 3
    sets = list(features[0].split(rows)) if p.case.stacked else features
    if p.case.normalize:
        sets = [F.normalize(s) for s in sets]
    labels = [p.labels] * 3 + [p.infrared_labels] * 3
    both = set(p.labels.tolist()) & set(p.infrared_labels.tolist())
    for identity in both:
        v, v_plus, v_minus, n_minus, n_plus, n = (
            s[of == identity].mean(0) for s, of in zip(sets, labels, strict=True)
        )
        for new, other, own in ((v_plus, n, v), (n_plus, v, n), (v_minus, n, v), (n_minus, v, n)):
            positive, negative = float((new - other).norm()), float((new - own).norm())
            magnitude = positive + negative + p.case.margin
            if abs(p.case.margin + positive - negative) < 1e-4 * magnitude:
                return True
            if min(positive, negative) < 1e-3 * float(new.norm() + own.norm() + other.norm()):
                return True
    return False


# --- bits and non-finite values ---------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: the sign of zero and the payload of NaN count."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )


def different_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of the results that are not equal to the last bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not same_bits(first[name], second[name])]


def nonfinite(x: Tensor) -> Tensor:
    """0 where finite, 1 for NaN, 2 for inf, 3 for -inf."""
    return torch.isnan(x).int() + 2 * torch.isposinf(x).int() + 3 * torch.isneginf(x).int()


def misaligned(t: Tensor) -> Tensor:
    """The same values in memory that begins one byte beside a multiple of the element's size."""
    content = bytearray(1 + t.numel() * t.element_size())
    found = torch.frombuffer(content, dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)
    return found.copy_(t.detach()).requires_grad_()


def poison_memory(p: Problem, times: int = 4) -> None:
    """Leave NaN in freed blocks that the allocator will hand out for the outputs and gradients of ``p``."""
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
