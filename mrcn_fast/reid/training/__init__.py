"""Training: from batches to checkpoints.

trainer.py is the loop, step.py takes a step of it, new_run.py checks what a new run would replace, and
messages.py has what a run says about itself. speed.py chooses what --speed means on a device, and fast.py has
its fast step and the CUDA graph. config.py has all values of a run, and the schedule of the learning rate.
batches.py makes paired batches, losses.py the total loss, gathering.py the outputs of all processes for it,
optimizer.py the optimizer, and transfers.py the copies to and from a GPU. parts.py and callbacks.py serve
parts of the caller's own. checkpoint.py writes and reads checkpoint.pth, checkpoint_checks.py checks what was
read, and restoring.py gives it to a network and a run; data_identity.py and random_state.py make two of its
fields. journal.py writes metrics.jsonl, loggers.py sends it to CSV or TensorBoard, and run_folder.py locks
the folder. initial.py loads the weights that a run begins with, and validation.py scores the network within
the run. pretraining.py pretrains on synthetic people, for the demo and the study. command.py is `mrcn-fast
train`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrcn_fast.reid.training.errors import TrainingError
    from mrcn_fast.reid.training.trainer import Trainer

__all__ = ["Trainer", "TrainingError"]


def __getattr__(name: str) -> Any:
    """Import the trainer, with all that it needs, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mrcn_fast.reid.training import trainer

    return getattr(trainer, name)
