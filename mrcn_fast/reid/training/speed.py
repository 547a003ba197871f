"""What the setting `speed` chooses on a device, and what it says about a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Final

import torch
from lightning_fabric import Fabric

from mrcn_fast.backends import cpu
from mrcn_fast.reid.kinds import Precision
from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.fast import FastStep
from mrcn_fast.reid.training.step import TrainingStep

# Height and width from which on a step is faster on a CPU: in bf16 and channels_last where the processor has
# instructions for bf16, and in float32 and channels_last elsewhere. On the last maps of images below 64 x 32,
# torch's bf16 convolution of stride 2 also reads memory that is not its own where the processor has AMX (seen
# with torch 2.13: random NaN).
_SMALLEST_IN_BF16: Final = (96, 48)
_SMALLEST_IN_CHANNELS_LAST: Final = (256, 128)


def resolved(config: TrainConfig) -> TrainConfig:
    """Fill in the precision and the memory layout that `speed` leaves to the device.

    On a CUDA device these are bf16-mixed and channels_last. On a CPU with instructions for bf16 they are the
    same, for images of at least 96 x 48 pixels. On other CPUs and for smaller images they are float32 and
    NCHW, or channels_last from 256 x 128 pixels on. Devices on which nothing was measured get the speed
    "plain". Values that are given stay.

    Example:
        >>> config = resolved(TrainConfig(data="", accelerator="cpu", precision="32-true"))
        >>> config.speed, config.precision, config.channels_last
        ('auto', '32-true', True)
    """
    device = _device_type(config.accelerator)
    if config.speed == "plain" or device not in ("cpu", "cuda"):
        return dataclasses.replace(config, speed="plain")
    fast: Precision = "bf16-mixed" if device == "cuda" or _computes_bf16(config) else "32-true"
    precision, channels_last = config.precision or fast, config.channels_last
    if channels_last is None:
        large = _at_least(config, _SMALLEST_IN_CHANNELS_LAST)
        channels_last = device == "cuda" or precision != "32-true" or large
    return dataclasses.replace(config, precision=precision, channels_last=channels_last)


def _device_type(accelerator: str) -> str:
    """The type of the device that lightning-fabric opens for an accelerator's name."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _computes_bf16(config: TrainConfig) -> bool:
    """Whether this CPU multiplies in bf16, and the images are large enough for it."""
    return _at_least(config, _SMALLEST_IN_BF16) and cpu.build_info().get("isa") == "avx512bf16"


def _at_least(config: TrainConfig, size: tuple[int, int]) -> bool:
    return config.height >= size[0] and config.width >= size[1]


def compile_trunk(model: ReIDModel) -> None:
    """Have torch.compile compile the stems and each layer of the trunk when they first run."""
    for part in model.trunk.children():
        part.compile(dynamic=False)


def make_step(
    parts: Collection[str], callbacks: Collection[object], **shared: Any
) -> tuple[TrainingStep, str]:
    """Make the object that takes the steps of a run, as its `speed` asks.

    Args:
        parts: kinds of the caller's own parts: model, loss, optimizer
        callbacks: of the caller
        shared: the fields of a TrainingStep

    Returns:
        the step, and how it is taken, in words
    """
    config, fabric = shared["config"], shared["fabric"]
    words = [config.precision, "channels_last" if config.channels_last else "NCHW"]
    words += ["compiled trunk"] * config.compile
    why_plain = _why_not_fast(config, fabric, parts)
    if why_plain is not None:
        reason = f" ({why_plain})" * (config.speed == "auto")
        return TrainingStep(**shared), ", ".join([*words, f"eager{reason}"])
    why_eager = _why_not_captured(fabric, parts, callbacks)
    # Callbacks look at the weights right after each step.
    step = FastStep(**shared, late=0 if callbacks else 1, captures=why_eager is None)
    words += ["fused optimizer", why_eager or "a CUDA graph from the fourth step on"]
    return step, ", ".join(words)


def _why_not_fast(config: TrainConfig, fabric: Fabric, parts: Collection[str]) -> str | None:
    """Why the host reads the loss before each update; None where the device may leave an update out."""
    if config.speed == "plain":
        return "as asked for"
    if config.precision == "16-mixed":
        return "the gradient scaler of 16-mixed decides about each update"
    if config.accumulate > 1:
        return "a step has several batches"
    if "optimizer" in parts or config.own_optimizer:
        return "an optimizer of your own may not leave an update out"
    return "several processes decide together about each update" if fabric.world_size > 1 else None


def _why_not_captured(fabric: Fabric, parts: Collection[str], callbacks: Collection[object]) -> str | None:
    """Why fast steps don't become a CUDA graph; None where they do.

    A graph repeats the kernels of the step that was captured, whatever Python would decide anew.
    """
    if fabric.device.type != "cuda":
        return "eager"
    if parts:
        return f"eager (your own {' and '.join(parts)} may do something else in each step)"
    return "eager (callbacks may change what a CUDA graph would hold)" if callbacks else None
