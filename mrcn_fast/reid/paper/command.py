"""`mrcn-fast table`: a table of the paper, trained or printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

from mrcn_fast.flags import Flags
from mrcn_fast.reid.console import log_to_console, progress_bars
from mrcn_fast.reid.kinds import Count, Draw, OneOf, PathText, Several, Split, Trials
from mrcn_fast.reid.paper.made_tables import load_made_table, markdown
from mrcn_fast.reid.paper.recipes import table_names
from mrcn_fast.reid.paper.tables import (
    OPTIONS,
    OVERLAY,
    SYNTHETIC,
    check_table,
    run_table,
    synthetic_places,
    synthetic_trees,
)
from mrcn_fast.reid.settings import kinds_of
from mrcn_fast.reid.training.command import TRAINING_GROUPS
from mrcn_fast.reid.training.config import TrainConfig

# The values that a table itself sets in its runs' configurations, and those of runs in several processes.
_SET_BY_TABLE: Final = frozenset(("data", "out", "dataset", "split", "devices", "nodes"))


def table(flags: Flags, argv: list[str]) -> int:
    """Run `mrcn-fast table`, and return its exit status."""
    _add_flags(flags)
    values, given = flags.values(argv), flags.given(argv)
    sources = [flag for flag in ("--data", "--synthetic", "--from") if values[flag.removeprefix("--")]]
    if len(sources) != 1:
        flags.error(
            f"got {' and '.join(sources) or 'no tree'}, expected one of --data, --synthetic and --from"
        )
    if values["from"]:
        print(markdown(load_made_table(values["from"], values["table"])))
        return 0
    training = {name: given[name] for name in given.keys() & kinds_of(TrainConfig).keys() - _SET_BY_TABLE}
    plan: dict[str, Any] = {
        "out": values["out"],
        "splits": 1 if values["synthetic"] else values["splits"],
        "seeds": values["seeds"],
        "overlay": OVERLAY if values["synthetic"] else None,
        "configure": lambda recipe: TrainConfig(**(dict(recipe) | training)),
    }
    if given.get("columns") and not values["synthetic"]:
        flags.error("got --columns with --data, expected --synthetic: of real trees, name those to be used")
    trees, columns = Path(values["out"]) / "data", values["columns"]
    if values["synthetic"]:
        check_table(values["table"], synthetic_places(trees, columns), **plan)
    log_to_console()
    with progress_bars() as bars:
        made = run_table(
            values["table"],
            synthetic_trees(trees, bars, columns) if values["synthetic"] else values["data"],
            options={name: values[name] for name in OPTIONS},
            overwrite=values["overwrite"],
            progress=bars,
            **plan,
        )
    print(markdown(made))
    return 0


def _add_flags(flags: Flags) -> None:
    flags.add_word("table", Annotated[str, OneOf(tuple(table_names()))], "which one of the paper")
    flags.group("the table")
    flags.add_setting("--data", Several[PathText], None, "the trees of RegDB and SYSU-MM01, or one")
    flags.add_setting("--synthetic", bool, False, "on synthetic trees, scaled down to what two cores train")
    flags.add_setting(
        "--columns",
        Several[Annotated[str, OneOf(SYNTHETIC)]],
        SYNTHETIC,
        "data sets whose columns are made with --synthetic",
    )
    flags.add_setting("--from", PathText, None, "only print a table made before")
    flags.add_setting("--out", PathText, "runs/tables", "folder for runs and table")
    flags.add_setting("--splits", Split, 10, "RegDB splits to train on: the first so many")
    flags.add_setting("--seeds", Count, 1, "trainings of each row, with --seed and the seeds after it")
    flags.add_setting("--trials", Trials, 10, "SYSU-MM01's gallery draws")
    flags.add_setting("--shots", Count, 1, "SYSU-MM01: 1 or 10")
    flags.add_setting("--draw", Draw, "random", "SYSU-MM01's gallery draw")
    flags.add_setting("--overwrite", bool, False, "replace a table of other values in --out; its runs stay")
    flags.add_of(TrainConfig, skip=_SET_BY_TABLE, groups=TRAINING_GROUPS)
