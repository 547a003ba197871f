"""Draw the pictures of README.md and the charts of docs/performance.md: `make readme-figures`.

    python benchmarks/readme_figures.py [--demo runs/demo] [--to benchmarks/charts]

Everything is drawn from files in benchmarks/results. With --demo, the ranking lists of a finished demo are
written there first, from its network MRCN. Its people are drawn again at a size that readers can see.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from mrcn_fast.benchmark.forms import FORMS
from mrcn_fast.benchmark.report import draw_charts, groups
from mrcn_fast.benchmark.results import Line, faster
from mrcn_fast.block import MODALITIES
from mrcn_fast.files import write_atomically, write_json
from mrcn_fast.reid.data import PersonImages, Sample
from mrcn_fast.reid.data.datasets.regdb import CAMERA_OF
from mrcn_fast.reid.data.synthetic import writers
from mrcn_fast.reid.data.types import Modality
from mrcn_fast.reid.evaluation.trained import open_trained
from mrcn_fast.reid.paper.figures import ranking_of
from mrcn_fast.reid.paper.plots import Row, draw_rankings
from mrcn_fast.reid.report import choose_subject

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
CHARTS: Final = ROOT / "benchmarks" / "charts"
RANKING: Final = RESULTS / "demo-ranking.json"
# The files whose charts docs/performance.md shows: all machines that its tables are of.
MEASURED: Final = (
    "cpu-amd-epyc-zen4-2-threads.jsonl",
    "sweep-amd-epyc-zen4-2-threads.jsonl",
    "fresh-pages-xeon-2-threads.jsonl",
    "nvidia-h200.jsonl",
)
_DOTS_PER_INCH: Final = 120
_PERCENTILES: Final = (50, 20, 10)
_PERSON: Final = (192, 96)  # height and width of a person in the picture, in pixels


class Machine(NamedTuple):
    """A panel of the chart of speeds."""

    name: str
    file: str
    case: str
    unit: str
    factor: float  # from milliseconds to the unit


MACHINES: Final = (
    Machine(
        "2 cores of an AMD EPYC, float32",
        "cpu-amd-epyc-zen4-2-threads.jsonl",
        "block forward 16x256x72x32 nchw",
        "ms",
        1.0,
    ),
    Machine(
        "NVIDIA H200, bfloat16",
        "nvidia-h200.jsonl",
        "gpu block forward 16x256x72x32 nchw bf16",
        "µs",
        1000.0,
    ),
)
COMPARED: Final = ("fused", "compile collapsed", "compile", "eager")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all pictures, and print their paths."""
    parser = argparse.ArgumentParser(description="Draw the pictures of README.md and of docs/performance.md.")
    parser.add_argument("--demo", type=Path, help="folder of a finished demo whose ranking lists are shown")
    parser.add_argument("--to", type=Path, default=CHARTS, help="folder for the pictures")
    options = parser.parse_args(argv)
    if options.demo:
        write_json(RANKING, ranking_lists(options.demo))
    options.to.mkdir(parents=True, exist_ok=True)
    for path in (*draw_readme(options.to), *draw_measured(options.to)):
        print(path)
    return 0


def draw_measured(folder: Path) -> list[Path]:
    """Draw the charts of `MEASURED`."""
    found = groups([RESULTS / name for name in MEASURED])
    return [path for group in found for path in draw_charts(group, folder)]


def draw_readme(folder: Path) -> list[Path]:
    """Draw the three pictures of README.md; each names in its metadata what it was drawn from."""
    ranking, speeds = json.loads(RANKING.read_text(encoding="utf-8")), measured_speeds()
    pictures = {
        "ranking": (draw_ranking(ranking), ranking),
        "block": (draw_block(), {}),
        "speed": (draw_speed(speeds), speeds),
    }
    paths = []
    for name, (figure, drawn_from) in pictures.items():
        paths.append(folder / f"readme-{name}.png")
        text = {"Description": json.dumps(drawn_from)}
        save = partial(figure.savefig, format="png", dpi=_DOTS_PER_INCH, metadata=text)
        write_atomically(paths[-1], save)
    return paths


# --- the ranking lists ------------------------------------------------------------------------------


def ranking_lists(demo: Path) -> dict[str, Any]:
    """Find, with a demo's network MRCN, the visible images nearest to some infrared queries.

    A list is as long as a person has visible images. The queries are those at `_PERCENTILES` when all are in
    the order of the number of right images in their lists, so that bad lists are shown beside good ones.

    Returns:
        the parameters of the synthetic people, Rank-1 of the search, and the lists: paths, and whether each
        is of the query's person
    """
    trained = open_trained(demo / "mrcn", demo / "data")
    people = json.loads((demo / "data" / writers.MARKER).read_text(encoding="utf-8"))
    subject, count = choose_subject(trained.dataset), people["images"]
    features = {modality: trained.features(subject.images[modality], modality) for modality in MODALITIES}
    search = subject.listed
    ranking = ranking_of(subject.images, features, search, search.query)
    correct = ranking.correct[:, :count]
    ordered = np.argsort(correct.sum(axis=1), kind="stable")
    shown = [ordered[len(ordered) * percentile // 100] for percentile in _PERCENTILES]

    def place(sample: Sample) -> str:
        return sample.path.relative_to(demo / "data").as_posix()

    return {
        "people": people,
        "search": search.name,
        "rank1": ranking.correct[:, 0].mean(),
        "lists": [
            {
                "query": place(search.query[row]),
                "found": [place(search.galleries[0][hit]) for hit in ranking.order[row, :count]],
                "correct": correct[row].tolist(),
            }
            for row in shown
        ],
    }


def draw_ranking(ranking: dict[str, Any]) -> Figure:
    """Draw the lists; the people are rendered again, larger than the network sees them."""
    names = [name for of in ranking["lists"] for name in (of["query"], *of["found"])]
    with tempfile.TemporaryDirectory() as folder:
        images = dict(zip(names, _rendered(names, ranking["people"], Path(folder)), strict=True))
    rows = [
        Row(
            f"{sum(of['correct'])} of {len(of['correct'])} right",
            images[of["query"]],
            [images[name] for name in of["found"]],
            of["correct"],
        )
        for of in ranking["lists"]
    ]
    title = f"Queries in infrared, found in visible light by MRCN (Rank-1 {100 * ranking['rank1']:.0f} %)"
    return draw_rankings({title: rows}, count=len(ranking["lists"][0]["found"]))


def _rendered(names: Sequence[str], people: dict[str, Any], folder: Path) -> list[Any]:
    """Render images of a synthetic tree in RegDB's layout at `_PERSON`'s size: uint8 (height, width, 3)."""
    known = {field.name for field in dataclasses.fields(writers.RegDBOptions)}
    values = {name: value for name, value in people.items() if name in known}
    options = writers.RegDBOptions(**values | {"image_size": _PERSON})
    shots, samples = [], []
    for name in names:
        kind, identity, file = name.split("/")
        modality: Modality = "visible" if kind == "Visible" else "infrared"
        number = int(file.split("_")[2]) - (int(identity) - 1) * options.images
        shots.append(writers._Shot(name, int(identity), CAMERA_OF[modality], number))
        samples.append(Sample(folder / name, int(identity), CAMERA_OF[modality], modality))
    cameras = {number: options.camera(number, 1, modality) for modality, number in CAMERA_OF.items()}
    writers._write_images(folder, options, shots, cameras, None)
    images = PersonImages(samples, _PERSON)
    return [images[row].permute(1, 2, 0).numpy() for row in range(len(samples))]


# --- the chart of speeds ------------------------------------------------------------------------------


def measured_speeds() -> dict[str, dict[str, float]]:
    """The medians of `COMPARED` in milliseconds, by the machine's name."""
    return {machine.name: _milliseconds(machine) for machine in MACHINES}


def _milliseconds(machine: Machine) -> dict[str, float]:
    (group,) = groups([RESULTS / machine.file])
    line: Line = next(line for line in group.lines if line["case"] == machine.case)
    return {form: faster(line["ms"], form)[1] for form in COMPARED}


def draw_speed(speeds: dict[str, dict[str, float]]) -> Figure:
    """Draw a panel per machine, with a bar for each form of the block."""
    figure = Figure(figsize=(9.8, 3.5), layout="constrained")
    figure.suptitle("The block's forward pass on maps of 16 × 256 × 72 × 32", fontweight="bold", fontsize=13)
    for axes, machine in zip(figure.subplots(1, len(MACHINES), sharey=True), MACHINES, strict=True):
        times = speeds[machine.name]
        for place, form in enumerate(COMPARED):
            bar = axes.barh(place, times[form] * machine.factor, 0.66, color=FORMS[form].color)
            ratio = times[form] / times["fused"]
            text = f"{times[form] * machine.factor:.3g} {machine.unit}"
            axes.bar_label(bar, [text if form == "fused" else f"{text}  ({ratio:.1f} ×)"], padding=4)
        axes.set_yticks(range(len(COMPARED)), [FORMS[form].title for form in COMPARED])
        axes.set_ylim(len(COMPARED) - 0.5, -0.5)
        axes.set_title(f"{machine.name}:\n{_finding(times)}", fontsize=9.5)
        axes.set_xlabel(f"{machine.unit}, shorter is better")
        axes.set_xlim(0, 1.6 * times["eager"] * machine.factor)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _finding(times: dict[str, float]) -> str:
    eager, compiled = times["eager"], min(times["compile"], times["compile collapsed"])
    ratios = (time / times["fused"] for time in (eager, compiled))
    return "eager {:.0f} × as long, the best compiled {:.1f} ×".format(*ratios)


# --- the block as a diagram ---------------------------------------------------------------------------

_COLORS: Final = {"v": "#b35900", "n": "#5b3a8c"}  # what is of visible images, what of infrared ones
_COLUMNS: Final = {
    8: "two feature maps",
    25: "two statistics",
    43: "normalized, residual",
    60: "four gates",
    83: "six sets",
}
_NOTE: Final = (
    "A₁ serves restitution, within a modality; A₂ serves compensation, across them. The fused block reads\n"
    "the maps once for the statistics and once more to write all six sets; it stores no normalized map\n"
    "and no residual."
)


def draw_block() -> Figure:
    """Draw the block: two maps, two statistics of each, four gates, six sets."""
    figure = Figure(figsize=(9.6, 5.2))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 96), ylim=(-5.5, 49))
    axes.axis("off")
    for x, text in _COLUMNS.items():
        axes.text(x, 46.8, text, ha="center", va="center", fontsize=11, fontweight="bold", color="0.15")
    _draw_modality(axes, "v", "visible", 33.5, 1)
    _draw_modality(axes, "n", "infrared", 12.5, -1)
    axes.text(48, -2.5, _NOTE, ha="center", va="center", fontsize=9.5, color="0.3", linespacing=1.4)
    return figure


def _draw_modality(axes: Axes, m: str, name: str, middle: float, up: int) -> None:
    """Draw the half of the modality `m`; `up` is 1 where its original set is the topmost one."""
    color, other = _COLORS[m], "n" if m == "v" else "v"
    original, restituted, compensated = (middle + up * offset for offset in (9, 2.4, -4.2))
    normalized, residual = middle + 3.8 * up, middle - 3.8 * up
    gates = residual + 2.6 * up, residual - 3.4 * up
    _box(axes, 8, middle, 12, 6.4, f"$F_{m}$\n{name}", color, fill=0.16)
    _box(axes, 25, middle, 14, 6.4, "mean $\\mu$\nvariance $\\sigma^2$", color, fill=0.06)
    _box(
        axes,
        43,
        normalized,
        14,
        4.4,
        rf"$\tilde F_{m} = \gamma\,(F_{m}-\mu)/\sigma + \beta$",
        color,
        fill=0.06,
        size=8,
    )
    _box(axes, 43, residual, 14, 4.4, rf"$M_{m} = F_{m} - \tilde F_{m}$", color, fill=0.06)
    for number, y in zip((1, 2), gates, strict=True):
        _box(axes, 60, y, 9, 4.2, f"$A_{number}(M_{m})$", color, fill=0.9)
        _line(axes, [(50, residual), (55.5, y)], color)
    sets = {
        original: f"${m} = F_{m}$",
        restituted: rf"${m}_+ = \tilde F_{m} + A_1(M_{m})\,M_{m}$",
        compensated: rf"${m}_- = \tilde F_{m} + A_2(M_{other})\,M_{other}$",
    }
    for y, text in sets.items():
        _box(axes, 83, y, 24, 4.8, text, color, fill=0.16, size=11)
    _line(axes, [(14, middle), (18, middle)], color)
    for y in (normalized, residual):
        _line(axes, [(32, middle), (36, y)], color)
    _line(axes, [(8, middle + 3.2 * up), (8, original), (71, original)], color)
    _line(axes, [(50, normalized), (71, normalized)], color)
    _line(axes, [(67.5, normalized), (67.5, compensated + up), (71, compensated + up)], color)
    _line(axes, [(64.5, gates[0]), (71, restituted - up)], color)
    # The gate of compensation serves the other modality, whose sets are mirrored at the picture's middle.
    _line(axes, [(64.5, gates[1]), (71, 46 - compensated + up)], color, width=2.2)


def _box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    color: str,
    *,
    fill: float,
    size: float = 10,
) -> None:
    """Draw a box around its middle; `fill` is the opacity of its colour, and dark boxes have white text."""
    for face, edge, alpha, order in (
        ("white", "none", 1, 3),
        (color, "none", fill, 4),
        ("none", color, 1, 5),
    ):
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.8",
                facecolor=face,
                edgecolor=edge,
                alpha=alpha,
                linewidth=1.2,
                zorder=order,
            )
        )
    ink = "white" if fill > 0.5 else "0.1"
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=ink, zorder=6)


def _line(axes: Axes, points: Sequence[tuple[float, float]], color: str, width: float = 1.2) -> None:
    """Draw a line through points, with an arrow at its end."""
    axes.plot(*zip(*points[:-1], strict=True), color=color, linewidth=width, zorder=2)
    axes.annotate(
        "",
        points[-1],
        points[-2],
        arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0},
        zorder=2,
    )


if __name__ == "__main__":
    raise SystemExit(main())
