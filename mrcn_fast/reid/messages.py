"""The messages for values that pydantic refuses: the setting, the value and what was expected."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError

# Types and formats of JSON schema, and our format "tensor".
_TYPES: Final = {
    "integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text",
    "path": "a path", "object": "values by name", "tensor": "a tensor",
}  # fmt: skip
# A value may be long, or contain itself.
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3
_LONGEST: Final = 200


def refused(name: str, value: object, expected: str) -> str:
    """Make the message about a value that the setting `name` doesn't take."""
    return f"got {name}={shown(value)}, expected {expected}"


def in_words(error: ValidationError, schema: dict[str, Any], name: str) -> str:
    """Say what is wrong with the setting `name`: the place in it, the value there, and what was expected.

    `schema` is the JSON schema of the setting's kind. Only the first error is described.
    """
    first = error.errors(include_url=False)[0]
    kind, place = first["type"], list(first["loc"])
    if kind == "invalid_key" or place[-1:] == ["[key]"]:
        inside = _joined(name, place[: -1 if kind == "invalid_key" else -2]) or "values"
        names = "integers" if kind.startswith("int_") else "text"
        return f"got {inside} with the name {shown(first['input'])}, expected names that are {names}"
    if kind == "missing" and isinstance(place[-1], str):
        return f"got no {_joined(name, place)}, expected {words(_part(schema, place))}"
    if kind == "missing":  # of a list that is too short
        place.pop()
    return refused(_joined(name, place), first["input"], _wanted(first, schema, place))


def wanted_whole(error: ValidationError, schema: dict[str, Any]) -> str:
    """Say what was expected of the whole value, even if only a part of it is unfit."""
    return _wanted(error.errors(include_url=False)[0], schema, [])


def words(schema: dict[str, Any]) -> str:
    """Say what a JSON schema accepts."""
    if "anyOf" in schema:  # the second is null
        return f"{words(schema['anyOf'][0])}, or none"
    if "enum" in schema or "const" in schema:
        return f"one of {', '.join(map(str, schema.get('enum') or [schema['const']]))}"
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} values, each {words(schema['prefixItems'][0])}"
    if schema.get("type") == "array":
        return f"a list of values, each {words(schema['items'])}"
    text = _TYPES.get(schema.get("format", schema.get("type", "object")), "another value")
    # pydantic before 2.12 makes 0.0 of a number's limit 0.
    least, most = (str(schema.get(limit, "")).removesuffix(".0") for limit in ("minimum", "maximum"))
    if most:
        return f"{text} from {least} to {most}"
    return f"{text} of at least {least}" if least else text


def shown(value: Any) -> str:
    """Format any value shortly for a message."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{type(value).__name__} of {value.dtype} {tuple(value.shape)}"
    try:
        text = _SHORT.repr(value)
    except ValueError:  # of an integer with more digits than Python writes
        return f"a {type(value).__name__} too long to write"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _wanted(error: Mapping[str, Any], schema: dict[str, Any], place: Sequence[str | int]) -> str:
    if error["type"] == "extra_forbidden":
        return "no value of this name"
    part = _part(schema, place)
    if error["type"] == "value_error":  # raised by one of our validators
        return f"{error['ctx']['error']}{', or none' * ('anyOf' in part)}"
    text = words(part)
    return text.replace("a number", "a finite number") if error["type"] == "finite_number" else text


def _joined(name: str, steps: Sequence[str | int]) -> str:
    for step in steps:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name


def _part(schema: dict[str, Any], steps: Sequence[str | int]) -> dict[str, Any]:
    """Find the JSON schema of a place in the value."""
    part = schema
    for step in steps:
        part = part.get("anyOf", [part])[0]
        if part.get("type") == "array":
            part = part.get("items") or part["prefixItems"][step]
        else:
            part = part.get("properties", {}).get(step) or part["additionalProperties"]
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
    return part
