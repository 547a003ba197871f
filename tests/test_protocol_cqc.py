"""How the last program to arrive adds up the losses (backends/triton/cqc.py): a model, in every interleaving.

Triton's interpreter runs one program after another and so can't show what happens between programs. Here a
program is a list of steps, and a launch a search through all states that its programs can bring about, one
step of one of them at a time. Stores are weak, as a GPU's are: a store is seen by its own program alone until
that program releases it, or until it trickles out by itself, sooner or later. Loads that nothing orders after
the counting may come before it: `LOADS_EARLY` has them there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

PROGRAMS = 3
LAUNCHES = 2

# Memory: a loss for each program, then these.
TOTAL, ARRIVALS = PROGRAMS, PROGRAMS + 1

Steps = tuple[str, ...]
LOADS: Steps = tuple(f"load {i}" for i in range(PROGRAMS))

# forward_kernel: all stop after "count" but the program that finds all others counted.
KERNEL: Steps = ("store loss", "release and count", "stop unless last", *LOADS, "store total", "reset")

COUNTS_BEFORE_IT_STORES: Steps = (
    "release and count",
    "store loss",
    "stop unless last",
    *LOADS,
    "store total",
    "reset",
)
RELEASES_NOTHING: Steps = ("store loss", "count", "stop unless last", *LOADS, "store total", "reset")
LOADS_EARLY: Steps = ("store loss", *LOADS, "release and count", "stop unless last", "store total", "reset")
NEVER_RESETS: Steps = ("store loss", "release and count", "stop unless last", *LOADS, "store total")
EVERYONE_RESETS: Steps = (
    "store loss",
    "release and count",
    "reset",
    "stop unless last",
    *LOADS,
    "store total",
)
FIRST_FINISHES: Steps = (
    "store loss",
    "release and count",
    "stop unless first",
    *LOADS,
    "store total",
    "reset",
)


class Program(NamedTuple):
    """Where a program stands, what it knows, and the stores (place, value) that only it sees, in order."""

    at: int = 0
    arrived: int = -1
    sum: int = 0
    stores: tuple[tuple[int, int], ...] = ()


class State(NamedTuple):
    programs: tuple[Program, ...]
    memory: tuple[int, ...]


def loss(launch: int, program: int) -> int:
    """Any subset of losses, of any launches, has a sum of its own."""
    return 10 ** (PROGRAMS * launch + program)


def written(memory: tuple[int, ...], stores: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    result = list(memory)
    for place, value in stores:
        result[place] = value
    return tuple(result)


def advance(steps: Steps, launch: int, index: int, p: Program, memory: tuple[int, ...]) -> State:
    """The program and the memory after its next step; the state's other programs are left out."""
    step = steps[p.at]
    p = p._replace(at=p.at + 1)
    if step == "store loss":
        p = p._replace(stores=(*p.stores, (index, loss(launch, index))))
    elif step == "store total":
        p = p._replace(stores=(*p.stores, (TOTAL, p.sum)))
    elif step == "reset":
        p = p._replace(stores=(*p.stores, (ARRIVALS, 0)))
    elif step.startswith("load"):
        p = p._replace(sum=p.sum + written(memory, p.stores)[int(step.split()[1])])
    elif step.endswith("count"):
        if step.startswith("release"):
            memory, p = written(memory, p.stores), p._replace(stores=())
        p = p._replace(arrived=memory[ARRIVALS])
        memory = written(memory, ((ARRIVALS, memory[ARRIVALS] + 1),))
    elif p.arrived != (PROGRAMS - 1 if step == "stop unless last" else 0):
        p = p._replace(at=len(steps))
    return State((p,), memory)


def following(steps: Steps, launch: int, state: State) -> Iterator[State]:
    """Every state that may come next: a step of a program, or its oldest store trickling out."""
    for index, p in enumerate(state.programs):
        choices = []
        if p.at < len(steps):
            choices.append(advance(steps, launch, index, p, state.memory))
        if p.stores:
            choices.append(State((p._replace(stores=p.stores[1:]),), written(state.memory, p.stores[:1])))
        for (moved,), memory in choices:
            yield State((*state.programs[:index], moved, *state.programs[index + 1 :]), memory)


def ends(steps: Steps, launch: int, memory: tuple[int, ...]) -> set[tuple[int, ...]]:
    """What memory may hold when a launch is over, which is when nothing can follow any more."""
    start = State((Program(),) * PROGRAMS, memory)
    seen, waiting, found = {start}, [start], set()
    while waiting:
        state = waiting.pop()
        later = set(following(steps, launch, state))
        if not later:
            found.add(state.memory)
        waiting += later - seen
        seen |= later
    return found


def outcomes(steps: Steps) -> list[set[tuple[int, int]]]:
    """(total, arrivals) that each of the launches, one after another on one counter, may leave behind."""
    memories, found = {(0,) * (PROGRAMS + 2)}, []
    for launch in range(LAUNCHES):
        memories = {end for memory in memories for end in ends(steps, launch, memory)}
        found.append({(memory[TOTAL], memory[ARRIVALS]) for memory in memories})
    return found


RIGHT = [{(sum(loss(launch, i) for i in range(PROGRAMS)), 0)} for launch in range(LAUNCHES)]


def test_every_interleaving_gives_the_sum_and_a_counter_of_zero() -> None:
    assert outcomes(KERNEL) == RIGHT


@pytest.mark.parametrize(
    ("steps", "launch"),
    [
        pytest.param(COUNTS_BEFORE_IT_STORES, 0, id="counts before it stores"),
        pytest.param(RELEASES_NOTHING, 0, id="releases nothing"),
        pytest.param(LOADS_EARLY, 0, id="acquires nothing"),
        pytest.param(FIRST_FINISHES, 0, id="the first one finishes"),
        pytest.param(EVERYONE_RESETS, 0, id="everyone resets"),
        pytest.param(NEVER_RESETS, 1, id="never resets"),
    ],
)
def test_the_model_finds_what_is_wrong_with(steps: Steps, launch: int) -> None:
    """``launch`` is the first at which some interleaving gives a wrong sum; others may well be right."""
    found = outcomes(steps)
    wrong = [
        {total for total, _ in each} != {total for total, _ in right}
        for each, right in zip(found, RIGHT, strict=True)
    ]
    assert wrong.index(True) == launch
