"""Kinds of settings: what Python, files and flags may give, and what is said where it doesn't fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from typing_extensions import TypedDict

from mrcn_fast.reid.kinds import (
    INCREASING,
    AnyPath,
    Count,
    Depth,
    Device,
    GateName,
    Height,
    Pair,
    PathOrEmpty,
    PathText,
    Seed,
    Several,
    Stage,
    Weight,
)
from mrcn_fast.reid.settings import (
    SettingError,
    check_arguments,
    check_fields,
    checked,
    expected,
    read,
    record,
    with_more,
)

Size = Pair[Height]
Stages = Annotated[Several[Stage], INCREASING]


@with_more
class Machine(TypedDict):
    """A docstring that no message has."""

    cpu: str
    threads: int


@with_more
class Result(TypedDict):
    machine: Machine
    rows: list[dict[str, Weight]]


def plain(value: Any, expected: Any) -> bool:
    return type(value) is type(expected) and value == expected


@pytest.mark.parametrize(
    ("kind", "value", "wanted"),
    [
        (Height, 48, 48),
        (Height, np.int64(48), 48),
        (Height, np.uint8(48), 48),
        (Weight, 1, 1.0),
        (Weight, np.float32(0.5), 0.5),
        (Weight, np.int8(2), 2.0),
        (bool, False, False),
        (Stages, [0, 2], (0, 2)),
        (Stages, [np.int16(0), 2], (0, 2)),
        (Stages, (), ()),
        (Size, [64, 32], (64, 32)),
        (Sequence[str], ["a"], ["a"]),
        (Depth, np.int32(50), 50),
        (Literal["sum", "mean"], "sum", "sum"),
        (GateName, "eca", "eca"),
        (PathText, Path("a/b"), "a/b"),
        (PathText, "f\udcff", "f\udcff"),
        (AnyPath, Path("a/b"), "a/b"),
        (PathOrEmpty, "", ""),
        (Device, "cuda:1", "cuda:1"),
        (Height | None, None, None),
    ],
)
def test_fitting_values_are_taken(kind: Any, value: object, wanted: object) -> None:
    assert plain(checked(kind, value, "name"), wanted)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Height, 48.0, "got name=48.0, expected an integer from 32 to 8192"),
        (Height, "48", "got name='48', expected an integer from 32 to 8192"),
        (Height, True, "got name=True, expected an integer from 32 to 8192"),
        (Height, np.True_, "expected an integer from 32 to 8192"),
        (Height, 7, "got name=7, expected an integer from 32 to 8192"),
        (Height, None, "got name=None, expected an integer from 32 to 8192"),
        (Seed, 2**63, "got name=9223372036854775808, expected an integer from 0 to 9223372036854775807"),
        (Weight, math.nan, "got name=nan, expected a finite number of at least 0"),
        (Weight, math.inf, "got name=inf, expected a finite number of at least 0"),
        (Weight, -1, "got name=-1, expected a number of at least 0"),
        (Weight, "abc", "got name='abc', expected a number of at least 0"),
        (Weight, True, "got name=True, expected a number of at least 0"),
        (Weight, np.True_, "expected a number of at least 0"),
        (bool, 1, "got name=1, expected true or false"),
        (Stages, 0, "got name=0, expected a list of values, each an integer from 0 to 4"),
        (Stages, "02", "expected a list of values"),
        (Stages, {0}, "got name={0}, expected a list of values"),
        (Stages, [0, 7], "got name[1]=7, expected an integer from 0 to 4"),
        (Stages, [0, "1"], "got name[1]='1', expected an integer from 0 to 4"),
        (Stages, [2, 1], "got name=[2, 1], expected increasing values"),
        (Stages, [1, 1], "got name=[1, 1], expected increasing values"),
        (Size, [64, 64, 64], "expected 2 values, each an integer from 32 to 8192"),
        (Size, [64], "got name=(64,), expected 2 values, each an integer from 32 to 8192"),
        (Depth, 34, "got name=34, expected one of 18, 50"),
        (Depth, 18.0, "got name=18.0, expected one of 18, 50"),
        (Depth, "18", "got name='18', expected one of 18, 50"),
        (Literal["sum"], ["sum"], "got name=['sum'], expected one of sum"),
        (GateName, "sse", "got name='sse', expected one of se, eca"),
        (GateName, ["se"], "got name=['se'], expected one of se, eca"),
        (PathText, "", "got name='', expected a path that is not empty"),
        (PathText, "a\0b", "expected a path without the character NUL"),
        (PathText, "\ud800", "expected a path whose characters the file system has"),
        (PathText, b"x", "got name=b'x', expected a path"),
        (Device, "tpu", "got name='tpu', expected cpu, cuda or cuda:N"),
        (Device, "cpu:0", "got name='cpu:0', expected cpu, cuda or cuda:N"),
        (Height | None, 7, "got name=7, expected an integer from 32 to 8192, or none"),
        (Result, [], "got name=[], expected values by name"),
        (Result, {"rows": []}, "got no name.machine, expected values by name"),
        (Result, {"machine": {"cpu": 1, "threads": 2}, "rows": []}, "got name.machine.cpu=1, expected text"),
        (
            Result,
            {"machine": {"cpu": "a", "threads": 2}, "rows": [{}, {"x": math.inf}]},
            "got name.rows[1].x=inf, expected a finite number of at least 0",
        ),
        (Result, {"machine": {"cpu": "a", "threads": 2}, "rows": ()}, "got name.rows=(), expected a list"),
        (dict[str, int], {3: 1}, "got name with the name 3, expected names that are text"),
        (dict[int, int], {"a": 1}, "got name with the name 'a', expected names that are integers"),
        (record("r", {"a.b": int}), {"a.b": 1, "c": 2}, "got name.c=2, expected no value of this name"),
        (record("r", {"a.b": int}), {"a.b": 1, 7: 2}, "got name with the name 7, expected names that are"),
        (record("r", {"a.b": int}), {}, "got no name.a.b, expected an integer"),
    ],
)
def test_unfit_values_are_refused(kind: Any, value: object, message: str) -> None:
    with pytest.raises(SettingError) as error:
        checked(kind, value, "name")
    assert message in str(error.value) and "pydantic" not in str(error.value)


def test_long_numbers_and_tensors_are_shortened_in_messages() -> None:
    for value, message in (
        (torch.zeros(1000, 3), "name=Tensor of torch.float32 (1000, 3)"),
        (np.zeros((1000, 3)), "name=ndarray of float64 (1000, 3)"),
        (Decimal(50), "name=Decimal('50')"),
    ):
        with pytest.raises(SettingError) as error:
            checked(Height, value, "name")
        assert message in str(error.value)


def test_a_record_may_have_more() -> None:
    kind = record("r", {"a": int}, more=True)
    assert checked(kind, {"a": 1, "b": [2]}, "") == {"a": 1, "b": [2]}
    result = {"machine": {"cpu": "a", "threads": 2, "gpu": None}, "rows": [], "date": "today"}
    assert checked(Result, result, "") == result


def test_numbers_beyond_every_limit_are_refused() -> None:
    with pytest.raises(SettingError, match="got name=a int too long to write, expected an integer from 32"):
        checked(Height, 10**5000, "name")
    with pytest.raises(SettingError, match="expected a number of at least 0"):
        checked(Weight, 10**400, "name")
    with pytest.raises(SettingError, match="an integer from 32 to 8192"):
        read(Height, "9" * 5000)


def test_a_value_that_contains_itself_is_shortened_in_messages() -> None:
    value: list[Any] = []
    for _ in range(20):
        value.extend([value] * 9)
    with pytest.raises(SettingError) as error:
        checked(Stages, value, "stages")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("kind", "words", "wanted"),
    [
        (Height, "48", 48),
        (Weight, "1e-3", 1e-3),
        (bool, "True", True),
        (bool, "false", False),
        (Stages, ["0,2"], (0, 2)),
        (Stages, "0,2", (0, 2)),
        (Stages, ["[0, 2]"], (0, 2)),
        (Stages, ["0", "2"], (0, 2)),
        (Stages, ["[]"], ()),
        (Size, ["(64,32)"], (64, 32)),
        (Several[PathText], ["a,b.jpg", "c"], ("a,b.jpg", "c")),
        (Several[PathText], ["[a, b]"], ("a", "b")),
        (Several[PathText], "a,b", ("a,b",)),
        (Several[GateName], "se,eca", ("se", "eca")),
        (Depth, "18", 18),
        (Literal["sum", "mean"], "sum", "sum"),
        (Height | None, "none", None),
        (PathText | None, "null", None),
        (Stages | None, ["none"], None),
        (str, "two words", "two words"),
    ],
)
def test_words_of_flags_are_read(kind: Any, words: str | list[str], wanted: object) -> None:
    assert plain(read(kind, words), wanted)


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        # Files can't say these either.
        (Height, "48.0", "an integer from 32 to 8192"),
        (Height, "4_8", "an integer from 32 to 8192"),
        (bool, "yes", "true or false"),
        (
            Stages,
            ["0", "2.0"],
            "a list of values, each an integer from 0 to 4, separated by commas or spaces",
        ),
        (Height, "48.5", "an integer from 32 to 8192"),
        (Height, "7", "an integer from 32 to 8192"),
        (Height, "none", "an integer from 32 to 8192"),
        (Weight, "nan", "a finite number of at least 0"),
        (bool, "maybe", "true or false"),
        (Depth, "34", "one of 18, 50"),
        (Stages, ["0,7"], "a list of values, each an integer from 0 to 4, separated by commas or spaces"),
        (Stages, ["&a [*a]"], "a list of values, each an integer from 0 to 4, separated by commas or spaces"),
        (Stages, "2,1", "increasing values"),
        (PathText, "", "a path that is not empty"),
        (Several[PathText], ["a", ""], "a path that is not empty"),
        (GateName | None, "sse", "one of se, eca, cbam-channel, cbam, or none"),
    ],
)
def test_unfit_words_of_flags_are_refused(kind: Any, words: str | list[str], message: str) -> None:
    with pytest.raises(SettingError) as error:
        read(kind, words)
    assert str(error.value) == message


def test_kinds_in_words() -> None:
    assert expected(Height) == "an integer from 32 to 8192"
    assert expected(Several[GateName] | None).startswith("a list of values, each one of se, eca")


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert checked(PathText, "~/sets", "data") == "/home/ann/sets"
    assert read(PathText | None, "~") == "/home/ann"
    assert checked(str, "~/sets", "title") == "~/sets"


def test_a_dataclass_checks_its_fields() -> None:
    @dataclass
    class Config:
        height: Height = 48
        anything: object = None

    class ConfigError(ValueError):
        pass

    config = Config(height=np.int16(50), anything={1})  # type: ignore[arg-type]
    check_fields(config, ConfigError)
    assert plain(config.height, 50)
    with pytest.raises(ConfigError, match=r"got height=48\.5, expected an integer"):
        check_fields(Config(height=48.5), ConfigError)  # type: ignore[arg-type]


def test_a_function_checks_its_arguments() -> None:
    @check_arguments
    def source(places: Sequence[str], count: Count = 1, *, other: Tensor | None = None) -> Any:
        return places, count, other

    three, other = np.int8(3), torch.zeros(1)
    found = source(["a"], three, other=other)  # type: ignore[arg-type]
    assert found[:2] == (["a"], 3) and found[2] is other
    assert source(["a"]) == (["a"], 1, None)
    for arguments, message in (({"places": "a"}, "places='a'"), ({"places": [], "count": 0}, "count=0")):
        with pytest.raises(SettingError, match=message):
            source(**arguments)
