"""The registry: every case of every suite, with its rivals and goals.

- table: what README shows, and what the goals are set for
- stages: every operation at the shapes of stages 0 to 4 of the paper's network, its batches and one of twice
  the identities, both dtypes, both layouts
- sweep: the block over N, C and H·W, from volumes of 1 MB to 1 GB: how the cost grows

A volume is one tensor of N·C·H·W elements. A floor is the time that a large copy takes to move an operation's
compulsory volumes: each input read once, each output written once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from mrcn_fast import backends, reference
from mrcn_fast.backends import cuda
from mrcn_fast.benchmark.suites.baselines import (
    collapsed_block,
    collapsed_concat,
    collapsed_restitution,
    collapsed_snr,
    compiled,
    library_block,
    library_concat,
    library_restitution,
    library_snr,
    looped_cqc,
    of_unit_rows,
    vectorized_cqc,
)
from mrcn_fast.benchmark.timing import EXACT, Case, Rivals
from mrcn_fast.block import MRCNBlock, MRCNFeatures, SNRBlock
from mrcn_fast.cqc import cqc_loss

Shape = tuple[int, int, int, int]

SUITES: Final = ("table", "stages", "sweep")
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS: Final = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
WAYS: Final = ("forward", "backward", "forward+backward")

SHAPES: Final = ((16, 256, 72, 32), (16, 64, 72, 32), (8, 512, 36, 16))
GPU_SHAPES: Final = ((16, 64, 72, 32), (16, 256, 72, 32), (64, 256, 72, 32))
# C, H, W behind stages 0 to 4 of ResNet-50 at 288 x 128 pixels, layer4 with stride 1.
STAGES: Final = ((64, 72, 32), (256, 72, 32), (512, 36, 16), (1024, 18, 8), (2048, 18, 8))
BATCHES: Final = (16, 32)  # samples of a modality: 4 x 4, and 8 x 4
SWEEP: Final[tuple[Shape, ...]] = (
    *((n, 256, 72, 32) for n in (1, 4, 16, 64, 256, 448)),
    *((16, c, 72, 32) for c in (8, 32, 64, 1024)),
    *((16, 64, h, w) for h, w in ((9, 4), (18, 8), (36, 16), (144, 64), (288, 128))),
    (1, 256, 288, 128),
)
# Beyond these bytes of a volume only the fused form and the floor are measured, and results are compared a
# part of the samples at a time: eager keeps some thirty volumes.
_PLAIN_FORMS_UP_TO: Final = 80e6

# A rival's other form, compiled with Inductor's autotuning: whichever is faster counts.
AUTOTUNED: Final = " autotuned"


class Operation(NamedTuple):
    """One of the library's operations: maps read, maps made, its module, and `call(module, *maps)`.

    Then the same with the nearest library's kernel, and collapsed.
    """

    inputs: int
    outputs: int
    make: Callable[..., nn.Module]
    call: Callable[..., tuple[Tensor, ...]]
    library: Callable[..., tuple[Tensor, ...]]
    collapsed: Callable[..., tuple[Tensor, ...]]

    def volumes(self, way: str) -> int:
        """The compulsory traffic: backward reads the gradients and the inputs and writes the latter's."""
        forward, backward = self.inputs + self.outputs, self.outputs + 2 * self.inputs
        return {"forward": forward, "backward": backward}.get(way, forward + backward)

    def results(self, way: str) -> int:
        """Volumes that stay when it is done: what is made, and the inputs' gradients."""
        return ("forward" in way) * self.outputs + ("backward" in way) * self.inputs

    def parameters(self, channels: int) -> int:
        """How many numbers its parameters are."""
        return sum(p.numel() for p in self.make(channels, device="meta").parameters())


OPERATIONS: Final = {
    "block": Operation(
        2, 4, MRCNBlock, lambda block, *maps: tuple(block(*maps)[1:5]), library_block, collapsed_block
    ),
    "concat": Operation(
        2, 6, MRCNBlock, lambda block, *maps: (block(*maps, concat=True),), library_concat, collapsed_concat
    ),
    "restitution": Operation(
        1,
        1,
        MRCNBlock,
        lambda block, x: (block.restitute(x, "visible"),),
        library_restitution,
        collapsed_restitution,
    ),
    "snr": Operation(1, 3, SNRBlock, lambda block, x: tuple(block(x)), library_snr, collapsed_snr),
}


class Problem(NamedTuple):
    """What is computed on what: names from OPERATIONS, WAYS, LAYOUTS and DTYPES."""

    operation: str
    way: str
    shape: Shape
    layout: str = "nchw"
    dtype: str = "fp32"
    device: str = "cpu"
    hot: bool = False  # on a GPU: one set of tensors, whatever of it the cache holds

    @property
    def name(self) -> str:
        """A case's history is found by this, so it stays."""
        words = (self.operation, self.way, "x".join(map(str, self.shape)), self.layout)
        if self.device != "cpu":
            return " ".join(("gpu", *words, self.dtype)) + " hot L2" * self.hot
        return " ".join(words) + ("" if self.dtype == "fp32" else f" {self.dtype}")

    @property
    def volume_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def result_bytes(self) -> int:
        """What stays when it is done, the parameters' gradients too."""
        operation = OPERATIONS[self.operation]
        gradients = operation.parameters(self.shape[1]) if "backward" in self.way else 0
        volumes = operation.results(self.way) * self.volume_bytes
        return volumes + gradients * DTYPES[self.dtype].itemsize

    @property
    def facts(self) -> dict[str, Any]:
        """What a report sorts by."""
        return {
            "operation": self.operation,
            "way": self.way,
            "shape": list(self.shape),
            "layout": self.layout,
            "dtype": self.dtype,
            "volume_bytes": self.volume_bytes,
            "volumes": OPERATIONS[self.operation].volumes(self.way),
            "result_bytes": self.result_bytes,
        }


# --- rivals -------------------------------------------------------------------------------------------


def map_rivals(problem: Problem, plain_forms: bool = True) -> Rivals:
    """Fused, the floor and, with `plain_forms`, eager, compiled reference, compiled collapsed form.

    On a GPU "fused" is the backend that serves by default, and "fused NAME" another that can.
    """
    operation, device, dtype = OPERATIONS[problem.operation], problem.device, DTYPES[problem.dtype]
    channels = problem.shape[1]
    torch.manual_seed(0)
    module = operation.make(channels, device=device, dtype=dtype)
    draw_parameters(module)
    plain = operation.make(channels, device=device, dtype=dtype, backend="reference")
    plain.load_state_dict(module.state_dict())
    sets = _sets(problem)

    def run(form: Callable[..., Any], of: nn.Module) -> Callable[[], Any]:
        return _runner(problem.way, form, list(of.parameters()), sets)

    literal, collapsed = partial(operation.call, plain), partial(operation.collapsed, plain)
    rivals: Rivals = {"fused": run(partial(operation.call, module), module)}
    for name in other_kernels(device):
        other = operation.make(channels, device=device, dtype=dtype, backend=name)
        other.load_state_dict(module.state_dict())
        rivals[f"fused {name}"] = run(partial(operation.call, other), other)
    if plain_forms:
        rivals["eager"] = run(literal, plain)
        rivals["instance_norm"] = run(partial(operation.library, plain), plain)
        modes = {"": None} if device == "cpu" else {"": None, AUTOTUNED: "max-autotune-no-cudagraphs"}
        for suffix, mode in modes.items():
            rivals[f"compile{suffix}"] = run(compiled(literal, mode), plain)
            rivals[f"compile collapsed{suffix}"] = run(compiled(collapsed, mode), plain)
    if dtype != torch.float32 or not plain_forms:
        given = itertools.cycle(sets)
        rivals[EXACT] = lambda: _exact(problem, plain, next(given))
    volumes = operation.volumes(problem.way)
    floor = copy_of(volumes * math.prod(problem.shape), device, dtype, hot=problem.hot)
    return rivals | {"floor": floor}


def draw_parameters(module: nn.Module) -> None:
    """Numbers of their own for every parameter: one that is left out or mistaken for another shows.

    With the module's first ones M is nearly zero and the gates are nearly one half, whatever is in them.
    """
    for name, parameter in module.named_parameters():
        mean = 1.0 if name.endswith("norm_weight") else 0.0
        fan_in = parameter.shape[-1] if parameter.dim() > 2 else 4  # a layer's weights, else std 0.5
        nn.init.normal_(parameter, mean, fan_in**-0.5)


def other_kernels(device: str) -> list[str]:
    """The backends that serve this device's tensors where they are asked for, and not by default."""
    if torch.device(device).type == "cpu":
        return []
    return ["cuda"] if backends()["cuda"].usable and not cuda.DEVICES else []


class _Set(NamedTuple):
    """Maps, and the gradients of what is made of them."""

    maps: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def _sets(problem: Problem) -> list[_Set]:
    operation, dtype = OPERATIONS[problem.operation], DTYPES[problem.dtype]
    backward = "backward" in problem.way

    def tensor(count: int = 1) -> Tensor:
        shape = (count * problem.shape[0], *problem.shape[1:])
        made = torch.randn(shape, device=problem.device, dtype=dtype)
        made += torch.randn((*shape[:2], 1, 1), device=problem.device, dtype=dtype)  # planes have means
        return made.contiguous(memory_format=LAYOUTS[problem.layout])

    def one() -> _Set:
        maps = tuple(tensor().requires_grad_(backward) for _ in range(operation.inputs))
        if not backward:
            return _Set(maps, ())
        if problem.operation == "concat":
            return _Set(maps, (tensor(operation.outputs),))
        return _Set(maps, tuple(tensor() for _ in range(operation.outputs)))

    moved = operation.volumes(problem.way) * problem.volume_bytes
    number = 1 if problem.hot else rotation(problem.device, moved)
    return [one() for _ in range(number)]


def _runner(
    way: str, form: Callable[..., Any], parameters: Sequence[Tensor], sets: Sequence[_Set]
) -> Callable[[], Any]:
    """A call of `form`, of its backward, or of both; each takes the next set of tensors."""
    given = itertools.cycle(sets)

    def forward() -> Any:
        with torch.no_grad():
            return form(*next(given).maps)

    def both() -> Any:
        maps, gradients = next(given)
        return torch.autograd.grad(form(*maps), (*maps, *parameters), gradients)

    if way != "backward":
        return forward if way == "forward" else both

    made: Iterator[tuple[_Set, Any]] | None = None

    def backward() -> Any:
        nonlocal made
        if made is None:
            # A compiled backward may otherwise hand out the memory of what the forward kept.
            with torch._functorch.config.patch(donated_buffer=False):
                made = itertools.cycle([(one, form(*one.maps)) for one in sets])
        (maps, gradients), outputs = next(made)
        return torch.autograd.grad(outputs, (*maps, *parameters), gradients, retain_graph=True)

    return backward


def _exact(problem: Problem, plain: nn.Module, given: _Set) -> tuple[Tensor, ...]:
    """The results in float32, from the same values, as many samples at once as eager has memory for."""
    operation = OPERATIONS[problem.operation]
    wide = operation.make(problem.shape[1], device=problem.device, backend="reference")
    wide.load_state_dict(plain.state_dict())
    samples = problem.shape[0]
    at_once = max(1, int(samples * _PLAIN_FORMS_UP_TO / problem.volume_bytes))
    if at_once >= samples:
        return _exact_part(problem, wide, given)
    if problem.operation == "concat":
        raise ValueError(
            "the sets of concat stand one after the other in its batch: no part of it is a slice"
        )
    maps = operation.inputs if "backward" in problem.way else operation.outputs
    results: list[Tensor] = []
    for start in range(0, samples, at_once):
        part = slice(start, start + at_once)
        found = _exact_part(problem, wide, _Set(*(tuple(x[part] for x in tensors) for tensors in given)))
        if not results:
            results = [torch.zeros_like(f) for f in found[maps:]]
            results = [f.new_empty((samples, *f.shape[1:])) for f in found[:maps]] + results
        # Of maps the parts one after the other, of the parameters' gradients their sum.
        for k, f in enumerate(found):
            if k < maps:
                results[k][part].copy_(f)
            else:
                results[k].add_(f)
    return tuple(results)


def _exact_part(problem: Problem, wide: nn.Module, given: _Set) -> tuple[Tensor, ...]:
    backward = "backward" in problem.way
    maps = tuple(x.detach().float().requires_grad_(backward) for x in given.maps)
    outputs = OPERATIONS[problem.operation].call(wide, *maps)
    if not backward:
        return tuple(o.detach() for o in outputs)
    return torch.autograd.grad(outputs, (*maps, *wide.parameters()), [g.float() for g in given.gradients])


# The copy's tensors are no larger than this: beyond the caches, and beside the largest volumes in memory.
_COPIED_AT_ONCE: Final = 256e6


def copy_of(
    elements: int, device: str = "cpu", dtype: torch.dtype = torch.float32, hot: bool = False
) -> Callable[[], Any]:
    """The floor: a copy that reads and writes so many elements in all."""
    half = elements // 2
    part = min(half, int(_COPIED_AT_ONCE) // dtype.itemsize)

    def pair() -> tuple[Tensor, Tensor]:
        source = torch.randn(part, device=device, dtype=dtype)
        return torch.empty_like(source), source

    number = rotation(device, 2 * half * dtype.itemsize) if part == half and not hot else 1
    pairs = itertools.cycle([pair() for _ in range(number)])

    def copy() -> Tensor:
        target, source = next(pairs)
        for start in range(0, half, part):
            length = min(part, half - start)
            target[:length].copy_(source[:length])
        return target

    return copy


def rotation(device: str, set_bytes: int) -> int:
    """How many sets of tensors a form goes round: on a GPU, together four times what its cache holds."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // set_bytes))


def cqc_rivals(
    identities: int,
    images: int,
    dimensions: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    normalize: bool = False,
) -> Rivals:
    """Fused, vectorised eager and the loop over identities, forward and backward.

    With ``normalize`` also the fused loss of features that torch normalizes, as "unfused".
    """
    torch.manual_seed(0)
    labels = torch.arange(identities, device=device).repeat_interleave(images)
    rows = identities * images
    sets = [
        MRCNFeatures(
            *(torch.randn(rows, dimensions, device=device, dtype=dtype).requires_grad_() for _ in range(6))
        )
        for _ in range(rotation(device, 6 * rows * dimensions * dtype.itemsize))
    ]

    def run(form: Callable[..., Any]) -> Callable[[], Any]:
        given = itertools.cycle(sets)

        def both() -> Any:
            features = next(given)
            return torch.autograd.grad(form(features, labels, labels), features)

        return both

    given = itertools.cycle(sets)

    def exact() -> Any:
        features = [f.detach().float().requires_grad_() for f in next(given)]
        losses, _ = reference.cqc_loss(features, labels, labels, normalize=normalize)
        return torch.autograd.grad(losses.sum(), features)

    loss = partial(cqc_loss, normalize=normalize)
    others = {f"fused {name}": run(partial(loss, backend=name)) for name in other_kernels(device)}
    rivals = {"fused": run(loss)} | others
    plain: dict[str, Callable[..., Any]] = {"vectorized": vectorized_cqc, "loop": looped_cqc}
    if normalize:
        plain = {"unfused": cqc_loss} | plain
    rivals |= {name: run(of_unit_rows(form) if normalize else form) for name, form in plain.items()}
    return rivals if dtype == torch.float32 else rivals | {EXACT: exact}


# --- suites -------------------------------------------------------------------------------------------


def cases(suite: str = "table", device: str = "cpu", dtypes: Sequence[str] = tuple(DTYPES)) -> list[Case]:
    """The cases of a suite that are in one of these dtypes, in the order of the table."""
    on_cpu = torch.device(device).type == "cpu"
    problems = {
        "table": _table_problems if on_cpu else _gpu_table_problems,
        "stages": _stage_problems,
        "sweep": _sweep_problems,
    }[suite](device)
    found = [_map_case(problem, suite) for problem in problems if problem.dtype in dtypes]
    return found + [case for case in _cqc_cases(suite, device) if _dtype_name(case) in dtypes]


def _dtype_name(case: Case) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == case.dtype)


def _table_problems(device: str) -> Iterator[Problem]:
    for layout, shape, way in itertools.product(LAYOUTS, SHAPES, ("forward", "forward+backward")):
        yield Problem("block", way, shape, layout, device=device)
    for layout, way in itertools.product(LAYOUTS, ("forward", "forward+backward")):
        yield Problem("block", way, SHAPES[0], layout, "bf16", device)
    for layout in LAYOUTS:
        yield Problem("concat", "forward+backward", SHAPES[0], layout, device=device)
    for operation, layout in itertools.product(("restitution", "snr"), LAYOUTS):
        yield Problem(operation, "forward", SHAPES[0], layout, device=device)


def _gpu_table_problems(device: str) -> Iterator[Problem]:
    ways = ("forward", "forward+backward")
    for dtype, layout, shape, way in itertools.product(DTYPES, LAYOUTS, GPU_SHAPES, ways):
        yield Problem("block", way, shape, layout, dtype, device)
    for dtype, way in itertools.product(DTYPES, ways):
        yield Problem("block", way, GPU_SHAPES[0], "channels_last", dtype, device, hot=True)


def _stage_problems(device: str) -> Iterator[Problem]:
    done = [("block", way) for way in WAYS]
    done += [("concat", WAYS[2]), ("restitution", WAYS[0]), ("snr", WAYS[2])]
    for (operation, way), batch, stage, dtype, layout in itertools.product(
        done, BATCHES, STAGES, DTYPES, LAYOUTS
    ):
        yield Problem(operation, way, (batch, *stage), layout, dtype, device)


def _sweep_problems(device: str) -> Iterator[Problem]:
    for way, shape in itertools.product(("forward", "forward+backward"), SWEEP):
        yield Problem("block", way, shape, device=device)


def _map_case(problem: Problem, suite: str) -> Case:
    plain_forms = suite != "sweep" or problem.volume_bytes <= _PLAIN_FORMS_UP_TO
    return Case(
        problem.name,
        partial(map_rivals, problem, plain_forms),
        goals(problem),
        problem.device,
        DTYPES[problem.dtype],
        hot=problem.hot,
        facts=problem.facts,
    )


def _cqc_cases(suite: str, device: str) -> Iterator[Case]:
    on_cpu = torch.device(device).type == "cpu"
    batches = {"table": ((4, 4),) if on_cpu else ((4, 4), (16, 8)), "stages": ((4, 4), (8, 4)), "sweep": ()}
    goals = {"vectorized": 5.0, "loop": 15.0} if on_cpu else {"vectorized": 4.0, "loop": 10.0}
    unit_goals = goals | {"unfused": 3.0}
    dtypes = ("fp32",) if on_cpu and suite == "table" else tuple(DTYPES)
    for dtype, normalize, (identities, images) in itertools.product(dtypes, (False, True), batches[suite]):
        name = f"cqc{' normalized' * normalize} forward+backward {identities}x{images}x2048"
        if not on_cpu:
            name = f"gpu {name} {dtype}"
        elif dtype != "fp32":
            name += f" {dtype}"
        make = partial(cqc_rivals, identities, images, 2048, device, DTYPES[dtype], normalize)
        facts = {"operation": "cqc normalized" if normalize else "cqc", "way": WAYS[2], "dtype": dtype}
        reached = unit_goals if normalize else goals
        yield Case(name, make, reached, device, DTYPES[dtype], waits=True, facts=facts)


def goals(problem: Problem) -> dict[str, float]:
    """What the case is to reach: see `Case.goals`."""
    return _cpu_goals(problem) if problem.device == "cpu" else _gpu_goals(problem)


# Volumes that no outer cache of a CPU holds.
_BEYOND_CACHE: Final = 32e6


def _cpu_goals(problem: Problem) -> dict[str, float]:
    both = problem.way == "forward+backward"
    memory = {"memory": 1.02} if both and problem.operation == "block" else {}
    beyond_cache = problem.volume_bytes > _BEYOND_CACHE
    if problem.dtype == "bf16":
        return {"floor": 1.3} | memory if problem.operation == "block" else {}
    if problem.operation == "restitution" and problem.way == "forward" and beyond_cache:
        return {"floor": 1.15}
    if problem.operation != "block" or problem.way == "backward":
        return {}
    if problem.shape in SHAPES[1:]:
        return {"compile": 3.0 if both else 4.0 if problem.shape[1] == 512 else 3.5} | memory
    if not beyond_cache:
        return memory
    if problem.volume_bytes > _PLAIN_FORMS_UP_TO:
        return {"floor": 1.35 if both else 1.1} | memory
    if both:
        return {"floor": 1.35, "compile": 3.5} | memory
    return {"floor": 1.1, "compile": 3.5, "compile collapsed": 2.5}


def _gpu_goals(problem: Problem) -> dict[str, float]:
    if problem.operation != "block" or problem.way == "backward":
        return {}
    if problem.way == "forward":
        return {"host": 40.0} | ({"floor": 1 / 0.8} if problem.volume_bytes >= 32e6 else {})
    if problem.shape[0] != 16:
        # Six volumes at 80 % of the copy's bandwidth, eight at 70 %.
        forward, backward = (OPERATIONS["block"].volumes(way) for way in ("forward", "backward"))
        return {"floor": (forward / 0.8 + backward / 0.7) / (forward + backward)}
    return {"compile": 2.0, "compile collapsed": 1.5, "eager": 6.0}
