"""A gate and an operation are added to a copy of the package as CONTRIBUTING says, and the files are counted.

The tests add entries of the tables, the equations in plain PyTorch, the public function, and the tests'
equations in long double. The new entries must then be in the tests' matrices, and right, without any other
change. A slow test adds both to the CPU's kernels too, and compiles these once. Triton's kernels, and the
gate's for CUDA, are neither written nor counted.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

# Where commands are looked up: pip's CMake and Ninja are beside this Python.
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
EXACT = "tests/support/extended.py"  # the equations in long double

# Compares each setting of the new entry with the equations in long double, and what torch.compile traces with
# the eager results. Prints the number of settings, modes and gates. For the backend "reference" it hides the
# compiled library, which an editable install finds outside the copy.
CHECK = """
import sys
import torch

folder, backend = sys.argv[1:]
if backend == "reference":
    sys.modules["mrcn_fast._C"] = None
import mrcn_fast
from tests.support import block_cases, matrix, rule

assert mrcn_fast.__file__.startswith(folder)
assert mrcn_fast.backends()["cpu"].usable == (backend == "cpu")
settings = [setting for setting in matrix.SETTINGS if "toy" in setting]
for mode, gate, restitute_to in settings:
    case = block_cases.Case(mode, gate, restitute_to, dtype=torch.float64)
    p = block_cases.problem(case)
    plain = block_cases.evaluate(p, "reference")
    for verdict in rule.verdicts(plain, plain, block_cases.truth(p)).values():
        assert verdict.fused <= 100 * verdict.unit, f"{mode}, {gate}, {restitute_to}: {verdict.text}"
    block_cases.check_accuracy(case, backend)
traced = torch.compile(lambda *leaves: p.run(backend, *leaves), fullgraph=True, backend="aot_eager")
expected = block_cases.evaluate(p, backend)
for name, result in block_cases.with_gradients(p, traced(*p.leaves)).items():
    torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12)
print(len(settings), len(matrix.MODES), len(matrix.GATES))
"""


class Copy:
    """A copy of the package and of `tests.support`, and the files that were edited in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.edited: set[str] = set()
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "reid")
        for package in ("mrcn_fast", "tests/support", "csrc"):
            shutil.copytree(ROOT / package, folder / package, ignore=ignored)
        (folder / "tests" / "__init__.py").touch()

    def read(self, file: str) -> str:
        return (self.folder / file).read_text()

    def replace(self, file: str, old: str, new: str) -> None:
        """Replace a text that the file has once."""
        content = self.read(file)
        assert content.count(old) == 1, f"{file} has {old!r} {content.count(old)} times, expected 1"
        (self.folder / file).write_text(content.replace(old, new))
        self.edited.add(file)

    def insert(self, file: str, text: str, *, before: str = "", after: str = "") -> None:
        """Insert ``text`` before or after the only place where the file has the other argument's text."""
        anchor = before or after
        self.replace(file, anchor, text + anchor if before else anchor + text)

    def build(self) -> None:
        """Compile the native library into the package, quickly: for one instruction set and float64 alone."""
        shutil.copy(ROOT / "CMakeLists.txt", self.folder)
        folder = self.folder / "build"
        configure = ["-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        flags = "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -DMRCN_ELEMENT=double"
        quickly = ["-DMRCN_FAST_ISAS=baseline", "-DCMAKE_BUILD_TYPE=Debug", flags]
        self._run(["cmake", *configure, *quickly])
        self._run(["cmake", "--build", str(folder)])
        (library,) = folder.glob("_C*.so")
        shutil.copy(library, self.folder / "mrcn_fast")

    def check(self, backend: str = "reference") -> list[int]:
        """The numbers of the new entry's settings, all of which must be right, of modes and of gates."""
        printed = self._run([sys.executable, "-c", CHECK, str(self.folder), backend])
        return [int(number) for number in printed.split()]

    def _run(self, command: list[str]) -> str:
        path = os.pathsep.join([str(self.folder), *sys.path])
        environment = os.environ | {"PYTHONPATH": path, "PATH": TOOLS}
        run = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def add_gate(copy: Copy) -> None:
    """Add a gate with one weight per channel: A(M) = σ(w GAP(M))."""
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
    copy.insert("mrcn_fast/gates.py", ", ToyGate", after="ECAGate, CBAMChannelGate")
    equation = '''def toy_gate(residual: Tensor, parameters: GateParameters) -> Tensor:
    """σ(w GAP(M)); ``parameters`` is one weight (C,)."""
    return torch.sigmoid(parameters[0] * residual.mean(dim=(2, 3)))


'''
    copy.insert("mrcn_fast/reference.py", equation, before="GATES: dict[")
    copy.insert("mrcn_fast/reference.py", '    "toy": toy_gate,\n', after='    "eca": eca_gate,\n')
    forward = """        if kind == "toy":
            logits = self.pooled[0] * parameters[0]
"""
    copy.insert(EXACT, forward, before="        self.result: Array = 1 / (1 + np.exp(-logits))\n")
    copy.insert(EXACT, " or kind == 'toy'", after='logits = self._convolved() if kind == "eca"')
    backward = """        if self.kind == "toy":
            of_plane = (of_logits * self.parameters[0] / size)[:, :, None, None]
            return np.broadcast_to(of_plane, self.residual.shape), [(of_logits * self.pooled[0]).sum(axis=0)]
"""
    copy.insert(EXACT, backward, before='        if self.kind == "eca":\n')


GATE = {"mrcn_fast/gates.py", "mrcn_fast/reference.py", EXACT}
GATE_KERNELS = {"csrc/block/gate_table.h", "csrc/block/cpu/gates.h"}


def test_a_gate(copy: Copy) -> None:
    add_gate(copy)
    settings, modes, gates = copy.check()
    assert gates == 4 and settings == 2 * modes - 1  # both readings of eq. 5, except in SNR
    assert copy.edited == GATE


def add_kernels_of_gate(copy: Copy) -> None:
    """Add the gate to the kernels for the CPU."""
    table, kernels = "csrc/block/gate_table.h", "csrc/block/cpu/gates.h"
    copy.replace(table, "cbam_channel };", "cbam_channel, toy };")
    copy.replace(table, "gate_kinds = 3", "gate_kinds = 4")
    shapes = "    {.parameters = 1, .sizes = {{Size::channels}}},\n"
    copy.insert(table, shapes, before="};\n\nconstexpr const GateEntry& entry_of")
    forward = """    if (shape_.gate == Gate::toy) {
      for (int64_t i = first; i < last; ++i) {
        for (int64_t c = c0; c < c1; ++c) {
          value(i, g)[c] = weights_[0][g * C_ + c] * pooled(modality(g), i)[c];
        }
      }
    } else """
    start = "int64_t c0, int64_t c1) const {\n"
    copy.insert(kernels, forward, after=f"void excite_block(int64_t first, int64_t last, int g, {start}")
    backward = """    if (shape_.gate == Gate::toy) return backward_toy(first, last);
"""
    copy.insert(kernels, backward, before="    if (shape_.gate == Gate::eca) return backward_eca(")
    gradients = """    if (shape_.gate == Gate::toy) return toy_gradients(gradient[0]);
"""
    copy.insert(kernels, gradients, before="    if (shape_.gate == Gate::eca) return eca_gradients(")
    functions = """  void backward_toy(int64_t first, int64_t last) const {
    const int M = sets_of(shape_.mode).inputs;
    for (int64_t i = first; i < last; ++i) {
      for (int m = 0; m < M; ++m) {
        for (int64_t c = 0; c < C_; ++c) {
          A total(0);
          for (int g = m; g < count_; g += M) {
            if (used_[g]) total += weights_[0][g * C_ + c] * before(i, g)[c];
          }
          of_pooled(m, i)[c] = total;
        }
      }
    }
  }

  void toy_gradients(A* gradient) const {
    for (int g = 0; g < count_; ++g) {
      for (int64_t c = 0; c < C_; ++c) {
        A total(0);
        for (int64_t i = 0; i < N_ && used_[g]; ++i) total += before(i, g)[c] * pooled(modality(g), i)[c];
        gradient[g * C_ + c] = total;
      }
    }
  }

"""
    copy.insert(kernels, functions, before="  void eca_gradients(")


def add_operation(copy: Copy) -> None:
    """Add an operation that gives the gated residual alone: M₊ = M x A(M) (eq. 4)."""
    entry = """    "toy": _of_one(
        "toy", function="toy", equation="toy", sets=(MadeSet("distilled", (0,), 0),), restitutes=False
    ),
"""
    copy.insert("mrcn_fast/operations.py", entry, before='    "snr": _of_one(\n')
    # The equation and the public function are SNR's under another name, with another result.
    reference, block = "mrcn_fast/reference.py", "mrcn_fast/block.py"
    equation = function(copy.read(reference), "snr_block").replace("snr_block", "toy")
    *lines, _, _, _ = equation.splitlines(keepends=True)
    equation = "".join(lines).replace("tuple[Tensor, Tensor, Tensor]", "Tensor")
    copy.insert(reference, equation + "    return s * removed\n\n\n", before="def mrcn_block(")
    public = function(copy.read(block), "snr_block").replace("snr_block", "toy").replace('"snr"', '"toy"')
    public = public.replace("SNRFeatures._make(", "(").replace("SNRFeatures", "Tensor")
    copy.insert(block, public.replace("tensors))", "tensors))[0]"), before="def snr_block(")
    copy.insert("mrcn_fast/__init__.py", "    toy,\n", after="    snr_block,\n")
    copy.insert("mrcn_fast/__init__.py", '    "toy",\n', after='    "snr_block",\n')
    exact = """def _toy(modalities: list[Modality], gradients: list[Array], restitute_to: str) -> Any:
    modalities[0].distilled_backward(0, gradients[0])
    return (modalities[0].distilled(0),)


"""
    copy.insert(EXACT, exact, before="def _snr(")
    copy.insert(EXACT, '"toy": _toy, ', before='"snr": _snr}')


OPERATION = {f"mrcn_fast/{name}.py" for name in ("operations", "reference", "block", "__init__")} | {EXACT}
OPERATION_KERNELS = {"csrc/block/sets.h", "csrc/schemas.h"}


def test_an_operation(copy: Copy) -> None:
    add_operation(copy)
    settings, modes, gates = copy.check()
    assert modes == 5 and settings == gates
    assert copy.edited == OPERATION


def add_kernels_of_operation(copy: Copy) -> None:
    """Add the operation to the table from which the kernels for the CPU and those for CUDA come."""
    table, schemas = "csrc/block/sets.h", "csrc/schemas.h"
    copy.insert(
        table,
        "  toy,        // x -> s M\n",
        after="  snr,        // x -> restituted, contaminated, normalized\n",
    )
    copy.replace(table, "constexpr int modes = 4,", "constexpr int modes = 5,")
    entry = """    {.name = "toy", .made_as = Mode::toy, .inputs = 1, .gates = 1, .made = 1,
        .parts = {{{Term::distilled, 0}}}, .restitutes = false},
"""
    copy.insert(table, entry, before="};\n\nconstexpr const Sets& sets_of")
    arguments = "Tensor norm_weight, Tensor norm_bias, Tensor[] gate_parameters, int gate"
    gradients = ", ".join(["Tensor"] * 7)
    schema = f"""  library.def("toy_forward(Tensor features, {arguments}, float eps) -> (Tensor, Tensor)");
  library.def(
      "toy_backward(Tensor? distilled, Tensor features, Tensor statistics, {arguments}) -> ({gradients})");
"""
    copy.insert(schemas, schema, before="  // The CQC loss. features are")


@pytest.mark.slow(seconds=60)
@pytest.mark.skipif(
    not all(shutil.which(tool, path=TOOLS) for tool in ("cmake", "ninja", "c++")),
    reason="CMake, Ninja or a C++ compiler is missing",
)
def test_a_gate_and_an_operation_with_their_kernels(copy: Copy) -> None:
    """Both are compiled at once, and the operation is computed with each gate, and each with the gate."""
    add_operation(copy)
    add_kernels_of_operation(copy)
    assert copy.edited == OPERATION | OPERATION_KERNELS
    copy.edited.clear()
    add_gate(copy)
    add_kernels_of_gate(copy)
    assert copy.edited == GATE | GATE_KERNELS
    copy.build()
    settings, modes, gates = copy.check("cpu")
    assert (modes, gates) == (5, 4) and settings == gates + 2 * (modes - 1) - 1


def test_contributing_gives_these_counts() -> None:
    counts = (
        f"without kernels the gate takes {len(GATE)} files and the operation {len(OPERATION)}; "
        f"with the kernels for the CPU the gate takes {len(GATE | GATE_KERNELS)} and the operation "
        f"{len(OPERATION | OPERATION_KERNELS)}."
    )
    assert counts in " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())


def function(source: str, name: str) -> str:
    """The text of a module's function, with the empty lines after it."""
    rest = source[source.index(f"def {name}(") :]
    return re.split(r"(?<=\n\n\n)", rest, maxsplit=1)[0]
