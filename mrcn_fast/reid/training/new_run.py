"""The checks before a run begins: what it would replace, and whether its files can be read and written."""

from __future__ import annotations

from pathlib import Path

from mrcn_fast.outputs import check_folder
from mrcn_fast.reid.training.checkpoint import CHECKPOINT_NAME
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.errors import TrainingError
from mrcn_fast.reid.training.initial import check_initial
from mrcn_fast.reid.training.loggers import check_logger
from mrcn_fast.reid.training.optimizer import check_optimizer
from mrcn_fast.reid.training.run_folder import held, run_files, step_files


def check_new_run(config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse a run that would overwrite another or can't be written, before anything is computed.

    Raises:
        TrainingError: for a run that would overwrite another
        FolderInUseError: where another process trains into the folder
        OSError: where the folder or the cache can't be written to
        WeightsError: for initial weights that can't be read
        ConfigError: for a logger whose package is not installed, and for a named optimizer that isn't there
    """
    if resume and overwrite:
        raise TrainingError("got both --resume and --overwrite, expected one of them: go on, or begin anew")
    out = Path(config.out)
    check_folder(out, "the run")
    if out.is_dir():
        with held(out, "trains"):
            replaced_files(out, resume=resume, overwrite=overwrite)
    if config.cache is not None:
        check_folder(config.cache, "the cache")
    check_initial(config)
    check_logger(config.logger)
    check_optimizer(config)


def replaced_files(out: Path, *, resume: bool, overwrite: bool) -> list[Path]:
    """List the files of an earlier run that a run into `out` replaces; none if it resumes from a checkpoint.

    Raises TrainingError for such files without `overwrite`.
    """
    there = run_files(out)
    if resume and out / CHECKPOINT_NAME in there:
        return []
    # A run without a checkpoint takes the steps again that it has measured.
    lost = [path for path in there if not resume or path not in step_files(out)]
    if lost and not overwrite:
        raise TrainingError(
            f"{lost[0]}: a run is already there. Go on with it (--resume), replace it (--overwrite), or "
            "give another folder (--out)."
        )
    return there
