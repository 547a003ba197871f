"""What the block's kernels are compiled for: their parameter `K`."""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl

from mrcn_fast.operations import OPERATIONS


@dataclass(frozen=True)
class Constants:
    """The values that a kernel is compiled for, under the names that the kernels use."""

    MODE: str
    GATE: str
    TO_INPUT: bool
    R: int  # width of the gates' hidden layer (SE, CBAM) or of their kernel (ECA)
    RB: int  # of those, how many a tile holds
    BLOCKS: int  # blocks of channels whose shares of the hidden layers are added up
    PARTS: int  # parts that the first launch splits the pixels of a plane into
    PART: int  # pixels of a part
    PIXELS: bool  # whether the maps are channels_last
    BC: int  # channels of a tile
    BL: int  # pixels of a tile
    AHEAD: int  # tiles that a program reads before it waits for any
    CHUNK: int  # pixels of a program of the last launch
    PC: int  # channels of a program that makes the parameters' gradients
    BESIDE: int  # samples that such a program reads before it waits for any
    EPS: float
    GIVEN: tuple[bool, ...]  # which results of the forward have a gradient
    A: tl.dtype  # the type that the kernel computes in

    @property
    def DOUBLE(self) -> bool:
        return tl.float64 == self.A

    @property
    def MODALITIES(self) -> int:
        return len(OPERATIONS[self.MODE].inputs)

    @property
    def GATES(self) -> int:
        return len(OPERATIONS[self.MODE].gates)

    @property
    def SETS(self) -> int:
        return len(OPERATIONS[self.MODE].sets)

    @property
    def USED_INPUTS(self) -> int:
        """A bit mask of the inputs from which sets with a gradient were made."""
        used, _ = OPERATIONS[self.MODE].used_by(self.GIVEN)
        return sum(1 << j for j, is_used in enumerate(used) if is_used)

    @property
    def USED_GATES(self) -> int:
        """A bit mask of the gates that took part in sets with a gradient."""
        operation = OPERATIONS[self.MODE]
        made = {s.gate for s in operation.given_sets(self.GIVEN)} - {None}
        return sum(1 << gate for gate in made if gate is not None)

    @property
    def BRANCHES(self) -> int:
        return 2 if self.GATE == "cbam-channel" else 1

    @property
    def CONCAT(self) -> int:
        return 1 if self.MODE == "concat" else 0

    @property
    def HIDDEN(self) -> int:
        """The width of a gate's hidden layer, or 0 if it has none."""
        return 0 if self.GATE == "eca" else self.R

    @property
    def LAYER_PARTS(self) -> int:
        """How many programs share the gradients of a gate's layers."""
        return 1 if self.GATE == "eca" else -(-self.R // self.RB)

    @property
    def MOMENTS(self) -> int:
        """How many numbers the forward keeps for each part of a plane."""
        return 2 * self.BRANCHES

    @property
    def OUTPUT_SLOTS(self) -> int:
        """How many planes the table of the output has."""
        return 3 * self.MODALITIES + 2 * self.SETS

    @property
    def SUMS(self) -> int:
        """How many sums the backward keeps for each part of a plane."""
        return (2 if self.MODE == "restitute" else 6) + 2 * (self.BRANCHES - 1)

    @property
    def GRADIENT_SLOTS(self) -> int:
        """How many planes the table of the gradients has."""
        return 6 * self.MODALITIES + self.SETS + 2 * self.MODALITIES * (self.BRANCHES - 1)

    @property
    def BEFORE(self) -> int:
        """The index of the first gradient before a sigmoid in the planes of the backward's scratch."""
        return 2 * self.MODALITIES + self.GATES

    @property
    def EXTREME(self) -> int:
        """The index of the first extreme in the planes of the backward's scratch."""
        return self.BEFORE + self.GATES

    @property
    def PLANES(self) -> int:
        """How many planes the backward's scratch has beside its table."""
        return self.EXTREME + (2 * self.MODALITIES if self.BRANCHES == 2 else 0)
