"""`bench scorer`: its loop is right, a wrong score isn't timed, and results are written as lines."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mrcn_fast import benchmark
from mrcn_fast.benchmark.suites import scorer
from mrcn_fast.benchmark.suites.scorer import Problem, calls, cases, fused_scores, looped_scores, measured

SMALL = {
    "sysu single": partial(scorer.sysu_problem, np.float32, 1, identities=12, queries=50),
    "sysu multi": partial(scorer.sysu_problem, np.float64, 10, identities=12, queries=50),
    "regdb": partial(scorer.regdb_problem, np.float32, identities=12),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("arrays", [False, True])
def test_the_loop_gives_the_same_scores(name: str, arrays: bool) -> None:
    problem = SMALL[name]()
    fused, looped = fused_scores(problem), looped_scores(problem, arrays=arrays, stable=True)
    assert benchmark.largest_error(fused, looped) < 1e-12
    assert 0.2 < fused[1] < 0.9, "a ranking that is all right or all wrong would compare nothing"


def test_the_problems_are_the_published_ones_in_size() -> None:
    single = scorer.sysu_problem(np.float32, 1)
    assert single.distance.shape == (3803, 301) and single.distance.dtype == np.float32
    assert len(np.unique(single.gallery_ids)) == 96
    assert set(single.query_cameras) == {3, 6} and set(single.gallery_cameras) == {1, 2, 4, 5}
    assert fused_scores(single)[3] == 3803
    regdb = scorer.regdb_problem(np.float64)
    assert regdb.distance.shape == (2060, 2060) and regdb.distance.dtype == np.float64
    assert [case.name for case in cases()][2:4] == [
        "score sysu multi-shot 3803x3010 fp32", "score sysu multi-shot 3803x3010 fp64",
    ]  # fmt: skip


def test_each_case_has_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        benchmark.Case(name, partial(calls, make), {"loop": 1e-9 if name == "regdb" else 1e9})
        for name, make in SMALL.items()
    ]
    monkeypatch.setattr(scorer, "cases", lambda: made)
    file = tmp_path / "results" / "scorer.jsonl"
    assert scorer.main(["--seconds", "0", "--only", "regdb", "--out", str(file)]) == 0
    assert "goals met" in capsys.readouterr().out
    assert scorer.main(["--seconds", "0", "--only", "single", "--out", str(file)]) == 1
    assert "below the goal: loop" in capsys.readouterr().out
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["regdb", "sysu single"]
    assert {"commit", "cpu", "threads", "torch", "numpy", "date"} <= set(lines[0])
    assert set(lines[0]["ms"]) == {"fused", "loop", "array loop"}


def test_an_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert scorer.main(["--only", "llcm"]) == 2
    assert "'llcm', which no case's name contains" in capsys.readouterr().err


def test_a_wrong_score_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused_scores

    def wrong(problem: Problem) -> tuple:
        cmc, precision, *rest = right(problem)
        return cmc, precision + 1e-6, *rest

    monkeypatch.setattr(scorer, "fused_scores", wrong)
    with pytest.raises(RuntimeError, match="the fused result is off by"):
        measured(benchmark.Case("wrong", partial(calls, SMALL["regdb"]), {}), 0.0)
