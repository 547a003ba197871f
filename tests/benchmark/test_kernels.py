"""The cases of `bench kernels`, and what its command says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mrcn_fast import cli
from mrcn_fast.benchmark.suites import kernels, problems

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


# Results are only added to: a case's history is found by its name.
FIRST_NAMES = [
    f"block {way} {shape} {layout}"
    for layout in ("nchw", "channels_last")
    for shape in ("16x256x72x32", "16x64x72x32", "8x512x36x16")
    for way in ("forward", "forward+backward")
]


def test_the_names_of_the_cpus_cases_stay() -> None:
    names = [case.name for case in kernels.cases()]
    assert names[:12] == FIRST_NAMES
    assert names[-2:] == [f"cqc{way} forward+backward 4x4x2048" for way in ("", " normalized")]
    assert "block forward 16x256x72x32 nchw bf16" in names
    assert {case.device for case in kernels.cases()} == {"cpu"}


@pytest.mark.parametrize("suite", kernels.SUITES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_name_belongs_to_one_case(suite: str, device: str) -> None:
    names = [case.name for case in kernels.cases(suite, device)]
    assert names and len(set(names)) == len(names)


def test_the_stages_have_the_papers_sizes() -> None:
    """288 x 128 pixels: behind each stage, for 4 x 4 and 8 x 4 images of a modality."""
    from mrcn_fast.reid.models.resnet import Trunk

    trunk = Trunk(50).eval()
    x = trunk.stem(torch.zeros(1, 3, 288, 128), "visible")
    for stage, expected in enumerate(kernels.STAGES):
        x = trunk.layers(x, stage, stage) if stage else x
        assert tuple(x.shape[1:]) == expected
    shapes = {tuple(case.facts["shape"]) for case in kernels.cases("stages") if "shape" in case.facts}
    assert shapes == {(n, *stage) for n in (16, 32) for stage in kernels.STAGES}


def test_the_sweep_goes_from_a_megabyte_to_a_gigabyte() -> None:
    volumes = [case.facts["volume_bytes"] for case in kernels.cases("sweep")]
    assert min(volumes) < 1e6 and max(volumes) > 1e9
    assert any(case.facts["shape"][0] == 1 for case in kernels.cases("sweep"))


def test_a_gpu_has_cases_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--device", "cuda", "--dtype", "bf16", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "gpu block forward+backward 16x64x72x32 channels_last bf16" in names
    assert "gpu block forward 16x64x72x32 channels_last bf16 hot L2" in names
    assert "gpu cqc forward+backward 16x8x2048 bf16" in names
    assert not any(name.endswith("fp32") for name in names)
    assert not {case.name for case in kernels.cases()} & set(names)


@no_gpu
def test_the_message_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert "nothing to measure: --device cuda: there is no GPU here" in said.err and not said.out


def test_a_name_that_no_case_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "--only", "no such case"]) == 2
    assert "no case's name in the suite table contains" in capsys.readouterr().err


def test_the_reference_is_not_measured_as_the_fused_form(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRCN_FAST_BACKEND", "reference")
    assert cli.main(["bench", "kernels", "--only", "16x64x72x32"]) == 2
    assert "MRCN_FAST_BACKEND is 'reference'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "--device", "nothing"], "got --device nothing, expected cpu, cuda or cuda:N"),
        (["show", "--table", "a", "--compare", "b", "c"], "got --table and --compare, expected one of them"),
        (["show"], "got nothing to show, expected one of --table, --compare and --report"),
        (
            ["kernels", "--only", "16x64", "--out", "/dev/null/x"],
            "/dev/null: expected a folder for the results",
        ),
    ],
)
def test_bad_arguments_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_measured_case_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plain forms would be compiled for most of a minute.
    monkeypatch.setattr(problems, "LARGEST_WITH_BASELINES", 0)
    file = tmp_path / "x.jsonl"
    words = ["--suite", "sweep", "--only", "forward 16x64x9x4", "--seconds", "0", "--out", str(file)]
    assert cli.main(["bench", "kernels", *words]) in (0, 1)
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["case"] == "block forward 16x64x9x4 nchw"
    assert set(line["ms"]) == {"fused", "floor"}
    assert line["pages"] in ("warm", "unknown") and line["volumes"] == 6
    assert {"commit", "cpu", "threads", "torch", "date", "peak_bytes"} <= set(line)
    assert "block forward 16x64x9x4 nchw" in capsys.readouterr().out
