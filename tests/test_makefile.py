"""The Makefile: the environment that it makes, whose Python is a shell script here, and `make clean`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.builds import run
from tests.support.processes import ROOT

FAKE_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin" && echo made > "$3/pyvenv.cfg" && [ -z "$FAKE_FAILS" ] && cp "$0" "$3/bin/python"
fi
"""


def environment(folder: Path, venv: str, *, fails: bool) -> subprocess.CompletedProcess[str]:
    """`make environment` there, with a Python whose venv module fails or doesn't."""
    shutil.copy2(ROOT / "Makefile", folder)
    fake = folder / "fake-python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    command = ("make", "environment", f"VENV={venv}", f"PYTHON={fake}")
    settings = {"FAKE_FAILS": "1" if fails else "", "MAKEFLAGS": ""}
    return run(*command, cwd=folder, check=False, settings=settings)


def contents(folder: Path) -> dict[str, str]:
    """What was in the folder before, where it still is as it was."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and "pyvenv.cfg" not in path.parts
    }


@pytest.mark.parametrize("venv", ["env", "a/b/env"])
def test_a_failed_environment_leaves_nothing_of_a_new_folder(tmp_path: Path, venv: str) -> None:
    done = environment(tmp_path, venv, fails=True)
    assert done.returncode != 0 and "can't make virtual environments" in done.stderr
    assert not (tmp_path / venv).exists()
    assert environment(tmp_path, venv, fails=False).returncode == 0
    assert (tmp_path / venv / "bin" / "python").exists()


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("venv", [".", "broken", "broken/", "link", "empty", "to-empty"])
def test_what_was_there_before_stays(tmp_path: Path, venv: str, fails: bool) -> None:
    (tmp_path / "broken" / "lib").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    # An environment without its Python, as an update of the system leaves it, with files of others.
    for folder in (tmp_path, tmp_path / "broken"):
        (folder / "pyvenv.cfg").write_text("home = /usr/bin")
    for name in ("notes.txt", "broken/notes.txt", "broken/lib/notes.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("broken")
    (tmp_path / "to-empty").symlink_to("empty")
    before = contents(tmp_path)
    done = environment(tmp_path, venv, fails=fails)
    assert (done.returncode != 0) == fails
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert all((tmp_path / name).is_dir() for name in ("broken", "empty", "link", "to-empty"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "to-empty").is_symlink()


@pytest.mark.parametrize("venv", ["full", "file", "full-link", ""])
def test_what_is_no_environment_is_refused(tmp_path: Path, venv: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("notes")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "full-link").symlink_to("full")
    before = contents(tmp_path)
    done = environment(tmp_path, venv, fails=True)
    assert done.returncode != 0 and "VENV" in done.stderr
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert list((tmp_path / "full").iterdir()) == [tmp_path / "full" / "notes.txt"]


NOISY_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$0" "$3/bin/python"; exit; fi
case "$*" in
  *"import re, sys"*) exit 1 ;;
  *" install "*) echo "Collecting torch"; echo "WARNING: noise" >&2; [ -z "$FAKE_FAILS" ] ;;
esac
"""


@pytest.mark.parametrize(("fails", "shown"), [("", ""), ("", "1"), ("yes", "")])
def test_the_output_of_pip_is_shown_on_demand_or_where_it_fails(
    tmp_path: Path, fails: str, shown: str
) -> None:
    shutil.copy2(ROOT / "Makefile", tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text(NOISY_PYTHON)
    fake.chmod(0o755)
    command = ("make", "environment", "torch", "VENV=env", f"PYTHON={fake}", "TORCH=torch==7", f"V={shown}")
    settings = {"FAKE_FAILS": fails, "MAKEFLAGS": ""}
    done = run(*command, cwd=tmp_path, check=False, settings=settings)
    assert (done.returncode != 0) == bool(fails)
    assert "Installing torch==7 into env: a download of" in done.stdout
    for noise in ("Collecting torch", "WARNING: noise"):
        assert (noise in done.stdout + done.stderr) == bool(fails or shown)


def test_clean_keeps_environments(tmp_path: Path) -> None:
    shutil.copy2(ROOT / "Makefile", tmp_path)
    for name in (
        "build/env/pyvenv.cfg",
        "build/a/env/pyvenv.cfg",
        "build/temp/x.o",
        "mrcn_fast/_native_build.json",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("tests", "benchmarks"):
        (tmp_path / name).mkdir()
    assert run("make", "clean", cwd=tmp_path, settings={"MAKEFLAGS": ""}).returncode == 0
    assert sorted(contents(tmp_path)) == ["Makefile", "notes.txt"]
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["a", "env"]
    # The folder itself may be one.
    for name in ("pyvenv.cfg", "bin/python"):
        (tmp_path / "build" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "build" / name).touch()
    run("make", "clean", cwd=tmp_path, settings={"MAKEFLAGS": ""})
    assert (tmp_path / "build" / "bin" / "python").exists()
