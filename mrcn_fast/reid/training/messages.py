"""What a run says about itself: when it begins, when it ends, and when it can't go on."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from mrcn_fast.reid.console import notice
from mrcn_fast.reid.models.resnet import imagenet_file
from mrcn_fast.reid.training.checkpoint import CHECKPOINT_NAME
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.data_identity import DataIdentity
from mrcn_fast.reid.training.journal import StepResult

log = logging.getLogger(__name__)

# What a step needs less memory for.
LESS_MEMORY: Final = (
    "Less is needed for fewer people or images of each in a batch (--identities, --images), for smaller "
    "images (--height, --width) and for fewer --workers"
)


@dataclass(frozen=True)
class RunMessages:
    """The messages of a run.

    Args:
        config: of the run
        parts: names of the caller's own "model", "loss" and "optimizer", where they were given

    Example:
        >>> RunMessages(TrainConfig(data="", model="baseline"), {}).title
        'baseline, ResNet-50'
    """

    config: TrainConfig
    parts: Mapping[str, str]

    @property
    def name(self) -> str:
        """The name of the network."""
        return self.parts.get("model", self.config.model)

    @property
    def title(self) -> str:
        """The network, with what it is made of."""
        config = self.config
        if "model" in self.parts:
            return f"{self.name}, a network of the caller's"
        stages = "" if config.model == "baseline" else f" after stage {', '.join(map(str, config.stages))}"
        parts = f", {config.parts} parts" if config.parts > 1 else ""
        return f"{config.model}{stages}{parts}, ResNet-{config.depth}"

    def introduce(self, data: DataIdentity, *, steps: int, devices: str, how: str) -> None:
        """Log what is trained, and on what.

        Args:
            data: the data set
            steps: of the whole run
            devices: on which it trains, see `devices`
            how: a step is taken, as `make_step` says it
        """
        config = self.config
        log.info("%s, on %s in %s: %d steps on %s", self.title, devices, config.precision, steps, data)
        log.info("Speed %s: %s", config.speed, how)
        own = "model" in self.parts
        if config.initial is None and config.depth == 50 and not own:  # the paper's network
            notice(
                "Training starts from random weights",
                "The paper starts from weights pretrained on ImageNet, and its scores are out of reach "
                "without them. Stop with Ctrl-C, give the weights (--weights FILE) and begin anew "
                f"(--overwrite). The file is {imagenet_file(config.depth)}",
            )
        elif config.initial is None and not own:
            log.info("From random weights; the paper starts from ImageNet's (--weights FILE)")

    def devices(self, device: torch.device, count: int, model: nn.Module) -> str:
        """The devices of `count` processes, and over how many of them losses and BatchNorm see a batch."""
        if count == 1:
            return str(device)
        synced = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        return (
            f"{count} devices of type {device.type}, "
            f"{'one' if self.config.gather else 'each its own'} batch in the losses and "
            f"{'one' if synced else 'each its own'} in BatchNorm,"
        )

    def summary(self, step: int, means: str) -> str:
        """The run's end in one line, with the commands that go on; `means` are those of the journal."""
        out, data = self.config.out, self.config.data
        commands = (
            f"`mrcn-fast test --checkpoint {shlex.quote(out)} --data {shlex.quote(data)}` and "
            f"`mrcn-fast report --runs {shlex.quote(out)} --data {shlex.quote(data)}`"
        )
        if "model" in self.parts:
            commands = f"mrcn_fast.reid.score_checkpoint({out!r}, {data!r}, model=...)"
        return f"{self.name} is trained to step {step}: {means}. To go on: {commands}"

    def loss_not_finite(self, step: int, epoch: int, result: StepResult, files: Sequence[str]) -> str:
        """Why a step was not taken, with the files of its batch."""
        return (
            f"step {step} (epoch {epoch}): the loss isn't finite "
            f"(total {result.loss}, identity {result.identity}, triplet {result.triplet}, cqc {result.cqc}, "
            f"causality {result.causality}). "
            f"The weights were not touched. {self.last_checkpoint()} The batch's files:\n  "
            + "\n  ".join(files)
        )

    def weights_not_finite(self, step: int, names: Sequence[str]) -> str:
        """Why no checkpoint was written."""
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return (
            f"step {step}: weights that aren't finite: {', '.join(names[:4])}{more}. "
            f"Lower the learning rate. {self.last_checkpoint()}"
        )

    def last_checkpoint(self) -> str:
        """Where the last checkpoint is, and what goes on from it."""
        path = Path(self.config.out) / CHECKPOINT_NAME
        if not path.exists():
            return "No checkpoint had been written yet."
        again = (
            "fit(resume=True) of a Trainer with the same parts"
            if self.parts
            else f"`mrcn-fast train --resume {shlex.quote(str(path.parent))}`"
        )
        return f"The last complete checkpoint is {path}; {again} goes on from it."
