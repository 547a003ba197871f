"""The exported test path: its features and scores are the network's, in ONNX and without mrcn_fast."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mrcn_fast.cli import main
from mrcn_fast.reid import export
from mrcn_fast.reid.data import PersonImages, normalize
from mrcn_fast.reid.evaluation.protocol import searches_of
from mrcn_fast.reid.evaluation.scoring import score_trial
from mrcn_fast.reid.evaluation.trained import open_network, open_trained
from mrcn_fast.reid.export import METADATA, ExportError, export_network

ATOL = 1e-6


def some_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 16), dtype=torch.uint8)


def own_features(finished: Path, pixels: Tensor, modality: Any) -> Tensor:
    with torch.no_grad():
        return open_network(finished, accelerator="cpu").reid_model.eval().extract(pixels, modality)


@pytest.mark.slow
def test_onnx_has_standard_operators_and_our_features_and_scores(
    finished: Path, tiny_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "onnxscript and onnxruntime come with the extra [export]"
    onnxruntime = pytest.importorskip("onnxruntime", reason=reason)
    pytest.importorskip("onnxscript", reason=reason)
    import onnx

    out = tmp_path / "visible.onnx"
    words = ["export", "--checkpoint", str(finished), "--modality", "visible", "--format", "onnx"]
    assert main([*words, "--out", str(out)]) == 0
    assert "features within" in capsys.readouterr().out
    onnx.checker.check_model(str(out), full_check=True)
    model = onnx.load(str(out))
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert (about["modality"], about["height"], about["width"]) == ("visible", "32", "16")
    session = onnxruntime.InferenceSession(str(out))

    def run(images: Tensor) -> Tensor:
        (found,) = session.run(["features"], {"images": images.numpy()})
        return torch.from_numpy(found)

    for count in (1, 7):
        images = some_images(count)
        torch.testing.assert_close(
            run(images), own_features(finished, normalize(images), "visible"), rtol=0, atol=ATOL
        )
    assert_scores_are_the_networks(finished, tiny_tree, run)
    assert main([*words, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def assert_scores_are_the_networks(finished: Path, tiny_tree: Path, run: Any) -> None:
    trained = open_trained(finished, tiny_tree, accelerator="cpu")
    (search,) = searches_of(trained.dataset, {"trials": 1})
    (gallery,) = search.galleries
    queries = trained.features(search.query, "infrared")
    images = PersonImages(gallery, (32, 16), filter=trained.config.filter)
    found = run(torch.stack([images[row] for row in range(len(images))]))
    expected = score_trial(-(queries @ trained.features(gallery, "visible").T), search.query, gallery, "sysu")
    assert score_trial(-(queries @ found.T), search.query, gallery, "sysu") == expected


RUN = f"""
import sys
sys.modules["mrcn_fast"] = None  # an import of it fails
import torch
extra = {{"{METADATA}": ""}}
program = torch.export.load(sys.argv[1], extra_files=extra)
with torch.no_grad():
    features = program.module()(torch.load(sys.argv[2]))
torch.save(features, sys.argv[3])
print(extra["{METADATA}"])
"""


@pytest.mark.slow
def test_the_page_runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "onnxscript and onnxruntime come with the extra [export]"
    pytest.importorskip("onnxruntime", reason=reason)
    pytest.importorskip("onnxscript", reason=reason)
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "export.md").read_text()
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    mrcn-fast (.*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main(command.replace("runs/people", str(finished)).split()) == 0
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        features, names["features"] = names.get("features"), None
        exec(code, names)
        assert features is None or features.shape == names["features"].shape


@pytest.mark.slow
def test_a_program_of_standard_operations_needs_no_mrcn_fast(finished: Path, tmp_path: Path) -> None:
    out, given, made = tmp_path / "infrared.pt2", tmp_path / "given.pt", tmp_path / "made.pt"
    export_network(finished, "infrared", "torch", out, pixels="float")
    pixels = normalize(some_images(7))
    torch.save(pixels, given)
    command = [sys.executable, "-I", "-W", "ignore", "-c", RUN, str(out), str(given), str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        torch.load(made), own_features(finished, pixels, "infrared"), rtol=0, atol=ATOL
    )
    about = json.loads(done.stdout)
    assert (about["modality"], about["pixels"], about["test_sets"]) == (
        "infrared",
        "float",
        "original restituted",
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec")
def test_a_program_of_fused_operations_runs_ours(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "visible.pt2"
    done = export_network(finished, "visible", "torch", out, operations="fused")
    assert done.difference is not None and done.difference <= ATOL
    program = torch.export.load(out)
    assert "mrcn_fast.restitute_forward.default" in {str(node.target) for node in program.graph.nodes}
    images = some_images(2)
    own = own_features(finished, normalize(images), "visible")
    torch.testing.assert_close(program.module()(images), own, rtol=0, atol=ATOL)


def test_what_cant_be_exported_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="got fused operations for ONNX"):
        export_network(finished, "visible", "onnx", out, operations="fused")
    with pytest.raises(ValueError, match="got modality='rgb', expected one of visible, infrared"):
        export_network(finished, "rgb", "onnx", out)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="expected a file for the exported network; found a folder"):
        export_network(finished, "visible", "onnx", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ExportError, match="got no onnx and no onnxscript, which ONNX needs: pip install onnx"
    ):
        export_network(finished, "visible", "onnx", out)
    assert list(tmp_path.iterdir()) == []


def test_other_features_are_not_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"an earlier one")
    monkeypatch.setattr(export, "_program", lambda path, images: None)
    monkeypatch.setattr(export, "_torch", lambda program, about: (b"", lambda images: torch.zeros(5, 1024)))
    with pytest.raises(ExportError, match=r"differ from the network's by .*; nothing was written"):
        export_network(finished, "visible", "torch", out, operations="fused", overwrite=True)
    assert out.read_bytes() == b"an earlier one"
