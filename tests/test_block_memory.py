"""The block's memory on every kernel backend: where results lie, what they read, and what is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mrcn_fast import MRCNBlock
from tests.support import block_cases, matrix
from tests.support.block_cases import Case
from tests.support.matrix import DEVICE, DTYPES, GATES, KERNEL_BACKENDS, MODES
from tests.support.tensors import different_bits, misaligned, same_bits

RESULT_LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "batch-sliced": torch.contiguous_format,
    "channel-sliced": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last channel-sliced": torch.channels_last,
}


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", RESULT_LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_results_have_their_inputs_layout(mode: str, layout: str, backend: str) -> None:
    p = block_cases.problem(Case(mode, shape=(2, 5, 4, 3), layouts=(layout, layout), gradient_layout=layout))
    results = block_cases.evaluate(p, backend)
    for name in (*block_cases.output_names(mode), *(f"grad {n}" for n in block_cases.input_names(mode))):
        assert results[name].is_contiguous(memory_format=RESULT_LAYOUTS[layout]), (
            f"{name} has strides {results[name].stride()}"
        )


@matrix.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_large_results(mode: str, layout: str, dtype: torch.dtype, backend: str) -> None:
    """Large results are written past the caches, odd planes too, with the bits of a small result.

    The results of one sample are small, and are written through the caches.
    """
    case = Case(mode, shape=(8, 32, 83, 101), dtype=dtype, layouts=(layout, layout), gradient_layout=layout)
    p = block_cases.problem(case)

    def results(samples: slice) -> list[Tensor]:
        inputs = [x[samples] for x in p.inputs]
        outputs = block_cases.call(case, inputs, p.parameters, backend)
        of_outputs = [g.unflatten(0, (-1, 8))[:, samples].flatten(0, 1) for g in p.gradients]
        return [*outputs, *torch.autograd.grad(outputs, inputs, of_outputs)]

    whole = results(slice(None))
    for i in (0, 5):
        for large, small in zip(whole, results(slice(i, i + 1)), strict=True):
            assert same_bits(large[i::8], small)

    for result in whole:
        assert result.is_contiguous(memory_format=RESULT_LAYOUTS[layout])
        assert result.storage_offset() == 0
        assert result.untyped_storage().nbytes() == result.nbytes
        assert result.data_ptr() % 64 == 0
    outputs, of_inputs = whole[: len(p.gradients)], whole[len(p.gradients) :]
    for read, written in ((p.inputs, outputs), ((*p.inputs, *p.gradients), of_inputs)):
        for k, one in enumerate(written):
            for other in (*read, *written[:k]):
                away = (one.data_ptr() - other.data_ptr()) % 4096
                assert min(away, 4096 - away) >= 128, "both lie at the same place of their pages"


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's memory is aligned by its allocator")
@pytest.mark.filterwarnings("ignore:The given buffer")
@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_memory_that_begins_anywhere(mode: str, dtype: torch.dtype, backend: str) -> None:
    p = block_cases.problem(Case(mode, dtype=dtype))
    moved = p._replace(
        inputs=tuple(map(misaligned, p.inputs)),
        parameters=tuple(map(misaligned, p.parameters)),
        gradients=tuple(map(misaligned, p.gradients)),
    )
    assert all(t.data_ptr() % t.element_size() == 1 for t in (*moved.inputs, *moved.parameters))
    assert different_bits(block_cases.evaluate(p, backend), block_cases.evaluate(moved, backend)) == []


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """torch fills the memory that it allocates with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("mode", MODES)
def test_every_element_of_every_result_is_written(
    mode: str, layout: str, dtype: torch.dtype, backend: str, empty_is_nan: None
) -> None:
    assert torch.empty(3, device=DEVICE).isnan().all()
    for gate, shape in itertools.product(GATES, [(1, 1, 1, 2), (2, 3, 5, 7), (1, 17, 3, 3), (2, 2, 67, 61)]):
        p = block_cases.problem(
            Case(mode, gate, shape=shape, dtype=dtype, layouts=(layout, layout), gradient_layout=layout)
        )
        for name, result in block_cases.evaluate(p, backend).items():
            assert result.isfinite().all(), f"{name} of {p.case}"


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_over_from_freed_memory(mode: str, layout: str, backend: str) -> None:
    """Memory that was freed before holds NaN, and so do scratch buffers that torch doesn't allocate."""
    for gate, shape in itertools.product(GATES, [(2, 3, 5, 7), (1, 17, 3, 3)]):
        p = block_cases.problem(
            Case(mode, gate, shape=shape, layouts=(layout, layout), gradient_layout=layout)
        )
        clean = block_cases.evaluate(p, backend)
        for _ in range(5):
            block_cases.poison_memory(p)
            assert different_bits(clean, block_cases.evaluate(p, backend)) == []


def kept_for_backward(run: Callable[[], Any], given: set[int]) -> int:
    """The bytes of the storages that autograd keeps, without those in ``given`` (data pointers)."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = run()
    del held
    return sum(kept.values())


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(16, 256, 72, 32), (16, 64, 72, 32), (8, 512, 36, 16)])
def test_under_one_percent_of_a_volume_is_kept_for_backward(
    shape: tuple[int, int, int, int], layout: torch.memory_format, backend: str
) -> None:
    visible, infrared = (
        torch.ones(shape, device=DEVICE).contiguous(memory_format=layout).requires_grad_() for _ in range(2)
    )
    volume = visible.numel() * visible.element_size()
    for gate, concat in itertools.product(GATES, (False, True)):
        block = MRCNBlock(shape[1], gate=gate, backend=backend, device=DEVICE)
        given = {x.untyped_storage().data_ptr() for x in (visible, infrared, *block.parameters())}
        extra = kept_for_backward(lambda b=block, c=concat: b(visible, infrared, concat=c), given)  # type: ignore[misc]
        assert extra < volume / 100, (
            f"{gate}, concat={concat}: {extra} bytes, {extra / volume:.2%} of a volume"
        )


def test_what_is_kept_is_counted() -> None:
    """The reference keeps feature maps: the count above would see them."""
    visible, infrared = (torch.ones(2, 4, 8, 8).requires_grad_() for _ in range(2))
    block = MRCNBlock(4, backend="reference")
    given = {x.untyped_storage().data_ptr() for x in (visible, infrared, *block.parameters())}
    extra = kept_for_backward(lambda: block(visible, infrared), given)
    assert extra > 4 * visible.numel() * visible.element_size()
