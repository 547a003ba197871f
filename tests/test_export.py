"""Export to ONNX: standard operators alone, a dynamic batch, and onnxruntime's results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrcn_fast import MRCNBlock, SNRBlock
from mrcn_fast.gates import GATES

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime, of the extra [export], is not installed"
)
pytest.importorskip("onnxscript", reason="onnxscript, of the extra [export], is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter's own, many


class Restitution(nn.Module):
    """F₊ of visible maps."""

    def __init__(self, block: MRCNBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, features: Tensor) -> Tensor:
        return self.block.restitute(features, "visible")


def assert_exports(module: nn.Module, inputs: int, shape: tuple[int, ...], atol: float) -> None:
    """Exported with three samples, the model gives what the module gives for one and for seven."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        module.eval(),
        tuple(torch.randn(3, *shape) for _ in range(inputs)),
        dynamo=True,
        dynamic_shapes=tuple({0: batch} for _ in range(inputs)),
        verbose=False,
    )
    assert program is not None
    assert {node.domain for node in program.model.graph} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for samples in (1, 7):
        given = [torch.randn(samples, *shape) for _ in range(inputs)]
        with torch.no_grad():
            made: Any = module(*given)
        want = [made] if isinstance(made, Tensor) else list(made)
        names = [known.name for known in session.get_inputs()]
        got = session.run(None, dict(zip(names, [x.numpy() for x in given], strict=True)))
        for found, expected in zip(got, want, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("gate", list(GATES))
def test_a_default_block(gate: str) -> None:
    """Held to 1e-6, with values of up to four."""
    torch.manual_seed(0)
    block = MRCNBlock(16, gate=gate)
    nn.init.normal_(block.norm_weight, 1, 0.2)
    nn.init.normal_(block.norm_bias, 0, 0.2)
    assert_exports(block, 2, (16, 6, 5), 2e-6)
    assert_exports(Restitution(block), 1, (16, 6, 5), 2e-6)


def test_restitution_to_the_input() -> None:
    torch.manual_seed(0)
    assert_exports(Restitution(MRCNBlock(16, restitute_to="input")), 1, (16, 6, 5), 2e-6)


def test_snr() -> None:
    torch.manual_seed(0)
    assert_exports(SNRBlock(16), 1, (16, 6, 5), 2e-6)
