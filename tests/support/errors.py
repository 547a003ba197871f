"""Expecting an error by its message."""

from __future__ import annotations

import re
from typing import Any

import pytest


def refuses(error: type[Exception], *parts: str) -> Any:
    """Expect ``error`` with a message that contains all ``parts`` in this order."""
    return pytest.raises(error, match=re.compile(".*".join(map(re.escape, parts)), re.DOTALL))
