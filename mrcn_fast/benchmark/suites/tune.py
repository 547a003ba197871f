"""`mrcn-fast tune`: measure on this machine's GPU which kernels serve maps of some shapes, and keep it.

The variants of a shape are timed in turn and with a cold cache, as in `mrcn-fast bench kernels`, after each
was compared with the reference. The choice is made of the times forward and backward together, because a
backend's backward takes what its own forward saved. Within the CUDA kernels each way may hold its samples in
shared memory or not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final, NamedTuple

import torch

from mrcn_fast import backends, dispatch, tuning
from mrcn_fast.benchmark.suites.problems import DTYPES, LAYOUTS, Problem, Shape, backend_calls
from mrcn_fast.benchmark.timing import EXACT, TOLERANCES, Calls, Timing, check, measure_gpu
from mrcn_fast.flags import DEVICE, Flags, Reader, number, one_of
from mrcn_fast.gates import FUSED
from mrcn_fast.outputs import check_file
from mrcn_fast.tuning import WAYS, Choice, Planes

# The maps after the stem and after the first stage of the paper's network, for its batch.
SHAPES: Final[tuple[Shape, ...]] = ((16, 64, 72, 32), (16, 256, 72, 32))

# The share of the time of what serves by itself that a variant must stay below, so that chance decides
# nothing. Where a sample can't be held, the variant that would hold it runs the same kernels as without.
BELOW: Final = 0.98

HELD: Final = "MRCN_FAST_CUDA_HELD"


class Variant(NamedTuple):
    """A way to compute a call: a backend, and for the CUDA kernels the value of MRCN_FAST_CUDA_HELD."""

    backend: str
    held: str = ""

    @property
    def name(self) -> str:
        """Its name in the file of choices."""
        return f"{self.backend} held" if self.held == "1" else self.backend


TRITON: Final = Variant("triton")
CUDA: Final = Variant("cuda", "0")
CUDA_HELD: Final = Variant("cuda", "1")

# Microseconds by variant and way, as in `tuning.Choice.us`.
Times = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Tuning:
    """What is measured: the arguments of `mrcn_fast.tune`.

    Raises ValueError for a value that `tune` doesn't take.
    """

    shapes: tuple[Shape, ...] = SHAPES
    gate: str = "se"
    dtypes: tuple[str, ...] = tuple(DTYPES)
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    seconds: float = 0.5
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name, given, known in (
            ("gate", (self.gate,), FUSED),
            ("dtypes", self.dtypes, tuple(DTYPES)),
            ("layouts", self.layouts, tuple(LAYOUTS)),
        ):
            if not set(given) <= set(known):
                raise ValueError(f"{name}: got {', '.join(given)!r}, expected one of {', '.join(known)}")
        given_shapes: Sequence[Sequence[int]] = self.shapes
        for shape in given_shapes:
            if len(shape) != 4 or min(shape) < 1 or shape[2] * shape[3] < 2:
                raise ValueError(
                    f"shapes: got {tuple(shape)}, expected N, C, H and W with two pixels or more"
                )

    @property
    def problems(self) -> list[Problem]:
        """The forward of the block for each shape, dtype and layout."""
        every = itertools.product(self.shapes, self.dtypes, self.layouts)
        return [
            Problem("block", "forward", shape, layout, dtype, self.device, gate=self.gate)
            for shape, dtype, layout in every
        ]


def tune(asked: Tuning, tell: Callable[[str], object] = lambda line: None) -> dict[Planes, Choice]:
    """Measure and keep the choices, as `mrcn_fast.tune` says; `tell` gets a line for each.

    Raises:
        ValueError: there is no GPU, or only one variant serves.
        OSError: before anything is measured, where the file can't be written.
    """
    known = variants(asked.device)
    check_file(tuning.file(), "the measured choices")
    device = torch.device("cuda", torch.device(asked.device).index or 0)
    found: dict[Planes, Choice] = {}
    for problem in asked.problems:
        with torch.cuda.device(device):
            choice = measured_choice(problem, known, asked.seconds, _timed_on_gpu)
        if choice is None:
            tell(f"{problem.name}: no variant gave the reference's results")
            continue
        planes = planes_of(problem)
        found[planes] = choice
        tell(tuning.described(planes, choice))
    if found:
        tell(f"written to {tuning.save(device, found)}")
        dispatch.forget_tuned()
    return found


def variants(device: str) -> list[Variant]:
    """The variants that serve on a device. Raises ValueError where there is nothing to choose."""
    if torch.device(device).type == "cpu":
        raise ValueError("nothing to choose: the CPU has one backend of kernels, cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"nothing to choose: there is no GPU here that torch {torch.__version__} can use")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs, counted from 0")
    status = backends()
    usable = [variant for variant in (TRITON, CUDA, CUDA_HELD) if status[variant.backend].usable]
    if len(usable) < 2:
        reasons = "; ".join(f"{name}: {status[name].reason}" for name in tuning.BACKENDS)
        raise ValueError(f"nothing to choose: at most one variant serves here ({reasons})")
    return usable


def planes_of(problem: Problem) -> Planes:
    """The planes of a problem's maps."""
    last = problem.layout == "channels_last"
    return tuning.planes_of(problem.gate, DTYPES[problem.dtype], last, problem.shape)


# --- one shape ----------------------------------------------------------------------------------------

# Times calls in turn for some seconds.
TimedInTurn = Callable[[Calls, float], Mapping[str, Timing]]


def _timed_on_gpu(calls: Calls, seconds: float) -> Mapping[str, Timing]:
    return measure_gpu(calls, seconds)[0]


def measured_choice(
    problem: Problem, known: Sequence[Variant], seconds: float, timed: TimedInTurn
) -> Choice | None:
    """Measure a problem's variants forward and backward, and choose.

    Args:
        problem: the block on some maps; its way doesn't count
        known: the variants
        seconds: measuring time per way
        timed: times calls in turn

    Returns:
        The choice; None where each variant differs from the reference or fails.
    """
    us: dict[str, dict[str, float]] = {variant.name: {} for variant in known}
    for way in WAYS:
        calls = correct_calls(problem._replace(way=way), known)
        for name, timing in (timed(calls, seconds) if calls else {}).items():
            us[name][way] = round(1e6 * timing.median, 2)
    whole = {name: times for name, times in us.items() if len(times) == len(WAYS)}
    if not whole:
        return None
    backend, held = chosen(whole)
    return Choice(problem.shape, backend, held, datetime.now(timezone.utc).date().isoformat(), whole)


def chosen(us: Times) -> tuple[str, tuple[str, ...]]:
    """Choose from times: the backend, and the ways in which the CUDA kernels hold their samples."""
    plain, held = us.get(CUDA.name), us.get(CUDA_HELD.name)
    ways = tuple(way for way in WAYS if held and (plain is None or held[way] < BELOW * plain[way]))
    cuda = plain or held
    if cuda is None:
        return TRITON.backend, ()
    best = sum((held or cuda)[way] if way in ways else cuda[way] for way in WAYS)
    static = us.get(TRITON.name)
    wins = static is None or best < BELOW * sum(static.values())
    return (CUDA.backend if wins else TRITON.backend), ways


def correct_calls(problem: Problem, known: Sequence[Variant]) -> Calls:
    """Make the calls of the variants whose results are the reference's; others are left out and told."""
    calls: Calls = {}
    for variant in known:
        made = backend_calls(problem, [variant.backend])
        call = _held_as(variant.held, made[variant.backend])
        try:
            check({f"fused {variant.name}": call, EXACT: made[EXACT]}, TOLERANCES[DTYPES[problem.dtype]])
        except RuntimeError as error:
            print(f"{problem.name}: without {variant.name}: {error}", file=sys.stderr)
            continue
        calls[variant.name] = call
    return calls


def _held_as(held: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Make a call with this value of MRCN_FAST_CUDA_HELD, which the CUDA kernels read at every call."""

    def run() -> Any:
        with _environment(HELD, held):
            return call()

    return run


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# --- the command --------------------------------------------------------------------------------------


def _shape(word: str) -> Shape:
    try:
        n, c, h, w = map(int, word.lower().replace("×", "x").split("x"))
    except ValueError:
        raise ValueError(SHAPE.expected) from None
    return n, c, h, w


SHAPE: Final = Reader(_shape, "a shape NxCxHxW, such as 16x64x72x32")


def flags() -> Flags:
    """Return the flags of `tune`."""
    found = Flags("tune", "measure which kernels are the fastest on this machine's GPU, and use them")
    several = {"nargs": "+", "action": "extend"}
    found.add("--shapes", SHAPE, None, "maps to measure; the paper's where left out", **several)
    found.add("--gate", one_of(FUSED), "se", "the block's gate")
    found.add("--dtypes", one_of(tuple(DTYPES)), None, "only these; all where it is left out", **several)
    found.add("--layouts", one_of(tuple(LAYOUTS)), None, "only these; all where it is left out", **several)
    seconds = number(float, 0, 86_400)
    found.add("--seconds", seconds, 0.5, "measuring time per shape, dtype, layout and way")
    found.add("--device", DEVICE, "cuda", "the GPU")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mrcn-fast tune argv...`: measure, print a line per choice, and keep them."""
    given = {name: value for name, value in flags().values(argv).items() if value is not None}
    found = tune(Tuning(**given), lambda line: print(line, flush=True))
    return 0 if found else 1
