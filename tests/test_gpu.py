"""What only a GPU can show: graphs, streams, devices, sizes, launches, waiting. `make gpu-check` runs it.

Values are compared by test_block*.py and test_cqc.py, which run there with MRCN_FAST_TEST_DEVICE=cuda.
The problems here are on the GPU whatever the value of that variable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mrcn_fast import MRCNBlock, backends, cqc_loss, mrcn_block, reference
from tests.support.tensors import same_bits

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and torch.cuda.is_available() is False"
)

BACKENDS = ("triton", "cuda")
LARGE = 2**31


def of_backends(*works: str) -> list[Any]:
    """``<backend> <work>`` for each backend; one that can't be used skips with its reason."""
    status = backends()
    return [
        pytest.param(
            f"{name} {work}",
            marks=pytest.mark.skipif(not status[name].usable, reason=f"{name}: {status[name].reason}"),
        )
        for name in BACKENDS
        for work in works
    ]


CQC = ("cqc", "cqc bf16 stacked", "cqc normalized", "cqc bf16 stacked normalized")
WORKS = of_backends("block", "block bf16 channels_last", *CQC)
CQC_WORKS = of_backends(*CQC)


class Work(NamedTuple):
    """Something to run forward and backward; the gradients of the outputs are its own."""

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    def both(self) -> tuple[Tensor, ...]:
        outputs = self.forward()
        found = torch.autograd.grad(outputs, self.leaves, self.gradients)
        return (*(o.detach() for o in outputs), *found)

    @torch.no_grad()
    def take(self, other: Work) -> None:
        """Overwrite the tensors with the values of another's."""
        for own, value in zip(
            (*self.leaves, *self.gradients), (*other.leaves, *other.gradients), strict=True
        ):
            own.copy_(value)


def normal(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


def block_work(dtype: torch.dtype, layout: torch.memory_format, backend: str, device: str, seed: int) -> Work:
    shape = (16, 64, 72, 32)

    def maps(first: int, count: int) -> list[Tensor]:
        made = (normal(*shape, seed=seed + first + i, dtype=dtype, device=device) for i in range(count))
        return [x.contiguous(memory_format=layout) for x in made]

    inputs = [x.requires_grad_() for x in maps(0, 2)]
    parameters = list(MRCNBlock(64, device=device).parameters())
    for i, p in enumerate(parameters):
        p.detach().add_(0.3 * normal(*p.shape, seed=seed + 100 + i, dtype=p.dtype, device=device))

    def forward() -> tuple[Tensor, ...]:
        visible, infrared = inputs
        norm_weight, norm_bias, *gate = parameters
        return mrcn_block(visible, infrared, norm_weight, norm_bias, gate, backend=backend)[1:5]

    return Work(forward, (*inputs, *parameters), tuple(maps(2, 4)))


def cqc_work(
    dtype: torch.dtype, stacked: bool, normalize: bool, backend: str, device: str, seed: int
) -> Work:
    labels = torch.arange(16, device=device).repeat_interleave(8).flip(0)
    sets = [normal(128, 2048, seed=seed + i, dtype=dtype, device=device) for i in range(6)]
    leaves = [x.requires_grad_() for x in ([torch.cat(sets)] if stacked else sets)]

    def forward() -> tuple[Tensor, ...]:
        loss = cqc_loss(leaves[0] if stacked else leaves, labels, normalize=normalize, backend=backend)
        assert isinstance(loss, Tensor)
        return (loss,)

    return Work(forward, tuple(leaves), (torch.full((), 0.7, device=device),))


def make(name: str, device: str = "cuda", seed: int = 0) -> Work:
    backend = name.split()[0]
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    if "cqc" in name:
        return cqc_work(dtype, "stacked" in name, "normalized" in name, backend, device, seed)
    layout = torch.channels_last if "channels_last" in name else torch.contiguous_format
    return block_work(dtype, layout, backend, device, seed)


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    different = [i for i, (g, w) in enumerate(zip(got, want, strict=True)) if not same_bits(g, w)]
    assert not different, f"results {different} of {len(want)} differ"


def warm(work: Work) -> None:
    """Compile the kernels, on the stream that capturing wants: not the default one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work.both()
    torch.cuda.current_stream().wait_stream(stream)


# --- streams, graphs, devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKS)
def test_the_same_bits_on_every_run(name: str) -> None:
    work = make(name)
    first = work.both()
    for _ in range(20):
        assert_same(work.both(), first)


@pytest.mark.parametrize("name", WORKS)
def test_a_captured_graph_replays_with_other_values(name: str) -> None:
    work, other = make(name), make(name, seed=1000)
    warm(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work.both()
    expected = other.both()
    work.take(other)
    for _ in range(3):
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        assert_same(results, expected)


@pytest.mark.parametrize("name", CQC_WORKS)
def test_a_graph_replays_beside_calls_on_another_stream(name: str) -> None:
    """A counter that both used would make one of them finish early, or never."""
    work, beside = make(name), make(name, seed=1000)
    expected, expected_beside = work.both(), beside.both()
    warm(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work.both()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(200):
        with torch.cuda.stream(stream):
            graph.replay()
        found = beside.both()
    torch.cuda.synchronize()
    assert_same(results, expected)
    assert_same(found, expected_beside)


@pytest.mark.parametrize("name", WORKS)
def test_work_goes_to_the_current_stream(name: str) -> None:
    """The inputs come late on a side stream: a kernel on any other would read what was there before."""
    work, other = make(name), make(name, seed=1000)
    expected = other.both()
    work.both()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        work.take(other)
        found = work.both()
    stream.synchronize()
    assert_same(found, expected)


@pytest.mark.parametrize("name", CQC_WORKS)
def test_two_streams_at_once(name: str) -> None:
    works = [make(name, seed=seed) for seed in (0, 1000)]
    expected = [work.both() for work in works]
    streams = [torch.cuda.Stream() for _ in works]
    torch.cuda.synchronize()
    found: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(50):
        for work, stream, results in zip(works, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(work.both())
    torch.cuda.synchronize()
    for results, want in zip(found, expected, strict=True):
        for got in results:
            assert_same(got, want)


@pytest.mark.parametrize("name", WORKS)
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs a second GPU, there is {torch.cuda.device_count()}")
    work = make(name, "cuda:1")
    assert torch.cuda.current_device() == 0
    found = work.both()
    assert torch.cuda.current_device() == 0 and all(x.device.index == 1 for x in found)
    with torch.cuda.device(1):
        assert_same(found, work.both())


# --- what a call costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKS)
def test_the_host_never_waits(name: str) -> None:
    work = make(name)
    work.both()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work.both()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def launches(call: Callable[[], Any]) -> Counter[str]:
    """Names of the kernels, copies and fills that ``call`` puts on the GPU, but for counters set to zero."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = (e.name for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA)
    return Counter(name for name in on_gpu if not name.startswith("Memset"))


@pytest.mark.parametrize("name", WORKS)
def test_launches(name: str) -> None:
    """One a direction, for the block in Triton at most three, and nothing else on the GPU."""
    most = 3 if name.startswith("triton block") else 1
    work = make(name)
    forward = launches(work.forward)
    outputs = work.forward()
    backward = launches(lambda: torch.autograd.grad(outputs, work.leaves, work.gradients, retain_graph=True))
    assert 1 <= forward.total() <= most, forward
    assert 1 <= backward.total() <= most, backward


@pytest.mark.parametrize("name", of_backends("block"))
def test_a_compiled_network_has_no_break_and_the_same_results(name: str) -> None:
    work = make(name)
    compiled = torch.compile(work.forward, fullgraph=True)
    for got, want in zip(compiled(), work.forward(), strict=True):
        torch.testing.assert_close(got, want)


# --- more than 2**31 elements ------------------------------------------------------------------------------


def need(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.xdist_group("large")  # not at once: a GPU has the memory for one
@pytest.mark.parametrize("name", of_backends("block"))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_block_of_more_than_2_31_elements(layout: torch.memory_format, name: str) -> None:
    """Samples don't know of each other: the first and the last are what the reference gives of them alone."""
    need(64)
    shape, dtype = (1030, 64, 256, 128), torch.bfloat16
    visible, infrared = (
        normal(*shape, seed=i, dtype=dtype, device="cuda").contiguous(memory_format=layout) for i in range(2)
    )
    assert visible.numel() > LARGE
    visible.requires_grad_()
    infrared.requires_grad_()
    norm_weight, norm_bias, *gate = (p.detach() for p in MRCNBlock(64, device="cuda").parameters())
    outputs = mrcn_block(visible, infrared, norm_weight, norm_bias, gate, backend=name.split()[0])[1:5]
    gradients = tuple(outputs[0].detach() for _ in outputs)  # one tensor for all four: memory is short
    found = torch.autograd.grad(outputs, (visible, infrared), gradients)
    for at in (0, shape[0] - 1):
        alone = [x[at : at + 1].detach().float().requires_grad_() for x in (visible, infrared)]
        sets = reference.mrcn_block(alone[0], alone[1], norm_weight, norm_bias, gate)[1:5]
        given = tuple(g[at : at + 1].float() for g in gradients)
        for got, want in zip(
            (*(o[at : at + 1] for o in outputs), *(g[at : at + 1] for g in found)),
            (*sets, *torch.autograd.grad(sets, alone, given)),
            strict=True,
        ):
            error = (got.detach().float() - want).abs().max() / want.abs().max()
            assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.xdist_group("large")  # not at once: a GPU has the memory for one
@pytest.mark.parametrize("name", of_backends("cqc"))
def test_cqc_of_more_than_2_31_elements(name: str) -> None:
    need(32)
    labels = torch.arange(4, device="cuda").repeat_interleave(6)
    features = normal(144, 2**24, seed=0, dtype=torch.bfloat16, device="cuda").requires_grad_()
    assert features.numel() > LARGE
    loss = cqc_loss(features, labels, margin=1e4, backend=name.split()[0])
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, features)
    # The reference of one identity at a time, in float32: all of it would not fit.
    expected = 0.0
    for identity in range(4):
        rows = torch.cat([24 * k + (labels == identity).nonzero()[:, 0] for k in range(6)])
        alone = features[rows].detach().float().requires_grad_()
        own = torch.full((6,), identity, device="cuda")
        each, _ = reference.cqc_loss(alone.split(6), own, own, margin=1e4)
        (want,) = torch.autograd.grad(each.sum(), alone)
        expected += float(each)
        error = (gradient[rows].float() - want).abs().max() / want.abs().max()
        assert error < 2 * torch.finfo(torch.bfloat16).eps
        del alone, want
    assert abs(float(loss) - expected) < 1e-4 * expected
