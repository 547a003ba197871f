"""A hundred bad calls, of the command line and of Python, and the message that each gets.

The messages stand in tests/golden/bad_calls.txt. After a change of one, write the file anew and read what
changed as the user who made the mistake:

    MRCN_FAST_REWRITE_GOLDEN=1 python -m pytest tests/reid/test_bad_calls.py
"""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import mrcn_fast
from mrcn_fast import cli
from mrcn_fast.reid.data import write_sysu
from mrcn_fast.reid.demo import DemoConfig
from mrcn_fast.reid.evaluation import reranking, scoring
from mrcn_fast.reid.evaluation import scores as evaluation
from mrcn_fast.reid.models import resnet
from mrcn_fast.reid.models.network import ReIDModel, TrainingOutput
from mrcn_fast.reid.paper import recipes
from mrcn_fast.reid.paper.figures import make_figures
from mrcn_fast.reid.paper.tables import run_table
from mrcn_fast.reid.training import losses
from mrcn_fast.reid.training.config import TrainConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "bad_calls.txt"

BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)
# Files that the calls name, in a folder of their own.
FILES: dict[str, bytes] = {
    "word.yaml": b"lr: abc\n",
    "float.yaml": b"height: 48.5\n",
    "truth.yaml": b"flip: true\n",
    "text.yaml": b'epochs: "3"\n',
    "scalar.yaml": b"stages: 0\n",
    "range.yaml": b"stages: [0, 7]\n",
    "nan.yaml": b"lr: .nan\n",
    "unknown.yaml": b"warmup_epoch: 3\n",
    "keys.yaml": b"1: 2\n",
    "twice.yaml": b"lr: 0.1\nlr: 0.2\n",
    "extends.yaml": b"extends: 7\n",
    "itself.yaml": b"extends: itself.yaml\n",
    "list.yaml": b"- 1\n",
    "one.yaml": b"abc\n",
    "empty.yaml": b"",
    "broken.yaml": b"a: [\n",
    "utf16.yaml": "lr: 0.1\n".encode("utf-16"),
    "binary.yaml": bytes(range(1, 256)),
    "huge.yaml": b"#" * 100_000,
    "deep.yaml": b"[" * 20_000,
    "bomb.yaml": BOMB.encode(),
    "self.yaml": b"milestones: &a [*a]\n",
    "tag.yaml": b"a: !!python/object/apply:os.system ['true']\n",
    "two.yaml": b"---\nlr: 0.1\n---\nlr: 0.2\n",
    "list.json": b"[1, 2]",
    "deep.json": b"[" * 200_000,
    "other.json": b'{"table": "2"}',
    "text.json": b"nothing",
    "lines.jsonl": b'{"case": "a"}\n',
    "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "page.pth": b"<!DOCTYPE html><html></html>",
    "empty.pth": b"",
    "cut.pth": b"PK\x03\x04cut",
    "file": b"a file",
}

TRAIN = "train --data {tree} --out {out}"
TEST = "test --checkpoint {run} --data {tree}"
COMMANDS = [
    "trian",
    "--colour train",
    "version",
    "-v",
    "--verison",
    "--traceback",
    "info extra",
    "info --verbose",
    "train",
    "train --data",
    "train --data=",
    "train --data {absent} --out {out}",
    f"{TRAIN} extra",
    f"{TRAIN} --colour red",
    f"{TRAIN} --learning-rate 0.1",
    f"{TRAIN} --epoch 3",
    f"{TRAIN} --ident 4",
    f"{TRAIN} --batch-size 16",
    f"{TRAIN} --lambda2 1.2",
    f"{TRAIN} --skip",
    f"{TRAIN} -lr 0.1",
    f"{TRAIN} --epochs three",
    f"{TRAIN} --lr 0,1",
    f"{TRAIN} --recipe",
    f"{TRAIN} --dataset SYSU",
    f"{TRAIN} --dataset regdb",
    f"{TRAIN} --recipe regdb-mrcn",
    f"{TRAIN} --precision bf16",
    f"{TRAIN} --accelerator gpu0",
    "train --data {files} --out {out}",
    "train --data {file} --out {out}",
    f"{TRAIN} --depth 34",
    f"{TRAIN} --depth",
    f"{TRAIN} --height 48.5",
    f"{TRAIN} --height 7",
    f"{TRAIN} --height 1000000000",
    f"{TRAIN} --height 99999999999999999999999",
    f"{TRAIN} --lr abc",
    f"{TRAIN} --lr nan",
    f"{TRAIN} --lr -1e-3",
    f"{TRAIN} --momentum 2",
    f"{TRAIN} --flip yes",
    f"{TRAIN} --skip-unreadable maybe",
    f"{TRAIN} --stages 0,7",
    f"{TRAIN} --stages 2,1",
    f"{TRAIN} --stages []",
    f"{TRAIN} --milestones soon",
    f"{TRAIN} --milestones '&a [*a]'",
    f"{TRAIN} --parts 1000",
    f"{TRAIN} --padding 5000",
    f"{TRAIN} --images 1000000",
    f"{TRAIN} --identities 1",
    f"{TRAIN} --identities 99 --depth 18 --height 32 --width 16 --accelerator cpu",
    f"{TRAIN} --steps 0",
    f"{TRAIN} --seed -1",
    f"{TRAIN} --seed 18446744073709551616",
    f"{TRAIN} --workers -1",
    f"{TRAIN} --model mrcnn",
    f"{TRAIN} --gate sse",
    f"{TRAIN} --backend abacus",
    f"{TRAIN} --precision 16",
    f"{TRAIN} --split 2",
    f"{TRAIN} --cache {{file}}",
    f"{TRAIN} --weights {{absent}}",
    f"{TRAIN} --init {{absent}}",
    f"{TRAIN} --init {{tree}}",
    f"{TRAIN} --init {{run}} --weights {{file}}",
    f"{TRAIN} --init {{files}}/page.pth --depth 18 --height 32 --width 16 --identities 2",
    f"{TRAIN} --init {{run}} --height 32 --width 16 --identities 2 --accelerator cpu",
    f"{TRAIN} --clip-norm 0",
    f"{TRAIN} --freeze stem,layer5",
    f"{TRAIN} --validate-every 0",
    f"{TRAIN} --resume --overwrite",
    "train --resume {absent}",
    "train --resume=",
    "train --resume {run} --out {out}",
    "train --resume {run} --lr 0.5",
    "train --data {tree} --out {file}",
    "train --data {tree} --out {file}/below",
    "train --data {tree} --out {run}",
    f"{TRAIN} --recipe regdb-mrcnn",
    f"{TRAIN} --config {{absent}}",
    *(f"{TRAIN} --recipe {{files}}/{name}" for name in FILES if name.endswith(".yaml")),
    *(
        f"{TRAIN} --depth 18 --height 32 --width 16 --identities 2 --weights {{files}}/{name}"
        for name in FILES
        if name.endswith(".pth")
    ),
    "test --data {tree}",
    "test --checkpoint {absent} --data {tree}",
    "test --checkpoint {run} --data {absent}",
    "test --checkpoint {files}/lfs.pth --data {tree}",
    "test --ckpt {run} --data {tree}",
    "test run.pth tree",
    f"{TEST} --mode al",
    f"{TEST} --mode outdoor",
    f"{TEST} --shots 0",
    f"{TEST} --draw official",
    f"{TEST} --draw lottery",
    f"{TEST} --trials 0",
    f"{TEST} --trials 1000000000",
    f"{TEST} --rerank --k1 500",
    f"{TEST} --rerank --k1 5 --k2 9",
    f"{TEST} --rerank --k1 0",
    f"{TEST} --k1 5",
    f"{TEST} --batch-size 0",
    f"{TEST} --workers -1",
    f"{TEST} --cache {{file}}",
    f"{TEST} --split 2",
    f"{TEST} --backend abacus",
    "table",
    "table all --synthetic",
    "table --synthetic",
    "table 2 --data {tree} {tree}",
    "table 2 --synthetic --epoch 3",
    "table 5 --data {tree}",
    "table 2",
    "table 2 --data {tree} --synthetic",
    "table 2 --data {absent}",
    "table 2 --data {tree} --splits 0",
    "table 2 --data {tree} --splits 11",
    "table 2 --data {tree} --trials 0",
    "table 2 --data {tree} --draw lottery",
    "table 2 --data {tree} --out {file}",
    "table 2 --data {tree} --out {out} --split 2",
    "table 2 --data {tree} --out {out} --parts 1000",
    "table 2 --synthetic --out {out} --height 7",
    *(f"table 2 --from {{files}}/{name}" for name in FILES if name.endswith(".json")),
    "table 2 --from {absent}",
    "figures --data {tree}",
    "figures --checkpoints {absent} --data {tree} --out {out}",
    "figures --checkpoints {run} --data {tree} --out {file}",
    "figures --checkpoints {run} --data {tree} --out {out} --people 0",
    "figures --checkpoints {run} --data {tree} --out {out} --seed 4294967296",
    "figures --checkpoints {run} --data {tree} --out {out} --query-paths nobody.jpg",
    "synth tree",
    "synth --out {out} --layout regdb --test-identities 3",
    "synth",
    "synth --out {out} --layout market",
    "synth --out {out} --identities 2",
    "synth --out {out} --identities many",
    "synth --out {out} --image-size 3",
    "synth --out {out} --image-size 8,8",
    "synth --out {out} --modality-gap nan",
    "synth --out {file}",
    "synth --out {run}",
    "synth --layout regdb --out {out} --splits 11",
    "synth --layout regdb --out {out} --images-per-camera 3",
    "synth --layout sysu --out {tree}",
    "demo --steps 0",
    "demo --images 0",
    "demo --height 7",
    "demo --identities 12",
    "demo --out {file}",
    "study",
    "study adam",
    "study cqc --rows unit",
    "study cqc --seeds -1",
    "study cqc --identities 6",
    "study cqc --out {file}",
    "table 2 --synthetic --seeds 0",
    "bench kernel",
    "bench kernels --list yes",
    "extract --checkpoint {run} --images {absent} --modality visible --out {out}.safetensors",
    "extract --checkpoint {run} --images {files} --modality visible --out {out}.safetensors",
    "extract --checkpoint {run} --images {files}/one.yaml --modality visible --out {out}.safetensors",
    "extract --checkpoint {run} --images {tree} --modality thermal --out {out}.safetensors",
    "extract --checkpoint {run} --images {tree} --modality visible --out {out}",
    "search --query {tree} --gallery {tree}",
    "search --query {tree} --gallery {tree} --checkpoint {run}",
    "search --query {tree} --gallery {absent}.safetensors --checkpoint {run}",
    "search --query {tree} --gallery {tree} --checkpoint {run} --index {out}",
    "search --query {tree} --gallery {tree} --checkpoint {run} --json {file}",
    "search --query {tree} --gallery {tree} --memory 0",
    "score --features {file} --protocol regdb",
    "score --features {file} {file} --protocol regdb",
    "score --features {file} {file} --protocol market",
    "export --checkpoint {run} --modality visible --format keras --out {out}",
    "export --checkpoint {run} --modality visible --format torch --out {file}",
    "export --checkpoint {run} --modality visible --format onnx --out {out} --operations fused",
    "bench kernels --suite nothing",
    "bench kernels --device tpu",
    "bench kernels --dtype int8",
    "bench kernels --seconds -1",
    "bench kernels --workers 0",
    "bench kernels --only nothing-of-this-name",
    "bench kernels --out {files} --only 16x64",
    "bench show --table {absent}",
    "bench show --table {files}/lines.jsonl",
    "bench show --table {files}/text.json",
    "bench show --table {absent} --compare {absent} {absent}",
    "bench show --compare {absent}",
    "bench step --depth 34",
    "bench step --height 7",
    "bench step --out {files}",
    "bench scorer --seconds soon",
    "bench scorer --only nothing-of-this-name",
    "bench loader",
    "bench loader {absent}",
    "bench loader {tree} --workers -1",
    "bench loader {tree} --cache {file}",
]

CALLS = [
    'TrainConfig(data="tree", lr=nan)',
    'TrainConfig(data="tree", lr=inf)',
    'TrainConfig(data="tree", lr="0.1")',
    'TrainConfig(data="tree", momentum=-0.5)',
    'TrainConfig(data="tree", cqc_weight=-1)',
    'TrainConfig(data="tree", seed=2**64)',
    'TrainConfig(data="tree", height=10**9)',
    'TrainConfig(data="tree", height=48.5)',
    'TrainConfig(data="tree", height=True)',
    'TrainConfig(data="tree", model="mrcnn")',
    'TrainConfig(data="tree", precision=16)',
    'TrainConfig(data="tree", stages=0)',
    'TrainConfig(data="tree", stages=())',
    'TrainConfig(data="tree", milestones=[60, 20])',
    'TrainConfig(data="tree", out="")',
    'TrainConfig(data="tree", out="a\\0b")',
    "TrainConfig(data=7)",
    'TrainConfig(data="tree", skip_unreadable="yes")',
    "DemoConfig(rounds=0)",
    "load_recipe(7)",
    "rerank(torch.zeros(3, 4), torch.zeros(3, 4), k1=20)",
    "rerank(torch.zeros(3, 4), torch.zeros(3, 4), k1=2.5)",
    "rerank(torch.zeros(3, 4), torch.zeros(3, 5), k1=2)",
    "rerank(torch.full((3, 4), nan), torch.zeros(3, 4), k1=2)",
    'rerank([["a"]], [["b"]], k1=1)',
    "rerank(torch.zeros(3, 4), torch.zeros(3, 4), k1=2, k2=1, weight=nan)",
    'score([[1.0, nan]], [1], [1, 2], protocol="regdb")',
    "score([[1.0, 2.0]], [1], [1, 2])",
    'score([[1.0, 2.0]], [1], [1, 2], protocol="market")',
    'score([[1.0, 2.0]], ["ann"], [1, 2], protocol="regdb")',
    'score([[1.0, 2.0]], [1.5], [1, 2], protocol="regdb")',
    'score([[1.0, 2.0]], [1, 2], [1, 2], protocol="regdb")',
    'score([[1.0], [2.0, 3.0]], [1, 2], [1, 2], protocol="regdb")',
    'score([[1.0, 2.0]], [3], [1, 2], protocol="regdb")',
    'score([[1.0, 2.0]], [1], [1, 2], protocol="regdb", max_rank=10**9)',
    'skipped_images([1], [1], ["c1"], [2], "sysu")',
    "average([])",
    "average([1, 2])",
    "score_checkpoint(run, tree, batch_size=0)",
    'score_checkpoint(run, tree, mode="outdoor")',
    "make_figures([], tree)",
    "make_figures(run, tree)",
    'run_table("5", [tree])',
    'run_table("2", [tree], splits=0)',
    "write_sysu(out, image_size=32)",
    'write_sysu(out, identities="7")',
    "ReIDModel(0)",
    'ReIDModel(5, depth="18")',
    "ReIDModel(5, depth=34)",
    "ReIDModel(5, depth=18, stages=3)",
    'ReIDModel(5, depth=18, gate=["se"])',
    'ReIDModel(5, depth=18, backend="gpu")',
    "model(images, images[:1])",
    "model(images.byte(), images.byte())",
    "model(images.numpy(), images.numpy())",
    'model.extract(images, "rgb")',
    'ReIDLoss(cqc_reduction="none")',
    'ReIDLoss(cqc_features="raw")',
    "ReIDLoss(triplet_margin=nan)",
    "ReIDLoss()(output, torch.tensor([0, 1, 0, 1]))",
    "ReIDLoss()(output, torch.tensor([0, 9]))",
    "ReIDLoss()(output, torch.tensor([0.0, 1.0]))",
    "BatchHardTriplet()(torch.zeros(4, 3), torch.zeros(2))",
    "Trunk(34)",
    'Trunk(18).load_imagenet(files / "absent.pth")',
    # The block and the loss, whose checks stand in mrcn_fast itself.
    "MRCNBlock(0)",
    "MRCNBlock(8.0)",
    "MRCNBlock(8, reduction=0)",
    "MRCNBlock(8, eps=0)",
    "MRCNBlock(8, eps=nan)",
    'MRCNBlock(8, eps="1e-5")',
    'MRCNBlock(8, gate="sse")',
    'MRCNBlock(8, gate=["se"])',
    'MRCNBlock(8, backend="gpu")',
    'MRCNBlock(8, restitute_to="output")',
    "MRCNBlock(8)(maps, maps[:1])",
    "MRCNBlock(8)(maps[0], maps[0])",
    "MRCNBlock(4)(maps, maps)",
    "MRCNBlock(8)(maps.numpy(), maps.numpy())",
    "MRCNBlock(8)(maps.long(), maps.long())",
    "MRCNBlock(8)(maps[:, :, :1, :1], maps[:, :, :1, :1])",
    'MRCNBlock(8).restitute(maps, "rgb")',
    "SNRBlock(-1)",
    "SNRBlock(8)(maps[0])",
    "mrcn_block(maps, maps, torch.ones(8), torch.ones(8), [])",
    'CQCLoss(reduction="max")',
    "CQCLoss(margin=nan)",
    "cqc_loss(torch.zeros(12, 3), torch.tensor([0, 1, 0, 1]))",
    "cqc_loss(torch.zeros(12, 3), [0, 1])",
    "cqc_loss(torch.zeros(12, 3), torch.tensor([0.0, 1.0]))",
    "cqc_loss(torch.zeros(12, 3).long(), torch.tensor([0, 1]))",
    "cqc_loss([torch.zeros(2, 3)] * 5, torch.tensor([0, 1]))",
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_tree: Path, finished: Path) -> dict[str, Path]:
    """The paths that calls name in braces."""
    files = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (files / name).write_bytes(content)
    free = tmp_path_factory.mktemp("free")
    return {
        "tree": tiny_tree,
        "run": finished.parent,
        "files": files,
        "file": files / "file",
        "absent": free / "absent",
        "out": free / "out",
    }


def named(text: str, places: dict[str, Path]) -> str:
    """The text with the names of places instead of this machine's paths."""
    for name, place in sorted(places.items(), key=lambda item: -len(str(item[1]))):
        text = text.replace(str(place), f"{{{name}}}")
    return text


def command_line(line: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the command refuses these words."""
    words = shlex.split(line.format(**places))
    status = cli.main(words)
    printed = capsys.readouterr()
    assert status == 2, f"{line}: ended with {status}, after printing {printed.out}"
    assert "Traceback" not in printed.err, line
    assert not places["out"].exists(), f"{line}: was refused too late"
    # Without what is logged before.
    message = printed.err[printed.err.index("mrcn-fast") :]
    return f"$ mrcn-fast {line}\n{named(message.strip(), places)}\n"


def python_call(call: str, places: dict[str, Path]) -> str:
    """The type and message of the error that the call raises."""
    torch.manual_seed(0)
    known: dict[str, Any] = {
        **vars(mrcn_fast),
        **vars(evaluation),
        **vars(losses),
        **{name: str(place) for name, place in places.items()},
        "files": places["files"],
        "nan": math.nan,
        "inf": math.inf,
        "torch": torch,
        "TrainConfig": TrainConfig,
        "DemoConfig": DemoConfig,
        "load_recipe": recipes.load_recipe,
        "rerank": reranking.rerank,
        "score_checkpoint": scoring.score_checkpoint,
        "make_figures": make_figures,
        "run_table": run_table,
        "write_sysu": write_sysu,
        "ReIDModel": ReIDModel,
        "Trunk": resnet.Trunk,
        "maps": torch.zeros(2, 8, 4, 3),
        "images": torch.zeros(2, 3, 32, 16),
        "output": TrainingOutput(torch.zeros(1, 12, 4), torch.zeros(1, 12, 5)),
    }
    if "model" in call and "Model" not in call:
        known["model"] = ReIDModel(5, depth=18)
    refused = None
    try:
        eval(call, known)
    except Exception as error:  # which one is what the file says
        refused = error
    assert refused is not None, f"{call}: was not refused"
    assert not places["out"].exists(), f"{call}: was refused too late"
    return f">>> {call}\n{type(refused).__name__}: {named(str(refused), places)}\n"


def test_every_bad_call_gets_its_message(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100000")  # log lines in one piece
    found = [command_line(line, places, capsys) for line in COMMANDS]
    found += [python_call(call, places) for call in CALLS]
    assert len(found) >= 100
    text = "\n".join(found)
    if os.environ.get("MRCN_FAST_REWRITE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text.splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines()
    assert "weights_only" not in text
