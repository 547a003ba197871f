"""Kinds of settings, as annotations that pydantic checks: numbers in a range, names, paths, lists.

The limits of a kind come before NUMPY, because its JSON schema, from which messages are made, lacks them
otherwise.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mrcn_fast.dispatch import NAMES
from mrcn_fast.flags import device_name, path_text
from mrcn_fast.gates import GATES
from mrcn_fast.operations import RESTITUTE_TO

Item = TypeVar("Item")


@dataclass(frozen=True)
class OneOf:
    """One of some values, where a `Literal` can't list them or flags must show them."""

    values: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.values)}

    def checked(self, value: Any) -> Any:
        if value not in self.values:
            raise PydanticCustomError("one_of", "not one of the values")
        return value


def _increasing(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError("increasing values")
    return values


def _path(value: object) -> str:
    """Convert a path given in Python to text."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise ValueError("a path")
    return path_text(text)


def _optimizer(value: str) -> str:
    name, *_ = value.split(maxsplit=1) or [""]
    if value not in OPTIMIZERS and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        raise ValueError("sgd, adamw, or a class with its arguments, such as torch.optim.RAdam eps=1e-6")
    return value


OPTIMIZERS: Final = ("sgd", "adamw")
NUMPY: Final = BeforeValidator(lambda value: value.item() if isinstance(value, np.generic) else value)
INCREASING: Final = AfterValidator(_increasing)
_LISTS: Final = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_PATH: Final = WithJsonSchema({"type": "string", "format": "path"})

# A larger count must be a typing error.
Count = Annotated[int, Field(ge=1, le=10**9), NUMPY]
CountOrZero = Annotated[int, Field(ge=0, le=10**9), NUMPY]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1), NUMPY]
Height = Annotated[int, Field(ge=32, le=8192), NUMPY]
Width = Annotated[int, Field(ge=16, le=8192), NUMPY]
# The file names of a synthetic tree number people and the images of a person with four digits.
People = Annotated[int, Field(ge=1, le=9999), NUMPY]
ImagesOfPerson = Annotated[int, Field(ge=1, le=9999), NUMPY]
# A property of synthetic images: 0 leaves it out, 1 is the default.
Strength = Annotated[FiniteFloat, Field(ge=0, le=2), NUMPY]
# RegDB has ten splits.
Split = Annotated[int, Field(ge=1, le=10), NUMPY]
# The number of gallery draws; millions would only fill the memory.
Trials = Annotated[int, Field(ge=1, le=10_000), NUMPY]
Depth = Annotated[int, OneOf((18, 50)), NUMPY]
Stage = Annotated[int, Field(ge=0, le=4), NUMPY]
Workers = Annotated[int, Field(ge=0, le=1024), NUMPY]
Share = Annotated[FiniteFloat, Field(ge=0, le=1), NUMPY]
Weight = Annotated[FiniteFloat, Field(ge=0), NUMPY]
Seconds = Annotated[FiniteFloat, Field(ge=0, le=86_400), NUMPY]
# Lists become tuples.
Several = Annotated[tuple[Item, ...], _LISTS]
Pair = Annotated[tuple[Item, Item], _LISTS]
PathText = Annotated[str, PlainValidator(_path), _PATH]
AnyPath = Annotated[str | Path, PlainValidator(_path), _PATH]
PathOrEmpty = Annotated[str, PlainValidator(lambda value: value if value == "" else _path(value)), _PATH]
GateName = Annotated[str, OneOf(tuple(GATES))]
RestituteTo = Annotated[str, OneOf(RESTITUTE_TO)]
BackendName = Annotated[str, OneOf((*NAMES, "auto"))]
Device = Annotated[str, AfterValidator(device_name)]
OptimizerText = Annotated[str, AfterValidator(_optimizer)]
Draw = Literal["random", "official"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
