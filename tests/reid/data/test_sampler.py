"""The paired sampler: pairs of one identity, P x K batches, a stream of seed and epoch alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from mrcn_fast.reid.data import PairedIdentitySampler

# Uneven numbers of images an identity, in no order.
VISIBLE = [5, 2, 9, 5, 7, 2, 9, 9, 3, 5, 5, 7, 7, 3, 2, 2, 2]
INFRARED = [9, 5, 7, 3, 2, 2, 3]


def make(**changes: Any) -> PairedIdentitySampler:
    return PairedIdentitySampler(VISIBLE, INFRARED, **{"identities": 3, "images": 2, "seed": 1, **changes})


def test_pairs_have_one_identity_and_batches_are_p_by_k() -> None:
    for batch in make(batches=50):
        identities = [VISIBLE[visible] for visible, _ in batch]
        assert identities == [INFRARED[infrared] for _, infrared in batch]
        assert identities[0::2] == identities[1::2]
        assert len(set(identities)) == 3
        assert len(batch) == 6


def test_all_images_are_drawn_and_with_replacement() -> None:
    pairs = [pair for batch in make(batches=200) for pair in batch]
    assert {visible for visible, _ in pairs} == set(range(len(VISIBLE)))
    assert {infrared for _, infrared in pairs} == set(range(len(INFRARED)))
    # Identity 5 has one infrared image and needs two in every batch.
    everyone = next(iter(make(identities=5)))
    assert [infrared for _, infrared in everyone if INFRARED[infrared] == 5] == [1, 1]


def test_number_of_batches() -> None:
    assert len(make()) == len(list(make())) == 17 // 6 + 1
    assert len(make(batches=5)) == len(list(make(batches=5))) == 5
    assert len(PairedIdentitySampler([1, 2], [1, 2] * 6, identities=2, images=2)) == 12 // 4 + 1


def test_stream_depends_on_seed_and_epoch_alone() -> None:
    sampler = make()
    first = list(sampler)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(123)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert list(make(seed=2)) != first
    resumed = make()
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_iterating_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    list(make())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (str(np.random.get_state()), random.getstate())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2, 3], [1, 2, 3], 4, 2), "a batch needs 4 different identities; got 3"),
        (([1, 2, 3], [1, 2, 4], 2, 2), "2 have one only: 3, 4"),
        (([1, 2], [1, 2], 0, 2), "identities must be at least 1; got 0"),
        (([1, 2], [1, 2], 2, 0), "images must be at least 1; got 0"),
        (([], [], 2, 2), "a batch needs 2 different identities; got 0"),
    ],
)
def test_bad_arguments(arguments: tuple[list[int], list[int], int, int], message: str) -> None:
    visible, infrared, identities, images = arguments
    with pytest.raises(ValueError, match=message):
        PairedIdentitySampler(visible, infrared, identities=identities, images=images)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        make().set_epoch(-1)


@pytest.mark.parametrize("identities", [[1.5, 2.0], [1.0, float("nan")], ["1", "2"], [[1, 2]], [True, False]])
def test_identities_are_integers(identities: Any) -> None:
    """As indices, numbers of other kinds would mean other people."""
    with pytest.raises(ValueError, match="expected the images' identities as a row of integers; got"):
        PairedIdentitySampler(identities, [1, 2], identities=1, images=1)
    with pytest.raises(ValueError, match="expected the images' identities as a row of integers; got"):
        PairedIdentitySampler([1, 2], identities, identities=1, images=1)


@pytest.mark.parametrize("name", ["identities", "images", "batches", "seed"])
@pytest.mark.parametrize("value", [2.5, float("nan"), float("inf"), "2"])
def test_counts_are_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer; got {value!r}"):
        make(**{name: value})
    with pytest.raises(ValueError, match=f"epoch must be an integer; got {value!r}"):
        make().set_epoch(value)
    assert len(make(**{name: np.int64(2)})) > 0


def test_processes_deal_out_one_sequence() -> None:
    whole = list(make(batches=9))
    shares = [list(make(batches=3, processes=3, process=process)) for process in range(3)]
    assert [batch for batches in zip(*shares, strict=True) for batch in batches] == whole
    # An epoch passes the images once, however many processes there are.
    assert [len(make(processes=count)) for count in (1, 2, 3)] == [3, 2, 1]
    with pytest.raises(ValueError, match="got process=2, expected 0 to 1"):
        make(processes=2, process=2)
