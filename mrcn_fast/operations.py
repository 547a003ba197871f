"""The table of the block operations: what each takes, which feature sets it makes, and of what.

An operation ``op`` is two operations of torch, ``<op>_forward`` and ``<op>_backward`` (csrc/schemas.h).
"""

from __future__ import annotations

from typing import NamedTuple


class MadeSet(NamedTuple):
    """A feature set that an operation makes: of which inputs, and by which gate, as places in the lists."""

    name: str
    inputs: tuple[int, ...]
    gate: int | None


class Operation(NamedTuple):
    """A block operation.

    ``gates`` are the slices of the gate's parameters. ``stacked``: the result is one tensor that holds the
    inputs too, in the paper's order of the six sets; else it is a tensor for each made set.
    ``restitutes``: whether it takes ``restitute_to``.
    """

    op: str
    inputs: tuple[str, ...]
    gates: tuple[str, ...]
    sets: tuple[MadeSet, ...]
    stacked: bool
    restitutes: bool

    @property
    def forward(self) -> str:
        """The name of the operation of torch that computes the results."""
        return f"{self.op}_forward"

    @property
    def backward(self) -> str:
        """The name of the operation of torch that computes the gradients."""
        return f"{self.op}_backward"

    @property
    def results(self) -> int:
        """Tensors that the forward gives, without what it saves for the backward."""
        return 1 if self.stacked else len(self.sets)

    @property
    def batches(self) -> int:
        """How many times the inputs' samples a result holds."""
        return len(self.sets) + 2 if self.stacked else 1

    def used_by(self, given: tuple[bool, ...]) -> tuple[tuple[bool, ...], bool]:
        """What the results with a gradient were made of: for each input whether any was, and whether a gate.

        ``given`` says of each result whether it has a gradient.
        """
        made = self.given_sets(given)
        inputs = tuple(any(j in s.inputs for s in made) for j in range(len(self.inputs)))
        return inputs, any(s.gate is not None for s in made)

    def given_sets(self, given: tuple[bool, ...]) -> tuple[MadeSet, ...]:
        """The made sets that have a gradient."""
        if self.stacked:
            return self.sets if given == (True,) else ()
        return tuple(s for s, has in zip(self.sets, given, strict=True) if has)

    def all_given(self) -> tuple[bool, ...]:
        """`given` where every result has a gradient."""
        return (True,) * self.results


_PAIR = Operation(
    "block",
    inputs=("visible", "infrared"),
    gates=("A_v1", "A_n1", "A_v2", "A_n2"),
    sets=(
        MadeSet("visible_restituted", (0,), 0),
        MadeSet("visible_compensated", (0, 1), 3),
        MadeSet("infrared_compensated", (0, 1), 2),
        MadeSet("infrared_restituted", (1,), 1),
    ),
    stacked=False,
    restitutes=True,
)

OPERATIONS = {
    "pair": _PAIR,
    "concat": _PAIR._replace(op="block_concat", stacked=True),
    "restitute": Operation(
        "restitute",
        inputs=("features",),
        gates=("A",),
        sets=(MadeSet("restituted", (0,), 0),),
        stacked=False,
        restitutes=True,
    ),
    "snr": Operation(
        "snr",
        inputs=("features",),
        gates=("A",),
        sets=(
            MadeSet("restituted", (0,), 0),
            MadeSet("contaminated", (0,), 0),
            MadeSet("normalized", (0,), None),
        ),
        stacked=False,
        restitutes=False,
    ),
}
