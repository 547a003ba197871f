"""Training and scoring in several processes: what they compute, what they write, and how they end."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from mrcn_fast.reid.data import open_dataset
from mrcn_fast.reid.devices import open_devices
from mrcn_fast.reid.evaluation.extraction import extract
from mrcn_fast.reid.evaluation.scoring import score_checkpoint
from mrcn_fast.reid.models.interface import ReIDNetwork
from mrcn_fast.reid.models.network import ReIDModel, TrainingOutput
from mrcn_fast.reid.processes import Processes
from mrcn_fast.reid.training.batches import Batch, TrainingBatches
from mrcn_fast.reid.training.checkpoint import CheckpointError, content_digest, load_checkpoint
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.journal import read_lines
from mrcn_fast.reid.training.losses import ReIDLoss
from mrcn_fast.reid.training.messages import RunMessages
from mrcn_fast.reid.training.trainer import Trainer
from tests.reid.conftest import quiet
from tests.reid.training.test_interruption import ended, started, wait_for
from tests.support.ranks import Outcome, in_processes

# Without augmentation a batch gives the same images in every process.
PLAIN: dict[str, Any] = {"padding": 0, "flip": 0.0, "erase": 0.0}


def values_of(outcomes: list[Outcome]) -> list[Any]:
    """The values that the processes returned; none has failed."""
    assert [outcome.status for outcome in outcomes] == [0] * len(outcomes), outcomes
    return [outcome.value for outcome in outcomes]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def gradients(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
    """The gradients of a batch's parts, with the statistics of all BatchNorms as they are."""
    step = trainer._step
    step.frozen = [
        module for module in trainer.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    step.optimizer.zero_grad(set_to_none=True)
    parts = batch.parts(trainer.config.accumulate)
    for part in parts:
        with step.fabric.no_backward_sync(step.model, enabled=part is not parts[-1]):
            visible, infrared, labels = step._inputs(part)
            step.backward(step.output(visible, infrared), labels)
    learned = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {name: cast(Tensor, p.grad).clone() for name, p in learned.items()}


def joined(batches: Iterable[Batch]) -> Batch:
    return Batch(*map(torch.cat, zip(*batches, strict=True)))


# What the processes compute.


def trained(rank: int, config: TrainConfig) -> dict[str, Any]:
    """The weights after each of three steps and the gradients of a batch, with and without --gather."""
    found: dict[str, Any] = {}
    trainer = Trainer(dataclasses.replace(config, **PLAIN))
    batches = list(trainer.batches.of(epoch=0))
    found["visible"] = [batch.visible_index for batch in batches]
    found["gradients"] = gradients(trainer, batches[0])
    found["gathered"] = gradients(Trainer(dataclasses.replace(config, **PLAIN, gather=True)), batches[0])
    trainer = Trainer(config)
    found["steps"] = [(trainer.step(batch), weights(trainer)) for batch in batches]
    found["random"] = torch.get_rng_state()
    return found


@pytest.fixture(scope="module")
def pair(tiny_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `trained` finds in two processes."""
    config = dataclasses.replace(tiny_run, out=str(tmp_path_factory.mktemp("pair")))
    return values_of(in_processes(2, trained, config))


def test_the_weights_are_equal_after_every_step(pair: list[dict[str, Any]]) -> None:
    first, second = (found["steps"] for found in pair)
    assert len(first) == 3
    for (result, own), (other_result, others) in zip(first, second, strict=True):
        assert result == other_result
        assert all(torch.equal(tensor, others[name]) for name, tensor in own.items())
    assert not torch.equal(
        first[0][1]["trunk.layer4.0.conv1.weight"], first[1][1]["trunk.layer4.0.conv1.weight"]
    )
    # Their augmentations differ.
    assert not torch.equal(pair[0]["random"], pair[1]["random"])


def test_the_processes_draw_the_batches_of_one_sequence(
    pair: list[dict[str, Any]], tiny_run: TrainConfig
) -> None:
    training = open_dataset(tiny_run.dataset, tiny_run.data).training()
    alone = dataclasses.replace(tiny_run, batches=6)
    expected = [batch.visible_index for batch in TrainingBatches(training, alone, name="tree").of(epoch=0)]
    found = [index for both in zip(*(found["visible"] for found in pair), strict=True) for index in both]
    assert len(found) == 6 and all(map(torch.equal, found, expected))


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6 * largest, msg=name)


def test_the_gradients_are_those_of_one_process_on_both_batches(
    pair: list[dict[str, Any]], tiny_config: TrainConfig
) -> None:
    trainer = Trainer(dataclasses.replace(tiny_config, **PLAIN, accumulate=2))
    both = next(trainer.batches.of(epoch=0))
    expected = gradients(trainer, both)
    for found in pair:
        close(found["gradients"], expected)


def test_gathered_gradients_are_those_of_one_batch_of_all_images(
    pair: list[dict[str, Any]], tiny_config: TrainConfig
) -> None:
    config: TrainConfig = dataclasses.replace(tiny_config, **PLAIN)
    trainer = Trainer(config)
    twice = dataclasses.replace(config, accumulate=2)
    both = next(TrainingBatches(trainer.training, twice, name="tree").of(epoch=0))
    expected = gradients(trainer, both)
    for found in pair:
        close(found["gathered"], expected)
    # The losses of each process's own batch give others.
    with pytest.raises(AssertionError):
        close(pair[0]["gradients"], expected)


def test_accumulated_gradients_are_the_means_of_the_batches(tiny_config: TrainConfig) -> None:
    alone = Trainer(dataclasses.replace(tiny_config, **PLAIN))
    both = Trainer(dataclasses.replace(tiny_config, **PLAIN, accumulate=2, batches=2))
    batch = next(both.batches.of(epoch=0, first=1))
    found = gradients(both, batch)
    each = [gradients(alone, part) for part in batch.parts(2)]
    close(found, {name: (each[0][name] + each[1][name]) / 2 for name in found})
    # Batches 2 and 3 of the sequence.
    alone_config = dataclasses.replace(tiny_config, batches=4)
    batches = TrainingBatches(alone.training, alone_config, name="tree")
    expected = joined(batches.of(epoch=0, first=2))
    assert torch.equal(batch.visible_index, expected.visible_index)


def scored(rank: int, checkpoint: Path, data: Path, options: dict[str, Any]) -> dict[str, Any]:
    return score_checkpoint(checkpoint, data, progress=Progress(disable=True), accelerator="cpu", **options)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_scores_and_result_are_those_of_one_process(
    count: int, finished: Path, tiny_tree: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"trials": 4, "batch_size": 5}
    results = []
    for number, folder in enumerate((tmp_path / "one", tmp_path / "several")):
        folder.mkdir()
        path = folder / "checkpoint.pth"
        path.write_bytes(finished.read_bytes())
        if number:
            results += values_of(in_processes(count, scored, path, tiny_tree, options))
        else:
            results.append(scored(0, path, tiny_tree, options))
        assert len(list(folder.glob("test-*.json"))) == 1
    for result in results:
        del result["path"], result["checkpoint"]
    assert all(result == results[0] for result in results[1:])


def extracted(rank: int, tree: Path, images: int) -> Any:
    fabric = open_devices("cpu", "32-true", None, None)
    samples = open_dataset("sysu-mm01", tree).training().visible[:images]
    torch.manual_seed(0)
    model = cast(ReIDNetwork, ReIDModel(classes=3, depth=18))
    config = TrainConfig(data=str(tree), height=32, width=16)
    done: list[int] = []
    features = extract(model, samples, "visible", config, fabric=fabric, batch_size=2, advance=done.append)
    processes = Processes(fabric)
    return features, sum(done), processes.means([rank, 1.0]), processes.from_first(os.getpid), os.getpid()


def test_more_processes_than_batches(tiny_tree: Path) -> None:
    found = values_of(in_processes(3, extracted, tiny_tree, 3))
    alone = extracted(0, tiny_tree, 3)
    pids = {value[4] for value in found}
    for features, done, means, first, _ in found:
        assert torch.equal(features, alone[0]) and done == 3 and means == [1.0, 1.0]
        assert first == found[0][4]
    assert len(pids) == 3


# What they write.


def written(rank: int, config: TrainConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train to the end; the files in the run's folder that this process opened for writing or removed."""
    touched: set[str] = set()

    def note(event: str, values: Any) -> None:
        names = {"open": values[:1], "os.rename": values[:2], "os.remove": values[:1]}.get(event, ())
        reads = event == "open" and not (values[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        for name in names:
            if not reads and isinstance(name, (str, os.PathLike)) and str(name).startswith(config.out):
                touched.add(Path(name).name)

    sys.addaudithook(note)
    trainer = Trainer(config)
    trainer.fit(progress=quiet(), **arguments)
    model = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return {"touched": touched, "model": model, "lines": trainer.journal.lines, "step": trainer.step_count}


def test_one_process_writes_and_another_number_is_refused(tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, validate_every=1, epochs=1)
    first, second = values_of(in_processes(2, written, config, {}))
    assert {"best.pth", "checkpoint.pth", "metrics.jsonl"} <= first["touched"] and not second["touched"]
    of_file = read_lines(Path(config.out, "metrics.jsonl"))
    assert len(of_file) == 3 and untimed(of_file) == untimed(first["lines"]) == untimed(second["lines"])
    with pytest.raises(CheckpointError, match=r"expected 2 \(checkpoint\), found 1 \(given\). Give 2"):
        Trainer(dataclasses.replace(config, epochs=3)).fit(progress=quiet(), resume=True)


def untimed(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Lines of a journal without what each process measures by its own clock."""
    return [{name: line[name] for name in line.keys() - {"step_seconds", "wait_seconds"}} for line in lines]


@pytest.mark.slow
def test_a_resumed_run_ends_at_the_same_weights(tiny_config: TrainConfig, tmp_path: Path) -> None:
    values_of(in_processes(2, written, dataclasses.replace(tiny_config, epochs=1), {}))
    resumed, _ = values_of(in_processes(2, written, tiny_config, {"resume": True}))
    whole = dataclasses.replace(tiny_config, out=str(tmp_path / "whole"))
    expected, _ = values_of(in_processes(2, written, whole, {}))
    assert resumed["step"] == expected["step"] == 6
    assert all(torch.equal(tensor, expected["model"][name]) for name, tensor in resumed["model"].items())
    found = load_checkpoint(tiny_config.out)
    assert content_digest(found.random) == content_digest(load_checkpoint(whole.out).random)
    assert untimed(resumed["lines"]) == untimed(expected["lines"])


# How they end.


class NotFinite:
    """A loss that isn't finite in process 1 from the second step on."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls, self.loss = rank, 0, ReIDLoss()

    def __call__(self, output: TrainingOutput, labels: Tensor) -> Tensor:
        self.calls += 1
        factor = float("nan") if self.rank == 1 and self.calls > 1 else 1.0
        return self.loss(output, labels).total * factor


LOST = "process 0 of 2: another process has ended or can't be reached"


def not_finite(rank: int, config: TrainConfig) -> None:
    """The process whose loss isn't finite reports it late, so that a report of the other would come first."""
    message = RunMessages.loss_not_finite

    def late(*arguments: Any) -> str:
        time.sleep(rank)
        return message(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunMessages, "loss_not_finite", late)
        Trainer(config, loss=NotFinite(rank)).fit(progress=quiet())


def killed(rank: int, config: TrainConfig) -> None:
    trainer = Trainer(config)
    if rank == 1:
        launch = trainer._step.launch

        def killing(batch: Batch) -> Any:
            if trainer.step_count == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return launch(batch)

        trainer._step.launch = killing  # type: ignore[method-assign]
    trainer.fit(progress=quiet())


def killed_and_ended(rank: int, config: TrainConfig) -> None:
    """The launcher ends the process that is left while that leaves its run."""
    close = TrainingBatches.close

    def closing(batches: TrainingBatches) -> None:
        signal.raise_signal(signal.SIGTERM)
        close(batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingBatches, "close", closing)
        killed(rank, config)


def unreadable(rank: int, config: TrainConfig) -> None:
    Trainer(dataclasses.replace(config, data=f"{config.data}-absent")).fit(progress=quiet())


@pytest.mark.parametrize(
    ("work", "reporter", "statuses", "message"),
    [
        (not_finite, 1, {1}, "step 2 (epoch 1): the loss isn't finite (total nan"),
        (killed, 0, {1, -signal.SIGKILL}, LOST),
        (killed_and_ended, 0, {1, -signal.SIGKILL}, LOST),
        (unreadable, None, {1}, "-absent: "),
    ],
)
def test_a_failure_in_one_process_ends_all_with_one_message(
    work: Callable[..., None],
    reporter: int | None,
    statuses: set[int],
    message: str,
    tiny_config: TrainConfig,
) -> None:
    started = time.monotonic()
    outcomes = in_processes(2, work, tiny_config, launcher="srun")
    assert time.monotonic() - started < 150  # mostly for the start of the processes
    assert {outcome.status for outcome in outcomes} == statuses, outcomes
    reports = [outcome.error for outcome in outcomes if outcome.error]
    assert len(reports) == 1 and message in reports[0], outcomes
    if reporter is not None:
        assert reports[0] == outcomes[reporter].error
    if message == LOST:
        path = Path(tiny_config.out, "checkpoint.pth")
        assert f"The last complete checkpoint is {path}" in reports[0]
        assert load_checkpoint(path).step == 3


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes that a command started in /proc")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, 128 + signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_the_commands_processes_end_together(
    number: signal.Signals, status: int, tiny_config: TrainConfig
) -> None:
    config = dataclasses.replace(tiny_config, devices=2, epochs=100000, checkpoint_every=1)
    command = started(config)
    try:
        wait_for(command, config, 2)
        ranks = children(command.pid)
        os.kill(ranks[1] if number == signal.SIGKILL else command.pid, number)
        at = time.monotonic()
    finally:
        errors = ended(command)
    assert time.monotonic() - at < 60
    assert command.returncode == status and "Traceback" not in errors, errors
    assert len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    path = Path(config.out, "checkpoint.pth")
    assert errors.count(f"The last complete checkpoint is {path}") == 1
    killed = f"Process 1 of 2 (pid {ranks[1]}) was ended by SIGKILL"
    assert (killed in errors) == (number == signal.SIGKILL), errors
    checkpoint = load_checkpoint(path)
    assert checkpoint.step >= 1 and len(checkpoint.random) == 2


class Unused(ReIDModel):
    """A network with a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__(classes=4, depth=18)
        self.spare = nn.Parameter(torch.ones(2))


def unused(rank: int, config: TrainConfig) -> None:
    Trainer(config, model=Unused()).fit(progress=quiet())


def test_a_parameter_without_gradient_is_named(tiny_config: TrainConfig) -> None:
    outcomes = in_processes(2, unused, tiny_config)
    reports = [outcome.error for outcome in outcomes if outcome.error]
    assert len(reports) == 1 and "loss doesn't depend on spare," in reports[0]


# What is refused.


def test_other_numbers_than_the_launchers_are_refused(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    started = "but torchrun started 2 processes on each of 2 machines"
    with pytest.raises(ConfigError, match=f"got devices=4, {started}"):
        Trainer(dataclasses.replace(tiny_config, devices=4))
    with pytest.raises(ConfigError, match=f"got nodes=1, {started}"):
        Trainer(dataclasses.replace(tiny_config, nodes=1))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="got 4 processes on 3 machines from torchrun"):
        Trainer(tiny_config)


@pytest.mark.parametrize(
    ("given", "missing", "advice"),
    [
        ({}, "SLURM_STEP_NUM_TASKS", "start the command by srun"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_NTASKS_PER_NODE", "give srun --ntasks-per-node"),
    ],
)
def test_tasks_of_slurm_that_srun_did_not_start_are_refused(
    given: dict[str, str],
    missing: str,
    advice: str,
    tiny_config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"got SLURM_NTASKS=4, but no {missing} .*{advice}"):
        Trainer(tiny_config)


def test_several_machines_need_a_meeting_point(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match=r"got nodes=2, but no MASTER_PORT, NODE_RANK in the environment"):
        Trainer(dataclasses.replace(tiny_config, nodes=2))


def test_an_interactive_session_starts_no_processes(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ConfigError, match="in an interactive session"):
        Trainer(dataclasses.replace(tiny_config, devices=2))
