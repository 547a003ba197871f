"""Any number of threads, and any repetition, gives the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support import block_cases, cqc_cases, matrix
from tests.support.block_cases import Case
from tests.support.cqc_cases import FORMS, CQCCase
from tests.support.matrix import DTYPES, GATES, KERNEL_BACKENDS, MODES
from tests.support.tensors import different_bits, same_bits

THREADS = (1, 2, 3, 5)


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The last two are so large that several threads share one sample, or one plane.
SHAPES = [(1, 7, 5, 3), (5, 13, 9, 7), (1, 64, 40, 24), (2, 3, 151, 149)]


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_block(mode: str, shape: tuple[int, int, int, int], layout: str, backend: str) -> None:
    # Each dtype has one gate, because a gate reads a plane's sums, which three of the dtypes hold in float32.
    for gate, dtype in zip((*GATES, "cbam-channel"), DTYPES, strict=True):
        p = block_cases.problem(
            Case(mode, gate, shape=shape, dtype=dtype, layouts=(layout, layout), gradient_layout=layout)
        )
        torch.set_num_threads(THREADS[0])
        first = block_cases.evaluate(p, backend)
        for threads in (*THREADS, THREADS[-1]):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            different = different_bits(first, block_cases.evaluate(p, backend))
            assert not different, f"{p.case} with {threads} threads: {', '.join(different)}"


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@FORMS
@pytest.mark.parametrize(
    ("counts", "dimensions"), [((4, 4, 4, 4), 2048), ((1,), 5), ((3,) * 40, 33), ((64,), 512)]
)
def test_cqc(
    counts: tuple[int, ...],
    dimensions: int,
    stacked: bool,
    normalize: bool,
    dtype: torch.dtype,
    backend: str,
) -> None:
    p = cqc_cases.problem(CQCCase(counts, counts, dimensions, dtype, stacked, normalize=normalize))
    torch.set_num_threads(THREADS[0])
    first = cqc_cases.evaluate(p, backend)
    for threads in (*THREADS, THREADS[-1]):
        torch.set_num_threads(threads)
        different = different_bits(first, cqc_cases.evaluate(p, backend))
        assert not different, f"{p.case} with {threads} threads: {', '.join(different)}"


@matrix.backends(*KERNEL_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_sample_doesnt_depend_on_its_batch(mode: str, backend: str) -> None:
    """A sample alone gives the same bits as in a batch: the order of its sums does not depend on others."""
    case = Case(mode, shape=(4, 7, 9, 5))
    p = block_cases.problem(case)
    together = block_cases.call(case, p.inputs, p.parameters, backend)
    for i in range(4):
        alone = block_cases.call(case, [x[i : i + 1] for x in p.inputs], p.parameters, backend)
        for whole, one in zip(together, alone, strict=True):
            assert same_bits(whole[i::4] if mode == "concat" else whole[i : i + 1], one)


# The weights of both layers take 0.3 and 8 MB, which several samples read together; in the second case 19
# samples don't fit in one group.
@matrix.backends("cpu")
@pytest.mark.parametrize("hidden", [21, 512])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_that_share_the_gates_weights(layout: str, hidden: int, backend: str) -> None:
    case = Case(shape=(19, 512, 3, 2), layouts=(layout, layout), gradient_layout=layout, hidden=hidden)
    p = block_cases.problem(case)
    torch.set_num_threads(1)
    first = block_cases.evaluate(p, backend)
    for threads in THREADS:
        torch.set_num_threads(threads)
        different = different_bits(first, block_cases.evaluate(p, backend))
        assert not different, f"{case} with {threads} threads: {', '.join(different)}"
    together = block_cases.call(case, p.inputs, p.parameters, backend)
    for i in (0, 9, 10, 18):
        alone = block_cases.call(case, [x[i : i + 1] for x in p.inputs], p.parameters, backend)
        for whole, one in zip(together, alone, strict=True):
            assert same_bits(whole[i : i + 1], one)
