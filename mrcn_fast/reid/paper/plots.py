"""The paper's Figures 5 and 6, computed and drawn from plain arrays. No window is opened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.typing import LineStyleType
from numpy.typing import NDArray
from torch import Tensor

from mrcn_fast.reid.evaluation.distances import BINS, FARTHEST, Distances, unit_features
from mrcn_fast.reid.evaluation.scores import skipped_images

# The colours of distances in Figure 5, of frames in Figure 6, and of up to 20 people. Colour-blind readers
# can tell blue from orange, and this green from this red; frames of wrong images are dashed too.
INTRA, INTER = "#0072b2", "#e69f00"
CORRECT, WRONG, QUERY = "#009e73", "#cc3311", "#4d4d4d"
PEOPLE = "tab20"

_BARS = 60  # at most, of the distances of Figure 5


def draw_distances(columns: Mapping[str, Distances], *, stacked: bool = False) -> Figure:
    """Draw Figure 5 (a-e): one panel per title, all on one scale, with dashed means and δ.

    The panels stand side by side, as in the paper, or `stacked` one below the other.
    """
    figure, panels = _panels(len(columns), *((4.6, 2.0) if stacked else (3.1, 3.0)), stacked=stacked)
    used = np.flatnonzero(sum(d.intra + d.inter for d in columns.values()))
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, BINS - 1)
    group = -(-(last + 1 - first) // _BARS)
    for panel, (title, found) in zip(panels, columns.items(), strict=True):
        for counts, color, name in ((found.intra, INTRA, "one person"), (found.inter, INTER, "two people")):
            starts = np.arange(first, last + 1, group)
            bars = np.add.reduceat(counts[: last + 1], starts)
            edges = np.append(starts, starts[-1] + group) * (FARTHEST / BINS)
            panel.stairs(
                100 * bars / max(1, bars.sum()), edges, color=color, fill=True, alpha=0.45, label=name
            )
        for mean, color in ((found.intra_mean, INTRA), (found.inter_mean, INTER)):
            if math.isfinite(mean):  # there is a pair
                panel.axvline(mean, ymax=0.87, color=color, linestyle="--", linewidth=1.3)
        panel.set_title(plain_text(title))
        delta = f"{found.delta:.3f}" if math.isfinite(found.delta) else "–"
        panel.text(0.03, 0.96, f"δ = {delta}", transform=panel.transAxes, va="top")
        panel.margins(x=0.02)
    # δ stands above the bars and the means.
    top = 1.2 * max(panel.get_ylim()[1] for panel in panels)
    for panel in panels:
        panel.set_ylim(0, top)
    figure.supylabel("share of pairs (%)", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel("distance of visible and infrared features of length 1 (dashed: means)", fontsize=9)
    return figure


def tsne_map(features: Tensor, *, seed: int = 0) -> NDArray[np.float32]:
    """Compute the t-SNE map of features scaled to length 1: (n, D) -> (n, 2); equal seeds give equal maps.

    It starts from the principal components. The perplexity is 30, or less for fewer than 91 images. Raises
    ValueError for fewer than three images.
    """
    check_map_size(len(features))
    # Imported here, because the import takes a second.
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    perplexity = min(30.0, (len(features) - 1) / 3)
    embedding = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    # One thread gives the same map on every machine, and in t-SNE's many short steps others would mostly
    # wait.
    with threadpool_limits(1):
        return embedding.fit_transform(unit_features(features, "features").numpy())


def check_map_size(images: int) -> None:
    """Raise ValueError for fewer images than a t-SNE map needs."""
    if images < 3:
        raise ValueError(f"a t-SNE map needs at least 3 images; got {images}")


def draw_tsne(
    columns: Mapping[str, NDArray[np.float32]], ids: Sequence[int], infrared: Sequence[bool]
) -> Figure:
    """Draw Figure 5 (f-j): one (n, 2) map per title, one colour per person, crosses for infrared images."""
    figure, panels = _panels(len(columns), 3.1, 3.3)
    people, owner = np.unique(np.asarray(ids), return_inverse=True)
    palette = matplotlib.colormaps[PEOPLE if len(people) <= 20 else "turbo"]
    shades = palette(np.arange(len(people)) if len(people) <= 20 else np.linspace(0, 1, len(people)))
    crosses = np.asarray(infrared, dtype=bool)
    for panel, (title, points) in zip(panels, columns.items(), strict=True):
        for chosen, marker, size in ((~crosses, "o", 14), (crosses, "x", 18)):
            width = 0 if marker == "o" else 1.0
            x, y = points[chosen].T
            panel.scatter(x, y, s=size, c=shades[owner[chosen]], marker=marker, linewidths=width)
        panel.set_title(plain_text(title))
        panel.set(xticks=[], yticks=[])
        panel.margins(0.06)
    shapes = [
        Line2D([], [], color="0.3", marker=marker, linestyle="", label=label)
        for marker, label in (("o", "visible"), ("x", "infrared"))
    ]
    figure.legend(
        handles=shapes,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        title=f"{len(people)} people, by colour",
    )
    return figure


class Ranking(NamedTuple):
    """The nearest gallery images of each query, (Q, count): columns (-1 past the last), and which match."""

    order: NDArray[np.int64]
    correct: NDArray[np.bool_]


def ranking(
    distance: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
    protocol: str,
    *,
    count: int = 10,
) -> Ranking:
    """Rank the gallery images of each query by (Q, G) distances, as `evaluation.score` does.

    Images that a query skips are left out, and equal distances rank in the order of the gallery. The other
    arguments are those of `score`. Raises ValueError for distances that are not finite.
    """
    if not distance.isfinite().all():
        raise ValueError("distance must be finite; got NaN or infinity. Look for them in the features")
    skipped = skipped_images(query_ids, gallery_ids, query_cameras, gallery_cameras, protocol)
    order = distance.masked_fill(skipped, torch.inf).argsort(dim=1, stable=True)[:, :count]
    order = order.masked_fill(skipped.gather(1, order), -1)
    correct = (gallery_ids[order] == query_ids[:, None]) & (order >= 0)
    return Ranking(order.numpy(), correct.numpy())


class Row(NamedTuple):
    """A query, its name, and the images found for it: uint8 (H, W, 3)."""

    name: str
    query: NDArray[np.uint8]
    found: Sequence[NDArray[np.uint8]]
    correct: Sequence[bool]


def draw_rankings(blocks: Mapping[str, Sequence[Row]], *, count: int = 10) -> Figure:
    """Draw Figure 6: one block per title, one row per query, green frames for matches, red for others."""
    height, width = next(iter(blocks.values()))[0].query.shape[:2]
    rows = sum(map(len, blocks.values()))
    cell = 0.8  # inches
    size = (count + 1.2) * (cell + 0.12) + 0.9, rows * (cell * height / width + 0.14) + 0.62 * len(blocks)
    spaces = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=size, layout=spaces)
    parts = figure.subfigures(
        len(blocks), 1, squeeze=False, height_ratios=[len(block) for block in blocks.values()]
    )[:, 0]
    for part, (title, block) in zip(parts, blocks.items(), strict=True):
        part.suptitle(plain_text(title), fontsize=12, fontweight="bold")
        # A narrow empty column separates the query.
        ratios = [1, 0.15, *[1] * count]
        panels = part.subplots(len(block), count + 2, squeeze=False, width_ratios=ratios)
        for line, (axes, row) in enumerate(zip(panels, block, strict=True)):
            for panel in axes:
                panel.axis("off")
            _frame(axes[0], row.query, QUERY, "-")
            axes[0].set_ylabel(row.name, fontsize=8)
            for panel, image, correct in zip(axes[2:], row.found, row.correct, strict=False):
                _frame(panel, image, *((CORRECT, "-") if correct else (WRONG, (0, (2.5, 1.2)))))
            if line == 0:
                for panel, name in zip((axes[0], *axes[2:]), ("query", *range(1, count + 1)), strict=True):
                    panel.set_title(str(name), fontsize=9)
    return figure


def plain_text(title: str) -> str:
    """Escape a title, which may contain the name of a folder, for matplotlib."""
    readable = title.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return readable.replace("$", r"\$")


def _frame(panel: Axes, image: NDArray[np.uint8], color: str, style: LineStyleType) -> None:
    panel.axis("on")
    panel.imshow(image, interpolation="bilinear")
    panel.set(xticks=[], yticks=[])
    for spine in panel.spines.values():
        spine.set(color=color, linewidth=3, linestyle=style)


def _panels(count: int, width: float, height: float, *, stacked: bool = False) -> tuple[Figure, list[Axes]]:
    if not count:
        raise ValueError("expected at least one column to draw; got none")
    rows, columns = (count, 1) if stacked else (1, count)
    figure = Figure(figsize=(0.5 + width * columns, height * rows + 0.4), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
