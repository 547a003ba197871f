"""The checks of settings by pydantic, which are the same for values from Python, files and flags.

The annotation of a setting, its kind, says what it takes. kinds.py has the kinds of several settings.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import GenericAlias
from typing import Any, Final, ParamSpec, TypeVar, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from mrcn_fast.reid.messages import in_words, wanted_whole, words

# For a TypedDict that may have other names too, which pydantic silently drops by default.
with_more: Final = with_config(ConfigDict(extra="allow"))
_without_more: Final = with_config(ConfigDict(extra="forbid"))

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# How flags write values, where pydantic would accept more.
_WRITTEN: Final = {"integer": r"[+-]?\d+", "boolean": r"true|false|True|False"}
_SEPARATED: Final = ", separated by commas or spaces"


class SettingError(ValueError):
    """A setting doesn't take a value. The message has the setting, the value and what was expected."""


def checked(kind: Any, value: object, name: str) -> Any:
    """Check a value, and return it in plain form: a tuple for a list, Python's number for NumPy's.

    Types are exact: "3" and 3.0 are no integers, and True is no number. Raises SettingError with the setting
    `name` (or the place in it), the value and what was expected.
    """
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise SettingError(in_words(error, schema_of(kind), name)) from None


def read(kind: Any, given: str | Sequence[str]) -> Any:
    """Read the value of a flag from its word, or from the words of a list.

    Raises SettingError, whose message is only what was expected.
    """
    text = given if isinstance(given, str) else ",".join(given)
    if text in ("none", "null") and "anyOf" in schema_of(kind):
        return None
    several = is_list(kind)
    items = _items(kind, given, text) if several else [text]
    if not all(_is_written_alike(kind, item) for item in items):
        raise SettingError(expected(kind) + _SEPARATED * several)
    try:
        if not several:
            return _adapter(kind).validate_strings(text)
        return _adapter(kind).validate_python(items, strict=False)
    except ValidationError as error:
        wanted = wanted_whole(error, schema_of(kind))
        raise SettingError(wanted + _SEPARATED * (several and wanted == expected(kind))) from None


def check_fields(settings: Any, error: type[ValueError]) -> None:
    """Check each field of a dataclass and put it into its plain form. Raises `error` for an unfit value."""
    try:
        source: Callable[..., Any] = type(settings)
        for name, kind in kinds_of(source).items():
            setattr(settings, name, checked(kind, getattr(settings, name), name))
    except SettingError as unfit:
        raise error(str(unfit)) from None


def check_arguments(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A decorator: calls raise SettingError for an argument that doesn't fit its annotation.

    Arguments whose annotation is no kind, such as tensors and functions, are not checked.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        bound = signature.bind(*args, **kwargs)
        for name, kind in kinds_of(function).items():
            if name in bound.arguments:
                bound.arguments[name] = checked(kind, bound.arguments[name], name)
        return function(*bound.args, **bound.kwargs)

    return call


@functools.cache
def kinds_of(source: Callable[..., Any]) -> dict[str, Any]:
    """The kinds of a dataclass's fields or a function's arguments: annotations with a JSON schema."""
    hints = get_type_hints(source, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return" and _is_kind(hint)}


def record(title: str, kinds: Mapping[str, Any], *, more: bool = False) -> Any:
    """Make the kind of a dictionary that must have these names and, with `more`, may have others."""
    extent = with_more if more else _without_more
    return extent(TypedDict(title, dict(kinds)))  # type: ignore[operator]


def by_name(kind: Any) -> Any:
    """Make the kind of a dictionary with any names and values of one kind."""
    return GenericAlias(dict, (str, kind))


def expected(kind: Any) -> str:
    """What a setting of this kind takes, in words."""
    return words(schema_of(kind))


def is_list(kind: Any) -> bool:
    """Whether a setting of this kind takes several values."""
    return _of_value(kind).get("type") == "array"


def is_truth(kind: Any) -> bool:
    """Whether a setting of this kind is true or false."""
    return _of_value(kind).get("type") == "boolean"


@functools.cache
def schema_of(kind: Any) -> dict[str, Any]:
    """The JSON schema of a kind. Raises PydanticUserError for an annotation that is no kind."""
    return _adapter(kind).json_schema()


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _of_value(kind: Any) -> dict[str, Any]:
    """The JSON schema of a value other than None."""
    schema = schema_of(kind)
    part: dict[str, Any] = schema.get("anyOf", [schema])[0]
    return part


def _is_kind(annotation: Any) -> bool:
    try:
        return schema_of(annotation) != {}
    except PydanticUserError:
        return False


def _is_written_alike(kind: Any, word: str) -> bool:
    """Whether a word is written as in files: 48.0 and 4_8 are no integers, and yes is not true."""
    value = _of_value(kind)
    pattern = _WRITTEN.get(value.get("items", value).get("type", ""), "")
    return not pattern or re.fullmatch(pattern, word, re.ASCII) is not None


def _items(kind: Any, given: str | Sequence[str], text: str) -> list[str]:
    """Split a list into words. Commas separate texts and paths, which may contain them, only in brackets."""
    enclosed = text[:1] + text[-1:] in ("[]", "()")
    items = _of_value(kind).get("items", {})
    if items.get("type") == "string" and "enum" not in items and not enclosed:
        return [given] if isinstance(given, str) else list(given)
    return [word for word in map(str.strip, (text[1:-1] if enclosed else text).split(",")) if word]
