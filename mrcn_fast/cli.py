"""The command mrcn-fast: a table of subcommands, each imported only when it is called."""

from __future__ import annotations

import argparse
import logging
import platform
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    if isinstance(error, (ValueError, OSError, ModuleNotFoundError)):
        return True
    return type(error).__name__ == "TrainingError"  # by name: its module needs the packages of [reid]


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
    from mrcn_fast.backends import native

    print(f"mrcn_fast {mrcn_fast.__version__}")
    print(f"torch     {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"python    {platform.python_version()}, {platform.system()} {platform.machine()}")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"cuda      {', '.join(devices) or 'no device'}")
    print("backends")
    for name, status in mrcn_fast.backends().items():
        print(f"  {name:10}{'usable' if status.usable else 'not usable'}: {status.reason}")
    if build := native.build_info():
        print("native library")
        for key, value in build.items():
            print(f"  {key:10}{', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
    return 0


def _synth(argv: list[str]) -> int:
    parser = _parser("synth")
    parser.add_argument("--out", required=True, help="folder for the tree; made where it isn't there")
    parser.add_argument("--layout", choices=["sysu"], default="sysu", help="data set whose tree is written")
    from mrcn_fast.reid.console import progress_bars
    from mrcn_fast.reid.data import write_sysu

    parser.add_function_arguments(write_sysu, skip={"root", "progress"})
    values = parser.parse_args(_underscored(argv)).as_dict()
    values.pop("layout")
    with progress_bars() as bars:
        task = bars.add_task("images", total=None, status="")
        root = write_sysu(
            values.pop("out"),
            progress=lambda done, total: bars.update(task, completed=done, total=total),
            **values,
        )
    print(root)
    return 0


def _train(argv: list[str]) -> int:
    parser = _parser("train")
    from mrcn_fast.reid.config import TrainConfig
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.training import Trainer

    parser.add_argument(
        "--config", action="config", help="YAML file of the values below; later flags override it"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_class_arguments(TrainConfig, as_group=False)
    values = parser.parse_args(_underscored(argv)).as_dict()
    values.pop("config")
    resume, overwrite = values.pop("resume"), values.pop("overwrite")
    log_to_console()
    print(Trainer(TrainConfig(**values)).fit(resume=resume, overwrite=overwrite))
    return 0


def _test(argv: list[str]) -> int:
    parser = _parser("test")
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.scoring import describe, score_checkpoint

    parser.add_function_arguments(score_checkpoint, skip={"progress"})
    values = parser.parse_args(_underscored(argv)).as_dict()
    log_to_console(logging.WARNING)
    print(describe(score_checkpoint(**values)))
    return 0


def _bench(argv: list[str]) -> int:
    from mrcn_fast.benchmark import main as benchmark

    return benchmark(argv)


def _demo(argv: list[str]) -> int:
    parser = _parser("demo")
    from mrcn_fast.reid.console import log_to_console
    from mrcn_fast.reid.demo import DemoConfig, run_demo

    parser.add_class_arguments(DemoConfig, as_group=False)
    values = parser.parse_args(_underscored(argv)).as_dict()
    log_to_console(logging.WARNING)
    run_demo(DemoConfig(**values))
    return 0


COMMANDS = {
    "info": Command("versions, and which backends are usable here and why (not)", _info),
    "synth": Command("write a synthetic data set in SYSU-MM01's tree", _synth),
    "train": Command("train MRCN or the two-stream baseline", _train),
    "test": Command("score a checkpoint on the data set's test images", _test),
    "bench": Command("measure the kernels beside plain PyTorch", _bench),
    "demo": Command("synthetic data, training and scores of both models, in one go", _demo),
}


def _parser(name: str) -> Any:
    """A jsonargparse parser: flags and their help from a dataclass's or a function's signature."""
    import jsonargparse

    if hasattr(jsonargparse, "set_parsing_settings"):
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return jsonargparse.ArgumentParser(prog=f"mrcn-fast {name}", description=COMMANDS[name].help)


def _underscored(argv: list[str]) -> list[str]:
    """--image-size as --image_size: flags carry Python names, people write them either way."""
    return [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]


if __name__ == "__main__":
    sys.exit(main())
