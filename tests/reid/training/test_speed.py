"""The speed of a run: what is chosen on a device, and that fast steps compute what plain steps compute."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mrcn_fast.backends import cpu
from mrcn_fast.reid.data import write_sysu
from mrcn_fast.reid.models.network import TrainingOutput
from mrcn_fast.reid.training import fast
from mrcn_fast.reid.training.batches import Batch
from mrcn_fast.reid.training.checkpoint import load_checkpoint
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.fast import Captured, FastStep
from mrcn_fast.reid.training.journal import StepResult
from mrcn_fast.reid.training.losses import LossParts, ReIDLoss
from mrcn_fast.reid.training.speed import make_step, resolved
from mrcn_fast.reid.training.step import NotFiniteError, TrainingStep
from mrcn_fast.reid.training.trainer import Trainer, TrainingError
from tests.reid.conftest import quiet, train
from tests.support.tensors import same_bits
from tests.support.waits import name_of, waits

AUTO: dict[str, Any] = {"speed": "auto", "precision": None, "channels_last": None}
PLAIN: dict[str, Any] = {"speed": "plain", "precision": None, "channels_last": None}
# A learning rate so low that steps from random weights don't amplify rounding, and bf16's error of a loss.
SLOW, BF16 = 0.0005, 0.02
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and torch.cuda.is_available() is False"
)


@pytest.fixture
def config(tiny_config: TrainConfig) -> TrainConfig:
    """A run of six fast steps on the CPU, in float32, because 32 x 16 pixels are too few for bf16."""
    return dataclasses.replace(tiny_config, **AUTO, log_every=50)


class Small(nn.Module):
    """A network of two sets that a test trains in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, 4)

    def extract(self, images: Tensor, modality: str) -> Tensor:
        features: Tensor = self.stem(images).mean(dim=(2, 3))
        return features

    def forward(self, visible: Tensor, infrared: Tensor) -> TrainingOutput:
        pooled = torch.cat((self.extract(visible, "visible"), self.extract(infrared, "infrared")))
        return TrainingOutput(pooled[None], self.classifier(pooled)[None])


def small(config: TrainConfig, name: str = "run", **parts: Any) -> Trainer[Small]:
    """Make a Trainer of a small network; it takes fast steps too."""
    return Trainer(dataclasses.replace(config, out=f"{config.out}-{name}"), model=Small(), **parts)


def fast_step(trainer: Trainer[Any]) -> FastStep:
    assert isinstance(trainer._step, FastStep)
    return trainer._step


def state_of(step: TrainingStep) -> list[Tensor]:
    """All tensors that a step changes: weights, statistics, the optimizer's state, and the flag."""
    flag = [step._refused] if isinstance(step, FastStep) else []
    optimizer = [t for t in tree_leaves(list(step.optimizer.state.values())) if isinstance(t, Tensor)]
    return [*step.model.state_dict().values(), *optimizer, *flag]


# --- what is chosen -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isa", "size", "expected"),
    [
        ("avx512bf16", (256, 128), ("bf16-mixed", True)),
        ("avx512bf16", (96, 48), ("bf16-mixed", True)),
        ("avx512bf16", (96, 32), ("32-true", False)),
        ("avx512", (256, 128), ("32-true", True)),
        ("avx512", (192, 128), ("32-true", False)),
        (None, (96, 48), ("32-true", False)),
    ],
)
def test_a_cpu_gets_what_it_computes_fast(
    monkeypatch: pytest.MonkeyPatch, isa: str | None, size: tuple[int, int], expected: tuple[str, bool]
) -> None:
    monkeypatch.setattr(cpu, "build_info", lambda: {"isa": isa} if isa else {})
    config = TrainConfig(data="", accelerator="cpu", height=size[0], width=size[1])
    assert (config.precision, config.channels_last) == (None, None)
    found = resolved(config)
    assert (found.speed, found.precision, found.channels_last) == ("auto", *expected)
    assert resolved(found) == found


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_a_gpu_gets_bf16_whatever_the_images(monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = resolved(TrainConfig(data="", accelerator=accelerator, height=32, width=16))
    assert (found.speed, found.precision, found.channels_last) == ("auto", "bf16-mixed", True)


def test_given_values_win() -> None:
    given: dict[str, Any] = {"precision": "16-mixed", "channels_last": False}
    found = resolved(TrainConfig(data="", accelerator="cuda", **given))
    assert (found.speed, found.precision, found.channels_last) == ("auto", "16-mixed", False)


def test_plain_is_plain_everywhere() -> None:
    plain = TrainConfig(data="", speed="plain")
    assert (plain.precision, plain.channels_last) == ("32-true", False)
    assert resolved(plain) == plain
    unmeasured = resolved(TrainConfig(data="", accelerator="mps"))
    assert (unmeasured.speed, unmeasured.precision, unmeasured.channels_last) == ("plain", "32-true", False)


class OnGPU:
    """As much of a Fabric on a GPU as `make_step` reads."""

    device = torch.device("cuda")

    def __init__(self, processes: int) -> None:
        self.world_size = processes


class Case(NamedTuple):
    """Values of a run on a GPU, with what its caller gave."""

    values: dict[str, Any]
    parts: tuple[str, ...] = ()
    callbacks: tuple[object, ...] = ()
    processes: int = 1

    def step(self) -> tuple[TrainingStep, str]:
        config = resolved(TrainConfig(**({"data": "", "accelerator": "cuda"} | self.values)))
        shared = dict.fromkeys(("model", "optimizer", "loss", "augment", "frozen", "layout"))
        return make_step(self.parts, self.callbacks, config=config, fabric=OnGPU(self.processes), **shared)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case({}), "bf16-mixed, channels_last, fused optimizer, a CUDA graph from the fourth step on"),
        (Case({"compile": True}), "channels_last, compiled trunk, fused optimizer, a CUDA graph"),
        (Case({}, parts=("model", "loss")), "eager (your own model and loss may do something else"),
        (Case({}, callbacks=(object(),)), "eager (callbacks may change what a CUDA graph would hold)"),
    ],
)
def test_what_becomes_a_cuda_graph(case: Case, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastStep, "__post_init__", lambda step: None)  # it needs the GPU
    step, how = case.step()
    assert isinstance(step, FastStep)
    assert step.captures == ("a CUDA graph from" in how) != ("eager" in how)
    assert step.late == (0 if case.callbacks else 1)
    assert words in how


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case({"precision": "16-mixed"}), "16-mixed, channels_last, eager (the gradient scaler of 16-mixed"),
        (Case({"optimizer": "torch.optim.RAdam"}), "eager (an optimizer of your own"),
        (Case({}, parts=("optimizer",)), "eager (an optimizer of your own"),
        (Case({}, processes=2), "eager (several processes"),
        (Case({"speed": "plain"}), "32-true, NCHW, eager"),
    ],
)
def test_what_waits_for_the_loss(case: Case, words: str) -> None:
    step, how = case.step()
    assert type(step) is TrainingStep and step.ahead == 0
    assert words in how


def test_a_run_says_how_its_steps_are_taken(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mrcn_fast"):
        trainer = train(dataclasses.replace(config, steps=1))
    assert "Speed auto: 32-true, NCHW, fused optimizer, eager" in caplog.messages
    kept = load_checkpoint(trainer.checkpoint_path).config
    assert (kept.speed, kept.precision, kept.channels_last, kept.compile) == ("auto", "32-true", False, False)


# --- what is computed ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SYSU-MM01's tree with images that are large enough for bf16 on any processor."""
    root = tmp_path_factory.mktemp("data") / "tree"
    return write_sysu(root, identities=7, test_identities=3, images_per_camera=2, image_size=(64, 32))


def losses_of(trainer: Trainer[Any]) -> Tensor:
    """Train a run, and return the loss of each step, (steps,)."""
    found = []
    add = trainer.journal.add

    def kept(result: StepResult, *seconds: float) -> None:
        found.append(result.loss)
        add(result, *seconds)

    trainer.journal.add = kept  # type: ignore[method-assign, assignment]
    trainer.fit(progress=quiet())
    return torch.tensor(found)


def follows(
    config: TrainConfig, larger_tree: Path, make: Callable[[TrainConfig, str], Trainer[Any]]
) -> Tensor:
    """Relative differences between the losses of a fast run in bf16 and a plain one, (100,)."""
    values: dict[str, Any] = {
        "data": str(larger_tree), "height": 64, "width": 32, "batches": 100, "epochs": 1, "warmup_lr": SLOW,
    }  # fmt: skip
    config = dataclasses.replace(config, **values)
    plain = losses_of(make(dataclasses.replace(config, **PLAIN), "plain"))
    trainer = make(dataclasses.replace(config, precision="bf16-mixed"), "fast")
    found = losses_of(trainer)
    assert (trainer.config.precision, type(trainer._step)) == ("bf16-mixed", FastStep)
    assert plain[-10:].mean() < 0.9 * plain[:10].mean()
    return (found - plain) / plain


def test_a_small_networks_losses_follow_the_plain_steps(config: TrainConfig, larger_tree: Path) -> None:
    assert follows(config, larger_tree, small).abs().max() < BF16


@pytest.mark.slow
def test_a_resnets_losses_follow_the_plain_steps(config: TrainConfig, larger_tree: Path) -> None:
    def resnet(config: TrainConfig, name: str) -> Trainer[Any]:
        # Most of a ResNet-18's weights are in layer4, which takes the time on images this small.
        return Trainer(dataclasses.replace(config, out=f"{config.out}-{name}", freeze=("layer4",)))

    # From random weights training amplifies any rounding: with another layout in float32, too, single losses
    # soon differ by tenths. The means of ten steps stay close.
    apart = follows(config, larger_tree, resnet)
    assert apart[0].abs() < BF16
    assert apart.view(10, 10).mean(dim=1).abs().max() < 0.08


def test_fast_steps_in_float32_are_the_plain_ones_up_to_rounding(config: TrainConfig) -> None:
    plain = losses_of(small(dataclasses.replace(config, **PLAIN), "plain"))
    torch.testing.assert_close(losses_of(small(config)), plain, rtol=1e-5, atol=0)


def test_a_resumed_run_ends_bitwise_as_an_uninterrupted_one(config: TrainConfig) -> None:
    whole = small(config)
    whole.fit(progress=quiet())
    small(dataclasses.replace(config, steps=2), "resumed").fit(progress=quiet())
    resumed = small(config, "resumed")
    resumed.fit(resume=True, progress=quiet())
    assert resumed.journal.lines[-1]["step"] == whole.journal.lines[-1]["step"] == 6
    for found, expected in zip(state_of(resumed._step), state_of(whole._step), strict=True):
        assert same_bits(found, expected)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_seconds_of_all_steps_are_recorded(config: TrainConfig, every: int) -> None:
    loss = ReIDLoss()

    def slow(output: TrainingOutput, labels: Tensor) -> LossParts:
        time.sleep(0.05)
        return loss(output, labels)

    trainer = small(dataclasses.replace(config, batches=6, epochs=1, log_every=every), loss=slow)
    begun = time.perf_counter()
    trainer.fit(progress=quiet())
    whole = time.perf_counter() - begun
    seconds = [line["step_seconds"] for line in trainer.journal.lines]
    assert len(seconds) * every == 6
    assert min(seconds) >= 0.05 and sum(seconds) * every < whole


class Failing:
    """The library's loss, which isn't finite in one of its calls."""

    def __init__(self, call: int) -> None:
        self.calls, self._fails = 0, call
        self._loss = ReIDLoss()

    def __call__(self, output: TrainingOutput, labels: Tensor) -> LossParts:
        self.calls += 1
        parts: LossParts = self._loss(output, labels)
        return parts._replace(total=parts.total * torch.inf) if self.calls == self._fails else parts


def test_a_run_goes_on_after_a_refused_step_that_was_never_read(config: TrainConfig) -> None:
    trainer = small(dataclasses.replace(config, steps=2), loss=Failing(3))
    trainer.fit(progress=quiet())
    trainer._step.launch(next(trainer.batches.of(0)))  # whose end Ctrl-C prevents
    trainer.config.steps = None
    trainer.fit(resume=True, progress=quiet())
    whole = small(config, "whole")
    whole.fit(progress=quiet())
    for found, wanted in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert same_bits(found.detach(), wanted.detach())


@pytest.mark.parametrize(("fails", "calls"), [(1, 1), (4, 5), (6, 6)])
def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(
    config: TrainConfig, fails: int, calls: int
) -> None:
    config = dataclasses.replace(config, batches=6, epochs=1)
    loss = Failing(fails)
    trainer = small(config, loss=loss)
    with pytest.raises(TrainingError, match=rf"^step {fails} \(epoch 1\): the loss isn't finite"):
        trainer.fit(progress=quiet())
    # The next step was on its way, and changed nothing either.
    assert loss.calls == calls
    assert (trainer.step_count, trainer.batch) == (fails - 1, fails - 1)
    expected = small(dataclasses.replace(config, steps=fails - 1 or None), "shorter")
    if fails > 1:
        expected.fit(progress=quiet())
    for found, wanted in zip(trainer.model.parameters(), expected.model.parameters(), strict=True):
        assert same_bits(found.detach(), wanted.detach())


# --- what a CUDA graph needs --------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Keeps the operations of a step with the shapes and types of what they make, and refuses to wait.

    Args:
        allowed: names of operations that would wait on a GPU, and how often each may come
    """

    def __init__(self, allowed: dict[str, int] | None = None) -> None:
        super().__init__()
        self.found: list[tuple[object, ...]] = []
        self._left = Counter(allowed or {})

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        if waits(function, arguments):
            name = name_of(function)
            self._left[name] -= 1
            assert self._left[name] >= 0, f"{name} needs values of the device within a step"
        result = function(*arguments, **(options or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.found.append((str(function), *((t.shape, t.dtype, t.stride()) for t in tensors)))
        return result


def refuse_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the methods fail that give values of a tensor to Python without an operation on the CPU."""
    for name in ("tolist", "cpu", "numpy"):

        def read(*arguments: object, name: str = name) -> None:
            raise AssertionError(f"Tensor.{name} within a step")

        monkeypatch.setattr(Tensor, name, read)


def inputs_of(trainer: Trainer[Any], batch: Batch) -> list[Tensor]:
    images = {"visible": batch.visible, "infrared": batch.infrared}
    return [*(trainer.prepared(x, name) for name, x in images.items()), batch.labels]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [{}, {"model": "snr", "clip_norm": 1.0}, {"model": "baseline", "parts": 2}]
)
def test_a_step_reads_nothing_and_is_the_same_each_time(
    config: TrainConfig, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(dataclasses.replace(config, **values))
    step = fast_step(trainer)
    batches = list(trainer.batches.of(0))
    step.take(batches[0])
    # On the CPU, where nothing is waited for, the CQC loss looks whether there is an identity at all.
    looks = trainer.config.parts * (trainer.config.model == "mrcn")
    kinds = []
    for batch in batches[1:]:
        inputs = inputs_of(trainer, batch)
        with monkeypatch.context() as patched, Operations({"_local_scalar_dense": looks}) as operations:
            refuse_reading(patched)
            step._computed(*inputs)
        kinds.append(operations.found)
    assert len(kinds[0]) > 400
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any())])
def test_reading_within_a_step_is_noticed(read: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="within a step"), Operations():
        read(torch.ones(3))


class Tape(TorchDispatchMode):
    """Keeps operations with their tensors, and repeats them in the same memory, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Any, ...]] = []
        self.replays = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        self._kept.append((function, arguments, options or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for function, arguments, options, result in self._kept:
                again = function(*arguments, **options)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    # A view, or the result of an operation in place, has the memory that it had.
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorded(Captured):
    """A stand-in for a CUDA graph on the CPU."""

    made: Recorded

    def __init__(self, work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        state = state_of(work.__self__)  # type: ignore[attr-defined]
        before = [tensor.clone() for tensor in state]
        # Zeros, so that a graph that kept these instead of the later inputs is noticed.
        self._inputs = [torch.zeros_like(given) for given in inputs]
        with Tape() as self._graph:
            self._result = work(*self._inputs)
        # Nothing is computed while a CUDA graph is captured.
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        Recorded.made = self

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        # A GPU's measurements are copied to the host, but those on the CPU stay where they are.
        return super().__call__(inputs).clone()


def test_a_graph_repeats_the_step_on_other_batches_and_rates(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, batches=4, epochs=2, clip_norm=1.0)
    eager = train(config)
    monkeypatch.setattr(fast, "Captured", Recorded)
    trainer = Trainer(dataclasses.replace(config, out=f"{config.out}-graph"))
    fast_step(trainer).captures = True
    trainer.fit(progress=quiet())
    assert Recorded.made._graph.replays == 5  # type: ignore[attr-defined]
    assert [line["lr"] for line in trainer.journal.lines] == pytest.approx([0.01, 0.02])
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.02, 0.002])
    for found, expected in zip(state_of(trainer._step), state_of(eager._step), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.fixture
def replayed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer[Any], list[Batch]]:
    """A trainer whose step was captured after three batches and replayed on the fourth, and six batches."""
    monkeypatch.setattr(fast, "Captured", Recorded)
    trainer = small(dataclasses.replace(config, batches=6))
    step = fast_step(trainer)
    step.captures = True
    batches = list(trainer.batches.of(0))
    for batch in batches[:4]:
        step.take(batch)
    return trainer, batches


def test_a_graph_leaves_the_update_out_for_a_loss_that_is_not_finite(
    replayed: tuple[Trainer[Any], list[Batch]],
) -> None:
    trainer, batches = replayed
    step = fast_step(trainer)
    assert Recorded.made._graph.replays == 1  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    visible, infrared, labels = inputs_of(trainer, batches[4])
    broken = step._launched([torch.full_like(visible, torch.nan), infrared, labels])
    later = step._launched(inputs_of(trainer, batches[5]))
    with pytest.raises(NotFiniteError):
        step._result(broken)
    # The weights are those before the broken step, so that the later one had no effect.
    assert all(same_bits(p.detach(), old) for p, old in zip(trainer.model.parameters(), before, strict=True))
    assert later is not None


def test_a_batch_of_another_shape_is_taken_without_the_graph(
    replayed: tuple[Trainer[Any], list[Batch]],
) -> None:
    trainer, batches = replayed
    step = fast_step(trainer)
    larger = Batch(*(torch.cat(pair) for pair in zip(batches[4], batches[5], strict=True)))
    assert step.take(larger).finite and step.take(batches[4]).finite
    assert Recorded.made._graph.replays == 2  # type: ignore[attr-defined]


def test_a_step_that_can_not_be_captured_is_taken_without_a_graph(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failed:
        def __init__(self, *given: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

    eager = small(config, "eager")
    eager.fit(progress=quiet())
    monkeypatch.setattr(fast, "Captured", Failed)
    trainer = small(config)
    fast_step(trainer).captures = True
    trainer.fit(progress=quiet())
    (message,) = (line for line in caplog.messages if "CUDA graph" in line)
    assert message.endswith("capturing one failed: operation not permitted when stream is capturing")
    for found, expected in zip(state_of(trainer._step), state_of(eager._step), strict=True):
        assert same_bits(found, expected)


# --- with a GPU: `make gpu-check` runs these ----------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("values", [{}, {"model": "baseline"}, {"clip_norm": 1.0}, {"precision": "32-true"}])
def test_a_captured_run_is_the_eager_one(
    config: TrainConfig, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"accelerator": "cuda", "batches": 6} | values
    config = dataclasses.replace(config, **own)
    captured = train(config)
    assert fast_step(captured)._graph is not None
    monkeypatch.setattr(fast, "_WARM_UPS", 10**9)
    eager = train(dataclasses.replace(config, out=f"{config.out}-eager"))
    assert fast_step(eager)._graph is None
    # The losses of both, because some of cuDNN's backward kernels add in an order of their own.
    for found, expected in zip(captured.journal.lines, eager.journal.lines, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-2)


def captured_on_gpu(config: TrainConfig) -> tuple[Trainer, list[Batch]]:
    """A trainer whose step is a CUDA graph that the fourth batch has replayed, and two more batches."""
    trainer = Trainer(dataclasses.replace(config, accelerator="cuda", batches=6))
    batches = list(trainer.batches.of(0))
    for batch in batches[:4]:
        trainer.step(batch)
    assert fast_step(trainer)._graph is not None
    return trainer, batches[4:]


@needs_gpu
def test_a_captured_step_never_waits(config: TrainConfig) -> None:
    trainer, batches = captured_on_gpu(config)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ends = [fast_step(trainer).launch(batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(end().finite for end in ends)


@needs_gpu
def test_a_captured_step_leaves_the_update_out(config: TrainConfig) -> None:
    trainer, batches = captured_on_gpu(config)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    visible, infrared, labels = inputs_of(trainer, batches[0])
    with pytest.raises(NotFiniteError):
        fast_step(trainer).on(torch.full_like(visible, torch.nan), infrared, labels.cuda())
    assert all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))


@needs_gpu
def test_the_losses_on_a_gpu_follow_the_plain_steps(config: TrainConfig) -> None:
    values: dict[str, Any] = {"accelerator": "cuda", "batches": 100, "epochs": 1, "warmup_lr": SLOW}
    config = dataclasses.replace(config, **values)
    plain = losses_of(Trainer(dataclasses.replace(config, **PLAIN, out=f"{config.out}-plain")))
    trainer = Trainer(config)
    apart = (losses_of(trainer) - plain) / plain
    assert fast_step(trainer)._graph is not None
    # As on the CPU.
    assert apart[0].abs() < BF16
    assert apart.view(10, 10).mean(dim=1).abs().max() < 0.08
