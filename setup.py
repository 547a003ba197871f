"""The native part of the build: CMakeLists.txt describes it, this calls it. Everything else: pyproject.toml.

MRCN_FAST_NATIVE=auto (default): build the library; where that fails, install without it and record why.
MRCN_FAST_NATIVE=1: a failed build is an error. MRCN_FAST_NATIVE=0: do not build.

The outcome stands in mrcn_fast/_native_build.json: {"built": bool, "reason": str, "log": str}, the reason
with what is missing and how to get it, the log with the end of the failed command's output.
mrcn_fast.backends() and `mrcn-fast info` read it when the library is not there to load.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
EXTENSION = "mrcn_fast._C"
RECORD = Path("mrcn_fast", "_native_build.json")
LOG_LINES = 60

GET_COMPILER = (
    "Debian, Ubuntu: sudo apt install g++; Fedora, RHEL: sudo dnf install gcc-c++; "
    "macOS: xcode-select --install"
)
GET_AGAIN = "then install again: make install, or pip install --no-build-isolation -e ."


class NativeBuildError(Exception):
    """The library could not be built: what is missing or failed and what to do, and the end of the log."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.log = log


def find_tool(name: str) -> str:
    """The path of cmake or ninja: the one beside this Python (pip's) first, then PATH's."""
    search = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(search))
    if found is None:
        raise NativeBuildError(
            f"{name} was not found; get it: {sys.executable} -m pip install {name}; {GET_AGAIN}"
        )
    return found


def find_compiler() -> str:
    """The C++ compiler CMake is to use: $CXX (with its flags) or the first of c++, g++, clang++ on PATH."""
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        if shutil.which(shlex.split(chosen)[0]):
            return chosen
        raise NativeBuildError(
            f"the C++ compiler CXX={chosen} was not found; unset CXX or correct it, {GET_AGAIN}"
        )
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise NativeBuildError(
        "no C++20 compiler was found (looked on PATH for c++, g++, clang++, and CXX is not set); "
        f"get one ({GET_COMPILER}), {GET_AGAIN}"
    )


def require_headers() -> None:
    """Python's headers, torch and pybind11: what the build compiles and links against."""
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        raise NativeBuildError(
            f"Python's headers were not found ({headers}/Python.h); get them (Debian, Ubuntu: "
            f"sudo apt install python3-dev; Fedora, RHEL: sudo dnf install python3-devel), {GET_AGAIN}"
        )
    for name in ("torch", "pybind11"):
        if importlib.util.find_spec(name) is None:
            raise NativeBuildError(
                f"{name} is not in the environment that builds ({sys.executable}); get it: "
                f"{sys.executable} -m pip install {name}; and build without isolation: "
                "pip install --no-build-isolation"
            )


def call(step: str, command: list[str]) -> None:
    """Runs a command, its output passed on as it comes."""
    print("+", shlex.join(command), flush=True)
    lines: list[str] = []
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise NativeBuildError(f"{step} could not start: {error}") from error
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode != 0:
        raise NativeBuildError(
            f"{step} failed: {first_error(lines) or f'exit status {process.returncode}'}. "
            f"Should the compiler be too old: g++ 11 or clang++ 14 is needed ({GET_COMPILER}); {GET_AGAIN}",
            log="".join(lines[-LOG_LINES:]),
        )


def first_error(lines: list[str]) -> str:
    """The first line of a log that tells an error; CMake's goes on to the end of its first sentence."""
    told = [line.strip() for line in lines if line.strip()]
    for at, line in enumerate(told):
        if line.startswith("CMake Error"):
            sentence = next((i for i in range(at + 1, len(told)) if told[i].endswith((".", ":"))), at)
            return " ".join(told[at : min(sentence, at + 5) + 1]).rstrip(".:")
        if "error:" in line:
            return textwrap.shorten(line, 300)
    return ""


def configure(directory: Path, cmake: str, ninja: str, compiler: str) -> None:
    """Configures the build directory, unless it was configured in the very same way before."""
    command = [
        *(cmake, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Release",
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    flags = {name: os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")}
    torch = importlib.util.find_spec("torch")
    now = json.dumps([command, compiler, flags, str(torch and torch.origin)])
    stamp = directory / "configured.json"
    if stamp.is_file() and stamp.read_text() == now and (directory / "build.ninja").is_file():
        return
    # CMake keeps the compiler and the flags of a directory's first configuration: others need a fresh one.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    call("CMake's configuration", command)
    stamp.write_text(now)


def build_directory() -> Path:
    """Where the objects stay from build to build: a directory for each Python and environment."""
    tag = sysconfig.get_config_var("SOABI") or f"cp{sys.version_info.major}{sys.version_info.minor}"
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    return ROOT / "build" / f"native-{tag}-{environment}"


def build_native(prefix: Path) -> None:
    """Builds the library in its own persistent directory and installs it under `prefix`."""
    compiler, cmake, ninja = find_compiler(), find_tool("cmake"), find_tool("ninja")
    require_headers()
    directory = build_directory()
    configure(directory, cmake, ninja, compiler)
    call("the compilation", [cmake, "--build", str(directory)])
    call("the installation of the library", [cmake, "--install", str(directory), "--prefix", str(prefix)])


class BuildNative(build_ext):
    """build_ext by CMake; leaves the library, where it could be built, and the record of the build."""

    def run(self) -> None:
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        library = prefix / self.get_ext_filename(EXTENSION)
        choice = os.environ.get("MRCN_FAST_NATIVE", "auto").strip().lower() or "auto"
        if choice not in ("auto", "0", "1"):
            raise SystemExit(
                f"MRCN_FAST_NATIVE: got {choice!r}, expected auto, 1 (must build) or 0 (do not build)"
            )
        reason, log = "", ""
        try:
            if choice == "0":
                raise NativeBuildError(
                    f"the build was switched off by MRCN_FAST_NATIVE=0; unset it, {GET_AGAIN}"
                )
            build_native(prefix)
            if not library.is_file():
                raise NativeBuildError(f"the build went through but did not install {library}")
        except NativeBuildError as error:
            # A library of older sources must not stand in for the one that could not be built.
            library.unlink(missing_ok=True)
            reason, log = error.reason, error.log
            print(f"mrcn_fast: no native library: {reason}", file=sys.stderr, flush=True)
        record = prefix / RECORD
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"built": not reason, "reason": reason, "log": log}, indent=1) + "\n")
        if reason and choice == "1":
            raise SystemExit(
                "MRCN_FAST_NATIVE=1 asks for the native library, and it could not be built (see above)"
            )

    def get_outputs(self) -> list[str]:
        directory = Path(self.build_lib)
        outputs = [directory / RECORD, directory / self.get_ext_filename(EXTENSION)]
        return [str(path) for path in outputs if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """build_py into an empty package, so that no file of an earlier build gets into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "mrcn_fast"), ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension(EXTENSION, sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
