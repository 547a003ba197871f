"""Result lines: goals, tables, comparisons and files."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mrcn_fast import benchmark, cli
from mrcn_fast.benchmark import Case, Cost, Timing, results
from mrcn_fast.benchmark.timing import AUTOTUNED


def result(goals: dict[str, float], host: float = 10.0, floor: float = 0.5, **times: float) -> dict[str, Any]:
    medians = {"fused": 1.0, "floor": floor} | times
    timings = {name: Timing(0.9 * t, t, 1.1 * t) for name, t in medians.items()}
    case = Case("a case", dict, goals, facts={"result_bytes": 100})
    return benchmark.row(case, timings, {name: Cost(host, 103) for name in timings})


@pytest.mark.parametrize(
    ("goals", "settings", "missed"),
    [
        ({"compile": 2.0}, {"compile": 2.1}, []),
        ({"compile": 2.0}, {"compile": 1.9}, ["compile"]),
        ({"compile": 2.0}, {"compile": 2.1, f"compile{AUTOTUNED}": 1.9}, ["compile"]),
        ({"compile": 2.0}, {"compile": 2.2, f"compile{AUTOTUNED}": 2.1}, []),
        ({"compile": 2.0}, {f"compile{AUTOTUNED}": 1.9}, ["compile"]),
        ({"floor": 1.25}, {"floor": 0.81}, []),
        ({"floor": 1.25}, {"floor": 0.79}, ["floor"]),
        ({"host": 40.0}, {"host": 39.0}, []),
        ({"host": 40.0}, {"host": 41.0}, ["host"]),
        ({"memory": 1.04}, {}, []),
        ({"memory": 1.02}, {}, ["memory"]),
    ],
)
def test_goals(goals: dict[str, float], settings: dict[str, float], missed: list[str]) -> None:
    """Of a baseline's two compilations the faster one counts."""
    assert result(goals, **settings)["missed"] == missed


GPU = {"date": "2026", "gpu": "NVIDIA X", "torch": "2.11", "cuda": "13.0", "triton": "3.6.0"}


def test_a_gpus_result_is_printed_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result({}, host=12.3, eager=6.0, compile=2.0)
    assert found["host_us"]["fused"] == 12.3 and found["peak_bytes"]["eager"] == 103
    benchmark.print_row(found)
    printed = capsys.readouterr().out
    assert "host 12 us" in printed and "memory 1.030 of the results'" in printed
    file = tmp_path / "results" / "x.jsonl"
    benchmark.write(file, GPU | result({}, eager=5.0))
    benchmark.write(file, GPU | found)
    assert cli.main(["bench", "show", "--table", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA X, torch 2.11, CUDA 13.0, Triton 3.6.0; 2026" in printed
    assert "| a case | 1000.00 ms | 6.0 × | – | 2.0 × | – | 2.00 |" in printed and "5.0 ×" not in printed


def test_a_comparison_shows_what_changed_between_two_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scaled(line: dict[str, Any], by: float, floor: float = 1.0) -> dict[str, Any]:
        ms = {n: [t * (floor if n == "floor" else by) for t in times] for n, times in line["ms"].items()}
        return line | {"ms": ms}

    lines = [result({}) | {"case": name} for name in ("same", "slow", "machine", "fast", "gone")]
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for line, by, floor in zip(lines, (1.1, 1.3, 1.3, 0.8, 1), (1, 1, 1.4, 1, 1), strict=True):
        benchmark.write(files[0], GPU | line)
        if line["case"] != "gone":
            benchmark.write(files[1], GPU | {"gpu": "NVIDIA Y"} | scaled(line, by, floor))
    assert cli.main(["bench", "show", "--compare", *map(str, files)]) == 0
    missing, places, *moved = capsys.readouterr().out.splitlines()
    assert missing == f"not in {files[1]}: gone"
    assert "NVIDIA X" in places and "NVIDIA Y" in places
    assert [line.split("×  ")[1] for line in moved] == [
        "within the spread", "slower", "slower; the floor moved too, 1.40 ×", "faster",
    ]  # fmt: skip


def test_machines_have_tables_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table has the newest result of each case, in whatever order the file has them."""
    file = tmp_path / "x.jsonl"
    cpu = {"cpu": "A", "threads": 2, "torch": "2.13", "pages": "warm"}
    old = cpu | {"kernels": "C++ kernels, avx2 of ..."}  # as committed files before 2026-12 have it
    new = cpu | {"kernels": "C++ kernels for avx512bf16, compiled for ..."}
    for where, day, ratio in ((new, 3, 2.0), (old, 1, 3.0), (new, 2, 4.0)):
        benchmark.write(file, where | {"date": f"2026-11-0{day}T00"} | result({}, eager=ratio))
    benchmark.write(file, new | {"date": "2026-11-05T00"} | result({}) | {"case": "another"})
    assert cli.main(["bench", "show", "--table", str(file)]) == 0
    printed = capsys.readouterr().out
    first, second = printed.split("A, avx2, ")
    assert first.startswith("A, avx512, 2 threads, torch 2.13, warm pages; 2026-11-03 to 2026-11-05\n")
    assert "| a case | 1000.00 ms | 2.0 ×" in first and "| another |" in first
    assert second.startswith("2 threads, torch 2.13, warm pages; 2026-11-01\n") and "3.0 ×" in second


@pytest.mark.parametrize(
    "content", [None, "", "nothing of ours\n", '{"case": "a"}\n', '{"case": "step", "ms": {"habit": [1]}}\n']
)
def test_a_file_without_results_is_refused(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.jsonl"
    if content is not None:
        file.write_text(content)
    for words in (["--table", str(file)], ["--compare", str(file), str(file)], ["--report", str(file)]):
        assert cli.main(["bench", "show", *words, "--to", str(tmp_path / "report")]) == 2
        assert f"{file}: expected result lines" in capsys.readouterr().err


def test_the_commit_is_that_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        named = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
        return subprocess.run([*named, *words], capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    file = tmp_path / "results.py"
    file.touch()
    monkeypatch.setattr(results, "__file__", str(file))
    assert results._commit() == "unknown"
    git("add", "results.py")
    git("commit", "-m", "this code")
    assert results._commit() == git("rev-parse", "--short", "HEAD")
