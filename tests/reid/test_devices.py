"""Where a network computes: what is refused, and that the precision that is recorded is the one that ran."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mrcn_fast import cli
from mrcn_fast.benchmark.suites.training_step import Plan, Step
from mrcn_fast.dispatch import BackendError
from mrcn_fast.reid import demo
from mrcn_fast.reid.demo import DemoConfig, run_demo
from mrcn_fast.reid.devices import check_alone, check_device, open_fabric
from mrcn_fast.reid.evaluation.scoring import open_trained, score_checkpoint
from mrcn_fast.reid.kinds import Precision
from mrcn_fast.reid.paper.figures import make_figures
from mrcn_fast.reid.paper.tables import run_table
from mrcn_fast.reid.training.checkpoint import load_checkpoint
from mrcn_fast.reid.training.config import ConfigError, TrainConfig
from mrcn_fast.reid.training.trainer import Trainer
from tests.reid.conftest import TINY

# On maps of 4 x 2, as 32 x 16 pixels give, torch's bf16 convolution of stride 2 reads memory that is not its
# own where the processor has AMX (seen with torch 2.13: random NaN).
SIZE: dict[str, Any] = {"height": 64, "width": 32}
QUIET: dict[str, Any] = {"accelerator": "cpu", "progress": Progress(disable=True)}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


# What ran.


@pytest.fixture
def convolved() -> Iterator[set[torch.dtype]]:
    """The dtypes that convolutions gave since it was emptied."""
    found: set[torch.dtype] = set()

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            found.add(output.dtype)

    handle = register_module_forward_hook(note)
    yield found
    handle.remove()


@pytest.fixture(scope="module", params=["32-true", "bf16-mixed"])
def precision(request: pytest.FixtureRequest) -> Precision:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tiny_run: TrainConfig, precision: Precision, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of one step in this precision."""
    out = str(tmp_path_factory.mktemp("run"))
    config = dataclasses.replace(tiny_run, precision=precision, out=out, steps=1, **SIZE)
    return Trainer(config).fit(progress=Progress(disable=True))


def dtype(precision: Precision) -> torch.dtype:
    return {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}[precision]


def test_training_computes_in_the_precision_it_records(
    tiny_config: TrainConfig, precision: Precision, convolved: set[torch.dtype]
) -> None:
    config = dataclasses.replace(tiny_config, precision=precision, steps=1, **SIZE)
    path = Trainer(config).fit(progress=Progress(disable=True))
    assert convolved == {dtype(precision)}
    assert load_checkpoint(path).config.precision == precision


def test_scoring_computes_in_the_precision_it_records(
    checkpoint: Path, precision: Precision, tiny_tree: Path, convolved: set[torch.dtype], tmp_path: Path
) -> None:
    path = shutil.copy(checkpoint, tmp_path)
    result = score_checkpoint(path, tiny_tree, trials=1, **QUIET)
    assert convolved == {dtype(precision)}
    assert result["precision"] == precision
    # Asked for another one: it computes in that and records it.
    other: Precision = "bf16-mixed" if precision == "32-true" else "32-true"
    convolved.clear()
    result = score_checkpoint(path, tiny_tree, trials=1, precision=other, **QUIET)
    assert convolved == {dtype(other)}
    assert (result["precision"], result["config"]["precision"]) == (other, precision)


def test_figures_compute_in_the_precision_they_record(
    checkpoint: Path, precision: Precision, tiny_tree: Path, tmp_path: Path, convolved: set[torch.dtype]
) -> None:
    result = make_figures(
        [str(checkpoint)], str(tiny_tree), str(tmp_path), people=3, queries=2, initial=True, **QUIET
    )
    assert convolved == {dtype(precision)}
    assert {column["precision"] for column in result["columns"].values()} == {precision}


def test_a_tables_runs_compute_in_the_precision_they_record(
    tiny_tree: Path, tmp_path: Path, precision: Precision, convolved: set[torch.dtype]
) -> None:
    def configure(values: dict[str, Any]) -> TrainConfig:
        return TrainConfig(**(values | TINY | SIZE | {"steps": 1, "precision": precision}))

    table = run_table(
        "4",
        [tiny_tree],
        out=tmp_path,
        options={"trials": 1},
        configure=configure,
        progress=Progress(disable=True),
    )
    assert convolved == {dtype(precision)}
    scored = [json.loads(path.read_text()) for path in tmp_path.glob("*/test-*.json")]
    assert len(scored) == len(table["rows"]) == 3
    assert {result["precision"] for result in scored} == {precision}


def test_the_demo_computes_in_the_precision_of_its_runs(
    tmp_path: Path, convolved: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = demo._scaled

    def in_bf16(*arguments: Any) -> TrainConfig:
        return dataclasses.replace(scaled(*arguments), precision="bf16-mixed")

    monkeypatch.setattr(demo, "_scaled", in_bf16)
    sizes = {"identities": 16, "images": 2, **SIZE}
    steps = {"pretraining_identities": 16, "pretraining_steps": 1, "steps": 1, "rounds": 1}
    run_demo(DemoConfig(out=str(tmp_path), accelerator="cpu", **sizes, **steps))
    assert convolved == {torch.bfloat16}


@pytest.mark.parametrize("added", [(), ("bf16",)])
def test_a_measured_step_computes_in_the_precision_of_its_plan(
    added: tuple[str, ...], convolved: set[torch.dtype]
) -> None:
    size: dict[str, Any] = {"depth": 18, "identities": 2, "images": 2, **SIZE}
    step = Step(TrainConfig(data="", **size), Plan("a plan", frozenset(added)), "cpu")
    step()
    block = step.block()
    assert block is not None
    block()
    assert convolved == {torch.bfloat16 if added else torch.float32}


# What is refused.


@pytest.mark.parametrize(
    ("name", "value", "launcher"),
    [
        ("WORLD_SIZE", "2", "torchrun"),
        ("OMPI_COMM_WORLD_SIZE", "2", "mpirun"),
        ("WORLD_SIZE", "two", "torchrun"),
    ],
)
def test_one_process_of_several_is_refused_before_it_writes(
    name: str, value: str, launcher: str, tiny_config: TrainConfig, finished: Path, tiny_tree: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(name, value)
    cached = dataclasses.replace(tiny_config, cache=str(tmp_path / "cache"))
    works: list[Callable[[], object]] = [
        lambda: Trainer(cached),
        lambda: score_checkpoint(finished, tiny_tree, **QUIET),
        lambda: make_figures([str(finished)], str(tiny_tree), str(tmp_path / "figures"), **QUIET),
        lambda: run_demo(DemoConfig(out=str(tmp_path / "demo"))),
        lambda: run_table("4", [tiny_tree], out=tmp_path / "tables"),
    ]
    for work in works:
        with pytest.raises(ConfigError, match=rf"got {name}={value} .*expected 1: {launcher} started"):
            work()
    for words in (["table", "4", "--synthetic"], ["bench", "step"], ["bench", "loader", str(tiny_tree)]):
        assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_one_process_alone_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    check_alone()
    # A shell on a node that was allocated for several tasks, as fabric reads it.
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    check_alone()


def test_settings_of_fabric_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fabric would compute in it and the checkpoint would say 32-true.
    monkeypatch.setenv("LT_PRECISION", "bf16-mixed")
    with pytest.raises(ConfigError, match="got LT_PRECISION in the environment"):
        open_fabric("cpu", "32-true")


@without_gpu
@pytest.mark.parametrize("accelerator", ["cuda", "gpu", "mps", "tpu", "CUDA", ""])
def test_an_accelerator_that_is_not_here_is_refused(accelerator: str) -> None:
    with pytest.raises(ConfigError, match=rf"got accelerator='{accelerator}', expected auto or cpu: "):
        check_device(accelerator, "32-true")


@without_gpu
@pytest.mark.parametrize("command", ["train", "test", "figures", "table", "demo", "bench"])
def test_every_command_refuses_a_missing_accelerator_in_one_line(
    command: str, tiny_tree: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    data, accelerator = ["--data", str(tiny_tree)], ["--accelerator", "cuda"]
    given = {
        "train": [*data, *out, *accelerator],
        "test": ["--checkpoint", str(finished), *data, *accelerator],
        "figures": ["--checkpoints", str(finished), *data, *out, *accelerator],
        "table": ["4", *data, *out, *accelerator],
        "demo": [*out, *accelerator],
        "bench": ["step", "--device", "cuda"],
    }
    assert cli.main([command, *given[command]]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and "cuda" in errors[0]
    assert not (tmp_path / "out").exists()


@without_gpu
@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_float16_on_the_cpu_is_refused(tiny_config: TrainConfig, accelerator: str) -> None:
    # Fabric would compute in bf16-mixed, and the checkpoint would say 16-mixed.
    config = dataclasses.replace(tiny_config, precision="16-mixed", accelerator=accelerator)
    with pytest.raises(ConfigError, match=r"16-mixed.*on the CPU.*--precision bf16-mixed"):
        Trainer(config)


@without_gpu
def test_a_backend_that_cant_serve_is_refused_before_the_data_is_read(
    finished: Path, tiny_config: TrainConfig
) -> None:
    with pytest.raises(BackendError, match="backend 'triton' can't serve"):
        Trainer(dataclasses.replace(tiny_config, data="absent", backend="triton"))
    with pytest.raises(BackendError, match="backend 'triton' can't serve"):
        open_trained(finished, "absent", backend="triton", accelerator="cpu")
