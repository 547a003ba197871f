"""Whether values that were read from a file are what a type says: of checkpoints, journals and results."""

from __future__ import annotations

import reprlib
import sys
import textwrap
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

_TITLES: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    Tensor: "a tensor",
    type(None): "none",
}


class Words(str):
    """What was found, in words: a message shows it without quotation marks."""


class SchemaError(ValueError):
    """A value that is not what it should be; the message says where it stands, the expected and the found."""


def unlike(place: str, expected: str, found: object) -> SchemaError:
    """The error of a value `found` at `place`."""
    return SchemaError(f"{place}: expected {expected}, found {shown(found)}")


def check(holds: bool, place: str, expected: str, found: object) -> None:
    """Raise SchemaError unless something holds of the value `found`."""
    if not holds:
        raise unlike(place, expected, found)


def conform(value: object, shape: Any, place: str) -> Any:
    """`value` where it is of the type `shape`, else SchemaError; `place` names the value in the message.

    `shape` is int (of 64 bits), float (a finite number, or a whole one), bool, str, None, Tensor, Any, a
    Literal, a union of them, or is made of them: tuple[...] (the result then is a tuple, the value may be a
    list), dict[str, ...], a NamedTuple (from a mapping of its fields), or a mapping of names to shapes, of
    which no name may be missing and none added. Types are exact: True is no whole number.
    """
    origin, arguments = get_origin(shape), get_args(shape)
    if shape is Any:
        return value
    if isinstance(shape, Mapping):
        return _record(value, shape, place)
    if hasattr(shape, "_fields"):
        return shape(**_record(value, get_type_hints(shape), place))
    if origin is dict:
        return _record(value, dict.fromkeys(_names(value, place), arguments[1]), place)
    if origin is tuple:
        return _tuple(value, arguments, place)
    check(_is_of(value, shape), place, title(shape), value)
    return value


def title(shape: Any) -> str:
    """A type in words, for messages."""
    origin, arguments = get_origin(shape), get_args(shape)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if _is_union(shape):
        return " or ".join(map(title, arguments))
    if origin is tuple:
        return _tuple_title(arguments)
    return "values by name" if isinstance(shape, Mapping) else _TITLES.get(shape, "values by name")


def _tuple_title(shapes: tuple[Any, ...]) -> str:
    count = "" if shapes[-1] is Ellipsis else f" of {len(shapes)}"
    return f"a list{count}, each {title(shapes[0])}"


def _is_union(shape: Any) -> bool:
    return get_origin(shape) in (Union, types.UnionType)


def _is_of(value: object, shape: Any) -> bool:
    if _is_union(shape):
        return any(_is_of(value, one) for one in get_args(shape))
    if get_origin(shape) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(shape))
    if shape is int and type(value) is int:
        return value.bit_length() < 64
    if shape is float and type(value) in (int, float):
        return -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]
    return type(value) is shape


def _names(value: object, place: str) -> list[str]:
    if not isinstance(value, Mapping):
        raise unlike(place, "values by name", value)
    for name in value:
        check(type(name) is str, place, "names that are text", name)
    return list(value)


def _record(value: object, shapes: Mapping[str, Any], place: str) -> dict[str, Any]:
    names = _names(value, place)
    inside = f"{place}." if place else ""
    for name in shapes:
        check(name in names, inside + name, title(shapes[name]), Words("nothing"))
    for name in names:
        check(name in shapes, inside + name, "no value of this name", value[name])  # type: ignore[index]
    return {name: conform(value[name], shape, inside + name) for name, shape in shapes.items()}  # type: ignore[index]


def _tuple(value: object, shapes: tuple[Any, ...], place: str) -> tuple[Any, ...]:
    expected = _tuple_title(shapes)
    if not isinstance(value, (list, tuple)):
        raise unlike(place, expected, value)
    if shapes[-1] is Ellipsis:
        shapes = shapes[:1] * len(value)
    check(len(value) == len(shapes), place, expected, value)
    return tuple(conform(v, s, f"{place}[{i}]") for i, (v, s) in enumerate(zip(value, shapes, strict=True)))


def shown(value: object) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, Words):
        return str(value)
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return textwrap.shorten(reprlib.repr(value), 80, placeholder="...")
