"""An optimization step: augmentation, forward pass, losses, backward pass and update of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor, nn

from mrcn_fast.reid.data import Augmentation, Modality
from mrcn_fast.reid.models.interface import check_output
from mrcn_fast.reid.models.network import TrainingOutput
from mrcn_fast.reid.training.batches import Batch
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.journal import StepResult, embedding_spread
from mrcn_fast.reid.training.parts import Loss, loss_parts
from mrcn_fast.reid.training.transfers import Readings, to_device


class NotFiniteError(ArithmeticError):
    """The loss of a step isn't finite, and the weights are as they were before the step.

    Attributes:
        result: the measurements of the step
    """

    def __init__(self, result: StepResult) -> None:
        super().__init__(f"the loss is {result.loss}")
        self.result = result


@dataclass
class TrainingStep:
    """Takes the optimization steps of a run.

    `take` is a whole step. It consists of `prepared`, `output`, `backward` and `update`, so that a step on
    several batches, or with the features of several processes, is made of the same parts.

    Args:
        config: of the run; the step reads `clip_norm`
        fabric: has the device and the precision
        model: the network, as `fabric.setup` gave it
        optimizer: its optimizer, as `fabric.setup` gave it
        loss: a function of the network's TrainingOutput and the labels (B,)
        augment: the augmentation of each modality
        frozen: modules of the network that stay in eval mode
        layout: the memory layout of the network's inputs
    """

    config: TrainConfig
    fabric: Fabric
    model: _FabricModule
    optimizer: _FabricOptimizer
    loss: Loss
    augment: Mapping[Modality, Augmentation]
    frozen: Sequence[nn.Module]
    layout: torch.memory_format

    def take(self, batch: Batch) -> StepResult:
        """Take a step on a batch of uint8 images.

        Raises NotFiniteError where the loss isn't finite, before the weights change.
        """
        labels = to_device(batch.labels, self.fabric.device)
        visible = self.prepared(batch.visible, "visible")
        infrared = self.prepared(batch.infrared, "infrared")
        self.optimizer.zero_grad(set_to_none=True)
        readings = self.backward(self.output(visible, infrared), labels)
        # The values are read after the backward pass was launched, so that a GPU isn't idle in between.
        result = StepResult(*readings.values())
        if not result.finite:
            raise NotFiniteError(result)
        self.update()
        return result

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
        parts = loss_parts(self.loss(output, labels))
        with torch.no_grad():
            right = output.logits.argmax(2) == labels.repeat(output.logits.shape[1] // len(labels))
            measured = (*parts, right.float().mean(), embedding_spread(output.pooled))
            # One transfer from the device per step serves the check of the loss and the journal.
            readings = Readings(torch.stack(measured))
        self.fabric.backward(parts.total)
        return readings

    def update(self) -> None:
        """Let the optimizer change the weights, after the gradient was clipped to `clip_norm`."""
        if self.config.clip_norm is not None:
            # In 16-mixed a gradient may be infinite: the scaler then leaves the step out.
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.config.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
