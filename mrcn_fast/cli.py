"""The command mrcn-fast: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import logging
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import mrcn_fast
from mrcn_fast.flags import Flags, nearest
from mrcn_fast.memory import MemoryShortageError, enough_memory
from mrcn_fast.outputs import check_folder
from mrcn_fast.streams import flush_stdout, printable, stdout_is_unread

DESCRIPTION = "Visible-infrared person re-identification with MRCN's fused block and loss."
OPTIONS = ("--version prints the version.", "--traceback shows where in the code an error arose.")


class Command(NamedTuple):
    """A subcommand: a line of help, and a function of the arguments after its name to the exit status."""

    help: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mrcn-fast argv...`, by default with the process's arguments, and return the exit status.

    0: done, also if the reader of stdout has gone. 2: an error that the caller can correct, with a message on
    stderr. 130: interrupted. 143: a training ended by SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    traced = arguments[:1] == ["--traceback"]
    with printable():
        try:
            status = _status(arguments[1:] if traced else arguments)
            flush_stdout()
            return status
        except KeyboardInterrupt:
            print("mrcn-fast: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if isinstance(error, BrokenPipeError) and stdout_is_unread():
                flush_stdout()
                return 0
            if traced or not _is_users(error):
                raise
            print(f"mrcn-fast: error: {_message(error)}", file=sys.stderr)
            return 2


def _status(arguments: Sequence[str]) -> int:
    """Run a command, and return its exit status, also after --help (0) and for wrong flags (2)."""
    try:
        with enough_memory(f"mrcn-fast {' '.join(arguments[:1])}", "Ask for less at a time"):
            return _run(arguments, COMMANDS, "mrcn-fast", DESCRIPTION)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2


def _run(arguments: Sequence[str], commands: Mapping[str, Command], program: str, description: str) -> int:
    """Run the command that the first argument names with the others, and return its exit status."""
    if not arguments:
        print(_help(commands, program, description), file=sys.stderr)
        return 2
    name = arguments[0]
    if name in ("-h", "--help"):
        print(_help(commands, program, description))
        return 0
    if name == "--version" and commands is COMMANDS:
        print(f"mrcn_fast {mrcn_fast.__version__}")
        return 0
    own = ["--help", *["--version"] * (commands is COMMANDS)]
    if name not in commands and name.startswith("-"):
        near = nearest(name, own)
        advice = f"did you mean {near}?" if near else f"write {program} COMMAND {name} ..."
        print(f"{program}: error: got {name} before the command; {advice}", file=sys.stderr)
        return 2
    if name not in commands:
        near = nearest(name, [*commands, *own[1:]])
        meant = f"; did you mean {near}?" if near else ""
        print(
            f"{program}: error: got the command {name!r}, expected one of {', '.join(commands)}{meant}",
            file=sys.stderr,
        )
        return 2
    return commands[name].run(list(arguments[1:]))


def _help(commands: Mapping[str, Command], program: str, description: str) -> str:
    whole = commands is COMMANDS
    return "\n".join(
        [
            f"usage: {program} {'[--version] [--traceback] ' * whole}COMMAND [--flag value ...]",
            "",
            description,
            "",
            "commands:",
            *(f"  {name:8}{command.help}" for name, command in commands.items()),
            "",
            f"`{program} COMMAND --help` lists a command's flags.",
            *(OPTIONS if whole else []),
        ]
    )


def _is_users(error: Exception) -> bool:
    """Whether the caller can correct the error (arguments, files, missing packages), so that it is no bug."""
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError, MemoryShortageError)):
        return True
    # Compared by name, because the modules of these errors need torch or the packages of [reid].
    return type(error).__name__ in ("BackendError", "ProcessError", "TrainingError")


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        ours = (error.name or "").startswith("mrcn_fast")
        return f"{error}" if ours else f"{error.name} is not installed; {_install_reid()}"
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename or 'the output'}: {error.strerror}"
    # An error from a DataLoader's process arrives with that process's traceback around it.
    text = str(error)
    if text.startswith("Caught "):
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return text.strip() or type(error).__name__


def _install_reid() -> str:
    """Name the packages of [reid], because this one may come from a checkout that pip can't find by name."""
    try:
        wanted = metadata.requires("mrcn-fast") or []
    except metadata.PackageNotFoundError:
        wanted = []
    packages = [shlex.quote(text.partition(";")[0].strip()) for text in wanted if 'extra == "reid"' in text]
    return f"this command needs the packages of [reid]: pip install {' '.join(packages) or '.[reid]'}"


def _info(argv: list[str]) -> int:
    """Print versions, backends with reasons, and the native build; needs torch alone."""
    _flags("info").values(argv)
    import torch

    from mrcn_fast.backends import cpu, cuda

    print(f"mrcn_fast {mrcn_fast.__version__}")
    print(f"torch     {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python    {platform.python_version()}, {platform.system()} {platform.machine()}")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"gpu       {', '.join(devices) or 'torch sees none'}")
    print("backends")
    for name, status in mrcn_fast.backends().items():
        print(f"  {name:10}{'usable' if status.usable else 'not usable'}: {status.reason}")
    print("choice")
    for line in _choices():
        print(f"  {line}")
    for title, build in (("native library", cpu.build_info()), ("CUDA part", cuda.build_info())):
        if build:
            print(title)
        for key, value in build.items():
            print(f"  {key:10}{', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return 0


def _choices() -> list[str]:
    """The lines of `info` about which kernels serve a GPU's maps, and why."""
    import os

    import torch

    from mrcn_fast import dispatch, tuning

    pinned = os.environ.get(dispatch.ENVIRONMENT_VARIABLE) or "auto"
    if pinned != "auto":
        return [f"{dispatch.ENVIRONMENT_VARIABLE}={pinned} decides"]
    if not tuning.enabled():
        return [f"the static choice, because of {tuning.ENVIRONMENT_VARIABLE}=0"]
    lines = []
    for index in range(torch.cuda.device_count()):
        choices = dispatch.tuned(torch.device("cuda", index))
        lines += [f"cuda:{index} {tuning.described(*item)}" for item in choices.items()]
        others = "other maps" if choices else f"all maps: nothing was measured in {tuning.file_text()}"
        lines.append(f"cuda:{index} the static choice for {others}; `mrcn-fast tune` measures")
    return lines or ["one backend per device: without a GPU there is nothing to measure"]


def _synth(argv: list[str]) -> int:
    from mrcn_fast.reid.console import progress_bars
    from mrcn_fast.reid.data import WRITERS
    from mrcn_fast.reid.data.synthetic.tree import check_replaceable
    from mrcn_fast.reid.data.synthetic.writers import OPTIONS
    from mrcn_fast.reid.kinds import OneOf, PathText

    # The layout is read first, because the other flags depend on it.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--layout", nargs="?")
    layout = first.parse_known_args(argv)[0].layout
    flags = _flags("synth")
    if layout in OPTIONS:  # named where an error says which command lacks a flag
        flags.prog += f" --layout {layout}"
    flags.add_setting("--out", PathText, help="folder for the tree; made where it isn't there")
    flags.add_switch("--overwrite", "replace an earlier synthetic data set of other values in this folder")
    flags.add_setting(
        "--layout",
        Annotated[str, OneOf(tuple(WRITERS))],
        "sysu",
        "data set whose tree is written; --layout NAME --help lists the flags of each",
    )
    flags.add_of(OPTIONS.get(layout, OPTIONS["sysu"]))
    values = flags.values(argv)
    layout, overwrite = values.pop("layout"), values.pop("overwrite", False)
    out = values.pop("out")
    check_folder(out, "the tree")
    if not overwrite:
        check_replaceable(Path(out), OPTIONS[layout](**values).parameters())
    bars = progress_bars()
    task = bars.add_task("images", total=None, status="")

    def show(done: int, total: int) -> None:
        bars.start()  # only after the writer has checked its parameters
        bars.update(task, completed=done, total=total)

    try:
        root = WRITERS[layout](out, progress=show, **values)
    finally:
        bars.stop()
    print(root)
    return 0


# The titles of the groups of fields in --help, by the first field of each: those of EvaluationOptions and of
# the classes that add fields to it.
_EVALUATION_GROUPS: Final = {"permutations": "data set", "backend": "machine", "cache": "machine"}


def _test(argv: list[str]) -> int:
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.evaluation.results import describe
    from mrcn_fast.reid.evaluation.scoring import ScoringOptions, score_checkpoint
    from mrcn_fast.reid.processes import is_first

    flags = _flags("test")
    flags.group("what is scored")
    flags.add_of(score_checkpoint, skip={"model", "progress", "options"})
    flags.add_of(ScoringOptions, groups=_EVALUATION_GROUPS | {"mode": "protocol", "rerank": "re-ranking"})
    values = flags.values(argv)
    log_to_console()
    result = score_checkpoint(**values)
    if is_first():
        print(describe(result))
    return 0


def _figures(argv: list[str]) -> int:
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.paper.figures import FigureOptions, make_figures

    flags = _flags("figures")
    flags.group("what the figures show")
    flags.add_of(make_figures, skip={"progress", "options"})
    flags.add_of(FigureOptions, groups=_EVALUATION_GROUPS | {"people": "what the figures show"})
    values = flags.values(argv)
    log_to_console()
    for path in make_figures(**values)["files"]:
        print(path)
    return 0


def _report(argv: list[str]) -> int:
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.report import ReportOptions, write_report

    flags = _flags("report")
    flags.group("what the page shows")
    flags.add_of(write_report, skip={"progress", "options"})
    flags.add_of(ReportOptions, groups=_EVALUATION_GROUPS)
    values = flags.values(argv)
    log_to_console()
    print(write_report(**values))
    return 0


def _bench(argv: list[str]) -> int:
    words = argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        words, old, new = _with_subcommand(argv)
        print(
            f"mrcn-fast bench: {old} is deprecated and will be removed in the next release; use "
            f"`mrcn-fast bench {new}`",
            file=sys.stderr,
        )
    return _run(words, BENCHES, "mrcn-fast bench", COMMANDS["bench"].help)


def _with_subcommand(argv: Sequence[str]) -> tuple[list[str], str, str]:
    """Give the arguments of `bench` in the spelling of earlier releases the subcommand that they mean.

    Returns:
        The arguments; and for a message, the earlier spelling and the one in its place.
    """
    words = [word.partition("=") for word in argv]
    names = [name for name, _, _ in words]
    shown = next((name for name in names if name in ("--table", "--compare", "--report")), None)
    measured = next((name for name in names if name in ("--step", "--scorer", "--loader")), None)
    rest = list(argv)
    if measured:  # --loader=DATA is --loader DATA
        place = names.index(measured)
        rest[place : place + 1] = filter(None, [words[place][2]])
    if shown:
        return (
            ["show", *rest],
            f"`{' '.join(filter(None, ('mrcn-fast bench', measured, shown)))}`",
            f"show {shown}",
        )
    if measured:
        subcommand = measured.removeprefix("--")
        return [subcommand, *rest], f"`mrcn-fast bench {measured}`", subcommand
    return ["kernels", *rest], "`mrcn-fast bench` without a command", "kernels"


def _measured_by(module: str) -> Callable[[list[str]], int]:
    """Return what runs the `main` of a module of mrcn_fast.benchmark, which is then imported."""

    def run(argv: list[str]) -> int:
        status: int = importlib.import_module(f"mrcn_fast.benchmark.{module}").main(argv)
        return status

    return run


def _demo(argv: list[str]) -> int:
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.demo import DemoConfig, run_demo

    flags = _flags("demo")
    flags.add_of(DemoConfig)
    flags.add_setting("--overwrite", bool, False, "replace another demo or runs in --out")
    values = flags.values(argv)
    overwrite = values.pop("overwrite")
    config = DemoConfig(**values)
    log_to_console(logging.WARNING)
    run_demo(config, overwrite=overwrite)
    return 0


def _study(argv: list[str]) -> int:
    from mrcn_fast.reid.console import log_to_console, progress_bars
    from mrcn_fast.reid.kinds import OneOf, Seed, Several
    from mrcn_fast.reid.paper.study import ROWS, SEEDS, StudyConfig, markdown, run_study

    flags = _flags("study")
    flags.add_word("study", Annotated[str, OneOf(("cqc",))], "which readings of the CQC loss help")
    flags.add_of(StudyConfig)
    kind = Several[Annotated[str, OneOf(tuple(ROWS))]]
    flags.add_setting("--rows", kind, tuple(ROWS), "rows to train, in this order")
    flags.add_setting("--seeds", Several[Seed], SEEDS, "seeds to train each row with")
    values = flags.values(argv)
    rows, seeds = values.pop("rows"), values.pop("seeds")
    values.pop("study")
    config = StudyConfig(**values)
    log_to_console()
    with progress_bars() as bars:
        result = run_study(config, rows=rows, seeds=seeds, progress=bars)
    print(markdown(result))
    return 0


def _run_by(module: str, name: str) -> Callable[[list[str]], int]:
    """Return what runs the command `name` of a module of mrcn_fast.reid, which is then imported."""

    def run(argv: list[str]) -> int:
        command = getattr(importlib.import_module(f"mrcn_fast.reid.{module}"), name)
        status: int = command(_flags(name), argv)
        return status

    return run


COMMANDS = {
    "info": Command("versions, and which backends are usable here and why (not)", _info),
    "synth": Command("write a synthetic data set in the tree of SYSU-MM01, RegDB or LLCM", _synth),
    "train": Command("train MRCN or a network it is compared with", _run_by("training.command", "train")),
    "test": Command("score a checkpoint on the data set's test images", _test),
    "table": Command(
        "train the missing runs of a table of the paper, and print ours beside the paper's",
        _run_by("paper.command", "table"),
    ),
    "study": Command("train the readings of the CQC loss on synthetic people, and compare them", _study),
    "figures": Command("distances, t-SNE map and ranking lists of checkpoints, as PNG", _figures),
    "report": Command("one HTML page about trained runs: scores, curves, distances, ranking lists", _report),
    "extract": Command(
        "write the features of your own images to a file", _run_by("search.commands", "extract")
    ),
    "search": Command(
        "find people in your own images, as text, JSON and a page", _run_by("search.commands", "search")
    ),
    "score": Command(
        "score features of any framework by a data set's protocol", _run_by("search.commands", "score")
    ),
    "export": Command("write a network's test path for ONNX or torch.export", _run_by("export", "export")),
    "bench": Command("measure kernels, training steps, scorer and loader beside their baselines", _bench),
    "tune": Command("measure which kernels are the fastest on this GPU", _measured_by("suites.tune")),
    "demo": Command("synthetic data, and training and scores of three networks, in one go", _demo),
}


BENCHES = {
    "kernels": Command("the kernels beside plain PyTorch and torch.compile", _measured_by("suites.kernels")),
    "step": Command(
        "whole training steps, with one addition at a time", _measured_by("suites.training_step")
    ),
    "scorer": Command("the retrieval scores beside a loop over queries", _measured_by("suites.scorer")),
    "loader": Command("images per second of training's loader", _measured_by("suites.loader")),
    "host": Command("what a call costs the host before its kernels run", _measured_by("suites.host")),
    "show": Command("print, compare or draw files of results; measure nothing", _measured_by("show")),
}


def _flags(name: str) -> Flags:
    return Flags(name, COMMANDS[name].help)


if __name__ == "__main__":
    sys.exit(main())
