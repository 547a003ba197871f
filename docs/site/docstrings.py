"""Griffe's extension for the docstrings: it knows the section "Examples", and ours is called "Example"."""

from __future__ import annotations

import re
from typing import Any, Final

import griffe

_SECTION: Final = re.compile(r"^( *)Example:$", re.MULTILINE)


class ExampleSections(griffe.Extension):
    """Gives the section of examples the name by which it is rendered as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in the docstring of an object, if it has one."""
        if obj.docstring:
            obj.docstring.value = _SECTION.sub(r"\1Examples:", obj.docstring.value)
