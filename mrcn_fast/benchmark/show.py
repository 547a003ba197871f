"""`mrcn-fast bench show`: tables, comparisons and charts of result files; nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mrcn_fast.benchmark import results
from mrcn_fast.flags import PATH, Flags
from mrcn_fast.outputs import check_folder

_KINDS: Final = ("table", "compare", "report")


@dataclass(frozen=True)
class Options:
    """The flags of `bench show`; one of `table`, `compare` and `report` is given."""

    table: Path | None
    compare: tuple[Path, Path] | None
    report: Sequence[Path] | None
    to: Path


def flags() -> Flags:
    """Return the flags of `bench show`."""
    found = Flags("bench show", "print, compare or draw files of results; measure nothing")
    found.add("--table", PATH, None, "print a file's newest results, of kernels and of steps, as Markdown")
    found.add("--compare", PATH, None, "say which cases became faster or slower between two files", nargs=2)
    found.add("--report", PATH, None, "draw files' results, as PNG and a page of HTML", nargs="+")
    found.add("--to", PATH, Path("runs/bench"), "the report's folder")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mrcn-fast bench show argv...`; the status is 0, or 2 where a file can't be read."""
    parser = flags()
    options = Options(**parser.values(argv))
    given = [f"--{name}" for name in _KINDS if getattr(options, name)]
    if len(given) != 1:
        expected = "--table, --compare and --report" if not given else "them"
        return parser.refuse(f"got {' and '.join(given) or 'nothing to show'}, expected one of {expected}")
    try:
        _show(options)
    except (ValueError, ImportError, OSError) as error:
        return parser.refuse(str(error))
    return 0


def _show(options: Options) -> None:
    if options.table:
        print_tables(options.table)
    elif options.compare:
        print("\n".join(results.compare(*options.compare)))
    elif options.report:
        check_folder(options.to, "the report")
        # Imported here because nothing else of the benchmark needs matplotlib.
        from mrcn_fast.benchmark.report import write_report

        for path in write_report(options.report, options.to):
            print(path)


def print_tables(file: Path) -> None:
    """Print the newest results in a file as Markdown tables, those of cases before those of training steps.

    Raises:
        ValueError: the file has no such results; the message names it.
    """
    lines = results.read(file, _checked, results.EXPECTED)
    steps = [line for line in lines if results.AS_PUBLISHED in line["ms"]]
    if not steps or any("fused" in line["ms"] for line in lines):
        results.print_table(file)
    if steps:
        from mrcn_fast.benchmark.suites.training_step import print_steps

        for line in {line["case"]: line for line in steps}.values():
            print_steps(line)


def _checked(line: Any) -> results.Line:
    found = results.checked(line)
    if results.AS_PUBLISHED not in found["ms"]:
        return found
    # Imported here because it needs the packages of [reid].
    from mrcn_fast.benchmark.suites.training_step import checked_line

    return checked_line(found)
