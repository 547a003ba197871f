"""A command's flags: each is a setting, and what is refused is refused in this library's words."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn

from mrcn_fast import settings

# The default of a flag that has to be given.
REQUIRED: Final = inspect.Parameter.empty


class _Flag(NamedTuple):
    kind: Any
    default: Any


class Flags(argparse.ArgumentParser):
    """The flags and words that a command takes.

    Flags are written with dashes or underscores, as --image-size or --image_size. One for true or false that
    stands alone means true. Several values of one flag are separated by spaces or commas.
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
        self._flags: dict[str, _Flag] = {}
        self._words: dict[str, _Flag] = {}

    def add(
        self, flag: str, kind: Any, default: Any = REQUIRED, help: str = "", *, repeated: bool = False
    ) -> None:
        """Add a flag such as "--out" of a kind of setting. `repeated`: each use of it adds to its list."""
        self._flags[flag] = _Flag(kind, default)
        options: dict[str, Any] = {"help": _with_default(help, default), "metavar": settings.symbol(kind)}
        if settings.is_list(kind):
            options |= {"nargs": "+", "action": "extend" if repeated else "store"}
        elif settings.is_truth(kind):
            options |= {"nargs": "?", "const": "true"}
        self.add_argument(flag, **options)

    def add_word(self, name: str, kind: Any, help: str) -> None:
        """Add a word that has to be given without a flag."""
        self._words[name] = _Flag(kind, REQUIRED)
        self.usage = f"%(prog)s {' '.join(word.upper() for word in self._words)} [--flag value ...]"
        self.description = f"{self.description}. {name.upper()}: {help}"

    def add_of(self, source: Callable[..., Any], *, skip: Collection[str] = ()) -> None:
        """Add the flags of a function's arguments or a dataclass's fields, with their docstring's help."""
        kinds, helps = settings.kinds_of(source), _helps(source)
        for name, parameter in inspect.signature(source).parameters.items():
            if name not in skip:
                self.add(_flag_of(name), kinds[name], parameter.default, helps.get(name, ""))

    def values(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The value of each flag and word by its name with underscores: the given or the default one.

        Ends the process with status 2 after telling what is wrong, and with 0 after --help.
        """
        given = self.given(argv)
        for flag, (kind, default) in self._flags.items():
            if default is not REQUIRED:
                given.setdefault(_name_of(flag), default)
            elif _name_of(flag) not in given:
                self.error(f"{flag} is missing: give {flag} and {settings.expected(kind)}")
        return given

    def given(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The values of those flags and words that `argv` (by default the process's arguments) has."""
        written = [_with_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
        try:
            found, rest = self.parse_known_args(self._with_negatives(written))
        except argparse.ArgumentError as error:
            self._refuse_without_value(str(error.argument_name))
        try:
            return self._read_flags(vars(found)) | self._read_words(rest)
        except settings.SettingError as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and the message on stderr."""
        sys.exit(self.refuse(message))

    def refuse(self, message: str) -> int:
        """Write the message to stderr; the exit status for it."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        return 2

    def _with_negatives(self, words: Sequence[str]) -> list[str]:
        """The words with a flag and a negative number after it as one: argparse takes -1e-3 for a flag."""
        joined: list[str] = []
        for word in words:
            before = self._flags.get(joined[-1]) if joined else None
            if before is not None and re.match(r"-[.\d]", word) and not settings.is_list(before.kind):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def _read_flags(self, texts: Mapping[str, str | list[str]]) -> dict[str, Any]:
        values = {}
        for name, text in texts.items():
            flag = _flag_of(name)
            values[name] = settings.read(
                self._flags[flag].kind, [text] if isinstance(text, str) else text, flag
            )
        return values

    def _read_words(self, rest: Sequence[str]) -> dict[str, Any]:
        strange = [word for word in rest if word.startswith("-") and word != "-"]
        if strange:
            self._refuse_unknown(strange[0])
        if len(rest) > len(self._words):
            self.error(f"got {settings.shown(rest[-1])}, which belongs to no flag; {self._see_help()}")
        if len(rest) < len(self._words):
            name = list(self._words)[len(rest)]
            self.error(f"{name.upper()} is missing: give {settings.expected(self._words[name].kind)}")
        return {
            name: settings.read(word.kind, [text], name.upper())
            for (name, word), text in zip(self._words.items(), rest, strict=True)
        }

    def _refuse_unknown(self, word: str) -> NoReturn:
        flag = word.partition("=")[0]
        near = difflib.get_close_matches(flag, self._flags, 1, cutoff=0.7)
        meant = f"did you mean {near[0]}? " if near else ""
        self.error(f"got {flag}, which {self.prog} doesn't have; {meant}{self._see_help()}")

    def _refuse_without_value(self, flag: str) -> NoReturn:
        if flag not in self._flags:
            self.error(f"got {flag} with a value, which it doesn't take")
        self.error(f"got {flag} without a value, expected {settings.expected(self._flags[flag].kind)}")

    def _see_help(self) -> str:
        return f"`{self.prog} --help` lists the flags"


def _flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _with_dashes(word: str) -> str:
    return re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word)


def _with_default(help: str, default: Any) -> str:
    said = ""
    if default is REQUIRED:
        said = "(required)"
    elif default not in (None, "", ()) and default is not False:
        said = f"(default {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
    return f"{help} {said}".strip().replace("%", "%%")


def _helps(source: Callable[..., Any]) -> dict[str, str]:
    """What the docstrings say of a function's arguments or a dataclass's fields."""
    # Of [reid]; the commands that need torch alone have no such flags.
    import docstring_parser

    if inspect.isclass(source):
        document = docstring_parser.parse_from_object(source)
    else:
        document = docstring_parser.parse(inspect.getdoc(source) or "")
    return {found.arg_name: " ".join((found.description or "").split()) for found in document.params}
