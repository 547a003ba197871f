"""The wheel and the sdist, each installed into a clean environment without a compiler on PATH."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import mrcn_fast
from tests.support.builds import CUDA_LIBRARY, LIBRARY, RECORD, SETTINGS, run
from tests.support.processes import ROOT

# The README's example of the block in a network.
EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[0]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` builds in this environment."""
    dist = tmp_path_factory.mktemp("dist")
    # From the checkout itself and with the caller's settings: the objects of its last build serve. The
    # environment has what a build needs, and nothing is installed into it.
    there = [word for target in ("environment", "torch", "requirements") for word in ("-o", target)]
    settings = {name: value for name, value in os.environ.items() if name in SETTINGS}
    settings |= {"MRCN_FAST_NATIVE": "1", "MAKEFLAGS": ""}
    run("make", "wheel", *there, f"VENV={sys.prefix}", f"DIST={dist}", cwd=ROOT, settings=settings)
    (built,) = dist.glob("mrcn_fast-*.whl")
    return built


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    """The source distribution of this checkout."""
    copy = tmp_path / "checkout"
    left = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", RECORD)
    shutil.copytree(ROOT, copy, ignore=left)
    program = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", program, cwd=copy)
    (built,) = (copy / "dist").glob("mrcn_fast-*.tar.gz")
    return built


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """The Python of a new environment that has this one's packages, but not this checkout."""
    folder = tmp_path / "clean"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", variables))
    # The path files of the packages there, such as that of an editable install, are not read from here.
    borrowed = [path for path in sys.path if path.endswith("-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin" / "python"


def in_clean(python: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command where neither a compiler nor make is on PATH."""
    path = {"PATH": str(python.parent), "MRCN_FAST_NATIVE": "auto", "MRCN_FAST_CUDA": "auto"}
    return run(*command, cwd=python.parent, settings=path)


def install(python: Path, package: Path) -> None:
    """Install a package as pip does in an environment that has torch."""
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall")
    in_clean(python, sys.executable, "-m", "pip", "--python", python, "install", *options, package)


def test_a_wheel_has_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    content = zipfile.ZipFile(wheel)
    inside = set(content.namelist())
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "mrcn_fast").rglob("recipes/**/*.yaml")}
    assert len(recipes) > 20
    assert {f"mrcn_fast/{LIBRARY}", f"mrcn_fast/{RECORD}", "mrcn_fast/py.typed", *recipes} <= inside
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "mrcn_fast").rglob("*.py")}
    assert {name for name in inside if name.endswith(".py")} == sources
    found = json.loads(content.read(f"mrcn_fast/{RECORD}"))["cuda"]
    assert (f"mrcn_fast/{CUDA_LIBRARY}" in inside) == found["built"], found["reason"]


def test_a_wheel_runs_without_a_compiler(wheel: Path, clean: Path) -> None:
    install(clean, wheel)
    ends = (
        "\nimport mrcn_fast; print(mrcn_fast.__file__)"
        "\nstatus = mrcn_fast.backends()['cpu']; assert status.usable, status.reason; print(status.reason)"
    )
    done = in_clean(clean, clean, "-c", EXAMPLE + ends)
    file, reason = done.stdout.splitlines()
    assert Path(file).is_relative_to(clean.parents[1])
    if sysconfig.get_platform() == "linux-x86_64" and os.environ.get("MRCN_FAST_ISAS", "all") == "all":
        assert "compiled for baseline, avx2, avx512" in reason
    assert "reference" not in done.stderr
    version = in_clean(clean, clean.parent / "mrcn-fast", "--version").stdout
    assert version == f"mrcn_fast {mrcn_fast.__version__}\n"


def test_a_source_distribution_without_a_compiler_is_the_reference_and_says_so(
    sdist: Path, clean: Path
) -> None:
    install(clean, sdist)
    done = in_clean(clean, clean, "-c", EXAMPLE)
    (line,) = [line for line in done.stderr.splitlines() if "reference backend" in line]
    assert "no C++20 compiler was found" in line
    info = in_clean(clean, clean.parent / "mrcn-fast", "info").stdout
    assert re.search(r"cpu +not usable: .*no C\+\+20 compiler was found", info)
    assert re.search(r"reference usable", info)
