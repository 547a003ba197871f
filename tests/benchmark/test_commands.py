"""`mrcn-fast bench`: its subcommands, the spelling of earlier releases, and the package's imports."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrcn_fast import benchmark, cli
from mrcn_fast.benchmark import results
from tests.support.processes import ROOT

PACKAGE = Path(benchmark.__file__).parent


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Record the subcommands and their arguments instead of running them."""
    log: list[tuple[str, list[str]]] = []

    def recorder(name: str) -> cli.Command:
        def record(argv: list[str]) -> int:
            log.append((name, argv))
            return 0

        return cli.Command("", record)

    monkeypatch.setattr(cli, "BENCHES", {name: recorder(name) for name in cli.BENCHES})
    return log


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ("", "kernels"),
        ("--suite stages --device cuda", "kernels --suite stages --device cuda"),
        ("--help", ""),
        ("--device cpu --help", "kernels --device cpu --help"),
        ("--step --model mrcn", "step --model mrcn"),
        ("--model mrcn --step", "step --model mrcn"),
        ("--scorer", "scorer"),
        ("--loader tree --workers 0", "loader tree --workers 0"),
        ("--loader=tree --workers 0", "loader tree --workers 0"),
        ("--table a.jsonl", "show --table a.jsonl"),
        ("--table=a.jsonl", "show --table=a.jsonl"),
        ("--step --table a.jsonl", "show --table a.jsonl"),
        ("--compare a b", "show --compare a b"),
        ("--report a b --to c", "show --report a b --to c"),
        ("kernels --only step", "kernels --only step"),
    ],
)
def test_the_spelling_of_earlier_releases(
    earlier: str, today: str, run: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *earlier.split()]) == 0
    error = capsys.readouterr().err
    assert [" ".join((name, *argv)) for name, argv in run] == [today][: bool(today)]
    if earlier == today or not today:
        assert not error
    else:
        subcommand = today.split()[0]
        assert error.startswith("mrcn-fast bench: `mrcn-fast bench") and error.count("\n") == 1
        assert "is deprecated" in error and f"use `mrcn-fast bench {subcommand}" in error


def test_the_message_names_both_spellings(
    run: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["bench", "--step", "--table", "file"])
    assert capsys.readouterr().err == (
        "mrcn-fast bench: `mrcn-fast bench --step --table` is deprecated and will be removed in the next "
        "release; use `mrcn-fast bench show --table`\n"
    )


@pytest.mark.parametrize("name", cli.BENCHES)
def test_every_subcommand_explains_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    assert f"\n  {name} " in capsys.readouterr().out
    assert cli.main(["bench", name, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: mrcn-fast bench {name} ") and not printed.err


@pytest.mark.parametrize(("wrong", "meant"), [("kernel", "kernels"), ("loaders", "loader"), ("xyz", "")])
def test_a_wrong_subcommand(wrong: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", wrong]) == 2
    error = capsys.readouterr().err
    assert f"got the command '{wrong}', expected one of kernels, step, scorer, loader, host, show" in error
    assert (f"did you mean {meant}?" in error) == bool(meant)


# --- result files -------------------------------------------------------------------------------------


def test_names_of_earlier_results_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    line: dict[str, Any] = {"ms": {"habit": [1]}, "images_per_second": {"0": {"habit, augmented": [1]}}}
    file.write_text(json.dumps(line) + "\n")
    (found,) = results.read(file, lambda line: line, "")
    assert found == {
        "ms": {"as published": [1]},
        "images_per_second": {"0": {"as published, augmented": [1]}},
    }


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("steps-amd-epyc-zen4-2-threads.jsonl", "\n| as published | "),
        ("nvidia-h200.jsonl", "\n| case | fused | eager |"),
    ],
)
def test_committed_results_are_shown(name: str, row: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "benchmarks" / "results" / name
    assert cli.main(["bench", "show", "--table", str(file)]) == 0
    assert row in capsys.readouterr().out


# --- imports ------------------------------------------------------------------------------------------


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, also in functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """This holds at the top of a module and in functions; and no module needs tests/."""
    files = {
        ".".join(file.relative_to(PACKAGE.parents[1]).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    imports = {name: set(imported(file)) for name, file in files.items()}
    assert not [name for names in imports.values() for name in names if name.split(".")[0] == "tests"]
    free = {name: names & files.keys() - {name} for name, names in imports.items()}
    while ready := [name for name, names in free.items() if not names]:
        free = {name: names - set(ready) for name, names in free.items() if name not in ready}
    assert not free, f"these modules import each other: {sorted(free)}"
