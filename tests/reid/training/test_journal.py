"""The journal: damaged lines, return to a checkpoint, and the warning of a collapse."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from mrcn_fast.reid.training.checkpoint import (
    load_checkpoint,
)
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.journal import CollapseWatch, Journal, StepResult, embedding_spread
from tests.reid.conftest import train


def test_a_collapse_is_logged_while_it_happens(caplog: pytest.LogCaptureFixture) -> None:
    def result(spread: float) -> StepResult:
        return StepResult(1.0, 1.0, 0.3, 0.0, 0.0, 0.1, spread)

    watch = CollapseWatch()
    with caplog.at_level(logging.WARNING, logger="mrcn_fast"):
        assert not any(watch.look(step, result(0.2)) for step in range(100))
        assert [watch.look(step, result(1e-4)) for step in range(100, 121)].index(True) == 19
        assert not watch.look(121, result(0.2))
        assert not any(watch.look(step, result(1e-4)) for step in range(122, 141))
    assert "step 119: the embeddings have collapsed" in caplog.text


def test_spread_by_hand() -> None:
    # Mean (3, 4), length 5; variances 1 and 4.
    points = torch.tensor([[[2.0, 2.0], [4.0, 6.0]]])
    assert embedding_spread(points).item() == pytest.approx(5**0.5 / 5)
    # As two parts of one number each.
    assert embedding_spread(points.permute(2, 1, 0)).item() == pytest.approx(5**0.5 / 5)
    assert embedding_spread(torch.ones(1, 4, 3)).item() == 0


def line(step: int) -> bytes:
    """A line of metrics.jsonl."""
    values = {"step": step, "epoch": 0, "lr": 0.01, "loss": 1.0, "identity": 1.0, "triplet": 0.0, "cqc": 0.0}
    more = {"causality": 0.0, "accuracy": 0.5, "spread": 0.1, "step_seconds": 0.1, "wait_seconds": 0.0}
    return json.dumps(values | more).encode()


def test_a_journal_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"\n" + line(2) + b"\n" + line(3) + b'\n{"ste')
    journal = Journal(path)
    journal.add(StepResult(9, 9, 0, 0, 0, 0.5, 0.1), 0.1, 0.0)  # of a step that the run takes again
    journal.return_to(2)
    journal.add(StepResult(1, 1, 0, 0, 0, 0.5, 0.1), 0.1, 0.0)
    journal.write(3, 0, 0.01)
    assert journal.lines[-1]["loss"] == 1
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b'{"ste\n'


DAMAGED = {
    "cut": line(2)[:40],
    "NUL bytes": bytes(60),
    "NUL bytes in it": line(2)[:20] + bytes(8) + line(2)[28:],
    "no JSON": b"Traceback (most recent call last):",
    "no UTF-8": b"\xff\xfe" + line(2),
    "two in one": line(2) + line(2),
    "a list": b"[1, 2]",
    "a number": b"7",
    "nothing": b"null",
    "nested": b"[" * 100_000,
    "no number": line(2).replace(b'"step": 2', b'"step": "2"'),
    "not finite": line(2).replace(b'"loss": 1.0', b'"loss": NaN'),
    "true": line(2).replace(b'"loss": 1.0', b'"loss": true'),
    "a value less": line(2).replace(b'"spread": 0.1, ', b""),
    "a value more": line(2).replace(b"{", b'{"more": 1, '),
    "a step before": line(1),
    "step 0": line(0),
    "a huge number": line(2).replace(b'"step": 2', b'"step": 1' + b"0" * 5000),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_set_aside(tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([line(1), text, line(3), b""]))
    journal = Journal(path)
    with caplog.at_level(logging.WARNING, logger="mrcn_fast"):
        journal.return_to(9)
    assert [line["step"] for line in journal.lines] == [1, 3]
    assert path.read_bytes().splitlines() == [line(1), line(3)]
    aside = path.with_name("metrics.jsonl.damaged")
    assert aside.read_bytes() == text + b"\n"
    assert f"{path}: damaged in line 2: moved to metrics.jsonl.damaged" in caplog.text
    # What was set aside before stays.
    path.write_bytes(b"more")
    journal.return_to(9)
    assert aside.read_bytes() == text + b"\nmore\n"
    journal.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_where_its_journal_is_damaged(tiny_config: TrainConfig, finished: Path) -> None:
    train(dataclasses.replace(tiny_config, steps=2))
    path = Path(tiny_config.out) / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + second[:30] + bytes(10))
    train(tiny_config, resume=True)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4, 5, 6]
    expected, found = load_checkpoint(finished).model, load_checkpoint(tiny_config.out).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("waited", "said"), [(0.001, False), (0.05, True)])
def test_the_summary_says_when_loading_is_the_bottleneck(tmp_path: Path, waited: float, said: bool) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for _ in range(3):
        journal.add(StepResult(1.0, 1.0, 0.3, 0.0, 0.0, 0.1, 0.2), 0.1, waited)
    journal.write(step=3, epoch=0, lr=0.1)
    assert ("100 ms per step after 50 ms of waiting for its batch" in journal.summary()) == said
    assert ("100 ms per step, lr 0.1" in journal.summary()) != said
