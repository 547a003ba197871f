"""The flags of a command, and the messages for values that they don't take.

`Flags.add` needs torch alone. `add_setting`, `add_of` and `add_word` need the packages of [reid].
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import torch

# Marks a flag that has no default and must be given.
REQUIRED: Final = inspect.Parameter.empty


class Reader(NamedTuple):
    """How a word of a flag is read or, with `whole`, how all its words are read as one value.

    `read` raises ValueError for a word that the flag doesn't take. Its message is only what was expected.
    """

    read: Callable[[Any], Any]
    expected: str
    whole: bool = False


class Flags(argparse.ArgumentParser):
    """The flags and words that a command takes.

    Flags are written with dashes or underscores, as --image-size or --image_size, and never abbreviated. A
    setting that is true or false and stands alone is true; several values of a setting are separated by
    spaces or commas. `group` begins a group of flags in --help.
    """

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"mrcn-fast {command}",
            usage="%(prog)s [--flag value ...]",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            exit_on_error=False,
            argument_default=argparse.SUPPRESS,
        )
        self._flags: dict[str, Reader] = {}
        self._words: dict[str, Reader] = {}
        self._default_of: dict[str, Any] = {}
        self._help_of: dict[str, str] = {}
        self._group: argparse._ActionsContainer = self

    def group(self, title: str) -> None:
        """Begin or go on with a group of --help, which gets the flags that are added next."""
        there = [group for group in self._action_groups if group.title == title]
        self._group = there[0] if there else self.add_argument_group(title)

    def add(self, flag: str, reader: Reader, default: Any = None, help: str = "", **options: Any) -> None:
        """Add a flag such as "--out"; the options are those of argparse."""
        self._flags[flag], self._default_of[flag], self._help_of[flag] = reader, default, help
        help = _with_default(f"{help}: {reader.expected}" if help else reader.expected, default)
        options = {"metavar": flag.removeprefix("--").upper()} | options
        self._group.add_argument(flag, help=help.replace("%", "%%"), **options)

    def add_switch(self, flag: str, help: str) -> None:
        """Add a flag without a value, which is true where it is given."""
        self._default_of[flag], self._help_of[flag] = False, help
        self._group.add_argument(flag, action="store_true", help=help)

    def add_setting(self, flag: str, kind: Any, default: Any = REQUIRED, help: str = "") -> None:
        """Add a flag that takes a kind of setting (see `reid.kinds`)."""
        from mrcn_fast.reid import settings

        options: dict[str, Any] = {"nargs": "+"} if settings.is_list(kind) else {}
        if settings.is_truth(kind):
            options = {"nargs": "?", "const": "true", "metavar": "true|false"}
        self.add(flag, _reader(kind), default, help, **options)

    def add_of(
        self,
        source: Callable[..., Any],
        *,
        skip: Collection[str] = (),
        groups: Mapping[str, str] | None = None,
    ) -> None:
        """Add a flag per argument of a function or field of a dataclass, with help from the docstrings.

        Args:
            source: the function or the dataclass
            skip: names that get no flag
            groups: titles of groups, by the name of the first argument or field in each
        """
        from mrcn_fast.reid import settings

        kinds, helps = settings.kinds_of(source), _helps(source)
        for name, parameter in inspect.signature(source).parameters.items():
            if groups and name in groups:
                self.group(groups[name])
            if name not in skip:
                self.add_setting(_flag_of(name), kinds[name], parameter.default, helps.get(name, ""))

    def add_word(self, name: str, kind: Any, help: str) -> None:
        """Add a positional argument that takes a kind of setting and must be given."""
        self._words[name] = _reader(kind)
        self.usage = f"%(prog)s {' '.join(word.upper() for word in self._words)} [--flag value ...]"
        self.description = f"{self.description}. {name.upper()}: {help}"

    def values(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Read the value of each flag and word, given or default, by its name with underscores.

        Ends the process with status 2 after a message about what is wrong, and with 0 after --help.
        """
        values = self.given(argv)
        for flag, default in self._default_of.items():
            if default is not REQUIRED:
                values.setdefault(_name_of(flag), default)
            elif _name_of(flag) not in values:
                self.error(f"{flag} is missing: give {flag} and {self._flags[flag].expected}")
        return values

    def given(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """Read the values of the flags and words in `argv`, by default the process's arguments."""
        written = [_with_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
        try:
            found, rest = self.parse_known_args(self._with_negatives(written))
        except argparse.ArgumentError as error:
            self._refuse_count(str(error.argument_name), error.message)
        values: dict[str, Any] = {}
        for name, words in vars(found).items():
            flag = _flag_of(name)
            values[name] = self._read(flag, self._flags[flag], words) if flag in self._flags else words
        return values | self._read_words(rest)

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and the message on stderr."""
        sys.exit(self.refuse(message))

    def refuse(self, message: str) -> int:
        """Write the message to stderr, and return the exit status for it."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        return 2

    def _with_negatives(self, words: Sequence[str]) -> list[str]:
        """Join flags and negative numbers after them, because argparse takes -1e-3 for a flag."""
        joined: list[str] = []
        for word in words:
            if joined and joined[-1] in self._flags and re.match(r"-[.\d]", word):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def _read_words(self, rest: Sequence[str]) -> dict[str, Any]:
        if strange := [word for word in rest if word.startswith("-") and word != "-"]:
            self._refuse_unknown(strange[0])
        if len(rest) > len(self._words):
            self.error(
                f"got {_written(rest[len(self._words)])}, which belongs to no flag; {self._see_help()}"
            )
        for name, reader in list(self._words.items())[len(rest) :]:
            self.error(f"{name.upper()} is missing: give {reader.expected}")
        readers = zip(self._words.items(), rest, strict=True)
        return {name: self._read(name.upper(), reader, word) for (name, reader), word in readers}

    def _read(self, name: str, reader: Reader, words: str | list[str]) -> Any:
        try:
            one = reader.whole or isinstance(words, str)
            return reader.read(words) if one else tuple(map(reader.read, words))
        except ValueError as error:
            written = " ".join(map(_written, [words] if isinstance(words, str) else words))
            self.error(f"got {name} {written}, expected {error}{_meant(written, str(error))}")

    def _refuse_count(self, name: str, message: str) -> NoReturn:
        """Refuse, in our words, a flag with too few values or with one too many."""
        if name not in self._flags or message.startswith("ignored"):
            self.error(f"got {name} with a value, which it doesn't take")
        expected, count = self._flags[name].expected, re.search(r"\d+", message)
        if count:
            self.error(f"got {name} with another number of values, expected {count[0]}, each {expected}")
        self.error(f"got {name} without a value, expected {expected}")

    def _refuse_unknown(self, word: str) -> NoReturn:
        flag = word.partition("=")[0]
        near = self._nearest(flag)
        meant = f"did you mean {near}? " if near else ""
        self.error(f"got {flag}, which {self.prog} doesn't have; {meant}{self._see_help()}")

    def _nearest(self, flag: str) -> str | None:
        """Find the flag that this one misspells or abbreviates, or else one whose help has its words.

        A help that begins with the words goes before one that has them further on.
        """
        sought = flag.lstrip("-").replace("-", " ")
        if (near := nearest(flag, self._default_of, cutoff=0.8)) or len(sought) < 2:
            return near
        named = re.compile(rf"\b{re.escape(sought)}\b", re.I)
        having = [known for known, help in self._help_of.items() if named.search(help)]
        return min(having, key=lambda known: not named.match(self._help_of[known]), default=None)

    def _see_help(self) -> str:
        return f"`{self.prog} --help` lists the flags"


def nearest(word: str, names: Iterable[str], cutoff: float = 0.7) -> str | None:
    """Find the name that a word misspells, by the `cutoff` of difflib, or abbreviates."""
    alike = difflib.get_close_matches(word, names, 1, cutoff)
    begun = [name for name in names if name.startswith(word)] if len(word) > 1 else []
    return next(iter(alike + begun), None)


def one_of(names: Collection[str]) -> Reader:
    """Make a reader of one of some names."""
    expected = f"one of {', '.join(names)}"

    def read(word: str) -> str:
        if word not in names:
            raise ValueError(expected)
        return word

    return Reader(read, expected)


def number(kind: type[int] | type[float], least: float, most: float) -> Reader:
    """Make a reader of a number from `least` to `most`."""
    expected = f"{'an integer' if kind is int else 'a number'} from {least} to {most}"

    def read(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            raise ValueError(expected) from None
        if not least <= value <= most:  # nor NaN
            raise ValueError(expected)
        return value

    return Reader(read, expected)


def path_text(word: str) -> str:
    """Read a path; a leading ~ is the home folder. Raises ValueError with what was expected."""
    if not word:
        raise ValueError("a path that is not empty")
    if "\0" in word:
        raise ValueError("a path without the character NUL")
    try:
        os.fsencode(word)
    except UnicodeEncodeError:
        raise ValueError("a path whose characters the file system has") from None
    return os.path.expanduser(word)


def device_name(word: str) -> str:
    """Read the name of a device to measure on. Raises ValueError with what was expected."""
    try:
        known = word == "cpu" or torch.device(word).type == "cuda"
    except RuntimeError:
        known = False
    if not known:
        raise ValueError(DEVICE.expected)
    return word


PATH: Final = Reader(lambda word: Path(path_text(word)), "a path")
DEVICE: Final = Reader(device_name, "cpu, cuda or cuda:N")
TEXT: Final = Reader(str, "text")


def _reader(kind: Any) -> Reader:
    from mrcn_fast.reid import settings

    return Reader(partial(settings.read, kind), settings.expected(kind), whole=True)


def _written(word: str) -> str:
    """Format a word for a message: as it was written, unless it is long or hard to see."""
    return word if word.strip() == word != "" and len(word) <= 80 else reprlib.repr(word)


def _meant(written: str, expected: str) -> str:
    """Ask whether the nearest of the names was meant, where names were expected."""
    names = expected.removeprefix("one of ").split(", ") if expected.startswith("one of ") else []
    near = nearest(written.lower(), names)
    return f"; did you mean {near}?" if near else ""


def _flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _with_dashes(word: str) -> str:
    return re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word)


def _with_default(help: str, default: Any) -> str:
    if default is REQUIRED:
        return f"{help} (required)"
    if default in (None, "", ()) or default is False:
        return help
    return f"{help} (default {' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def _helps(source: Callable[..., Any]) -> dict[str, str]:
    """Read what the docstrings say about a function's arguments or a dataclass's fields."""
    import docstring_parser  # of [reid]

    if inspect.isclass(source):
        # The docstrings of inherited fields are in the class that declares them.
        owners = [cls for cls in reversed(source.__mro__) if dataclasses.is_dataclass(cls)]
        documents = [docstring_parser.parse_from_object(cls) for cls in owners]
    else:
        documents = [docstring_parser.parse(inspect.getdoc(source) or "")]
    return {
        found.arg_name: " ".join((found.description or "").split()).removesuffix(".")
        for document in documents
        for found in document.params
    }
