"""`bench step`: every plan computes the published step, and a wrong one isn't timed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mrcn_fast import cli
from mrcn_fast.autograd import BlockFunction
from mrcn_fast.benchmark.results import AS_PUBLISHED
from mrcn_fast.benchmark.suites import training_step
from mrcn_fast.benchmark.suites.baselines import LoopedCQC
from mrcn_fast.benchmark.suites.training_step import ADDITIONS, ConcatenatedSets, Plan, Step, plans
from mrcn_fast.reid.models.blocks import BlockOutput, RestitutionCompensation
from mrcn_fast.reid.training.config import TrainConfig
from mrcn_fast.reid.training.fast import FastStep
from mrcn_fast.reid.training.step import TrainingStep

# Not 32 x 16 pixels: see SIZE in test_devices.py.
SMALL = {"depth": 18, "identities": 2, "images": 2, "height": 64, "width": 32}


def test_one_thing_is_added_at_a_time() -> None:
    on_cpu, on_gpu = plans("mrcn", "cpu"), plans("mrcn", "cuda")
    assert on_cpu[0] == Plan(AS_PUBLISHED, frozenset())
    for before, after in itertools.pairwise(on_gpu):
        assert before.added < after.added and after.added - before.added == {after.name.removeprefix("+ ")}
    names = [plan.name for plan in on_gpu]
    assert [name for name in names if name != "+ CUDA graph"] == [plan.name for plan in on_cpu]
    assert names[-2:] == ["+ CUDA graph", "+ compiled trunk"]


def test_a_plan_is_judged_by_what_it_rounds_to(monkeypatch: pytest.MonkeyPatch) -> None:
    published, *_, last = plans("mrcn", "cuda")
    assert {published.precision("cpu"), last.precision("cpu")} == {"32", "bf16"}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert {published.precision("cuda"), last.precision("cuda")} == {"tf32", "bf16"}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert published.precision("cuda") == "32"


def test_a_step_has_what_its_plan_says() -> None:
    config = TrainConfig(data="", model="mrcn", **SMALL)  # type: ignore[arg-type]
    published = Step(config, Plan(AS_PUBLISHED, frozenset()), "cpu")
    (block,) = published.model.blocks
    assert isinstance(block, ConcatenatedSets) and block.backend == "reference"
    assert isinstance(published.loss.cqc, LoopedCQC)
    ours = Step(
        config, Plan("all", frozenset(("fused block", "concat", "fused CQC", "channels_last"))), "cpu"
    )
    (block,) = ours.model.blocks
    assert type(block) is RestitutionCompensation and block.backend is None
    assert not isinstance(ours.loss.cqc, LoopedCQC)
    assert ours.images[0].is_contiguous(memory_format=torch.channels_last)
    for name, tensor in published.model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name])


def test_each_model_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # To compile a ResNet takes minutes.
    fewer = {model: tuple(n for n in names if n != "compiled trunk") for model, names in ADDITIONS.items()}
    monkeypatch.setattr(training_step, "ADDITIONS", fewer)
    file = tmp_path / "results" / "steps.jsonl"
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    assert cli.main(["bench", "step", *words, "--seconds", "0", "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    baseline, mrcn = map(json.loads, file.read_text().splitlines())
    assert (baseline["case"], mrcn["case"]) == ("step baseline 2x2 64x32", "step mrcn 2x2 64x32")
    for line, model in ((baseline, "baseline"), (mrcn, "mrcn")):
        names = [plan.name for plan in plans(model, "cpu")]  # type: ignore[arg-type]
        assert list(line["ms"]) == list(line["ratios"]) == names
        assert line["ratios"][AS_PUBLISHED] == 1
        assert all(error < 2e-2 for error in line["first_loss_error"].values())
        assert all(f"| {name} |" in printed for name in names)
    assert not baseline["block_share"] and set(mrcn["block_share"]) == set(mrcn["ms"])
    assert cli.main(["bench", "show", "--table", str(file)]) == 0
    assert capsys.readouterr().out == printed


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(self: RestitutionCompensation, visible: torch.Tensor, infrared: torch.Tensor) -> BlockOutput:
        return BlockOutput(0.5 * self(visible, infrared, concat=True))

    monkeypatch.setattr(RestitutionCompensation, "first", halved)
    with pytest.raises(RuntimeError, match=r"\+ concat: the first loss is .*, the published step's is"):
        training_step.measure_steps(TrainConfig(data="", model="mrcn", **SMALL), seconds=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros_like, "plugs is 0 long"),
        (lambda g: None if g.dim() < 4 else g, "plugs is 0 long"),
        (lambda g: g * float("nan"), "trunk is nan long"),
    ],
    ids=["zeros", "none", "nan"],
)
def test_a_step_with_wrong_gradients_is_not_timed(
    wrong: Callable[[torch.Tensor], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = BlockFunction.backward

    def spoiled(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        return tuple(None if g is None else wrong(g) for g in backward(ctx, *gradients))

    monkeypatch.setattr(BlockFunction, "backward", staticmethod(spoiled))
    with pytest.raises(RuntimeError, match=rf"\+ fused block: the gradient of the {message}"):
        training_step.measure_steps(TrainConfig(data="", model="mrcn", **SMALL), seconds=0)  # type: ignore[arg-type]


def test_a_step_is_the_trainers_own() -> None:
    config = TrainConfig(data="", model="mrcn", **SMALL)  # type: ignore[arg-type]
    for plan in plans("mrcn", "cpu")[:-1]:
        step = Step(config, plan, "cpu")
        kind = FastStep if "fused optimizer" in plan.added else TrainingStep
        assert type(step.training) is kind
        known = step.training.config
        precision = "bf16-mixed" if "bf16" in plan.added else "32-true"
        assert (known.precision, known.channels_last) == (precision, "channels_last" in plan.added)
        assert step.training.optimizer.param_groups[0]["fused"] is (True if kind is FastStep else None)


def test_a_step_that_fails_is_named_and_the_others_are_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_step, "ADDITIONS", {"mrcn": ("fused block", "compiled trunk")})

    def no_compiler(*_: object, **__: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "forward", no_compiler))
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    file = tmp_path / "steps.jsonl"
    assert cli.main(["bench", "step", "--model=mrcn", *words, "--seconds=0", f"--out={file}"]) == 0
    line = json.loads(file.read_text())
    assert list(line["ms"]) == [AS_PUBLISHED, "+ fused block"]
    assert line["failed"] == {"+ compiled trunk": "OSError: no compiler"}
    assert "+ compiled trunk failed: OSError: no compiler" in capsys.readouterr().out


STEP_WITHOUT_DEPTH = (
    '{"case": "a", "date": "2026", "torch": "2", "ratios": {}, "ms": {"as published": [1, 1, 1]}}\n'
)


@pytest.mark.parametrize("content", ["", "nothing of ours\n", STEP_WITHOUT_DEPTH])
def test_a_file_without_steps(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    assert cli.main(["bench", "show", "--table", str(file)]) == 2
    assert f"{file}: expected result lines, as --out writes them" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_message_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", "--device", "cuda"]) == 2
    assert "nothing to measure: --device cuda: there is no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "mps", "tpu", "cuda:x"])
def test_a_device_that_nothing_is_measured_on_is_refused(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for rest in (["step"], ["loader", "tree"], ["kernels"], ["host"]):
        assert cli.main(["bench", *rest, "--device", device]) == 2
        assert f"got --device {device}, expected cpu, cuda or cuda:N" in capsys.readouterr().err
