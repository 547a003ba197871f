"""`mrcn-fast bench show --report`: charts of results, each as PNG, and an HTML page with all of them.

There are three charts per machine: the time of each form over the fused time; time over the size of the maps,
beside the floor; and the peak memory of a call. A chart that has no results is not drawn. Each chart's title
is the finding, computed from the results that it shows.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from mrcn_fast.benchmark.forms import FLOOR, FORMS, Form
from mrcn_fast.benchmark.results import Line, faster, markdown, newest
from mrcn_fast.files import write_atomically

try:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as missing:
    raise ImportError("--report draws with matplotlib; install it: pip install matplotlib") from missing

# Sizes are a series only if at least this many of them were measured.
_LEAST_SIZES: Final = 4
_DOTS_PER_INCH: Final = 110
_WAYS: Final = ("forward", "forward+backward")
# What grows along a series, and the places of the shape (N, C, H, W) that then differ.
_SERIES: Final = {"samples": (0,), "channels": (1,), "pixels": (2, 3)}


class Group(NamedTuple):
    """The newest results of one machine."""

    title: str
    lines: list[Line]

    @property
    def stem(self) -> str:
        """The start of its charts' file names."""
        return re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-")


class Series(NamedTuple):
    """Cases that differ in one size alone, in its order: a panel of the chart of sizes."""

    grows: str  # one of _SERIES
    fixed: str  # the shape, with a letter for what grows
    lines: list[Line]


def write_report(files: Sequence[Path], folder: Path) -> list[Path]:
    """Draw the results of ``files`` into ``folder``.

    Returns:
        The PNG files, and report.html after them.

    Raises:
        ValueError: a file has no results of cases; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    sections = []
    for group in groups(files):
        charts = draw_charts(group, folder)
        pictures = [
            f'<img alt="{path.stem.rpartition("-")[2]}" src="data:image/png;base64,{_base64(path)}">'
            for path in charts
        ]
        sections.append("\n".join([f"<h2>{html.escape(group.title)}</h2>", *pictures, _table(group)]))
        written += charts
    page = folder / "report.html"
    write_atomically(page, lambda file: file.write(_page(sections).encode()))
    return [*written, page]


def draw_charts(group: Group, folder: Path) -> list[Path]:
    """Draw the charts that a machine has results for as PNG into ``folder``, and return their paths."""
    paths = []
    for name, draw in CHARTS.items():
        figure = draw(group)
        if figure is not None:
            paths.append(folder / f"{group.stem}-{name}.png")
            write_atomically(paths[-1], partial(figure.savefig, format="png", dpi=_DOTS_PER_INCH))
    return paths


def groups(files: Sequence[Path]) -> list[Group]:
    """Return the newest result of every case, grouped by the machine it was measured on."""
    return [Group(title, list(lines.values())) for title, lines in newest(*files).items()]


# --- charts -------------------------------------------------------------------------------------------


def draw_speedups(group: Group) -> Figure | None:
    """Draw a dot per form and case: its time over the fused time, which is 1, on a logarithmic axis."""
    rows = {line["case"]: _ratios(line) for line in group.lines if _ratios(line)}
    if not rows:
        return None
    fused = {name: {"fused": 1.0, **ratios} for name, ratios in rows.items()}
    finding = f"Times as long as mrcn_fast: {_ranges(list(rows.values()))}"
    figure = _dots(group, fused, finding, "time over mrcn_fast's time", "{:g} ×")
    for axes in figure.axes:
        axes.axvline(1, color=FORMS["fused"].color, linewidth=1, zorder=0)
    return figure


def draw_sizes(group: Group) -> Figure | None:
    """Draw time over the size of a map, both logarithmic: a column per series, a row per way."""
    ways = [way for way in _WAYS if series_of(group.lines, way)]
    if not ways:
        return None
    found = [series_of(group.lines, way) for way in ways]
    columns = max(map(len, found))
    figure = Figure(figsize=(1.2 + 3.3 * columns, 1.5 + 2.7 * len(ways)), layout="constrained")
    panels = figure.subplots(len(ways), columns, squeeze=False, sharey="row")
    for way, row, all_series in zip(ways, panels, found, strict=True):
        for axes, series in zip(row, all_series, strict=False):
            _draw_series(axes, series)
        for axes in row[len(all_series) :]:
            axes.set_visible(False)
        row[0].set_ylabel(f"{way} (ms)")
    over = [ratio for of in found for series in of for ratio in _over_floor(series)]
    title = "The fused block stays near the floor as the maps grow"
    _finish(figure, group, f"{title}: at most {max(over):.1f} × beyond 10 MB" if over else title)
    return figure


def draw_memory(group: Group) -> Figure | None:
    """Draw a dot per form and case: the peak memory in MB, with the size of the results marked."""
    lines = [line for line in group.lines if line.get("peak_bytes") and line.get("result_bytes")]
    if not lines:
        return None
    rows = {line["case"]: _megabytes(line["peak_bytes"]) for line in lines}
    most = max(line["peak_bytes"]["fused"] / line["result_bytes"] for line in lines)
    finding = f"The fused forms need at most {most:.2f} × the memory of their results"
    results = {line["case"]: line["result_bytes"] / 1e6 for line in lines}
    marked = ("the results alone", results)
    return _dots(group, rows, finding, "peak memory", "{:g} MB", marked=marked)


CHARTS: Final[dict[str, Callable[[Group], Figure | None]]] = {
    "speedup": draw_speedups,
    "size": draw_sizes,
    "memory": draw_memory,
}


def series_of(lines: Sequence[Line], way: str) -> list[Series]:
    """Find the series of the block's float32 NCHW cases: those that differ in one size alone.

    A case belongs to every series that it fits. Only series of at least four sizes are returned.
    """
    chosen = [
        line
        for line in lines
        if [line.get(fact) for fact in ("operation", "way", "layout", "dtype")]
        == ["block", way, "nchw", "fp32"]
    ]
    found: list[Series] = []
    for grows, places in _SERIES.items():
        together: dict[str, list[Line]] = {}
        for line in chosen:
            sizes = [
                "NCHW"[place] if place in places else str(size) for place, size in enumerate(line["shape"])
            ]
            together.setdefault("×".join(sizes), []).append(line)
        for fixed, members in together.items():
            if len({line["volume_bytes"] for line in members}) >= _LEAST_SIZES:
                found.append(Series(grows, fixed, sorted(members, key=lambda line: line["volume_bytes"])))
    return found


def _draw_series(axes: Axes, series: Series) -> None:
    for name, form in FORMS.items():
        _points(axes, series.lines, name, form)
    _points(axes, series.lines, "floor", FLOOR, "--")
    axes.set(xscale="log", yscale="log", title=f"more {series.grows}: {series.fixed}")
    axes.set_xlabel("size of a map (MB)")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_numbers(axis, "{:g}")
    axes.title.set_fontsize(10)
    axes.grid(True, which="major", alpha=0.3)


def _points(axes: Axes, lines: list[Line], name: str, form: Form, style: str = "-") -> None:
    times = [(line["volume_bytes"] / 1e6, faster(line["ms"], name)) for line in lines]
    points = [(size, ms) for size, ms in times if ms is not None]
    if not points:
        return
    sizes, medians = [size for size, _ in points], [ms[1] for _, ms in points]
    wide = 2.2 if name == "fused" else 1.4
    axes.plot(
        sizes, medians, style, marker="o", markersize=3, linewidth=wide, label=form.title, color=form.color
    )
    lows, highs = [ms[0] for _, ms in points], [ms[2] for _, ms in points]
    axes.fill_between(sizes, lows, highs, color=form.color, alpha=0.15, linewidth=0)


def _dots(
    group: Group,
    rows: Mapping[str, Mapping[str, float]],
    finding: str,
    xlabel: str,
    unit: str,
    *,
    marked: tuple[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Draw the values of rows by form as dots on a logarithmic axis; the first row is on top.

    Args:
        group: whose results the rows are
        rows: values by the names of FORMS, by the name of the case
        finding: the title
        xlabel: of the axis
        unit: how a value of the axis is written
        marked: a label, and for each row a value that gets a black line
    """
    figure = Figure(figsize=(9.5, 1.7 + 0.235 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(rows.values()):
        axes.plot(
            [min(values.values()), max(values.values())], [place] * 2, color="0.85", linewidth=2, zorder=1
        )
    for name, form in FORMS.items():
        places = [(row[name], place) for place, row in enumerate(rows.values()) if name in row]
        if places:
            size = 80 if name == "fused" else 30
            x, y = zip(*places, strict=True)
            axes.scatter(x, y, s=size, color=form.color, label=form.title, zorder=3)
    if marked:
        label, values = marked
        at = [values[name] for name in rows]
        axes.scatter(at, range(len(rows)), marker="|", s=130, color="black", label=label, zorder=4)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis, unit)
    axes.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8.5)
    axes.grid(True, axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _finish(figure, group, finding)
    return figure


def _plain_numbers(axis: Axis, unit: str) -> None:
    """Label a logarithmic axis with numbers that people read: 1, 10, 100, or on a short axis 1, 2, 5, 10."""
    low, high = axis.get_view_interval()
    ticks = (1, 2, 5) if high < 100 * low else (1,)
    axis.set_major_locator(LogLocator(base=10, subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: unit.format(value)))
    axis.set_minor_formatter(NullFormatter())


def _ratios(line: Line) -> dict[str, float]:
    """Return each baseline's time over the fused time; of its two compilations, that of the faster one."""
    ratios = {name: faster(line["ratios"], name) for name in FORMS}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _ranges(rows: Iterable[Mapping[str, float]]) -> str:
    """The smallest and the largest ratio of the main baselines in words."""
    rows = list(rows)
    parts = []
    for name, words in (("eager", "eager"), ("compile", "torch.compile"), ("compile collapsed", "collapsed")):
        values = [row[name] for row in rows if name in row]
        if values:
            parts.append(f"{words} {min(values):.1f} to {max(values):.1f} ×")
    return ", ".join(parts) or "beside its baselines"


def _megabytes(peaks: Mapping[str, float]) -> dict[str, float]:
    """The peak memory of each form in MB; of a baseline's two compilations, that of the smaller one."""
    found = {name: faster(dict(peaks), name) for name in FORMS}
    return {name: peak / 1e6 for name, peak in found.items() if peak}


def _over_floor(series: Series) -> list[float]:
    """The fused times of maps beyond 10 MB over the floor's."""
    return [
        line["ms"]["fused"][1] / line["ms"]["floor"][1]
        for line in series.lines
        if line["volume_bytes"] > 1e7 and "floor" in line["ms"]
    ]


def _finish(figure: Figure, group: Group, finding: str) -> None:
    """Add the title, which is the finding, the machine below it, and the legend."""
    inch = 1 / figure.get_figheight()
    figure.text(0.01, 1 - 0.08 * inch, finding, fontsize=12, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.31 * inch, group.title, fontsize=9, color="0.35", va="top")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, 0, 1, 1 - 0.52 * inch))
    known: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(
        list(known.values()), list(known), loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )


# --- the page -----------------------------------------------------------------------------------------


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _table(group: Group) -> str:
    head, _, *rows = markdown(group.lines)
    cells = [[html.escape(cell.strip()) for cell in row.strip("|").split("|")] for row in (head, *rows)]
    lines = [f"<tr><th>{'</th><th>'.join(cells[0])}</th></tr>"]
    lines += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in cells[1:]]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _page(sections: Sequence[str]) -> str:
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%;display:block;margin:1rem 0}table{border-collapse:collapse}"
        ".wide{overflow-x:auto}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}"
    )
    body = "\n".join(f"<section>{section}</section>" for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>mrcn_fast: benchmark</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head>\n<body><h1>mrcn_fast: benchmark</h1>\n"
        "<p>Medians of interleaved rounds. The columns are the baselines' times over the fused time; the "
        "floor is the time of a large copy that moves the compulsory bytes.</p>\n"
        f"{body}\n</body></html>\n"
    )
