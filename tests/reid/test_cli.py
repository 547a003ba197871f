"""The command line: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mrcn_fast
from mrcn_fast import cli
from mrcn_fast.cli import main
from mrcn_fast.flags import Flags

REID_PACKAGES = (
    "PIL", "docstring_parser", "lightning_fabric", "matplotlib", "numpy",
    "pydantic", "rich", "safetensors", "scipy", "sklearn", "yaml",
)  # fmt: skip

WITHOUT_REID = f"""
import importlib.machinery
import sys

find = importlib.machinery.PathFinder.find_spec

def absent(name, path=None, target=None):
    return None if name.split(".")[0] in {REID_PACKAGES} else find(name, path, target)

importlib.machinery.PathFinder.find_spec = absent
from mrcn_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_package_runs_as_the_command_does() -> None:
    command = [sys.executable, "-m", "mrcn_fast", "table", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: mrcn-fast table")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mrcn_fast {mrcn_fast.__version__}\n"


def run_without_reid(*arguments: str) -> subprocess.CompletedProcess[str]:
    """mrcn-fast in a process in which only torch and the standard library can be imported."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_REID, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_info_needs_nothing_but_torch() -> None:
    done = run_without_reid("info")
    assert done.returncode == 0, done.stderr
    assert f"mrcn_fast {mrcn_fast.__version__}" in done.stdout
    assert torch.__version__ in done.stdout
    for name, status in mrcn_fast.backends().items():
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith(name))
        assert ("not usable" in line) == (not status.usable)
        assert status.reason in line


def test_bench_of_kernels_needs_nothing_but_torch() -> None:
    done = run_without_reid("bench", "kernels", "--device", "cpu", "--seconds", "0.1", "--list")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    done = run_without_reid("bench", "kernels", "--device", "tpu")
    assert done.returncode == 2
    assert "got --device tpu, expected cpu, cuda or cuda:N" in done.stderr


def test_missing_packages_are_named() -> None:
    done = run_without_reid("train", "--data", "tree")
    assert done.returncode == 2
    assert "is not installed" in done.stderr
    assert "the packages of [reid]: pip install " in done.stderr
    assert "lightning-fabric>=" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in cli.COMMANDS)
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"mrcn-fast {command}" in capsys.readouterr().out


def test_every_flag_has_help_and_in_long_lists_a_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Flags] = []
    begin = Flags.__init__

    def noted(self: Flags, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Flags, "__init__", noted)
    for name in cli.COMMANDS:
        for words in [[name]] if name != "bench" else [[name, suite] for suite in cli.BENCHES]:
            made.clear()
            assert main([*words, "--help"]) == 0
            (flags,) = made
            assert flags._help_of.keys() == flags._default_of.keys()
            assert not [flag for flag, help in flags._help_of.items() if not help], words
            # A list of more flags than a screen shows is grouped; --help alone stands outside.
            assert len(flags._help_of) < 15 or len(flags._optionals._group_actions) == 1, words
    capsys.readouterr()


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The message on stderr with which mrcn-fast refuses these arguments."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr().err
    assert "Traceback" not in output
    return output


def test_wrong_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "got the command 'trian', expected one of info, synth" in refused(capsys, "trian")
    assert "data" in refused(capsys, "train")
    assert "depth" in refused(capsys, "train", "--data=x", "--depth=34")
    assert "expected an integer from 2" in refused(capsys, "train", "--data=x", "--identities=1")


def test_a_missing_tree_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "absent"
    output = refused(capsys, "train", "--data", tree, "--out", tmp_path / "run")
    assert str(tree) in output.replace("\n", "")
    assert "expected" in output
    assert not (tmp_path / "run").exists()


def test_a_wrong_checkpoint_is_named(
    tmp_path: Path, tiny_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content, found in (("absent.pth", None, "no such file"), ("bad.pth", b"x", "can't be read")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        output = refused(capsys, "test", "--checkpoint", tmp_path / name, "--data", tiny_tree)
        assert str(tmp_path / name) in output
        assert found in output


def test_an_unknown_backend_is_refused(
    tmp_path: Path, tiny_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = refused(
        capsys, "train", "--data", tiny_tree, "--out", tmp_path, "--depth=18", "--backend=abacus"
    )
    assert "abacus" in output
    assert "reference" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, and Triton serves it")
def test_the_message_says_why_a_backend_cant_serve(
    tmp_path: Path, tiny_tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRCN_FAST_BACKEND", "triton")
    size = ("--depth=18", "--height=32", "--width=16", "--identities=2", "--images=2", "--workers=0")
    output = refused(capsys, "train", "--data", tiny_tree, "--out", tmp_path, *size)
    assert "backend 'triton' can't serve this call" in output


def test_unreadable_images_are_named_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    flags = ["--identities=6", "--test-identities=2", "--images-per-camera=1", "--image-size=[32,16]"]
    assert main(["synth", "--out", str(tree), *flags]) == 0
    capsys.readouterr()
    for path in tree.glob("cam6/*/*.jpg"):
        path.write_bytes(b"not an image")
    given = [
        "--data", tree, "--out", tmp_path / "run", "--depth=18", "--height=32", "--width=16",
        "--identities=2", "--images=4", "--workers=1", "--accelerator=cpu", "--epochs=1", "--batches=1",
    ]  # fmt: skip
    output = refused(capsys, "train", *given, "--batches=20")
    assert str(tree / "cam6") in output
    # Camera 3 is infrared, too: without camera 6 every identity has both modalities.
    assert main(["train", *map(str, given), "--skip-unreadable", "--overwrite"]) == 0


@pytest.mark.parametrize("words", [["train"], ["test"], ["figures"], ["bench", "loader"], ["table"]])
def test_every_command_that_reads_images_can_leave_some_out(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*words, "--help"])
    output = capsys.readouterr().out
    # A table takes all flags of the training.
    assert any(flag in output for flag in ("--skip-unreadable", "--skip_unreadable", "mrcn-fast train"))


def test_an_error_in_the_library_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        raise KeyError("a defect")

    monkeypatch.setitem(cli.COMMANDS, "info", cli.Command("", broken))
    with pytest.raises(KeyError):
        main(["info"])


def test_traceback_shows_where_a_users_error_arose(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent"):
        main(["--traceback", "train", "--data", str(tmp_path / "absent")])


def test_an_interruption_is_reported_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", cli.Command("", interrupted))
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_synth_train_and_test_from_the_command_line(
    tmp_path: Path, tiny_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(
        f"data: {tiny_tree}\ndepth: 18\nheight: 32\nwidth: 16\nidentities: 3\nimages: 1\nworkers: 0\n"
        "batches: 2\nepochs: 1\nmilestones: [1]\naccelerator: cpu\n"
    )
    out = tmp_path / "run"
    assert main(["train", "--config", str(values), "--out", str(out), "--identities", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "checkpoint.pth")
    assert (
        main(["test", "--checkpoint", str(out), "--data", str(tiny_tree), "--trials=2", "--accelerator=cpu"])
        == 0
    )
    output = capsys.readouterr().out
    assert "sysu-mm01, split 1, all-search, single-shot, random draw, 2 trials, 12 of 12 queries" in output
    assert all(name in output for name in ("Rank-1", "Rank-10", "Rank-20", "mAP", "mINP", "±"))


@pytest.mark.parametrize(
    ("layout", "flags", "name"),
    [
        ("sysu", ["--identities=6", "--test-identities=2", "--images-per-camera=1"], "sysu-mm01"),
        ("regdb", ["--identities=4", "--images=1", "--splits=1"], "regdb"),
        ("llcm", ["--identities=6", "--test-identities=2", "--images-per-camera=1"], "llcm"),
    ],
)
def test_synth_writes_each_tree(tmp_path: Path, layout: str, flags: list[str], name: str) -> None:
    from mrcn_fast.reid.data import recognize

    tree = tmp_path / "tree"
    assert main(["synth", "--layout", layout, "--out", str(tree), "--image-size=[32,16]", *flags]) == 0
    assert recognize(tree) == name


def test_synth_replaces_other_values_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["synth", "--layout=regdb", f"--out={tmp_path}/tree", "--identities=4", "--splits=1"]
    given.append("--image-size=[32,16]")
    assert main([*given, "--images=2"]) == 0
    assert main([*given, "--images=2"]) == 0
    images = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.bmp"))
    capsys.readouterr()
    for other in ([*given, "--images=1"], ["synth", "--layout=sysu", f"--out={tmp_path}/tree"]):
        assert "--overwrite to replace it" in refused(capsys, *other)
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.bmp")) == images
    assert main([*given, "--images=1", "--overwrite"]) == 0
    assert len(list(tmp_path.rglob("*.bmp"))) == len(images) // 2


def test_a_config_file_is_like_a_recipe_and_overrides_it(
    tmp_path: Path, tiny_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrcn_fast.reid.training import trainer

    made: list[Any] = []
    monkeypatch.setattr(trainer.Trainer, "__init__", lambda self, config: made.append(config))
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self, **_: "done")
    monkeypatch.setenv("HOME", str(tiny_tree.parent))
    (tmp_path / "base.yaml").write_text("lr: 1e-3\nepochs: 5\nsteps: 9\n")
    (tmp_path / "own.yaml").write_text(f"extends: base.yaml\ndata: ~/{tiny_tree.name}\nepochs: 7\n")
    given = ["--recipe", "regdb-mrcn-p", "--config", str(tmp_path / "own.yaml"), "--out=~/run", "--steps=3"]
    assert main(["train", *given, "--stages", "0,2", "--dataset=sysu-mm01", "--skip-unreadable"]) == 0
    (config,) = made
    assert (config.parts, config.lr, config.epochs, config.steps) == (4, 1e-3, 7, 3)
    assert (config.stages, config.skip_unreadable, config.dataset) == ((0, 2), True, "sysu-mm01")
    assert (config.data, config.out) == (str(tiny_tree), str(tiny_tree.parent / "run"))


def test_train_recognizes_the_tree(
    tmp_path: Path, tiny_tree: Path, tiny_regdb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrcn_fast.reid.training import trainer

    made: list[Any] = []
    monkeypatch.setattr(trainer.Trainer, "__init__", lambda self, config: made.append(config))
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self, **_: "done")
    for tree in (tiny_regdb, tiny_tree):
        assert main(["train", "--data", str(tree), "--out", str(tmp_path / "run")]) == 0
    assert [config.dataset for config in made] == ["regdb", "sysu-mm01"]


def test_reranking_takes_its_neighbours_and_checks_them_first(
    tmp_path: Path, finished: Path, tiny_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished, tmp_path / "checkpoint.pth")
    test = [
        "test",
        "--checkpoint",
        str(tmp_path),
        "--data",
        str(tiny_tree),
        "--trials=1",
        "--accelerator=cpu",
    ]
    for words, expected in (
        (["--rerank", "--k1", "24"], "k1 must be at least 1 and below the number of images, 24"),
        (["--rerank", "--k1", "5", "--k2", "7"], "k2 must be from 1"),
        (["--k2", "3"], "got k1=None, k2=3 without rerank"),
    ):
        message = refused(capsys, *test, *words)
        assert expected in message and "features" not in message
    assert not list(tmp_path.glob("*.json"))
    assert main([*test, "--rerank", "--k1", "5", "--k2", "2"]) == 0
    assert "re-ranked with k1=5 and k2=2" in capsys.readouterr().out


def test_a_run_that_is_there_is_refused_before_anything(
    finished: Path, tiny_tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrcn_fast.reid.training import trainer

    monkeypatch.setattr(trainer, "open_dataset", None)
    output = refused(capsys, "train", "--data", tiny_tree, "--out", finished.parent)
    assert "a run is already there" in output


def test_characters_that_the_terminal_lacks_are_printed(
    tmp_path: Path, finished: Path, tiny_tree: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = tmp_path / os.fsdecode(b"run\xff")
    folder.mkdir()
    shutil.copy(finished, folder / "checkpoint.pth")
    given = ["--checkpoint", str(folder), "--data", str(tiny_tree), "--trials=2", "--accelerator=cpu"]
    assert main(["test", *given]) == 0
    printed = capsysbinary.readouterr().out
    assert " ± ".encode() in printed and b"written to " + os.fsencode(folder) in printed


def test_progress_bars_without_a_reader_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from mrcn_fast.reid.console import _Console

    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        console = _Console(stderr=True)
        for _ in range(2):
            console.print("a line")  # rich would end the process


def test_flags_override_a_recipe(tmp_path: Path, tiny_regdb: Path) -> None:
    from mrcn_fast.reid.training.checkpoint import load_checkpoint

    out = tmp_path / "run"
    scale = ["--depth=18", "--height=32", "--width=16", "--identities=2", "--images=1", "--steps=1"]
    more = ["--workers=0", "--accelerator=cpu", "--cqc-weight=0.5"]
    given = ["--recipe", "regdb-mrcn-p", "--data", str(tiny_regdb), "--out", str(out), "--parts=2"]
    assert main(["train", *given, *scale, *more]) == 0
    config = load_checkpoint(out).config
    assert (config.dataset, config.stages, config.parts, config.cqc_weight) == ("regdb", (1,), 2, 0.5)
    # What no flag touches is the recipe's.
    assert (config.epochs, config.milestones, config.erase) == (80, (20, 60), 0.5)


def test_an_unknown_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    output = refused(capsys, "train", "--recipe", "regdb-mrcnn", "--data=x")
    assert "regdb-mrcnn" in output and "regdb-mrcn-p" in output


def test_a_table_from_the_command_line(
    tmp_path: Path, tiny_regdb: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tables"
    flags = ["--depth=18", "--height=32", "--width=16", "--identities=2", "--images=1", "--epochs=1"]
    flags += ["--batches=1", "--workers=0", "--accelerator=cpu"]
    assert main(["table", "4", "--data", str(tiny_regdb), "--out", str(out), "--splits=1", *flags]) == 0
    output, logged = capsys.readouterr()
    # What it is about to run, what is missing, and how long that takes.
    for said in ("3 trainings on", "of sysu-mm01 are left out", "One of the 3 others takes about"):
        assert said in " ".join(logged.split())
    assert "(85.1)" in output and "(63.8)" not in output
    assert main(["table", "4", "--from", str(out / "table-4.json")]) == 0
    assert capsys.readouterr().out == output
    output = refused(capsys, "table", "4", "--data", tiny_regdb, "--out", out, "--colour=red")
    assert "got --colour, which mrcn-fast table doesn't have" in output
    assert "got TABLE 5, expected one of 1, 2, 3, 4" in refused(capsys, "table", "5", "--data", tiny_regdb)
    other = ("--data", tiny_regdb, "--out", tmp_path / "other", "--splits=1", "--split=2")
    output = refused(capsys, "table", "4", *other, *flags)
    assert "got --split, which mrcn-fast table doesn't have; did you mean --splits?" in output


def test_the_flag_whose_help_begins_with_a_word_is_meant(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The help of --seed has "people", too, and comes before that of --identities.
    output = refused(capsys, "synth", "--layout", "regdb", "--out", tmp_path / "tree", "--people", 8)
    assert "did you mean --identities?" in output


def test_figures_from_the_command_line(
    tmp_path: Path, finished: Path, tiny_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures"
    given = ["--checkpoints", str(finished), "--data", str(tiny_tree), "--out", str(out)]
    assert main(["figures", *given, "--people=3", "--queries=2", "--accelerator=cpu"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {path.name for path in files if path.suffix == ".png"} == {
        "distances.png", "tsne.png", "ranking.png",
    }  # fmt: skip
    assert all(path.is_file() for path in files)


@pytest.mark.parametrize("place", ["folder", "out"])
def test_resume_needs_no_other_flag(tmp_path: Path, tiny_tree: Path, finished: Path, place: str) -> None:
    import torch

    from mrcn_fast.reid.training.checkpoint import load_checkpoint

    run, values = tmp_path / "run", load_checkpoint(finished).config.as_dict()
    values |= {"out": run, "steps": 2}
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    assert main(["train", *flags]) == 0
    moved = run.rename(tmp_path / "moved")
    words = ["--resume", str(moved)] if place == "folder" else ["--resume", "--out", str(moved)]
    assert main(["train", *words, "--steps", "none"]) == 0
    expected, found = load_checkpoint(finished), load_checkpoint(moved)
    assert found.config.out == str(moved) and found.step == expected.step == 6
    assert all(torch.equal(tensor, expected.model[name]) for name, tensor in found.model.items())
