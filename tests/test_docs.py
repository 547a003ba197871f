"""The documents: links lead somewhere, code runs, and figures are those of the result files."""

from __future__ import annotations

import doctest
import inspect
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mrcn_fast
from mrcn_fast import cli
from tests.support.scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
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


def site_module(name: str) -> ModuleType:
    """A module of docs/site, which is no package; those that MkDocs alone can import are not needed here."""
    return load_script(f"docs/site/{name}.py")


links, generated = site_module("links"), site_module("generated")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs both make them of plain words."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.*)$", prose, re.MULTILINE)
    return {"#" + re.sub(r"[^\w\s-]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for path, anchor in links.links_of(page.read_text()):
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), path
        if anchor:
            assert anchor in anchors(there), f"{path}{anchor}"


def nav_pages(nav: list[Any]) -> Iterator[str]:
    """The pages of MkDocs' nav, of all sections."""
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            (section,) = entry.values()
            yield from [section] if isinstance(section, str) else nav_pages(section)


def test_the_nav_has_every_page_once() -> None:
    yaml = pytest.importorskip("yaml", reason="mkdocs.yml is read with PyYAML, of [reid]")
    nav = list(nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    written = {page.relative_to(DOCS).as_posix() for page in DOCS.glob("**/*.md")}
    assert sorted(nav) == sorted(written | set(links.OUTSIDE))


def test_the_index_names_every_page() -> None:
    named = {path for path, _ in links.links_of((DOCS / "README.md").read_text())}
    written = {page.relative_to(DOCS).as_posix() for page in DOCS.glob("**/*.md")} - {"README.md"}
    assert written - named == set()


@pytest.mark.parametrize(
    ("place", "text", "expected"),
    [
        ("how-to/a.md", "[x](../performance.md#y)", "[x](../performance.md#y)"),
        ("how-to/a.md", "[log](../../benchmarks/LOG.md)", "[log](../log.md)"),
        ("log.md", "[page](../docs/design/cpu.md)", "[page](design/cpu.md)"),
        ("performance.md", "![c](../benchmarks/charts/a.png)", "![c](benchmarks/charts/a.png)"),
        ("a.md", "[`s.py`](../examples/s.py) and `[a](b)`", "[`s.py`](examples.md#s) and `[a](b)`"),
        ("a.md", "see [`csrc/block`](../csrc/block)", "see `csrc/block`"),
        ("a.md", "[out](https://arxiv.org) [here](#b)", "[out](https://arxiv.org) [here](#b)"),
    ],
)
def test_links_on_the_site(place: str, text: str, expected: str) -> None:
    assert links.on_site(text, place) == expected


def test_generated_parts() -> None:
    pytest.importorskip("lightning_fabric", reason="the commands' flags come with the packages of [reid]")
    from mrcn_fast.reid.paper.recipes import recipe_names

    commands = generated.cli_part()
    assert [name for name in cli.COMMANDS if f"## mrcn-fast {name}\n" not in commands] == []
    assert "--cqc-features" in commands and "show this help" in commands
    assert [name for name in recipe_names() if f"| `{name}` |" not in generated.recipes_part()] == []
    assert "def main() -> None:" in generated.examples_part()
    markers = {name for page in PAGES for name in re.findall(r"<!-- generated: (\w+) -->", page.read_text())}
    assert markers == set(generated.PARTS)


def test_the_api_page_has_every_public_name() -> None:
    page = (DOCS / "reference" / "api.md").read_text()
    shown = set(re.findall(r"^::: mrcn_fast\.(?:\w+\.)*(\w+)$", page, re.MULTILINE))
    assert set(mrcn_fast.__all__) - shown == set()


# --- code on the pages --------------------------------------------------------------------------------

# These continue one another, and train.
TUTORIAL = ("train-sysu-mm01.md", "read-results.md", "own-images.md")
COMPILING = ("compile-and-export.md",)
# The code reads the files of the commands before it: tests/reid/test_exported_network.py runs it.
AFTER_COMMANDS = ("how-to/export.md",)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """The code blocks of a page in some languages, as (language, code)."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, code) for language, code in found if language in languages]


WITH_CODE = [
    page
    for page in DOCS.glob("**/*.md")
    if blocks(page, "python")
    and page.name not in TUTORIAL
    and page.relative_to(DOCS).as_posix() not in AFTER_COMMANDS
]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in COMPILING else [])
        for page in sorted(WITH_CODE)
    ],
    ids=page_name,
)
def test_code_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [text for _, text in blocks(page, "python")]
    if "mrcn_fast.reid" in "".join(code):
        pytest.importorskip("lightning_fabric", reason="this page needs the packages of [reid]")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for text in code:
        exec(text, names)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow(seconds=60)
def test_the_tutorial_runs(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric", reason="the tutorial needs the packages of [reid]")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path)), "TERM": "dumb"}
    for name in TUTORIAL:
        page = DOCS / "tutorials" / name
        code = blocks(page, "sh", "python")
        assert code
        # The blocks of a page are one script in one process: the blocks of Python share names.
        script = "".join(text if language == "python" else as_python(text) for language, text in code)
        run = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        print(run.stdout)
        assert run.returncode == 0, run.stderr[-3000:]


def as_python(shell: str) -> str:
    """Python that runs the mrcn-fast commands of a shell block."""
    commands = [shlex.split(line, comments=True) for line in shell.splitlines()]
    assert {words[0] for words in commands if words} == {"mrcn-fast"}
    calls = [f"assert main({words[1:]!r}) == 0\n" for words in commands if words]
    return "".join(["from mrcn_fast.cli import main\n", *calls])


def commands_on(page: Path) -> Iterator[list[str]]:
    """The commands of mrcn-fast that a page shows in blocks or within a sentence, as words."""
    text = page.read_text().replace("\\\n", " ")  # lines that go on
    shown = re.findall(r"^(?: {4})?(mrcn-fast .*)$", text, re.MULTILINE)
    shown += re.findall(r"`(mrcn-fast [^`]+)`", text)
    for command in shown:
        yield shlex.split(command.replace("...", ""), comments=True)[1:]


# The log has the commands of its time.
CURRENT = [page for page in PAGES if page.name != "LOG.md"]


@pytest.mark.parametrize("page", CURRENT, ids=page_name)
def test_commands_have_the_flags_that_pages_show(page: Path) -> None:
    pytest.importorskip("lightning_fabric", reason="the commands' flags come with the packages of [reid]")
    for words in commands_on(page):
        if words[0].isupper() or words[0].startswith("-"):
            continue  # `mrcn-fast COMMAND --help`, `mrcn-fast --version`
        command = tuple(words[:2]) if words[0] == "bench" and words[1:2] else (words[0],)
        assert command in set(generated.commands()) | {("bench",)}, words
        known = generated.help_of(command)
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert flag in known or flag == "--help", f"mrcn-fast {' '.join(words)}: {flag}"


# --- public docstrings --------------------------------------------------------------------------------


def doctests(name: str) -> list[doctest.DocTest]:
    """The docstrings of a public name and of what belongs to it, as tests."""
    item = getattr(mrcn_fast, name)
    names = vars(mrcn_fast) | {"torch": torch} | (vars(item) if inspect.ismodule(item) else {})
    return doctest.DocTestFinder().find(item, name, globs=names)


def test_public_names_have_examples() -> None:
    missing = {name for name in mrcn_fast.__all__ if not any(test.examples for test in doctests(name))}
    assert missing == set()


@pytest.mark.parametrize("name", mrcn_fast.__all__)
def test_examples_in_docstrings_run(name: str) -> None:
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctests(name):
        runner.run(test)
    assert runner.summarize().failed == 0


# --- figures ------------------------------------------------------------------------------------------


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


SYNTHETIC_TABLES = sorted((ROOT / "benchmarks" / "results").glob("table-*-synthetic.json"))


@pytest.mark.parametrize("path", SYNTHETIC_TABLES, ids=lambda path: path.stem)
def test_a_synthetic_table_is_that_of_its_result_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning_fabric", reason="tables need the packages of [reid]")
    table = json.loads(path.read_text())["table"]
    assert cli.main(["table", table, "--from", str(path)]) == 0
    printed = rows(capsys.readouterr().out)
    page = (DOCS / "how-to" / "reproduce-a-table.md").read_text()
    shown = page.partition(f"table {table} --from benchmarks/results/{path.name}")[2]
    assert len(printed) > 8
    assert rows(shown.partition("\n## ")[0].partition("--from ")[0]) == printed
