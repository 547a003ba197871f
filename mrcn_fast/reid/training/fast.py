"""The fast training step: the device can leave an update out, and the host reads measurements late.

The host of a plain step waits for the loss before it lets the optimizer change the weights. Here the device
decides: it computes a flag from the measurements, and the kernel of the optimizer does nothing where the flag
is set. The host reads the measurements of a step after it has launched the next one, so that a GPU always
has work. On a GPU the kernels of a step are captured as a CUDA graph, which later steps replay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from mrcn_fast.reid.training.batches import Batch
from mrcn_fast.reid.training.journal import StepResult
from mrcn_fast.reid.training.step import NotFiniteError, TrainingStep
from mrcn_fast.reid.training.transfers import Readings, SideStream, to_device

log = logging.getLogger(__name__)

# After this many steps Triton, Inductor and cuDNN have compiled their kernels and chosen among them.
_WARM_UPS: Final = 3


class Captured:
    """A function of tensors, captured as one CUDA graph: a call replays it on other values.

    Nothing in the function may wait for the GPU, and all that it reads besides its arguments must stay at its
    address. The result of a call is overwritten by the next one.

    Args:
        work: the function
        inputs: tensors with the shapes, dtypes and layouts of all later inputs; their values are not read

    Raises:
        RuntimeError: where a part of the function can't be captured
    """

    def __init__(self, work: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._inputs = [torch.empty_like(given) for given in inputs]
        self._graph = torch.cuda.CUDAGraph()
        # In the default mode, calls of the thread that pins batches would end the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = work(*self._inputs)

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the inputs have the shapes and dtypes that were captured."""
        return [(x.shape, x.dtype) for x in inputs] == [(x.shape, x.dtype) for x in self._inputs]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result


@dataclass
class FastStep(TrainingStep):
    """Takes steps whose measurements are read late, and on a GPU replays them as one CUDA graph.

    A batch is copied and augmented on a stream of its own, while the step before it computes. The optimizer
    must be a fused one of PyTorch's, whose kernel can leave an update out.

    Args:
        captures: whether steps become a CUDA graph, after three that are taken without one
        late: how many later steps may be launched before the measurements of a step are read. `ahead` is 0
            until the first step was read, and then this number.
    """

    captures: bool = False
    late: int = 1

    def __post_init__(self) -> None:
        # 1 after a step whose loss wasn't finite, until the host has read that.
        self._refused = torch.zeros((), device=self.fabric.device)
        # Where this attribute is 1, PyTorch's fused optimizers leave the update out; GradScaler sets it too.
        vars(self.optimizer.optimizer)["found_inf"] = self._refused
        self._side = SideStream(self.fabric.device)
        self.reset()

    def reset(self) -> None:
        self._refused.zero_()
        self._launches = self.ahead = 0
        self._graph: Captured | None = None
        self._rates: list[Tensor] = []

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        with self._side.ahead():
            inputs = [
                self.prepared(batch.visible, "visible"),
                self.prepared(batch.infrared, "infrared"),
                to_device(batch.labels, self.fabric.device),
            ]
        self._side.hand_over(inputs)
        return partial(self._result, self._launched(inputs))

    def on(self, visible: Tensor, infrared: Tensor, labels: Tensor) -> StepResult:
        return self._result(self._launched([visible, infrared, labels]))

    def _result(self, readings: Readings) -> StepResult:
        result = StepResult(*readings.values())
        if not result.finite:
            self._refused.zero_()
            raise NotFiniteError(result)
        return result

    def _launched(self, inputs: Sequence[Tensor]) -> Readings:
        if self._launches == 0:
            return self._first(*inputs)
        if self.captures and self._graph is None and self._launches >= _WARM_UPS:
            self._capture(inputs)
        self._launches += 1
        if self._graph is None or not self._graph.takes(inputs):
            # Nothing that a warm-up leaves behind may belong to the stream that is captured later.
            with self._side.in_turn():
                return Readings(self._computed(*inputs))
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        return Readings(self._graph(inputs))

    def _first(self, visible: Tensor, infrared: Tensor, labels: Tensor) -> Readings:
        """Take the first step, which makes the optimizer's state.

        The host reads its loss before the update, because an update that is left out makes no state.
        """
        self.optimizer.zero_grad(set_to_none=True)
        readings = self.backward(self.output(visible, infrared), labels)
        if StepResult(*readings.values()).finite:
            self.update()
            self._launches, self.ahead = 1, self.late
        return readings

    def _computed(self, visible: Tensor, infrared: Tensor, labels: Tensor) -> Tensor:
        """Compute a whole step without reading anything; returns the measurements, (7,), on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        total, measured = self.losses(self.output(visible, infrared), labels)
        self.fabric.backward(total)
        bad = measured.isfinite().all().logical_not().float()
        torch.maximum(self._refused, bad, out=self._refused)
        self.update()
        return measured

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        """Capture the step; where that fails, later steps are taken without a graph."""
        groups = self.optimizer.param_groups
        rates = [float(group["lr"]) for group in groups]
        # The graph reads the rates from tensors, which the schedule can overwrite. After the capture the
        # groups have numbers again, which all other code expects.
        self._rates = [torch.tensor(rate, device=self.fabric.device) for rate in rates]
        # The graph allocates its own gradients.
        self.optimizer.zero_grad(set_to_none=True)
        try:
            for group, tensor in zip(groups, self._rates, strict=True):
                group["lr"] = tensor
            self._graph = Captured(self._computed, inputs)
        except RuntimeError as error:
            self.captures = False
            reason = str(error).strip().split("\n")[0]
            log.warning("The steps go on without a CUDA graph, because capturing one failed: %s", reason)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
