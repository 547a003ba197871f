"""Which backend serves a call, and what is said where one can't."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from mrcn_fast import CQCLoss, MRCNBlock, backends, dispatch
from mrcn_fast.backends import cpu, triton
from tests.support import matrix
from tests.support.errors import refuses
from tests.support.matrix import KERNEL_BACKENDS
from tests.support.tensors import same_bits

SHAPE = (2, 4, 3, 3)
FEATURES = [torch.ones(4, 3) for _ in range(6)]
LABELS = torch.tensor([0, 0, 1, 1])


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment chooses no backend."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    yield monkeypatch


def call_block(**settings: Any) -> Tensor:
    return MRCNBlock(4, **settings)(torch.ones(SHAPE), torch.ones(SHAPE), concat=True)


def call_loss(**settings: Any) -> Tensor:
    loss = CQCLoss(**settings)(FEATURES, LABELS)
    assert isinstance(loss, Tensor)
    return loss


CALLS = pytest.mark.parametrize("call", [call_block, call_loss])


def test_backends_tells_why() -> None:
    known = backends()
    assert set(KERNEL_BACKENDS) | {"reference"} <= set(known) == set(dispatch.NAMES)
    assert known["reference"].usable
    assert all(status.reason for status in known.values())


@pytest.fixture
def triton_asked_anew(fresh: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The cached facts about Triton are dropped, before the test and after."""
    triton._find_triton.cache_clear()
    yield fresh
    triton._find_triton.cache_clear()


def test_triton_is_absent(triton_asked_anew: pytest.MonkeyPatch) -> None:
    triton_asked_anew.setattr(importlib.util, "find_spec", lambda name: None)
    usable, reason = triton.status()
    assert not usable and "not installed" in reason and "3.6" in reason
    with refuses(RuntimeError, "backend 'triton' can't serve this call", "not installed"):
        call_block(backend="triton")


def test_triton_is_too_old(triton_asked_anew: pytest.MonkeyPatch) -> None:
    triton_asked_anew.setattr(importlib.util, "find_spec", lambda name: object())
    triton_asked_anew.setattr(metadata, "version", lambda name: "3.5.1")
    usable, reason = triton.status()
    assert not usable and "3.5.1 is too old" in reason and "3.6 or newer" in reason
    triton._find_triton.cache_clear()
    triton_asked_anew.setattr(metadata, "version", lambda name: "3.10.0+git")
    assert triton._find_triton() == ("3.10.0+git", "")


def test_triton_without_a_gpu(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(triton, "_find_triton", lambda: ("3.9.0", ""))
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    with refuses(RuntimeError, "backend 'triton' can't serve this call", "no GPU", "TRITON_INTERPRET=1"):
        call_block(backend="triton")


def test_triton_serves_gpus_by_itself(fresh: pytest.MonkeyPatch) -> None:
    """Triton is chosen for a GPU's tensors, as far as a machine without one shows; ROCm's are "cuda" too."""
    fresh.setattr(triton, "status", lambda: (True, "Triton 3.9.0 on a GPU"))
    fresh.setattr(triton, "_register", lambda: None)
    assert dispatch.choose(None, "cuda", torch.bfloat16) == "triton"
    assert dispatch.choose("auto", "cuda", torch.float64) == "triton"
    assert dispatch.choose(None, "cuda", torch.float8_e5m2) == "reference"
    assert dispatch.choose(None, "xpu", torch.float32) == "reference"
    with refuses(RuntimeError, "backend 'triton'", "CUDA and ROCm tensors", "'cpu'", "TRITON_INTERPRET=1"):
        dispatch.choose("triton", "cpu", torch.float32)


def test_import_does_not_import_triton() -> None:
    code = "import sys, mrcn_fast; mrcn_fast.backends(); print('triton' in sys.modules)"
    got = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert got.stdout.split() == ["False"]


def test_backends_says_that_the_library_is_absent(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(cpu, "_library", None)
    usable, reason = cpu.status()
    assert not usable and "native library" in reason


def test_a_refused_dtype_is_no_fallback(fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    maps = torch.ones(2, 16, 3, 3, dtype=torch.int32)
    with caplog.at_level(logging.DEBUG, "mrcn_fast"), refuses(TypeError, "visible: got dtype torch.int32"):
        MRCNBlock(16)(maps, maps)
    assert not caplog.messages


@CALLS
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_an_unknown_backend(call: Callable[..., Tensor], by: str, fresh: pytest.MonkeyPatch) -> None:
    def run() -> Tensor:
        if by == "argument":
            return call(backend="gpu")
        fresh.setenv("MRCN_FAST_BACKEND", "gpu")
        return call()

    name = {"argument": "backend", "environment": "MRCN_FAST_BACKEND"}[by]
    with refuses(
        ValueError, f"{name}: got 'gpu'", "expected one of 'cpu'", "'triton'", "'reference'", "'auto'"
    ):
        run()


@CALLS
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_choice_that_cant_serve_raises_with_the_reason(
    call: Callable[..., Tensor], by: str, fresh: pytest.MonkeyPatch
) -> None:
    fresh.setattr(cpu, "status", lambda: (False, "no compiler was found"))
    settings = {"backend": "cpu"} if by == "argument" else {}
    if by == "environment":
        fresh.setenv("MRCN_FAST_BACKEND", "cpu")
    with refuses(RuntimeError, "backend 'cpu' can't serve this call", "no compiler was found", "unset"):
        call(**settings)


@matrix.backends(*KERNEL_BACKENDS)
def test_a_kernel_refuses_what_it_doesnt_serve(backend: str, fresh: pytest.MonkeyPatch) -> None:
    meta = torch.ones(SHAPE, device="meta")
    with refuses(RuntimeError, "backend 'cpu' can't serve this call", "CPU tensors", "'meta'"):
        MRCNBlock(4, backend=backend, device="meta")(meta, meta)
    with refuses(
        RuntimeError, "backend 'cpu' can't serve this call", "torch.float32", "got torch.float8_e5m2"
    ):
        dispatch.choose(backend, "cpu", torch.float8_e5m2)


@CALLS
@pytest.mark.parametrize("backend", [None, "auto"])
def test_the_automatic_choice_falls_back_and_says_so_once(
    call: Callable[..., Tensor],
    backend: str | None,
    fresh: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fresh.setattr(cpu, "status", lambda: (False, "no compiler was found"))
    with caplog.at_level(logging.INFO, "mrcn_fast"):
        torch.manual_seed(0)
        first = call(backend=backend)
        torch.manual_seed(0)
        assert same_bits(first, call(backend="reference"))
        call(backend=backend)
    records = [r for r in caplog.records if r.name == "mrcn_fast"]
    assert len(records) == 1 and records[0].levelno == logging.WARNING
    assert "reference" in records[0].getMessage() and "no compiler was found" in records[0].getMessage()


@matrix.backends(*KERNEL_BACKENDS)
@CALLS
def test_the_automatic_choice_takes_the_kernels_silently(
    call: Callable[..., Tensor],
    backend: str,
    fresh: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "mrcn_fast"):
        torch.manual_seed(0)
        automatic = call()
    torch.manual_seed(0)
    assert same_bits(automatic, call(backend=backend))
    assert not caplog.records
    assert dispatch.choose(None, "cpu", torch.float32) == backend


def test_the_argument_goes_before_the_environment(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("MRCN_FAST_BACKEND", "nonsense")
    call_block(backend="reference")
    fresh.setenv("MRCN_FAST_BACKEND", "reference")
    assert dispatch.choose(None, "cpu", torch.float32) == "reference"
    fresh.setenv("MRCN_FAST_BACKEND", "")
    assert dispatch.choose(None, "meta", torch.float32) == "reference"


def test_the_environment_of_a_process_is_read() -> None:
    code = (
        "import torch; from mrcn_fast import dispatch; "
        "print('chose', dispatch.choose(None, 'cpu', torch.float32))"
    )
    got = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MRCN_FAST_BACKEND": "reference", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert got.stdout.split() == ["chose", "reference"]


@matrix.backends("cpu")
@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyError("a mistake of ours")])
def test_what_is_no_refusal_is_raised_as_it_is(
    error: Exception, backend: str, fresh: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    fresh.setattr(cpu, "operation", lambda name: fail)
    with pytest.raises(type(error)) as raised:
        call_block(backend=backend)
    assert raised.value is error
