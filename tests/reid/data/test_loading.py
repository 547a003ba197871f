"""The processes that decode images end with the one that they serve, whatever parts torch's loader has."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Both ways start here: processes that live on, and nothing of torch's own that ends them at exit.
START = """
import torch
from torch.utils.data import TensorDataset, dataloader
from mrcn_fast.reid.data.loading import Batches

iterator = dataloader._MultiProcessingDataLoaderIter
getattr(dataloader, "_persistent_workers_atexit", set()).clear()
batches = Batches(TensorDataset(torch.arange(8)), len, batch_size=2, workers=2)
first = iter(batches)
print(next(first))
"""
WITHOUT_SHUTDOWN = "\ndel iterator._shutdown_workers, iterator.__del__"
WITHOUT_ITERATOR = WITHOUT_SHUTDOWN + "\nheld = vars(batches._loader).pop('_iterator')"


@pytest.mark.parametrize(
    "missing", ["", WITHOUT_SHUTDOWN, WITHOUT_ITERATOR], ids=["", "shutdown", "iterator"]
)
def test_processes_end_with_an_error_of_the_run(missing: str) -> None:
    script = START + missing + "\nraise SystemExit('ended')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    # torch may add that a process was ended by a signal.
    assert (done.returncode, done.stdout, done.stderr.splitlines()[0]) == (1, "2\n", "ended")
