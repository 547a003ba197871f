"""Runs that are stopped or killed, and folders that another process holds."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mrcn_fast.reid.stopping import StopRequests
from mrcn_fast.reid.training.checkpoint import CHECKPOINT_NAME, load_checkpoint
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.journal import read_lines
from mrcn_fast.reid.training.restoring import build_model
from mrcn_fast.reid.training.run_folder import FolderInUseError, held
from mrcn_fast.reid.training.trainer import Trainer, TrainingError
from tests.reid.conftest import quiet, train

PROGRAM = """
import sys, json
from mrcn_fast.cli import main
sys.exit(main(json.loads(sys.argv[1])))
"""


def started(config: TrainConfig, *more: str) -> subprocess.Popen[str]:
    """Start `mrcn-fast train` with these values in a process of its own."""
    flags = [f"--{name}={value}" for name, value in config.as_dict().items() if value is not None]
    return launched(["train", *flags, *more])


def launched(words: list[str]) -> subprocess.Popen[str]:
    """Start `mrcn-fast words...` in a process of its own, which leads a group of processes."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(words)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "500"},
        # A shell's background jobs, and what they start, ignore it: this one shall hear it all the same.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(process: subprocess.Popen[str], config: TrainConfig, steps: int) -> None:
    """Wait until the run has taken this many steps."""
    metrics = Path(config.out) / "metrics.jsonl"
    until = time.monotonic() + 300  # never reached but where training does not start
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None and time.monotonic() < until, "training did not get going"
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> str:
    """Wait until the run has ended; returns what it wrote to stderr."""
    try:
        return process.communicate(timeout=300)[1]
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("number", "status", "workers"),
    [(signal.SIGINT, 130, 0), (signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 0), (signal.SIGTERM, 143, 1)],
)
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(
    tiny_config: TrainConfig, number: signal.Signals, status: int, workers: int
) -> None:
    # A terminal and a scheduler send the signal to all processes of the job, also to those that decode.
    config = dataclasses.replace(
        tiny_config, epochs=100000, workers=workers, checkpoint_every=10**6, batches=9
    )
    process = started(config)
    try:
        wait_for(process, config, 4)
        os.killpg(process.pid, number)
    finally:
        errors = ended(process)
    path = Path(config.out) / CHECKPOINT_NAME
    assert process.returncode == status and "Traceback" not in errors, errors
    checkpoint = load_checkpoint(path)
    assert f"Stopped after step {checkpoint.step}. The last complete checkpoint is {path}" in errors
    assert f"`mrcn-fast train --resume {config.out}` goes on from it" in errors
    assert [line["step"] for line in read_lines(path.with_name("metrics.jsonl"))][-1] == checkpoint.step
    build_model(path, checkpoint)
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == [".lock"]


def test_a_run_that_was_stopped_ends_bitwise_as_one_that_was_not(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, epochs=100000, batches=5)
    stopped = started(config)
    try:
        wait_for(stopped, config, 3)
        stopped.send_signal(signal.SIGTERM)
    finally:
        errors = ended(stopped)
    steps = load_checkpoint(config.out).step + 3
    (command,) = re.findall(r"`mrcn-fast (train --resume .*)` goes on", errors)
    ended(launched([*shlex.split(command), "--steps", str(steps)]))
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), steps=steps)
    ended(started(whole))
    expected, found = load_checkpoint(whole.out), load_checkpoint(config.out)
    assert found.step == expected.step == steps
    assert all(torch.equal(tensor, expected.model[name]) for name, tensor in found.model.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_requests_leave_signals_that_the_caller_handles(number: signal.Signals) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda received, _: seen.append(received))
    try:
        with StopRequests() as requests:
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert requests.received is None and seen == [number]


def test_requests_leave_a_handler_that_was_set_after_them() -> None:
    try:
        with StopRequests() as requests:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert requests.received is None and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def usual_interrupt() -> Iterator[None]:
    """Ctrl-C as Python handles it, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_interrupt")
def test_the_second_signal_has_its_usual_effect() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequests() as requests:
        signal.raise_signal(signal.SIGINT)
        assert requests.received is signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("when", "steps"), [("on_fit_start", 0), ("on_fit_end", 2)])
def test_a_signal_before_and_after_the_steps_is_granted(
    tiny_config: TrainConfig, when: str, steps: int
) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    callback = SimpleNamespace(**{when: lambda trainer: signal.raise_signal(signal.SIGTERM)})
    config = dataclasses.replace(tiny_config, steps=2)
    trainer = Trainer(config, callbacks=[callback])
    try:
        with pytest.raises(SystemExit) as stop:
            trainer.fit(progress=quiet())
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143 and trainer.step_count == steps
    # The folder is free again, and the run goes on.
    train(config, resume=True)
    assert load_checkpoint(tiny_config.out).step == 2


@pytest.mark.slow
def test_a_killed_run_ends_bitwise_as_one_that_was_not(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, epochs=4, batches=5, checkpoint_every=1)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    first = started(whole)
    killed = started(config)
    try:
        for steps in (3, 12):
            wait_for(killed, config, steps)
            killed.kill()
            killed.communicate()
            assert killed.returncode == -signal.SIGKILL
            killed = started(config, "--resume")
        _, errors = killed.communicate(timeout=300)
        assert killed.returncode == 0, errors
        _, errors = first.communicate(timeout=300)
        assert first.returncode == 0, errors
    finally:
        first.kill()
        killed.kill()
    expected, found = load_checkpoint(whole.out), load_checkpoint(config.out)
    assert found.step == expected.step == 20
    assert all(torch.equal(tensor, expected.model[name]) for name, tensor in found.model.items())
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    tiny_config: TrainConfig, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(tiny_config.out).mkdir()
    (Path(tiny_config.out) / "metrics.jsonl").write_text('{"step": 1}\n')
    with caplog.at_level(logging.WARNING, logger="mrcn_fast"):
        train(tiny_config, resume=True)
    assert "no checkpoint yet: the run begins with its first step" in caplog.text
    expected, found = load_checkpoint(finished).model, load_checkpoint(tiny_config.out).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_folder_that_another_process_holds_is_refused(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, steps=1)
    path = train(config).checkpoint_path
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    with held(path.parent, "trains"):
        for arguments in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(FolderInUseError, match=r"another process trains in this folder") as error:
                train(dataclasses.replace(config, steps=2), **arguments)
            assert str(path.parent) in str(error.value)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
    train(dataclasses.replace(config, steps=2), resume=True)


def test_the_folder_of_a_killed_run_can_be_used_again(tiny_config: TrainConfig) -> None:
    # Its processes that decode images live a little longer: they don't hold the folder.
    config = dataclasses.replace(tiny_config, epochs=100000, workers=1)
    process = started(config)
    try:
        wait_for(process, config, 1)
        second = started(config, "--resume")
        _, errors = second.communicate(timeout=300)
        assert second.returncode == 2
        assert f"{config.out}: another process trains in this folder" in errors and "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()
    with held(Path(config.out), "trains"):
        pass


@pytest.mark.parametrize("arguments", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_leftovers_of_a_killed_run_are_removed(tiny_config: TrainConfig, arguments: dict[str, bool]) -> None:
    config = dataclasses.replace(tiny_config, steps=1)
    folder = train(config).out
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = (CHECKPOINT_NAME, "metrics.jsonl", "test-all-search.json")
    left = [folder / f".{name}.{gone.pid}.tmp" for name in names]
    others = [folder / f".notes.{gone.pid}.tmp", folder / f".{CHECKPOINT_NAME}.{os.getppid()}.tmp"]
    for path in (*left, *others):
        path.write_bytes(b"half")
    train(dataclasses.replace(config, steps=2), **arguments)
    assert [path.exists() for path in (*left, *others)] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "metrics.jsonl.damaged", "best.pth", "test-all-search.json"]
)
def test_files_of_a_run_without_checkpoint_are_not_replaced(tiny_config: TrainConfig, name: str) -> None:
    config = dataclasses.replace(tiny_config, steps=1)
    there = Path(config.out) / name
    there.parent.mkdir()
    there.write_text("of an earlier run")
    with pytest.raises(TrainingError, match=rf"{there}: a run is already there"):
        train(config)
    assert there.read_text() == "of an earlier run"
    train(config, overwrite=True)
    assert sorted(path.name for path in there.parent.iterdir()) == [".lock", CHECKPOINT_NAME, "metrics.jsonl"]
