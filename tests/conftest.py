"""What all tests share: hypothesis' profiles, the number of threads, and fixtures."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

import hypothesis
import pytest
import torch

from mrcn_fast import autograd, dispatch
from tests.support.matrix import CUDA_ON_HOST

# What the user has measured on this machine decides nothing in a test.
os.environ["MRCN_FAST_TUNE"] = "0"

if CUDA_ON_HOST:
    from tests.cuda_on_host import library

    library.load()
    dispatch.KERNELS["cuda"] = library

# There are no deadlines, because a first call may compile or load a library. In CI the same examples are
# drawn every time, so that only a change can make a run fail; elsewhere new examples are drawn.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# The tests' tensors are small: on a machine with many cores, more threads only wait for each other.
torch.set_num_threads(min(torch.get_num_threads(), 4))


LOGGER = logging.getLogger("mrcn_fast")
LEVEL, HANDLERS = LOGGER.level, list(LOGGER.handlers)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Undo what tests and commands change in the logger, and forget which backends and operations they chose.

    A fixture of a module runs before this one. So its changes are undone before the test, and what a test
    leaves is undone after it.
    """
    _undo()
    yield
    _undo()


def _undo() -> None:
    LOGGER.setLevel(LEVEL)
    LOGGER.handlers[:] = HANDLERS
    for known in (dispatch._choose, dispatch._log_fallback, autograd.block_call):
        known.cache_clear()
    dispatch.forget_tuned()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slow tests, the longest first: at the end, one process would wait for another's."""

    def seconds(item: pytest.Item) -> int:
        slow = item.get_closest_marker("slow")
        return -1 if slow is None else slow.kwargs.get("seconds", 0)

    items.sort(key=seconds, reverse=True)


@pytest.fixture
def ops_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels' operations, in the order in which the test calls them."""
    names: list[str] = []
    for module in dispatch.KERNELS.values():

        def operation(name: str, original: Callable[..., Any] = module.operation) -> Callable[..., Any]:
            names.append(name)
            return original(name)

        monkeypatch.setattr(module, "operation", operation)
    return names


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape logged names that are not UTF-8, because pytest-xdist can't send them and stops."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the resources of compiled kernels, which tests record as the property "resources"."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    lines = [told for r in reports for name, told in r.user_properties if name == "resources"]
    if lines:
        terminalreporter.section("kernels compiled ahead of time")
        terminalreporter.write_line("\n".join(sorted(lines)))
