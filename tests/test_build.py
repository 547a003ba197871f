"""The install: one version, a failed build that says why, partial rebuilds, a wheel that stands alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mrcn_fast

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
RECORD = "_native_build.json"
SETTINGS = ("CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "MRCN_FAST_NATIVE", "MRCN_FAST_BACKEND", "PYTHONPATH")

# Two translation units and no torch: what setup.py does with CMake, in seconds.
SMALL_CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(small LANGUAGES CXX)
add_library(_C MODULE csrc/one.cpp csrc/two.cpp)
set_target_properties(_C PROPERTIES PREFIX "" OUTPUT_NAME "{stem}" SUFFIX "{suffix}")
install(TARGETS _C DESTINATION mrcn_fast)
"""


def run(
    *command: str | Path, cwd: Path, check: bool = True, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command with none of the caller's build settings but `settings`; its whole output where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment.update(settings or {})
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=True, timeout=600
    )
    if check and done.returncode != 0:
        pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def build(checkout: Path, check: bool = True, **settings: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
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
    left = shutil.ignore_patterns("__pycache__", "_C.*", RECORD)
    shutil.copytree(ROOT / "mrcn_fast", tmp_path / "mrcn_fast", ignore=left)
    return tmp_path


@pytest.fixture
def small_checkout(tmp_path: Path) -> Path:
    """This project's setup.py over a library of two small files."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / "mrcn_fast").mkdir()
    (tmp_path / "mrcn_fast" / "__init__.py").write_text('__version__ = "0"\n')
    (tmp_path / "README.md").touch()
    (tmp_path / "csrc").mkdir()
    for name in ("one", "two"):
        (tmp_path / "csrc" / f"{name}.cpp").write_text(f"int {name}() {{ return 1; }}\n")
    stem, suffix = LIBRARY.split(".", 1)
    (tmp_path / "CMakeLists.txt").write_text(SMALL_CMAKE.format(stem=stem, suffix="." + suffix))
    return tmp_path


def record(checkout: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((checkout / "mrcn_fast" / RECORD).read_text())
    return loaded


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
    for told in (reason, done.stderr):
        assert "no C++20 compiler was found" in told
        assert "apt install g++" in told and "dnf install gcc-c++" in told and "xcode-select" in told


def test_a_failed_build_leaves_a_reason_its_log_and_no_older_library(small_checkout: Path) -> None:
    build(small_checkout)
    assert record(small_checkout) == {"built": True, "reason": "", "log": ""}
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
    def compiled(output: str) -> list[str]:
        return re.findall(r"Building CXX object \S*/(\w+)\.cpp", output)

    assert sorted(compiled(build(small_checkout).stdout)) == ["one", "two"]
    assert compiled(build(small_checkout).stdout) == []
    (small_checkout / "csrc" / "two.cpp").write_text("int two() { return 2; }\n")
    changed = build(small_checkout).stdout
    assert compiled(changed) == ["two"]
    assert "compiler identification" not in changed  # configured once
    assert sorted(compiled(build(small_checkout, CXXFLAGS="-DOTHER").stdout)) == ["one", "two"]


@pytest.mark.slow
def test_a_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    # From the checkout itself and with the caller's settings: the objects of its last build serve.
    settings = {name: value for name, value in os.environ.items() if name in SETTINGS}
    settings["MRCN_FAST_NATIVE"] = "1"
    run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", wheels, "."),
        cwd=ROOT,
        settings=settings,
    )
    (wheel,) = wheels.glob("mrcn_fast-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "mrcn_fast" / "reid").glob("recipes/*.yaml")}
    assert {f"mrcn_fast/{LIBRARY}", f"mrcn_fast/{RECORD}", "mrcn_fast/py.typed", *recipes} <= inside
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "mrcn_fast").rglob("*.py")}
    assert {name for name in inside if name.endswith(".py")} == sources

    elsewhere = tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(elsewhere)
    program = (
        "import mrcn_fast, torch; s = mrcn_fast.backends()['cpu']; assert s.usable, s.reason; "
        "x = torch.randn(2, 16, 3, 2); mrcn_fast.MRCNBlock(16, backend='cpu')(x, x); "
        "from mrcn_fast import _C; print(_C.__file__)"
    )
    assert Path(run_with(elsewhere, program).strip()) == elsewhere / "mrcn_fast" / LIBRARY


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
