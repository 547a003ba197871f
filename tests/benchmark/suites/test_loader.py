"""`bench loader`: every way gives the images, one as published code does, and the result is a line."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mrcn_fast import cli
from mrcn_fast.benchmark.suites import loader
from mrcn_fast.benchmark.suites.loader import LoaderConfig, PublishedImages, measure_loader
from mrcn_fast.reid.data import PersonImages, open_dataset
from mrcn_fast.reid.data.augment import normalize

SIZE = (48, 24)
WAYS = ["cold", "warm", "cached", "warm, augmented", "cached, augmented", "as published, augmented"]


def test_every_source_holds_the_same_images(tiny_tree: Path, tmp_path: Path) -> None:
    training = open_dataset("sysu-mm01", tiny_tree).training()
    sources, preparation = loader._sources(training, "sysu-mm01", SIZE, "lanczos", tmp_path)
    count = len(training.visible) + len(training.infrared)
    assert preparation["bytes"] == count * 3 * SIZE[0] * SIZE[1]
    for files, cache, published in zip(*sources, strict=True):
        assert isinstance(published, PublishedImages)
        for i in (0, len(files) - 1):  # type: ignore[arg-type]
            assert torch.equal(cache[i], files[i])
            assert torch.equal(torch.from_numpy(published.pixels[i]).permute(2, 0, 1), files[i])


def test_a_published_image_without_chance_is_a_normalized_image(tiny_tree: Path) -> None:
    samples = open_dataset("sysu-mm01", tiny_tree).training().visible[:2]
    images = PersonImages(samples, SIZE, filter="lanczos")
    pixels = np.stack([image.permute(1, 2, 0).numpy() for image in (images[0], images[1])])
    plain = PublishedImages(pixels, padding=0, flip=0, erase=0)[1]
    torch.testing.assert_close(plain, normalize(images[1][None])[0])
    mirrored = PublishedImages(pixels, padding=0, flip=1, erase=0)[1]
    assert torch.equal(mirrored, plain.flip(2))
    erased = PublishedImages(pixels, padding=0, flip=0, erase=1)[1]
    # Published code erases a rectangle of 2 to 40 % of the area.
    assert 0.015 < (erased == 0).all(dim=0).float().mean() < 0.45


def test_a_line_of_results(tiny_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "loader.jsonl"
    size = ["--height", str(SIZE[0]), "--width", str(SIZE[1])]
    words = ["bench", "loader", str(tiny_tree), *size, "--workers", "0", "1", "--seconds", "0"]
    assert cli.main([*words, "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {way} |" in printed for way in WAYS) and "| 0 workers | 1 workers |" in printed
    (line,) = map(json.loads, file.read_text().splitlines())
    assert {"commit", "cpu", "torch", "date", "cores", "augmentation"} <= set(line)
    assert line["images"] == [32, 16] and line["stretch"] == 32
    assert list(line["images_per_second"]) == ["0", "1"]
    for rates in line["images_per_second"].values():
        assert list(rates) == WAYS
        assert all(0 < low <= median <= high for low, median, high in rates.values())


def test_files_are_out_of_memory_when_the_system_says_so(tiny_tree: Path) -> None:
    paths = [sample.path for sample in open_dataset("sysu-mm01", tiny_tree).training().visible]
    loader._read(paths)
    before = loader._share_out_of_memory(paths)
    if before is None:
        pytest.skip("this system doesn't tell whether a file is in memory")
    words = ["stat", "--file-system", "--format=%T", str(paths[0])]
    kind = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        pytest.skip(f"the temporary folder is in memory ({kind})")
    assert before == 0
    # What a processor has set aside for the system's lists is not dropped before it is on them.
    for _ in range(50):
        loader._forget(paths)
        after = loader._share_out_of_memory(paths)
        if after is not None and after > 0.5:
            return
        time.sleep(0.1)
    raise AssertionError(f"{after} of the files are out of memory")


def test_fewer_images_than_a_batch_are_refused(tiny_regdb: Path) -> None:
    with pytest.raises(ValueError, match="got 8 training images of a modality, expected at least 16"):
        measure_loader(LoaderConfig(tiny_regdb))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_message_says_that_there_is_no_gpu(tiny_tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["loader", str(tiny_tree)], ["--loader", str(tiny_tree)], [f"--loader={tiny_tree}"]):
        assert cli.main(["bench", *words, "--device", "cuda"]) == 2
        assert "nothing to measure: --device cuda: there is no GPU here" in capsys.readouterr().err


def test_unreadable_images_are_left_out_where_asked_for(
    tiny_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = Path(shutil.copytree(tiny_tree, tmp_path / "tree"))
    training = open_dataset("sysu-mm01", tree).training()
    broken = training.visible[3].path
    broken.write_bytes(b"no image")
    words = ["bench", "loader", str(tree), "--height", "48", "--width", "24", "--workers", "0"]
    words += ["--seconds", "0", "--out", str(tmp_path / "loader.jsonl")]
    assert cli.main(words) == 2
    assert f"mrcn-fast: error: {broken}: expected a readable image" in capsys.readouterr().err
    assert cli.main([*words, "--skip-unreadable"]) == 0
    (line,) = map(json.loads, (tmp_path / "loader.jsonl").read_text().splitlines())
    assert line["images"] == [31, 16]
    for sample in training.infrared:
        sample.path.write_bytes(b"no image")
    assert cli.main([*words, "--skip-unreadable"]) == 2
    assert "no infrared image is left. Left out were" in capsys.readouterr().err
