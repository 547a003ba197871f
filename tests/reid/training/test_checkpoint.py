"""What a checkpoint must hold: edited and damaged ones are refused by the field's name."""

from __future__ import annotations

import copy
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mrcn_fast import cli
from mrcn_fast.reid.settings import SettingError
from mrcn_fast.reid.training import checkpoint as module
from mrcn_fast.reid.training import checkpoint_checks
from mrcn_fast.reid.training.checkpoint import (
    CHECKPOINT_NAME,
    FORMAT,
    Checkpoint,
    CheckpointError,
    content_digest,
    load_checkpoint,
    save_checkpoint,
)

Edit = Callable[[dict[str, Any]], object]
CONV = "trunk.layer1.0.conv1.weight"


@pytest.fixture(scope="module")
def content(finished: Path) -> dict[str, Any]:
    """The content of a finished run's file: 6 steps, 2 epochs of 3 batches."""
    loaded: dict[str, Any] = torch.load(finished, weights_only=True)
    return loaded


def set_in(*path: Any, to: Any) -> Edit:
    """An edit that sets the value at `path`; a callable makes the new value of the old."""

    def edit(content: Any) -> None:
        *parents, last = path
        for name in parents:
            content = content[name]
        content[last] = to(content[last]) if callable(to) else to

    return edit


def without(*path: Any) -> Edit:
    def edit(content: Any) -> None:
        *parents, last = path
        for name in parents:
            content = content[name]
        del content[last]

    return edit


def with_value(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return change


GROUP = ("optimizer", "param_groups", 0)
MOMENTUM = ("optimizer", "state", 0, "momentum_buffer")

# What the message must name, and the edits.
EDITS: list[tuple[str, Edit]] = [
    # Numbers out of range, and of another place in the run.
    ("step", set_in("step", to=-5)),
    ("step", set_in("step", to=5)),
    ("step", set_in("step", to=6.0)),
    ("step", set_in("step", to="6")),
    ("step", set_in("step", to=True)),
    ("step", without("step")),
    ("epoch", set_in("epoch", to=10**9)),
    ("epoch", set_in("epoch", to=-1)),
    ("epoch", set_in("epoch", to=None)),
    ("epoch", set_in("epoch", to=10**5000)),
    ("config: got epochs=", set_in("config", "epochs", to=10**5000)),
    ("names that are text", set_in(5, to=5)),
    ("batch", set_in("batch", to=-1)),
    ("batch", set_in("batch", to=3)),
    ("batch", set_in("batch", to=[0])),
    ("extra", set_in("extra", to=1)),
    # The configuration.
    ("config", set_in("config", to=None)),
    ("config: got no data", set_in("config", to={})),
    ("config: got lr='abc'", set_in("config", "lr", to="abc")),
    ("config: got lr=nan", set_in("config", "lr", to=float("nan"))),
    ("config: got height=48.5", set_in("config", "height", to=48.5)),
    ("config: got stages[1]='two'", set_in("config", "stages", to=[0, "two"])),
    ("config: got stages=7", set_in("config", "stages", to=7)),
    ("config: got depth=34", set_in("config", "depth", to=34)),
    ("config: got parts=1000000000", set_in("config", "parts", to=10**9)),
    ("config: got dataset='market'", set_in("config", "dataset", to="market")),
    ("config: got colour='red'", set_in("config", "colour", to="red")),
    ("config: got identities=1", set_in("config", "identities", to=1)),
    ("config: got gate='none'", set_in("config", "gate", to="none")),
    ("config: got momentum=-1.0", set_in("config", "momentum", to=-1.0)),
    # A network of other values than the configuration's.
    ("model.trunk", set_in("config", "depth", to=50)),
    ("model.plugs", set_in("config", "model", to="baseline")),
    (f"model.{CONV}", without("model", CONV)),
    (f"model.{CONV}", set_in("model", CONV, to=lambda t: t[:, :3])),
    (f"model.{CONV}", set_in("model", CONV, to=lambda t: t.double())),
    (f"model.{CONV}", set_in("model", CONV, to=lambda t: t.tolist())),
    (f"model.{CONV}", set_in("model", CONV, to=lambda t: t.to_sparse())),
    (f"model.{CONV}", set_in("model", CONV, to=lambda t: t.to("meta"))),
    (f"model.{CONV}", set_in("model", CONV, to=with_value(7, float("nan")))),
    ("model.surplus", set_in("model", "surplus", to=torch.ones(1))),
    ("running_var", set_in("model", "trunk.visible.bn1.running_var", to=with_value(0, -1.0))),
    ("num_batches_tracked", set_in("model", "trunk.visible.bn1.num_batches_tracked", to=lambda t: t - 99)),
    ("model", set_in("model", to=[])),
    # The optimizer.
    ("optimizer.state", set_in("optimizer", "state", to=None)),
    ("optimizer.param_groups", set_in("optimizer", "param_groups", to=[])),
    ("optimizer.param_groups[0].momentum", set_in(*GROUP, "momentum", to=0.5)),
    ("optimizer.param_groups[0].nesterov", set_in(*GROUP, "nesterov", to=0)),
    ("optimizer.param_groups[0].params", set_in(*GROUP, "params", to=[0, 0])),
    ("optimizer.param_groups[0].lr", set_in(*GROUP, "lr", to=float("inf"))),
    ("optimizer.param_groups[0].scale", without(*GROUP, "scale")),
    ("optimizer.param_groups[0].more", set_in(*GROUP, "more", to=1)),
    ("optimizer.state[0].momentum_buffer", set_in(*MOMENTUM, to=lambda t: t[:1])),
    ("optimizer.state[0].momentum_buffer", set_in(*MOMENTUM, to=with_value(0, float("inf")))),
    ("optimizer.state[0].momentum_buffer", set_in(*MOMENTUM, to=0.0)),
    ("optimizer.state[999]", set_in("optimizer", "state", 999, to=lambda _: {})),
    ("scaler", set_in("scaler", to={"scale": 65536.0})),
    # The rest.
    ("random[0].torch", set_in("random", 0, "torch", to=lambda t: t[:100])),
    ("random[0].torch", set_in("random", 0, "torch", to=torch.zeros_like)),
    ("random[0].cuda[0]", set_in("random", 0, "cuda", to=[torch.ones(3)])),
    ("random[0].python", set_in("random", 0, "python", to=(3, (1, 2), None))),
    ("random[0].python", set_in("random", 0, "python", to="state")),
    ("data.identities", set_in("data", "identities", to=(3, 1, 2))),
    ("data.identities", set_in("data", "identities", to=())),
    ("data.split", set_in("data", "split", to=2)),
    ("data.name", set_in("data", "name", to="regdb")),
    ("data.fingerprint", set_in("data", "fingerprint", to="abc")),
    ("data.images", set_in("data", "images", to=(32, 0))),
    ("weights", set_in("weights", to="0" * 64)),
    ("metrics.step", set_in("metrics", "step", to=7)),
    ("metrics.loss", set_in("metrics", "loss", to=float("nan"))),
    ("metrics.loss", without("metrics", "loss")),
    ("format", set_in("format", to=FORMAT - 1)),
    ("format", set_in("format", to=None)),
    ("format", set_in("format", to=10**5000)),
    ("format", set_in("format", to=torch.full((3,), FORMAT))),
    ("digest", without("digest")),
    ("random", set_in("random", to=[])),
    # Nothing but the digests knows these.
    ("config", set_in("config", "lr", to=0.021)),
    ("model", set_in("model", CONV, to=with_value(7, 0.125))),
    ("optimizer", set_in(*MOMENTUM, to=with_value(7, 0.125))),
    ("optimizer", without("optimizer", "state", 3)),
    ("data", set_in("data", "fingerprint", to="0" * 64)),
    ("metrics", set_in("metrics", "loss", to=1.5)),
    ("metrics", set_in("metrics", to={})),
    ("random", set_in("random", 0, "python", to=random.Random(5).getstate())),
]


def copied(value: Any) -> Any:
    """A copy whose dictionaries and lists are its own; the tensors are shared."""
    return copy.deepcopy(value, {id(t): t for t in tensors_of(value)})


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inside for tensor in tensors_of(item)]


@pytest.mark.parametrize(("named", "edit"), EDITS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(EDITS)])
def test_an_edited_field_is_refused_by_its_name(
    named: str, edit: Edit, content: dict[str, Any], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = copied(content)
    if named == "optimizer.state[999]":
        edited["optimizer"]["state"][999] = None
    edit(edited)
    # As if it had been read from the file: to write 80 MB for each edit would take a minute.
    monkeypatch.setattr(torch, "load", lambda *_, **__: edited)
    with pytest.raises(CheckpointError, match=re.escape(named)) as error:
        load_checkpoint(finished)
    assert str(finished) in str(error.value)
    assert len(str(error.value)) < 1000


def test_an_edited_file_is_refused_in_a_line(
    content: dict[str, Any], tmp_path: Path, tiny_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / CHECKPOINT_NAME
    torch.save(content | {"step": -5}, path)
    values = content["config"] | {"out": str(tmp_path)}
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    assert cli.main(["train", *flags, "--resume"]) == 2
    errors = capsys.readouterr().err
    assert "got step=-5, expected 6, after 2 epochs and 0 batches" in " ".join(errors.split())
    assert "Traceback" not in errors
    # Written anew without an edit, it is the same checkpoint.
    torch.save(content, path)
    assert load_checkpoint(path).step == 6


def flipped(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (old,) = file.read(1)
        file.seek(place)
        file.write(bytes([old ^ 1 << bit]))


def test_a_flipped_bit_is_refused_or_changes_nothing(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(finished, tmp_path))
    with zipfile.ZipFile(path) as archive:
        pickled, last = archive.infolist()[0], archive.infolist()[-1]
        directory = archive.start_dir
    size = path.stat().st_size
    whole = digest_of(load_checkpoint(path))
    generator = random.Random(0)
    # Most bits are the tensors'; the others lead the reader.
    parts = ((0, size), (0, pickled.file_size), (directory, size), (last.header_offset, size))
    refused = 0
    for number in range(32):
        place, bit = generator.randrange(*parts[number % 4]), generator.randrange(8)
        flipped(path, place, bit)
        try:
            assert digest_of(load_checkpoint(path)) == whole, (place, bit)
        except CheckpointError:
            refused += 1
        flipped(path, place, bit)
    assert refused > 16
    assert digest_of(load_checkpoint(path)) == whole


def digest_of(checkpoint: Checkpoint) -> str:
    fields = checkpoint._asdict() | {"config": checkpoint.config.as_dict()}
    return content_digest(fields)


def test_the_digest_depends_on_values_types_and_order() -> None:
    ones = torch.ones(2, 3)
    different = [
        {"a": ones}, {"b": ones}, {"a": ones.view(3, 2)}, {"a": ones.double()}, {"a": ones.bfloat16()},
        {"a": -ones}, {"a": [1.0] * 6}, {"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None},
        {"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": [1, 2]}, {"a": [[1], 2]}, {"a": torch.ones(0)},
    ]  # fmt: skip
    assert len({content_digest(value) for value in different}) == len(different)
    # Not the memory layout, nor the kind of sequence, which a file doesn't keep.
    image = torch.randn(2, 3, 4, 5)
    assert content_digest(image) == content_digest(image.to(memory_format=torch.channels_last))
    assert content_digest((1, (2,))) == content_digest([1, [2]])


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_step_epoch_and_batch_must_fit_each_other(content: dict[str, Any], steps: int) -> None:
    checkpoint = module._conforming(content)
    epoch, batch = divmod(steps, 3)
    here = checkpoint._replace(step=steps, epoch=epoch, batch=batch, metrics={})
    checkpoint_checks.check_place(here)
    with pytest.raises(SettingError, match=f"got step={steps + 1}, expected {steps}, after"):
        checkpoint_checks.check_place(here._replace(step=steps + 1))


def test_an_epoch_without_unreadable_images_may_be_shorter(content: dict[str, Any]) -> None:
    checkpoint = module._conforming(content)
    checkpoint.config.skip_unreadable, checkpoint.config.batches = True, None
    most = 32 // 4 + 1
    checkpoint = checkpoint._replace(data=checkpoint.data._replace(images=(32, 16)), metrics={})
    for step in (2 + 1, 2 * most + 1):
        checkpoint_checks.check_place(checkpoint._replace(step=step, epoch=2, batch=1))
    for step in (2, 2 * most + 2):
        with pytest.raises(SettingError, match=f"got step={step}, expected 3 to 19"):
            checkpoint_checks.check_place(checkpoint._replace(step=step, epoch=2, batch=1))


def test_an_unfit_state_of_the_gradient_scaler_is_refused(content: dict[str, Any]) -> None:
    state = {
        "scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
        "_growth_tracker": 0,
    }  # fmt: skip
    checkpoint = module._conforming(content)
    checkpoint.config.precision = "16-mixed"
    checkpoint_checks.check_scaler(checkpoint._replace(scaler=state))
    wrong: list[dict[str, Any]] = [{}, state | {"scale": 0.0}, state | {"growth_interval": 1.5}]
    for scaler in wrong:
        with pytest.raises(SettingError, match=r"scaler\."):
            checkpoint_checks.check_scaler(checkpoint._replace(scaler=scaler))


def test_a_full_disk_keeps_the_checkpoint_before(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In test_files.py, the system itself refuses the write."""
    path = Path(shutil.copy(finished, tmp_path))
    before = path.read_bytes()
    checkpoint = load_checkpoint(path)

    def full(content: object, file: Any) -> None:
        file._file.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        save_checkpoint(path, checkpoint)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_message_advises_to_execute_the_file(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT_NAME
    torch.save({"format": FORMAT, "config": Path("x")}, path)
    with pytest.raises(CheckpointError, match="pickled Python objects") as error:
        load_checkpoint(path)
    assert "weights_only" not in str(error.value)
