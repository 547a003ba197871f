"""A gate and an operation are added to a copy of the package as CONTRIBUTING says, and the files are counted.

What is added are the tables, the equations in plain PyTorch, the public function, and the tests' equations in
long double. The new entries must then be in the tests' matrices, and right, without any other change. Their
kernels are neither written nor counted, in csrc (with the operation's schema) and in backends/triton: to
compile or interpret them takes minutes. So the copy has no compiled library, and the backend is "reference".
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

# Compares each setting of the new entry with the equations in long double, and prints the number of settings,
# modes and gates. It hides the compiled library, which an editable install finds outside the copy.
CHECK = """
import sys
import torch

sys.modules["mrcn_fast._C"] = None
import mrcn_fast
from tests.support import block_cases, matrix, rule

assert mrcn_fast.__file__.startswith(sys.argv[1]) and not mrcn_fast.backends()["cpu"].usable
settings = [setting for setting in matrix.SETTINGS if "toy" in setting]
for mode, gate, restitute_to in settings:
    p = block_cases.problem(block_cases.Case(mode, gate, restitute_to, dtype=torch.float64))
    results = block_cases.evaluate(p, "reference")
    for verdict in rule.verdicts(results, results, block_cases.truth(p)).values():
        assert verdict.fused <= 100 * verdict.unit, f"{mode}, {gate}, {restitute_to}: {verdict.text}"
print(len(settings), len(matrix.MODES), len(matrix.GATES))
"""


class Copy:
    """A copy of the package and of `tests.support`, and the files that were edited in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.edited: set[str] = set()
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "reid")
        for package in ("mrcn_fast", "tests/support"):
            shutil.copytree(ROOT / package, folder / package, ignore=ignored)
        (folder / "tests" / "__init__.py").touch()

    def read(self, file: str) -> str:
        return (self.folder / file).read_text()

    def insert(self, file: str, text: str, *, before: str = "", after: str = "") -> None:
        """Insert ``text`` before or after the only place where the file has the other argument's text."""
        content, anchor = self.read(file), before or after
        assert content.count(anchor) == 1, f"{file} has {anchor!r} {content.count(anchor)} times, expected 1"
        changed = content.replace(anchor, text + anchor if before else anchor + text)
        (self.folder / file).write_text(changed)
        self.edited.add(file)

    def check(self) -> list[int]:
        """The numbers of the new entry's settings, all of which must be right, of modes and of gates."""
        run = subprocess.run(
            [sys.executable, "-c", CHECK, str(self.folder)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(self.folder), *sys.path])},
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        return [int(number) for number in run.stdout.split()]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_a_gate(copy: Copy) -> None:
    """A gate with one weight per channel: A(M) = σ(w GAP(M))."""
    gate = '''class ToyGate(Gate):
    """A weight per channel; parameter: ``weight (count, C)``."""

    kind = "toy"
    weight: nn.Parameter

    @staticmethod
    def width(channels: int, reduction: int) -> int:
        return channels

    @classmethod
    def shapes(cls, channels: int, width: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (channels,)}

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


'''
    copy.insert("mrcn_fast/gates.py", gate, before="GATES: dict[")
    copy.insert("mrcn_fast/gates.py", "ToyGate, ", after="for gate in (")
    equation = '''def toy_gate(residual: Tensor, parameters: GateParameters) -> Tensor:
    """σ(w GAP(M)); ``parameters`` is one weight (C,)."""
    return torch.sigmoid(parameters[0] * residual.mean(dim=(2, 3)))


'''
    copy.insert("mrcn_fast/reference.py", equation, before="GATES: dict[")
    copy.insert("mrcn_fast/reference.py", '    "toy": toy_gate,\n', after='    "eca": eca_gate,\n')
    truth = "tests/support/extended.py"
    forward = """        if kind == "toy":
            logits = self.pooled[0] * parameters[0]
"""
    copy.insert(truth, forward, before="        self.result: Array = 1 / (1 + np.exp(-logits))\n")
    copy.insert(truth, " or kind == 'toy'", after='logits = self._convolved() if kind == "eca"')
    backward = """        if self.kind == "toy":
            of_plane = (of_logits * self.parameters[0] / size)[:, :, None, None]
            return np.broadcast_to(of_plane, self.residual.shape), [(of_logits * self.pooled[0]).sum(axis=0)]
"""
    copy.insert(truth, backward, before='        if self.kind == "eca":\n')

    settings, modes, gates = copy.check()
    assert gates == 4 and settings == 2 * modes - 1  # both readings of eq. 5, except in SNR
    assert copy.edited == {"mrcn_fast/gates.py", "mrcn_fast/reference.py", truth}


def test_an_operation(copy: Copy) -> None:
    """An operation that takes away what restitution adds: F̃ - M₊ or F - M₊, by ``restitute_to``."""
    entry = """    "toy": Operation(
        "toy",
        inputs=("features",),
        gates=("A",),
        sets=(MadeSet("toy", (0,), 0),),
        stacked=False,
        restitutes=True,
    ),
"""
    copy.insert("mrcn_fast/operations.py", entry, before='    "snr": Operation(\n')
    # The equation and the public function are copies of restitution's under another name.
    reference, block = "mrcn_fast/reference.py", "mrcn_fast/block.py"
    equation = function(copy.read(reference), "restitution").replace("def restitution", "def toy")
    equation = equation.replace("normalized, distilled, restitute_to", "normalized, -distilled, restitute_to")
    copy.insert(reference, equation, before="def mrcn_block(")
    served = """        if mode == "toy":
            return (reference.toy(*own, gate=gate, eps=eps, restitute_to=restitute_to),)
"""
    copy.insert("mrcn_fast/plain.py", served, before='        if mode == "snr":\n')
    public = function(copy.read(block), "mrcn_restitution").replace("mrcn_restitution", "toy")
    copy.insert(block, public.replace('"restitute"', '"toy"'), before="def snr_block(")
    copy.insert("mrcn_fast/__init__.py", "    toy,\n", after="    snr_block,\n")
    copy.insert("mrcn_fast/__init__.py", '    "toy",\n', after='    "snr_block",\n')
    cases, truth = "tests/support/block_cases.py", "tests/support/extended.py"
    copy.insert(cases, ", toy", after="from mrcn_fast import mrcn_block, mrcn_restitution, snr_block")
    call = '    "toy": lambda *tensors, **settings: (toy(*tensors, **settings),),\n'
    copy.insert(cases, call, before='    "snr": lambda')
    exact = """def _toy(modalities: list[Modality], gradients: list[Array], restitute_to: str) -> Any:
    (m,), (gradient,) = modalities, gradients
    to_input = restitute_to == "input"
    (m.of_input if to_input else m.of_normalized)[...] += gradient
    m.distilled_backward(0, -gradient)
    return ((m.x if to_input else m.normalized) - m.distilled(0),)


"""
    copy.insert(truth, exact, before="def _snr(")
    copy.insert(truth, '"toy": _toy, ', before='"snr": _snr}')

    settings, modes, gates = copy.check()
    assert modes == 5 and settings == 2 * gates
    package = {f"mrcn_fast/{name}.py" for name in ("operations", "reference", "plain", "block", "__init__")}
    assert copy.edited == package | {cases, truth}


def function(source: str, name: str) -> str:
    """The text of a module's function, with the empty lines after it."""
    start = source.index(f"def {name}(")
    return source[start : source.index("\ndef ", start) + 1]
