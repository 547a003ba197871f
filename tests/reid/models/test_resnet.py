"""The trunk: torchvision's key names and weights, and the paper's sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mrcn_fast.reid.models.resnet import Trunk, WeightsError

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def published_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """torchvision's state_dict of a ResNet, from the architecture's published description."""
    blocks, convolutions = {18: ((2, 2, 2, 2), 2), 50: ((3, 4, 6, 3), 3)}[depth]
    expansion = 1 if depth == 18 else 4
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}

    def batch_norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{part}": (channels,) for part in BATCH_NORM[:-1]})
        shapes[f"{name}.{BATCH_NORM[-1]}"] = ()

    batch_norm("bn1", 64)
    channels = 64
    for layer, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        for block in range(count):
            prefix = f"layer{layer}.{block}"
            sizes = [3, 3] if convolutions == 2 else [1, 3, 1]
            outputs = [width] * (convolutions - 1) + [width * expansion]
            into = channels
            for index, (size, out) in enumerate(zip(sizes, outputs, strict=True), start=1):
                shapes[f"{prefix}.conv{index}.weight"] = (out, into, size, size)
                batch_norm(f"{prefix}.bn{index}", out)
                into = out
            # A shortcut has weights where the size changes: in each layer but ResNet-18's first.
            if block == 0 and channels != width * expansion:
                shapes[f"{prefix}.downsample.0.weight"] = (width * expansion, channels, 1, 1)
                batch_norm(f"{prefix}.downsample.1", width * expansion)
            channels = width * expansion
    shapes["fc.weight"], shapes["fc.bias"] = (1000, channels), (1000,)
    return shapes


def published_weights(depth: int) -> dict[str, Tensor]:
    """A file's content in torchvision's format, random."""
    generator = torch.Generator().manual_seed(depth)
    return {
        name: torch.rand(shape, generator=generator) if shape else torch.tensor(1)
        for name, shape in published_shapes(depth).items()
    }


@pytest.mark.parametrize(("depth", "entries", "features"), [(18, 122, 512), (50, 320, 2048)])
def test_trunk_has_torchvisions_keys(depth: int, entries: int, features: int) -> None:
    expected = published_shapes(depth)
    assert len(expected) == entries
    trunk = Trunk(depth)
    state = {name: tuple(tensor.shape) for name, tensor in trunk.state_dict().items()}
    shared = {name: shape for name, shape in expected.items() if name.startswith("layer")}
    stem = {name: shape for name, shape in expected.items() if not name.startswith(("layer", "fc."))}
    assert {name: shape for name, shape in state.items() if name.startswith("layer")} == shared
    for modality in ("visible", "infrared"):
        own = {n.removeprefix(f"{modality}."): s for n, s in state.items() if n.startswith(f"{modality}.")}
        assert own == stem
    assert len(state) == entries - 2 + len(stem)
    assert trunk.channels[-1] == features


def test_stages_have_the_papers_sizes() -> None:
    trunk = Trunk(50).eval()
    with torch.inference_mode():
        x = trunk.stem(torch.rand(1, 3, 288, 128), "visible")
        sizes = [tuple(x.shape[1:])]
        for stage in range(1, 5):
            x = trunk.layers(x, stage, stage)
            sizes.append(tuple(x.shape[1:]))
    # 64 channels, 72 x 32 after the stem; the last stride is 1.
    assert sizes == [(64, 72, 32), (256, 72, 32), (512, 36, 16), (1024, 18, 8), (2048, 18, 8)]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_imagenet_weights_fill_trunk_and_both_stems(tmp_path: Path, suffix: str) -> None:
    weights = published_weights(18)
    path = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        from safetensors.torch import save_file

        save_file(weights, path)
    trunk = Trunk(18)
    trunk.load_imagenet(path)
    for name, tensor in trunk.state_dict().items():
        source = name.removeprefix("visible.").removeprefix("infrared.")
        assert torch.equal(tensor, weights[source]), name


def test_imagenet_weights_without_batch_counters_load(tmp_path: Path) -> None:
    weights = {k: v for k, v in published_weights(18).items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "old.pth")
    trunk = Trunk(18)
    trunk.load_imagenet(tmp_path / "old.pth")
    assert torch.equal(trunk.state_dict()["visible.bn1.running_var"], weights["bn1.running_var"])


def test_unfitting_weights_are_refused_by_key(tmp_path: Path) -> None:
    weights = published_weights(18)
    del weights["layer2.0.conv1.weight"]
    weights["head.weight"] = torch.rand(2, 2)
    weights["conv1.weight"] = torch.rand(64, 1, 7, 7)
    path = tmp_path / "odd.pth"
    torch.save(weights, path)
    trunk = Trunk(18)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        trunk.load_imagenet(path)
    for part in (
        str(path),
        "missing: layer2.0.conv1.weight",
        "not expected: head.weight",
        "conv1.weight: found",
    ):
        assert part in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())


def test_weights_of_another_depth_are_refused(tmp_path: Path) -> None:
    torch.save(published_weights(18), tmp_path / "resnet18.pth")
    with pytest.raises(WeightsError, match=r"expected the weights of a ResNet-50.*layer1\.0\.conv3") as error:
        Trunk(50).load_imagenet(tmp_path / "resnet18.pth")
    assert "These are the weights of a ResNet-18: give that depth" in str(error.value)


CONV = "layer1.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {CONV: torch.full((64, 64, 3, 3), torch.nan)},
            "expected finite weights, found NaN",
        ),
        ({CONV: torch.full((64, 64, 3, 3), torch.inf)}, f"found NaN or infinity in {CONV}"),
        ({CONV: torch.full((64, 64, 3, 3), 1e300, dtype=torch.float64)}, f"found NaN or infinity in {CONV}"),
        (
            {CONV: torch.zeros(64, 64, 3, 3, dtype=torch.int8)},
            f"weights, found torch.int8 in {CONV}",
        ),
        ({CONV: torch.zeros(64, 64, 3, 3, dtype=torch.complex64)}, "found torch.complex64"),
        ({CONV: torch.zeros(64, 64, 3, 3).to_sparse()}, "expected dense tensors"),
        ({CONV: torch.zeros(64, 64, 3, 3, device="meta")}, "expected dense tensors"),
        ({"bn1.running_var": torch.full((64,), -1.0)}, "found negative values in bn1.running_var"),
    ],
)
def test_weights_of_unfit_values_are_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    torch.save(published_weights(18) | change, tmp_path / "odd.pth")
    trunk = Trunk(18)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        trunk.load_imagenet(tmp_path / "odd.pth")
    assert str(tmp_path / "odd.pth") in str(error.value) and message in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())


def test_half_precision_and_unused_tensors_are_accepted(tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in published_weights(18).items()}
    weights["fc.weight"] = torch.full((3, 3), torch.nan)
    torch.save(weights, tmp_path / "half.pth")
    trunk = Trunk(18)
    trunk.load_imagenet(tmp_path / "half.pth")
    assert torch.equal(trunk.state_dict()[CONV], weights[CONV].float())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.model."])
def test_a_prefix_is_named(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "wrapped.pth"
    torch.save({prefix + name: tensor for name, tensor in published_weights(18).items()}, path)
    with pytest.raises(WeightsError) as error:
        Trunk(18).load_imagenet(path)
    assert f"Its keys begin with {prefix!r}" in str(error.value) and "depth" not in str(error.value)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(published_weights(18), tmp_path / "resnet18.pth")
    Trunk(18).load_imagenet("~/resnet18.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("page.safetensors", b"<html></html>", "a web page"),
        ("empty.pth", b"", "an empty file"),
        ("absent.pth", None, "no such file"),
        ("broken.pth", b"not a checkpoint", "can't be read"),
        ("broken.safetensors", b"not a checkpoint", "can't be read"),
    ],
)
def test_unreadable_weights_name_the_path(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as error:
        Trunk(18).load_imagenet(path)
    assert str(path) in str(error.value)


def test_a_checkpoint_in_place_of_weights_is_named(tmp_path: Path) -> None:
    torch.save({"model": published_weights(18), "epoch": 3}, tmp_path / "run.pth")
    with pytest.raises(WeightsError, match=r"expected a state_dict.*model, epoch: save 'model' of it alone"):
        Trunk(18).load_imagenet(tmp_path / "run.pth")
