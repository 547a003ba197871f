"""Parts of the caller's own: public names, networks, losses, optimizers, callbacks, and the examples."""

from __future__ import annotations

import dataclasses
import doctest
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mrcn_fast
from mrcn_fast import cli, convert, reid
from mrcn_fast.block import Modality
from mrcn_fast.reid import (
    Callback,
    LossParts,
    ReIDLoss,
    ReIDModel,
    StagedTrunk,
    TrainConfig,
    Trainer,
    TrainingOutput,
    load_checkpoint,
    make_optimizer,
    score_checkpoint,
    without_decay,
)
from mrcn_fast.reid.training.checkpoint import CheckpointError
from mrcn_fast.reid.training.config import ConfigError
from tests.reid.conftest import quiet

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 4


class Small(nn.Module):
    """A network of two sets with the least that training and scoring need."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stems = nn.ModuleDict({name: nn.Conv2d(3, 8, 4, 4) for name in ("visible", "infrared")})
        self.classifier = nn.Linear(8, CLASSES)
        self.register_buffer("nothing", torch.empty(0))

    def features(self, images: Tensor, modality: str) -> Tensor:
        means: Tensor = self.stems[modality](images).mean(dim=(2, 3))
        return means

    def forward(self, visible: Tensor, infrared: Tensor) -> TrainingOutput:
        pooled = torch.cat((self.features(visible, "visible"), self.features(infrared, "infrared")))
        return TrainingOutput(pooled[None], self.classifier(pooled)[None])

    def extract(self, images: Tensor, modality: Modality) -> Tensor:
        return F.normalize(self.features(images, modality))


class Other(Small):
    pass


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=0.004)


def logits_alone(output: TrainingOutput, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[0], labels.repeat(2))


@pytest.fixture
def config(tiny_config: TrainConfig, tiny_regdb: Path) -> TrainConfig:
    return dataclasses.replace(tiny_config, data=str(tiny_regdb), dataset="regdb")


def same(found: nn.Module, expected: nn.Module) -> bool:
    pairs = zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_public_names_are_those_of_the_table() -> None:
    assert sorted(reid.__all__) == sorted(reid._PLACES)
    assert set(reid.__all__) <= set(dir(reid))
    with pytest.raises(AttributeError, match="nonsense"):
        reid.nonsense  # noqa: B018


@pytest.mark.parametrize("name", reid.__all__)
def test_a_public_name_has_an_example_that_runs(
    name: str, tiny_regdb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "regdb").symlink_to(tiny_regdb)
    monkeypatch.chdir(tmp_path)
    public = {known: getattr(reid, known) for known in reid.__all__}
    names = public | {"torch": torch, "nn": nn, "Tensor": Tensor, "mrcn_fast": mrcn_fast}
    (test,) = doctest.DocTestFinder(recurse=False).find(public[name], name, globs=names)
    assert len(test.examples) > 0
    lines: list[str] = []
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=lines.append).failed == 0, lines


def test_importing_needs_torch_alone_and_says_what_is_missing() -> None:
    script = """
import sys
for name in ("lightning_fabric", "pydantic", "PIL", "scipy", "rich", "sklearn", "matplotlib", "filelock"):
    sys.modules[name] = None
import mrcn_fast, mrcn_fast.convert, mrcn_fast.reid
try:
    mrcn_fast.reid.Trainer
except ModuleNotFoundError as error:
    print(error)
"""
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "mrcn_fast.reid.Trainer needs the packages of [reid]" in made.stdout
    assert "pip install 'mrcn-fast[reid]'" in made.stdout


def test_a_network_of_ones_own_trains_goes_on_and_is_scored(config: TrainConfig) -> None:
    whole = Trainer(dataclasses.replace(config, out=f"{config.out}-whole"), model=Small(), optimizer=adamw)
    whole.fit(progress=quiet())
    begun = Trainer(dataclasses.replace(config, steps=2), model=Small(), optimizer=adamw)
    path = begun.fit(progress=quiet())
    checkpoint = load_checkpoint(path)
    assert checkpoint.parts == {"model": "Small", "optimizer": "AdamW"}
    resumed = Trainer(config, model=Small(), optimizer=adamw)
    resumed.fit(resume=True, progress=quiet())
    assert same(resumed.model, whole.model)
    assert not same(resumed.model, begun.model)

    result = score_checkpoint(path, config.data, model=Small(), accelerator="cpu", progress=quiet())
    direct = resumed.model.extract(torch.rand(2, 3, 32, 16), "visible")
    assert direct.shape == (2, 8)
    assert 0 < result["searches"]["visible-to-infrared"]["mean"]["mAP"] <= 1
    assert result["searches"]["visible-to-infrared"]["pairings"] == {}


def test_a_run_with_own_parts_is_not_continued_without_them(config: TrainConfig, capsys: Any) -> None:
    config = dataclasses.replace(config, steps=1)
    path = Trainer(config, model=Small(), loss=logits_alone).fit(progress=quiet())
    for parts, found in (
        ({}, "the library's own parts"),
        ({"model": Small()}, "the model Small"),
        ({"model": Other(), "loss": logits_alone}, "the model Other and the loss logits_alone"),
    ):
        with pytest.raises(CheckpointError) as error:
            Trainer(config, **parts).fit(resume=True, progress=quiet())
        assert f"expected the model Small and the loss logits_alone, found {found}." in str(error.value)
        assert "Trainer(config, model=..., loss=...)" in str(error.value)
    assert cli.main(["test", "--checkpoint", str(path), "--data", config.data, "--accelerator", "cpu"]) == 2
    assert "network of its caller's own (Small)" in capsys.readouterr().err
    wide = Small()
    wide.classifier = nn.Linear(8, CLASSES + 1)
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        score_checkpoint(path, config.data, model=wide, accelerator="cpu", progress=quiet())


def test_a_library_run_takes_no_network(finished: Path, tiny_tree: Path) -> None:
    with pytest.raises(CheckpointError, match="give no model"):
        score_checkpoint(finished, tiny_tree, model=Small(), accelerator="cpu", progress=quiet())


class Counting(torch.optim.SGD):
    """SGD that counts its steps in its groups, as Prodigy and schedule-free optimizers do."""

    def __init__(self, params: Any, momentum: float) -> None:
        super().__init__(params, lr=0.01, momentum=momentum)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] += 1
        return super().step(closure)


def test_an_optimizer_whose_groups_change_goes_on(config: TrainConfig) -> None:
    def counting(momentum: float) -> Any:
        return lambda network: Counting(network.parameters(), momentum)

    begun = dataclasses.replace(config, steps=2)
    Trainer(begun, model=Small(), optimizer=counting(0.9)).fit(progress=quiet())
    with pytest.raises(CheckpointError, match=r"param_groups\[0\]\.momentum=0\.9, expected 0\.5"):
        Trainer(config, model=Small(), optimizer=counting(0.5)).fit(resume=True, progress=quiet())
    resumed = Trainer(config, model=Small(), optimizer=counting(0.9))
    resumed.fit(resume=True, progress=quiet())
    assert resumed.optimizer.param_groups[0]["k"] == resumed.step_count == 6


def test_an_own_optimizer_follows_the_schedule_in_proportion(config: TrainConfig) -> None:
    trainer = Trainer(dataclasses.replace(config, warmup_lr=0.005), model=Small(), optimizer=adamw)
    rates: list[float] = []

    class Watch(Callback):
        def on_step_end(self, trainer: Any, batch: Any, result: Any) -> None:
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer.fabric._callbacks = [Watch()]
    trainer.fit(progress=quiet())
    assert rates == pytest.approx([0.001] * 3 + [0.004] * 3)


def test_callbacks_are_called_in_order(config: TrainConfig) -> None:
    called: list[str] = []

    class Watch(Callback):
        def on_fit_start(self, trainer: Any) -> None:
            called.append("start")

        def on_step_end(self, trainer: Any, batch: Any, result: Any) -> None:
            called.append(f"step {trainer.step_count} of {len(batch.labels)}")

        def on_checkpoint(self, trainer: Any, path: Path) -> None:
            assert path.exists()
            called.append("checkpoint")

        def on_fit_end(self, trainer: Any) -> None:
            called.append("end")

    Trainer(dataclasses.replace(config, steps=2), model=Small(), callbacks=[Watch(), object()]).fit(
        progress=quiet()
    )
    assert called == ["start", "step 1 of 4", "step 2 of 4", "checkpoint", "end"]


def test_a_scalar_loss_and_a_loss_of_parts(config: TrainConfig) -> None:
    def parts(output: TrainingOutput, labels: Tensor) -> LossParts:
        total = logits_alone(output, labels)
        return LossParts(total, total, *torch.zeros(3))

    lines = []
    for name, loss in (("scalar", logits_alone), ("parts", parts)):
        own = dataclasses.replace(config, steps=2, out=f"{config.out}-{name}")
        trainer = Trainer(own, model=Small(), loss=loss)
        trainer.fit(progress=quiet())
        lines.append(trainer.journal.lines[-1])
    assert lines[0]["loss"] == lines[1]["loss"] == lines[1]["identity"] > 0
    assert lines[0]["identity"] == 0


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": nn.Linear(2, 2)}, TypeError, "extract"),
    ({"loss": nn.Linear(2, 2)}, ValueError, "without parameters and buffers"),
    ({"loss": "triplet"}, TypeError, "expected a function of the network's output"),
    ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1)}, TypeError, "lambda network"),
    ({"optimizer": lambda network: None}, TypeError, "gave NoneType"),
]


@pytest.mark.parametrize(("parts", "kind", "message"), REFUSED)
def test_parts_that_do_not_fit_are_refused(
    config: TrainConfig, parts: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        Trainer(config, **parts)


def test_settings_that_an_own_part_makes_useless_are_refused(config: TrainConfig, resnet18: Path) -> None:
    for values in ({"weights": str(resnet18)}, {"backend": "reference"}):
        with pytest.raises(ConfigError, match=f"got {next(iter(values))}=.*set it in the network"):
            Trainer(dataclasses.replace(config, **values), model=Small())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"lr=0\.0"):
        Trainer(dataclasses.replace(config, lr=0.0), optimizer=adamw)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda p, x: (p, x), "gave tuple in training"),
        (lambda p, x: TrainingOutput(p, x), r"pooled\[None\]"),
        (lambda p, x: TrainingOutput(p[None, 1:], x[None, 1:]), "for 4 pairs"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(config: TrainConfig, output: Any, message: str) -> None:
    class Wrong(Small):
        def forward(self, visible: Tensor, infrared: Tensor) -> TrainingOutput:
            found = super().forward(visible, infrared)
            return output(found.pooled[0], found.logits[0])

    trainer = Trainer(config, model=Wrong())
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.step(next(iter(trainer.batches.of(0))))


def test_labels_of_both_modalities_in_one_are_refused() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    both = labels.repeat(2)
    six = TrainingOutput(torch.rand(1, 24, 8), torch.rand(1, 24, 2))
    for call in (
        lambda: ReIDLoss()(six, both),
        lambda: ReIDLoss()(TrainingOutput(six.pooled[:, :8], six.logits[:, :8]), both),
        lambda: mrcn_fast.cqc_loss(six.pooled[0], both),
        lambda: mrcn_fast.cqc_loss(six.pooled[0].chunk(6), both),
    ):
        with pytest.raises(ValueError, match="pass one modality's labels"):
            call()


def test_no_weight_decay_is_honoured_where_it_is_asked_for() -> None:
    with torch.device("meta"):
        model = ReIDModel(CLASSES, depth=18, stages=(0,))
    names = {id(p): name for name, p in model.named_parameters()}
    plain = make_optimizer(model, TrainConfig(data=""))
    assert {group["weight_decay"] for group in plain.param_groups} == {5e-4}
    chosen = make_optimizer(model, TrainConfig(data="", selective_decay=True))
    left_out = {
        names[id(p)] for group in chosen.param_groups if not group["weight_decay"] for p in group["params"]
    }
    stacked = {f"plugs.0.{name}" for name in model.blocks[0].no_weight_decay()}
    assert without_decay(model) == stacked <= left_out
    assert {name for name in left_out - stacked if model.get_parameter(name).dim() > 1} == set()
    assert "plugs.0.gate.fc1_weight" not in left_out and "trunk.visible.bn1.weight" in left_out
    for optimizer in (plain, chosen):
        of_scale = {group["scale"]: 0 for group in optimizer.param_groups}
        for group in optimizer.param_groups:
            of_scale[group["scale"]] += len(group["params"])
        assert of_scale == {1.0: 2, 0.1: len(names) - 3}  # the neck's bias doesn't train


def test_a_run_with_selective_decay_goes_on(config: TrainConfig) -> None:
    config = dataclasses.replace(config, selective_decay=True, steps=1)
    Trainer(config).fit(progress=quiet())
    trainer = Trainer(dataclasses.replace(config, steps=2))
    trainer.fit(resume=True, progress=quiet())
    assert trainer.step_count == 2


def test_the_gates_of_a_network_show_their_attention() -> None:
    model = ReIDModel(CLASSES, depth=18, stages=(0,))
    (block,) = model.blocks
    assert isinstance(block, mrcn_fast.MRCNBlock)
    seen: list[Tensor] = []
    handle = block.gate.register_forward_hook(lambda gate, arguments, made: seen.append(made))
    visible, infrared = torch.rand(2, 3, 3, 32, 16)
    model(visible, infrared)
    handle.remove()
    maps = model.trunk.stem(visible, "visible"), model.trunk.stem(infrared, "infrared")
    assert [attention.shape for attention in seen] == [(3, 64)] * 4
    for found, expected in zip(seen, block.attention(*maps), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_two_stream_resnet_of_agws_layout_loads_by_name() -> None:
    model, source = (ReIDModel(CLASSES, depth=18, stages=(0,)) for _ in range(2))
    state = {f"module.base_resnet.base.{name}": t for name, t in source.trunk.state_dict().items()}
    for theirs, modality in (("visible_module.visible", "visible"), ("thermal_module.thermal", "infrared")):
        own = getattr(source.trunk, modality).state_dict()
        state |= {f"module.{theirs}.{name}": tensor for name, tensor in own.items()}
    neck = cast(nn.Module, source.heads[0].neck)
    state |= {f"module.bottleneck.{name}": t for name, t in neck.state_dict().items()}
    found = convert.load_by_name(model, state, optional=("plugs.", "heads.0.classifier."))
    assert same(model.trunk, source.trunk)
    assert all(name.startswith(("plugs.0.", "heads.0.classifier.")) for name in found.missing)
    assert len(found.missing) == 7
    assert {name.rpartition("base.")[2].partition(".")[0] for name in found.unused} == {"visible", "infrared"}


def test_a_trunk_of_ones_own_has_its_stages() -> None:
    stages = [nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 48, 2, 2)]
    trunk = StagedTrunk(stages, channels=[32, 48])
    model = ReIDModel(CLASSES, trunk=trunk, stages=(0, 1)).eval()
    images = torch.rand(2, 3, 32, 16)
    assert model.extract(images, "infrared").shape == (2, 96)
    assert torch.equal(trunk.visible.weight, trunk.infrared.weight)  # type: ignore[arg-type]
    assert trunk.visible is not trunk.infrared
    torch.testing.assert_close(
        trunk.layers(trunk.stem(images, "visible"), 1, 1), stages[1](stages[0](images)), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="expected stages from 0 to 1 of the trunk"):
        ReIDModel(CLASSES, trunk=trunk, stages=(2,))
    with pytest.raises(ValueError, match="expected a number for each stage"):
        StagedTrunk(stages, channels=[32])


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = (ROOT / "docs" / "how-to" / "own-parts.md").read_text().split("```python\n")[1:]
    names: dict[str, object] = {}
    assert len(blocks) > 4
    for block in blocks:
        exec(block.partition("```")[0], names)
