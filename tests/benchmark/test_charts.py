"""The charts of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def test_the_charts_show_the_fused_form_and_say_what_was_found() -> None:
    pytest.importorskip("matplotlib", reason="reports are drawn with matplotlib")
    from matplotlib.colors import to_hex

    from mrcn_fast.benchmark import report
    from mrcn_fast.benchmark.forms import FORMS

    lines = []
    for shape in ((1, 8, 6, 4), (2, 8, 6, 4), (4, 8, 6, 4), (8, 8, 6, 4), (8, 8, 12, 8)):
        problem = Problem("block", "forward", shape)
        timings = {name: Timing(ms, ms, ms) for name, ms in (("fused", 2.0), ("eager", 6.0), ("floor", 1.0))}
        case = Case(problem.name, dict, {}, facts=problem.facts)
        peaks = {"fused": 2 * problem.result_bytes, "eager": 8 * problem.result_bytes}
        lines.append(results.row(case, timings, peaks=peaks))
    group = report.Group("a machine", lines)
    # Four sizes that differ in the samples alone are a series; the fifth differs in its pixels too.
    (series,) = report.series_of(lines, "forward")
    assert (series.grows, series.fixed, len(series.lines)) == ("samples", "N×8×6×4", 4)
    findings = {
        "speedup": "Times as long as mrcn_fast: eager 3.0 to 3.0 ×",
        "size": "The fused block stays near the floor as the maps grow",
        "memory": "The fused forms need at most 2.00 × the memory of their results",
    }
    for name, draw in report.CHARTS.items():
        figure = draw(group)
        assert figure is not None
        assert [text.get_text() for text in figure.texts] == [findings[name], "a machine"]
        (axes,) = figure.axes
        handles, labels = axes.get_legend_handles_labels()
        fused = handles[labels.index(FORMS["fused"].title)]
        assert to_hex(_color(fused)) == FORMS["fused"].color
        assert "10^" not in axes.get_xaxis().get_major_formatter()(10.0)


def _color(handle: Any) -> Any:
    """The colour of a line or of dots."""
    return handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor()[0]
