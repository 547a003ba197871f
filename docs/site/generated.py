"""The parts of the documentation that are generated: commands, recipes, examples, and formulas as MathML.

A page has a line `<!-- generated: NAME -->` where a part of `PARTS` belongs; the page read in the repository
is whole without it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mrcn_fast import cli

ROOT: Final = Path(__file__).resolve().parents[2]
_HELP_COLUMNS: Final = "88"
_MARKER: Final = re.compile(r"<!-- generated: ([\w-]+) -->")
_FORMULA: Final = re.compile(
    r"<(?:span|div) class=\"arithmatex\">\\([(\[])(.*?)\\[)\]]</(?:span|div)>", re.DOTALL
)


def commands() -> Iterator[tuple[str, ...]]:
    """List the words of every command that has a help of its own."""
    for name in cli.COMMANDS:
        yield (name,)
    for name in cli.BENCHES:
        yield ("bench", name)


def help_of(words: tuple[str, ...]) -> str:
    """Read what `mrcn-fast WORDS --help` prints on a terminal of 88 columns."""
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _HELP_COLUMNS
    try:
        with contextlib.redirect_stdout(printed):
            status = cli.main([*words, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    if status != 0:
        raise RuntimeError(f"mrcn-fast {' '.join(words)} --help ended with status {status}")
    return printed.getvalue().rstrip()


def cli_part() -> str:
    """Write a section for each command, with its help."""
    return "\n\n".join(
        f"## {' '.join(('mrcn-fast', *words))}\n\n```text\n{help_of(words)}\n```" for words in commands()
    )


def recipes_part() -> str:
    """Write a table of the recipes: their first comment, what they extend, and the values that they set."""
    import yaml

    from mrcn_fast.reid.paper import recipes

    folder = Path(recipes.__file__).with_suffix("")
    lines = ["| recipe | what it is | extends | sets |", "|---|---|---|---|"]
    for name in recipes.recipe_names():
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        base = values.pop("extends", None)
        summary = text.splitlines()[0].removeprefix("# ")
        own = "as listed below" if base is None else ", ".join(f"`{k}: {v}`" for k, v in values.items())
        lines.append(f"| `{name}` | {summary} | {f'`{base}`' if base else ''} | {own} |")
    for name in ("paper", "synthetic"):
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8").rstrip()
        lines += ["", f"## {name}.yaml", "", "```yaml", text, "```"]
    return "\n".join(lines)


def examples_part() -> str:
    """Write a section for each example, with its whole text."""
    return "\n\n".join(
        f"## {path.name} {{#{path.stem}}}\n\n```python\n{path.read_text(encoding='utf-8').rstrip()}\n```"
        for path in sorted((ROOT / "examples").glob("*.py"))
    )


PARTS: Final[dict[str, Callable[[], str]]] = {
    "cli": cli_part,
    "examples": examples_part,
    "recipes": recipes_part,
}


def with_parts(markdown: str) -> str:
    """Put the generated parts into a page."""
    return _MARKER.sub(lambda found: PARTS[found[1]](), markdown)


def with_mathml(html: str) -> str:
    """Turn the formulas that pymdownx.arithmatex marked into MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    def formula(found: re.Match[str]) -> str:
        latex = found[2].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        return str(convert(latex.strip(), display="block" if found[1] == "[" else "inline"))

    return _FORMULA.sub(formula, html)
