"""The operations that are measured, and for each problem the calls that are timed: fused, baselines, floor.

A volume is one tensor of N·C·H·W elements. The floor is the time that a large copy takes to move an
operation's compulsory volumes: each input is read once and each result is written once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from mrcn_fast import backends, operations, reference
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
from mrcn_fast.benchmark.timing import AUTOTUNED, EXACT, Calls, default_kernels
from mrcn_fast.block import MRCNBlock, MRCNFeatures, SNRBlock
from mrcn_fast.cqc import cqc_loss

Shape = tuple[int, int, int, int]

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS: Final = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
WAYS: Final = ("forward", "backward", "forward+backward")

# For volumes of more bytes, only the fused form and the floor are measured, and the results are compared for
# a part of the samples at a time: eager PyTorch keeps some thirty volumes.
LARGEST_WITH_BASELINES: Final = 80e6


class Measured(NamedTuple):
    """An operation of the library with the module that computes it, and the same in plain PyTorch.

    Attributes:
        entry: its entry in the table of operations
        make: makes its module, from the number of channels
        call: computes its results with that module, as `call(module, *maps)`
        library: the same with PyTorch's own instance normalization
        collapsed: the same as one statistics pass and one elementwise pass
    """

    entry: operations.Operation
    make: Callable[..., nn.Module]
    call: Callable[..., tuple[Tensor, ...]]
    library: Callable[..., tuple[Tensor, ...]]
    collapsed: Callable[..., tuple[Tensor, ...]]

    @property
    def inputs(self) -> int:
        """How many maps it reads."""
        return len(self.entry.inputs)

    @property
    def outputs(self) -> int:
        """How many maps it makes."""
        return self.entry.results * self.entry.batches

    def volumes(self, way: str) -> int:
        """Return how many volumes must be moved.

        The backward reads the results' gradients and the inputs, and writes the inputs' gradients.
        """
        forward, backward = self.inputs + self.outputs, self.outputs + 2 * self.inputs
        return {"forward": forward, "backward": backward}.get(way, forward + backward)

    def results(self, way: str) -> int:
        """Return how many volumes a call returns: the maps that it makes, and the inputs' gradients."""
        return ("forward" in way) * self.outputs + ("backward" in way) * self.inputs

    def parameters(self, channels: int) -> int:
        """Return how many numbers its parameters have."""
        return sum(p.numel() for p in self.make(channels, device="meta").parameters())


def _measured(
    mode: str, make: type[nn.Module], run: Callable[..., Any], *others: Callable[..., Any]
) -> Measured:
    """Return an operation of the table, computed by `run(module, *maps)` and, in PyTorch, by the others."""
    entry = operations.OPERATIONS[mode]

    def call(module: nn.Module, *maps: Tensor) -> tuple[Tensor, ...]:
        return entry.results_of(run(module, *maps))

    return Measured(entry, make, call, *others)


_concat = partial(MRCNBlock.__call__, concat=True)
_restitute = partial(MRCNBlock.restitute, modality="visible")
OPERATIONS: Final = {
    "block": _measured("pair", MRCNBlock, MRCNBlock.__call__, library_block, collapsed_block),
    "concat": _measured("concat", MRCNBlock, _concat, library_concat, collapsed_concat),
    "restitution": _measured("restitute", MRCNBlock, _restitute, library_restitution, collapsed_restitution),
    "snr": _measured("snr", SNRBlock, SNRBlock.__call__, library_snr, collapsed_snr),
}


class Problem(NamedTuple):
    """An operation on tensors of one kind, by names from OPERATIONS, WAYS, LAYOUTS, DTYPES and `gates.FUSED`.

    With `hot`, on a GPU, all calls use the same tensors, whatever of them the cache holds.
    """

    operation: str
    way: str
    shape: Shape
    layout: str = "nchw"
    dtype: str = "fp32"
    device: str = "cpu"
    hot: bool = False
    gate: str = "se"

    @property
    def name(self) -> str:
        """The name of its case. Results of a case are found by it in files, so it never changes."""
        words = (self.operation, self.way, "x".join(map(str, self.shape)), self.layout)
        if self.device != "cpu":
            return " ".join(("gpu", *words, self.dtype)) + " hot L2" * self.hot + self._gate_name
        return " ".join(words) + ("" if self.dtype == "fp32" else f" {self.dtype}") + self._gate_name

    @property
    def _gate_name(self) -> str:
        return "" if self.gate == "se" else f" {self.gate}"

    @property
    def volume_bytes(self) -> int:
        """The bytes of one volume."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def result_bytes(self) -> int:
        """The bytes of everything that a call returns, including the parameters' gradients."""
        operation = OPERATIONS[self.operation]
        gradients = operation.parameters(self.shape[1]) if "backward" in self.way else 0
        volumes = operation.results(self.way) * self.volume_bytes
        return volumes + gradients * DTYPES[self.dtype].itemsize

    @property
    def facts(self) -> dict[str, Any]:
        """What reports sort by: see `Case.facts`."""
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


# --- what is timed ------------------------------------------------------------------------------------


def map_calls(problem: Problem, with_baselines: bool = True) -> Calls:
    """Make the calls of a problem on maps.

    Args:
        problem: what is computed
        with_baselines: whether to add "eager", "instance_norm", "compile" (torch.compile of the reference)
            and "compile collapsed"

    Returns:
        "fused", "floor" and the baselines. On a GPU "fused" is the backend that serves by default, and
        "fused NAME" is another backend that can serve. EXACT is added where the fused result can't be
        compared with "eager".
    """
    operation, device, dtype = OPERATIONS[problem.operation], problem.device, DTYPES[problem.dtype]
    torch.manual_seed(0)
    module = _module(problem, default_kernels(device))
    draw_parameters(module)
    plain = _module_like(problem, module, "reference")
    sets = _sets(problem)

    def run(form: Callable[..., Any], of: nn.Module) -> Callable[[], Any]:
        return _runner(problem.way, form, list(of.parameters()), sets)

    literal, collapsed = partial(operation.call, plain), partial(operation.collapsed, plain)
    calls: Calls = {"fused": run(partial(operation.call, module), module)}
    for name in other_kernels(device):
        other = _module_like(problem, module, name)
        calls[f"fused {name}"] = run(partial(operation.call, other), other)
    if with_baselines:
        calls["eager"] = run(literal, plain)
        calls["instance_norm"] = run(partial(operation.library, plain), plain)
        modes = {"": None} if device == "cpu" else {"": None, AUTOTUNED: "max-autotune-no-cudagraphs"}
        for suffix, mode in modes.items():
            calls[f"compile{suffix}"] = run(compiled(literal, mode), plain)
            calls[f"compile collapsed{suffix}"] = run(compiled(collapsed, mode), plain)
    if dtype != torch.float32 or not with_baselines:
        given = itertools.cycle(sets)
        calls[EXACT] = lambda: _exact(problem, plain, next(given))
    volumes = operation.volumes(problem.way)
    floor = copy_of(volumes * math.prod(problem.shape), device, dtype, hot=problem.hot)
    return calls | {"floor": floor}


def backend_calls(problem: Problem, names: Sequence[str]) -> Calls:
    """Make the calls of a problem on backends, by name, and EXACT, which their results are compared with."""
    torch.manual_seed(0)
    plain = _module(problem, "reference")
    draw_parameters(plain)
    sets = _sets(problem)
    calls: Calls = {}
    for name in names:
        module = _module_like(problem, plain, name)
        form = partial(OPERATIONS[problem.operation].call, module)
        calls[name] = _runner(problem.way, form, list(module.parameters()), sets)
    given = itertools.cycle(sets)
    return calls | {EXACT: lambda: _exact(problem, plain, next(given))}


def _module(problem: Problem, backend: str) -> nn.Module:
    """Make a problem's module with new parameters."""
    kind = {"device": problem.device, "dtype": DTYPES[problem.dtype], "gate": problem.gate}
    return OPERATIONS[problem.operation].make(problem.shape[1], backend=backend, **kind)


def _module_like(problem: Problem, module: nn.Module, backend: str) -> nn.Module:
    """Make a problem's module with the parameters of another one."""
    made = _module(problem, backend)
    made.load_state_dict(module.state_dict())
    return made


def draw_parameters(module: nn.Module) -> None:
    """Draw every parameter anew, so that a kernel that leaves one out or mistakes it for another is found.

    With a new module's own parameters M is nearly zero and the gates are nearly one half, whatever they
    compute.
    """
    for name, parameter in module.named_parameters():
        mean = 1.0 if name.endswith("norm_weight") else 0.0
        fan_in = parameter.shape[-1] if parameter.dim() > 2 else 4  # a layer's weights, else std 0.5
        nn.init.normal_(parameter, mean, fan_in**-0.5)


def other_kernels(device: str) -> list[str]:
    """Return the backends that serve this device's tensors only when they are asked for by name."""
    if torch.device(device).type == "cpu":
        return []
    return ["cuda"] if backends()["cuda"].usable and not cuda.DEVICES else []


class _Set(NamedTuple):
    """The maps of one call, and the gradients of its results."""

    maps: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def _sets(problem: Problem) -> list[_Set]:
    operation, dtype = OPERATIONS[problem.operation], DTYPES[problem.dtype]
    backward = "backward" in problem.way

    def tensor(batches: int = 1) -> Tensor:
        shape = (batches * problem.shape[0], *problem.shape[1:])
        made = torch.randn(shape, device=problem.device, dtype=dtype)
        made += torch.randn((*shape[:2], 1, 1), device=problem.device, dtype=dtype)  # planes have means
        return made.contiguous(memory_format=LAYOUTS[problem.layout])

    def one() -> _Set:
        maps = tuple(tensor().requires_grad_(backward) for _ in range(operation.inputs))
        if not backward:
            return _Set(maps, ())
        results, batches = operation.entry.results, operation.entry.batches
        return _Set(maps, tuple(tensor(batches) for _ in range(results)))

    moved = operation.volumes(problem.way) * problem.volume_bytes
    number = 1 if problem.hot else rotation(problem.device, moved)
    return [one() for _ in range(number)]


def _runner(
    way: str, form: Callable[..., Any], parameters: Sequence[Tensor], sets: Sequence[_Set]
) -> Callable[[], Any]:
    """Return a call that runs `form`, its backward, or both; each time it takes the next set of tensors."""
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
            # A compiled backward would otherwise reuse the memory of what the forward saved, and runs once
            # only.
            with torch._functorch.config.patch(donated_buffer=False):
                made = itertools.cycle([(one, form(*one.maps)) for one in sets])
        (maps, gradients), outputs = next(made)
        return torch.autograd.grad(outputs, (*maps, *parameters), gradients, retain_graph=True)

    return backward


def _exact(problem: Problem, plain: nn.Module, given: _Set) -> tuple[Tensor, ...]:
    """Return the results in float32 from the same values, for as many samples at once as fit into memory."""
    operation = OPERATIONS[problem.operation]
    wide = operation.make(problem.shape[1], device=problem.device, gate=problem.gate, backend="reference")
    wide.load_state_dict(plain.state_dict())
    samples = problem.shape[0]
    at_once = max(1, int(samples * LARGEST_WITH_BASELINES / problem.volume_bytes))
    if at_once >= samples:
        return _exact_part(problem, wide, given)
    if operation.entry.stacked:
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
        # The parts of maps follow one another; those of the parameters' gradients are added.
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


# The bytes of the copy's tensors, at most: more than the caches hold, and few beside the largest volumes.
_COPIED_AT_ONCE: Final = 256e6


def copy_of(
    elements: int, device: str = "cpu", dtype: torch.dtype = torch.float32, hot: bool = False
) -> Callable[[], Any]:
    """Return the floor: a copy that reads and writes this many elements in total."""
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
    """Return how many sets of tensors a call uses in turn.

    On a GPU they have together four times the bytes of its L2 cache.
    """
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // set_bytes))


def cqc_calls(
    identities: int,
    images: int,
    dimensions: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    normalize: bool = False,
) -> Calls:
    """Make the calls of the CQC loss, forward and backward.

    Args:
        identities: identities per batch
        images: images per identity in each modality
        dimensions: of a feature
        device: where it runs
        dtype: of the features
        normalize: whether the features are normalized first

    Returns:
        "fused", "vectorized" (eager), "loop" (over identities), and with ``normalize`` "unfused": the fused
        loss of features that torch normalizes.
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
    calls = {"fused": run(loss)} | others
    plain: dict[str, Callable[..., Any]] = {"vectorized": vectorized_cqc, "loop": looped_cqc}
    if normalize:
        plain = {"unfused": cqc_loss} | plain
    calls |= {name: run(of_unit_rows(form) if normalize else form) for name, form in plain.items()}
    return calls if dtype == torch.float32 else calls | {EXACT: exact}
