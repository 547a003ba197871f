"""Backend of csrc's CUDA kernels, which nvcc compiled with the rest: CUDA tensors, where it is asked for.

The operations are cpu.py's ``torch.ops.mrcn_fast.*``: a library of its own, `LIBRARY`, registers kernels
for CUDA tensors under them, and torch's dispatcher goes by the tensors. It is loaded where such a tensor is
first served, never on a machine without a GPU, so that one wheel serves any torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mrcn_fast.backends import cpu, shapes

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
# Whose tensors it takes by itself: nobody's, as long as Triton's kernels take less of a GPU's time.
DEVICES: tuple[str, ...] = ()

GET_IT = "build it with `make install`, where there is nvcc 12.4 or newer"


def _record() -> dict[str, Any]:
    """What setup.py tells of the CUDA part; empty if nothing."""
    record = json.loads(cpu.BUILD_RECORD.read_text()) if cpu.BUILD_RECORD.exists() else {}
    return dict(record.get("cuda", {}))


@functools.cache
def _absent() -> str:  # every call asks for the status
    """Why the library is not there; empty if it is."""
    record = _record()
    if not record:
        return f"the CUDA part is absent; {GET_IT}"
    if not record["built"]:
        return f"the CUDA part was not built: {record['reason']}"
    return "" if LIBRARY.is_file() else f"the CUDA part was built, but {LIBRARY.name} is gone; {GET_IT}"


def build_info() -> dict[str, Any]:
    """The GPUs that the CUDA part was built for, those it was not, nvcc's version; empty if there is none."""
    if _absent():
        return {}
    record = _record()
    info = {"built for": _names(record["archs"]), "nvcc": record["nvcc"]}
    if record["left_out"]:
        info["left out"] = f"{_names(record['left_out'])}, which this nvcc does not know"
    return info


def _names(archs: list[int]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)


def status() -> tuple[bool, str]:
    """Whether the CUDA part is there and has a GPU to run on, and which or why not."""
    if reason := _absent():
        return False, reason
    if not cpu.loaded():
        return False, f"its operations are those of the native library, and {cpu.status()[1]}"
    if torch.version.hip is not None:
        return False, "its kernels are NVIDIA's, and this torch is built for ROCm, where Triton's serve"
    if not torch.cuda.is_available():
        return False, f"torch sees no GPU here; its kernels are built for {_names(_record()['archs'])}"
    return _describe()


@functools.cache
def _describe() -> tuple[bool, str]:
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    archs: list[int] = _record()["archs"]
    capability, oldest = 10 * major + minor, min(archs)
    if capability < oldest:
        return False, (
            f"its kernels are built for {_names(archs)}, and {name} is an sm_{capability}; "
            f"MRCN_FAST_CUDA_ARCHS={capability} make install builds them for it"
        )
    # Code serves its own generation, from the GPU it was made for on; the oldest one's PTX all that follow.
    ready = any(arch // 10 == major and arch <= capability for arch in archs)
    compiled = "" if ready else f" (sm_{capability}: compiled by the driver when they load)"
    return True, (
        f"CUDA C++ kernels for {_names(archs)} on {name}{compiled}; serves where it is asked for: Triton's "
        "serve CUDA tensors by default, and take less of the GPU's time, but more of the host's"
    )


def serves(device_type: str, dtype: torch.dtype) -> str | None:
    """Why such tensors can't be served; None where they can, and then the kernels are there."""
    if device_type != "cuda":
        return f"it serves CUDA tensors, got a tensor on {device_type!r}"
    if dtype not in shapes.DTYPES:
        return f"it serves {', '.join(map(str, shapes.DTYPES))}, got {dtype}"
    return _load()  # here, because torch.compile traces `operation` but not what chooses a backend


@functools.cache
def _load() -> str | None:
    """Loads the library, once; why it can't be, if it can't."""
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the CUDA part does not load: {error.__cause__ or error}. Reinstall with this torch."
    for device, planes in _held.items():
        torch.ops.mrcn_fast.set_held(device, planes)
    return None


_held: dict[int, list[int]] = {}  # what `hold` was given, by device


def hold(device: int, planes: list[int]) -> None:
    """Say of a device which planes its kernels hold in shared memory, as csrc's `set_held` takes them."""
    _held[device] = planes
    if _load.cache_info().currsize > 0 and _load() is None:
        torch.ops.mrcn_fast.set_held(device, planes)


def operation(name: str) -> Callable[..., Any]:
    """``torch.ops.mrcn_fast.<name>.default``, once `serves` has said that it can serve."""
    return getattr(torch.ops.mrcn_fast, name).default
