"""Export of the network's test path: exported with three images, run with one and with seven."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrcn_fast.reid.data import Modality
from mrcn_fast.reid.models.network import ReIDModel

BATCH = torch.export.Dim("batch", min=1, max=64)
NETWORKS: dict[str, dict[str, Any]] = {
    "mrcn": {"model": "mrcn"},
    "mrcn, two blocks, parts": {"model": "mrcn", "stages": (0, 2), "parts": 3, "pool": "gem"},
    "snr": {"model": "snr"},
    "baseline": {"model": "baseline"},
}


class Extraction(nn.Module):
    """Test features of one modality."""

    def __init__(self, modality: Modality = "infrared", **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = ReIDModel(5, depth=18, **settings)
        self.modality = modality
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract(images, self.modality)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_export(name: str) -> None:
    module = Extraction(**NETWORKS[name])
    program = torch.export.export(module, (torch.randn(3, 3, 64, 32),), dynamic_shapes=({0: BATCH},)).module()
    for number in (1, 7):
        images = torch.randn(number, 3, 64, 32)
        assert torch.equal(program(images), module(images))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mrcn", "baseline"])
def test_onnx(name: str) -> None:
    reason = "onnxscript and onnxruntime come with the extra [export]"
    onnxruntime = pytest.importorskip("onnxruntime", reason=reason)
    pytest.importorskip("onnxscript", reason=reason)
    module = Extraction(**NETWORKS[name])
    program = torch.onnx.export(
        module, (torch.randn(3, 3, 64, 32),), dynamo=True, dynamic_shapes=({0: BATCH},), verbose=False
    )
    assert program is not None
    assert {node.domain for node in program.model.graph} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (given,) = session.get_inputs()
    for number in (1, 7):
        images = torch.randn(number, 3, 64, 32)
        (found,) = session.run(None, {given.name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(images), rtol=0, atol=1e-5)
