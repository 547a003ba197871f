"""The CUDA part as it comes: what setup.py decides, what the backend says of itself, what the library is.

None of it needs a GPU. How setup.py builds the two parts beside each other is in test_build.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mrcn_fast import dispatch
from mrcn_fast.backends import cpu, cuda
from mrcn_fast.gates import FUSED, GATES
from mrcn_fast.operations import OPERATIONS
from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
OPS = [
    f"{op}_{way}"
    for op in (*(operation.op for operation in OPERATIONS.values()), "cqc")
    for way in ("forward", "backward")
]

# --- what setup.py decides ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup() -> Any:
    """setup.py's functions."""
    return load_script("setup.py")


def write_nvcc(folder: Path, release: str = "12.8") -> str:
    """An nvcc that knows its release."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvcc"
    program.write_text(f"#!/bin/sh\necho release {release}, sm_80 sm_90\n")
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def nowhere(setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No nvcc in any place that is looked at."""
    for name in ("CUDACXX", "CUDA_HOME", "MRCN_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(setup, "USUAL_CUDA", tmp_path / "usual")
    return monkeypatch


def test_where_nvcc_is_looked_for(setup: Any, nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(setup.NativeBuildError, match=r"nvcc was not found.*12\.4 or newer.*make install"):
        setup.find_nvcc()
    usual = write_nvcc(tmp_path / "usual" / "bin")
    assert setup.find_nvcc() == usual
    on_path = write_nvcc(tmp_path / "path")
    assert setup.find_nvcc() == on_path
    nowhere.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup.find_nvcc() == on_path
    home = write_nvcc(tmp_path / "home" / "bin")
    assert setup.find_nvcc() == home
    named = write_nvcc(tmp_path / "named")
    nowhere.setenv("CUDACXX", named)
    assert setup.find_nvcc() == named


def test_a_named_toolkit_is_not_passed_over(setup: Any, nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_nvcc(tmp_path / "usual" / "bin")
    nowhere.setenv("CUDA_HOME", str(tmp_path / "home"))
    with pytest.raises(setup.NativeBuildError, match=r"CUDA_HOME=.*home and on PATH"):
        setup.find_nvcc()
    nowhere.setenv("CUDACXX", "no-such-nvcc")
    with pytest.raises(setup.NativeBuildError, match="CUDACXX=no-such-nvcc"):
        setup.find_nvcc()


@pytest.mark.parametrize("release", ["12.3", "11.8", "9.2"])
def test_an_nvcc_that_is_too_old(
    release: str, setup: Any, nowhere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvcc(tmp_path / "path", release)
    with pytest.raises(setup.NativeBuildError, match=rf"nvcc {release} .*too old.*12\.4 or newer"):
        setup.find_cuda()


def test_an_nvcc_that_does_not_run(setup: Any, nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = Path(write_nvcc(tmp_path / "path"))
    program.write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    with pytest.raises(setup.NativeBuildError, match="nvcc --version failed: broken"):
        setup.find_cuda()
    program.write_text("#!/no/such/shell\n")
    with pytest.raises(setup.NativeBuildError, match="does not run"):
        setup.find_cuda()


def test_what_nvcc_is_found(setup: Any, nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = write_nvcc(tmp_path / "path", "13.0")
    assert setup.find_cuda() == (nvcc, "13.0", (80, 90), (86, 89, 100, 120))
    nowhere.setenv("MRCN_FAST_CUDA_ARCHS", "90")
    assert setup.find_cuda() == (nvcc, "13.0", (90,), ())


@pytest.mark.parametrize(
    ("value", "archs"),
    [
        ("", ()),
        (" , ", ()),
        ("90", (90,)),
        ("120,80", (80, 120)),
        ("80; 90;80;", (80, 90)),
        ("90 75", (75, 90)),
    ],
)
def test_architectures(
    value: str, archs: tuple[int, ...], setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRCN_FAST_CUDA_ARCHS", value)
    assert setup.wanted_archs() == archs


@pytest.mark.parametrize("value", ["sm_90", "9.0", "90a", "native", "all", "8", "1000", "-90", "80:90"])
def test_wrong_architectures(value: str, setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRCN_FAST_CUDA_ARCHS", value)
    with pytest.raises(SystemExit, match=re.escape(f"MRCN_FAST_CUDA_ARCHS: got {value!r}") + ".*80,86,89"):
        setup.wanted_archs()


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [((90,), (90,)), ((80, 90), (80, 90)), ((80, 121), (80,)), ((121,), (80, 90))],
    ids=["one", "two", "one unknown to nvcc", "only unknown ones: the default"],
)
def test_what_the_gpus_here_are_built_for(
    gpus: tuple[int, ...], archs: tuple[int, ...], setup: Any, nowhere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_nvcc(tmp_path / "path")
    assert setup.find_cuda(gpus).archs == archs
    nowhere.setenv("MRCN_FAST_CUDA_ARCHS", "90")
    assert setup.find_cuda(gpus).archs == (90,)


def test_torch_is_found_where_an_isolated_build_hides_it(
    setup: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    assert not setup.is_isolated()
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    assert setup.is_isolated() and setup.find_torch() == tmp_path / "torch"
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path / "elsewhere"))
    with pytest.raises(setup.NativeBuildError, match="--no-build-isolation"):
        setup.find_torch()


def test_architectures_that_an_nvcc_does_not_know(setup: Any) -> None:
    known = (50, 80, 86, 89, 90)
    assert setup.choose_archs((), known, "12.4") == ((80, 86, 89, 90), (100, 120))
    assert setup.choose_archs((), (*known, 100, 103, 120), "12.8") == (setup.CUDA_ARCHS, ())
    assert setup.choose_archs((90,), known, "12.4") == ((90,), ())
    with pytest.raises(SystemExit, match=r"got 100, 120, which nvcc 12\.4 does not know; it knows 50, 80"):
        setup.choose_archs((90, 100, 120), known, "12.4")


@pytest.mark.parametrize(
    "line",
    [
        'csrc/block/cuda/forward.cu(12): error: identifier "x" is undefined',
        "nvcc fatal   : Unsupported gpu architecture 'compute_999'",
        "ptxas fatal   : Unresolved extern function 'x'",
        'csrc/block/cuda/forward.cu(9): error #177-D: variable "x" was declared but never referenced',
        "ptxas error   : Entry function 'x' uses too much shared data",
        "/usr/bin/ld: cannot find -lcudart_static: No such file or directory",
    ],
)
def test_the_error_that_a_reason_quotes(line: str, setup: Any) -> None:
    told = setup.first_error(["FAILED: x.o\n", f"{line}\n", "ninja: build stopped: error: more\n"])
    assert told == " ".join(line.split())


# --- what the backend says of itself ------------------------------------------------------------------------

BUILT = {"built": True, "reason": "", "log": "", "archs": [80, 90], "left_out": [120], "nvcc": "12.4"}


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Nothing known of the CUDA part, whose record and library are files in `tmp_path`."""
    forget = (cuda._absent, cuda._describe, cuda._load)
    monkeypatch.setattr(cpu, "BUILD_RECORD", tmp_path / "record.json")
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cuda.so")
    for known in forget:
        known.cache_clear()
    yield monkeypatch
    for known in forget:
        known.cache_clear()


def tell(**values: Any) -> None:
    """The record of a build of the CUDA part, and its library."""
    cpu.BUILD_RECORD.write_text(json.dumps({"built": True, "cuda": BUILT | values}))
    cuda.LIBRARY.touch()


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(cpu, "loaded", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_status_where_it_was_not_built(asked_anew: pytest.MonkeyPatch) -> None:
    usable, reason = cuda.status()
    assert not usable and "absent" in reason and "nvcc 12.4" in reason
    assert cuda.build_info() == {}
    cuda._absent.cache_clear()
    tell(built=False, reason="nvcc was not found; get it")
    assert cuda.status() == (False, "the CUDA part was not built: nvcc was not found; get it")
    cuda._absent.cache_clear()
    cpu.BUILD_RECORD.write_text(
        json.dumps({"built": True, "reason": "", "log": ""})
    )  # setup.py before this part
    assert "absent" in cuda.status()[1]


def test_status_where_the_library_is_gone(asked_anew: pytest.MonkeyPatch) -> None:
    tell()
    cuda.LIBRARY.unlink()
    usable, reason = cuda.status()
    assert not usable and "_cuda.so is gone" in reason


def test_status_without_the_native_library(asked_anew: pytest.MonkeyPatch) -> None:
    tell()
    asked_anew.setattr(cpu, "_library", None)
    usable, reason = cuda.status()
    assert not usable and "operations are those of the native library" in reason and "does not load" in reason


def test_status_without_a_gpu(asked_anew: pytest.MonkeyPatch) -> None:
    tell()
    on_gpu(asked_anew, (9, 0))
    asked_anew.setattr(torch.cuda, "is_available", lambda: False)
    usable, reason = cuda.status()
    assert not usable and "torch sees no GPU" in reason and "sm_80, sm_90" in reason
    with pytest.raises(RuntimeError, match="backend 'cuda' can't serve this call: torch sees no GPU"):
        dispatch.choose("cuda", "cuda", torch.float32)


def test_status_on_rocm(asked_anew: pytest.MonkeyPatch) -> None:
    tell()
    on_gpu(asked_anew, (9, 4))
    asked_anew.setattr(torch.version, "hip", "7.1")
    usable, reason = cuda.status()
    assert not usable and "ROCm" in reason and "Triton" in reason


@pytest.mark.parametrize(
    ("capability", "usable", "told"),
    [
        ((7, 5), False, "NVIDIA X is an sm_75; MRCN_FAST_CUDA_ARCHS=75 make install"),
        ((8, 0), True, "for sm_80, sm_90 on NVIDIA X; serves"),
        ((8, 9), True, "on NVIDIA X; serves"),
        ((9, 0), True, "on NVIDIA X; serves"),
        ((12, 0), True, "on NVIDIA X (sm_120: compiled by the driver"),
    ],
)
def test_status_on_a_gpu(
    capability: tuple[int, int], usable: bool, told: str, asked_anew: pytest.MonkeyPatch
) -> None:
    tell()
    on_gpu(asked_anew, capability)
    got, reason = cuda.status()
    assert got == usable and told in reason
    assert ("Triton's serve CUDA tensors by default" in reason and "more of the host's" in reason) == usable


def test_it_serves_only_where_it_is_asked_for(asked_anew: pytest.MonkeyPatch) -> None:
    tell()
    on_gpu(asked_anew, (9, 0))
    asked_anew.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    asked_anew.setattr(cuda, "_load", lambda: None)
    asked_anew.setattr(dispatch.KERNELS["triton"], "status", lambda: (False, "Triton is not installed"))
    assert dispatch.choose(None, "cuda", torch.float32) == "reference"
    assert dispatch.choose("cuda", "cuda", torch.bfloat16) == "cuda"
    asked_anew.setenv(dispatch.ENVIRONMENT_VARIABLE, "cuda")
    assert dispatch.choose(None, "cuda", torch.float64) == "cuda"
    with pytest.raises(RuntimeError, match="it serves CUDA tensors, got a tensor on 'cpu'"):
        dispatch.choose(None, "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=r"torch\.float32.*got torch\.float8_e5m2"):
        dispatch.choose(None, "cuda", torch.float8_e5m2)


def test_a_library_that_does_not_load_is_a_reason(asked_anew: pytest.MonkeyPatch) -> None:
    tell()
    on_gpu(asked_anew, (9, 0))
    reason = cuda.serves("cuda", torch.float32)
    assert reason is not None and "does not load" in reason and "_cuda.so" in reason


def test_build_info(asked_anew: pytest.MonkeyPatch) -> None:
    tell()
    info = cuda.build_info()
    assert info["built for"] == "sm_80, sm_90" and info["nvcc"] == "12.4" and "sm_120" in info["left out"]


@pytest.mark.parametrize("gate", FUSED)
@pytest.mark.parametrize("mode", list(OPERATIONS))
def test_a_forward_saves_what_its_device_wants(mode: str, gate: str) -> None:
    """Traced tensors are on a GPU that need not be there."""
    operation = OPERATIONS[mode]
    fake = cpu.fakes()[f"{operation.op}_forward"]
    modalities, gates = len(operation.inputs), len(operation.gates)

    def saved(device: str) -> torch.Size:
        with FakeTensorMode():
            x, norm = torch.empty(3, 8, 2, 2, device=device), torch.empty(modalities, 8, device=device)
            parameter = torch.empty(gates, 5, 8, device=device)
            return fake(*[x] * modalities, norm, norm, [parameter], FUSED.index(gate), 1e-5)[-1].shape

    hidden = GATES[gate].hidden_layers * gates * 5
    assert saved("cpu") == (modalities, 3, 8, 2)
    assert saved("cuda") == (3, 2 * modalities * 8 + hidden)


def test_the_loss_saves_what_its_device_wants() -> None:
    def saved(device: str, normalize: bool, **kernels: str) -> torch.Size:
        with FakeTensorMode():
            labels, others = torch.empty(4, device=device).long(), torch.empty(3, device=device).long()
            features = [torch.empty(21, 6, device=device)]
            fake = cpu.fakes(**kernels)["cqc_forward"]
            return fake(features, labels, others, 0.2, False, normalize)[-1].shape

    assert saved("cpu", False) == saved("cpu", True) == (4, 8)
    assert saved("cuda", False) == saved("cpu", False, device_type="cuda") == (39,)
    assert saved("cuda", True) == (39 + 21,)


# --- what the library is ------------------------------------------------------------------------------------


@pytest.fixture
def library() -> Path:
    """The CUDA part of this checkout; where it is not, a reason to skip, unless it is required as in CI."""
    cuda._absent.cache_clear()
    reason = cuda._absent()
    if reason and os.environ.get("MRCN_FAST_CUDA") != "1":
        pytest.skip(reason)
    assert not reason, reason
    return cuda.LIBRARY


def run(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_import_does_not_load_it() -> None:
    told = run(
        "import torch, mrcn_fast; from pathlib import Path; from mrcn_fast.backends import cuda; "
        "mrcn_fast.backends(); x = torch.ones(2, 4, 3, 3); mrcn_fast.MRCNBlock(4)(x, x); "
        "maps = Path('/proc/self/maps'); "
        "print(maps.exists() and cuda.LIBRARY.name in maps.read_text(), list(torch.ops.loaded_libraries))"
    )
    assert told.split(maxsplit=1)[0] == "False" and "_cuda" not in told


def test_it_loads_into_any_torch_and_registers_every_operation(library: Path) -> None:
    """Also into one for CPUs, though there nothing ever does it."""
    told = run(
        "import torch, mrcn_fast\n"
        "from mrcn_fast.backends import cuda\n"
        "def found():\n"
        f"    has, ops = torch._C._dispatch_has_kernel_for_dispatch_key, {OPS}\n"
        "    return [op for op in ops if has(f'mrcn_fast::{op}', 'CUDA')]\n"
        "assert found() == [], found()\n"
        "assert cuda._load() is None, cuda._load()\n"
        "print(*found())\n"
    )
    assert told.split() == OPS


def test_it_brings_its_cuda_runtime_and_hides_it(library: Path) -> None:
    """Else the calls would go to the runtime that torch loaded, of whatever version."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf, which comes with a C++ compiler, is not on PATH")

    def readelf(*arguments: str) -> str:
        command = ["readelf", "--wide", *arguments, str(library)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    dynamic = readelf("--dynamic")
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert needed and not [name for name in needed if "cuda" in name]
    symbols = [line.split() for line in readelf("--dyn-syms").splitlines() if re.match(r"\s*\d+:", line)]
    exported = [words[-1] for words in symbols if words[4] != "LOCAL" and words[6] != "UND"]
    assert not [name for name in exported if "cuda" in name.lower()]
    assert not [words[-1] for words in symbols if words[-1].startswith("cuda") and words[6] == "UND"]


# As ptxas tells it, twice for each kernel and architecture: "Compiling entry function ..." begins an entry.
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
# Block: four dtypes (held: all but float64) x pair, restitute and SNR x both layouts. The loss: four dtypes x
# normalized or not, in both directions.
KERNELS = {"block forward": 24, "held forward": 18, "block backward": 24, "held backward": 18, "cqc": 16}
# Of held forwards that have 74 KB of lines each, two fit the 65,536 registers of a multiprocessor. A held
# backward has a multiprocessor to itself.
MOST_REGISTERS = {"held forward": 128}


def kind(kernel: str) -> str:
    if "Cqc" in kernel:
        return "cqc"
    direction = "forward" if "forward_kernel" in kernel else "backward"
    return f"held {direction}" if "held_" in kernel else f"block {direction}"


def test_no_kernel_spills(library: Path, setup: Any, record_property: Callable[[str, object], None]) -> None:
    """The resource table: registers, and nothing that did not fit into them, for every architecture."""
    log = setup.build_directory() / "cuda-resources.log"
    if not log.is_file():
        pytest.skip(f"this library was built elsewhere: there is no {log.name} in {log.parent.name}")
    entries = [match.groupdict() for match in ENTRY.finditer(log.read_text())]
    spilling = [e for e in entries if e["stores"] != "0" or e["loads"] != "0"]
    assert not spilling, spilling
    for arch, (name, number) in itertools.product(cuda._record()["archs"], KERNELS.items()):
        registers = [
            int(e["registers"]) for e in entries if e["arch"] == str(arch) and kind(e["kernel"]) == name
        ]
        assert len(registers) == number, (name, arch)
        assert max(registers) <= MOST_REGISTERS.get(name, 255), (name, arch)
        told = f"{name:15} sm_{arch:3}: {number} kernels, {min(registers)} to {max(registers)} registers"
        record_property("resources", told)


def test_no_kernel_traps(library: Path) -> None:
    """nvcc makes a trap of what it can't do on a GPU, such as a look into a host's table, without a word."""
    triton = importlib.util.find_spec("triton")
    folders = (triton and triton.submodule_search_locations) or ["."]
    reader = Path(folders[0], "backends", "nvidia", "bin", "cuobjdump")
    if not reader.is_file():
        pytest.skip("cuobjdump, which reads the library, comes with Triton, and it is not installed")
    ptx = subprocess.run([reader, "-ptx", library], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert ptx.count(".entry ") == sum(KERNELS.values())
    assert re.findall(r"^\s*trap;", ptx, re.MULTILINE) == []
