"""Every instruction set that this machine has, not only the best one, each in a process of its own."""

from __future__ import annotations

import pytest

from tests.processes import INSTRUCTION_SETS, instruction_set, run_pytest


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_accuracy_with_each_instruction_set(isa: str) -> None:
    run_pytest(
        "tests/test_block.py", "tests/test_cqc.py", "-k", "in_every_layout", environment=instruction_set(isa)
    )
