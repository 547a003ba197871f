"""A table that `run_table` made: its file, its Markdown and its chart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat
from typing_extensions import NotRequired, TypedDict

from mrcn_fast.files import write_atomically
from mrcn_fast.reid.documents import DocumentError, read_json
from mrcn_fast.reid.evaluation.pairings import HEADLINE_PAIRING, PAIRINGS, TITLES, exchange
from mrcn_fast.reid.kinds import Share
from mrcn_fast.reid.messages import shown
from mrcn_fast.reid.paper.recipes import Row, TableSpec, load_table
from mrcn_fast.reid.settings import SettingError, checked, with_more

SCORE_TITLES = {"rank1": "R-1", "rank10": "R-10", "rank20": "R-20", "mAP": "mAP", "mINP": "mINP"}
DISTANCES = {"intra": "within people", "inter": "between people", "delta": "δ"}


@with_more
class _Machine(TypedDict):
    cpu: str
    threads: int
    torch: str
    date: str


_Scores = dict[str, Share]


@with_more
class _MadeRow(TypedDict):
    ours: dict[str, _Scores]
    # Tables made by earlier versions lack these.
    std: NotRequired[dict[str, _Scores]]
    pairings: NotRequired[dict[str, dict[str, _Scores]]]
    distances: NotRequired[dict[str, dict[str, FiniteFloat]]]


@with_more
class _MadeTable(TypedDict):
    """The part of a table's file that `markdown` reads."""

    table: str
    synthetic: bool
    trained: int
    seconds: float
    machine: _Machine
    rows: list[_MadeRow]


def load_made_table(path: str | Path, name: str) -> dict[str, Any]:
    """Read the table `name` that `run_table` wrote. Raises DocumentError for any other file."""
    path = Path(path)
    expected = f"table {name} as `mrcn-fast table {name}` writes it"
    try:
        table: dict[str, Any] = checked(_MadeTable, read_json(path, expected), "table")
    except SettingError as error:
        raise DocumentError(f"{path}: expected {expected}; {error}") from None
    if table["table"] != name:
        raise DocumentError(f"{path}: expected {expected}; found table {shown(table['table'])}")
    spec = load_table(name)
    if len(table["rows"]) != len(spec.rows):
        raise DocumentError(
            f"{path}: expected {expected}, of {len(spec.rows)} rows; found {len(table['rows'])}"
        )
    for place, row in enumerate(table["rows"]):
        if (strange := _strange_scores(spec, row)) is not None:
            raise DocumentError(
                f"{path}: expected {expected}; found other scores in row {place + 1}: {shown(strange)}"
            )
    return table


def _strange_scores(spec: TableSpec, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the first of a row's scores that `markdown` can't print."""
    for part in ("ours", "std"):
        for key, found in row.get(part, {}).items():
            if key not in spec.columns or not set(spec.columns[key].scores) <= found.keys():
                return {key: found}
    for key, by_pairing in row.get("pairings", {}).items():
        names = set(by_pairing)
        whole = not names or names == set(PAIRINGS) - {HEADLINE_PAIRING}
        if key not in row["ours"] or not whole or any("rank1" not in of for of in by_pairing.values()):
            return {key: by_pairing}
    for key, found in row.get("distances", {}).items():
        if key not in row["ours"] or not set(DISTANCES) <= found.keys():
            return {key: found}
    return None


def markdown(table: Mapping[str, Any]) -> str:
    """Format a table as Markdown: our figures in percent, and the paper's in brackets.

    The columns of a data set that was not given have no scores of ours, and are left out.
    """
    spec = _with_scores(load_table(table["table"]), table["rows"])
    header = ["Methods"]
    for column in spec.columns.values():
        header += [f"{column.title} {SCORE_TITLES[score]}" for score in column.scores]
    lines = [_line(header), _line(["---"] * len(header))]
    for row, ours in zip(spec.rows, table["rows"], strict=True):
        lines.append(_line([row.title, *_cells(spec, row, ours)]))
    title = f"{spec.title}: ours (the paper's), in percent"
    if any(row.get("std") for row in table["rows"]):
        title += "; mean ± standard deviation over the runs"
    notes = [*_pairing_lines(spec, table["rows"]), *_distance_lines(spec, table["rows"])]
    notes += ["", spec.note] if spec.note else []
    if table["synthetic"]:
        notes += ["", "Synthetic data and scaled-down training: the figures say nothing about the paper's."]
    if table["trained"]:
        where, minutes = table["machine"], table["seconds"] / 60
        notes += [
            "",
            f"{table['trained']} runs trained and scored in {minutes:.0f} minutes on {where['cpu']},",
        ]
        notes += [f"{where['threads']} threads, torch {where['torch']}; {where['date']}."]
    return "\n".join([title, "", *lines, *notes])


def _with_scores(spec: TableSpec, rows: Sequence[Mapping[str, Any]]) -> TableSpec:
    """Leave out of a table's columns those without a score of ours, if any column has one."""
    scored = {key: column for key, column in spec.columns.items() if any(key in row["ours"] for row in rows)}
    return spec._replace(columns=scored or spec.columns)


def _cells(spec: TableSpec, row: Row, made: Mapping[str, Any]) -> list[str]:
    cells = []
    spread = made.get("std", {})
    for key, column in spec.columns.items():
        paper = row.paper.get(key, [None] * len(column.scores))
        for score, published in zip(column.scores, paper, strict=True):
            own = f"{100 * made['ours'][key][score]:.1f}" if key in made["ours"] else "–"
            if key in spread:
                own += f" ± {100 * spread[key][score]:.1f}"
            quoted = "–" if published is None else f"{published:.1f}"
            cells.append(f"{own} ({quoted})" if row.recipes else quoted)
    return cells


def _pairing_lines(spec: TableSpec, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format rank-1 by each pairing, for the rows whose network has two test features, if there are any."""
    rank1 = [
        {key: _rank1(row, key) for key, found in row.get("pairings", {}).items() if found} for row in rows
    ]
    keys = [key for key in spec.columns if any(key in found for found in rank1)]
    if not keys:
        return []
    header = ["Rank-1 by pairing"]
    header += [f"{spec.columns[key].title} {TITLES[pairing]}" for key in keys for pairing in PAIRINGS]
    lines, warnings = ["", _line(header), _line(["---"] * len(header))], []
    for row, found in zip(spec.rows, rank1, strict=True):
        if not found:
            continue
        cells = [f"{100 * found[key][p]:.1f}" if key in found else "–" for key in keys for p in PAIRINGS]
        lines.append(_line([row.title, *cells]))
        texts = {key: exchange(by_pairing) for key, by_pairing in found.items()}
        warnings += [
            f"{row.title}, {spec.columns[key].title}: {text}." for key, text in texts.items() if text
        ]
    return lines + [line for warning in warnings for line in ("", warning)]


def _distance_lines(spec: TableSpec, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format the distances of Figure 5 and its δ, of the rows that have them, if there are any."""
    measured = [row.get("distances", {}) for row in rows]
    keys = [key for key in spec.columns if any(key in found for found in measured)]
    if not keys:
        return []
    header = ["Mean distance (Figure 5)"]
    header += [f"{spec.columns[key].title} {title}" for key in keys for title in DISTANCES.values()]
    lines = ["", _line(header), _line(["---"] * len(header))]
    for row, found in zip(spec.rows, measured, strict=True):
        cells = [_distance(found[key], name) if key in found else "–" for key in keys for name in DISTANCES]
        lines += [_line([row.title, *cells])] if found else []
    return lines


def _distance(found: Mapping[str, float], name: str) -> str:
    spread = f" ± {found['std']:.3f}" if name == "delta" and "std" in found else ""
    return f"{found[name]:.3f}{spread}"


def _rank1(row: Mapping[str, Any], key: str) -> dict[str, float]:
    others = {pairing: scores["rank1"] for pairing, scores in row["pairings"][key].items()}
    return {HEADLINE_PAIRING: row["ours"][key]["rank1"], **others}


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw_curves(spec: TableSpec, table: Mapping[str, Any], path: Path) -> None:
    """Draw the scores over the rows, one panel per column."""
    # pyplot isn't used, because it would choose a backend for the caller.
    from matplotlib.figure import Figure

    keys = [key for key in spec.columns if key in table["rows"][0]["ours"]]
    figure = Figure(figsize=(5 * len(keys), 3.6), layout="constrained")
    for panel, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        column = spec.columns[key]
        for score in column.scores:
            values = [100 * row["ours"][key][score] for row in table["rows"]]
            panel.plot([float(row.title) for row in spec.rows], values, "o-", label=SCORE_TITLES[score])
        panel.set(title=column.title, xlabel=spec.curve, ylabel="percent")
        panel.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
