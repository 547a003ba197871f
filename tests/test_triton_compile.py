"""Every Triton kernel compiled ahead of time, without a GPU: registers, spills, shared memory.

The launchers are run on meta tensors, so what is compiled is what they would launch. The table stands in
pytest's summary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this machine")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter is on: nothing is compiled", allow_module_level=True)

from triton.compiler import ASTSource  # noqa: E402

from mrcn_fast.backends.triton import operations  # noqa: E402
from mrcn_fast.backends.triton.launch import Arguments, Launcher  # noqa: E402
from mrcn_fast.gates import FUSED, GATES  # noqa: E402
from mrcn_fast.operations import OPERATIONS  # noqa: E402
from tests.support.ahead import TARGETS, TYPES, usage  # noqa: E402

PAPER = [(16, 64, 72, 32), (16, 256, 72, 32), (8, 512, 36, 16)]


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    warps: int


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Launch]]:
    """What the launchers would have launched."""
    found: list[Launch] = []

    def record(launcher: Launcher, _: int, given: Arguments) -> None:
        arguments = launcher.ordered(given)
        found.append(Launch(launcher.kernel, arguments, launcher.options["num_warps"]))

    monkeypatch.setattr(Launcher, "__call__", record)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield found


def run(
    mode: str, gate: str, shape: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool
) -> None:
    """Forward and backward of meta tensors; parameters in float32 as under autocast."""
    modalities, gates = len(OPERATIONS[mode].inputs), len(OPERATIONS[mode].gates)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    channels, hidden = shape[1], max(1, shape[1] // 16)
    precise = torch.float64 if dtype == torch.float64 else torch.float32

    def empty(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=precise, device="meta")

    norm = empty(modalities, channels)
    shapes = GATES[gate].shapes(channels, 5 if gate == "eca" else hidden)
    parameters = [empty(gates, *size) for size in shapes.values()]
    inputs = [x] * modalities
    *made, statistics = operations.forward(mode, inputs, norm, norm, parameters, FUSED.index(gate), 1e-5)
    operations.backward(mode, made, inputs, statistics, norm, norm, parameters, FUSED.index(gate))


def source(launch: Launch) -> ASTSource:
    """The kernel specialized as Triton does it at a launch: ones and multiples of 16 are known."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, place: tuple[int, ...], general: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(member, (*place, k), general) for k, member in enumerate(value))
        if not isinstance(value, int | torch.Tensor) or (type(value) is int and value == 1 and not general):
            constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not general):
            attributes[place] = [["tt.divisibility", 16]]
        return f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"

    signature = {
        parameter.name: kind(value, (position,), parameter.do_not_specialize)
        for position, (parameter, value) in enumerate(
            zip(launch.kernel.params, launch.arguments, strict=True)
        )
    }
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def check(
    launches: list[Launch], target: Any, folder: Path, case: str, tell: Callable[[str, object], None]
) -> None:
    spilled = []
    for launch in launches:
        used = usage(source(launch), target, folder, num_warps=launch.warps, enable_fp_fusion=False)
        line = (
            f"{launch.kernel.__name__:18} {target.arch!s:7} {case:45} {used.registers:4} registers, "
            f"{used.spilled + used.scalars} spilled, {used.shared} bytes shared"
        )
        tell("resources", line)
        if used.spilled or used.scalars:
            spilled.append(line)
    assert not spilled, "\n".join(spilled)


# Target, dtype, channels_last, shapes: all three where a thread holds most coefficients.
PAPER_CASES = [
    ("sm_90", torch.bfloat16, True, PAPER),
    ("sm_90", torch.float32, False, PAPER[1:2]),
    ("sm_80", torch.bfloat16, False, PAPER[1:2]),
    ("sm_100", torch.bfloat16, True, PAPER[1:2]),
    ("gfx942", torch.float32, False, PAPER[1:2]),
    ("gfx942", torch.bfloat16, True, PAPER[1:2]),
]


@pytest.mark.parametrize(("target", "dtype", "channels_last", "shapes"), PAPER_CASES)
def test_the_papers_block_spills_nothing(
    target: str,
    dtype: torch.dtype,
    channels_last: bool,
    shapes: list[tuple[int, int, int, int]],
    launches: list[Launch],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    for shape in shapes:
        launches.clear()
        run("pair", "se", shape, dtype, channels_last)
        layout = "channels_last" if channels_last else "nchw"
        case = f"pair se {TYPES[dtype]} {layout} {'x'.join(map(str, shape))}"
        check(launches, TARGETS[target], tmp_path, case, record_property)


# Every mode, gate and dtype, and the shapes at the ends of the configurations.
OTHER_CASES = [
    ("gfx942", "concat", "cbam-channel", (16, 256, 72, 32), torch.float16),
    ("sm_80", "pair", "eca", (16, 256, 72, 32), torch.float16),
    ("sm_90", "restitute", "cbam-channel", (16, 256, 72, 32), torch.float32),
    ("sm_90", "snr", "se", (16, 256, 72, 32), torch.float32),
    ("sm_90", "concat", "cbam-channel", (8, 2048, 18, 8), torch.float32),
    ("sm_90", "concat", "cbam-channel", (2, 37, 17, 15), torch.float64),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "mode", "gate", "shape", "dtype"), OTHER_CASES)
def test_other_operations_spill_nothing(
    target: str,
    mode: str,
    gate: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    launches: list[Launch],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    run(mode, gate, shape, dtype, channels_last=False)
    case = f"{mode} {gate} {TYPES[dtype]} {'x'.join(map(str, shape))}"
    check(launches, TARGETS[target], tmp_path, case, record_property)


@pytest.mark.slow
def test_joining_the_most_parts_spills_nothing(
    launches: list[Launch], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run("pair", "cbam-channel", (1, 256, 288, 128), torch.bfloat16, channels_last=True)
    check(launches, TARGETS["sm_90"], tmp_path, "pair cbam-channel bf16 1x256x288x128", record_property)
