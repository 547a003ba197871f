"""The barrier of a group of blocks (csrc/block/cuda/held.cuh): a model, in every interleaving.

A block stores its part, waits for its own threads, and counts itself; then it polls the counter, acquires,
and adds up everybody's parts. Here a block is a list of steps, and a launch a search through all states that
its blocks can bring about, one step of one of them at a time. Stores are weak, as a GPU's are: a store is
seen by its own block alone until that block releases it, or until it trickles out by itself, sooner or later.
Loads are weak too: the first-level cache may have parts as they were before, which the block sees until it
acquires. The counter is cleared before each launch, in order with it.

The backward's last meeting, of all blocks of a launch, has the same steps with another counter: a block
writes its gradients, which no other block reads, between counting itself and waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import pytest

BLOCKS = 3
LAUNCHES = 2
CLEARED = 0

Steps = tuple[str, ...]
Value = TypeVar("Value")
LOADS: Steps = tuple(f"load {i}" for i in range(BLOCKS))

# meet(), between the store of the block's part and the loads of all. "cache" stands for a load of other data
# in the same lines, by any block of the multiprocessor.
KERNEL: Steps = ("store", "release and count", "cache", "wait for all", "acquire", *LOADS)

COUNTS_BEFORE_IT_STORES: Steps = ("release and count", "store", "cache", "wait for all", "acquire", *LOADS)
RELEASES_NOTHING: Steps = ("store", "count", "cache", "wait for all", "acquire", *LOADS)
ACQUIRES_NOTHING: Steps = ("store", "release and count", "cache", "wait for all", *LOADS)
ACQUIRES_TOO_EARLY: Steps = ("store", "release and count", "acquire", "cache", "wait for all", *LOADS)
WAITS_FOR_ONE_LESS: Steps = ("store", "release and count", "cache", "wait for others", "acquire", *LOADS)
WAITS_FOR_NOBODY: Steps = ("store", "release and count", "cache", "acquire", *LOADS)


class Block(NamedTuple):
    """Where a block stands, its sum, its stores that only it sees, and the parts in its cache (None: not)."""

    at: int = 0
    sum: int = 0
    stores: tuple[int, ...] = ()
    cache: tuple[int | None, ...] = (None,) * BLOCKS


class State(NamedTuple):
    blocks: tuple[Block, ...]
    parts: tuple[int, ...]
    counter: int


def part(launch: int, block: int) -> int:
    """Any subset of parts, of any launches, has a sum of its own."""
    return 10 ** (BLOCKS * launch + block)


def replaced(values: tuple[Value, ...], index: int, value: Value) -> tuple[Value, ...]:
    return (*values[:index], value, *values[index + 1 :])


def advance(steps: Steps, launch: int, index: int, state: State) -> State | None:
    """The state after the block's next step; None where it waits."""
    block, parts, counter = state.blocks[index], state.parts, state.counter
    step = steps[block.at]
    word, _, argument = step.partition(" ")
    block = block._replace(at=block.at + 1)
    if word == "cache":
        block = block._replace(cache=parts)
    elif word == "store":
        block = block._replace(stores=(part(launch, index),), cache=replaced(block.cache, index, None))
    elif step == "acquire":
        block = block._replace(cache=(None,) * BLOCKS)
    elif word == "wait":
        if counter < (BLOCKS if argument == "for all" else BLOCKS - 1):
            return None
    elif word == "load":
        cached, own = block.cache[int(argument)], int(argument) == index and block.stores
        value = block.stores[0] if own else parts[int(argument)] if cached is None else cached
        block = block._replace(sum=block.sum + value)
    else:
        if word == "release" and block.stores:
            parts, block = replaced(parts, index, block.stores[0]), block._replace(stores=())
        counter += 1
    return State((*state.blocks[:index], block, *state.blocks[index + 1 :]), parts, counter)


def following(steps: Steps, launch: int, state: State) -> Iterator[State]:
    """Every state that may come next: a step of a block, or its store trickling out."""
    for index, block in enumerate(state.blocks):
        if block.at < len(steps) and (moved := advance(steps, launch, index, state)) is not None:
            yield moved
        if block.stores:
            drained = block._replace(stores=())
            blocks = (*state.blocks[:index], drained, *state.blocks[index + 1 :])
            yield state._replace(blocks=blocks, parts=replaced(state.parts, index, block.stores[0]))


def ends(steps: Steps, launch: int, start: State) -> set[State]:
    """The states in which nothing can follow any more."""
    seen, waiting, found = {start}, [start], set()
    while waiting:
        state = waiting.pop()
        later = set(following(steps, launch, state))
        if not later:
            found.add(state)
        waiting += later - seen
        seen |= later
    return found


def outcomes(steps: Steps, clears: bool = True) -> list[set[tuple[int, ...]]]:
    """The sums that the blocks of each launch may end with; a block that waits for ever has the sum -1."""
    starts, found = {((0,) * BLOCKS, CLEARED)}, []
    for launch in range(LAUNCHES):
        last = {
            end
            for parts, counter in starts
            for end in ends(steps, launch, State((Block(),) * BLOCKS, parts, CLEARED if clears else counter))
        }
        found.append({tuple(b.sum if b.at == len(steps) else -1 for b in end.blocks) for end in last})
        starts = {(end.parts, end.counter) for end in last}
    return found


RIGHT = [{(sum(part(launch, i) for i in range(BLOCKS)),) * BLOCKS} for launch in range(LAUNCHES)]


def test_every_interleaving_gives_every_block_the_sum() -> None:
    assert outcomes(KERNEL) == RIGHT


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(COUNTS_BEFORE_IT_STORES, id="counts before it stores"),
        pytest.param(RELEASES_NOTHING, id="releases nothing"),
        pytest.param(ACQUIRES_NOTHING, id="acquires nothing"),
        pytest.param(ACQUIRES_TOO_EARLY, id="acquires before the last has come"),
        pytest.param(WAITS_FOR_ONE_LESS, id="waits for one less"),
        pytest.param(WAITS_FOR_NOBODY, id="waits for nobody"),
    ],
)
def test_the_model_finds_what_is_wrong_with(steps: Steps) -> None:
    assert outcomes(steps)[0] - RIGHT[0]


def test_the_model_finds_a_counter_that_is_not_cleared() -> None:
    found = outcomes(KERNEL, clears=False)
    assert found[0] == RIGHT[0] and found[1] - RIGHT[1]
