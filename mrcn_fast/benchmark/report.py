"""`mrcn-fast bench show --report`: charts of results, each as PNG, and an HTML page with all of them.

There are three charts per machine: the baselines' times over the fused time; time over size beside the floor,
with logarithmic axes; and the peak memory of a call, in volumes. A chart that has no results is not drawn.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from mrcn_fast.benchmark.results import Line, faster, markdown, newest
from mrcn_fast.files import write_atomically

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as missing:
    raise ImportError("--report draws with matplotlib; install it: pip install matplotlib") from missing

# The fused form and its baselines in the order of the bars, with their titles and colours.
FORMS: Final = {
    "fused": ("mrcn_fast", "#1b6ca8"),
    "compile collapsed": ("torch.compile of the collapsed form", "#7fb069"),
    "compile": ("torch.compile of the reference", "#e6aa68"),
    "instance_norm": ("eager with torch's instance_norm", "#a0522d"),
    "eager": ("eager PyTorch", "#ca3c25"),
    "unfused": ("the fused loss after torch's normalize", "#7fb069"),
    "vectorized": ("vectorised eager", "#e6aa68"),
    "loop": ("a loop over identities", "#ca3c25"),
}
FLOOR: Final = "0.35"
# An operation is in the chart of sizes only if at least this many sizes of it were measured.
_LEAST_SIZES: Final = 4


class Group(NamedTuple):
    """The newest results of one machine."""

    title: str
    lines: list[Line]

    @property
    def stem(self) -> str:
        """The start of its charts' file names."""
        return re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-")


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
        parts = [f"<h2>{html.escape(group.title)}</h2>"]
        for name, draw in CHARTS.items():
            figure = draw(group)
            if figure is None:
                continue
            path = folder / f"{group.stem}-{name}.png"
            write_atomically(path, partial(figure.savefig, format="png", dpi=130))
            written.append(path)
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{_base64(path)}">')
        sections.append("\n".join([*parts, _table(group)]))
    page = folder / "report.html"
    write_atomically(page, lambda file: file.write(_page(sections).encode()))
    return [*written, page]


def groups(files: Sequence[Path]) -> list[Group]:
    """Return the newest result of every case, grouped by the machine it was measured on."""
    return [Group(title, list(lines.values())) for title, lines in newest(*files).items()]


# --- charts -------------------------------------------------------------------------------------------


def draw_speedups(group: Group) -> Figure | None:
    """Draw a group of bars per case: each baseline's time over the fused time."""
    lines = [line for line in group.lines if _ratios(line)]
    if not lines:
        return None
    figure, axes = _bars([_ratios(line) for line in lines], "%.1f ×")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [line["case"] for line in lines], fontsize=8)
    axes.set_xlabel("time over mrcn_fast's time")
    _legend(figure, axes, group)
    return figure


def draw_sizes(group: Group) -> Figure | None:
    """Draw time over a volume's bytes, with logarithmic axes: one panel per operation and way."""
    panels: dict[str, list[Line]] = {}
    for line in group.lines:
        if line.get("volume_bytes") and line["layout"] == "nchw" and line["dtype"] == "fp32":
            panels.setdefault(f"{line['operation']} {line['way']}", []).append(line)
    panels = {title: lines for title, lines in panels.items() if len(lines) >= _LEAST_SIZES}
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, (label, color) in FORMS.items():
            _points(axes, lines, name, label, color)
        _points(axes, lines, "floor", "floor: a copy of the compulsory bytes", FLOOR, "--")
        axes.set(xscale="log", yscale="log", title=title, xlabel="bytes of a volume", ylabel="ms")
        axes.grid(True, which="major", alpha=0.3)
    _legend(figure, figure.axes[0], group)
    return figure


def draw_memory(group: Group) -> Figure | None:
    """Draw a group of bars per case: peak memory in volumes, with the size of the results marked."""
    lines = [line for line in group.lines if line.get("peak_bytes") and line.get("result_bytes")]
    if not lines:
        return None
    bars = [{n: peak / line["volume_bytes"] for n, peak in line["peak_bytes"].items()} for line in lines]
    figure, axes = _bars(bars, "%.0f")
    given = [line["result_bytes"] / line["volume_bytes"] for line in lines]
    axes.scatter(given, range(len(lines)), marker="|", s=300, color="black", label="the results", zorder=3)
    axes.set_yticks(range(len(lines)), [line["case"] for line in lines], fontsize=8)
    axes.set_xlabel("peak memory, in volumes of N·C·H·W elements")
    _legend(figure, axes, group)
    return figure


CHARTS: Final[dict[str, Callable[[Group], Figure | None]]] = {
    "speedup": draw_speedups,
    "size": draw_sizes,
    "memory": draw_memory,
}


def _ratios(line: Line) -> dict[str, float]:
    """Return each baseline's time over the fused time; of its two compilations, that of the faster one."""
    ratios = {name: faster(line["ratios"], name) for name in FORMS}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _points(
    axes: matplotlib.axes.Axes, lines: list[Line], name: str, label: str, color: str, style: str = "-"
) -> None:
    times = [(line["volume_bytes"], faster(line["ms"], name)) for line in lines]
    points = sorted((size, ms) for size, ms in times if ms is not None)
    if not points:
        return
    sizes, medians = [size for size, _ in points], [ms[1] for _, ms in points]
    axes.plot(sizes, medians, style, marker="o", markersize=3, label=label, color=color)
    lows, highs = [ms[0] for _, ms in points], [ms[2] for _, ms in points]
    axes.fill_between(sizes, lows, highs, color=color, alpha=0.2, linewidth=0)


def _bars(rows: Sequence[dict[str, float]], text: str) -> tuple[Figure, matplotlib.axes.Axes]:
    """Draw groups of bars by the names of FORMS, the first row on top; `text` formats a bar's value."""
    most = max(sum(name in FORMS for name in row) for row in rows)
    figure = Figure(figsize=(8.5, 1.2 + 0.15 * (most + 1) * len(rows)), layout="constrained")
    axes: matplotlib.axes.Axes = figure.subplots()
    thick = 0.85 / most
    for name, (title, color) in FORMS.items():
        places, values = [], []
        for place, row in enumerate(rows):
            present = [other for other in FORMS if other in row]
            if name in row:
                places.append(place + (present.index(name) - (len(present) - 1) / 2) * thick)
                values.append(row[name])
        if values:
            drawn = axes.barh(places, values, thick, label=title, color=color)
            axes.bar_label(drawn, fmt=text, padding=2, fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.1)
    return figure, axes


def _legend(figure: Figure, axes: matplotlib.axes.Axes, group: Group) -> None:
    figure.suptitle(group.title, fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


# --- the page -----------------------------------------------------------------------------------------


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _table(group: Group) -> str:
    head, _, *rows = markdown(group.lines)
    cells = [[html.escape(cell.strip()) for cell in row.strip("|").split("|")] for row in (head, *rows)]
    lines = [f"<tr><th>{'</th><th>'.join(cells[0])}</th></tr>"]
    lines += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in cells[1:]]
    return f"<table>{''.join(lines)}</table>"


def _page(sections: Sequence[str]) -> str:
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%;display:block;margin:1rem 0}table{border-collapse:collapse}"
        "td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,th:first-child{text-align:left}"
    )
    body = "\n".join(f"<section>{section}</section>" for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>mrcn_fast: benchmark</title>'
        f"<style>{style}</style></head>\n<body><h1>mrcn_fast: benchmark</h1>\n"
        "<p>Medians of interleaved rounds. The columns are the baselines' times over the fused time; the "
        "floor is the time of a large copy that moves the compulsory bytes.</p>\n"
        f"{body}\n</body></html>\n"
    )
