"""A training step asks the device for nothing until all of its backward is on its way."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.trainer import Trainer
from mrcn_fast.reid.training.transfers import Readings, to_device
from tests.support.waits import name_of, waits


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU's host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        if waits(function, arguments):
            self.found[name_of(function)] += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.unique(), "_unique2"),
    ],
)
def test_operations_that_wait_are_counted(work: Callable[[torch.Tensor], object], name: str) -> None:
    with Waits() as waits:
        work(torch.randn(9))
    assert waits.found[name] == 1


@pytest.mark.parametrize("values", [{"model": "baseline"}, {"model": "snr"}, {"model": "mrcn"}, {"parts": 2}])
def test_a_training_step_has_nothing_to_wait_for(tiny_config: TrainConfig, values: dict[str, Any]) -> None:
    config = dataclasses.replace(tiny_config, channel_augmentation=0.5, **values)
    trainer = Trainer(config)
    batch = next(iter(trainer.batches.of(0)))
    with Waits() as waits:
        trainer.step(batch)
    # On the CPU, where nothing is waited for, the CQC loss looks whether there is an identity at all.
    looks = config.parts * (config.model == "mrcn")
    assert waits.found == Counter(_local_scalar_dense=looks)


def test_readings_are_requested_after_the_backward(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny_config)
    learning = [p for p in trainer.model.parameters() if p.requires_grad]
    asked = []

    class Watched(Readings):
        def values(self) -> list[float]:
            asked.append(all(p.grad is not None for p in learning))
            return super().values()

    monkeypatch.setattr("mrcn_fast.reid.training.step.Readings", Watched)
    trainer.step(next(iter(trainer.batches.of(0))))
    assert asked == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, accelerator="cuda", channel_augmentation=0.5)
    trainer = Trainer(config)
    batches = list(trainer.batches.of(0))
    first = trainer.step(batches[0])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = trainer.step(batches[1])
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert first.finite and second.finite


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_later_writes_do_not_change_readings() -> None:
    numbers = torch.arange(5.0)
    there = to_device(numbers, torch.device("cuda"))
    assert there.is_cuda
    readings = Readings(2 * there)
    there.zero_()
    assert readings.values() == [0, 2, 4, 6, 8]
