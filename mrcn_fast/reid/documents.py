"""The readers of YAML and JSON, with limits, so that no file can hang the process or fill its memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

# For comparison: a configuration has a hundred lines, and a table of the paper with all its runs 2 MB.
_YAML_BYTES: Final = 1 << 16
_YAML_DEPTH: Final = 8
_YAML_ALIASES: Final = 16
_JSON_BYTES: Final = 1 << 26

_MARKS: Final = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


class DocumentError(ValueError):
    """A file has unexpected content. The message has the path, the expected and the found."""


def read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """Read the mapping in a YAML file; `expected` describes it for messages.

    Scalars are read as in YAML 1.2: 1e-3 is a number and 010 is ten, but yes, 1:30 and 2024-01-01 are text.
    Raises DocumentError for a file that is missing, not UTF-8 or beyond the limits on size, depth and
    aliases, and for YAML that is no mapping, repeats a name or has tags.
    """
    text = _text(path, expected, _YAML_BYTES)
    try:
        _check_limits(text)
        content = yaml.load(text, Loader=_Loader)
    except _Refused as refused:
        raise DocumentError(f"{path}: expected {expected}; found {refused}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two of "\\Uffffffff"
        raise DocumentError(f"{path}: expected {expected}; this is no YAML: {_reason(error)}") from None
    if content is None:
        raise DocumentError(f"{path}: expected {expected}; found an empty file")
    if not isinstance(content, dict):
        raise DocumentError(f"{path}: expected {expected}; found {_KINDS.get(type(content), 'one value')}")
    return content


def read_json(path: Path, expected: str) -> Any:
    """Read a JSON file. Raises DocumentError for one that is missing, no JSON, too large or too deep."""
    text = _text(path, expected, _JSON_BYTES)
    try:
        return json.loads(text)
    except RecursionError:
        raise DocumentError(f"{path}: expected {expected}; found JSON nested too deep") from None
    except ValueError as error:
        where = ""
        if isinstance(error, json.JSONDecodeError):
            where = f" from line {error.lineno}, column {error.colno} on"
        raise DocumentError(f"{path}: expected {expected}; this is no JSON{where}") from None


_KINDS: Final = {list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}


def _text(path: Path, expected: str, most: int) -> str:
    try:
        if path.is_dir() or not path.exists():
            found = "a folder" if path.is_dir() else "no such file"
            raise DocumentError(f"{path}: expected {expected}; found {found}")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise DocumentError(f"{path}: expected {expected}; found: {error.strerror}") from None
    if len(content) > most:
        raise DocumentError(f"{path}: expected {expected}, of at most {most} bytes; found a larger file")
    for mark, name in _MARKS.items():
        if content.startswith(mark):
            raise DocumentError(
                f"{path}: expected {expected}, in UTF-8; found {name}. Save the file as UTF-8"
            )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{path}: expected {expected}, in UTF-8; found the byte {content[error.start]:#04x} at "
            f"{error.start}, which UTF-8 doesn't have there. Save the file as UTF-8"
        ) from None


class _Refused(Exception):
    """YAML is beyond the limits. The message says what was found, and the limit."""


def _check_limits(text: str) -> None:
    """Parse YAML without building its values. Raises _Refused or yaml.YAMLError."""
    depth = aliases = documents = 0
    events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
    for event in events:
        line = f"in line {event.start_mark.line + 1}"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > _YAML_DEPTH:
            raise _Refused(f"values nested more than {_YAML_DEPTH} deep, the limit, {line}")
        if aliases > _YAML_ALIASES:
            raise _Refused(f"more than {_YAML_ALIASES} aliases (*name), the limit, {line}")
        if documents > 1:
            raise _Refused(f"a second document (---) {line}; leave one")
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"the tag {event.tag} {line}; leave it out: values need none")


class _Loader(yaml.SafeLoader):
    """A loader with the scalars of YAML 1.2, which refuses repeated names."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 [PyYAML's own]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        there = set()
        for name in (name for name, _ in node.value if isinstance(name, yaml.ScalarNode)):
            if name.value in there:
                raise _Refused(f"{name.value!r} a second time in line {name.start_mark.line + 1}")
            there.add(name.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        try:
            return int(node.value)
        except ValueError:  # of thousands of digits
            raise _Refused(
                f"a number of {len(node.value)} digits in line {node.start_mark.line + 1}"
            ) from None


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _reason(error: Exception) -> str:
    """Shorten an error of PyYAML to what is wrong and where."""
    if not isinstance(error, yaml.YAMLError):
        return "an escaped character that there is not"
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {error.character:#04x} at {error.position}, which text doesn't have"
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
    return f"{getattr(error, 'problem', None) or 'it ends too early'}{where}"
