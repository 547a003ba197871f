"""What several tests of readers share: the error that they expect, and damaged copies of files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import pytest

from mrcn_fast.reid.data import DatasetError

# `with refused(match=...)` expects a DatasetError.
refused = partial(pytest.raises, DatasetError)


def damaged_copies(whole: bytes, count: int, first: int, cut: float) -> Iterator[bytes]:
    """Copies of a file with 1, 2 or 8 random bytes, of which about half are among the `first` ones.

    A share `cut` of the copies also ends early. The copies are the same on every run.
    """
    generator = random.Random(0)
    for _ in range(count):
        broken = bytearray(whole)
        for _ in range(generator.choice((1, 2, 8))):
            broken[generator.randrange(generator.choice((first, len(broken))))] = generator.randrange(256)
        yield bytes(broken[: generator.randrange(len(broken))] if generator.random() < cut else broken)
