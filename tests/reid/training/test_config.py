"""The configuration: the schedule, the defaults, what is refused, and which rates the optimizer gets."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrcn_fast.reid.models.network import ReIDModel
from mrcn_fast.reid.training.checkpoint import CheckpointError
from mrcn_fast.reid.training.config import ConfigError, TrainConfig, learning_rate
from mrcn_fast.reid.training.optimizer import make_optimizer
from mrcn_fast.reid.training.restoring import load_optimizer


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 0.01),
        (1, 0.019),
        (5, 0.055),
        (10, 0.1),
        (19, 0.1),
        (20, 0.01),
        (59, 0.01),
        (60, 0.001),
        (79, 0.001),
    ],
)
def test_the_schedule_is_the_papers(epoch: int, expected: float) -> None:
    assert learning_rate(TrainConfig(data=""), epoch) == pytest.approx(expected)


def test_a_milestone_within_the_warm_up_counts_from_its_epoch_on() -> None:
    """Otherwise the rate would go on to grow, and fall when the warm-up ends."""
    config = TrainConfig(data="", milestones=(5, 20))
    assert [learning_rate(config, epoch) for epoch in (4, 5, 9, 10)] == pytest.approx(
        [0.046, 0.0055, 0.0091, 0.01]
    )


def test_no_more_workers_than_cores() -> None:
    assert 1 <= TrainConfig(data="").workers <= min(4, os.cpu_count() or 1)


def test_the_defaults_are_the_papers() -> None:
    config = TrainConfig(data="")
    assert (config.model, config.depth, config.stages, config.gate) == ("mrcn", 50, (0,), "se")
    assert (config.height, config.width, config.identities, config.images) == (288, 128, 4, 4)
    assert (config.epochs, config.momentum, config.weight_decay, config.trunk_lr) == (80, 0.9, 5e-4, 0.1)
    assert (config.triplet_weight, config.cqc_weight, config.cqc_margin) == (1.0, 1.2, 0.2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"identities": 1}, "got identities=1, expected an integer from 2 to"),
        ({"steps": 0}, "got steps=0, expected an integer from 1 to 1000000000, or none"),
        ({"flip": 1.5}, "got flip=1.5"),
        ({"milestones": (60, 20)}, r"got milestones=\(60, 20\), expected increasing values"),
        ({"height": 8}, "got height=8"),
        ({"split": 2}, "sysu-mm01 has one split"),
        ({"parts": 0}, "got parts=0, expected an integer from 1 to"),
        ({"parts": 19}, "got parts=19, expected at most 18 at height=288"),
        ({"height": 10**9}, "got height=1000000000, expected an integer from 32 to 8192"),
        ({"height": 48.5}, "got height=48.5, expected an integer from 32"),
        ({"width": "128"}, "got width='128', expected an integer from 16"),
        ({"padding": 289}, "got padding=289, expected at most 288"),
        ({"images": 10**6}, "expected at most 4294967296"),
        ({"lr": math.nan}, "got lr=nan, expected a finite number of at least 0"),
        ({"lr": math.inf}, "got lr=inf, expected a finite number"),
        ({"lr": "0.1"}, "got lr='0.1', expected a number"),
        ({"momentum": -0.1}, "got momentum=-0.1, expected a number from 0 to 1"),
        ({"momentum": math.nan}, "got momentum=nan"),
        ({"weight_decay": -1}, "got weight_decay=-1, expected a number of at least 0"),
        ({"cqc_weight": -1.0}, "got cqc_weight=-1.0, expected a number of at least 0"),
        ({"triplet_margin": math.inf}, "got triplet_margin=inf"),
        ({"seed": -1}, "got seed=-1, expected an integer from 0 to"),
        ({"seed": 2**64}, "got seed=18446744073709551616, expected an integer from 0 to 9223372036854775807"),
        ({"epochs": True}, "got epochs=True, expected an integer"),
        ({"workers": -1}, "got workers=-1, expected an integer from 0 to 1024"),
        ({"depth": 34}, "got depth=34, expected one of 18, 50"),
        ({"model": "mrcnn"}, "got model='mrcnn', expected one of baseline, snr, mrcn"),
        ({"gate": ["se"]}, r"got gate=\['se'\], expected one of se, eca"),
        ({"backend": "abacus"}, "got backend='abacus', expected one of cpu, triton"),
        ({"precision": 16}, "got precision=16, expected one of 32-true"),
        ({"stages": 0}, "got stages=0, expected a list of values, each an integer from 0 to 4"),
        ({"stages": ()}, "expected at least one stage for the blocks of mrcn"),
        ({"stages": (1, 5)}, r"got stages\[1\]=5, expected an integer from 0 to 4"),
        ({"skip_unreadable": "yes"}, "got skip_unreadable='yes', expected true or false"),
        ({"out": ""}, "got out='', expected a path that is not empty"),
        ({"cache": "a\0b"}, "expected a path without the character NUL"),
        ({"weights": 7}, "got weights=7, expected a path, or none"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(data="", **values)


def test_values_are_put_into_their_plain_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given: dict[str, Any] = {
        "height": np.int64(64),
        "lr": np.float32(0.5),
        "stages": [0, 2],
        "out": tmp_path / "run",
        "weights": "~/a",
    }
    config = TrainConfig(data="~/tree", **given)
    plain = (64, 0.5, (0, 2), str(tmp_path / "run"), str(tmp_path / "a"), str(tmp_path / "tree"))
    found = (config.height, config.lr, config.stages, config.out, config.weights, config.data)
    assert found == plain and list(map(type, found)) == list(map(type, plain))
    assert json.loads(json.dumps(config.as_dict()))["height"] == 64


def test_the_configuration_survives_json() -> None:
    config = TrainConfig(data="somewhere", milestones=(3, 7), steps=5, stages=(0, 2))
    values = json.loads(json.dumps(config.as_dict()))
    assert TrainConfig.from_dict(values) == config
    with pytest.raises(ConfigError, match="got colour='red', expected no value of this name"):
        TrainConfig.from_dict(values | {"colour": "red"})
    del values["depth"]
    with pytest.raises(ConfigError, match="got no depth, expected one of 18, 50"):
        TrainConfig.from_dict(values)


def test_an_optimizer_may_be_a_class_by_its_name() -> None:
    model = ReIDModel(5, depth=18)
    config = TrainConfig(
        data="",
        optimizer="torch.optim.RAdam betas=[0.8,0.9] eps=1e-6",
        lr=3e-4,
        weight_decay=0.05,
        selective_decay=True,
    )
    optimizer = make_optimizer(model, config)
    assert type(optimizer) is torch.optim.RAdam
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert [group["scale"] for group in optimizer.param_groups] == [1.0, 1.0, 0.1, 0.1]
    assert decays == [0.05, 0, 0.05, 0]
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.9), 1e-6, 3e-4)
    # Rprop has no weight decay, and gets none.
    rprop = TrainConfig(data="", optimizer="torch.optim.Rprop etas=[0.4,1.3]")
    assert make_optimizer(model, rprop).param_groups[0]["etas"] == (0.4, 1.3)


class Inheriting(torch.optim.AdamW):
    """An optimizer that passes its arguments on."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


def test_an_optimizer_may_pass_its_arguments_on() -> None:
    config = TrainConfig(data="", optimizer=f"{__name__}.Inheriting eps=1e-6", lr=3e-4, weight_decay=0.05)
    group = make_optimizer(ReIDModel(5, depth=18), config).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (3e-4, 0.05, 1e-6)


def test_the_state_of_an_optimizer_that_passes_its_arguments_on_is_compared() -> None:
    model = ReIDModel(5, depth=18)
    began, now = (
        make_optimizer(model, TrainConfig(data="", optimizer=f"{__name__}.Inheriting", weight_decay=decay))
        for decay in (0.05, 0.1)
    )
    load_optimizer("run/checkpoint.pth", now, now.state_dict())
    with pytest.raises(CheckpointError, match=r"weight_decay=0\.05, expected 0\.1"):
        load_optimizer("run/checkpoint.pth", now, began.state_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rmsprop", "got optimizer='rmsprop', expected sgd, adamw, or a class with its arguments"),
        ("sgd momentum=0.5", "got optimizer='sgd momentum=0.5', expected sgd, adamw, or a class"),
        ("nowhere.Adam", "can't import nowhere.Adam: No module named 'nowhere'"),
        ("torch.optim.Nothing", "can't import torch.optim.Nothing: .* has no attribute 'Nothing'"),
        ("torch.optim.SparseAdam", "got torch.optim.SparseAdam, expected one for dense gradients"),
        ("torch.nn.Linear", "got torch.nn.Linear, expected a class of optimizers"),
        ("torch.optim.RAdam lr=1", "got the argument 'lr=1' .*, expected name=value .* among betas, eps"),
        ("torch.optim.RAdam help", "got the argument 'help' .*, expected name=value"),
        ("torch.optim.RAdam eps=small", "eps.*: Expected a <class 'float'>. Got value: small"),
        ("torch.optim.RAdam 'eps=1", "No closing quotation"),
        ("torch.optim.LBFGS", "LBFGS refuses the run's values: .*parameter groups"),
    ],
)
def test_an_unfit_optimizer_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(ReIDModel(5, depth=18), TrainConfig(data="", optimizer=text))


def test_neck_and_classifier_learn_at_the_full_rate() -> None:
    model = ReIDModel(5, depth=18)
    optimizer = make_optimizer(model, TrainConfig(data=""))
    head, rest = optimizer.param_groups
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head() if p.requires_grad}
    assert (head["scale"], rest["scale"]) == (1.0, 0.1)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)
    other = make_optimizer(model, TrainConfig(data="", optimizer="adamw", lr=3e-4, weight_decay=0.05))
    assert isinstance(other, torch.optim.AdamW)
    assert [(group["scale"], group["weight_decay"]) for group in other.param_groups] == [
        (1.0, 0.05),
        (0.1, 0.05),
    ]
    assert [len(group["params"]) for group in other.param_groups] == [
        len(head["params"]),
        len(rest["params"]),
    ]
