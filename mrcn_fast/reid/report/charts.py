"""The charts of a report, each a figure of its own, so that a phone shows them one below the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would choose the caller's backend
from matplotlib.ticker import MaxNLocator

from mrcn_fast.benchmark.forms import FORMS
from mrcn_fast.reid.paper.plots import plain_text

# A colour for each network, in their order, from the palette of Okabe and Ito, and a dash pattern beside it.
COLORS: Final = ("#6b6b6b", "#e69f00", "#0072b2", "#cc79a7", "#009e73", "#56b4e9", "#d55e00")
STYLES: Final = ("-", "--", "-.", ":")

# The measurements of training steps that are drawn, by their names in the journal.
TERMS: Final = {
    "identity": "Identity loss",
    "triplet": "Triplet loss",
    "cqc": "CQC loss",
    "causality": "Causality loss",
    "accuracy": "Accuracy on the training images",
}

Curve = tuple[Sequence[float], Sequence[float]]


class BlockTimes(NamedTuple):
    """Medians of the block's forward and backward pass in milliseconds, on maps of this network's size."""

    fused: float
    plain: float  # in plain PyTorch
    backend: str  # that served the fused passes; "reference" where no fused one can
    device: str
    maps: str  # their shape in words
    note: str = ""  # a further sentence


def draw_losses(journals: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Figure]:
    """Draw the measurements of training over the steps: one figure per term, one line per network.

    Args:
        journals: the lines of each network's metrics.jsonl by the network's title

    Returns:
        a figure for each of `TERMS` that a network was trained with, by the term's name
    """
    figures: dict[str, Figure] = {}
    for term, title in TERMS.items():
        curves = {
            name: ([line["step"] for line in lines], [line[term] for line in lines])
            for name, lines in journals.items()
        }
        # A term that a network is not trained with is 0 throughout.
        if any(any(values) for _, values in curves.values()):
            figures[term] = _draw_curves(title, curves, "training step")
    return figures


def draw_cmc(curves: Mapping[str, torch.Tensor]) -> Figure:
    """Draw cumulative matching curves: the share of queries with a match among the first k, in percent."""
    drawn = {name: (range(1, len(curve) + 1), (100 * curve).tolist()) for name, curve in curves.items()}
    figure = _draw_curves("Cumulative matching curves", drawn, "rank k", marker="o")
    (axes,) = figure.axes
    lowest = min(min(values) for _, values in drawn.values())
    axes.set(ylabel="queries with a match among the first k (%)", ylim=(max(0, 10 * (lowest // 10)), 101))
    axes.set_xticks([1, 5, 10, 15, 20])
    return figure


def draw_block(times: BlockTimes) -> Figure:
    """Draw a bar for each form of the block: its forward and backward pass in milliseconds."""
    figure = Figure(figsize=(5.2, 1.9), layout="constrained")
    axes = figure.subplots()
    bars = {"fused": times.fused, "eager": times.plain}
    for place, (form, milliseconds) in enumerate(bars.items()):
        bar = axes.barh(place, milliseconds, 0.62, color=FORMS[form].color)
        axes.bar_label(bar, [f"{milliseconds:.2f} ms"], padding=4)
    axes.set_yticks(range(len(bars)), [FORMS[form].title for form in bars])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel("forward and backward (ms)")
    _tidy(axes)
    return figure


def _draw_curves(
    title: str, curves: Mapping[str, Curve], xlabel: str, *, marker: str | None = None
) -> Figure:
    figure = Figure(figsize=(4.8, 3.3), layout="constrained")
    axes = figure.subplots()
    for index, (name, (x, y)) in enumerate(curves.items()):
        # A curve of zeros is of a loss that this network is trained without.
        if any(y):
            axes.plot(
                x,
                y,
                STYLES[index % len(STYLES)],
                color=COLORS[index % len(COLORS)],
                marker=marker or ("o" if len(x) < 3 else None),  # a line of one point is invisible
                markersize=3.5,
                label=plain_text(name),
            )
    axes.set(title=title, xlabel=xlabel, ylim=(0, 1.08 * max(max(y, default=0) for _, y in curves.values())))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    axes.grid(True, alpha=0.25)
    _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
