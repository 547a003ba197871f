"""Values of settings: one check for what Python, a file and the command line give.

A setting's kind is its annotation: `bool`, `int`, `float`, `str`, a path, a `Literal`, a sequence or an
optional of these, a `dict` by name or a `TypedDict`. `Annotated` adds a rule of this module:

    height: Annotated[int, Range(32, 8192)] = 288

`checked` takes the value that Python or a file gave, `read` the text of a flag. Both refuse the same values.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Larger integers overflow in torch and numpy; no setting needs them.
_BITS: Final = 63
# What a flag of an optional setting says for None.
_NONE: Final = ("none", "null")
# For messages: a value may be long, or hold itself.
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3
_LONGEST: Final = 200


class SettingError(ValueError):
    """A value that a setting doesn't take; the message has the setting, the value and what was expected."""


class Rule(Protocol):
    """What `Annotated` adds to a kind: which of its values fit. Its text is what such a value must be."""

    def holds(self, value: Any) -> bool: ...

    def of(self, kind: str) -> str:
        """The values of a kind, such as "an integer", for which the rule holds, in words."""
        ...


class Range(NamedTuple):
    """Finite numbers from `least` to `most`, both included; `why` is added to the message."""

    least: float
    most: float | None = None
    why: str = ""

    def holds(self, value: float) -> bool:
        return value >= self.least and (self.most is None or value <= self.most)

    def of(self, kind: str) -> str:
        return f"{kind} of {self}" if self.most is None else f"{kind} {self._between()}"

    def __str__(self) -> str:
        bounds = f"at least {self.least}" if self.most is None else f"a number {self._between()}"
        return bounds + (f" ({self.why})" if self.why else "")

    def _between(self) -> str:
        return f"from {self.least} to {self.most}"


class OneOf(NamedTuple):
    """One of some names, where a `Literal` can't list them."""

    names: tuple[str, ...]


class Increasing(NamedTuple):
    """A sequence in which each value is above the one before; `what` says what it lists."""

    what: str

    def holds(self, value: Sequence[Any]) -> bool:
        return list(value) == sorted(set(value))

    def of(self, kind: str) -> str:
        return f"{kind}, increasing"

    def __str__(self) -> str:
        return f"increasing {self.what}"


class PathRule(NamedTuple):
    """Text that is a path; a leading `~` becomes the home folder. `empty`: it may say that there is none."""

    empty: bool = False

    def holds(self, value: str) -> bool:
        return self.empty or value != ""

    def of(self, kind: str) -> str:
        return kind

    def __str__(self) -> str:
        return "a path that is not empty"


PathText = Annotated[str, PathRule()]


def shown(value: object) -> str:
    """A value for a message, short whatever it is."""
    try:
        text = _SHORT.repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    except ValueError:  # of an integer with more digits than Python writes
        return f"a {type(value).__name__} too long to write"


def checked(kind: Any, value: object, name: str) -> Any:
    """The value in the plain form of its kind: a tuple for a list, Python's number for numpy's.

    Raises SettingError naming the setting, the value and what was expected.
    """
    found = _kind(kind)
    try:
        return found.fit(value)
    except _Unfit as unfit:
        got = f"got {name}{unfit.place}={shown(unfit.value)}"
        like = "" if isinstance(value, (list, tuple)) else found.example
        raise SettingError(f"{got}, expected {unfit.expected}{like and f', such as [{like}]'}") from None


def read(kind: Any, words: Sequence[str], flag: str) -> Any:
    """The value that a flag's words stand for: one word, or those of a list.

    Raises SettingError naming the flag, the words and what was expected.
    """
    found = _kind(kind)
    try:
        return found.fit(found.parse(words))
    except _Unfit as unfit:
        wanted = f"{found.expected}, such as {found.example}" if found.example else unfit.expected
        got = " ".join(map(_short_word, words))
        raise SettingError(f"got {flag} {got}, expected {wanted}") from None


def _short_word(word: str) -> str:
    """A flag's word as it was written, but for one that is long or hard to see."""
    return word if word.strip() == word != "" and len(word) <= _SHORT.maxstring else shown(word)


def expected(kind: Any) -> str:
    """What a setting of this kind takes, in words."""
    return _kind(kind).expected


def symbol(kind: Any) -> str:
    """What stands for a value of a setting of this kind in a flag's help."""
    return _kind(kind).symbol


def is_list(kind: Any) -> bool:
    """Whether a setting of this kind takes several values."""
    return bool(_kind(kind).example)


def is_truth(kind: Any) -> bool:
    """Whether a setting of this kind is true or false."""
    return isinstance(_kind(kind), _Truth)


def is_kind(annotation: Any) -> bool:
    """Whether an annotation is a kind of setting."""
    try:
        _kind(annotation)
    except TypeError:
        return False
    return True


def kinds_of(source: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a dataclass's fields, or of a function's arguments, that are kinds of settings."""
    hints = get_type_hints(source, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return" and is_kind(hint)}


def check_fields(settings: Any, error: type[ValueError]) -> None:
    """Put each field of a dataclass into the form of its kind. Raises `error` for one that doesn't fit."""
    for name, kind in kinds_of(type(settings)).items():
        try:
            setattr(settings, name, checked(kind, getattr(settings, name), name))
        except SettingError as unfit:
            raise error(str(unfit)) from None


def check_arguments(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function whose calls raise SettingError for an argument that doesn't fit its annotation.

    Arguments whose annotation is no kind of setting pass as they are.
    """
    signature = inspect.signature(function)
    kinds = functools.cache(kinds_of)  # at the first call: annotations may name what comes later in a file

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        bound = signature.bind(*args, **kwargs)
        for name, kind in kinds(function).items():
            if name in bound.arguments:
                bound.arguments[name] = checked(kind, bound.arguments[name], name)
        return function(*bound.args, **bound.kwargs)

    return call


class _Unfit(Exception):
    """A value that its kind doesn't take: which, what was expected, and where in the setting it is."""

    def __init__(self, value: object, expected: str, place: str = "") -> None:
        super().__init__(expected)
        self.value, self.expected, self.place = value, expected, place


class _Kind:
    """What a setting takes.

    expected, and several in a list: in words; symbol: in a flag's help; samples: two of its values; example:
    a list as a flag has it.
    """

    expected: str
    several: str
    symbol: str
    samples: tuple[str, ...] = ("a", "b")
    example = ""
    is_text = False

    def fit(self, value: Any) -> Any:
        """The value in its plain form. Raises _Unfit."""
        raise NotImplementedError

    def parse(self, words: Sequence[str]) -> Any:
        """What a flag's words stand for, not yet checked. Raises _Unfit."""
        return self.parse_word(" ".join(words))

    def parse_word(self, word: str) -> Any:
        """What one word stands for."""
        return word


class _Truth(_Kind):
    expected, several, symbol = "true or false", "truth values", "{true,false}"

    def fit(self, value: Any) -> Any:
        if not isinstance(value, bool):
            raise _Unfit(value, self.expected)
        return value

    def parse_word(self, word: str) -> Any:
        return {"true": True, "false": False}.get(word.lower(), word)


class _Integer(_Kind):
    expected, several, symbol = "an integer", "integers", "INTEGER"
    samples = ("1", "2")

    def fit(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise _Unfit(value, self.expected)
        if abs(value) >= 2**_BITS:
            raise _Unfit(value, f"{self.expected} below 2**{_BITS}")
        return int(value)

    def parse_word(self, word: str) -> Any:
        return _number(int, word)


class _Number(_Kind):
    expected, several, symbol = "a number", "numbers", "NUMBER"

    def fit(self, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _Unfit(value, self.expected)
        try:
            return float(value)
        except OverflowError:  # of an integer beyond what a float holds
            return math.inf

    def parse_word(self, word: str) -> Any:
        return _number(float, word)


class _Text(_Kind):
    expected, several, symbol = "text", "texts", "TEXT"
    is_text = True

    def fit(self, value: Any) -> Any:
        if not isinstance(value, str):
            raise _Unfit(value, self.expected)
        if "\0" in value:
            raise _Unfit(value, f"{self.expected} without the character NUL")
        return value

    def parse_word(self, word: str) -> Any:
        if not word:
            raise _Unfit(word, f"{self.expected} that is not empty")
        return word


class _Path(_Text):
    """Text that is a path, or what `os.fspath` makes text of."""

    expected, several, symbol = "a path", "paths", "PATH"

    def fit(self, value: Any) -> Any:
        text = super().fit(os.fspath(value) if isinstance(value, os.PathLike) else value)
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            raise _Unfit(value, "a path whose characters the file system has") from None
        return os.path.expanduser(text)


class _PathObject(_Path):
    """The same as a `Path`."""

    def fit(self, value: Any) -> Any:
        return Path(super().fit(value))


class _Choice(_Kind):
    """One of the values of a `Literal` or `OneOf`, of its type: True is not 1."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self._values = values
        self.expected = f"one of {', '.join(map(str, values))}"
        self.several = f"values, each {self.expected}"
        self.samples = tuple(map(str, values[:2]))
        self.symbol = f"{{{','.join(map(str, values))}}}"

    def fit(self, value: Any) -> Any:
        plain = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value
        for known in self._values:
            if type(known) is type(plain) and known == plain:
                return known
        raise _Unfit(value, self.expected)

    def parse_word(self, word: str) -> Any:
        return {str(known): known for known in self._values}.get(word, word)


class _Optional(_Kind):
    def __init__(self, inner: _Kind) -> None:
        self._inner = inner
        self.expected = f"{inner.expected}, or none"
        self.several, self.symbol, self.example = inner.several, inner.symbol, inner.example

    def fit(self, value: Any) -> Any:
        if value is None:
            return None
        try:
            return self._inner.fit(value)
        except _Unfit as unfit:
            raise _Unfit(unfit.value, f"{unfit.expected}, or none", unfit.place) from None

    def parse(self, words: Sequence[str]) -> Any:
        return None if " ".join(words) in _NONE else self._inner.parse(words)


class _List(_Kind):
    """Values of one kind, `length` of them or any number."""

    def __init__(self, item: _Kind, length: int | None = None) -> None:
        self._item, self._length = item, length
        self.expected = self.several = f"a list of {item.several}"
        self.symbol = item.symbol
        if length is not None:
            self.expected = f"{length} {item.several}"
        self.example = ",".join(item.samples)

    def fit(self, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise _Unfit(value, self.expected)
        if self._length not in (None, len(value)):
            raise _Unfit(value, self.expected)
        return tuple(_fit_at(f"[{place}]", self._item, item) for place, item in enumerate(value))

    def parse(self, words: Sequence[str]) -> Any:
        text = ",".join(words)
        enclosed = text[:1] + text[-1:] in ("[]", "()")
        if enclosed or not self._item.is_text:  # a path may have a comma in it
            inside = text[1:-1] if enclosed else text
            words = [word for word in map(str.strip, inside.split(",")) if word]
        return [self._item.parse_word(word) for word in words]


class _Table(_Kind):
    """Values by name: those of a `TypedDict`, or any names with values of one kind."""

    expected = several = symbol = "values by name"

    def __init__(self, kinds: Mapping[str, _Kind] | _Kind) -> None:
        self._kinds = kinds

    def fit(self, value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise _Unfit(value, self.expected)
        kinds = dict.fromkeys(value, self._kinds) if isinstance(self._kinds, _Kind) else self._kinds
        if missing := [name for name in kinds if name not in value]:
            raise _Unfit(value, f"values by name, {', '.join(missing)} among them")
        return dict(value) | {name: _fit_at(f".{name}", kind, value[name]) for name, kind in kinds.items()}


class _Ruled(_Kind):
    """The values of a kind for which a rule holds."""

    def __init__(self, kind: _Kind, rule: Rule) -> None:
        self._inner, self._rule = kind, rule
        self.expected, self.several = rule.of(kind.expected), rule.of(kind.several)
        self.symbol, self.samples, self.example = kind.symbol, kind.samples, kind.example
        self.is_text = kind.is_text

    def fit(self, value: Any) -> Any:
        try:
            plain = self._inner.fit(value)
        except _Unfit as unfit:
            bounded = isinstance(self._rule, Range) and self._rule.most is not None
            wanted = self.expected if bounded else self._rule.of(unfit.expected)
            raise _Unfit(unfit.value, unfit.expected if unfit.place else wanted, unfit.place) from None
        if isinstance(plain, float) and not math.isfinite(plain):
            raise _Unfit(value, self._rule.of("a finite number"))
        if not self._rule.holds(plain):
            raise _Unfit(value, str(self._rule))
        return plain

    def parse(self, words: Sequence[str]) -> Any:
        return self._inner.parse(words)

    def parse_word(self, word: str) -> Any:
        return self._inner.parse_word(word)


def _number(make: Callable[[str], Any], word: str) -> Any:
    try:
        return make(word)
    except ValueError:
        return word


def _fit_at(place: str, kind: _Kind, value: Any) -> Any:
    try:
        return kind.fit(value)
    except _Unfit as unfit:
        raise _Unfit(unfit.value, unfit.expected, place + unfit.place) from None


_PLAIN: Final[dict[Any, type[_Kind]]] = {
    bool: _Truth,
    int: _Integer,
    float: _Number,
    str: _Text,
    Path: _PathObject,
}


@functools.cache
def _kind(annotation: Any) -> _Kind:
    """The kind of setting that an annotation says. Raises TypeError for one that is none."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]()
    if is_typeddict(annotation):
        hints = get_type_hints(annotation, include_extras=True)
        return _Table({name: _kind(hint) for name, hint in hints.items()})
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = _kind(arguments[0])
        for rule in arguments[1:]:
            if isinstance(rule, OneOf):
                inner = _Choice(rule.names)
            else:
                inner = _Ruled(_Path() if isinstance(rule, PathRule) else inner, rule)
        return inner
    if origin is Literal:
        return _Choice(arguments)
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        if len(options) > 1 and set(options) != {str, Path}:
            raise TypeError(f"{annotation}: a setting has one kind")
        inner = _Path() if len(options) > 1 else _kind(options[0])
        return _Optional(inner) if len(options) < len(arguments) else inner
    if origin is tuple and arguments[-1] is not Ellipsis:
        return _List(_kind(arguments[0]), len(arguments))
    if origin in (tuple, list, Sequence):
        return _List(_kind(arguments[0]))
    if origin in (dict, Mapping):
        return _Table(_kind(arguments[1]))
    raise TypeError(f"{annotation}: not a kind of setting")
