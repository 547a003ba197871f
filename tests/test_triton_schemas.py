"""Triton's operations have the schemas that csrc/schemas.h spells."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this machine")

from mrcn_fast.backends import triton as backend

SCHEMAS = Path(__file__).resolve().parents[1] / "csrc" / "schemas.h"


def spelled() -> dict[str, str]:
    """The operations of csrc/schemas.h, with the text of their schemas."""
    definitions = re.findall(r'library\.def\(((?:\s*"[^"]*")+)\)', SCHEMAS.read_text())
    schemas = ["".join(re.findall(r'"([^"]*)"', definition)) for definition in definitions]
    return {name: f"({rest}" for name, _, rest in (schema.partition("(") for schema in schemas)}


def test_the_schemas_are_those_of_csrc() -> None:
    modules = [importlib.import_module(f"{backend.__name__}.{name}") for name in backend.KERNEL_MODULES]
    expected = spelled()
    del expected["set_held"]  # a setting of the CUDA kernels
    assert len(expected) == 10
    assert {name: schema for module in modules for name, schema in module.SCHEMAS.items()} == expected
