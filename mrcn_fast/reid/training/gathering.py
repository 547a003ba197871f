"""The network's outputs of all processes as one, for losses that compare the images of a batch."""

from __future__ import annotations

from typing import cast

from lightning_fabric import Fabric
from torch import Tensor

from mrcn_fast import SNRFeatures
from mrcn_fast.reid.models.network import TrainingOutput


def gather_outputs(fabric: Fabric, output: TrainingOutput, labels: Tensor) -> tuple[TrainingOutput, Tensor]:
    """Join the outputs of all processes, as if one process had run the network on all their batches.

    The gradient of a loss of the joined output is exact. Each process has the same loss L of the features
    f_1, ..., f_W of all W processes, and the backward pass gives process r the sum of its dL/df_r over the
    processes, W dL/df_r. DistributedDataParallel takes the mean of the parameters' gradients over the
    processes, which is then sum_r dL/df_r df_r/dw, the gradient of L.

    Args:
        fabric: has connected the processes
        output: of the network for the B pairs of this process
        labels: (B,), the class of each pair, on the device

    Returns:
        the output for the W B pairs of W processes, process after process within each set, and the labels
        (W B,)
    """
    sets = output.pooled.shape[1] // len(labels)
    styles = tuple(
        SNRFeatures(*(_gathered(fabric, features[None], 2)[0] for features in style))
        for style in output.styles
    )
    joined = TrainingOutput(
        _gathered(fabric, output.pooled, sets), _gathered(fabric, output.logits, sets), styles
    )
    return joined, cast(Tensor, fabric.all_gather(labels)).flatten()


def _gathered(fabric: Fabric, features: Tensor, sets: int) -> Tensor:
    """Gather (parts, sets * B, D) to (parts, sets * W * B, D)."""
    everywhere = cast(Tensor, fabric.all_gather(features, sync_grads=True))
    return everywhere.unflatten(2, (sets, -1)).permute(1, 2, 0, 3, 4).flatten(1, 3)
