"""The center-quadruplet causal loss in Triton (eq. 8-10): one launch forward, one backward.

Here stands the way from torch's tensors to the launches; cqc_forward.py and cqc_backward.py have the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrcn_fast.backends import shapes
from mrcn_fast.backends.triton.cqc_backward import backward_kernel
from mrcn_fast.backends.triton.cqc_forward import forward_kernel
from mrcn_fast.backends.triton.launch import Arguments, Launcher, on_device

# Centers that coincide are at a distance of exactly zero only where each is rounded on its own: a fused
# multiply-add of one center's share with the other's would leave a rounding error, and a direction with it.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}

# The program of a leader has a multiprocessor nearly to itself. ptxas must not spill registers so that more
# programs fit.
REGISTERS = 255
if torch.version.hip is None:
    OPTIONS["maxnreg"] = REGISTERS

# In the forward one program per identity reads features, and in the backward of normalized rows one per
# sample; each of them has all columns. In the backward of plain rows every block of columns has a program,
# and small blocks make many programs.
FORWARD_WARPS, BACKWARD_WARPS, UNIT_BACKWARD_WARPS = 8, 2, 8

# How many members of an identity a program reads at once. No other program hides the latency of a leader's
# reads, so it starts several of them together.
MEMBERS = 4


_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrivals_counter(device: torch.device) -> Tensor:
    """Return an int32 zero that a forward on the current stream may count in, and leaves zero.

    Each stream has one, because its launches follow one another: no launch is spent on clearing it. A
    captured graph may be replayed on another stream beside this one, so its launches get counters of their
    own, which the graph clears.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = (device, stream.cuda_stream)
    if key not in _counters:
        _counters.setdefault(key, _kept_zero(device, stream))
    return _counters[key]


def _kept_zero(device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    """Return an int32 zero that nothing overwrites, cleared on ``stream``.

    A thread of its own makes it: while torch.compile warms up its graphs, what the calling thread allocates
    comes from their memory, which their replays overwrite.
    """

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros((), dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def six(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return a tensor for each of the six sets; a stack is the tensor of all."""
    return tuple(tensors) if len(tensors) == 6 else (tensors[0],) * 6


@dataclass(frozen=True)
class Constants:
    """What a kernel of the loss is compiled for: its parameter `K`."""

    A: tl.dtype  # what is computed in
    LABELS: int  # labels that a program scans at once
    DIMENSIONS: int  # columns that it reads at once
    MEMBERS: int  # rows that it reads at once
    STACKED: bool  # whether the six sets stand in one tensor
    NORMALIZE: bool  # whether rows are divided by their lengths
    DETACH: bool  # whether no gradient flows through the pushed distances; the backward alone reads it


def constants(
    dtype: torch.dtype,
    samples: int,
    dimensions: int,
    warps: int,
    *,
    stacked: bool,
    normalize: bool,
    detach: bool = False,
) -> Constants:
    """Return a kernel's constants: a thread reads 16 bytes of a row at once, and four labels.

    They follow from the shapes alone, so the order of every sum does too.
    """
    columns = 32 * warps * (16 // dtype.itemsize)
    return Constants(
        A=tl.float64 if dtype == torch.float64 else tl.float32,
        LABELS=min(32 * warps * 4, triton.next_power_of_2(samples)),
        DIMENSIONS=min(columns, triton.next_power_of_2(max(1, dimensions))),
        MEMBERS=MEMBERS,
        STACKED=stacked,
        NORMALIZE=normalize,
        DETACH=detach,
    )


@functools.cache
def _launcher(kernel: Any, warps: int, chosen: Constants) -> Launcher:
    return Launcher(kernel, {"K": chosen}, num_warps=warps, **OPTIONS)


@functools.lru_cache(maxsize=1024)
def forward_launcher(
    dtype: torch.dtype, samples: int, dimensions: int, stacked: bool, normalize: bool
) -> Launcher:
    """Return the forward's launcher for so many samples of the larger modality."""
    chosen = constants(dtype, samples, dimensions, FORWARD_WARPS, stacked=stacked, normalize=normalize)
    return _launcher(forward_kernel, FORWARD_WARPS, chosen)


@functools.lru_cache(maxsize=1024)
def backward_launcher(
    dtype: torch.dtype, samples: int, dimensions: int, stacked: bool, normalize: bool, detach: bool
) -> tuple[Launcher, int]:
    """Return the backward's launcher, and how many programs share the columns of a sample."""
    warps = UNIT_BACKWARD_WARPS if normalize else BACKWARD_WARPS
    chosen = constants(dtype, samples, dimensions, warps, stacked=stacked, normalize=normalize, detach=detach)
    blocks = 1 if normalize else triton.cdiv(dimensions, chosen.DIMENSIONS)
    return _launcher(backward_kernel, warps, chosen), blocks


def forward(
    features: Sequence[Tensor],
    labels: Tensor,
    infrared_labels: Tensor,
    margin: float,
    detach_negative: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total (), losses (B_v,), identities (B_v,), count (), and what the backward needs.

    Losses and identities stand in the slots of the identities' leaders; other slots have a loss of 0 and the
    largest int64 as identity.
    """
    readable = [f if f.stride(1) == 1 else f.contiguous() for f in features]
    labels, infrared_labels = labels.contiguous(), infrared_labels.contiguous()
    first, visible, infrared = readable[0], labels.shape[0], infrared_labels.shape[0]
    dtype, dimensions = shapes.precise(first.dtype), first.shape[1]
    total, losses = first.new_empty((), dtype=dtype), first.new_empty(visible, dtype=dtype)
    number, identities = labels.new_empty(()), torch.empty_like(labels)
    weights = first.new_empty(shapes.cqc_saved_on_gpu(visible, infrared, normalize), dtype=dtype)
    sets = six(readable)
    stacked = len(features) == 1
    launch = forward_launcher(first.dtype, max(visible, infrared), dimensions, stacked, normalize)
    with on_device(first.device):
        given = Arguments(
            first.device,
            {
                "labels": labels,
                "infrared_labels": infrared_labels,
                "losses": losses,
                "identities": identities,
                "weights": weights,
                "total": total,
                "number": number,
                "arrivals": arrivals_counter(first.device),
            },
            {"strides": tuple([f.stride(0) for f in sets]), "dimensions": dimensions},
            {"margin": margin, "visible": visible, "infrared": infrared},
            {"features": sets},
        )
        launch(visible + infrared, given)
    return total, losses, identities, number, weights


def backward(
    gradient: Tensor,
    features: Sequence[Tensor],
    labels: Tensor,
    infrared_labels: Tensor,
    weights: Tensor,
    detach_negative: bool,
    normalize: bool,
) -> Tensor:
    """Return the gradient of the six sets, stacked; ``gradient`` is () or, one number per slot, (B_v,)."""
    readable = [f if f.stride(1) == 1 else f.contiguous() for f in features]
    labels, infrared_labels = labels.contiguous(), infrared_labels.contiguous()
    first, visible, infrared = readable[0], labels.shape[0], infrared_labels.shape[0]
    dimensions = first.shape[1]
    made = first.new_empty((3 * (visible + infrared), dimensions))
    launch, blocks = backward_launcher(
        first.dtype, max(visible, infrared), dimensions, len(features) == 1, normalize, detach_negative
    )
    sets = six(readable)
    given = Arguments(
        first.device,
        {"gradient": gradient, "labels": labels, "infrared_labels": infrared_labels, "weights": weights},
        {
            "strides": tuple([f.stride(0) for f in sets]),
            "dimensions": dimensions,
            "gradient_stride": gradient.stride(0) if gradient.dim() else 0,
        },
        {"visible": visible, "infrared": infrared},
        {"features": sets, "gradients": (made,) * 6},
    )
    with on_device(first.device):
        launch((visible + infrared) * blocks, given)
    return made


# --- for torch ------------------------------------------------------------------------------------------

# As csrc/schemas.h has them.
SCHEMAS: dict[str, str] = {
    "cqc_forward": "(Tensor[] features, Tensor labels, Tensor infrared_labels, float margin, "
    "bool detach_negative, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cqc_backward": "(Tensor gradient, Tensor[] features, Tensor labels, Tensor infrared_labels, "
    "Tensor saved, bool detach_negative, bool normalize) -> Tensor",
}

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"cqc_forward": forward, "cqc_backward": backward}


def _saved(labels: Tensor, infrared_labels: Tensor, normalize: bool) -> tuple[int, ...]:
    return (shapes.cqc_saved_on_gpu(labels.shape[0], infrared_labels.shape[0], normalize),)


FAKES: dict[str, Callable[..., Any]] = {
    "cqc_forward": shapes.cqc_forward_fake(_saved),
    "cqc_backward": shapes.cqc_backward_fake,
}
