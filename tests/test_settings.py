"""Kinds of settings: what Python, files and flags may give, and what is said where it doesn't fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pytest

from mrcn_fast import settings
from mrcn_fast.settings import Increasing, OneOf, PathText, Range, SettingError, checked, read

Height = Annotated[int, Range(32, 8192)]
Rate = Annotated[float, Range(0)]
Stages = Annotated[tuple[Annotated[int, Range(0, 4)], ...], Increasing("stages")]


class Machine(TypedDict):
    cpu: str
    threads: int


class Result(TypedDict):
    machine: Machine
    rows: list[dict[str, Rate]]


def plain(value: Any, expected: Any) -> bool:
    return type(value) is type(expected) and value == expected


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (Height, 48, 48),
        (Height, np.int64(48), 48),
        (Rate, 1, 1.0),
        (Rate, np.float32(0.5), 0.5),
        (bool, False, False),
        (Stages, [0, 2], (0, 2)),
        (Stages, (), ()),
        (tuple[int, int], [64, 32], (64, 32)),
        (Sequence[str], ["a"], ("a",)),
        (Literal[18, 50], np.int32(50), 50),
        (Annotated[str, OneOf(("se", "eca"))], "eca", "eca"),
        (PathText, Path("a/b"), "a/b"),
        (str | Path, Path("a/b"), "a/b"),
        (Path, "a/b", Path("a/b")),
        (Height | None, None, None),
    ],
)
def test_what_fits(kind: Any, value: object, expected: object) -> None:
    assert plain(checked(kind, value, "name"), expected)


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (Height, 48.0, "got name=48.0, expected an integer from 32 to 8192"),
        (Height, "48", "got name='48', expected an integer from 32 to 8192"),
        (Height, True, "got name=True, expected an integer from 32 to 8192"),
        (Height, 7, "got name=7, expected a number from 32 to 8192"),
        (int, 2**63, "got name=9223372036854775808, expected an integer below 2**63"),
        (Rate, math.nan, "got name=nan, expected a finite number of at least 0"),
        (Rate, -1, "got name=-1, expected at least 0"),
        (Rate, "abc", "got name='abc', expected a number of at least 0"),
        (Rate, np.bool_(True), "expected a number of at least 0"),
        (bool, 1, "got name=1, expected true or false"),
        (Stages, 0, "got name=0, expected a list of integers from 0 to 4, increasing, such as [1,2]"),
        (Stages, "02", "expected a list of integers from 0 to 4"),
        (Stages, [0, 7], "got name[1]=7, expected a number from 0 to 4"),
        (Stages, [0, "1"], "got name[1]='1', expected an integer from 0 to 4"),
        (Stages, [2, 1], "got name=[2, 1], expected increasing stages"),
        (tuple[int, int], [1, 2, 3], "got name=[1, 2, 3], expected 2 integers"),
        (Literal[18, 50], 34, "got name=34, expected one of 18, 50"),
        (Literal[1, 2], True, "got name=True, expected one of 1, 2"),
        (Literal["sum"], ["sum"], "got name=['sum'], expected one of sum"),
        (Annotated[str, OneOf(("se", "eca"))], "sse", "got name='sse', expected one of se, eca"),
        (PathText, "", "got name='', expected a path that is not empty"),
        (PathText, "a\0b", "expected a path without the character NUL"),
        (PathText, "\ud800", "expected a path whose characters the file system has"),
        (PathText, b"x", "got name=b'x', expected a path"),
        (Height | None, 7, "got name=7, expected a number from 32 to 8192, or none"),
        (Result, [], "got name=[], expected values by name"),
        (Result, {"rows": []}, "expected values by name, machine among them"),
        (Result, {"machine": {"cpu": 1, "threads": 2}, "rows": []}, "got name.machine.cpu=1, expected text"),
        (
            Result,
            {"machine": {"cpu": "a", "threads": 2}, "rows": [{}, {"x": math.inf}]},
            "got name.rows[1].x=inf, expected a finite number of at least 0",
        ),
    ],
)
def test_what_does_not_fit(kind: Any, value: object, told: str) -> None:
    with pytest.raises(SettingError) as error:
        checked(kind, value, "name")
    assert told in str(error.value)


def test_numbers_beyond_every_limit_are_refused() -> None:
    with pytest.raises(SettingError, match="got name=a int too long to write, expected an integer from 32"):
        checked(Height, 10**5000, "name")
    with pytest.raises(SettingError, match="expected a finite number of at least 0"):
        checked(Rate, 10**400, "name")
    with pytest.raises(SettingError, match="expected an integer from 32 to 8192"):
        read(Height, ["9" * 5000], "--flag")


def test_a_value_that_holds_itself_is_shown_shortly() -> None:
    value: list[Any] = []
    for _ in range(20):
        value.extend([value] * 9)
    with pytest.raises(SettingError) as error:
        checked(Stages, value, "stages")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        (Height, ["48"], 48),
        (Rate, ["1e-3"], 1e-3),
        (bool, ["True"], True),
        (bool, ["false"], False),
        (Stages, ["0,2"], (0, 2)),
        (Stages, ["[0, 2]"], (0, 2)),
        (Stages, ["0", "2"], (0, 2)),
        (Stages, ["[]"], ()),
        (tuple[int, int], ["(64,32)"], (64, 32)),
        (Sequence[PathText], ["a,b.jpg", "c"], ("a,b.jpg", "c")),
        (Sequence[PathText], ["[a, b]"], ("a", "b")),
        (Literal[18, 50], ["18"], 18),
        (Height | None, ["none"], None),
        (PathText | None, ["null"], None),
        (str, ["two words"], "two words"),
    ],
)
def test_what_a_flag_may_say(kind: Any, words: list[str], expected: object) -> None:
    assert plain(read(kind, words, "--flag"), expected)


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        (Height, ["48.5"], "got --flag 48.5, expected an integer from 32 to 8192"),
        (Height, ["7"], "got --flag 7, expected a number from 32 to 8192"),
        (Rate, ["nan"], "got --flag nan, expected a finite number of at least 0"),
        (bool, ["yes"], "got --flag yes, expected true or false"),
        (Stages, ["0,7"], "got --flag 0,7, expected a list of integers from 0 to 4, increasing, such as 1,2"),
        (Stages, ["&a [*a]"], "expected a list of integers"),
        (PathText, [""], "got --flag '', expected a path that is not empty"),
    ],
)
def test_what_a_flag_may_not_say(kind: Any, words: list[str], told: str) -> None:
    with pytest.raises(SettingError) as error:
        read(kind, words, "--flag")
    assert told in str(error.value) and len(str(error.value)) < 300


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert checked(PathText, "~/sets", "data") == "/home/ann/sets"
    assert read(PathText | None, ["~"], "--data") == "/home/ann"
    assert checked(str, "~/sets", "title") == "~/sets"


def test_a_dataclass_checks_its_fields() -> None:
    @dataclass
    class Config:
        height: int = 48
        anything: object = None

    class ConfigError(ValueError):
        pass

    config = Config(height=np.int16(50), anything={1})  # type: ignore[arg-type]
    settings.check_fields(config, ConfigError)
    assert plain(config.height, 50)
    with pytest.raises(ConfigError, match=r"got height=48\.5, expected an integer"):
        settings.check_fields(Config(height=48.5), ConfigError)  # type: ignore[arg-type]


def test_a_function_checks_its_arguments() -> None:
    @settings.check_arguments
    def source(places: Sequence[str], count: Annotated[int, Range(1)] = 1, *, other: object = None) -> Any:
        return places, count, other

    three: Any = np.int8(3)
    assert source(["a"], three, other={1}) == (("a",), 3, {1})
    assert source(["a"]) == (("a",), 1, None)
    for arguments, told in (({"places": "a"}, "places='a'"), ({"places": [], "count": 0}, "count=0")):
        with pytest.raises(SettingError, match=told):
            source(**arguments)
