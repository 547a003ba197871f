"""The recipes, YAML configurations of the rows of the paper's tables, and the tables made of them.

The values of a recipe are fields of TrainConfig. A recipe that `extends` another has only the differences.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from mrcn_fast.reid.documents import DocumentError, read_yaml
from mrcn_fast.reid.messages import shown
from mrcn_fast.reid.settings import SettingError, checked, kinds_of
from mrcn_fast.reid.training.config import ConfigError, TrainConfig

_FOLDER: Final = Path(__file__).with_suffix("")
_EXTENDS: Final = "extends"
# The most recipes that may extend one another; more must be a mistake.
_LONGEST_CHAIN: Final = 16


class Column(NamedTuple):
    """A group of figures in a table: a search of a data set, and its scores that are shown."""

    dataset: str
    search: str
    title: str
    scores: list[str]


class Row(NamedTuple):
    """A row of a table: the recipe for each data set, and the paper's figures in percent by column."""

    title: str
    recipes: dict[str, str]
    paper: dict[str, list[float | None]]


class TableSpec(NamedTuple):
    """A table of the paper. Rows without recipes are other methods, with figures that the paper quotes."""

    title: str
    columns: dict[str, Column]
    rows: list[Row]
    note: str
    curve: str  # the quantity in the titles of the rows, if the paper draws a curve; else ""


def recipe_names() -> list[str]:
    """The names of the library's recipes."""
    return _names(_FOLDER)


def load_recipe(name: str) -> dict[str, Any]:
    """Read the values of a recipe: one of the library's by name, or a .yaml file by path.

    The values of the recipes that it extends (by name, or by a path beside it) are merged in. Raises
    ConfigError, which names the file, for an unknown name, a file that `documents.read_yaml` refuses, values
    that TrainConfig doesn't have or take, and a recipe that extends itself.
    """
    values: dict[str, Any] = {}
    chain: list[str] = []
    base: object = name
    beside = Path()
    while base is not None:
        path = _path(base, beside, chain[-1] if chain else "")
        # The real path, because a recipe that extends ../a/b.yaml would have a new path each time.
        chain.append(os.path.realpath(path))
        if chain[-1] in chain[:-1]:
            raise ConfigError(f"a recipe must not extend itself; found {' -> '.join(chain)}")
        if len(chain) > _LONGEST_CHAIN:
            raise ConfigError(
                f"{chain[0]}: expected at most {_LONGEST_CHAIN} recipes that extend one another"
            )
        own, base = _values(path)
        values = own | values
        beside = path.parent
    return values


def table_names() -> list[str]:
    """The names of the paper's tables that can be made."""
    return _names(_FOLDER / "tables")


def load_table(name: str) -> TableSpec:
    """Read a table of the paper by name. Raises ConfigError for an unknown name."""
    if name not in table_names():
        raise ConfigError(f"got table {name!r}, expected one of {', '.join(table_names())}")
    content = yaml.safe_load((_FOLDER / "tables" / f"{name}.yaml").read_text(encoding="utf-8"))
    columns = {key: Column(**column) for key, column in content["columns"].items()}
    rows = [Row(row["title"], row.get("recipes", {}), row.get("paper", {})) for row in content["rows"]]
    return TableSpec(content["title"], columns, rows, content.get("note", ""), content.get("curve", ""))


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _path(name: object, beside: Path, extending: str) -> Path:
    """Find the file of a recipe by its name, or by its path relative to the folder `beside`."""
    if isinstance(name, str) and name in recipe_names():
        return _FOLDER / f"{name}.yaml"
    if (
        isinstance(name, str)
        and (path := beside / os.path.expanduser(name)).suffix == ".yaml"
        and path.exists()
    ):
        return path
    where = f"{extending}: got {_EXTENDS}={shown(name)}" if extending else f"got recipe {name!r}"
    near = difflib.get_close_matches(str(name), recipe_names(), 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"{where}, expected the path of a .yaml file or one of {', '.join(recipe_names())}{meant}"
    )


def _values(path: Path) -> tuple[dict[str, Any], object]:
    """Read the values in a recipe's own file, and the recipe that it extends."""
    try:
        values = read_yaml(path, "values of TrainConfig by name")
    except DocumentError as error:
        raise ConfigError(str(error)) from None
    base = values.pop(_EXTENDS, None)
    kinds = kinds_of(TrainConfig)
    if unknown := [name for name in values if name not in kinds]:
        near = difflib.get_close_matches(str(unknown[0]), kinds, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{path}: unknown values: {', '.join(map(str, unknown))[:200]}{meant}")
    try:
        for name, value in values.items():
            checked(kinds[name], value, name)
    except SettingError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values, base
