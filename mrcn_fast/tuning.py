"""Which kernels serve a map on a GPU by measurement: `tune` measures, a file keeps it, dispatch reads it.

A choice belongs to a GPU and to the planes of a map: gate, dtype, layout, channels and pixels. It holds for
every operation and batch size, so that they go on giving the same bits. The file has the choices of all
machines that share the folder. A choice counts only where GPU, driver, torch, Triton and this library are
those that it was measured with.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from mrcn_fast.backends import shapes, triton
from mrcn_fast.files import write_json
from mrcn_fast.gates import FUSED

logger = logging.getLogger("mrcn_fast")

ENVIRONMENT_VARIABLE: Final = "MRCN_FAST_TUNE"
FORMAT: Final = 1
DEVICE_TYPES: Final = ("cuda",)  # of whose tensors there are choices
BACKENDS: Final = ("triton", "cuda")
WAYS: Final = ("forward", "backward")
LAYOUTS: Final = ("nchw", "channels_last")
DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in shapes.DTYPES}

Shape = tuple[int, int, int, int]


class Planes(NamedTuple):
    """The planes of a map, as far as the choice of kernels depends on them.

    Attributes:
        gate: the block's
        dtype: of the map
        channels_last: whether the map lies in memory as channels_last
        channels: C
        pixels: H·W
    """

    gate: str
    dtype: torch.dtype
    channels_last: bool
    channels: int
    pixels: int


class Choice(NamedTuple):
    """What was measured for some planes, and which kernels serve them therefore.

    Attributes:
        shape: (N, C, H, W) of the maps that were measured
        backend: "triton" or "cuda"
        held: the ways, "forward" and "backward", in which the CUDA kernels hold samples in shared memory
        measured: the day of the measurement, as 2026-11-30
        us: microseconds of the GPU by variant and way
    """

    shape: Shape
    backend: str
    held: tuple[str, ...]
    measured: str
    us: dict[str, dict[str, float]]


Choices = Mapping[Planes, Choice]


def tune(
    shapes: Sequence[Shape] | None = None,
    *,
    gate: str = "se",
    dtypes: Sequence[str] = ("fp32", "bf16"),
    layouts: Sequence[str] = LAYOUTS,
    seconds: float = 0.5,
    device: str = "cuda",
) -> dict[Planes, Choice]:
    """Measure which kernels of the block are the fastest on a GPU, and use them from now on.

    Every variant that serves here (Triton's kernels; the CUDA kernels with and without samples held in shared
    memory) is first compared with the reference. Then all are timed in turn, each with a cold cache, forward
    and backward. The choices are kept in the user's cache folder and hold for later processes too.

    Args:
        shapes: (N, C, H, W) of maps; where left out those of the paper's network, 16×64×72×32 and
            16×256×72×32
        gate: the block's gate, one with kernels
        dtypes: names from "fp32" and "bf16"
        layouts: names from "nchw" and "channels_last"
        seconds: measuring time per shape, dtype, layout and way
        device: the GPU, as torch names it

    Returns:
        The choice for each planes that was measured.

    Raises:
        ValueError: there is no GPU, or only one variant serves; the message says which.
        OSError: before anything is measured, where the file can't be written.

    Example:
        >>> import mrcn_fast
        >>> mrcn_fast.tune([(16, 64, 72, 32)], dtypes=["bf16"])  # doctest: +SKIP
    """
    # Imported here, because it imports the block, which imports this module.
    from mrcn_fast.benchmark.suites import tune as suite

    return suite.tune(
        suite.Tuning(
            shapes=tuple(shapes or suite.SHAPES),
            gate=gate,
            dtypes=tuple(dtypes),
            layouts=tuple(layouts),
            seconds=seconds,
            device=device,
        )
    )


# --- for dispatch -----------------------------------------------------------------------------------------


def enabled() -> bool:
    """Whether choices are read: MRCN_FAST_TUNE=0 leaves the static choice in place."""
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: got {value!r}, expected 0 or 1")
    return value == "1"


def load(device: torch.device) -> dict[Planes, Choice]:
    """The choices for a device; none on the CPU, without a file of this machine, or with MRCN_FAST_TUNE=0."""
    if device.type not in DEVICE_TYPES or not enabled():
        return {}
    return _of(machine(device)) if _entries() else {}


def _of(machine: dict[str, str]) -> dict[Planes, Choice]:
    """The choices of the file for a machine."""
    found = [choice for entry in _entries() if entry["machine"] == machine for choice in entry["choices"]]
    return dict(map(_read_choice, found))


def planes_of(gate: str, dtype: torch.dtype, channels_last: bool, shape: Sequence[int]) -> Planes:
    """The planes of a map of this shape, (N, C, H, W)."""
    _, channels, height, width = shape
    return Planes(gate, dtype, channels_last, channels, height * width)


def held_numbers(choices: Choices) -> list[int]:
    """The choices as csrc's operation `set_held` takes them."""
    return [
        int(number)
        for planes, choice in choices.items()
        for number in (
            *(FUSED.index(planes.gate), shapes.DTYPES.index(planes.dtype), planes.channels_last),
            *(planes.channels, planes.pixels, *(way in choice.held for way in WAYS)),
        )
    ]


# --- the file ---------------------------------------------------------------------------------------------


def file() -> Path:
    """The file of the choices: mrcn_fast/tuned.json in $XDG_CACHE_HOME, by default ~/.cache.

    Raises OSError where there is neither.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "mrcn_fast" / "tuned.json"
    except RuntimeError:
        raise OSError("no home folder for the measured choices: give a folder by XDG_CACHE_HOME") from None


def file_text() -> str:
    """The path of the file for a message, also where there is none."""
    try:
        return str(file())
    except OSError:
        return "the file of measured choices"


def machine(device: torch.device) -> dict[str, str]:
    """What a choice holds for."""
    import mrcn_fast  # it is complete only after it has imported this module

    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.version(),
        "mrcn_fast": mrcn_fast.__version__,
    }


def _driver(module: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's driver, as Linux has it; "unknown" elsewhere."""
    try:
        found = re.search(r"\d+\.\d[\d.]*", module.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    return found[0] if found else "unknown"


def save(device: torch.device, choices: Choices) -> Path:
    """Enter the choices into the file, in place of earlier ones for the same planes on this machine."""
    forget()  # another process may have written since this one read
    here = machine(device)
    written = [_written(planes, choice) for planes, choice in (_of(here) | dict(choices)).items()]
    others = [entry for entry in _entries() if entry["machine"] != here]
    path = file()
    write_json(path, {"format": FORMAT, "machines": [*others, {"machine": here, "choices": written}]})
    forget()
    return path


def forget() -> None:
    """Read the file again when it is next asked for."""
    _entries.cache_clear()


@functools.cache  # one reading, and one warning
def _entries() -> list[dict[str, Any]]:
    """The file's entries, one per machine; none, after a warning, where it is not a file of ours."""
    try:
        path = file()
        content = json.loads(path.read_text(encoding="utf-8"))
        _check(content)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is ignored, and the static choice of kernels holds: %s", file_text(), error)
        return []
    entries: list[dict[str, Any]] = content["machines"]
    return entries


def _check(content: Any) -> None:
    """Raise ValueError where the content is not what `save` writes."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT} of `mrcn-fast tune`")
    machines = content.get("machines")
    if not isinstance(machines, list):
        raise ValueError("expected a list of machines")
    for entry in machines:
        if not isinstance(entry, dict) or not isinstance(entry.get("machine"), dict):
            raise ValueError("expected a machine in each entry")
        if not isinstance(entry.get("choices"), list):
            raise ValueError("expected a list of choices for each machine")
        for choice in entry["choices"]:
            _read_choice(choice)


def _read_choice(content: Any) -> tuple[Planes, Choice]:
    """A choice of the file. Raises ValueError where it is none."""
    if not isinstance(content, dict):
        raise ValueError(f"expected a choice, found {content!r}")

    def one_of(name: str, known: Iterable[str]) -> str:
        value = content.get(name)
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(known)}")
        return value

    shape, held, us = content.get("shape"), content.get("held"), content.get("us")
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"shape: found {shape!r}, expected four numbers above 0")
    if not isinstance(held, list) or not all(way in WAYS for way in held):
        raise ValueError(f"held: found {held!r}, expected some of {', '.join(WAYS)}")
    if not isinstance(us, dict) or not all(_is_times(times) for times in us.values()):
        raise ValueError(f"us: found {us!r}, expected microseconds by variant and way")
    measured = content.get("measured")
    try:
        date.fromisoformat(measured if isinstance(measured, str) else "")
    except ValueError:
        raise ValueError(f"measured: found {measured!r}, expected a day") from None
    planes = planes_of(
        one_of("gate", FUSED),
        DTYPES[one_of("dtype", DTYPES)],
        one_of("layout", LAYOUTS) == LAYOUTS[1],
        shape,
    )
    n, c, h, w = shape
    return planes, Choice((n, c, h, w), one_of("backend", BACKENDS), tuple(held), str(measured), us)


def _is_times(times: Any) -> bool:
    return (
        isinstance(times, dict)
        and sorted(times) == sorted(WAYS)
        and all(type(us) in (int, float) for us in times.values())
    )


def _written(planes: Planes, choice: Choice) -> dict[str, Any]:
    """A choice as the file has it."""
    return {
        "gate": planes.gate,
        "dtype": str(planes.dtype).removeprefix("torch."),
        "layout": LAYOUTS[planes.channels_last],
        **choice._asdict(),
    }


# --- for people -------------------------------------------------------------------------------------------


def described(planes: Planes, choice: Choice) -> str:
    """A choice as a line of text."""
    held = f", held {' and '.join(choice.held)}" if choice.held and choice.backend == "cuda" else ""
    times = "; ".join(
        f"{name} {times['forward']:.1f} + {times['backward']:.1f}" for name, times in choice.us.items()
    )
    shape = "x".join(map(str, choice.shape))
    kind = f"{planes.gate} {str(planes.dtype).removeprefix('torch.')} {LAYOUTS[planes.channels_last]}"
    return f"{shape} {kind}: {choice.backend}{held} ({times} us forward + backward, {choice.measured})"
