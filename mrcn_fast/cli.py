"""The command mrcn-fast: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mrcn_fast.memory import MemoryShortageError, enough_memory

INSTALL_REID = 'this command needs the packages of [reid]: pip install "mrcn-fast[reid]"'


class Command(NamedTuple):
    """A subcommand: a line of help, and what runs it: arguments after its name -> exit status."""

    help: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mrcn-fast argv...` (the process's arguments by default); returns the exit status.

    0: done. 2: something the caller can put right, told in one message on stderr. 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="mrcn-fast",
        description="Visible-infrared person re-identification with MRCN's fused block and loss.",
        epilog="commands:\n"
        + "\n".join(f"  {name:8}{command.help}" for name, command in COMMANDS.items())
        + "\n\n`mrcn-fast COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own options"
    )
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    traced = False
    try:
        known = parser.parse_args(arguments)
        traced = known.traceback
        with enough_memory(f"mrcn-fast {known.command}", "Ask for less at a time"):
            return COMMANDS[known.command].run(known.arguments)
    except SystemExit as stop:  # argparse after --help (0) and wrong flags (2)
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("mrcn-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if traced or not _is_users(error):
            raise
        print(f"mrcn-fast: error: {_message(error)}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """Whether the caller can put it right: arguments, files, missing packages; not a defect of ours."""
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError, MemoryShortageError)):
        return True
    # By name: the modules need torch, or the packages of [reid].
    return type(error).__name__ in ("BackendError", "TrainingError")


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        ours = (error.name or "").startswith("mrcn_fast")
        return f"{error}" if ours else f"{error.name} is not installed; {INSTALL_REID}"
    # An error from a DataLoader's process arrives with that process's traceback around it.
    text = str(error)
    if text.startswith("Caught "):
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return text.strip() or type(error).__name__


def _info(argv: list[str]) -> int:
    """Versions, backends with reasons, the native build: works with torch alone."""
    argparse.ArgumentParser(prog="mrcn-fast info", description=COMMANDS["info"].help).parse_args(argv)
    import torch

    import mrcn_fast
    from mrcn_fast.backends import cuda, native

    print(f"mrcn_fast {mrcn_fast.__version__}")
    print(f"torch     {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python    {platform.python_version()}, {platform.system()} {platform.machine()}")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"gpu       {', '.join(devices) or 'torch sees none'}")
    print("backends")
    for name, status in mrcn_fast.backends().items():
        print(f"  {name:10}{'usable' if status.usable else 'not usable'}: {status.reason}")
    for title, build in (("native library", native.build_info()), ("CUDA part", cuda.build_info())):
        if build:
            print(title)
        for key, value in build.items():
            print(f"  {key:10}{', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return 0


def _synth(argv: list[str]) -> int:
    from mrcn_fast.reid.console import progress_bars
    from mrcn_fast.reid.data import WRITERS

    # The layout first: the other flags are those of its writer.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--layout", choices=WRITERS, default="sysu")
    write = WRITERS[first.parse_known_args(argv)[0].layout]
    parser = _parser("synth")
    parser.add_argument("--out", required=True, help="folder for the tree; made where it isn't there")
    parser.add_argument(
        "--layout",
        choices=list(WRITERS),
        default="sysu",
        help="data set whose tree is written; --layout NAME --help lists the flags of each",
    )
    parser.add_function_arguments(write, skip={"root", "progress"})
    values = parser.parse_args(_words(argv, write)).as_dict()
    values.pop("layout")
    with progress_bars() as bars:
        task = bars.add_task("images", total=None, status="")
        root = write(
            values.pop("out"),
            progress=lambda done, total: bars.update(task, completed=done, total=total),
            **values,
        )
    print(root)
    return 0


def _train(argv: list[str]) -> int:
    from mrcn_fast.reid.config import TrainConfig
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.recipes import load_recipe
    from mrcn_fast.reid.training import Trainer

    # The recipe first: its values are the defaults that all other flags override.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    recipe = first.parse_known_args(argv)[0].recipe
    parser = _config_parser({} if recipe is None else load_recipe(recipe))
    parser.add_argument(
        "--recipe",
        help="a row of the paper's tables, such as regdb-mrcn, or a .yaml file like it; flags override it",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of the values below; later flags override it"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    values = parser.parse_args(_words(argv, TrainConfig)).as_dict()
    values.pop("config")
    values.pop("recipe")
    resume, overwrite = values.pop("resume"), values.pop("overwrite")
    log_to_console()
    print(Trainer(TrainConfig(**values)).fit(resume=resume, overwrite=overwrite))
    return 0


def _test(argv: list[str]) -> int:
    parser = _parser("test")
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.scoring import describe, score_checkpoint

    parser.add_function_arguments(score_checkpoint, skip={"progress"})
    values = parser.parse_args(_words(argv, score_checkpoint)).as_dict()
    log_to_console()
    print(describe(score_checkpoint(**values)))
    return 0


def _table(argv: list[str]) -> int:
    from mrcn_fast.reid.config import TrainConfig
    from mrcn_fast.reid.console import log_to_console, progress_bars
    from mrcn_fast.reid.devices import check_device
    from mrcn_fast.reid.recipes import table_names
    from mrcn_fast.reid.tables import OVERLAY, markdown, run_table, synthetic_trees

    parser = argparse.ArgumentParser(
        prog="mrcn-fast table",
        description=COMMANDS["table"].help,
        epilog="All other flags are those of `mrcn-fast train`, but for --dataset and --split, and override "
        "the recipes' values.",
        allow_abbrev=False,
    )
    parser.add_argument("table", choices=table_names(), help="of the paper")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", nargs="+", metavar="TREE", help="the trees of RegDB and SYSU-MM01, or one")
    source.add_argument(
        "--synthetic", action="store_true", help="on synthetic trees, scaled down to what two cores train"
    )
    source.add_argument("--from", dest="file", metavar="FILE", help="only print a table made before")
    parser.add_argument("--out", default="runs/tables", help="folder for runs and table (%(default)s)")
    parser.add_argument("--splits", type=int, default=10, help="RegDB splits to train on (%(default)s)")
    parser.add_argument("--trials", type=int, default=10, help="SYSU-MM01's gallery draws (%(default)s)")
    parser.add_argument("--shots", type=int, default=1, help="SYSU-MM01: 1 or 10 (%(default)s)")
    parser.add_argument("--draw", default="random", help="SYSU-MM01: random or official (%(default)s)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a table of other values in --out; its runs stay"
    )
    known, flags = parser.parse_known_args(_words(argv, TrainConfig))
    if known.file:
        print(markdown(json.loads(Path(known.file).read_text(encoding="utf-8"))))
        return 0
    log_to_console()

    def configure(values: Mapping[str, Any]) -> TrainConfig:
        return TrainConfig(**_config_parser(values).parse_args(flags).as_dict())

    if known.synthetic:
        # Before trees are written: what the flags ask for that this machine hasn't.
        asked = configure({"data": known.out})
        check_device(asked.accelerator, asked.precision)
    with progress_bars() as bars:
        trees = synthetic_trees(Path(known.out) / "data", bars) if known.synthetic else known.data
        table = run_table(
            known.table,
            trees,
            out=known.out,
            splits=1 if known.synthetic else known.splits,
            options={"trials": known.trials, "shots": known.shots, "draw": known.draw},
            overlay=OVERLAY if known.synthetic else None,
            configure=configure,
            overwrite=known.overwrite,
            progress=bars,
        )
    print(markdown(table))
    return 0


def _figures(argv: list[str]) -> int:
    parser = _parser("figures")
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.figures import make_figures

    parser.add_argument(
        "--checkpoints",
        nargs="+",
        required=True,
        help="files that `mrcn-fast train` wrote, or their folders; a column or block each",
    )
    parser.add_function_arguments(make_figures, skip={"checkpoints", "progress"})
    values = parser.parse_args(_words(argv, make_figures)).as_dict()
    log_to_console()
    for path in make_figures(**values)["files"]:
        print(path)
    return 0


def _bench(argv: list[str]) -> int:
    subjects = {
        "--step": "mrcn_fast.reid.step_speed",
        "--scorer": "mrcn_fast.reid.scoring_speed",
        "--loader": "mrcn_fast.reid.loading_speed",
    }
    words = [word.partition("=") for word in argv]
    place = next((k for k, (name, _, _) in enumerate(words) if name in subjects), None)
    if place is None:
        module, rest = "mrcn_fast.benchmark.command", argv
    else:  # --loader=DATA is --loader DATA
        module, value = subjects[words[place][0]], words[place][2]
        rest = [*argv[:place], *([value] if value else []), *argv[place + 1 :]]
    status: int = importlib.import_module(module).main(rest)
    return status


def _demo(argv: list[str]) -> int:
    parser = _parser("demo")
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.demo import DemoConfig, run_demo

    parser.add_class_arguments(DemoConfig, as_group=False)
    parser.add_argument("--overwrite", action="store_true", help="replace another demo or runs in --out")
    values = parser.parse_args(_words(argv, DemoConfig)).as_dict()
    overwrite = values.pop("overwrite")
    log_to_console(logging.WARNING)
    run_demo(DemoConfig(**values), overwrite=overwrite)
    return 0


COMMANDS = {
    "info": Command("versions, and which backends are usable here and why (not)", _info),
    "synth": Command("write a synthetic data set in the tree of SYSU-MM01, RegDB or LLCM", _synth),
    "train": Command("train MRCN or a network it is compared with", _train),
    "test": Command("score a checkpoint on the data set's test images", _test),
    "table": Command("run what a table of the paper lacks, and print ours beside the paper's", _table),
    "figures": Command("distances, t-SNE map and ranking lists of checkpoints, as PNG", _figures),
    "bench": Command("measure the kernels beside plain PyTorch", _bench),
    "demo": Command("synthetic data, training and scores of both models, in one go", _demo),
}


def _parser(name: str) -> Any:
    """A jsonargparse parser: flags and their help from a dataclass's or a function's signature."""
    import jsonargparse

    if hasattr(jsonargparse, "set_parsing_settings"):
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return jsonargparse.ArgumentParser(prog=f"mrcn-fast {name}", description=COMMANDS[name].help)


def _config_parser(defaults: Mapping[str, Any]) -> Any:
    """A parser of TrainConfig's flags with these values as defaults."""
    from mrcn_fast.reid.config import TrainConfig

    parser = _parser("train")
    parser.add_class_arguments(TrainConfig, as_group=False)
    parser.set_defaults(dict(defaults))
    return parser


def _words(argv: Sequence[str], source: Callable[..., Any]) -> list[str]:
    """The arguments as a parser of `source`'s flags takes them.

    Flags carry Python names, and people write dashes too: --image-size is --image_size. One of a truth value
    without a value means true: --skip-unreadable is --skip_unreadable=true.
    """
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    parameters = inspect.signature(source).parameters.values()
    truths = {f"--{p.name}" for p in parameters if p.annotation in (bool, "bool")}
    following = [*words, ""][1:]
    return [
        f"{word}=true" if word in truths and after not in ("true", "false") else word
        for word, after in zip(words, following, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
