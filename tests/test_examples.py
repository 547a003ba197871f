"""The scripts in examples/ run, and say what they show."""

from __future__ import annotations

import ast
import os
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
# The modules that an example needs beyond those of [reid].
NEEDED = {
    "sharded_faiss": {"faiss": "faiss-cpu, of the extra [search], is not installed"},
    "pgvector": {
        "pyarrow": "pyarrow, of the extra [search], is not installed",
        "psycopg": "psycopg is not installed, which speaks to PostgreSQL",
    },
}


@pytest.mark.filterwarnings("ignore")  # of torch's ONNX exporter
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(ast.get_docstring(ast.parse(text)) or "") > 100
    if "mrcn_fast.reid" in text:
        pytest.importorskip("lightning_fabric", reason="this example needs the packages of [reid]")
    for module, reason in NEEDED.get(path.stem, {}).items():
        pytest.importorskip(module, reason=reason)
    if path.stem == "pgvector" and "MRCN_FAST_DATABASE" not in os.environ:
        pytest.skip("MRCN_FAST_DATABASE names no PostgreSQL with pgvector")
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_the_examples_are_there() -> None:
    known = {"drop_in", "training_step", "own_network", "inference", "export"}
    known |= {"train_own_network", "own_backbone", "agw", "deen", "sharded_faiss", "pgvector"}
    assert {path.stem for path in EXAMPLES} == known
