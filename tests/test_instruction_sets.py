"""The instruction sets of this machine that the other tests don't use, each in its own process."""

from __future__ import annotations

import pytest

from mrcn_fast.backends import cpu
from tests.support.processes import INSTRUCTION_SETS, instruction_set, run_pytest

OTHERS = [isa for isa in INSTRUCTION_SETS if isa != cpu.build_info().get("isa")]


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_accuracy_with_the_other_instruction_sets(isa: str) -> None:
    files = ("tests/test_block_accuracy.py", "tests/test_cqc.py")
    run_pytest(*files, "-k", "in_every_layout", environment=instruction_set(isa))
