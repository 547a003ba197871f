"""The export of a trained network's test path to ONNX or to a program of torch.export."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mrcn_fast import internals
from mrcn_fast.block import Modality
from mrcn_fast.files import write_atomically
from mrcn_fast.flags import Flags
from mrcn_fast.outputs import check_new
from mrcn_fast.reid.console import log_to_console
from mrcn_fast.reid.data import normalize
from mrcn_fast.reid.evaluation.trained import Network, open_network
from mrcn_fast.reid.kinds import AnyPath
from mrcn_fast.reid.models.network import ReIDModel, use_layout
from mrcn_fast.reid.settings import check_arguments
from mrcn_fast.reid.training.checkpoint import content_digest

Format = Literal["onnx", "torch"]
Pixels = Literal["uint8", "float"]
Operations = Literal["standard", "fused"]

TOLERANCE: Final = 1e-4
"""The largest difference of a feature's numbers between an exported network and the network itself."""
METADATA: Final = "mrcn_fast.json"
"""The name of the extra file in a program of torch.export that says what was exported."""
# The images that a network is exported with, and those that the result is checked with.
_TRACED, _CHECKED = 3, 5

log = logging.getLogger(__name__)


class ExportError(ValueError):
    """A network can't be exported. The message says why, and what to do."""


class Extraction(nn.Module):
    """The features of images of one modality, as `ReIDModel.extract` gives them.

    Args:
        model: the network, in eval mode
        modality: of the images
        pixels: "uint8" for images from 0 to 255, which are normalized here; "float" for images that
            `mrcn_fast.reid.data.normalize` has made of them

    Shape:
        (N, 3, H, W) -> (N, `model.feature_size`), float32
    """

    def __init__(self, model: ReIDModel, modality: Modality, pixels: Pixels) -> None:
        super().__init__()
        self.model = model
        self.modality = modality
        self.pixels = pixels
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model.extract(normalize(images) if self.pixels == "uint8" else images, self.modality)


class Exported(NamedTuple):
    """What was written, and how far its features are from the network's."""

    path: Path
    size: int  # bytes
    difference: float | None  # the largest of the checked features; None: there was nothing to run it with


@check_arguments
def export_network(
    checkpoint: AnyPath,
    modality: Modality,
    format: Format,
    out: AnyPath,
    *,
    pixels: Pixels = "uint8",
    operations: Operations = "standard",
    overwrite: bool = False,
) -> Exported:
    """Export the test path of one modality: stem, restitution, trunk, BNNeck and L2 normalization.

    The exported network takes any number of images of the training's size, and computes in float32. It is run
    on random images and compared with the network before it is written.

    Args:
        checkpoint: checkpoint of the network, or its folder
        modality: modality of the images
        format: onnx, standard operators alone; or torch, a program that `torch.export.load` reads
        out: file to write
        pixels: uint8, RGB from 0 to 255; or float, normalized by ImageNet's statistics
        operations: of torch: standard, which need no mrcn_fast; or fused, after an import of mrcn_fast
        overwrite: replace the file

    Raises:
        CheckpointError: where the checkpoint can't be used
        ExportError: where packages of the extra [export] are missing, for fused operations in ONNX, and where
            the exported network gives other features
        OSError: where the file can't be written or, unless `overwrite`, is there already
    """
    out = Path(out)
    check_new(out, "the exported network", overwrite)
    if format == "onnx":
        _check_onnx(operations)
    network = open_network(checkpoint, accelerator="cpu", precision="32-true")
    use_layout(network.reid_model, channels_last=False)
    path = Extraction(network.reid_model, modality, pixels)
    about = _about(network, path)
    with torch.no_grad(), _quiet():
        program = _program(path, _images(network, pixels, _TRACED))
        if operations == "standard":
            program = _standard(program)
        content, run = (_onnx if format == "onnx" else _torch)(program, about)
    difference = None if run is None else _difference(run, path, _images(network, pixels, _CHECKED))
    write_atomically(out, lambda file: file.write(content))
    return Exported(out, len(content), difference)


def export(flags: Flags, argv: list[str]) -> int:
    """Run `mrcn-fast export`, and return its exit status."""
    flags.add_of(export_network)
    values = flags.values(argv)
    log_to_console()
    done = export_network(**values)
    checked = "not compared with the network"
    if done.difference is not None:
        checked = f"features within {done.difference:.1e} of the network's"
    print(f"{done.path}: {done.size} bytes, {checked}")
    return 0


def _check_onnx(operations: Operations) -> None:
    if operations == "fused":
        raise ExportError(
            "got fused operations for ONNX, whose runtimes don't have them; expected standard ones. Leave "
            "--operations out, or export with --format torch"
        )
    packages = ("onnx", "onnxscript")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"got no {' and no '.join(missing)}, which ONNX needs: pip install onnx onnxscript onnxruntime"
        )


def _about(network: Network, path: Extraction) -> dict[str, str]:
    """What a user of the exported network has to know, as text by name."""
    config = network.config
    return {
        "modality": path.modality,
        "pixels": path.pixels,
        "height": str(config.height),
        "width": str(config.width),
        "filter": config.filter,
        "test_sets": " ".join(network.reid_model.test_sets),
        "network": content_digest(network.state.model),
    }


def _images(network: Network, pixels: Pixels, count: int) -> Tensor:
    size = (count, 3, network.config.height, network.config.width)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    return images if pixels == "uint8" else normalize(images)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the exporters' own warnings, of which users can correct none."""
    exporter = logging.getLogger("torch.onnx")
    before = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(before)


def _program(path: Extraction, images: Tensor) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(path, (images,), dynamic_shapes=({0: batch},))


def _standard(program: ExportedProgram) -> ExportedProgram:
    """Take the block's operations apart into standard ones."""
    program = program.run_decompositions(internals.decompositions("mrcn_fast"))
    left = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("mrcn_fast.")}
    if left:
        raise ExportError(
            f"this torch ({torch.__version__}) doesn't take {', '.join(sorted(left))} apart; set "
            "MRCN_FAST_BACKEND=reference, which uses standard operations from the start"
        )
    return program


def _torch(program: ExportedProgram, about: dict[str, str]) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA: json.dumps(about)})
    run: Any = torch.export.load(io.BytesIO(content.getvalue())).module()
    return content.getvalue(), run


def _onnx(program: ExportedProgram, about: dict[str, str]) -> tuple[bytes, Callable[[Tensor], Tensor] | None]:
    made: Any = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"], output_names=["features"]
    )
    model = made.model_proto
    if strange := {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}:
        raise ExportError(
            f"torch's exporter made operators that are not ONNX's own: {', '.join(sorted(strange))}"
        )
    for name, value in about.items():
        model.metadata_props.add(key=name, value=value)
    content: bytes = model.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        log.warning("The exported network is not compared: onnxruntime is not installed")
        return content, None
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: torch.from_numpy(
        np.asarray(session.run(None, {"images": images.numpy()})[0])
    )


@torch.no_grad()
def _difference(run: Callable[[Tensor], Tensor], path: Extraction, images: Tensor) -> float:
    """The largest difference of the features. Raises ExportError above `TOLERANCE`."""
    found = float((run(images) - path(images)).abs().max())
    if not found <= TOLERANCE:  # nor NaN
        raise ExportError(
            f"the exported network's features differ from the network's by {found:.1e}, expected at most "
            f"{TOLERANCE:.0e}; nothing was written. Please report it with the versions of `mrcn-fast info`"
        )
    return found
