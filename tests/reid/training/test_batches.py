"""Training batches: the sampler's pairs, classes that stay, exact resumption, caches, unreadable images."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from mrcn_fast.reid.data import DatasetError, PairedIdentitySampler, PersonImages, Sample, TrainingSet
from mrcn_fast.reid.data.datasets.sysu_mm01 import SYSUMM01
from mrcn_fast.reid.training.batches import Batch, TrainingBatches
from mrcn_fast.reid.training.config import TrainConfig

NAME = "sysu-mm01-split1"


@pytest.fixture
def tree(tiny_tree: Path, tmp_path: Path) -> Path:
    """A tree that a test damages: 4 training identities with 2 images of each of 6 cameras."""
    return Path(shutil.copytree(tiny_tree, tmp_path / "tree"))


def damage(*samples: Sample) -> None:
    for sample in samples:
        sample.path.write_bytes(b"no image")


def of_identity(samples: tuple[Sample, ...], identity: int) -> list[Sample]:
    return [sample for sample in samples if sample.identity == identity]


def equal(got: list[Batch], expected: list[Batch]) -> bool:
    pairs = zip(got, expected, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def check(batches: list[Batch], training: TrainingSet, config: TrainConfig) -> None:
    """Images, indices and classes of the batches belong together."""
    size = (config.height, config.width)
    files = [PersonImages(s, size, filter=config.filter) for s in (training.visible, training.infrared)]
    for batch in batches:
        assert len(batch.labels) == config.identities * config.images
        rows = torch.stack((batch.labels, batch.visible_index, batch.infrared_index), dim=1)
        for row, (label, i, j) in enumerate(rows.tolist()):
            identity = training.identities[label]
            assert training.visible[i].identity == training.infrared[j].identity == identity
            assert torch.equal(batch.visible[row], files[0][i])
            assert torch.equal(batch.infrared[row], files[1][j])


@pytest.mark.parametrize("filter", ["lanczos", "bilinear"])
def test_batches_are_the_samplers_pairs(
    tiny_config: TrainConfig, filter: Literal["lanczos", "bilinear"]
) -> None:
    config = dataclasses.replace(tiny_config, filter=filter)
    training = SYSUMM01(config.data).training()
    batches = TrainingBatches(training, config, name=NAME)
    sampler = PairedIdentitySampler(
        [s.identity for s in training.visible], [s.identity for s in training.infrared],
        identities=2, images=2, seed=config.seed, batches=3,
    )  # fmt: skip
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        got = list(batches.of(epoch))
        pairs = [torch.stack((b.visible_index, b.infrared_index), dim=1).tolist() for b in got]
        assert pairs == [list(map(list, batch)) for batch in sampler]
        check(got, training, config)
    assert len(batches) == 3
    files = got[0].files(training)
    assert files[:4] == [str(training.visible[i].path) for i in got[0].visible_index.tolist()]
    assert files[4:] == [str(training.infrared[i].path) for i in got[0].infrared_index.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_any_workers_and_a_cache_give_one_stream_from_any_batch_on(
    workers: int, cache: bool, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    training = SYSUMM01(tiny_config.data).training()
    expected = [list(TrainingBatches(training, tiny_config, name=NAME).of(epoch)) for epoch in (0, 1)]
    config = dataclasses.replace(
        tiny_config, workers=workers, cache=str(tmp_path / "cache") if cache else None
    )
    state = torch.get_rng_state()
    batches = TrainingBatches(training, config, name=NAME)
    assert equal(list(batches.of(1, 1)), expected[1][1:])
    # Left in the middle, as a run does that reaches its last step.
    assert equal(list(itertools.islice(batches.of(0), 1)), expected[0][:1])
    for epoch in (1, 0):
        assert equal(list(batches.of(epoch)), expected[epoch])
    assert list(batches.of(0, 3)) == []
    assert torch.equal(torch.get_rng_state(), state)
    if cache:
        names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "cache").glob("*.npy"))
        assert names == [f"{NAME}-train-{m}-32x16-lanczos" for m in ("infrared", "visible")]


def test_unreadable_images_are_left_out_and_classes_stay(
    tiny_config: TrainConfig, tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = SYSUMM01(tree).training()
    first, second, third, fourth = training.identities
    broken = [of_identity(training.visible, first)[0], of_identity(training.infrared, third)[1]]
    damage(*broken, *of_identity(training.infrared, second))
    config = dataclasses.replace(tiny_config, skip_unreadable=True, batches=30)
    with caplog.at_level(logging.WARNING):
        batches = TrainingBatches(training, config, name=NAME)
    messages = "\n".join(caplog.messages)
    assert "Left out 6 of 48 images that can't be read: 5 infrared, 1 visible" in messages
    assert all(f"Left out: {sample.path}: " in messages for sample in broken)
    assert f"{NAME}: left out 1 training identities without infrared images (8 images): {second}" in messages
    assert set(batches.unreadable) == {*broken, *of_identity(training.infrared, second)}
    got = list(batches.of(0))
    check(got, training, config)
    assert {training.identities[label] for batch in got for label in batch.labels.tolist()} == {
        first, third, fourth,
    }  # fmt: skip
    drawn = {training.visible[i] for batch in got for i in batch.visible_index.tolist()}
    drawn |= {training.infrared[i] for batch in got for i in batch.infrared_index.tolist()}
    assert not drawn & set(batches.unreadable)


def test_without_unreadable_images_skipping_changes_nothing(tiny_config: TrainConfig) -> None:
    training = SYSUMM01(tiny_config.data).training()
    expected = list(TrainingBatches(training, tiny_config, name=NAME).of(0))
    config = dataclasses.replace(tiny_config, skip_unreadable=True)
    batches = TrainingBatches(training, config, name=NAME)
    assert batches.unreadable == ()
    assert equal(list(batches.of(0)), expected)


def test_a_cache_holds_the_readable_images(tiny_config: TrainConfig, tree: Path, tmp_path: Path) -> None:
    training = SYSUMM01(tree).training()
    damage(training.visible[3])
    config = dataclasses.replace(tiny_config, cache=str(tmp_path / "cache"), batches=10)
    with pytest.raises(DatasetError, match="expected a readable image"):
        TrainingBatches(training, config, name=NAME)
    config = dataclasses.replace(config, skip_unreadable=True)
    check(list(TrainingBatches(training, config, name=NAME).of(0)), training, config)


def test_too_few_identities_after_skipping(tiny_config: TrainConfig, tree: Path) -> None:
    training = SYSUMM01(tree).training()
    config = dataclasses.replace(tiny_config, skip_unreadable=True)
    damage(*(s for s in training.visible if s.identity != training.identities[0]))
    with pytest.raises(ValueError, match="a batch needs 2 different identities; got 1"):
        TrainingBatches(training, config, name=NAME)
    damage(*training.visible)
    with pytest.raises(
        DatasetError,
        match=r"\.jpg: this image can't be read, and .*, no training identity has images of both modalities; "
        r"no visible image is left. Left out were 32 of 32 visible images",
    ):
        TrainingBatches(training, config, name=NAME)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_as_in_this_process(
    workers: int, tiny_config: TrainConfig, tree: Path
) -> None:
    training = SYSUMM01(tree).training()
    damage(*training.visible)
    batches = TrainingBatches(training, dataclasses.replace(tiny_config, workers=workers), name=NAME)
    with pytest.raises(DatasetError) as caught:
        next(batches.of(0))
    assert str(caught.value).startswith(f"{tree}")
    assert ": expected a readable image of identity " in str(caught.value)
    assert "Traceback" not in str(caught.value)


SCRIPT = """
import torch
from mrcn_fast.reid.data.loading import Batches

batches = Batches(range(4), torch.tensor, batch_size=2, workers=1)
print([batch.tolist() for batch in batches])
"""


def test_a_script_ends_though_its_processes_outlive_a_signal() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=200,  # it would never end
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (run.returncode, run.stdout) == (0, "[[0, 1], [2, 3]]\n"), run.stderr
