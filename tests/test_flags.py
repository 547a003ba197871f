"""A command's flags: how they may be written, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest

from mrcn_fast.flags import DEVICE, PATH, REQUIRED, TEXT, Flags, number, one_of
from mrcn_fast.reid.kinds import OneOf, Pair, PathText, Several, Weight

Size = Pair[Weight]


def flags() -> Flags:
    made = Flags("try", "try flags")
    made.add_setting("--out", PathText, help="a folder")
    made.add_setting("--image-size", Size, (64, 32), "100 % of it")
    made.add_setting("--lr", Weight, 0.1)
    made.add_setting("--skip-unreadable", bool, False)
    made.add("--dtype", one_of(("fp32", "bf16")), None, nargs="+", action="extend")
    made.add_setting("--places", Several[str], ())
    return made


DEFAULTS: dict[str, Any] = {
    "image_size": (64, 32), "lr": 0.1, "skip_unreadable": False, "dtype": None, "places": (),
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--image-size 3,4", {"image_size": (3, 4)}),
        ("--image_size=[3,4]", {"image_size": (3, 4)}),
        ("--image-size 3 4", {"image_size": (3, 4)}),
        ("--lr 1e-3", {"lr": 1e-3}),
        ("--lr 0.5 --lr 0.25", {"lr": 0.25}),
        ("--skip-unreadable", {"skip_unreadable": True}),
        ("--skip_unreadable false", {"skip_unreadable": False}),
        ("--dtype fp32 --dtype bf16", {"dtype": ("fp32", "bf16")}),
        ("--places a,1 b --lr 0.5", {"places": ("a,1", "b"), "lr": 0.5}),
    ],
)
def test_how_flags_may_be_written(words: str, given: dict[str, Any]) -> None:
    assert flags().given(words.split()) == given
    assert flags().values(["--out", "x", *words.split()]) == DEFAULTS | {"out": "x"} | given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--out is missing: give --out and a path"),
        ("--out", "got --out without a value, expected a path"),
        ("--places --out x", "got --places without a value, expected a list of values, each text"),
        ("--out x --image-size 3", "got --image-size 3, expected 2 values, each a number of at least 0, sep"),
        ("--out x --lr -1e-3", "got --lr -1e-3, expected a number of at least 0"),
        ("--out x --lr -inf", "got --lr without a value"),
        ("--out x --skip-unreadable maybe", "got --skip-unreadable maybe, expected true or false"),
        ("--out x --dtype fp64", "got --dtype fp64, expected one of fp32, bf16"),
        (
            "--out x --colour red",
            "got --colour, which mrcn-fast try doesn't have; `mrcn-fast try --help` lists",
        ),
        ("--out x --image-sise 3,4", "did you mean --image-size?"),
        ("--out x --image 3,4", "got --image, which mrcn-fast try doesn't have; did you mean --image-size?"),
        ("--out x --sk", "did you mean --skip-unreadable?"),
        ("--folder x", "got --folder, which mrcn-fast try doesn't have; did you mean --out?"),
        ("--out x --old 3", "got --old, which mrcn-fast try doesn't have; `mrcn-fast try --help` lists"),
        ("--out x --dtype bf61", "got --dtype bf61, expected one of fp32, bf16; did you mean bf16?"),
        ("--out x -lr 3", "got -lr, which mrcn-fast try doesn't have"),
        ("--out x y", "got y, which belongs to no flag"),
        ("--help=3", "got -h/--help with a value, which it doesn't take"),
    ],
)
def test_wrong_flags_are_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        flags().values(words.split())
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith("mrcn-fast try: error: ") and message in printed.err
    assert len(printed.err.splitlines()) == 1


def test_words_without_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    made = Flags("try", "try words")
    made.add_word("table", Annotated[str, OneOf(("1", "2"))], "which one")
    made.add("--out", TEXT)
    for words in (["2", "--out", "x"], ["--out", "x", "2"]):
        assert made.values(words) == {"table": "2", "out": "x"}
    for wrong, message in (
        ([], "TABLE is missing: give one of 1, 2"),
        (["3"], "got TABLE 3, expected one of 1, 2"),
    ):
        with pytest.raises(SystemExit):
            made.values(wrong)
        assert message in capsys.readouterr().err


def test_help_has_what_a_flag_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        flags().values(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "--out OUT a folder: a path (required)" in printed
    assert "100 % of it: 2 values, each a number of at least 0 (default 64 32)" in printed
    assert "one of fp32, bf16" in printed and "--lr LR a number of at least 0 (default 0.1)" in printed


def test_help_has_groups(capsys: pytest.CaptureFixture[str]) -> None:
    made = Flags("try", "try groups")
    for title, flag in (("files", "--in"), ("sizes", "--image-size"), ("files", "--out")):
        made.group(title)
        made.add(flag, TEXT, help="a text")
    with pytest.raises(SystemExit):
        made.values(["--help"])
    printed = capsys.readouterr().out
    places = [
        printed.index(text) for text in ("files:", "--in", "--out", "sizes:", "--image-size IMAGE-SIZE")
    ]
    assert places == sorted(places) and printed.count("files:") == 1


def plain() -> Flags:
    """Flags that need torch alone."""
    made = Flags("try", "try plain flags")
    made.add("--out", PATH, REQUIRED)
    made.add("--device", DEVICE, "cpu")
    made.add("--seconds", number(float, 0, 10), 8.0)
    made.add("--workers", number(int, 1, 4), 1)
    made.add("--compare", PATH, nargs=2)
    made.add_switch("--list", "list")
    return made


def test_plain_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    found = plain().values(
        ["--out", "~/x", "--device", "cuda:1", "--seconds", "1e-1", "--compare", "a", "b", "--list"]
    )
    assert found == {
        "out": Path("/home/ann/x"), "device": "cuda:1", "seconds": 0.1, "workers": 1,
        "compare": (Path("a"), Path("b")), "list": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--out is missing: give --out and a path"),
        ("--out=", "got --out '', expected a path that is not empty"),
        ("--out x --device tpu", "got --device tpu, expected cpu, cuda or cuda:N"),
        ("--out x --seconds nan", "got --seconds nan, expected a number from 0 to 10"),
        ("--out x --seconds -1", "got --seconds -1, expected a number from 0 to 10"),
        ("--out x --workers 1.5", "got --workers 1.5, expected an integer from 1 to 4"),
        ("--out x --compare a", "got --compare with another number of values, expected 2, each a path"),
        ("--out x --list=yes", "got --list with a value, which it doesn't take"),
        ("--out x --liste", "did you mean --list?"),
    ],
)
def test_wrong_plain_flags(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plain().values(words.split())
    assert message in capsys.readouterr().err
