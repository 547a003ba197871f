"""What all tests share: hypothesis' profiles and the number of threads."""

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

if CUDA_ON_HOST:
    from tests.cuda_on_host import library

    library.load()
    dispatch.KERNELS["cuda"] = library

# A first call may compile or page in a library: deadlines would measure that. In CI the same examples are
# drawn every time, so that a red run is a change's doing; at a desk new ones are.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# The tests' tensors are small: on a machine with many cores, more threads only wait for each other.
torch.set_num_threads(min(torch.get_num_threads(), 4))


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that a test runs shows the library's log lines from some level on; the next test has all."""
    logger = logging.getLogger("mrcn_fast")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first: at the end, one process would wait for the other."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def choices_anew() -> Iterator[None]:
    """No test sees which backend or operation another one had chosen, or been told of."""
    for known in (dispatch._choose, dispatch._tell, autograd.block_call):
        known.cache_clear()
    yield


@pytest.fixture
def ops_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled operations as they are called."""
    names: list[str] = []
    for module in dispatch.KERNELS.values():

        def operation(name: str, original: Callable[..., Any] = module.operation) -> Callable[..., Any]:
            names.append(name)
            return original(name)

        monkeypatch.setattr(module, "operation", operation)
    return names


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logged may hold names that are no UTF-8; pytest-xdist can't send those, and stops."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What compiled kernels take, which tests tell as the property "resources"."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    lines = [told for r in reports for name, told in r.user_properties if name == "resources"]
    if lines:
        terminalreporter.section("kernels compiled ahead of time")
        terminalreporter.write_line("\n".join(sorted(lines)))
