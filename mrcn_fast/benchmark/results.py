"""Result lines: their contents, printing them, tables of a file, and comparing two files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from mrcn_fast import backends
from mrcn_fast.benchmark.timing import AUTOTUNED, Case, Cost, Growth, Timing
from mrcn_fast.files import append

Line = dict[str, Any]

# The name, in the results of training steps and of the loader, of what published code of the field does.
AS_PUBLISHED: Final = "as published"

# What a file of results is, for messages.
EXPECTED: Final = "result lines, as --out writes them"

# Names in the result lines of earlier versions, and today's. Files of results are only added to.
_RENAMED: Final = {"habit": AS_PUBLISHED, "habit, augmented": f"{AS_PUBLISHED}, augmented"}


def machine(device: str = "cpu") -> Line:
    """Return what a result line says about the machine that it was measured on."""
    where = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": backends()["cpu" if device == "cpu" else "triton"].reason,
    }
    if device != "cpu":
        where |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
            "triton": importlib.metadata.version("triton"),
        }
    return where


def _commit() -> str:
    """Return the short name of HEAD, with "-dirty" where a tracked file differs from it.

    Result files don't count: they differ whenever something was measured. It is "unknown" where git doesn't
    track this file, as in an environment that lies in the repository of another project.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    differ = [*git, "diff", "--quiet", "HEAD", "--", ":(top)", ":(top,exclude)benchmarks/results"]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        words = [*git, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        return commit + "-dirty" * (subprocess.run(differ, capture_output=True).returncode != 0)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """Return the processor's name, as the system has it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def row(
    case: Case,
    timings: dict[str, Timing],
    costs: dict[str, Cost] | None = None,
    peaks: dict[str, int] | None = None,
    saved: dict[str, int] | None = None,
    refused: dict[str, str] | None = None,
    grown: Growth | None = None,
) -> Line:
    """Return the result line of a case: milliseconds of every call, ratios to the fused time, missed goals.

    Args:
        case: what was measured
        timings: of every call, by name
        costs: on a GPU: the host's time and peak memory, by name
        peaks: on a CPU: peak memory in bytes, by name
        saved: bytes that autograd keeps for the backward, by name
        refused: the error of each baseline that doesn't compile
        grown: the memory that repeated fused calls leave behind
    """
    fused = timings["fused"].median
    ratios = {name: t.median / fused for name, t in timings.items() if name not in ("fused", "floor")}
    if "floor" in timings:
        ratios["floors"] = fused / timings["floor"].median
    result: Line = {
        "case": case.name,
        **case.facts,
        "ms": {name: [round(1e3 * s, 4) for s in t] for name, t in timings.items()},
        "ratios": {name: round(r, 3) for name, r in ratios.items()},
        "goals": case.goals,
    }
    if costs:
        result["host_us"] = {name: round(cost.host, 1) for name, cost in costs.items()}
        peaks = {name: cost.peak for name, cost in costs.items()}
    if peaks:
        result["peak_bytes"] = peaks
    if saved:
        result["saved_bytes"] = saved
    if grown:
        result["grown_bytes"] = {"in_use_a_call": round(grown.in_use, 2), "resident": grown.resident}
    if refused:
        result["refused"] = refused
    return result | {"missed": [name for name, goal in case.goals.items() if _missed(name, goal, result)]}


def _missed(name: str, goal: float, result: Line) -> bool:
    """Return whether a goal is missed.

    A goal for memory is met where the system doesn't tell it, one for a baseline where that doesn't compile.
    """
    ratios = result["ratios"]
    if name == "floor":
        return bool(ratios["floors"] > goal)
    if name == "host":
        return "host_us" not in result or result["host_us"]["fused"] > goal
    if name == "memory":
        return "peak_bytes" in result and result["peak_bytes"]["fused"] > goal * result["result_bytes"]
    fastest = faster(ratios, name)
    return fastest is not None and bool(fastest < goal)


def faster(times: dict[str, Any], name: str) -> Any:
    """Return a baseline's ratio or quantiles; of its two compilations, those of the faster one.

    Returns:
        None where the baseline was not measured.
    """
    found = [times[form] for form in (name, name + AUTOTUNED) if form in times]
    return min(found, key=lambda time: time[1] if isinstance(time, list) else time, default=None)


def print_row(result: Line) -> None:
    """Print a result as a line of text."""
    ms, ratios = result["ms"], result["ratios"]
    cells = [f"{result['case']:<58}", f"{ms['fused'][1]:9.3f} ms"]
    cells += [f"{name} {ratio:5.2f}x" for name, ratio in ratios.items() if name != "floors"]
    if "host_us" in result:
        cells.append(f"host {result['host_us']['fused']:.0f} us")
    if "floors" in ratios:
        cells.append(f"{ratios['floors']:.2f} floors of {ms['floor'][1]:.2f} ms")
    if "peak_bytes" in result and "result_bytes" in result:
        cells.append(f"memory {result['peak_bytes']['fused'] / result['result_bytes']:.3f} of the results'")
    if "saved_bytes" in result:
        cells.append(f"kept for the backward {result['saved_bytes']['fused'] / 1e6:.2f} MB")
    if result.get("grown_bytes", {}).get("in_use_a_call", 0) >= 1:
        cells.append(f"LEAKS {result['grown_bytes']['in_use_a_call']} bytes per call")
    cells += [f"{name} does not compile: {error}" for name, error in result.get("refused", {}).items()]
    cells.append(f"below the goal: {', '.join(result['missed'])}" if result["missed"] else "goals met")
    print("  ".join(cells), flush=True)


def described(where: Line) -> str:
    """Return the machine of a result line as text.

    It includes the instruction set, without extensions: processors of different generations may have one
    name.
    """
    if "gpu" in where:
        return f"{where['gpu']}, torch {where['torch']}, CUDA {where['cuda']}, Triton {where['triton']}"
    isa = re.match(r"C\+\+ kernels(?:,| for) (avx512|\w+)", where.get("kernels", ""))
    cpu = where["cpu"] + (f", {isa[1]}" if isa else "")
    return f"{cpu}, {where['threads']} threads, torch {where['torch']}, {where['pages']} pages"


def write(file: Path, *lines: Line) -> None:
    """Append results to a file, all or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    append(file, "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def read(file: Path, check: Callable[[Any], Line], expected: str) -> list[Line]:
    """Read the lines of a file of results, with names of earlier versions replaced by today's.

    Args:
        file: a file of JSON lines
        check: returns a line that fits, and raises ValueError for another one
        expected: what the file should be, for messages

    Raises:
        ValueError: the message names the file, the line and what is wrong with it.
    """
    if not file.is_file():
        raise ValueError(
            f"{file}: expected {expected}; found {'a folder' if file.is_dir() else 'no such file'}"
        )
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{file}: expected {expected}; found: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file}: expected {expected}; found a file that isn't in UTF-8") from None
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text, object_hook=_with_new_names)
        except (ValueError, RecursionError):
            raise ValueError(f"{file}: expected {expected}; found no JSON in line {number}") from None
        try:
            lines.append(check(line))
        except ValueError as error:
            raise ValueError(f"{file}: expected {expected}; in line {number} {error}") from None
    return lines


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(name, name): value for name, value in values.items()}


def checked(line: Any) -> Line:
    """Return a line that has what tables and charts read.

    Raises:
        ValueError: the message names what the line lacks.
    """
    if not isinstance(line, dict):
        raise ValueError("got no values by name")
    for name in ("case", "date", "torch"):
        if not isinstance(line.get(name), str):
            raise ValueError(f"got no text as {name}")
    ratios, times = line.get("ratios"), line.get("ms")
    if not isinstance(ratios, dict) or not _are_numbers(ratios.values()):
        raise ValueError("got no numbers by name as ratios")
    if not isinstance(times, dict) or not all(
        isinstance(row, list) and _are_numbers(row) for row in times.values()
    ):
        raise ValueError("got no lists of numbers by name as ms")
    return line


def _are_numbers(values: Iterable[object]) -> bool:
    return all(type(value) in (int, float) for value in values)


def newest(*files: Path) -> dict[str, dict[str, Line]]:
    """Return the newest result of every case, by the machine that `described` names and by the case's name.

    Raises:
        ValueError: a file is missing or has no results of cases; the message names it.
    """
    found: dict[str, dict[str, Line]] = {}
    for file in files:
        lines = [line for line in read(file, checked, EXPECTED) if "fused" in line["ms"]]
        if not lines:
            raise ValueError(f"{file}: expected {EXPECTED}; found none of kernels")
        for line in lines:
            try:
                known = found.setdefault(described(line), {})
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}: expected {EXPECTED}; that of {line['case']} has no {error} of the machine it "
                    "was measured on"
                ) from None
            case = line["case"]
            if case not in known or known[case]["date"] <= line["date"]:
                known[case] = line
    return found


def print_table(file: Path) -> None:
    """Print the newest result of every case in ``file`` as Markdown, one table per machine."""
    for place, found in newest(file).items():
        print(f"{place}; {days(list(found.values()))}\n")
        print("\n".join(markdown(found.values())) + "\n")


def days(lines: Sequence[Line]) -> str:
    """Return the days on which the results were measured, from the first to the last."""
    first, last = (choose(line["date"][:10] for line in lines) for choose in (min, max))
    return first if first == last else f"{first} to {last}"


def markdown(found: Iterable[Line]) -> list[str]:
    """Return the results as lines of a Markdown table."""
    lines = [
        "| case | fused | eager | instance_norm | torch.compile | compile of the collapsed form | floors |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in found:
        case = result["case"]
        of_maps = ("eager", "instance_norm", "compile", "compile collapsed")
        names = ("loop", None, "vectorized", None) if "loop" in result["ratios"] else of_maps
        ratios = [None if name is None else faster(result["ratios"], name) for name in names]
        fused = result["ms"]["fused"][1]
        cells = [
            f"{fused:.2f} ms" if fused >= 0.1 else f"{1e3 * fused:.0f} µs",
            *("–" if r is None else f"{r:.1f} ×" for r in ratios),
        ]
        floors = result["ratios"].get("floors")
        lines.append(f"| {case} | {' | '.join(cells)} | {'–' if floors is None else f'{floors:.2f}'} |")
    return lines


def compare(before: Path, after: Path) -> list[str]:
    """Return lines of text that say which cases became faster or slower from one file to the other.

    A case became faster or slower where the ranges from the 20th to the 80th percentile of its fused times
    don't overlap. Where the floor's ranges don't overlap either, the machine was at least a part of the
    reason. If a file has results of a case from several machines, the newest one counts.

    Raises:
        ValueError: a file has no results of cases.
    """
    old, new = (_newest_of_any_machine(file) for file in (before, after))
    lines = []
    for file, own, other in ((before, old, new), (after, new, old)):
        if missing := [case for case in other if case not in own]:
            lines.append(f"not in {file}: {', '.join(missing)}")
    shared = [case for case in old if case in new]
    places = {described(found[case]) for found in (old, new) for case in shared}
    if len(places) > 1:
        lines.append(f"measured in different places: {'; '.join(sorted(places))}")
    return lines + [_moved(old[case], new[case]) for case in shared]


def _newest_of_any_machine(file: Path) -> dict[str, Line]:
    lines = [line for found in newest(file).values() for line in found.values()]
    return {line["case"]: line for line in sorted(lines, key=lambda line: str(line["date"]))}


def _moved(old: Line, new: Line) -> str:
    low, before, high = old["ms"]["fused"]
    new_low, after, new_high = new["ms"]["fused"]
    verdict = "slower" if new_low > high else "faster" if new_high < low else "within the spread"
    text = f"{old['case']:<58}  {before:9.3f} -> {after:9.3f} ms  {after / before:5.2f} ×  {verdict}"
    floors = [line["ms"].get("floor") for line in (old, new)]
    if verdict != "within the spread" and all(floors):
        (floor_low, floor, floor_high), (to_low, to, to_high) = floors
        if to_low > floor_high or to_high < floor_low:
            text += f"; the floor moved too, {to / floor:.2f} ×"
    return text
