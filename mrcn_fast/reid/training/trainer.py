"""Training: paired batches, SGD with the paper's schedule, and checkpoints; errors stop a run at once."""

from __future__ import annotations

import logging
import random
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Generic, NamedTuple, cast

import numpy as np
import torch
from rich.progress import Progress, TaskID
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import TypeVar

from mrcn_fast.memory import MemoryShortageError, enough_memory
from mrcn_fast.reid.console import log_to_file, progress_bars
from mrcn_fast.reid.data import Modality, open_dataset
from mrcn_fast.reid.devices import open_devices, serving_backend
from mrcn_fast.reid.models.network import ReIDModel, use_layout
from mrcn_fast.reid.processes import Processes, other_failed
from mrcn_fast.reid.stopping import StopRequests
from mrcn_fast.reid.training.batches import Batch, TrainingBatches
from mrcn_fast.reid.training.checkpoint import (
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    weights_fingerprint,
)
from mrcn_fast.reid.training.checkpoint_checks import all_finite
from mrcn_fast.reid.training.config import TrainConfig, learning_rate
from mrcn_fast.reid.training.data_identity import data_identity
from mrcn_fast.reid.training.errors import TrainingError
from mrcn_fast.reid.training.initial import begin
from mrcn_fast.reid.training.journal import (
    METRICS_NAME,
    CollapseWatch,
    Journal,
    StepResult,
)
from mrcn_fast.reid.training.loggers import RunLog
from mrcn_fast.reid.training.losses import ReIDLoss
from mrcn_fast.reid.training.messages import LESS_MEMORY, RunMessages
from mrcn_fast.reid.training.new_run import check_new_run, replaced_files
from mrcn_fast.reid.training.optimizer import freeze, make_optimizer
from mrcn_fast.reid.training.parts import (
    Loss,
    MakeOptimizer,
    check_loss,
    check_model,
    check_parts,
    named_parts,
    own_optimizer,
)
from mrcn_fast.reid.training.random_state import random_state, restore_random_state
from mrcn_fast.reid.training.restoring import (
    check_config,
    check_data,
    check_processes,
    load_optimizer,
    load_weights,
)
from mrcn_fast.reid.training.run_folder import LOG_NAME, held
from mrcn_fast.reid.training.speed import compile_trunk, make_step, resolved
from mrcn_fast.reid.training.step import NotFiniteError, TrainingStep, augmentations
from mrcn_fast.reid.training.validation import Validation

__all__ = ["Trainer", "TrainingError"]

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module, default=ReIDModel)


class _Launched(NamedTuple):
    """A step whose measurements have not been read."""

    number: int
    batch: Batch
    end: Callable[[], StepResult]
    wait_seconds: float


def _seed_process(seed: int, rank: int) -> None:
    """Seed a process's augmentation. The first process goes on with the stream that made the weights."""
    if rank > 0:
        (own,) = np.random.SeedSequence((seed, rank)).generate_state(1, np.uint64).tolist()
        torch.manual_seed(own)
        random.seed(own)


class Trainer(Generic[Model]):
    """A training run, built from a TrainConfig. `fit()` trains to the end, `step()` takes one step.

    A checkpoint of a run with parts of your own holds the network's and the optimizer's state, and the names
    of the classes or functions of model, loss and optimizer. Code isn't in it: to go on, give the same parts
    to a new Trainer, and to score, the network to `score_checkpoint`. Other parts are refused.

    With several `devices` or `nodes`, and where torchrun or srun started several processes, each device has a
    process with a trainer of its own. Where no launcher started them, the first trainer starts the program
    again for each device, waits for these processes and ends this one with their exit status. Each process
    draws other batches, their gradients are averaged, and the first one writes. An exception in one process
    ends all of them.

    Args:
        config: of the run. With a network of your own its fields of the architecture have no effect, with a
            loss of your own those of the loss, and with an optimizer of your own `optimizer`, `momentum`,
            `weight_decay`, `selective_decay` and `trunk_lr`.
        model: a network of your own with the methods of `ReIDNetwork`. You seed its weights.
        loss: a function of the network's TrainingOutput and the labels (B,) that gives LossParts or a scalar
        optimizer: a function of the network that makes its optimizer. The learning rates that it sets are
            those at `config.lr`, and follow the schedule in proportion.
        callbacks: objects with some of the methods of `Callback`

    Raises:
        DatasetError, WeightsError: for bad files
        ValueError: for values that don't fit, such as fewer identities than P, an accelerator that this
            machine doesn't have, or other numbers of devices and nodes than the launcher's
        TypeError: for parts that are no network, loss or optimizer
        BackendError: for a backend that can't serve

    Example:
        >>> config = TrainConfig(data="data/regdb", dataset="regdb", stages=(1,), out="runs/trainer",
        ...     depth=18, height=64, width=32, identities=2, images=2, steps=2, workers=0)
        >>> Trainer(config).fit().name
        'checkpoint.pth'
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: Model | None = None,
        loss: Loss | None = None,
        optimizer: MakeOptimizer | None = None,
        callbacks: Sequence[object] = (),
    ) -> None:
        self.config = config = resolved(config)
        self.out = Path(config.out)
        self.checkpoint_path = self.out / CHECKPOINT_NAME
        # A device, a backend or a part that can't serve is refused before the data set is read.
        self.fabric = open_devices(
            config.accelerator, config.precision, config.devices, config.nodes, callbacks
        )
        self.processes = Processes(self.fabric)
        with self.processes.together():
            self._make(model, loss, optimizer, callbacks)

    def _make(
        self,
        model: Model | None,
        loss: Loss | None,
        optimizer: MakeOptimizer | None,
        callbacks: Sequence[object],
    ) -> None:
        """Read the data set, and make the network and all that trains it."""
        config = self.config
        serving = ""
        if model is None:
            serving = serving_backend(config, config.backend, self.fabric, config.precision)
        else:
            check_model(model, config)
        if loss is not None:
            check_loss(loss)
        dataset = open_dataset(
            config.dataset, config.data, split=config.split, hold_out_val=config.validate_on == "val"
        )
        self.training = dataset.training()
        self.data = data_identity(dataset, self.training)

        frozen = self._make_network(model)
        self.optimizer: torch.optim.Optimizer = (
            make_optimizer(self.model, config)
            if optimizer is None
            else own_optimizer(optimizer, self.model, config)
        )
        made = None if optimizer is None else self.optimizer
        self.parts = named_parts(model=model, loss=loss, optimizer=made)
        self.messages = RunMessages(config, self.parts)
        self.loss: Loss = ReIDLoss(**config.loss_arguments()) if loss is None else loss
        self.augment = augmentations(config)
        self._step, self._how = self._make_step(frozen, callbacks)
        self.batches = TrainingBatches(
            self.training,
            config,
            name=f"{dataset.name}-split{dataset.split}",
            pin_memory=self.fabric.device.type == "cuda",
            processes=self.processes.count,
            process=self.processes.rank,
        )
        self._validation = (
            None if config.validate_every is None else Validation(config, dataset, self.fabric, serving)
        )
        self.journal = Journal(self.out / METRICS_NAME, writes=self.processes.first)
        self._watch = CollapseWatch()
        self._requests = StopRequests()
        self._stop: signal.Signals | None = None
        # The number of steps taken, and the epoch and number of the next batch.
        self.step_count = self.epoch = self.batch = 0
        self._stepped = False  # by `step`, whose steps belong to no run
        self._launched: deque[_Launched] = deque()

    def _make_network(self, model: Model | None) -> list[nn.Module]:
        """Make the network, or take the caller's; returns the modules that stay in eval mode."""
        config = self.config
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        if model is None:
            built = ReIDModel(len(self.training.identities), **config.model_arguments())
            begin(built, config)
            model = cast(Model, built)
        self.model = model
        if self.processes.count > 1 and config.sync_batchnorm and self.fabric.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        _seed_process(config.seed, self.processes.rank)
        self.weights = weights_fingerprint(config.initial)
        frozen = freeze(cast(ReIDModel, self.model), config.freeze)
        self.layout = use_layout(self.model, config.channels_last)
        if config.compile:
            compile_trunk(cast(ReIDModel, self.model))
        return frozen

    def _make_step(
        self, frozen: Sequence[nn.Module], callbacks: Sequence[object]
    ) -> tuple[TrainingStep, str]:
        """Move the network to the device; returns what takes the steps, and how it does so, in words."""
        # The wrapped pair has the device and the precision; checkpoints take the names from the plain pair.
        wrapped, wrapped_optimizer = self.fabric.setup(self.model, self.optimizer)
        # The optimizer changes these parameters in place, and an average of them follows.
        ema = self.config.ema
        self._average = (
            None
            if ema is None
            else AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
        )
        return make_step(
            self.parts,
            callbacks,
            config=self.config,
            fabric=self.fabric,
            model=wrapped,
            optimizer=wrapped_optimizer,
            loss=self.loss,
            augment=self.augment,
            frozen=frozen,
            layout=self.layout,
            agree=self._agreed,
            average=self._average,
        )

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run."""
        total = self.config.epochs * len(self.batches)
        return total if self.config.steps is None else min(total, self.config.steps)

    def step(self, batch: Batch) -> StepResult:
        """Take one optimization step on a batch of uint8 images; returns the means over the processes.

        The step belongs to no run: it isn't counted, and `fit` then begins no run with this Trainer. Raises
        TrainingError where the loss isn't finite, before the weights change.
        """
        self._stepped = True
        try:
            return self._step.take(batch)
        except NotFiniteError as error:
            raise self._not_finite(batch, error.result) from None

    def prepared(self, images: Tensor, modality: Modality) -> Tensor:
        """Move a batch of uint8 images to the device, augment it, and put it into the run's memory layout."""
        return self._step.prepared(images, modality)

    def fit(self, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None) -> Path:
        """Train to the last step, and write checkpoints and metrics on the way.

        Args:
            resume: go on from the checkpoint in `out`. On the CPU the weights end bitwise as if the run had
                never stopped. A run that was stopped before its first checkpoint begins again.
            overwrite: replace the run in `out` and its scores, which is refused otherwise
            progress: bars to add to; by default this method shows its own

        Returns:
            the checkpoint's path

        Raises:
            TrainingError, CheckpointError: where training can't begin or go on; a Trainer that has taken
                steps begins no other run
            FolderInUseError: where another process trains into `out`
            MemoryShortageError: where an allocation fails

        Ctrl-C and SIGTERM end the run after the step that it is taking, with a checkpoint. The command that
        goes on with it is logged. Then KeyboardInterrupt is raised or, for SIGTERM, SystemExit with status
        143. A second signal ends the process at once. After that and after MemoryShortageError, the last
        checkpoint is whole.
        """
        # Where a process is lost, the launcher sends SIGTERM to this one, which may be about to report it.
        with self._requests as requests, self.processes.together(self.messages.last_checkpoint):
            if self.processes.first:
                check_new_run(self.config, resume=resume, overwrite=overwrite)
            # One process writes the files, and holds their folder.
            with held(self.out, "trains") if self.processes.first else nullcontext():
                self._fit(resume, overwrite, progress)
            requests.grant()
        return self.checkpoint_path

    def _fit(self, resume: bool, overwrite: bool, progress: Progress | None) -> None:
        self._begin(resume=resume, overwrite=overwrite)
        with log_to_file(self.out / LOG_NAME, append=resume) if self.processes.first else nullcontext():
            self._introduce()
            self.fabric.call("on_fit_start", self)
            bars = progress_bars() if progress is None else progress
            with bars if progress is None else nullcontext(), self._logging():
                self._run(bars)
            self.fabric.call("on_fit_end", self)
            log.info("%s", self.messages.summary(self.step_count, self.journal.summary()))

    def _begin(self, *, resume: bool, overwrite: bool) -> None:
        """Resume the run in `out`, or remove the files of an earlier one."""
        if resume and self.processes.from_first(self.checkpoint_path.exists):
            self._resume()
            return
        if self.step_count > 0 or self._stepped:
            taken = f"{self.step_count} steps" if self.step_count > 0 else "steps by step()"
            raise TrainingError(
                f"{self.out}: this Trainer has taken {taken}, expected one that has taken none: make a new "
                "one to begin anew, or go on with fit(resume=True) from a checkpoint"
            )
        if resume:
            log.warning("%s: no checkpoint yet: the run begins with its first step", self.out)
        if self.processes.first:
            # All files of an old run go, because its scores would be wrong beside the metrics of this run.
            for path in replaced_files(self.out, resume=resume, overwrite=overwrite):
                path.unlink(missing_ok=True)
        self.journal.clear()

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """A context in which the journal sends its lines to the logger, if there is one."""
        if self.config.logger == "none" or not self.processes.first:
            yield
            return
        self.journal.log = RunLog(self.config, self.step_count, self.processes.count)
        try:
            yield
        finally:
            self.journal.log.close()

    def _agreed(self, values: Sequence[float]) -> list[float]:
        """Take the means of a step's measurements over the processes, which agree here on whether to stop."""
        if self.processes.count == 1:
            return list(values)
        received = self._requests.received
        *means, interrupted, ended = self.processes.means(
            [*values, received == signal.SIGINT, received == signal.SIGTERM]
        )
        self._stop = signal.SIGINT if interrupted else signal.SIGTERM if ended else None
        return means

    @property
    def _stopping(self) -> signal.Signals | None:
        """The signal after which the run stops. One that a process got counts when all have agreed on it."""
        return self._requests.received if self.processes.count == 1 else self._stop

    def _run(self, bars: Progress) -> None:
        name = f"steps of {self.out.name}"
        task = bars.add_task(name, total=self.total_steps, completed=self.step_count, status="")
        try:
            with enough_memory("a training step", LESS_MEMORY):
                self._validate()
                while self.step_count < self.total_steps and self._stopping is None:
                    self._run_epoch(bars, task)
                    self._validate()
            self._requests.received = self._stopping or self._requests.received
            self._requests.grant()
        except (KeyboardInterrupt, SystemExit, MemoryShortageError):
            log.warning("Stopped after step %d. %s", self.step_count, self.messages.last_checkpoint())
            raise
        finally:
            # A later run's processes, forked while these wait, would inherit them and report errors.
            self.batches.close()

    def _introduce(self) -> None:
        devices = self.messages.devices(self.fabric.device, self.processes.count, self.model)
        self.messages.introduce(self.data, steps=self.total_steps, devices=devices, how=self._how)

    @property
    def _scored(self) -> nn.Module:
        """The network that is scored: the moving average of the weights, or the trained network itself."""
        return self.model if self._average is None else self._average.module

    def _run_epoch(self, bars: Progress, task: TaskID) -> None:
        """Train from the next batch to the end of the epoch or of the run."""
        rate = learning_rate(self.config, self.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        asked, unrecorded = time.perf_counter(), 0.0
        for batch in self.batches.of(self.epoch, self.batch):
            begun = time.perf_counter()
            self._launched.append(
                _Launched(self.step_count + 1, batch, self._step.launch(batch), begun - asked)
            )
            self.step_count += 1
            self.batch += 1
            ahead = 0 if self._writes_here() else self._step.ahead
            unrecorded = self._end_steps(bars, task, begun - unrecorded, ahead=ahead)
            if self._ends_here():
                break
            self._write_within_epoch(rate)
            asked = time.perf_counter()
        self._end_steps(bars, task, time.perf_counter() - unrecorded)
        self.journal.write(self.step_count, self.epoch, rate)
        if self.batch >= len(self.batches):
            self.epoch, self.batch = self.epoch + 1, 0
        self.save()
        log.info(
            "%s, step %d of %d, %d of %d epochs done: %s",
            *(self.messages.name, self.step_count, self.total_steps, self.epoch, self.config.epochs),
            self.journal.summary(),
        )

    def _end_steps(self, bars: Progress, task: TaskID, begun: float, *, ahead: int = 0) -> float:
        """Read and record the measurements of all steps but the last `ahead`, whose time began at `begun`.

        Returns the seconds that have passed since the last of them ended, or else since `begun`. Raises
        TrainingError for a loss that isn't finite. That step and those after it then don't count.
        """
        while len(self._launched) > ahead:
            number, batch, end, waited = self._launched.popleft()
            try:
                result = end()
            except BaseException as error:
                self._launched.clear()
                self.batch -= self.step_count - number + 1
                self.step_count = number - 1
                if isinstance(error, NotFiniteError):
                    raise self._not_finite(batch, error.result) from None
                raise
            now = time.perf_counter()
            self.journal.add(result, now - begun, waited)
            begun = now
            self._watch.look(number, result)
            self.fabric.call("on_step_end", self, batch, result)
            status = f"epoch {self.epoch + 1} loss {result.loss:.3f} accuracy {result.accuracy:.2f}"
            bars.update(task, completed=number, status=status)
        return time.perf_counter() - begun

    def _validate(self) -> None:
        """Score the network if an epoch has just ended after which that is due and hasn't been done."""
        every, done = self.config.validate_every, self.journal.validations
        if self._validation is None or every is None or self._stopping is not None:
            return
        due = self.epoch > 0 and self.batch == 0 and self.epoch % every == 0
        if not due or (done and done[-1]["step"] == self.step_count):
            return
        # The checkpoint was just written, so that nothing is lost where a signal ends the validation.
        with self._requests.at_once():
            self._share_buffers()
            self._validation.run(self._scored, self._state(), self.journal)

    def _share_buffers(self) -> None:
        """Give all processes the statistics of BatchNorm of the first, as their next forward pass would."""
        if self.processes.count > 1:
            for buffer in chain(self.model.buffers(), self._scored.buffers()):
                distributed.broadcast(buffer, 0)

    def _ends_here(self) -> bool:
        last = self.batch >= len(self.batches) or self.step_count == self.total_steps
        return self._stopping is not None or last

    def _writes_here(self) -> bool:
        every = (self.config.log_every, self.config.checkpoint_every)
        return any(self.step_count % number == 0 for number in every)

    def _write_within_epoch(self, rate: float) -> None:
        if self.step_count % self.config.log_every == 0:
            self.journal.write(self.step_count, self.epoch, rate)
        if self.step_count % self.config.checkpoint_every == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint. Raises TrainingError for weights that are not finite; the earlier one stays.

        All processes of a run call this, and the first one writes. Its statistics of BatchNorm are in the
        checkpoint. With SyncBatchNorm, those of all processes are equal.
        """
        state = self.model.state_dict()
        if bad := [name for name, tensor in state.items() if not all_finite(tensor)]:
            raise TrainingError(self.messages.weights_not_finite(self.step_count, bad))
        checkpoint = self._state()
        if self.processes.first:
            save_checkpoint(self.checkpoint_path, checkpoint)
        self.processes.wait()
        self.fabric.call("on_checkpoint", self, self.checkpoint_path)

    def _state(self) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            data=self.data,
            weights=self.weights,
            model=self._scored.state_dict(),
            raw={} if self._average is None else self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.fabric.strategy.precision.state_dict(),
            random=self.processes.gathered(random_state(self.fabric.device)),
            step=self.step_count,
            epoch=self.epoch,
            batch=self.batch,
            metrics=self.journal.lines[-1] if self.journal.lines else {},
            parts=self.parts,
        )

    def _resume(self) -> None:
        path = self.checkpoint_path
        checkpoint = load_checkpoint(path)
        check_processes(path, checkpoint, self.processes.count)
        check_parts(path, checkpoint, self.parts)
        check_config(path, checkpoint, self.config)
        check_data(path, checkpoint, self.data)
        if checkpoint.step > self.total_steps:
            raise CheckpointError(
                f"{path}: this run has taken {checkpoint.step} steps, and is to end after "
                f"{self.total_steps}: give more steps or epochs"
            )
        load_weights(path, self.model, checkpoint.raw or checkpoint.model)
        if self._average is not None:
            load_weights(path, self._average.module, checkpoint.model)
            # An average of nothing yet would begin with the next weights.
            self._average.n_averaged.fill_(checkpoint.step)
        load_optimizer(path, self.optimizer, checkpoint.optimizer)
        self.fabric.strategy.precision.load_state_dict(checkpoint.scaler)
        self._step.reset()
        self._launched.clear()
        self.step_count, self.epoch, self.batch = checkpoint.step, checkpoint.epoch, checkpoint.batch
        self.journal.return_to(self.step_count)
        restore_random_state(checkpoint.random[self.processes.rank], self.fabric.device)
        log.info("Going on from %s: step %d of %d", path, self.step_count, self.total_steps)

    def _not_finite(self, batch: Batch, result: StepResult) -> Exception:
        """The exception for a step that was refused; the process whose own result isn't finite reports it."""
        if result.finite:
            return other_failed()
        files = batch.files(self.training)
        return TrainingError(
            self.messages.loss_not_finite(self.step_count + 1, self.epoch + 1, result, files)
        )
