"""The moments of a run at which code of the caller is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mrcn_fast.reid.training.batches import Batch
    from mrcn_fast.reid.training.journal import StepResult
    from mrcn_fast.reid.training.trainer import Trainer


class Callback:
    """Methods that `Trainer(config, callbacks=[...])` calls in a run; here they do nothing.

    Lightning Fabric calls them, so that any object with some of these methods will do. They run in the
    training process, between two steps. An exception ends the run as one of the training does. A checkpoint
    doesn't hold what a callback keeps.

    Example:
        >>> class Progress(Callback):
        ...     def on_step_end(self, trainer, batch, result):
        ...         if trainer.step_count % 100 == 0:
        ...             print(trainer.step_count, result.loss)
        >>> callbacks = [Progress()]
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        """Called before the first step, and after the checkpoint was read where a run goes on."""

    def on_step_end(self, trainer: Trainer, batch: Batch, result: StepResult) -> None:
        """Called after each optimization step."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Called after a checkpoint was written."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Called after the last step, unless the run was interrupted."""
