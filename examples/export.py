"""Export: the restitution of a modality with `torch.export`, and as ONNX where its packages are installed.

The exported program takes any batch size. In ONNX the block consists of standard operators, so that it runs
wherever ONNX does.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from mrcn_fast import MRCNBlock

BATCH = torch.export.Dim("batch", min=1)


class Restitution(nn.Module):
    """F₊ of visible feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MRCNBlock(32)

    def forward(self, features: Tensor) -> Tensor:
        return self.block.restitute(features, "visible")


def main() -> None:
    torch.manual_seed(0)
    module, maps = Restitution().eval(), torch.randn(3, 32, 12, 6)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(module, (maps,), dynamic_shapes=({0: BATCH},))
        path = Path(folder, "restitution.pt2")
        torch.export.save(program, path)
        loaded, more = torch.export.load(path).module(), torch.randn(65, 32, 12, 6)
        torch.testing.assert_close(loaded(more), module(more))
        print(f"torch.export: {path.stat().st_size} bytes, the same results with another batch size")
        if not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
            print("ONNX: install the packages of [export]")
            return
        onnx_check(module, maps, more, Path(folder, "restitution.onnx"))


def onnx_check(module: nn.Module, maps: Tensor, more: Tensor, path: Path) -> None:
    """Export to ONNX, and compare onnxruntime's results with the module's."""
    import onnxruntime

    torch.onnx.export(
        module, (maps,), path, dynamo=True, dynamic_shapes=({0: BATCH},), external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(more), rtol=0, atol=1e-5)
    print(f"ONNX: {path.stat().st_size} bytes, the same results in onnxruntime")


if __name__ == "__main__":
    main()
