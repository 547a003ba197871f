"""An optimization step: augmentation, forward pass, losses, backward pass and update of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mrcn_fast.reid.data import Augmentation, Modality
from mrcn_fast.reid.models.interface import check_output
from mrcn_fast.reid.models.network import TrainingOutput
from mrcn_fast.reid.training.batches import Batch
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.gathering import gather_outputs
from mrcn_fast.reid.training.journal import StepResult, embedding_spread
from mrcn_fast.reid.training.parts import Loss, loss_parts
from mrcn_fast.reid.training.transfers import Readings, to_device

# Prepared images of both modalities, and the labels, on the device.
_Inputs = tuple[Tensor, Tensor, Tensor]


class NotFiniteError(ArithmeticError):
    """The loss of a step isn't finite, and the weights are as they were before the step.

    Attributes:
        result: the measurements of the step in this process; they are finite where another process has the
            loss that isn't
    """

    def __init__(self, result: StepResult) -> None:
        super().__init__(f"the loss is {result.loss}")
        self.result = result


def augmentations(config: TrainConfig) -> dict[Modality, Augmentation]:
    """Make the augmentation of each modality."""
    size = (config.height, config.width)
    augment = partial(Augmentation, size, padding=config.padding, flip=config.flip, erase=config.erase)
    return {"visible": augment(channel=config.channel_augmentation), "infrared": augment()}


@dataclass
class TrainingStep:
    """Takes the optimization steps of a run.

    `take` is a whole step. It consists of `prepared`, `output`, `losses`, `backward` and `update`, so that
    a step on several batches, or with the features of several processes, is made of the same parts.

    Args:
        config: of the run; the step reads `clip_norm`
        fabric: has the device and the precision
        model: the network, as `fabric.setup` gave it
        optimizer: its optimizer, as `fabric.setup` gave it
        loss: a function of the network's TrainingOutput and the labels (B,)
        augment: the augmentation of each modality
        frozen: modules of the network that stay in eval mode
        layout: the memory layout of the network's inputs
        average: the moving average of the network's weights, which each update adds to; None if there is none
        ahead: how many later steps may be launched before the measurements of a step are read
        agree: takes the means of measurements over the processes
    """

    config: TrainConfig
    fabric: Fabric
    model: _FabricModule
    optimizer: _FabricOptimizer
    loss: Loss
    augment: Mapping[Modality, Augmentation]
    frozen: Sequence[nn.Module]
    layout: torch.memory_format
    average: AveragedModel | None = None
    ahead: int = 0
    agree: Callable[[Sequence[float]], list[float]] = list
    _checked: bool = field(default=False, init=False)

    def take(self, batch: Batch) -> StepResult:
        """Take a step on a batch of uint8 images; returns the means over its parts and the processes.

        Raises NotFiniteError where the loss isn't finite in one of the processes, before the weights change.
        """
        return self.launch(batch)()

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        """Begin a step; the function that is returned ends it as `take` does."""
        return partial(self._whole, batch)

    def _whole(self, batch: Batch) -> StepResult:
        parts = batch.parts(self.config.accumulate)
        return self._on(map(self._inputs, parts), len(parts))

    def on(self, visible: Tensor, infrared: Tensor, labels: Tensor) -> StepResult:
        """Take a step on prepared images, (B, 3, H, W) each, and labels (B,) on the device."""
        return self._on([(visible, infrared, labels)], 1)

    def _inputs(self, batch: Batch) -> _Inputs:
        labels = to_device(batch.labels, self.fabric.device)
        visible = self.prepared(batch.visible, "visible")
        return visible, self.prepared(batch.infrared, "infrared"), labels

    def _on(self, parts: Iterable[_Inputs], count: int) -> StepResult:
        """Take a step on `count` parts; the processes exchange gradients with those of the last part."""
        self.optimizer.zero_grad(set_to_none=True)
        readings = []
        for number, (visible, infrared, labels) in enumerate(parts, start=1):
            with self.fabric.no_backward_sync(self.model, enabled=number < count):
                readings.append(self.backward(self.output(visible, infrared), labels))
        self._check_gradients()
        # The values are read after the backward passes were launched, so that a GPU isn't idle in between.
        each = [reading.values() for reading in readings]
        own = StepResult(*(sum(values) / count for values in zip(*each, strict=True)))
        result = StepResult(*self.agree(own))
        if not result.finite:
            raise NotFiniteError(own)
        self.update()
        return result

    def reset(self) -> None:
        """Drop what depends on the optimizer's state, which has been replaced."""

    def _check_gradients(self) -> None:
        """Refuse parameters that no loss depends on, because the processes would wait for their gradients."""
        if self._checked or self.fabric.world_size == 1:
            return
        self._checked = True
        named = self.model.module.named_parameters()
        if without := [name for name, p in named if p.requires_grad and p.grad is None]:
            raise ValueError(
                f"got a network whose loss doesn't depend on {', '.join(without[:4])}, expected that it "
                "depends on each parameter in several processes: leave these out, or take them out of the "
                "training by requires_grad_(False)"
            )

    def prepared(self, images: Tensor, modality: Modality) -> Tensor:
        """Move a batch of uint8 images to the device, augment it, and put it into the run's memory layout."""
        images = images.to(self.fabric.device, non_blocking=True)
        augmented: Tensor = self.augment[modality](images)
        return augmented.contiguous(memory_format=self.layout)

    def output(self, visible: Tensor, infrared: Tensor) -> TrainingOutput:
        """Run the network in training mode on prepared images, (B, 3, H, W) each."""
        self.model.train()
        for module in self.frozen:
            module.eval()
        return check_output(self.model(visible, infrared), len(visible))

    def backward(self, output: TrainingOutput, labels: Tensor) -> Readings:
        """Compute the losses, add their gradients to those of the parameters, and request the measurements.

        Args:
            output: of the network for B pairs of images
            labels: (B,), the class of each pair, on the device

        Returns:
            the fields of a StepResult, on their way to the host
        """
        total, measured = self.losses(output, labels)
        # One transfer from the device per step serves the check of the loss and the journal.
        readings = Readings(measured)
        self.fabric.backward(total / self.config.accumulate)
        return readings

    def losses(self, output: TrainingOutput, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the total loss, and the fields of a StepResult, (7,), without a gradient."""
        if self.config.gather and self.fabric.world_size > 1:
            output, labels = gather_outputs(self.fabric, output, labels)
        parts = loss_parts(self.loss(output, labels))
        with torch.no_grad():
            right = output.logits.argmax(2) == labels.repeat(output.logits.shape[1] // len(labels))
            measured = torch.stack((*parts, right.float().mean(), embedding_spread(output.pooled)))
        return parts.total, measured

    def update(self) -> None:
        """Let the optimizer change the weights, after the gradient was clipped to `clip_norm`.

        The moving average, where there is one, follows.
        """
        if self.config.clip_norm is not None:
            # In 16-mixed a gradient may be infinite: the scaler then leaves the step out.
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.config.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model.module)
