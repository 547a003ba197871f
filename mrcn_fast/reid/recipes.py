"""The recipes: the configurations of the paper's rows as YAML, and the tables that are made of them.

A recipe holds what it differs in from the one it `extends`; its values are fields of TrainConfig.
"""

from __future__ import annotations

import os
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mrcn_fast.reid.config import ConfigError, TrainConfig

_FOLDER = files("mrcn_fast.reid") / "recipes"
_EXTENDS = "extends"


class Column(NamedTuple):
    """A group of a table's figures: one search of a data set, and the scores shown of it."""

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
    """A table of the paper. Rows without recipes are other methods, with the figures the paper quotes.

    curve: what the rows' titles are values of, where the paper draws a curve over them, or "".
    """

    title: str
    columns: dict[str, Column]
    rows: list[Row]
    note: str
    curve: str


def recipe_names() -> list[str]:
    """The recipes that come with the library, by name."""
    return _names(_FOLDER)


def load_recipe(name: str) -> dict[str, Any]:
    """The values of a recipe, by the name of one that comes with the library or the path of a .yaml file.

    What it extends (a name, or a path beside it) is merged in. Raises ConfigError for an unknown name, a file
    that is no mapping, keys that are no fields of TrainConfig, and a recipe that extends itself.
    """
    values = _merged(name, Path())
    if unknown := sorted(set(values) - {field.name for field in fields(TrainConfig)}):
        raise ConfigError(f"recipe {name}: unknown values: {', '.join(unknown)}")
    return values


def table_names() -> list[str]:
    """The paper's tables that can be made, by name."""
    return _names(_FOLDER / "tables")


def load_table(name: str) -> TableSpec:
    """A table of the paper by name. Raises ConfigError for an unknown one."""
    if name not in table_names():
        raise ConfigError(f"got table {name!r}, expected one of {', '.join(table_names())}")
    content = yaml.safe_load((_FOLDER / "tables" / f"{name}.yaml").read_text(encoding="utf-8"))
    columns = {key: Column(**column) for key, column in content["columns"].items()}
    rows = [Row(row["title"], row.get("recipes", {}), row.get("paper", {})) for row in content["rows"]]
    return TableSpec(content["title"], columns, rows, content.get("note", ""), content.get("curve", ""))


def _names(folder: Any) -> list[str]:
    names = (entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(name.removesuffix(".yaml") for name in names)


def _merged(name: str, beside: Path, extending: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's values over those it extends; `extending` holds the files that led here."""
    own = _FOLDER / f"{name}.yaml"
    path: Any = own if own.is_file() else beside / name
    if not path.is_file() or path.suffix != ".yaml":
        raise ConfigError(
            f"got recipe {name!r}, expected the path of a .yaml file or one of {', '.join(recipe_names())}"
        )
    # By its real path: ../a/b.yaml would be a new name each time.
    chain = (*extending, os.path.realpath(str(path)))
    if chain[-1] in extending:
        raise ConfigError(f"a recipe must not extend itself; found {' -> '.join(chain)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: expected YAML; found: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected values of TrainConfig by name; found {type(values).__name__}")
    base = values.pop(_EXTENDS, None)
    inherited = {} if base is None else _merged(base, beside if path is own else path.parent, chain)
    return inherited | values
