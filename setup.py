"""The native part of the build: CMakeLists.txt describes it, this calls it. Everything else: pyproject.toml.

MRCN_FAST_NATIVE=auto (default): build the library; where that fails, install without it and record why.
MRCN_FAST_NATIVE=1: a failed build is an error. MRCN_FAST_NATIVE=0: do not build.

MRCN_FAST_CUDA says the same of the CUDA part, a library of its own, which nvcc compiles. By default it is
built where it can serve: where torch is a build for CUDA and there is nvcc, for the GPUs that torch sees.
MRCN_FAST_CUDA=1, for CUDA_ARCHS, and MRCN_FAST_CUDA_ARCHS ask for it on a machine without a GPU. The first
part is built even if the second fails; the second is of no use without the first.

MRCN_FAST_ISAS says for which of the processor's instruction sets the kernels are compiled: native (default
where the library is built into the checkout), those of this machine's processor; all (default for a wheel);
or names, such as avx2;avx512.

The output of CMake and the compilers is shown, or with `setup.py -q` only where a step fails; then a line
every 15 s says how far it is.

The outcome stands in mrcn_fast/_native_build.json: {"built": bool, "reason": str, "log": str, "cuda": {the
same, "archs": list, "left_out": list, "nvcc": version}}, a reason with what is missing and how to get it, a
log with the end of the failed command's output. mrcn_fast.backends() and `mrcn-fast info` read it.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
EXTENSION = "mrcn_fast._C"
# Loaded beside the torch that it was compiled for alone; without it large outputs get new pages each time.
STORAGE_LIBRARY = Path("mrcn_fast", "_storage.so")
CUDA_LIBRARY = Path("mrcn_fast", "_cuda.so")
RECORD = Path("mrcn_fast", "_native_build.json")
LOG_LINES = 60
SECONDS_BETWEEN_LINES = 15
# What compiling one of the library's files takes a core on average.
SECONDS_A_FILE = 10

# setuptools sends it to stdout, and with -q nowhere.
log = logging.getLogger("mrcn_fast.build")

OLDEST_NVCC = (12, 4)
# The data centre's and the desk's GPUs since Ampere. An sm_89 runs sm_86's code: for both, ptxas makes the
# same instructions. An nvcc before 12.8 does not know the last two.
CUDA_ARCHS = (80, 86, 90, 100, 120)
# Where the toolkit's installers put it, without an entry in PATH.
USUAL_CUDA = Path("/usr/local/cuda")

GET_COMPILER = (
    "Debian, Ubuntu: sudo apt install g++; Fedora, RHEL: sudo dnf install gcc-c++; "
    "macOS: xcode-select --install"
)
GET_AGAIN = "then install again: make install, or pip install --no-build-isolation -e ."
BUILD_TOOLS = "setuptools wheel cmake ninja pybind11"
GET_NVCC = "it is in NVIDIA's CUDA toolkit, 12.4 or newer: https://developer.nvidia.com/cuda-downloads"
OLD_COMPILER = f"Should the compiler be too old: g++ 11 or clang++ 14 is needed ({GET_COMPILER})"
NEW_COMPILER = "Should the C++ compiler be too new for this nvcc: name an older one in CXX"


class NativeBuildError(Exception):
    """A library could not be built: what is missing or failed and what to do, and the end of the log."""

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


def find_torch() -> Path:
    """torch's folder: of the torch that this Python imports, or of the one that pip's isolation hides.

    An isolated build of pip has its own packages on sys.path, and sysconfig still names the environment that
    pip installs into.
    """
    hidden = [sysconfig.get_path(name) for name in ("platlib", "purelib")]
    spec = importlib.util.find_spec("torch") or importlib.machinery.PathFinder.find_spec("torch", hidden)
    if spec is None or not spec.submodule_search_locations:
        raise NativeBuildError(
            f"torch is not in the environment that builds ({sys.executable}); install torch there first; "
            "where it is installed, the build was isolated from it: "
            f"pip install {BUILD_TOOLS}, then pip install --no-build-isolation mrcn-fast"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def is_isolated() -> bool:
    """Whether torch is in the environment that pip installs into, and not on this build's sys.path."""
    return importlib.util.find_spec("torch") is None


def require_headers() -> None:
    """Python's headers and pybind11, which the build compiles against."""
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        raise NativeBuildError(
            f"Python's headers were not found ({headers}/Python.h); get them (Debian, Ubuntu: "
            f"sudo apt install python3-dev; Fedora, RHEL: sudo dnf install python3-devel), {GET_AGAIN}"
        )
    if importlib.util.find_spec("pybind11") is None:
        raise NativeBuildError(
            f"pybind11 is not in the environment that builds ({sys.executable}); get it: "
            f"{sys.executable} -m pip install pybind11; {GET_AGAIN}"
        )


class Cuda(NamedTuple):
    """What compiles the CUDA part, and for what: compute capabilities without their point."""

    nvcc: str
    version: str
    archs: tuple[int, ...]
    left_out: tuple[int, ...]  # of the default ones, those that this nvcc doesn't know

    def arguments(self) -> list[str]:
        return [f"-DMRCN_FAST_NVCC={self.nvcc}", f"-DMRCN_FAST_CUDA_ARCHS={';'.join(map(str, self.archs))}"]


NO_CUDA = Cuda("", "", (), ())


def find_nvcc() -> str:
    """The path of nvcc: $CUDACXX, else of $CUDA_HOME, else PATH's, else where it usually lies."""
    chosen = os.environ.get("CUDACXX", "").strip()
    if chosen:
        if found := shutil.which(chosen):
            return found
        raise NativeBuildError(
            f"nvcc was not found: CUDACXX={chosen} is no program; unset CUDACXX or correct it, {GET_AGAIN}"
        )
    home = os.environ.get("CUDA_HOME", "").strip()
    # A toolkit that is named is not passed over for one that happens to lie about.
    places = [str(Path(home, "bin")), None] if home else [None, str(USUAL_CUDA / "bin")]
    for place in places:
        if found := shutil.which("nvcc", path=place):
            return found
    looked = f"in CUDA_HOME={home} and on PATH" if home else f"on PATH and in {USUAL_CUDA}/bin"
    raise NativeBuildError(
        f"nvcc was not found (looked {looked}; CUDACXX can name it); {GET_NVCC}; {GET_AGAIN}"
    )


def ask_nvcc(nvcc: str, question: str) -> str:
    try:
        done = subprocess.run([nvcc, question], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise NativeBuildError(f"{nvcc} does not run: {error}; {GET_NVCC}; {GET_AGAIN}") from error
    if done.returncode != 0:
        told = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
        raise NativeBuildError(f"{nvcc} {question} failed: {told}; {GET_NVCC}; {GET_AGAIN}")
    return done.stdout


def wanted_archs() -> tuple[int, ...]:
    """The architectures of MRCN_FAST_CUDA_ARCHS, ascending; none where it names none."""
    value = os.environ.get("MRCN_FAST_CUDA_ARCHS", "")
    names = re.split(r"[,;\s]+", value.strip(" ,;\t\n"))
    if names == [""]:
        return ()
    if not all(re.fullmatch(r"[1-9][0-9]{1,2}", name) for name in names):
        raise SystemExit(
            f"MRCN_FAST_CUDA_ARCHS: got {value!r}, expected compute capabilities without their point, "
            f"with commas between them; the default is {','.join(map(str, CUDA_ARCHS))}"
        )
    return tuple(sorted(set(map(int, names))))


def choose_archs(
    wanted: tuple[int, ...], known: Iterable[int], version: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What to compile for, and what is left out of the default because this nvcc doesn't know it."""
    known = sorted(known)
    unknown = tuple(arch for arch in wanted or CUDA_ARCHS if arch not in known)
    if wanted and unknown:
        raise SystemExit(
            f"MRCN_FAST_CUDA_ARCHS: got {', '.join(map(str, unknown))}, which nvcc {version} does not know; "
            f"it knows {', '.join(map(str, known))}. Leave it out, or name another nvcc in CUDACXX"
        )
    return tuple(arch for arch in wanted or CUDA_ARCHS if arch in known), unknown


def seen_gpus(torch: Path) -> tuple[int, ...]:
    """The compute capabilities, without their point, of the GPUs that torch sees; none without CUDA."""
    if runpy.run_path(str(torch / "version.py")).get("cuda") is None:
        return ()
    question = (
        "import torch; count = torch.cuda.device_count(); "
        "print(*(10 * a + b for a, b in map(torch.cuda.get_device_capability, range(count))))"
    )
    paths = [str(torch.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(
        [sys.executable, "-c", question], capture_output=True, text=True, errors="replace", env=environment
    )
    return tuple(sorted(set(map(int, done.stdout.split())))) if done.returncode == 0 else ()


def require_a_use(torch: Path) -> tuple[int, ...]:
    """The GPUs that an unasked CUDA part is built for; an error that says why it would be of no use."""
    if gpus := seen_gpus(torch):
        return gpus
    raise NativeBuildError(
        "torch sees no NVIDIA GPU here, so the CUDA part was left out; MRCN_FAST_CUDA=1 builds it all the "
        "same, for the GPUs of MRCN_FAST_CUDA_ARCHS"
    )


def find_cuda(gpus: tuple[int, ...] = ()) -> Cuda:
    """What the CUDA part is to be compiled with; an error that says why there can't be one.

    For MRCN_FAST_CUDA_ARCHS, else for those of `gpus` that this nvcc knows, else for CUDA_ARCHS.
    """
    nvcc = find_nvcc()
    told = ask_nvcc(nvcc, "--version")
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None:
        raise NativeBuildError(f"{nvcc} --version names no release: {textwrap.shorten(told, 200)}")
    version = f"{release[1]}.{release[2]}"
    if (int(release[1]), int(release[2])) < OLDEST_NVCC:
        raise NativeBuildError(f"nvcc {version} ({nvcc}) is too old; {GET_NVCC}; {GET_AGAIN}")
    known = sorted(map(int, re.findall(r"\bsm_(\d+)\b", ask_nvcc(nvcc, "--list-gpu-code"))))
    wanted = wanted_archs() or tuple(gpu for gpu in gpus if gpu in known)
    return Cuda(nvcc, version, *choose_archs(wanted, known, version))


def call(step: str, command: list[str], advice: str = OLD_COMPILER) -> None:
    """Runs a command, its output passed on as it comes, or with -q where it fails."""
    log.info("+ %s", shlex.join(command))
    lines: list[str] = []
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise NativeBuildError(f"{step} could not start: {error}") from error
    with process, reported(step, lines):
        assert process.stdout is not None
        for line in process.stdout:
            log.info(line.rstrip("\n"))
            lines.append(line)
    if process.returncode != 0:
        if not log.isEnabledFor(logging.INFO):
            print("".join(lines[-LOG_LINES:]), end="", file=sys.stderr, flush=True)
        raise NativeBuildError(
            f"{step} failed: {first_error(lines) or f'exit status {process.returncode}'}. "
            f"{advice}; {GET_AGAIN}",
            log="".join(lines[-LOG_LINES:]),
        )


@contextmanager
def reported(step: str, lines: list[str]) -> Iterator[None]:
    """With -q, says every 15 s how far a step is whose output arrives in `lines`."""
    begun, ended = time.monotonic(), threading.Event()

    def go_on() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            done = [found for line in lines if (found := re.match(r"\[(\d+)/(\d+)\]", line))]
            far = f"{done[-1][1]} of {done[-1][2]} steps, " if done else ""
            print(f"  {step}: {far}{time.monotonic() - begun:.0f} s so far", flush=True)

    writer = threading.Thread(target=go_on, daemon=True)
    if not log.isEnabledFor(logging.INFO):
        writer.start()
    try:
        yield
    finally:
        ended.set()


# Of compilers ("error:", nvcc's also "error #177-D:"), nvcc's other programs ("ptxas fatal   :"), linkers.
ERROR = re.compile(r"\b(error|fatal)\b[^:]{0,12}:|cannot find -l")


def first_error(lines: list[str]) -> str:
    """The first line of a log that tells an error; CMake's goes on to the end of its first sentence."""
    told = [line.strip() for line in lines if line.strip()]
    for at, line in enumerate(told):
        if line.startswith("CMake Error"):
            sentence = next((i for i in range(at + 1, len(told)) if told[i].endswith((".", ":"))), at)
            return " ".join(told[at : min(sentence, at + 5) + 1]).rstrip(".:")
        if ERROR.search(line):
            return textwrap.shorten(line, 300)
    return ""


def wanted_isas(in_place: bool) -> str:
    """The instruction sets of MRCN_FAST_ISAS, as CMakeLists.txt takes them."""
    value = os.environ.get("MRCN_FAST_ISAS", "").strip().lower() or ("native" if in_place else "all")
    return "" if value == "all" else ";".join(re.split(r"[,;\s]+", value))


def find_launcher() -> list[str]:
    """What has CMake call the compiler through ccache, where there is one."""
    ccache = shutil.which("ccache")
    return [f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}"] if ccache else []


def configure(directory: Path, cmake: str, ninja: str, compiler: str, cuda: Cuda, isas: str) -> None:
    """Configures the build directory, unless it was configured in the very same way before."""
    command = [
        *(cmake, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DTORCH_ROOT={find_torch()}",
        "-DCMAKE_BUILD_TYPE=Release",
        *find_launcher(),
    ]
    given = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    flags = {name: os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")}
    now = [[command, given, compiler, flags], [*cuda.arguments(), cuda.version, isas]]
    stamp = directory / "configured.json"
    found = stamp.is_file() and (directory / "build.ninja").is_file()
    before = json.loads(stamp.read_text()) if found else []
    if before == now:
        return
    if before[:1] != now[:1]:
        # CMake keeps the compiler and the flags of a directory's first configuration: others need a fresh
        # one. Another nvcc, other architectures and other instruction sets don't, and all objects stay.
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    stamp.unlink(missing_ok=True)
    call("CMake's configuration", [*command, *cuda.arguments(), f"-DMRCN_FAST_ISAS={isas}", *given])
    stamp.write_text(json.dumps(now))


def build_directory() -> Path:
    """Where the objects stay from build to build: a directory for each Python and environment."""
    tag = sysconfig.get_config_var("SOABI") or f"cp{sys.version_info.major}{sys.version_info.minor}"
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    # An isolated build brings its own CMake, at another path each time: it keeps no other build's objects.
    isolated = "-isolated" if is_isolated() else ""
    return ROOT / "build" / f"native-{tag}-{environment}{isolated}"


def announce(cmake: str, directory: Path) -> None:
    """Says how many files are to be compiled, and about how long that takes."""
    asked = [cmake, "--build", str(directory), "--", "-n"]
    told = subprocess.run(asked, capture_output=True, text=True, errors="replace").stdout
    files, cores = len(re.findall(r"Building \w+ object", told)), os.cpu_count() or 1
    if files:
        seconds = 15 * -(-files * SECONDS_A_FILE // (15 * cores))
        print(f"Compiling the library: {files} files, about {seconds} s on {cores} free cores", flush=True)


def build_native(prefix: Path, cuda: Cuda, isas: str) -> NativeBuildError | None:
    """Builds the libraries in their own persistent directory and installs them under `prefix`.

    Raises where the first could not be built, and gives why the CUDA part could not.
    """
    compiler, cmake, ninja = find_compiler(), find_tool("cmake"), find_tool("ninja")
    require_headers()
    directory = build_directory()
    configure(directory, cmake, ninja, compiler, cuda, isas)
    announce(cmake, directory)
    compile_all = [cmake, "--build", str(directory)]
    install = [cmake, "--install", str(directory), "--prefix", str(prefix)]
    failure = None
    if cuda == NO_CUDA:
        call("the compilation", compile_all)
    else:
        try:
            # Both at once, for they keep the processor busier than one after the other, and each to its end.
            call("the compilation", [*compile_all, "--", "-k", "0"])
        except NativeBuildError:
            call("the compilation", [*compile_all, "--target", "_C"])
            try:
                call("the compilation of the CUDA part", [*compile_all, "--target", "_cuda"], NEW_COMPILER)
            except NativeBuildError as error:
                failure = error
    call("the installation of the library", install)
    if cuda != NO_CUDA and failure is None:
        call("the installation of the CUDA part", [*install, "--component", "cuda"])
    return failure


def choice(variable: str) -> str:
    """What a variable of the environment says of a part: auto, 0 or 1."""
    value = os.environ.get(variable, "auto").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: got {value!r}, expected auto, 1 (must build) or 0 (do not build)")
    return value


def build(
    prefix: Path, library: Path, isas: str
) -> tuple[NativeBuildError | None, NativeBuildError | None, Cuda]:
    """Builds both parts where they are wanted and can be built.

    Gives why the first, which is to stand at `library`, and why the CUDA part could not be built, and what
    the CUDA part was built with. A library of older sources must not stand in for one that was not built.
    """
    native_choice, cuda_choice = choice("MRCN_FAST_NATIVE"), choice("MRCN_FAST_CUDA")
    if (native_choice, cuda_choice) == ("0", "1"):
        raise SystemExit("MRCN_FAST_CUDA=1 needs the native library, and MRCN_FAST_NATIVE=0 forbids it")
    wanted_archs()  # a wrong value is an error whatever else is found
    cuda, no_native, no_cuda = NO_CUDA, None, None
    switched_off = "the build was switched off by {}=0; unset it, " + GET_AGAIN
    try:
        if cuda_choice == "0":
            raise NativeBuildError(switched_off.format("MRCN_FAST_CUDA"))
        if native_choice != "0":
            asked = cuda_choice == "1" or wanted_archs()
            cuda = find_cuda(() if asked else require_a_use(find_torch()))
    except NativeBuildError as error:
        no_cuda = error
    try:
        if native_choice == "0":
            raise NativeBuildError(switched_off.format("MRCN_FAST_NATIVE"))
        failure = build_native(prefix, cuda, isas)
        no_cuda = no_cuda or failure
        if not library.is_file():
            raise NativeBuildError(f"the build went through but did not install {library}")
        if no_cuda is None and not (prefix / CUDA_LIBRARY).is_file():
            no_cuda = NativeBuildError(f"the build went through but did not install {prefix / CUDA_LIBRARY}")
    except NativeBuildError as error:
        no_native = error
        # Its operations are those that the native library names.
        no_cuda = no_cuda or NativeBuildError(f"the native library was not built: {error.reason}")
    if no_native is not None:
        library.unlink(missing_ok=True)
        print(f"mrcn_fast: no native library: {no_native.reason}", file=sys.stderr, flush=True)
    if no_cuda is not None:
        (prefix / CUDA_LIBRARY).unlink(missing_ok=True)
        print(f"mrcn_fast: no CUDA part: {no_cuda.reason}", file=sys.stderr, flush=True)
    elif cuda.left_out:
        names = ", ".join(f"sm_{arch}" for arch in cuda.left_out)
        print(
            f"mrcn_fast: the CUDA part leaves out {names}, which nvcc {cuda.version} doesn't know",
            file=sys.stderr,
            flush=True,
        )
    return no_native, no_cuda, cuda if no_cuda is None else NO_CUDA


class BuildNative(build_ext):
    """build_ext by CMake; leaves the libraries, where they could be built, and the record of the build."""

    def run(self) -> None:
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        library = prefix / self.get_ext_filename(EXTENSION)
        no_native, no_cuda, cuda = build(prefix, library, wanted_isas(bool(self.inplace)))
        record = outcome(no_native) | {
            "cuda": outcome(no_cuda) | {"archs": cuda.archs, "left_out": cuda.left_out, "nvcc": cuda.version}
        }
        path = prefix / RECORD
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        if no_native is not None and choice("MRCN_FAST_NATIVE") == "1":
            raise SystemExit(
                "MRCN_FAST_NATIVE=1 asks for the native library, and it could not be built (see above)"
            )
        if no_cuda is not None and choice("MRCN_FAST_CUDA") == "1":
            raise SystemExit("MRCN_FAST_CUDA=1 asks for the CUDA part, and it could not be built (see above)")

    def get_outputs(self) -> list[str]:
        directory = Path(self.build_lib)
        names = [RECORD, self.get_ext_filename(EXTENSION), STORAGE_LIBRARY, CUDA_LIBRARY]
        return [str(directory / name) for name in names if (directory / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def outcome(error: NativeBuildError | None) -> dict[str, object]:
    """What the record says of a part."""
    return {
        "built": error is None,
        "reason": "" if error is None else error.reason,
        "log": "" if error is None else error.log,
    }


class BuildPython(build_py):
    """build_py into an empty package, so that no file of an earlier build gets into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "mrcn_fast"), ignore_errors=True)
        super().run()


# Not where tests read this file for its functions.
if __name__ == "__main__":
    setup(
        ext_modules=[Extension(EXTENSION, sources=[])],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    )
