"""The table of operations: what each takes, which feature sets it makes, and what it makes them from.

Each block operation has an entry in `OPERATIONS`, and the loss has `LOSS`. The autograd Functions, the plain
PyTorch forms, the shapes for tracing, the rules for vmap, the checks of arguments, Triton's schemas, the
benchmark and the tests are made from these entries. An operation ``op`` stands for two operations of torch,
``<op>_forward`` and ``<op>_backward``, whose schemas are those of csrc/schemas.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple

# The six feature sets in the paper's order: three with the visible samples, three with the infrared ones.
SETS: Final = (
    "visible",
    "visible_restituted",
    "visible_compensated",
    "infrared_compensated",
    "infrared_restituted",
    "infrared",
)

# What M₊ is added to: F̃ (the paper's text) or F (eq. 5 as printed).
RESTITUTE_TO: Final = ("normalized", "input")


def rows_of_sets(visible: int, infrared: int) -> list[int]:
    """The number of rows of each of the six sets, for these numbers of samples."""
    return [visible] * 3 + [infrared] * 3


class MadeSet(NamedTuple):
    """A feature set that an operation makes.

    ``inputs`` and ``gate`` are places in the operation's lists. A set that no gate makes has None.
    """

    name: str
    inputs: tuple[int, ...]
    gate: int | None


class Arguments(NamedTuple):
    """The arguments of a block's forward, as torch passes them to the operation."""

    inputs: tuple[Any, ...]
    norm_weight: Any
    norm_bias: Any
    gate_parameters: Any
    gate: int
    eps: float
    flags: tuple[bool, ...]

    @property
    def tensors(self) -> tuple[Any, ...]:
        """The inputs, γ, β and the gate's parameters, one after the other."""
        return *self.inputs, self.norm_weight, self.norm_bias, *self.gate_parameters


@dataclass(frozen=True)
class Differentiable:
    """An operation with a backward: two operations of torch."""

    op: str

    @property
    def forward(self) -> str:
        """The name of the operation of torch that computes the results."""
        return f"{self.op}_forward"

    @property
    def backward(self) -> str:
        """The name of the operation of torch that computes the gradients."""
        return f"{self.op}_backward"


@dataclass(frozen=True)
class Operation(Differentiable):
    """A block operation.

    Attributes:
        function: the name of the public function that computes it.
        equation: the name of the function of `reference` that computes it.
        inputs: the feature maps that it takes.
        gates: the slices of the gate's parameters.
        sets: the feature sets that it makes.
        stacked: whether the result is one tensor that holds the inputs too, in the order of `SETS`. Otherwise
            there is one tensor for each made set.
        restitutes: whether it takes ``restitute_to``.
    """

    function: str
    equation: str
    inputs: tuple[str, ...]
    gates: tuple[str, ...]
    sets: tuple[MadeSet, ...]
    stacked: bool = False
    restitutes: bool = True

    @property
    def all_sets(self) -> tuple[str, ...]:
        """The names of the sets that its two functions return: those of a pair return the inputs too."""
        made = tuple(s.name for s in self.sets)
        return (self.inputs[0], *made, self.inputs[1]) if len(self.inputs) == 2 else made

    @property
    def results(self) -> int:
        """The number of tensors that the forward gives, without what it saves for the backward."""
        return 1 if self.stacked else len(self.sets)

    @property
    def batches(self) -> int:
        """How many times a result holds the inputs' samples."""
        return len(self.all_sets) if self.stacked else 1

    def results_of(self, returned: Any) -> tuple[Any, ...]:
        """The results of the forward among what one of the two functions returned."""
        if not isinstance(returned, tuple):
            return (returned,)
        return tuple(x for name, x in zip(self.all_sets, returned, strict=True) if name not in self.inputs)

    def split(self, arguments: Sequence[Any]) -> Arguments:
        """The arguments of the forward by name."""
        n = len(self.inputs)
        norm_weight, norm_bias, gate_parameters, gate, eps, *flags = arguments[n:]
        inputs = tuple(arguments[:n])
        return Arguments(inputs, norm_weight, norm_bias, gate_parameters, gate, eps, tuple(flags))

    def flags(self, restitute_to: str) -> tuple[bool, ...]:
        """The last arguments of the forward and of the backward: whether M₊ is added to the input."""
        return (restitute_to == "input",) if self.restitutes else ()

    def restitute_to(self, flags: tuple[bool, ...]) -> str:
        """The setting for which `flags` gives these."""
        return RESTITUTE_TO[True in flags]

    def used_by(self, given: tuple[bool, ...]) -> tuple[tuple[bool, ...], bool]:
        """From what the results with a gradient were made.

        Args:
            given: whether each result has a gradient.

        Returns:
            For each input whether such a result was made from it, and whether one was made by a gate.
        """
        made = self.given_sets(given)
        inputs = tuple(any(j in s.inputs for s in made) for j in range(len(self.inputs)))
        return inputs, any(s.gate is not None for s in made)

    def given_sets(self, given: tuple[bool, ...]) -> tuple[MadeSet, ...]:
        """The made sets that have a gradient; ``given`` as in `used_by`."""
        if self.stacked:
            return self.sets if given == (True,) else ()
        return tuple(s for s, has in zip(self.sets, given, strict=True) if has)

    def all_given(self) -> tuple[bool, ...]:
        """``given`` as in `used_by`, where every result has a gradient."""
        return (True,) * self.results


LOSS: Final = Differentiable("cqc")

# The block operations on one feature map with one gate.
_of_one = partial(Operation, inputs=("features",), gates=("A",))

_PAIR: Final = Operation(
    "block",
    function="mrcn_block",
    equation="mrcn_block",
    inputs=("visible", "infrared"),
    gates=("A_v1", "A_n1", "A_v2", "A_n2"),
    sets=(
        MadeSet("visible_restituted", (0,), 0),
        MadeSet("visible_compensated", (0, 1), 3),
        MadeSet("infrared_compensated", (0, 1), 2),
        MadeSet("infrared_restituted", (1,), 1),
    ),
)

OPERATIONS: Final[dict[str, Operation]] = {
    "pair": _PAIR,
    "concat": replace(_PAIR, op="block_concat", stacked=True),
    "restitute": _of_one(
        "restitute",
        function="mrcn_restitution",
        equation="restitution",
        sets=(MadeSet("restituted", (0,), 0),),
    ),
    "snr": _of_one(
        "snr",
        function="snr_block",
        equation="snr_block",
        sets=(
            MadeSet("restituted", (0,), 0),
            MadeSet("contaminated", (0,), 0),
            MadeSet("normalized", (0,), None),
        ),
        restitutes=False,
    ),
}
