"""The install: one version, a failed build that says why, partial rebuilds.

Wheels are in test_packages.py, and the environments that the Makefile makes in test_makefile.py.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mrcn_fast
from tests.support.builds import CUDA_LIBRARY, LIBRARY, RECORD, run
from tests.support.processes import ROOT
from tests.support.scripts import load_script

# Two translation units and no torch: what setup.py does with CMake, in seconds. The CUDA part has one, for
# which the C++ compiler stands in for nvcc.
SMALL_CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(small LANGUAGES CXX)
add_library(_C MODULE csrc/one.cpp csrc/two.cpp)
set_target_properties(_C PROPERTIES PREFIX "" OUTPUT_NAME "{stem}" SUFFIX "{suffix}")
install(TARGETS _C DESTINATION mrcn_fast)
if(MRCN_FAST_NVCC)
  add_library(_cuda MODULE csrc/kernels.cpp)
  list(JOIN MRCN_FAST_CUDA_ARCHS _ archs)
  target_compile_definitions(_cuda PRIVATE FOR_${{archs}})
  set_target_properties(_cuda PROPERTIES PREFIX "" SUFFIX .so)
  install(TARGETS _cuda DESTINATION mrcn_fast COMPONENT cuda EXCLUDE_FROM_ALL)
endif()
"""


def build(checkout: Path, check: bool = True, **settings: str) -> subprocess.CompletedProcess[str]:
    """setup.py in place; without the CUDA part, unless `settings` say of it what a caller can."""
    settings = {"MRCN_FAST_CUDA": "0"} | settings
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    return run(*command, cwd=checkout, check=check, settings=settings)


def run_with(package: Path, program: str) -> str:
    """What a program prints that imports mrcn_fast from `package`, and all else from this environment.

    Without `site`, so that the editable install of the checkout does not join in.
    """
    paths = [str(package), *(path for path in sys.path if path.endswith("-packages"))]
    settings = {"PYTHONPATH": os.pathsep.join(paths)}
    return run(sys.executable, "-S", "-c", program, cwd=package, settings=settings).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package and its build as they come, nothing compiled."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path)
    left = shutil.ignore_patterns("__pycache__", "_C.*", CUDA_LIBRARY, RECORD)
    shutil.copytree(ROOT / "mrcn_fast", tmp_path / "mrcn_fast", ignore=left)
    return tmp_path


@pytest.fixture
def small_checkout(tmp_path: Path) -> Path:
    """This project's setup.py over a library of two small files, and a CUDA part of one."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / "mrcn_fast").mkdir()
    (tmp_path / "mrcn_fast" / "__init__.py").write_text('__version__ = "0"\n')
    (tmp_path / "README.md").touch()
    (tmp_path / "csrc").mkdir()
    for name in ("one", "two", "kernels"):
        (tmp_path / "csrc" / f"{name}.cpp").write_text(f"int {name}() {{ return 1; }}\n")
    stem, suffix = LIBRARY.split(".", 1)
    (tmp_path / "CMakeLists.txt").write_text(SMALL_CMAKE.format(stem=stem, suffix="." + suffix))
    return tmp_path


def record(checkout: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((checkout / "mrcn_fast" / RECORD).read_text())
    return loaded


def compiled(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The sources that a build of a small checkout compiled."""
    return sorted(re.findall(r"Building CXX object \S*/(\w+)\.cpp", done.stdout))


def cpu_status(checkout: Path) -> tuple[bool, str]:
    """What the package in `checkout` says of its C++ kernels, and that a block works all the same."""
    program = (
        "import json, torch, mrcn_fast as m; "
        "f = m.MRCNBlock(16)(torch.randn(2, 16, 3, 2), torch.randn(2, 16, 3, 2)); "
        "assert all(bool(x.isfinite().all()) for x in f); "
        "s = m.backends(); assert s['reference'].usable; print(json.dumps(list(s['cpu'])))"
    )
    usable, reason = json.loads(run_with(checkout, program))
    return usable, reason


@pytest.fixture
def setup() -> ModuleType:
    """setup.py's functions."""
    return load_script("setup.py")


def installed_metadata() -> metadata.Distribution:
    try:
        return metadata.distribution("mrcn-fast")
    except metadata.PackageNotFoundError:
        pytest.skip("mrcn-fast is not installed in this environment: make install")


def test_the_version_stands_in_one_place() -> None:
    files = [
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.py"),
        *ROOT.glob("CMakeLists.txt"),
        *ROOT.glob("mrcn_fast/**/*.py"),
    ]
    naming = [path for path in files if f'"{mrcn_fast.__version__}"' in path.read_text()]
    assert naming == [ROOT / "mrcn_fast" / "__init__.py"]
    assert installed_metadata().version == mrcn_fast.__version__


def test_the_changelog_names_the_version() -> None:
    assert re.search(
        rf"^## \[{re.escape(mrcn_fast.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_no_compiler_leaves_the_reference_and_a_reason(checkout: Path, tmp_path: Path) -> None:
    empty = tmp_path / "no-tools"
    empty.mkdir()
    done = build(checkout, PATH=str(empty))
    assert record(checkout)["built"] is False
    usable, reason = cpu_status(checkout)
    assert not usable
    for message in (reason, done.stderr):
        assert "no C++20 compiler was found" in message
        assert "apt install g++" in message and "dnf install gcc-c++" in message and "xcode-select" in message


def test_a_failed_build_leaves_a_reason_its_log_and_no_older_library(small_checkout: Path) -> None:
    build(small_checkout)
    found = record(small_checkout)
    assert (found["built"], found["reason"], found["log"]) == (True, "", "")
    library = small_checkout / "mrcn_fast" / LIBRARY
    assert library.is_file()

    (small_checkout / "csrc" / "one.cpp").write_text("int one() { return undeclared; }\n")
    build(small_checkout)
    failed = record(small_checkout)
    assert failed["built"] is False
    assert "undeclared" in str(failed["reason"]) and "one.cpp" in str(failed["log"])
    assert not library.exists()


def test_a_required_build_that_fails_is_an_error(small_checkout: Path) -> None:
    done = build(small_checkout, check=False, MRCN_FAST_NATIVE="1", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "CXX=no-such-compiler" in done.stderr and "MRCN_FAST_NATIVE=1" in done.stderr


def test_the_build_can_be_switched_off(small_checkout: Path) -> None:
    build(small_checkout, MRCN_FAST_NATIVE="0")
    assert record(small_checkout)["built"] is False
    assert "MRCN_FAST_NATIVE=0" in str(record(small_checkout)["reason"])
    assert not (small_checkout / "build").exists()


def test_an_unknown_setting_is_refused(small_checkout: Path) -> None:
    done = build(small_checkout, check=False, MRCN_FAST_NATIVE="maybe")
    assert done.returncode != 0 and "'maybe'" in done.stderr


def test_a_change_rebuilds_only_what_it_must(small_checkout: Path) -> None:
    assert compiled(build(small_checkout)) == ["one", "two"]
    assert compiled(build(small_checkout)) == []
    (small_checkout / "csrc" / "two.cpp").write_text("int two() { return 2; }\n")
    changed = build(small_checkout)
    assert compiled(changed) == ["two"]
    assert "compiler identification" not in changed.stdout  # configured once
    assert compiled(build(small_checkout, CXXFLAGS="-DOTHER")) == ["one", "two"]


def test_the_output_of_the_compilers_is_shown_on_demand_or_where_they_fail(small_checkout: Path) -> None:
    quiet = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    done = run(*quiet, cwd=small_checkout, settings={"MRCN_FAST_CUDA": "0"})
    announced = rf"Compiling the library: 2 files, about 15 s on {os.cpu_count()} free cores\n"
    assert re.fullmatch(announced, done.stdout)
    assert run(*quiet, cwd=small_checkout, settings={"MRCN_FAST_CUDA": "0"}).stdout == ""

    (small_checkout / "csrc" / "one.cpp").write_text("int one() { return undeclared; }\n")
    failed = run(*quiet, cwd=small_checkout, settings={"MRCN_FAST_CUDA": "0"})
    assert "Building CXX object" not in failed.stdout and "one.cpp:1:" in failed.stderr
    assert "Building CXX object" in build(small_checkout).stdout


def test_a_long_compilation_says_how_far_it_is(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "SECONDS_BETWEEN_LINES", 0.02)
    monkeypatch.setattr(setup.log, "disabled", True)
    lines = [
        "-- Configuring done\n",
        "[1/27] Building CXX object one\n",
        "[7/27] Linking CXX library\n",
        "note\n",
    ]
    with setup.reported("the compilation", lines):
        time.sleep(0.2)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "  the compilation: 7 of 27 steps, 0 s so far"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set")
def test_a_checkouts_library_is_for_this_processor(tmp_path: Path) -> None:
    def carried(isas: str, check: bool = True) -> list[str]:
        folder = tmp_path / "build"
        command = ("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
        done = run(*command, f"-DMRCN_FAST_ISAS={isas}", cwd=tmp_path, check=check)
        if done.returncode != 0:
            assert "got sse9, expected native, all or names of" in " ".join(done.stderr.split())
            return []
        # What csrc/cpu/isa.cpp is compiled with, in its order: slowest first.
        found = set(re.findall(r"-DMRCN_ISAS=\W*((?:X\(\w+\))+)", (folder / "build.ninja").read_text()))
        assert len(found) == 1
        return re.findall(r"X\((\w+)\)", found.pop())

    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    every = carried("")
    assert every[:3] == ["baseline", "avx2", "avx512"]
    expected = every
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        expected = ["avx512", *(every[3:] if "avx512_bf16" in flags else ())]
    elif {"avx2", "fma", "f16c"} <= flags:
        expected = ["avx2"]
    assert carried("native") == expected
    # In any order, and named twice.
    assert carried("avx2;baseline;avx2") == ["baseline", "avx2"]
    # avx512bf16 serves bf16 alone.
    if "avx512bf16" in every:
        assert carried("baseline;avx512bf16") == ["baseline", "avx512", "avx512bf16"]
    assert carried("sse9", check=False) == []


def test_what_is_compiled_for_is_chosen_by_where_the_library_goes(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MRCN_FAST_ISAS", raising=False)
    assert setup.wanted_isas(in_place=True) == "native"
    assert setup.wanted_isas(in_place=False) == ""
    for value, isas in (("all", ""), ("avx2, avx512", "avx2;avx512"), ("native", "native")):
        monkeypatch.setenv("MRCN_FAST_ISAS", value)
        assert {setup.wanted_isas(in_place) for in_place in (False, True)} == {isas}


# --- the CUDA part ----------------------------------------------------------------------------------------


def write_torch(folder: Path, *gpus: int, cuda: str | None = "13.0") -> str:
    """A folder with a torch that is a build for CUDA and sees these GPUs."""
    package = folder / "packages" / "torch"
    package.mkdir(parents=True)
    (package / "version.py").write_text(f"cuda = {cuda!r}\n")
    (package / "__init__.py").write_text("from torch import cuda\n")
    (package / "cuda.py").write_text(
        f"def device_count(): return {len(gpus)}\n"
        f"def get_device_capability(index): return divmod({list(gpus)}[index], 10)\n"
    )
    return str(package.parent)


@pytest.fixture
def nvcc(tmp_path: Path) -> dict[str, Any]:
    """Settings that name an nvcc of 12.4, which answers what setup.py asks and compiles nothing."""
    program = tmp_path / "nvcc-12.4"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release 12.4, V12.4.99"\n'
        '[ "$1" = --list-gpu-code ] && printf "sm_%d\\n" 50 80 86 87 89 90\nexit 0\n'
    )
    program.chmod(0o755)
    return {"MRCN_FAST_CUDA": "auto", "CUDACXX": str(program), "PYTHONPATH": write_torch(tmp_path, 90)}


def test_without_nvcc_the_cpu_part_alone(small_checkout: Path, tmp_path: Path) -> None:
    torch = write_torch(tmp_path, 90)
    done = build(small_checkout, MRCN_FAST_CUDA="auto", CUDACXX="no-such-nvcc", PYTHONPATH=torch)
    found = record(small_checkout)
    assert found["built"] and not found["cuda"]["built"]
    for reason in (found["cuda"]["reason"], done.stderr):
        assert (
            "nvcc was not found" in reason and "CUDACXX=no-such-nvcc" in reason and "make install" in reason
        )
    assert compiled(done) == ["one", "two"]
    assert not (small_checkout / "mrcn_fast" / CUDA_LIBRARY).exists()


@pytest.mark.parametrize("cuda", [None, "13.0"], ids=["a build for the CPU", "no GPU"])
def test_the_cuda_part_is_left_out_where_torch_sees_no_gpu(
    cuda: str | None, small_checkout: Path, nvcc: dict[str, Any], tmp_path: Path
) -> None:
    auto = nvcc | {"PYTHONPATH": write_torch(tmp_path / "other", cuda=cuda)}
    assert compiled(build(small_checkout, **auto)) == ["one", "two"]
    reason = record(small_checkout)["cuda"]["reason"]
    assert "torch sees no NVIDIA GPU" in reason and "MRCN_FAST_CUDA=1" in reason

    assert compiled(build(small_checkout, **(auto | {"MRCN_FAST_CUDA_ARCHS": "80"}))) == ["kernels"]
    assert record(small_checkout)["cuda"]["archs"] == [80]
    done = build(small_checkout, **(auto | {"MRCN_FAST_CUDA": "1"}))
    assert record(small_checkout)["cuda"] == {
        **{"built": True, "reason": "", "log": ""},
        **{"archs": [80, 86, 90], "left_out": [100, 120], "nvcc": "12.4"},
    }
    assert "leaves out sm_100, sm_120, which nvcc 12.4" in done.stderr


def test_a_required_cuda_part_without_nvcc_is_an_error(small_checkout: Path) -> None:
    done = build(small_checkout, check=False, MRCN_FAST_CUDA="1", CUDACXX="no-such-nvcc")
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr and "MRCN_FAST_CUDA=1" in done.stderr
    assert (small_checkout / "mrcn_fast" / LIBRARY).is_file()


def test_a_failed_cuda_part_leaves_the_other_and_no_older_one(
    small_checkout: Path, nvcc: dict[str, Any]
) -> None:
    build(small_checkout, **nvcc)
    found = record(small_checkout)
    assert found["cuda"] == {
        **{"built": True, "reason": "", "log": ""},
        **{"archs": [90], "left_out": [], "nvcc": "12.4"},
    }
    libraries = [small_checkout / "mrcn_fast" / name for name in (LIBRARY, CUDA_LIBRARY)]
    assert [library.is_file() for library in libraries] == [True, True]

    (small_checkout / "csrc" / "kernels.cpp").write_text("int kernels() { return undeclared; }\n")
    build(small_checkout, **nvcc)
    found = record(small_checkout)
    assert (found["built"], found["reason"], found["log"]) == (True, "", "")
    failed = found["cuda"]
    assert not failed["built"] and failed["archs"] == []
    assert "undeclared" in failed["reason"] and "CXX" in failed["reason"] and "kernels.cpp" in failed["log"]
    assert [library.is_file() for library in libraries] == [True, False]

    required = build(small_checkout, check=False, **(nvcc | {"MRCN_FAST_CUDA": "1"}))
    assert required.returncode != 0 and "MRCN_FAST_CUDA=1" in required.stderr


def test_a_failed_library_takes_the_cuda_part_along(small_checkout: Path, nvcc: dict[str, Any]) -> None:
    build(small_checkout, **nvcc)
    (small_checkout / "csrc" / "two.cpp").write_text("int two() { return undeclared; }\n")
    build(small_checkout, **nvcc)
    found = record(small_checkout)
    assert "undeclared" in found["reason"] and "two.cpp" in found["log"]
    assert found["cuda"]["reason"].startswith("the native library was not built")
    assert not list((small_checkout / "mrcn_fast").glob("_*.so"))


def test_what_concerns_the_cuda_part_rebuilds_it_alone(small_checkout: Path, nvcc: dict[str, Any]) -> None:
    without = nvcc | {"MRCN_FAST_CUDA": "0"}
    assert compiled(build(small_checkout, **without)) == ["one", "two"]
    assert compiled(build(small_checkout, **nvcc)) == ["kernels"]
    assert compiled(build(small_checkout, **nvcc)) == []
    chosen = nvcc | {"MRCN_FAST_CUDA_ARCHS": "90;80"}
    assert compiled(build(small_checkout, **chosen)) == ["kernels"]
    assert record(small_checkout)["cuda"]["archs"] == [80, 90]
    (small_checkout / "csrc" / "kernels.cpp").write_text("int kernels() { return 2; }\n")
    assert compiled(build(small_checkout, **chosen)) == ["kernels"]
    assert compiled(build(small_checkout, **without)) == []
    assert not (small_checkout / "mrcn_fast" / CUDA_LIBRARY).exists()
    assert "MRCN_FAST_CUDA=0" in record(small_checkout)["cuda"]["reason"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MRCN_FAST_CUDA": "maybe"}, "MRCN_FAST_CUDA: got 'maybe', expected auto"),
        ({"MRCN_FAST_CUDA_ARCHS": "80,ninety"}, "MRCN_FAST_CUDA_ARCHS: got '80,ninety', expected"),
        ({"MRCN_FAST_CUDA_ARCHS": "8.0"}, "MRCN_FAST_CUDA_ARCHS: got '8.0', expected"),
        ({"MRCN_FAST_CUDA_ARCHS": "80,100"}, "got 100, which nvcc 12.4 does not know; it knows 50, 80"),
        ({"MRCN_FAST_CUDA": "1", "MRCN_FAST_NATIVE": "0"}, "MRCN_FAST_CUDA=1 needs the native library"),
    ],
)
def test_a_wrong_setting_of_the_cuda_part_is_refused(
    settings: dict[str, str], message: str, small_checkout: Path, nvcc: dict[str, Any]
) -> None:
    done = build(small_checkout, check=False, **(nvcc | settings))
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert not (small_checkout / "build").exists()


def test_importing_the_core_imports_nothing_of_reid() -> None:
    requirements = installed_metadata().requires or []
    wanted = {
        re.split(r"[^\w-]", line)[0].lower()
        for line in requirements
        if "extra == 'reid'" in line.replace('"', "'")
    }
    assert len(wanted) > 3
    packages = metadata.packages_distributions()
    modules = sorted(
        name for name, owners in packages.items() if wanted & {owner.lower() for owner in owners}
    )
    assert "rich" in modules and "numpy" in modules
    # What torch imports by itself is not this package's doing.
    program = "import sys, torch; print(*sys.modules); import mrcn_fast; print(*sys.modules)"
    before, after = (set(line.split()) for line in run_with(ROOT, program).splitlines())
    new = {name.partition(".")[0] for name in after} - {name.partition(".")[0] for name in before}
    assert "mrcn_fast" in new
    assert not new & set(modules)
    assert not [name for name in after if name.startswith("mrcn_fast.reid")]
