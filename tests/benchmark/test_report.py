"""The charts of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrcn_fast.benchmark import Case, Timing, results
from mrcn_fast.benchmark.suites.problems import Problem


def test_a_report_has_charts_and_a_page_without_links(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports are drawn with matplotlib")
    from mrcn_fast.benchmark.report import write_report

    where = {"date": "2026", "cpu": "A & B", "threads": 2, "torch": "2.13", "pages": "warm"}
    file = tmp_path / "x.jsonl"
    for count in (1, 2, 4, 8):
        problem = Problem("block", "forward", (count, 8, 6, 4))
        timings = {name: Timing(0.9 * count, count, 1.1 * count) for name in ("fused", "eager", "floor")}
        case = Case(problem.name, dict, {}, facts=problem.facts)
        line = results.row(case, timings, peaks={"fused": 5, "eager": 50})
        results.write(file, where | line)
    written = write_report([file], tmp_path / "report")
    assert [path.name for path in written] == [
        "a-b-2-threads-torch-2.13-warm-pages-speedup.png",
        "a-b-2-threads-torch-2.13-warm-pages-size.png",
        "a-b-2-threads-torch-2.13-warm-pages-memory.png",
        "report.html",
    ]
    page = written[-1].read_text()
    assert page.count("data:image/png;base64,") == 3 and "A &amp; B" in page
    assert "block forward 8x8x6x4 nchw" in page and 'src="http' not in page
    for path in written[:3]:
        assert path.read_bytes().startswith(b"\x89PNG")
