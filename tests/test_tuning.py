"""Kernels chosen by measurement: the file, the keys, dispatch's choice, and the loop that measures.

No GPU is needed. Stand-ins serve CPU tensors in the names of a GPU's backends, and a table of times takes the
place of the clock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mrcn_fast
from mrcn_fast import MRCNBlock, dispatch, tuning
from mrcn_fast.backends import cpu, cuda
from mrcn_fast.benchmark.suites import tune as suite
from mrcn_fast.benchmark.timing import EXACT, Calls, Timing
from mrcn_fast.cli import main
from mrcn_fast.tuning import Choice, Planes
from tests.support import matrix
from tests.support.tensors import same_bits

DEVICE = torch.device("cuda", 0)
SHAPE = (2, 4, 4, 3)
PLANES = Planes("se", torch.float32, False, 4, 12)
CHOICE = Choice(SHAPE, "cuda", ("forward",), "2026-11-30", {"triton": {"forward": 25.1, "backward": 37.0}})
needs_cpu_kernels = matrix.backends("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """As if there were a GPU, and a cache folder with nothing in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MRCN_FAST_TUNE")
    monkeypatch.delenv("MRCN_FAST_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA X")
    monkeypatch.setattr(tuning, "_driver", lambda: "580.1")
    return monkeypatch


# --- the file ---------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tuning.save(DEVICE, {PLANES: CHOICE})
    assert path == tmp_path / "mrcn_fast" / "tuned.json"
    assert tuning.load(DEVICE) == {PLANES: CHOICE}
    # A later measurement of the same planes replaces the earlier one, and others stay.
    other = PLANES._replace(dtype=torch.bfloat16, channels_last=True)
    tuning.save(DEVICE, {other: CHOICE})
    tuning.save(DEVICE, {PLANES: CHOICE._replace(backend="triton", held=())})
    assert {planes: choice.backend for planes, choice in tuning.load(DEVICE).items()} == {
        PLANES: "triton",
        other: "cuda",
    }
    assert tuning.load(torch.device("cpu")) == {}


def test_a_choice_holds_for_its_machine_alone(gpu: pytest.MonkeyPatch) -> None:
    tuning.save(DEVICE, {PLANES: CHOICE})
    here = tuning.machine(DEVICE)
    assert here["gpu"] == "NVIDIA X" and here["driver"] == "580.1"
    assert here["torch"] == torch.__version__ and here["mrcn_fast"] == mrcn_fast.__version__
    for name in ("gpu", "driver", "torch", "triton", "mrcn_fast"):
        with gpu.context() as other:
            other.setattr(tuning, "machine", lambda _, name=name: here | {name: "another"})
            assert tuning.load(DEVICE) == {}, name
            tuning.save(DEVICE, {PLANES: CHOICE._replace(backend="triton")})
        assert tuning.load(DEVICE) == {PLANES: CHOICE}, "the other machine's choice stands beside it"


def test_what_another_process_has_saved_stays(gpu: pytest.MonkeyPatch) -> None:
    path = tuning.save(DEVICE, {PLANES: CHOICE})
    saved = path.read_bytes()
    path.unlink()
    tuning.forget()
    assert tuning.load(DEVICE) == {}
    path.write_bytes(saved)  # by the other process
    other = PLANES._replace(channels=8)
    tuning.save(DEVICE, {other: CHOICE._replace(shape=(2, 8, 4, 3))})
    assert tuning.load(DEVICE).keys() == {PLANES, other}


def test_the_folder(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu.setattr(Path, "home", lambda: tmp_path / "home")
    for given in ("", "relative"):
        gpu.setenv("XDG_CACHE_HOME", given)
        assert tuning.file() == tmp_path / "home" / ".cache" / "mrcn_fast" / "tuned.json"


def test_the_drivers_version(tmp_path: Path) -> None:
    version = tmp_path / "version"
    assert tuning._driver(version) == "unknown"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert tuning._driver(version) == "580.95.05"
    version.write_text("nothing")
    assert tuning._driver(version) == "unknown"


def with_choice(**changes: object) -> str:
    choice = tuning._written(PLANES, CHOICE) | changes
    return json.dumps({"format": 1, "machines": [{"machine": {}, "choices": [choice]}]})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Expecting"),
        ("[" * 100_000, "recursion"),
        ('{"format": 2, "machines": []}', "expected format 1"),
        ("[]", "expected format 1"),
        ('{"format": 1}', "expected a list of machines"),
        ('{"format": 1, "machines": [{}]}', "expected a machine"),
        ('{"format": 1, "machines": [{"machine": {}}]}', "expected a list of choices"),
        ('{"format": 1, "machines": [{"machine": {}, "choices": [1]}]}', "expected a choice, found 1"),
        (with_choice(shape=[1, 2, 3]), "shape: found"),
        (with_choice(shape=[1, 2, 3, True]), "shape: found"),
        (with_choice(gate="gate"), "gate: found 'gate', expected one of se"),
        (with_choice(dtype=["float32"]), "dtype: found"),
        (with_choice(layout="nhwc"), "layout: found 'nhwc'"),
        (with_choice(backend="reference"), "backend: found 'reference', expected one of triton, cuda"),
        (with_choice(held=["both"]), "held: found"),
        (with_choice(us={"triton": {"forward": "1", "backward": 2}}), "us: found"),
        (with_choice(measured="today"), "measured: found 'today'"),
    ],
)
def test_a_file_that_is_not_ours_is_ignored_with_one_warning(
    content: str, told: str, gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuning.file()
    path.parent.mkdir()
    path.write_text(content)
    for device in (DEVICE, torch.device("cuda", 1), DEVICE):
        assert dispatch.tuned(device) == {}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "mrcn_fast"
    assert str(path) in record.getMessage() and told in record.getMessage()
    tuning.save(DEVICE, {PLANES: CHOICE})
    assert tuning.load(DEVICE) == {PLANES: CHOICE}, "a measurement replaces it"


def test_without_a_file_there_is_no_warning(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert dispatch.tuned(DEVICE) == {}
    assert not caplog.records


# --- dispatch ---------------------------------------------------------------------------------------------


class StandIn(SimpleNamespace):
    """A backend of a GPU's name that serves CPU tensors by the CPU's kernels, and keeps what it was asked."""

    def __init__(self, *, default: bool) -> None:
        super().__init__(status=lambda: (True, "stands in"), serves=cpu.serves)
        self.DEVICES = ("cpu",) if default else ()
        self.asked: list[str] = []
        self.held: dict[int | None, list[int]] = {}

    def operation(self, name: str) -> Callable[..., Any]:
        self.asked.append(name)
        return cpu.operation(name)

    def hold(self, device: int | None, planes: list[int]) -> None:
        self.held[device] = planes


@pytest.fixture
def stand_ins(gpu: pytest.MonkeyPatch) -> Iterator[dict[str, StandIn]]:
    """Triton serves CPU tensors by default, CUDA where it is chosen; the file has PLANES for the CPU."""
    made = {"triton": StandIn(default=True), "cuda": StandIn(default=False)}
    gpu.setattr(dispatch, "KERNELS", made)
    gpu.setattr(tuning, "DEVICE_TYPES", ("cpu",))
    gpu.setattr(tuning, "load", lambda _: {PLANES: CHOICE} if tuning.enabled() else {})
    yield made


def maps(shape: tuple[int, ...] = SHAPE, **kind: Any) -> Tensor:
    return torch.randn(shape).to(**kind) if kind else torch.randn(shape)


def chosen(x: Tensor, requested: str | None = None, gate: str = "se") -> str:
    found = dispatch.choose_for(requested, x, gate)
    assert found == dispatch.choose_for_plain(requested, x, gate)
    return found


def test_the_measured_backend_serves_its_planes_alone(stand_ins: dict[str, StandIn]) -> None:
    for shape in (SHAPE, (7, 4, 4, 3), (1, 4, 12, 1)):
        assert chosen(maps(shape)) == chosen(maps(shape), "auto") == "cuda"
    for x, gate in (
        (maps((2, 5, 4, 3)), "se"),
        (maps((2, 4, 4, 4)), "se"),
        (maps(), "eca"),
        (maps(dtype=torch.bfloat16), "se"),
        (maps(memory_format=torch.channels_last), "se"),
        (maps((2, 4, 4, 6))[..., ::2], "se"),
        (maps((4, 4)), "se"),
    ):
        assert chosen(x, gate=gate) == "triton"
    assert stand_ins["cuda"].held == {None: [0, 0, 0, 4, 12, 1, 0]}


def test_what_pins_the_choice(stand_ins: dict[str, StandIn], gpu: pytest.MonkeyPatch) -> None:
    assert chosen(maps(), "triton") == "triton" and chosen(maps(), "reference") == "reference"
    gpu.setenv("MRCN_FAST_BACKEND", "triton")
    assert chosen(maps()) == "triton" and chosen(maps(), "auto") == "cuda"
    gpu.delenv("MRCN_FAST_BACKEND")
    dispatch.forget_tuned()
    gpu.setenv("MRCN_FAST_TUNE", "0")
    assert chosen(maps()) == "triton"
    dispatch.forget_tuned()
    gpu.setenv("MRCN_FAST_TUNE", "yes")
    with pytest.raises(ValueError, match="MRCN_FAST_TUNE: got 'yes', expected 0 or 1"):
        chosen(maps())


def test_a_measured_backend_that_can_no_longer_serve(
    stand_ins: dict[str, StandIn], gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(stand_ins["cuda"], "status", lambda: (False, "it is gone"))
    assert chosen(maps()) == "triton"


def test_the_file_is_read_once(stand_ins: dict[str, StandIn], gpu: pytest.MonkeyPatch) -> None:
    assert chosen(maps()) == "cuda"
    gpu.setattr(tuning, "load", lambda _: pytest.fail("it is read again"))
    assert chosen(maps()) == "cuda"


@needs_cpu_kernels
def test_every_operation_and_its_backward_go_to_it(backend: str, stand_ins: dict[str, StandIn]) -> None:
    block, x = MRCNBlock(4), maps().requires_grad_()
    block(x, x, concat=True).sum().backward()
    block.restitute(x, "visible")
    assert stand_ins["cuda"].asked == [
        *("block_concat_forward", "block_concat_backward", "restitute_forward", "restitute_backward")
    ]
    assert not stand_ins["triton"].asked
    with pytest.raises(ValueError, match="got 3 dimensions"):
        block(x[0], x[0])
    assert torch.vmap(lambda v: block(v, v, concat=True))(torch.stack([x.detach()] * 2)).shape[0] == 2


@needs_cpu_kernels
def test_a_compiled_call(backend: str, stand_ins: dict[str, StandIn]) -> None:
    torch._dynamo.reset()
    block = MRCNBlock(4).requires_grad_(False)
    compiled = torch.compile(lambda x: block(x, x, concat=True), backend="eager", fullgraph=True)
    x, other = maps(), maps((2, 4, 5, 3))
    assert same_bits(compiled(x), block(x, x, concat=True))
    assert set(stand_ins["cuda"].asked) == {"block_concat_forward", "block_concat_backward"}
    assert not stand_ins["triton"].asked
    compiled(other)
    assert stand_ins["triton"].asked
    torch._dynamo.reset()
    # Code for maps of any height is not for those that were measured, and need not become theirs.
    stand_ins["cuda"].asked.clear()
    torch._dynamo.mark_dynamic(x, 2)
    compiled(x)
    assert not stand_ins["cuda"].asked
    torch._dynamo.reset()


@needs_cpu_kernels
def test_without_the_part_of_torch_that_compares_sizes(
    backend: str, stand_ins: dict[str, StandIn], gpu: pytest.MonkeyPatch
) -> None:
    from torch.fx.experimental import symbolic_shapes

    gpu.delattr(symbolic_shapes, "statically_known_true")
    assert not mrcn_fast.internals.always_equal(3, 3)


def test_planes_reach_the_library_before_and_after_it_is_loaded(gpu: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, list[int]]] = []
    gpu.setattr(cuda, "_held", {})
    gpu.setattr(torch.ops, "load_library", lambda _: None)
    gpu.setattr(torch.ops.mrcn_fast, "set_held", lambda *given: told.append(given), raising=False)
    cuda._load.cache_clear()
    try:
        cuda.hold(0, [1])
        assert not told
        assert cuda._load() is None and told == [(0, [1])]
        cuda.hold(1, [2])
        assert told == [(0, [1]), (1, [2])]
    finally:
        cuda._load.cache_clear()


# --- what it says -----------------------------------------------------------------------------------------


def test_backends_and_info_say_what_was_measured(
    gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, found in (("is_available", True), ("current_device", 0), ("device_count", 1)):
        gpu.setattr(torch.cuda, name, lambda found=found: found)
    gpu.setattr(dispatch.KERNELS["cuda"], "status", lambda: (True, "CUDA on NVIDIA X"))
    gpu.setattr(dispatch.KERNELS["cuda"], "hold", lambda *_: None)
    gpu.setattr(dispatch.KERNELS["triton"], "status", lambda: (True, "Triton on NVIDIA X"))
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "cuda:0 the static choice for all maps: nothing was measured in" in printed
    assert dispatch.backends()["cuda"].reason == "CUDA on NVIDIA X"

    tuning.save(DEVICE, {PLANES: CHOICE, PLANES._replace(gate="eca"): CHOICE._replace(backend="triton")})
    dispatch.forget_tuned()
    assert "measured to be the fastest for 1 of 2 shapes" in dispatch.backends()["cuda"].reason
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    line = (
        "2x4x4x3 se float32 nchw: cuda, held forward (triton 25.1 + 37.0 us forward + backward, 2026-11-30)"
    )
    assert f"cuda:0 {line}" in printed and "the static choice for other maps" in printed

    gpu.setenv("MRCN_FAST_TUNE", "0")
    assert main(["info"]) == 0
    assert "the static choice, because of MRCN_FAST_TUNE=0" in capsys.readouterr().out
    gpu.setenv("MRCN_FAST_BACKEND", "triton")
    assert main(["info"]) == 0
    assert "MRCN_FAST_BACKEND=triton decides" in capsys.readouterr().out

    gpu.delenv("MRCN_FAST_TUNE")
    gpu.setenv("MRCN_FAST_BACKEND", "auto")  # as if it were not set
    gpu.delenv("XDG_CACHE_HOME")
    gpu.setattr(Path, "home", no_home)
    dispatch.forget_tuned()
    assert main(["info"]) == 0
    assert "all maps: nothing was measured in the file of measured choices" in capsys.readouterr().out


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tune"], "nothing to choose: there is no GPU here that torch"),
        (["tune", "--device", "cpu"], "nothing to choose: the CPU has one backend of kernels, cpu"),
        (["tune", "--shapes", "4x3"], "expected a shape NxCxHxW"),
        (["tune", "--shapes", "4x3x1x1"], "shapes: got (4, 3, 1, 1), expected N, C, H and W"),
        (["tune", "--gate", "cbam"], "expected one of se, eca, cbam-channel"),
    ],
)
def test_what_the_command_refuses(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_variants(gpu: pytest.MonkeyPatch) -> None:
    usable = {"triton": True, "cuda": True}
    gpu.setattr(torch.cuda, "is_available", lambda: True)
    gpu.setattr(torch.cuda, "device_count", lambda: 1)
    gpu.setattr(
        suite, "backends", lambda: {n: dispatch.BackendStatus(u, f"{n} is {u}") for n, u in usable.items()}
    )
    assert suite.variants("cuda:0") == [suite.TRITON, suite.CUDA, suite.CUDA_HELD]
    with pytest.raises(ValueError, match="torch sees 1 GPUs"):
        suite.variants("cuda:1")
    usable["triton"] = False
    assert suite.variants("cuda") == [suite.CUDA, suite.CUDA_HELD]
    usable |= {"triton": True, "cuda": False}
    with pytest.raises(
        ValueError, match=r"at most one variant serves here \(triton: .*; cuda: cuda is False"
    ):
        suite.variants("cuda")


@pytest.mark.parametrize("given", [{"dtypes": ("fp64",)}, {"layouts": ("nhwc",)}, {"shapes": ((4, 3, 2),)}])
def test_what_the_function_refuses(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))}: got .*expected"):
        mrcn_fast.tune(**given)


# --- the measurement --------------------------------------------------------------------------------------


def us(**times: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {name.replace("_", " "): dict(zip(tuning.WAYS, pair, strict=True)) for name, pair in times.items()}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (us(triton=(25, 37), cuda=(80, 250), cuda_held=(13, 250)), ("triton", ("forward",))),
        (us(triton=(25, 37), cuda=(26, 40), cuda_held=(13, 39.9)), ("cuda", ("forward",))),
        (us(triton=(25, 37), cuda=(26, 40), cuda_held=(13, 17)), ("cuda", ("forward", "backward"))),
        (us(triton=(25, 37), cuda=(25, 37), cuda_held=(24.9, 36.9)), ("triton", ())),  # chance
        (us(triton=(25, 37), cuda=(20, 30), cuda_held=(30, 40)), ("cuda", ())),
        (us(triton=(25, 37), cuda_held=(13, 17)), ("cuda", ("forward", "backward"))),
        (us(triton=(25, 37), cuda=(13, 17)), ("cuda", ())),
        (us(triton=(25, 37)), ("triton", ())),
        (us(cuda=(80, 250), cuda_held=(13, 260)), ("cuda", ("forward",))),
    ],
)
def test_the_choice_from_times(
    times: Mapping[str, Mapping[str, float]], expected: tuple[str, tuple[str, ...]]
) -> None:
    assert suite.chosen(times) == expected


class Clock:
    """Times by name and way in place of a GPU's; keeps the value of MRCN_FAST_CUDA_HELD in each call."""

    def __init__(self) -> None:
        self.held: dict[str, str | None] = {}
        self.rounds: list[list[str]] = []

    def __call__(self, calls: Calls, seconds: float) -> dict[str, Timing]:
        assert seconds == 0.25 and EXACT not in calls
        for call in calls.values():
            call()
        self.rounds.append(list(calls))
        fastest = {"triton": 2e-5, "cuda": 4e-5, "cuda held": 1e-5}
        return {name: Timing(*[fastest[name]] * 3) for name in calls}


@pytest.fixture
def measured(
    gpu: pytest.MonkeyPatch, stand_ins: dict[str, StandIn]
) -> Callable[..., tuple[dict[Planes, Choice], Clock, list[str]]]:
    """Runs `tune` for CPU tensors, with the stand-ins and the clock."""

    def run(**asked: Any) -> tuple[dict[Planes, Choice], Clock, list[str]]:
        clock, told = Clock(), list[str]()
        gpu.setattr(suite, "variants", lambda _: [suite.TRITON, suite.CUDA, suite.CUDA_HELD])
        gpu.setattr(suite, "_timed_on_gpu", clock)
        gpu.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        tuning_asked = suite.Tuning(shapes=(SHAPE,), seconds=0.25, device="cpu", **asked)
        return suite.tune(tuning_asked, told.append), clock, told

    return run


@needs_cpu_kernels
def test_each_variant_is_checked_and_timed_each_way(
    backend: str, measured: Callable[..., Any], stand_ins: dict[str, StandIn], gpu: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    operation = stand_ins["cuda"].operation

    def recorded(name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            seen.append(os.environ["MRCN_FAST_CUDA_HELD"])
            return operation(name)(*arguments)

        return run

    gpu.setattr(stand_ins["cuda"], "operation", recorded)
    gpu.setenv("MRCN_FAST_CUDA_HELD", "")
    found, clock, told = measured()
    assert os.environ["MRCN_FAST_CUDA_HELD"] == "" and set(seen) == {"0", "1"}
    assert clock.rounds == [["triton", "cuda", "cuda held"]] * 8, "two dtypes, two layouts, two ways"
    assert list(found) == [
        Planes("se", dtype, last, 4, 12)
        for dtype in (torch.float32, torch.bfloat16)
        for last in (False, True)
    ]
    for choice in found.values():
        assert (choice.backend, choice.held, choice.shape) == ("cuda", ("forward", "backward"), SHAPE)
        assert choice.us["cuda held"] == {"forward": 10.0, "backward": 10.0}
    assert told[-1] == f"written to {tuning.file()}" and len(told) == 5
    gpu.undo()
    content = json.loads(Path(told[-1].removeprefix("written to ")).read_text())
    assert len(content["machines"][0]["choices"]) == 4


def test_the_file_is_checked_before_anything_is_measured(
    measured: Callable[..., Any], gpu: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu.setattr(suite, "measured_choice", lambda *_: pytest.fail("was measured"))
    (tmp_path / "mrcn_fast").touch()
    with pytest.raises(OSError, match=r"tuned\.json|expected a folder for the measured choices"):
        measured()
    gpu.delenv("XDG_CACHE_HOME")
    gpu.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="no home folder for the measured choices: give a folder by XDG_CACHE"):
        measured()


def test_where_no_variant_is_right_nothing_is_written(
    measured: Callable[..., Any], gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(suite, "measured_choice", lambda *_: None)
    found, _, told = measured(dtypes=("fp32",), layouts=("nchw",))
    assert found == {} and not tuning.file().exists()
    assert told == ["block forward 2x4x4x3 nchw: no variant gave the reference's results"]


@needs_cpu_kernels
def test_a_wrong_variant_is_not_chosen(
    backend: str,
    measured: Callable[..., Any],
    stand_ins: dict[str, StandIn],
    gpu: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wrong(name: str) -> Callable[..., Any]:
        right = cpu.operation(name)

        def run(*arguments: Any) -> tuple[Tensor, ...]:
            made = right(*arguments)
            if os.environ["MRCN_FAST_CUDA_HELD"] == "1" and name.endswith("backward"):
                made[1].mul_(1.01)
            return made

        return run

    gpu.setattr(stand_ins["cuda"], "operation", wrong)
    found, clock, _ = measured(dtypes=("fp32",), layouts=("nchw",), gate="eca")
    assert clock.rounds == [["triton", "cuda", "cuda held"], ["triton", "cuda"]]
    (choice,) = found.values()
    assert choice.backend == "triton" and set(choice.us) == {"triton", "cuda"}
    assert "block backward 2x4x4x3 nchw eca: without cuda held: the fused cuda held result is off by 1" in (
        capsys.readouterr().err
    )
