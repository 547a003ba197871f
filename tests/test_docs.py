"""The documents: links lead somewhere, examples run, and figures are those of the result files."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from mrcn_fast import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    if path.name != "CHANGELOG.md"
)
PERFORMANCE = ROOT / "docs" / "performance.md"
RESULTS = (
    "cpu-amd-epyc-zen4-2-threads.jsonl",
    "fresh-pages-xeon-2-threads.jsonl",
    "steps-amd-epyc-zen4-2-threads.jsonl",
    "nvidia-h200.jsonl",
)


def rows(text: str) -> list[str]:
    """The lines of the tables in a page."""
    return [line for line in text.splitlines() if line.startswith("|")]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]+`(?!\])", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)", prose)
    local = [target for target in targets if not target.startswith(("http:", "https:"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_readmes_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_performance_has_the_rows_of_the_result_files(capsys: pytest.CaptureFixture[str]) -> None:
    printed: set[str] = set()
    for name in RESULTS:
        assert cli.main(["bench", "show", "--table", str(ROOT / "benchmarks" / "results" / name)]) == 0
        printed |= set(rows(capsys.readouterr().out))
    before_the_commands, after = PERFORMANCE.read_text().split("## Where the figures come from")
    shown = rows(before_the_commands) + rows(after.partition("## Kernels on a GPU")[2])
    assert len(shown) > 60
    assert [row for row in shown if row not in printed] == []


def test_the_readmes_speeds_are_those_of_the_performance_page() -> None:
    speed = (ROOT / "README.md").read_text().partition("## Speed")[2].partition("\n## ")[0]
    measured = {tuple(cells(row)) for row in rows(PERFORMANCE.read_text())}
    # A measured row is: case, fused, eager, instance_norm, torch.compile, collapsed form, floors.
    known = {(row[1], row[2], row[4], row[5]) for row in measured if len(row) == 7}
    shown = [tuple(cells(row)[1:]) for row in rows(speed)[2:]]
    assert len(shown) == 5
    assert [row for row in shown if row not in known] == []


def demo_table(name: str) -> list[list[str]]:
    """The rows of the demo's table of rank-1 in percent, from the result files of five seeds."""
    files = [ROOT / "benchmarks" / "results" / f"{name}-seed-{seed}.json" for seed in range(5)]
    scores = [json.loads(file.read_text())["scores"] for file in files]
    networks = ("baseline", "mrcn-without-cqc", "mrcn")
    rank1 = [[100 * of[network]["rank1"] for network in networks] for of in scores]
    by_seed = [[str(seed), *(f"{value:.1f}" for value in values)] for seed, values in enumerate(rank1)]
    means = [f"{statistics.mean(row):.1f} ± {statistics.stdev(row):.1f}" for row in zip(*rank1, strict=True)]
    return [*by_seed, ["mean ± standard deviation", *means]]


def test_the_demos_scores_are_those_of_the_result_files() -> None:
    page = (ROOT / "docs" / "explanation" / "cqc-readings.md").read_text()
    section = page.partition("## What the demo shows")[2].partition("\n## ")[0]
    shown = [cells(row) for row in rows(section) if not row.startswith(("| seed", "|---"))]
    assert shown == demo_table("demo") + demo_table("demo-one-thread")


def test_the_studys_table_is_that_of_the_result_file() -> None:
    pytest.importorskip("lightning_fabric", reason="the study needs the packages of [reid]")
    from mrcn_fast.reid.paper.study import markdown

    page = (ROOT / "docs" / "explanation" / "cqc-readings.md").read_text()
    result = json.loads((ROOT / "benchmarks" / "results" / "study-cqc.json").read_text())
    assert rows(page.partition("## What the study shows")[2]) == rows(markdown(result))
