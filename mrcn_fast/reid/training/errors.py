"""The error of a training that can't begin or go on."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training can't go on, for example because the loss isn't finite or the run would overwrite another."""
